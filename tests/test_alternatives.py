"""The alternatives of the benchmarks are what they claim: normalised categoricals, unbiased estimates, encoders that
see only what is visible.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import real_cells
from scipy import stats

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.tokenizer import bin_edges, encode, token_midpoints
from lingshu_cell.data.training_set import TrainingSet, assemble
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    from alternatives.group_encoders import OwnWeightGroups, SharedMapGroups
    from alternatives.grouped_gate import GroupedGate
    from alternatives.latent_encoder import LatentDenoiser
    from alternatives.masks import complementary_masks, independent_shares
    from alternatives.negative_binomial_head import NegativeBinomialHead, log_negative_binomial_token
    from alternatives.optimisers import adamw, muon, muon_and_codes
    from alternatives.race import Recipe, crossing, race
    from alternatives.softmax_head import SoftmaxHead
    from compare_parts import HEADS as HEADS_ON_TRUNK
    from compare_parts import ours_from_zero
finally:
    sys.path.remove(BENCHMARKS)

N_GENES = 150
MIDPOINTS = torch.from_numpy(token_midpoints())
NO_CONDITIONS = torch.zeros(4, 0, dtype=torch.int64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def cells() -> TrainingSet:
    return assemble([read_counts(real_cells(200, N_GENES))], min_cells_per_gene=1, validation_fraction=0.2)


def randomised(network: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng(parameter.numel())) * scale)
    return network


def softmax_head(counts: torch.Tensor) -> SoftmaxHead:
    return started(SoftmaxHead(len(counts), 10, 7, 6, MIDPOINTS), counts)


def mixture_head(counts: torch.Tensor, n_components: int = 2) -> NegativeBinomialHead:
    return started(NegativeBinomialHead(len(counts), 10, 7, n_components, 4), counts)


def started(head: torch.nn.Module, counts: torch.Tensor) -> torch.nn.Module:
    head.initialise(rng())
    head.start_at_frequencies(counts)
    return head


HEADS = pytest.mark.parametrize("make", [softmax_head, mixture_head])
ENCODERS = pytest.mark.parametrize(
    "make",
    [
        lambda: SharedMapGroups(
            N_GENES, MIDPOINTS, gene_width=8, genes_per_group=8, width=16, n_blocks=1, n_heads=2, generator=rng()
        ),
        lambda: OwnWeightGroups(
            N_GENES, MIDPOINTS, gene_width=8, genes_per_group=64, width=16, n_blocks=1, n_heads=2, generator=rng()
        ),
        lambda: LatentDenoiser(
            N_GENES,
            MIDPOINTS,
            gene_width=8,
            n_latents=5,
            width=16,
            n_blocks=1,
            n_heads=2,
            answer_width=12,
            generator=rng(),
        ),
    ],
    ids=["shared maps", "own weights", "latents"],
)


@HEADS
def test_each_head_is_a_normalised_categorical_and_its_nll_agrees(make, cells):
    head = randomised(make(torch.from_numpy(cells.token_counts())))
    x_0_BG = torch.from_numpy(cells.rows(cells.train[:4]).tokens_BG).clone()
    x_0_BG[0, :6] = torch.tensor([99, 100, 189, 190, 279, 3])  # every width of token
    scored_BG = torch.rand(x_0_BG.shape, generator=rng(3)) < 0.15
    scored_BG[0, :6] = True
    distribution = head(torch.randn(4, 10, generator=rng(1)))
    positions = Positions.where(scored_BG)
    log_p_MV = distribution.log_probabilities(positions)
    torch.testing.assert_close(log_p_MV.exp().sum(1), torch.ones(len(positions)), atol=2e-4, rtol=0)
    of_true_M = log_p_MV.gather(1, positions.of(x_0_BG).long()[:, None])[:, 0]
    expected_B = torch.zeros(4).index_add(0, positions.cell_M, -of_true_M)
    torch.testing.assert_close(distribution.nll(x_0_BG, scored_BG), expected_B, rtol=1e-4, atol=1e-3)


@HEADS
def test_each_head_starts_near_the_token_frequencies_of_real_cells(make, cells):
    counts = torch.from_numpy(cells.token_counts())
    head = make(counts)
    with torch.no_grad():
        head.gene_GE.zero_()
        distribution = head(torch.zeros(1, 10))
        log_p_GV = distribution.log_probabilities(Positions.where(torch.ones(1, len(counts), dtype=torch.bool)))
    frequency_GV = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(frequency_GV, frequency_GV).sum()
    cross = -(frequency_GV * log_p_GV).sum()
    assert entropy < cross < 1.06 * entropy, f"{cross:.1f} nats, entropy {entropy:.1f}"


def test_mixture_tokens_are_sums_of_negative_binomial_probabilities():
    mean, theta = 180.0, 1.5
    tokens = torch.tensor([0, 7, 99, 100, 150, 189, 190, 230, 279, 280])
    log_p = log_negative_binomial_token(
        tokens, torch.full((10, 1), mean).double().log(), torch.full((10, 1), theta).double().log()
    )[:, 0]
    lower, upper = bin_edges()
    law = stats.nbinom(theta, theta / (theta + mean))
    expected = law.cdf(upper[tokens]) - law.cdf(lower[tokens] - 1)
    np.testing.assert_allclose(log_p[:9].exp(), expected[:9], rtol=1e-3, atol=1e-9)
    assert log_p[9].exp() < 1e-5  # more than 9,999


def test_grouped_gate_with_equal_hidden_vectors_is_the_products_head(cells):
    counts = torch.from_numpy(cells.token_counts())
    head = randomised(started(GateHead(len(counts), 10, 7, 16, MIDPOINTS), counts))
    groups = SharedMapGroups(
        len(counts), MIDPOINTS, gene_width=7, genes_per_group=8, width=16, n_blocks=1, n_heads=2, generator=rng()
    ).groups
    h_BD = torch.randn(4, 10, generator=rng(1))
    grouped = GroupedGate(head, h_BD[:, None].expand(-1, groups.n_groups, -1), groups)
    x_0_BG = torch.from_numpy(cells.rows(cells.train[:4]).tokens_BG)
    everywhere = torch.ones_like(x_0_BG, dtype=torch.bool)
    torch.testing.assert_close(grouped.nll(x_0_BG, everywhere), head(h_BD).nll(x_0_BG, everywhere))
    positions = Positions.where(everywhere)
    torch.testing.assert_close(grouped.log_probabilities(positions), head(h_BD).log_probabilities(positions))


@ENCODERS
def test_each_encoder_reads_visible_genes_only_and_answers_with_normalised_probabilities(make, cells):
    network = make()
    network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
    randomised(network)
    x_0_BG = torch.from_numpy(cells.rows(cells.train[:4]).tokens_BG)
    hidden_BG = torch.rand(x_0_BG.shape, generator=rng(3)) < 0.5
    x_t_BG = torch.where(hidden_BG, MASK_TOKEN, x_0_BG)
    positions = Positions.where(hidden_BG)
    log_p_MV = network(x_t_BG, NO_CONDITIONS).log_probabilities(positions)
    assert log_p_MV.shape == (len(positions), N_EXPRESSION_TOKENS)
    torch.testing.assert_close(log_p_MV.exp().sum(1), torch.ones(len(positions)), atol=1e-4, rtol=0)
    other = x_t_BG.clone()
    cell, gene = torch.nonzero(~hidden_BG[1:] & (x_0_BG[1:] > 0))[0]
    other[cell + 1, gene] += 5
    change_M = (network(other, NO_CONDITIONS).log_probabilities(positions) - log_p_MV).abs().amax(1)
    assert change_M[positions.cell_M == cell + 1].min() > 0, "a visible gene speaks of all others in its cell"
    assert change_M[positions.cell_M != cell + 1].max() < 1e-5, "and of no other cell"


def test_complementary_masks_hide_every_gene_exactly_once():
    x_0_BG = torch.from_numpy(encode(np.arange(40).reshape(8, 5)))
    seen = []

    def denoise(x_t_BG, condition_BC):
        seen.append(x_t_BG == MASK_TOKEN)
        return OneNat()

    class OneNat:
        def nll(self, x_0, scored):
            return scored.sum(1).float()

    nelbo_B = torch.stack([complementary_masks(denoise, x_0_BG, NO_CONDITIONS, rng(s)) for s in range(400)])
    assert all(torch.equal(hidden[:4], ~hidden[4:]) for hidden in seen)
    assert nelbo_B.mean().item() == pytest.approx(5, rel=0.1)  # 5 genes of one nat each: unbiased


def test_independent_shares_follow_the_law_of_the_product():
    law = MaskLaw(0.5, 1.0)
    visible, weight = independent_shares(law, 40_000, 500, rng())
    stratified, _ = law.draw(40_000, 500, rng(1))
    assert stats.ks_2samp(visible, stratified).pvalue > 1e-3
    assert (weight * visible).mean().item() == pytest.approx(0.5, abs=0.01)  # reweighted to the uniform


@pytest.mark.parametrize("optimisers", [adamw, muon, muon_and_codes])
def test_optimisers_take_every_parameter_once(optimisers):
    network = LatentDenoiser(
        N_GENES, MIDPOINTS, gene_width=8, n_latents=5, width=16, n_blocks=1, n_heads=2, answer_width=12, generator=rng()
    )
    parameters = dict(network.named_parameters())
    held = [p for o in optimisers(parameters, 1e-3) for group in o.param_groups for p in group["params"]]
    assert len(held) == len(parameters) and {id(p) for p in held} == {id(p) for p in parameters.values()}
    by_muon = [
        p for o in optimisers(parameters, 1e-3) if isinstance(o, torch.optim.Muon) for p in o.param_groups[0]["params"]
    ]
    assert any(p is network.head.gene_GE for p in by_muon) == (optimisers is muon_and_codes)


def test_a_race_lowers_the_held_out_bound_and_ends_at_its_budget(cells, tmp_path):
    def build(training: TrainingSet, seed: int) -> torch.nn.Module:
        network = OwnWeightGroups(
            len(training.modelled), MIDPOINTS, gene_width=8, genes_per_group=64, width=16, n_blocks=1, n_heads=2,
            generator=rng(seed),
        )  # fmt: skip
        network.start_at_frequencies(torch.from_numpy(training.token_counts()))
        return network

    recipes = [
        Recipe("by steps", build, steps=60, minibatch_size=32),
        Recipe("by seconds", build, cpu_seconds=0.3, minibatch_size=32, optimisers=muon),
    ]
    rows = race(recipes, cells, (0.05, 1.0), lambda share: ("0.1", "last"), tmp_path / "log.json", lambda text: None)
    by_steps, by_seconds = rows
    assert by_steps["points"][-1]["step"] == 60
    assert 0.3 <= by_seconds["points"][-1]["cpu_seconds"] < 0.6
    assert by_steps["points"][-1]["nelbo"]["0.1"] < by_steps["points"][0]["nelbo"]["0.1"] - 0.1
    assert all(row["training_flops_per_cell"] > 1e4 for row in rows)
    assert (tmp_path / "log.json").is_file()


@pytest.mark.parametrize("name", list(HEADS_ON_TRUNK)[:3])
def test_every_head_learns_on_the_products_trunk(name, cells, tmp_path):
    recipe = Recipe(name, HEADS_ON_TRUNK[name], steps=12, minibatch_size=32, peak_learning_rate=1e-3)
    points = race([recipe], cells, (0.1, 1.0), lambda share: ("last",), tmp_path / "log.json", lambda text: None)[0][
        "points"
    ]
    assert points[-1]["nelbo"]["last"] < points[0]["nelbo"]["last"]


def test_biases_at_zero_are_far_from_the_frequencies(cells):
    network = ours_from_zero(cells, 0)
    assert not network.head.gate_bias_G.any() and network.detection_G.any()


def test_crossing_interpolates():
    points = [{"step": s, "nelbo": {"0.1": n}} for s, n in ((10, 30.0), (20, 20.0), (30, 22.0))]
    assert crossing(points, 25.0, "0.1", "step") == 15
    assert crossing(points, 19.0, "0.1", "step") is None
    assert crossing(points, 35.0, "0.1", "step") == 10
