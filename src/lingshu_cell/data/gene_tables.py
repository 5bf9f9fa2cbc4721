"""What is known of gene names: approved symbols, former ones, Ensembl ids and orthologs, read from public tables."""

import csv
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import expanded, open_text, refuse_special

HUMAN = "homo_sapiens"
_SPECIES = {
    "human": HUMAN,
    "mouse": "mus_musculus",
    "rat": "rattus_norvegicus",
    "macaque": "macaca_mulatta",
    "rhesus": "macaca_mulatta",
    "rhesus_macaque": "macaca_mulatta",
    "zebrafish": "danio_rerio",
    "fly": "drosophila_melanogaster",
    "fruit_fly": "drosophila_melanogaster",
    "worm": "caenorhabditis_elegans",
    "chicken": "gallus_gallus",
    "pig": "sus_scrofa",
    "marmoset": "callithrix_jacchus",
    "yeast": "saccharomyces_cerevisiae",
}
_SPECIES_OF_PREFIX = {
    "ENSG": HUMAN,
    "ENSMUSG": "mus_musculus",
    "ENSRNOG": "rattus_norvegicus",
    "ENSMMUG": "macaca_mulatta",
    "ENSDARG": "danio_rerio",
    "ENSGALG": "gallus_gallus",
    "ENSSSCG": "sus_scrofa",
    "ENSCJAG": "callithrix_jacchus",
    "FBgn": "drosophila_melanogaster",
    "WBGene": "caenorhabditis_elegans",
}


@dataclass(frozen=True)
class GeneTables:
    """Names of genes as public tables give them; empty where no table was read.

    Attributes
    ----------
    approved
        Approved human symbol → Ensembl id, or empty text.
    former
        Former or other human symbol → the approved symbols it may mean; former names shadow mere aliases.
    symbol_of_id
        Ensembl id of any species → symbol.
    id_of_symbol
        Species → symbol → Ensembl id, where the symbol is unique.
    orthologs
        Species → id or symbol → id or symbol of the other species' ortholog, by species: ``(species, partner)``.
    """

    approved: Mapping[str, str] = field(default_factory=dict)
    former: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    symbol_of_id: Mapping[str, str] = field(default_factory=dict)
    id_of_symbol: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    orthologs: Mapping[tuple[str, str], Mapping[str, tuple[str, float]]] = field(default_factory=dict)


def species_name(text: str) -> str:
    """Give a species' name in one spelling.

    Parameters
    ----------
    text
        E.g. ``human``, ``Homo sapiens``, ``mouse``, ``mus_musculus``.

    Returns
    -------
    str
        E.g. ``homo_sapiens``.
    """
    plain = "_".join(text.strip().lower().replace("-", " ").replace("_", " ").split())
    return _SPECIES.get(plain, plain)


def species_of_id(gene_id: str) -> str | None:
    """Tell the species by the prefix of an Ensembl, FlyBase or WormBase id; None where it is not known."""
    return _SPECIES_OF_PREFIX.get(gene_id.rstrip("0123456789").removesuffix("_PAR_Y").rstrip("0123456789"))


def read_tables(
    aliases: Path | str | None = None,
    gene_tables: Mapping[str, Path | str] | None = None,
    orthologs: Sequence[tuple[str | None, Path | str]] = (),
) -> GeneTables:
    """Read tables of gene names; each may be zipped.

    Parameters
    ----------
    aliases
        HGNC's complete set (tab-separated, with ``symbol``, ``alias_symbol``, ``prev_symbol``, ``ensembl_gene_id``), or
        two columns, old and new symbol. Used for human genes only.
    gene_tables
        Species → table whose first two columns are Ensembl id and symbol.
    orthologs
        Pairs of a species, or None, and a table with the genes of two species in its first two columns, ids or symbols;
        a number in the third column says how good the match is. Without a species the heading must name both; with
        one, the first column is human.

    Returns
    -------
    GeneTables

    Raises
    ------
    LingshuError
        If a table cannot be read or has not these columns.
    """
    approved, former = _read_aliases(expanded(aliases)) if aliases else ({}, {})
    symbol_of_id = {gene_id: symbol for symbol, gene_id in approved.items() if gene_id}
    id_of_symbol: dict[str, dict[str, str]] = {HUMAN: {s: i for s, i in approved.items() if i}} if approved else {}
    for species, file in (gene_tables or {}).items():
        pairs = [row[:2] for row in _rows(expanded(file), least=2) if row[0] and row[1]]
        for gene_id, symbol in pairs:
            symbol_of_id.setdefault(gene_id, symbol)
        ids = _partners((symbol, gene_id, 0.0) for gene_id, symbol in pairs)
        known = id_of_symbol.setdefault(species_name(species), {})
        known.update({symbol: gene_id for symbol, (gene_id, _) in ids.items() if symbol not in known})
    joined: dict[tuple[str, str], Mapping[str, tuple[str, float]]] = {}
    for species, file in orthologs:
        joined.update(_read_orthologs(species, expanded(file)))
    return GeneTables(approved, former, symbol_of_id, id_of_symbol, joined)


