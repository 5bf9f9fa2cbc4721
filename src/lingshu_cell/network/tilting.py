r"""Move the mean of a count distribution by a stated factor, and nothing else about its kind.

Of all distributions with the wanted mean, we take the exponential tilt along log(1 + count),

.. math:: \tilde p(v) \propto p(v) (1 + v)^{\lambda},

with :math:`\lambda` solved for. It moves a log-normal by exactly its shift; tilting along the count itself, or scaling
logits, lets the upper tail of an overdispersed gene take over.

Shapes: M positions, V counts.
"""

import torch
from torch import Tensor

_MOST_STEPS = 40  # few need more than 8; a mean that no tilt reaches takes them all
_STEEPEST = 1000.0  # doubling the mean of a log-normal of variance 0.01 takes 69
_GOOD_ENOUGH = 1e-4


def solve_tilt(log_p_MV: Tensor, count_V: Tensor, log_shift_M: Tensor) -> Tensor:
    """Solve for the tilt that moves the logarithm of each mean count by a given amount.

    Newton steps between bounds: a step out of them is replaced by half the way to the bound.

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
    with torch.autocast(log_p_MV.device.type, enabled=False):
        return _solve(log_p_MV.float(), count_V.float(), log_shift_M.float())


def _solve(log_p_MV: Tensor, count_V: Tensor, log_shift_M: Tensor) -> Tensor:
    log_count_V = torch.log1p(count_V)
    target_M = torch.log((log_p_MV.exp() @ count_V).clamp_min(1e-30)) + log_shift_M
    solved_M, open_M = log_shift_M.clone(), torch.arange(len(log_shift_M), device=log_shift_M.device)
    tilt_M, low_M, high_M = log_shift_M, torch.full_like(target_M, -_STEEPEST), torch.full_like(target_M, _STEEPEST)
    for _ in range(_MOST_STEPS):
        p_MV = torch.softmax(torch.addcmul(log_p_MV, tilt_M[:, None], log_count_V), -1)
        mean_M = (p_MV @ count_V).clamp_min(1e-30)
        # d log mean / d tilt = Cov(count, log(1 + count)) / mean, above 0
        slope_M = (p_MV @ (count_V * log_count_V)) / mean_M - p_MV @ log_count_V
        error_M = torch.log(mean_M) - target_M
        low_M = torch.where(error_M < 0, tilt_M, low_M)  # the mean rises with the tilt: keep the root between
        high_M = torch.where(error_M > 0, tilt_M, high_M)
        farthest_M = 2 + tilt_M.abs()
        newton_M = tilt_M - (error_M / slope_M.clamp_min(1e-9)).clamp(-farthest_M, farthest_M)
        inside_M = (newton_M > low_M) & (newton_M < high_M)
        close_M = error_M.abs() < _GOOD_ENOUGH  # a step too small to see must not become half the way to a bound
        tilt_M = torch.where(inside_M, newton_M, torch.where(close_M, tilt_M, (low_M + high_M) / 2))
        solved_M[open_M] = tilt_M
        unsolved = torch.nonzero(~close_M)[:, 0]
        if len(unsolved) == 0:
            break
        if len(unsolved) <= len(open_M) // 2:  # go on with the stubborn ones alone
            open_M, log_p_MV, target_M = open_M[unsolved], log_p_MV[unsolved], target_M[unsolved]
            tilt_M, low_M, high_M = tilt_M[unsolved], low_M[unsolved], high_M[unsolved]
    return torch.where(log_shift_M == 0, 0.0, solved_M)


def tilted(log_p_MV: Tensor, tilt_M: Tensor, count_V: Tensor) -> Tensor:
    """Tilt distributions: normalised log-probabilities, M × V."""
    return torch.log_softmax(log_p_MV + tilt_M[:, None] * torch.log1p(count_V), -1)
