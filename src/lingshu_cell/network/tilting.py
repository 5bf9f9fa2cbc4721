r"""Move the mean of a count distribution by a stated factor, and nothing else about its kind.

Of all distributions with the wanted mean, we take the exponential tilt along log(1 + count),

.. math:: \tilde p(v) \propto p(v) (1 + v)^{\lambda},

with :math:`\lambda` solved for. It moves a log-normal by exactly its shift; tilting along the count itself, or scaling
logits, lets the upper tail of an overdispersed gene take over.

Shapes: M positions, V counts.
"""

import torch
from torch import Tensor

_NEWTON_STEPS = 10
_STEEPEST = 40.0


def solve_tilt(log_p_MV: Tensor, count_V: Tensor, log_shift_M: Tensor) -> Tensor:
    """Solve for the tilt that moves the logarithm of each mean count by a given amount.

    Parameters
    ----------
    log_p_MV
        Normalised log-probabilities.
    count_V
        Count of each category, rising from 0.
    log_shift_M
        Wanted change of the log mean, natural logarithm. A mean that no tilt reaches (above the largest count) is
        approached.

    Returns
    -------
    Tensor
        λ, float32, shape M.
    """
    count_V, log_count_V = count_V.to(log_p_MV.dtype), torch.log1p(count_V).to(log_p_MV.dtype)
    target_M = torch.log((log_p_MV.exp() @ count_V).clamp_min(1e-30)) + log_shift_M
    low_M, high_M = torch.full_like(target_M, -_STEEPEST), torch.full_like(target_M, _STEEPEST)
    tilt_M = log_shift_M.clone()
    for _ in range(_NEWTON_STEPS):
        p_MV = torch.softmax(torch.addcmul(log_p_MV, tilt_M[:, None], log_count_V), -1)
        mean_M = (p_MV @ count_V).clamp_min(1e-30)
        # d log mean / d tilt = Cov(count, log(1 + count)) / mean, above 0
        slope_M = (p_MV @ (count_V * log_count_V)) / mean_M - p_MV @ log_count_V
        error_M = torch.log(mean_M) - target_M
        low_M = torch.where(error_M < 0, tilt_M, low_M)  # the mean rises with the tilt: keep the root between
        high_M = torch.where(error_M > 0, tilt_M, high_M)
        newton_M = tilt_M - error_M / slope_M.clamp_min(1e-9)
        inside_M = (newton_M > low_M) & (newton_M < high_M)
        tilt_M = torch.where(error_M == 0, tilt_M, torch.where(inside_M, newton_M, (low_M + high_M) / 2))
        if bool((error_M.abs() < 1e-4).all()):
            break
    return tilt_M


def tilted(log_p_MV: Tensor, tilt_M: Tensor, count_V: Tensor) -> Tensor:
    """Tilt distributions: normalised log-probabilities, M × V."""
    return torch.log_softmax(log_p_MV + tilt_M[:, None] * torch.log1p(count_V), -1)
