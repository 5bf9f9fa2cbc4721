"""Normalised expression, principal components fitted on reference cells only, and a map for pictures."""

import warnings
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

_CELLS_PER_CHUNK = 4096


def log_normalise(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Scale every cell to ``target_sum`` counts and take log(1 + x), as ``scanpy.pp.normalize_total`` and ``log1p`` do.

    Parameters
    ----------
    counts
        Raw counts, (cells, genes).
    target_sum
        Counts per cell after scaling, above 0; cells without counts stay zero.

    Returns
    -------
    float32 CSR matrix of the same shape.
    """
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    values = counts.data * np.repeat(scale, np.diff(counts.indptr))
    return sp.csr_matrix((np.log1p(values).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)


def mean_log_expression(counts: sp.csr_matrix, target_sum: float) -> np.ndarray:
    """Average log-normalised expression of every gene in bounded memory; shape (genes,).

    Parameters
    ----------
    counts
        Raw counts, (cells, genes).
    target_sum
        Counts per cell after scaling.

    Returns
    -------
    float64 means.
    """
    total = np.zeros(counts.shape[1])
    for start in range(0, counts.shape[0], _CELLS_PER_CHUNK):
        rows = log_normalise(counts[start : start + _CELLS_PER_CHUNK], target_sum)
        total += np.bincount(rows.indices, weights=rows.data, minlength=total.size)
    return total / counts.shape[0]


@dataclass(frozen=True, eq=False)
class PcaSpace:
    """Axes (components, genes used) and mean (genes used,) of log-normalised reference cells, and the genes used."""

    genes: np.ndarray
    axes: np.ndarray
    mean: np.ndarray
    target_sum: float

    def project(self, counts: sp.csr_matrix) -> np.ndarray:
        """Give the principal components of raw counts over all genes, float64 (cells, components)."""
        shift = self.mean @ self.axes.T
        chunks = [counts[start : start + _CELLS_PER_CHUNK] for start in range(0, counts.shape[0], _CELLS_PER_CHUNK)]
        expression = (log_normalise(chunk, self.target_sum)[:, self.genes] for chunk in chunks)
        return np.concatenate([np.asarray(x @ self.axes.T) - shift for x in expression])


def fit_pca(counts: sp.csr_matrix, genes: np.ndarray, target_sum: float, n_components: int, seed: int) -> PcaSpace:
    """Fit a PCA on log-normalised cells without making them dense (scikit-learn, ARPACK).

    Parameters
    ----------
    counts
        Raw counts of reference cells, (cells, genes).
    genes
        Column numbers of the genes to use, at least two.
    target_sum
        Counts per cell (of all genes) after normalisation.
    n_components
        Number of components, at least 1; cut to what the matrix allows.
    seed
        Start vector of ARPACK.

    Returns
    -------
    PcaSpace with at most ``n_components`` axes.
    """
    from sklearn.decomposition import PCA

    expression = log_normalise(counts, target_sum)[:, genes].astype(np.float64)
    n_components = max(1, min(n_components, min(expression.shape) - 1))
    pca = PCA(n_components, svd_solver="arpack", random_state=seed).fit(expression)
    return PcaSpace(genes, pca.components_, pca.mean_, target_sum)


def umap_coordinates(components: np.ndarray, seed: int) -> np.ndarray:
    """Lay cells out in two dimensions with UMAP from their principal components.

    Parameters
    ----------
    components
        Principal components of all cells to be drawn together, (cells, components), at least four cells.
    seed
        Random state; fixed seeds make UMAP run on one core and repeatable.

    Returns
    -------
    float32 coordinates, (cells, 2).

    Source
    ------
    McInnes, Healy, Melville 2018, arXiv 1802.03426 (umap-learn defaults: 15 neighbours, minimal distance 0.1).
    """
    import umap

    with warnings.catch_warnings():
        # umap-learn says at every call with a seed that it uses one core; that is what the seed is for.
        warnings.filterwarnings("ignore", message="n_jobs value .* overridden to 1", category=UserWarning)
        reducer = umap.UMAP(n_neighbors=min(15, components.shape[0] - 1), init="pca", random_state=seed)
        return np.asarray(reducer.fit_transform(components), dtype=np.float32)
