"""Condition rows looked up among those of the training cells: the same row, or the rows most like it.

Shapes: N cells, R condition rows, C condition fields.
"""

from functools import cached_property

import numpy as np


class ConditionRows:
    """Distinct condition rows.

    Parameters
    ----------
    row_RC
        Indices in each condition field, int64, 0 = unknown.
    """

    def __init__(self, row_RC: np.ndarray) -> None:
        self.row_RC = row_RC

    def __len__(self) -> int:
        return len(self.row_RC)

    @cached_property
    def _place(self) -> dict[tuple[int, ...], int]:
        return {tuple(row): r for r, row in enumerate(self.row_RC.tolist())}

    def find(self, condition_NC: np.ndarray) -> np.ndarray:
        """Give the place of each cell's row, -1 where it is not there, int64, N."""
        return np.array([self._place.get(tuple(row), -1) for row in condition_NC.tolist()], dtype=np.int64)

    def like(self, row_C: np.ndarray, perturbation_field: int | None) -> np.ndarray:
        """Give what stands for a row where training cells are asked: rows, boolean, R.

        The row itself; where no cell has it, the rows that agree with it in all that is known, or else in all but the
        perturbation, so those of its identity; where there is none of these either, all rows.
        """
        same_RC = self.row_RC == row_C
        itself_R = same_RC.all(1)
        if itself_R.any():
            return itself_R
        known_C = row_C != 0
        agreeing_R = same_RC[:, known_C].all(1)
        if not agreeing_R.any() and perturbation_field is not None:
            known_C[perturbation_field] = False
            agreeing_R = same_RC[:, known_C].all(1)
        return agreeing_R if agreeing_R.any() else np.ones(len(self), dtype=bool)
