"""Sequence compression: genes in a fixed random order, S of them to a transformer token, and back (paper, section 2.3).

Shapes: B cells, G genes, P = ⌈G/S⌉ groups, S slots of a group, D width, V expression tokens, T input tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lingshu_cell.network.distribution import CountDistribution, Positions, draw_tokens
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_POSITIONS_AT_ONCE = 1 << 16  # bounds the logits in memory: 65,536 × 281 float32 = 74 MB


class GeneGroups(nn.Module):
    """A random permutation of the genes, drawn once and kept in the checkpoint, cut into groups of S.

    Gene g sits in group ``place[g] // S``, slot ``place[g] % S``; the last group is padded with [MASK].
    """

    def __init__(self, n_genes: int, genes_per_group: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_genes, self.genes_per_group = n_genes, genes_per_group
        self.n_groups = -(-n_genes // genes_per_group)
        permutation_G = torch.randperm(n_genes, generator=generator)
        self.register_buffer("permutation_G", permutation_G)  # place -> gene
        self.register_buffer("place_G", torch.argsort(permutation_G), persistent=False)  # gene -> place

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.place_G.copy_(torch.argsort(self.permutation_G))

    def group(self, x_BG: Tensor) -> Tensor:
        """Permute and cut: B × G tokens to B × P × S tokens."""
        padding = self.n_groups * self.genes_per_group - self.n_genes
        permuted = F.pad(x_BG[:, self.permutation_G], (0, padding), value=MASK_TOKEN)
        return permuted.view(len(x_BG), self.n_groups, self.genes_per_group)


class Compressor(nn.Module):
    """S·D → D: embed the S tokens of a group, flatten, and map with one linear layer shared by all groups.

    The two linear maps are applied as one table of S × T rows of width D, looked up and summed: the same function and
    the same parameters, at 1/S of the memory and a fraction of the arithmetic.
    """

    def __init__(self, width: int, genes_per_group: int) -> None:
        super().__init__()
        self.genes_per_group = genes_per_group
        self.linear = nn.Linear(genes_per_group * width, width, bias=False)

    def forward(self, x_BPS: Tensor, embedding_TD: Tensor) -> Tensor:
        """Map B × P × S tokens to B × P × D."""
        n_cells, n_groups, n_slots = x_BPS.shape
        weight_DSD = self.linear.weight.unflatten(1, (n_slots, -1))
        table = torch.einsum("te,dse->std", embedding_TD, weight_DSD).flatten(0, 1)
        rows = x_BPS.long() + torch.arange(n_slots, device=x_BPS.device) * len(embedding_TD)
        return F.embedding_bag(rows.flatten(0, 1), table, mode="sum").view(n_cells, n_groups, -1)


class Decompressor(nn.Module):
    """D → S·D → V: spread a group's token over its S genes, then one linear head shared by all genes.

    As nothing lies between the two maps, their product (S × V × D) is formed once a step and applied only to the
    genes asked for, in fp32, so that logits of all genes × all tokens never exist.
    """

    def __init__(self, width: int, genes_per_group: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, genes_per_group * width, bias=False)
        self.head = nn.Linear(width, N_EXPRESSION_TOKENS, bias=False)

    def forward(self, h_BPD: Tensor, groups: GeneGroups) -> "GroupedSoftmax":
        """Give the distribution of every gene."""
        with torch.autocast(h_BPD.device.type, enabled=False):
            weight_SED = self.linear.weight.float().unflatten(0, (groups.genes_per_group, -1))
            weight_SVD = torch.einsum("ve,sed->svd", self.head.weight.float(), weight_SED)
        return GroupedSoftmax(h_BPD, weight_SVD, groups)


class GroupedSoftmax(CountDistribution):
    """Softmax over the 281 expression tokens of each gene, computed where it is asked for."""

    def __init__(self, h_BPD: Tensor, weight_SVD: Tensor, groups: GeneGroups) -> None:
        self._h_BPD, self._weight_SVD, self._groups = h_BPD, weight_SVD, groups

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`; logits are computed again on the way back, so none outlives its piece."""
        positions = Positions.where(scored_BG)
        total_B = self._h_BPD[..., :0].float().sum((1, 2))  # zeros with a way back, even where nothing is scored
        for piece, weight_VD in self._pieces(positions):
            where = positions[piece]
            target_M = where.of(x_0_BG).long()
            nll_M = checkpoint(self._cross_entropy, where, weight_VD, target_M, use_reentrant=False)
            total_B = total_B.index_add(0, where.cell_M, nll_M)
        return total_B

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        log_p_MV = torch.empty(len(positions), N_EXPRESSION_TOKENS, device=self._h_BPD.device)
        for piece, weight_VD in self._pieces(positions):
            log_p_MV[piece] = torch.log_softmax(self._logits(positions[piece], weight_VD), dim=-1)
        return log_p_MV

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; drawn piece by piece, so that memory does not grow with the positions."""
        token_M = torch.empty(len(positions), dtype=torch.int64, device=self._h_BPD.device)
        for piece, weight_VD in self._pieces(positions):
            log_p_MV = torch.log_softmax(self._logits(positions[piece], weight_VD), dim=-1)
            token_M[piece] = draw_tokens(log_p_MV, uniform_M2[piece])
        return token_M

    def _pieces(self, positions: Positions) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices into M, output weights of their slot), so that every product is one dense matmul."""
        slot_M = self._groups.place_G[positions.gene_M] % self._groups.genes_per_group
        for slot, weight_VD in enumerate(self._weight_SVD):
            for piece in torch.nonzero(slot_M == slot)[:, 0].split(_POSITIONS_AT_ONCE):
                yield piece, weight_VD

    def _cross_entropy(self, positions: Positions, weight_VD: Tensor, target_M: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(positions, weight_VD), target_M, reduction="none")

    def _logits(self, positions: Positions, weight_VD: Tensor) -> Tensor:
        group_M = self._groups.place_G[positions.gene_M] // self._groups.genes_per_group
        with torch.autocast(self._h_BPD.device.type, enabled=False):
            return self._h_BPD[positions.cell_M, group_M].float() @ weight_VD.T
