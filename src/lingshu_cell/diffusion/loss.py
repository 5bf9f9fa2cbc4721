"""The training objective: an unbiased estimate of the negative ELBO of whole cells, in nats.

Shapes: B cells, G genes.
"""

import torch
from torch import Tensor

from lingshu_cell.diffusion.noising import MaskLaw, hide
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoise
from lingshu_cell.tokens import MASK_TOKEN


def nelbo_estimate(
    denoise: Denoise, x_0_BG: Tensor, conditions: Conditions | Tensor, law: MaskLaw, generator: torch.Generator
) -> Tensor:
    r"""Estimate the negative ELBO of each cell from one random mask.

    .. math::

        -\log p(x_0) \le \mathbb{E}_{t \sim U(0,1)} \frac{1}{t}
        \mathbb{E}_{x_t} \sum_{g:\, x_t^g = \mathrm{MASK}} -\log p_\theta(x_0^g \mid x_t)

    with the visible share v = 1 - t drawn from ``law`` and weighted back to the uniform (paper, eq. 3; LLaDA, SMDM).

    Parameters
    ----------
    denoise
        The network.
    x_0_BG
        Expression tokens of whole cells; ``MASK_TOKEN`` where a gene was not measured, which hides it for good and
        never scores it.
    conditions
        Conditions of the cells; a plain tensor B × C stands for categories alone.
    law
        Law of the visible share.
    generator
        Source of the masks, on the device of ``x_0_BG``.

    Returns
    -------
    Tensor
        Nats per cell, shape B. Its expectation is the negative ELBO.
    """
    visible_B, weight_B = law.draw(len(x_0_BG), x_0_BG.shape[1], generator)
    return weight_B * nll_per_hidden_share(denoise, x_0_BG, conditions, visible_B, generator)


def nll_per_hidden_share(
    denoise: Denoise, x_0_BG: Tensor, conditions: Conditions | Tensor, visible_B: Tensor, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of the hidden genes at the given visible shares, divided by the hidden share; nats per cell,
    shape B.
    """
    x_t_BG = hide(x_0_BG, visible_B, generator)
    scored_BG = (x_t_BG == MASK_TOKEN) & (x_0_BG != MASK_TOKEN)
    return denoise(x_t_BG, conditions).nll(x_0_BG, scored_BG) / (1 - visible_B)


@torch.no_grad()
def validation_nelbo(
    denoise: Denoise, x_0_BG: Tensor, conditions: Conditions | Tensor, generator: torch.Generator, n_masks: int = 8
) -> Tensor:
    """Estimate the negative ELBO of held-out cells with masks stratified over the visible share; nats per cell,
    shape B.
    """
    estimates = [nelbo_estimate(denoise, x_0_BG, conditions, MaskLaw(0.0), generator) for _ in range(n_masks)]
    return torch.stack(estimates).mean(0)
