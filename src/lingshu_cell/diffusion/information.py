r"""The information curve of a model, and the schedules that follow from it.

h(n) is the mean cross-entropy of one hidden gene when n genes, drawn uniformly, are visible. A step of the sampler from
n_i to n_{i+1} visible genes draws all its genes at h(n_i), where one gene at a time would pay h(n_i), h(n_i + 1), …
Averaged over the random order of the genes, a grid therefore costs

.. math::

    \mathrm{KL}(\mathrm{grid}) = \sum_i \sum_{n=n_i}^{n_{i+1}-1} \bigl(h(n_i) - h(n)\bigr)

nats per cell, the left Riemann-sum error of the curve (arXiv 2511.04647, 2510.25544). For the exact denoiser this is
the KL divergence of (order, cell) from data to sampler, an upper bound on that of the cells alone; for any denoiser it
is the held-out likelihood lost against revealing one gene at a time with the same network.

Shapes: B cells, G genes, K knots of the curve, or candidates of a grid.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingshu_cell.diffusion.randomness import reveal_ranks
from lingshu_cell.diffusion.schedule import custom_grid
from lingshu_cell.errors import LingshuError
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoise
from lingshu_cell.tokens import MASK_TOKEN

MOST_STEPS = 1024
"""Largest step budget that :func:`steps_for` considers."""

_CANDIDATES = 4 * MOST_STEPS  # visible counts between which the best grid chooses; all of them where there are no more


@dataclass(frozen=True)
class InformationCurve:
    """h(n) at some visible counts.

    Attributes
    ----------
    n_genes
        G.
    visible
        Visible counts of the knots, rising from 0 to G - 1.
    nats
        h at the knots, nats per hidden gene, as measured.
    standard_error
        Of the information gained, h(0) - h(n); over cells, which share much of what varies in h itself.
    n_cells
        Cells it was measured on.
    """

    n_genes: int
    visible: tuple[int, ...]
    nats: tuple[float, ...]
    standard_error: tuple[float, ...]
    n_cells: int

    @cached_property
    def everywhere(self) -> np.ndarray:
        """h(n) for n = 0 … G - 1, float64: made non-increasing, as it is in truth, then linear in log(1 + n)."""
        visible = np.array(self.visible)
        # a knot is a mean over the genes that are hidden there, hence the weights
        level = non_increasing(np.array(self.nats), self.n_genes - visible)
        return np.interp(np.log1p(np.arange(self.n_genes)), np.log1p(visible), level)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "InformationCurve":
        """Read what :meth:`to_json` gave.

        Raises
        ------
        LingshuError
            If the values are no curve.
        """
        try:
            curve = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
            visible, numbers = np.array(curve.visible), np.array([curve.nats, curve.standard_error], dtype=float)
            whole = numbers.shape[1:] == visible.shape and visible[0] == 0 and visible[-1] == curve.n_genes - 1
            whole = whole and (np.diff(visible) > 0).all() and np.isfinite(numbers).all()
        except (TypeError, ValueError, IndexError):
            whole = False
        if not whole:
            raise LingshuError(
                "An information curve has h at visible counts from 0 to one less than the genes",
                f"found {str(values)[:80]}",
                "Measure it again with lingshu schedule RUN --data DATA.h5ad",
            )
        return curve


def knots(n_genes: int, n_knots: int = 24) -> np.ndarray:
    """Visible counts at which to measure: 0, 1, log-spaced to .95 G, and G - 1; rising int64, at most ``n_knots``."""
    inner = np.geomspace(1, max(0.95 * n_genes, 1), n_knots - 2)
    return np.unique(np.concatenate([[0], np.rint(inner), [n_genes - 1]]).astype(np.int64).clip(0, n_genes - 1))


@torch.no_grad()
def measure_curve(
    denoise: Denoise,
    minibatches: Iterable[tuple[Tensor, Conditions | Tensor]],
    visible: np.ndarray,
    generator: torch.Generator,
    most_cells: int | None = None,
) -> InformationCurve:
    """Measure h(n) on cells the network has not seen, in one evaluation per cell and knot.

    Every cell reveals its genes in one random order, so that the visible sets of the knots are nested, and the curve
    is summed from its differences: the genes still hidden at a knot are scored at this knot and at the one before.
    Both ends of a difference see the same genes of the same cell, which removes most of the noise.

    Parameters
    ----------
    denoise
        The network.
    minibatches
        Pairs of whole cells ``x_0_BG`` (``MASK_TOKEN`` where a gene was not measured) and ``conditions``.
    visible
        Visible counts of the knots, see :func:`knots`.
    generator
        Source of the orders, on the device of the cells.
    most_cells
        Cells evaluated at once; whole minibatches when not given. Orders do not depend on it.
    """
    curves, n_genes = [], 0
    for x_0_BG, conditions in minibatches:
        n_genes = x_0_BG.shape[1]
        order_BG = torch.rand(x_0_BG.shape, generator=generator, device=x_0_BG.device)
        step = most_cells or len(x_0_BG)
        for part in (slice(start, start + step) for start in range(0, len(x_0_BG), step)):
            told = Conditions.of(conditions).rows(part)
            curve_BK = _cell_curves(denoise, x_0_BG[part], told, visible, order_BG[part])
            curves.append(curve_BK.double().cpu().numpy())
    nats_NK = np.concatenate(curves)
    spread_K = (nats_NK - nats_NK[:, :1]).std(0, ddof=1) if len(nats_NK) > 1 else np.zeros(len(visible))
    return InformationCurve(
        n_genes=n_genes,
        visible=tuple(int(n) for n in visible),
        nats=tuple(nats_NK.mean(0).tolist()),
        standard_error=tuple((spread_K / len(nats_NK) ** 0.5).tolist()),
        n_cells=len(nats_NK),
    )


def _cell_curves(
    denoise: Denoise, x_0_BG: Tensor, conditions: Conditions, visible: np.ndarray, order_BG: Tensor
) -> Tensor:
    """Each cell's own estimate of h at the knots, B × K."""
    measured_BG = x_0_BG != MASK_TOKEN
    n_measured_B1 = measured_BG.sum(1, keepdim=True)
    rank_BG = reveal_ranks(order_BG, measured_BG)
    h_B, curve, before = torch.zeros(len(x_0_BG), device=x_0_BG.device), [], None
    for n in visible.tolist():
        # a cell with unmeasured genes sees the same share of those it has
        edge_B1 = torch.round(n / x_0_BG.shape[1] * n_measured_B1.double()).long().clamp_max(n_measured_B1 - 1)
        hidden_BG = measured_BG & (rank_BG >= edge_B1)
        n_hidden_B = hidden_BG.sum(1).clamp_min(1)
        here = denoise(torch.where(hidden_BG, MASK_TOKEN, x_0_BG), conditions)
        h_B = h_B + here.nll(x_0_BG, hidden_BG) / n_hidden_B
        if before is not None:
            h_B = h_B - before.nll(x_0_BG, hidden_BG) / n_hidden_B
        before = here
        curve.append(h_B)
    return torch.stack(curve, dim=1)


def predicted_kl(grid: np.ndarray, curve: InformationCurve) -> float:
    """Nats per cell that a grid costs against revealing one gene at a time, see the formula of this file.

    Parameters
    ----------
    grid
        Visible counts 0 = n_0 < … < n_N = G.
    curve
        The curve of the model.

    Raises
    ------
    LingshuError
        If the grid is none for G genes.
    """
    grid, h_G = custom_grid(grid, curve.n_genes), curve.everywhere
    return max(0.0, float(np.diff(grid) @ h_G[grid[:-1]] - h_G.sum()))  # rounding may fall below


def optimal_grid(curve: InformationCurve, n_steps: int) -> np.ndarray:
    """Give the grid of ``n_steps`` steps with the least predicted KL, by dynamic programming.

    Exact among grids of 4,096 log-spaced visible counts; with no more genes than that, among all grids.

    Parameters
    ----------
    curve
        The curve of the model.
    n_steps
        N, 1 … G.

    Returns
    -------
    numpy.ndarray
        Visible counts 0 = n_0 < … < n_N = G, int64.

    Raises
    ------
    LingshuError
        If the number of steps is not possible.
    """
    if not 1 <= n_steps <= curve.n_genes:
        raise LingshuError(
            "The number of steps must lie between 1 and the number of genes",
            f"{n_steps} steps, {curve.n_genes} genes",
            "Change --steps",
        )
    count_K = _candidates(curve.n_genes, max(_CANDIDATES, 4 * n_steps))
    sweeps = _least_kl(count_K, curve.everywhere)
    previous = [next(sweeps)[1] for _ in range(n_steps)]
    at = [len(count_K) - 1]
    for previous_K in reversed(previous):
        at.append(int(previous_K[at[-1]]))
    return count_K[at[::-1]]


