"""What a model knows by name: its ordered genes, its conditions, and how another data set's genes fit them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.errors import LingshuError, offenders

MIN_COVERAGE = 0.5
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl_gene_id", "ensembl", "feature_id")
SYMBOL_COLUMNS = ("gene_symbols", "gene_symbol", "gene_names", "gene_name", "symbol", "symbols", "feature_name")

# Vertebrate Ensembl ids may carry a version suffix; a dot in other names (Y74C9A.3, AL627309.1) belongs to the name.
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(?:\.\d+)?(_PAR_Y)?")
_OTHER_ID = re.compile(r"FBgn\d{7}|WBGene\d{8}")


@dataclass(frozen=True)
class GeneVocabulary:
    """The ordered genes of a model or a data set.

    Parameters
    ----------
    names
        Gene names in order, unique: symbols or Ensembl ids, as in ``var_names``.
    ensembl_ids
        Ensembl id of every gene, or empty text where there is none; None when no ids are known.
    """

    names: tuple[str, ...]
    ensembl_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise LingshuError("A gene vocabulary needs genes", "the list is empty", "Pass at least one gene name")
        repeated = [name for name, n in Counter(self.names).items() if n > 1]
        if repeated:
            raise LingshuError(
                "Gene names must be unique", f"found more than once: {offenders(repeated)}", "Remove the repeats"
            )
        if self.ensembl_ids is not None and len(self.ensembl_ids) != len(self.names):
            raise LingshuError(
                "A gene vocabulary needs one Ensembl id per gene",
                f"{len(self.names)} genes and {len(self.ensembl_ids)} ids",
                "Use empty text where a gene has no id",
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_var(cls, gene_names: Sequence[str], var: pd.DataFrame | None = None) -> "GeneVocabulary":
        """Take the gene names of a data set and, where its ``var`` (or the names themselves) hold them, the ids.

        Parameters
        ----------
        gene_names
            ``var_names``.
        var
            ``adata.var``, rows in the order of ``gene_names``; ids are looked for in ``ID_COLUMNS``.

        Returns
        -------
        GeneVocabulary
        """
        names = tuple(str(name) for name in gene_names)
        ids = _ensembl_ids(names, var)
        return cls(names, tuple(one or "" for one in ids) if any(ids) else None)

    def index(self, names: Iterable[str]) -> np.ndarray:
        """Give the position of every named gene.

        Parameters
        ----------
        names
            Gene names of this vocabulary.

        Returns
        -------
        np.ndarray
            Positions, int64, shape [number of names].

        Raises
        ------
        LingshuError
            If a name is not in the vocabulary.
        """
        names = [names] if isinstance(names, str) else list(names)
        position = {name: i for i, name in enumerate(self.names)}
        unknown = [name for name in names if name not in position]
        if unknown:
            raise LingshuError(
                "Genes must be in the vocabulary",
                f"{offenders(unknown)} are not among its {len(self)} genes ({_examples(self.names)})",
                "Check spelling and capitals, or use align_genes to match symbols, Ensembl ids and aliases",
            )
        return np.array([position[name] for name in names], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Give the vocabulary as plain JSON types."""
        return {"names": list(self.names), "ensembl_ids": None if self.ensembl_ids is None else list(self.ensembl_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "GeneVocabulary":
        """Rebuild the vocabulary from what :meth:`to_json` gave."""
        ids = value["ensembl_ids"]
        return cls(tuple(value["names"]), None if ids is None else tuple(ids))


@dataclass(frozen=True)
class GeneAlignment:
    """Where each gene of a vocabulary lies in a data set.

    Parameters
    ----------
    columns
        Column of the data set for every gene of the vocabulary, −1 where it is absent; int64, shape [n_vocab].
    n_source
        Genes in the data set.
    matched
        Vocabulary genes found under their own name.
    renamed
        ``(name in the data, name in the vocabulary, how)`` with how one of ``Ensembl id``, ``symbol``, ``alias``,
        ``capitals``.
    ambiguous
        Vocabulary genes that several genes of the data set could be; left absent.
    missing
        Vocabulary genes that the data set has not; ambiguous ones are not repeated here.
    extra
        Genes of the data set that the vocabulary has not.
    conflicting
        Genes matched by name although the Ensembl ids of both sides differ.
    """

    columns: np.ndarray
    n_source: int
    matched: tuple[str, ...]
    renamed: tuple[tuple[str, str, str], ...]
    ambiguous: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    conflicting: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that the data set has, 0 … 1."""
        return (len(self.matched) + len(self.renamed)) / len(self.columns)

    def describe(self) -> str:
        """Tell in a few lines how well the genes fit."""
        found = len(self.matched) + len(self.renamed)
        lines = [f"{found:,} of {len(self.columns):,} genes of the model found in the data ({self.coverage:.1%})"]
        for how, n in Counter(how for _, _, how in self.renamed).items():
            pairs = [f"{old} → {new}" for old, new, by in self.renamed if by == how]
            lines.append(f"  {n:,} by {how}: {', '.join(pairs[:3])}{', …' if n > 3 else ''}")
        notes = (
            (self.missing, "absent, treated as unknown and not as zero"),
            (self.ambiguous, "with several candidates, treated as unknown"),
            (self.conflicting, "found by name although the Ensembl ids differ"),
            (self.extra, "only in the data, not used"),
        )
        lines += [f"  {len(genes):,} {what}: {_examples(genes)}" for genes, what in notes if genes]
        return "\n".join(lines)


def align_genes(
    vocabulary: GeneVocabulary,
    gene_names: Sequence[str],
    var: pd.DataFrame | None = None,
    aliases: Mapping[str, str] | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> GeneAlignment:
    """Find each gene of a vocabulary in a data set: by name, Ensembl id, symbol column, alias, then by capitals.

    A gene is taken by the first of these that names exactly one candidate on both sides; several candidates make it
    ambiguous, and it stays absent.

    Parameters
    ----------
    vocabulary
        The genes wanted, in order.
    gene_names
        ``var_names`` of the data set.
    var
        ``adata.var``; its id and symbol columns are used when present (``ID_COLUMNS``, ``SYMBOL_COLUMNS``).
    aliases
        Former or other symbol → current symbol, applied to both sides.
    min_coverage
        Smallest share of the vocabulary that must be found, 0 … 1.

    Returns
    -------
    GeneAlignment

    Raises
    ------
    LingshuError
        If the coverage is 0 or below ``min_coverage``, if ids or capitals say that it is another species, or if
        ``var`` has another length than ``gene_names``.
    """
    source = [str(name) for name in gene_names]
    if var is not None and len(var) != len(source):
        raise LingshuError(
            "var needs one row per gene", f"{len(source)} genes and {len(var)} rows", "Pass adata.var_names, adata.var"
        )
    ids = vocabulary.ensembl_ids or ("",) * len(vocabulary)
    wanted_ids = [_as_id(one) or _as_id(name) for one, name in zip(ids, vocabulary.names, strict=True)]
    source_ids = _ensembl_ids(source, var)
    _check_species(wanted_ids, source_ids)
    aliases = aliases or {}
    rungs: tuple[tuple[str, Sequence[str | None], Sequence[str | None]], ...] = (
        ("name", vocabulary.names, source),
        ("Ensembl id", wanted_ids, source_ids),
        ("symbol", vocabulary.names, _column(var, SYMBOL_COLUMNS, len(source))),
        ("alias", [aliases.get(n, n) for n in vocabulary.names], [aliases.get(n, n) for n in source]),
        ("capitals", [n.upper() for n in vocabulary.names], [n.upper() for n in source]),
    )
    columns, how, ambiguous = _climb(rungs, len(vocabulary), len(source))
    found = np.flatnonzero(columns >= 0)
    by_name = [g for g in found if how[g] == "name"]
    alignment = GeneAlignment(
        columns=columns,
        n_source=len(source),
        matched=tuple(vocabulary.names[g] for g in by_name),
        renamed=tuple((source[columns[g]], vocabulary.names[g], how[g]) for g in found if how[g] != "name"),
        ambiguous=tuple(vocabulary.names[g] for g in sorted(ambiguous)),
        missing=tuple(vocabulary.names[g] for g in np.flatnonzero(columns < 0) if g not in ambiguous),
        extra=tuple(source[c] for c in np.setdiff1d(np.arange(len(source)), columns)),
        conflicting=tuple(
            vocabulary.names[g]
            for g in by_name
            if wanted_ids[g] and source_ids[columns[g]] and wanted_ids[g] != source_ids[columns[g]]
        ),
    )
    _check_fit(alignment, vocabulary.names, source, min_coverage)
    return alignment


def apply_alignment(counts: sparse.csr_matrix, alignment: GeneAlignment) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Bring counts into the gene order of the vocabulary and say which genes are known at all.

    Parameters
    ----------
    counts
        UMI counts, shape [n_cells, alignment.n_source].
    alignment
        What :func:`align_genes` gave for these genes.

    Returns
    -------
    tuple
        Counts of shape [n_cells, n_vocab], CSR with sorted indices, dtype kept, and ``present``, bool [n_vocab]. A gene
        that is not present has no stored counts: it is unknown, not zero.

    Raises
    ------
    LingshuError
        If ``counts`` has another number of genes than the data set that was aligned.
    """
    if counts.shape[1] != alignment.n_source:
        raise LingshuError(
            "Counts must have the genes that were aligned",
            f"{counts.shape[1]} columns instead of {alignment.n_source}",
            "Align the genes of this data set",
        )
    present = alignment.columns >= 0
    wanted = np.flatnonzero(present)
    one = np.ones(len(wanted), dtype=counts.dtype)
    place = sparse.csr_matrix((one, (alignment.columns[wanted], wanted)), (counts.shape[1], len(present)))
    moved = sparse.csr_matrix(counts @ place)
    moved.sort_indices()
    return moved, present


def union_vocabulary(gene_lists: Sequence[Sequence[str]]) -> tuple[GeneVocabulary, tuple[float, ...]]:
    """Join the gene lists of several data sets, in order of first appearance.

    Parameters
    ----------
    gene_lists
        ``var_names`` of each data set.

    Returns
    -------
    tuple
        The vocabulary, and for every data set the share of it that the set has, 0 … 1.

    Raises
    ------
    LingshuError
        If there is no list, or if a list shares no gene with any other.
    """
    if not gene_lists:
        raise LingshuError("A union needs gene lists", "none was given", "Pass the var_names of each data set")
    lists = [[str(name) for name in genes] for genes in gene_lists]
    sets = [set(genes) for genes in lists]
    shared = Counter(name for genes in sets for name in genes)
    for i, genes in enumerate(sets):
        if len(sets) > 1 and not any(shared[name] > 1 for name in genes):
            other = lists[1 if i == 0 else 0]
            raise LingshuError(
                "Gene lists to be joined must share genes",
                f"list {i + 1} ({_examples(lists[i])}) shares none with the others ({_examples(other)})",
                "Use one name style, symbols or Ensembl ids, in all of them",
            )
    vocabulary = GeneVocabulary(tuple(dict.fromkeys(name for genes in lists for name in genes)))
    return vocabulary, tuple(len(genes) / len(vocabulary) for genes in sets)


@dataclass(frozen=True)
class ConditionVocabulary:
    """The conditions a model was trained on: obs columns and their categories.

    Index 0 of every field means unknown (unconditional); category k of the tuple has index k + 1.

    Parameters
    ----------
    fields
        obs column → its categories, in order.
    """

    fields: Mapping[str, tuple[str, ...]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of indices of every field: its categories and one for unknown."""
        return tuple(len(categories) + 1 for categories in self.fields.values())

    @classmethod
    def from_obs(cls, obs: pd.DataFrame, keys: Sequence[str]) -> "ConditionVocabulary":
        """Collect the categories that occur in obs columns, sorted as text.

        Parameters
        ----------
        obs
            ``adata.obs``.
        keys
            The columns, in the order of the condition tokens; none is allowed.

        Returns
        -------
        ConditionVocabulary

        Raises
        ------
        LingshuError
            If a key is absent or named twice, has no label in some cells, or holds decimal numbers.
        """
        if isinstance(keys, str) or len(set(keys)) != len(keys):
            raise LingshuError(
                "Condition keys must be a list of different obs columns", f"got {keys!r}", "Pass e.g. ['cell_type']"
            )
        return cls({key: tuple(sorted(set(_labels(obs, key)))) for key in keys})

    def encode(self, obs: pd.DataFrame | Mapping[str, Any], n: int | None = None) -> np.ndarray:
        """Give the index of every cell's condition in every field.

        Parameters
        ----------
        obs
            Labels of given cells: a data frame that has every field. Or what is wanted: field → one label for all
            cells, or one label per cell; a field left out or None is unknown (unconditional).
        n
            Number of cells; may be left out for a data frame.

        Returns
        -------
        np.ndarray
            Indices, int64, shape [n, n_fields]; 0 = unknown.

        Raises
        ------
        LingshuError
            If a field or a label is not known, or if lengths differ.
        """
        given = {key: _labels(obs, key) for key in self.fields} if isinstance(obs, pd.DataFrame) else dict(obs)
        n = len(obs) if n is None and isinstance(obs, pd.DataFrame) else n
        if n is None:
            raise LingshuError("The number of cells must be given", "n is missing", "Pass n=…")
        unknown = [key for key in given if key not in self.fields]
        if unknown:
            raise LingshuError(
                "Conditions must be those of the model",
                f"{offenders(unknown)} is not one of its fields",
                f"Use {offenders(self.fields)}" if self.fields else "This model was trained without conditions",
            )
        indices = np.zeros((n, len(self.fields)), dtype=np.int64)
        for column, (key, categories) in enumerate(self.fields.items()):
            indices[:, column] = _encode_field(key, categories, given.get(key), n)
        return indices

    def decode(self, indices: np.ndarray) -> pd.DataFrame:
        """Give the labels of condition indices, missing where unknown.

        Parameters
        ----------
        indices
            What :meth:`encode` gave, int64, shape [n, n_fields].

        Returns
        -------
        pd.DataFrame
            One categorical column per field, n rows.
        """
        columns = {
            key: pd.Categorical.from_codes(indices[:, i] - 1, categories=list(categories))
            for i, (key, categories) in enumerate(self.fields.items())
        }
        return pd.DataFrame(columns, index=pd.RangeIndex(len(indices)))

    def to_json(self) -> dict[str, list[str]]:
        """Give the vocabulary as plain JSON types; the order of the fields counts."""
        return {key: list(categories) for key, categories in self.fields.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[str]]) -> "ConditionVocabulary":
        """Rebuild the vocabulary from what :meth:`to_json` gave."""
        return cls({key: tuple(categories) for key, categories in value.items()})


def _encode_field(key: str, categories: tuple[str, ...], labels: Any, n: int) -> np.ndarray | int:
    if labels is None:
        return 0
    if isinstance(labels, str) or np.ndim(labels) == 0:
        labels = [labels] * n
    labels = [str(label) for label in labels]
    if len(labels) != n:
        raise LingshuError(
            "Conditions need one label per cell", f"{len(labels)} labels of {key!r} for {n} cells", "Pass one or n"
        )
    position = {category: k + 1 for k, category in enumerate(categories)}
    unknown = [label for label in dict.fromkeys(labels) if label not in position]
    if unknown:
        raise LingshuError(
            "Conditions must be among those the model was trained on",
            f"{key} has no {offenders(unknown)}",
            f"Known values: {offenders(categories)}",
        )
    return np.array([position[label] for label in labels], dtype=np.int64)


def _labels(obs: pd.DataFrame, key: str) -> list[str]:
    if key not in obs.columns:
        raise LingshuError(
            "Conditions must be obs columns", f"there is no {key!r}", f"Available: {offenders(obs.columns)}"
        )
    column = obs[key]
    n_missing = int(column.isna().sum())
    if n_missing:
        raise LingshuError(
            "Conditions need a label in every cell",
            f"{n_missing} of {len(column)} cells have none in {key!r}",
            "Drop these cells or give them a label",
        )
    if pd.api.types.is_float_dtype(column.dtype):
        raise LingshuError(
            "Conditions must be labels", f"{key!r} holds decimal numbers", "Cut it into named classes, or leave it out"
        )
    return [str(label) for label in column]


def _climb(
    rungs: Sequence[tuple[str, Sequence[str | None], Sequence[str | None]]], n_wanted: int, n_source: int
) -> tuple[np.ndarray, dict[int, str], set[int]]:
    """Match one rung after another among the genes still free; keys that are not unique on both sides match nothing."""
    columns = np.full(n_wanted, -1, dtype=np.int64)
    how: dict[int, str] = {}
    ambiguous: set[int] = set()
    free = np.ones(n_source, dtype=bool)
    for name, wanted, source in rungs:
        places: dict[str, list[int]] = {}
        for c in np.flatnonzero(free):
            if source[c]:
                places.setdefault(source[c], []).append(int(c))
        askers = Counter(wanted[g] for g in range(n_wanted) if columns[g] < 0 and wanted[g])
        for g in range(n_wanted):
            candidates = places.get(wanted[g] or "", ()) if columns[g] < 0 else ()
            if len(candidates) == 1 and askers[wanted[g]] == 1 and g not in ambiguous:
                columns[g], how[g] = candidates[0], name
                free[candidates[0]] = False
            elif candidates:
                ambiguous.add(g)
    return columns, how, ambiguous


def _check_species(wanted_ids: Sequence[str | None], source_ids: Sequence[str | None]) -> None:
    """Refuse ids of two species: chicken symbols are spelt like human ones, and half of them would match."""
    prefixes = [Counter(re.match("[A-Za-z]+", one).group() for one in ids if one) for ids in (wanted_ids, source_ids)]
    if not all(prefixes):
        return
    (wanted, _), (source, _) = (counter.most_common(1)[0] for counter in prefixes)
    if source not in prefixes[0]:  # a model of several species has ids of each
        raise LingshuError(
            "Genes must be those of one species",
            f"most ids of the model begin with {wanted}, most ids of the data with {source}",
            "Check the species; to use orthologs, rename the genes and drop the id column",
        )


def _check_fit(alignment: GeneAlignment, wanted: Sequence[str], source: Sequence[str], min_coverage: float) -> None:
    n_capitals = sum(how == "capitals" for _, _, how in alignment.renamed)
    if n_capitals > len(alignment.matched) + len(alignment.renamed) - n_capitals:
        pairs = [f"{old} for {new}" for old, new, how in alignment.renamed if how == "capitals"]
        raise LingshuError(
            "Genes must be those of one species",
            f"most names agree only when capitals are ignored, e.g. {', '.join(pairs[:3])}",
            "Check the species; to use orthologs, rename the genes or pass them as aliases",
        )
    if alignment.coverage < min_coverage or alignment.coverage == 0:
        found = len(alignment.matched) + len(alignment.renamed)
        raise LingshuError(
            f"At least {min_coverage:.0%} of the model's genes must be in the data",
            f"{found} of {len(wanted)} are ({alignment.coverage:.1%}); the model has {_examples(wanted)}, "
            f"the data {_examples(source)}",
            "Use the same species and name style, put Ensembl ids in var['gene_ids'], pass aliases, or lower "
            "min_coverage if the data only measure fewer genes",
        )


def _as_id(name: str | None) -> str | None:
    if not name:
        return None
    match = _ENSEMBL.fullmatch(name)
    if match:
        return match.group(1) + (match.group(2) or "")
    return name if _OTHER_ID.fullmatch(name) else None


def _ensembl_ids(names: Sequence[str], var: pd.DataFrame | None) -> list[str | None]:
    stated = _column(var, ID_COLUMNS, len(names))
    return [_as_id(one) or _as_id(name) for one, name in zip(stated, names, strict=True)]


def _column(var: pd.DataFrame | None, candidates: Sequence[str], n: int) -> list[str | None]:
    """Give the first of the candidate columns of ``var``, capitals ignored, as text; None where there is nothing."""
    by_lower = {} if var is None else {str(column).lower(): column for column in var.columns}
    for name in candidates:
        if name in by_lower:
            column = var[by_lower[name]]
            return [None if missing else str(v) for v, missing in zip(column, column.isna(), strict=True)]
    return [None] * n


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
