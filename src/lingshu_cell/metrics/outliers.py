"""Counts that no real cell shows: far above all that were seen of a gene, or none of a gene that is always there.

Averages over cells hide them, yet one count of 10,000 is most of a cell.
"""

import numpy as np
import scipy.sparse as sp

FAR = 5  # times the largest count of the reference cells
LEAST_FAR = 15
EXPECTED = 20.0  # counts expected of a gene, of which a cell then has some


def type_shares(counts: sp.csr_matrix, types: np.ndarray) -> dict[str, np.ndarray]:
    """Give each type's share of every gene in all counts of its cells, shape (genes,), sum 1 or 0."""
    names, place_N = np.unique(types, return_inverse=True)
    is_type_TN = sp.csr_matrix((np.ones(len(types)), (place_N, np.arange(len(types)))), (len(names), len(types)))
    sum_TG = (is_type_TN @ counts).toarray()
    return dict(zip(names, sum_TG / np.maximum(sum_TG.sum(1, keepdims=True), 1.0), strict=True))


def counts_far_above(counts: sp.csr_matrix, largest_G: np.ndarray) -> float:
    """Give the share of cells with a count above five times the largest that reference cells show of the gene.

    Parameters
    ----------
    counts
        Raw counts, (cells, genes).
    largest_G
        Largest count of every gene in the reference cells.

    Returns
    -------
    0 … 1; a count of 15 or less is never far above.
    """
    far = counts.data > np.maximum(FAR * largest_G[counts.indices], LEAST_FAR)
    return len(np.unique(np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))[far])) / counts.shape[0]


def zeros_of_abundant_genes(counts: sp.csr_matrix, types: np.ndarray, shares: dict[str, np.ndarray]) -> float | None:
    """Give the share of zeros among the genes of which a cell should have twenty counts or more.

    Parameters
    ----------
    counts
        Raw counts, (cells, genes).
    types
        Type of every cell.
    shares
        Of the reference cells, see :func:`type_shares`. Expected of a gene is its share in the cell's type, times the
        cell's total.

    Returns
    -------
    0 … 1; None where no such gene is in any cell.
    """
    n_zeros = n_expected = 0
    totals_N = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    for name in set(types) & set(shares):
        rows, share_G = np.flatnonzero(types == name), shares[name]
        genes = np.flatnonzero(share_G * totals_N[rows].max() >= EXPECTED)
        expected = totals_N[rows, None] * share_G[genes] >= EXPECTED
        n_expected += int(expected.sum())
        n_zeros += int(((counts[rows][:, genes].toarray() == 0) & expected).sum())
    return n_zeros / n_expected if n_expected else None
