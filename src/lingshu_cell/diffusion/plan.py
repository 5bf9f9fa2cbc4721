"""From a wish (steps or a KL budget, a schedule by name) to the grid that the sampler follows."""

from dataclasses import dataclass

import numpy as np

from lingshu_cell.diffusion.information import InformationCurve, optimal_grid, predicted_kl, steps_for
from lingshu_cell.diffusion.schedule import GRIDS, custom_grid
from lingshu_cell.errors import LingshuError

SCHEDULES = (*GRIDS, "optimal")


@dataclass(frozen=True, eq=False)
class Schedule:
    """How many genes are visible before and after each step.

    Attributes
    ----------
    name
        ``uniform``, ``cosine``, ``geometric``, ``optimal`` or ``custom``.
    grid
        Visible counts 0 = n_0 < … < n_N = G, int64.
    predicted_kl
        What it costs against one gene at a time, nats per cell; ``None`` where there is no information curve.
    """

    name: str
    grid: np.ndarray
    predicted_kl: float | None

    @property
    def steps(self) -> int:
        """N, network evaluations per cell."""
        return len(self.grid) - 1


def choose_schedule(
    n_genes: int, curve: InformationCurve | None, *, steps: int | str, schedule: str, max_kl: float
) -> Schedule:
    """Choose the grid of visible counts.

    Parameters
    ----------
    n_genes
        G.
    curve
        The information curve of the model, where it has one.
    steps
        N, 1 … G, or ``auto``: the fewest that are predicted to cost at most ``max_kl``.
    schedule
        One of :data:`SCHEDULES`; ``auto``: ``optimal`` with a curve, else ``geometric``; or a custom one: the visible
        counts between the steps, like ``1,10,100,1000``, which fixes the number of steps.
    max_kl
        Nats per cell, more than 0; only read with ``steps = auto``.

    Raises
    ------
    LingshuError
        On an unknown schedule, an impossible number of steps or budget, or a wish that needs a curve.
    """
    if isinstance(schedule, str) and schedule[:1].isdigit():
        return _custom(schedule, n_genes, curve)
    name = schedule if schedule != "auto" else "geometric" if curve is None else "optimal"
    if name not in SCHEDULES:
        raise LingshuError(
            "The schedule must exist",
            f"'{name}'",
            f"Choose one of {', '.join((*SCHEDULES, 'auto'))}, or counts like 1,10,100",
        )
    if steps != "auto" and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer))):
        raise LingshuError("The number of steps must be a whole number or auto", f"{steps!r}", "Change --steps")
    if not max_kl > 0:
        raise LingshuError("The KL budget must be more than 0 nats per cell", f"{max_kl:g}", "Change --max-kl")
    if curve is None and (isinstance(steps, str) or name == "optimal"):
        raise LingshuError(
            "An optimal schedule and automatic steps need the run's information curve",
            "none was measured",
            "Run lingshu schedule RUN --data DATA.h5ad, or give a number of steps and another schedule",
        )
    if isinstance(steps, str):
        steps = steps_for(curve, max_kl, GRIDS.get(name))
    grid = optimal_grid(curve, steps) if name == "optimal" else GRIDS[name](n_genes, steps)
    return Schedule(name, grid, None if curve is None else predicted_kl(grid, curve))


def _custom(text: str, n_genes: int, curve: InformationCurve | None) -> Schedule:
    try:
        between = [int(count) for count in text.split(",")]
    except ValueError:
        raise LingshuError(
            "A custom schedule must be whole visible counts", f"'{text}'", "Write for example 1,10,100,1000"
        ) from None
    grid = custom_grid([0, *between, n_genes], n_genes)
    return Schedule("custom", grid, None if curve is None else predicted_kl(grid, curve))
