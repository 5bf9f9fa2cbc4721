"""The files to be compared, read and brought to the same genes."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.data.anndata_io import CountMatrix
from lingshu_cell.errors import LingshuError, offenders

DEFAULT_CELL_TYPE_KEY = "cell_type"
_LEAST_COVERAGE = 0.5


def common_genes(files: Mapping[str, CountMatrix]) -> pd.Index:
    """Find the genes of the real file, in its order, that every other file has too.

    Parameters
    ----------
    files
        ``"real"`` and others, by name.

    Returns
    -------
    Gene names.

    Raises
    ------
    LingshuError
        If fewer than half of the real genes remain.
    """
    names = files["real"].gene_names
    for what, matrix in files.items():
        shared = names.intersection(matrix.gene_names, sort=False)
        if len(shared) < _LEAST_COVERAGE * files["real"].n_genes:
            unknown = files["real"].gene_names.difference(matrix.gene_names, sort=False)
            raise LingshuError(
                "At least half of the real genes must be found in the other files",
                f"the {what} file leaves {len(shared)} of {files['real'].n_genes}; real genes it lacks: "
                f"{offenders(unknown)}; its own genes: {offenders(matrix.gene_names)}",
                "Give all files the same kind of gene names (symbols or Ensembl ids) as var_names",
            )
        names = shared
    return names


def resolve_cell_type_key(files: Mapping[str, CountMatrix], key: str | None) -> str | None:
    """Check that a cell-type key the user chose exists; the default key may be absent.

    Parameters
    ----------
    files
        ``"real"`` and others, by name; the generated file need not have labels.
    key
        obs column, or None.

    Returns
    -------
    The key, or None when there are no labels.

    Raises
    ------
    LingshuError
        If ``key`` is not the default and no file of real cells has it.
    """
    if key is None or any(key in files[name].obs for name in files if name != "generated"):
        return key
    if key == DEFAULT_CELL_TYPE_KEY:
        return None
    columns = list(files["real"].obs.columns)
    raise LingshuError(
        "The cell-type key must be an obs column of the real cells",
        f"there is no {key!r}",
        f"Available: {offenders(columns)}" if columns else "The real cells have no obs columns: leave the key out",
    )


def counts_and_labels(matrix: CountMatrix, names: pd.Index, key: str | None) -> tuple[sp.csr_matrix, np.ndarray]:
    """Take the named genes' counts and the labels of all cells ("" where unknown).

    Parameters
    ----------
    matrix
        Counts of one file.
    names
        Genes to keep, in this order; all must be there.
    key
        obs column of the labels; "" for every cell when it is None or absent.

    Returns
    -------
    CSR counts with sorted indices, (cells, genes), and an object array of labels, (cells,).
    """
    counts, labels = matrix.counts, np.full(matrix.n_cells, "", dtype=object)
    if key is not None and key in matrix.obs:
        column = matrix.obs[key]
        labels = np.where(column.isna(), "", column.astype(str)).astype(object)
    if not matrix.gene_names.equals(names):
        counts = counts[:, matrix.gene_names.get_indexer(names)]
        counts.sort_indices()
    return counts, labels
