"""Memory and time of writing a submission to the Virtual Cell Challenge 2026, up to its full size.

    python benchmarks/export_vcc2026.py --cells 20000
    python benchmarks/export_vcc2026.py --cells 20000 360000 --pool 12 1

The predictions are made here: each cell is the sum of some random real cells of PBMC 3k (--pool), over 18,533 genes,
so that the number of genes per cell is that of a deep screen. Three files, one per context (the same cells under three
labels), genes in another order than the list, control cells among them.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from recording import ROOT, Stopwatch, environment, markdown_table, run_in_child, say, write_result
from scipy import sparse

from lingshu_cell.check_vcc2026 import CELLS_PER_CONDITION, N_GENES, validate_vcc2026
from lingshu_cell.data.anndata_io import H5adWriter
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.export_vcc2026 import write_vcc2026

_CONTEXTS = ("A", "B", "C")
_CONTROLS = 400  # of each context
_CELLS_AT_ONCE = 400
_ABOUT = (
    f"`lingshu export vcc2026` on predictions over {N_GENES:,} genes: three files, genes in another order than the "
    "list, 400 control cells in each. Each cell is the sum of some random cells of PBMC 3k, in the column *pool*. "
    "Each stage runs in its own process; peak memory includes Python and its libraries. The last column is what the "
    "matrix takes in memory. Export reads, reorders, checks and writes (gzip); check reads the submission against "
    "every rule."
)
_HEADER = (
    "cells", "pool", "stored entries", "genes per cell", "file, GiB", "export, s", "export, CPU s", "export, peak GiB",
    "check, CPU s", "check, peak GiB", "matrix, GiB",
)  # fmt: skip


def make_predictions(folder: Path, n_cells: int, pool: int) -> dict[str, Any]:
    """Write a file of predictions for each context.

    Parameters
    ----------
    folder
        Where to.
    n_cells
        Cells in all, without controls; a multiple of 1,200.
    pool
        Real cells added up to one.
    """
    real = ad.read_h5ad(pbmc3k_path())
    detected = np.asarray((real.X > 0).sum(axis=0)).ravel()
    genes = np.sort(np.argsort(-detected, kind="stable")[:N_GENES])
    (folder / "genes.txt").write_text("\n".join(real.var_names[genes]) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    genes = rng.permutation(genes)
    counts = sparse.csr_matrix(real.X[:, genes], dtype=np.int32)
    targets = [f"T{i}" for i in range(n_cells // CELLS_PER_CONDITION // len(_CONTEXTS))]
    first, n_stored = folder / f"{_CONTEXTS[0]}.h5ad", 0
    with H5adWriter(first, pd.DataFrame(index=real.var_names[genes])) as writer:
        for target in ["non-targeting", *targets]:
            chosen = rng.integers(0, real.n_obs, (_CELLS_AT_ONCE, pool))
            rows = np.repeat(np.arange(_CELLS_AT_ONCE), pool)
            ones = np.ones(rows.size, dtype=np.int32)
            made = sparse.csr_matrix((ones, (rows, chosen.ravel())), shape=(_CELLS_AT_ONCE, real.n_obs)) @ counts
            names = [f"{target}-{i}" for i in range(_CELLS_AT_ONCE)]
            writer.append(made, pd.DataFrame({"perturbation": target, "cell_line": _CONTEXTS[0]}, index=names))
            n_stored += made.nnz
    for context in _CONTEXTS[1:]:
        copy = shutil.copyfile(first, folder / f"{context}.h5ad")
        with h5py.File(copy, "r+") as file:
            file["obs/cell_line/categories"][0] = context
    return {"n_stored": n_stored * len(_CONTEXTS)}


def export(folder: Path) -> dict[str, Any]:
    """Write the submission and time it."""
    genes = (folder / "genes.txt").read_text(encoding="utf-8").split("\n")[:-1]
    watch, cpu = Stopwatch(), time.process_time()
    made = write_vcc2026(
        [folder / f"{context}.h5ad" for context in _CONTEXTS],
        folder / "submission.h5ad",
        genes,
        contexts=_CONTEXTS,
        check=False,
    )
    size = made.path.stat().st_size
    return {
        "seconds": watch.seconds(),
        "cpu_seconds": time.process_time() - cpu,
        "n_cells": made.n_cells,
        "n_dropped": made.n_controls_dropped,
        "bytes": size,
    }


def check(folder: Path) -> dict[str, Any]:
    """Check the submission and time it."""
    genes = (folder / "genes.txt").read_text(encoding="utf-8").split("\n")[:-1]
    watch, cpu = Stopwatch(), time.process_time()
    report = validate_vcc2026(folder / "submission.h5ad", genes, contexts=_CONTEXTS)
    if not report.passed:
        raise RuntimeError(report.to_text())
    cpu = time.process_time() - cpu
    return {
        "seconds": watch.seconds(),
        "cpu_seconds": cpu,
        "n_stored": report.n_stored,
        "rules": len(report.rules),
        "every_rule_holds": report.passed,
    }


def main() -> None:
    """Make predictions of each size, export and check them, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_400], help="cells, rounded up to 1,200")
    parser.add_argument("--pool", type=int, nargs="+", default=[12], help="real cells added up to one, for each size")
    parser.add_argument("--name", default="export_vcc2026")
    args, facts = parser.parse_args(), environment()
    unit = CELLS_PER_CONDITION * len(_CONTEXTS)
    rows, runs = [], []
    (ROOT / "build").mkdir(exist_ok=True)
    for asked, pool in zip(args.cells, args.pool + args.pool[-1:] * len(args.cells), strict=False):
        n_cells = -(-asked // unit) * unit
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
            folder = Path(scratch)
            say(f"{n_cells:,} cells; {shutil.disk_usage(folder).free / 2**30:.0f} GiB free")
            made = run_in_child(make_predictions, folder, n_cells, pool)
            say(f"predictions: {made['n_stored']:,} stored entries")
            written, checked = run_in_child(export, folder), run_in_child(check, folder)
        run = {"pool": pool, "predictions": made, "export": written, "check": checked}
        runs.append(run)
        rows.append(
            [
                written["n_cells"],
                pool,
                checked["n_stored"],
                checked["n_stored"] / written["n_cells"],
                written["bytes"] / 2**30,
                written["seconds"],
                written["cpu_seconds"],
                written["peak_memory_gib"],
                checked["cpu_seconds"],
                checked["peak_memory_gib"],
                checked["n_stored"] * 8 / 2**30,
            ]
        )
        write_result(args.name, _ABOUT, facts, {"runs": runs}, [markdown_table(_HEADER, rows)])


if __name__ == "__main__":
    sys.exit(main())
