"""The command ``lingshu``: one module of :mod:`lingshu_cell.commands` for each command.

Exit codes: 0 done; 2 a mistake in data, settings or arguments, or files that cannot be read or written; 130 stopped by
Ctrl-C; 143 stopped by SIGTERM; 1 anything else.
Results go to stdout, everything else to stderr.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: huge pages make a training step on CPUs much faster
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that spin cost several times the work

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lingshu_cell import __version__
from lingshu_cell.commands import (
    baseline,
    calibrate,
    config,
    de,
    demo,
    embeddings,
    evaluate,
    export,
    generate,
    genes,
    info,
    prepare,
    report,
    schedule,
    split,
    train,
)
from lingshu_cell.console import give, say, send_messages_to_stderr
from lingshu_cell.errors import (
    EXIT_CODE_INTERRUPTED,
    EXIT_CODE_TROUBLE,
    EXIT_CODE_USER_ERROR,
    LingshuError,
    and_behind,
    one_line,
    out_of_memory,
)
from lingshu_cell.launch import is_first, remember

# Torch, AnnData and scanpy are imported inside the commands, so that help is there at once.

EXIT_CODE_TERMINATED = 128 + signal.SIGTERM
_UsageProblem = typer.BadParameter.__mro__[2]  # ClickException: typer has its own copy of click, or not, by version
_WRONG_PATHS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO,
}  # fmt: skip


class _Stopped(Exception):
    """Ctrl-C outside of training, which handles it itself."""


class _Terminated(BaseException):
    """SIGTERM outside of training: unfinished files are removed on the way out, as after Ctrl-C."""


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped from None


def _examples(lines: Sequence[str]) -> str:
    """End a help text with command lines to copy."""
    return "\n\n".join(["[bold]Examples[/]", *(f"[cyan]{escape(line)}[/]" for line in lines)])


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learn the distribution of whole single-cell transcriptomes from raw counts, generate cells and their "
    "responses to perturbations, judge them.\n\nFirst try: [bold]lingshu demo[/]",
)
for _command in (
    train.train,
    generate.generate,
    evaluate.evaluate,
    report.report,
    schedule.schedule,
    info.info,
    demo.demo,
    split.split,
    calibrate.calibrate,
    baseline.baseline,
    de.de,
    embeddings.embeddings,
    genes.genes,
    prepare.prepare,
):
    app.command(epilog=_examples(sys.modules[_command.__module__].EXAMPLES))(_command)
app.command("config", epilog=_examples(config.EXAMPLES))(config.show_config)
_exports = typer.Typer(rich_markup_mode="rich", help="Write cells in the form that others ask for.")
_exports.command("vcc2026", epilog=_examples(export.EXAMPLES))(export.vcc2026)
app.add_typer(_exports, name="export")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        give(f"lingshu-cell {__version__}")
    elif context.invoked_subcommand is None:
        give(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; what goes wrong is one line on stderr."""
    send_messages_to_stderr()
    remember(arguments)
    handler: Any = None
    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(None if arguments is None else list(arguments), prog_name="lingshu", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, _Terminated) as error:
        line, code = _one_line(error)
        if line is None:
            raise
        if line:
            say(line)
        _forget_unwritten_output()
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def _forget_unwritten_output() -> None:
    """Where stdout cannot be written, do not let Python try again at the end, which would print a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _what_stopped(error: BaseException | None) -> BaseException | None:
    """Ctrl-C or SIGTERM behind an error: libraries in C that were at work make other errors of it, of damaged files."""
    for one in and_behind(error):
        if isinstance(one, (KeyboardInterrupt, _Stopped, _Terminated)):
            return one if isinstance(one, _Terminated) else _Stopped()
    return None


def _one_line(error: BaseException) -> tuple[str | None, int]:
    """What to say of an error and the exit code; None for a fault of this program, which deserves its traceback."""
    error = _what_stopped(error) or error
    if (ran_out := out_of_memory(error)) is not None:
        finding = " ".join(str(ran_out).split())[:200] or "it ran out"
        remedy = "Lower --minibatch-size or training.microbatch_size, use fewer cells, or a smaller network"
        return f"error: Memory must suffice: {finding}. {remedy}.", EXIT_CODE_TROUBLE
    if isinstance(error, LingshuError):
        says_it = error.process == int(os.environ.get("RANK", "0"))  # what all processes find wrong, the first says
        return f"error: {error}" if says_it else "", error.exit_code
    if isinstance(error, _UsageProblem):
        return f"error: {one_line(error.format_message())}. See lingshu --help.", EXIT_CODE_USER_ERROR
    if isinstance(error, (_Stopped, typer.Abort)):
        return "stopped by Ctrl-C" if is_first() else "", EXIT_CODE_INTERRUPTED
    if isinstance(error, _Terminated):
        return "stopped by SIGTERM" if is_first() else "", EXIT_CODE_TERMINATED
    text = " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):
        return "stopped: nobody reads the output", EXIT_CODE_TROUBLE
    if isinstance(error, OSError) and error.errno in _WRONG_PATHS:
        finding = f"{error.filename}: {error.strerror}" if error.filename else text
        wrong = LingshuError(
            "Files and folders must be there, and open to you", finding, "Check the path and the rights"
        )
        return f"error: {wrong}", EXIT_CODE_USER_ERROR
    if isinstance(error, OSError):
        return f"error: Files must be readable and the disk must have space: {text}.", EXIT_CODE_USER_ERROR
    return None, EXIT_CODE_TROUBLE
