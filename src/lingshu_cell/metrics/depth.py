"""Cell by cell: library size, genes detected and zeros."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True, eq=False)
class Depth:
    """Log total counts (empty cells as one molecule) and genes detected of every cell, and the number of genes."""

    log_umi: np.ndarray
    detected: np.ndarray
    n_genes: int

    def take(self, rows: np.ndarray) -> "Depth":
        """Return some of the cells."""
        return Depth(self.log_umi[rows], self.detected[rows], self.n_genes)

    @property
    def zero_fraction(self) -> float:
        """Share of zeros in the cells × genes matrix, 0…1."""
        return 1.0 - float(self.detected.mean()) / self.n_genes


def total_counts(counts: sp.csr_matrix) -> np.ndarray:
    """Sum every cell's counts; int64, shape (cells,)."""
    return np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()


def measure_depth(counts: sp.csr_matrix) -> Depth:
    """Measure library size and genes detected of raw counts without stored zeros, (cells, genes)."""
    return Depth(np.log(np.maximum(total_counts(counts), 1)), np.diff(counts.indptr).astype(np.int64), counts.shape[1])


def ratio(numerator: float, denominator: float) -> float | None:
    """Divide, or return None where the denominator is not above zero (e.g. the spread of equal cells)."""
    return float(numerator / denominator) if denominator > 0 else None


def spread_ratio(other: np.ndarray, real: np.ndarray) -> float | None:
    """Divide two standard deviations (ddof 1); None for fewer than two cells or a real side without spread."""
    if min(other.size, real.size) < 2:
        return None
    return ratio(float(np.std(other, ddof=1)), float(np.std(real, ddof=1)))


def compare_depth(real: Depth, other: Depth) -> dict[str, float | None]:
    """Compare library size, genes detected and zeros of two sets of cells of any sizes.

    Parameters
    ----------
    real, other
        Depth of the real cells and of those to be judged.

    Returns
    -------
    ``sd_log_umi_ratio``, ``mean_log_umi`` (of ``other``), ``genes_detected_ratio``, ``genes_detected_sd_ratio``,
    ``zero_fraction`` (of ``other``) and ``zero_fraction_difference``; ratios are other / real.
    """
    return {
        "sd_log_umi_ratio": spread_ratio(other.log_umi, real.log_umi),
        "mean_log_umi": float(other.log_umi.mean()),
        "genes_detected_ratio": ratio(other.detected.mean(), real.detected.mean()),
        "genes_detected_sd_ratio": spread_ratio(other.detected, real.detected),
        "zero_fraction": other.zero_fraction,
        "zero_fraction_difference": abs(other.zero_fraction - real.zero_fraction),
    }


def depth_between_halves(real: Depth, rng: np.random.Generator, n_splits: int) -> dict[str, list[float | None]]:
    """Compare random halves of real cells with each other, ``n_splits`` times; values as in :func:`compare_depth`."""
    splits = []
    for _ in range(n_splits):
        halves = np.array_split(rng.permutation(real.log_umi.size), 2)
        splits.append(compare_depth(real.take(halves[0]), real.take(halves[1])))
    return {name: [split[name] for split in splits] for name in splits[0]}
