"""The training objective: an unbiased estimate of the negative ELBO of whole cells, in nats.

Shapes: B cells, G genes.
"""

from collections.abc import Callable, Sequence

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
    return hidden_nll(of_answers(denoise), x_t_BG, x_0_BG, conditions) / (1 - visible_B)


Nll = Callable[[Tensor, Conditions | Tensor, Tensor, Tensor], Tensor]
"""``nll(x_t_BG, conditions, x_0_BG, scored_BG)``: nats of the scored genes of each cell, shape B."""


def of_answers(denoise: Denoise) -> Nll:
    """Score by what a denoiser answers."""
    return lambda x_t_BG, conditions, x_0_BG, scored_BG: denoise(x_t_BG, conditions).nll(x_0_BG, scored_BG)


def hidden_nll(nll: Nll, x_t_BG: Tensor, x_0_BG: Tensor, conditions: Conditions | Tensor) -> Tensor:
    """Cross-entropy of the hidden genes of each cell, those that were measured; nats, shape B."""
    return nll(x_t_BG, conditions, x_0_BG, (x_t_BG == MASK_TOKEN) & (x_0_BG != MASK_TOKEN))


@torch.no_grad()
def validation_nelbo(
    denoise: Denoise,
    x_0_BG: Tensor,
    conditions: Conditions | Tensor,
    generator: torch.Generator,
    n_masks: int = 8,
    parts: Sequence[slice] = (slice(None),),
) -> Tensor:
    """Estimate the negative ELBO of held-out cells with masks stratified over the visible share.

    Parameters
    ----------
    denoise, x_0_BG, conditions, generator
        As for :func:`nelbo_estimate`.
    n_masks
        Masks per cell.
    parts
        Rows to evaluate, part by part; masks are drawn for all rows, so they do not depend on the parts.

    Returns
    -------
    Tensor
        Nats per cell of the rows in ``parts``, one part after the other.
    """
    law, conditions = MaskLaw(0.0), Conditions.of(conditions)
    estimates = []
    for _ in range(n_masks):
        visible_B, weight_B = law.draw(len(x_0_BG), x_0_BG.shape[1], generator)
        x_t_BG = hide(x_0_BG, visible_B, generator)
        found = [hidden_nll(of_answers(denoise), x_t_BG[p], x_0_BG[p], conditions.rows(p)) for p in parts]
        weight_B = weight_B / (1 - visible_B)
        estimates.append(torch.cat(found) * torch.cat([weight_B[p] for p in parts]))
    return torch.stack(estimates).mean(0)
