"""Genes that a perturbation silences in other identities, and its target, start at 1 UMI where it is generated."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED_DATA, tiny_config

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.de_tables import read_de_table, strongly_down_regulated
from lingshu_cell.data.training_set import assemble
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import TrainedModel, generate, load_model, plan_cells, steering_of
from lingshu_cell.metrics.differential import write_differential
from lingshu_cell.silenced import SILENCED_FILE, measure_silenced, read_silenced
from lingshu_cell.train import train

KANG = SHARED_DATA / "kang_ifnb.h5ad"
pytestmark = pytest.mark.skipif(not KANG.is_file(), reason="the shared data are not here")
pytest.importorskip("pdex")

TYPES = ("B cells", "Dendritic cells", "FCGR3A+ Monocytes")
SILENCED = {"Dendritic cells": {"INSIG1", "IL8"}, "FCGR3A+ Monocytes": {"CD14", "IL8"}}  # of genes kept below
DATA = {"condition_keys": ["cell_type"], "perturbation_key": "perturbation", "control": "control", "silenced": True}


@pytest.fixture(scope="module")
def kang() -> ad.AnnData:
    """150 cells of each of three types and both conditions; the perturbation is called by a gene, RPL3."""
    cells = ad.read_h5ad(KANG)
    groups = cells.obs.groupby(["cell_type", "perturbation"], observed=True).indices
    rng = np.random.default_rng(0)
    chosen = [rng.choice(rows, 150, replace=False) for (kind, _), rows in groups.items() if kind in TYPES]
    detected = np.asarray((cells.X > 0).sum(0)).ravel()
    genes = cells.var_names[np.argsort(-detected, kind="stable")[:1500]].union(["IL8", "CD14", "INSIG1", "RPL3"])
    cells = cells[np.sort(np.concatenate(chosen)), genes].copy()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).replace({"IFNB": "RPL3"})
    cells.obs = cells.obs[["cell_type", "perturbation"]]
    return cells


@pytest.fixture(scope="module")
def model(kang, tmp_path_factory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("silenced")
    config = tiny_config(data=DATA, training={"steps": 5})
    train([kang], folder / "run", config)
    return load_model(folder / "run")


def asked(kind: str, label: str = "RPL3") -> dict[str, str]:
    return {"cell_type": kind, "perturbation": label}


def started(model: TrainedModel, condition: dict[str, str] | None, **settings) -> dict[tuple[str, str], set[str]]:
    """Genes that a plan holds, by condition."""
    plan = plan_cells(model, 4, condition=condition, **settings)
    names = np.array([model.genes.names[g] for g in model.modelled])
    found = {}
    for row, columns in plan.silenced.items():
        labels = plan.request.conditioner.vocabulary.decode(np.array([row])).astype(str).iloc[0]
        found[labels["cell_type"], labels["perturbation"]] = set(names[columns])
    return found


def test_training_leaves_what_obeys_the_rule(model, kang):
    """The table holds every gene that obeys the rule on the training cells, whole tables being compared."""
    kept = read_silenced(model.checkpoint.folder.parent)
    cells = assemble([read_counts(kang, None, ["cell_type", "perturbation"])], **model.config.data.assembly())
    measured = measure_silenced(cells, model.conditioner.identity_names, model.config.data)
    pd.testing.assert_frame_equal(kept.table, measured, check_dtype=False)
    assert set(zip(measured["identity"], measured["target"], strict=True)) == {(kind, "RPL3") for kind in TYPES}
    obeys = measured[(measured["fdr"] < 0.05) & (measured["log2_fold_change"] < -1) & (measured["target_mean"] < 1)]
    for kind, genes in SILENCED.items():
        assert genes <= set(obeys["feature"][obeys["identity"] == kind])
        normalised = kang[(kang.obs["cell_type"] == kind).to_numpy()]
        means = normalised[:, sorted(genes)].to_df().groupby(normalised.obs["perturbation"].to_numpy()).mean()
        assert (means.loc["control"] > means.loc["RPL3"] + 0.5).all()


def test_each_condition_holds_its_target_and_what_other_identities_silence(model):
    steering = steering_of(model, prior="silenced")
    b_cells = started(model, asked("B cells"), steering=steering)["B cells", "RPL3"]
    assert {"RPL3", "IL8", "CD14", "INSIG1"} <= b_cells
    dendritic = started(model, asked("Dendritic cells"), steering=steering)["Dendritic cells", "RPL3"]
    assert {"RPL3", "IL8", "CD14"} <= dendritic
    assert "INSIG1" not in dendritic, "its own cells do not count"
    assert started(model, asked("B cells", "control"), steering=steering) == {}
    several = started(model, None, steering=steering)
    assert set(several) == {(kind, "RPL3") for kind in TYPES}
    assert several["Dendritic cells", "RPL3"] == dendritic and several["B cells", "RPL3"] == b_cells


def test_generated_cells_have_one_count_of_each_and_the_others_are_drawn(model):
    cells = generate(model, 24, steering=steering_of(model, prior="silenced"))
    perturbed = (cells.obs["perturbation"] == "RPL3").to_numpy()
    assert 3 < perturbed.sum() < 21
    counts = cells.to_df()
    assert (counts.loc[perturbed, ["RPL3", "IL8"]] == 1).all(None)
    elsewhere = perturbed & (cells.obs["cell_type"] != "Dendritic cells").to_numpy()
    assert elsewhere.any() and (counts.loc[elsewhere, "INSIG1"] == 1).all()
    assert (counts.loc[~perturbed, "RPL3"] != 1).mean() > 0.5
    told = cells.uns["lingshu_cell"]["perturbation"]
    assert told["prior"] == "silenced: the training cells"
    assert any("RPL3 in B cells:" in note and "2 other identities measured" in note for note in told["notes"])


def test_a_users_clamp_goes_before_the_prior(model):
    steering = steering_of(model, prior="silenced", clamp={"IL8": 7})
    cells = generate(model, 6, condition=asked("B cells"), steering=steering).to_df()
    assert (cells["IL8"] == 7).all() and (cells["RPL3"] == 1).all()


def test_tables_of_lingshu_de_and_of_other_screens_serve(model, kang, tmp_path):
    """A folder of lingshu de; and a table without identities, all of whose rows are other contexts."""
    keys = {"perturbation_key": "perturbation", "control": "control", "identity_keys": ["cell_type"]}
    write_differential(kang, tmp_path / "de", **keys)
    steering = steering_of(model, prior="silenced", de_tables=tmp_path / "de")
    found = {k: strongly_down_regulated(t)["RPL3"] for k, t in read_de_table(tmp_path / "de").groupby("identity")}
    others = {*found["B cells"], *found["FCGR3A+ Monocytes"]}
    modelled = {model.genes.names[g] for g in model.modelled}
    held = started(model, asked("Dendritic cells"), steering=steering)["Dendritic cells", "RPL3"]
    assert held == ({"RPL3"} | others) & modelled and len(held) > 3
    assert not set(found["Dendritic cells"]) <= held
    table = pd.DataFrame(
        {"target": "RPL3", "feature": ["FTH1", "B2M", "FTL"], "target_mean": [0.5, 0.5, 1.5], "ref_mean": 5.0,
         "log2_fold_change": [-3.0, -3.0, -3.0], "fdr": [0.01, 0.2, 0.01]}
    )  # fmt: skip
    table.to_csv(tmp_path / "other.csv", index=False)
    steering = steering_of(model, prior="silenced", de_tables=tmp_path / "other.csv")
    assert started(model, asked("B cells"), steering=steering)["B cells", "RPL3"] == {"RPL3", "FTH1"}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"prior": "loud"}, "The prior must exist"),
        ({"de_tables": "x.csv"}, "Tables of differential expression serve a prior"),
    ],
)
def test_priors_that_make_no_sense_are_refused(model, options, rule):
    with pytest.raises(LingshuError) as caught:
        steering_of(model, **options)
    assert caught.value.rule == rule


def test_without_tables_or_perturbations_there_is_no_such_prior(trained_run, model, tmp_path):
    with pytest.raises(LingshuError) as caught:
        steering_of(load_model(trained_run), prior="silenced")
    assert caught.value.rule == "Holding silenced genes low needs tables of differential expression"
    steering = steering_of(model, prior="silenced")
    with pytest.raises(LingshuError) as caught:
        plan_cells(load_model(trained_run), 3, steering=steering)
    assert caught.value.rule == "Silenced genes are those of a perturbation"
    assert (model.checkpoint.folder.parent / SILENCED_FILE).is_file()


def test_tables_of_training_that_were_changed_are_not_used(model, tmp_path):
    run = model.checkpoint.folder.parent
    expected = model.checkpoint.manifest["silenced_sha256"]
    assert read_silenced(run, expected=expected).source == "the training cells"
    (tmp_path / SILENCED_FILE).write_bytes((run / SILENCED_FILE).read_bytes()[:-20])
    with pytest.raises(LingshuError, match=r"tables of a run must be whole: .*silenced\.csv does not match"):
        read_silenced(tmp_path, expected=expected)
