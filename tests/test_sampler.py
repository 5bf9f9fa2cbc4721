"""Sampling recovers the exact joint from exact conditionals, and keeps its promises about what changes and when."""

import numpy as np
import pytest
import torch
from oracle import N_GENES, Oracle, product_of_marginals, random_joint, state_counts
from scipy import stats

from lingshu_cell.diffusion.randomness import CellNoise, cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.diffusion.schedule import GRIDS, uniform_grid
from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

N_CELLS = 20_000


def noise_of(n_cells: int, n_genes: int, run_seed: int = 0) -> CellNoise:
    return draw_cell_noise(cell_seeds(run_seed, 0, n_cells).tolist(), n_genes)


def sample(denoise, noise: CellNoise, visible_counts, start_BG=None) -> torch.Tensor:
    n_cells, n_genes = noise.order_BG.shape
    start_BG = torch.full((n_cells, n_genes), MASK_TOKEN) if start_BG is None else start_BG
    return sample_cells(denoise, start_BG, torch.zeros(n_cells, 0, dtype=torch.int64), noise, visible_counts)


class Flat(CountDistribution):
    """The same categorical for every gene, whatever is visible."""

    def __init__(self, log_p_V: torch.Tensor) -> None:
        self.log_p_V = log_p_V

    def nll(self, x_0_BG, scored_BG):
        return -(self.log_p_V[x_0_BG.long()] * scored_BG).sum(1)

    def log_probabilities(self, positions: Positions):
        return self.log_p_V.expand(len(positions), -1)


class Recorder:
    """Calls a denoiser and keeps the cells it was shown."""

    def __init__(self, log_p_V: torch.Tensor | None = None) -> None:
        self.log_p_V = torch.zeros(N_EXPRESSION_TOKENS) if log_p_V is None else log_p_V
        self.shown: list[torch.Tensor] = []

    def __call__(self, x_t_BG, condition_BC):
        self.shown.append(x_t_BG.clone())
        return Flat(torch.log_softmax(self.log_p_V, 0))


@pytest.mark.parametrize("seed", range(2))
def test_one_gene_at_a_time_recovers_the_exact_joint(seed):
    joint_S = random_joint(seed)
    x_BG = sample(Oracle(joint_S), noise_of(N_CELLS, N_GENES), [0, 1, 2, 3])
    assert stats.chisquare(state_counts(x_BG), N_CELLS * joint_S).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_all_genes_in_one_step_gives_the_product_of_marginals_instead(seed):
    joint_S = random_joint(seed)
    counts = state_counts(sample(Oracle(joint_S), noise_of(N_CELLS, N_GENES), [0, 3]))
    assert stats.chisquare(counts, N_CELLS * product_of_marginals(joint_S)).pvalue > 1e-3
    assert stats.chisquare(counts, N_CELLS * joint_S).pvalue < 1e-12


def test_a_given_gene_conditions_the_others():
    joint_S = random_joint(0)
    start_BG = torch.full((N_CELLS, N_GENES), MASK_TOKEN)
    start_BG[:, 1] = 2
    x_BG = sample(Oracle(joint_S), noise_of(N_CELLS, N_GENES), [0, 1, 2, 3], start_BG)
    assert (x_BG[:, 1] == 2).all()
    conditional = joint_S.reshape(4, 4, 4)[:, 2].ravel()
    counts = np.bincount((x_BG[:, 0] * 4 + x_BG[:, 2]).numpy(), minlength=16)
    assert stats.chisquare(counts, N_CELLS * conditional / conditional.sum()).pvalue > 1e-3


@pytest.mark.parametrize("schedule", GRIDS)
def test_each_step_sees_as_many_genes_as_the_grid_says_and_no_mask_is_left(schedule):
    grid, recorder = GRIDS[schedule](500, 12), Recorder()
    x_BG = sample(recorder, noise_of(6, 500), grid.tolist())
    for x_t_BG, n_visible in zip(recorder.shown, grid[:-1], strict=True):
        assert ((x_t_BG != MASK_TOKEN).sum(1) == n_visible).all()
    assert (x_BG >= 0).all()
    assert (x_BG < N_EXPRESSION_TOKENS).all()


