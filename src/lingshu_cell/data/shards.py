"""Rows of counts out of shards, by plain reads of the files: no decompression, no copies, and flat memory."""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from lingshu_cell.data.store_files import damaged, shard_file

_OPEN_FILES = 256


@dataclass(frozen=True)
class _Place:
    """Where an array lies in its file."""

    offset: int
    dtype: np.dtype


@dataclass(frozen=True)
class _Run:
    """Neighbouring cells of one shard, and where their values lie."""

    shard: int
    pointers: np.ndarray

    @property
    def n_values(self) -> int:
        return int(self.pointers[-1] - self.pointers[0])


class Shards:
    """The counts of a store.

    Parameters
    ----------
    store
        Folder of the store.
    n_cells, cells_per_shard, n_genes
        Cells in all, cells in each shard but the last, genes.
    verify
        Called with the name of a shard before it is first read.
    """

    def __init__(
        self, store: Path, n_cells: int, cells_per_shard: int, n_genes: int, verify: Callable[[str], None]
    ) -> None:
        self._store, self._n_cells, self._per_shard, self._n_genes = store, n_cells, cells_per_shard, n_genes
        self._verify = verify
        self._places: dict[int, dict[str, _Place]] = {}
        self._open: OrderedDict[int, int] = OrderedDict()

    def rows(self, cells: np.ndarray) -> sparse.csr_matrix:
        """Read cells in rising order, with three reads for every run of neighbours.

        Parameters
        ----------
        cells
            Positions in the store, rising, int64.

        Returns
        -------
        scipy.sparse.csr_matrix
            uint16 or int32, cells × genes.
        """
        runs = self._runs(cells)
        steps = [np.diff(run.pointers) for run in runs]
        indptr = np.concatenate([np.zeros(1, np.int64), *steps]).cumsum()
        indptr = indptr.astype(np.int32 if indptr[-1] < 2**31 else np.int64)
        wide = any(self._places[run.shard]["data"].dtype.itemsize > 2 for run in runs)
        values = np.empty(indptr[-1], dtype=np.int32 if wide else np.uint16)
        columns = np.empty(indptr[-1], dtype=np.int32)
        at = 0
        for run in runs:
            stop = at + run.n_values
            self._read(run.shard, "data", int(run.pointers[0]), values[at:stop])
            self._read(run.shard, "indices", int(run.pointers[0]), columns[at:stop])
            at = stop
        return sparse.csr_matrix((values, columns, indptr), shape=(len(cells), self._n_genes), copy=False)

    def names(self, shard: int) -> np.ndarray:
        """Read the names of all cells of a shard, object array."""
        file = shard_file(shard)
        self._verify(file)
        try:
            with h5py.File(self._store / file, "r") as opened:
                obs = opened["obs"]
                return obs[obs.attrs["_index"]].asstr()[:]
        except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise damaged(self._store, f"{file}: {error}") from None

    def close(self) -> None:
        """Close all files; they are opened again when needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _runs(self, cells: np.ndarray) -> list[_Run]:
        shard = cells // self._per_shard
        new = (np.diff(cells, prepend=-2) != 1) | (np.diff(shard, prepend=-1) != 0)
        runs = []
        for i, j in pairwise([*np.flatnonzero(new), len(cells)]):
            number = int(shard[i])
            pointers = np.empty(j - i + 1, dtype=np.int64)
            self._read(number, "indptr", int(cells[i]) - number * self._per_shard, pointers)
            runs.append(_Run(number, pointers))
        return runs

    def _read(self, shard: int, name: str, first: int, target: np.ndarray) -> None:
        """Fill ``target`` with entries of an array of a shard from ``first`` on."""
        descriptor = self._descriptor(shard)
        place = self._places[shard][name]
        into = target if target.dtype == place.dtype else np.empty(len(target), dtype=place.dtype)
        start, n_bytes, done = place.offset + first * place.dtype.itemsize, into.nbytes, 0
        view = into.view(np.uint8)
        while done < n_bytes:  # one read gives at most 2 GiB
            n_read = os.preadv(descriptor, [view[done:]], start + done)
            if not n_read:
                raise damaged(self._store, f"{shard_file(shard)} is shorter than when it was opened")
            done += n_read
        if into is not target:
            target[:] = into

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = self._store / shard_file(shard)
        if shard not in self._places:
            self._verify(shard_file(shard))
            n_cells = min(self._per_shard, self._n_cells - shard * self._per_shard)
            self._places[shard] = self._find(file, n_cells)
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise damaged(self._store, f"{shard_file(shard)}: {error}") from None
        return self._open[shard]

    def _find(self, file: Path, n_cells: int) -> dict[str, _Place]:
        """Ask HDF5 where the arrays of X lie; they are in one piece each."""
        try:
            with h5py.File(file, "r") as shard:
                group = shard["X"]
                shape = tuple(int(n) for n in group.attrs["shape"])
                arrays = {name: group[name] for name in ("data", "indices", "indptr")}
                if shape != (n_cells, self._n_genes) or len(arrays["indptr"]) != n_cells + 1:
                    raise ValueError(f"its shape is {shape} in place of {(n_cells, self._n_genes)}")
                n_values = int(arrays["indptr"][-1])
                if not len(arrays["data"]) == len(arrays["indices"]) == n_values:
                    raise ValueError("its values and pointers do not fit")
                offsets = {name: array.id.get_offset() for name, array in arrays.items()}
                if None in [offset for name, offset in offsets.items() if len(arrays[name])]:
                    raise ValueError("its arrays are not in one piece")
                return {name: _Place(offsets[name] or 0, array.dtype) for name, array in arrays.items()}
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise damaged(self._store, f"{file.name}: {error}") from None
