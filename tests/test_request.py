"""What is asked for is checked against what a model knows, extended by what is new, and never silently replaced."""

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import real_cells, tiny_config

from lingshu_cell.conditioning import Conditioner
from lingshu_cell.conditioning_of_cells import build_conditioner
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, write_embeddings
from lingshu_cell.data.training_set import TrainingSet, assemble
from lingshu_cell.errors import LingshuError
from lingshu_cell.request import Request, describe_request, resolve_request


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """300 real cells × 120 genes, called a screen of three lines with P, Q, P+Q and none; L3 was never given Q."""
    cells, rng = real_cells(300, 120), np.random.default_rng(0)
    cells.obs["line"] = rng.choice(["L1", "L2", "L3"], 300)
    drug = rng.choice(["none", "P", "Q", "P+Q"], 300, p=[0.4, 0.2, 0.2, 0.2])
    cells.obs["drug"] = np.where((cells.obs["line"] == "L3") & (drug == "Q"), "none", drug)
    cells.obs["dose"] = np.where(cells.obs["drug"] == "none", np.nan, rng.choice([1.0, 100.0], 300))
    return cells


@pytest.fixture(scope="module")
def model(screen, tmp_path_factory) -> tuple[TrainingSet, Conditioner]:
    path: Path = tmp_path_factory.mktemp("embeddings") / "drugs.npz"
    vectors = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    write_embeddings(GeneEmbeddings.of(["P", "Q", "R", "S", "T"], vectors, "a test"), path)
    data = {"condition_keys": ["line"], "perturbation_key": "drug", "control": "none", "dose_key": "dose",
            "depth": True, "embeddings": [str(path)]}  # fmt: skip
    config = tiny_config(data=data)
    cells = assemble([read_counts(screen, None, ["line", "drug"])], **config.data.assembly())
    return cells, build_conditioner(cells, config)


@pytest.fixture(scope="module")
def new_line(screen) -> ad.AnnData:
    """Control cells of a line that is called L9."""
    cells = screen[(screen.obs["line"] == "L3") & (screen.obs["drug"] == "none")].copy()
    cells.obs["line"] = "L9"
    return cells


def ask(model: tuple[TrainingSet, Conditioner], condition=None, **asked) -> Request:
    cells, conditioner = model
    conditioner = asked.pop("conditioner", conditioner)
    return resolve_request(
        conditioner,
        *cells.condition_frequencies(),
        condition or {},
        genes=cells.vocabulary,
        modelled=cells.modelled,
        min_coverage=0.5,
        **asked,
    )


def labels(request: Request) -> list[tuple[str, str]]:
    decoded = request.conditioner.vocabulary.decode(request.rows).astype(object)
    return list(zip(decoded["line"], decoded["drug"], strict=True))


def test_a_known_condition_is_asked_for_as_it_is(model):
    request = ask(model, {"line": "L1", "drug": "P"})
    assert labels(request) == [("L1", "P")]
    assert request.probabilities.tolist() == [1]
    assert request.conditioner is model[1]
    assert request.notes == ()
    assert request.standard_dose is None
    assert np.isnan(request.log_depth), "drawn from cells like these, the default of a model trained with depth"


def test_open_fields_are_drawn_jointly_as_often_as_in_training(model):
    cells = model[0]
    rows, counts = cells.condition_frequencies()
    request = ask(model, {"drug": "Q"})
    drug = list(cells.conditions.fields["drug"]).index("Q") + 1
    np.testing.assert_array_equal(request.rows, rows[rows[:, 1] == drug])
    np.testing.assert_allclose(request.probabilities, counts[rows[:, 1] == drug] / counts[rows[:, 1] == drug].sum())
    assert ("L3", "Q") not in labels(request)
    everything = ask(model)
    np.testing.assert_array_equal(everything.rows, rows)
    assert everything.probabilities.sum() == pytest.approx(1)


