"""The power-function averages are the averages they say they are."""

import numpy as np
import pytest
import torch

from lingshu_cell.ema import PowerEma, gamma_of


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_that_of_the_edm2_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.15, 0.25])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma = gamma_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # moments of (gamma + 1) τ^gamma on (0, 1)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
@pytest.mark.parametrize("every", [1, 4])
def test_average_is_the_explicit_one_over_the_trajectory(sigma_rel, every):
    """Step i weighs (i/t)^(γ+1) - ((i - every)/t)^(γ+1): the profile (γ+1) τ^γ integrated over its stretch of time."""
    trajectory = np.random.default_rng(0).normal(size=(40, 3)).cumsum(0)
    parameters = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    ema = PowerEma(sigma_rel, parameters)
    power = gamma_of(sigma_rel) + 1
    for t in range(1, 41):
        parameters["a"].copy_(torch.from_numpy(trajectory[t - 1, :2]))
        parameters["b"].copy_(torch.from_numpy(trajectory[t - 1, 2:]))
        if t % every == 0:
            ema.update(parameters, t, every)
            seen = np.arange(every, t + 1, every)
            weights = (seen / t) ** power - ((seen - every) / t) ** power
            assert weights.sum() == pytest.approx(1)
            explicit = weights @ trajectory[seen - 1]
            np.testing.assert_allclose(torch.cat([ema.weights["a"], ema.weights["b"]]), explicit, rtol=1e-9, atol=1e-12)


def test_first_update_forgets_the_initial_weights():
    ema = PowerEma(0.05, {"a": torch.full((3,), 100.0)})
    ema.update({"a": torch.ones(3)}, 1)
    assert torch.equal(ema.weights["a"], torch.ones(3))


def test_average_owns_its_weights():
    parameters = {"a": torch.ones(3, requires_grad=True)}
    ema = PowerEma(0.05, parameters)
    with torch.no_grad():
        parameters["a"].zero_()
    assert torch.equal(ema.weights["a"], torch.ones(3))
    assert not ema.weights["a"].requires_grad


def test_average_of_constant_weights_is_the_constant():
    parameters = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    ema = PowerEma(0.10, parameters)
    for step in range(1, 1001):
        ema.update(parameters, step)
    torch.testing.assert_close(ema.weights["a"], parameters["a"], rtol=1e-6, atol=1e-7)
