"""Training from a store against training from memory: speed and peak memory, in one run, at two numbers of cells.

Cells × 18,000 genes are drawn with replacement from real cells, as in ``loader.py``, with three groups as a condition
and control and perturbed cells, so that contexts and effects are measured too. Each training has a process of its own
and makes the same number of steps of the default network with minibatches of 128. Speed is that of the steps, in CPU
seconds; the peak is of the whole process, reading, statistics and checkpoint included.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from loader import make_cells
from recording import ROOT, environment, markdown_table, run_in_child, say, write_result

from lingshu_cell.prepare import prepare
from lingshu_cell.run_config import run_config
from lingshu_cell.train import Progress, train


def make(source: str, n_cells: int, n_genes: int, folder: str) -> dict[str, Any]:
    """Draw cells, write them as a file and as a store."""
    file = Path(folder) / "cells.h5ad"
    make_cells(source, n_cells, n_genes, file)
    cells = ad.read_h5ad(file)
    cells.obs["drug"] = np.random.default_rng(1).choice(["none", "A", "B"], n_cells)
    cells.write_h5ad(file)
    prepare([file], Path(folder) / "store")
    return {}


def measure(source: str, run: str, n_steps: int) -> dict[str, Any]:
    """Train, and say how fast the steps were."""
    data = {"condition_keys": ("group",), "perturbation_key": "drug", "control": "none"}
    settings = [f"training.steps={n_steps}", f"training.validate_every={n_steps}", "data.validation_fraction=0.01"]
    config = run_config([source], Path(run), settings=settings, overrides={"data": data})
    seen: list[Progress] = []
    start = time.process_time()
    train([source], run, config, on_progress=seen.append, clock=time.process_time)
    n_cells = n_steps * config.training.minibatch_size
    stepping = n_cells / seen[-1].cells_per_second
    return {
        "training_cells_per_cpu_second": seen[-1].cells_per_second,
        "cpu_seconds_beside_steps": time.process_time() - start - stepping,
    }


def main() -> None:
    """Measure both ways at both sizes, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=str(ROOT.parent / "shared" / "data" / "pbmc8k.h5ad"))
    parser.add_argument("--cells", type=int, nargs="+", default=[5_000, 40_000])
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if not Path(arguments.source).is_file():
        sys.exit(f"--source: there is no {arguments.source}")
    facts, work = environment(), ROOT / "build" / "store-training"
    shutil.rmtree(work, ignore_errors=True)
    results: dict[str, Any] = {}
    rows = []
    for n_cells in arguments.cells:
        folder = work / str(n_cells)
        folder.mkdir(parents=True)
        run_in_child(make, arguments.source, n_cells, arguments.genes, str(folder))
        for way, source in (("memory", "cells.h5ad"), ("store", "store")):
            say(f"{n_cells:,} cells from {way}")
            found = run_in_child(measure, str(folder / source), str(folder / f"run-{way}"), arguments.steps)
            results[f"{n_cells} cells, {way}"] = found
            rows.append(
                [f"{n_cells:,}", way, found["training_cells_per_cpu_second"], found["cpu_seconds_beside_steps"],
                 round(found["peak_memory_gib"] * 1024)]
            )  # fmt: skip
    header = ["cells", "read from", "training cells per CPU second", "CPU seconds beside the steps", "peak memory, MiB"]
    about = " ".join((__doc__ or "").split())
    write_result("store-training", about, facts, {"results": results}, [markdown_table(header, rows)])
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
