"""Which data sets the training cells of each condition are from and which genes these measured, so that no other gene
is generated for it.

Shapes: R condition rows, C condition fields, S data sets, G modelled genes, N cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lingshu_cell.data.condition_rows import ConditionRows
from lingshu_cell.data.positions import pieces
from lingshu_cell.data.training_set import TrainingCells


@dataclass(frozen=True, eq=False)
class MeasuredGenes:
    """Modelled genes by data set, and data sets by condition row.

    Attributes
    ----------
    row_RC
        Condition rows of the training cells.
    of_row_RS
        Which data sets have cells of each row, boolean.
    measured_SG
        Which genes each data set measured, boolean.
    """

    row_RC: np.ndarray
    of_row_RS: np.ndarray
    measured_SG: np.ndarray

    @classmethod
    def of_cells(cls, cells: TrainingCells, row_RC: np.ndarray) -> "MeasuredGenes | None":
        """Look which data sets the training cells of each condition row are from; ``None`` where there is but one."""
        if len(cells.measured) == 1:
            return None
        rows = ConditionRows(row_RC)
        of_row_RS = np.zeros((len(row_RC), len(cells.measured)), dtype=bool)
        for piece in pieces(cells.train):
            labels = np.column_stack([cells.condition_rows(piece), cells.data_sets_of(piece)])
            found = np.unique(labels, axis=0)
            of_row_RS[rows.find(found[:, :-1]), found[:, -1]] = True
        return cls(row_RC, of_row_RS, cells.measured)

    def data_sets(self, condition_NC: np.ndarray, perturbation_field: int | None) -> np.ndarray:
        """Give the data sets that have cells of a condition, boolean, N × S; of a condition row that no training cell
        has, those with cells of the rows like it (:meth:`ConditionRows.like`).
        """
        distinct, place_N = np.unique(condition_NC, axis=0, return_inverse=True)
        row = self._rows.find(distinct)
        found = self.of_row_RS[row]
        for i in np.flatnonzero(row < 0):
            found[i] = self.of_row_RS[self._rows.like(distinct[i], perturbation_field)].any(0)
        return found[place_N.reshape(-1)]

    def genes(self, condition_NC: np.ndarray, perturbation_field: int | None) -> np.ndarray:
        """Give the genes that some of these data sets measured, boolean, N × G."""
        distinct, place_N = np.unique(condition_NC, axis=0, return_inverse=True)
        sets_NS = self.data_sets(distinct, perturbation_field)
        return np.stack([self.measured_SG[sets_S].any(0) for sets_S in sets_NS])[place_N.reshape(-1)]

    @cached_property
    def _rows(self) -> ConditionRows:
        return ConditionRows(self.row_RC)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Give what a checkpoint keeps beside the condition rows."""
        return {
            "measured": torch.from_numpy(self.measured_SG),
            "condition_row_data_sets": torch.from_numpy(self.of_row_RS),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], n_genes: int) -> "MeasuredGenes | None":
        """Make it anew from the arrays of a checkpoint; ``None`` where it keeps none.

        Raises
        ------
        ValueError
            If the arrays do not fit together.
        """
        if "measured" not in tensors:
            return None
        made = cls(*(tensors[name].numpy() for name in ("condition_rows", "condition_row_data_sets", "measured")))
        fits = made.measured_SG.ndim == 2 and made.of_row_RS.shape == (len(made.row_RC), len(made.measured_SG))
        if not (
            fits and made.measured_SG.shape[1] == n_genes and made.of_row_RS.dtype == made.measured_SG.dtype == bool
        ):
            raise ValueError("measured genes of other types or shapes")
        return made
