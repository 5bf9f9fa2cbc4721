"""The information curve predicts exactly what few steps cost, and the schedules that follow from it are optimal.

What equals what: the sampler draws an order σ of the genes and then a cell from q_σ, whose steps draw their genes
independently given the genes of earlier steps. Under the exact denoiser, with p the data,

    predicted KL = mean over σ of KL(p || q_σ) = KL(p(x) p(σ) || q_σ(x) p(σ)),

and by convexity the KL of the cells alone, KL(p || mean over σ of q_σ), is at most that.
"""

import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import N_GENES, N_TOKENS, STATES, Oracle, product_of_marginals, random_joint, state_counts
from scipy import stats

from lingshu_cell import cli
from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.curve_store import StoredCurve, load_curve, save_curve
from lingshu_cell.diffusion.information import (
    InformationCurve,
    knots,
    measure_curve,
    non_increasing,
    optimal_grid,
    predicted_kl,
    steps_for,
)
from lingshu_cell.diffusion.plan import choose_schedule
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.diffusion.schedule import GRIDS
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import generate, load_model, resolve_schedule
from lingshu_cell.network.distribution import Positions
from lingshu_cell.output_files import read_checked_json, write_checked_json
from lingshu_cell.schedule import schedule_run
from lingshu_cell.tokens import MASK_TOKEN
from lingshu_cell.train import train

ORDERS = list(itertools.permutations(range(N_GENES)))
GRIDS_OF_3 = [np.array(g) for g in ([0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3])]
NO_CONDITION = torch.zeros(len(STATES), 0, dtype=torch.int64)


def curve_of(h, visible=None, n_genes: int | None = None) -> InformationCurve:
    """A curve with h at every count, or at the given ones."""
    visible = range(len(h)) if visible is None else visible
    h = tuple(float(v) for v in h)
    return InformationCurve(n_genes or len(h), tuple(int(n) for n in visible), h, (0.0,) * len(h), 1)


def conditional_log_p(denoise, visible: tuple[int, ...]) -> np.ndarray:
    """log p(x_g | x_visible) under a denoiser for all 64 cells and each hidden gene, 64 × 3; 0 for visible genes."""
    x_0 = torch.from_numpy(STATES)
    hidden = torch.ones(len(STATES), N_GENES, dtype=torch.bool)
    hidden[:, list(visible)] = False
    positions = Positions.where(hidden)
    answer = denoise(torch.where(hidden, MASK_TOKEN, x_0), NO_CONDITION)
    log_p = torch.zeros(len(STATES), N_GENES, dtype=torch.float64)
    log_p[hidden] = answer.log_probabilities(positions).double()[torch.arange(len(positions)), positions.of(x_0)]
    return log_p.numpy()


