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

SIZE = 8.0  # r: the counts of a gene given what else is known of its cell, measured (log)
_LOG_SIZE = math.log(SIZE)
_IS_LOGIT = -12.0  # below, log m is the logit to the last bit


def log_mean_of(detected: Tensor) -> Tensor:
    """Give the log mean at which a gene is detected with a probability, in (0, 1)."""
    rate = -torch.log1p(-detected)
    return _LOG_SIZE + torch.log(torch.expm1(rate / SIZE))


def detection_logits(log_mean: Tensor) -> Tensor:
    """Give the logit of the probability that a gene with a log mean is detected, any shape."""
    return _DetectionLogits.apply(log_mean)


def share_of_values(detected: Tensor) -> Tensor:
    """Tell which part of a change of the log mean goes to the counts above 0; detection takes the rest."""
    undetected = 1 - detected
    return 1 - undetected * SIZE * (1 - undetected ** (1 / SIZE)) / detected


class _DetectionLogits(torch.autograd.Function):
    """With rate λ = r softplus(log m - log r) = -log p(0), the logit is λ + log(1 - e^-λ)."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_mean: Tensor) -> Tensor:
        over = log_mean - _LOG_SIZE
        rate = SIZE * F.softplus(over)
        detected = -torch.expm1(-rate)
        is_logit = log_mean < _IS_LOGIT
        ctx.save_for_backward((SIZE * torch.sigmoid(over) / detected).masked_fill_(is_logit, 1.0))
        return torch.where(is_logit, log_mean, rate + torch.log(detected))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope
