"""Perturbations end to end on real cells: train, resume, and ask for what training never showed."""

import shutil
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, TINY_SET
from scipy import sparse

from lingshu_cell.config import Config, load_config
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, write_embeddings
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import (
    Steering,
    TrainedModel,
    generate,
    generate_file,
    load_model,
    plan_cells,
    request_of,
    steering_of,
)
from lingshu_cell.shown_effects import _shown
from lingshu_cell.train import train

KANG = SHARED_DATA / "kang_ifnb.h5ad"
pytestmark = pytest.mark.skipif(not KANG.is_file(), reason="the shared data are not here")

TYPES = ("B cells", "CD14+ Monocytes", "CD4 T cells")
HELD_OUT = {"cell_type": "B cells", "perturbation": "IFNB"}
SPLIT = """
perturbation_key = "perturbation"
control = "control"
identity_key = "cell_type"
[held_out]
pairs = [{ cell_type = "B cells", perturbation = "IFNB" }]
"""


def assert_same_cells(one: ad.AnnData, other: ad.AnnData) -> None:
    assert (one.obs.astype(str) == other.obs.astype(str)).all(None)
    assert list(one.obs_names) == list(other.obs_names)
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())


@pytest.fixture(scope="module")
def kang() -> ad.AnnData:
    """360 real cells × 600 genes of four cell types; a third of the stimulated cells are called JAKI, and every
    stimulated cell has one of two doses.
    """
    cells = ad.read_h5ad(KANG)
    rng = np.random.default_rng(0)
    chosen = []
    for (kind, _), rows in cells.obs.groupby(["cell_type", "perturbation"], observed=True).indices.items():
        if kind in (*TYPES, "NK cells"):
            chosen.append(rng.choice(rows, 45, replace=False))
    cells = cells[np.sort(np.concatenate(chosen))]
    detected = np.asarray((cells.X > 0).sum(0)).ravel()
    by_detection = cells.var_names[np.argsort(-detected, kind="stable")[:1800:3]]
    cells = cells[:, by_detection.union(["B2M", "ISG15"], sort=False)].copy()
    labels = cells.obs["perturbation"].astype(str).to_numpy(dtype=object)
    labels[(labels == "IFNB") & (np.arange(len(labels)) % 3 == 0)] = "JAKI"
    cells.obs["perturbation"] = labels
    cells.obs["dose"] = np.where(labels == "control", np.nan, rng.choice([1.0, 10.0], len(labels)))
    cells.obs = cells.obs[["cell_type", "perturbation", "dose"]]
    return cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("perturbations")
    (folder / "split.toml").write_text(SPLIT, encoding="utf-8")
    names = ["IFNB", "JAKI", "IFNG", "TNF", "IL6"]
    vectors = np.random.default_rng(1).normal(size=(len(names), 6)).astype(np.float32)
    write_embeddings(GeneEmbeddings.of(names, vectors, "a test"), folder / "embeddings.npz")
    return folder


def settings(folder: Path, **sections) -> Config:
    base = {
        "data": {
            "condition_keys": ["cell_type"], "perturbation_key": "perturbation", "control": "control",
            "dose_key": "dose", "depth": True, "split": str(folder / "split.toml"),
            "embeddings": [str(folder / "embeddings.npz")], "validation_fraction": 0.2,
        },
        "network": TINY_SET,
        "training": {
            "steps": 12, "minibatch_size": 32, "warmup_steps": 2, "peak_learning_rate": 1e-2, "validate_every": 6,
            "checkpoint_every": 4, "device": "cpu",
        },
        "generation": {"steps": 5, "minibatch_size": 16, "tile_size": 8},
    }  # fmt: skip
    return load_config(overrides={name: {**base[name], **sections.get(name, {})} for name in base})


