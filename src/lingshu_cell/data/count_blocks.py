"""The count matrix of an h5ad file, block of cells by block of cells, in memory that does not grow with the file."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from lingshu_cell.data.containers import check_hdf5
from lingshu_cell.data.counts import dense_counts, row_pointers
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, refuse_special

VALUES_PER_BLOCK = 1 << 19  # larger blocks save a tenth of the time and cost most of the memory


class CountBlocks:
    """A count matrix on disk, CSR or dense, that is read some cells at a time; a context manager.

    Parameters
    ----------
    path
        h5ad file.
    layer
        Layer of the matrix; None for ``X``.

    Raises
    ------
    LingshuError
        If the file is no h5ad file, has no such matrix, or keeps it by genes (CSC), or if its row pointers are broken.
    """

    def __init__(self, path: Path | str, layer: str | None = None) -> None:
        self.path = expanded(path)
        refuse_special(self.path, "The cells must be an h5ad file")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            finding = f"{path} cannot be opened ({error})" if self.path.exists() else f"there is no {path}"
            raise LingshuError("The cells must be an h5ad file", finding, "Check the path") from error
        try:
            check_hdf5(self._file, str(path))
            self._open(layer)
        except LingshuError:
            self._file.close()
            raise
        except Exception as error:  # as many kinds as there are ways to break a file
            self._file.close()
            raise self._damaged(f"{type(error).__name__}: {str(error)[:200]}") from error

    def __enter__(self) -> "CountBlocks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def blocks(self, values_per_block: int = VALUES_PER_BLOCK) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Read all cells in their order.

        Parameters
        ----------
        values_per_block
            Stored values (of a dense matrix: all values) read at a time; a cell with more is a block of its own.

        Yields
        ------
        tuple
            Number of the first cell, and the values, CSR of the dtype on disk, shape [n_cells_of_the_block, n_genes].

        Raises
        ------
        LingshuError
            If the file is damaged or names a gene that does not exist.
        """
        start = 0
        while start < self.n_cells:
            try:
                end, block = (
                    self._dense(start, values_per_block) if self.is_dense else self._sparse(start, values_per_block)
                )
            except (OSError, ValueError, RuntimeError) as error:
                if isinstance(error, LingshuError):
                    raise
                raise self._damaged(str(error)) from error
            yield start, block
            start = end

    def _open(self, layer: str | None) -> None:
        place = "X" if layer is None else f"layers/{layer}"
        missing = [name for name in ("obs", "var", place) if name not in self._file]
        if missing:
            layers = list(self._file.get("layers", {}))
            remedy = f"Layers present: {offenders(layers)}" if layers else "Save it with AnnData.write_h5ad"
            raise LingshuError("The cells must be an h5ad file with counts", f"{self.path} has no {missing[0]}", remedy)
        self._matrix: Any = self._file[place]
        self.gene_names = pd.Index(read_elem(self._file["var"]).index.astype(str))
        self.is_dense = isinstance(self._matrix, h5py.Dataset)
        attributes = dict(self._matrix.attrs)
        self.encoding = (
            "dense" if self.is_dense else str(attributes.get("encoding-type", attributes.get("h5sparse_format")))
        )
        shape = self._matrix.shape if self.is_dense else attributes.get("shape", attributes.get("h5sparse_shape"))
        self.n_cells, self.n_genes = (int(length) for length in shape)
        if self.n_genes != len(self.gene_names):
            raise self._damaged(f"{self.n_genes} columns for {len(self.gene_names)} genes")
        if not self.is_dense and not self.encoding.startswith("csr"):
            remedy = "Save it again after adata.X = adata.X.tocsr()"
            raise LingshuError("Counts must be stored by cells (CSR)", f"{self.path} has {self.encoding}", remedy)
        self.n_stored: int | None = None if self.is_dense else len(self._matrix["data"])
        self.value_dtype: np.dtype = self._matrix.dtype if self.is_dense else self._matrix["data"].dtype
        if not self.is_dense:
            self._read_pointers()

    def _read_pointers(self) -> None:
        indptr, n_values = self._matrix["indptr"], len(self._matrix["data"])
        if indptr.shape != (self.n_cells + 1,):
            raise self._damaged("the row pointers do not rise from 0, one for each cell")
        self._indptr = row_pointers(indptr[:], self.n_cells, n_values, len(self._matrix["indices"]))

    def _sparse(self, start: int, values_per_block: int) -> tuple[int, sparse.csr_matrix]:
        indptr = self._indptr
        end = int(np.searchsorted(indptr, indptr[start] + values_per_block, side="right")) - 1
        end = min(max(end, start + 1), self.n_cells)
        values = slice(int(indptr[start]), int(indptr[end]))
        data, indices = self._matrix["data"][values], self._matrix["indices"][values]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_genes:
            raise self._damaged(f"gene numbers from {indices.min()} to {indices.max()} for {self.n_genes} genes")
        pointers = (indptr[start : end + 1] - indptr[start]).astype(np.int32)
        shape = (end - start, self.n_genes)
        return end, sparse.csr_matrix((data, indices.astype(np.int32, copy=False), pointers), shape=shape)

    def _dense(self, start: int, values_per_block: int) -> tuple[int, sparse.csr_matrix]:
        end = min(start + max(1, values_per_block // max(1, self.n_genes)), self.n_cells)
        return end, dense_counts(self._matrix[start:end], str(self.path))

    def _damaged(self, finding: str) -> LingshuError:
        return LingshuError("The matrix must be whole", f"{self.path}: {finding}", "Write the file again")