def steps_for(curve: InformationCurve, max_kl: float, make_grid: Callable[[int, int], np.ndarray] | None = None) -> int:
    """Give the least number of steps that is predicted to cost at most ``max_kl`` nats per cell.

    Parameters
    ----------
    curve
        The curve of the model.
    max_kl
        The budget, 0 or more.
    make_grid
        One of :data:`lingshu_cell.diffusion.schedule.GRIDS`; the optimal grids when not given.

    Raises
    ------
    LingshuError
        If :data:`MOST_STEPS` are not enough.
    """
    most = min(MOST_STEPS, curve.n_genes)
    if make_grid is None:
        sweeps = _least_kl(_candidates(curve.n_genes, _CANDIDATES), curve.everywhere)
        costs: Iterator[float] = (float(kl_K[-1]) for kl_K, _ in sweeps)
    else:
        costs = (predicted_kl(make_grid(curve.n_genes, n), curve) for n in range(1, most + 1))
    for n_steps, kl in zip(range(1, most + 1), costs, strict=False):
        if kl <= max_kl + 1e-9:  # rounding of sums over thousands of genes
            return n_steps
    raise LingshuError(
        f"The KL budget must be within reach of {most} steps",
        f"{max_kl:g} nats per cell asked for, {most} steps cost {kl:.3g}",
        "Raise --max-kl or give --steps",
    )


def non_increasing(value_K: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Give the nearest non-increasing sequence in weighted least squares, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(value_K.tolist(), weight_K.tolist(), strict=True):
        length = 1
        while pools and pools[-1][0] < value:
            mean, other, n = pools.pop()
            value, weight, length = (mean * other + value * weight) / (other + weight), other + weight, length + n
        pools.append((value, weight, length))
    return np.repeat([mean for mean, _, _ in pools], [n for _, _, n in pools])


def _candidates(n_genes: int, n_candidates: int) -> np.ndarray:
    """0, then log-spaced counts up to G, int64; all counts where that is no more than asked for."""
    if n_genes <= n_candidates:
        return np.arange(n_genes + 1)
    return np.unique(np.concatenate([[0], np.rint(np.geomspace(1, n_genes, n_candidates)).astype(np.int64)]))


def _least_kl(count_K: np.ndarray, h_G: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For N = 1, 2, …: the least KL of N steps from nothing up to each candidate, and the candidate before it."""
    cumulative_K = np.concatenate([[0.0], np.cumsum(h_G)])[count_K]
    h_K = np.append(h_G, 0.0)[count_K]  # from the last candidate no step goes on
    least_K = np.where(count_K == 0, 0.0, np.inf)
    while True:

        def kl(i: np.ndarray, j: np.ndarray, least_K: np.ndarray = least_K) -> np.ndarray:
            step = (count_K[j] - count_K[i]) * h_K[i] - (cumulative_K[j] - cumulative_K[i])
            return np.where(i < j, least_K[i] + step, np.inf)

        least_K, previous_K = _row_minima(kl, len(count_K))
        yield least_K, previous_K


def _row_minima(cost: Callable[[np.ndarray, np.ndarray], np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Least ``cost(i, j)`` over i, and the least such i, for each j = 0 … n - 1, in O(n log n) evaluations.

    As h falls, (d - c)(h(a) - h(b)) ≥ 0 for a ≤ b and c ≤ d: the cost is a Monge array, the best i never decreases with
    j, and the middle j of a range splits the search of both halves (divide and conquer, all ranges of a level at once).
    """
    least, where = np.full(n, np.inf), np.zeros(n, dtype=np.int64)
    j_low, j_high, i_low, i_high = (np.array([v]) for v in (0, n, 0, n - 1))
    while len(j_low):
        middle = (j_low + j_high) // 2
        width = i_high - i_low + 1
        start = np.cumsum(width) - width
        i = np.arange(width.sum()) + np.repeat(i_low - start, width)
        values = cost(i, np.repeat(middle, width))
        least[middle] = np.minimum.reduceat(values, start)
        is_least = values == np.repeat(least[middle], width)
        where[middle] = best = np.minimum.reduceat(np.where(is_least, i, n), start)
        j_low, j_high = np.concatenate([j_low, middle + 1]), np.concatenate([middle, j_high])
        i_low, i_high = np.concatenate([i_low, best]), np.concatenate([best, i_high])
        some = j_low < j_high
        j_low, j_high, i_low, i_high = j_low[some], j_high[some], i_low[some], i_high[some]
    return least, where