def test_fields_open_under_a_perturbation_never_measured_are_drawn_as_in_control_cells(model):
    cells = model[0]
    rows, counts = cells.condition_frequencies()
    at_rest = rows[:, 1] == list(cells.conditions.fields["drug"]).index("none") + 1
    request = ask(model, {"drug": "Q+R"}, unseen="embedding")
    assert labels(request) == [("L1", "Q+R"), ("L2", "Q+R"), ("L3", "Q+R")]
    np.testing.assert_array_equal(request.rows[:, 0], rows[at_rest, 0])
    np.testing.assert_allclose(request.probabilities, counts[at_rest] / counts[at_rest].sum())
    assert "'line' (1): drawn as in control cells, as no training cell has drug=Q+R" in request.notes
    with pytest.raises(LingshuError) as caught:
        resolve_request(
            model[1], rows[~at_rest], counts[~at_rest], {"drug": "Q+R"}, unseen="embedding",
            genes=cells.vocabulary, modelled=cells.modelled, min_coverage=0.5,
        )  # fmt: skip
    assert caught.value.rule == "Fields left open are drawn from the training cells that match the given ones"
    assert (caught.value.finding, caught.value.remedy) == (
        "no training cell has drug=Q+R", "Give every field: 'line', 'drug' (2)"
    )  # fmt: skip


def test_a_pair_never_seen_together_gets_its_expected_effect(model):
    request = ask(model, {"line": "L3", "drug": "Q"})
    assert labels(request) == [("L3", "Q")]
    assert len(request.notes) == 1
    assert request.notes[0].startswith("expected effect from other identities: 2; confidence ")
    told = request.conditioner.conditions(request.rows)
    effect = told.effect.table_KJG[told.effect.row_B[0], 0]
    np.testing.assert_array_equal(effect, model[1].predict_effect(request.rows[0]).delta)
    assert len(request.conditioner.effects.effect_KG) == len(model[1].effects.effect_KG) + 1
    assert model[1].effects.rows(request.rows).tolist() == [0], "the model's own table is not written to"


@pytest.mark.parametrize("label", ["Q+P", "P + Q", "Q+none+P"])
def test_another_spelling_is_the_known_label(model, label):
    request = ask(model, {"line": "L1", "drug": label})
    assert labels(request) == [("L1", "P+Q")]
    assert request.notes == (f"{label} is P+Q of the training cells",)


def test_a_combination_never_seen_is_told_as_its_parts_together(model):
    request = ask(model, {"line": "L1", "drug": "Q+R"}, unseen="embedding")
    assert labels(request) == [("L1", "Q+R")]
    assert request.notes[0] == "'R' (1) was never trained: told by its embedding"
    assert request.notes[1] == "the combination Q+R was not in training: told as its parts together"
    assert request.notes[2] == "no effect to expect: neither other identities nor embeddings tell of it"
    told = request.conditioner.conditions(request.rows)
    assert told.perturbation_BP.tolist() == [[0, 0, 1, 1]]
    assert told.embedding_PQ.shape == (4, 6)
    np.testing.assert_array_equal(told.embedding_PQ[:3], model[1].embedding_PQ)
    assert request.conditioner.sizes.categories == model[1].sizes.categories


def test_an_unseen_perturbation_has_the_scale_of_those_seen(model):
    """What is added for it must be made as the embeddings of training were."""
    cells, conditioner = model
    forgetful = replace(conditioner, perturbations=replace(conditioner.perturbations, names=("none", "P")))
    forgetful = replace(forgetful, embedding_PQ=conditioner.embedding_PQ[:2], effects=None)
    fields = {"line": cells.conditions.fields["line"], "drug": ("P", "none")}
    forgetful = replace(forgetful, vocabulary=replace(conditioner.vocabulary, fields=fields))
    request = ask(model, {"line": "L1", "drug": "Q"}, unseen="embedding", conditioner=forgetful)
    np.testing.assert_array_equal(request.conditioner.embedding_PQ[2], conditioner.embedding_PQ[2])


def test_a_dose_is_standardised_as_in_training(model):
    dose_mean, dose_sd = model[1].dose_mean, model[1].dose_sd
    asked = ask(model, {"line": "L1", "drug": "P"}, dose=100.0).standard_dose
    assert asked == pytest.approx((np.log(100) - dose_mean) / dose_sd)
    mean = ask(model, {"line": "L1", "drug": "P"}, dose=float(np.exp(dose_mean))).standard_dose
    assert mean == pytest.approx(0, abs=1e-9)


