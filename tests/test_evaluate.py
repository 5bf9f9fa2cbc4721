"""The whole evaluation on real cells: other real cells near ideal, broken ones bad, files whole, mistakes refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from lingshu_cell.errors import LingshuError
from lingshu_cell.evaluate import evaluate_files
from lingshu_cell.metrics.catalogue import CATALOGUE
from lingshu_cell.metrics.genes import shuffle_genes

ROOT = Path(__file__).resolve().parents[1]
PBMC = (ROOT / "src" / "lingshu_cell" / "datasets" / "pbmc3k.h5ad", ROOT.parent / "shared" / "data" / "pbmc3k.h5ad")
N_HELD_OUT = 300
N_TRAINING = 1200


def _write(path, counts, obs, var, uns=None):
    adata = ad.AnnData(sp.csr_matrix(counts).astype(np.int32), obs=obs.copy(), var=var.copy(), uns=uns or {})
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Held-out real cells, training cells and several kinds of 'generated' cells made from real ones, as files."""
    source = next((path for path in PBMC if path.is_file()), None)
    if source is None:
        pytest.skip("PBMC 3k is neither bundled nor in the shared data")
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("cells")
    adata = ad.read_h5ad(source)
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 20]
    order = rng.permutation(adata.n_obs)
    parts = np.split(order, [N_HELD_OUT, 2 * N_HELD_OUT, 2 * N_HELD_OUT + N_TRAINING])
    held, other, train, _ = (adata[rows].to_memory() for rows in parts)
    counts = sp.csr_matrix(other.X).astype(np.int32)
    made = {"model": "a test", "seed": np.int64(3), "conditions": {"cell_type": "all"}}
    files = {
        "real": _write(folder / "real.h5ad", held.X, held.obs, held.var),
        "training": _write(folder / "training.h5ad", train.X, train.obs, train.var),
        "other": _write(folder / "other.h5ad", counts, other.obs, other.var, {"lingshu_cell": made}),
        "shuffled": _write(folder / "shuffled.h5ad", shuffle_genes(counts, rng), other.obs[[]], other.var),
        "doubled": _write(folder / "doubled.h5ad", counts * 2, other.obs, other.var),
    }
    copied = sp.csr_matrix(train.X)[:N_HELD_OUT].astype(np.int32)  # B cells left out, others copied, one repeated
    copied = copied[(train.obs["cell_type"][:N_HELD_OUT] != "B cells").to_numpy()]
    copied = sp.vstack([copied, copied[:1]])
    files["copied"] = _write(folder / "copied.h5ad", copied, train.obs[: copied.shape[0]], train.var)
    return files


@pytest.fixture(scope="module")
def judged(cells, tmp_path_factory):
    """Evaluate each kind of cells once: name → (metrics, folder)."""
    found = {}

    def judge(name):
        if name not in found:
            out = tmp_path_factory.mktemp("evaluations") / name
            n_splits = 2 if name == "other" else 1
            metrics = evaluate_files(cells["real"], cells[name], out, training=cells["training"], n_splits=n_splits)
            found[name] = metrics, out
        return found[name]

    return judge


