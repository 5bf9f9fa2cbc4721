"""Sets of genes, links between genes, and wishes for genes, read from files; each with a direction."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, open_binary, refuse_special, said_as

_SIGNS = {"+": 1.0, "1": 1.0, "activation": 1.0, "up": 1.0, "-": -1.0, "-1": -1.0, "repression": -1.0, "down": -1.0}
_SIGN_COLUMNS = ("sign", "mor", "effect", "interaction", "weight", "score")


@dataclass(frozen=True, eq=False)
class GeneEdges:
    """Links between genes.

    Parameters
    ----------
    first, second
        Names of the two genes of every link; for regulons the regulator comes first.
    sign
        +1 (activates, or plainly linked) or −1 (represses), or any weight; float64, shape [number of links].
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    sign: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, eq=False)
class GeneTilts:
    """How strongly each gene of a vocabulary is wished up or down.

    Parameters
    ----------
    log2_fold_change
        Wished log2 fold change, 0 where nothing is wished; float32, shape [n_genes].
    strength
        How much of it is to be enforced, 0 … 1, 0 where nothing is wished; float32, shape [n_genes].
    """

    log2_fold_change: np.ndarray
    strength: np.ndarray


def read_gmt(path: Path | str) -> dict[str, tuple[str, ...]]:
    """Read gene sets in GMT format (name, description, genes …; tab separated), gzipped or not.

    Parameters
    ----------
    path
        The file, e.g. from MSigDB.

    Returns
    -------
    dict
        Name of the set → its genes, in the order of the file, repeats removed.

    Raises
    ------
    LingshuError
        If the file is absent, damaged, or a line has fewer than three fields, or a set's name comes twice.
    """
    sets: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        genes = tuple(dict.fromkeys(gene.strip() for gene in fields[2:] if gene.strip()))
        if not genes:
            raise LingshuError(
                "Each line of a GMT file must hold a name, a description and genes, separated by tabs",
                f"line {number} of {path} is {line.strip()[:60]!r}",
                "Check the format",
            )
        if fields[0] in sets:
            raise LingshuError(
                "Names of gene sets must be unique", f"{fields[0]!r} comes twice in {path}", "Rename one of them"
            )
        sets[fields[0]] = genes
    if not sets:
        raise LingshuError("A GMT file must hold gene sets", f"{path} is empty", "Check the file")
    return sets


def read_edges(path: Path | str) -> GeneEdges:
    """Read links between genes from a tab- or comma-separated table with a header, gzipped or not.

    The first two columns name the genes. The sign is taken from a column called ``sign``, ``mor``, ``effect``,
    ``interaction``, ``weight`` or ``score`` (a number, or a word such as ``activation`` or ``repression``), or from the
    two columns ``consensus_stimulation`` and ``consensus_inhibition`` of OmniPath tables; without any it is +1.
    Rows in which a gene is missing, is linked with itself, or whose sign is unknown or 0 are left out.

    Parameters
    ----------
    path
        The file, e.g. STRING pairs or CollecTRI.

    Returns
    -------
    GeneEdges

    Raises
    ------
    LingshuError
        If the file is absent or damaged, has fewer than two columns, or no link is left.
    """
    table = read_table(path)
    if table.shape[1] < 2:
        raise LingshuError(
            "A table of links needs two columns of genes",
            f"{path} has {offenders(table.columns)}",
            "Separate the columns by tabs or commas",
        )
    sign = _edge_signs(table)
    first, second = (table.iloc[:, column].astype("string") for column in (0, 1))
    kept = (first.notna() & second.notna() & (first != second)).to_numpy(dtype=bool) & np.isfinite(sign) & (sign != 0)
    if not kept.any():
        raise LingshuError("A table of links must hold links", f"{path} has none with two genes and a sign", "Check it")
    return GeneEdges(tuple(first[kept].tolist()), tuple(second[kept].tolist()), sign[kept])


def _edge_signs(table: pd.DataFrame) -> np.ndarray:
    by_lower = {str(column).lower(): column for column in table.columns[2:]}
    if {"consensus_stimulation", "consensus_inhibition"} <= set(by_lower):
        up, down = (
            table[by_lower[f"consensus_{what}"]].astype(str).str.lower().isin(("true", "1"))
            for what in ("stimulation", "inhibition")
        )
        return up.to_numpy(dtype=np.float64) - down.to_numpy(dtype=np.float64)
    named = [by_lower[name] for name in _SIGN_COLUMNS if name in by_lower]
    if not named:
        return np.ones(len(table))
    column = table[named[0]]
    words = column.astype(str).str.strip().str.lower().map(_SIGNS)
    return words.fillna(pd.to_numeric(column, errors="coerce")).to_numpy(dtype=np.float64)


