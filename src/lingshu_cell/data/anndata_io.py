"""Raw counts in from AnnData, h5ad, zarr or a URL, checked; generated cells out to h5ad, in bounded memory."""

import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from scipy import sparse

from lingshu_cell.data.cell_folder import is_cell_folder, shard_files
from lingshu_cell.data.containers import check_folder, check_hdf5, check_zarr
from lingshu_cell.data.counts import canonical_counts, check_counts, dense_counts, fingerprint, row_pointers
from lingshu_cell.data.hdf5_output import Hdf5Output, writing_hdf5
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, refuse_special
from lingshu_cell.output_files import Draft, write_atomically

_CHUNK = 1 << 22  # values looked at or made sparse at a time
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, eq=False)
class CountMatrix:
    """Checked raw counts with their labels.

    Parameters
    ----------
    counts
        UMI counts, CSR int32, shape [n_cells, n_genes]; sorted indices, no duplicates, no stored zeros.
    obs
        Labels of the cells, all columns of the source.
    obs_names
        Unique cell names.
    gene_names
        Unique gene names (``var_names``).
    var
        Annotation of the genes, all columns of the source.
    uns_source
        Text of ``uns["source"]`` where there is one.
    source
        The path or URL, or ``"AnnData in memory"``.
    fingerprint
        sha256 over shape, gene names and counts; the same for CSR, CSC, dense, float or integer storage.
    """

    counts: sparse.csr_matrix
    obs: pd.DataFrame
    obs_names: pd.Index
    gene_names: pd.Index
    var: pd.DataFrame
    uns_source: str | None
    source: str
    fingerprint: str

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]


@dataclass(frozen=True, eq=False)
class _Parts:
    """One AnnData, opened but not loaded: matrices by the name of the ``layer`` argument, None meaning X."""

    obs: pd.DataFrame
    var: pd.DataFrame
    raw_var: pd.DataFrame | None
    matrices: Mapping[str | None, Any]
    uns_source: str | None


def read_counts(source: Path | str | ad.AnnData, layer: str | None = None, obs_keys: Sequence[str] = ()) -> CountMatrix:
    """Read raw counts and refuse everything that is not.

    Cells without any counts are kept, with a warning: in a gene panel they are ordinary observations, and dropping them
    here would silently shift the cells against the caller's own tables.

    Parameters
    ----------
    source
        An AnnData, the path of an ``.h5ad`` file, of a ``.zarr`` folder or of a folder of generated cells, or the URL
        (http, https, ftp, file) of an h5ad.
    layer
        Name of the layer that holds the counts; None for ``X``, ``"raw"`` for ``raw.X`` with the genes of ``raw``
        (unless a layer has that name).
    obs_keys
        obs columns that must exist and have a label in every cell.

    Returns
    -------
    CountMatrix
        The counts; integers stored as floats, CSC and dense matrices are converted without a dense copy of the whole.

    Raises
    ------
    LingshuError
        If the file or URL cannot be read or holds no AnnData, the layer or a key is missing, names are duplicated, a
        label is missing, there are no cells or no genes, or values are not integers in 0 … 2³¹ − 1.
    """
    obs_keys = [obs_keys] if isinstance(obs_keys, str) else list(obs_keys)
    with _opened(source) as parts:
        matrix = _chosen_matrix(parts, layer)
        var = parts.raw_var if layer == "raw" and parts.raw_var is not None else parts.var
        obs_names, gene_names = parts.obs.index.astype(str), var.index.astype(str)
        _check_names(obs_names, gene_names)
        _check_labels(parts.obs, obs_names, obs_keys)
        loaded = _load_csr(matrix, (len(obs_names), len(gene_names)), _place(layer, parts))
        check_counts(loaded, _place(layer, parts), lambda: _where_integers_are(parts, layer))
    counts = canonical_counts(loaded, copy=isinstance(source, ad.AnnData))
    empty = obs_names[np.diff(counts.indptr) == 0]
    if len(empty):
        warnings.warn(f"Cells without any counts are kept: {offenders(empty)}", UserWarning, stacklevel=2)
    return CountMatrix(
        counts=counts,
        obs=parts.obs,
        obs_names=obs_names,
        gene_names=gene_names,
        var=var,
        uns_source=parts.uns_source,
        source="AnnData in memory" if isinstance(source, ad.AnnData) else str(source),
        fingerprint=fingerprint(counts, gene_names),
    )


