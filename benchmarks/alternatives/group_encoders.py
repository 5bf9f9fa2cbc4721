"""Alternative encoders that cut the genes into groups, with the product's gate-and-values head.

Shapes: B cells, G genes, P groups, S slots, D width, E gene width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alternatives.grouped_gate import GroupedGate
from lingshu_cell.network.compression import Compressor, GeneGroups
from lingshu_cell.network.distribution import CountDistribution
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.network.layers import Block, rotary_angles
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_N_SMALL_VALUES = 16
_N_STATISTICS = 3  # visible, detected, log count
_N_FEATURES = 16


class SharedMapGroups(nn.Module):
    """The paper's encoder: one embedding per token, one linear map S·D → D shared by all groups, rotary transformer.

    Parameters
    ----------
    n_genes, gene_width, count_of_token
        As for :class:`GateHead`.
    genes_per_group, width, n_blocks, n_heads
        Sizes; the hidden width of SwiGLU is 2 · width.
    generator
        Source of the permutation and the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        count_of_token: Tensor,
        *,
        gene_width: int,
        genes_per_group: int,
        width: int,
        n_blocks: int,
        n_heads: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.head_width = width // n_heads
        self.groups = GeneGroups(n_genes, genes_per_group, generator)
        self.embedding = nn.Embedding(MASK_TOKEN + 1, width)
        self.compressor = Compressor(width, genes_per_group)
        self.blocks = nn.ModuleList(Block(width, n_heads, 2 * width) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.head = GateHead(n_genes, width, gene_width, _N_SMALL_VALUES, count_of_token)
        _initialise(self, generator)
        with torch.no_grad():
            self.embedding.weight.normal_(0.0, 0.5, generator=generator)

    def forward(self, x_t_BG: Tensor, condition_BC: Tensor) -> CountDistribution:
        """Answer for every gene; the network knows no conditions."""
        h_BPD = self.compressor(self.groups.group(x_t_BG), self.embedding.weight)
        angles = rotary_angles(h_BPD.shape[1], self.head_width, h_BPD.device)
        for block in self.blocks:
            h_BPD = block(h_BPD, angles)
        return GroupedGate(self.head, self.norm(h_BPD), self.groups)

    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """See :meth:`GateHead.start_at_frequencies`."""
        self.head.start_at_frequencies(token_counts_GV)


class OwnWeightGroups(nn.Module):
    """Large groups; every gene has input weights of its own for being visible, detected, and its log count.

    Detected and log count are taken less their expectation over the training cells.

    Parameters
    ----------
    n_genes, gene_width, count_of_token
        As for :class:`GateHead`.
    genes_per_group, width, n_blocks, n_heads
        Sizes; the hidden width of SwiGLU is 2 · width.
    generator
        Source of the permutation and the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        count_of_token: Tensor,
        *,
        gene_width: int,
        genes_per_group: int,
        width: int,
        n_blocks: int,
        n_heads: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_genes, self.head_width = n_genes, width // n_heads
        count_T = torch.zeros(MASK_TOKEN + 1)
        count_T[:N_EXPRESSION_TOKENS] = count_of_token
        self.register_buffer("count_T", count_T, persistent=False)
        self.register_buffer("detection_G", torch.zeros(n_genes))
        self.register_buffer("mean_log_G", torch.zeros(n_genes))
        self.groups = GeneGroups(n_genes, genes_per_group, generator)
        self.input_PID = nn.Parameter(torch.empty(self.groups.n_groups, _N_STATISTICS * genes_per_group, width))
        self.place_PD = nn.Parameter(torch.empty(self.groups.n_groups, width))
        self.feature_in = nn.Linear(_N_FEATURES, width)
        self.blocks = nn.ModuleList(Block(width, n_heads, 2 * width) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.head = GateHead(n_genes, width, gene_width, _N_SMALL_VALUES, count_of_token)
        _initialise(self, generator)
        with torch.no_grad():
            self.input_PID.normal_(0.0, 1 / math.sqrt(genes_per_group), generator=generator)
            self.place_PD.normal_(0.0, 0.5, generator=generator)

    def forward(self, x_t_BG: Tensor, condition_BC: Tensor) -> CountDistribution:
        """Answer for every gene; the network knows no conditions."""
        visible_BG = (x_t_BG != MASK_TOKEN).float()
        count_BG = self.count_T[x_t_BG.int()]
        detected_BG = (count_BG > 0).float() - visible_BG * self.detection_G
        log_BG = torch.log1p(count_BG) - visible_BG * self.mean_log_G
        statistics = torch.cat([self._group(s_BG) for s_BG in (visible_BG, detected_BG, log_BG)], dim=2)
        h_BPD = torch.bmm(statistics, self.input_PID).transpose(0, 1) + self.place_PD
        h_BPD = h_BPD + self.feature_in(visible_features(visible_BG, count_BG))[:, None]
        angles = rotary_angles(h_BPD.shape[1], self.head_width, h_BPD.device)
        for block in self.blocks:
            h_BPD = block(h_BPD, angles)
        return GroupedGate(self.head, self.norm(h_BPD), self.groups)

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Set expectations and the head's biases from how many training cells show each token, G × 281."""
        frequency_GV = token_counts_GV.double() / token_counts_GV.sum(1, keepdim=True).clamp_min(1)
        self.detection_G.copy_(1 - frequency_GV[:, 0])
        self.mean_log_G.copy_(frequency_GV @ torch.log1p(self.count_T[:N_EXPRESSION_TOKENS].double()))
        self.head.start_at_frequencies(token_counts_GV)

    def _group(self, values_BG: Tensor) -> Tensor:
        """P × B × S, padded with zeros."""
        groups = self.groups
        padding = groups.n_groups * groups.genes_per_group - groups.n_genes
        permuted = F.pad(values_BG[:, groups.permutation_G], (0, padding))
        return permuted.view(len(values_BG), groups.n_groups, -1).transpose(0, 1)


def visible_features(visible_BG: Tensor, count_BG: Tensor) -> Tensor:
    """How much is visible and the library size it suggests, as Fourier features, B × 16."""
    n_visible_B, n_genes = visible_BG.sum(1), visible_BG.shape[1]
    seen = torch.log1p(n_visible_B) / math.log1p(n_genes)
    library = (torch.log1p(count_BG.sum(1)) - torch.log(n_visible_B.clamp_min(1) / n_genes)) / 4 - 2
    frequency = 2.0 ** torch.arange(_N_FEATURES // 4)
    angle = torch.cat([1.5 * seen[:, None] * frequency, library[:, None] * frequency], dim=1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@torch.no_grad()
def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            if name.endswith(("attention.out", "feedforward.down")):
                module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    network.head.initialise(generator)
