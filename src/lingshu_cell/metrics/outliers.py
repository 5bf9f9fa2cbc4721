"""Counts that no real cell shows: far above all that were seen of a gene, or none of a gene that is always there.

Averages over cells hide them, yet one count of 10,000 is most of a cell.
"""

import numpy as np
import scipy.sparse as sp

FAR = 5  # times the largest count of the reference cells
LEAST_FAR = 15
EXPECTED = 20.0  # counts expected of a gene, of which a cell then has some


def counts_far_above(counts: sp.csr_matrix, reference: sp.csr_matrix) -> float:
    """Give the share of cells with a count above five times the largest that reference cells show of the gene.

    Parameters
    ----------
    counts, reference
        Raw counts, (cells, genes) with the same genes.

    Returns
    -------
    0 … 1; a count of 15 or less is never far above.
    """
    largest_G = reference.max(axis=0).toarray().ravel().astype(np.float64)
    far = counts.data > np.maximum(FAR * largest_G[counts.indices], LEAST_FAR)
    return len(np.unique(np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))[far])) / counts.shape[0]


def zeros_of_abundant_genes(
    counts: sp.csr_matrix, types: np.ndarray, reference: sp.csr_matrix, reference_types: np.ndarray
) -> float | None:
    """Give the share of zeros among the genes of which a cell should have twenty counts or more.

    Parameters
    ----------
    counts, reference
        Raw counts, (cells, genes) with the same genes.
    types, reference_types
        Type of every cell. Expected of a gene is its share in the reference cells of that type, times the cell's total.

    Returns
    -------
    0 … 1; None where no such gene is in any cell.
    """
    n_zeros = n_expected = 0
    totals_N = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    for name in np.unique(types):
        of_type = np.asarray(reference[reference_types == name].sum(axis=0), dtype=np.float64).ravel()
        rows = np.flatnonzero(types == name)
        share_G = of_type / max(of_type.sum(), 1.0)
        genes = np.flatnonzero(share_G * totals_N[rows].max() >= EXPECTED)
        expected = totals_N[rows, None] * share_G[genes] >= EXPECTED
        n_expected += int(expected.sum())
        n_zeros += int(((counts[rows][:, genes].toarray() == 0) & expected).sum())
    return n_zeros / n_expected if n_expected else None
