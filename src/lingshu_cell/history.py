"""The record of a training run: history.csv, TensorBoard on request, and the lock that keeps two runs apart."""

import contextlib
import csv
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import locked, writable, write_text

COLUMNS = (
    "step", "loss", "validation_nelbo", "bits_per_gene", "learning_rate", "gradient_norm", "seconds",
    "condition_nelbo", "condition_r", "condition_slope", "condition_explained",
)  # fmt: skip
"""loss and nelbo in nats per cell; seconds since this process began to train; condition_* of validation conditions."""

_RULE = "The run folder must be writable"
_REMEDY = "Free some space or check the rights, then go on with --resume"


class RunTable:
    """A table that grows with a run; rows after the step of resumption are dropped, as they will come again.

    What a full disk or a damage left broken is dropped too, and told.

    Parameters
    ----------
    path
        A CSV file.
    columns
        Its columns, of which ``step`` is the first.
    step
        Step the run goes on from; 0 starts a new table.
    texts
        Which columns hold texts; all others hold numbers or nothing.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int, texts: Sequence[str] = ()) -> None:
        self.path, self._columns = path, tuple(columns)
        self._numbers = [i for i, name in enumerate(columns) if name not in texts]
        kept = self._kept(step) if step and path.is_file() else []
        with writable(_RULE, path, _REMEDY):
            write_text(path, _csv([self._columns, *kept]))

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Add rows; what is ``None`` or not given stays empty."""
        lines = [["" if row.get(name) is None else row[name] for name in self._columns] for row in rows]
        with writable(_RULE, self.path, _REMEDY), open(self.path, "a", newline="", encoding="utf-8") as stream:
            stream.write(_csv(lines))

    def _kept(self, step: int) -> list[list[str]]:
        with open(self.path, newline="", encoding="utf-8", errors="replace") as stream:
            try:
                rows = list(csv.reader(stream))[1:]
            except csv.Error:
                rows = [[]]
        whole = [row for row in rows if self._is_whole(row)]
        if len(whole) < len(rows):
            warnings.warn(f"{self.path}: {len(rows) - len(whole)} broken rows were left out", stacklevel=2)
        return [row for row in whole if int(row[0]) <= step]

    def _is_whole(self, row: list[str]) -> bool:
        try:
            int(row[0])
            return len(row) == len(self._columns) and all(math.isfinite(float(row[i] or 0)) for i in self._numbers)
        except (ValueError, IndexError):
            return False


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


class History:
    """The table history.csv of a run, and TensorBoard's events.

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
        self._table = RunTable(run / "history.csv", COLUMNS, step)
        self._events = _events(run) if tensorboard else None

    def add(self, **row: Any) -> None:
        """Add a row; None leaves its cell empty."""
        self._table.add(row)
        if self._events:
            for key, value in row.items():
                if value is not None and key != "step":
                    self._events.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Close what is open."""
        if self._events:
            self._events.close()


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
