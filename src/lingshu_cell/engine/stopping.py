"""Ctrl-C and SIGTERM as a request to stop after this step; and a loss that must stay finite."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from lingshu_cell.errors import LingshuError

_DIVERGED = 3.0  # times the first loss


@contextlib.contextmanager
def stop_signals(several: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; a second one stops at once.

    One of ``several`` processes may get a signal twice, from the terminal and from what started it: there only the
    first counts, as what started it kills those that do not end in time. If that is gone itself, they stop as well.
    """
    asked: list[int] = []
    handlers: dict[int, Any] = {}
    parent = os.getppid()

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if not several:
            signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            handlers[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked) or (several and os.getppid() != parent)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Losses:
    """The smoothed loss of a run; one loss alone may be huge, as 1/t has no finite variance.

    Parameters
    ----------
    first, smooth
        Of the run so far.
    """

    def __init__(self, first: float | None = None, smooth: float | None = None) -> None:
        self.first, self.smooth = first, smooth

    def take_in(self, loss: float, norm: float, step: int, saved_step: int | None) -> None:
        """Smooth, and stop on NaN or divergence.

        Raises
        ------
        LingshuError
            If loss or gradient norm are not finite, or the smoothed loss is far above the first.
        """
        self.first = loss if self.first is None else self.first
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and self.smooth < _DIVERGED * max(self.first, 1.0):
            return
        saved = "No checkpoint was saved" if saved_step is None else f"The checkpoint of step {saved_step} is whole"
        raise LingshuError(
            "Training must stay finite",
            f"at step {step} the loss is {loss:.4g} nats per cell and the gradient norm {norm:.4g}",
            f"{saved}; lower training.peak_learning_rate and start again",
        )
