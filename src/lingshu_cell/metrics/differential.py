"""Differential expression of perturbed against control cells: one table per condition, tested by pdex."""

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from threadpoolctl import threadpool_limits

from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_json
from lingshu_cell.metrics.folder import holding_output, package_versions, write_folder

COLUMNS = (
    "gene", "mean_control", "mean_perturbed", "log2_fold_change", "fraction_control", "fraction_perturbed", "p_value",
    "fdr",
)  # fmt: skip
INDEX_NAME, FACTS_NAME, README_NAME = "index.csv", "de.json", "README.txt"
SIGNIFICANT = 0.05
PSEUDOCOUNT = 0.05  # about one count in a hundred cells of 2,000 UMI: bounds the fold change of genes hardly seen
TARGET_SUM = 1e4
LEAST_CELLS = 3
_TEST = "two-sided Mann-Whitney U (Wilcoxon rank-sum), corrected for ties"


@dataclass(frozen=True, eq=False)
class DifferentialTables:
    """The tables of a folder.

    Parameters
    ----------
    index
        One row per condition, as :func:`write_differential` returns it.
    tables
        Condition → table with the columns :data:`COLUMNS`.
    facts
        Control, test, correction, versions.
    """

    index: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    facts: dict[str, Any]


def differential_tables(
    counts: sparse.csr_matrix,
    groups: np.ndarray,
    control: str,
    gene_names: Sequence[str],
    *,
    target_sum: float = TARGET_SUM,
    pseudocount: float = PSEUDOCOUNT,
    threads: int = 1,
) -> dict[str, pd.DataFrame]:
    """Compare every group of cells with the control cells, gene by gene.

    pdex does the work: it is what the preprint names and what cell-eval scores with, so tables and scores agree; it
    corrects for ties, which are most of the values of sparse counts (scanpy's Wilcoxon test does so only on request).

    Parameters
    ----------
    counts
        Raw counts, CSR, shape (cells, genes).
    groups
        Label of each cell, shape (cells,).
    control
        Label of the control cells.
    gene_names
        Names, shape (genes,).
    target_sum
        Counts per cell that each cell is normalised to.
    pseudocount
        Added to both means before the fold change, on the scale of ``target_sum``, > 0.
    threads
        Threads of the test, ≥ 1.

    Returns
    -------
    dict
        Group → table, columns :data:`COLUMNS`, smallest p-value first: arithmetic means of normalised counts, their
        log2 fold change, shares of cells with the gene, p-value of the test on normalised counts, and FDR
        (Benjamini-Hochberg over all genes of the table, also those never seen).

    Raises
    ------
    LingshuError
        If pdex is not installed.
    """
    pdex = _pdex()
    normalised = _normalised(counts, target_sum)
    names, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    reference = int(np.flatnonzero(names == control)[0])
    obs = pd.DataFrame({"group": codes.astype(str)}, index=np.arange(len(codes)).astype(str))
    var = pd.DataFrame(index=np.arange(counts.shape[1]).astype(str))
    options = {"mode": "ref", "reference": str(reference), "is_log1p": False, "geometric_mean": False}
    with _one_voice():
        found = pdex(ad.AnnData(normalised, obs, var), "group", threads=threads, epsilon=pseudocount, **options)
    seen = {code: _fraction_detected(counts[codes == code]) for code in range(len(names))}
    tables = {}
    for code, name in enumerate(names):
        if code == reference:
            continue
        rows = found.filter(found["target"] == str(code))
        columns = {
            "gene": np.asarray(gene_names, dtype=object),
            "mean_control": rows["ref_mean"].to_numpy(),
            "mean_perturbed": rows["target_mean"].to_numpy(),
            "log2_fold_change": rows["log2_fold_change"].to_numpy(),
            "fraction_control": seen[reference],
            "fraction_perturbed": seen[code],
            "p_value": rows["p_value"].to_numpy(),
            "fdr": rows["fdr"].to_numpy(),
        }
        table = pd.DataFrame(columns)[list(COLUMNS)]
        order = np.lexsort((-table["log2_fold_change"].abs(), table["p_value"]))
        tables[str(name)] = table.iloc[order].reset_index(drop=True)
    return tables


