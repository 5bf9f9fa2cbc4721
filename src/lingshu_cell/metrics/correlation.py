"""Gene-gene correlation within one cell type, judged against many real reference cells of that type."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

_FOLDS = 5  # disjoint parts of the cells for the standard error of the slope


@dataclass(frozen=True)
class CorrelationComparison:
    """Root-mean-square error of the correlations, their slope against the reference and its standard error."""

    error: float
    slope: float
    slope_error: float


def expressed_genes(counts: sp.csr_matrix, most: int) -> np.ndarray:
    """Pick the ``most`` genes with the highest mean count among those with any; sorted column numbers."""
    mean = np.asarray(counts.mean(axis=0)).ravel()
    best = np.argsort(-mean, kind="stable")[:most]
    return np.sort(best[mean[best] > 0])


def compare_correlations(reference: np.ndarray, cells: np.ndarray, order: np.ndarray) -> CorrelationComparison | None:
    """Compare the gene-gene correlations of some cells with those of reference cells of the same type.

    Over the pairs of genes i < j, with c of the cells, r of all reference cells and r', r'' of two random halves of
    them: error = sqrt(mean (c_ij - r_ij)²), which has a floor from the finite number of cells, and
    slope = Σ c_ij (r'_ij + r''_ij) / 2 Σ r'_ij r''_ij, which is 1 on average for the reference's own distribution at
    any number of cells (the halves remove the noise of r from the denominator) and 0 for independent genes.

    Parameters
    ----------
    reference, cells
        Log-normalised expression of the same genes, (cells, genes), dense; at least six and fifteen cells.
    order
        Random permutation of the reference cells; its first and second half are the halves.

    Returns
    -------
    CorrelationComparison, or None when fewer than five genes vary or the reference shows no reproducible correlation.
    """
    varies = reference.std(axis=0) > 0
    if varies.sum() < 5 or len(reference) < 6 or len(cells) < 3 * _FOLDS:
        return None
    halves = [_upper_correlations(reference[half][:, varies]) for half in np.array_split(order, 2)]
    r, c = (_upper_correlations(x[:, varies]) for x in (reference, cells))
    signal = halves[0] + halves[1]
    strength = 2.0 * float(np.dot(*halves))
    if strength <= 0:
        return None
    folds = [np.dot(_upper_correlations(x[:, varies]), signal) for x in np.array_split(cells, _FOLDS)]
    return CorrelationComparison(
        error=float(np.sqrt(np.mean((c - r) ** 2))),
        slope=float(np.dot(c, signal)) / strength,
        slope_error=float(np.std(folds, ddof=1) / np.sqrt(_FOLDS)) / strength,
    )


def _upper_correlations(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    scaled = np.divide(
        centred, norm, out=np.zeros_like(centred), where=norm > 0
    )  # a constant gene correlates with none
    return (scaled.T @ scaled)[np.triu_indices(x.shape[1], k=1)]
