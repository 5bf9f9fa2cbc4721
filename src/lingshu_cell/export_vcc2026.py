"""Predicted cells to the submission file of the Virtual Cell Challenge 2026, block by block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.check_vcc2026 import (
    CELLS_PER_CONDITION,
    CONTEXT_KEY,
    CONTROL,
    MOST_COUNTS_PER_CELL,
    MOST_STORED,
    N_GENES,
    TARGET_KEY,
    Panel,
    Rule,
    Vcc2026Report,
    gene_rules,
    label_rules,
    validate_vcc2026,
)
from lingshu_cell.data.anndata_io import H5adWriter, read_obs
from lingshu_cell.data.cell_folder import is_cell_folder, shard_files
from lingshu_cell.data.condition_labels import labels_of
from lingshu_cell.data.count_blocks import VALUES_PER_BLOCK, CountBlocks
from lingshu_cell.data.counts import check_counts
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded


@dataclass(frozen=True)
class Vcc2026Export:
    """What was written, what was left out or filled in, and the check of the file."""

    path: Path
    n_cells: int
    n_controls_dropped: int
    n_genes_filled: int
    n_genes_dropped: int
    report: Vcc2026Report | None


@dataclass(frozen=True, eq=False)
class _Source:
    """A file of predictions: labels of its cells, and for each of its genes the place in the list, or -1."""

    path: Path
    names: np.ndarray
    targets: np.ndarray
    contexts: np.ndarray
    kept: np.ndarray
    places: np.ndarray
    n_absent: int


def write_vcc2026(
    sources: Sequence[Path | str],
    out: Path | str,
    genes: Sequence[str],
    *,
    target_key: str = "perturbation",
    context_key: str = "cell_line",
    control: str = CONTROL,
    contexts: Sequence[str] | None = None,
    panel: Panel | None = None,
    cells_per_condition: int | None = CELLS_PER_CONDITION,
    n_genes: int | None = N_GENES,
    fill_genes: bool = False,
    layer: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    values_per_block: int = VALUES_PER_BLOCK,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vcc2026Export:
    """Write predicted cells as a submission, and check the file.

    Labels and genes are checked before any count is read; counts pass block by block; only labels are held for
    all cells. Cells keep their order; control cells are left out. The file appears under its name only when whole.

    Parameters
    ----------
    sources
        h5ad files of predicted counts, CSR or dense, and folders of generated cells.
    out
        The submission, an h5ad file.
    genes
        Genes of the challenge's list, in order.
    target_key, context_key
        obs columns of the perturbation and of the context in the sources.
    control
        Label of control cells.
    contexts, panel, cells_per_condition
        See :func:`lingshu_cell.check_vcc2026.label_rules`.
    n_genes
        Length the list must have; None for any.
    fill_genes
        Allow genes of the list that a source lacks (they become 0 in all of its cells) and genes that the list lacks
        (left out).
    layer
        Layer of the counts; None for ``X``.
    overwrite
        Whether ``out`` may be replaced.
    check
        Read the file back and hold it against every rule.
    values_per_block
        Stored values held at a time.
    on_progress
        Called with the cells done and their total.

    Returns
    -------
    Vcc2026Export
        What was written.

    Raises
    ------
    LingshuError
        If labels, genes or counts break a rule, or a file cannot be read or written; nothing is left behind.
    """
    _refuse(gene_rules(genes, genes, n_genes))
    folders = [(path, is_cell_folder(expanded(path))) for path in sources]
    sources = [file for path, is_folder in folders for file in (shard_files(expanded(path)) if is_folder else [path])]
    if not sources:
        raise LingshuError("A submission has cells", "no file of predictions is given", "Name one or more")
    if expanded(out).exists() and any(expanded(out).samefile(expanded(p)) for p in sources):
        raise LingshuError("Predictions stay as they are", f"{out} is one of them", "Name another file to write")
    read = [_read_source(path, genes, target_key, context_key, control, layer, fill_genes) for path in sources]
    targets, of_context = (
        np.concatenate([getattr(source, name)[source.kept] for source in read]) for name in ("targets", "contexts")
    )
    said = {"control": control, "panel": panel, "cells_per_condition": cells_per_condition}
    _refuse(label_rules(targets, of_context, wanted_contexts=contexts, **said))
    names = _cell_names(read)
    writer = H5adWriter(out, pd.DataFrame(index=pd.Index(genes)), n_cells=len(targets), overwrite=overwrite)
    n_stored = 0
    with writer:
        for source, cell_names in zip(read, names, strict=True):
            first = np.concatenate([[0], np.cumsum(source.kept)])  # of each cell, its place among the kept ones
            with CountBlocks(source.path, layer) as stored:
                for start, block in stored.blocks(values_per_block):
                    rows = slice(start, start + block.shape[0])
                    kept = source.kept[rows]
                    counts = _aligned(block[kept] if not kept.all() else block, source, len(genes))
                    labels = cell_names[first[rows.start] : first[rows.stop]]
                    _check_block(counts, labels, source.path)
                    n_stored += counts.nnz
                    _check_stored(n_stored)
                    columns = {TARGET_KEY: source.targets[rows][kept], CONTEXT_KEY: source.contexts[rows][kept]}
                    if len(labels):
                        writer.append(counts, pd.DataFrame(columns, index=labels))
                        on_progress(writer.n_written, len(targets))
        n_controls = sum(int((~source.kept).sum()) for source in read)
        writer.close(
            {
                "lingshu_cell": {
                    "version": version("lingshu-cell"),
                    "export": "vcc2026",
                    "n_controls_dropped": n_controls,
                }
            }
        )
    report = None
    if check:
        said |= {"contexts": contexts, "n_genes": n_genes, "values_per_block": values_per_block}
        report = validate_vcc2026(writer.path, genes, **said)
    return Vcc2026Export(
        path=writer.path,
        n_cells=len(targets),
        n_controls_dropped=n_controls,
        n_genes_filled=max(source.n_absent for source in read),
        n_genes_dropped=max(int((source.places < 0).sum()) for source in read),
        report=report,
    )


def _read_source(
    path: Path | str,
    genes: Sequence[str],
    target_key: str,
    context_key: str,
    control: str,
    layer: str | None,
    fill_genes: bool,
) -> _Source:
    obs = read_obs(path)
    targets, contexts = labels_of(obs, target_key), labels_of(obs, context_key)
    with CountBlocks(path, layer) as stored:
        names = stored.gene_names
    if not names.is_unique:
        finding = f"{path} repeats {offenders(names[names.duplicated()].unique())}"
        raise LingshuError("var_names must be unique", finding, "Call adata.var_names_make_unique() and save it again")
    places = pd.Index(genes).get_indexer(names)
    absent = pd.Index(genes).difference(names, sort=False)
    if not fill_genes and (len(absent) or (places < 0).any()):
        raise LingshuError(
            "Predictions must hold exactly the genes of the list, in any order",
            f"{path} lacks {offenders(absent)} and has others: {offenders(names[places < 0])}",
            "Name genes as the list does; to write absent genes as 0 and leave the others out, say --fill-genes",
        )
    if len(absent) == len(genes):
        finding = f"{path} has {offenders(names)}"
        raise LingshuError("Predictions must hold genes of the list", finding, "Name genes as the list does")
    cell_names = obs.index.astype(str).to_numpy(dtype=object)
    return _Source(Path(path), cell_names, targets, contexts, targets != control, places, len(absent))


def _cell_names(sources: Sequence[_Source]) -> list[np.ndarray]:
    """Keep the cells' names, with the number of the file in front where files share some."""
    names = [source.names[source.kept] for source in sources]
    if pd.Index(np.concatenate(names)).is_unique:
        return names
    return [np.array([f"{number}-{name}" for name in own], dtype=object) for number, own in enumerate(names, start=1)]


