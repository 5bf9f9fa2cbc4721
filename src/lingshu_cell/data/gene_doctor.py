"""Genes of several data sets and species brought onto one list, with a report of what became of each."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.data.gene_tables import HUMAN, GeneTables, species_name, species_of_id
from lingshu_cell.data.vocabulary import SYMBOL_COLUMNS, GeneVocabulary
from lingshu_cell.errors import LingshuError, offenders

FATES = {
    "name": "kept under their name",
    "Ensembl id": "named by Ensembl id",
    "alias": "renamed by alias",
    "ortholog": "named after their ortholog",
    "spelling": "not in the table of orthologs, named like a human gene",
    "unlisted": "in no table, name kept",
    "ambiguous": "ambiguous, name kept",
}
"""What may become of a gene, in order of trust: of two genes that claim one name, the first kind gets it."""

_ACROSS = ("ortholog", "spelling")  # fates that give a gene the name of another species' gene
_EXAMPLES = 5
_OPEN_READING_FRAME = re.compile(r"^C(\d+|X|Y)ORF(\d+)")  # some files write everything in capitals


@dataclass(frozen=True, eq=False)
class GeneList:
    """The genes of one data set as it names them.

    Attributes
    ----------
    data_set
        Its name in reports.
    gene_names
        Unique names.
    var
        Annotation with one row per gene, or None; ids and symbols are looked for in it.
    species
        The species if known.
    """

    data_set: str
    gene_names: Sequence[str]
    var: pd.DataFrame | None = None
    species: str | None = None


@dataclass(frozen=True)
class GeneReport:
    """What became of the genes of one data set.

    Attributes
    ----------
    data_set, species
        Whose genes.
    n_genes
        Genes in the file.
    counts
        Number of genes of each fate, see :data:`FATES`.
    examples
        A few genes of each fate, as ``old → new`` where the name changed.
    n_joint
        Genes of the joint list.
    n_measured
        How many of these the data set measured; the others are unknown in it, never zero.
    missing
        A few of those it did not measure.
    n_dropped
        Genes of the file that are not on the joint list.
    dropped
        A few of them.
    conflicting
        Number of genes whose symbol and Ensembl id belong to different genes; the id was believed.
    notes
        What else a user should know.
    """

    data_set: str
    species: str
    n_genes: int
    counts: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    n_joint: int
    n_measured: int
    missing: tuple[str, ...]
    n_dropped: int
    dropped: tuple[str, ...]
    conflicting: int = 0
    notes: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """Tell it in a few lines."""
        lines = [f"{self.data_set} · {self.species.replace('_', ' ')} · {self.n_genes:,} genes"]
        for fate, what in FATES.items():
            if n := self.counts.get(fate, 0):
                lines.append(f"  {n:>7,} {what}: {', '.join(self.examples[fate])}{', …' if n > _EXAMPLES else ''}")
        if self.n_dropped:
            lines.append(f"  {self.n_dropped:>7,} not on the joint list, dropped: {', '.join(self.dropped)}, …")
        absent = self.n_joint - self.n_measured
        share = self.n_measured / self.n_joint
        lines.append(f"  {self.n_measured:>7,} of {self.n_joint:,} joint genes measured ({share:.1%})")
        if absent:
            more = ", …" if absent > _EXAMPLES else ""
            lines.append(f"  {absent:>7,} missing: unknown here, never zero: {', '.join(self.missing)}{more}")
        if self.conflicting:
            lines.append(f"  {self.conflicting:>7,} whose symbol is now another gene's: the Ensembl id was believed")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain JSON types."""
        return {
            **{key: getattr(self, key) for key in ("data_set", "species", "n_genes", "n_joint", "n_measured")},
            **{key: getattr(self, key) for key in ("n_dropped", "conflicting")},
            "counts": dict(self.counts),
            "examples": {fate: list(genes) for fate, genes in self.examples.items()},
            "missing": list(self.missing),
            "dropped": list(self.dropped),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class JoinedGenes:
    """The joint gene list and where each data set's genes lie in it.

    Attributes
    ----------
    vocabulary
        Joint genes in order of first appearance, under current symbols of the reference species.
    columns
        For each data set the position of each of its genes in the vocabulary, −1 where it is not on it; int64.
    measured
        Boolean, data sets × joint genes.
    reports
        One for each data set.
    """

    vocabulary: GeneVocabulary
    columns: tuple[np.ndarray, ...]
    measured: np.ndarray
    reports: tuple[GeneReport, ...]


@dataclass(frozen=True, eq=False)
class _Named:
    """Genes of one data set with their new names and fates."""

    genes: GeneList
    species: str
    ids: tuple[str, ...]
    names: tuple[str, ...]
    fates: tuple[str, ...]
    conflicting: int
    notes: tuple[str, ...]


def join_genes(
    lists: Sequence[GeneList],
    tables: GeneTables | None = None,
    *,
    join: str | Sequence[str] = "union",
    reference: str | None = None,
    separate_species: bool = False,
) -> JoinedGenes:
    """Find out which genes of several data sets are the same.

    A gene goes by the symbol of its Ensembl id where a table or another data set gives one, else by its own symbol, if
    that is out of date by the symbol it has now. Genes of other species take the name of their ortholog in the
    reference species; one that the table lacks takes the name of the human gene so spelt. Where two genes of one data
    set claim a name, the surer claim has it; equal claims are ambiguous and both keep their own names.

    Parameters
    ----------
    lists
        The data sets, one or more.
    tables
        What is known of names; None for nothing.
    join
        ``"union"``, ``"intersection"``, or the names of the genes wanted, in order.
    reference
        Species whose symbols are used; human if there is any, else the first data set's.
    separate_species
        Whether a species without a table of orthologs may keep its genes to itself.

    Returns
    -------
    JoinedGenes

    Raises
    ------
    LingshuError
        If there is no data set, a species cannot be joined, or no gene or data set remains.
    """
    if not lists:
        raise LingshuError("Genes to join need a data set", "none was given", "Name a file")
    tables = tables or GeneTables()
    ids = [_ids(one) for one in lists]
    species, notes = _species(lists, ids, reference)
    reference = species_name(reference) if reference else (HUMAN if HUMAN in species else species[0])
    symbol_of_id, id_of_symbol = _learned(lists, ids)
    symbol_of_id |= dict(tables.symbol_of_id)
    _check_orthologs(lists, species, reference, tables, separate_species)
    ordered = sorted(range(len(lists)), key=lambda i: species[i] != reference)  # names of the reference come first
    owner: dict[str, str] = dict.fromkeys(tables.approved, HUMAN)
    named: dict[int, _Named] = {}
    for i in ordered:
        known = _Known(tables, symbol_of_id, id_of_symbol, species[i], reference)
        claims, conflicting = _claims(lists[i], ids[i], known)
        names, fates = _settle(lists[i], ids[i], claims)
        names = _apart(names, fates, species[i], owner)
        named[i] = _Named(lists[i], species[i], ids[i], names, fates, conflicting, tuple(notes[i]))
    in_order = [named[i] for i in range(len(lists))]
    vocabulary = _joint([named[i] for i in ordered], in_order, join, tables, symbol_of_id)
    position = {name: g for g, name in enumerate(vocabulary.names)}
    columns = tuple(np.array([position.get(n, -1) for n in one.names], dtype=np.int64) for one in in_order)
    measured = np.zeros((len(lists), len(vocabulary)), dtype=bool)
    for row, places in zip(measured, columns, strict=True):
        row[places[places >= 0]] = True
    if empty := [one.data_set for one, row in zip(lists, measured, strict=True) if not row.any()]:
        raise LingshuError(
            "Every data set must have genes of the joint list",
            f"{offenders(empty)} has none",
            "Use one name style (symbols or Ensembl ids), pass tables of aliases, or leave the data set out",
        )
    reports = tuple(_report(one, places, vocabulary) for one, places in zip(in_order, columns, strict=True))
    return JoinedGenes(vocabulary, columns, measured, reports)


def _ids(genes: GeneList) -> tuple[str, ...]:
    return GeneVocabulary.from_var(genes.gene_names, genes.var).ensembl_ids or ("",) * len(genes.gene_names)


def _species(
    lists: Sequence[GeneList], ids: Sequence[tuple[str, ...]], reference: str | None
) -> tuple[list[str], list[list[str]]]:
    """Take the species stated, else that of the ids; else it is the reference's, which is noted."""
    found: list[str | None] = []
    notes: list[list[str]] = [[] for _ in lists]
    for one, of_one in zip(lists, ids, strict=True):
        by_id = Counter(filter(None, (species_of_id(gene) for gene in of_one if gene))).most_common(1)
        told = species_name(one.species) if one.species else None
        if told and by_id and by_id[0][0] != told and by_id[0][1] > len(of_one) / 2:
            raise LingshuError(
                "The species must be that of the Ensembl ids",
                f"{one.data_set} is said to be {told}, but most ids are of {by_id[0][0]}",
                "Correct --species-of, or the id column of var",
            )
        found.append(told or (by_id[0][0] if by_id else None))
    stated = [one for one in found if one]
    fallback = species_name(reference) if reference else (HUMAN if HUMAN in stated or not stated else stated[0])
    for i, one in enumerate(found):
        if one is None:
            notes[i].append(f"species not stated, taken as {fallback.replace('_', ' ')}")
    return [one or fallback for one in found], notes


def _check_orthologs(
    lists: Sequence[GeneList], species: Sequence[str], reference: str, tables: GeneTables, separate: bool
) -> None:
    alone = [
        f"{one.data_set} ({kind})"
        for one, kind in zip(lists, species, strict=True)
        if kind != reference and (kind, reference) not in tables.orthologs
    ]
    if alone and not separate:
        raise LingshuError(
            "Genes of several species are joined by orthologs",
            f"there is no table of orthologs to {reference} for {offenders(alone)}",
            "Pass one with --orthologs, correct --species-of, or let each species keep its own genes with "
            "--separate-species",
        )


def _own_symbols(genes: GeneList) -> list[str]:
    """Give the symbol a data set itself has for each gene: the name, or a symbol column where names are ids."""
    names = [str(name) for name in genes.gene_names]
    by_lower = {} if genes.var is None else {str(c).lower(): c for c in genes.var.columns}
    column = next((by_lower[c] for c in SYMBOL_COLUMNS if c in by_lower), None)
    said = genes.var[column].astype(object).where(genes.var[column].notna(), "") if column is not None else names
    return [str(s) if _is_id(n) and s and not _is_id(str(s)) else n for n, s in zip(names, said, strict=True)]


def _is_id(name: str) -> bool:
    return species_of_id(name.split(".")[0]) is not None


def _learned(lists: Sequence[GeneList], ids: Sequence[tuple[str, ...]]) -> tuple[dict[str, str], dict[str, str]]:
    """Learn symbols of ids from data sets that have both, the first one counts; and ids of symbols if all agree."""
    symbols: dict[str, str] = {}
    ids_of: dict[str, set[str]] = {}
    for genes, of_one in zip(lists, ids, strict=True):
        for symbol, gene_id in zip(_own_symbols(genes), of_one, strict=True):
            if gene_id and not _is_id(symbol):
                symbols.setdefault(gene_id, symbol)
                ids_of.setdefault(symbol, set()).add(gene_id)
    return symbols, {symbol: next(iter(found)) for symbol, found in ids_of.items() if len(found) == 1}


@dataclass(frozen=True, eq=False)
class _Known:
    """All that helps to name the genes of one data set."""

    tables: GeneTables
    symbol_of_id: Mapping[str, str]
    learned_ids: Mapping[str, str]
    species: str
    reference: str


def _claims(genes: GeneList, ids: tuple[str, ...], known: _Known) -> tuple[list[tuple[str, str, float]], int]:
    """Say for each gene which name it claims, by which fate, and how well."""
    claims, conflicting = [], 0
    species, tables = known.species, known.tables
    orthologs = tables.orthologs.get((species, known.reference), {})
    own_ids = tables.id_of_symbol.get(species, {})
    for own, symbol, gene_id in zip(map(str, genes.gene_names), _own_symbols(genes), ids, strict=True):
        if species != known.reference:
            keys = (gene_id, own_ids.get(symbol, ""), symbol, known.symbol_of_id.get(gene_id, ""))
            partner = next((orthologs[key] for key in keys if key and key in orthologs), None)
            if partner:
                claims.append((known.symbol_of_id.get(partner[0], partner[0]), "ortholog", partner[1]))
                continue
            if orthologs and (alike := _spelt_like_human(symbol, known)):
                claims.append((alike, "spelling", 0.0))
                continue
        current, fate = _current(own, symbol, gene_id, known)
        if species == HUMAN and fate == "Ensembl id" and tables.approved.get(symbol, gene_id) not in ("", gene_id):
            conflicting += 1
        claims.append((current, fate, 0.0))
    return claims, conflicting


def _spelt_like_human(symbol: str, known: _Known) -> str | None:
    """Give the human gene of the same name, capitals ignored: tables of orthologs lack such genes as Gapdh."""
    name = symbol.upper()
    if known.reference != HUMAN or name == symbol:
        return None
    if name in known.tables.approved:
        return name
    meanings = known.tables.former.get(name, ())
    return meanings[0] if len(meanings) == 1 else None


def _current(own: str, symbol: str, gene_id: str, known: _Known) -> tuple[str, str]:
    """Give the current symbol within a species, and how it was found."""
    tables = known.tables
    if gene_id:
        symbol = known.symbol_of_id.get(gene_id, symbol)
    fate = "name" if symbol == own else "Ensembl id"
    if known.species != HUMAN or not tables.approved or symbol in tables.approved:
        return symbol, fate
    if by_id := tables.symbol_of_id.get(known.learned_ids.get(symbol, "") if not gene_id else ""):
        return by_id, "Ensembl id"  # a data set with the same old symbol tells the id
    spelt = _OPEN_READING_FRAME.sub(r"C\1orf\2", symbol)
    meanings = (spelt,) if spelt in tables.approved else tables.former.get(spelt, ())
    if len(meanings) == 1:
        return meanings[0], "alias"
    if meanings:
        return own, "ambiguous"
    return symbol, "unlisted" if symbol == own else fate


def _settle(
    genes: GeneList, ids: tuple[str, ...], claims: Sequence[tuple[str, str, float]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give each name to its surest claimant; the others keep their own names."""
    rank = {fate: r for r, fate in enumerate(FATES)}
    best: dict[str, tuple[float, float]] = {}
    claimants: dict[str, list[int]] = {}
    for i, (name, fate, score) in enumerate(claims):
        trust = (0.0 if name == str(genes.gene_names[i]) else 1.0 + rank[fate], -score)
        if name not in best or trust < best[name]:
            best[name], claimants[name] = trust, [i]
        elif trust == best[name]:
            claimants[name].append(i)
    names: list[str | None] = [None] * len(claims)
    fates = [fate for _, fate, _ in claims]
    for name, of_name in claimants.items():
        if len(of_name) == 1:
            names[of_name[0]] = name
    taken = {name for name in names if name is not None}
    for i, name in enumerate(names):
        if name is None:
            own = str(genes.gene_names[i])
            candidates = [own, f"{own} [{ids[i] or 'another gene'}]", f"{own} [gene {i}]"]
            names[i] = next(one for one in candidates if one not in taken)
            taken.add(names[i])
            fates[i] = "ambiguous"
    return tuple(str(name) for name in names), tuple(fates)


def _apart(names: tuple[str, ...], fates: tuple[str, ...], species: str, owner: dict[str, str]) -> tuple[str, ...]:
    """Add the species where another species' gene has the same name and is no ortholog."""
    apart = []
    for name, fate in zip(names, fates, strict=True):
        if fate not in _ACROSS and owner.setdefault(name, species) != species:
            name = f"{name} ({species})"
            owner.setdefault(name, species)
        apart.append(name)
    return tuple(apart)


def _joint(
    ordered: Sequence[_Named],
    in_order: Sequence[_Named],
    join: str | Sequence[str],
    tables: GeneTables,
    symbol_of_id: Mapping[str, str],
) -> GeneVocabulary:
    if isinstance(join, str) and join not in ("union", "intersection"):
        raise LingshuError("Genes are joined by union, intersection or a list", f"got {join!r}", "Choose one of them")
    present = dict.fromkeys(name for one in in_order for name in one.names)
    if join == "intersection":
        sets = [set(one.names) for one in in_order]
        names = [name for name in present if all(name in of_one for of_one in sets)]
    elif join == "union":
        names = list(present)
    else:
        names = _wanted(join, present, in_order, tables, symbol_of_id)
    if not names:
        raise LingshuError(
            "The joint gene list must hold genes",
            f"the {join if isinstance(join, str) else 'list'} is empty",
            "Use one name style (symbols or Ensembl ids) in all data sets, pass tables of aliases, or join by union",
        )
    id_of: dict[str, str] = {}
    for one in ordered:
        for name, gene_id in zip(one.names, one.ids, strict=True):
            if gene_id and name not in id_of and (one.species == ordered[0].species or f"({one.species})" in name):
                id_of[name] = gene_id
    for one in ordered:  # then genes that only another species has
        for name, gene_id, fate in zip(one.names, one.ids, one.fates, strict=True):
            if gene_id and fate not in _ACROSS:
                id_of.setdefault(name, gene_id)
    ids = tuple(tables.approved.get(name) or id_of.get(name, "") for name in names)
    return GeneVocabulary(tuple(names), ids if any(ids) else None)


def _wanted(
    listed: Sequence[str],
    present: Mapping[str, None],
    named: Sequence[_Named],
    tables: GeneTables,
    symbol_of_id: Mapping[str, str],
) -> list[str]:
    """Bring a list of wanted genes to the joint names; one that no data set has stays, as unknown everywhere."""
    by_own = {
        str(own): name for one in reversed(named) for own, name in zip(one.genes.gene_names, one.names, strict=True)
    }
    wanted = []
    for gene in map(str, listed):
        former = tables.former.get(gene, ())
        candidates = (gene, symbol_of_id.get(gene), by_own.get(gene), former[0] if len(former) == 1 else None)
        wanted.append(next((one for one in candidates if one in present), gene))
    repeated = [name for name, n in Counter(wanted).items() if n > 1]
    if repeated:
        raise LingshuError(
            "Genes of a list must be different", f"found more than once: {offenders(repeated)}", "Remove the repeats"
        )
    return wanted


def _report(named: _Named, places: np.ndarray, vocabulary: GeneVocabulary) -> GeneReport:
    own = [str(name) for name in named.genes.gene_names]
    at = {fate: [i for i, one in enumerate(named.fates) if one == fate] for fate in FATES}
    missing = np.ones(len(vocabulary), dtype=bool)
    missing[places[places >= 0]] = False
    dropped = np.flatnonzero(places < 0)
    return GeneReport(
        data_set=named.genes.data_set,
        species=named.species,
        n_genes=len(own),
        counts={fate: len(of_fate) for fate, of_fate in at.items()},
        examples={fate: _shown((own[i], named.names[i]) for i in of_fate[:_EXAMPLES]) for fate, of_fate in at.items()},
        n_joint=len(vocabulary),
        n_measured=int((~missing).sum()),
        missing=tuple(vocabulary.names[g] for g in np.flatnonzero(missing)[:_EXAMPLES]),
        n_dropped=len(dropped),
        dropped=tuple(own[i] for i in dropped[:_EXAMPLES]),
        conflicting=named.conflicting,
        notes=named.notes,
    )


def _shown(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(old if old == new else f"{old} → {new}" for old, new in pairs)
