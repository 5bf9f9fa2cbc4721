"""What a terminal shows: progress and notes on stderr, results on stdout, settings as TOML, metrics as a table."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lingshu_cell.config import Config
from lingshu_cell.errors import printable

if TYPE_CHECKING:
    from lingshu_cell.train import Progress as TrainingProgress

_LEAST_WIDTH = 100  # of tables that go to a file or a pipe
_MARK_STYLE = {"good": "green", "close": "yellow", "off": "red"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def say(text: str) -> None:
    """Print a line to stderr."""
    Console(stderr=True, soft_wrap=True).print(printable(text), markup=False, highlight=False)


def give(text: str) -> None:
    """Print a result to stdout."""
    Console(soft_wrap=True).print(printable(text), markup=False, highlight=False)


def give_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout; a number that is not finite becomes null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))  # a file name may be no Unicode: \udcff is JSON


def clock(seconds: float) -> str:
    """Write a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def send_messages_to_stderr() -> None:
    """Show what the package logs, and every warning, as one line on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lingshu_cell")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    warnings.showwarning = lambda message, category, *where: say(f"warning: {' '.join(str(message).split())}")


@contextmanager
def training_bar() -> Iterator[Callable[["TrainingProgress"], None]]:
    """Show loss, validation NELBO, cells/s and time left while the block runs: a bar, or lines where no terminal is.

    Yields
    ------
    Callable
        To be called after each optimiser step.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_at_validation()
        return
    columns = (
        TextColumn("train"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=None, now="")

        def show(progress: "TrainingProgress") -> None:
            bar.update(task, completed=progress.step, total=progress.steps, now=_training_line(progress))

        yield show


def _print_at_validation() -> Callable[["TrainingProgress"], None]:
    last: list[float | None] = [None]

    def show(progress: "TrainingProgress") -> None:
        if progress.validation_nelbo != last[0] or progress.step == progress.steps:
            last[0] = progress.validation_nelbo
            say(f"step {progress.step} of {progress.steps} · {_training_line(progress)}")

    return show


def _training_line(progress: "TrainingProgress") -> str:
    nelbo = "–" if progress.validation_nelbo is None else f"{progress.validation_nelbo:,.1f}"
    return (
        f"loss {progress.loss:,.1f} · validation {nelbo} nats/cell · {progress.cells_per_second:,.0f} cells/s · "
        f"{clock(progress.seconds_left)} left"
    )


@contextmanager
def cells_bar(n_cells: int) -> Iterator[Callable[[int], None]]:
    """Show how many cells are generated while the block runs, on a terminal only.

    Yields
    ------
    Callable
        To be called with the number of cells done.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("generate"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("cells ·"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("generate", total=n_cells)
        yield lambda n_done: bar.update(task, completed=n_done)


def give_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the metric table to stdout: value, real against real, shuffled floor, and the mark of the report's rule."""
    from lingshu_cell.judgement import judge, number

    console = Console()
    console = console if console.is_terminal else Console(width=_LEAST_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (
        ("metric", "left"),
        ("generated", "right"),
        ("real vs real", "right"),
        ("shuffled", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)
    table.add_column("mark", no_wrap=True)
    for row in judge(metrics):
        mark = f"[{_MARK_STYLE[row.mark]}]{row.mark}[/]" if row.mark else "–"
        table.add_row(row.name, number(row.value), number(row.real_vs_real), number(row.shuffled), mark)
    console.print(table)


def give_responses(found: Mapping[str, Any]) -> None:
    """Print the summary of an evaluation of responses to stdout: means over conditions beside what real cells reach."""
    from lingshu_cell.judgement import number

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("metric, mean over conditions", "left"), ("predicted", "right"), ("real cells", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, entry in found["summary"].items():
        table.add_row(name, number(entry.get("mean")), number(entry.get("ceiling_mean")))
        if "pooled" in entry:
            table.add_row(f"{name}, pooled", number(entry["pooled"]), number(entry.get("ceiling_pooled")))
    console = Console()
    (console if console.is_terminal else Console(width=_LEAST_WIDTH)).print(table)
    for note in found["notes"]:
        say(note)


def give_schedules(table: Mapping[int, Mapping[str, float]]) -> None:
    """Print predicted KL to stdout: a row for each number of steps, a column for each schedule."""
    shown = Table(box=None, pad_edge=False, header_style="bold", title="predicted KL, nats per cell")
    shown.add_column("steps", justify="right")
    for name in next(iter(table.values())):
        shown.add_column(name, justify="right", min_width=9)
    for n_steps, row in table.items():
        shown.add_row(f"{n_steps:,}", *(f"{kl:,.3g}" if kl < 999 else f"{kl:,.0f}" for kl in row.values()))
    Console().print(shown)


def settings_toml(config: Config) -> str:
    """Write a whole configuration as TOML, each setting under its description and range.

    Parameters
    ----------
    config
        Any configuration.

    Returns
    -------
    str
        Text that ``--config`` reads back to the same configuration.
    """
    lines = [f"preset = {json.dumps(config.preset)}"]
    for section in ("data", "network", "training", "generation"):
        values: BaseModel = getattr(config, section)
        lines += ["", f"# {' '.join((type(values).__doc__ or '').split())}", f"[{section}]"]
        for key, field in type(values).model_fields.items():
            value = getattr(values, key)
            bounds = choices_of(type(values), key) or _range_of(field)
            if field.description:
                lines.append(f"# {field.description}{f' ({bounds})' if bounds else ''}")
            if value is None or (key == "condition_keys" and key not in values.model_fields_set):
                lines.append(f"# {key} is not set" + ("" if value is None else ": cell_type, if every cell has one"))
            else:
                lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines)


def choices_of(section: type[BaseModel], key: str) -> str:
    """Name the values that a setting chooses from, as in ``"fp32 or bf16"``; empty where it takes others too."""
    choices = getattr(section.model_fields[key].annotation, "__args__", ())
    return " or ".join(choices) if all(isinstance(choice, str) for choice in choices) else ""


def _range_of(field: Any) -> str:
    """Bounds of a setting in words."""
    bounds = {
        sign: getattr(rule, name) for rule in field.metadata for name, sign in _BOUNDS.items() if hasattr(rule, name)
    }
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds.items())


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