def test_visible_genes_never_change():
    recorder, generator = Recorder(), torch.Generator().manual_seed(0)
    start_BG = torch.full((20, 300), MASK_TOKEN, dtype=torch.int16)
    given_BG = torch.rand(20, 300, generator=generator) < torch.linspace(0, 1, 20)[:, None]
    start_BG[given_BG] = torch.randint(0, 281, (int(given_BG.sum()),), generator=generator, dtype=torch.int16)
    before = start_BG.clone()
    x_BG = sample(recorder, noise_of(20, 300), GRIDS["cosine"](300, 15).tolist(), start_BG)
    for earlier, later in zip([before, *recorder.shown], [*recorder.shown, x_BG], strict=True):
        visible_BG = earlier != MASK_TOKEN
        assert torch.equal(earlier[visible_BG], later[visible_BG])
    assert torch.equal(start_BG, before), "the caller's tensor is not written to"
    assert not (x_BG == MASK_TOKEN).any()


def test_the_grid_is_scaled_to_the_hidden_genes_where_genes_are_given():
    recorder = Recorder()
    start_BG = torch.full((2, 100), MASK_TOKEN)
    start_BG[1, :60] = 0
    sample(recorder, noise_of(2, 100), [0, 25, 50, 100], start_BG)
    assert [(x != MASK_TOKEN).sum(1).tolist() for x in recorder.shown] == [[0, 60], [25, 70], [50, 80]]


def test_a_whole_cell_comes_back_without_asking_the_network():
    recorder, cell = Recorder(), torch.arange(30)[None]
    assert torch.equal(sample(recorder, noise_of(1, 30), [0, 10, 30], cell), cell)
    assert recorder.shown == []


def test_positions_are_uniformly_random_and_chosen_without_looking_at_values():
    zeros, large = torch.zeros(N_EXPRESSION_TOKENS), torch.zeros(N_EXPRESSION_TOKENS)
    zeros[0], large[50] = 30.0, 30.0
    orders = []
    for log_p_V in (zeros, large):
        recorder = Recorder(log_p_V)
        sample(recorder, noise_of(5000, 6), uniform_grid(6, 6).tolist())
        orders.append(torch.stack([x == MASK_TOKEN for x in recorder.shown]))
    assert torch.equal(*orders)
    first_revealed = (~orders[0][1]).float().argmax(1)
    assert stats.chisquare(np.bincount(first_revealed.numpy(), minlength=6)).pvalue > 1e-3


def test_noise_of_a_cell_depends_on_its_seed_alone():
    together = draw_cell_noise([5, 2**62 + 1, 7], 50)
    alone = draw_cell_noise([2**62 + 1], 50)
    assert torch.equal(together.order_BG[1:2], alone.order_BG)
    assert torch.equal(together.uniform_BG2[1:2], alone.uniform_BG2)
    assert not torch.equal(together.order_BG[0], together.order_BG[2])


def test_noise_is_uniform_and_its_streams_are_unrelated():
    noise = noise_of(2000, 20)
    columns = torch.stack([noise.order_BG, noise.uniform_BG2[..., 0], noise.uniform_BG2[..., 1]]).flatten(1)
    for column in columns:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.02


def test_seeds_of_different_runs_and_cells_never_meet():
    seeds = np.concatenate([cell_seeds(run, 0, 1000) for run in (0, 1, 2**31 - 1)])
    assert len(np.unique(seeds)) == len(seeds)
    assert (seeds >= 0).all()
    np.testing.assert_array_equal(cell_seeds(3, 10, 5), cell_seeds(3, 0, 15)[10:])


def test_unmeasured_genes_stay_hidden_and_the_steps_are_spread_over_the_others():
    seen, flat = [], Flat(torch.log(torch.eye(N_EXPRESSION_TOKENS)[5]))

    def denoise(x_BG, conditions):
        seen.append((x_BG != MASK_TOKEN).sum(1).tolist())
        return flat

    start_BG = torch.full((2, 24), MASK_TOKEN)
    unmeasured_BG = torch.zeros(2, 24, dtype=torch.bool)
    unmeasured_BG[0, :12] = True
    none = torch.zeros(2, 0, dtype=torch.int64)
    x_BG = sample_cells(denoise, start_BG, none, noise_of(2, 24), [0, 8, 16, 24], unmeasured_BG)
    assert (x_BG[0, :12] == MASK_TOKEN).all() and (x_BG[0, 12:] == 5).all() and (x_BG[1] == 5).all()
    assert seen == [[0, 0], [4, 8], [8, 16]]
