"""Baselines of perturbation responses: cells move as asked, are counts, keep their depth, and need what they say."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import typer
from conftest import SHARED_DATA, real_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from typer.testing import CliRunner

from lingshu_cell.baselines import BASELINES, conditions_of, predict_baseline, respond, write_prediction
from lingshu_cell.commands import baseline as command
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.errors import LingshuError
from lingshu_cell.perturbation_effects import PSEUDOCOUNT, mean_after, read_screen, ridge_effects

KEYS = {"perturbation_key": "perturbation", "control": "control"}
KANG = SHARED_DATA / "kang_ifnb.h5ad"
needs_kang = pytest.mark.skipif(not KANG.exists(), reason="needs the shared data")


def screen(
    effects: dict[str, np.ndarray], identities=("X", "Y", "Z"), n: int = 150, n_genes: int = 60, shift: float = 0.0
) -> ad.AnnData:
    """Poisson cells of known effects: identities differ in their profiles, and by ``shift`` in their effects."""
    rng = np.random.default_rng(0)
    counts, rows = [], []
    for i, identity in enumerate(identities):
        profile = np.exp(np.random.default_rng(100 + i).normal(0, 1, n_genes))
        for label, effect in {"control": np.zeros(n_genes), **effects}.items():
            mean = profile * np.exp(effect * (1 + shift * i))
            size = rng.lognormal(np.log(3000), 0.3, n)
            counts.append(rng.poisson(size[:, None] * mean / mean.sum()))
            rows += [(identity, label)] * n
    obs = pd.DataFrame(rows, columns=["cell_type", "perturbation"], index=[f"c{i}" for i in range(len(rows))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    return ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.int32)), obs, var)


def direction(seed: int, n_genes: int = 60, size: float = 0.8) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, n_genes)


def log_profile(counts) -> np.ndarray:
    counts = np.asarray(counts.todense() if sparse.issparse(counts) else counts, dtype=float)
    return np.log(np.mean(1e4 * counts / counts.sum(1, keepdims=True), axis=0) + PSEUDOCOUNT)


def without(adata: ad.AnnData, identity: str, *perturbations: str) -> ad.AnnData:
    return adata[~((adata.obs.cell_type == identity) & adata.obs.perturbation.isin(perturbations)).to_numpy()].copy()


def cells(adata: ad.AnnData, identity: str, perturbation: str):
    return adata.X[((adata.obs.cell_type == identity) & (adata.obs.perturbation == perturbation)).to_numpy()]


def refused(*parts: str):
    return pytest.raises(LingshuError, match=".*".join(parts))


# --- the mathematics -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), strength=st.floats(0.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_cells_reach_the_means_asked_for(seed, strength):
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(0.6, 2.0, 25), size=(4000, 25)).astype(np.int32))
    before = np.asarray(counts.mean(axis=0), dtype=float).ravel()
    after = mean_after(before, rng.normal(0, strength, 25))
    moved = respond(counts, before, after, rng)
    assert moved.dtype == np.int32 and moved.data.min(initial=1) > 0 and moved.shape == counts.shape
    assert after.sum() == pytest.approx(before.sum())
    error = np.asarray(moved.mean(axis=0)).ravel() - after
    # Thinning and adding are drawn: a standard error is at most sqrt(mean) / sqrt(n).
    assert np.all(np.abs(error) < 6 * np.sqrt(np.maximum(after, before) / 4000) + 1e-3)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_no_effect_leaves_every_count(seed):
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(0.3, 1.0, 30), size=(50, 30)).astype(np.int32))
    before = rng.gamma(1.0, 300.0, 30)
    assert np.array_equal(mean_after(before, np.zeros(30)), before)
    assert (respond(counts, before, mean_after(before, np.zeros(30)), rng) != counts).nnz == 0


def test_a_falling_gene_never_gains_and_a_rising_one_never_loses():
    rng = np.random.default_rng(3)
    counts = sparse.csr_matrix(rng.poisson(3.0, size=(300, 4)).astype(np.int32))
    before, after = np.array([3.0, 3.0, 3.0, 3.0]), np.array([1.0, 5.0, 3.0, 3.0])
    change = (respond(counts, before, after, rng) - counts).toarray()
    assert change[:, 0].max() == 0 and change[:, 0].min() < 0
    assert change[:, 1].min() == 0 and change[:, 1].max() > 0
    assert not change[:, 2:].any()


def test_a_silent_gene_can_be_switched_on_in_proportion_to_depth():
    rng = np.random.default_rng(4)
    size = np.repeat([1000, 4000], 2000)
    counts = sparse.csr_matrix(np.stack([rng.poisson(size), np.zeros(4000, int)], axis=1).astype(np.int32))
    moved = respond(counts, np.array([1e4, 0.0]), np.array([9900.0, 100.0]), rng).toarray()[:, 1]
    assert moved[2000:].mean() / moved[:2000].mean() == pytest.approx(4, rel=0.1)


# --- the baselines recover a known truth -----------------------------------------------------------------------------


def test_additive_recovers_an_effect_shared_by_identities():
    effect = direction(1)
    truth = screen({"A": effect})
    found = predict_baseline(
        "additive",
        without(truth, "Z", "A"),
        [{"cell_type": "Z", "perturbation": "A", "n": 2000}],
        **KEYS,
        identity_keys=["cell_type"],
    )
    wanted = log_profile(cells(truth, "Z", "A")) - log_profile(cells(truth, "Z", "control"))
    got = log_profile(found.X) - log_profile(cells(truth, "Z", "control"))
    assert np.corrcoef(wanted, got)[0, 1] > 0.98
    assert (got @ wanted) / (wanted @ wanted) == pytest.approx(1, abs=0.05)


def test_a_combination_is_the_sum_of_its_parts():
    a, b = direction(1, size=0.5), direction(2, size=0.5)
    truth = screen({"A": a, "B": b, "A+B": a + b}, identities=("X",), n=600)
    training = without(truth, "X", "A+B")
    base = log_profile(cells(truth, "X", "control"))
    wanted = log_profile(cells(truth, "X", "A+B")) - base
    got = {}
    for label in ("A+B", "A+control+B", "A"):
        found = predict_baseline("additive", training, [{"perturbation": label, "n": 3000}], **KEYS)
        got[label] = log_profile(found.X) - base
    assert np.corrcoef(wanted, got["A+B"])[0, 1] > 0.97 > np.corrcoef(wanted, got["A"])[0, 1]
    assert np.abs(got["A+B"] - got["A+control+B"]).max() < 0.2
    with refused("Additive effects need every perturbation", r"'A\+B'"):
        predict_baseline("additive", training, [{"perturbation": "A+B"}], **KEYS, separator="/")


def test_ridge_follows_the_embedding_where_the_mean_effect_cannot():
    axes = np.stack([direction(7), direction(8)])
    angles = np.linspace(0, 2 * np.pi, 13)[:-1]
    table = pd.DataFrame(
        np.stack([np.cos(angles), np.sin(angles)], axis=1), index=[f"P{i}" for i in range(12)], columns=["u", "v"]
    )
    truth = screen({name: row @ axes for name, row in zip(table.index, table.to_numpy(), strict=True)}, ("X",), n=100)
    training = without(truth, "X", "P0")
    base = log_profile(cells(truth, "X", "control"))
    wanted = log_profile(cells(truth, "X", "P0")) - base

    def score(name: str, **options) -> float:
        found = predict_baseline(name, training, [{"perturbation": "P0", "n": 1500}], **KEYS, **options)
        return np.corrcoef(log_profile(found.X) - base, wanted)[0, 1]

    noise = pd.DataFrame(np.random.default_rng(0).normal(size=(12, 2)), index=table.index)
    assert score("ridge", embeddings=table) > 0.95
    assert score("ridge", embeddings=noise) < 0.5
    assert score("context_mean") < 0.5
    assert 0.6 < score("nearest_neighbour", embeddings=table) < score("ridge", embeddings=table)


def test_ridge_without_embeddings_follows_the_control_profiles():
    rng, n_genes = np.random.default_rng(5), 60
    axis, effect = direction(11, size=1.0), direction(12, size=1.0)
    counts, rows = [], []
    for i, where in enumerate(np.linspace(-1, 1, 9)):
        for label, factor in (("control", 0.0), ("A", where)):
            mean = np.exp(axis * where + effect * factor)
            counts.append(rng.poisson(4000 * mean / mean.sum(), size=(120, n_genes)))
            rows += [(f"T{i}", label)] * 120
    obs = pd.DataFrame(rows, columns=["cell_type", "perturbation"], index=[f"c{i}" for i in range(len(rows))])
    adata = ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.int32)), obs)
    wanted = log_profile(cells(adata, "T1", "A")) - log_profile(cells(adata, "T1", "control"))
    found = read_screen(without(adata, "T1", "A"), **KEYS, identity_keys=["cell_type"])
    got = ridge_effects(found, [(("T1",), "A")], None)[("T1",), "A"]
    assert np.corrcoef(wanted, got)[0, 1] > 0.95
    assert np.corrcoef(wanted, found.shared_effect("A"))[0, 1] < 0  # the plain mean points the other way


def test_nearest_neighbour_takes_the_identity_whose_controls_are_alike():
    adata = screen({"A": direction(1)}, identities=("X", "Y"))
    twin = adata[(adata.obs.cell_type == "Y").to_numpy() & (adata.obs.perturbation == "control").to_numpy()].copy()
    twin.obs["cell_type"] = "Y2"
    training = ad.concat([adata, twin], index_unique="-")
    adata = training.copy()
    changed = ((adata.obs.cell_type == "X") & (adata.obs.perturbation == "A")).to_numpy()
    adata.X = sparse.csr_matrix(np.where(changed[:, None], adata.X.toarray()[:, ::-1], adata.X.toarray()))
    options = {**KEYS, "identity_keys": ["cell_type"]}
    found = predict_baseline(
        "nearest_neighbour", adata, [{"cell_type": "Y2", "perturbation": "A", "n": 1500}], **options
    )
    base = log_profile(twin.X)
    assert np.corrcoef(log_profile(found.X) - base, log_profile(cells(adata, "Y", "A")) - base)[0, 1] > 0.97


def test_pools_are_the_real_cells_they_claim_to_be():
    adata = screen({"A": direction(1), "B": direction(2)})
    training = without(adata, "Z", "A")
    options = {**KEYS, "identity_keys": ["cell_type"]}
    by_name = pd.Series(range(training.n_obs), index=training.obs_names)
    for name, belongs in {
        "control_bootstrap": lambda obs: (obs.cell_type == "Z") & (obs.perturbation == "control"),
        "perturbation_mean": lambda obs: (obs.cell_type != "Z") & (obs.perturbation == "A"),
        "context_mean": lambda obs: (obs.cell_type == "Z") & (obs.perturbation == "B"),
    }.items():
        found = predict_baseline(name, training, [{"cell_type": "Z", "perturbation": "A", "n": 400}], **options)
        rows = by_name[found.obs["source_cell"].astype(str)].to_numpy()
        assert belongs(training.obs.iloc[rows]).all()
        assert (training.X[rows] != found.X).nnz == 0
        pool = belongs(training.obs).sum()
        assert len(set(rows)) > 0.7 * pool * (1 - np.exp(-400 / pool))  # a bootstrap of all of them


def test_the_own_condition_is_not_looked_at_by_the_context_mean():
    adata = screen({"A": direction(1), "B": direction(2)}, identities=("X",))
    found = predict_baseline("context_mean", adata, [{"perturbation": "A", "n": 300}], **KEYS)
    labels = adata.obs["perturbation"][found.obs["source_cell"].astype(str)]
    assert set(labels) == {"B"}


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_integer_cells_with_labels_and_provenance(name, tmp_path):
    adata = screen({f"P{i}": direction(i, size=0.4) for i in range(5)}, n=60)
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), index=[f"P{i}" for i in range(5)])
    heldout = adata[((adata.obs.cell_type == "Y") & adata.obs.perturbation.isin(["P0", "P3"])).to_numpy()]
    options = {**KEYS, "identity_keys": ["cell_type"]}
    wanted = conditions_of(heldout, **options)
    assert wanted == [{"cell_type": "Y", "perturbation": p, "n": 60} for p in ("P0", "P3")]
    training = without(adata, "Y", "P0", "P3")
    found = predict_baseline(name, training, wanted, embeddings=table, **options)
    written = read_counts(write_prediction(found, tmp_path / "p.h5ad", chunk_cells=50))
    assert written.obs.groupby(["cell_type", "perturbation"], observed=True).size().to_dict() == {
        ("Y", "P0"): 60,
        ("Y", "P3"): 60,
    }
    assert (written.counts != found.X).nnz == 0 and list(written.gene_names) == list(adata.var_names)
    made_by = ad.read_h5ad(tmp_path / "p.h5ad").uns["lingshu_cell"]
    assert made_by["baseline"] == name and made_by["control"] == "control" and "lingshu-cell" in made_by["versions"]
    source = training[found.obs["source_cell"].astype(str).tolist()]
    depth = np.asarray(found.X.sum(1)).ravel() / np.asarray(source.X.sum(1)).ravel()
    assert abs(np.log(depth).mean()) < 0.05  # a response changes composition, not depth


def test_a_condition_does_not_depend_on_what_else_is_asked_and_the_seed_counts():
    adata = screen({"A": direction(1), "B": direction(2)}, identities=("X",), n=60)
    alone = predict_baseline("additive", adata, [{"perturbation": "B", "n": 40}], **KEYS)
    both = predict_baseline("additive", adata, [{"perturbation": "A", "n": 30}, {"perturbation": "B", "n": 40}], **KEYS)
    other = predict_baseline("additive", adata, [{"perturbation": "B", "n": 40}], **KEYS, seed=1)
    assert (both.X[30:] != alone.X).nnz == 0
    assert (other.X != alone.X).nnz > 0


def test_real_cells_without_a_perturbation_stay_themselves():
    adata = real_cells(120, 100)
    adata.obs["perturbation"] = np.where(np.arange(120) < 80, "control", "A")
    found = predict_baseline("control_bootstrap", adata, [{"perturbation": "A"}], **KEYS, n_cells=50)
    source = adata[found.obs["source_cell"].astype(str).tolist()]
    assert found.n_obs == 50 and (found.X != source.X).nnz == 0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_say_what_is_missing():
    adata = screen({f"P{i}": direction(i) for i in range(4)}, n=20)
    options = {**KEYS, "identity_keys": ["cell_type"]}
    here = [{"cell_type": "X", "perturbation": "P9"}]
    with refused("A baseline has a known name", "'mean'", "additive"):
        predict_baseline("mean", adata, here, **options)
    with refused("Additive effects need every perturbation in training", r"'P9' \(1\)", "embeddings"):
        predict_baseline("additive", adata, here, **options)
    with refused("Without embeddings, ridge needs the perturbation in 3 other identities", "--embeddings"):
        predict_baseline("ridge", adata, here, **options)
    with refused("nearest neighbour needs the perturbation in training, or its embedding", "'P9'"):
        predict_baseline("nearest_neighbour", adata, here, **options)
    with refused("needs training cells of the perturbation in another identity", "'X / P9'"):
        predict_baseline("perturbation_mean", adata, here, **options)
    table = pd.DataFrame(np.eye(4), index=[f"P{i}" for i in range(4)])
    with refused("Ridge needs an embedding of every perturbation", "'P9'"):
        predict_baseline("ridge", adata, here, embeddings=table, **options)
    with refused("At least 3 training perturbations need an embedding", "1 have one", "'P1', 'P2', 'P3'"):
        predict_baseline("ridge", adata, here, embeddings=pd.DataFrame(np.eye(2), index=["P0", "P9"]), **options)
    with refused("Every identity needs control cells", "'W'"):
        predict_baseline("additive", adata, [{"cell_type": "W", "perturbation": "P0"}], **options)
    with refused("A condition gives cell_type, perturbation", "'cell_type', 'dose'"):
        predict_baseline("additive", adata, [{"perturbation": "P0", "dose": 1}], **options)
    with refused("asked for once", "'X / P0'"):
        predict_baseline("additive", adata, [{"cell_type": "X", "perturbation": "P0"}] * 2, **options)
    with refused("A number of cells is 1 or more", "n = 0"):
        predict_baseline("additive", adata, [{"cell_type": "X", "perturbation": "P0", "n": 0}], **options)
    with refused("Training cells must include controls", "'ctrl'", "'P0'"):
        predict_baseline("additive", adata, here, **{**options, "control": "ctrl"})
    with refused("There must be something to predict"):
        predict_baseline("additive", adata, [], **options)
    with refused("There must be perturbed cells to predict"):
        conditions_of(adata[adata.obs.perturbation == "control"], **options)
    with refused("Keys must be obs columns", "'line'", "Available"):
        conditions_of(adata, **KEYS, identity_keys=["line"])
    with refused("Embeddings are finite numbers"):
        predict_baseline("ridge", adata, here, embeddings=pd.DataFrame({"a": ["x"]}, index=["P9"]), **options)


def test_training_perturbations_without_embedding_are_named():
    adata = screen({f"P{i}": direction(i) for i in range(5)}, identities=("X",), n=20)
    table = pd.DataFrame(np.eye(4), index=[f"P{i}" for i in range(4)])
    with pytest.warns(UserWarning, match="without embedding are not used: 'P4'"):
        predict_baseline("ridge", adata, [{"perturbation": "P1"}], embeddings=table, **KEYS)


# --- the command and real data ---------------------------------------------------------------------------------------


def test_the_command_writes_a_file_like_the_heldout_one(tmp_path):
    adata = screen({f"P{i}": direction(i) for i in range(4)}, n=30)
    without(adata, "Y", "P1").write_h5ad(tmp_path / "train.h5ad")
    heldout = ((adata.obs.cell_type == "Y") & (adata.obs.perturbation == "P1")).to_numpy()
    adata[heldout].copy().write_h5ad(tmp_path / "h.h5ad")
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), index=[f"P{i}" for i in range(4)])
    table.to_csv(tmp_path / "e.csv")
    app = typer.Typer()
    app.command()(command.baseline)
    files = ["--training", str(tmp_path / "train.h5ad"), "--like", str(tmp_path / "h.h5ad")]
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--identity-key", "cell_type"]
    out = tmp_path / "ridge.h5ad"
    result = CliRunner().invoke(
        app, ["ridge", *files, *keys, "--embeddings", str(tmp_path / "e.csv"), "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["n_conditions"], said["n_cells"], said["n_genes"]) == (1, 30, 60)
    assert set(ad.read_h5ad(out).obs["perturbation"]) == {"P1"}
    again = CliRunner().invoke(app, ["additive", *files, *keys, "--out", str(out)])
    assert again.exit_code == 1 and isinstance(again.exception, LingshuError)
    text = CliRunner().invoke(app, ["additive", *files, *keys, "--out", str(out), "--overwrite", "--n", "7"])
    assert text.exit_code == 0 and "1 conditions, 7 cells" in text.output


def test_the_command_names_every_baseline():
    assert tuple(BASELINES) == command.NAMES


@needs_kang
def test_baselines_foretell_interferon_in_a_held_out_cell_type():
    """Held-out NK cells: additive well above the pooled cells of other types, no response near zero."""
    adata = ad.read_h5ad(KANG)
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(adata.n_obs, 2500, replace=False))
    nk = np.flatnonzero((adata.obs.cell_type == "NK cells").to_numpy())
    adata = adata[np.union1d(kept, nk)].copy()
    heldout = ((adata.obs.cell_type == "NK cells") & (adata.obs.perturbation != "control")).to_numpy()
    nk_controls = rng.permutation(
        np.flatnonzero(((adata.obs.cell_type == "NK cells") & (adata.obs.perturbation == "control")).to_numpy())
    )
    truth_side, other_side = nk_controls[::2], nk_controls[1::2]
    training = adata[np.setdiff1d(np.flatnonzero(~heldout), truth_side)]
    options = {**KEYS, "identity_keys": ["cell_type"]}

    def mean_log(counts) -> np.ndarray:
        values = counts.toarray().astype(float)
        return np.log1p(1e4 * values / values.sum(1, keepdims=True)).mean(axis=0)

    wanted = mean_log(adata.X[heldout]) - mean_log(adata.X[truth_side])
    score = {}
    for name in ("control_bootstrap", "perturbation_mean", "additive", "ridge", "nearest_neighbour"):
        found = predict_baseline(name, training, conditions_of(adata[heldout], **options), **options)
        score[name] = np.corrcoef(mean_log(found.X) - mean_log(adata.X[other_side]), wanted)[0, 1]
    assert abs(score["control_bootstrap"]) < 0.1
    assert min(score["additive"], score["ridge"], score["nearest_neighbour"]) > 0.7
    assert score["perturbation_mean"] < score["additive"]
