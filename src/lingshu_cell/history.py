"""The record of a training run: history.csv, TensorBoard on request, and the lock that keeps two runs apart."""

import contextlib
import csv
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import locked, writable, write_text

COLUMNS = ("step", "loss", "validation_nelbo", "bits_per_gene", "learning_rate", "gradient_norm", "seconds")
"""loss and validation_nelbo in nats per cell; seconds since this process began to train."""

_RULE = "The run folder must be writable"
_REMEDY = "Free some space or check the rights, then go on with --resume"


class History:
    """Append-only table of a run; rows after the step of resumption are dropped, as they will come again.

    Parameters
    ----------
    run
        Folder of the run.
    step
        Step the run goes on from; 0 starts a new table.
    tensorboard
        Also write TensorBoard events to ``RUN/tensorboard``.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        self._path = path = run / "history.csv"
        kept = _whole_rows(path, step) if step and path.is_file() else []
        text = io.StringIO(newline="")
        csv.writer(text).writerows([COLUMNS, *kept])
        with writable(_RULE, path, _REMEDY):
            write_text(path, text.getvalue())
            self._stream = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._writer = csv.DictWriter(self._stream, COLUMNS)
        self._events = _events(run) if tensorboard else None

    def add(self, **row: Any) -> None:
        """Add a row; None leaves its cell empty."""
        with writable(_RULE, self._path, _REMEDY):
            self._writer.writerow({key: "" if value is None else value for key, value in row.items()})
            self._stream.flush()
        if self._events:
            for key, value in row.items():
                if value is not None and key != "step":
                    self._events.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # what could not be written was said
            self._stream.close()
        if self._events:
            self._events.close()


def _whole_rows(path: Path, step: int) -> list[list[str]]:
    """Read the rows up to a step; of what a full disk or a damage left broken, say so and go on without it."""
    with open(path, newline="", encoding="utf-8", errors="replace") as stream:
        lines = stream.read().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    whole = [row for row in rows if _is_whole(row)]
    if len(whole) < len(rows):
        warnings.warn(f"{path}: {len(rows) - len(whole)} broken rows were left out", stacklevel=2)
    return [row for row in whole if int(row[0]) <= step]


def _is_whole(row: list[str]) -> bool:
    try:
        int(row[0])
        return len(row) == len(COLUMNS) and all(math.isfinite(float(value or 0)) for value in row)
    except ValueError:
        return False


def _events(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LingshuError(
            "training.tensorboard needs TensorBoard", "it is not installed", "pip install 'lingshu-cell[tensorboard]'"
        ) from None
    return SummaryWriter(run / "tensorboard")


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock goes with the process, however it ends."""
    rule = "One run folder belongs to one training at a time"
    with contextlib.ExitStack() as held:
        with writable(_RULE, run, "Check the rights, or change --out"):
            held.enter_context(locked(run, rule, f"{run} is in use", "Wait, or change --out"))
        yield