def exact_output(denoise, grid: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """log q_σ(x) of all 64 cells: what the sampler draws when it follows a grid in a given order."""
    log_q = np.zeros(len(STATES))
    for low, high in itertools.pairwise(grid):
        log_q += conditional_log_p(denoise, order[:low])[:, list(order[low:high])].sum(1)
    return log_q


def exact_curve(denoise, joint_S: np.ndarray) -> InformationCurve:
    """h(n) by enumeration: the mean over all visible sets, hidden genes and cells."""
    h = []
    for n in range(N_GENES):
        nats = [-joint_S @ conditional_log_p(denoise, seen) for seen in itertools.combinations(range(N_GENES), n)]
        h.append(np.mean([v.sum() / (N_GENES - n) for v in nats]))
    return curve_of(h)


@pytest.mark.parametrize("grid", GRIDS_OF_3, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_predicted_kl_is_the_enumerated_kl_of_order_and_cell(seed, grid):
    joint_S = random_joint(seed)
    oracle = Oracle(joint_S)
    log_q_by_order = np.array([exact_output(oracle, grid, order) for order in ORDERS])
    np.testing.assert_allclose(np.exp(log_q_by_order).sum(1), 1, atol=1e-6)
    of_order_and_cell = np.mean([joint_S @ (np.log(joint_S) - log_q) for log_q in log_q_by_order])
    predicted = predicted_kl(grid, exact_curve(oracle, joint_S))
    assert predicted == pytest.approx(of_order_and_cell, abs=1e-5)  # the oracle answers in float32
    of_cells_alone = joint_S @ (np.log(joint_S) - np.log(np.exp(log_q_by_order).mean(0)))
    assert of_cells_alone <= predicted + 1e-6
    if len(grid) - 1 == N_GENES:
        assert predicted == pytest.approx(0, abs=1e-5)
    elif len(grid) - 1 == 1:
        assert 0.1 < predicted == pytest.approx(of_cells_alone, abs=1e-5), "one step has no order"
    else:
        assert 1e-3 < of_cells_alone < 0.99 * predicted, "the bound is strict where orders differ"


def test_curve_sums_to_the_entropy():
    joint_S = random_joint(0)
    entropy = -joint_S @ np.log(joint_S)
    assert exact_curve(Oracle(joint_S), joint_S).everywhere.sum() == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("grid", GRIDS_OF_3, ids=str)
def test_for_any_denoiser_it_is_the_likelihood_lost_against_one_gene_at_a_time(grid):
    joint_S = random_joint(1)
    wrong = Oracle(0.6 * joint_S + 0.4 * product_of_marginals(random_joint(2)))
    curve = exact_curve(wrong, joint_S)
    assert (np.diff(curve.nats) < 0).all(), "or it would be made so, and no longer be exact"

    def nats(g) -> float:
        return float(np.mean([-joint_S @ exact_output(wrong, g, order) for order in ORDERS]))

    assert predicted_kl(grid, curve) == pytest.approx(nats(grid) - nats([0, 1, 2, 3]), abs=1e-5)


@pytest.mark.parametrize("grid", GRIDS_OF_3[:3], ids=str)
def test_enumerated_output_is_what_the_sampler_draws(grid):
    n_cells, oracle = 20_000, Oracle(random_joint(3))
    start_BG = torch.full((n_cells, N_GENES), MASK_TOKEN)
    noise = draw_cell_noise(cell_seeds(0, 0, n_cells).tolist(), N_GENES)
    x_BG = sample_cells(oracle, start_BG, torch.zeros(n_cells, 0, dtype=torch.int64), noise, grid.tolist())
    q = np.mean([np.exp(exact_output(oracle, grid, order)) for order in ORDERS], axis=0)
    assert stats.chisquare(state_counts(x_BG), n_cells * q / q.sum()).pvalue > 1e-3


@pytest.fixture(scope="module")
def measured() -> tuple[InformationCurve, np.ndarray]:
    """A curve measured on 6,000 cells of a joint, and the exact one."""
    joint_S = random_joint(4)
    x_0_BG = torch.from_numpy(STATES[np.random.default_rng(0).choice(len(STATES), 6000, p=joint_S)])
    minibatches = [(x_BG, torch.zeros(len(x_BG), 0, dtype=torch.int64)) for x_BG in x_0_BG.split(1000)]
    oracle, generator = Oracle(joint_S), torch.Generator().manual_seed(0)
    found = measure_curve(oracle, minibatches, np.arange(N_GENES), generator)
    return found, np.array(exact_curve(oracle, joint_S).nats)


def test_measured_curve_is_the_exact_one_within_its_error(measured):
    found, exact = measured
    assert (found.n_genes, found.n_cells, found.visible) == (N_GENES, 6000, (0, 1, 2))
    assert found.nats[0] == pytest.approx(exact[0], abs=0.03)
    gain, error = found.nats[0] - np.array(found.nats), np.array(found.standard_error)
    assert error[0] == 0 and (error[1:] > 0.001).all() and (error < 0.03).all()
    assert (np.abs(gain - (exact[0] - exact)) <= 4 * error).all()


def test_common_random_numbers_pay(measured):
    """Two knots measured apart, each with its own cells and masks, give their difference with more error."""
    joint_S = random_joint(4)
    rng, variance = np.random.default_rng(1), 0.0
    for n in (0, 2):
        cells = rng.choice(len(STATES), 6000, p=joint_S)
        seen = rng.permuted(np.tile(np.arange(N_GENES), (6000, 1)), axis=1)[:, :n]
        tables = {s: conditional_log_p(Oracle(joint_S), s) for s in itertools.combinations(range(N_GENES), n)}
        nats = [-tables[tuple(sorted(s))][c].sum() / (N_GENES - n) for c, s in zip(cells, seen.tolist(), strict=True)]
        variance += np.var(nats) / 6000
    print(measured[0].standard_error[2], variance**0.5)
    assert measured[0].standard_error[2] < 0.9 * variance**0.5


def test_unmeasured_genes_are_never_shown_nor_scored():
    joint_S = random_joint(5)
    x_0_BG = torch.from_numpy(STATES[np.random.default_rng(0).choice(len(STATES), 4000, p=joint_S)]).clone()
    x_0_BG[:, 2] = MASK_TOKEN
    minibatches = [(x_0_BG, torch.zeros(4000, 0, dtype=torch.int64))]
    found = measure_curve(Oracle(joint_S), minibatches, np.arange(N_GENES), torch.Generator().manual_seed(0))
    two = joint_S.reshape((N_TOKENS,) * 3).sum(2)
    entropy = [-(p * np.log(p)).sum() for p in (two.sum(1), two.sum(0), two.ravel())]
    assert found.nats[0] == pytest.approx((entropy[0] + entropy[1]) / 2, abs=0.05)
    assert found.nats[2] == pytest.approx(entropy[2] - (entropy[0] + entropy[1]) / 2, abs=0.05)


falling_curves = st.lists(st.floats(0, 3), min_size=1, max_size=9).map(lambda h: curve_of(sorted(h, reverse=True)))


@given(falling_curves)
def test_dynamic_programming_finds_the_best_of_all_grids(curve):
    g = curve.n_genes
    for n_steps in range(1, g + 1):
        middles = itertools.combinations(range(1, g), n_steps - 1)
        best = min(predicted_kl(np.array([0, *middle, g]), curve) for middle in middles)
        grid = optimal_grid(curve, n_steps)
        assert len(grid) == n_steps + 1
        assert predicted_kl(grid, curve) == pytest.approx(best, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(60, 20_000),
    st.lists(st.floats(0, 1), min_size=24, max_size=24),
    st.sampled_from([1, 2, 3, 8, 16, 60]),
)
def test_optimal_falls_with_steps_and_no_named_grid_is_better(n_genes, drops, n_steps):
    visible = knots(n_genes)
    curve = curve_of(np.cumsum(drops[: len(visible)])[::-1], visible, n_genes)
    cost = predicted_kl(optimal_grid(curve, n_steps), curve)
    tolerance = 1e-9 * curve.everywhere.sum()
    assert cost >= -tolerance
    for make_grid in GRIDS.values():
        assert cost <= predicted_kl(make_grid(n_genes, n_steps), curve) * (1 + 1e-2) + tolerance
    if n_steps > 1:
        assert cost <= predicted_kl(optimal_grid(curve, n_steps - 1), curve) + tolerance


def cell_like_curve(n_genes: int = 18_080) -> InformationCurve:
    """The shape of real curves: from 0.17 nats per gene, half of what can be known after some hundred genes."""
    visible = knots(n_genes)
    return curve_of(0.155 + 0.015 / (1 + visible / 200) - 0.0006 * np.log1p(visible), visible, n_genes)


def test_grids_for_18080_genes_come_fast_and_obey_the_order_of_the_method_notes():
    curve = cell_like_curve()
    started = time.process_time()
    for n_steps in (3, 16, 64, 256):
        grid = optimal_grid(curve, n_steps)
        assert len(grid) == n_steps + 1 and grid[0] == 0 and grid[-1] == 18_080 and (np.diff(grid) > 0).all()
        costs = {name: predicted_kl(make(18_080, n_steps), curve) for name, make in GRIDS.items()}
        best = predicted_kl(grid, curve)
        assert best < costs["cosine"] < costs["uniform"] and best < costs["geometric"]
    steps_for(curve, 1.0)
    assert time.process_time() - started < 8  # about 1 s on an idle machine


@pytest.mark.parametrize("name", ["optimal", *GRIDS])
@pytest.mark.parametrize("max_kl", [100.0, 3.0, 0.5])
def test_automatic_steps_are_the_fewest_that_keep_to_the_budget(name, max_kl):
    curve = cell_like_curve(3000)
    chosen = choose_schedule(3000, curve, steps="auto", schedule=name, max_kl=max_kl)
    assert chosen.predicted_kl <= max_kl and chosen.name == name
    assert chosen.steps == 1 or (
        choose_schedule(3000, curve, steps=chosen.steps - 1, schedule=name, max_kl=max_kl).predicted_kl > max_kl
    )


def test_a_flat_curve_needs_one_step():
    assert steps_for(curve_of([0.3] * 50), 1e-6) == 1


def test_noise_against_the_trend_is_pooled():
    value = non_increasing(np.array([5.0, 2.0, 4.0, 3.0, 1.0]), np.array([1.0, 3.0, 1.0, 1.0, 9.0]))
    np.testing.assert_allclose(value, [5, 2.6, 2.6, 2.6, 1])  # (2·3 + 4 + 3) / 5
    falling = np.sort(np.random.default_rng(0).random(20))[::-1]
    np.testing.assert_array_equal(non_increasing(falling, np.ones(20)), falling)


@pytest.mark.parametrize("n_genes", [1, 2, 3, 10, 24, 25, 13_528, 40_000])
def test_knots_reach_from_nothing_to_all_but_one(n_genes):
    visible = knots(n_genes)
    assert visible[0] == 0 and visible[-1] == n_genes - 1 and len(visible) <= 24
    assert (np.diff(visible) > 0).all()
    assert n_genes < 2 or visible[1] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "often"}, "number of steps must be a whole number or auto: 'often'"),
        ({"steps": 0}, "between 1 and the number of genes: 0 steps, 3000 genes"),
        ({"steps": 3001}, "between 1 and the number of genes: 3001 steps"),
        ({"steps": "auto", "max_kl": 0.0}, "KL budget must be more than 0 nats per cell: 0"),
        ({"steps": "auto", "max_kl": float("nan")}, "KL budget must be more than 0 nats per cell: nan"),
        ({"steps": "auto", "max_kl": 1e-7}, "KL budget must be within reach of 1024 steps: 1e-07 nats per cell"),
        (
            {"schedule": "linear"},
            "schedule must exist: 'linear'. Choose one of uniform, cosine, geometric, optimal, auto",
        ),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused(values, message):
    with pytest.raises(LingshuError, match=message):
        choose_schedule(3000, cell_like_curve(3000), **{"steps": 8, "schedule": "auto", "max_kl": 1.0, **values})


