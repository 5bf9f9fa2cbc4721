"""Sequence compression: genes in a fixed random order, S of them to a transformer token, and back (paper, section 2.3).

Shapes: B cells, G genes, P = ⌈G/S⌉ groups, S slots of a group, D width, V expression tokens, T input tokens.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingshu_cell.network.distribution import CountDistribution, Positions, draw_tokens
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_POSITIONS_AT_ONCE = 1 << 16  # bounds the logits in memory: 65,536 × 288 float32 = 75 MB
_PADDED_TOKENS = 288  # GPUs multiply rows of 281 float32 at a tenth of the speed of aligned ones


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
        self._h_BPD, self._groups = h_BPD, groups
        self._weight_SVD = F.pad(weight_SVD, (0, 0, 0, _PADDED_TOKENS - N_EXPRESSION_TOKENS))

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`; no logits outlive their piece, also on the way back."""
        positions = Positions.where(scored_BG)
        order_M, pieces = self._by_slot(positions)
        row_M, target_M = self._rows(positions)[order_M], positions.of(x_0_BG).long()[order_M]
        with self._fp32():
            nll_M = _NllBySlot.apply(self._h_BPD.float().flatten(0, 1), self._weight_SVD, row_M, target_M, pieces)
        return nll_M.new_zeros(len(x_0_BG)).index_add(0, positions.cell_M[order_M], nll_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        log_p_MV = torch.empty(len(positions), N_EXPRESSION_TOKENS, device=self._h_BPD.device)
        for places, log_p in self._log_probabilities_by_piece(positions):
            log_p_MV[places] = log_p
        return log_p_MV

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; drawn piece by piece, so that memory does not grow with the positions."""
        token_M = torch.empty(len(positions), dtype=torch.int64, device=self._h_BPD.device)
        for places, log_p in self._log_probabilities_by_piece(positions):
            token_M[places] = draw_tokens(log_p, uniform_M2[places])
        return token_M

    def _log_probabilities_by_piece(self, positions: Positions) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield indices into M and the log-probabilities there."""
        order_M, pieces = self._by_slot(positions)
        row_M, h_RD = self._rows(positions)[order_M], self._h_BPD.flatten(0, 1)
        for slot, piece in pieces:
            with self._fp32():
                logits_NV = h_RD.index_select(0, row_M[piece]).float() @ self._weight_SVD[slot].T
            yield order_M[piece], torch.log_softmax(logits_NV[:, :N_EXPRESSION_TOKENS], dim=-1)

    def _rows(self, positions: Positions) -> Tensor:
        """Row of each position's group among all cells' groups."""
        group_M = self._groups.place_G[positions.gene_M] // self._groups.genes_per_group
        return positions.cell_M * self._groups.n_groups + group_M

    def _by_slot(self, positions: Positions) -> "tuple[Tensor, list[Piece]]":
        """Order positions by slot, and cut them into pieces of one slot, so that every product is one dense matmul."""
        slot_M = self._groups.place_G[positions.gene_M] % self._groups.genes_per_group
        pieces, at = [], 0
        for slot, n in enumerate(torch.bincount(slot_M, minlength=self._groups.genes_per_group).tolist()):
            edges = [*range(at, at + n, _POSITIONS_AT_ONCE), at + n]
            pieces += [(slot, slice(a, b)) for a, b in pairwise(edges)]
            at += n
        return torch.argsort(slot_M, stable=True), pieces

    def _fp32(self) -> torch.autocast:
        return torch.autocast(self._h_BPD.device.type, enabled=False)


Piece = tuple[int, slice]  # a slot, and positions in it


class _NllBySlot(torch.autograd.Function):
    """Cross-entropy of positions ordered by slot, head included; logits are computed again on the way back.

    Written by hand as autograd would make a gradient of all rows for every piece: with the paper's 2,260 groups that
    is more traffic than the products. In one piece every row occurs once, so gradients add up in a fixed order.
    """

    @staticmethod
    def forward(ctx, h_RD: Tensor, weight_SVD: Tensor, row_M: Tensor, target_M: Tensor, pieces: list[Piece]) -> Tensor:
        score = _fused(_score, h_RD.device)
        nll_M, log_sum_M = h_RD.new_empty(len(row_M)), h_RD.new_empty(len(row_M))
        for slot, piece in pieces:
            logits_NV = h_RD.index_select(0, row_M[piece]) @ weight_SVD[slot].T
            nll_M[piece], log_sum_M[piece] = score(logits_NV, target_M[piece])
        ctx.save_for_backward(h_RD, weight_SVD, row_M, target_M, log_sum_M)
        ctx.pieces = pieces
        return nll_M

    @staticmethod
    def backward(ctx, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        h_RD, weight_SVD, row_M, target_M, log_sum_M = ctx.saved_tensors
        back = _fused(_grad_of_logits, h_RD.device)
        grad_RD, grad_SVD = torch.zeros_like(h_RD), torch.zeros_like(weight_SVD)
        with torch.autocast(h_RD.device.type, enabled=False):
            for slot, piece in ctx.pieces:
                h_ND = h_RD.index_select(0, row_M[piece])
                grad_NV = back(h_ND @ weight_SVD[slot].T, log_sum_M[piece], target_M[piece], grad_M[piece])
                grad_RD.index_add_(0, row_M[piece], grad_NV @ weight_SVD[slot])
                grad_SVD[slot].addmm_(grad_NV.T, h_ND)
        return grad_RD, grad_SVD, None, None, None


def _score(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of padded logits, and the logarithms of their sums."""
    logits_NV = logits_NV[:, :N_EXPRESSION_TOKENS]
    log_sum_N = torch.logsumexp(logits_NV, dim=1)
    return log_sum_N - logits_NV.gather(1, target_N[:, None])[:, 0], log_sum_N


def _grad_of_logits(logits_NV: Tensor, log_sum_N: Tensor, target_N: Tensor, grad_N: Tensor) -> Tensor:
    """Gradient of cross-entropies with respect to padded logits: probability less truth; 0 in the padding."""
    token_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    grad_NV = torch.exp(logits_NV - log_sum_N[:, None]) - (token_V == target_N[:, None]).float()
    return grad_NV * torch.where(token_V < N_EXPRESSION_TOKENS, grad_N[:, None], 0.0)


def _fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compile elementwise work for a GPU, where memory traffic is what it costs."""
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
