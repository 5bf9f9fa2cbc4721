"""Tables of differential expression, and the genes that a perturbation silences."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from lingshu_cell.data.condition_labels import components_of
from lingshu_cell.data.gene_sets import read_table
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded

DE_COLUMNS = ("target", "feature", "target_mean", "ref_mean", "log2_fold_change", "fdr")
_DE_SYNONYMS = {
    "target": ("perturbation", "group"),
    "feature": ("gene", "names"),
    "target_mean": ("mean_perturbed",),
    "ref_mean": ("mean_control",),
    "log2_fold_change": ("log2fc", "logfoldchanges"),
    "fdr": ("padj", "pvals_adj", "q_value"),
}


def read_de_table(path: Path | str) -> pd.DataFrame:
    """Read a table of differential expression and check its columns.

    Columns (``DE_COLUMNS``, the names that pdex writes; those of ``lingshu de``, scanpy and DESeq2 are understood):
    ``target`` the perturbation, ``feature`` the gene, ``target_mean`` and ``ref_mean`` the mean normalised counts of
    perturbed and control cells (``lingshu de``: per 10,000), ``log2_fold_change``, ``fdr``. An optional column
    ``identity`` says in which cell line, type or donor.

    Parameters
    ----------
    path
        CSV or TSV, gzipped or not, or the folder that ``lingshu de`` wrote; its identities are joined by `` / ``.

    Returns
    -------
    pandas.DataFrame
        The columns of ``DE_COLUMNS`` and, where it is given, ``identity``.

    Raises
    ------
    LingshuError
        If the file or a column is absent, or a value that must be a number is not.
    """
    path = expanded(path)
    return _read_folder(path) if path.is_dir() else _canonical_de(read_table(path), str(path))


def _canonical_de(table: pd.DataFrame, called: str) -> pd.DataFrame:
    by_lower = {str(column).lower(): column for column in table.columns}
    chosen = {
        name: next((by_lower[one] for one in (name, *_DE_SYNONYMS[name]) if one in by_lower), None)
        for name in DE_COLUMNS
    }
    absent = [name for name, column in chosen.items() if column is None]
    if absent:
        raise LingshuError(
            f"A table of differential expression needs the columns {', '.join(DE_COLUMNS)}",
            f"{called} lacks {offenders(absent)}",
            "Rename its columns, or run lingshu de",
        )
    out = pd.DataFrame({name: table[column] for name, column in chosen.items()})
    for name in ("target", "feature"):
        out[name] = out[name].astype(str)
    for name in DE_COLUMNS[2:]:
        numbers = pd.to_numeric(out[name], errors="coerce")
        missing = out[name].isna() | out[name].astype(str).str.lower().isin(("na", "nan"))  # as DESeq2 writes them
        broken = out["feature"][numbers.isna() & ~missing]
        if len(broken):
            raise LingshuError(f"{name} must be numbers", f"it is not for {offenders(broken)}", f"Check {called}")
        out[name] = numbers
    if "identity" in by_lower:
        out["identity"] = table[by_lower["identity"]].astype(str)
    return out


def join_de_tables(tables: Mapping[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Put tables of single conditions, as ``lingshu de`` and ``differential_tables`` give them, under each other.

    Parameters
    ----------
    tables
        ``(identity, perturbation)`` → table with one row per gene and the columns of ``DE_COLUMNS`` but ``target``.

    Returns
    -------
    pandas.DataFrame
        As :func:`read_de_table`, with ``identity``.

    Raises
    ------
    LingshuError
        If there is no table, or one lacks a column.
    """
    if not tables:
        raise LingshuError("There must be tables to join", "none was given", "Run lingshu de first")
    whole = [
        _canonical_de(table.assign(target=target, identity=identity), f"the table of {target}")
        for (identity, target), table in tables.items()
    ]
    return pd.concat(whole, ignore_index=True)


