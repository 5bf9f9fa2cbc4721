"""Guidance is the denoiser at 1 and the reference at 0; beyond, log means move as stated, or all logits do."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import TINY_SET
from oracle import N_GENES, STATES, Oracle, TableDistribution, random_joint, state_counts
from scipy import special, stats
from torch import Tensor

from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.diffusion.guidance import GuidedDenoiser
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import CountDistribution, Denoiser, DenoisingFunction, Positions
from lingshu_cell.network.set_denoiser import SetDenoiser
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

COUNT_V = torch.from_numpy(token_midpoints()).float()
N_CELLS = 20_000


class Fixed(CountDistribution):
    """The same categorical everywhere."""

    def __init__(self, log_p_V: Tensor) -> None:
        self.log_p_V = log_p_V

    def nll(self, x_0_BG, scored_BG):
        return -(self.log_p_V[x_0_BG.long()] * scored_BG).sum(1)

    def log_probabilities(self, positions):
        return self.log_p_V.expand(len(positions), -1)


def negative_binomial(mean: float, theta: float) -> Tensor:
    """Log-probabilities of tokens."""
    count = np.arange(20_000)
    log_pmf, token = stats.nbinom.logpmf(count, theta, theta / (theta + mean)), encode(count)
    return torch.from_numpy(np.array([special.logsumexp(log_pmf[token == t]) for t in range(N_EXPRESSION_TOKENS)]))


ASKED, REFERENCE = Conditions(torch.tensor([[2]])), Conditions(torch.tensor([[1]]))


def two_branches(asked_V: Tensor, reference_V: Tensor) -> Denoiser:
    """A denoiser that knows one gene and two categories: 1 is the reference."""
    table = {1: Fixed(reference_V.float()), 2: Fixed(asked_V.float())}
    return DenoisingFunction(lambda x_t_BG, conditions: table[int(Conditions.of(conditions).category_BC[0, 0])])


def mean_of(log_p_MV: Tensor) -> Tensor:
    return log_p_MV.double().exp() @ COUNT_V.double()


HIDDEN, ONE = torch.full((1, 1), MASK_TOKEN), Positions(torch.tensor([0]), torch.tensor([0]))


def guided(denoiser: Denoiser, scale: float, space: str, **options) -> CountDistribution:
    return GuidedDenoiser(denoiser, REFERENCE, scale, space, COUNT_V, **options)(HIDDEN, ASKED)


def test_an_overdispersed_gene_goes_where_it_should_by_its_mean_and_explodes_by_logits():
    """NB θ = 2 from 20 to 40 UMI with w = 1. By the mean, the fold change doubles: 80. By logits, success probabilities
    combine to q = (20/21)² / (10/11), again a negative binomial, of mean 2 q / (1 - q) = 880; on tokens, whose bins are
    coarse and end at 10,000, of 719.
    """
    denoiser = two_branches(negative_binomial(40, 2), negative_binomial(20, 2))
    by_mean, by_logits = (guided(denoiser, 2.0, space).log_probabilities(ONE) for space in ("log-mean", "logits"))
    assert mean_of(by_mean).item() == pytest.approx(80, rel=2e-3)
    q = (20 / 21) ** 2 / (10 / 11)
    assert 2 * q / (1 - q) == pytest.approx(880)
    assert mean_of(by_logits).item() == pytest.approx(719, rel=0.01)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(("asked", "reference"), [(40, 20), (0.02, 0.05), (300, 250), (1, 4)])
def test_the_mean_is_multiplied_by_the_ratio_to_a_power(scale, asked, reference):
    denoiser = two_branches(negative_binomial(asked, 2), negative_binomial(reference, 1.5))
    means = [mean_of(negative_binomial(mean, theta)[None]) for mean, theta in ((asked, 2), (reference, 1.5))]
    expected = means[0] * (means[0] / means[1]) ** (scale - 1)
    found = mean_of(guided(denoiser, scale, "log-mean", clip=10.0).log_probabilities(ONE))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_the_change_of_a_log_mean_is_clipped(clip):
    for asked, reference, sign in ((40, 2, 1), (2, 40, -1)):
        denoiser = two_branches(negative_binomial(asked, 2), negative_binomial(reference, 2))
        reached = mean_of(guided(denoiser, 2.0, "log-mean", clip=clip).log_probabilities(ONE))
        assert reached.log().item() == pytest.approx(np.log(asked) + sign * clip, abs=2e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_logits_are_those_of_the_paper_on_all_tokens(scale):
    asked_V, reference_V = negative_binomial(30, 3), negative_binomial(25, 2)
    found = guided(two_branches(asked_V, reference_V), scale, "logits").log_probabilities(ONE)[0].double()
    expected = torch.log_softmax(reference_V + scale * (asked_V - reference_V), 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-3, atol=1e-6)


def test_logits_of_tokens_that_cannot_be_are_not_nan():
    impossible = torch.full((N_EXPRESSION_TOKENS,), -torch.inf).index_fill(0, torch.tensor([0, 3]), np.log(0.5))
    other = torch.full((N_EXPRESSION_TOKENS,), -torch.inf).index_fill(0, torch.tensor([0, 2]), np.log(0.5))
    for scale, wanted in ((0.0, other), (1.0, impossible), (2.0, impossible)):
        p_V = guided(two_branches(impossible, other), scale, "logits").log_probabilities(ONE)[0].exp()
        torch.testing.assert_close(p_V[3] > 0.4, wanted[3].exp() > 0.4)
        assert p_V.sum().item() == pytest.approx(1)


@lru_cache
def network() -> SetDenoiser:
    """A tiny network whose genes range from rare to many and whose categories matter."""
    made = SetDenoiser(50, (3,), COUNT_V.double(), **TINY_SET | {"dropout": 0.0}, n_small_values=16,
                       generator=torch.Generator().manual_seed(0))  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = encode(rng.negative_binomial(2, 2 / (2 + np.geomspace(0.01, 60, 50)), (3000, 50)))
    made.start_at_frequencies(torch.from_numpy(np.stack([np.bincount(t, minlength=281) for t in tokens.T])))
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made.eval()


def of_all(n: int, category: int) -> Conditions:
    return Conditions(torch.full((n, 1), category))


def everywhere(n: int) -> Positions:
    return Positions.where(torch.ones(n, 50, dtype=torch.bool))


def half_visible(n: int) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    x_BG = torch.poisson(torch.full((n, 50), 2.0), generator=rng).int()
    return torch.where(torch.rand(n, 50, generator=rng) < 0.5, x_BG, MASK_TOKEN)


@torch.no_grad()
@pytest.mark.parametrize("space", ["log-mean", "logits"])
def test_1_is_the_denoiser_and_0_the_reference(space):
    x_BG, asked, reference = half_visible(6), of_all(6, 2), of_all(6, 1)
    plain, other = (network()(x_BG, c).log_probabilities(everywhere(6)) for c in (asked, reference))
    at_1, at_0 = (
        GuidedDenoiser(network(), reference, s, space, COUNT_V, clip=20.0)(x_BG, asked).log_probabilities(everywhere(6))
        for s in (1.0, 0.0)
    )
    torch.testing.assert_close(at_1, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean_of(at_0), mean_of(other), rtol=0.01, atol=1e-6)
    if space == "logits":
        torch.testing.assert_close(at_0, other, rtol=1e-3, atol=1e-3)
    assert (mean_of(plain) / mean_of(other)).log().abs().max() > 0.1, "the branches differ"


@torch.no_grad()
@pytest.mark.parametrize("space", ["log-mean", "logits"])
def test_draws_follow_the_guided_probabilities(space):
    """Frequencies of 0 and of 1, and means, of 50 genes."""
    n = 1500
    asked, reference = of_all(n, 2), of_all(n, 1)
    x_BG = half_visible(1).expand(n, -1)
    distribution = GuidedDenoiser(network(), reference, 2.0, space, COUNT_V)(x_BG, asked)
    uniform_M2 = torch.rand(n * 50, 2, generator=torch.Generator().manual_seed(1))
    drawn_BG = distribution.draw(everywhere(n), uniform_M2).view(n, 50)
    p_GV = distribution.log_probabilities(everywhere(1)).exp()
    for token in (0, 1):
        observed_G, p_G = (drawn_BG == token).float().mean(0), p_GV[:, token]
        assert ((observed_G - p_G).abs() < 5 * (p_G * (1 - p_G) / n).sqrt() + 0.005).all()
    mean_G = p_GV @ COUNT_V
    sd_G = (p_GV @ COUNT_V**2 - mean_G**2).sqrt()
    assert ((COUNT_V[drawn_BG].mean(0) - mean_G).abs() < 6 * sd_G / n**0.5 + 0.01 * mean_G).all()


@torch.no_grad()
def test_one_score_of_all_tokens():
    x_BG, asked, reference = half_visible(4), of_all(4, 2), of_all(4, 1)
    x_0_BG = torch.randint(0, N_EXPRESSION_TOKENS, (4, 50), generator=torch.Generator().manual_seed(5))
    scored_BG = x_BG == MASK_TOKEN
    for space in ("log-mean", "logits"):
        distribution = GuidedDenoiser(network(), reference, 1.7, space, COUNT_V)(x_BG, asked)
        log_p_BGV = distribution.log_probabilities(everywhere(4)).view(4, 50, -1)
        expected_B = -(log_p_BGV.gather(2, x_0_BG[..., None])[..., 0] * scored_BG).sum(1)
        torch.testing.assert_close(distribution.nll(x_0_BG, scored_BG), expected_B)


@torch.no_grad()
def test_a_ramp_begins_with_nothing_and_ends_with_all():
    """No gene visible: as trained. All but one: nearly the whole strength. Each cell by its own share."""
    x_BG = torch.zeros(3, 50, dtype=torch.int64)
    x_BG[0], x_BG[1, ::2], x_BG[2, 0] = MASK_TOKEN, MASK_TOKEN, MASK_TOKEN
    asked, reference, first = of_all(3, 2), of_all(3, 1), Positions(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    logs = [network()(x_BG, c).log_probabilities(first).double() for c in (asked, reference)]
    ramped = GuidedDenoiser(network(), reference, 3.0, "logits", COUNT_V, ramp=2.0)(x_BG, asked)
    for cell, share in enumerate((0.0, 0.5, 0.98)):
        expected = torch.log_softmax(logs[0][cell] + 2 * share**2 * (logs[0][cell] - logs[1][cell]), 0)
        torch.testing.assert_close(ramped.log_probabilities(first)[cell].double(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cells_being_followed_get_the_answers_of_their_tokens():
    x_BG, asked, reference = half_visible(4), of_all(4, 2), of_all(4, 1)
    denoiser = GuidedDenoiser(network(), reference, 2.0, "log-mean", COUNT_V)
    cells = denoiser.start(x_BG)
    followed = denoiser.answer(cells, asked).log_probabilities(everywhere(4))
    torch.testing.assert_close(followed, denoiser(x_BG, asked).log_probabilities(everywhere(4)))


class TwoOracles(Denoiser):
    """Exact conditionals of one joint for category 2 and of another for category 1."""

    def __init__(self, asked_S: np.ndarray, reference_S: np.ndarray) -> None:
        self.oracles = {2: Oracle(asked_S), 1: Oracle(reference_S)}

    def __call__(self, x_t_BG: Tensor, conditions: Conditions) -> TableDistribution:
        return self.oracles[int(conditions.category_BC[0, 0])](x_t_BG, conditions.category_BC)


def enumerate_guided(asked_S: np.ndarray, reference_S: np.ndarray, guide) -> np.ndarray:
    """The joint of genes revealed one by one in random order when every conditional is changed by ``guide``."""
    shape, joint = (4,) * N_GENES, np.zeros(len(STATES))
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for s, state in enumerate(STATES):
            p, seen = 1.0, [slice(None)] * N_GENES
            for gene in order:
                conditionals = []
                for table_S in (asked_S, reference_S):
                    table = table_S.reshape(shape)[tuple(seen)]
                    kept = sum(isinstance(part, slice) for part in seen[:gene])
                    marginal = table.sum(tuple(i for i in range(table.ndim) if i != kept))
                    conditionals.append(marginal / marginal.sum())
                p *= guide(*conditionals)[state[gene]]
                seen[gene] = int(state[gene])
            joint[s] += p / 6
    return joint


def by_logits(asked: np.ndarray, reference: np.ndarray) -> np.ndarray:
    p = asked**2 / reference
    return p / p.sum()


def by_mean(asked: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Binomial thinning, as the reference is higher everywhere; growth would leave the four counts."""
    count = np.arange(4)
    shift = np.clip(np.log(asked @ count) - np.log(reference @ count), -0.4, 0.4)
    assert shift < 0
    return stats.binom.pmf(count[:, None], count, np.exp(shift)) @ asked


