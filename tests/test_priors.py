"""Clamped genes are seen by all others, tilted genes change their mean alone, and both sample the right joint."""

import numpy as np
import pytest
import torch
from oracle import N_GENES, STATES, Oracle, TableDistribution, random_joint, state_counts
from scipy import stats
from torch import Tensor

from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.diffusion.guidance import GuidedDenoiser
from lingshu_cell.diffusion.priors import TiltedDenoiser, clamp
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoiser, DenoisingFunction, Positions
from lingshu_cell.tokens import MASK_TOKEN

COUNT_V = torch.from_numpy(token_midpoints()).float()
N_CELLS = 20_000
NO_CONDITIONS = torch.zeros(N_CELLS, 0, dtype=torch.int64)


def sample(denoiser: Denoiser, start_BG: Tensor | None = None, visible=(0, 1, 2, 3)) -> Tensor:
    noise = draw_cell_noise(cell_seeds(0, 0, N_CELLS).tolist(), N_GENES)
    start_BG = torch.full((N_CELLS, N_GENES), MASK_TOKEN) if start_BG is None else start_BG
    return sample_cells(denoiser, start_BG, NO_CONDITIONS, noise, visible)


def thinned(p: np.ndarray, log_factor: float) -> np.ndarray:
    count = np.arange(4)
    return stats.binom.pmf(count[:, None], count, np.exp(log_factor)) @ p


def test_clamp_writes_a_copy_and_only_its_genes():
    x_BG = torch.full((3, 5), MASK_TOKEN, dtype=torch.int16)
    clamped_BG = clamp(x_BG, {1: 7, 4: 0})
    assert (x_BG == MASK_TOKEN).all()
    assert clamped_BG.dtype == torch.int16
    assert (clamped_BG == torch.tensor([MASK_TOKEN, 7, MASK_TOKEN, MASK_TOKEN, 0])).all()
    assert torch.equal(clamp(x_BG, {}), x_BG)


@pytest.mark.parametrize("token", range(4))
def test_the_others_follow_a_clamped_gene_exactly(token):
    joint_S = random_joint(1)
    start_BG = clamp(torch.full((N_CELLS, N_GENES), MASK_TOKEN), {1: token})
    counts = state_counts(sample(DenoisingFunction(Oracle(joint_S)), start_BG))
    expected_S = joint_S * (STATES[:, 1] == token)
    there = expected_S > 0
    assert counts[~there].sum() == 0
    assert stats.chisquare(counts[there], N_CELLS * expected_S[there] / expected_S.sum()).pvalue > 1e-3


def test_a_tilted_gene_gets_its_mean_from_each_conditional_and_the_joint_is_the_one_enumerated():
    """Gene 2 is tilted whenever it is drawn, whatever is visible then; the others stay exact conditionals."""
    joint_S, log_factor = random_joint(2), -0.4
    denoiser = TiltedDenoiser(DenoisingFunction(Oracle(joint_S)), torch.tensor([0.0, 0.0, log_factor]), COUNT_V)
    expected, table = np.zeros((4, 4, 4)), joint_S.reshape(4, 4, 4)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for state in STATES:
            p, seen = 1.0, [slice(None)] * 3
            for gene in order:
                part = table[tuple(seen)]
                axis = sum(isinstance(one, slice) for one in seen[:gene])
                q = part.sum(tuple(i for i in range(part.ndim) if i != axis))
                q = q / q.sum()
                p *= (thinned(q, log_factor) if gene == 2 else q)[state[gene]]
                seen[gene] = int(state[gene])
            expected[tuple(state)] += p / 6
    x_BG = sample(denoiser)
    assert stats.chisquare(state_counts(x_BG), N_CELLS * expected.ravel()).pvalue > 1e-3
    mean, tilted_mean = (np.arange(4) @ t.sum((0, 1)) for t in (table, expected))
    assert tilted_mean == pytest.approx(mean * np.exp(log_factor), rel=0.02)
    assert x_BG[:, 2].float().mean().item() == pytest.approx(tilted_mean, abs=0.03)


def test_a_factor_of_1_changes_no_cell():
    denoiser = DenoisingFunction(Oracle(random_joint(2)))
    assert torch.equal(sample(TiltedDenoiser(denoiser, torch.zeros(3), COUNT_V)), sample(denoiser))


def test_a_clamped_gene_is_not_tilted_and_does_not_change():
    denoiser = TiltedDenoiser(DenoisingFunction(Oracle(random_joint(2))), torch.tensor([0.0, 2.0, 0.0]), COUNT_V)
    start_BG = clamp(torch.full((N_CELLS, N_GENES), MASK_TOKEN), {1: 2})
    assert (sample(denoiser, start_BG)[:, 1] == 2).all()


class ByCategory(Denoiser):
    """Exact conditionals of one joint for category 2 and of another for category 1."""

    def __init__(self, asked_S: np.ndarray, reference_S: np.ndarray) -> None:
        self.oracles = {2: Oracle(asked_S), 1: Oracle(reference_S)}

    def __call__(self, x_t_BG: Tensor, conditions: Conditions) -> TableDistribution:
        return self.oracles[int(conditions.category_BC[0, 0])](x_t_BG, conditions.category_BC)


@pytest.mark.parametrize("space", ["log-mean", "logits"])
def test_a_tilt_around_guidance_multiplies_the_guided_mean(space):
    base = ByCategory(random_joint(0), random_joint(3))
    asked, reference = (Conditions(torch.tensor([[k]])) for k in (2, 1))
    guided = GuidedDenoiser(base, reference, 1.5, space, COUNT_V, clip=0.2)
    tilted = TiltedDenoiser(guided, torch.tensor([np.log(0.7), 0.0, np.log(1.2)]).float(), COUNT_V)
    positions = Positions(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    hidden = torch.full((1, 3), MASK_TOKEN)
    before, after = (
        d(hidden, asked).log_probabilities(positions).double().exp() @ COUNT_V.double() for d in (guided, tilted)
    )
    np.testing.assert_allclose(after / before, [0.7, 1.0, 1.2], rtol=1e-3)


def test_cells_being_followed_get_the_answers_of_their_tokens():
    denoiser = TiltedDenoiser(DenoisingFunction(Oracle(random_joint(2))), torch.tensor([0.3, 0.0, -0.2]), COUNT_V)
    x_BG = torch.tensor([[1, MASK_TOKEN, MASK_TOKEN], [MASK_TOKEN, 2, 0]])
    positions = Positions.where(x_BG == MASK_TOKEN)
    followed = denoiser.answer(denoiser.start(x_BG), torch.zeros(2, 0)).log_probabilities(positions)
    assert torch.equal(followed, denoiser(x_BG, torch.zeros(2, 0)).log_probabilities(positions))
