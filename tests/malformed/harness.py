"""Try one malformed input in a process of its own: exit code, what was printed, seconds, memory; never a hang.

A worker process imports the package once and then forks for every case, so that a case costs milliseconds, has a limit
of address space and of time, and leaves nothing behind but its folder.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 20.0
"""CPU time that a case may take."""
WALL_SECONDS = 120.0
"""Until a case that waits for something is taken for hanging; other work on the machine must not make it so."""
MEMORY = 3 << 30
"""Address space that a case may take beyond what the worker has; libraries map some hundred MB by themselves."""
MOST_GROWTH_MIB = 600.0
"""Resident memory that a case may take; nothing in the catalogue is larger than a few MB on disk."""
_MOST_BYTES_WRITTEN = 1 << 30
_LONGEST_LINE = 2000
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"
PRELOADED = (
    "encodings.utf_8_sig",
    "torch", "anndata", "h5py", "zarr", "scipy.stats", "pandas", "pydantic", "safetensors.torch", "lingshu_cell.cli",
    "lingshu_cell.model", "lingshu_cell.prepare", "lingshu_cell.calibrate", "lingshu_cell.export_vcc2026",
    "lingshu_cell.check_vcc2026", "lingshu_cell.baselines", "lingshu_cell.data.loader",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One malformed input under a name that says what is wrong.

    Attributes
    ----------
    name
        ``kind: what is wrong``.
    kind
        What is malformed, e.g. ``h5ad``.
    expected
        ``refused``: exit code 2 and one line; ``accepted``: exit code 0; ``either`` only for random mutations.
    make
        Writes the input into the working directory, given the examples; returns the words of a command line, or a
        function to call in place of the command line.
    says
        Words that the error must hold.
    """

    name: str
    kind: str
    expected: str
    make: Callable[[Path], Sequence[str] | Callable[[], Any]]
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``code`` is None where it had to be killed; ``seconds`` of CPU time."""

    code: int | None
    out: str
    err: str
    seconds: float
    growth_mib: float
    executed: bool = False
    """Whether code in the input was run: it leaves a file EXECUTED behind."""

    def faults(self, case: Case) -> list[str]:
        """Say what is wrong with this outcome; nothing where the input was handled as it must be."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        faults = ["code in the input was executed"] if self.executed else []
        if self.code is None:
            return [f"no end after {self.seconds:.0f} s, or killed"]
        if "Traceback" in self.err:
            faults.append("a traceback")
        wanted = {REFUSED: (2,), ACCEPTED: (0,), EITHER: (0, 2)}[case.expected]
        if self.code not in wanted:
            faults.append(f"exit code {self.code}, not {' or '.join(map(str, wanted))}")
        if self.code == 2 and "Traceback" not in self.err:
            if len(errors) != 1 or self.err.splitlines()[-1] != errors[0]:
                faults.append("the last line of stderr is not the one line of an error")
            elif case.says and case.says.lower() not in errors[0].lower():
                faults.append(f"the error does not say {case.says!r}")
            elif len(errors[0]) > _LONGEST_LINE:
                faults.append(f"the line has {len(errors[0]):,} characters")
        if any(not (c.isprintable() or c in "\n\t") for c in self.err + self.out):
            faults.append("control characters were printed")
        if self.growth_mib > MOST_GROWTH_MIB:
            faults.append(f"it took {self.growth_mib:,.0f} MiB")
        return faults


class Worker:
    """The process that forks for every case; a context manager.

    Parameters
    ----------
    examples
        Folder of :func:`malformed.examples.write_examples`.
    """

    def __init__(self, examples: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "COLUMNS": "200"}
        command = [sys.executable, "-m", "malformed.harness", str(examples)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, name: str, folder: Path) -> Outcome:
        """Try a case of the catalogue (or ``mutation:KIND:SEED``) in an empty folder."""
        self._process.stdin.write(json.dumps({"name": name, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the worker has died")
        return Outcome(**json.loads(answer))


def _serve(examples: Path) -> None:
    """Answer requests, one line each."""
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    import torch

    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # its first use imports for seconds
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        outcome = _in_child(request["name"], Path(request["folder"]), examples)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


def _in_child(name: str, folder: Path, examples: Path) -> Outcome:
    out, err, facts = (folder / f".{what}" for what in ("out", "err", "facts"))
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        _become(name, folder, examples, out, err, facts)
    deadline = started + WALL_SECONDS
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(0.005)
    if not ended:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    told = json.loads(text) if facts.is_file() and (text := facts.read_text()) else {}
    printed = [file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "" for file in (out, err)]
    took = told.get("seconds", time.monotonic() - started)  # of one that was killed, wall time
    executed = (folder / "EXECUTED").exists()
    return Outcome(told.get("code"), *printed, took, told.get("growth_mib", 0.0), executed)


def _become(name: str, folder: Path, examples: Path, out: Path, err: Path, facts: Path) -> None:
    """Be the case: never returns."""
    from malformed.catalogue import find

    code: int | None = 70
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        told = open(facts, "w")  # noqa: SIM115 - now, as the case may give up its rights
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", errors=e, buffering=1, closefd=False)
                                  for n, e in ((1, "strict"), (2, "backslashreplace")))  # fmt: skip
        os.chdir(folder)
        work = find(name).make(examples)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _memory("VmHWM")
        limit = (_memory("VmSize") << 10) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + int(SECONDS) + 1, used + int(SECONDS) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES_WRITTEN, _MOST_BYTES_WRITTEN))
        started = time.process_time()
        code = _run(work)
        seconds = time.process_time() - started
        growth = max(_memory("VmHWM") - before, 0) / 1024
        json.dump({"code": code, "seconds": seconds, "growth_mib": growth}, told)
        told.close()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(work: Sequence[str] | Callable[[], Any]) -> int:
    """Run a command line, or a call of the Python interface as the command line would."""
    from lingshu_cell import cli
    from lingshu_cell.console import say
    from lingshu_cell.errors import LingshuError

    try:
        if not callable(work):
            cli.main([str(word) for word in work])
        else:
            work()
    except LingshuError as error:
        say(f"error: {error}")
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _memory(field: str) -> int:
    """A line of /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"this kernel does not report {field}")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