def read_obs(source: Path | str | ad.AnnData) -> pd.DataFrame:
    """Read the labels of the cells and nothing else.

    Parameters
    ----------
    source
        As in :func:`read_counts`.

    Returns
    -------
    pandas.DataFrame
        ``obs``, all columns.

    Raises
    ------
    LingshuError
        If the file or URL cannot be read or holds no AnnData.
    """
    with _opened(source) as parts:
        return parts.obs


@contextmanager
def _opened(source: Path | str | ad.AnnData) -> Iterator[_Parts]:
    if isinstance(source, ad.AnnData):
        yield _parts_of_anndata(source.to_memory() if source.isbacked else source)
    elif isinstance(source, str) and _URL.match(source):
        with (
            tempfile.TemporaryDirectory() as folder,
            _opened_path(_download(source, Path(folder)), called=source) as parts,
        ):
            yield parts
    elif isinstance(source, (str, os.PathLike)) and isinstance(os.fspath(source), str):
        if is_cell_folder(expanded(source)):
            yield _parts_of_shards(shard_files(expanded(source)))
            return
        with _opened_path(expanded(source), called=os.fspath(source)) as parts:
            yield parts
    else:
        raise LingshuError(
            "Counts are read from an AnnData, a path or a URL",
            f"got {type(source).__name__}",
            "Wrap a matrix as anndata.AnnData(X=…) with obs_names and var_names",
        )


def _download(url: str, folder: Path) -> Path:
    path = folder / "download.h5ad"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
            announced = response.headers.get("Content-Length")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise LingshuError(
            "The URL must lead to an h5ad file",
            f"{url} could not be fetched ({getattr(error, 'reason', None) or error})",
            "Check the address and the connection (http, https, ftp and file work), or download the file first",
        ) from error
    if announced is not None and int(announced) != path.stat().st_size:
        raise LingshuError(
            "The download must be whole",
            f"{path.stat().st_size} of {announced} bytes of {url} came",
            "Try again, or download the file first",
        )
    return path


@contextmanager
def _opened_path(path: Path, called: str) -> Iterator[_Parts]:
    refuse_special(path, "The data file must be readable")
    if not path.exists():
        raise LingshuError("The data file must exist", f"there is no {called or 'name'}", "Check the path")
    if path.is_dir():
        store, close = _open_zarr(path, called), None
    else:
        store = _open_h5(path, called)
        close = store.close
    try:
        with _whole(called):
            if not ("obs" in store and "var" in store):
                raise _not_anndata(called, f"it holds {offenders(sorted(store.keys()))}")
            if close:
                check_hdf5(store, called)
            else:
                check_zarr(store, called)
            legacy = "encoding-type" not in store.attrs  # written by anndata < 0.7: its own reader knows these layouts
            parts = _parts_of_anndata(ad.read_h5ad(path)) if legacy and close else _parts_of_store(store)
            _check_texts(parts.obs)
        yield parts
    finally:
        if close:
            close()


def _open_h5(path: Path, called: str) -> h5py.File:
    try:
        if not h5py.is_hdf5(path):
            raise _not_anndata(called, "it is empty" if path.stat().st_size == 0 else "it is no HDF5 file")
        return h5py.File(path, "r")
    except OSError as error:
        what = "it is cut off" if "truncated" in str(error) else f"it cannot be opened ({error})"
        raise LingshuError(
            "The data file must be whole", f"{called}: {what}", "Copy, download or write it again"
        ) from error


def _open_zarr(path: Path, called: str) -> Any:
    import zarr

    check_folder(path)
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:  # broken metadata make it fail in any way
        raise _not_anndata(called, "the folder is no zarr group") from error