def _aligned(block: sparse.csr_matrix, source: _Source, n_genes: int) -> sparse.csr_matrix:
    """Bring the columns of a block to the order of the list."""
    places = source.places[block.indices]
    kept = places >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[block.indptr]
    aligned = sparse.csr_matrix((block.data[kept], places[kept], indptr), shape=(block.shape[0], n_genes))
    aligned.sort_indices()
    return aligned


def _check_block(counts: sparse.csr_matrix, names: np.ndarray, path: Path) -> None:
    check_counts(counts, str(path))
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    over = totals > MOST_COUNTS_PER_CELL
    if over.any():
        raise LingshuError(
            f"A cell has at most {MOST_COUNTS_PER_CELL:,} counts",
            f"{path}: {offenders(names[over])} have up to {totals.max():,.0f}",
            "Scale the predicted depth down",
        )
    counts.data = counts.data.astype(np.int32)


def _check_stored(n_stored: int) -> None:
    if n_stored > MOST_STORED:
        raise LingshuError(
            f"A submission has at most {MOST_STORED:,} stored entries",
            "the predictions have more",
            "Predict fewer expressed genes per cell",
        )


def _refuse(rules: Sequence[Rule]) -> None:
    for rule in rules:
        if not rule.passed:
            raise LingshuError(f"A submission must keep the rule '{rule.requirement}'", rule.found, rule.remedy)
