"""Both heads are normalised categoricals over 281 tokens, whose likelihood, probabilities and draws agree."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_SET, real_cells
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.data.training_set import assemble
from lingshu_cell.network import compression
from lingshu_cell.network.compression import GeneGroups, GroupedSoftmax
from lingshu_cell.network.detection import (
    SIZE,
    detection_nll,
    log_detected,
    log_mean_of,
    share_of_values,
    undetected_rate,
)
from lingshu_cell.network.distribution import CountDistribution, Positions, invert_cdf
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.network.set_denoiser import SetDenoiser
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

N_GENES, K = 23, 6
MIDPOINTS = torch.from_numpy(token_midpoints())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gated(n_cells: int = 4) -> CountDistribution:
    """A gate-and-values head whose every parameter is random."""
    head = GateHead(N_GENES, width=10, gene_width=7, n_small_values=K, count_of_token=MIDPOINTS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.4, generator=rng(parameter.numel()))
        head.gate_bias_G.normal_(1.5, 1, generator=rng(1))
        head.small_bias_GK[:, -1] += 2  # the tail is not rare
    return head(torch.randn(n_cells, 10, generator=rng(2)))


def grouped(n_cells: int = 4) -> CountDistribution:
    """A grouped softmax over random logits, 23 genes in groups of 4."""
    groups = GeneGroups(N_GENES, 4, rng())
    h_BPD = torch.randn(n_cells, groups.n_groups, 10, generator=rng(1))
    return GroupedSoftmax(h_BPD, torch.randn(4, N_EXPRESSION_TOKENS, 10, generator=rng(2)) * 0.5, groups)


BOTH = pytest.mark.parametrize("make", [gated, grouped])
EVERYWHERE = Positions.where(torch.ones(4, N_GENES, dtype=torch.bool))


@BOTH
def test_probabilities_of_all_tokens_sum_to_one(make):
    log_p_MV = make().log_probabilities(EVERYWHERE)
    assert log_p_MV.shape == (4 * N_GENES, N_EXPRESSION_TOKENS)
    assert log_p_MV.dtype == torch.float32
    torch.testing.assert_close(log_p_MV.exp().sum(1), torch.ones(4 * N_GENES), atol=2e-6, rtol=0)


@BOTH
def test_nll_is_the_probability_of_the_true_tokens_summed_over_the_scored_genes(make):
    distribution = make()
    edge_tokens = torch.tensor([0, 1, K - 1, K, K + 1, 99, 100, 279, 280])
    x_0_BG = edge_tokens[torch.randint(0, len(edge_tokens), (4, N_GENES), generator=rng(5))]
    scored_BG = torch.rand(4, N_GENES, generator=rng(6)) < 0.6
    scored_BG[3] = False
    log_p_BGV = distribution.log_probabilities(EVERYWHERE).view(4, N_GENES, -1)
    expected_B = -(log_p_BGV.gather(2, x_0_BG[..., None])[..., 0] * scored_BG).sum(1)
    unmeasured_BG = torch.where(scored_BG, x_0_BG, MASK_TOKEN)
    for tokens in (x_0_BG, unmeasured_BG, unmeasured_BG.short()):
        torch.testing.assert_close(distribution.nll(tokens, scored_BG), expected_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [7, 1 << 16])
def test_gradients_written_by_hand_are_those_of_the_probabilities(monkeypatch, at_once):
    monkeypatch.setattr(compression, "_POSITIONS_AT_ONCE", at_once)
    groups, scored_BG = GeneGroups(N_GENES, 4, rng()), torch.rand(4, N_GENES, generator=rng(6)) < 0.6
    h_BPD = torch.randn(4, groups.n_groups, 10, generator=rng(1))
    weight_SVD = torch.randn(4, N_EXPRESSION_TOKENS, 10, generator=rng(2)) * 0.5
    x_0_BG = torch.randint(0, N_EXPRESSION_TOKENS, (4, N_GENES), generator=rng(5))
    upstream_B, found = torch.tensor([0.3, -1.0, 2.0, 0.0]), []
    for by_hand in (True, False):
        leaves = [h_BPD.clone().requires_grad_(), weight_SVD.clone().requires_grad_()]
        if by_hand:
            nll_B = GroupedSoftmax(*leaves, groups).nll(x_0_BG, scored_BG)
        else:
            place_G = groups.place_G
            logits_BGV = torch.einsum("bgd,gvd->bgv", leaves[0][:, place_G // 4], leaves[1][place_G % 4])
            nll_BG = -torch.log_softmax(logits_BGV, -1).gather(2, x_0_BG[..., None])[..., 0]
            nll_B = (nll_BG * scored_BG).sum(1)
        (nll_B * upstream_B).sum().backward()
        found.append([nll_B.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@BOTH
def test_probabilities_at_some_positions_are_those_at_all_positions(make):
    distribution = make()
    keep = torch.randperm(len(EVERYWHERE), generator=rng(3))[:31].sort().values
    torch.testing.assert_close(
        distribution.log_probabilities(EVERYWHERE[keep]), distribution.log_probabilities(EVERYWHERE)[keep]
    )


@BOTH
@pytest.mark.parametrize("gene", [0, 5, 22])
def test_draws_follow_the_probabilities(make, gene):
    n = 100_000
    distribution, here = make(), Positions(torch.full((n,), 2), torch.full((n,), gene))
    uniform_M2 = torch.rand(n, 2, generator=rng(9))
    drawn = np.bincount(distribution.draw(here, uniform_M2).numpy(), minlength=N_EXPRESSION_TOKENS)
    one = Positions(torch.tensor([2]), torch.tensor([gene]))
    expected = distribution.log_probabilities(one)[0].detach().double().exp().numpy()
    expected *= n / expected.sum()
    common = expected >= 5
    drawn, expected = (np.append(a[common], a[~common].sum() + 1e-9) for a in (drawn, expected))
    assert len(drawn) > 10
    assert stats.chisquare(drawn, expected * drawn.sum() / expected.sum()).pvalue > 1e-3


@BOTH
def test_draws_stay_expression_tokens_at_the_edges_of_the_uniforms(make):
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for uniform_M2 in torch.cartesian_prod(edges, edges):
        token_M = make().draw(EVERYWHERE, uniform_M2.expand(len(EVERYWHERE), 2))
        assert ((token_M >= 0) & (token_M < N_EXPRESSION_TOKENS)).all()
        if uniform_M2[0] == 0:
            assert (token_M == 0).all()


def test_gated_and_plain_draws_agree_on_zero_or_not_under_the_same_uniforms():
    distribution, uniform_M2 = gated(), torch.rand(len(EVERYWHERE), 2, generator=rng(4))
    plain = CountDistribution.draw(distribution, EVERYWHERE, uniform_M2)
    assert torch.equal(distribution.draw(EVERYWHERE, uniform_M2) > 0, plain > 0)


def test_invert_cdf_gives_each_category_its_interval():
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(7, -1)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 0.99, 1 - 2**-24])
    assert invert_cdf(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3, 3]


class LargestTensor(TorchDispatchMode):
    """The number of values in the largest tensor that any operation makes, forwards or backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.n_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.n_values = max(self.n_values, tensor.numel())
        return out


