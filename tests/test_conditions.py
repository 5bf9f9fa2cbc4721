"""What a denoiser is told can be forgotten part by part, and each part says what it should and no more."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_SET
from torch import Tensor

from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.diffusion.priors import clamp
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.diffusion.schedule import GRIDS
from lingshu_cell.network.conditions import Conditions, Profiles
from lingshu_cell.network.distribution import CountDistribution, PartialCells, Positions
from lingshu_cell.network.perturbation import PerturbationReader
from lingshu_cell.network.set_denoiser import ConditionSizes, SetDenoiser, SummedCells
from lingshu_cell.tokens import MASK_TOKEN

N_GENES, B = 60, 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told() -> Conditions:
    """Four cells: control, one perturbation, two, and unknown; profiles of rows 1, 2, 2 and none."""
    context = torch.rand(3, 2, N_GENES, generator=rng(1))
    effect = torch.randn(3, 1, N_GENES, generator=rng(2)) * 0.5
    context[0], effect[0] = 9.0, 9.0  # row 0 stands for none and must not be read
    row_B = torch.tensor([1, 2, 2, 0])
    return Conditions(
        torch.tensor([[1, 2], [2, 1], [2, 2], [0, 1]]),
        torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]),
        torch.tensor([[0.0, 0, 0], [0, 0.7, 0], [0, -0.4, -0.4], [0, 0, 0]]),
        torch.randn(3, 5, generator=rng(3)),
        Profiles(context, row_B),
        Profiles(effect, row_B),
        torch.tensor([7.0, 8.0, 9.0, float("nan")]),
    )


def network(embedding: int = 5) -> SetDenoiser:
    sizes = ConditionSizes((3, 3), perturbations=3, embedding=embedding, context=True, effect=True, depth=True)
    made = SetDenoiser(
        N_GENES, sizes, torch.from_numpy(token_midpoints()), **TINY_SET | {"dropout": 0.0}, n_small_values=8,
        generator=rng(),
    )  # fmt: skip
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(100 + i)) * 0.2)
        made.detection_G.copy_(torch.rand(N_GENES, generator=rng(4)))
        made.mean_log_G.copy_(torch.rand(N_GENES, generator=rng(5)))
    return made.eval()


def half_visible(n: int = B) -> Tensor:
    x_BG = torch.poisson(torch.full((n, N_GENES), 1.5), generator=rng(6)).long()
    return torch.where(torch.rand(n, N_GENES, generator=rng(7)) < 0.5, x_BG, MASK_TOKEN)


def probabilities(distribution: CountDistribution, n: int = B) -> Tensor:
    everywhere = Positions.where(torch.ones(n, N_GENES, dtype=torch.bool))
    return distribution.log_probabilities(everywhere).exp().view(n, N_GENES, -1)


def same(one: Conditions, other: Conditions) -> None:
    for name in ("category_BC", "perturbation_BP", "dose_BP", "embedding_PQ"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("context", "effect"):
        assert torch.equal(getattr(one, name).row_B, getattr(other, name).row_B), name
        assert torch.equal(getattr(one, name).table_KJG, getattr(other, name).table_KJG), name
    assert torch.equal(one.depth_B.nan_to_num(-1), other.depth_B.nan_to_num(-1))


KNOWN = torch.tensor([True, False, True, False])


def test_forgetting_nothing_changes_nothing_and_does_not_write():
    conditions, everything = told(), torch.ones(B, dtype=torch.bool)
    for name in ("only", "without_categories", "without_perturbation", "without_context", "without_depth"):
        same(getattr(conditions, name)(everything), told())
        getattr(conditions, name)(KNOWN)
    same(conditions, told())


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        ("without_categories", {"category_BC"}),
        ("without_perturbation", {"perturbation_BP", "dose_BP", "effect"}),
        ("without_context", {"context"}),
        ("without_depth", {"depth_B"}),
        ("only", {"category_BC", "perturbation_BP", "dose_BP", "effect", "context", "depth_B"}),
    ],
)
def test_each_part_is_forgotten_in_the_cells_named_and_nowhere_else(name, forgotten):
    before, after = told(), getattr(told(), name)(KNOWN)
    for part in ("category_BC", "perturbation_BP", "dose_BP", "context", "effect", "depth_B"):
        one, other = getattr(before, part), getattr(after, part)
        one, other = (x.row_B if isinstance(x, Profiles) else x.nan_to_num(0) for x in (one, other))
        assert torch.equal(one[KNOWN], other[KNOWN]), part
        assert torch.equal(other[~KNOWN], torch.zeros_like(other[~KNOWN]) if part in forgotten else one[~KNOWN]), part
    assert torch.equal(after.embedding_PQ, before.embedding_PQ)


def test_conditions_of_categories_alone_can_be_forgotten_too():
    plain = Conditions.of(torch.tensor([[1], [2]]))
    assert plain.only(torch.tensor([True, False])).category_BC.tolist() == [[1], [0]]
    assert plain.only(torch.tensor([True, False])).perturbation_BP is None
    assert Conditions.of(plain) is plain
    assert len(plain) == 2


def test_moving_keeps_every_part():
    same(told().to("cpu"), told())
    assert Conditions(torch.zeros(2, 1)).to("cpu").effect is None


def test_distinct_profiles_are_those_that_occur_and_row_0_reads_as_zeros():
    table = torch.randn(5, 2, 7, generator=rng())
    table[0] = torch.nan
    profiles = Profiles(table, torch.tensor([3, 0, 1, 3, 3]))
    rows, place = profiles.distinct()
    assert rows.shape == (3, 2, 7)
    expected = table[profiles.row_B].clone()
    expected[1] = 0
    assert torch.equal(rows[place], expected)
    assert profiles.known().tolist() == [True, False, True, True, True]
    rows, place = Profiles(table, torch.tensor([2, 2])).distinct()
    assert torch.equal(rows, table[2:3])


@torch.no_grad()
def test_row_0_of_a_profile_and_nan_depth_are_as_if_nothing_was_told():
    made, x_BG = network(), half_visible()
    silent = replace(told(), context=None, effect=None, depth_B=None)
    nothing = torch.zeros(B, dtype=torch.int64)
    empty = replace(
        told(),
        context=replace(told().context, row_B=nothing),
        effect=replace(told().effect, row_B=nothing),
        depth_B=torch.full((B,), torch.nan),
    )
    torch.testing.assert_close(
        probabilities(made(x_BG, empty)), probabilities(made(x_BG, silent)), rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("part", ["perturbation_BP", "dose_BP", "embedding_PQ", "context", "effect", "depth_B"])
def test_every_part_that_is_told_matters_and_only_to_its_cell(part):
    made, x_BG = network(), half_visible()
    plain, value = probabilities(made(x_BG, told())), getattr(told(), part)
    if isinstance(value, Profiles):
        changed = replace(value, row_B=torch.tensor([1, 1, 2, 0]))
    elif part == "embedding_PQ":
        changed = value + torch.tensor([[0.0], [0], [1]])  # of the perturbation that only cell 2 has
    else:
        changed = value.clone()
        changed[1] += 1
    after = probabilities(made(x_BG, replace(told(), **{part: changed})))
    touched = [2] if part == "embedding_PQ" else [1]
    for cell in range(B):
        difference = (after[cell] - plain[cell]).abs().max()
        assert difference > 1e-4 if cell in touched else difference < 1e-5, (cell, difference)


@torch.no_grad()
def test_nan_in_a_context_tells_nothing():
    """A gene that a context did not measure may hold anything else that equals what is expected of it."""
    made, x_BG = network(), half_visible()
    unmeasured, expected = told().context.table_KJG.clone(), told().context.table_KJG.clone()
    unmeasured[1:, :, ::3] = torch.nan
    expected[1:, 0, ::3], expected[1:, 1, ::3] = made.detection_G[::3], made.mean_log_G[::3]
    one, other = (
        probabilities(made(x_BG, replace(told(), context=Profiles(table, told().context.row_B))))
        for table in (unmeasured, expected)
    )
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_context_measured_nowhere_is_finite():
    table = told().context.table_KJG.clone()
    table[1:] = torch.nan
    answer = network()(half_visible(), replace(told(), context=Profiles(table, told().context.row_B)))
    assert probabilities(answer).isfinite().all()


def reader() -> PerturbationReader:
    made = PerturbationReader(3, 5, 16)
    with torch.no_grad():
        made.residual_PD.normal_(generator=rng())
        made.dose_PD.normal_(generator=rng(1))
    return made.eval()


def applied(*perturbations: int, n: int = 3, dose: float | None = None) -> Conditions:
    chosen = torch.zeros(1, n)
    chosen[0, list(perturbations)] = 1
    embedding_PQ = torch.randn(4, 5, generator=rng(9))[:n]
    none = torch.zeros(1, 0, dtype=torch.int64)
    return Conditions(none, chosen, None if dose is None else chosen * dose, embedding_PQ)


def test_a_combination_is_the_sum_of_its_parts():
    made = reader()
    torch.testing.assert_close(made(applied(1, 2)), made(applied(1)) + made(applied(2)))
    torch.testing.assert_close(made(applied(1, 2, dose=0.5)), made(applied(1, dose=0.5)) + made(applied(2, dose=0.5)))
    assert (made(applied()) == 0).all()


def test_a_standardised_dose_of_0_is_no_dose_at_all():
    made = reader()
    torch.testing.assert_close(made(applied(1, dose=0.0)), made(applied(1)))
    up, down = (made(applied(1, dose=d)) - made(applied(1)) for d in (1.5, -1.5))
    torch.testing.assert_close(up, -down)
    assert up.abs().max() > 0.1


def test_an_unseen_perturbation_is_one_whose_residual_is_0():
    made = reader()
    unseen = applied(3, n=4)
    known = PerturbationReader(4, 5, 16)
    known.load_state_dict(
        {
            "residual_PD": torch.cat([made.residual_PD, torch.zeros(1, 16)]),
            "dose_PD": torch.cat([made.dose_PD, torch.zeros(1, 16)]),
            "embedding.weight": made.embedding.weight,
        }
    )
    torch.testing.assert_close(made(unseen), known.eval()(unseen))
    torch.testing.assert_close(made(applied(1, 3, n=4)), made(applied(1)) + made(unseen))
    assert made(unseen).abs().max() > 0.1


def test_residuals_are_left_out_in_training_only_and_only_where_an_embedding_stands_in():
    made = reader().train()
    torch.manual_seed(0)
    control = replace(applied(0), embedding_PQ=applied(0).embedding_PQ.index_fill(0, torch.tensor([0]), 0.0))
    assert all(torch.equal(made(control), made.residual_PD[:1]) for _ in range(50)), "control has no embedding"
    alone = made.embedding(applied(1).embedding_PQ[1:2])
    left_out = sum(torch.allclose(made(applied(1)), alone, atol=1e-5) for _ in range(500)) / 500
    assert abs(left_out - 0.2) < 0.06
    made.eval()
    assert not torch.allclose(made(applied(1)), alone, atol=1e-2)


def test_perturbations_start_without_an_effect():
    made = PerturbationReader(3, 5, 16).train()
    made.initialise()
    assert (made(applied(1, 2, dose=0.5)) == 0).all()


@pytest.mark.parametrize("schedule", ["geometric", "uniform"])
def test_evidence_being_followed_is_that_of_reading_anew(schedule, monkeypatch):
    """Over a whole sampling, in small steps that add up and large ones that are read anew, with clamped genes."""
    made, seen = network(), []
    start_BG = clamp(torch.full((6, N_GENES), MASK_TOKEN), {3: 5, 40: 130, 41: 0})
    plain_reveal = SummedCells.reveal

    def reveal(self, positions, token_M):
        plain_reveal(self, positions, token_M)
        assert len(self._followed) == 1
        relative, evidence = self.of(few)
        fresh = made.read(self.x_t_BG, relative)
        for name in vars(fresh):
            torch.testing.assert_close(getattr(evidence, name), getattr(fresh, name), rtol=1e-3, atol=2e-3, msg=name)
        seen.append(len(positions) * SummedCells._DENSE_FROM > self.x_t_BG.numel())

    monkeypatch.setattr(SummedCells, "reveal", reveal)
    noise = draw_cell_noise(cell_seeds(0, 0, 6).tolist(), N_GENES)
    few = replace(told(), **{
        name: torch.cat([value, value[:2]]) for name, value in vars(told()).items()
        if isinstance(value, Tensor) and name != "embedding_PQ"
    }, context=None, effect=None)  # fmt: skip
    x_BG = sample_cells(made, start_BG, few, noise, GRIDS[schedule](N_GENES, 57).tolist())
    assert len(seen) > 20
    assert False in seen
    assert (x_BG[:, [3, 40, 41]] == torch.tensor([5, 130, 0])).all()
    plain = sample_cells(made.__call__, start_BG, few, noise, GRIDS[schedule](N_GENES, 57).tolist())
    assert (x_BG != plain).float().mean() < 0.02, "near ties only"


def test_other_cells_than_its_own_are_read_anew():
    made, x_BG = network(), half_visible()
    with torch.no_grad():
        one = probabilities(made.answer(PartialCells(x_BG), told()))
        torch.testing.assert_close(one, probabilities(made(x_BG, told())))
        torch.testing.assert_close(one, probabilities(made.answer(made.start(x_BG), told())))
