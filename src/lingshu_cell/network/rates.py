r"""Multiply the rates behind a count distribution by a factor f, and leave all else about it as it is.

A count is taken for a Poisson draw of a rate that varies from cell to cell. Fewer: every molecule stays with
probability f,

.. math:: k \mid n \sim \mathrm{Binomial}(n, f) \quad (f < 1).

More: the rate behind a count n is guessed, and what a rate (f - 1) times as high brings is added,

.. math:: k - n \mid n \sim \mathrm{Poisson}((f - 1) \lambda), \quad \lambda \mid n \sim \mathrm{Gamma}(n + \theta,
          \text{mean } (n + \theta) \mu / (\mu + \theta)) \quad (f > 1).

Thinning multiplies the rates of any mixture of Poissons exactly, with extra zeros or several modes too. Growth does so
for a negative binomial of dispersion θ, and moves every mean exactly; θ is taken from mean and probability of 0, which
a negative binomial ties together. Exponential tilts, of counts, log counts or logits, instead multiply the odds of zero
or let the upper tail take over (docs/log.md has the comparison).

A token that stands for several counts is taken for any of them when it is drawn, and for its middle where whole
distributions are looked at.

Shapes: M positions, V tokens, N counts before, K counts after.
"""

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 256
_NO_MASS = 1e-9  # probability of a token below which nothing is expected of it
_IMPOSSIBLE = 1e-30  # stands for probability 0
_DISPERSION = (1e-6, 1e6)  # from gene in a few cells only to Poisson
_LAST = 20_000  # counts above are one token


def move(
    token_M: Tensor, log_factor_M: Tensor, uniform_M: Tensor, log_mean_M: Tensor, log_p_zero_M: Tensor, count_V: Tensor
) -> Tensor:
    """Thin or grow drawn tokens, by inverse distribution functions.

    Parameters
    ----------
    token_M
        Expression tokens.
    log_factor_M
        Wanted change of the log mean.
    uniform_M
        Uniforms in [0, 1), independent of the tokens.
    log_mean_M, log_p_zero_M
        Of the distributions that the tokens were drawn from.
    count_V
        Expected count of each token: the middle of its bin.

    Returns
    -------
    Tensor
        Tokens, int64, shape M.
    """
    first_V = _first_counts(count_V)
    inside_M = uniform_M.double() * (2 * (count_V.double() - first_V) + 1)[token_M]  # times the width of the bin
    count_M, uniform_M = first_V[token_M] + inside_M.floor(), inside_M % 1
    factor_M, moved_M = log_factor_M.double().exp(), count_M.clone()
    fewer = torch.nonzero((factor_M < 1) & (count_M > 0))[:, 0]
    for some, width in _by_width(fewer, count_M[fewer] + 1):
        cdf_MK = _binomial(count_M[some], factor_M[some], width).cumsum(1)
        moved_M[some] = torch.searchsorted(cdf_MK, uniform_M[some, None], right=True)[:, 0].double()
    moved_M = torch.minimum(moved_M, torch.where(factor_M < 1, count_M, torch.inf))
    size_M, odds_M = _growth(count_M, factor_M, log_mean_M, log_p_zero_M)
    more = torch.nonzero((factor_M > 1) & (uniform_M >= (1 + odds_M) ** -size_M))[:, 0]
    for some, width in _by_width(more, _width(size_M[more], odds_M[more])):
        cdf_MK = _negative_binomial(size_M[some], odds_M[some], width).cumsum(1)
        moved_M[some] += torch.searchsorted(cdf_MK, uniform_M[some, None], right=True)[:, 0].double()
    return _token_of(moved_M, count_V)


def moved(log_p_MV: Tensor, log_factor_M: Tensor, count_V: Tensor) -> Tensor:
    """Thin or grow distributions: log-probabilities of all tokens afterwards, float32, M × V.

    All counts before and after are summed over: for distributions to be looked at, not for drawing.
    """
    p_MV, middle_V = log_p_MV.double().exp(), count_V.double()
    log_mean_M, log_p_zero_M = torch.log((p_MV * middle_V).sum(1).clamp_min(1e-30)), log_p_MV[:, 0]
    p_MV, factor_M = torch.where(p_MV > _NO_MASS, p_MV, 0.0), log_factor_M.double().exp()
    after_MV = log_p_MV.float().clone()
    highest_M = ((p_MV > 0) * torch.arange(p_MV.shape[1], device=p_MV.device)).amax(1)
    for grows in (False, True):
        chosen = torch.nonzero((factor_M > 1) if grows else (factor_M < 1))[:, 0]
        for m in chosen[torch.argsort(highest_M[chosen])].split(64):
            tokens = torch.nonzero((p_MV[m] > 0).any(0))[:, 0]
            count_N = torch.cat([middle_V[tokens].floor(), middle_V[tokens].ceil()])
            for one in m.tolist():
                before_N = 0.5 * p_MV[one, tokens].repeat(2)
                kept = before_N > 0
                given_NK = _kernel(count_N[kept], factor_M[one], log_mean_M[one], log_p_zero_M[one])
                counts_K = torch.arange(given_NK.shape[1], device=p_MV.device).double()
                after_K = before_N[kept] @ given_NK
                after_V = torch.zeros_like(p_MV[one]).index_add(0, _token_of(counts_K, count_V), after_K)
                after_MV[one] = torch.log((after_V / after_V.sum()).clamp_min(_IMPOSSIBLE)).float()
    return after_MV


