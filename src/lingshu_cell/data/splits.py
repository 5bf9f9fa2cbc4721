"""Which cells train a model and which are held out, from one seed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError


def split_cells(
    n_cells: int, validation_fraction: float, seed: int, strata: Sequence[object] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide cells at random into training and validation cells.

    Parameters
    ----------
    n_cells
        Number of cells, 2 or more.
    validation_fraction
        Share of the cells to hold out, between 0 and 1; the number is rounded.
    seed
        Seed of the shuffle; the same seed gives the same cells on every machine.
    strata
        One label per cell; every stratum then gives its share, to within one cell, but never its last cell, so each
        label is seen in training. Labels that are single cells may make the held-out set a little smaller than asked.

    Returns
    -------
    tuple of np.ndarray
        Training and validation indices, int64, sorted, disjoint, together 0 … n_cells − 1.

    Raises
    ------
    LingshuError
        If the fraction is not between 0 and 1, if either side would be empty, or if a stratum label is missing.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise LingshuError(
            "The validation fraction must lie between 0 and 1", f"got {validation_fraction}", "Choose e.g. 0.1"
        )
    n_validation = round(n_cells * validation_fraction)
    codes = np.zeros(n_cells, dtype=np.int64) if strata is None else _stratum_codes(strata, n_cells)
    quota = _quotas(np.bincount(codes, minlength=1), validation_fraction, n_validation, keep=int(strata is not None))
    if not 0 < quota.sum() < n_cells:
        raise LingshuError(
            "Training and validation both need cells",
            f"{validation_fraction} of {n_cells} cells leaves {n_cells - quota.sum()} and {quota.sum()}",
            "Use more cells, another fraction, or no strata",
        )
    shuffled = np.random.default_rng(seed).permutation(n_cells)
    by_stratum = shuffled[np.argsort(codes[shuffled], kind="stable")]
    rank = np.arange(n_cells) - np.searchsorted(codes[by_stratum], codes[by_stratum])
    held_out = rank < quota[codes[by_stratum]]
    return np.sort(by_stratum[~held_out]), np.sort(by_stratum[held_out])


def _stratum_codes(strata: Sequence[object] | np.ndarray, n_cells: int) -> np.ndarray:
    if len(strata) != n_cells:
        raise LingshuError(
            "Strata need one label per cell", f"{len(strata)} labels for {n_cells} cells", "Pass an obs column"
        )
    codes, _ = pd.factorize(pd.Series(strata).astype("object").map(str, na_action="ignore"), sort=True)
    if (codes < 0).any():
        raise LingshuError(
            "Strata need a label in every cell",
            f"{int((codes < 0).sum())} of {n_cells} cells have none",
            "Drop these cells or give them a label",
        )
    return codes


def _quotas(sizes: np.ndarray, fraction: float, total: int, keep: int) -> np.ndarray:
    """Share ``total`` held-out cells among strata by largest remainder, keeping ``keep`` training cells in each."""
    exact = sizes * fraction
    room = np.maximum(sizes - keep, 0)
    quota = np.minimum(np.floor(exact).astype(np.int64), room)
    for stratum in np.argsort(quota - exact, kind="stable"):
        if quota.sum() < total and quota[stratum] < room[stratum]:
            quota[stratum] += 1
    return quota
