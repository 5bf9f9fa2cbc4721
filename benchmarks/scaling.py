"""What a training step costs per cell, gene and parameter: measured at several sizes, fitted, checked on others.

Real cells (PBMC 3k, its most detected genes), the real ``train``, CPU seconds of one thread. Fitted by non-negative
least squares of relative errors: seconds = a · cells · genes + b · cells · genes · (gene width) + c · cells · (trunk
parameters) + d. Optimiser and averages, which go by all parameters, are in c and d: with so few sizes they cannot be
told apart.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from recording import RESULTS, ROOT, environment, markdown_table, say, write_result
from scipy.optimize import nnls

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import load_config
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.train import train

FITTED = (  # genes, gene width, width, minibatch
    (2_000, 128, 512, 64),
    (6_000, 128, 512, 64),
    (13_000, 128, 512, 64),
    (13_000, 32, 128, 64),
    (6_000, 128, 1024, 64),
    (6_000, 128, 512, 128),
)
CHECKED = ((9_000, 64, 512, 96), (3_000, 128, 768, 128))
STEPS = 8


def measure(adata: ad.AnnData, by_detection: np.ndarray, size: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Train for a few steps."""
    genes, gene_width, width, minibatch = size
    config = load_config(
        overrides={
            "data": {"condition_keys": ["cell_type"], "min_cells_per_gene": 1},
            "network": {"gene_width": gene_width, "width": width, "feedforward_width": 2 * width},
            "training": {"steps": STEPS, "minibatch_size": minibatch, "validate_every": STEPS, "device": "cpu"},
        }
    )
    ends: list[float] = []
    shutil.rmtree(folder, ignore_errors=True)
    cells = adata[:, np.sort(by_detection[:genes])].copy()
    train([cells], folder, config, on_progress=lambda progress: ends.append(time.process_time()))
    checkpoint = load_checkpoint(folder)
    weights = checkpoint.tensors("weights")
    shutil.rmtree(folder)
    return {
        "genes": checkpoint.manifest["n_modelled_genes"],
        "gene_width": gene_width,
        "width": width,
        "minibatch_size": minibatch,
        "parameters": checkpoint.manifest["n_parameters"],
        "in_trunk": sum(one.numel() for name, one in weights.items() if name.startswith("blocks.")),
        "seconds_per_step": statistics.median(np.diff(ends)[1:-1]),  # the last step also validates
    }


def terms(row: dict[str, Any]) -> list[float]:
    """What the seconds of a step are made of."""
    cells = row["minibatch_size"]
    genes = cells * row["genes"]
    return [genes, genes * row["gene_width"], cells * row["in_trunk"], 1.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refit", action="store_true", help="measure nothing; fit what is in results/scaling.json")
    asked = parser.parse_args()
    facts, folder = environment(), ROOT / "build" / "scaling"
    adata = ad.read_h5ad(pbmc3k_path())[::3].copy()
    by_detection = np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")
    rows = []
    if asked.refit:
        before = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
        rows, facts = before["rows"], {key: before[key] for key in facts}
    for size in () if asked.refit else (*FITTED, *CHECKED):
        rows.append(measure(adata, by_detection, size, folder))
        say(str(rows[-1]))
    fitted = rows[: len(FITTED)]
    matrix = np.array([[term / row["seconds_per_step"] for term in terms(row)] for row in fitted])
    scale = matrix.max(0)
    coefficients = nnls(matrix / scale, np.ones(len(fitted)))[0] / scale
    for row in rows:
        row["foretold"] = float(np.dot(coefficients, terms(row)))
        row["used_to_fit"] = row in fitted
    table = markdown_table(
        ["genes", "gene width", "width", "cells", "parameters", "CPU s per step", "by the fit", "ratio", "used to fit"],
        [
            [row[key] for key in ("genes", "gene_width", "width", "minibatch_size", "parameters", "seconds_per_step")]
            + [row["foretold"], row["foretold"] / row["seconds_per_step"], "yes" if row["used_to_fit"] else "no"]
            for row in rows
        ],
    )
    names = ("cell and gene", "cell, gene and number of its gene width", "cell and parameter of the trunk", "step")
    per = markdown_table(
        ["per", "CPU ns"], [[name, 1e9 * float(value)] for name, value in zip(names, coefficients, strict=True)]
    )
    about = (
        "A training step of the set denoiser (forward, backward, clipping, AdamW, two averages) at several sizes, one "
        "thread, all in one run; the last sizes were not used to fit."
    )
    write_result("scaling", about, facts, {"rows": rows, "coefficients_s": coefficients.tolist()}, [table, per])


if __name__ == "__main__":
    main()