@pytest.fixture(scope="module")
def cells():
    return assemble([read_counts(real_cells(300, 1000))], min_cells_per_gene=1, validation_fraction=0)


def set_denoiser(cells, start: bool = True) -> SetDenoiser:
    sizes = TINY_SET | {"n_small_values": 16, "dropout": 0.0}
    network = SetDenoiser(len(cells.modelled), (), MIDPOINTS, **sizes, generator=rng())
    if start:
        network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
    return network


def test_gated_head_never_makes_all_genes_times_all_tokens_on_real_cells(cells):
    network, x_0_BG = set_denoiser(cells), torch.from_numpy(cells.rows(np.arange(16)).tokens_BG)
    hidden_BG = torch.full_like(x_0_BG, MASK_TOKEN)
    condition_BC = torch.zeros(16, 0, dtype=torch.int64)
    n_genes = x_0_BG.shape[1]
    with LargestTensor() as largest:
        nll_B = network(hidden_BG, condition_BC).nll(x_0_BG, torch.ones_like(x_0_BG, dtype=torch.bool))
        nll_B.sum().backward()
    per_gene_and_cell = largest.n_values / (16 * n_genes)
    assert per_gene_and_cell <= 4, f"{per_gene_and_cell} values per gene and cell"
    positions = Positions.where(torch.ones_like(x_0_BG, dtype=torch.bool))
    with LargestTensor() as largest, torch.no_grad():
        network(hidden_BG, condition_BC).draw(positions, torch.rand(len(positions), 2, generator=rng()))
    assert largest.n_values / (16 * n_genes) <= N_EXPRESSION_TOKENS / 10


