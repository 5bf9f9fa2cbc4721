"""Cells that a trained model has not been given before, brought to its genes, tokens and conditions.

Shapes: N cells, B cells of a minibatch, G modelled genes, C condition fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from lingshu_cell.conditioning import Conditioner
from lingshu_cell.data.anndata_io import CountMatrix
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.data.vocabulary import align_genes, apply_alignment
from lingshu_cell.generate import TrainedModel
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.tokens import MASK_TOKEN, STATE_FIELDS


@dataclass(frozen=True, eq=False)
class AlignedCells:
    """Tokens and conditions as the network takes them.

    Attributes
    ----------
    conditioner
        That of the model.
    tokens
        Expression tokens of the modelled genes, CSR int16, N × G, zeros not stored.
    measured
        Boolean, G: which modelled genes the data have.
    condition_NC
        Index of each cell's condition in each field, 0 = unknown.
    """

    conditioner: Conditioner
    tokens: sparse.csr_matrix
    measured: np.ndarray
    condition_NC: np.ndarray

    def minibatches(
        self, size: int, device: torch.device, cells: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Conditions]]:
        """Give ``x_0_BG`` (``MASK_TOKEN`` where a gene was not measured) and conditions of ``size`` cells at a
        time; of all cells, or of those whose indices are given.
        """
        cells = np.arange(self.tokens.shape[0]) if cells is None else cells
        for first in range(0, len(cells), size):
            some = cells[first : first + size]
            dense = self.tokens[some].toarray()
            dense[:, ~self.measured] = MASK_TOKEN
            yield torch.from_numpy(dense).to(device), self.conditioner.conditions(self.condition_NC[some]).to(device)


def align_cells(model: TrainedModel, data: CountMatrix, *, use_conditions: bool = True) -> AlignedCells:
    """Bring checked counts to the genes of a model; a gene the data lack is unknown, not zero.

    Parameters
    ----------
    model
        A trained model.
    data
        Its cells' counts and labels.
    use_conditions
        Take each cell's own labels where ``obs`` has the model's condition fields; otherwise every field is unknown.
        Cell states are left open always.

    Raises
    ------
    LingshuError
        If the genes do not fit, or a label is not known to the model.
    """
    coverage = model.config.data.min_coverage
    alignment = align_genes(model.genes, list(data.gene_names), data.var, min_coverage=coverage)
    counts, present = apply_alignment(data.counts, alignment)
    counts = counts[:, model.modelled]
    fields = [f for f in model.conditions.fields if use_conditions and f in data.obs and f not in STATE_FIELDS]
    return AlignedCells(
        conditioner=model.conditioner,
        tokens=sparse.csr_matrix((encode(counts.data), counts.indices, counts.indptr), shape=counts.shape),
        measured=present[model.modelled],
        condition_NC=model.conditions.encode({f: data.obs[f].tolist() for f in fields}, data.n_cells),
    )
