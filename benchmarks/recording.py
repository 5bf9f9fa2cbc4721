"""What stands beside every measured number: the command, the machine and the versions; and memory, measured cleanly."""

import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = (
    "lingshu-cell", "torch", "numpy", "scipy", "pandas", "anndata", "scanpy", "scikit-learn", "scib-metrics", "jax",
    "umap-learn", "pydantic", "safetensors",
)  # fmt: skip


def peak_memory_gib() -> float:
    """Give the largest resident memory of this process so far, in GiB.

    ``VmHWM`` belongs to the program that runs now; ``getrusage`` also remembers the parent that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("this kernel does not report VmHWM")


def run_in_child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a fresh Python process, so that its peak memory is its own.

    Parameters
    ----------
    function
        Function of an importable module; returns a dict.
    arguments
        What it is called with; must be picklable.

    Returns
    -------
    dict
        The function's, and ``peak_memory_gib`` with the Python process and its libraries included.

    Raises
    ------
    RuntimeError
        If the child fails; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call_and_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    child.join()
    if result is None or child.exitcode:
        raise RuntimeError(f"{function.__name__} failed in its own process (exit code {child.exitcode})")
    return result


def _call_and_send(sender: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    result = function(*arguments)
    sender.send({**result, "peak_memory_gib": peak_memory_gib()})


def environment() -> dict[str, Any]:
    """Say with what and where a result was made; no paths, no host names."""
    facts: dict[str, Any] = {
        "command": command_line(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }
    return facts


def command_line() -> str:
    """Give the command that runs now, as it is typed in the repository's root; absolute paths keep their last part."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    words += [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    threads = os.environ.get("OMP_NUM_THREADS")
    return " ".join(([f"OMP_NUM_THREADS={threads}"] if threads else []) + ["python", *words])


def cpu_model() -> str:
    """Give the name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def write_result(name: str, about: str, facts: dict[str, Any], body: dict[str, Any], sections: Iterable[str]) -> Path:
    """Write ``benchmarks/results/NAME.json`` and ``NAME.md``.

    Parameters
    ----------
    name
        Name of both files.
    about
        One paragraph: what was done.
    facts
        What :func:`environment` gave at the start.
    body
        All numbers, JSON values.
    sections
        Parts of the page, e.g. from :func:`markdown_table`.

    Returns
    -------
    Path
        The page.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"name": name, "about": about, **facts, **body}
    text = json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    gpu = f" · {facts['gpu']}" if facts["gpu"] else ""
    machine = (
        f"{facts['date']} · commit {facts['commit']} · {facts['cpu']}, {facts['cores']} cores, "
        f"OMP_NUM_THREADS {facts['threads']}, load {facts['load_average_1_min']} at the start{gpu}"
    )
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items() if number)
    page = [f"# {name}", about, f"```bash\n{facts['command']}\n```", machine, *sections, f"Versions: {versions}."]
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay out a table; numbers get four significant digits, None a dash."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(show(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def show(value: Any) -> str:
    """Write a value for a table cell."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3e}" if value and not 1e-4 <= abs(value) < 1e5 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Give the seconds so far."""
        return time.perf_counter() - self._start


def say(text: str) -> None:
    """Tell the user what goes on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