def train_quietly(cells: ad.AnnData, run: Path, config: Config, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cells without any counts|No effects can be measured without control cells")
        return train([cells], run, config, **options)


@pytest.fixture(scope="module")
def known(kang) -> ad.AnnData:
    """Without NK cells, which are an identity that training never sees."""
    return kang[kang.obs["cell_type"].isin(TYPES)].copy()


@pytest.fixture(scope="module")
def run(known, folder) -> Path:
    train_quietly(known, folder / "run", settings(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def model(run) -> TrainedModel:
    return load_model(run)


@pytest.fixture(scope="module")
def held_out(model) -> ad.AnnData:
    return generate(model, 12, condition=HELD_OUT)


def test_the_model_was_told_everything(model, known):
    conditioner = model.conditioner
    assert conditioner.perturbations.names == ("control", "IFNB", "JAKI")
    assert conditioner.sizes.categories == (4,)
    assert (conditioner.sizes.perturbations, conditioner.sizes.embedding) == (3, 6)
    assert conditioner.sizes.context
    assert conditioner.sizes.effect
    assert conditioner.sizes.depth
    doses = known.obs["dose"].dropna()
    assert 0 < conditioner.dose_mean < np.log(10)
    assert abs(conditioner.dose_mean - np.log(doses).mean()) < 0.3
    rows = model.conditions.decode(model.condition_rows).astype(str)
    assert not ((rows["cell_type"] == "B cells") & (rows["perturbation"] == "IFNB")).any()
    assert model.condition_row_counts.sum() == model.checkpoint.manifest["n_training_cells"]


def test_every_part_of_what_it_is_told_learns(run):
    """Twelve steps move every reader, so none of them is left out of the graph."""
    first = {n: p.clone() for n, p in untrained(run).named_parameters()}
    told = ("perturbation.", "context.", "effect.", "depth.", "condition.")
    moved = {n: bool((p != first[n]).any()) for n, p in load_model(run, weights="weights").network.named_parameters()}
    assert all(moved[n] for n in moved if n.startswith(told)), [n for n in moved if not moved[n]]


def untrained(run: Path) -> torch.nn.Module:
    """The network as it was before the first step."""
    from lingshu_cell.data.tokenizer import token_midpoints
    from lingshu_cell.network.denoiser import build_denoiser

    model = load_model(run)
    midpoints = torch.from_numpy(token_midpoints())
    return build_denoiser(model.config.network, len(model.modelled), model.conditioner.sizes, midpoints, 0)


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(run, known, folder, tmp_path):
    part = tmp_path / "run"
    shutil.copytree(run, part)
    for checkpoint in part.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 8:
            shutil.rmtree(checkpoint)
    assert load_model(part).checkpoint.step == 8  # the two newest are kept
    train_quietly(known, part, settings(folder), resume=True)
    whole, resumed = load_model(run).checkpoint, load_model(part).checkpoint
    assert resumed.step == whole.step == 12
    for kind in ("weights", "ema_0.05", "ema_0.10", "optimizer", "buffers", "conditioning", "data"):
        one, other = whole.tensors(kind), resumed.tensors(kind)
        assert one.keys() == other.keys()
        assert not [name for name in one if not torch.equal(one[name], other[name])], kind
    assert resumed.manifest == whole.manifest


def test_resuming_under_another_split_is_refused(run, known, folder, tmp_path):
    part, split = tmp_path / "run", folder / "split.toml"
    shutil.copytree(run, part)
    split.write_text(SPLIT.replace('"IFNB"', '"JAKI"'), encoding="utf-8")
    try:
        with pytest.raises(LingshuError, match=r"changed: 'files that the settings name, e\.g\. the split'"):
            train_quietly(known, part, settings(folder), resume=True)
    finally:
        split.write_text(SPLIT, encoding="utf-8")


ASKED = {
    "held-out pair": {"condition": HELD_OUT},
    "combination": {"condition": {"cell_type": "B cells", "perturbation": "IFNB+JAKI"}},
    "unseen perturbation": {"condition": {"cell_type": "B cells", "perturbation": "IFNG"}, "unseen": "embedding"},
    "unseen in a combination": {"condition": HELD_OUT | {"perturbation": "IFNB+IFNG"}, "unseen": "embedding"},
    "dose": {"condition": HELD_OUT, "dose": 1e9},  # far out, as twelve steps learn little
    "depth": {"condition": HELD_OUT, "depth": 3000},
    "depth of the model": {"condition": HELD_OUT, "depth": "model"},
    "open depth": {"condition": HELD_OUT, "depth": "open"},
    "guidance": {"condition": HELD_OUT, "steering": Steering(guidance_scale=2.0)},
    "late guidance": {"condition": HELD_OUT, "steering": Steering(guidance_scale=8.0, guidance_ramp=1.0)},
    "guidance on logits": {"condition": HELD_OUT, "steering": Steering(guidance_scale=2.0, guidance_space="logits")},
    "clamp": {"condition": HELD_OUT, "steering": Steering(clamp={"B2M": 123})},
    "tilt": {"condition": HELD_OUT, "steering": Steering(tilt={"B2M": 0.2, "ISG15": 4.0})},
    "all": {
        "condition": {"cell_type": "B cells", "perturbation": "JAKI+IFNG"}, "unseen": "embedding", "dose": 2.0,
        "depth": 2000, "steering": Steering(guidance_scale=1.5, clamp={"B2M": 7}, tilt={"ISG15": 3.0}),
    },
    "everything open": {},
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_cells_depend_on_nothing_but_their_seed_and_what_is_asked(model, asked):
    """Neither on the minibatch size, nor on where a restart began; and they are whole cells with their labels."""
    whole = generate(model, 12, **asked)
    assert_same_cells(generate(model, 12, minibatch_size=8, **asked), whole)
    assert_same_cells(generate(model, 5, first=6, **asked), whole[6:11])
    assert whole.X.dtype == np.int32
    assert sparse.issparse(whole.X)
    assert whole.X.data.min() > 0
    for key, label in asked.get("condition", {}).items():
        assert (whole.obs[key] == label).all()


@pytest.mark.parametrize(
    "name", [n for n in ASKED if n not in ("held-out pair", "depth of the model", "everything open")]
)
def test_every_wish_changes_the_cells(model, held_out, name):
    cells = generate(model, 12, **ASKED[name])
    assert (cells.X != held_out.X).nnz > 0


def test_the_depth_of_the_model_is_the_default_and_one_of_training(model, held_out):
    assert_same_cells(generate(model, 12, condition=HELD_OUT, depth="model"), held_out)


def test_a_clamped_gene_keeps_its_very_count(model):
    """Also above 99, where a token stands for ten counts or more; and at 0."""
    for count in (0, 1, 57, 123, 4567):
        cells = generate(model, 6, condition=HELD_OUT, steering=Steering(clamp={"B2M": count}))
        assert set(cells[:, "B2M"].X.toarray().ravel()) == {count}


def test_a_tilt_moves_its_gene(model):
    gene = "B2M"
    plain, less, more = (
        generate(model, 64, condition=HELD_OUT, steering=Steering(tilt={gene: f}))[:, gene].X.toarray().mean()
        for f in (1.0, 0.25, 4.0)
    )
    assert less < 0.5 * plain < 2 * plain < more


def test_guidance_of_1_and_empty_priors_change_nothing(model, held_out):
    assert_same_cells(generate(model, 12, condition=HELD_OUT, steering=Steering(1.0, "logits", 0.5, 3.0)), held_out)
    assert_same_cells(generate(model, 12, condition=HELD_OUT, steering=Steering(tilt={"B2M": 1.0})), held_out)


@pytest.mark.parametrize("space", ["log-mean", "logits"])
def test_control_guided_any_far_is_control(model, space):
    """Both branches are the same for control cells."""
    condition = HELD_OUT | {"perturbation": "control"}
    plain, guided = (generate(model, 12, condition=condition, steering=Steering(scale, space)) for scale in (1.0, 5.0))
    assert_same_cells(guided, plain)


def test_a_context_stands_for_an_identity_never_trained(model, kang, known):
    controls = kang[(kang.obs["cell_type"] == "NK cells") & (kang.obs["perturbation"] == "control")].copy()
    asked = {"condition": {"perturbation": "IFNB"}, "context": controls}
    cells = generate(model, 12, **asked)
    assert_same_cells(generate(model, 12, minibatch_size=8, **asked), cells)
    assert cells.obs["cell_type"].isna().all()
    notes = list(cells.uns["lingshu_cell"]["perturbation"]["notes"])
    assert notes[0] == "identity told by 45 control cells; 100% of the genes are in them"
    assert notes[1].startswith("expected effect from other identities: 2; confidence")
    others = known[(known.obs["cell_type"] == TYPES[1]) & (known.obs["perturbation"] == "control")].copy()
    assert (generate(model, 12, **asked | {"context": others}).X != cells.X).nnz > 0


def test_a_context_that_lacks_genes_is_told_by_those_it_has(model, kang):
    controls = kang[(kang.obs["cell_type"] == "NK cells") & (kang.obs["perturbation"] == "control")].copy()
    some = controls[:, : int(0.7 * controls.n_vars)].copy()
    cells = generate(model, 12, condition={"perturbation": "IFNB"}, context=some)
    assert cells.uns["lingshu_cell"]["perturbation"]["notes"][0].endswith("70% of the genes are in them")
    assert np.isfinite(cells.X.data).all()


def test_unseen_perturbations_are_told_with_what_is_expected_of_them(model):
    cells = generate(model, 8, **ASKED["unseen perturbation"])
    notes = list(cells.uns["lingshu_cell"]["perturbation"]["notes"])
    assert notes[0] == "'IFNG' (1) was never trained: told by its embedding"
    assert notes[1:] == ["no effect to expect: neither other identities nor embeddings tell of it"]  # too few to fit


def test_a_foretold_effect_is_shown_whole(known, folder, tmp_path):
    """Without doses the means of a network that sees nothing change by what is foretold, whatever it does with it."""
    train_quietly(known, tmp_path / "run", settings(folder, data={"dose_key": None}))
    model = load_model(tmp_path / "run")
    with torch.no_grad():
        model.network.average_cell.gate_weight_G *= 0.7
        model.network.average_cell.value_weight_G *= 0.7
    asked = request_of(model, HELD_OUT)
    planned = plan_cells(model, 4, condition=HELD_OUT).request
    count_V = torch.from_numpy(token_midpoints()).float()
    told = model.conditioner.predict_effect(asked.rows[0]).delta
    share = []
    for request in (asked, planned):
        shown = _shown(request.conditioner, request.rows, model.network, count_V)[0]
        share.append(float(told @ shown / (told @ told)))
    assert share[0] < 0.9 and share[1] == pytest.approx(1, abs=0.02), share
    assert "times as strongly, so that it shows whole" in planned.notes[-1]
    seen = {"cell_type": "CD4 T cells", "perturbation": "IFNB"}
    assert "whole" not in " ".join(plan_cells(model, 4, condition=seen).notes)


def test_a_combination_asked_for_in_another_order_gives_the_same_cells(model):
    one, other = (
        generate(model, 12, condition=HELD_OUT | {"perturbation": label}) for label in ("IFNB+JAKI", "JAKI+IFNB")
    )
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())


def test_the_file_says_what_was_asked_for(model, tmp_path):
    steering = steering_of(model, guidance_scale=2.0, clamp={"B2M": 7}, tilt={"ISG15": 3.0})
    asked = ASKED["all"] | {"steering": steering}
    path = generate_file(model, 8, tmp_path / "cells.h5ad", **asked)
    said = ad.read_h5ad(path).uns["lingshu_cell"]
    assert dict(said["condition"]) == {"cell_type": "B cells", "perturbation": "JAKI+IFNG"}
    told = said["perturbation"]
    assert (told["perturbation_key"], told["control"], told["unseen"]) == ("perturbation", "control", "embedding")
    assert (told["dose"], round(float(told["depth"]))) == (2.0, 2000)
    expected = (np.log(2.0) - model.conditioner.dose_mean) / model.conditioner.dose_sd
    assert told["standard_log_dose"] == pytest.approx(expected)
    assert (told["guidance_scale"], told["guidance_space"], told["guidance_clip"]) == (2.0, "log-mean", 2.0)
    assert dict(told["clamp"]) == {"B2M": 7}
    assert dict(told["tilt"]) == {"ISG15": 3.0}
    assert "never trained" in told["notes"][0]
    assert "combination" in told["notes"][1]


def test_a_model_without_perturbations_says_its_priors_too(trained_run):
    model = load_model(trained_run)
    gene = model.genes.names[int(model.modelled[0])]
    cells = generate(model, 4, steering=Steering(clamp={gene: 3}))
    assert cells.uns["lingshu_cell"]["steering"]["clamp"] == {gene: 3}
    plain = generate(model, 4).uns["lingshu_cell"]["steering"]
    assert plain["clamp"] == {} and plain["depth"] == "model"


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (Steering(guidance_space="mean"), "The space of guidance must exist: 'mean'. Choose log-mean, logits."),
        (Steering(clamp={"B2M": 1.5}), "A clamped gene needs a whole count: {'B2M': 1.5}. Write for example STAT1=1."),
        (Steering(clamp={"B2M": -1}), "A clamped gene needs a whole count: {'B2M': -1}. Write for example STAT1=1."),
        (Steering(clamp={"B2M": float("nan")}), "A clamped gene needs a whole count: {'B2M': nan}. Write for"),
        (Steering(tilt={"B2M": 0.0}), "A tilt is a factor above 0: {'B2M': 0.0}. Write for example STAT1=0.2."),
        (Steering(tilt={"B2M": float("inf")}), "A tilt is a factor above 0: {'B2M': inf}."),
        (Steering(tilt={"NOGENE": 2.0}), "'NOGENE'"),
    ],
    ids=str,
)
def test_impossible_steering_is_refused(model, steering, message):
    with pytest.raises(LingshuError) as caught:
        generate(model, 4, condition=HELD_OUT, steering=steering)
    assert message in str(caught.value)


def test_guidance_of_a_model_without_perturbations_is_refused(trained_run):
    with pytest.raises(LingshuError) as caught:
        generate(load_model(trained_run), 4, steering=Steering(guidance_scale=2.0))
    assert str(caught.value) == (
        "Guidance goes from control to a perturbation: this model knows no perturbations. "
        "Train with data.perturbation_key and data.control."
    )


def test_rare_genes_cannot_be_clamped_or_tilted(known, folder, tmp_path):
    config = settings(folder, data={"min_cells_per_gene": 40}, training={"steps": 1})
    train_quietly(known, tmp_path / "run", config)
    model = load_model(tmp_path / "run")
    rare = next(name for i, name in enumerate(model.genes.names) if i not in set(model.modelled.tolist()))
    for name, steering in (("clamped", Steering(clamp={rare: 1})), ("tilted", Steering(tilt={rare: 2.0}))):
        with pytest.raises(LingshuError, match=f"Only modelled genes can be {name}: '{rare}' .* was too rare"):
            generate(model, 4, condition=HELD_OUT, steering=steering)


def test_perturbations_kept_for_validation_have_no_residual(known, folder, tmp_path):
    """Their labels are known, but no cell trains them: only the embedding may speak, not the random start."""
    split = tmp_path / "split.toml"
    split.write_text(SPLIT.split("[held_out]")[0] + '[validation]\nperturbations = ["JAKI"]\n', encoding="utf-8")
    train_quietly(known, tmp_path / "run", settings(folder, data={"split": str(split)}, training={"steps": 3}))
    model = load_model(tmp_path / "run")
    residual_PD = model.network.perturbation.residual_PD
    assert model.conditioner.perturbations.names == ("control", "IFNB", "JAKI")
    assert (residual_PD[2] == 0).all()
    assert (residual_PD[:2] != 0).all()


def test_few_control_cells_give_no_context_and_still_train(known, folder, tmp_path):
    """Below 8 control cells of an identity there is no context; below it everywhere, there is none at all."""
    controls = np.flatnonzero(known.obs["perturbation"] == "control")
    few = known[np.setdiff1d(np.arange(known.n_obs), controls[6:])].copy()
    train_quietly(few, tmp_path / "run", settings(folder, data={"split": None}, training={"steps": 2}))
    assert generate(load_model(tmp_path / "run"), 4, condition=HELD_OUT).n_obs == 4


def test_labels_in_any_order_and_with_control_train(known, folder, tmp_path):
    """JAKI+IFNB and IFNB+control are spellings that screens use."""
    cells = known.copy()
    stimulated = np.flatnonzero(cells.obs["perturbation"] == "IFNB")
    labels = cells.obs["perturbation"].astype(str).to_numpy(dtype=object)
    labels[stimulated[::3]], labels[stimulated[1::3]] = "JAKI+IFNB", "IFNB+control"
    cells.obs["perturbation"] = labels
    train_quietly(cells, tmp_path / "run", settings(folder, data={"split": None}, training={"steps": 2}))
    model = load_model(tmp_path / "run")
    assert model.conditioner.perturbations.names == ("control", "IFNB", "JAKI")
    rows = model.condition_rows[model.conditioner.is_perturbed(model.condition_rows)]
    assert (model.conditioner.effects.rows(rows) > 0).all(), "every perturbed condition has its prior effect"
    cells = generate(model, 6, condition=HELD_OUT | {"perturbation": "IFNB+JAKI"})
    assert (cells.obs["perturbation"] == "JAKI+IFNB").all()
    assert "IFNB+JAKI is JAKI+IFNB of the training cells" in cells.uns["lingshu_cell"]["perturbation"]["notes"]
