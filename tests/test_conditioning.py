"""Labels become what a denoiser is told, from training cells alone, and a saved conditioner is the same one."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import SCREEN_SPLIT, real_cells, tiny_config

from lingshu_cell.conditioning import (
    Conditioner,
    ContextTable,
    DepthTable,
    EffectTable,
    average_profile,
    standard_doses,
)
from lingshu_cell.conditioning_of_cells import build_conditioner, build_contexts
from lingshu_cell.config import Config
from lingshu_cell.data import condition_sums
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.condition_sums import ContextSums, LibrarySample
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, write_embeddings
from lingshu_cell.data.training_set import TrainingSet, assemble
from lingshu_cell.data.vocabulary import ConditionVocabulary
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError

DATA = {
    "condition_keys": ["line"], "perturbation_key": "drug", "control": "none", "dose_key": "dose", "depth": True,
    "min_cells_per_gene": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """300 real cells × 120 genes, called a screen of four lines with P, Q, Q+P and none."""
    cells, rng = real_cells(300, 120), np.random.default_rng(0)
    cells.obs["line"] = rng.choice(["L1", "L2", "L3", "L4"], 300)
    cells.obs["drug"] = rng.choice(["none", "P", "Q", "Q+P"], 300, p=[0.4, 0.2, 0.2, 0.2])
    cells.obs["dose"] = np.where(cells.obs["drug"] == "none", np.nan, rng.choice([1.0, 100.0], 300))
    return cells


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "drugs.npz"
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    write_embeddings(GeneEmbeddings.of(["P", "Q", "R", "S"], vectors, "a test"), path)
    return path


def both(screen: ad.AnnData, **data) -> tuple[TrainingSet, Conditioner, Config]:
    config = tiny_config(data={**DATA, **data})
    cells = assemble([read_counts(screen, None, ["line", "drug"])], **config.data.assembly())
    return cells, build_conditioner(cells, config), config


@pytest.fixture(scope="module")
def built(screen, embeddings) -> tuple[TrainingSet, Conditioner]:
    return both(screen, embeddings=[str(embeddings)])[:2]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("split") / "split.toml"
    path.write_text(SCREEN_SPLIT, encoding="utf-8")
    return str(path)


def test_the_perturbation_field_becomes_what_was_applied(built):
    cells, conditioner = built
    told = conditioner.conditions(
        cells.condition_NC, dose_N=standard_doses(cells.dose, cells.condition_NC, conditioner)
    )
    labels = cells.conditions.decode(cells.condition_NC)["drug"].astype(str)
    assert conditioner.perturbations.names == ("none", "P", "Q")
    expected = {"none": [1, 0, 0], "P": [0, 1, 0], "Q": [0, 0, 1], "Q+P": [0, 1, 1]}
    np.testing.assert_array_equal(told.perturbation_BP, [expected[label] for label in labels])
    assert told.category_BC.shape == (300, 1)
    np.testing.assert_array_equal(told.category_BC[:, 0], cells.condition_NC[:, 0])
    assert (told.dose_BP[torch.from_numpy((labels == "none").to_numpy())] == 0).all()
    assert (told.dose_BP[:, 0] == 0).all()
    assert told.depth_B.isnan().all()
    sizes = conditioner.sizes
    assert (sizes.categories, sizes.perturbations, sizes.embedding) == ((5,), 3, 5)
    np.testing.assert_array_equal(told.embedding_PQ[0], np.zeros(5))
    assert conditioner.is_perturbed(cells.condition_NC).tolist() == (labels != "none").tolist()


def test_unknown_labels_are_told_as_nothing(built):
    _, conditioner = built
    told = conditioner.conditions(np.zeros((2, 2), dtype=np.int64), dose_N=np.ones(2))
    for part in (told.category_BC, told.perturbation_BP, told.dose_BP, told.context.row_B, told.effect.row_B):
        assert (part == 0).all()
    assert not conditioner.is_perturbed(np.zeros((2, 2), dtype=np.int64)).any()


def test_as_control_changes_the_perturbation_alone(built):
    cells, conditioner = built
    control_NC = conditioner.as_control(cells.condition_NC)
    assert not conditioner.is_perturbed(control_NC).any()
    np.testing.assert_array_equal(control_NC[:, 0], cells.condition_NC[:, 0])
    assert (conditioner.conditions(control_NC).effect.row_B == 0).all()


def with_overall(counts: np.ndarray, overall_JG: np.ndarray) -> np.ndarray:
    """Average of cells and of 4 that are the average over all identities."""
    sums = np.stack([(counts > 0).sum(0), np.log1p(counts).sum(0)])
    return (sums + 4 * overall_JG) / (len(counts) + 4)


def test_contexts_are_of_training_controls_of_the_same_identity_alone(screen, split):
    """Held-out cells and cells for validation do not enter; nor does any perturbed cell."""
    cells, conditioner, _ = both(screen, split=split, validation_fraction=0.3)
    counts = cells.counts_of(slice(None))[0].toarray()
    labels = cells.conditions.decode(cells.condition_NC).astype(str)
    train = np.isin(np.arange(len(labels)), cells.train)
    assert not (labels["line"] == "L3").any()
    assert not ((labels["line"] == "L2") & (labels["drug"] == "P")).any()
    assert "L3" not in cells.conditions.fields["line"]
    assert set(cells.conditions.fields["drug"]) == {"none", "P", "Q", "Q+P"}
    told = conditioner.conditions(cells.condition_NC)
    for line in ("L1", "L2", "L4"):
        chosen = counts[train & (labels["line"] == line) & (labels["drug"] == "none")]
        here = np.flatnonzero(labels["line"] == line)
        profile = told.context.table_KJG[told.context.row_B[here[0]]]
        assert (told.context.row_B[here] == told.context.row_B[here[0]]).all(), "the same whatever was done to a cell"
        np.testing.assert_allclose(profile, with_overall(chosen, told.context.table_KJG[0].numpy()), rtol=1e-5)


def test_counts_of_cells_not_trained_on_change_nothing_of_the_conditioner(screen, split, embeddings):
    """Other counts in validation cells and in held-out cells: every table is the same to the bit."""
    cells, conditioner, _ = both(screen, split=split, embeddings=[str(embeddings)], validation_fraction=0.3)
    kept = set(read_counts(screen).obs_names[part_of(screen, split)][cells.train])
    other = screen.copy()
    spoilt = ~other.obs_names.isin(kept)
    dense = other.X.toarray()
    dense[spoilt] = np.random.default_rng(1).permutation(dense[spoilt].ravel()).reshape(dense[spoilt].shape)
    other.X = dense
    again = both(other, split=split, embeddings=[str(embeddings)], validation_fraction=0.3)[1]
    one, two = conditioner.to_tensors(), again.to_tensors()
    assert spoilt.sum() > 60
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def part_of(screen: ad.AnnData, split: str) -> np.ndarray:
    from lingshu_cell.data.split_files import read_split

    return read_split(split).assign(screen.obs) != "test"


def test_a_capped_control_is_context_but_not_trained_on(screen):
    cells, conditioner, _ = both(screen, control_share=0.1, validation_fraction=0.0)
    controls = np.flatnonzero(~conditioner.is_perturbed(cells.condition_NC))
    trained = np.intersect1d(controls, cells.train)
    n_perturbed = 300 - len(controls)
    assert len(trained) == int(0.1 / 0.9 * n_perturbed)
    assert len(trained) / len(cells.train) <= 0.1
    np.testing.assert_array_equal(np.flatnonzero(cells.context_cells), controls)
    assert any(f"{len(trained)} of {len(controls)} control cells are trained on" in note for note in cells.notes)
    again = both(screen, control_share=0.1, validation_fraction=0.0)[0]
    np.testing.assert_array_equal(again.train, cells.train)
    everything = both(screen, control_share=1.0, validation_fraction=0.0)[0]
    assert len(everything.train) == 300


def contexts_of(counts, identity_NC: np.ndarray, piece: int = 7) -> ContextTable:
    """Contexts of control cells that come in pieces; the perturbation is the second field."""
    identity_IC, n_I = np.unique(identity_NC, axis=0, return_counts=True)
    sums = ContextSums(identity_IC, n_I, 1, 1, counts.shape[1], least_cells=8, n_parts=16, part_cells=(32, 256), seed=0)
    condition_NC = identity_NC + np.array([0, 1])
    for i in range(0, len(condition_NC), piece):
        sums.add(counts[i : i + piece], None, condition_NC[i : i + piece])
    return build_contexts(sums)


def test_random_contexts_are_of_parts_of_the_controls_and_come_from_the_generator(built):
    identity_NC = np.array([[1, 0]] * 120 + [[2, 0]] * 180)
    counts = built[0].counts_of(slice(None))[0]
    table = contexts_of(counts, identity_NC)
    rows = [table.rows(identity_NC, np.random.default_rng(seed).random(300)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()
    for identity, first, n in zip(table.identity_IC, table.first_I, table.n_I, strict=True):
        mine = (identity_NC == identity).all(1)
        assert ((rows[2][mine] >= first) & (rows[2][mine] < first + n)).all()
        assert len(np.unique(rows[2][mine])) == n == 17
        whole, parts = table.profile_KJG[first], table.profile_KJG[first + 1 : first + n]
        np.testing.assert_array_equal(whole, average_profile(counts[mine], table.profile_KJG[0]))
        assert (np.abs(parts - whole).mean((1, 2)) > 0).sum() > 5
        assert np.abs(parts.mean(0) - whole).max() < 0.1
    np.testing.assert_array_equal(table.profile_KJG[0], average_profile(counts))
    again = contexts_of(counts, identity_NC, piece=300)
    np.testing.assert_array_equal(again.profile_KJG, table.profile_KJG)


def test_identities_of_fewer_than_8_controls_have_no_context(built):
    counts = built[0].counts_of(np.arange(20))[0]
    table = contexts_of(counts, np.array([[1, 0]] * 13 + [[2, 0]] * 7))
    assert table.identity_IC.tolist() == [[1, 0]]
    assert table.rows(np.array([[1, 0], [2, 0], [3, 0]]), None).tolist() == [1, 0, 0]
    none = contexts_of(counts, np.stack([np.arange(20), np.zeros(20, int)], 1))
    assert none.rows(np.array([[0, 1], [2, 3]]), np.array([0.1, 0.9])).tolist() == [0, 0]


def test_average_profile_is_the_share_that_detects_and_the_mean_log_count(built):
    counts = built[0].counts_of(np.arange(50))[0]
    dense = counts.toarray()
    profile = average_profile(counts)
    assert profile.dtype == np.float32
    np.testing.assert_allclose(profile[0], (dense > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(profile[1], np.log1p(dense).mean(0), rtol=1e-5)
    overall = average_profile(built[0].counts_of(slice(None))[0])
    np.testing.assert_allclose(average_profile(counts, overall), with_overall(dense, overall), rtol=1e-5)


def test_every_perturbed_condition_has_its_own_effect_and_controls_have_none(built):
    cells, conditioner = built
    rows, _ = cells.condition_frequencies()
    place = conditioner.effects.rows(rows)
    perturbed = conditioner.is_perturbed(rows)
    assert (place[perturbed] > 0).all(), "Q+P too, however its parts are ordered"
    assert len(np.unique(place[perturbed])) == perturbed.sum()
    assert (place[~perturbed] == 0).all()
    assert (conditioner.effects.effect_KG[0] == 0).all()
    measured, found = conditioner.prior.measured_effects()
    assert found.all()
    names = [(name, "Q+P" if "+" in drug else drug) for name, drug in conditioner.prior.conditions]
    for row, k in zip(rows[perturbed], place[perturbed], strict=True):
        labels = [names[row[i] - 1] for i, names in enumerate(conditioner.vocabulary.fields.values())]
        np.testing.assert_array_equal(conditioner.effects.effect_KG[k], measured[names.index(tuple(labels))])


def test_an_effect_is_told_from_its_own_cells_and_foretold_without_them(screen):
    """Its other counts change what training is told of it, and not what would be foretold of it."""
    other, mine = screen.copy(), (screen.obs["line"] == "L1") & (screen.obs["drug"] == "P")
    dense = other.X.toarray()
    dense[mine] = np.random.default_rng(1).permuted(dense[mine], axis=1)
    other.X = dense
    told, foretold = [], []
    for data in (screen, other):
        cells, conditioner, _ = both(data, validation_fraction=0.0, min_cells_per_gene=0)
        rows = cells.conditions.encode({"line": ["L1", "L2"], "drug": ["P", "P"]}, 2)
        told.append(conditioner.effects.effect_KG[conditioner.effects.rows(rows)])
        foretold.append([conditioner.predict_effect(row).delta for row in rows])
    np.testing.assert_array_equal(foretold[0][0], foretold[1][0])
    assert np.abs(foretold[0][1] - foretold[1][1]).max() > 0.01
    assert np.abs(told[0][0] - told[1][0]).max() > 0.01
    np.testing.assert_array_equal(told[0][1], told[1][1])


def test_depths_are_drawn_from_the_library_sizes_of_the_condition():
    library = np.concatenate([np.arange(1000, 1100), np.arange(5000, 5100), np.arange(200, 220)])
    condition_NC = np.array([[1, 1]] * 100 + [[1, 2]] * 100 + [[2, 1]] * 20)
    row_RC, n_R = np.unique(condition_NC, axis=0, return_counts=True)
    sample = LibrarySample(row_RC, n_R, 0)
    for i in range(0, len(library), 7):
        sample.add(None, library[i : i + 7], condition_NC[i : i + 7])
    table = DepthTable(row_RC, *sample.sizes())
    uniform = np.linspace(0, 1, 101)

    def draw(row, field=1):
        return np.exp(table.draw(np.tile(row, (101, 1)), uniform, field))

    np.testing.assert_allclose(draw([1, 1])[[0, 50, 100]], [1000, 1050, 1099])
    np.testing.assert_allclose(draw([2, 1])[[0, 100]], [200, 219], rtol=1e-6)
    np.testing.assert_allclose(draw([2, 2]), draw([2, 1]), err_msg="as the rows of the same identity")
    np.testing.assert_allclose(draw([1, 3])[[0, 49, 51, 100]], [1000, 1098, 5002, 5099], err_msg="both of its identity")
    np.testing.assert_allclose(draw([1, 3], None)[[0, 100]], [200, 5099], err_msg="all, as nothing agrees")
    np.testing.assert_allclose(draw([0, 1])[[0, 100]], [200, 1099], err_msg="what is not known may be anything")
    np.testing.assert_allclose(draw([7, 7])[[0, 100]], [200, 5099])


def test_of_a_condition_of_many_cells_few_are_read(monkeypatch):
    monkeypatch.setattr(condition_sums, "_MOST_LIBRARIES", 200)
    condition_NC = np.repeat([[1], [2]], [4000, 100], axis=0)
    library = np.random.default_rng(0).permutation(np.arange(1, 4101))
    row_RC, n_R = np.unique(condition_NC, axis=0, return_counts=True)
    sample, n_read = LibrarySample(row_RC, n_R, 0), 0
    for piece in np.array_split(np.random.default_rng(1).permutation(4100), 7):
        wanted = piece[sample.wants(condition_NC[piece])]
        sample.add(None, library[wanted], condition_NC[wanted])
        n_read += len(wanted)
    assert 250 < n_read < 360
    (n_many, n_few), sizes = sample.sizes()
    assert set(sizes[n_many:]) == set(library[4000:]) and n_few == 100, "all of the one that has few"
    of_many = sizes[:n_many]
    assert len(of_many) <= 200 and set(of_many) <= set(library[:4000])
    assert np.median(of_many) == pytest.approx(np.median(library[:4000]), rel=0.2)


def test_drawn_depths_spread_like_those_of_real_cells_to_the_last_percent():
    """PBMC 3k has a few cells of several times the usual depth: between even quantiles they would be too many."""
    library = np.asarray(ad.read_h5ad(pbmc3k_path()).X.sum(1)).ravel().astype(np.int64)
    row_RC = np.zeros((1, 0), dtype=np.int64)
    sample = LibrarySample(row_RC, np.array([len(library)]), 0)
    sample.add(None, library, np.zeros((len(library), 0), dtype=np.int64))
    table = DepthTable(row_RC, *sample.sizes())
    n = 20_000
    drawn = table.draw(np.zeros((n, 0), dtype=np.int64), (np.arange(n) + 0.5) / n, None)
    assert drawn.std() == pytest.approx(np.log(library).std(), rel=0.005)
    np.testing.assert_allclose(
        np.quantile(drawn, [0.01, 0.5, 0.99]), np.quantile(np.log(library), [0.01, 0.5, 0.99]), atol=0.02
    )
    assert table.log_moments(np.ones(1)) == pytest.approx((np.log(library).mean(), np.log(library).std()), rel=0.01)


def test_one_dose_for_all_is_the_mean_dose(screen):
    alike = screen.copy()
    alike.obs["dose"] = 0.3
    cells, conditioner, _ = both(alike)
    assert (conditioner.dose_mean, conditioner.dose_sd) == (pytest.approx(np.log(0.3)), 1.0)
    np.testing.assert_allclose(standard_doses(cells.dose, cells.condition_NC, conditioner), 0, atol=1e-6)


def test_doses_are_standardised_by_training_cells_and_given_to_what_was_applied(built):
    cells, conditioner = built
    standard = standard_doses(cells.dose, cells.condition_NC, conditioner)
    perturbed = conditioner.is_perturbed(cells.condition_NC)
    assert (standard[~perturbed] == 0).all()
    trained = cells.train[perturbed[cells.train]]
    assert standard[trained].mean() == pytest.approx(0, abs=1e-5)
    assert standard[trained].std() == pytest.approx(1, abs=1e-5)
    told = conditioner.conditions(cells.condition_NC, dose_N=standard)
    np.testing.assert_allclose(told.dose_BP, told.perturbation_BP * torch.from_numpy(standard)[:, None])


def test_saved_and_read_again_it_is_the_same_bit_for_bit(built):
    cells, conditioner = built
    again = Conditioner.from_saved(json.loads(json.dumps(conditioner.to_json())), conditioner.to_tensors())
    one, two = conditioner.to_tensors(), again.to_tensors()
    assert one.keys() == two.keys()
    assert len(one) > 10
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name], two[name]), name
    assert json.dumps(again.to_json()) == json.dumps(conditioner.to_json())
    assert again.sizes == conditioner.sizes
    for uniform_N in (None, np.random.default_rng(3).random(300)):
        a, b = (
            c.conditions(cells.condition_NC, dose_N=np.ones(300), context_uniform_N=uniform_N)
            for c in (conditioner, again)
        )
        assert torch.equal(a.perturbation_BP, b.perturbation_BP)
        assert torch.equal(a.dose_BP, b.dose_BP)
        assert torch.equal(a.embedding_PQ, b.embedding_PQ)
        assert torch.equal(a.context.table_KJG[a.context.row_B], b.context.table_KJG[b.context.row_B])
        assert torch.equal(a.effect.table_KJG[a.effect.row_B], b.effect.table_KJG[b.effect.row_B])
    unseen = [c.prior.predict("R", "L1", None, c.embeddings) for c in (conditioner, again)]
    np.testing.assert_array_equal(unseen[0].delta, unseen[1].delta)
    assert isinstance(again.contexts, ContextTable)
    assert isinstance(again.effects, EffectTable)
    assert isinstance(again.depths, DepthTable)


def test_a_conditioner_of_categories_alone_and_one_of_nothing_come_back():
    for fields in ({"line": ("A", "B")}, {}):
        conditioner = Conditioner(ConditionVocabulary(fields))
        again = Conditioner.from_saved(conditioner.to_json(), conditioner.to_tensors())
        assert again.vocabulary.fields == conditioner.vocabulary.fields
        told = again.conditions(np.ones((3, len(fields)), dtype=np.int64))
        assert told.category_BC.shape == (3, len(fields))
        assert told.perturbation_BP is None


def test_only_profiles_that_occur_are_handed_over(built):
    cells, conditioner = built
    told = conditioner.conditions(cells.condition_NC[:1])
    assert len(told.context.table_KJG) == 2
    np.testing.assert_array_equal(told.context.table_KJG[0], conditioner.contexts.profile_KJG[0])


@pytest.mark.parametrize("setting", ["dose_key", "embeddings", "depth"])
def test_the_papers_network_refuses_what_it_cannot_be_told(screen, embeddings, setting):
    value = {"dose_key": "dose", "embeddings": [str(embeddings)], "depth": True}
    data = {**DATA, "dose_key": None, "depth": False, setting: value[setting]}
    config = tiny_config("paper", data=data)
    cells = assemble([read_counts(screen, None, ["line", "drug"])], **config.data.assembly())
    with pytest.raises(LingshuError) as caught:
        build_conditioner(cells, config)
    assert caught.value.rule == "The paper's network knows categories only"
    assert caught.value.finding == f"data.{setting} is set"
    assert caught.value.remedy == "Leave it out, or take --preset small"


def test_embeddings_of_other_things_are_refused(screen, tmp_path):
    path = tmp_path / "genes.npz"
    write_embeddings(GeneEmbeddings.of(["X", "Y"], np.eye(2, dtype=np.float32), "a test"), path)
    with pytest.raises(LingshuError) as caught:
        both(screen, embeddings=[str(path)])
    assert caught.value.rule == "Embeddings must be those of the perturbations"
    assert caught.value.finding == f"none of 'P', 'Q' (2) is in '{path}' (1)"
    assert caught.value.remedy == "Name them as the perturbations are named"


@pytest.mark.parametrize(
    ("data", "rule", "finding"),
    [
        ({"dose_key": "amount"}, "The dose must be an obs column", "there is no 'amount'"),
        ({"control": "vehicle"}, "Control cells must be there", "no cell is labelled 'vehicle'"),
        ({"control_share": 0.001}, "Some control cells must be trained on", "0.001 of "),
    ],
)
def test_data_that_do_not_fit_the_settings_are_refused(screen, data, rule, finding):
    with pytest.raises(LingshuError) as caught:
        both(screen, **data)
    assert caught.value.rule == rule
    assert caught.value.finding.startswith(finding)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"control": None}, "perturbation_key and control go together"),
        ({"perturbation_key": None, "dose_key": None}, "perturbation_key and control go together"),
        ({"condition_keys": ["line", "drug"]}, "'drug' is the perturbation_key, not one of condition_keys"),
        ({"perturbation_key": None, "control": None}, "dose_key, embeddings and silenced need a perturbation_key"),
        ({"control_share": 0.0}, "data.control_share = 0.0: Input should be greater than 0"),
        ({"control_share": 1.5}, "data.control_share = 1.5: Input should be less than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(data, message):
    with pytest.raises(LingshuError) as caught:
        tiny_config(data={**DATA, **data})
    assert caught.value.rule == "Every setting must have a valid value"
    assert caught.value.finding.endswith(message)
    assert caught.value.remedy == "See lingshu train --help or docs/config.md"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"training": {"identity_dropout": 1.5}},
            "training.identity_dropout = 1.5: Input should be less than or equal",
        ),
        ({"training": {"depth_dropout": -0.1}}, "training.depth_dropout = -0.1: Input should be greater than or equal"),
        ({"generation": {"guidance_clip": 0.0}}, "generation.guidance_clip = 0.0: Input should be greater than 0"),
        ({"generation": {"guidance_ramp": -1.0}}, "generation.guidance_ramp = -1.0: Input should be greater than or"),
        ({"generation": {"guidance_space": "mean"}}, "generation.guidance_space = 'mean': Input should be 'log-mean'"),
    ],
    ids=str,
)
def test_guidance_and_dropout_settings_keep_their_range(section, message):
    with pytest.raises(LingshuError) as caught:
        tiny_config(**section)
    assert message in caught.value.finding
