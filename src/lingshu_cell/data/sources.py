"""Files of counts opened but not loaded: h5ad, zarr, 10x h5 and 10x mtx folders, streamed in chunks of whole cells."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from scipy import sparse

from lingshu_cell.data.anndata_io import (
    _check_names,
    _check_shape,
    _chosen_matrix,
    _is_group,
    _opened_path,
    _place,
    _where_integers_are,
    _whole,
    uns_text,
)
from lingshu_cell.data.containers import check_folder, check_hdf5
from lingshu_cell.data.counts import canonical_counts, check_counts, dense_counts, row_pointers
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, open_binary, open_text, refuse_special

CHUNK_CELLS = 2048
CHUNK_VALUES = 1 << 22  # stored values of a chunk, but never less than one cell: some 50 MB
_SPARSE_LAYOUT = "0.1.0"  # of AnnData's compressed matrices, the only one there has been
_CSC_VALUES = 1 << 24  # a matrix stored by gene is scanned once for so many values of whole cells
_LONGEST_LINE = 1 << 16  # of what stands before the values of a Matrix Market file
_MATRIX_FILES = ("matrix.mtx.gz", "matrix.mtx")
_TABLE_FILES = {
    "barcodes": ("barcodes.tsv.gz", "barcodes.tsv"),
    "features": ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"),
}

Rows = Callable[[int], Iterator[sparse.csr_matrix]]
"""Gives raw rows from a cell on, in pieces."""


@dataclass(frozen=True, eq=False)
class CountSource:
    """One file of counts: labels in memory, counts on disk.

    Attributes
    ----------
    path
        The file or folder.
    kind
        ``h5ad``, ``zarr``, ``10x h5`` or ``10x mtx``.
    obs
        Labels of the cells.
    obs_names, gene_names
        Unique names.
    var
        Annotation of the genes.
    species
        Text of ``uns["species"]`` or ``uns["organism"]`` where there is one.
    """

    path: Path
    kind: str
    obs: pd.DataFrame
    obs_names: pd.Index
    gene_names: pd.Index
    var: pd.DataFrame
    species: str | None
    _rows: Rows = field(repr=False)
    _where: str = "X"
    _find_remedy: Callable[[], str | None] = field(default=lambda: None, repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs_names)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.gene_names)

    def chunks(self, start: int = 0) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Stream checked counts, a few thousand whole cells at a time.

        Parameters
        ----------
        start
            Cell to begin with, 0 … n_cells.

        Yields
        ------
        tuple
            Index of the first cell, and counts of this and the next ones: CSR int32, canonical, all genes.

        Raises
        ------
        LingshuError
            If the file is damaged or a value is no count; the words are those of ``read_counts``.
        """
        rows = self._rows(start)
        while True:
            with _readable(self.path):
                piece = next(rows, None)
                if piece is None:
                    break
                piece.check_format(full_check=True)
            check_counts(piece, f"{self.path.name}: {self._where}", self._find_remedy)
            yield start, canonical_counts(piece, copy=False)
            start += piece.shape[0]
        if start != self.n_cells:
            raise LingshuError(
                "The data file must be whole",
                f"{self.path} holds counts of {start} cells and names of {self.n_cells}",
                "Copy, download or write it again",
            )


def open_source(path: Path | str, layer: str | None = None) -> AbstractContextManager[CountSource]:
    """Open a file of raw counts without loading them.

    Parameters
    ----------
    path
        An ``.h5ad`` file, a ``.zarr`` folder, a Cell Ranger ``.h5`` file (of version 2 or 3), or a Cell Ranger folder
        with ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv`` or ``genes.tsv``, zipped or not.
    layer
        As in ``read_counts``; None for ``X``. Files of 10x have no layers.

    Returns
    -------
    context manager of CountSource

    Raises
    ------
    LingshuError
        If there is no such file, it is of no known kind or damaged, or names are duplicated.
    """
    path = expanded(path)
    refuse_special(path, "The data file must be readable")
    if not path.exists():
        raise LingshuError("The data file must exist", f"there is no {path}", "Check the path")
    kind = _kind_of(path)
    if kind in ("h5ad", "zarr"):
        return _open_anndata(path, kind, layer)
    if layer is not None:
        raise LingshuError("Files of 10x have no layers", f"{path.name} and layer {layer!r}", "Leave the layer out")
    return _open_10x_h5(path) if kind == "10x h5" else _open_10x_mtx(path)