def test_untrained_network_gives_the_marginal_entropy_of_real_cells(cells):
    n_cells, counts_GV = len(cells.train), cells.token_counts()
    frequency_GV = counts_GV / n_cells
    entropy = -(frequency_GV[counts_GV > 0] * np.log(frequency_GV[counts_GV > 0])).sum()
    nll = {}
    x_0_BG = torch.from_numpy(cells.rows(cells.train).tokens_BG)
    for start in (False, True):
        with torch.no_grad():
            distribution = set_denoiser(cells, start)(
                torch.full_like(x_0_BG, MASK_TOKEN), torch.zeros(n_cells, 0, dtype=torch.int64)
            )
        nll[start] = distribution.nll(x_0_BG, torch.ones_like(x_0_BG, dtype=torch.bool)).mean().item()
    assert entropy < nll[True] < 1.03 * entropy, f"{nll[True]:.2f} nats, entropy {entropy:.2f}"
    assert nll[False] > 2 * entropy, "the start is what does it"


def test_start_at_frequencies_gives_each_genes_own_detection_rate(cells):
    network, counts_GV = set_denoiser(cells), cells.token_counts()
    n_genes = len(cells.modelled)
    with torch.no_grad():
        network.head.gene_GE.zero_()
        distribution = network(torch.full((1, n_genes), MASK_TOKEN), torch.zeros(1, 0, dtype=torch.int64))
        p_zero_G = distribution.log_probabilities(Positions.where(torch.ones(1, n_genes, dtype=torch.bool)))[:, 0].exp()
    np.testing.assert_allclose(p_zero_G, counts_GV[:, 0] / counts_GV.sum(1), atol=1 / 300)