@pytest.mark.parametrize("values", [{"steps": "auto"}, {"schedule": "optimal"}], ids=str)
def test_without_a_curve_automatic_is_geometric_and_optimal_is_refused(values):
    given_values = {"steps": 8, "schedule": "auto", "max_kl": 1.0}
    plain = choose_schedule(3000, None, **given_values)
    assert plain.name == "geometric" and plain.predicted_kl is None
    np.testing.assert_array_equal(plain.grid, GRIDS["geometric"](3000, 8))
    with pytest.raises(
        LingshuError, match=r"need the run's information curve: none was measured. Run lingshu schedule"
    ):
        choose_schedule(3000, None, **{**given_values, **values})


def test_a_curve_survives_json_and_damage_is_seen():
    curve = cell_like_curve(300)
    assert InformationCurve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
    values = curve.to_json()
    for change in ({"nats": values["nats"][1:]}, {"visible": values["visible"][::-1]}, {"n_genes": 400}, {"more": 1}):
        with pytest.raises(LingshuError, match="information curve has h at visible counts from 0"):
            InformationCurve.from_json({**values, **change})


# A run: measured when training ends, used by generation, measured again on files.


def test_training_leaves_a_curve_and_generation_follows_it(trained_run):
    model = load_model(trained_run)
    curve = model.curve
    assert curve.n_genes == len(model.modelled) and curve.n_cells == 16 and curve.visible[-1] == curve.n_genes - 1
    chosen = resolve_schedule(model)
    assert chosen.name == "optimal" and chosen.steps == 8
    np.testing.assert_array_equal(chosen.grid, optimal_grid(curve, 8))
    made = generate(model, 3).uns["lingshu_cell"]["generation"]
    assert (made["schedule"], made["steps"]) == ("optimal", 8)
    assert made["visible_counts"] == " ".join(map(str, chosen.grid))
    assert made["predicted_kl_nats_per_cell"] == pytest.approx(chosen.predicted_kl)
    auto = generate(model, 3, steps="auto", max_kl=0.2).uns["lingshu_cell"]["generation"]
    assert auto["steps"] == steps_for(curve, 0.2) and auto["predicted_kl_nats_per_cell"] <= 0.2


