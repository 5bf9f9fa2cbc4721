"""The record of a training run: history.csv, TensorBoard on request, and the lock that keeps two runs apart."""

import contextlib
import csv
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingshu_cell.errors import LingshuError

COLUMNS = (
    "step", "loss", "validation_nelbo", "bits_per_gene", "learning_rate", "gradient_norm", "seconds",
    "condition_nelbo", "condition_r", "condition_slope", "condition_explained",
)  # fmt: skip
"""loss and nelbo in nats per cell; seconds since this process began to train; condition_* of validation conditions."""


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
        path = run / "history.csv"
        kept: list[dict[str, str]] = []
        if step and path.is_file():
            with open(path, newline="", encoding="utf-8") as stream:
                kept = [row for row in csv.DictReader(stream) if int(row["step"]) <= step]
        self._stream = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._writer = csv.DictWriter(self._stream, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._stream.flush()
        self._events = _events(run) if tensorboard else None

    def add(self, **row: Any) -> None:
        """Add a row; None leaves its cell empty."""
        self._writer.writerow({key: "" if value is None else value for key, value in row.items()})
        self._stream.flush()
        if self._events:
            for key, value in row.items():
                if value is not None and key != "step":
                    self._events.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
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
    descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LingshuError(
                "One run folder belongs to one training at a time", f"{run} is in use", "Wait, or change --out"
            ) from None
        yield
    finally:
        os.close(descriptor)