def test_extreme_logits_stay_finite():
    head = GateHead(3, width=4, gene_width=4, n_small_values=K, count_of_token=MIDPOINTS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.gate_bias_G.copy_(torch.tensor([-200.0, 0.0, 200.0]))
        head.power_bias_G.fill_(-3.0)  # no power
        head.reach_G.fill_(20.0)
    distribution = head(torch.zeros(1, 4))
    x_0_BG = torch.from_numpy(encode(np.array([[0, 1, 20_000]])))
    nll_B = distribution.nll(x_0_BG, torch.ones(1, 3, dtype=torch.bool))
    detected = -math.log(1 - (1 + 1 / SIZE) ** -SIZE)  # at a log mean of 0
    expected = 0 + detected + math.log(K) + math.log(K) + math.log(N_EXPRESSION_TOKENS - K)
    assert nll_B.item() == pytest.approx(expected, rel=1e-5)
    unlikely = distribution.nll(torch.tensor([[1, 1, 0]]), torch.ones(1, 3, dtype=torch.bool))
    undetected = SIZE * (200 - math.log(SIZE))
    assert unlikely.item() == pytest.approx(60 - math.log(SIZE) + detected + 2 * math.log(K) + undetected, rel=1e-4)


def test_genes_start_without_counts_far_above_what_cells_show(cells):
    """Each of thousands of genes has a tail; a count of 10,000 of a gene with 20 at most would be most of a cell."""
    counts_GV = cells.token_counts()
    n_genes = len(counts_GV)
    distribution = set_denoiser(cells)(torch.full((1, n_genes), MASK_TOKEN), torch.zeros(1, 0, dtype=torch.int64))
    with torch.no_grad():
        p_GV = distribution.log_probabilities(Positions.where(torch.ones(1, n_genes, dtype=torch.bool))).exp().numpy()
    largest_G = np.array([MIDPOINTS[np.flatnonzero(row)[-1]] for row in counts_GV])
    far_GV = token_midpoints() > np.maximum(5 * largest_G, 15)[:, None]
    assert (p_GV * far_GV).sum() < 0.02, "of 50 cells one has such a count; of real ones several"
    assert (p_GV * far_GV * token_midpoints()).sum() < 1, "counts in a cell"


def test_training_cannot_make_counts_far_above_common(cells):
    """A count of 10,000 of a gene with 20 at most costs 200 nats more than the tilts of its tail say."""
    head = GateHead(2, width=4, gene_width=4, n_small_values=16, count_of_token=MIDPOINTS)
    head.initialise(rng())
    counts_GV = torch.zeros(2, N_EXPRESSION_TOKENS)
    counts_GV[:, 0], counts_GV[0, encode(np.array(20))], counts_GV[1, encode(np.array(3000))] = 900, 100, 100
    head.start_at_frequencies(counts_GV)
    with torch.no_grad():
        head.tail_bias_GJ[:, 1] += 0.5  # e^50 times as many at 10,000
        p_GV = head(torch.zeros(1, 4)).log_probabilities(Positions.where(torch.ones(1, 2, dtype=torch.bool))).exp()
    far_V = MIDPOINTS > 200
    assert (p_GV[0] * far_V).sum() < 1e-5 < 1e-3 < (p_GV[1] * far_V).sum()


def test_genes_that_no_cell_lacks_start_with_hardly_any_zeros():
    head = GateHead(2, width=4, gene_width=4, n_small_values=K, count_of_token=MIDPOINTS)
    head.initialise(rng())
    counts_GV = torch.zeros(2, N_EXPRESSION_TOKENS)
    counts_GV[0, encode(np.array(80))] = counts_GV[1, encode(np.array(8))] = 1000
    head.start_at_frequencies(counts_GV)
    undetected_G = torch.exp(-undetected_rate(head(torch.zeros(1, 4)).log_means()[0]))
    assert undetected_G.tolist() == pytest.approx([41**-2 / 1001, 5**-2 / 1001], rel=1e-3)


def test_detection_is_that_of_a_negative_binomial():
    log_mean = torch.linspace(-9, 5, 57, dtype=torch.float64, requires_grad=True)
    undetected = stats.nbinom.pmf(0, SIZE, SIZE / (SIZE + log_mean.detach().exp().numpy()))
    rate = undetected_rate(log_mean)
    np.testing.assert_allclose(torch.exp(-rate).detach(), undetected, rtol=1e-9)
    np.testing.assert_allclose(log_detected(rate).detach(), np.log1p(-undetected), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(log_mean_of(torch.from_numpy(1 - undetected)), log_mean.detach(), atol=1e-5, rtol=0)
    far = torch.tensor([-300.0, -50.0, -30.0, 300.0])
    expected = torch.tensor([math.log(SIZE) - 60, -50, -30, 0])
    torch.testing.assert_close(log_detected(undetected_rate(far)), expected, rtol=1e-4, atol=0)
    positive_BG, scored_BG = (torch.rand(3, 19, generator=rng(seed)) < 0.5 for seed in (1, 2))
    log_mean_BG, detected = log_mean.detach().view(3, 19).requires_grad_(), Positions.where(positive_BG & scored_BG)
    assert torch.autograd.gradcheck(lambda x: detection_nll(x, detected, scored_BG), (log_mean_BG,))
    expected_BG = torch.where(positive_BG, -log_detected(rate.view(3, 19)), rate.view(3, 19))
    torch.testing.assert_close(detection_nll(log_mean_BG, detected, scored_BG), (expected_BG * scored_BG).sum(1))
    # what detection and values take of a change of the mean is all of it
    step = 1e-5
    with torch.no_grad():
        before, after = (log_detected(undetected_rate(log_mean + s)) for s in (-step, step))
    share = share_of_values(-torch.expm1(-rate).detach())
    torch.testing.assert_close(share, 1 - (after - before) / (2 * step), atol=1e-6, rtol=0)


def test_the_gate_head_stays_in_fp32_under_autocast():
    everywhere = Positions.where(torch.ones(4, N_GENES, dtype=torch.bool))
    x_0_BG = torch.randint(0, 40, (4, N_GENES), generator=rng())
    scored_BG = torch.ones_like(x_0_BG, dtype=torch.bool)
    plain = gated().log_probabilities(everywhere), gated().nll(x_0_BG, scored_BG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gated().log_probabilities(everywhere), gated().nll(x_0_BG, scored_BG)
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))
