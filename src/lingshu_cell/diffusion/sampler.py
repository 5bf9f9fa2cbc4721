"""The reverse process: from all genes hidden to a whole cell, in as many network evaluations as the grid has steps.

Shapes: B cells, G genes, M positions revealed in one step.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lingshu_cell.diffusion.randomness import CellNoise, reveal_ranks
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoise, Denoiser, DenoisingFunction, Positions
from lingshu_cell.tokens import MASK_TOKEN


@torch.no_grad()
def sample_cells(
    denoise: Denoiser | Denoise,
    start_BG: Tensor,
    conditions: Conditions | Tensor,
    noise: CellNoise,
    visible_counts: Sequence[int],
    unmeasured_BG: Tensor | None = None,
) -> Tensor:
    """Reveal the hidden genes step by step (paper, section 2.5).

    How many genes each step reveals is fixed beforehand; which genes is uniformly random and chosen before any value
    is drawn; values come from the plain categorical; a gene that is visible never changes.

    Parameters
    ----------
    denoise
        The denoising function, guided or not.
    start_BG
        Tokens to start from: ``MASK_TOKEN`` everywhere, or with genes given by the user or a prior already visible.
    conditions
        What the cells shall be; a plain tensor B × C stands for categories alone.
    noise
        The cells' random numbers.
    visible_counts
        Grid 0 = n_0 < … < n_N = G for a cell with all genes hidden; where genes are given, it is scaled to the hidden
        ones.
    unmeasured_BG
        Genes that stay hidden, boolean: those that training cells like these were not measured for, which the network
        has only ever seen hidden.

    Returns
    -------
    Tensor
        ``x_0_BG``, whole cells: expression tokens 0 … 280; ``MASK_TOKEN`` only where a gene stays hidden.
    """
    n_genes = start_BG.shape[1]
    hidden_BG = start_BG == MASK_TOKEN
    if unmeasured_BG is not None:
        hidden_BG &= ~unmeasured_BG
    n_hidden_B1 = hidden_BG.sum(1, keepdim=True)
    rank_BG = reveal_ranks(noise.order_BG, hidden_BG)
    edges = torch.as_tensor(visible_counts, device=start_BG.device, dtype=torch.float64) / n_genes
    edges_NB1 = torch.round(edges[:, None, None] * n_hidden_B1).long()
    denoiser = denoise if isinstance(denoise, Denoiser) else DenoisingFunction(denoise)
    cells = denoiser.start(start_BG)
    for low_B1, high_B1 in pairwise(edges_NB1):
        positions = Positions.where((rank_BG >= low_B1) & (rank_BG < high_B1))
        if len(positions) == 0:
            continue
        uniform_M2 = noise.uniform_BG2[positions.cell_M, positions.gene_M]
        cells.reveal(positions, denoiser.answer(cells, conditions).draw(positions, uniform_M2))
    return cells.x_t_BG