def dispersion(log_mean_M: Tensor, log_p_zero_M: Tensor) -> Tensor:
    """Solve p(0) = (1 + μ/θ)^-θ for θ, the dispersion of a negative binomial; float64, shape M."""
    mean_M, wanted_M = log_mean_M.double().exp(), -log_p_zero_M.double()
    low_M, high_M = (torch.full_like(mean_M, bound).log() for bound in _DISPERSION)
    for _ in range(40):
        half_M = (low_M + high_M) / 2
        theta_M = half_M.exp()
        below_M = theta_M * torch.log1p(mean_M / theta_M) < wanted_M  # rises with θ, up to the mean: Poisson
        low_M, high_M = torch.where(below_M, half_M, low_M), torch.where(below_M, high_M, half_M)
    return ((low_M + high_M) / 2).exp()


def _growth(count_M: Tensor, factor_M: Tensor, log_mean_M: Tensor, log_p_zero_M: Tensor) -> tuple[Tensor, Tensor]:
    """Size of the negative binomial that is added to each count, and its mean over its size."""
    theta_M, mean_M = dispersion(log_mean_M, log_p_zero_M), log_mean_M.double().exp()
    return count_M + theta_M, (factor_M - 1).clamp_min(0) * mean_M / (mean_M + theta_M)


def _width(size_M: Tensor, odds_M: Tensor) -> Tensor:
    """How far a negative binomial's distribution function has to be followed."""
    mean_M = size_M * odds_M
    return (mean_M + 10 * (mean_M * (1 + odds_M)).sqrt() + 25 * (1 + odds_M)).ceil().clamp_max(_LAST)


def _by_width(rows: Tensor, width_M: Tensor) -> list[tuple[Tensor, int]]:
    """Put rows of like width together, few enough at once for memory."""
    order, pieces, at = torch.argsort(width_M), [], 0
    rows, widths = rows[order], width_M[order].long().tolist()
    while at < len(rows):
        end = min(at + _ROWS_AT_ONCE, len(rows))
        end = min(end, at + max(1, _ELEMENTS_AT_ONCE // widths[end - 1]))
        pieces.append((rows[at:end], widths[end - 1]))
        at = end
    return pieces


def _kernel(count_N: Tensor, factor: Tensor, log_mean: Tensor, log_p_zero: Tensor) -> Tensor:
    """Probability of every count after, given each count before, float64, N × K."""
    factor_N = factor.expand(len(count_N))
    if factor < 1:
        return _binomial(count_N, factor_N, int(count_N.max()) + 1)
    size_N, odds_N = _growth(count_N, factor_N, log_mean.expand(len(count_N)), log_p_zero.expand(len(count_N)))
    added_NK = _negative_binomial(size_N, odds_N, int(_width(size_N, odds_N).max()))
    added_NK[:, -1] += (1 - added_NK.sum(1)).clamp_min(0)  # beyond the last count
    given_NK = torch.zeros(len(count_N), int(count_N.max()) + added_NK.shape[1], dtype=torch.float64)
    place_NK = count_N.long()[:, None] + torch.arange(added_NK.shape[1], device=count_N.device)
    return given_NK.to(count_N.device).scatter(1, place_NK, added_NK)


def _binomial(count_M: Tensor, keep_M: Tensor, width: int) -> Tensor:
    """Binomial(count, keep) at 0 … width - 1, float64, M × K."""
    k_K = torch.arange(width, device=count_M.device, dtype=torch.float64)
    log_factorial_K = torch.lgamma(k_K + 1)
    lost_MK = count_M[:, None] - k_K
    log_choose_MK = log_factorial_K[count_M.long()][:, None] - log_factorial_K
    log_choose_MK = log_choose_MK - log_factorial_K[lost_MK.clamp(0, width - 1).long()]
    log_p_MK = log_choose_MK + k_K * keep_M.log()[:, None] + lost_MK * torch.log1p(-keep_M)[:, None]
    return torch.where(lost_MK >= 0, log_p_MK, -torch.inf).exp()


def _negative_binomial(size_M: Tensor, odds_M: Tensor, width: int) -> Tensor:
    """Negative binomial of a size and a mean of odds · size at 0 … width - 1, float64, M × K."""
    k_K = torch.arange(width, device=size_M.device, dtype=torch.float64)
    log_p_MK = torch.lgamma(k_K + size_M[:, None]) - torch.lgamma(size_M)[:, None] - torch.lgamma(k_K + 1)
    log_p_MK = log_p_MK + k_K * torch.log(odds_M / (1 + odds_M))[:, None] - (size_M * torch.log1p(odds_M))[:, None]
    return log_p_MK.exp()


def _token_of(count_M: Tensor, count_V: Tensor) -> Tensor:
    """Token of each count."""
    return torch.searchsorted(_first_counts(count_V), count_M, right=True) - 1


def _first_counts(count_V: Tensor) -> Tensor:
    """Smallest count of each token: a bin begins where the one before it, of which the middle is known, ends."""
    doubled_V = 2 * count_V.double() + 1
    sign_V = 1 - 2 * (torch.arange(len(count_V), device=count_V.device) % 2)
    return -sign_V * torch.cat([torch.zeros_like(doubled_V[:1]), torch.cumsum(sign_V * doubled_V, 0)[:-1]])