@pytest.fixture(scope="module")
def own_run(pbmc, tmp_path_factory):
    """A run of its own to write into, without a curve in its manifest, as it was interrupted or held nothing out."""
    folder = tmp_path_factory.mktemp("schedule")
    pbmc[:160].copy().write_h5ad(folder / "train.h5ad")
    pbmc[160:].copy().write_h5ad(folder / "heldout.h5ad")
    config = tiny_config(data={"validation_fraction": 0.0}, training={"steps": 10})
    train([folder / "train.h5ad"], folder / "run", config)
    return folder


@pytest.mark.filterwarnings("ignore:Cells without any counts")
def test_schedule_measures_on_held_out_cells_and_generation_takes_it_up(own_run):
    run = own_run / "run"
    assert load_model(run).curve is None and resolve_schedule(load_model(run)).name == "geometric"
    with pytest.raises(LingshuError, match=r"follows from the information curve .* Pass --data with held-out cells"):
        schedule_run(run)
    with pytest.raises(LingshuError, match="cells that were not trained on: these data were, and the run held none"):
        schedule_run(run, [own_run / "train.h5ad"])
    found = schedule_run(run, [own_run / "heldout.h5ad"], steps=5)
    assert found.stored.measured_on == "80 cells, all taken as not trained on" and found.stored.curve.n_cells == 80
    assert found.chosen.name == "optimal" and found.chosen.steps == 5
    for row in found.table.values():
        assert row["optimal"] <= min(row.values()) + 1e-9
    optimal = [found.table[n]["optimal"] for n in sorted(found.table)]
    assert optimal == sorted(optimal, reverse=True) and optimal[0] > 0
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    assert load_model(run).curve == found.stored.curve
    assert schedule_run(run).stored == found.stored, "kept for later"