def test_a_depth_is_its_logarithm_or_drawn_or_open(model):
    wishes = {3000: np.log(3000), "3000": np.log(3000), "model": np.nan, None: np.nan}
    for depth, expected in wishes.items():
        assert ask(model, {"line": "L1", "drug": "P"}, depth=depth).log_depth == pytest.approx(expected, nan_ok=True)
    assert ask(model, {"line": "L1", "drug": "P"}, depth="open").log_depth is None


def test_a_context_stands_for_an_identity(model, new_line):
    request = ask(model, {"drug": "P"}, context=new_line)
    assert request.rows[0, 0] == 0
    told = request.conditioner.conditions(request.rows)
    profile = told.context.table_KJG[told.context.row_B[0]].numpy()
    counts = new_line.X.toarray()[:, model[0].modelled]
    sums = np.stack([(counts > 0).sum(0), np.log1p(counts).sum(0)])
    overall = told.context.table_KJG[0].numpy()
    np.testing.assert_allclose(profile, (sums + 4 * overall) / (len(counts) + 4), rtol=1e-5)
    assert request.notes[0] == f"identity told by {new_line.n_obs} control cells; 100% of the genes are in them"
    assert request.notes[1].startswith("expected effect from other identities: 3; confidence")
    control = request.conditioner.conditions(request.conditioner.as_control(request.rows))
    assert (control.context.row_B > 0).all(), "the reference of guidance has the same context"


def test_a_context_replaces_that_of_a_known_identity(model, new_line):
    plain, told = ask(model, {"line": "L1", "drug": "P"}), ask(model, {"line": "L1", "drug": "P"}, context=new_line)
    profiles = []
    for request in (plain, told):
        conditions = request.conditioner.conditions(request.rows)
        profiles.append(conditions.context.table_KJG[conditions.context.row_B[0]].numpy())
    assert np.abs(profiles[0] - profiles[1]).max() > 0.01
    table = told.conditioner.contexts
    assert len(np.unique(table.identity_IC, axis=0)) == len(table.identity_IC)


def test_genes_a_context_did_not_measure_are_nan(model, new_line):
    some = new_line[:, 20:].copy()
    request = ask(model, {"drug": "P"}, context=some)
    told = request.conditioner.conditions(request.rows)
    profile = told.context.table_KJG[told.context.row_B[0]].numpy()
    absent = model[0].modelled < 20
    assert np.isnan(profile[:, absent]).all()
    assert np.isfinite(profile[:, ~absent]).all()


def test_a_context_is_read_from_the_layer_of_training(model, new_line):
    layered = new_line.copy()
    layered.layers["counts"], layered.X = layered.X.copy(), layered.X * 0
    request = ask(model, {"drug": "P"}, context=layered, layer="counts")
    plain = ask(model, {"drug": "P"}, context=new_line)
    np.testing.assert_array_equal(request.conditioner.contexts.profile_KJG, plain.conditioner.contexts.profile_KJG)


def test_what_was_asked_for_is_said_in_plain_types(model):
    request = ask(model, {"line": "L1", "drug": "P"}, dose=10.0, depth=2000)
    said = describe_request(request)
    assert said["standard_log_dose"] == request.standard_dose
    assert said["depth"] == pytest.approx(2000)
    assert describe_request(ask(model, {"line": "L1", "drug": "P"}, depth="model"))["depth"] == "model"
    assert "depth" not in describe_request(ask(model, {"line": "L1", "drug": "P"}, depth="open"))


KNOWN = {"line": "L1", "drug": "P"}


