"""Positions of cells that are too many for arrays of all of them: in pieces, in few bytes, and shared out."""

from collections.abc import Iterator, Sequence

import numpy as np

_AT_ONCE = 1 << 18


def pieces(cells: Sequence[int] | np.ndarray | range, size: int = _AT_ONCE) -> Iterator[np.ndarray]:
    """Give positions in pieces, int64, so that nothing of the size of a store is made of them."""
    for i in range(0, len(cells), size):
        yield np.asarray(cells[i : i + size], dtype=np.int64)


def position_dtype(n_cells: int) -> type[np.unsignedinteger]:
    """Give the smallest type that holds positions of so many cells."""
    return np.uint32 if n_cells <= 2**32 else np.uint64


def share_of(n: int, rank: int, world_size: int) -> slice:
    """Which of ``n`` rows are a process's; the shares of all are disjoint, cover all and differ by one row."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def among(wanted: np.ndarray, cells: np.ndarray | range) -> np.ndarray:
    """Say which positions are among rising ones, boolean."""
    if isinstance(cells, range):
        return (wanted >= cells.start) & (wanted < cells.stop)
    if not len(cells):
        return np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(cells, wanted.astype(cells.dtype)), len(cells) - 1)
    return cells[place] == wanted


def others(cells: np.ndarray | range, n_cells: int) -> np.ndarray:
    """Give the positions below ``n_cells`` that are not among rising ones, rising, in few bytes."""
    parts = [piece[~among(piece, cells)].astype(position_dtype(n_cells)) for piece in pieces(range(n_cells))]
    return np.concatenate(parts) if parts else np.empty(0, dtype=position_dtype(n_cells))
