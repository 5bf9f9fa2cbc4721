"""Rates are multiplied: means move as asked, negative binomials and Poissons exactly, and draws follow."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import TINY_SET, real_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.diffusion.tilt import TiltedDistribution
from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.network.gate_head import GatedDistribution, GateHead
from lingshu_cell.network.rates import dispersion, move, moved
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

COUNT_V = torch.from_numpy(token_midpoints()).float()
N_GENES, WIDTH = 120, 16


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_counts(pmf: np.ndarray) -> np.ndarray:
    """Probabilities of tokens from those of the counts 0, 1, …"""
    return np.bincount(encode(np.arange(len(pmf))), weights=pmf, minlength=N_EXPRESSION_TOKENS)


def negative_binomial(mean: float, theta: float) -> np.ndarray:
    return of_counts(stats.nbinom.pmf(np.arange(50_000), theta, theta / (theta + mean)))


def poisson(mean: float) -> np.ndarray:
    return of_counts(stats.poisson.pmf(np.arange(50_000), mean))


def log_normal(log_median: float, sd: float) -> np.ndarray:
    """A normal density of log(1 + count), cut into tokens."""
    z = np.log1p(token_midpoints())
    p = np.exp(-0.5 * ((z - log_median) / sd) ** 2) * np.gradient(z)
    return p / p.sum()


def zero_inflated(p: np.ndarray, share: float) -> np.ndarray:
    """Keep a share of a distribution, the rest is 0."""
    inflated = share * p
    inflated[0] += 1 - share
    return inflated


def narrow(token: int, spread: float) -> np.ndarray:
    p = np.full(N_EXPRESSION_TOKENS, 1e-12)
    p[[token - 1, token, token + 1]] = spread / 2, 1 - spread, spread / 2
    return p / p.sum()


DISTRIBUTIONS = {
    "negative binomial": negative_binomial(20, 2),
    "negative binomial, rare": negative_binomial(0.05, 0.3),
    "negative binomial, wide": negative_binomial(300, 0.5),
    "Poisson 1": poisson(1),
    "Poisson .001": poisson(0.001),
    "Poisson 50": poisson(50),
    "log-normal": log_normal(3, 1),
    "log-normal, narrow": log_normal(4, 0.1),
    "log-normal, few": log_normal(0.5, 0.5),
    "p(0) = .999 of a negative binomial": zero_inflated(negative_binomial(50, 2), 0.001),
    "p(0) = .999 of a Poisson": zero_inflated(poisson(1), 0.001),
    "0 or 1, p(0) = .999": zero_inflated(np.eye(N_EXPRESSION_TOKENS)[1], 0.001),
    "nearly one value": narrow(7, 0.01),
    "two modes": 0.5 * poisson(1) + 0.5 * poisson(500),
    "two modes, one rare": 0.999 * poisson(0.5) + 0.001 * poisson(2000),
}


def mean_of(log_p_MV: Tensor) -> Tensor:
    return log_p_MV.double().exp() @ COUNT_V.double()


def log_of(p_V: np.ndarray) -> Tensor:
    return torch.from_numpy(p_V / p_V.sum()).log().float()


def two_modes(low: float, high: float) -> np.ndarray:
    return 0.5 * negative_binomial(low, 5) + 0.5 * negative_binomial(high, 5)


def times(before_V: np.ndarray, factor: float) -> np.ndarray:
    return moved(log_of(before_V)[None], torch.tensor([factor]).log(), COUNT_V)[0].double().exp().numpy()


def moments(p_V: np.ndarray) -> tuple[float, float, float]:
    """Probability of 0, mean, variance."""
    count_V = COUNT_V.double().numpy()
    mean = p_V @ count_V
    return p_V[0], mean, p_V @ count_V**2 - mean**2


RATES_TIMES = {  # a distribution, the factor, and the same with its rates multiplied
    "NB 20": (negative_binomial(20, 2), 0.5, negative_binomial(10, 2)),
    "NB 50, narrow": (negative_binomial(50, 10), 0.5, negative_binomial(25, 10)),
    "NB 50, 2 in 10,000 zero": (zero_inflated(negative_binomial(50, 10), 0.9998), 0.5,
                                zero_inflated(negative_binomial(25, 10), 0.9998)),
    "half of NB 5 zero": (zero_inflated(negative_binomial(5, 2), 0.5), 0.3,
                          zero_inflated(negative_binomial(1.5, 2), 0.5)),
    "two modes": (two_modes(1, 30), 0.5, two_modes(0.5, 15)),
    "rare": (negative_binomial(0.05, 0.3), 0.2, negative_binomial(0.01, 0.3)),
    "Poisson 3": (poisson(3), 0.9, poisson(2.7)),
    "NB 300, wide": (negative_binomial(300, 0.5), 0.2, negative_binomial(60, 0.5)),
    "NB 20 up": (negative_binomial(20, 2), 2.0, negative_binomial(40, 2)),
    "NB 20 up, narrow": (negative_binomial(20, 10), 2.0, negative_binomial(40, 10)),
    "rare up": (negative_binomial(0.05, 0.3), 4.0, negative_binomial(0.2, 0.3)),
    "Poisson .5 up": (poisson(0.5), 4.0, poisson(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES_TIMES)
def test_moved_is_what_other_rates_give(name):
    before_V, factor, expected_V = RATES_TIMES[name]
    after_V, expected_V = times(before_V, factor), expected_V / expected_V.sum()
    assert 0.5 * np.abs(after_V - expected_V).sum() < 1e-3
    for found, expected in zip(moments(after_V), moments(expected_V), strict=True):
        assert found == pytest.approx(expected, rel=5e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("before_V", "expected_V", "most"),
    [
        (zero_inflated(negative_binomial(20, 2), 0.5), zero_inflated(negative_binomial(40, 2), 0.5), 0.07),
        (two_modes(1, 30), two_modes(2, 60), 0.13),
        ((1 - 1e-5) * negative_binomial(0.05, 2) + 1e-5 * negative_binomial(800, 2),
         (1 - 1e-5) * negative_binomial(0.1, 2) + 1e-5 * negative_binomial(1600, 2), 0.03),
    ],
    ids=["half zeros", "two modes", "one in 100,000 far out"],
)  # fmt: skip
def test_growth_of_other_mixtures_is_near(before_V, expected_V, most):
    """An exponential tilt along log counts is .38, .54 and .04 away in total variation."""
    assert 0.5 * np.abs(times(before_V, 2.0) - expected_V / expected_V.sum()).sum() < most


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_mean_moves_by_the_factor_asked_for(name):
    """Both directions, as far as guidance may go with its default clip of 2 on log means."""
    factor_M = torch.tensor([0.136, 0.8, 1.9])
    log_p_MV = log_of(DISTRIBUTIONS[name]).expand(len(factor_M), -1)
    reached_M = mean_of(moved(log_p_MV, factor_M.log(), COUNT_V)) / mean_of(log_p_MV)
    np.testing.assert_allclose(reached_M, factor_M, rtol=1e-2)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.floats(-2, 2), st.floats(0.1, 2))
def test_any_distribution_reaches_any_mean_within_guidance(seed, log_shift, roughness):
    """Random distributions on the tokens below 100."""
    slope_M1 = torch.rand(6, 1, generator=rng(seed)) * 3
    rough_MV = torch.randn(6, 100, generator=rng(seed + 1)) * roughness
    log_p_MV = torch.log_softmax(rough_MV - (slope_M1 + 1) * torch.log1p(COUNT_V[:100]), -1)
    log_p_MV = torch.cat([log_p_MV, torch.full((6, N_EXPRESSION_TOKENS - 100), -torch.inf)], 1)
    reached_M = mean_of(moved(log_p_MV, torch.full((6,), log_shift), COUNT_V)) / mean_of(log_p_MV)
    np.testing.assert_allclose(reached_M, np.exp(log_shift), rtol=5e-3)


def test_a_factor_of_1_changes_nothing():
    log_p_MV = torch.stack([log_of(p) for p in DISTRIBUTIONS.values()])
    same_MV = moved(log_p_MV, torch.zeros(len(log_p_MV)), COUNT_V)
    torch.testing.assert_close(same_MV.exp(), log_p_MV.exp(), rtol=1e-5, atol=1e-8)


def test_an_impossible_mean_is_approached_and_nothing_is_nan():
    """One value only; and a mean above the largest count."""
    one_value = torch.full((1, N_EXPRESSION_TOKENS), -torch.inf).index_fill(1, torch.tensor([5]), 0.0)
    for log_p_MV, shift in ((one_value, 1.0), (one_value, -1.0), (log_of(poisson(3000))[None], 5.0)):
        after_MV = moved(log_p_MV, torch.tensor([shift]), COUNT_V)
        assert not after_MV.isnan().any()
        token_M = torch.full((50,), int(log_p_MV[0].argmax()))
        log_mean_M, log_p_zero_M = mean_of(log_p_MV).log().expand(50), log_p_MV[:, 0].expand(50)
        uniform_M = torch.arange(50) / 50
        drawn_M = move(token_M, torch.full((50,), shift), uniform_M, log_mean_M, log_p_zero_M, COUNT_V)
        assert drawn_M.min() >= 0 and drawn_M.max() <= 280
    assert mean_of(after_MV) > 10_000 and drawn_M.min() == 280


def test_an_autocast_around_changes_nothing():
    """Generation runs in the autocast of bf16 networks; three digits of bf16 would be no mean."""
    log_p_MV = torch.stack([log_of(negative_binomial(20, 2)), log_of(poisson(1))])
    shift_M = torch.tensor([0.7, -0.7])
    given = (torch.tensor([30, 2]), shift_M, torch.tensor([0.4, 0.7]), mean_of(log_p_MV).log(), log_p_MV[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = moved(log_p_MV, shift_M, COUNT_V), move(*given, COUNT_V)
    assert torch.equal(inside[0], moved(log_p_MV, shift_M, COUNT_V)) and torch.equal(inside[1], move(*given, COUNT_V))


def test_dispersion_is_that_of_negative_binomials():
    mean, theta = (torch.tensor(x, dtype=torch.float64) for x in ([20.0, 0.05, 300.0, 1.0], [2.0, 0.3, 0.5, 30.0]))
    np.testing.assert_allclose(dispersion(mean.log(), -theta * torch.log1p(mean / theta)), theta, rtol=1e-4)
    assert dispersion(torch.zeros(1), torch.tensor([-1.5]))[0] > 9e5, "fewer zeros than a Poisson: taken for one"


def test_rows_are_moved_each_by_its_own_and_thinned_twice_is_once_with_the_product():
    log_p_MV = torch.stack([log_of(p) for p in (poisson(3), negative_binomial(9, 2), negative_binomial(0.05, 0.3))])
    keep_M = torch.tensor([0.15, 0.5, 0.95])
    together_MV = moved(log_p_MV, keep_M.log(), COUNT_V)
    for row, (log_p_V, keep) in enumerate(zip(log_p_MV, keep_M, strict=True)):
        torch.testing.assert_close(together_MV[row], moved(log_p_V[None], keep.log()[None], COUNT_V)[0])
    twice_MV = moved(moved(log_p_MV, keep_M.log() / 2, COUNT_V), keep_M.log() / 2, COUNT_V)
    torch.testing.assert_close(twice_MV.exp(), together_MV.exp(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("count", "factor"), [(1, 0.3), (6, 0.5), (99, 0.05), (104, 0.9), (2000, 0.25),
                                               (0, 2.0), (3, 1.5), (40, 3.0), (104, 7.0)])  # fmt: skip
def test_one_count_moves_as_its_binomial_or_negative_binomial_says(count, factor):
    """Evenly spread uniforms give every result its share."""
    n, mean, theta = 4000, 20.0, 2.0
    token = int(encode(np.array([count]))[0])
    given = [torch.full((n,), float(x)) for x in (np.log(factor), np.log(mean), -theta * np.log1p(mean / theta))]
    moved_M = move(torch.full((n,), token), given[0], (torch.arange(n) + 0.5) / n, *given[1:], COUNT_V).numpy()
    count_K, share_K = np.arange(20_000), np.zeros(20_000)
    inside = np.flatnonzero(encode(count_K) == token)
    for before in inside:
        odds = (factor - 1) * mean / (mean + theta)
        after = stats.binom(before, factor) if factor < 1 else stats.nbinom(before + theta, 1 / (1 + odds), before)
        share_K += after.pmf(count_K) / len(inside)
    expected_V = np.bincount(encode(count_K), weights=share_K, minlength=N_EXPRESSION_TOKENS)
    assert np.abs(np.bincount(moved_M, minlength=N_EXPRESSION_TOKENS) / n - expected_V).max() < 12 / n


@lru_cache
def head() -> GateHead:
    """A head that knows the frequencies of real genes, with random tilts for each cell."""
    tokens = encode(real_cells(900, N_GENES).X.toarray().astype(np.int64))
    counts_GV = np.stack([np.bincount(gene, minlength=N_EXPRESSION_TOKENS) for gene in tokens.T])
    network = GateHead(N_GENES, WIDTH, TINY_SET["gene_width"], 16, COUNT_V.double())
    network.initialise(rng(0))
    network.start_at_frequencies(torch.from_numpy(counts_GV))
    with torch.no_grad():
        for parameter in (network.gene_GE, network.small_query.weight, network.tail_query.weight):
            parameter.add_(torch.randn(parameter.shape, generator=rng(len(parameter))) * 0.1)
    return network


class Generic(CountDistribution):
    """The same distribution by the general way over all 281 tokens."""

    def __init__(self, base: CountDistribution) -> None:
        self.base = base

    def nll(self, x_0_BG, scored_BG):
        return self.base.nll(x_0_BG, scored_BG)

    def log_probabilities(self, positions):
        return self.base.log_probabilities(positions)


@pytest.fixture(scope="module", params=["many positions", "few positions"])
def gated(request) -> tuple[GatedDistribution, Positions]:
    n_cells = 30
    distribution = head()(torch.randn(n_cells, WIDTH, generator=rng(7)))
    chosen_BG = torch.ones(n_cells, N_GENES, dtype=torch.bool)
    if request.param == "few positions":  # below 1 in 100 the head gathers rows
        chosen_BG = torch.zeros_like(chosen_BG)
        chosen_BG[torch.arange(10), torch.arange(10) * 4] = True
    positions = Positions.where(chosen_BG)
    return distribution, positions


@torch.no_grad()
def test_the_heads_means_are_those_of_all_tokens(gated):
    distribution, positions = gated
    expected_M = Generic(distribution).log_mean(positions, COUNT_V)
    torch.testing.assert_close(distribution.log_mean(positions, COUNT_V), expected_M, rtol=0, atol=0.01)
    expected_M = Generic(distribution).log_p_zero(positions)
    torch.testing.assert_close(distribution.log_p_zero(positions), expected_M)


class Shifted(TiltedDistribution):
    """A stated shift at every position."""

    def __init__(self, base: CountDistribution, shift_BG: Tensor) -> None:
        super().__init__(base, COUNT_V)
        self.shift_BG = shift_BG

    def log_shift(self, positions: Positions) -> Tensor:
        return positions.of(self.shift_BG)


def shares_agree(drawn_M: np.ndarray, p_V: np.ndarray) -> None:
    expected_V = len(drawn_M) * p_V / p_V.sum()
    common = expected_V >= 5
    found_V = np.bincount(drawn_M, minlength=N_EXPRESSION_TOKENS)
    found, expected = (np.append(x[common], x[~common].sum()) for x in (found_V, expected_V))
    assert stats.chisquare(found, expected).pvalue > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("n", [8, 4000], ids=["few positions", "many positions"])
@pytest.mark.parametrize("sign", [-1, 1], ids=["fewer", "more"])
def test_draws_of_the_head_follow_the_moved_probabilities(n, sign):
    """Five genes from the most to the least expressed: gate, small values and tail are drawn, then moved."""
    distribution = head()(torch.randn(1, WIDTH, generator=rng(7)).expand(n, -1))
    everywhere = Positions.where(torch.ones(1, N_GENES, dtype=torch.bool))
    genes = torch.argsort(distribution.log_mean(everywhere, COUNT_V), descending=True)[[0, 2, 5, 20, 60]]
    shift_BG = torch.zeros(n, N_GENES)
    shift_BG[:, genes] = sign * torch.tensor([0.2, 0.7, 1.0, 0.4, 1.5])
    shifted = Shifted(distribution, shift_BG)
    positions = Positions.where(shift_BG != 0)
    first = positions[torch.arange(5)]
    p_GV = shifted.log_probabilities(first).double().exp().numpy()
    drawn = [shifted.draw(positions, torch.rand(5 * n, 2, generator=rng(i))).view(n, 5) for i in range(4000 // n)]
    before_G = distribution.log_mean(first, COUNT_V).exp().numpy()
    np.testing.assert_allclose(p_GV @ COUNT_V.double().numpy(), before_G * first.of(shift_BG).exp().numpy(), rtol=0.01)
    for g, drawn_M in enumerate(torch.cat(drawn).T.numpy()):
        shares_agree(drawn_M, p_GV[g])


@torch.no_grad()
def test_a_moved_distribution_scores_its_probabilities_and_leaves_the_rest_as_it_is():
    distribution = head()(torch.randn(6, WIDTH, generator=rng(7)))
    shift_BG = torch.randn(6, N_GENES, generator=rng(4)) * (torch.rand(6, N_GENES, generator=rng(5)) < 0.05)
    shifted = Shifted(distribution, shift_BG)
    everywhere = Positions.where(torch.ones(6, N_GENES, dtype=torch.bool))
    log_p_MV = shifted.log_probabilities(everywhere)
    torch.testing.assert_close(log_p_MV.exp().sum(1), torch.ones(len(everywhere)))
    x_0_BG = torch.randint(0, N_EXPRESSION_TOKENS, (6, N_GENES), generator=rng(5))
    x_0_BG[shift_BG != 0] = 1  # what is beyond all possible counts has probability 0
    expected_B = -log_p_MV.gather(1, x_0_BG.flatten()[:, None])[:, 0].view(6, N_GENES).sum(1)
    torch.testing.assert_close(shifted.nll(x_0_BG, torch.ones(6, N_GENES, dtype=torch.bool)), expected_B)
    uniform_M2, shift_M = torch.rand(len(everywhere), 2, generator=rng(6)), shift_BG.flatten()
    drawn_M, plain_M = shifted.draw(everywhere, uniform_M2), distribution.draw(everywhere, uniform_M2)
    assert torch.equal(drawn_M[shift_M == 0], plain_M[shift_M == 0])
    assert (drawn_M <= plain_M)[shift_M < 0].all() and (drawn_M >= plain_M)[shift_M > 0].all()
    assert (drawn_M != plain_M).any()


@torch.no_grad()
def test_shifts_upon_shifts_are_added_up():
    """Up by guidance and down by a prior is the net of both."""
    distribution = head()(torch.randn(6, WIDTH, generator=rng(7)))
    everywhere = Positions.where(torch.ones(6, N_GENES, dtype=torch.bool))
    up_BG, down_BG = torch.full((6, N_GENES), 0.8), torch.full((6, N_GENES), -0.8)
    down_BG[:, ::2] = -1.5
    uniform_M2 = torch.rand(len(everywhere), 2, generator=rng(2))
    drawn_M = Shifted(Shifted(distribution, up_BG), down_BG).draw(everywhere, uniform_M2)
    assert torch.equal(drawn_M, Shifted(distribution, up_BG + down_BG).draw(everywhere, uniform_M2))
    unmoved = everywhere.gene_M % 2 == 1
    assert torch.equal(drawn_M[unmoved], distribution.draw(everywhere, uniform_M2)[unmoved])