def test_other_real_cells_are_rated_like_real_cells(judged):
    metrics, _ = judged("other")
    value = {name: metric["value"] for name, metric in metrics.items()}
    ideal = {name: metric["real_vs_real"] for name, metric in metrics.items()}
    for name in ("classifier_auc_random_forest", "classifier_auc_logistic", "classifier_auc_library_size"):
        assert 0.35 < value[name] < 0.65 and 0.35 < ideal[name] < 0.65, name
    assert abs(value["mmd2"]) < 0.04 and abs(ideal["mmd2"]) < 0.04
    assert value["ilisi"] > 0.85 and ideal["ilisi"] > 0.85
    assert value["gene_mean_pearson"] > 0.985 and abs(value["gene_mean_pearson"] - ideal["gene_mean_pearson"]) < 0.004
    assert value["wasserstein"] == pytest.approx(ideal["wasserstein"], rel=0.1)
    assert value["sd_log_umi_ratio"] == pytest.approx(1.0, abs=0.25)
    assert value["zero_fraction_difference"] < 0.005 and value["mean_variance_error"] < 0.12
    assert value["gene_correlation_slope"] == pytest.approx(1.0, abs=0.4)
    assert ideal["gene_correlation_slope"] == pytest.approx(1.0, abs=0.1)  # one draw is not so near: ± .3
    assert metrics["gene_correlation_slope"]["real_vs_real_sd"] > 0.02
    error = metrics["gene_correlation_error"]
    assert 0 < error["real_vs_real_sd"] < error["real_vs_real"] / 2
    assert abs(error["value"] - error["real_vs_real"]) < 4 * error["real_vs_real_sd"]
    assert value["proportion_max_error"] < 0.12 and value["label_accuracy"] > 0.85 and value["marker_overlap"] > 0.4
    assert value["doublet_rate"] < 0.12 and value["training_duplicates"] == value["generated_duplicates"] == 0
    assert value["memorisation_distance_ratio"] == pytest.approx(1.0, abs=0.1)
    for name in ("counts_far_above", "zeros_of_abundant_genes"):
        assert value[name] == pytest.approx(ideal[name], abs=0.1), name


def test_shuffled_genes_are_caught_by_every_joint_metric_and_by_no_marginal_one(judged):
    metrics, _ = judged("shuffled")
    floor = {name: metric.get("shuffled") for name, metric in metrics.items()}
    value = {name: metric["value"] for name, metric in metrics.items()}
    ideal = {name: metric["real_vs_real"] for name, metric in metrics.items()}
    for shuffled in (value, floor):  # shuffled cells given as the generated file, and the floor computed within
        assert shuffled["classifier_auc_random_forest"] > 0.97 and shuffled["mmd2"] > 0.3 and shuffled["ilisi"] < 0.2
        assert shuffled["sd_log_umi_ratio"] < 0.4 and shuffled["classifier_auc_library_size"] > 0.75
        assert abs(shuffled["gene_correlation_slope"]) < 0.2
        assert shuffled["gene_correlation_error"] > ideal["gene_correlation_error"] + 0.02
        assert shuffled["gene_mean_pearson"] > 0.98 and shuffled["zero_fraction_difference"] < 0.005
        assert shuffled["zeros_of_abundant_genes"] > 3 * ideal["zeros_of_abundant_genes"]
    assert value["doublet_rate"] > 0.2 and value["proportion_max_error"] > 0.2
    assert value["memorisation_distance_ratio"] > 1.1
    assert value["label_accuracy"] is None and "cell-type column" in metrics["label_accuracy"]["why"]


def test_doubled_counts_are_caught_by_depth_and_variance_only(judged):
    doubled, plain = judged("doubled")[0], judged("other")[0]
    assert doubled["mean_log_umi"]["value"] - plain["mean_log_umi"]["value"] == pytest.approx(math.log(2), abs=1e-6)
    assert doubled["classifier_auc_library_size"]["value"] > 0.8
    assert doubled["mean_variance_bias"]["value"] > 0.3 > abs(plain["mean_variance_bias"]["value"])
    assert doubled["wasserstein"]["value"] == pytest.approx(plain["wasserstein"]["value"], rel=0.05)


def test_copies_of_training_cells_and_missing_types_are_caught(judged):
    metrics, _ = judged("copied")
    n = json.loads((judged("copied")[1] / "facts.json").read_text())["n_cells"]["generated"]
    assert metrics["training_duplicates"]["value"] == n and metrics["training_duplicates"]["real_vs_real"] == 0
    assert metrics["generated_duplicates"]["value"] == 1
    assert metrics["memorisation_distance_ratio"]["value"] < 1e-6
    assert metrics["memorisation_near_fraction"]["value"] == 1.0
    table = pd.read_csv(judged("copied")[1] / "proportions.csv").set_index("cell_type")
    assert table.loc["B cells", "generated"] < 0.02 < 0.05 < table.loc["B cells", "real"]
    assert metrics["proportion_max_error"]["value"] >= table.loc["B cells", "real"] - 0.02