def identity(path: Path | str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Say which bytes a file or folder holds.

    Parameters
    ----------
    path
        File or folder.
    known
        An earlier answer; as long as size and time of the last change are the same, its checksum is taken over.

    Returns
    -------
    dict
        ``bytes``, ``mtime_ns`` and ``sha256``; of a folder the sums over its files in order of their names.
    """
    path = expanded(path)
    refuse_special(path, "The data file must be readable")
    if path.is_dir():
        check_folder(path)
    try:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stats = [file.stat() for file in files]
        facts = {"bytes": sum(s.st_size for s in stats), "mtime_ns": max((s.st_mtime_ns for s in stats), default=0)}
        if known and all(known.get(key) == value for key, value in facts.items()):
            return {**facts, "sha256": known["sha256"]}
        digest = hashlib.sha256()
        for file, stat in zip(files, stats, strict=True):
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()}\0{stat.st_size}\0".encode())
            with open(file, "rb") as stream:
                while piece := stream.read(1 << 22):
                    digest.update(piece)
    except OSError as error:
        raise LingshuError("The data file must be readable", f"{path}: {error}", "Check the rights") from error
    return {**facts, "sha256": digest.hexdigest()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Also turn what gzip raises on broken bytes into an error that names the file."""
    with _whole(str(path)):
        try:
            yield
        except (EOFError, zlib.error) as error:
            raise ValueError(f"its zipped bytes end early or are wrong: {error}") from error


def _kind_of(path: Path) -> str:
    if path.is_dir():
        check_folder(path)
        return "10x mtx" if _first_of(path, _MATRIX_FILES) else "zarr"
    try:
        with h5py.File(path, "r") as file:
            is_10x = "obs" not in file and _group_of_10x(file) is not None
    except (OSError, RuntimeError, KeyError):
        return "h5ad"  # its reader says what is wrong
    return "10x h5" if is_10x else "h5ad"


@contextmanager
def _open_anndata(path: Path, kind: str, layer: str | None) -> Iterator[CountSource]:
    with _opened_path(path, called=str(path)) as parts:
        matrix = _chosen_matrix(parts, layer)
        var = parts.raw_var if layer == "raw" and parts.raw_var is not None else parts.var
        obs_names, gene_names = parts.obs.index.astype(str), var.index.astype(str)
        _check_names(obs_names, gene_names)
        with _whole(str(path)):
            rows = _rows_of(matrix, (len(obs_names), len(gene_names)))
        yield CountSource(
            path, kind, parts.obs, obs_names, gene_names, var, _species_of(path, kind), rows,
            _place(layer, parts), lambda: _where_integers_are(parts, layer),
        )  # fmt: skip


def _species_of(path: Path, kind: str) -> str | None:
    """Read what ``uns`` says of the species, if it is plain text."""
    import zarr

    store = h5py.File(path, "r") if kind == "h5ad" else zarr.open_group(path, mode="r")
    try:
        return uns_text(store, "species") or uns_text(store, "organism")
    finally:
        if kind == "h5ad":
            store.close()


def _rows_of(matrix: Any, shape: tuple[int, int]) -> Rows:
    """Choose how to stream a matrix by its storage."""
    if sparse.issparse(matrix):  # a layout of anndata < 0.7, which its reader loads whole
        loaded = sparse.csr_matrix(matrix)
        return _compressed_rows(loaded.data, loaded.indices, loaded.indptr, loaded.shape, shape)
    if not _is_group(matrix):
        _check_shape(tuple(matrix.shape), shape)
        return lambda start: _dense_rows(matrix, shape, start)
    encoding = matrix.attrs.get("encoding-type")
    if (layout := matrix.attrs.get("encoding-version")) != _SPARSE_LAYOUT:
        raise ValueError(f"a sparse matrix of version {layout!r} cannot be read")
    stated = tuple(int(n) for n in matrix.attrs["shape"])
    _check_shape(stated, shape)
    if encoding == "csr_matrix":
        return _compressed_rows(matrix["data"], matrix["indices"], matrix["indptr"], stated, shape)
    if encoding == "csc_matrix":
        return _CscRows(matrix["data"], matrix["indices"], matrix["indptr"], shape)
    raise ValueError(f"a matrix of kind {encoding!r} cannot be streamed")


def _dense_rows(matrix: Any, shape: tuple[int, int], start: int) -> Iterator[sparse.csr_matrix]:
    rows = min(CHUNK_CELLS, max(1, CHUNK_VALUES // max(1, shape[1])))
    for i in range(start, shape[0], rows):
        yield dense_counts(matrix[i : i + rows], "the matrix")


def _compressed_rows(data: Any, indices: Any, indptr: Any, stated: tuple[int, ...], shape: tuple[int, int]) -> Rows:
    _check_shape(tuple(stated), shape)
    pointers = _pointers(data, indices, indptr, shape[0])

    def rows(start: int) -> Iterator[sparse.csr_matrix]:
        while start < shape[0]:
            stop = int(np.searchsorted(pointers, pointers[start] + CHUNK_VALUES, side="right")) - 1
            stop = min(max(stop, start + 1), start + CHUNK_CELLS, shape[0])
            first, last = int(pointers[start]), int(pointers[stop])
            values, columns = np.array(data[first:last]), np.array(indices[first:last])
            yield sparse.csr_matrix((values, columns, pointers[start : stop + 1] - first), (stop - start, shape[1]))
            start = stop

    return rows


def _pointers(data: Any, indices: Any, indptr: Any, n_rows: int) -> np.ndarray:
    """Check the three arrays of a compressed matrix and give the pointers."""
    if len(data.shape) != 1 or len(indices.shape) != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"its values are {data.dtype} {data.shape}, its indices {indices.dtype} {indices.shape}")
    if indptr.shape != (n_rows + 1,):
        raise ValueError(f"its pointers have the shape {indptr.shape} for {n_rows} rows")
    return row_pointers(np.asarray(indptr[:]), n_rows, data.shape[0], indices.shape[0])


class _CscRows:
    """Rows of a matrix stored by columns: scanned anew for each block of rows that fits into memory."""

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> None:
        self._data, self._indices, self._shape = data, indices, shape
        self._pointers = _pointers(data, indices, indptr, shape[1])
        self._per_row: np.ndarray | None = None

    def __call__(self, start: int) -> Iterator[sparse.csr_matrix]:
        if self._per_row is None:
            self._per_row = np.zeros(self._shape[0], dtype=np.int64)
            for first, last in self._ranges():
                rows = np.asarray(self._indices[first:last])
                if len(rows) and (rows.min() < 0 or rows.max() >= self._shape[0]):
                    raise ValueError("row indices are out of range")
                self._per_row += np.bincount(rows, minlength=self._shape[0])
        pointers = np.append(0, np.cumsum(self._per_row))
        while start < self._shape[0]:
            stop = int(np.searchsorted(pointers, pointers[start] + _CSC_VALUES, side="right")) - 1
            stop = min(max(stop, start + 1), self._shape[0])
            block = self._block(start, stop)
            for i in range(0, stop - start, CHUNK_CELLS):
                yield block[i : i + CHUNK_CELLS]
            start = stop

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + CHUNK_VALUES, self._data.shape[0])) for i in range(0, self._data.shape[0], CHUNK_VALUES))

    def _block(self, start: int, stop: int) -> sparse.csr_matrix:
        values, rows, columns = [], [], []
        for first, last in self._ranges():
            row = np.asarray(self._indices[first:last])
            here = np.flatnonzero((row >= start) & (row < stop))
            values.append(np.asarray(self._data[first:last])[here])
            rows.append(row[here] - start)
            columns.append(np.searchsorted(self._pointers, first + here, side="right") - 1)
        shape = (stop - start, self._shape[1])
        if not values:
            return sparse.csr_matrix(shape, dtype=self._data.dtype)
        triple = [np.concatenate(part) for part in (values, rows, columns)]
        return sparse.csr_matrix((triple[0], (triple[1], triple[2])), shape)


