"""A tilt moves the mean to where it is asked for, from any distribution, and the head's short cut gives the same."""

import math
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
from lingshu_cell.network.tilting import solve_tilt, tilted
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


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_mean_moves_by_the_factor_asked_for(name):
    """Both directions, as far as guidance may go with its default clip of 2 on log means."""
    factor_M = torch.tensor([0.136, 0.3, 0.5, 0.8, 0.99, 1.01, 1.25, 1.9])
    log_p_MV = log_of(DISTRIBUTIONS[name]).expand(len(factor_M), -1)
    tilt_M = solve_tilt(log_p_MV, COUNT_V, factor_M.log())
    reached_M = mean_of(tilted(log_p_MV, tilt_M, COUNT_V)) / mean_of(log_p_MV)
    np.testing.assert_allclose(reached_M, factor_M, rtol=1e-3)
    assert (tilt_M.sign() == factor_M.log().sign()).all()


@pytest.mark.parametrize("name", [n for n, p in DISTRIBUTIONS.items() if p[200:].sum() < 0.01 and "modes" not in n])
def test_means_rise_sevenfold_too(name):
    log_p_MV = log_of(DISTRIBUTIONS[name])[None]
    if name == "0 or 1, p(0) = .999":
        assert mean_of(tilted(log_p_MV, solve_tilt(log_p_MV, COUNT_V, torch.tensor([9.0])), COUNT_V)) > 0.998
    tilt_M = solve_tilt(log_p_MV, COUNT_V, torch.tensor([2.0]))
    np.testing.assert_allclose(mean_of(tilted(log_p_MV, tilt_M, COUNT_V)) / mean_of(log_p_MV), math.e**2, rtol=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31 - 1), st.floats(-2, 2), st.floats(0.1, 5))
def test_any_distribution_with_tails_reaches_any_mean_within_guidance(seed, log_shift, roughness):
    """Random smooth distributions on all tokens; together in one call, so that the hard ones do not stop the easy."""
    slope_M1 = torch.rand(20, 1, generator=rng(seed)) * 3
    rough_MV = torch.randn(20, N_EXPRESSION_TOKENS, generator=rng(seed + 1)) * roughness
    log_p_MV = torch.log_softmax(rough_MV - (slope_M1 + 2) * torch.log1p(COUNT_V), -1)
    shift_M = torch.full((20,), log_shift)
    reached_M = mean_of(tilted(log_p_MV, solve_tilt(log_p_MV, COUNT_V, shift_M), COUNT_V)) / mean_of(log_p_MV)
    np.testing.assert_allclose(reached_M, np.exp(log_shift), rtol=1e-3)


def test_a_log_normal_is_shifted_and_keeps_its_width():
    log_p_MV = log_of(log_normal(4, 0.5))[None]
    after_MV = tilted(log_p_MV, torch.tensor([1.0]), COUNT_V)
    z = torch.log1p(COUNT_V).double()
    moments = [
        (p @ z, (p @ z**2 - (p @ z) ** 2).sqrt()) for p in (log_p_MV[0].double().exp(), after_MV[0].double().exp())
    ]
    assert abs((moments[1][0] - moments[0][0]).item() - 0.25) < 0.01, "λ times the variance"
    assert abs((moments[1][1] - moments[0][1]).item()) < 0.01


def test_a_tilt_of_0_changes_nothing_and_a_shift_of_0_is_a_tilt_of_0():
    log_p_MV = torch.stack([log_of(p) for p in DISTRIBUTIONS.values()])
    assert torch.equal(solve_tilt(log_p_MV, COUNT_V, torch.zeros(len(log_p_MV))), torch.zeros(len(log_p_MV)))
    torch.testing.assert_close(tilted(log_p_MV, torch.zeros(len(log_p_MV)), COUNT_V), log_p_MV, rtol=0, atol=1e-5)


def test_an_impossible_mean_is_approached_and_nothing_is_nan():
    """One value only; and a mean above the largest count."""
    one_value = torch.full((1, N_EXPRESSION_TOKENS), -torch.inf).index_fill(1, torch.tensor([5]), 0.0)
    for log_p_MV, shift in ((one_value, 1.0), (one_value, -1.0), (log_of(poisson(3000))[None], 5.0)):
        after_MV = tilted(log_p_MV, solve_tilt(log_p_MV, COUNT_V, torch.tensor([shift])), COUNT_V)
        assert not after_MV.isnan().any()
    assert mean_of(after_MV) > 3800


def test_means_are_reached_in_full_precision_within_an_autocast():
    """Generation runs in the autocast of bf16 networks; three digits of bf16 would be no mean."""
    log_p_MV = torch.stack([log_of(negative_binomial(20, 2)), log_of(poisson(1))])
    shift_M = torch.tensor([0.7, -0.7])
    with torch.autocast("cpu", torch.bfloat16):
        tilt_M = solve_tilt(log_p_MV, COUNT_V, shift_M)
    assert torch.equal(tilt_M, solve_tilt(log_p_MV, COUNT_V, shift_M))


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
def gated(request) -> tuple[GatedDistribution, Positions, Tensor]:
    n_cells = 30
    distribution = head()(torch.randn(n_cells, WIDTH, generator=rng(7)))
    chosen_BG = torch.ones(n_cells, N_GENES, dtype=torch.bool)
    if request.param == "few positions":  # below 1 in 100 the head gathers rows
        chosen_BG = torch.zeros_like(chosen_BG)
        chosen_BG[torch.arange(10), torch.arange(10) * 4] = True
    positions = Positions.where(chosen_BG)
    shift_M = torch.linspace(-2, 2, len(positions))[torch.randperm(len(positions), generator=rng(8))]
    return distribution, positions, shift_M


