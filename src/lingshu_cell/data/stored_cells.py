"""Cells that training reads from a store: what :class:`TrainingSet` is in memory, with counts left on disk.

Of each cell nothing is held but its position, and that only where training cells are not one range of the store.

Shapes: N cells of the store, G modelled genes, C condition fields.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import sparse

from lingshu_cell.data.condition_splits import PARTS, TEST, TRAIN, VALIDATION, Labelled
from lingshu_cell.data.loader import Minibatch, StoreLoader, balanced_groups, columns_of, tokenize
from lingshu_cell.data.positions import among, others, pieces, position_dtype
from lingshu_cell.data.split_files import read_split
from lingshu_cell.data.store import Store, open_store
from lingshu_cell.data.store_files import damaged
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.data.training_set import (
    CellRows,
    RareGenes,
    TrainingCells,
    check_modelled,
    counts_of_tokens,
    most_controls,
    say_controls,
    say_modelled,
    say_parts,
)
from lingshu_cell.data.vocabulary import ConditionVocabulary, GeneVocabulary
from lingshu_cell.errors import LingshuError, offenders

Cells = np.ndarray | range


@dataclass(frozen=True, eq=False)
class StoredCells(TrainingCells):
    """What training reads, left in a store.

    Attributes
    ----------
    store
        The store.
    vocabulary, modelled, measured, conditions, train, validation, seen, rare, fingerprints, notes
        See :class:`TrainingCells`.
    index_of_code
        For each condition field, the index of each stored code + 1; 0 = unknown.
    dose_key
        Label that holds doses; ``None`` where they are not read.
    token_count_GV
        What :meth:`token_counts` gives.
    """

    store: Store
    vocabulary: GeneVocabulary
    modelled: np.ndarray
    measured: np.ndarray
    conditions: ConditionVocabulary
    index_of_code: tuple[np.ndarray, ...]
    dose_key: str | None
    train: Cells
    validation: Cells
    seen: Cells
    rare: RareGenes
    fingerprints: tuple[str, ...]
    notes: tuple[str, ...]
    token_count_GV: np.ndarray

    def rows(self, cells: np.ndarray) -> CellRows:
        """Give some cells, with library sizes."""
        tokens, library = self._tokens(cells)
        return self._as_rows(tokens, np.asarray(cells), library)

    def condition_rows(self, cells: np.ndarray) -> np.ndarray:
        """Give the condition indices of some cells."""
        rows = np.zeros((len(cells), len(self.index_of_code)), dtype=np.int64)
        for i, (key, index) in enumerate(zip(self.conditions.fields, self.index_of_code, strict=True)):
            rows[:, i] = index[self.store.column(key)[cells].astype(np.int64) + 1]
        return rows

    def data_sets_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the data set of some cells."""
        return self.store.data_set[cells].astype(np.int64)

    def doses(self, cells: np.ndarray) -> np.ndarray | None:
        """Give the doses of some cells as read."""
        return None if self.dose_key is None else self.store.obs(cells, [self.dose_key])[self.dose_key].to_numpy()

    def counts_of(self, cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Give counts of the modelled genes in some cells, and their exact sums."""
        tokens, library = self._tokens(cells)
        return counts_of_tokens(tokens), library

    def token_counts(self) -> np.ndarray:
        """How many training cells show each token."""
        return self.token_count_GV

    def draws(
        self, minibatch_size: int, seed: int, balance: float, rank: int = 0, world_size: int = 1
    ) -> Callable[[int], CellRows]:
        """Draw by epochs of shuffled windows, or rows of conditions by their weights where they are balanced."""
        keys = tuple(self.conditions.fields)
        by_group = balance > 0 and len(keys) > 0
        loader = StoreLoader(
            self.store,
            minibatch_size,
            seed,
            rank=rank,
            world_size=world_size,
            cells=None if by_group else self.train,
            groups=balanced_groups(self.store, keys, self.train, power=1 - balance) if by_group else None,
            genes=self.modelled,
            prefetch=True,
            library=True,
        )

        def draw(step: int) -> CellRows:
            found: Minibatch = loader.minibatch(step)
            return self._as_rows(found.tokens, found.cells, found.library)

        return draw

    def _as_rows(self, tokens: sparse.csr_matrix, cells: np.ndarray, library: np.ndarray | None) -> CellRows:
        unmeasured_BG = None if self.measured.all() else ~self.measured[self.store.data_set[cells]]
        return CellRows(cells, tokens, unmeasured_BG, self.condition_rows(cells), self.doses(cells), library)

    @cached_property
    def _column_of(self) -> np.ndarray:
        return columns_of(self.modelled, self.store.n_genes)

    def _tokens(self, cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        return tokenize(self.store.counts(cells), self._column_of, len(self.modelled), with_library=True)


def open_cells(
    path: Path | str,
    *,
    condition_keys: Sequence[str] = (),
    perturbation_key: str | None = None,
    control: str | None = None,
    dose_key: str | None = None,
    control_share: float = 1.0,
    split: Path | str | None = None,
    min_cells_per_gene: int = 3,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> StoredCells:
    """Open a store for training: read its labels, choose cells and genes.

    Counts are read of few cells only: of those that do not train, to take them out of the store's own sums.

    Parameters
    ----------
    path
        Folder that ``lingshu prepare`` wrote.
    condition_keys, perturbation_key, control, dose_key, control_share, split, min_cells_per_gene
        See :func:`lingshu_cell.data.training_set.assemble`. Labels of the identity may be unknown in some cells.
    validation_fraction
        Share of the cells held out, a block of the shuffled store; 0 keeps all for training.
    split_seed
        Which block that is: 0 = the last, 1 = the one before; and the seed of control cells left out.

    Returns
    -------
    StoredCells

    Raises
    ------
    LingshuError
        If the store is damaged or not finished, a label is missing, or too few cells or genes remain.
    """
    store = open_store(path)
    settings = condition_keys, perturbation_key, control, dose_key, control_share, split
    try:
        return _cells_of(store, *settings, min_cells_per_gene, validation_fraction, split_seed)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, LingshuError):
            raise
        finding = f"it holds what lingshu prepare does not write ({type(error).__name__}: {error})"
        raise damaged(store.path, finding) from None


def _cells_of(
    store: Store,
    condition_keys: Sequence[str],
    perturbation_key: str | None,
    control: str | None,
    dose_key: str | None,
    control_share: float,
    split: Path | str | None,
    min_cells_per_gene: int,
    validation_fraction: float,
    split_seed: int,
) -> StoredCells:
    keys = (*condition_keys, perturbation_key) if perturbation_key else tuple(condition_keys)
    for key in keys:
        store.categories(key)
    notes: list[str] = []
    free, named = _parts(store, split, notes)
    conditions, index_of_code = _vocabulary(store, keys, perturbation_key, free, named, notes)
    train, validation = free, named
    if named is None:
        train, validation = _held_out_block(free, validation_fraction, split_seed, store.n_cells)
    seen = train
    if perturbation_key:
        code = (
            store.categories(perturbation_key).index(control) if control in store.categories(perturbation_key) else -2
        )
        train = _cap_controls(
            train, lambda cells: store.column(perturbation_key)[cells] == code, control_share, split_seed, notes
        )
    if dose_key is not None and dose_key not in store.obs_columns:
        raise LingshuError(
            "The dose must be an obs column", f"there is no {dose_key!r}", f"Available: {offenders(store.obs_columns)}"
        )
    n_left_out = store.n_cells - len(train)
    of_tokens = (
        store.token_counts(of=train) if n_left_out > len(train) else store.token_counts(others(train, store.n_cells))
    )
    detected_in = of_tokens[:, 1:].sum(1)
    is_modelled = detected_in >= max(min_cells_per_gene, 0)
    check_modelled(is_modelled, min_cells_per_gene, len(train))
    if (~is_modelled).any():
        umi = of_tokens @ token_midpoints()
        notes.append(say_modelled(is_modelled, min_cells_per_gene, umi[~is_modelled].sum() / max(umi.sum(), 1)))
    modelled = np.flatnonzero(is_modelled)
    return StoredCells(
        store=store,
        vocabulary=store.vocabulary,
        modelled=modelled,
        measured=store.measured[:, modelled],
        conditions=conditions,
        index_of_code=index_of_code,
        dose_key=dose_key,
        train=train,
        validation=validation,
        seen=seen,
        rare=_rare_genes(store, train, ~is_modelled),
        fingerprints=(store.fingerprint, *(str(one["sha256"]) for one in store.manifest["sources"])),
        notes=tuple(notes),
        token_count_GV=of_tokens[modelled],
    )


def _parts(store: Store, split: Path | str | None, notes: list[str]) -> tuple[Cells, Cells | None]:
    """Cells of the training part, and of the validation part where a split names it; test cells are in neither."""
    if split is None:
        return range(store.n_cells), None
    rules = read_split(split)

    def labelled(key: str) -> Labelled:
        labels, n_unknown = store.categories(key), _n_unknown(store, key)
        if n_unknown:
            raise _unlabelled(key, n_unknown, store.n_cells)
        return Labelled(store.column(key), labels)

    identity = None if rules.identity_key is None else labelled(rules.identity_key)
    part = rules.assign_codes(identity, labelled(rules.perturbation_key), store.cell_names)
    n_cells = {name: int((part == i).sum()) for i, name in enumerate(PARTS)}
    notes.append(say_parts(split, {name: n for name, n in n_cells.items() if n}))
    dtype = position_dtype(store.n_cells)
    free, named = (np.flatnonzero(part == PARTS.index(name)).astype(dtype) for name in (TRAIN, VALIDATION))
    if not n_cells[TEST] and not len(named):
        return range(store.n_cells), None
    return free, named if len(named) else None


def _n_unknown(store: Store, key: str) -> int:
    column = store.column(key)
    return sum(int((column[piece] < 0).sum()) for piece in pieces(range(store.n_cells)))


def _unlabelled(key: str, n: int, n_cells: int) -> LingshuError:
    return LingshuError(
        "Every cell needs a perturbation label and what a split is said by",
        f"{n:,} of {n_cells:,} cells have none in {key!r}",
        "Label them in the files, control cells too, and prepare the store again",
    )


def _vocabulary(
    store: Store, keys: Sequence[str], perturbation_key: str | None, free: Cells, named: Cells | None, notes: list[str]
) -> tuple[ConditionVocabulary, tuple[np.ndarray, ...]]:
    """Number the labels that cells of the training and validation parts have, sorted."""
    fields, index_of_code = {}, []
    parts = [free] if named is None else [free, named]
    for key in keys:
        names, column = store.categories(key), store.column(key)
        n_with = np.zeros(len(names) + 1, dtype=np.int64)
        for part in parts:
            for piece in pieces(part):
                n_with += np.bincount(column[piece].astype(np.int64) + 1, minlength=len(n_with))
        if n_with[0] and key == perturbation_key:
            raise _unlabelled(key, int(n_with[0]), int(n_with.sum()))
        if n_with[0] == n_with.sum():
            raise LingshuError("A condition needs a label in some cells", f"{key!r} has none", "Leave it out")
        if n_with[0]:
            notes.append(
                f"{key} is unknown in {n_with[0]:,} of {n_with.sum():,} cells, which are trained on without it"
            )
        present = sorted(names[code] for code in np.flatnonzero(n_with[1:]))
        fields[key] = tuple(present)
        place = {name: i + 1 for i, name in enumerate(present)}
        index_of_code.append(np.array([0, *(place.get(name, 0) for name in names)], dtype=np.int64))
    return ConditionVocabulary(fields), tuple(index_of_code)


def _held_out_block(free: Cells, fraction: float, seed: int, n_cells: int) -> tuple[Cells, Cells]:
    """Hold out a block of cells; as they were shuffled, neighbours have nothing in common."""
    if not fraction:
        return free, free[:0]
    n_held_out = round(len(free) * fraction)
    if not 0 < n_held_out < len(free):
        raise LingshuError(
            "Training and validation both need cells",
            f"{fraction} of {len(free)} cells leaves {len(free) - n_held_out} and {n_held_out}",
            "Use more cells, or another data.validation_fraction",
        )
    last = len(free) - n_held_out
    first = last - seed % (last // n_held_out + 1) * n_held_out
    held_out = free[first : first + n_held_out]
    if first == last:
        return free[:first], held_out
    dtype = position_dtype(n_cells)
    before, behind = (np.asarray(part, dtype=dtype) for part in (free[:first], free[first + n_held_out :]))
    return (free[n_held_out:] if first == 0 else np.concatenate([before, behind])), held_out


def _cap_controls(
    train: Cells, is_control: Callable[[np.ndarray], np.ndarray], share: float, seed: int, notes: list[str]
) -> Cells:
    """Leave out control cells at random until they are at most ``share`` of the training cells."""
    if share >= 1:
        return train
    n_controls = sum(int(is_control(piece).sum()) for piece in pieces(train))
    most = most_controls(n_controls, len(train) - n_controls, share)
    if most >= n_controls:
        return train
    notes.append(say_controls(most, n_controls, share))
    # How many of a piece are kept is hypergeometric, so all choices of so many cells are equally likely.
    rng, kept, left, wanted = np.random.default_rng([seed, 1]), [], n_controls, most
    for piece in pieces(train):
        control = is_control(piece)
        here = np.flatnonzero(control)
        n_here = int(rng.hypergeometric(len(here), left - len(here), wanted)) if wanted else 0
        left, wanted = left - len(here), wanted - n_here
        chosen = np.zeros(len(piece), dtype=bool)
        chosen[rng.choice(here, n_here, replace=False)] = True
        kept.append(piece[~control | chosen].astype(position_dtype(int(train[-1]) + 1)))
    return np.concatenate(kept)


def _rare_genes(store: Store, train: Cells, is_rare: np.ndarray) -> RareGenes:
    """Give the counts of genes that are not modelled: from the store's list, or for genes not on it from the cells."""
    listed = np.array(store.rare_counts())
    listed = listed[is_rare[listed[:, 1]]]
    found = [listed[among(listed[:, 0], train)]]
    missing = is_rare & (store.detected_in() > int(store.manifest["rare_up_to_cells"]))
    if missing.any():
        for cells, counts in store.iterate(train):
            here = np.flatnonzero(missing[counts.indices])
            cell = cells[np.searchsorted(counts.indptr, here, side="right") - 1]
            found.append(np.stack([cell, counts.indices[here], counts.data[here]], axis=1).astype(np.int64))
    entries = np.concatenate(found)
    n_cells_S = sum(np.bincount(store.data_set[piece], minlength=len(store.data_sets)) for piece in pieces(train))
    data_set = np.asarray(store.data_set[entries[:, 0]], dtype=np.int64)
    return RareGenes(entries[:, 1].copy(), entries[:, 2].astype(np.int32), data_set, n_cells_S)