# --- 10x ------------------------------------------------------------------------------------------------------------


def _group_of_10x(file: h5py.File) -> str | None:
    names = [name for name, group in file.items() if isinstance(group, h5py.Group) and "barcodes" in group]
    return names[0] if len(names) == 1 else None


@contextmanager
def _open_10x_h5(path: Path) -> Iterator[CountSource]:
    with h5py.File(path, "r") as file:
        with _whole(str(path)):
            check_hdf5(file, str(path))
            group = file[_group_of_10x(file)]
            features = group.get("features", group)
            ids = _texts(features["id"] if "id" in features else features["genes"])
            names = _texts(features["name"] if "name" in features else features["gene_names"])
            kinds = _texts(features["feature_type"]) if "feature_type" in features else None
            barcodes = _texts(group["barcodes"])
            n_features, n_cells = (int(n) for n in group["shape"][:])  # stored by cell, as genes × cells
            n_kinds = n_features if kinds is None else len(kinds)
            if (len(ids), len(names), n_kinds, len(barcodes)) != (n_features, n_features, n_features, n_cells):
                raise ValueError("names and shape do not fit")
            shape = (n_cells, n_features)
            rows = _compressed_rows(group["data"], group["indices"], group["indptr"], shape, shape)
        yield _source_of_10x(path, "10x h5", barcodes, ids, names, kinds, rows)