@pytest.mark.parametrize("name", ["other", "shuffled"])
def test_metrics_json_is_complete_finite_and_explained(judged, name):
    returned, out = judged(name)
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert metrics == returned
    assert set(metrics) == {metric for metric in CATALOGUE if not metric.startswith("nelbo")}
    for metric in metrics.values():
        assert {"value", "real_vs_real", "better", "unit", "description"} <= metric.keys()
        assert metric["better"] in ("higher", "lower", "closer_to_real") and metric["description"].endswith(".")
        assert (metric["value"] is None or metric["real_vs_real"] is None) == ("why" in metric)
        numbers = [metric[key] for key in metric if key in ("value", "real_vs_real", "shuffled") or key.endswith("_sd")]
        assert all(number is None or math.isfinite(number) for number in numbers)


def test_tables_and_facts(judged, cells):
    _, out = judged("other")
    table = pd.read_csv(out / "cells.csv.gz", keep_default_na=False)
    assert table["source"].value_counts().to_dict() == {"real": N_HELD_OUT, "generated": N_HELD_OUT}
    markers = [column.removeprefix("gene:") for column in table if column.startswith("gene:")]
    assert 5 <= len(markers) <= 12 and {"CD79A", "CD79B", "MS4A1"} & set(markers) and np.isfinite(table["umap1"]).all()
    real = ad.read_h5ad(cells["real"])
    assert table["total_counts"][:N_HELD_OUT].tolist() == np.asarray(real.X.sum(axis=1)).ravel().tolist()
    of_gene = np.asarray(real[:, markers[0]].X.todense()).ravel() * 1e4 / table["total_counts"][:N_HELD_OUT]
    np.testing.assert_allclose(table[f"gene:{markers[0]}"][:N_HELD_OUT], np.log1p(of_gene), rtol=1e-4)

    genes = pd.read_csv(out / "genes.csv.gz", keep_default_na=False).set_index("gene")
    assert list(genes.index) == list(real.var_names)
    np.testing.assert_allclose(genes["mean_real"], np.asarray(real.X.mean(axis=0)).ravel(), rtol=1e-4)
    np.testing.assert_allclose(genes["variance_real"], real.X.toarray().var(axis=0), rtol=1e-3, atol=1e-6)

    shares = pd.read_csv(out / "proportions.csv")
    assert shares[["real", "generated"]].sum().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    facts = json.loads((out / "facts.json").read_text())
    assert facts["provenance"] == {"model": "a test", "seed": 3, "conditions": {"cell_type": "all"}}
    assert facts["n_cells"]["each_sample_of_a_comparison"] == N_HELD_OUT // 2
    assert facts["versions"]["scib-metrics"] and facts["files"]["generated"]["name"] == "other.h5ad"
    assert len(facts["files"]["real"]["fingerprint"]) == 64 and facts["seconds"]["umap"] > 0


def test_without_training_without_types_and_with_other_gene_order(cells, tmp_path):
    real, other = ad.read_h5ad(cells["real"]), ad.read_h5ad(cells["other"])
    del real.obs["cell_type"]
    real.write_h5ad(tmp_path / "real.h5ad")
    other[:, ::-1].write_h5ad(tmp_path / "generated.h5ad")
    nelbo = {"nats_per_cell": 2900.5}
    paths = tmp_path / "real.h5ad", tmp_path / "generated.h5ad", tmp_path / "out"
    metrics = evaluate_files(*paths, n_splits=1, max_cells=240, nelbo=nelbo)
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["n_cells"]["reference"] == 80 and facts["n_cells"]["real"] == 160
    assert facts["n_cells"]["each_sample_of_a_comparison"] == 80 and facts["cell_type_key"] is None
    assert 0.3 < metrics["classifier_auc_random_forest"]["value"] < 0.7
    assert metrics["gene_mean_pearson"]["value"] > 0.97  # genes were matched by name
    assert (
        metrics["proportion_max_error"]["value"] is None and "--cell-type-key" in metrics["proportion_max_error"]["why"]
    )
    assert metrics["training_duplicates"]["value"] is None and "--training" in metrics["training_duplicates"]["why"]
    assert metrics["nelbo_nats_per_cell"]["value"] == 2900.5 and "nelbo_bits_per_gene" not in metrics
    assert pd.read_csv(tmp_path / "out" / "proportions.csv").empty
    assert sum(column.startswith("gene:") for column in pd.read_csv(tmp_path / "out" / "cells.csv.gz")) == 12


