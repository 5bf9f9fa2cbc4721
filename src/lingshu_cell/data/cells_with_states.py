"""Training cells with their state as one or two more conditions, wherever they lie.

With perturbations the states are those of control cells, and a perturbed cell is in the state that it would be in
without the mean effect on its identity: a state must not carry what is to be foretold.

Shapes: N positions, B cells, C condition fields, S of them of the state, Q principal components.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from scipy import sparse

from lingshu_cell.data.cell_states import FEWEST_GENES, CellStates, learn_states
from lingshu_cell.data.positions import pieces
from lingshu_cell.data.training_set import CellRows, TrainingCells
from lingshu_cell.data.vocabulary import ConditionVocabulary
from lingshu_cell.errors import LingshuError

_CELLS_TO_LEARN_FROM = 8192
_CELLS_AT_ONCE = 4096
_LEAST_CELLS = 20  # of a condition, and of its control cells, for the mean effect on where they lie


class CellsWithStates(TrainingCells):
    """Training cells whose first conditions say their state.

    Parameters
    ----------
    cells
        Training cells, in memory or in a store.
    states
        What to group them by. The state of every cell is found once, and kept in two bytes.
    control
        Field of the perturbations and name of control; ``None`` without perturbations. Cells of conditions of fewer
        than 20 cells, or 20 control cells of their identity, have no state.
    """

    def __init__(self, cells: TrainingCells, states: CellStates, control: tuple[str, str] | None = None) -> None:
        self._cells, self.states = cells, states
        self.vocabulary, self.modelled, self.measured = cells.vocabulary, cells.modelled, cells.measured
        self.conditions = ConditionVocabulary({**states.fields, **cells.conditions.fields})
        self.train, self.validation, self.seen = cells.train, cells.validation, cells.seen
        self.rare, self.fingerprints = cells.rare, cells.fingerprints
        found = f"{len(states)} cell states" + (f" and {n} programmes" if (n := len(states.offset_LQ)) else "")
        self.notes = (*cells.notes, f"{found} are drawn before library size and genes (data.states)")
        self._state_NS = self._find(control)

    def _find(self, control: tuple[str, str] | None) -> np.ndarray:
        """The state of every cell, N × S."""
        cells, states = self._cells, self.states
        shifts = {} if control is None else _mean_effects(cells, states, *_column_and_index(cells, control))
        n, kind = 1 + max(map(_last, _parts(cells))), np.uint8 if len(states) < 256 else np.uint16
        state_NS = np.zeros((n, len(states.fields)), dtype=kind)
        for piece in _each_once(cells):
            score_BQ = states.scores(cells.counts_of(piece)[0])
            if control is None:
                state_NS[piece] = states.nearest(score_BQ)
                continue
            row_RC, row_B = np.unique(cells.condition_rows(piece), axis=0, return_inverse=True)
            shift_RQ = np.stack([shifts[tuple(row)] for row in row_RC.tolist()])
            shift_BQ = shift_RQ[row_B.reshape(-1)]
            found_BS = states.nearest(score_BQ - np.nan_to_num(shift_BQ))
            state_NS[piece] = np.where(np.isnan(shift_BQ).any(1)[:, None], 0, found_BS)
        return state_NS

    @property
    def states_open(self) -> TrainingCells:
        """The same cells, their states not told."""
        other = copy.copy(self)
        other._state_NS = np.zeros_like(self._state_NS)
        return other

    def rows(self, cells: np.ndarray) -> CellRows:
        """Give some cells, with library sizes."""
        return self._told(self._cells.rows(cells))

    def condition_rows(self, cells: np.ndarray) -> np.ndarray:
        """Give the condition indices of some cells, those of the state first."""
        return self._with_states(cells, self._cells.condition_rows(cells))

    def data_sets_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the data set of some cells."""
        return self._cells.data_sets_of(cells)

    def doses(self, cells: np.ndarray) -> np.ndarray | None:
        """Give the doses of some cells as read."""
        return self._cells.doses(cells)

    def counts_of(self, cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Give counts of the modelled genes in some cells, and their exact sums."""
        return self._cells.counts_of(cells)

    def token_counts(self) -> np.ndarray:
        """How many training cells show each token."""
        return self._cells.token_counts()

    def draws(
        self, minibatch_size: int, seed: int, balance: float, rank: int = 0, world_size: int = 1
    ) -> Callable[[int], CellRows]:
        """Draw cells as ever; balance counts the other conditions only."""
        draw = self._cells.draws(minibatch_size, seed, balance, rank, world_size)
        return lambda step: self._told(draw(step))

    def _told(self, rows: CellRows) -> CellRows:
        return replace(rows, condition_BC=self._with_states(rows.cells, rows.condition_BC))

    def _with_states(self, cells: np.ndarray, condition_BC: np.ndarray) -> np.ndarray:
        return np.concatenate([self._state_NS[cells].astype(np.int64), condition_BC], axis=1)


def with_states(
    cells: TrainingCells,
    n_states: int,
    seed: int,
    saved: CellStates | None = None,
    *,
    control: tuple[str, str] | None = None,
    needed: bool = False,
) -> TrainingCells:
    """Group training cells into states.

    Parameters
    ----------
    cells
        Training cells. States are learned from at most 8,192 of them, control cells only where there are perturbations,
        by genes that all data sets measured.
    n_states
        How many to look for.
    seed
        Of the run.
    saved
        States that a run was begun with.
    control
        Field of the perturbations and name of control; ``None`` without perturbations.
    needed
        Whether cells that cannot be grouped are refused; else they stay as they are.

    Raises
    ------
    LingshuError
        If the cells cannot be grouped.
    """
    if saved is None:
        teaching = teaching_cells(cells, control)
        some = np.asarray(teaching[:: -(-len(teaching) // _CELLS_TO_LEARN_FROM)], dtype=np.int64)
        saved = learn_states(cells.counts_of(some)[0], n_states, seed, cells.measured.all(0))
    if len(saved) >= 2:
        return CellsWithStates(cells, saved, control)
    if needed:
        raise LingshuError(
            f"Cell states need {FEWEST_GENES} genes that vary and are measured everywhere, and cells that differ",
            f"{len(saved.gene_H):,} such genes, {len(saved)} state",
            "Leave data.states out",
        )
    return cells


def teaching_cells(cells: TrainingCells, control: tuple[str, str] | None) -> np.ndarray | range:
    """Give the cells that states are learned from: those of training, with perturbations all its control cells."""
    if control is None:
        return cells.train
    column, index = _column_and_index(cells, control)
    found = [piece[cells.condition_rows(piece)[:, column] == index] for piece in pieces(cells.seen, _CELLS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _mean_effects(
    cells: TrainingCells, states: CellStates, column: int, control: int
) -> dict[tuple[int, ...], np.ndarray]:
    """How far the mean cell of each condition row lies from that of its control cells, Q; NaN where it is unknown."""
    total: dict[tuple[int, ...], np.ndarray] = {}
    n: dict[tuple[int, ...], int] = {}
    for piece in _each_once(cells):
        score_BQ = states.scores(cells.counts_of(piece)[0])
        row_RC, row_B, n_R = np.unique(cells.condition_rows(piece), axis=0, return_inverse=True, return_counts=True)
        for r, row in enumerate(map(tuple, row_RC.tolist())):
            total[row] = total.get(row, 0.0) + score_BQ[row_B.reshape(-1) == r].sum(0)
            n[row] = n.get(row, 0) + int(n_R[r])
    found = {}
    for row in total:
        of_control = (*row[:column], control, *row[column + 1 :])
        if row == of_control:
            found[row] = np.zeros_like(total[row])
        elif min(n[row], n.get(of_control, 0)) < _LEAST_CELLS or row[column] == 0:
            found[row] = np.full_like(total[row], np.nan)
        else:
            found[row] = total[row] / n[row] - total[of_control] / n[of_control]
    return found


def _column_and_index(cells: TrainingCells, control: tuple[str, str]) -> tuple[int, int]:
    """Which column of a condition row says the perturbation, and what stands there for control; -1 if no cell is."""
    key, name = control
    labels = cells.conditions.fields[key]
    return list(cells.conditions.fields).index(key), 1 + labels.index(name) if name in labels else -1


def _parts(cells: TrainingCells) -> list[np.ndarray | range]:
    return [part for part in (cells.train, cells.validation, cells.seen) if len(part)]


def _last(part: np.ndarray | range) -> int:
    return int(part[-1])


def _each_once(cells: TrainingCells) -> Iterator[np.ndarray]:
    """Positions of all cells in pieces."""
    parts = _parts(cells)
    new_N = np.ones(1 + max(map(_last, parts)), dtype=bool)
    for part in parts:
        for piece in pieces(part, _CELLS_AT_ONCE):
            piece = piece[new_N[piece]]
            new_N[piece] = False
            if len(piece):
                yield piece