def _not_anndata(called: str, finding: str) -> LingshuError:
    return LingshuError(
        "The data file must be an AnnData (.h5ad or .zarr)",
        f"{called}: {finding}",
        "Read other formats with scanpy (read_10x_h5, read_10x_mtx, read_csv, read_loom) and save them with write_h5ad",
    )


@contextmanager
def _whole(what: str) -> Iterator[None]:
    """Turn what h5py, zarr, anndata and scipy raise on broken bytes into an error that names the file."""
    try:
        yield
    except (LingshuError, MemoryError):
        raise
    except Exception as error:  # as many kinds as there are ways to break a file, and more with every release
        raise LingshuError(
            "The data file must be whole",
            f"{what} is damaged ({type(error).__name__}: {str(error)[:200]})",
            "Copy, download or write it again",
        ) from error


def _parts_of_anndata(adata: ad.AnnData) -> _Parts:
    matrices: dict[str | None, Any] = {None: adata.X}
    if adata.raw is not None:
        matrices["raw"] = adata.raw.X
    matrices.update(adata.layers)
    raw_var = None if adata.raw is None or "raw" in adata.layers else adata.raw.var.copy()
    said = adata.uns.get("source")
    return _Parts(adata.obs.copy(), adata.var.copy(), raw_var, matrices, said if isinstance(said, str) else None)


def _parts_of_store(store: Any) -> _Parts:
    layers = store.get("layers", {})
    raw = store.get("raw")  # anndata >= 0.12 writes "no raw" as an empty dataset
    raw = raw if _is_group(raw) and "X" in raw else None
    matrices: dict[str | None, Any] = {None: store.get("X")}
    if raw is not None:
        matrices["raw"] = raw["X"]
    matrices.update({str(name): layers[name] for name in layers})
    raw_var = None if raw is None or "raw" in layers else read_elem(raw["var"])
    said = uns_text(store, "source")
    return _Parts(read_elem(store["obs"]), read_elem(store["var"]), raw_var, matrices, said)


def uns_text(store: Any, key: str) -> str | None:
    """Give a text of ``uns``; None where there is none, or none that can be read: it is a remark, no data."""
    uns = store.get("uns")
    try:
        said = read_elem(uns[key]) if _is_group(uns) and key in uns else None
    except Exception:  # damaged in any way
        return None
    return said if isinstance(said, str) else None


def _parts_of_shards(files: Sequence[Path]) -> _Parts:
    """All shards of a folder of generated cells, in memory."""
    obs, counts, first = [], [], None
    for file in files:
        with _opened_path(file, str(file)) as parts:
            first = first or parts
            if not parts.var.index.equals(first.var.index):
                rule = "All shards must hold the same genes"
                raise LingshuError(rule, f"{file} has others than {files[0]}", "Generate the cells again")
            obs.append(parts.obs)
            counts.append(_load_csr(_chosen_matrix(parts, None), (len(parts.obs), len(parts.var)), "X"))
    whole = sparse.vstack(counts, format="csr")
    return _Parts(pd.concat(obs), first.var, None, {None: whole}, first.uns_source)


def _chosen_matrix(parts: _Parts, layer: str | None) -> Any:
    matrix = parts.matrices.get(layer)
    if matrix is not None and getattr(matrix, "shape", True) is not None:
        return matrix
    present = [name for name in parts.matrices if name is not None]
    raise LingshuError(
        "Counts must be in X or in the layer named",
        "there is no X" if layer is None else f"there is no layer {layer!r}",
        f"Layers present: {offenders(present)}" if present else "There are no layers: use X, or save the counts again",
    )


