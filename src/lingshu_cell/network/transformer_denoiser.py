"""The paper's denoiser, read top to bottom as the paper tells it (arXiv 2603.25240, section 2; presets ``paper*``).

Shapes: B cells, G genes, P gene groups, C conditions, D width, T input tokens.

Where the paper is silent we chose: condition tokens take the first rotary positions; matrices start at N(0, 0.02²),
those that write into the residual stream at 0.02 / √(2 · blocks); an unknown condition has a token of its own.
"""

import torch
from torch import Tensor, nn

from lingshu_cell.network.compression import Compressor, Decompressor, GeneGroups
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import CountDistribution, Denoiser
from lingshu_cell.network.layers import Block, rotary_angles
from lingshu_cell.tokens import MASK_TOKEN


class TransformerDenoiser(nn.Module, Denoiser):
    """Bidirectional transformer over groups of genes, with condition tokens in front and no time input.

    Parameters
    ----------
    n_genes
        G, the length of the gene list.
    condition_sizes
        For each condition field, the number of its indices; index 0 of a field means *unknown*.
    width, n_blocks, n_heads, feedforward_width, genes_per_group
        Sizes; the paper's are 640, 13, 10, 2560 and 8 or 32.
    generator
        Source of the gene permutation and the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        condition_sizes: tuple[int, ...],
        *,
        width: int,
        n_blocks: int,
        n_heads: int,
        feedforward_width: int,
        genes_per_group: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.head_width = width // n_heads
        sizes = torch.tensor([0, *condition_sizes])
        self.register_buffer("first_token_C", MASK_TOKEN + 1 + torch.cumsum(sizes, 0)[:-1], persistent=False)
        self.groups = GeneGroups(n_genes, genes_per_group, generator)
        # One table for expression tokens, [MASK] and condition tokens.
        self.embedding = nn.Embedding(MASK_TOKEN + 1 + int(sizes.sum()), width)
        self.compressor = Compressor(width, genes_per_group)
        self.blocks = nn.ModuleList(Block(width, n_heads, feedforward_width) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.decompressor = Decompressor(width, genes_per_group)
        self._initialise(generator)

    def forward(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions) for every gene.

        Parameters
        ----------
        x_t_BG
            Tokens 0 … 280, ``MASK_TOKEN`` where hidden; any integer dtype.
        conditions
            Categories, B × C, 0 = unknown; the paper's network knows no others, a perturbation is one of them.
        """
        condition_BC = Conditions.of(conditions).category_BC
        # Genes: permute, group, embed and compress S·D → D.
        h_BPD = self.compressor(self.groups.group(x_t_BG), self.embedding.weight).float()  # residual stream in fp32
        # Conditions: tokens of the same table, in front, outside the compression, never masked.
        condition_BCD = self.embedding(condition_BC + self.first_token_C)
        h_BPD = torch.cat([condition_BCD, h_BPD], dim=1)
        # Bidirectional blocks: no mask, no time input.
        angles = rotary_angles(h_BPD.shape[1], self.head_width, h_BPD.device)
        for block in self.blocks:
            h_BPD = block(h_BPD, angles)
        # Back to genes: norm, D → S·D, inverse permutation, shared head.
        return self.decompressor(self.norm(h_BPD[:, condition_BC.shape[1] :]), self.groups)

    def compile_blocks(self) -> None:
        """Fuse the elementwise work of the blocks, in one program that all share; the first call takes seconds."""
        for block in self.blocks:
            block.compile()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # RMSNorm starts at one
            residual = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            std = 0.02 / (2 * len(self.blocks)) ** 0.5 if residual else 0.02
            parameter.normal_(0.0, std, generator=generator)