@pytest.mark.filterwarnings("ignore:Cells without any counts")
def test_schedule_finds_the_validation_cells_in_the_training_file(pbmc, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    found = schedule_run(run, [pbmc])
    assert found.stored.measured_on == "48 validation cells of the run, found again in the data it was trained on"
    by_training = load_curve(load_checkpoint(trained_run))
    assert by_training.measured_on == "16 validation cells, when training ended"
    total = np.sum(found.stored.curve.everywhere)  # the entropy bound of a cell, on 48 and on 16 of the same cells
    assert total == pytest.approx(np.sum(by_training.curve.everywhere), rel=0.2)
    with pytest.raises(LingshuError, match=r"not trained on: these data were\. Pass held-out cells, or all files"):
        schedule_run(run, [pbmc, pbmc[::2].copy()])


def test_a_stored_curve_belongs_to_one_checkpoint(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    checkpoint = load_checkpoint(run)
    other = StoredCurve(curve_of(np.linspace(1, 0.5, checkpoint.manifest["n_modelled_genes"])), "made up")
    file = save_curve(checkpoint, other)
    assert load_model(run).curve == other.curve
    stored = read_checked_json(file)
    write_checked_json(file, {**stored, "checkpoint_checksum": "0" * 64})
    assert load_model(run).curve == load_model(trained_run).curve
    text = json.dumps({**stored, "checksum": "0" * 64})
    for damaged in ("{", text):
        file.write_text(damaged)
        with pytest.raises(LingshuError, match=r"A stored schedule must be whole: .*schedule\.json.* Delete this file"):
            load_model(run)


GENERATE = ["generate", "RUN", "--n", 3, "--out", "x.h5ad"]


@pytest.fixture
def lingshu(capsys, monkeypatch):
    """Call the program in this process; gives exit code, stdout, stderr."""
    monkeypatch.setattr(cli, "send_messages_to_stderr", lambda: None)  # it would outlive the test

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return int(end.value.code), printed.out, printed.err

    return call


def test_the_command_tells_table_grid_and_picture(trained_run, tmp_path, lingshu):
    run = shutil.copytree(trained_run, tmp_path / "run")
    code, out, _ = lingshu("schedule", run, "--steps", 16, "--max-kl", 0.1, "--json")
    told = json.loads(out)
    curve = InformationCurve.from_json(told["information_curve"])
    assert code == 0 and curve == load_model(run).curve
    assert set(told["predicted_kl_nats_per_cell"]) == {"3", "8", "16", "32", "64", "128"}, "150 genes allow no 256"
    assert told["visible_counts"] == optimal_grid(curve, 16).tolist() and told["steps_for_max_kl"] == steps_for(
        curve, 0.1
    )
    code, text, _ = lingshu("schedule", run, "--steps", "auto", "--max-kl", 0.1)
    assert code == 0 and "uniform" in text and "optimal" in text and "schedule.png" in text
    assert f"at most 0.1 nats per cell: {told['steps_for_max_kl']} steps" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GENERATE, "--steps", "often"], "must be a whole number or auto: 'often'."),
        ([*GENERATE, "--steps", "auto", "--max-kl", -1], "more than 0 nats per cell: -1."),
        (["schedule", "RUN", "--steps", "-3"], "between 1 and the number of genes: -3 steps"),
        (["schedule", "nowhere"], "A run folder must hold a checkpoint"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(trained_run, tmp_path, monkeypatch, lingshu, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = lingshu(*(trained_run if word == "RUN" else word for word in words))
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_custom_schedule_reveals_the_counts_it_names():
    chosen = choose_schedule(3000, cell_like_curve(3000), steps=64, schedule="1,10,100,1000", max_kl=1.0)
    assert (chosen.name, chosen.steps, chosen.grid.tolist()) == ("custom", 5, [0, 1, 10, 100, 1000, 3000])
    assert chosen.predicted_kl == predicted_kl(chosen.grid, cell_like_curve(3000))


@pytest.mark.parametrize(
    ("text", "said"), [("1,ten", "whole visible counts"), ("10,10", "rise strictly"), ("10,3000", "rise strictly")]
)
def test_a_custom_schedule_that_is_none_is_refused(text, said):
    with pytest.raises(LingshuError, match=said):
        choose_schedule(3000, None, steps=64, schedule=text, max_kl=1.0)
