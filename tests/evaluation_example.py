"""An evaluation folder made from real PBMC 3k cells, for the tests of the report."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

ROOT = Path(__file__).resolve().parents[1]
PBMC = (ROOT / "src" / "lingshu_cell" / "datasets" / "pbmc3k.h5ad", ROOT.parent / "shared" / "data" / "pbmc3k.h5ad")
MARKERS = ("CD3D", "MS4A1", "LYZ", "NKG7", "PPBP", "FCER1A")
N_PER_SIDE = 300


def example_folder(tmp_path_factory: pytest.TempPathFactory, *, shuffle: bool) -> Path:
    """Return one example for all tests of a run; they must not change it."""
    directory = tmp_path_factory.getbasetemp() / "evaluation_example" / ("shuffled" if shuffle else "untouched") / "out"
    return directory if directory.exists() else write_example(directory, shuffle=shuffle)


def write_example(directory: Path, *, shuffle: bool) -> Path:
    """Write an evaluation of real PBMC against other real PBMC that play the generated side.

    With ``shuffle`` each gene of that side is dealt out to its cells anew: every gene is right, no cell is.
    """
    path = next((p for p in PBMC if p.is_file()), None)
    if path is None:
        pytest.skip("PBMC 3k is neither bundled nor in the shared data")
    rng = np.random.default_rng(0)
    adata = anndata.read_h5ad(path)
    adata = adata[rng.permutation(adata.n_obs)[: 3 * N_PER_SIDE]].to_memory()
    counts = adata.X.toarray().astype(np.int64)
    detected = (counts > 0).sum(axis=0) >= 3
    genes = adata.var_names[detected].astype(str).to_numpy()
    real, other, reference = np.split(counts[:, detected], 3)
    types, other_types, _ = np.split(adata.obs["cell_type"].astype(str).to_numpy(), 3)
    generated = rng.permuted(other, axis=0) if shuffle else other

    directory.mkdir(parents=True, exist_ok=True)
    pca = TruncatedSVD(20, random_state=0).fit(_log_normalised(reference))  # fitted on cells that are in neither sample
    sides = {"real": real, "generated": generated, "other": other, "shuffled": rng.permuted(other, axis=0)}
    components = {name: pca.transform(_log_normalised(side)) for name, side in sides.items()}
    _cells(real, generated, genes, types, other_types, components).to_csv(directory / "cells.csv.gz", index=False)
    _genes(real, generated, genes).to_csv(directory / "genes.csv.gz", index=False)
    shares = {"real": types, "generated": other_types}
    shares = pd.DataFrame({k: pd.Series(v).value_counts(normalize=True) for k, v in shares.items()}).fillna(0.0)
    shares.rename_axis("cell_type").to_csv(directory / "proportions.csv")
    (directory / "metrics.json").write_text(json.dumps(_metrics(real, generated, other, components)))
    (directory / "facts.json").write_text(json.dumps(_facts()))
    step = np.arange(0, 200, 10)
    history = pd.DataFrame({"step": step, "loss": 3000 + 900 * np.exp(-step / 40), "validation_nelbo": np.nan})
    history.loc[::5, "validation_nelbo"] = 2950 + 800 * np.exp(-step[::5] / 40)
    history.to_csv(directory / "history.csv", index=False)
    return directory


def _log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def _cells(real, generated, genes, types, other_types, components) -> pd.DataFrame:
    counts = np.concatenate([real, generated])
    expression = _log_normalised(counts)
    columns = {
        "source": np.repeat(["real", "generated"], N_PER_SIDE),
        "cell_type": np.concatenate([types, np.full(N_PER_SIDE, "")]),
        "predicted_cell_type": np.concatenate([types, other_types]),
        "total_counts": counts.sum(axis=1),
        "n_genes": (counts > 0).sum(axis=1),
        "umap1": np.concatenate([components["real"], components["generated"]])[:, 1],
        "umap2": np.concatenate([components["real"], components["generated"]])[:, 2],
    }
    markers = {f"gene:{gene}": expression[:, list(genes).index(gene)].round(4) for gene in MARKERS}
    return pd.DataFrame({**columns, **markers})


def _genes(real, generated, genes) -> pd.DataFrame:
    table = {"gene": genes}
    for side, counts in (("real", real), ("generated", generated)):
        table[f"mean_{side}"] = counts.mean(axis=0)
        table[f"variance_{side}"] = counts.var(axis=0, ddof=1)
        table[f"zero_fraction_{side}"] = (counts == 0).mean(axis=0)
        table[f"mean_lognorm_{side}"] = _log_normalised(counts).mean(axis=0)
    return pd.DataFrame(table)


def _metrics(real, generated, other, components) -> dict:
    def auc(name: str) -> float:
        features = np.concatenate([components["real"], components[name]])
        side = np.repeat([0, 1], N_PER_SIDE)
        forest = RandomForestClassifier(50, random_state=0)
        return float(roc_auc_score(side, cross_val_predict(forest, features, side, cv=3, method="predict_proba")[:, 1]))

    def entry(value, reference, better, unit="", **more) -> dict:
        return {"value": float(value), "real_vs_real": float(reference), "better": better, "unit": unit, **more}

    def pearson(counts) -> float:
        return pearsonr(_log_normalised(counts).mean(axis=0), _log_normalised(real).mean(axis=0)).statistic

    def spread(counts) -> float:
        return np.log(counts.sum(axis=1)).std() / np.log(real.sum(axis=1)).std()

    return {
        "gene_mean_pearson": entry(
            pearson(generated), pearson(other), "higher", "correlation",
            description="Correlation of mean log expression over genes; 1 is perfect.",
        ),
        "classifier_auc_random_forest": entry(
            auc("generated"), auc("other"), "lower", "AUC", shuffled=auc("shuffled"),
            description="How well a random forest tells generated from real cells; 0.5 means that it cannot.",
        ),
        "sd_log_umi_ratio": entry(
            spread(generated), spread(other), "closer_to_real", "ratio",
            description="Spread of depth between cells, generated over real; 1 is right.",
        ),
        "zero_fraction": entry((generated == 0).mean(), (real == 0).mean(), "closer_to_real", "fraction"),
        "nelbo_nats_per_cell": {"value": None, "real_vs_real": None, "better": "lower", "unit": "nats per cell",
                                "why": "Needs the model that made the cells.", "description": "Likelihood bound."},
        "brand_new_measure": entry(1.05, 1.0, "lower"),
    }  # fmt: skip


def _facts() -> dict:
    return {
        "seed": 0,
        "target_sum": 1e4,
        "n_cells": {"real": N_PER_SIDE, "generated": N_PER_SIDE, "reference": N_PER_SIDE},
        "files": {"real": {"name": "held out.h5ad", "fingerprint": "5f1c"}, "generated": {"name": "generated.h5ad"}},
        "versions": {"numpy": np.__version__, "pandas": pd.__version__},
        "provenance": {
            "training": {"steps": 2000, "n_cells": 9},
            "preset": "small",
            "checkpoint_step": 1200,
            "condition": {"cell_type": "B cells"},
            "generation": {"steps": 64, "seed": 3, "schedule": "cosine"},
        },
    }
