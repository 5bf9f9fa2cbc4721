"""Alternative encoder: visible non-zero genes and one token of pooled zeros, read by latents through attention.

Shapes: B cells, G genes, N tokens of the cell that has most, L latents, D width, E gene width, H heads, M non-zeros.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alternatives.group_encoders import visible_features
from lingshu_cell.network.distribution import CountDistribution
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.network.layers import Block, SwiGLU, rotary_angles
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_N_SMALL_VALUES = 16
_N_VALUE_FEATURES = 8
_N_FEATURES = 16


class LatentDenoiser(nn.Module):
    """Perceiver over the visible non-zero genes (Jaegle et al. 2021, arXiv 2103.03206), low-rank answer.

    A token is the code of its gene (the head's own, mapped) scaled by its log count, plus Fourier features of the
    count. All visible zeros are one token: the sum of their codes, each by how often the gene is detected. Latents read
    the tokens once, speak to each other in a transformer, and are flattened and mapped to the one hidden vector that
    asks the head: gene queries of rank E.

    Parameters
    ----------
    n_genes, gene_width, count_of_token
        As for :class:`GateHead`.
    n_latents, width, n_blocks, n_heads, answer_width
        Sizes.
    generator
        Source of the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        count_of_token: Tensor,
        *,
        gene_width: int,
        n_latents: int,
        width: int,
        n_blocks: int,
        n_heads: int,
        answer_width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_width = n_heads, width // n_heads
        count_T = torch.zeros(MASK_TOKEN + 1)
        count_T[:N_EXPRESSION_TOKENS] = count_of_token
        self.register_buffer("count_T", count_T, persistent=False)
        self.register_buffer("detection_G", torch.zeros(n_genes))
        self.code_norm, self.zero_norm = nn.RMSNorm(gene_width), nn.RMSNorm(gene_width)
        self.code_in = nn.Linear(gene_width, width, bias=False)
        self.value_in = nn.Linear(_N_VALUE_FEATURES, width)
        self.zero_in = nn.Linear(gene_width, width)
        self.latent_LD = nn.Parameter(torch.empty(n_latents, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.read_out = nn.Linear(width, width, bias=False)
        self.feature_in = nn.Linear(_N_FEATURES, width)
        self.blocks = nn.ModuleList(Block(width, n_heads, 2 * width) for _ in range(n_blocks))
        self.flat_norm = nn.RMSNorm(width)
        self.flatten = nn.Linear(n_latents * width, answer_width, bias=False)
        self.answer_norm, self.norm = nn.RMSNorm(answer_width), nn.RMSNorm(answer_width)
        self.answer = SwiGLU(answer_width, 2 * answer_width)
        self.head = GateHead(n_genes, answer_width, gene_width, _N_SMALL_VALUES, count_of_token)
        self._initialise(generator)

    def forward(self, x_t_BG: Tensor, condition_BC: Tensor) -> CountDistribution:
        """Answer for every gene; the network knows no conditions."""
        visible_BG = (x_t_BG != MASK_TOKEN).float()
        count_BG = self.count_T[x_t_BG.int()]
        token_BND, known_BN = self._tokens(visible_BG, count_BG)
        h_BLD = self._read(token_BND, known_BN)
        h_BLD = h_BLD + self.feature_in(visible_features(visible_BG, count_BG))[:, None]
        angles = rotary_angles(h_BLD.shape[1], self.head_width, h_BLD.device)
        for block in self.blocks:
            h_BLD = block(h_BLD, angles)
        h_BD = self.flatten(self.flat_norm(h_BLD).flatten(1))
        h_BD = h_BD + self.answer(self.answer_norm(h_BD))
        return self.head(self.norm(h_BD))

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Set the genes' detection rates and the head's biases from token counts of training cells, G × 281."""
        self.detection_G.copy_(1 - token_counts_GV[:, 0] / token_counts_GV.sum(1).clamp_min(1))
        self.head.start_at_frequencies(token_counts_GV)

    def _tokens(self, visible_BG: Tensor, count_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens padded to the cell that has most, and which of them are real; the first is that of the zeros."""
        codes_GE = self.head.gene_GE
        cell_M, gene_M = torch.nonzero(count_BG, as_tuple=True)
        n_B = torch.bincount(cell_M, minlength=len(count_BG))
        log_M1 = torch.log1p(count_BG[cell_M, gene_M])[:, None]
        angle_M4 = log_M1 * 2.0 ** torch.arange(_N_VALUE_FEATURES // 2)
        value_M = self.value_in(torch.cat([angle_M4.sin(), angle_M4.cos()], dim=1))
        token_MD = self.code_in(self.code_norm(codes_GE)[gene_M]) * log_M1 + value_M
        zero_BE = (visible_BG * (count_BG == 0) * self.detection_G) @ codes_GE
        first_B = torch.cumsum(n_B, 0) - n_B
        place_M = torch.arange(len(cell_M)) - first_B[cell_M] + 1
        token_BND = token_MD.new_zeros(len(count_BG), int(n_B.max()) + 1, token_MD.shape[1])
        token_BND = token_BND.index_put((cell_M, place_M), token_MD)
        zero_BD = self.zero_in(self.zero_norm(zero_BE))
        token_BND = torch.cat([zero_BD[:, None], token_BND[:, 1:]], dim=1)
        return token_BND, torch.arange(token_BND.shape[1]) <= n_B[:, None]

    def _read(self, token_BND: Tensor, known_BN: Tensor) -> Tensor:
        n_cells = len(token_BND)
        q, k, v = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
            for x in (self.query(self.latent_LD).expand(n_cells, -1, -1), self.key(token_BND), self.value(token_BND))
        )
        mixed_BHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=known_BN[:, None, None])
        return self.latent_LD + self.read_out(mixed_BHLd.transpose(1, 2).flatten(-2))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                if name.endswith(("attention.out", "feedforward.down", "answer.down")):
                    module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        self.latent_LD.normal_(0.0, 1.0, generator=generator)
        self.head.initialise(generator)