@contextmanager
def _open_10x_mtx(path: Path) -> Iterator[CountSource]:
    tables = {}
    for what, names in _TABLE_FILES.items():
        file = _first_of(path, names)
        if file is None:
            raise LingshuError(
                "A 10x folder must hold matrix.mtx, barcodes.tsv and features.tsv",
                f"{path} has none of {offenders(names)}",
                "Copy the whole folder",
            )
        with _readable(file), open_binary(file) as stream:
            tables[what] = pd.read_csv(stream, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    features = tables["features"]
    ids, names = features[0].tolist(), features[min(1, features.shape[1] - 1)].tolist()
    kinds = features[2].tolist() if features.shape[1] > 2 else None
    barcodes = tables["barcodes"][0].tolist()
    matrix = _first_of(path, _MATRIX_FILES)
    assert matrix is not None  # the kind was told by it
    shape = (len(barcodes), len(ids))
    yield _source_of_10x(path, "10x mtx", barcodes, ids, names, kinds, lambda start: _mtx_rows(matrix, shape, start))


def _source_of_10x(
    path: Path, kind: str, barcodes: list[str], ids: list[str], names: list[str], kinds: list[str] | None, rows: Rows
) -> CountSource:
    """Keep genes only: Cell Ranger files may also hold antibodies, guides or peaks."""
    is_gene = np.array([one == "Gene Expression" for one in kinds]) if kinds else np.ones(len(ids), dtype=bool)
    gene_names = make_index_unique(pd.Index(np.array(names, dtype=object)[is_gene].astype(str)))
    obs_names = pd.Index(barcodes)
    _check_names(obs_names, gene_names)
    var = pd.DataFrame({"gene_ids": np.array(ids, dtype=object)[is_gene]}, index=gene_names)
    of_genes = np.flatnonzero(is_gene)
    chosen = rows if is_gene.all() else lambda start: (piece[:, of_genes] for piece in rows(start))
    return CountSource(path, kind, pd.DataFrame(index=obs_names), obs_names, gene_names, var, None, chosen, "matrix")


def _mtx_rows(file: Path, shape: tuple[int, int], start: int) -> Iterator[sparse.csr_matrix]:
    """Parse Matrix Market text as Cell Ranger writes it: gene, cell, count, sorted by cell."""
    n_cells, n_genes = shape
    with open_text(file, encoding="ascii") as stream:
        n_values = _mtx_header(stream, shape)
        held = np.empty((0, 3))
        n_read, last_cell, next_cell = 0, 0, start
        names = ["gene", "cell", "count"]
        tables = pd.read_csv(stream, sep=r"\s+", header=None, names=names, comment="%", chunksize=CHUNK_VALUES // 4)
        for table in tables:
            triple = table.to_numpy(dtype=np.float64)
            n_read += len(triple)
            _check_places(triple, shape)
            cells = triple[:, 1] - 1
            if (np.diff(cells, prepend=last_cell) < 0).any():
                raise LingshuError(
                    "A 10x matrix must be sorted by cell",
                    f"{file} is not",
                    "Read it with scanpy.read_10x_mtx and save it with write_h5ad",
                )
            last_cell = cells[-1]
            triple = np.concatenate([held, triple[cells >= start]])
            whole = triple[:, 1] - 1 < last_cell  # the last cell may go on in the next piece
            stop = min(int(last_cell), n_cells)
            if stop > next_cell:
                yield from _in_pieces(triple[whole], next_cell, stop, n_genes)
                next_cell = stop
                triple = triple[~whole]
            held = triple
    if n_read != n_values:
        raise ValueError(f"{file.name} announces {n_values} values and holds {n_read}")
    if next_cell < n_cells:
        yield from _in_pieces(held, next_cell, n_cells, n_genes)


def _check_places(triple: np.ndarray, shape: tuple[int, int]) -> None:
    """Refuse genes and cells that are no whole numbers from 1 on."""
    for column, most, what in ((0, shape[1], "gene"), (1, shape[0], "cell")):
        places = triple[:, column]
        wrong = ~((places >= 1) & (places <= most) & (places == np.floor(places)))
        if wrong.any():
            raise ValueError(f"matrix.mtx names {what} {places[wrong][0]:g}, which is out of range: it has {most}")


def _in_pieces(triple: np.ndarray, first: int, stop: int, n_genes: int) -> Iterator[sparse.csr_matrix]:
    genes, cells = triple[:, 0].astype(np.int64) - 1, triple[:, 1].astype(np.int64) - 1
    rows = sparse.csr_matrix((triple[:, 2], (cells - first, genes)), (stop - first, n_genes))
    for i in range(0, stop - first, CHUNK_CELLS):
        yield rows[i : i + CHUNK_CELLS]


def _mtx_header(stream: IO[str], shape: tuple[int, int]) -> int:
    line = stream.readline(_LONGEST_LINE)
    if not line.startswith("%%MatrixMarket matrix coordinate"):
        raise ValueError("matrix.mtx does not begin as a sparse Matrix Market file")
    while line.startswith("%"):
        while line and not line.endswith("\n"):
            line = stream.readline(_LONGEST_LINE)
        line = stream.readline(_LONGEST_LINE)
    n_genes, n_cells, n_values = (int(word) for word in line.split())
    if (n_cells, n_genes) != shape:
        raise ValueError(f"matrix.mtx has {n_cells} cells and {n_genes} genes, the tables {shape[0]} and {shape[1]}")
    return n_values


def _first_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _texts(dataset: h5py.Dataset) -> list[str]:
    if dataset.dtype.kind not in "SOU":
        raise ValueError(f"names are {dataset.dtype}")
    return [one.decode() if isinstance(one, bytes) else str(one) for one in dataset[:]]
