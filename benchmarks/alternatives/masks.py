"""Other ways to draw the masks of a minibatch; each gives an unbiased estimate of the negative ELBO per cell.

Shapes: B cells, G genes, C conditions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lingshu_cell.diffusion.loss import nelbo_estimate
from lingshu_cell.diffusion.noising import MaskLaw, hide
from lingshu_cell.network.distribution import Denoise
from lingshu_cell.tokens import MASK_TOKEN

Estimate = Callable[[Denoise, Tensor, Tensor, torch.Generator], Tensor]
"""From network, tokens, conditions and a generator to nats per cell, shape B."""


def product_masks(law: MaskLaw) -> Estimate:
    """One mask per cell, shares stratified over the minibatch, as in the product."""
    return lambda denoise, x_0_BG, condition_BC, generator: nelbo_estimate(
        denoise, x_0_BG, condition_BC, law, generator
    )


def unstratified_masks(law: MaskLaw) -> Estimate:
    """One mask per cell, shares drawn independently from the same law."""

    def estimate(denoise: Denoise, x_0_BG: Tensor, condition_BC: Tensor, generator: torch.Generator) -> Tensor:
        visible_B, weight_B = independent_shares(law, len(x_0_BG), x_0_BG.shape[1], generator)
        return weight_B * _nll_per_hidden_share(denoise, x_0_BG, condition_BC, visible_B, generator)

    return estimate


def complementary_masks(denoise: Denoise, x_0_BG: Tensor, condition_BC: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the cells, each twice: under a mask, and under the mask that hides just what the first one shows.

    The share is uniform, so the complement's is too; the cost is that of one mask for each of B cells.
    """
    half = len(x_0_BG) // 2
    visible_H, _ = MaskLaw(0.0).draw(half, x_0_BG.shape[1], generator)
    visible_H = visible_H.clamp_min(2**-24)
    keep_HG = torch.rand(half, x_0_BG.shape[1], generator=generator) < visible_H[:, None]
    cells = torch.cat([x_0_BG[:half]] * 2)
    x_t_BG = torch.where(torch.cat([keep_HG, ~keep_HG]), cells, MASK_TOKEN)
    scored_BG = (x_t_BG == MASK_TOKEN) & (cells != MASK_TOKEN)
    nll_B = denoise(x_t_BG, torch.cat([condition_BC[:half]] * 2)).nll(cells, scored_BG)
    return nll_B / torch.cat([1 - visible_H, visible_H])


def independent_shares(law: MaskLaw, n_cells: int, n_genes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw visible shares and weights as :meth:`MaskLaw.draw` does, without strata."""
    uniform = torch.rand(n_cells, generator=generator)
    is_log = torch.rand(n_cells, generator=generator) < law.log_uniform_share
    visible = torch.where(is_log, torch.exp((uniform - 1) * math.log(n_genes)), uniform).clamp_max(1 - 2**-24)
    return visible, law.density(visible, n_genes) ** -law.weight_power


def _nll_per_hidden_share(
    denoise: Denoise, x_0_BG: Tensor, condition_BC: Tensor, visible_B: Tensor, generator: torch.Generator
) -> Tensor:
    x_t_BG = hide(x_0_BG, visible_B, generator)
    scored_BG = (x_t_BG == MASK_TOKEN) & (x_0_BG != MASK_TOKEN)
    return denoise(x_t_BG, condition_BC).nll(x_0_BG, scored_BG) / (1 - visible_B)
