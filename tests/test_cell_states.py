"""Cell states: groups that mean something, the same for every process, drawn first and left open where nobody knows."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from conftest import real_cells, tiny_config
from safetensors.torch import load_file
from scipy import sparse

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.cell_states import CellStates, learn_states, number_of_states
from lingshu_cell.data.cells_with_states import CellsWithStates, with_states
from lingshu_cell.data.stored_cells import open_cells
from lingshu_cell.data.training_set import assemble
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import generate, load_model
from lingshu_cell.model import LingshuCell
from lingshu_cell.prepare import prepare
from lingshu_cell.tokens import STATE_FIELDS
from lingshu_cell.train import train

N_STATES = 6


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """600 real cells × 400 genes, named types only."""
    adata = real_cells(650, 400)
    return adata[adata.obs["cell_type"] != "unassigned"][:600].copy()


@pytest.fixture(scope="module")
def states(cells) -> CellStates:
    return learn_states(sparse.csr_matrix(cells.X), N_STATES, seed=0)


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
    """A short training with states."""
    out = tmp_path_factory.mktemp("states") / "run"
    train([cells], out, tiny_config(data={"states": N_STATES}))
    return out


# --- groups ---------------------------------------------------------------------------------------------------------


def test_states_of_real_cells_are_of_one_type_mostly():
    adata = ad.read_h5ad(pbmc3k_path())
    found = learn_states(sparse.csr_matrix(adata.X), 24, seed=0)
    state_N, type_N = found.of(adata.X)[:, 0], adata.obs["cell_type"].to_numpy()
    purity = sum(np.unique(type_N[state_N == k], return_counts=True)[1].max() for k in np.unique(state_N)) / adata.n_obs
    assert purity > 0.8 and 16 <= len(found) <= 24
    sizes = np.bincount(state_N)[1:]
    assert sizes.min() >= 15 and sizes[0] > sizes[-1]


def test_state_is_the_nearest_centre_by_the_plain_formula(cells, states):
    x = cells.X.toarray().astype(float)
    log = np.log1p(1e4 * x / x.sum(1, keepdims=True))[:, states.gene_H]
    score = np.minimum((log - states.mean_H) / states.sd_H, 10) @ states.axes_HQ
    nearest = ((score[:, None] - states.centre_KQ) ** 2).sum(2).argmin(1)
    left = score - states.centre_KQ[nearest]
    programme = ((left[:, None] - states.offset_LQ) ** 2).sum(2).argmin(1)
    assert (states.of(sparse.csr_matrix(cells.X)) == 1 + np.stack([nearest, programme], 1)).all()
    assert len(states) > 2 and (np.bincount(nearest, minlength=len(states)) > 0).all()
    assert len(states.offset_LQ) > 1 and (np.bincount(programme, minlength=len(states.offset_LQ)) >= 18).all()


def test_groups_are_the_same_each_time_and_none_is_of_a_handful_of_cells(cells, states):
    again = learn_states(sparse.csr_matrix(cells.X), N_STATES, seed=0)
    assert all((a == b).all() for a, b in zip(vars(again).values(), vars(states).values(), strict=True))
    many = learn_states(sparse.csr_matrix(cells.X), 60, seed=0)
    assert len(many) < 60, "groups of fewer than 20 cells are given to their neighbours"


@pytest.mark.filterwarnings("error")
def test_cells_of_which_few_differ_are_few_states(cells):
    copies = sparse.csr_matrix(cells.X)[np.repeat(np.arange(20), 25)]
    found = learn_states(copies, 22, seed=0)
    assert len(found) == 20 and len(np.unique(found.of(copies))) == 20
    assert len(found.offset_LQ) == 0, "nothing is left within the states"
    assert len(learn_states(copies[:25], 2, seed=0)) == 0, "all cells are alike"


def test_damaged_states_are_refused(states):
    assert states.checked(400) is states
    for broken in (
        replace(states, gene_H=states.gene_H + 400),
        replace(states, sd_H=states.sd_H * 0),
        replace(states, centre_KQ=states.centre_KQ * np.nan),
        replace(states, axes_HQ=states.axes_HQ[1:]),
        replace(states, centre_KQ=states.centre_KQ[:, 1:]),
        replace(states, offset_LQ=states.offset_LQ[:, 1:]),
        replace(states, offset_LQ=states.offset_LQ * np.inf),
    ):
        with pytest.raises(ValueError, match="cell states"):
            broken.checked(400)


def test_genes_that_a_data_set_lacks_are_not_used(cells):
    usable = np.arange(cells.n_vars) % 3 > 0
    assert usable[learn_states(sparse.csr_matrix(cells.X), N_STATES, 0, usable).gene_H].all()


@pytest.mark.parametrize(("n_cells", "n"), [(799, 0), (800, 8), (2430, 24), (10**8, 64)])
def test_number_of_states_by_default(n_cells, n):
    assert number_of_states("auto", n_cells) == n
    assert number_of_states(0, n_cells) == 0 and number_of_states(20, n_cells) == 20


def test_states_that_cannot_be_are_refused(cells, tmp_path):
    with pytest.raises(
        LingshuError, match=r"needs 20 training cells: 50 states of 480 training cells\. Ask for 24 or fewer"
    ):
        train([cells], tmp_path / "run", tiny_config(data={"states": 50}))
    assert not (tmp_path / "run").exists()
    few = cells[:, :100].copy()
    with pytest.raises(LingshuError, match="need 200 genes that vary"):
        train([few], tmp_path / "run", tiny_config(data={"states": 4}))
    cells.obs["drug"] = np.where(np.arange(cells.n_obs) % 4, "A", "none")
    with pytest.raises(LingshuError, match="needs 20 control cells: 10 states of 1"):
        train(
            [cells.copy()],
            tmp_path / "run",
            tiny_config(data={"states": 10, "perturbation_key": "drug", "control": "none"}),
        )
    del cells.obs["drug"]
    for name in STATE_FIELDS:
        with pytest.raises(LingshuError, match=f"'{name}' is what cell states are called"):
            tiny_config(data={"condition_keys": [name]})


# --- as a condition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "store"])
def test_every_cell_has_its_state_however_it_is_read(cells, tmp_path, place):
    if place == "memory":
        inner = assemble([read_counts(cells)], condition_keys=["cell_type"])
    else:
        cells.write_h5ad(tmp_path / "cells.h5ad")
        prepare([tmp_path / "cells.h5ad"], tmp_path / "store")
        inner = open_cells(tmp_path / "store", condition_keys=["cell_type"])
    found = with_states(inner, N_STATES, seed=0)
    assert isinstance(found, CellsWithStates) and list(found.conditions.fields) == [*STATE_FIELDS, "cell_type"]
    some = np.asarray(found.validation[:20])
    rows = found.rows(some)
    assert (rows.condition_BC == found.condition_rows(some)).all()
    assert (rows.condition_BC[:, :2] == found.states.of(inner.counts_of(some)[0])).all()
    assert (rows.condition_BC[:, 2:] == inner.condition_rows(some)).all()
    drawn, plain = (one.draws(32, 0, 0.0)(3) for one in (found, inner))
    assert (drawn.condition_BC[:, 2:] == plain.condition_BC).all()
    known = {tuple(row) for row in found.condition_frequencies()[0].tolist()}
    assert {tuple(row) for row in drawn.condition_BC.tolist()} <= known
    assert (drawn.tokens != plain.tokens).nnz == 0


def test_resumed_run_keeps_the_states_it_began_with(cells, run, tmp_path):
    config = tiny_config(data={"states": N_STATES})
    calls = iter(range(100))
    out = tmp_path / "run"

    def stop(progress):
        if next(calls) == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([cells], out, config, on_progress=stop)
    train([cells], out, config, resume=True)
    whole, resumed = (load_checkpoint(one).folder for one in (run, out))
    for name in ("weights", "conditioning"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, resumed))
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def test_generated_cells_come_from_all_states_and_a_state_can_be_asked_for(run):
    model = load_model(run)
    drawn = generate(model, 60, seed=1)
    assert drawn.obs["lingshu_state"].nunique() > 2 and drawn.obs["lingshu_programme"].nunique() > 1
    pairs = set(map(tuple, model.conditions.decode(model.condition_rows).astype(str).to_numpy()))
    assert set(map(tuple, drawn.obs[[*STATE_FIELDS, "cell_type"]].astype(str).to_numpy())) <= pairs
    asked = generate(model, 10, condition={"lingshu_state": "02"})
    assert set(asked.obs["lingshu_state"]) == {"02"}
    with pytest.raises(LingshuError, match="'99'"):
        generate(model, 5, condition={"lingshu_state": "99"})


def test_bound_is_measured_with_the_state_left_open(run, cells):
    model, some = LingshuCell.load(run), cells[:20].copy()
    open_state = model.nelbo(some, n_masks=2)
    some.obs["lingshu_state"] = some.obs["lingshu_programme"] = "01"
    assert model.nelbo(some, n_masks=2) == open_state


def test_labels_that_no_training_cell_has_together_are_generated_with_the_state_open(cells, tmp_path):
    donor = np.where(cells.obs["cell_type"] == "B cells", "D1", "D2")
    donor[::2][cells.obs["cell_type"][::2] != "B cells"] = "D1"
    labelled = cells.copy()
    labelled.obs["donor"] = donor
    config = tiny_config(data={"states": N_STATES, "condition_keys": ["cell_type", "donor"]}, training={"steps": 4})
    train([labelled], tmp_path / "run", config)
    model = load_model(tmp_path / "run")
    made = generate(model, 6, condition={"cell_type": "B cells", "donor": "D2"}, steps=4)
    assert made.obs[list(STATE_FIELDS)].isna().all(axis=None) and set(made.obs["donor"]) == {"D2"}
    assert 0.2 < np.asarray(made.X.sum(1)).mean() / np.asarray(cells.X.sum(1)).mean() < 5


# --- with perturbations ---------------------------------------------------------------------------------------------

CONTROL = ("drug", "none")


@pytest.fixture(scope="module")
def screen(cells) -> ad.AnnData:
    """Every cell as control, and once more with 40 of its genes many times as high; NK cells have no drug, and one
    cell of B another.
    """
    treated = cells.copy()
    x = treated.X.toarray().astype(np.int32)
    x[:, 50:90] += np.random.default_rng(0).poisson(6, (len(x), 40)).astype(np.int32)
    treated.X = sparse.csr_matrix(x)
    treated.obs["drug"], cells_1 = "A", cells.copy()
    cells_1.obs["drug"] = "none"
    treated = treated[treated.obs["cell_type"] != "NK cells"].copy()
    treated.obs["drug"] = np.where(np.arange(treated.n_obs) == 7, "B", treated.obs["drug"])
    both = ad.concat([cells_1, treated], index_unique="-")
    both.var = cells.var
    return both


@pytest.fixture(scope="module")
def told(screen) -> CellsWithStates:
    keys = {"condition_keys": ["cell_type"], "perturbation_key": CONTROL[0], "control": CONTROL[1]}
    inner = assemble([read_counts(screen, None, ["cell_type", "drug"])], **keys, validation_fraction=0.0)
    return with_states(inner, N_STATES, seed=0, control=CONTROL)


def test_states_with_perturbations_are_learned_from_control_cells(screen, told):
    control = np.flatnonzero(screen.obs["drug"] == "none")
    alone = learn_states(told.counts_of(control)[0], N_STATES, seed=0)
    assert all((a == b).all() for a, b in zip(vars(alone).values(), vars(told.states).values(), strict=True))


def test_a_perturbed_cell_is_in_the_state_it_was_in_before(screen, told):
    """The same cells before and after, though the drug moves them all far from the centres."""
    state_NS = told.condition_rows(np.arange(screen.n_obs))[:, : len(STATE_FIELDS)]
    of = dict(zip(screen.obs_names, state_NS, strict=True))
    moved = told.states.of(told.counts_of(np.arange(screen.n_obs))[0])
    same, same_if_told = [], []
    for name, drug, by_counts in zip(screen.obs_names, screen.obs["drug"], moved, strict=True):
        if drug == "A":
            before = of[name.removesuffix("-1") + "-0"][0]
            same.append(of[name][0] == before)
            same_if_told.append(by_counts[0] == before)
    assert np.mean(same) > 0.7 > 0.4 > np.mean(same_if_told)


def test_conditions_of_few_cells_have_no_state(screen, told):
    found = told.condition_rows(np.arange(screen.n_obs))[:, : len(STATE_FIELDS)]
    lonely = (screen.obs["drug"] == "B").to_numpy()
    n = screen.obs.groupby(["cell_type", "drug"], observed=True)["cell_type"].transform("size").to_numpy()
    assert (found[lonely] == 0).all() and (found[(n >= 20) & ~lonely] > 0).all()
    opened = told.states_open
    assert (opened.condition_rows(np.arange(9))[:, :2] == 0).all() and (
        told.condition_rows(np.arange(9))[:, 0] > 0
    ).all()


@pytest.fixture(scope="module")
def screen_runs(screen, tmp_path_factory):
    """Trained with states, to the end and with a stop, and without."""
    folder = tmp_path_factory.mktemp("screen")
    keys = {"perturbation_key": CONTROL[0], "control": CONTROL[1]}
    states, plain = (
        tiny_config(data={**keys, "states": n}, training={"steps": 8, "checkpoint_every": 4}) for n in (N_STATES, 0)
    )
    calls = iter(range(100))

    def stop(progress):
        if next(calls) == 5:
            raise KeyboardInterrupt

    train([screen], folder / "states", states)
    train([screen], folder / "plain", plain)
    with pytest.raises(KeyboardInterrupt):
        train([screen], folder / "resumed", states, on_progress=stop)
    train([screen], folder / "resumed", states, resume=True)
    return folder


def test_contexts_and_effects_are_those_without_states(screen_runs):
    states, plain = (load_model(screen_runs / name).conditioner for name in ("states", "plain"))
    np.testing.assert_array_equal(states.effects.effect_KG, plain.effects.effect_KG)
    np.testing.assert_array_equal(states.effects.condition_KC[1:, 2:], plain.effects.condition_KC[1:])
    np.testing.assert_allclose(states.contexts.profile_KJG, plain.contexts.profile_KJG, rtol=1e-6)
    rows = load_model(screen_runs / "states").condition_rows
    assert states.identity_names(rows) == plain.identity_names(rows[:, 2:])
    told, wanted = states.conditions(rows), plain.conditions(rows[:, 2:])
    for name in ("context", "effect"):
        one, other = (getattr(of, name) for of in (told, wanted))
        np.testing.assert_allclose(one.table_KJG[one.row_B], other.table_KJG[other.row_B], rtol=1e-6)


def test_a_resumed_screen_keeps_its_states(screen_runs):
    whole, resumed = (load_checkpoint(screen_runs / name).folder for name in ("states", "resumed"))
    for name in ("weights", "conditioning", "data"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, resumed))
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def test_a_pair_never_trained_is_drawn_in_the_states_of_its_control_cells(screen_runs):
    model = load_model(screen_runs / "states")
    made = generate(model, 40, condition={"cell_type": "NK cells", "drug": "A"}, steps=4)
    known = model.conditions.decode(model.condition_rows).astype(str)
    of_control = known[(known["cell_type"] == "NK cells") & (known["drug"] == "none")]
    assert set(map(tuple, made.obs[list(STATE_FIELDS)].astype(str).to_numpy())) <= set(
        map(tuple, of_control[list(STATE_FIELDS)].astype(str).to_numpy())
    )
    assert set(made.obs["drug"]) == {"A"} and made.obs["lingshu_state"].nunique() > 1
    notes = [note for note in made.uns["lingshu_cell"]["perturbation"]["notes"] if "expected effect" in note]
    assert len(notes) == 1, "one effect, whatever the states"
