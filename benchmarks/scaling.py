"""What a training step costs per cell, gene and parameter: measured at several sizes, fitted, checked on others.

Real cells (PBMC 3k, its most detected genes), the real ``train``, CPU seconds of one thread. Fitted by least squares of
relative errors: seconds = a · cells · genes · (gene width) + b · cells · (trunk parameters) + c · parameters.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from recording import ROOT, environment, markdown_table, say, write_result
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
    return [cells * row["genes"] * row["gene_width"], cells * row["in_trunk"], row["parameters"]]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    facts, folder = environment(), ROOT / "build" / "scaling"
    adata = ad.read_h5ad(pbmc3k_path())[::3].copy()
    by_detection = np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")
    rows = []
    for size in (*FITTED, *CHECKED):
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
    names = ("cell, gene and number of its gene width", "cell and parameter of the trunk", "parameter and step")
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