@holding_output
def write_differential(
    cells: Path | str | ad.AnnData,
    out: Path,
    *,
    perturbation_key: str,
    control: str,
    identity_keys: Sequence[str] = (),
    controls: Path | str | ad.AnnData | None = None,
    layer: str | None = None,
    controls_layer: str | None = None,
    max_cells: int | None = None,
    threads: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Write one table per perturbed condition against the control cells of the same identity.

    Parameters
    ----------
    cells
        Raw counts, real or generated.
    out
        Folder for the tables, ``index.csv``, ``de.json`` and ``README.txt``.
    perturbation_key, control
        obs column of perturbations and its value for controls.
    identity_keys
        obs columns that say what a cell is; cells are compared within them.
    controls
        Another file to take the control cells from, its genes found by name; needed where ``cells`` has none.
    layer, controls_layer
        Layers of the counts; ``X`` by default.
    max_cells
        Draw at most so many random cells of every condition and of the controls of every identity, so that files of
        different size have the same power; ≥ 3.
    threads
        Threads of the test.
    seed
        Of that draw.

    Returns
    -------
    pandas.DataFrame
        One row per condition: identity, perturbation, numbers of cells, of genes with FDR < 0.05, and the file; the
        file is empty where a side has fewer than three cells (a warning says so).

    Raises
    ------
    LingshuError
        If there are no controls for an identity, no perturbed cells, genes are missing in ``controls``, a key is
        missing, or the folder cannot be written.
    """
    _pdex()
    out, keys = Path(out), [*identity_keys, perturbation_key]
    matrix = read_counts(cells, layer=layer, obs_keys=keys)
    other = None if controls is None else read_counts(controls, layer=controls_layer, obs_keys=keys)
    counts, labels = _gathered(matrix, other, keys, control)
    origin = (matrix if other is None else other).source
    conditions = _conditions(labels, list(identity_keys), perturbation_key, control, controls is not None)
    rng = np.random.default_rng(seed)
    rows, tables, used = [], {}, set()
    for identity, perturbations in conditions.items():
        chosen = _drawn(labels, identity, keys, max_cells, rng)
        groups = labels[perturbation_key].to_numpy(object)[chosen]
        sizes = pd.Series(groups).value_counts()
        found = _tested(counts[chosen], groups, sizes, control, matrix.gene_names, threads)
        for perturbation in perturbations:
            name = " / ".join((*identity, perturbation))
            file = _file_name(name, used) if perturbation in found else ""
            if file:
                tables[file] = found[perturbation]
            columns = {"condition": name, **dict(zip(identity_keys, identity, strict=True))}
            columns |= {"perturbation": perturbation, "n_perturbed": sizes[perturbation], "n_control": sizes[control]}
            rows.append(columns | _summary(found.get(perturbation)) | {"file": file})
    index = pd.DataFrame(rows)
    few = index.loc[index["file"] == "", "condition"]
    if len(few):
        warnings.warn(f"Fewer than {LEAST_CELLS} cells on a side, not tested: {offenders(few)}", stacklevel=2)
    facts = _facts(matrix, origin, keys, control, controls is not None, max_cells, seed)
    write_folder(out, tables | {INDEX_NAME: index}, {FACTS_NAME: facts}, {README_NAME: facts["readme"] + "\n"})
    return index


def read_differential(folder: Path) -> DifferentialTables:
    """Read the tables that :func:`write_differential` wrote.

    Parameters
    ----------
    folder
        That folder.

    Returns
    -------
    DifferentialTables
        Index, tables and facts.

    Raises
    ------
    LingshuError
        If a file is missing or lacks a column.
    """
    folder = Path(folder)
    try:
        index = pd.read_csv(folder / INDEX_NAME, dtype={"file": str, "condition": str, "perturbation": str})
        index["file"] = index["file"].fillna("")
        strange = [file for file in index["file"] if Path(file).name != file]
        if strange:
            raise ValueError(f"tables lie beside their index, which names {offenders(strange)}")
        facts = read_json(folder / FACTS_NAME, f"{FACTS_NAME} must be a JSON object", "Run lingshu de again")
        written = index[index["file"] != ""]
        tables = {
            row.condition: pd.read_csv(folder / row.file, dtype={"gene": str}, keep_default_na=False)
            for row in written.itertuples()
        }
    except LingshuError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise LingshuError(
            "A folder of DE tables must be whole", f"{folder}: {error}", "Run lingshu de again and give its folder"
        ) from error
    broken = [name for name, table in tables.items() if not set(COLUMNS) <= set(table.columns)]
    if broken:
        raise LingshuError(
            "A DE table must have all its columns", f"not so: {offenders(broken)}", "Run lingshu de again"
        )
    return DifferentialTables(index, tables, facts)


def _pdex() -> Any:
    try:
        from pdex import pdex
    except ImportError as error:
        raise LingshuError(
            "DE tables need pdex",
            f"{error.name!r} is not installed",
            'Install it with: pip install "lingshu-cell[responses]"',
        ) from error
    return pdex


@contextlib.contextmanager
def _one_voice() -> Any:
    """Keep pdex's progress bars off the terminal, let its warnings through, and give numba and OpenMP their threads
    back.
    """
    import numba

    before = numba.get_num_threads()
    try:
        with (
            threadpool_limits(None, user_api="openmp"),
            warnings.catch_warnings(record=True) as said,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        numba.set_num_threads(before)
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _normalised(counts: sparse.csr_matrix, target_sum: float) -> sparse.csr_matrix:
    """Counts brought to one total per cell; 1 of 300 and 3 of 900 come out equal to the last bit, so that they tie."""
    totals = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    found = sparse.csr_matrix(counts, dtype=float, copy=True)
    found.data = found.data * target_sum / np.repeat(totals, np.diff(found.indptr))
    return found


def _fraction_detected(counts: sparse.csr_matrix) -> np.ndarray:
    return np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1]) / max(counts.shape[0], 1)


def _labels(matrix: CountMatrix, keys: list[str]) -> pd.DataFrame:
    return matrix.obs[keys].astype(str).reset_index(drop=True)


def _gathered(
    matrix: CountMatrix, other: CountMatrix | None, keys: list[str], control: str
) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Counts and labels of all cells to compare: controls of the other file in place of the cells' own."""
    labels = _labels(matrix, keys)
    if other is None:
        return matrix.counts, labels
    missing = matrix.gene_names.difference(other.gene_names, sort=False)
    if len(missing):
        raise LingshuError(
            "The file of controls must have every gene of the cells",
            f"it lacks {offenders(missing)}",
            "Give both files the same genes, under the same names",
        )
    own, theirs = (labels[keys[-1]] != control).to_numpy(), (_labels(other, keys)[keys[-1]] == control).to_numpy()
    aligned = other.counts[theirs][:, other.gene_names.get_indexer(matrix.gene_names)]
    both = pd.concat([labels[own], _labels(other, keys)[theirs]], ignore_index=True)
    return sparse.vstack([matrix.counts[own], aligned], format="csr"), both


def _conditions(
    labels: pd.DataFrame, identity_keys: list[str], perturbation_key: str, control: str, separate: bool
) -> dict[tuple[str, ...], list[str]]:
    """Perturbations of every identity; refuses cells that there is nothing to compare with."""
    is_control = labels[perturbation_key] == control
    if is_control.all():
        raise LingshuError(
            "There must be perturbed cells",
            f"every cell has {perturbation_key}={control!r}",
            "Check the control's name",
        )
    if not is_control.any():
        raise LingshuError(
            "Perturbed cells are compared with control cells",
            f"no cell {'of the file of controls ' if separate else ''}has {perturbation_key}={control!r}",
            "Name the control as the file does, or give a file with controls (--controls)",
        )
    identities = list(map(tuple, labels[identity_keys].to_numpy(object)))
    has_control = {identity for identity, yes in zip(identities, is_control, strict=True) if yes}
    pairs = sorted({(i, p) for i, p in zip(identities, labels[perturbation_key], strict=True) if p != control})
    lonely = sorted({" / ".join(identity) for identity, _ in pairs if identity not in has_control})
    if lonely:
        raise LingshuError(
            "Every identity needs control cells of its own", f"none for {offenders(lonely)}", "Add them (--controls)"
        )
    return {identity: [p for i, p in pairs if i == identity] for identity in dict.fromkeys(i for i, _ in pairs)}


def _drawn(
    labels: pd.DataFrame, identity: tuple[str, ...], keys: list[str], max_cells: int | None, rng: np.random.Generator
) -> np.ndarray:
    """Rows of an identity, at most ``max_cells`` of each perturbation."""
    if max_cells is not None and max_cells < LEAST_CELLS:
        raise LingshuError(
            f"At least {LEAST_CELLS} cells are compared", f"max_cells = {max_cells}", "Allow more, or leave it out"
        )
    rows = np.flatnonzero((labels[keys[:-1]].to_numpy(object) == np.array(identity, dtype=object)).all(axis=1))
    if max_cells is None:
        return rows
    groups = pd.Series(rows).groupby(labels[keys[-1]].to_numpy(object)[rows], sort=True)
    picked = [g.to_numpy() if len(g) <= max_cells else rng.choice(g, max_cells, replace=False) for _, g in groups]
    return np.sort(np.concatenate(picked))


def _tested(
    counts: sparse.csr_matrix, groups: np.ndarray, sizes: pd.Series, control: str, gene_names: pd.Index, threads: int
) -> dict[str, pd.DataFrame]:
    """Tables of the groups that have enough cells, as the control must too."""
    enough = sizes.index[sizes >= LEAST_CELLS]
    kept = np.isin(groups, enough)
    if control not in enough or len(enough) < 2:
        return {}
    return differential_tables(counts[kept], groups[kept], control, gene_names, threads=threads)


def _summary(table: pd.DataFrame | None) -> dict[str, Any]:
    if table is None:
        return {"n_significant": pd.NA, "n_up": pd.NA, "n_down": pd.NA, "top_genes": ""}
    significant = table[table["fdr"] < SIGNIFICANT]
    up = int((significant["log2_fold_change"] > 0).sum())
    top = ", ".join(significant["gene"].head(5).astype(str))
    return {"n_significant": len(significant), "n_up": up, "n_down": len(significant) - up, "top_genes": top}


def _file_name(condition: str, used: set[str]) -> str:
    """A name that any file system takes, unlike all before it."""
    stem = re.sub(r"[^A-Za-z0-9._+-]+", "_", condition).strip("._-")[:100] or "condition"
    name, i = stem, 1
    while name.lower() in used | {Path(INDEX_NAME).stem}:
        i += 1
        name = f"{stem}-{i}"
    used.add(name.lower())
    return f"{name}.csv"


def _facts(
    matrix: CountMatrix, origin: str, keys: list[str], control: str, separate: bool, max_cells: int | None, seed: int
) -> dict[str, Any]:
    within = f" of the same {', '.join(keys[:-1])}" if len(keys) > 1 else ""
    drawn = "" if max_cells is None else f" At most {max_cells:,} cells of each side were drawn (seed {seed})."
    readme = (
        f"Cells of {matrix.source} against control cells ({keys[-1]} = {control}) of {origin}{within}. "
        f"Means: arithmetic, of counts normalised to {TARGET_SUM:,.0f} per cell; log2 fold change with pseudocount "
        f"{PSEUDOCOUNT:g} on that scale. Test: {_TEST}, on normalised counts, each cell an observation, by pdex "
        f"{version('pdex')}. FDR: Benjamini-Hochberg over all {matrix.n_genes:,} genes of a table; significant: FDR < "
        f"{SIGNIFICANT:g}.{drawn} Cells are no replicates: p-values say nothing of differences between donors."
    )
    if separate:
        readme += " The controls come from another file: differences between the files count as effects."
    versions = package_versions() | {name: version(name) for name in ("pdex", "numba-mwu")}
    settings: Mapping[str, Any] = {"target_sum": TARGET_SUM, "pseudocount": PSEUDOCOUNT, "significant_fdr": SIGNIFICANT}
    labels = {"perturbation_key": keys[-1], "control": control, "identity_keys": keys[:-1]}
    sources = {"cells": matrix.source, "controls": origin, "cells_fingerprint": matrix.fingerprint}
    draw = {"max_cells": max_cells, "seed": seed}
    return {
        "readme": readme, **labels, **sources, "test": _TEST, "correction": "Benjamini-Hochberg", **settings, **draw,
        "versions": versions,
    }  # fmt: skip
