"""Runs ``lingshu`` in forks of one process that has imported everything, or as whole processes; and disturbs them."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hook.fault_hook import install
from recording import ROOT

HOOK = Path(__file__).with_name("hook")
_LONGEST = 600.0
_POLL = 0.001


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that ended it; its output; and seconds of wall time."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def refused_well(self) -> str | None:
        """Say what is wrong with a refusal: it must be one line, the last, and exit code 2. None if nothing is."""
        if self.code != 2:
            return f"exit code {self.code}: {self.err[-300:]}"
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return f"traceback: {self.err[-300:]}"
        if len(self.errors) != 1 or self.err.splitlines()[-1] != self.errors[0]:
            return f"not one last line: {self.err[-300:]}"
        return None


@dataclass(frozen=True)
class Disturbance:
    """What happens to a process.

    Attributes
    ----------
    number
        The signal.
    after
        Seconds until it is sent; None where ``at`` says when.
    at
        Before which event under the working folder the process sends it to itself.
    """

    number: int
    after: float | None = None
    at: int | None = None


def import_everything() -> None:
    """Import what any command imports, so that a fork begins at once."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax  # noqa: F401
        import matplotlib.figure  # noqa: F401
        import pdex  # noqa: F401
        import scanpy  # noqa: F401
        import scib_metrics  # noqa: F401
        import sklearn.ensemble  # noqa: F401
        import torch
        import umap  # noqa: F401

        import lingshu_cell.calibrate
        import lingshu_cell.cli
        import lingshu_cell.evaluate_responses
        import lingshu_cell.export_vcc2026
        import lingshu_cell.model
        import lingshu_cell.prepare
        import lingshu_cell.schedule  # noqa: F401

    torch.set_num_threads(1)


def fork(
    words: Sequence[object],
    folder: Path,
    disturbance: Disturbance | None = None,
    prepare: Callable[[], None] = lambda: None,
    record: Path | None = None,
) -> Ended:
    """Run a command in a fork, in ``folder``, and wait for its end; ``prepare`` runs in the fork before it."""
    with started(words, folder, disturbance, prepare, record) as child:
        return child.wait()


class Child:
    """A forked command that runs."""

    def __init__(self, pid: int, files: tuple[Path, Path], disturbance: Disturbance | None) -> None:
        self.pid, self._files, self._disturbance, self._started = pid, files, disturbance, time.monotonic()
        self._ended: Ended | None = None

    def wait(self) -> Ended:
        """Wait for its end, and disturb it when the time has come."""
        sent = self._disturbance is None or self._disturbance.after is None
        while self._ended is None:
            seconds = time.monotonic() - self._started
            if not sent and seconds >= self._disturbance.after:
                os.kill(self.pid, self._disturbance.number)
                sent = True
            self._poll(seconds)
            time.sleep(_POLL)
            if seconds > _LONGEST:
                os.kill(self.pid, signal.SIGKILL)
                raise RuntimeError(f"a command hung for {seconds:.0f} s: {self._files[1].read_text()[-500:]}")
        return self._ended

    def wait_until_stopped(self) -> bool:
        """Wait until SIGSTOP stops it; False if it ended before."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self._take(status, time.monotonic() - self._started)
        return False

    def _poll(self, seconds: float) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._take(status, seconds)

    def _take(self, status: int, seconds: float) -> None:
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in self._files)
        self._ended = Ended(os.waitstatus_to_exitcode(status), out, err, seconds)

    def end(self) -> None:
        """Make sure that it has ended."""
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def started(
    words: Sequence[object],
    folder: Path,
    disturbance: Disturbance | None = None,
    prepare: Callable[[], None] = lambda: None,
    record: Path | None = None,
) -> Iterator[Child]:
    """Start a command in a fork; see :func:`fork`."""
    logs = folder.with_name(folder.name + ".logs")
    logs.mkdir(exist_ok=True)
    files = logs / f"{time.monotonic_ns()}.out", logs / f"{time.monotonic_ns()}.err"
    for file in files:
        file.touch()
    pid = os.fork()
    if not pid:
        _be_lingshu(words, folder, files, disturbance, prepare, record)
    child = Child(pid, files, disturbance)
    try:
        yield child
    finally:
        child.end()


def _be_lingshu(
    words: Sequence[object],
    folder: Path,
    files: tuple[Path, Path],
    disturbance: Disturbance | None,
    prepare: Callable[[], None],
    record: Path | None,
) -> None:
    """Become the command: own output, own folder, Python's own signals; and never come back."""
    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for descriptor, file in zip((1, 2), files, strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8") for n in (1, 2))
        os.chdir(folder)
        events: list[tuple[str, ...]] | None = None if record is None else []
        at, number = (None, 0) if disturbance is None else (disturbance.at, disturbance.number)
        if at is not None or events is not None:
            install(folder, at, number, events)
        prepare()
        from lingshu_cell.cli import main

        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except KeyboardInterrupt:
            code = 130
            sys.stderr.write("KeyboardInterrupt\n")
        if record is not None:
            record.write_text(json.dumps(events), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def whole_process(
    words: Sequence[object], folder: Path, disturbance: Disturbance | None = None, in_child: float = 0.0
) -> Ended:
    """Run a command as a user does, Python's start included; what it started has ended too when this returns.

    Parameters
    ----------
    words, folder, disturbance
        See :func:`fork`.
    in_child
        0 sends the signal to the command; otherwise which of the processes that it has started by then gets it, as a
        number up to 1.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT / "src")])}
    if disturbance is not None and disturbance.at is not None:
        environment["LINGSHU_FAULT"] = f"{folder}:{disturbance.at}:{disturbance.number}"
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lingshu_cell", *map(str, words)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(None if disturbance is None else disturbance.after)
    if process.poll() is None and disturbance is not None and disturbance.after is not None:
        children = _children(process.pid) if in_child else []
        if children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[min(int(in_child * len(children)), len(children) - 1)], disturbance.number)
        else:
            process.send_signal(disturbance.number)
    out, err = process.communicate(timeout=_LONGEST)
    while left := _working_in(folder):
        if time.monotonic() - begun > _LONGEST:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"processes lived on: {words}")
        time.sleep(0.1)
    return Ended(process.returncode, out, err, time.monotonic() - begun)


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _working_in(folder: Path) -> list[int]:
    """Processes whose working folder it is: those that a killed command left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "cwd") == str(folder.resolve()):
                    found.append(int(entry.name))
    return found


def small_files(n_bytes: int) -> Callable[[], None]:
    """Let no file of the fork grow past a size, as a full disk would."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return limit


def without_privileges() -> None:
    """Let root obey the rights of files like anyone else."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")
