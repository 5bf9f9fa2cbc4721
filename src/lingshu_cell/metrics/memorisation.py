"""Copying: distances to the nearest training cell and exact duplicates."""

import hashlib

import numpy as np
import scipy.sparse as sp


def nearest_distances(cells: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Euclidean distance of every cell to its nearest training cell in principal components.

    Parameters
    ----------
    cells
        Principal components, (cells, components).
    training
        Principal components of the training cells, (training cells, components).

    Returns
    -------
    Distances, (cells,).
    """
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(training).kneighbors(cells)
    return distances[:, 0]


def cell_fingerprints(counts: sp.csr_matrix) -> np.ndarray:
    """Hash every cell's counts, so that equal cells have equal fingerprints; shape (cells,).

    Parameters
    ----------
    counts
        Raw counts with sorted indices and without stored zeros, (cells, genes).

    Returns
    -------
    Object array of 16-byte digests.
    """

    def digest(start: int, end: int) -> bytes:
        indices, data = (x[start:end].astype(np.int64) for x in (counts.indices, counts.data))
        return hashlib.blake2b(indices.tobytes() + data.tobytes(), digest_size=16).digest()

    digests = [digest(start, end) for start, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]
    return np.array(digests, dtype=object)


def n_copies(fingerprints: np.ndarray, training: np.ndarray) -> int:
    """Number of cells that equal a training cell in every gene."""
    known = set(training)
    return sum(digest in known for digest in fingerprints)


def n_repeats(fingerprints: np.ndarray) -> int:
    """Number of cells that repeat an earlier cell of the same file in every gene."""
    return len(fingerprints) - len(set(fingerprints))
