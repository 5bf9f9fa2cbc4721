"""What counts are: non-negative integers in one canonical sparse form, with one fingerprint."""

import hashlib
import json
from collections.abc import Callable, Iterable

import numpy as np
from scipy import sparse

from lingshu_cell.errors import LingshuError

MOST_COUNTS = 2**31 - 1
_LOG_CEILING = 15.0  # log1p of any real count stays below; cell-eval draws the same line
_CHUNK = 1 << 22  # values looked at or hashed at a time


def check_counts(matrix: sparse.csr_matrix, where: str, find_remedy: Callable[[], str | None] = lambda: None) -> None:
    """Refuse values that are no counts, naming the likely reason.

    Parameters
    ----------
    matrix
        Values of any dtype.
    where
        Their place in the data, e.g. ``"X"``.
    find_remedy
        Called only on refusal; says where counts may be found instead, or None.

    Raises
    ------
    LingshuError
        If a value is NaN or infinite, negative, not an integer, or above 2³¹ − 1.
    """
    kind = matrix.data.dtype.kind
    if kind not in "iufb":
        raise LingshuError("Counts must be numbers", f"{where} has dtype {matrix.data.dtype}", "Pass raw UMI counts")
    pieces = [matrix.data[i : i + _CHUNK] for i in range(0, len(matrix.data), _CHUNK)]
    n_lost = sum(int((~np.isfinite(piece)).sum()) for piece in pieces) if kind == "f" else 0
    if n_lost:
        raise LingshuError(
            "Counts must be finite", f"{where} holds {n_lost} NaN or infinite values", _remedy(find_remedy)
        )
    fractions = [piece[piece != np.floor(piece)] for piece in pieces] if kind == "f" else []
    n_fractions = sum(map(len, fractions))
    lowest = min((piece.min() for piece in pieces), default=0)
    highest = max((piece.max() for piece in pieces), default=0)
    if lowest < 0:
        n_negative = sum(int((piece < 0).sum()) for piece in pieces)
        guess = "looks scaled: " if n_fractions else ""
        finding = f"{where} {guess}holds {n_negative} negative values, the smallest {lowest:.4g}"
        raise LingshuError("Counts must be 0 or more", finding, _remedy(find_remedy))
    if n_fractions:
        examples = ", ".join(f"{value:.4g}" for value in np.concatenate(fractions)[:3])
        finding = f"{where} {_likely_transform(matrix, float(highest))} ({n_fractions} non-integers such as {examples})"
        raise LingshuError("Counts must be integers", finding, _remedy(find_remedy))
    if highest > MOST_COUNTS:
        raise LingshuError(
            f"Counts must be at most {MOST_COUNTS:,}",
            f"{where} holds {int(highest):,}",
            "Check the file: no cell has so many",
        )


def row_pointers(indptr: np.ndarray, n_rows: int, n_values: int, n_indices: int) -> np.ndarray:
    """Check the pointers of a compressed matrix, before any compiled code trusts them.

    Parameters
    ----------
    indptr
        As stored.
    n_rows
        Rows of CSR, or columns of CSC.
    n_values, n_indices
        Lengths of the two other arrays.

    Returns
    -------
    np.ndarray
        int64, n_rows + 1, rising from 0 to the number of values.

    Raises
    ------
    ValueError
        If they are of another kind.
    """
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu" or len(indptr) != n_rows + 1:
        raise ValueError(f"its pointers are {indptr.dtype} {indptr.shape} for {n_rows} rows")
    pointers = indptr.astype(np.int64)  # signed, whatever the file has: a step back must show
    if pointers[0] != 0 or (np.diff(pointers) < 0).any():
        raise ValueError("its row pointers do not rise from 0, one for each row")
    if not pointers[-1] == n_values == n_indices:
        raise ValueError(f"{n_values:,} values, {n_indices:,} indices, {pointers[-1]:,} expected by row pointers")
    return pointers


def dense_counts(block: np.ndarray, where: str) -> sparse.csr_matrix:
    """Make rows of a dense matrix sparse, in a type that sparse matrices can have.

    Raises
    ------
    LingshuError
        If values are masked or no numbers.
    """
    if np.ma.isMaskedArray(block):
        raise LingshuError("Counts must not be masked", f"{where} is a masked array", "Fill it, or drop those cells")
    block = np.asarray(block)
    if block.dtype.kind not in "iufb":
        raise LingshuError("Counts must be numbers", f"{where} has dtype {block.dtype}", "Pass raw UMI counts")
    return sparse.csr_matrix(block.astype(np.float32) if block.dtype == np.float16 else block)


def canonical_counts(matrix: sparse.csr_matrix, copy: bool) -> sparse.csr_matrix:
    """Give checked counts as int32 CSR with sorted indices, no duplicates and no stored zeros.

    Parameters
    ----------
    matrix
        Counts that :func:`check_counts` accepts.
    copy
        Whether the arrays of ``matrix`` belong to somebody else and must stay as they are.

    Returns
    -------
    scipy.sparse.csr_matrix
        The same counts.

    Raises
    ------
    LingshuError
        If duplicated entries add up to more than 2³¹ − 1.
    """
    indices, indptr = (matrix.indices.copy(), matrix.indptr.copy()) if copy else (matrix.indices, matrix.indptr)
    counts = sparse.csr_matrix((matrix.data.astype(np.int32), indices, indptr), shape=matrix.shape)
    if not counts.has_canonical_format:
        counts.data = counts.data.astype(np.int64)
        counts.sum_duplicates()
        if counts.nnz and counts.data.max() > MOST_COUNTS:
            raise LingshuError(
                f"Counts must be at most {MOST_COUNTS:,}",
                f"duplicated entries add up to {counts.data.max():,}",
                "Check the file: no cell has so many",
            )
        counts.data = counts.data.astype(np.int32)
    counts.eliminate_zeros()
    return counts


def fingerprint(counts: sparse.csr_matrix, gene_names: Iterable[str]) -> str:
    """Give the sha256 of counts and gene names, the same for every storage of the same counts.

    Parameters
    ----------
    counts
        Counts from :func:`canonical_counts`, shape [n_cells, n_genes].
    gene_names
        Names of the genes in order.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([list(counts.shape), list(gene_names)]).encode())
    for array in (counts.indptr, counts.indices, counts.data):
        for i in range(0, len(array), _CHUNK):
            digest.update(array[i : i + _CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()


def _remedy(find_remedy: Callable[[], str | None]) -> str:
    return find_remedy() or "Pass raw UMI counts, before normalisation, log or scaling"


def _likely_transform(matrix: sparse.csr_matrix, highest: float) -> str:
    if highest < _LOG_CEILING:
        return "looks log-normalised"
    totals = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    totals = totals[totals > 0]
    if len(totals) > 1 and np.ptp(totals) < 1e-3 * totals.mean():
        return f"looks normalised to {totals.mean():.6g} per cell"
    return "is not integer"
