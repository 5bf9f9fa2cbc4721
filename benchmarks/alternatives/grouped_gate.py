"""The product's gate-and-values head, asked by one hidden vector per group of genes instead of one per cell.

Shapes: B cells, G genes, P groups, S slots, D width, E gene width, J statistics, M positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingshu_cell.network.compression import GeneGroups
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.gate_head import GatedDistribution, GateHead


class GroupedGate(GatedDistribution):
    """The tree of :class:`GatedDistribution` in which gene g is asked by the hidden vector of its group."""

    def __init__(self, head: GateHead, h_BPD: Tensor, groups: GeneGroups) -> None:
        super().__init__(head, h_BPD)
        self._groups = groups

    def log_means(self) -> Tensor:
        return self._inner_products(self._gate_BE[:, :, None])[:, 0] + self._head.gate_bias_G

    def _log_means_at(self, positions: Positions) -> Tensor:
        return positions.of(self.log_means())

    def _tilt(self, query: nn.Linear, positions: Positions) -> Tensor:
        query_BPJE = query(self._h_BD).unflatten(2, (-1, self._head.gene_GE.shape[1]))
        return self._inner_products(query_BPJE)[positions.cell_M, :, positions.gene_M]

    def _power_of_cells(self, positions: Positions) -> Tensor:
        group_G = self._groups.place_G // self._groups.genes_per_group
        return (self._h_BD @ self._head.power_D)[positions.cell_M, group_G[positions.gene_M]]

    def _inner_products(self, query_BPJE: Tensor) -> Tensor:
        """q_pj · U_g for the group p of each gene, B × J × G."""
        groups, codes_GE = self._groups, self._head.gene_GE
        n_cells, n_groups, n_queries, width = query_BPJE.shape
        padding = n_groups * groups.genes_per_group - groups.n_genes
        codes_PSE = F.pad(codes_GE[groups.permutation_G], (0, 0, 0, padding)).view(n_groups, -1, width)
        product = torch.bmm(query_BPJE.permute(1, 0, 2, 3).reshape(n_groups, -1, width), codes_PSE.transpose(1, 2))
        product = product.unflatten(1, (n_cells, n_queries)).permute(1, 2, 0, 3).flatten(2)
        return product[:, :, groups.place_G]
