"""Our denoiser: the visible genes are a set, summed as evidence; a residual trunk reads the sum and the head answers.

Where the paper spends a transformer token on every S genes, we give every gene one code U_g and one sum per cell. The
head says log p(x_g) = θ_g(h) · S(x_g) + … with θ_g(h) linear in U_g; what a visible gene tells about h is then the
score of that family, (S(x_g) - E S(x_g)) U_g. So the encoder adds up just that, with the same codes: visible zeros
speak through their expectation, and what is learned of a gene as an output serves it as an input. Separate input
weights learn slower and fit noise (docs/log.md). A cell costs about 6 · G · E multiplications, thousands of times
below the paper's.

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
_N_FEATURES = 4 * _N_FREQUENCIES + 4
_MOST_LOG_WEIGHT = 10.0  # first weight of a gene's log count: half its mean, as a Poisson score has it, at most this


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
    gene_width, width, n_blocks, feedforward_width, n_small_values, dropout
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
        self.register_buffer("detection_G", torch.zeros(n_genes))  # E 1[x > 0]
        self.register_buffer("mean_log_G", torch.zeros(n_genes))  # E log(1 + x)
        self.detection_weight_G = nn.Parameter(torch.ones(n_genes))
        self.log_weight_G = nn.Parameter(torch.zeros(n_genes))
        self.detection_norm, self.log_norm = nn.RMSNorm(gene_width), nn.RMSNorm(gene_width)
        self.detection_in = nn.Linear(gene_width, width, bias=False)
        self.log_in = nn.Linear(gene_width, width, bias=False)
        self.feature_in = nn.Linear(_N_FEATURES, width)
        self.condition = nn.Embedding(max(int(sizes.sum()), 1), width)
        self.blocks = nn.ModuleList(_TrunkBlock(width, feedforward_width, dropout) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.head = GateHead(n_genes, width, gene_width, n_small_values, count_of_token)
        self._initialise(generator)

    def forward(self, x_t_BG: Tensor, condition_BC: Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions) for every gene; arguments as in :class:`TransformerDenoiser`."""
        visible_BG = (x_t_BG != MASK_TOKEN).float()
        count_BG = self.count_T.index_select(0, x_t_BG.int().flatten()).view(x_t_BG.shape)  # 0 where hidden
        # Evidence of the visible genes, less its expectation, along the gene's code: detected or not, and log count.
        codes_GE = self.head.gene_GE
        detected_BG = (count_BG > 0).float() - visible_BG * self.detection_G
        detected_BE = (detected_BG @ (codes_GE * self.detection_weight_G[:, None])).float()
        log_BG = torch.log1p(count_BG) - visible_BG * self.mean_log_G
        log_BE = (log_BG @ (codes_GE * self.log_weight_G[:, None])).float()
        feature_BF = self._features(visible_BG.sum(1), count_BG.sum(1), detected_BE, log_BE)
        h_BD = self.detection_in(self.detection_norm(detected_BE)) + self.log_in(self.log_norm(log_BE))
        h_BD = h_BD + self.feature_in(feature_BF)
        h_BD = h_BD + self.condition(condition_BC + self.first_row_C).sum(1)
        for block in self.blocks:
            h_BD = block(h_BD, feature_BF)
        return self.head(self.norm(h_BD))

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Start at the token frequencies of the training cells, G × 281, see :meth:`GateHead.start_at_frequencies`."""
        frequency_GV = token_counts_GV.double() / token_counts_GV.sum(1, keepdim=True).clamp_min(1)
        count_V = self.count_T[:N_EXPRESSION_TOKENS].double().cpu()
        mean_G = frequency_GV @ count_V
        self.detection_G.copy_(1 - frequency_GV[:, 0])
        self.mean_log_G.copy_(frequency_GV @ torch.log1p(count_V))
        self.log_weight_G.copy_(torch.where(mean_G > 0.5, mean_G / 2, 0.0).clamp_max(_MOST_LOG_WEIGHT))
        self.head.start_at_frequencies(token_counts_GV)

    def _features(self, n_visible_B: Tensor, total_B: Tensor, detected_BE: Tensor, log_BE: Tensor) -> Tensor:
        """How much is visible, the library size it suggests (both as Fourier features), and how strong the evidence
        is; B × F.
        """
        seen = torch.log1p(n_visible_B) / math.log1p(self.n_genes)
        library = (torch.log1p(total_B) - torch.log(n_visible_B.clamp_min(1) / self.n_genes)) / 4 - 2
        frequency = 2.0 ** torch.arange(_N_FREQUENCIES, device=seen.device)
        angle = torch.cat([1.5 * seen[:, None] * frequency, library[:, None] * frequency], dim=1)
        strength = [
            torch.log(sum_BE.norm(dim=1) / torch.sqrt(n_visible_B + 1) + 0.01) for sum_BE in (detected_BE, log_BE)
        ]
        return torch.cat([angle.sin(), angle.cos(), torch.stack([seen, library, *strength], dim=1)], dim=1)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        self.condition.weight.normal_(0.0, 1.0, generator=generator)
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