def _check_names(obs_names: pd.Index, gene_names: pd.Index) -> None:
    for names, what in ((obs_names, "cells"), (gene_names, "genes")):
        if not len(names):
            raise LingshuError(f"The data must have {what}", f"there are no {what}", "Check how the file was filtered")
    for names, what in ((gene_names, "var_names"), (obs_names, "obs_names")):
        wrong = [name for name in names if not name or "\0" in name]
        if wrong:
            raise LingshuError(
                f"{what} must be texts without zero bytes",
                f"empty or with such bytes: {offenders(wrong)}",
                "Name these rows or drop them",
            )
        if not names.is_unique:
            raise LingshuError(
                f"{what} must be unique",
                f"found more than once: {offenders(names[names.duplicated()].unique())}",
                f"Call adata.{what}_make_unique() and save the file again",
            )


def _check_texts(obs: pd.DataFrame) -> None:
    """Refuse texts that no h5ad file can hold."""
    for name in obs.columns:
        column = obs[name]
        is_category = isinstance(column.dtype, pd.CategoricalDtype)
        if is_category or column.dtype.kind == "O":
            texts = column.cat.categories if is_category else column.unique()
            wrong = [text for text in texts if isinstance(text, str) and "\0" in text]
            if wrong:
                raise LingshuError(
                    "Labels must be texts without zero bytes", f"obs[{name!r}] has {offenders(wrong)}", "Mend them"
                )


def _check_labels(obs: pd.DataFrame, obs_names: pd.Index, keys: Sequence[str]) -> None:
    absent = [key for key in keys if key not in obs.columns]
    if absent:
        available = f"Available: {offenders(obs.columns)}" if len(obs.columns) else "The data has no obs columns"
        raise LingshuError("Keys must be obs columns", f"there is no {offenders(absent)}", available)
    for key in keys:
        missing = obs[key].isna().to_numpy()
        if missing.any():
            raise LingshuError(
                f"Every cell needs a label in obs[{key!r}]",
                f"cells without one: {offenders(obs_names[missing])}",
                "Drop these cells or give them a label",
            )


def _is_group(matrix: Any) -> bool:
    return hasattr(matrix, "keys") and hasattr(matrix, "attrs")