def test_a_handful_of_cells_gives_reasons_instead_of_numbers(cells, tmp_path):
    ad.read_h5ad(cells["other"])[:8].copy().write_h5ad(tmp_path / "few.h5ad")
    metrics = evaluate_files(cells["real"], tmp_path / "few.h5ad", tmp_path / "out", training=cells["training"])
    assert metrics["mmd2"]["value"] is None and "20 generated cells" in metrics["mmd2"]["why"]
    assert metrics["gene_correlation_slope"]["value"] is None and metrics["gene_correlation_slope"]["why"]
    assert metrics["mean_log_umi"]["value"] > 5 and metrics["memorisation_distance_ratio"]["value"] > 0


def test_the_same_seed_gives_the_same_numbers_and_files(cells, tmp_path):
    runs = []
    for name in ("first", "second"):
        paths = cells["real"], cells["other"], tmp_path / name
        metrics = evaluate_files(*paths, training=cells["training"], n_splits=1, max_cells=60, seed=5)
        runs.append((metrics, pd.read_csv(tmp_path / name / "cells.csv.gz")))
    assert runs[0][0] == runs[1][0]
    pd.testing.assert_frame_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"out": "file"},
            "The output must be a folder: .*file is a file. Name another folder, or move that file away.",
        ),
        ({"target_sum": 0.0}, "target_sum must be above 0: it is 0.0. Use e.g. 10000 counts per cell."),
        ({"max_cells": 10}, "max_cells must be at least 60: it is 10. Leave it out to use all cells."),
        ({"n_splits": 0}, "n_splits must be at least 1: it is 0. Use e.g. 5 halvings of the real cells."),
        (
            {"cell_type_key": "tpye"},
            "The cell-type key must be an obs column of the real cells: there is no 'tpye'. Avail",
        ),
        ({"training": "real"}, "Real cells must be held out from training: 300 of 300 equal a training cell in every"),
        ({"generated": "absent"}, "there is no .*absent.h5ad"),
        ({"nelbo": {"loss": 1.0}}, r"nelbo holds nats_per_cell and bits_per_gene: found 'loss' \(1\)."),
    ],
)
def test_mistakes_are_refused_with_a_remedy(cells, tmp_path, change, message):
    (tmp_path / "file").write_text("kept")
    arguments = {"real": cells["real"], "generated": cells["other"], "out": tmp_path / "out"}
    paths = {"out": tmp_path / "file", "training": cells["real"], "generated": tmp_path / "absent.h5ad"}
    arguments |= {
        key: paths[key] if isinstance(value, str) and key in paths else value for key, value in change.items()
    }
    with pytest.raises(LingshuError, match=message):
        evaluate_files(**arguments)
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "out").exists()


def test_genes_that_do_not_match_are_refused(cells, tmp_path):
    other = ad.read_h5ad(cells["other"])
    other.var_names = [f"ENSG{i:011d}" for i in range(other.n_vars)]
    other.write_h5ad(tmp_path / "generated.h5ad")
    with pytest.raises(
        LingshuError, match=r"At least half of the real genes .* the generated file leaves 0 of .*ENSG0000"
    ):
        evaluate_files(cells["real"], tmp_path / "generated.h5ad", tmp_path / "out")


def test_judging_needs_no_torch_and_importing_it_is_fast():
    heavy = "torch", "scanpy", "umap", "jax", "sklearn", "lingshu_cell.network", "lingshu_cell.diffusion"
    code = f"import sys, lingshu_cell.evaluate; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
