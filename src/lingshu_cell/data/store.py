"""A training store on disk: shuffled cells of many data sets on one gene list, in shards that scanpy reads as they are.

A store is a folder::

    STORE/manifest.json              genes in order, data sets, labels, QC, settings; sizes and sha256 of all files
    STORE/shards/shard-000000.h5ad   counts (CSR, not compressed) and obs of cells_per_shard cells
    STORE/arrays/*.npy               what training reads without opening shards: labels, measured genes, frequencies

Shapes: N cells, G joint genes, D data sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.checksums import sha256
from lingshu_cell.data.shards import Shards
from lingshu_cell.data.store_files import MANIFEST, WORK, damaged, read_manifest
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.data.vocabulary import ConditionVocabulary, GeneVocabulary
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

_LABELS_AT_ONCE = 1 << 20
DATA_SET = "data_set"
SPECIES = "species"


class Store:
    """A store that was opened and checked; counts are read when asked for. Made by :func:`open_store`.

    Attributes
    ----------
    path
        The folder.
    manifest
        What ``manifest.json`` says.
    vocabulary
        Joint genes in order.
    measured
        Boolean, D × G: which genes each data set measured; the others are unknown in it, not zero.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary = GeneVocabulary.from_json(manifest["genes"])
        self._fields = {field["name"]: field for field in manifest["obs"]}
        self._verified: set[str] = set()
        self._arrays: dict[str, np.ndarray] = {}
        self._shards = Shards(path, self.n_cells, int(manifest["cells_per_shard"]), self.n_genes, self._verify)
        self.measured = np.array(self._array("arrays/measured.npy", (len(self.data_sets), self.n_genes), bool))

    @property
    def n_cells(self) -> int:
        """Number of cells, N."""
        return int(self.manifest["n_cells"])

    @property
    def n_genes(self) -> int:
        """Number of joint genes, G."""
        return len(self.vocabulary)

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Names of the data sets, D."""
        return tuple(one["name"] for one in self.manifest["data_sets"])

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, which holds the checksums of all files."""
        return str(self.manifest["checksum"])

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(self._fields)

    @property
    def data_set(self) -> np.ndarray:
        """Data set of each cell, N, a memory map."""
        return self.column(DATA_SET)

    def column(self, name: str) -> np.ndarray:
        """Give one label of all cells as it is stored, as a memory map.

        Parameters
        ----------
        name
            One of :attr:`obs_columns`.

        Returns
        -------
        np.ndarray
            For categories their index in :meth:`categories`, −1 where unknown; else numbers, NaN where unknown. Shape
            [N].

        Raises
        ------
        LingshuError
            If there is no such label or its file is damaged.
        """
        field = self._field(name)
        return self._array(field["file"], (self.n_cells,), np.dtype(field["dtype"]))

    def categories(self, name: str) -> tuple[str, ...]:
        """Give the values of a label in order; refused for numbers."""
        field = self._field(name)
        if field["kind"] != "category":
            raise LingshuError("Conditions must be labels", f"{name!r} holds numbers", "Choose another obs column")
        return tuple(field["categories"])

    def is_labelled(self, name: str) -> bool:
        """Say whether there is a label of that name, which every cell has."""
        if name not in self._fields or self._fields[name]["kind"] != "category":
            return False
        column = self.column(name)
        return not any((column[i : i + _LABELS_AT_ONCE] < 0).any() for i in range(0, self.n_cells, _LABELS_AT_ONCE))

    def obs(
        self, cells: Sequence[int] | np.ndarray | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Give labels as a table.

        Parameters
        ----------
        cells
            Positions in the store; None for all.
        columns
            Some of :attr:`obs_columns`; None for all.

        Returns
        -------
        pandas.DataFrame
            Categorical and number columns, one row per cell, indexed by position.
        """
        places = np.arange(self.n_cells) if cells is None else np.asarray(cells, dtype=np.int64)
        table: dict[str, Any] = {}
        for name in self.obs_columns if columns is None else columns:
            values = self.column(name)[places]
            is_label = self._field(name)["kind"] == "category"
            table[name] = (
                pd.Categorical.from_codes(values, categories=list(self.categories(name))) if is_label else values
            )
        return pd.DataFrame(table, index=pd.RangeIndex(len(places)) if cells is None else pd.Index(places))

    def conditions(self, keys: Sequence[str]) -> ConditionVocabulary:
        """Give the condition vocabulary of labels: their categories over all cells of the store."""
        return ConditionVocabulary({key: self.categories(key) for key in keys})

    def condition_rows(self, keys: Sequence[str], cells: Sequence[int] | np.ndarray) -> np.ndarray:
        """Give the condition indices of cells.

        Parameters
        ----------
        keys
            Labels, the fields of :meth:`conditions`.
        cells
            Positions in the store.

        Returns
        -------
        np.ndarray
            int64, cells × keys; 0 = unknown.
        """
        rows = np.zeros((len(cells), len(keys)), dtype=np.int64)
        for i, key in enumerate(keys):
            self.categories(key)
            rows[:, i] = self.column(key)[cells].astype(np.int64) + 1
        return rows

    def counts(self, cells: Sequence[int] | np.ndarray | range) -> sparse.csr_matrix:
        """Read the counts of cells.

        Parameters
        ----------
        cells
            Positions in the store, 0 … N − 1, in any order; rising ones that touch are read at once.

        Returns
        -------
        scipy.sparse.csr_matrix
            uint16 or int32, cells × G, in the order asked for.

        Raises
        ------
        LingshuError
            If a position is out of range or a shard is damaged.
        """
        wanted = np.asarray(cells, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_cells):
            raise LingshuError(
                f"Cells of the store lie in 0 … {self.n_cells - 1}",
                f"got {wanted.min()} … {wanted.max()}",
                "Correct it",
            )
        order = None
        if len(wanted) and (np.diff(wanted) < 0).any():
            order = np.argsort(wanted, kind="stable")
            wanted = wanted[order]
        read = self._shards.rows(wanted)
        if order is None:
            return read
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return read[back]

    def iterate(
        self, cells: Sequence[int] | np.ndarray | range | None = None, chunk_cells: int = 4096
    ) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Go through cells in the order given, in pieces of bounded size.

        Parameters
        ----------
        cells
            Positions; None for all.
        chunk_cells
            Cells in a piece.

        Yields
        ------
        tuple
            Positions, int64, and their counts.
        """
        places = range(self.n_cells) if cells is None else cells
        for i in range(0, len(places), chunk_cells):
            here = np.asarray(places[i : i + chunk_cells], dtype=np.int64)
            yield here, self.counts(here)

    def split(self, validation_fraction: float = 0.1, most_validation_cells: int | None = None) -> tuple[range, range]:
        """Divide the cells: as they were shuffled, the last ones serve for validation.

        Parameters
        ----------
        validation_fraction
            Share held out, 0 … 1, rounded; 0 keeps all.
        most_validation_cells
            Never hold out more.

        Returns
        -------
        tuple of range
            Positions of training and validation cells.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise LingshuError(
                "The validation fraction must be at least 0 and below 1",
                f"got {validation_fraction}",
                "Choose e.g. 0.1",
            )
        n = round(self.n_cells * validation_fraction)
        n = n if most_validation_cells is None else min(n, most_validation_cells)
        return range(self.n_cells - n), range(self.n_cells - n, self.n_cells)

    def detected_in(self, without: Sequence[int] | range = ()) -> np.ndarray:
        """Say in how many cells each gene is detected, int64, G; ``without`` these cells, which alone are read."""
        counts = np.array(self._array("arrays/detected_in.npy", (self.n_genes,), np.dtype(np.int64)))
        for _, of_cells in self.iterate(without):
            counts -= np.bincount(of_cells.indices, minlength=self.n_genes)
        return counts

    def token_counts(
        self, without: Sequence[int] | np.ndarray | range = (), of: Sequence[int] | np.ndarray | range | None = None
    ) -> np.ndarray:
        """Say how many cells show each token, zeros only where the gene was measured.

        Parameters
        ----------
        without
            Cells left out, e.g. those for validation; only these are read.
        of
            Count these cells in place of all, and read all of them.

        Returns
        -------
        np.ndarray
            int64, G × 281; tokens of genes that a data set lacks are counted nowhere.
        """
        counts = np.zeros((self.n_genes, N_EXPRESSION_TOKENS), dtype=np.int64)
        if of is None:
            entries = self._array("arrays/token_counts.npy", (None, 3), np.dtype(np.int64))
            counts[entries[:, 0], entries[:, 1]] = entries[:, 2]
        per_set = np.zeros(len(self.data_sets), dtype=np.int64)
        for i in range(0, self.n_cells if of is None else 0, _LABELS_AT_ONCE):
            per_set += np.bincount(self.data_set[i : i + _LABELS_AT_ONCE], minlength=len(per_set))
        flat, sign = counts.reshape(-1), -1 if of is None else 1
        for cells, of_cells in self.iterate(without if of is None else of):
            tokens = encode(of_cells.data)
            np.add.at(flat, of_cells.indices * np.int64(N_EXPRESSION_TOKENS) + tokens, sign)
            per_set += sign * np.bincount(self.data_set[cells], minlength=len(per_set))
        counts[:, 0] = per_set @ self.measured - counts[:, 1:].sum(axis=1)
        return counts

    def cell_names(self, cells: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read the names of cells, object array, in the order asked for."""
        wanted = np.asarray(cells, dtype=np.int64)
        names = np.empty(len(wanted), dtype=object)
        shard_of = wanted // int(self.manifest["cells_per_shard"])
        for shard in np.unique(shard_of):
            here = shard_of == shard
            names[here] = self._shards.names(int(shard))[wanted[here] % int(self.manifest["cells_per_shard"])]
        return names

    def modelled_genes(self, min_cells: int = 3, without: Sequence[int] | range = ()) -> np.ndarray:
        """Give the genes detected in at least ``min_cells`` cells, int64, rising."""
        return np.flatnonzero(self.detected_in(without) >= min_cells)

    def rare_counts(self) -> np.ndarray:
        """Give every count of the genes that few cells show.

        Returns
        -------
        np.ndarray
            int64, one row per count: cell, gene, count; all of the genes detected in at most
            ``manifest["rare_up_to_cells"]`` cells.
        """
        return self._array("arrays/rare_counts.npy", (None, 3), np.dtype(np.int64))

    def verify(self) -> None:
        """Compare the checksums of all files, each at most once while the store is open.

        Raises
        ------
        LingshuError
            If a file is missing, cut off or changed.
        """
        for file in self.manifest["files"]:
            self._verify(file)

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        self._shards.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}  # so that worker processes open it themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, state["path"], state["manifest"])

    def _field(self, name: str) -> Mapping[str, Any]:
        if name not in self._fields:
            raise LingshuError(
                "Keys must be labels of the store", f"there is no {name!r}", f"Available: {offenders(self._fields)}"
            )
        return self._fields[name]

    def _array(self, file: str, shape: tuple[int | None, ...], dtype: np.dtype | type) -> np.ndarray:
        if file not in self._arrays:
            self._verify(file)
            try:
                array = np.load(self.path / file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise damaged(self.path, f"{file}: {error}") from None
            fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
            if not fits or array.dtype != dtype:
                raise damaged(self.path, f"{file} holds {array.dtype} {array.shape}")
            self._arrays[file] = array
        return self._arrays[file]

    def _verify(self, file: str) -> None:
        if file in self._verified:
            return
        try:
            found = sha256(self.path / file)
        except OSError as error:
            raise damaged(self.path, f"{file}: {error}") from None
        if found != self.manifest["files"][file]["sha256"]:
            raise damaged(self.path, f"{file} does not match its checksum")
        self._verified.add(file)


def open_store(path: Path | str, verify: bool = False) -> Store:
    """Open a training store after checking its manifest and the size of every file.

    Parameters
    ----------
    path
        The folder that ``lingshu prepare --out`` wrote.
    verify
        Compare the checksums of all files now; else that of each file when it is first read.

    Returns
    -------
    Store

    Raises
    ------
    LingshuError
        If there is no store, it is unfinished, of another format, or a file is missing, cut off or changed.
    """
    path = expanded(path)
    manifest = read_manifest(path)
    for file, facts in manifest["files"].items():
        try:
            size = (path / file).stat().st_size
        except OSError:
            raise damaged(path, f"{file} is missing") from None
        if size != facts["bytes"]:
            raise damaged(path, f"{file} has {size:,} of {facts['bytes']:,} bytes")
    try:
        store = Store(path, manifest)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, LingshuError):
            raise
        raise damaged(path, f"manifest.json: {type(error).__name__} {error}") from None
    if verify:
        store.verify()
    return store


def is_store(source: object) -> bool:
    """Say whether something is, or was meant to be, the folder of a store."""
    if not isinstance(source, (str, Path)):
        return False
    path = expanded(source)
    try:
        return path.is_dir() and any((path / name).exists() for name in (MANIFEST, WORK, "shards"))
    except (OSError, ValueError):
        return False