def _load_csr(matrix: Any, shape: tuple[int, int], where: str) -> sparse.csr_matrix:
    """Load any storage of a matrix as CSR, dense ones by blocks of rows."""
    with _whole("the count matrix"):
        if _is_group(matrix):
            stated = tuple(int(n) for n in matrix.attrs.get("shape", ()))
            _check_shape(stated, shape)
            matrix = read_elem(matrix)
        elif hasattr(matrix, "compute"):  # dask
            matrix = matrix.compute()
        _check_shape(tuple(getattr(matrix, "shape", ())), shape)
        if not sparse.issparse(matrix):
            rows = max(1, _CHUNK // max(1, shape[1]))
            blocks = [dense_counts(matrix[i : i + rows], where) for i in range(0, matrix.shape[0], rows)]
            matrix = sparse.vstack(blocks, format="csr")
        elif matrix.format in ("csr", "csc"):
            n_rows = shape[0] if matrix.format == "csr" else shape[1]
            row_pointers(matrix.indptr, n_rows, len(matrix.data), len(matrix.indices))
            if matrix.indices.dtype.kind not in "iu":
                raise ValueError(f"its indices are {matrix.indices.dtype}")
            matrix.check_format(full_check=True)
        loaded = sparse.csr_matrix(matrix)
        loaded.check_format(full_check=True)
    return loaded


def _check_shape(stated: tuple[int, ...], shape: tuple[int, int]) -> None:
    if stated != shape:
        raise ValueError(f"its shape is {stated}, but there are {shape[0]} cells and {shape[1]} genes")


def _place(layer: str | None, parts: _Parts) -> str:
    if layer is None:
        return "X"
    return "raw.X" if layer == "raw" and parts.raw_var is not None else f"layers[{layer!r}]"


def _where_integers_are(parts: _Parts, layer: str | None) -> str | None:
    """Name the other matrices of the data that hold non-negative integers, judged by their first values."""
    others = [name for name, matrix in parts.matrices.items() if name != layer and matrix is not None]
    found = [name for name in others if _holds_integers(parts.matrices[name])]
    return "; ".join(f"{_place(name, parts)} holds integers: pass layer={name!r}" for name in found) or None


def _holds_integers(matrix: Any) -> bool:
    if _is_group(matrix):
        values = matrix["data"][:_CHUNK] if "data" in matrix else np.empty(0)
    elif sparse.issparse(matrix):
        values = matrix.data[:_CHUNK]
    else:
        values = np.asarray(matrix[: max(1, _CHUNK // matrix.shape[1])])
    if values.dtype.kind not in "iuf" or not values.size or not np.isfinite(values).all():
        return False
    return bool(values.min() >= 0 and values.max() > 0 and (values == np.floor(values)).all())


class H5adWriter:
    """Write generated cells to an h5ad file piece by piece; the file appears under its name only when whole.

    Counts go to ``<path>.tmp`` as they come and take no memory; only the labels are kept until the end. Used as a
    context manager it closes by itself, and an error inside the block removes the unfinished file.

    Parameters
    ----------
    path
        The file to write; its folder must exist.
    var
        Annotation of the genes; the index holds the unique gene names.
    n_cells
        Number of cells that must have come when the file is closed; None if not known.
    overwrite
        Whether an existing file may be replaced.

    Raises
    ------
    LingshuError
        If the file exists, its folder does not, it cannot be written, or gene names are duplicated.
    """

    def __init__(
        self, path: Path | str, var: pd.DataFrame, n_cells: int | None = None, overwrite: bool = False
    ) -> None:
        self.path = Path(path).expanduser()
        self._n_expected = n_cells
        self._var = _text_index(var)
        _check_names(pd.Index(["any"]), self._var.index)
        _check_output(self.path, overwrite)
        self._obs: list[pd.DataFrame] = []
        self._seen: set[str] = set()
        with _writing(self.path):
            self._draft = Draft(self.path, self.path.with_name(self.path.name + ".tmp"))
        self._output: Hdf5Output | None = None
        try:
            _check_output(self.path, overwrite)  # once more: another process may have written it before we held it
            with _writing(self.path):
                self._output = Hdf5Output(self._draft.path)
                with self._output.told_once() as self._file:
                    self._begin()
        except BaseException:
            self.abort()
            raise

    @property
    def n_written(self) -> int:
        """Number of cells appended so far."""
        return len(self._seen)

    def append(self, counts: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        """Add cells at the end.

        Parameters
        ----------
        counts
            UMI counts, integer dtype, shape [n_new_cells, n_genes].
        obs
            Labels, one row per new cell; the index holds names that no other cell has, the columns are those of the
            first call.

        Raises
        ------
        LingshuError
            If shapes, columns or names do not fit, values are no counts, or the disk is full.
        """
        obs = _text_index(obs)
        self._check_piece(counts, obs)
        counts = canonical_counts(sparse.csr_matrix(counts), copy=True)
        with _writing(self.path), self._output.told_once():
            group = self._file["X"]
            _extend(group["indptr"], len(group["data"]) + counts.indptr[1:].astype(np.int64))
            _extend(group["indices"], counts.indices)
            _extend(group["data"], counts.data)
        self._obs.append(obs)
        self._seen.update(obs.index)

    def close(self, uns: Mapping[str, Any] | None = None) -> None:
        """Write the labels and ``uns``, and give the file its name.

        Parameters
        ----------
        uns
            What AnnData may hold in ``uns``: nested mappings of text, numbers and arrays.

        Raises
        ------
        LingshuError
            If the number of cells is not the one promised, no cell came, or the disk is full. The unfinished file is
            removed.
        """
        try:
            if self.n_written == 0 or self._n_expected not in (None, self.n_written):
                expected = "at least one" if self._n_expected is None else self._n_expected
                raise LingshuError(
                    "The file must hold all cells", f"{self.n_written} of {expected} came", "Append the others first"
                )
            with _writing(self.path):
                with self._output.told_once():
                    self._file["X"].attrs["shape"] = np.array([self.n_written, len(self._var)], dtype=np.int64)
                    _narrow_pointers(self._file["X"])
                    write_elem(self._file, "obs", _categorical(pd.concat(self._obs)))
                    write_elem(self._file, "var", self._var)
                    write_elem(self._file, "uns", dict(uns or {}))
                    for name in ("layers", "obsm", "varm", "obsp", "varp"):
                        write_elem(self._file, name, {})
                self._output.close()
                self._draft.commit()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up and remove the unfinished file."""
        if self._output is not None:
            self._output.abandon()
        self._draft.abort()

    def __enter__(self) -> "H5adWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._file:
            self.close()

    def _begin(self) -> None:
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        group = self._file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        for name, dtype in (("data", np.int32), ("indices", np.int32), ("indptr", np.int64)):
            group.create_dataset(
                name, (0,), dtype, maxshape=(None,), chunks=(1 << 16,), compression="gzip", shuffle=True
            )
        _extend(group["indptr"], np.zeros(1, np.int64))

    def _check_piece(self, counts: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        remedy = "Check the code that generates the cells"
        if counts.shape != (len(obs), len(self._var)):
            finding = f"shape {counts.shape} for {len(obs)} rows of obs and {len(self._var)} genes"
            raise LingshuError("Cells to write need one row of obs each and every gene", finding, remedy)
        if not np.issubdtype(counts.dtype, np.integer) or (counts.nnz and counts.data.min() < 0):
            finding = f"dtype {counts.dtype}, smallest {counts.data.min() if counts.nnz else 0}"
            raise LingshuError("Cells to write must be integer counts, 0 or more", finding, remedy)
        if self._obs and list(obs.columns) != list(self._obs[0].columns):
            finding = f"{offenders(obs.columns)} after {offenders(self._obs[0].columns)}"
            raise LingshuError("All pieces need the same obs columns", finding, remedy)
        repeated = list(obs.index[obs.index.duplicated()]) + [name for name in obs.index if name in self._seen]
        if repeated:
            finding = f"found more than once: {offenders(dict.fromkeys(repeated))}"
            raise LingshuError("obs_names must be unique", finding, remedy)


def write_adata(path: Path, adata: ad.AnnData) -> None:
    """Write a whole AnnData, compressed; the file appears when it is whole.

    Raises
    ------
    LingshuError
        If it cannot be written.
    """

    def save(draft: Path) -> None:
        with writing_hdf5(draft) as file:
            write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})

    with _writing(path):
        write_atomically(path, save)


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise LingshuError("The output must be a file", f"{path} is a device or a pipe", "Name a file")
    if path.is_dir():
        raise LingshuError("The output must be a file", f"{path} is a folder", "Name a file in it, e.g. generated.h5ad")
    if path.exists() and not overwrite:
        raise LingshuError("The output must not exist yet", f"{path} does", "Choose another name or allow overwriting")
    if not path.parent.is_dir():
        raise LingshuError("The folder of the output must exist", f"there is no {path.parent}", "Create it first")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LingshuError(
            "The output must be writable",
            f"{path}: {error.strerror or error}",
            "Check the rights and the space on the disk",
        ) from error


def _narrow_pointers(group: h5py.Group) -> None:
    """Give row pointers the type of the gene numbers where they fit: scipy changes no mixture of both in place."""
    pointers = group["indptr"][:]
    if pointers[-1] < 2**31:
        del group["indptr"]
        group.create_dataset("indptr", data=pointers.astype(np.int32), compression="gzip", shuffle=True)


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize((start + len(values),))
    dataset[start:] = values


def _text_index(table: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    table.index = table.index.astype(str)
    table.index.name = None
    return table


def _categorical(obs: pd.DataFrame) -> pd.DataFrame:
    """Make text columns categorical, as scanpy expects them for colours and groups."""
    is_number = {name: pd.api.types.is_numeric_dtype(obs[name]) for name in obs}  # True for bool too
    return obs.assign(**{str(name): obs[name].astype("category") for name in obs if not is_number[name]})
