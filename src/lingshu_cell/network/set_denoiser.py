"""Our denoiser: the visible genes are a set, summed with one weight vector each; a residual trunk reads the sum.

Where the paper spends a transformer token on every S genes, we give every gene its own input and output weights and one sum
per cell. The cost of a cell is 4 · G · E multiplications, thousands of times below the paper's, and on data sets of
thousands of cells it learns far faster (docs/log.md). What enters is what masked diffusion can know: which genes are visible,
which of them are not zero, and their log counts.

Shapes: B cells, G genes, C condition fields, E gene width, D trunk width, F features of the visible set.
"""

import math

import torch
from torch import Tensor, nn

from lingshu_cell.network.distribution import CountDistribution
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.network.layers import SwiGLU
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_N_FREQUENCIES = 8
_N_FEATURES = 4 * _N_FREQUENCIES + 2
_EVIDENCE_SCALE = 20.0  # visible genes beyond which the sum is averaged rather than added


class SetDenoiser(nn.Module):
    """Sum over visible genes, residual SwiGLU trunk, gate-and-values head.

    Parameters
    ----------
    n_genes
        G, the length of the gene list.
    condition_sizes
        For each condition field, the number of its indices; index 0 of a field means *unknown*.
    count_of_token
        Expected count of each expression token, float, shape 281.
    gene_width, width, n_blocks, feedforward_width, value_width, n_small_values, dropout
        Sizes, see ``config.SetConfig``.
    generator
        Source of the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        condition_sizes: tuple[int, ...],
        count_of_token: Tensor,
        *,
        gene_width: int,
        width: int,
        n_blocks: int,
        feedforward_width: int,
        value_width: int,
        n_small_values: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        count_T = torch.zeros(MASK_TOKEN + 1)
        count_T[:N_EXPRESSION_TOKENS] = count_of_token
        self.register_buffer("count_T", count_T, persistent=False)
        sizes = torch.tensor([0, *condition_sizes])
        self.register_buffer("first_row_C", torch.cumsum(sizes, 0)[:-1], persistent=False)
        self.visible_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.nonzero_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.log_count_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.sum_norm = nn.RMSNorm(gene_width)
        self.sum_in = nn.Linear(gene_width, width, bias=False)
        self.feature_in = nn.Linear(_N_FEATURES, width)
        self.condition = nn.Embedding(max(int(sizes.sum()), 1), width)
        self.blocks = nn.ModuleList(_TrunkBlock(width, feedforward_width, dropout) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.head = GateHead(n_genes, width, gene_width, value_width, n_small_values)
        self._initialise(generator)

    def forward(self, x_t_BG: Tensor, condition_BC: Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions) for every gene; arguments as in :class:`TransformerDenoiser`."""
        visible_BG = x_t_BG != MASK_TOKEN
        count_BG = self.count_T.index_select(0, x_t_BG.int().flatten()).view(x_t_BG.shape)
        # The set: visible genes, visible non-zero genes, and log counts, each with its own weights.
        sum_BE = visible_BG.float() @ self.visible_GE
        sum_BE = sum_BE + (count_BG > 0).float() @ self.nonzero_GE
        sum_BE = sum_BE + torch.log1p(count_BG) @ self.log_count_GE
        n_visible_B = visible_BG.sum(1).float()
        sum_BE = sum_BE / torch.sqrt(1 + n_visible_B / _EVIDENCE_SCALE)[:, None]
        feature_BF = self._features(n_visible_B, count_BG.sum(1))
        h_BD = self.sum_in(self.sum_norm(sum_BE)) + self.feature_in(feature_BF)
        h_BD = h_BD + self.condition(condition_BC + self.first_row_C).sum(1)
        for block in self.blocks:
            h_BD = block(h_BD, feature_BF)
        return self.head(self.norm(h_BD))

    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Start at the token frequencies of the training cells, see :meth:`GateHead.start_at_frequencies`."""
        self.head.start_at_frequencies(token_counts_GV)

    def _features(self, n_visible_B: Tensor, total_B: Tensor) -> Tensor:
        """Fourier features of how much is visible, and of the library size it suggests; B × F."""
        seen = torch.log1p(n_visible_B) / math.log1p(self.n_genes)
        library = (torch.log1p(total_B) - torch.log(n_visible_B.clamp_min(1) / self.n_genes)) / 4 - 2
        frequency = 2.0 ** torch.arange(_N_FREQUENCIES, device=seen.device)
        angle = torch.cat([1.5 * seen[:, None] * frequency, library[:, None] * frequency], dim=1)
        return torch.cat([angle.sin(), angle.cos(), seen[:, None], library[:, None]], dim=1)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for parameter, std in ((self.visible_GE, 0.01), (self.nonzero_GE, 0.02), (self.log_count_GE, 0.02)):
            parameter.normal_(0.0, std, generator=generator)
        self.condition.weight.zero_()
        for block in self.blocks:
            block.start_as_identity()
        self.head.initialise(generator)


class _TrunkBlock(nn.Module):
    """Residual SwiGLU whose norm is scaled and shifted by how much is visible (FiLM, arXiv 1709.07871)."""

    def __init__(self, width: int, feedforward_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.modulation = nn.Linear(_N_FEATURES, 2 * width)
        self.feedforward = SwiGLU(width, feedforward_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BD: Tensor, feature_BF: Tensor) -> Tensor:
        scale_BD, shift_BD = self.modulation(feature_BF).chunk(2, dim=-1)
        return h_BD + self.dropout(self.feedforward(self.norm(h_BD) * (1 + scale_BD) + shift_BD))

    def start_as_identity(self) -> None:
        self.modulation.weight.zero_()
        self.feedforward.down.weight.zero_()