@pytest.mark.parametrize(("space", "guide"), [("logits", by_logits), ("log-mean", by_mean)])
def test_guided_sampling_gives_the_joint_that_enumeration_gives(space, guide):
    asked_S, reference_S = random_joint(0), random_joint(3)
    if space == "log-mean":
        reference_S = asked_S * 1.3 ** STATES.sum(1)
        reference_S = reference_S / reference_S.sum()
    expected_S = enumerate_guided(asked_S, reference_S, guide)
    assert expected_S.sum() == pytest.approx(1)
    denoiser = GuidedDenoiser(TwoOracles(asked_S, reference_S), of_all(N_CELLS, 1), 2.0, space, COUNT_V, clip=0.4)
    noise = draw_cell_noise(cell_seeds(0, 0, N_CELLS).tolist(), N_GENES)
    start_BG = torch.full((N_CELLS, N_GENES), MASK_TOKEN)
    counts = state_counts(sample_cells(denoiser, start_BG, of_all(N_CELLS, 2), noise, [0, 1, 2, 3]))
    few = N_CELLS * expected_S < 5
    merge = lambda x: np.append(x[~few], x[few].sum()) if few.any() else x  # noqa: E731
    chi = stats.chisquare(merge(counts), merge(N_CELLS * expected_S))
    assert chi.pvalue > 1e-3
    assert stats.chisquare(counts, N_CELLS * asked_S).pvalue < 1e-12, "it is not the joint without guidance"