def read_gene_tilts(path: Path | str, gene_names: Sequence[str]) -> GeneTilts:
    """Read wishes for single genes from a CSV or TSV and bring them into the order of a vocabulary.

    Columns: ``gene``; ``log2_fold_change`` (a number other than 0) or ``direction`` (``up`` or ``down``, meaning a
    doubling or a halving); optionally ``strength`` (0 … 1, 1 when left out).

    Parameters
    ----------
    path
        The file, gzipped or not.
    gene_names
        Genes of the model in order.

    Returns
    -------
    GeneTilts

    Raises
    ------
    LingshuError
        If a column is absent, a gene is unknown or comes twice, or a value is out of range.
    """
    table = read_table(path)
    table.columns = [str(column).strip().lower() for column in table.columns]
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()]
        raise LingshuError("A table has one column of a name", f"{path} has more: {offenders(twice)}", "Rename them")
    if "gene" not in table or not ({"direction", "log2_fold_change"} & set(table.columns)):
        raise LingshuError(
            "A table of gene wishes needs the columns gene, and direction or log2_fold_change",
            f"{path} has {offenders(table.columns)}",
            "Name the columns so; strength is optional",
        )
    genes = table["gene"].astype(str).str.strip()
    position = {name: g for g, name in enumerate(gene_names)}
    unknown = [gene for gene in genes if gene not in position]
    if unknown:
        raise LingshuError("Wished genes must be genes of the model", f"unknown: {offenders(unknown)}", "Check them")
    if genes.duplicated().any():
        twice = genes[genes.duplicated()].unique()
        raise LingshuError("A gene can be wished once", f"more than once: {offenders(twice)}", "Remove the repeats")
    change = _wished_change(table, genes)
    strength = pd.to_numeric(table.get("strength", pd.Series(1.0, table.index)), errors="coerce").to_numpy(np.float64)
    wrong = ~((strength >= 0) & (strength <= 1))
    if wrong.any():
        raise LingshuError("strength must lie in 0 … 1", f"it does not for {offenders(genes[wrong])}", "Correct it")
    where = np.array([position[gene] for gene in genes], dtype=np.int64)
    tilts = GeneTilts(np.zeros(len(position), np.float32), np.zeros(len(position), np.float32))
    tilts.log2_fold_change[where], tilts.strength[where] = change, strength
    return tilts


def _wished_change(table: pd.DataFrame, genes: pd.Series) -> np.ndarray:
    change = np.full(len(table), np.nan)
    if "direction" in table:
        words = table["direction"].astype(str).str.strip().str.lower()
        change = words.map({"up": 1.0, "down": -1.0}).to_numpy(dtype=np.float64)
    if "log2_fold_change" in table:
        given = pd.to_numeric(table["log2_fold_change"], errors="coerce").to_numpy(dtype=np.float64)
        against = np.isfinite(given) & np.isfinite(change) & (given * change < 0)
        if against.any():
            raise LingshuError(
                "direction and log2_fold_change must agree", f"they do not for {offenders(genes[against])}", "Drop one"
            )
        change = np.where(np.isfinite(given), given, change)
    wrong = ~np.isfinite(change) | (change == 0)
    if wrong.any():
        raise LingshuError(
            "A wished gene needs direction up or down, or a log2_fold_change other than 0",
            f"neither is given for {offenders(genes[wrong])}",
            "Fill it in, or leave the gene out",
        )
    return change


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a table with a header, separated by tabs or commas, gzipped or not.

    Parameters
    ----------
    path
        The file; tabs separate when the header holds one.

    Returns
    -------
    pandas.DataFrame

    Raises
    ------
    LingshuError
        If the file is absent, damaged or no table.
    """
    lines = _lines(path)
    if not lines:
        raise LingshuError("A table must have a header", f"{path} is empty", "Check the file")
    separator = "\t" if "\t" in lines[0] else ","
    try:
        # A gene may be called NA or NAN1: only an empty field is missing.
        with open_binary(expanded(path)) as stream:
            return pd.read_csv(stream, sep=separator, keep_default_na=False, na_values=[""], low_memory=False)
    except (ValueError, csv.Error) as error:
        raise LingshuError("The file must be a table", f"{path} cannot be read ({error})", "Check it") from error


def _lines(path: Path | str) -> list[str]:
    path = expanded(path)
    refuse_special(path, "The file must be whole text")
    if not path.exists():
        raise LingshuError("The file must exist", f"there is no {path}", "Check the path")
    with said_as("The file must be whole text", path, "Check it"), open_binary(path) as stream:
        return stream.read().decode("utf-8-sig").splitlines()
