"""The forward process: hide genes independently, and say how much each draw counts in the bound.

Shapes: B cells, G genes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingshu_cell.tokens import MASK_TOKEN


@dataclass(frozen=True)
class MaskLaw:
    """Law of the visible share v = 1 - t from which the masks of training are drawn.

    The bound is the expectation under v ~ U(0, 1); any other law gives the same expectation with weight 1 / density.

    Parameters
    ----------
    log_uniform_share
        Share of draws in which the *number* of visible genes is log-uniform between 1 and G. 0 is the paper's law.
    weight_power
        The weight is density^-weight_power. 1 is the bound, exactly. Below 1 the first genes of a cell count for more
        than their few nats: which type a cell becomes, how deep it is, and whether it obeys its conditions is decided
        there, yet a label is worth less than 2 of 3,000 nats. The best answer at each visible share is the same for
        every weight.
    """

    log_uniform_share: float = 0.0
    weight_power: float = 1.0

    def draw(self, n_cells: int, n_genes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the visible shares and their weights.

        Returns
        -------
        tuple
            ``visible_B`` in [0, 1) and ``weight_B`` = density^-weight_power, both float32 on the generator's device.
        """
        device = generator.device
        # Stratified over the minibatch: each cell draws from its own 1/B slice, which lowers the variance of the loss.
        strata = (torch.randperm(n_cells, generator=generator, device=device) + 0.0) / n_cells
        uniform = strata + torch.rand(n_cells, generator=generator, device=device) / n_cells
        uniform = uniform.clamp_max(1 - 2**-24)  # float32 may round up to 1, and the loss divides by 1 - v
        if self.log_uniform_share == 0:
            return uniform, torch.ones_like(uniform)
        is_log = torch.rand(n_cells, generator=generator, device=device) < self.log_uniform_share
        log_uniform = torch.exp((uniform - 1) * math.log(n_genes))  # v from 1/G to 1
        visible = torch.where(is_log, log_uniform, uniform)
        return visible, self.density(visible, n_genes) ** -self.weight_power

    def density(self, visible: Tensor, n_genes: int) -> Tensor:
        """Density of the visible share on (0, 1)."""
        log_density = torch.where(visible * n_genes >= 1, 1 / (visible.clamp_min(1e-12) * math.log(n_genes)), 0.0)
        return (1 - self.log_uniform_share) + self.log_uniform_share * log_density


TILE_CELLS = 16
"""Neighbours in a minibatch that draw their masks together; a part of a minibatch draws for whole tiles."""


def hide_by_place(x_0_BG: Tensor, visible_B: Tensor, tile_seed: Callable[[int], int], first: int) -> Tensor:
    """Hide every gene independently, by draws that belong to the places of a minibatch.

    Whoever holds the rows from ``first`` on hides the same genes in them as one who holds the whole minibatch.

    Parameters
    ----------
    x_0_BG
        Expression tokens of some neighbours in the minibatch.
    visible_B
        Visible share of each of them, in [0, 1].
    tile_seed
        The seed of each tile of ``TILE_CELLS`` places, 0, 1, ….
    first
        Place of the first row.

    Returns
    -------
    Tensor
        ``x_t_BG``: the tokens with ``MASK_TOKEN`` where hidden.
    """
    n, n_genes = x_0_BG.shape
    tiles = range(first // TILE_CELLS, -(-(first + n) // TILE_CELLS))
    uniform_BG = torch.empty(len(tiles) * TILE_CELLS, n_genes, device=x_0_BG.device)
    generator = torch.Generator(x_0_BG.device)
    for tile, rows_BG in zip(tiles, uniform_BG.split(TILE_CELLS), strict=True):
        torch.rand(rows_BG.shape, generator=generator.manual_seed(tile_seed(tile)), out=rows_BG)
    offset = first - tiles[0] * TILE_CELLS if n else 0
    return torch.where(uniform_BG[offset : offset + n] < visible_B[:, None], x_0_BG, MASK_TOKEN)


def hide(x_0_BG: Tensor, visible_B: Tensor, generator: torch.Generator) -> Tensor:
    """Hide every gene independently with probability 1 - v (paper, eq. 1 with t = 1 - v).

    Parameters
    ----------
    x_0_BG
        Expression tokens of whole cells; genes that were not measured already carry ``MASK_TOKEN``.
    visible_B
        Visible share of each cell, in [0, 1].

    Returns
    -------
    Tensor
        ``x_t_BG``: the tokens with ``MASK_TOKEN`` where hidden.
    """
    keep_BG = torch.rand(x_0_BG.shape, generator=generator, device=x_0_BG.device) < visible_B[:, None]
    return torch.where(keep_BG, x_0_BG, MASK_TOKEN)
