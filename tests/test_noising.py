"""The forward process hides each gene with probability t, and the laws of t carry exact weights."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lingshu_cell.diffusion.noising import MaskLaw, hide
from lingshu_cell.tokens import MASK_TOKEN

LAWS = pytest.mark.parametrize("law", [MaskLaw(0.0), MaskLaw(0.5), MaskLaw(0.9)], ids=str)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("visible", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_genes_are_hidden_at_the_rate_asked_for(visible):
    x_0_BG = torch.zeros(400, 1000, dtype=torch.int16)
    x_t_BG = hide(x_0_BG, torch.full((400,), visible), rng())
    n_visible = int((x_t_BG != MASK_TOKEN).sum())
    assert stats.binomtest(n_visible, x_0_BG.numel(), visible).pvalue > 1e-3


def test_genes_of_a_cell_are_hidden_independently():
    hidden_BG = hide(torch.zeros(40_000, 4, dtype=torch.int16), torch.full((40_000,), 0.3), rng()) == MASK_TOKEN
    patterns = np.bincount((hidden_BG.long() @ torch.tensor([8, 4, 2, 1])).numpy(), minlength=16)
    n_hidden = np.array([i.bit_count() for i in range(16)])
    expected = 40_000 * 0.7**n_hidden * 0.3 ** (4 - n_hidden)
    assert stats.chisquare(patterns, expected).pvalue > 1e-3


def test_every_cell_has_its_own_rate():
    visible_B = torch.tensor([0.1, 0.9])
    shown_B = (hide(torch.zeros(2, 20_000, dtype=torch.int16), visible_B, rng()) != MASK_TOKEN).float().mean(1)
    torch.testing.assert_close(shown_B, visible_B, atol=0.01, rtol=0)


def test_visible_genes_keep_their_token_and_unmeasured_genes_stay_hidden():
    x_0_BG = torch.randint(0, 281, (50, 200), generator=rng(1), dtype=torch.int16)
    x_0_BG[:, 50:80] = MASK_TOKEN
    x_t_BG = hide(x_0_BG, torch.linspace(0, 1, 50), rng())
    shown_BG = x_t_BG != MASK_TOKEN
    assert torch.equal(x_t_BG[shown_BG], x_0_BG[shown_BG])
    assert not shown_BG[:, 50:80].any()
    assert x_t_BG.dtype == x_0_BG.dtype


def test_masks_come_from_the_generator_alone():
    x_0_BG = torch.zeros(8, 100, dtype=torch.int16)
    torch.manual_seed(1)
    first = hide(x_0_BG, torch.full((8,), 0.5), rng(3))
    torch.manual_seed(2)
    assert torch.equal(first, hide(x_0_BG, torch.full((8,), 0.5), rng(3)))
    assert not torch.equal(first, hide(x_0_BG, torch.full((8,), 0.5), rng(4)))


def test_paper_law_is_uniform_with_weight_one_and_one_cell_in_each_slice():
    visible_B, weight_B = MaskLaw(0.0).draw(64, 1000, rng())
    assert torch.equal(weight_B, torch.ones(64))
    assert sorted((visible_B * 64).int().tolist()) == list(range(64))
    many = torch.cat([MaskLaw(0.0).draw(64, 1000, rng(seed))[0] for seed in range(100)])
    assert stats.kstest((many * 64) % 1, "uniform").pvalue > 1e-3


@LAWS
def test_a_share_is_always_hidden_so_that_no_loss_is_divided_by_zero(law):
    # In float32 the topmost slice rounds to 1 with probability 2^-25 · minibatch size: NaN about once in 10^5 steps.
    for seed in range(8):
        visible_B, weight_B = law.draw(1 << 21, 1000, rng(seed))
        assert visible_B.min() >= 0
        assert visible_B.max() < 1
        assert torch.isfinite(weight_B / (1 - visible_B)).all()


@LAWS
@pytest.mark.parametrize("n_genes", [2, 50, 18_080])
def test_density_integrates_to_one(law, n_genes):
    def density(v: float) -> float:
        return float(law.density(torch.tensor(v, dtype=torch.float64), n_genes))

    below = integrate.quad(density, 0, 1 / n_genes)[0]
    above = integrate.quad(lambda log_v: density(np.exp(log_v)) * np.exp(log_v), -np.log(n_genes) + 1e-12, 0)[0]
    assert below + above == pytest.approx(1, abs=1e-6)


@LAWS
def test_shares_are_drawn_from_the_density_and_weights_are_its_inverse(law):
    n_genes = 200
    draws = [law.draw(100, n_genes, rng(seed)) for seed in range(300)]
    visible = torch.cat([v for v, _ in draws]).double()
    torch.testing.assert_close(
        torch.cat([w for _, w in draws]).double(), 1 / law.density(visible, n_genes), rtol=1e-4, atol=0
    )

    def cdf(v: np.ndarray) -> np.ndarray:
        log_uniform = np.clip(1 + np.log(np.maximum(v, 1e-12)) / np.log(n_genes), 0, 1)
        return (1 - law.log_uniform_share) * v + law.log_uniform_share * log_uniform

    assert stats.kstest(visible.numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weight_power_tempers_the_weights_and_changes_no_mask(power):
    visible_B, weight_B = MaskLaw(0.5, power).draw(100, 500, rng())
    exact_visible_B, exact_weight_B = MaskLaw(0.5).draw(100, 500, rng())
    assert torch.equal(visible_B, exact_visible_B)
    torch.testing.assert_close(weight_B, exact_weight_B**power)


@LAWS
def test_weights_give_expectations_under_the_uniform_law(law):
    draws = [law.draw(128, 500, rng(seed)) for seed in range(200)]
    for function, exact in (
        (torch.ones_like, 1.0),
        (torch.square, 1 / 3),
        (lambda v: torch.sin(9 * v), (1 - np.cos(9)) / 9),
    ):
        means = np.array([float((w * function(v)).double().mean()) for v, w in draws])
        assert abs(means.mean() - exact) < 4 * means.std(ddof=1) / len(means) ** 0.5 + 1e-6