@torch.no_grad()
def test_the_heads_means_are_those_of_all_tokens(gated):
    distribution, positions, _ = gated
    expected_M = Generic(distribution).log_mean(positions, COUNT_V)
    torch.testing.assert_close(distribution.log_mean(positions, COUNT_V), expected_M, rtol=0, atol=0.01)


@torch.no_grad()
def test_the_heads_tilts_are_those_of_all_tokens(gated):
    distribution, positions, shift_M = gated
    generic = Generic(distribution)
    short_M = distribution.tilts(positions, shift_M, COUNT_V)
    reached_M = mean_of(generic.tilted_log_probabilities(positions, short_M, COUNT_V)).log()
    wanted_M = mean_of(generic.log_probabilities(positions)).log() + shift_M
    np.testing.assert_allclose(reached_M, wanted_M, atol=0.02)
    torch.testing.assert_close(short_M, generic.tilts(positions, shift_M, COUNT_V), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_the_heads_tilted_draws_are_those_of_all_tokens(gated):
    distribution, positions, shift_M = gated
    tilt_M = distribution.tilts(positions, shift_M, COUNT_V)
    uniform_M2 = torch.rand(len(positions), 2, generator=rng(9))
    drawn_M = distribution.draw_tilted(positions, uniform_M2, tilt_M, COUNT_V)
    expected_M = Generic(distribution).draw_tilted(positions, uniform_M2, tilt_M, COUNT_V)
    assert (drawn_M != expected_M).float().mean() < 0.003
    assert ((drawn_M - expected_M).abs() <= 1).all(), "near ties only"


@torch.no_grad()
def test_a_light_tail_that_the_tilt_makes_heavy_is_seen():
    """Poisson 3 has 1e-7 of its mass at 16 and more; times 7 it has most of it there, and none at the last token."""
    network = GateHead(1, WIDTH, 8, 16, COUNT_V.double())
    network.initialise(rng(0))
    network.gene_GE.zero_()
    p_V = poisson(3)
    p_V[16:] = 1e-7 * poisson(20)[16:] / poisson(20)[16:].sum()
    network.start_at_frequencies(torch.from_numpy(1e9 * p_V[None]).float(), pseudocount=1e-3)
    distribution = network(torch.zeros(2000, WIDTH))
    positions = Positions.where(torch.ones(2000, 1, dtype=torch.bool))
    tilt_M = distribution.tilts(positions, torch.full((2000,), 2.0), COUNT_V)
    torch.testing.assert_close(
        tilt_M[:1], Generic(distribution).tilts(positions, torch.full((2000,), 2.0), COUNT_V)[:1]
    )
    drawn_M = distribution.draw_tilted(positions, torch.rand(2000, 2, generator=rng(3)), tilt_M, COUNT_V)
    wanted = mean_of(distribution.log_probabilities(positions))[0] * math.e**2
    counts_M = COUNT_V[drawn_M]
    assert abs(counts_M.mean() - wanted) < 4 * counts_M.std() / 2000**0.5


class Shifted(TiltedDistribution):
    """A stated shift at every position."""

    def __init__(self, base: CountDistribution, shift_BG: Tensor) -> None:
        super().__init__(base, COUNT_V)
        self.shift_BG = shift_BG

    def log_shift(self, positions: Positions) -> Tensor:
        return positions.of(self.shift_BG)


@torch.no_grad()
def test_a_tilted_distribution_scores_draws_and_reports_the_same_probabilities():
    distribution = head()(torch.randn(30, WIDTH, generator=rng(7)))
    shift_BG = torch.randn(30, N_GENES, generator=rng(4))
    shift_BG[:, ::3] = 0
    shifted = Shifted(distribution, shift_BG)
    everywhere = Positions.where(torch.ones(30, N_GENES, dtype=torch.bool))
    log_p_MV = shifted.log_probabilities(everywhere)
    torch.testing.assert_close(log_p_MV.exp().sum(1), torch.ones(len(everywhere)))
    x_0_BG = torch.randint(0, N_EXPRESSION_TOKENS, (30, N_GENES), generator=rng(5))
    expected_B = -log_p_MV.gather(1, x_0_BG.flatten()[:, None])[:, 0].view(30, N_GENES).sum(1)
    torch.testing.assert_close(shifted.nll(x_0_BG, torch.ones(30, N_GENES, dtype=torch.bool)), expected_B)
    uniform_M2 = torch.rand(len(everywhere), 2, generator=rng(6))
    drawn_M, untouched = shifted.draw(everywhere, uniform_M2), shift_BG.flatten() == 0
    assert torch.equal(drawn_M[untouched], distribution.draw(everywhere, uniform_M2)[untouched])
    expected_M = Generic(shifted).draw(everywhere, uniform_M2)
    assert (drawn_M != expected_M).float().mean() < 0.005


@torch.no_grad()
def test_a_shift_of_0_everywhere_draws_what_the_base_draws():
    distribution = head()(torch.randn(5, WIDTH, generator=rng(7)))
    everywhere = Positions.where(torch.ones(5, N_GENES, dtype=torch.bool))
    uniform_M2 = torch.rand(len(everywhere), 2, generator=rng(6))
    drawn_M = Shifted(distribution, torch.zeros(5, N_GENES)).draw(everywhere, uniform_M2)
    assert torch.equal(drawn_M, distribution.draw(everywhere, uniform_M2))
