"""Gene by gene: means, variances, zeros, 1-Wasserstein distances, and the gene-wise shuffled floor."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import pearsonr, spearmanr

_CELLS_PER_CHUNK = 4096
_GROUPS = 10


@dataclass(frozen=True)
class GeneMoments:
    """Mean, variance (ddof 0) and share of zeros of every gene; arrays of shape (genes,)."""

    mean: np.ndarray
    variance: np.ndarray
    zero_fraction: np.ndarray


def gene_moments(matrix: sp.csr_matrix) -> GeneMoments:
    """Compute mean, variance and zero fraction of every column in float64 without making the matrix dense.

    Parameters
    ----------
    matrix
        Non-negative values without stored zeros, (cells, genes), at least one cell.

    Returns
    -------
    GeneMoments of shape (genes,).
    """
    n_cells, n_genes = matrix.shape
    total, squares, nonzero = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    for start in range(0, n_cells, _CELLS_PER_CHUNK):
        rows = matrix[start : start + _CELLS_PER_CHUNK]
        values = rows.data.astype(np.float64)
        total += np.bincount(rows.indices, weights=values, minlength=n_genes)
        squares += np.bincount(rows.indices, weights=values**2, minlength=n_genes)
        nonzero += np.bincount(rows.indices, minlength=n_genes)
    mean = total / n_cells
    return GeneMoments(mean, np.maximum(squares / n_cells - mean**2, 0.0), 1.0 - nonzero / n_cells)


def gene_mean_correlations(a: sp.csr_matrix, b: sp.csr_matrix) -> tuple[float | None, float | None]:
    """Correlate the gene means of two samples; None where one side is constant.

    Parameters
    ----------
    a, b
        Log-normalised expression, (cells, genes) with the same genes.

    Returns
    -------
    Pearson and Spearman correlation over genes, each in -1…1.
    """
    means = [np.asarray(x.mean(axis=0), dtype=np.float64).ravel() for x in (a, b)]
    if any(np.ptp(mean) == 0 for mean in means):
        return None, None
    return float(pearsonr(*means).statistic), float(spearmanr(*means).statistic)


def wasserstein_per_gene(a: sp.csr_matrix, b: sp.csr_matrix) -> np.ndarray:
    """Compute the exact 1-Wasserstein distance of every gene between two samples of equally many cells.

    For equal sizes it is the mean absolute difference of the sorted values; only non-zero values need sorting.

    Parameters
    ----------
    a, b
        Non-negative values, (cells, genes), the same shape.

    Returns
    -------
    Distances in the unit of the values, (genes,); equal to ``scipy.stats.wasserstein_distance`` gene by gene.
    """
    left, right = a.tocsc(), b.tocsc()
    distance = np.zeros(a.shape[1])
    for gene in range(a.shape[1]):
        x = np.sort(left.data[left.indptr[gene] : left.indptr[gene + 1]])[::-1]
        y = np.sort(right.data[right.indptr[gene] : right.indptr[gene + 1]])[::-1]
        both = min(x.size, y.size)
        distance[gene] = np.abs(x[:both] - y[:both]).sum() + x[both:].sum() + y[both:].sum()
    return distance / a.shape[0]


@dataclass(frozen=True, eq=False)
class MeanVarianceTrend:
    """Log variance as a polynomial of log mean, and ten groups of genes (column numbers) of similar mean."""

    coefficients: np.ndarray
    groups: tuple[np.ndarray, ...]


def fit_mean_variance_trend(counts: sp.csr_matrix, min_mean: float) -> MeanVarianceTrend | None:
    """Fit log variance as a cubic polynomial of log mean over the genes of real reference cells.

    Parameters
    ----------
    counts
        Raw counts of reference cells, (cells, genes).
    min_mean
        Genes with a lower mean count are left out, above 0.

    Returns
    -------
    MeanVarianceTrend, or None when fewer than ten genes qualify.
    """
    moments = gene_moments(counts)
    used = np.flatnonzero((moments.mean >= min_mean) & (moments.variance > 0))
    if used.size < _GROUPS:
        return None
    used = used[np.argsort(moments.mean[used], kind="stable")]
    coefficients = np.polyfit(np.log(moments.mean[used]), np.log(moments.variance[used]), 3)
    return MeanVarianceTrend(coefficients, tuple(np.array_split(used, _GROUPS)))


def mean_variance_error(
    real: sp.csr_matrix, other: sp.csr_matrix, trend: MeanVarianceTrend
) -> tuple[float | None, float | None]:
    """Compare the mean-variance relation of two samples.

    With r(gene) = log variance - trend(log mean), each gene judged at its own mean, r_other - r_real is averaged in ten
    groups of genes of similar mean, which removes most of the sampling noise of single genes; the error is the mean
    absolute value over the groups and the bias their signed mean. The groups come from reference cells: genes chosen by
    their mean in one of the samples would regress to the mean in the other.

    Parameters
    ----------
    real, other
        Raw counts, (cells, genes) with the same genes.
    trend
        Trend and groups of :func:`fit_mean_variance_trend`; genes without spread in either sample are left out.

    Returns
    -------
    Error (0 = same relation) and bias (negative = too little spread), in nats; None when a group has no gene left.
    """
    x, y = gene_moments(real), gene_moments(other)
    varies = (x.variance > 0) & (y.variance > 0)
    differences = []
    for group in (genes[varies[genes]] for genes in trend.groups):
        r_x, r_y = (np.log(z.variance[group]) - np.polyval(trend.coefficients, np.log(z.mean[group])) for z in (x, y))
        differences.append(float((r_y - r_x).mean()) if group.size else np.nan)
    if np.isnan(differences).any():
        return None, None
    return float(np.abs(differences).mean()), float(np.mean(differences))


def shuffle_genes(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Permute every gene's counts over the cells independently: marginals stay, all dependence between genes goes.

    Parameters
    ----------
    counts
        Raw counts, (cells, genes).
    rng
        Source of the permutations.

    Returns
    -------
    CSR matrix of the same shape with the same multiset of counts in every column.
    """
    columns = counts.tocsc()
    n_cells, per_gene = counts.shape[0], np.diff(columns.indptr)
    rows = [rng.permutation(n_cells)[:n] if n > 1 else rng.integers(n_cells, size=n) for n in per_gene]
    indices = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return sp.csc_matrix((columns.data, indices, columns.indptr), shape=counts.shape).tocsr()
