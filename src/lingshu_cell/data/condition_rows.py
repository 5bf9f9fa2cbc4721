"""Condition rows looked up among those of the training cells: the same row, or the rows most like it.

Shapes: N cells, R condition rows, C condition fields.
"""

import numpy as np


def find_rows(table_RC: np.ndarray, wanted_NC: np.ndarray) -> np.ndarray:
    """Give the place of each wanted row in a table of distinct rows, -1 where it is not there, int64, N."""
    place = {tuple(row): i for i, row in enumerate(table_RC.tolist())}
    return np.array([place.get(tuple(row), -1) for row in wanted_NC.tolist()], dtype=np.int64)


def rows_like(table_RC: np.ndarray, row_C: np.ndarray, perturbation_field: int | None) -> np.ndarray:
    """Give what stands for a condition row where training cells are asked: rows of the table, boolean, R.

    The row itself; where no cell has it, the rows that agree with it in all that is known (not 0), or else in all but
    the perturbation, so those of its identity; where there is none of these either, all rows.
    """
    same_RC = table_RC == row_C
    itself_R = same_RC.all(1)
    if itself_R.any():
        return itself_R
    known_C = row_C != 0
    agreeing_R = same_RC[:, known_C].all(1)
    if not agreeing_R.any() and perturbation_field is not None:
        known_C[perturbation_field] = False
        agreeing_R = same_RC[:, known_C].all(1)
    return agreeing_R if agreeing_R.any() else np.ones(len(table_RC), dtype=bool)
