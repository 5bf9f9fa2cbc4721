"""The loss is the negative ELBO: exact where it can be enumerated, unbiased under every law of the visible share."""

import itertools

import numpy as np
import pytest
import torch
from oracle import N_GENES, STATES, Oracle, product_of_marginals, random_joint
from scipy.special import beta

from lingshu_cell.diffusion.loss import nelbo_estimate, nll_per_hidden_share, validation_nelbo
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.network.distribution import CountDistribution
from lingshu_cell.tokens import MASK_TOKEN

LAWS = pytest.mark.parametrize("law", [MaskLaw(0.0), MaskLaw(0.5)], ids=["uniform", "half log-uniform"])
NO_CONDITION = torch.zeros(len(STATES), 0, dtype=torch.int64)
CELLS = torch.from_numpy(STATES)


def enumerated_nelbo(denoise) -> np.ndarray:
    """The bound of each of the 64 cells, summed over all 7 masks; ∫ v^n (1-v)^(G-n-1) dv = B(n + 1, G - n)."""
    total = np.zeros(len(STATES))
    for hidden in itertools.product([False, True], repeat=N_GENES):
        if any(hidden):
            hidden_BG = torch.tensor(hidden).expand(len(STATES), -1)
            n_visible = N_GENES - sum(hidden)
            x_t_BG = torch.where(hidden_BG, MASK_TOKEN, CELLS)
            nll_B = denoise(x_t_BG, NO_CONDITION).nll(CELLS, hidden_BG)
            total += beta(n_visible + 1, N_GENES - n_visible) * nll_B.numpy()
    return total


@pytest.mark.parametrize("seed", range(3))
def test_bound_is_tight_for_the_oracle_cell_by_cell(seed):
    joint_S = random_joint(seed)
    np.testing.assert_allclose(enumerated_nelbo(Oracle(joint_S)), -np.log(joint_S), rtol=1e-5)


def test_expected_bound_of_the_oracle_is_the_entropy_and_of_any_other_denoiser_more():
    joint_S = random_joint(0)
    entropy = -(joint_S * np.log(joint_S)).sum()
    assert joint_S @ enumerated_nelbo(Oracle(joint_S)) == pytest.approx(entropy, rel=1e-5)
    independent_S = product_of_marginals(joint_S)
    cross_entropy = -(joint_S * np.log(independent_S)).sum()
    assert joint_S @ enumerated_nelbo(Oracle(independent_S)) == pytest.approx(cross_entropy, rel=1e-5)
    assert cross_entropy > entropy + 0.1


@LAWS
@pytest.mark.parametrize("model_seed", [0, 1], ids=["oracle", "wrong model"])
def test_monte_carlo_mean_is_the_enumerated_bound_within_its_standard_error(law, model_seed):
    joint_S, denoise = random_joint(0), Oracle(random_joint(model_seed))
    exact = float(joint_S @ enumerated_nelbo(denoise))
    generator = torch.Generator().manual_seed(7)
    x_0_BG = CELLS.repeat(8, 1)
    weight_B = torch.from_numpy(np.tile(joint_S, 8)) / 8
    condition_BC = NO_CONDITION.repeat(8, 1)
    estimates = np.array(
        [float((nelbo_estimate(denoise, x_0_BG, condition_BC, law, generator) * weight_B).sum()) for _ in range(1500)]
    )
    standard_error = estimates.std(ddof=1) / len(estimates) ** 0.5
    assert standard_error < 0.02 * exact
    assert abs(estimates.mean() - exact) < 4 * standard_error


def test_validation_estimates_the_same_bound():
    joint_S = random_joint(2)
    nelbo_B = validation_nelbo(Oracle(joint_S), CELLS, NO_CONDITION, torch.Generator().manual_seed(0), n_masks=4000)
    assert float(nelbo_B @ torch.from_numpy(joint_S).float()) == pytest.approx(
        -(joint_S * np.log(joint_S)).sum(), rel=0.03
    )


class Watcher:
    """Stands in front of a denoiser and keeps what was shown to it and what was scored."""

    def __init__(self, denoise) -> None:
        self.denoise, self.seen = denoise, []

    def __call__(self, x_t_BG, condition_BC) -> CountDistribution:
        distribution = self.denoise(torch.where(x_t_BG == MASK_TOKEN, x_t_BG, x_t_BG.clamp_max(3)), condition_BC)
        inner = distribution.nll
        distribution.nll = lambda x_0_BG, scored_BG: self.seen.append((x_t_BG, scored_BG)) or inner(x_0_BG, scored_BG)
        return distribution


def test_unmeasured_genes_are_never_scored_and_never_visible():
    x_0_BG = CELLS.clone()
    x_0_BG[:, 1] = MASK_TOKEN
    watcher = Watcher(Oracle(random_joint(0)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert torch.isfinite(nelbo_estimate(watcher, x_0_BG, NO_CONDITION, MaskLaw(0.5), generator)).all()
    x_t = torch.cat([x for x, _ in watcher.seen])
    scored = torch.cat([s for _, s in watcher.seen])
    assert (x_t[:, 1] == MASK_TOKEN).all()
    assert not scored[:, 1].any()
    assert torch.equal(scored[:, [0, 2]], x_t[:, [0, 2]] == MASK_TOKEN)
    assert 0 < scored[:, 0].float().mean() < 1


def test_bound_of_partly_measured_cells_is_the_bound_of_what_was_measured():
    joint_S = random_joint(3)
    pair = joint_S.reshape(4, 4, 4).sum(1)  # genes 0 and 2
    x_0_BG = CELLS.clone()
    x_0_BG[:, 1] = MASK_TOKEN
    nelbo_B = validation_nelbo(Oracle(joint_S), x_0_BG, NO_CONDITION, torch.Generator().manual_seed(0), n_masks=4000)
    assert float(nelbo_B @ torch.from_numpy(joint_S).float()) == pytest.approx(-(pair * np.log(pair)).sum(), rel=0.03)


def test_cross_entropy_is_divided_by_the_hidden_share():
    watcher = Watcher(Oracle(random_joint(0)))
    at_half = nll_per_hidden_share(watcher, CELLS, NO_CONDITION, torch.full((64,), 0.5), torch.Generator())
    ((x_t_BG, scored_BG),) = watcher.seen
    torch.testing.assert_close(at_half, 2 * watcher.denoise(x_t_BG, NO_CONDITION).nll(CELLS, scored_BG))
    all_hidden = nll_per_hidden_share(watcher, CELLS, NO_CONDITION, torch.zeros(64), torch.Generator())
    product = product_of_marginals(random_joint(0))
    np.testing.assert_allclose(all_hidden, -np.log(product), rtol=1e-5)
