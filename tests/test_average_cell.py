"""The average cell of a condition: what it is made of, and that answers and evidence are relative to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_SET
from torch import Tensor

from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.diffusion.schedule import GRIDS
from lingshu_cell.network.average_cell import AverageCell, AverageCells
from lingshu_cell.network.conditions import Conditions, Profiles
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.set_denoiser import ConditionSizes, SetDenoiser
from lingshu_cell.tokens import EFFECT_PSEUDOCOUNT, MASK_TOKEN, N_EXPRESSION_TOKENS

N_GENES, N_CELLS = 300, 5_000
SIZES = ConditionSizes(categories=(3,), perturbations=2, context=True, effect=True, depth=True)
LOG_LIBRARY = torch.tensor(np.log(1500.0))


def means(seed: int = 0) -> np.ndarray:
    """Expected counts of the genes of a cell of 1,500."""
    share = np.exp(np.random.default_rng(seed).normal(0, 2, N_GENES))
    return 1500 * share / share.sum()


def profile(mean_G: np.ndarray, seed: int = 0) -> Tensor:
    """Average of many cells with Poisson counts, 2 × G."""
    counts = np.random.default_rng(seed).poisson(mean_G, (N_CELLS, N_GENES))
    return torch.tensor(np.stack([(counts > 0).mean(0), np.log1p(counts).mean(0)]), dtype=torch.float32)


def told(context: list[Tensor] | None = None, effect: list[Tensor] | None = None, depth=None, n: int = 1) -> Conditions:
    """Conditions of ``n`` cells; each is told the last profile."""

    def table(rows: list[Tensor] | None) -> Profiles | None:
        if rows is None:
            return None
        return Profiles(torch.stack([torch.zeros_like(rows[0]), *rows]), torch.full((n,), len(rows)))

    depth_B = None if depth is None else torch.full((n,), float(depth)).log()
    effects = None if effect is None else [one[None] for one in effect]
    applied_BP = torch.tensor([[0.0, 1.0]]).expand(n, 2)
    return Conditions(
        torch.ones(n, 1, dtype=torch.int64), applied_BP, None, None, table(context), table(effects), depth_B
    )


def typical_mean(average: AverageCells) -> Tensor:
    detected_RG = average.detected_RG
    return detected_RG * torch.expm1(average.log_RG / detected_RG).clamp_min(1)


@pytest.fixture(scope="module")
def overall() -> Tensor:
    return profile(means())


@pytest.fixture
def average_cell() -> AverageCell:
    cell = AverageCell(N_GENES, 3)
    cell.initialise()
    return cell


def test_told_nothing_it_is_the_average_of_all_cells_and_adds_nothing(average_cell, overall):
    nothing = Conditions(torch.zeros(3, 1, dtype=torch.int64))
    average = average_cell(nothing, *overall)
    offsets = average_cell.offsets(average, *overall)
    assert average.place_B.tolist() == [0, 0, 0]
    assert not offsets.gate_RG.any()
    assert not offsets.fold_RG.any()


def test_a_context_is_taken_as_it_is_where_it_is_known(average_cell, overall):
    here = profile(means(1), 1)
    here[:, :5] = torch.nan
    average = average_cell(told(context=[here]), *overall)
    torch.testing.assert_close(average.log_RG[0, 5:], here[1, 5:])
    torch.testing.assert_close(average.log_RG[0, :5], overall[1, :5])


def test_no_effect_leaves_every_bit_and_an_effect_moves_the_mean_of_its_gene_by_as_much(average_cell, overall):
    none, some = torch.zeros(N_GENES), torch.zeros(N_GENES)
    before = average_cell(told(context=[overall]), *overall)
    same = average_cell(told(context=[overall], effect=[none]), *overall)
    assert torch.equal(same.detected_RG, before.detected_RG)
    assert torch.equal(same.log_RG, before.log_RG)
    gene = int(overall[0].argsort()[int(0.85 * N_GENES)])
    for delta in (2.0, -2.0):
        some[gene] = delta
        after = average_cell(told(context=[overall], effect=[some]), *overall)
        share, moved = (typical_mean(one)[0] / typical_mean(one)[0].sum() for one in (before, after))
        found = torch.log((moved[gene] + EFFECT_PSEUDOCOUNT) / (share[gene] + EFFECT_PSEUDOCOUNT))
        assert found == pytest.approx(delta, abs=0.25)
        assert typical_mean(after).sum() == pytest.approx(float(typical_mean(before).sum()), rel=0.04)


def test_twice_the_depth_is_what_cells_of_twice_the_counts_show(average_cell, overall):
    """The oracle: Poisson cells drawn at that depth."""
    for factor in (0.5, 2.0, 4.0):
        expected = profile(factor * means(), 7)
        average = average_cell(told(depth=1500 * factor), *overall, LOG_LIBRARY)
        often = overall[0] > 0.01
        torch.testing.assert_close(average.detected_RG[0, often], expected[0, often], atol=0.04, rtol=0)
        error = (average.log_RG[0, often] - expected[1, often]).abs()
        assert error.max() < 0.25
        assert error.mean() < 0.04
        assert (overall[1] - expected[1])[often].abs().mean() > 0.1, "so that the test can fail"


def test_a_depth_is_relative_to_how_deep_the_context_is(average_cell, overall):
    """Cells of a type with twice the counts, asked for at their own depth, are the context itself."""
    here = profile(2 * means(), 3)
    plain = average_cell(told(context=[here]), *overall, LOG_LIBRARY)
    deep = average_cell(told(context=[here], depth=3000), *overall, LOG_LIBRARY)
    torch.testing.assert_close(deep.detected_RG, plain.detected_RG, atol=0.01, rtol=0)


def test_a_depth_left_open_changes_nothing(average_cell, overall):
    conditions = told(context=[overall], depth=3000, n=2)
    open_B = torch.tensor([False, True])
    average = average_cell(conditions.without_depth(open_B), *overall, LOG_LIBRARY)
    plain = average_cell(told(context=[overall]), *overall)
    torch.testing.assert_close(average.detected_RG[average.place_B[0]], plain.detected_RG[0])
    assert (average.detected_RG[1] > plain.detected_RG[0]).float().mean() > 0.9


def network(shake: float = 0.0, mean_G: np.ndarray | None = None) -> SetDenoiser:
    generator = torch.Generator().manual_seed(0)
    mean_G = means() if mean_G is None else mean_G
    settings = TINY_SET | {"n_small_values": 8, "dropout": 0.0}
    made = SetDenoiser(N_GENES, SIZES, torch.from_numpy(token_midpoints()), **settings, generator=generator)
    tokens = encode(np.random.default_rng(0).poisson(mean_G, (N_CELLS, N_GENES)))
    table = torch.stack([torch.from_numpy((tokens == v).sum(0)) for v in range(N_EXPRESSION_TOKENS)], dim=1)
    made.start_at_frequencies(table)
    made.depth.start_at(float(np.log(mean_G.sum())), 1e-3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * shake)
    return made.eval()


@torch.no_grad()
def test_an_untrained_network_says_the_average_cell(overall):
    """Means and detection of every gene, of a condition that no cell was ever trained on."""
    here = profile(means() * np.exp(np.random.default_rng(1).normal(0, 0.7, N_GENES)), 1)
    hidden_BG = torch.full((1, N_GENES), MASK_TOKEN)
    everywhere = Positions.where(torch.ones_like(hidden_BG, dtype=torch.bool))
    p_GV = network()(hidden_BG, told(context=[here])).log_probabilities(everywhere).exp()
    error_G = (1 - p_GV[:, 0] - here[0]).abs()
    assert error_G.quantile(0.95) < 0.02, "all but genes that every cell or hardly any cell expressed in training"
    assert (overall[0] - here[0]).abs().quantile(0.95) > 0.2
    log_count_V = torch.log1p(torch.from_numpy(token_midpoints()).float())
    error_G, without_G = p_GV @ log_count_V - here[1], overall[1] - here[1]
    for genes, share in ((torch.from_numpy(means() < 4), 0.3), (torch.from_numpy(means() < 1e9), 0.5)):
        assert error_G[genes].square().mean() < share * without_G[genes].square().mean()


@torch.no_grad()
def test_evidence_is_what_differs_from_the_average_cell():
    """Summed by hand, along the codes, for genes that are visible."""
    one = network(shake=0.1)
    here = profile(means(1), 1)
    x_BG = torch.from_numpy(encode(np.random.default_rng(1).poisson(means(1), (2, N_GENES)))).long()
    x_BG[torch.rand(x_BG.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = MASK_TOKEN
    conditions = told(context=[here], effect=[torch.linspace(-1, 1, N_GENES)], depth=2500, n=2)
    average, _ = relative = one.relative_to(conditions)
    evidence = one.read(x_BG, relative)
    visible = x_BG != MASK_TOKEN
    count = torch.where(visible, one.count_T[x_BG], 0.0)
    for found, statistic, expected, weight in (
        (evidence.detected_BE, (count > 0).float(), average.detected_RG, one.detection_weight_G),
        (evidence.log_BE, torch.log1p(count), average.log_RG, one.log_weight_G),
    ):
        by_hand = ((statistic - expected) * visible) @ (one.head.gene_GE * weight[:, None])
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_cells_being_followed_are_answered_as_whole_ones():
    """Guidance asks about two conditions in every step; each keeps its own average cell."""
    one = network(shake=0.1)
    conditions = [told(context=[profile(means(k), k)], depth=1000 * k, n=2) for k in (1, 2)]
    x_BG = torch.full((2, N_GENES), MASK_TOKEN)
    cells = one.start(x_BG)
    everywhere = Positions.where(torch.ones_like(x_BG, dtype=torch.bool))
    for gene in (3, 50):
        cells.reveal(Positions(torch.tensor([0, 1]), torch.tensor([gene, gene + 1])), torch.tensor([2, 0]))
        for asked in conditions:
            followed = one.answer(cells, asked).log_probabilities(everywhere)
            torch.testing.assert_close(
                followed, one(cells.x_t_BG, asked).log_probabilities(everywhere), atol=1e-4, rtol=1e-4
            )


def test_what_is_left_is_the_library_less_what_shows(average_cell, overall):
    """Two cells of 3,000 in which the same half of all shares is visible: one showed half of its counts, one all."""
    average = average_cell(told(depth=3000, n=3), *overall, LOG_LIBRARY)
    average = replace(average, depth_B=torch.log(torch.tensor([3000.0, 3000, torch.nan])))
    share_G = average.share_RG[0]
    assert share_G.sum() == pytest.approx(1, rel=1e-5)
    visible_BG = (share_G[share_G.argsort()].cumsum(0)[share_G.argsort().argsort()] < 0.5).float().expand(3, -1)
    share_B = (visible_BG * share_G).sum(1)
    shown = float(share_B[0])
    left_B = average.left(share_B, torch.tensor([3000 * shown, 3000, 500]))
    assert left_B[0] == pytest.approx(0, abs=1e-3)
    assert left_B[1] == -2, "nothing is left, as far as it goes"
    assert left_B[2] == 0, "no depth was asked for"
    torch.testing.assert_close(average.left(torch.zeros(3), torch.zeros(3)), torch.zeros(3), atol=1e-3, rtol=0)


@torch.no_grad()
def test_cells_get_the_depth_asked_for_even_untrained():
    """Of a network that knows nothing but the average cell; without the account of what is left they scatter."""
    x_BG = torch.full((64, N_GENES), MASK_TOKEN)
    noise = draw_cell_noise(cell_seeds(0, 0, 64).tolist(), N_GENES)
    for depth, most_error in ((200, 0.05), (600, 0.25)):
        spreads = []
        for amount in (1.0, 0.0):
            one = network(mean_G=means() ** 0.3)  # as in real cells, most genes show 0, 1 or 2
            one.average_cell.left_amount_1.fill_(amount)
            made = sample_cells(one, x_BG, told(depth=depth, n=64), noise, GRIDS["uniform"](N_GENES, 30).tolist())
            log_B = one.count_T[made].sum(1).log()
            spreads.append(float(log_B.std()))
            assert not amount or (log_B.median() - np.log(depth)).abs() < most_error
        assert spreads[0] < 0.8 * spreads[1], (depth, spreads)


@torch.no_grad()
def test_no_gene_gets_more_than_is_left_of_the_library():
    """A cell of 60 that shows 40 already: a hidden gene has 20 or so at most; smaller counts keep their odds."""
    one = network(mean_G=means() ** 0.3)
    one.head.tail_bias_GJ.zero_()  # heavy tails
    x_BG = torch.full((2, N_GENES), MASK_TOKEN)
    x_BG[:, :4] = 10
    asked = told(depth=60, n=2)
    asked = replace(asked, depth_B=torch.tensor([np.log(60.0), torch.nan], dtype=torch.float32))
    everywhere = Positions.where(x_BG == MASK_TOKEN)
    p_BGV = one(x_BG, asked).log_probabilities(everywhere).exp().view(2, N_GENES - 4, -1)
    count_V = torch.from_numpy(token_midpoints())
    torch.testing.assert_close(p_BGV.sum(-1), torch.ones(2, N_GENES - 4))
    assert p_BGV[0][:, count_V > 25].sum(-1).max() < 1e-9
    assert p_BGV[1][:, count_V > 25].sum(-1).max() > 1e-4, "where no depth is asked for, nothing is ruled out"
    assert (p_BGV[0][:, 1:20] > 0).all()


def test_the_true_counts_are_never_ruled_out():
    """Whatever is visible of real-like cells, deep ones with counts beyond 100 and 1,000 too."""
    rng = np.random.default_rng(0)
    midpoints, head = torch.from_numpy(token_midpoints()).float(), network().head
    least = torch.cat([torch.arange(float(head.n_small_values)), head.tail_least_L])
    for scale in (1, 30, 3000):
        counts = rng.negative_binomial(0.3, 0.3 / (0.3 + scale), (50, 200))
        tokens = torch.from_numpy(encode(counts)).long()
        depth_B = torch.from_numpy(counts.sum(1)).clamp_min(1).float().log()
        average = AverageCells(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(50, dtype=torch.int64), depth_B)
        visible = torch.from_numpy(rng.random(counts.shape) < rng.random((50, 1)))
        shown_B = (midpoints[tokens] * visible).sum(1)
        most_B = average.most(shown_B, ((tokens == N_EXPRESSION_TOKENS - 1) & visible).any(1))
        hidden = torch.where(visible, 0.0, least[tokens])
        assert (hidden <= most_B[:, None]).all()
