"""Judging perturbation responses on real cells: others real ones near the ceiling, broken ones bad."""

import json
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from lingshu_cell import evaluate_responses as verb
from lingshu_cell.errors import LingshuError
from lingshu_cell.evaluate_responses import evaluate_responses

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TYPES = ("B cells", "NK cells")
KEYS = {"perturbation_key": "perturbation", "control": "control", "identity_key": "cell_type"}
QUICK = {"use_cell_eval": False, "use_cell_eval2": False}
needs_libraries = pytest.mark.skipif(
    not all(find_spec(name) for name in ("cell_eval", "cell_eval2", "pdex")), reason="extra responses not installed"
)


def load(name):
    path = DATA / f"{name}.h5ad"
    if not path.is_file():
        pytest.skip(f"{name} is not in the shared data")
    adata = ad.read_h5ad(path)
    adata.X = sp.csr_matrix(adata.X).astype(np.int32)
    adata.obs = adata.obs.astype(str)
    return adata


def cells(counts, like, labels):
    obs = pd.DataFrame(labels, index=[f"predicted{i}" for i in range(counts.shape[0])])
    return ad.AnnData(sp.csr_matrix(counts).astype(np.int32), obs=obs, var=like.var[[]].copy())


@pytest.fixture(scope="module")
def kang():
    """Two cell types × 1,500 genes: real cells to judge by, and several predictions of their stimulated cells."""
    adata = load("kang_ifnb")
    adata = adata[adata.obs["cell_type"].isin(TYPES)].to_memory()
    expressed = np.argsort(-np.asarray((adata.X > 0).sum(axis=0)).ravel(), kind="stable")[:1500]
    adata = adata[:, np.sort(expressed)].to_memory()
    rng = np.random.default_rng(0)
    types, stimulated = adata.obs["cell_type"].to_numpy(), (adata.obs["perturbation"] == "IFNB").to_numpy()
    held = stimulated & (rng.random(adata.n_obs) < 0.4)
    labels = {"cell_type": types[held], "perturbation": "IFNB"}
    other = {t: np.flatnonzero(~stimulated & (types == t)) for t in TYPES}
    bootstrap = np.concatenate([rng.choice(other[t], 200) for t in TYPES])
    half = np.concatenate([rows[: len(rows) // 2] for rows in other.values()])
    fresh = np.concatenate([rows[len(rows) // 2 :] for rows in other.values()])
    return {
        "real": adata[~held].to_memory(),
        "fewer controls": adata[~held & ~np.isin(np.arange(adata.n_obs), fresh)].to_memory(),
        "other": cells(adata.X[held], adata, labels),
        "shuffled": cells(adata.X[held][:, rng.permutation(adata.n_vars)], adata, labels),
        "control": cells(adata.X[bootstrap], adata, {"cell_type": types[bootstrap], "perturbation": "IFNB"}),
        "control of training": cells(
            adata.X[np.repeat(half, 2)], adata, {"cell_type": types[np.repeat(half, 2)], "perturbation": "IFNB"}
        ),
        "training": adata[half].to_memory(),
        "fresh controls": cells(adata.X[fresh], adata, {"cell_type": types[fresh], "perturbation": "control"}),
    }


@pytest.fixture(scope="module")
def judged(kang, tmp_path_factory):
    """Judge a prediction once: name → (record, table)."""
    found = {}

    def judge(name):
        if name not in found:
            out = tmp_path_factory.mktemp("responses") / name
            record = evaluate_responses(kang["real"], kang[name], out, **KEYS, **QUICK)
            found[name] = record, pd.read_csv(out / verb.TABLE).set_index("identity")
        return found[name]

    return judge


def test_other_real_cells_are_rated_like_the_ceiling(judged):
    _, table = judged("other")
    assert sorted(table.index) == sorted(TYPES) and (table["perturbation"] == "IFNB").all()
    for name, off in (("pearson_delta", 0.06), ("cosine_delta", 0.06), ("mae_log1p", 0.01)):
        assert table[name].to_numpy() == pytest.approx(table[f"ceiling_{name}"].to_numpy(), abs=off)
    assert table["pearson_delta"].min() > 0.7
    assert table["lfc_slope"].to_numpy() == pytest.approx([1.0, 1.0], abs=0.15)
    assert (table["e_distance"] < 0.1 * table["e_distance_effect"]).all() and table["e_test_p"].min() > 0.01
    assert (table["e_test_effect_p"] <= 0.001).all()
    assert table["sd_log_umi_ratio"].between(0.7, 1.4).all()
    assert (table["n_de_predicted"] > 0.6 * table["n_de_real"]).all()


def test_control_cells_as_a_prediction_fail_every_metric(judged):
    _, table = judged("control")
    assert table["pearson_delta"].max() < 0.1 and table["lfc_slope"].abs().max() < 0.2
    assert (table["mae_log1p"] > 1.3 * table["ceiling_mae_log1p"]).all()
    assert (table["e_distance"] > 0.7 * table["e_distance_effect"]).all() and table["e_test_p"].max() <= 0.005
    assert (table["n_de_predicted"] < 0.1 * table["n_de_real"]).all()


def test_shuffled_genes_as_a_prediction_fail(judged):
    _, table = judged("shuffled")
    assert (table["pearson_delta"] < 0.3 * table["ceiling_pearson_delta"]).all()
    assert (table["mae_log1p"] > 3 * table["ceiling_mae_log1p"]).all()
    assert (table["e_distance"] > 2 * table["e_distance_effect"]).all()
    assert (table["n_de_predicted"] > 2 * table["n_de_real"]).all()


def test_the_folder_holds_all_numbers(judged, kang, tmp_path):
    record, table = judged("other")
    again = evaluate_responses(kang["real"], kang["other"], tmp_path / "again", **KEYS, **QUICK)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [verb.TABLE, verb.RECORD]
    written = json.loads((tmp_path / "again" / verb.RECORD).read_text())
    assert written == again and again["summary"] == record["summary"]  # the same seed, the same numbers
    assert written["settings"]["target_sum"] == 1e4 and written["settings"]["control"] == "control"
    assert written["versions"]["lingshu-cell"] and "cell-eval" in written["versions"]
    assert written["n"] == {"conditions": 2, "identities": 2, "genes": 1500}
    assert written["summary"]["pearson_delta"]["mean"] == pytest.approx(table["pearson_delta"].mean(), abs=1e-5)
    assert {f"ceiling_{name}" for name in ("pearson_delta", "lfc_slope", "e_distance", "n_de_predicted")} <= set(table)


def test_order_of_genes_and_other_conditions_do_not_matter(judged, kang, tmp_path):
    _, table = judged("other")
    genes = np.random.default_rng(1).permutation(1500)
    real, predicted = (kang[n][kang[n].obs["cell_type"] == TYPES[0]].to_memory() for n in ("real", "other"))
    evaluate_responses(real, predicted[:, genes].to_memory(), tmp_path, **KEYS, **QUICK)
    alone = pd.read_csv(tmp_path / verb.TABLE).set_index("identity").loc[TYPES[0]]
    same = [name for name in table if "e_distance" not in name and "e_test" not in name]  # their PCA is another
    pd.testing.assert_series_equal(alone[same], table.loc[TYPES[0], same], check_dtype=False)


def test_generated_controls_are_judged_and_copies_are_told(kang, judged, tmp_path):
    assert any("no false-DE rate" in note for note in judged("other")[0]["notes"])
    real = kang["fewer controls"]
    fresh = ad.concat([kang["other"], kang["fresh controls"]], index_unique="-")
    record = evaluate_responses(real, fresh, tmp_path / "fresh", **KEYS, **QUICK)
    rates = [record["controls"][t]["false_de_rate"] for t in TYPES]
    assert max(rates) < 0.02 and max(record["controls"][t]["ceiling_false_de_rate"] for t in TYPES) < 0.02
    broken = fresh.copy()  # every gene's mean doubled or halved
    factor = np.random.default_rng(2).choice([0, 3], broken.n_vars)
    broken.X = sp.csr_matrix(broken.X.multiply(factor)).astype(np.int32)
    record = evaluate_responses(real, broken, tmp_path / "broken", **KEYS, **QUICK)
    assert min(record["controls"][t]["false_de_rate"] for t in TYPES) > 0.3
    own = evaluate_responses(real, broken, tmp_path / "own", **KEYS, **QUICK, use_predicted_controls=True)
    assert own["notes"][0] == "The change of the prediction is measured from its own control cells."
    assert own["summary"]["mae_delta"]["mean"] < record["summary"]["mae_delta"]["mean"]
    copies = kang["real"][kang["real"].obs["perturbation"] == "control"]
    record = evaluate_responses(
        kang["real"], ad.concat([kang["other"], copies], index_unique="-"), tmp_path / "copies", **KEYS, **QUICK
    )
    assert record["controls"][TYPES[0]]["false_de_rate"] is None
    assert any("copies of real ones in 'B cells', 'NK cells' (2)" in note for note in record["notes"])


def test_controls_that_were_not_trained_on_stand_behind_the_truth(kang, judged, tmp_path):
    """Repeating the noise of the truth's control cells is rated below 0, of other ones as what it is: no change."""
    known = evaluate_responses(
        kang["real"], kang["control of training"], tmp_path, **KEYS, **QUICK, training=kang["training"]
    )
    assert known["real_perturbed_cells_also_in_training"] == 0 and known["pca"] == "training cells"
    assert not any("hold some control cells" in note for note in known["notes"])
    unknown = evaluate_responses(kang["real"], kang["control of training"], tmp_path, **KEYS, **QUICK)
    assert abs(known["summary"]["pearson_delta"]["mean"]) < 0.08
    assert unknown["summary"]["pearson_delta"]["mean"] < known["summary"]["pearson_delta"]["mean"]
    every = kang["real"][kang["real"].obs["perturbation"] == "control"].to_memory()
    record = evaluate_responses(kang["real"], kang["other"], tmp_path, **KEYS, **QUICK, training=every)
    assert any("hold some control cells of every identity out of training" in note for note in record["notes"])


def test_protocol_of_the_challenges(kang, tmp_path):
    options = {"ceiling": False, "split_controls": False, "max_cells_per_condition": 100}
    record = evaluate_responses(kang["real"], kang["other"], tmp_path, **KEYS, **QUICK, **options)
    table = pd.read_csv(tmp_path / verb.TABLE)
    assert (table[["n_truth", "n_judged", "n_controls"]] == 100).all(axis=None)
    assert not [name for name in table if name.startswith("ceiling_") and table[name].notna().any()]
    assert table["lfc_slope"].to_numpy() == pytest.approx([1.0, 1.0], abs=0.2)
    assert any("share control cells" in note for note in record["notes"])


@needs_libraries
def test_cell_eval_agrees_with_our_own_numbers(kang, tmp_path):
    record = evaluate_responses(kang["real"], kang["other"], tmp_path / "other", **KEYS, use_cell_eval2=False)
    table = pd.read_csv(tmp_path / "other" / verb.TABLE)
    for ours, theirs in (("pearson_delta", "cell_eval_pearson_delta"), ("mae_log1p", "cell_eval_mae")):
        for prefix in ("", "ceiling_"):
            assert table[prefix + ours].to_numpy() == pytest.approx(table[prefix + theirs].to_numpy(), abs=1e-4)
    assert record["cell_eval"]["mean"]["pds"] is None and record["cell_eval"]["mean"]["spearman_n_de"] is None
    assert any(note.startswith("PDS compares") for note in record["notes"])
    assert record["cell_eval"]["mean"]["des"] == pytest.approx(record["cell_eval"]["ceiling_mean"]["des"], abs=0.12)
    assert record["cell_eval2"] is None and not any("unique" in text for text in record["library_warnings"])
    worse = evaluate_responses(
        kang["real"], kang["control"], tmp_path / "control", **KEYS, use_cell_eval2=False, baseline=tmp_path / "other"
    )
    assert worse["cell_eval"]["mean"]["des"] < 0.05
    assert worse["cell_eval"]["average_score"]["average"] == 0.0
    assert worse["cell_eval"]["average_score"]["left_out"] == ["pds", "spearman_n_de"]
    with pytest.raises(LingshuError, match=r"judged against the same cells: different: 'seed' \(1\)"):
        evaluate_responses(
            kang["real"], kang["other"], tmp_path / "x", **KEYS, **QUICK, seed=1, baseline=tmp_path / "other"
        )


@needs_libraries
def test_discrimination_between_several_perturbations(tmp_path):
    adata = load("vcc_h1_sub")
    control, rng = "non-targeting", np.random.default_rng(0)
    part = rng.permutation(adata.n_obs) < 200
    perturbed = part & (adata.obs["perturbation"] != control).to_numpy()
    rows = np.flatnonzero(perturbed)
    names = adata.obs["perturbation"].to_numpy()[rows]
    turned = pd.Series(names).map(dict(zip(*[(u := np.unique(names)), np.roll(u, 1)], strict=True))).to_numpy()
    keys = {"perturbation_key": "perturbation", "control": control}
    found = {}
    for name, labels in (("right", names), ("wrong", turned)):
        predicted = cells(adata.X[rows], adata, {"perturbation": labels})
        found[name] = evaluate_responses(adata[~part].to_memory(), predicted, tmp_path / name, **keys)
    right, wrong = (found[name]["cell_eval"]["mean"] for name in ("right", "wrong"))
    assert right["pds"] > 0.7 > 0.6 > wrong["pds"] and right["pds_paper"] == pytest.approx(2 * right["pds"] - 1)
    assert found["right"]["cell_eval2"]["overall"]["pds_cosine"] > found["wrong"]["cell_eval2"]["overall"]["pds_cosine"]
    assert found["right"]["cell_eval2"]["scores"]["pds_cosine"] > 0.3
    assert right["pearson_delta"] > wrong["pearson_delta"] and list(found["right"]["controls"]) == [""]
    assert found["right"]["cell_eval2"]["overall"]["jaccard"] > found["wrong"]["cell_eval2"]["overall"]["jaccard"]


def refused(kang, tmp_path, match, real="real", predicted="other", **changes):
    real, predicted = (kang[x] if isinstance(x, str) else x for x in (real, predicted))
    with pytest.raises(LingshuError, match=match):
        evaluate_responses(real, predicted, tmp_path / "out", **(KEYS | QUICK | changes))
    assert not (tmp_path / "out").exists()


def test_mistakes_are_refused(kang, tmp_path):
    real, other = kang["real"], kang["other"]
    refused(kang, tmp_path, "must have control cells: no cell has 'ctrl'.*found: 'IFNB', 'control'", control="ctrl")
    refused(kang, tmp_path, "Keys must be obs columns: there is no 'type'", identity_key="type")
    refused(kang, tmp_path, r"lacks|not in the predicted data: .* \(2\)", predicted=other[:, 2:].to_memory())
    only_b = other[other.obs["cell_type"] == TYPES[0]].to_memory()
    refused(kang, tmp_path, r"not in the prediction: 'NK cells / IFNB' \(1\)", predicted=only_b)
    unknown = other.copy()
    unknown.obs["perturbation"] = "IFNG"
    refused(kang, tmp_path, r"not in the real data: 'B cells / IFNG', 'NK cells / IFNG' \(2\)", predicted=unknown)
    keep = ((real.obs["cell_type"] != TYPES[1]) | (real.obs["perturbation"] == "IFNB")).to_numpy()
    refused(kang, tmp_path, r"at least 20 real control cells: fewer in 'NK cells' \(1\)", real=real[keep].to_memory())
    refused(kang, tmp_path, "held out from training: .* equal a training cell", training=real)
    refused(kang, tmp_path, "target_sum must be above 0", target_sum=0)
    refused(kang, tmp_path, "max_cells_per_condition must be at least 20", max_cells_per_condition=5)
    refused(kang, tmp_path, "threads must be at least 1", threads=0)
    refused(kang, tmp_path, "baseline must be a folder with responses.json", baseline=tmp_path / "nowhere")
    few = other[other.obs.groupby("cell_type").cumcount().to_numpy() < 5].to_memory()
    refused(kang, tmp_path, r"too few in every condition: 'B cells / IFNB', 'NK cells / IFNB' \(2\)", predicted=few)
    normalised = other.copy()
    normalised.X = normalised.X.astype(np.float32) * 0.5
    refused(kang, tmp_path, "Counts must be integers", predicted=normalised)


def test_a_prediction_of_some_conditions_can_be_judged(kang, tmp_path):
    only_b = kang["other"][kang["other"].obs["cell_type"] == TYPES[0]].to_memory()
    record = evaluate_responses(kang["real"], only_b, tmp_path, **KEYS, **QUICK, only_predicted=True)
    assert record["n"]["conditions"] == 1 and any("left out: 1" in note for note in record["notes"])


@pytest.mark.parametrize("library", ["cell_eval", "cell_eval2"])
def test_a_missing_library_is_said_at_once(kang, tmp_path, monkeypatch, library):
    module = getattr(verb, library)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(LingshuError, match=rf'pip install "lingshu-cell\[responses\]".*use_{library}=False'):
        evaluate_responses(kang["real"], kang["other"], tmp_path / "out", **KEYS)
