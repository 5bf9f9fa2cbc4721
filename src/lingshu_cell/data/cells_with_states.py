"""Training cells with their state as one or two more conditions, wherever they lie.

Shapes: N positions, B cells, C condition fields, S of them of the state.
"""

from collections.abc import Callable
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


class CellsWithStates(TrainingCells):
    """Training cells whose first conditions say their state.

    Parameters
    ----------
    cells
        Training cells, in memory or in a store.
    states
        What to group them by. The state of every cell is found once, and kept in two bytes.
    """

    def __init__(self, cells: TrainingCells, states: CellStates) -> None:
        self._cells, self.states = cells, states
        self.vocabulary, self.modelled, self.measured = cells.vocabulary, cells.modelled, cells.measured
        self.conditions = ConditionVocabulary({**states.fields, **cells.conditions.fields})
        self.train, self.validation, self.seen = cells.train, cells.validation, cells.seen
        self.rare, self.fingerprints = cells.rare, cells.fingerprints
        found = f"{len(states)} cell states" + (f" and {n} programmes" if (n := len(states.offset_LQ)) else "")
        self.notes = (*cells.notes, f"{found} are drawn before library size and genes (data.states)")
        parts = [part for part in (cells.train, cells.validation, cells.seen) if len(part)]
        n, kind = 1 + max(int(part[-1]) for part in parts), np.uint8 if len(states) < 256 else np.uint16
        self._state_NS = np.zeros((n, len(states.fields)), dtype=kind)
        for part in parts:
            for piece in pieces(part, _CELLS_AT_ONCE):
                new = piece[self._state_NS[piece, 0] == 0]
                if len(new):
                    self._state_NS[new] = states.of(cells.counts_of(new)[0])

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
    cells: TrainingCells, n_states: int, seed: int, saved: CellStates | None = None, *, needed: bool = False
) -> TrainingCells:
    """Group training cells into states.

    Parameters
    ----------
    cells
        Training cells. States are learned from at most 8,192 of them, by genes that all data sets measured.
    n_states
        How many to look for.
    seed
        Of the run.
    saved
        States that a run was begun with.
    needed
        Whether cells that cannot be grouped are refused; else they stay as they are.

    Raises
    ------
    LingshuError
        If the cells cannot be grouped.
    """
    if saved is None:
        step = -(-len(cells.train) // _CELLS_TO_LEARN_FROM)
        some = np.asarray(cells.train[::step], dtype=np.int64)
        saved = learn_states(cells.counts_of(some)[0], n_states, seed, cells.measured.all(0))
    if len(saved) >= 2:
        return CellsWithStates(cells, saved)
    if needed:
        raise LingshuError(
            f"Cell states need {FEWEST_GENES} genes that vary and are measured everywhere, and cells that differ",
            f"{len(saved.gene_H):,} such genes, {len(saved)} state",
            "Leave data.states out",
        )
    return cells
