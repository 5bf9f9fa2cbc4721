"""From data sets to what training needs: one gene list, tokens, conditions, and which cells train or validate.

Shapes: N cells of all data sets, G modelled genes, C condition fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lingshu_cell.data.anndata_io import CountMatrix
from lingshu_cell.data.splits import split_cells
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.data.vocabulary import (
    ConditionVocabulary,
    GeneVocabulary,
    align_genes,
    apply_alignment,
    union_vocabulary,
)
from lingshu_cell.errors import LingshuError
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS


@dataclass(frozen=True, eq=False)
class RareGenes:
    """Genes too rare to model: every non-zero count seen in training, to be drawn with its frequency.

    Attributes
    ----------
    gene
        Index into the vocabulary of each non-zero count, int64.
    count
        The counts, int32.
    n_cells
        Training cells behind them; each entry recurs in a generated cell with probability 1 / n_cells.
    """

    gene: np.ndarray
    count: np.ndarray
    n_cells: int


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Everything training reads, in memory and sparse.

    Attributes
    ----------
    vocabulary
        All genes, in order.
    modelled
        Indices into the vocabulary of the G genes the network models, int64, rising.
    tokens
        Expression tokens of the modelled genes, CSR int16, N × G, zeros not stored.
    measured
        Boolean, data sets × G: which modelled genes each data set measured.
    data_set
        Data set of each cell, int64, N.
    conditions
        Condition fields and their categories.
    condition_NC
        Index of each cell's condition in each field.
    train, validation
        Indices of the cells, disjoint.
    rare
        The genes that are not modelled.
    fingerprints
        sha256 of each data set.
    notes
        What a user should read about the data: coverage, genes left out.
    """

    vocabulary: GeneVocabulary
    modelled: np.ndarray
    tokens: sparse.csr_matrix
    measured: np.ndarray
    data_set: np.ndarray
    conditions: ConditionVocabulary
    condition_NC: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    rare: RareGenes
    fingerprints: tuple[str, ...]
    notes: tuple[str, ...]

    def dense_tokens(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of some cells, int16, shape [len(cells), G]; ``MASK_TOKEN`` where a gene was not measured."""
        dense = self.tokens[cells].toarray()
        if not self.measured.all():
            dense[~self.measured[self.data_set[cells]]] = MASK_TOKEN
        return dense

    def token_counts(self) -> np.ndarray:
        """How many training cells show each token, int64, shape [G, 281]; zeros only where the gene was measured."""
        tokens = self.tokens[self.train].tocoo()
        flat = tokens.col.astype(np.int64) * N_EXPRESSION_TOKENS + tokens.data
        counts = np.bincount(flat, minlength=tokens.shape[1] * N_EXPRESSION_TOKENS).reshape(-1, N_EXPRESSION_TOKENS)
        n_measured = np.bincount(self.data_set[self.train], minlength=len(self.measured)) @ self.measured
        counts[:, 0] = n_measured - counts.sum(1)
        return counts

    def condition_frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct condition rows of the training cells, R × C, and how often each occurs."""
        return np.unique(self.condition_NC[self.train], axis=0, return_counts=True)


def assemble(
    data_sets: Sequence[CountMatrix],
    *,
    condition_keys: Sequence[str] = (),
    min_cells_per_gene: int = 3,
    min_coverage: float = 0.5,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> TrainingSet:
    """Bring data sets onto one gene list, tokenize, and split their cells.

    Parameters
    ----------
    data_sets
        Checked counts; genes of several are joined by name and those a data set lacks are unknown in it, not zero.
    condition_keys
        obs columns to condition on; all data sets have them.
    min_cells_per_gene
        Genes detected in fewer training cells are not modelled (the preprint's own rule, with 3).
    min_coverage
        Least share of the joint gene list that each data set must have.
    validation_fraction
        Share of the cells held out; 0 keeps all for training.
    split_seed
        Seed of the split.

    Raises
    ------
    LingshuError
        If gene lists do not fit, a condition is missing, or too few cells or genes remain.
    """
    if len(data_sets) == 1:
        vocabulary = GeneVocabulary.from_var(data_sets[0].gene_names, data_sets[0].var)
    else:
        vocabulary, _ = union_vocabulary([d.gene_names for d in data_sets])
    counts, measured, notes = _align(data_sets, vocabulary, min_coverage)
    conditions, condition_NC = _conditions(data_sets, condition_keys)
    n_cells = counts.shape[0]
    everyone = np.arange(n_cells)
    train, validation = (
        split_cells(n_cells, validation_fraction, split_seed) if validation_fraction else (everyone, everyone[:0])
    )
    detected_in = np.bincount(counts[train].indices, minlength=len(vocabulary))
    is_modelled = detected_in >= max(min_cells_per_gene, 0)
    if not is_modelled.any():
        raise LingshuError(
            "Some genes must be detected often enough to model",
            f"none of {len(vocabulary)} is detected in {min_cells_per_gene} of {len(train)} training cells",
            "Use more cells or lower data.min_cells_per_gene",
        )
    modelled = np.flatnonzero(is_modelled)
    rare_counts = counts[train][:, np.flatnonzero(~is_modelled)].tocoo()
    rare = RareGenes(np.flatnonzero(~is_modelled)[rare_counts.col], rare_counts.data.astype(np.int32), len(train))
    if (~is_modelled).any():
        share = rare.count.sum() / max(counts[train].sum(), 1)
        notes.append(
            f"{len(modelled):,} of {len(vocabulary):,} genes are modelled; {(~is_modelled).sum():,} detected in "
            f"fewer than {min_cells_per_gene} training cells ({share:.2%} of all UMI) are drawn from their frequency"
        )
    tokens = counts[:, modelled]
    tokens = sparse.csr_matrix((encode(tokens.data), tokens.indices, tokens.indptr), shape=tokens.shape)
    return TrainingSet(
        vocabulary=vocabulary,
        modelled=modelled,
        tokens=tokens,
        measured=measured[:, modelled],
        data_set=np.repeat(np.arange(len(data_sets)), [d.n_cells for d in data_sets]),
        conditions=conditions,
        condition_NC=condition_NC,
        train=train,
        validation=validation,
        rare=rare,
        fingerprints=tuple(d.fingerprint for d in data_sets),
        notes=tuple(notes),
    )


def _align(
    data_sets: Sequence[CountMatrix], vocabulary: GeneVocabulary, min_coverage: float
) -> tuple[sparse.csr_matrix, np.ndarray, list[str]]:
    if len(data_sets) == 1:
        return data_sets[0].counts, np.ones((1, len(vocabulary)), dtype=bool), []
    aligned, measured, notes = [], [], []
    for data in data_sets:
        alignment = align_genes(vocabulary, list(data.gene_names), data.var, min_coverage=min_coverage)
        counts, present = apply_alignment(data.counts, alignment)
        aligned.append(counts)
        measured.append(present)
        notes.append(f"{data.source}: {alignment.describe()}")
    return sparse.vstack(aligned, format="csr"), np.stack(measured), notes


def _conditions(data_sets: Sequence[CountMatrix], keys: Sequence[str]) -> tuple[ConditionVocabulary, np.ndarray]:
    per_set = [ConditionVocabulary.from_obs(data.obs, keys) for data in data_sets]
    fields = {key: tuple(sorted({c for one in per_set for c in one.fields[key]})) for key in keys}
    conditions = ConditionVocabulary(fields)
    return conditions, np.concatenate([conditions.encode(data.obs) for data in data_sets])


def minibatch_cells(train: np.ndarray, minibatch_size: int, step: int, seed: int) -> np.ndarray:
    """Cells of optimiser step ``step`` (0, 1, …): epochs of fresh permutations, cut without remainder.

    A function of the step alone, so that a resumed run goes on where the stopped one would have.
    """
    n = len(train)
    place = np.arange(step * minibatch_size, (step + 1) * minibatch_size)
    cells = np.empty(minibatch_size, dtype=np.int64)
    for epoch in range(place[0] // n, place[-1] // n + 1):
        here = place // n == epoch
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        cells[here] = train[order[place[here] - epoch * n]]
    return cells