@pytest.mark.parametrize(
    ("condition", "asked", "rule", "finding", "remedy"),
    [
        (KNOWN, {"unseen": "guess"}, "The policy for unseen perturbations must exist", "'guess'",
         "Choose ('error', 'embedding')"),
        ({"line": "L1", "drug": "R"}, {}, "Perturbations must be among those the model was trained on",
         "it does not know 'R' (1)",
         "Known: 'none', 'P', 'Q' (3), or allow embeddings to stand in (--unseen embedding)"),
        ({"line": "L1", "drug": "P+R"}, {}, "Perturbations must be among those the model was trained on",
         "it does not know 'R' (1)", None),
        ({"line": "L1", "drug": "Z+R+Y"}, {"unseen": "embedding"}, "An unseen perturbation needs an embedding",
         "there is none of 'Y', 'Z' (2)", "Embeddings are from drugs.npz; train with a file that has it"),
        ({"line": "L1", "drug": "P+P"}, {}, "A combination must join different perturbations",
         "'P+P' taken apart at '+' gives 'P', 'P' (2)", None),
        ({"line": "L7", "drug": "P"}, {}, "Conditions must be among those the model was trained on",
         "line has no 'L7' (1)", "Known values: 'L1', 'L2', 'L3' (3)"),
        (KNOWN, {"dose": 0}, "A dose must be a number above 0 in every perturbed cell",
         "1 of 1 perturbed cells have '0' (1)", None),
        (KNOWN, {"depth": "deep"}, "The depth must be UMI per cell, 'model' or 'open'", "'deep'",
         "Write for example --depth 5000"),
        (KNOWN, {"depth": 0}, "The depth must be UMI per cell, 'model' or 'open'", "0", None),
        (KNOWN, {"depth": float("inf")}, "The depth must be UMI per cell, 'model' or 'open'", "inf", None),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_model_cannot_be_asked_is_refused(model, condition, asked, rule, finding, remedy):
    with pytest.raises(LingshuError) as caught:
        ask(model, condition, **asked)
    assert caught.value.rule == rule
    assert caught.value.finding == finding
    assert remedy is None or caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("part", "asked", "rule", "finding", "remedy"),
    [
        ("dose_mean", {"dose": 1.0}, "A dose needs a model trained with doses", "this one was not",
         "Train with data.dose_key"),
        ("depths", {"depth": 100}, "A depth needs a model trained with depth", "this one was not",
         "Train without data.depth=false"),
        ("contexts", {"context": "cells"}, "A context needs a model trained with contexts", "this one was not",
         "Train with data.perturbation_key and data.context"),
    ],
)  # fmt: skip
def test_what_the_model_was_not_trained_with_is_refused(model, new_line, part, asked, rule, finding, remedy):
    asked = {"context": new_line} if "context" in asked else asked
    with pytest.raises(LingshuError) as caught:
        ask(model, KNOWN, conditioner=replace(model[1], **{part: None}), **asked)
    assert (caught.value.rule, caught.value.finding, caught.value.remedy) == (rule, finding, remedy)


def test_an_unseen_perturbation_without_any_embedding_is_refused(model):
    bare = replace(model[1], embeddings=None, embedding_PQ=None)
    with pytest.raises(LingshuError) as caught:
        ask(model, {"line": "L1", "drug": "R"}, conditioner=bare)
    assert caught.value.remedy == "Known: 'none', 'P', 'Q' (3)", "no hint at what this model cannot do"
    with pytest.raises(LingshuError) as caught:
        ask(model, {"line": "L1", "drug": "R"}, conditioner=bare, unseen="embedding")
    assert caught.value.rule == "An unseen perturbation needs a model trained with embeddings"
    assert caught.value.finding == "this one has none for 'R' (1)"
    assert caught.value.remedy == "Train with data.embeddings"


def test_contexts_that_are_none_are_refused(model, screen, new_line):
    cases = [
        ({"line": "L1"}, new_line, "With a context, the perturbation must be given", "no drug is asked for",
         "Add it as a condition; control cells are 'none'"),
        ({"drug": "P"}, new_line[:7].copy(), "A context needs 8 control cells or more", "7", "Pass more cells"),
        ({"drug": "P"}, screen, "A context holds control cells only", "it also has 'P', 'P+Q', 'Q' (3)",
         "Take the others out"),
    ]  # fmt: skip
    for condition, context, rule, finding, remedy in cases:
        with pytest.raises(LingshuError) as caught:
            ask(model, condition, context=context)
        assert (caught.value.rule, caught.value.finding, caught.value.remedy) == (rule, finding, remedy)
    few = new_line[:, :30].copy()
    with pytest.raises(LingshuError, match="At least 50% of the model's genes must be in the data"):
        ask(model, {"drug": "P"}, context=few)


def test_labels_of_a_context_are_not_needed(model, new_line):
    bare = ad.AnnData(new_line.X, var=new_line.var)
    request = ask(model, {"drug": "P"}, context=bare)
    assert request.notes[0].startswith("identity told by")