def _read_aliases(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    rows = list(_rows(file, least=2))
    header = rows[0]
    if "prev_symbol" not in header:
        pairs = [(row[0], row[1]) for row in rows if row[0] and row[1]]
        new = {symbol: "" for _, symbol in pairs}
        return new, _collected((old, symbol) for old, symbol in pairs if old not in new)
    at = {name: i for i, name in enumerate(header)}
    needed = ("symbol", "alias_symbol", "prev_symbol", "ensembl_gene_id")
    if missing := [name for name in needed if name not in at]:
        raise LingshuError(
            "The table of aliases must be HGNC's complete set, or two columns: old and new symbol",
            f"{file.name} has no column {offenders(missing)}",
            "Download hgnc_complete_set.txt from genenames.org",
        )
    rows = [row + [""] * (len(header) - len(row)) for row in rows[1:]]
    if "status" in at:
        rows = [row for row in rows if row[at["status"]] == "Approved"]
    approved = {row[at["symbol"]]: row[at["ensembl_gene_id"]] for row in rows}
    named = {
        column: _collected(
            (old.strip(), row[at["symbol"]])
            for row in rows
            for old in row[at[column]].strip('"').split("|")
            if old.strip() and old.strip() not in approved
        )
        for column in ("alias_symbol", "prev_symbol")
    }
    return approved, {**named["alias_symbol"], **named["prev_symbol"]}


def _collected(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for old, new in pairs:
        if new not in found.get(old, ()):
            found[old] = (*found.get(old, ()), new)
    return found


def _read_orthologs(
    species: str | None, file: Path
) -> Iterator[tuple[tuple[str, str], Mapping[str, tuple[str, float]]]]:
    rows = list(_rows(file, least=2))
    if species is None:
        left, right = (species_name(name) for name in rows[0][:2])
        if not (left in _SPECIES.values() and right in _SPECIES.values()):
            raise LingshuError(
                "The heading of a table of orthologs must name two species",
                f"{file.name} begins with {offenders(rows[0][:2])}",
                "Say which species is beside human, e.g. --orthologs rhesus=FILE",
            )
        rows = rows[1:]
    else:
        left, right = HUMAN, species_name(species)
    pairs = [(row[0], row[1], _number(row[2]) if len(row) > 2 else 0.0) for row in rows if row[0] and row[1]]
    if not pairs:
        raise LingshuError("A table of orthologs must hold pairs of genes", f"{file.name} has none", "Check the file")
    yield (left, right), _partners(pairs)
    yield (right, left), _partners((b, a, score) for a, b, score in pairs)


def _partners(pairs: Iterable[tuple[str, str, float]]) -> dict[str, tuple[str, float]]:
    """Keep the best partner of every gene; where two are equally good there is none."""
    best: dict[str, tuple[str, float]] = {}
    tied: set[str] = set()
    for gene, partner, score in pairs:
        now = best.get(gene)
        if now is None or score > now[1]:
            best[gene] = (partner, score)
            tied.discard(gene)
        elif score == now[1] and partner != now[0]:
            tied.add(gene)
    return {gene: found for gene, found in best.items() if gene not in tied}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _rows(file: Path, least: int) -> Iterator[list[str]]:
    """Read a table separated by tabs or commas, whichever its first line has."""
    refuse_special(file, "A table of genes must be readable")
    if not file.is_file():
        raise LingshuError("A table of genes must exist", f"there is no {file}", "Check the path")
    try:
        with open_text(file, encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            separator = "\t" if "\t" in first else ","
            narrow = None
            for row in csv.reader([first], delimiter=separator):
                narrow = row
                if len(row) >= least:
                    yield [cell.strip() for cell in row]
            if narrow is None or len(narrow) < least:
                raise LingshuError(
                    f"A table of genes must have at least {least} columns", f"{file.name} begins with {first[:80]!r}",
                    "Save it separated by tabs or commas",
                )  # fmt: skip
            for row in csv.reader(stream, delimiter=separator):
                if row:
                    yield [cell.strip() for cell in row + [""] * (least - len(row))]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise LingshuError("A table of genes must be readable", f"{file}: {error}", "Download it again") from error
