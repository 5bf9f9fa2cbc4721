"""How often a gene is detected, as a function of its mean count: that of a negative binomial variable.

A gene with mean m is not detected with probability (1 + m / r)^-r. With log m in place of the logit, one step means the
same change of the mean where every cell shows a gene as where few do. (A linear logit cannot be 3 for one cell and 15
for another: genes with means of 40 then come out as 0 once in 700 cells, where real cells never show that, log.)
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lingshu_cell.network.distribution import Positions

SIZE = 8.0  # r: the counts of a gene given what else is known of its cell, measured (log)
_LOG_SIZE = math.log(SIZE)
_LEAST = -60.0  # of log (m / r), which float32 can still tell from 0


def log_mean_of(detected: Tensor) -> Tensor:
    """Give the log mean at which a gene is detected with a probability, in (0, 1)."""
    rate = -torch.log1p(-detected)
    return _LOG_SIZE + torch.log(torch.expm1(rate / SIZE))


def undetected_rate(log_mean: Tensor) -> Tensor:
    """Give λ = -log of the probability that a gene with a log mean is not detected, any shape."""
    return SIZE * F.softplus((log_mean - _LOG_SIZE).clamp_min(_LEAST))


def log_detected(rate: Tensor) -> Tensor:
    """Give the log of the probability that a gene is detected, log(1 - e^-λ), from the rate λ."""
    return torch.log(-torch.expm1(-rate))


def share_of_values(detected: Tensor) -> Tensor:
    """Tell which part of a change of the log mean goes to the counts above 0; detection takes the rest."""
    undetected = 1 - detected
    return 1 - undetected * SIZE * (1 - undetected ** (1 / SIZE)) / detected


def detection_nll(log_mean_BG: Tensor, detected: Positions, scored_BG: Tensor) -> Tensor:
    """Give the negative log-likelihood of which genes are detected, summed over the scored genes of each cell, B.

    Parameters
    ----------
    log_mean_BG
        As in :func:`undetected_rate`.
    detected
        Where scored genes have counts.
    scored_BG
        Which genes are asked for; bool.
    """
    return _DetectionNll.apply(log_mean_BG, detected, scored_BG)


class _DetectionNll(torch.autograd.Function):
    """λ where a gene is not detected, -log(1 - e^-λ) where it is; value and slope are made in one pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_mean_BG: Tensor, detected: Positions, scored_BG: Tensor) -> Tensor:
        over_BG = (log_mean_BG - _LOG_SIZE).clamp_min_(_LEAST)
        nll_BG = F.softplus(over_BG).mul_(SIZE)
        slope_BG = over_BG.sigmoid_().mul_(SIZE)
        place_M = detected.cell_M * nll_BG.shape[1] + detected.gene_M  # a tenth of all
        rate_M, slope_M = nll_BG.flatten()[place_M], slope_BG.flatten()[place_M]
        detected_M = -torch.expm1(-rate_M)
        nll_BG.view(-1)[place_M] = -torch.log(detected_M)
        slope_BG.view(-1)[place_M] = slope_M * (1 - 1 / detected_M)
        ctx.save_for_backward(slope_BG.mul_(scored_BG))
        return nll_BG.mul_(scored_BG).sum(1)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient_B: Tensor) -> tuple[Tensor, None, None]:
        (slope_BG,) = ctx.saved_tensors
        return gradient_B[:, None] * slope_BG, None, None
