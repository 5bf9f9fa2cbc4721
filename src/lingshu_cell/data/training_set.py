"""From data sets to what training needs: one gene list, tokens, conditions, and which cells train or validate.

Shapes: N cells of all data sets, G modelled genes, C condition fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.data.anndata_io import CountMatrix
from lingshu_cell.data.cell_states import CellStates
from lingshu_cell.data.positions import pieces, share_of
from lingshu_cell.data.split_files import read_split
from lingshu_cell.data.splits import split_cells
from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.data.vocabulary import (
    ConditionVocabulary,
    GeneVocabulary,
    align_genes,
    apply_alignment,
    union_vocabulary,
)
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS


@dataclass(frozen=True, eq=False)
class RareGenes:
    """Genes too rare to model: every non-zero count seen in training, to be drawn with its frequency.

    Attributes
    ----------
    gene
        Index into the vocabulary of each non-zero count, int64, J.
    count
        The counts, int32.
    data_set
        Which data set each is from, int64.
    n_cells_S
        Training cells of each data set, int64. Each entry recurs in a generated cell whose conditions are those of some
        data sets, its own being one, with probability 1 / (cells of these data sets).
    """

    gene: np.ndarray
    count: np.ndarray
    data_set: np.ndarray
    n_cells_S: np.ndarray


@dataclass(frozen=True, eq=False)
class CellRows:
    """Some cells as a network takes them in.

    Attributes
    ----------
    cells
        Their positions, int64.
    tokens
        Expression tokens of the modelled genes, CSR int16, B × G, zeros not stored.
    unmeasured_BG
        Boolean: genes that a cell's data set did not measure; ``None`` where all did all.
    condition_BC
        Index of each cell's condition in each field, int64, 0 = unknown.
    dose_B
        Doses as read; ``None`` where they are not.
    library_B
        Modelled UMI, int64; ``None`` where nobody needs them.
    """

    cells: np.ndarray
    tokens: sparse.csr_matrix
    unmeasured_BG: np.ndarray | None
    condition_BC: np.ndarray
    dose_B: np.ndarray | None
    library_B: np.ndarray | None

    @property
    def tokens_BG(self) -> np.ndarray:
        """All tokens, int16; ``MASK_TOKEN`` where a gene was not measured."""
        dense_BG = self.tokens.toarray()
        if self.unmeasured_BG is not None:
            dense_BG[self.unmeasured_BG] = MASK_TOKEN
        return dense_BG


class TrainingCells(ABC):
    """What training reads, wherever the cells lie; cells are named by their positions.

    Attributes
    ----------
    vocabulary
        All genes, in order.
    modelled
        Indices into the vocabulary of the G genes the network models, int64, rising.
    measured
        Boolean, data sets × G: which modelled genes each data set measured.
    conditions
        Condition fields and their categories.
    states
        What groups the cells, where their state is the first condition.
    train, validation
        Positions of the cells, rising, disjoint.
    seen
        Those of training and of all control cells of the training part, whether trained on or not.
    rare
        The genes that are not modelled.
    fingerprints
        Checksums of the data; of a store, its own and those of the files it was made of.
    notes
        What a user should read about the data: coverage, genes left out.
    """

    states: CellStates | None = None
    vocabulary: GeneVocabulary
    modelled: np.ndarray
    measured: np.ndarray
    conditions: ConditionVocabulary
    train: np.ndarray | range
    validation: np.ndarray | range
    seen: np.ndarray | range
    rare: RareGenes
    fingerprints: tuple[str, ...]
    notes: tuple[str, ...]

    @abstractmethod
    def rows(self, cells: np.ndarray) -> CellRows:
        """Give some cells, with library sizes."""

    @abstractmethod
    def condition_rows(self, cells: np.ndarray) -> np.ndarray:
        """Give the condition indices of some cells, int64, shape [len(cells), C]."""

    @abstractmethod
    def data_sets_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the data set of some cells: rows of ``measured``, int64."""

    @abstractmethod
    def doses(self, cells: np.ndarray) -> np.ndarray | None:
        """Give the doses of some cells as read; ``None`` where doses are not read."""

    @abstractmethod
    def counts_of(self, cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Give counts of the modelled genes in some cells, bin middles above 99, CSR float32, and their exact sums."""

    @property
    def states_open(self) -> "TrainingCells":
        """The same cells, their states not told where they have any."""
        return self

    @abstractmethod
    def token_counts(self) -> np.ndarray:
        """How many training cells show each token, int64, shape [G, 281]; zeros only where the gene was measured."""

    @abstractmethod
    def draws(
        self, minibatch_size: int, seed: int, balance: float, rank: int = 0, world_size: int = 1
    ) -> Callable[[int], CellRows]:
        """Give what draws one process's cells of optimiser step 0, 1, …: a function of the step alone, so that a
        resumed run goes on where the stopped one would have, and any number of processes draw the same cells.

        Parameters
        ----------
        minibatch_size
            Cells of a step over all processes.
        seed
            Seed of the order.
        balance
            A condition row of n cells is drawn n^(1 - balance) times as often as one of a single cell.
        rank, world_size
            Which of how many processes this is.
        """

    def condition_frequencies(self, cells: np.ndarray | range | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Distinct condition rows of the training cells, or of others, R × C, and how often each occurs."""
        found: dict[tuple[int, ...], int] = {}
        for piece in pieces(self.train if cells is None else cells):
            for row, n in zip(*np.unique(self.condition_rows(piece), axis=0, return_counts=True), strict=True):
                found[tuple(row.tolist())] = found.get(tuple(row.tolist()), 0) + int(n)
        rows = sorted(found)
        table = np.array(rows, dtype=np.int64).reshape(len(rows), len(self.conditions.fields))
        return table, np.array([found[row] for row in rows], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class TrainingSet(TrainingCells):
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
    dose
        Dose of each cell as read, N; ``None`` where doses are not read.
    library
        Modelled UMI of each cell, int64, N.
    train, validation
        Indices of the cells, disjoint.
    context_cells
        Control cells that may serve as a context: those of the training part, N boolean, whether trained on or not.
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
    dose: np.ndarray | None
    library: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    context_cells: np.ndarray
    rare: RareGenes
    fingerprints: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seen(self) -> np.ndarray:
        """Positions of training cells and of all control cells of the training part."""
        return np.union1d(self.train, np.flatnonzero(self.context_cells))

    def rows(self, cells: np.ndarray) -> CellRows:
        """Give some cells, with library sizes."""
        unmeasured_BG = None if self.measured.all() else ~self.measured[self.data_set[cells]]
        labels = self.condition_NC[cells], self.doses(cells), self.library[cells]
        return CellRows(cells, self.tokens[cells], unmeasured_BG, *labels)

    def condition_rows(self, cells: np.ndarray) -> np.ndarray:
        """Give the condition indices of some cells."""
        return self.condition_NC[cells]

    def data_sets_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the data set of some cells."""
        return self.data_set[cells]

    def doses(self, cells: np.ndarray) -> np.ndarray | None:
        """Give the doses of some cells as read."""
        return None if self.dose is None else self.dose[cells]

    def counts_of(self, cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Give counts of the modelled genes in some cells, and their exact sums."""
        return counts_of_tokens(self.tokens[cells]), self.library[cells]

    def draws(
        self, minibatch_size: int, seed: int, balance: float, rank: int = 0, world_size: int = 1
    ) -> Callable[[int], CellRows]:
        """Draw by epochs of fresh permutations, or independently where conditions are balanced."""
        mine = share_of(minibatch_size, rank, world_size)
        probabilities = balanced_probabilities(self.condition_NC[self.train], balance) if balance else None
        return lambda step: self.rows(minibatch_cells(self.train, minibatch_size, step, seed, probabilities)[mine])

    def token_counts(self) -> np.ndarray:
        """How many training cells show each token, int64, shape [G, 281]; zeros only where the gene was measured."""
        tokens = self.tokens[self.train].tocoo()
        flat = tokens.col.astype(np.int64) * N_EXPRESSION_TOKENS + tokens.data
        counts = np.bincount(flat, minlength=tokens.shape[1] * N_EXPRESSION_TOKENS).reshape(-1, N_EXPRESSION_TOKENS)
        n_measured = np.bincount(self.data_set[self.train], minlength=len(self.measured)) @ self.measured
        counts[:, 0] = n_measured - counts.sum(1)
        return counts


def counts_of_tokens(tokens: sparse.csr_matrix) -> sparse.csr_matrix:
    """Turn tokens into counts, bin middles above 99, CSR float32."""
    values = token_midpoints()[tokens.data].astype(np.float32)
    return sparse.csr_matrix((values, tokens.indices, tokens.indptr), shape=tokens.shape)


def assemble(
    data_sets: Sequence[CountMatrix],
    *,
    condition_keys: Sequence[str] = (),
    perturbation_key: str | None = None,
    control: str | None = None,
    dose_key: str | None = None,
    control_share: float = 1.0,
    split: Path | str | None = None,
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
        obs columns of the identity to condition on; all data sets have them.
    perturbation_key, control
        obs column of perturbations, which becomes the last condition field, and its label of control cells.
    dose_key
        obs column of doses.
    control_share
        Most that control cells may be of the training cells; those beyond, chosen at random, serve as context only.
    split
        TOML file of held-out conditions; its test cells are left out altogether.
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
    data_sets, part, split_notes = _without_test_cells(data_sets, split)
    if len(data_sets) == 1:
        vocabulary = GeneVocabulary.from_var(data_sets[0].gene_names, data_sets[0].var)
    else:
        vocabulary, _ = union_vocabulary([d.gene_names for d in data_sets])
    counts, measured, notes = _align(data_sets, vocabulary, min_coverage)
    notes += split_notes
    keys = (*condition_keys, perturbation_key) if perturbation_key else tuple(condition_keys)
    conditions, condition_NC = _conditions(data_sets, keys)
    train, validation = _parts(part, validation_fraction, split_seed)
    context_cells = np.zeros(counts.shape[0], dtype=bool)
    if perturbation_key:
        is_control = np.concatenate([(data.obs[perturbation_key].astype(str) == control) for data in data_sets])
        context_cells[train] = is_control[train]
        train = _cap_controls(train, is_control, control_share, split_seed, notes)
    detected_in = np.bincount(counts[train].indices, minlength=len(vocabulary))
    is_modelled = detected_in >= max(min_cells_per_gene, 0)
    check_modelled(is_modelled, min_cells_per_gene, len(train))
    modelled = np.flatnonzero(is_modelled)
    data_set = np.repeat(np.arange(len(data_sets)), [d.n_cells for d in data_sets])
    rare_counts = counts[train][:, np.flatnonzero(~is_modelled)].tocoo()
    rare = RareGenes(
        np.flatnonzero(~is_modelled)[rare_counts.col],
        rare_counts.data.astype(np.int32),
        data_set[train][rare_counts.row],
        np.bincount(data_set[train], minlength=len(data_sets)),
    )
    if (~is_modelled).any():
        share = rare.count.sum() / max(counts[train].sum(), 1)
        notes.append(say_modelled(is_modelled, min_cells_per_gene, share))
    tokens = counts[:, modelled]
    tokens = sparse.csr_matrix((encode(tokens.data), tokens.indices, tokens.indptr), shape=tokens.shape)
    return TrainingSet(
        vocabulary=vocabulary,
        modelled=modelled,
        tokens=tokens,
        measured=measured[:, modelled],
        data_set=data_set,
        conditions=conditions,
        condition_NC=condition_NC,
        dose=None if dose_key is None else np.concatenate([_doses(data, dose_key) for data in data_sets]),
        library=np.asarray(counts[:, modelled].sum(1)).ravel(),
        train=train,
        validation=validation,
        context_cells=context_cells,
        rare=rare,
        fingerprints=tuple(d.fingerprint for d in data_sets),
        notes=tuple(notes),
    )


def check_modelled(is_modelled: np.ndarray, min_cells_per_gene: int, n_training_cells: int) -> None:
    """Refuse gene lists of which next to nothing can be modelled."""
    if is_modelled.sum() < 2:  # the law of masks is one of how much some genes say of others
        raise LingshuError(
            "Two genes or more must be detected often enough to model",
            f"{is_modelled.sum() or 'none'} of {len(is_modelled)} is detected in {min_cells_per_gene} of "
            f"{n_training_cells} training cells",
            "Use more cells or lower data.min_cells_per_gene",
        )


def say_modelled(is_modelled: np.ndarray, min_cells_per_gene: int, share: float) -> str:
    """Say how many genes are modelled, and which share of all UMI the others have."""
    return (
        f"{is_modelled.sum():,} of {len(is_modelled):,} genes are modelled; {(~is_modelled).sum():,} detected in "
        f"fewer than {min_cells_per_gene} training cells ({share:.2%} of all UMI) are drawn from their frequency"
    )


def say_parts(split: Path | str, n_cells: Mapping[str, int]) -> str:
    """Say how many cells a split puts into each part."""
    return f"{Path(split).name}: " + ", ".join(f"{n:,} {part}" for part, n in sorted(n_cells.items())) + " cells"


def most_controls(n_controls: int, n_perturbed: int, share: float) -> int:
    """Say how many control cells may be trained on so that they are at most ``share`` of all.

    Raises
    ------
    LingshuError
        If none is left.
    """
    most = n_controls if share >= 1 else int(share / (1 - share) * n_perturbed)
    if n_controls and most == 0:
        raise LingshuError(
            "Some control cells must be trained on",
            f"{share:g} of {n_perturbed} perturbed cells leaves none",
            "Raise data.control_share",
        )
    return min(most, n_controls)


def say_controls(n_kept: int, n_controls: int, share: float) -> str:
    """Say how many control cells are trained on."""
    return f"{n_kept:,} of {n_controls:,} control cells are trained on (data.control_share {share:g})"


def _without_test_cells(
    data_sets: Sequence[CountMatrix], split: Path | str | None
) -> tuple[list[CountMatrix], np.ndarray, list[str]]:
    """Leave out what a split holds out for testing, so that not even its labels are learned; give each cell's part."""
    sizes = [data.n_cells for data in data_sets]
    if split is None:
        return list(data_sets), np.full(sum(sizes), "train"), []
    part = read_split(split).assign(pd.concat([data.obs for data in data_sets]))
    notes = [say_parts(split, dict(zip(*np.unique(part, return_counts=True), strict=True)))]
    kept = []
    for data, of_set in zip(data_sets, np.split(part, np.cumsum(sizes)[:-1]), strict=True):
        cells = np.flatnonzero(of_set != "test")
        kept.append(replace(data, counts=data.counts[cells], obs=data.obs.iloc[cells], obs_names=data.obs_names[cells]))
    return kept, part[part != "test"], notes


def _parts(part: np.ndarray, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation cells: as a split says, or at random where it names no validation conditions."""
    free, named = np.flatnonzero(part == "train"), np.flatnonzero(part == "validation")
    if len(named) or not validation_fraction:
        return free, named
    train, validation = split_cells(len(free), validation_fraction, seed)
    return free[train], free[validation]


def _cap_controls(train: np.ndarray, is_control: np.ndarray, share: float, seed: int, notes: list[str]) -> np.ndarray:
    """Leave out control cells at random until they are at most ``share`` of the training cells."""
    controls, perturbed = train[is_control[train]], train[~is_control[train]]
    most = most_controls(len(controls), len(perturbed), share)
    if most >= len(controls):
        return train
    kept = np.random.default_rng([seed, 1]).choice(controls, most, replace=False)
    notes.append(say_controls(most, len(controls), share))
    return np.sort(np.concatenate([perturbed, kept]))


def _doses(data: CountMatrix, key: str) -> np.ndarray:
    if key not in data.obs:
        raise LingshuError(
            "The dose must be an obs column", f"there is no {key!r}", f"Available: {offenders(data.obs.columns)}"
        )
    return data.obs[key].to_numpy()


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


def balanced_probabilities(condition_NC: np.ndarray, balance: float) -> np.ndarray:
    """Give each cell its probability so that a condition row of n cells is drawn n^(1 - balance) times as often as one
    of a single cell; float64, N, sum 1.
    """
    _, row_N, n_R = np.unique(condition_NC, axis=0, return_inverse=True, return_counts=True)
    weight_N = n_R[row_N.reshape(-1)] ** -balance
    return weight_N / weight_N.sum()


def minibatch_cells(
    train: np.ndarray, minibatch_size: int, step: int, seed: int, probabilities: np.ndarray | None = None
) -> np.ndarray:
    """Cells of optimiser step ``step`` (0, 1, …): epochs of fresh permutations, cut without remainder; or, with
    probabilities, independent draws.

    A function of the step alone, so that a resumed run goes on where the stopped one would have.
    """
    if probabilities is not None:
        return np.random.Generator(np.random.Philox(key=[seed, step])).choice(train, minibatch_size, p=probabilities)
    n = len(train)
    place = np.arange(step * minibatch_size, (step + 1) * minibatch_size)
    cells = np.empty(minibatch_size, dtype=np.int64)
    for epoch in range(place[0] // n, place[-1] // n + 1):
        here = place // n == epoch
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        cells[here] = train[order[place[here] - epoch * n]]
    return cells