def _read_folder(folder: Path) -> pd.DataFrame:
    """Read what ``lingshu de`` wrote: its index names identity columns between condition and perturbation."""
    index = read_table(folder / "index.csv")
    if not {"condition", "perturbation", "file"} <= set(index.columns):
        raise LingshuError(
            "A folder of DE tables must have the index of lingshu de",
            f"{folder / 'index.csv'} has {offenders(index.columns)}",
            "Run lingshu de again",
        )
    keys = list(index.columns[list(index.columns).index("condition") + 1 : list(index.columns).index("perturbation")])
    index = index[index["file"].notna()]
    strange = [str(file) for file in index["file"] if Path(str(file)).name != str(file)]
    if strange:
        raise LingshuError("DE tables lie beside their index", f"it names {offenders(strange)}", "Run lingshu de again")
    names = [" / ".join(str(one) for one in row) for row in index[keys].to_numpy(dtype=object)]
    labels = zip(names, index["perturbation"].astype(str), index["file"], strict=True)
    return join_de_tables({(identity, target): read_table(folder / file) for identity, target, file in labels})


def strongly_down_regulated(
    de_table: pd.DataFrame,
    *,
    fdr: float = 0.05,
    mean_difference: float = 1.0,
    log2_fold_change: float = 1.0,
    reference_mean: float = 2.0,
    target_mean: float = 1.0,
) -> dict[str, tuple[str, ...]]:
    """Name the genes that each perturbation all but silences, by the rule of the preprint.

    A gene counts when its FDR < ``fdr``, |target mean − reference mean| > ``mean_difference``, log2 fold change <
    −``log2_fold_change``, reference mean > ``reference_mean`` and target mean < ``target_mean``.

    Parameters
    ----------
    de_table
        Columns ``DE_COLUMNS`` (see :func:`read_de_table`), with means in counts per cell.
    fdr, mean_difference, log2_fold_change, reference_mean, target_mean
        Thresholds of the rule.

    Returns
    -------
    dict
        Perturbation → its genes, strongest first over all rows; perturbations without any are left out.

    Raises
    ------
    LingshuError
        If a column is absent.

    References
    ----------
    arXiv 2603.25240, biological prior injection.
    """
    table = _canonical_de(de_table, "the table")
    kept = table[
        (table["fdr"] < fdr)
        & ((table["target_mean"] - table["ref_mean"]).abs() > mean_difference)
        & (table["log2_fold_change"] < -log2_fold_change)
        & (table["ref_mean"] > reference_mean)
        & (table["target_mean"] < target_mean)
    ].sort_values("log2_fold_change", kind="stable")
    found: dict[str, dict[str, None]] = {}
    for target, gene in zip(kept["target"], kept["feature"], strict=True):
        found.setdefault(target, {})[gene] = None
    return {target: tuple(genes) for target, genes in found.items()}


def silenced_genes(
    de_table: pd.DataFrame,
    target: str,
    gene_names: Iterable[str],
    *,
    except_identity: str | None = None,
    separator: str | None = "+",
    **thresholds: float,
) -> tuple[str, ...]:
    """Name the genes to hold low when a genetic perturbation is generated: its target, and what it silences elsewhere.

    Parameters
    ----------
    de_table
        As in :func:`strongly_down_regulated`; needs ``identity`` when ``except_identity`` is given.
    target
        The perturbation; with a ``separator`` in it, the union over its parts and over itself.
    gene_names
        Genes of the model; others are left out.
    except_identity
        The identity that is predicted: its own rows are not looked at.
    separator
        What joins the parts of a combination; None where labels are never combinations.
    **thresholds
        Passed to :func:`strongly_down_regulated`.

    Returns
    -------
    tuple
        Gene names, the targets first.

    Raises
    ------
    LingshuError
        If a column is absent.
    """
    if except_identity is not None:
        if "identity" not in de_table:
            raise LingshuError(
                "Leaving one identity out needs to know them", "the table has no column identity", "Add it"
            )
        de_table = de_table[de_table["identity"].astype(str) != except_identity]
    silenced: Mapping[str, tuple[str, ...]] = strongly_down_regulated(de_table, **thresholds) if len(de_table) else {}
    parts = components_of(target, separator or "", None)
    wanted = [*parts, *(gene for label in dict.fromkeys((*parts, target)) for gene in silenced.get(label, ()))]
    known = set(gene_names)
    return tuple(gene for gene in dict.fromkeys(wanted) if gene in known)
