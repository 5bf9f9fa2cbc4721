"""How many genes are revealed at each step: grids 0 = n_0 < n_1 < … < n_N = G of visible counts."""

import math
from collections.abc import Sequence

import numpy as np

from lingshu_cell.errors import LingshuError


def uniform_grid(n_genes: int, n_steps: int) -> np.ndarray:
    """Reveal the same number of genes at each step."""
    return _whole(np.linspace(0, n_genes, _checked(n_genes, n_steps) + 1))


def cosine_grid(n_genes: int, n_steps: int) -> np.ndarray:
    """Reveal few genes first: n_i = G (1 - cos(pi i / 2N)), MaskGIT's cosine (the paper names it without a formula)."""
    i = np.arange(_checked(n_genes, n_steps) + 1)
    return _whole(n_genes * (1 - np.cos(math.pi / 2 * i / n_steps)))


def geometric_grid(n_genes: int, n_steps: int) -> np.ndarray:
    """Reveal one gene, then multiply the visible count by a constant factor up to G."""
    if _checked(n_genes, n_steps) == 1:
        return np.array([0, n_genes])
    return _whole(np.concatenate([[0], n_genes ** (np.arange(n_steps) / (n_steps - 1))]))


GRIDS = {"uniform": uniform_grid, "cosine": cosine_grid, "geometric": geometric_grid}


def custom_grid(visible_counts: Sequence[int], n_genes: int) -> np.ndarray:
    """Check a grid given by the user: whole numbers that start at 0, rise strictly and end at G."""
    grid = np.asarray(visible_counts)
    rises = (
        grid.ndim == 1 and grid.size >= 2 and np.issubdtype(grid.dtype, np.integer) and bool((np.diff(grid) > 0).all())
    )
    if not rises or grid[0] != 0 or grid[-1] != n_genes:
        raise LingshuError(
            "A custom schedule must be visible counts that start at 0, rise strictly and end at the number of genes",
            f"{list(visible_counts)[:5]}… for {n_genes} genes",
            "Mend the list",
        )
    return grid.astype(np.int64)


def _checked(n_genes: int, n_steps: int) -> int:
    if not 1 <= n_steps <= n_genes:
        raise LingshuError(
            "The number of steps must lie between 1 and the number of genes",
            f"{n_steps} steps, {n_genes} genes",
            "Change --steps",
        )
    return n_steps


def _whole(grid: np.ndarray) -> np.ndarray:
    """Round to whole counts that rise by at least one per step, so that a grid of N steps has exactly N."""
    n_steps = len(grid) - 1
    whole = np.rint(grid).astype(np.int64)
    whole[-1] = n_genes = round(grid[-1])
    whole = np.maximum.accumulate(np.maximum(whole - np.arange(n_steps + 1), 0)) + np.arange(n_steps + 1)
    return np.minimum(whole, n_genes - np.arange(n_steps, -1, -1))
