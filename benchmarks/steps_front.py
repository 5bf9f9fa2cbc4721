"""Quality against the number of generation steps and the schedule, for a trained run.

    python benchmarks/steps_front.py RUN HELDOUT.h5ad TRAIN.h5ad

Every point generates as many cells as are held out, from the same seeds, and judges them with the package's own
evaluation. Writes a table and a picture.
"""

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import anndata as ad
from recording import RESULTS, Stopwatch, environment, markdown_table, say, write_result

from lingshu_cell.diffusion.plan import SCHEDULES
from lingshu_cell.evaluate import evaluate_files
from lingshu_cell.generate import TrainedModel, generate_file, load_model, resolve_schedule
from lingshu_cell.train import pick_device

METRICS = {
    "sd_log_umi_ratio": "SD of log UMI, generated / real",
    "classifier_auc_random_forest_all_cells": "random-forest AUC",
    "gene_correlation_slope": "gene-gene correlation slope",
    "gene_correlation_error": "gene-gene correlation error",
    "mmd2": "MMD²",
    "genes_detected_sd_ratio": "SD of genes detected, generated / real",
    "zero_fraction_difference": "difference of zero fractions",
}
_PLOTTED = tuple(METRICS)[:4]


def measure_point(
    model: TrainedModel, files: tuple[Path, Path], steps: int, schedule: str, seed: int, n_splits: int
) -> dict[str, Any]:
    """Generate with some steps of a schedule and judge the cells.

    Parameters
    ----------
    model
        A trained model.
    files
        Held-out and training cells.
    steps, schedule, seed
        How to generate.
    n_splits
        Random halvings of the evaluation.

    Returns
    -------
    dict
        steps, schedule, predicted KL (nats per cell), cells per second, and of each metric the value and the
        real-vs-real value.
    """
    n_cells = ad.read_h5ad(files[0], backed="r").n_obs
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "generated.h5ad"
        watch = Stopwatch()
        generate_file(model, n_cells, generated, steps=steps, schedule=schedule, seed=seed)
        seconds = watch.seconds()
        metrics = evaluate_files(
            files[0], generated, Path(folder) / "evaluation", training=files[1], n_splits=n_splits, seed=seed
        )
    chosen = {name: {side: metrics[name].get(side) for side in ("value", "real_vs_real")} for name in METRICS}
    return {
        "schedule": schedule,
        "steps": steps,
        "predicted_kl": resolve_schedule(model, steps=steps, schedule=schedule).predicted_kl,
        "cells_per_second": n_cells / seconds,
        "metrics": chosen,
    }


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Draw each metric over the steps, a line per schedule, the real-vs-real value dashed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for axis, name in zip(axes.flat, _PLOTTED, strict=True):
        for schedule in dict.fromkeys(p["schedule"] for p in points):
            known = [(p["steps"], p["metrics"][name]["value"]) for p in points if p["schedule"] == schedule]
            known = [(steps, value) for steps, value in known if value is not None]
            axis.plot([s for s, _ in known], [v for _, v in known], "o-", label=schedule)
        real = [p["metrics"][name]["real_vs_real"] for p in points if p["metrics"][name]["real_vs_real"] is not None]
        if real:
            axis.axhline(real[0], color="0.4", linestyle="--", label="real against real")
        axis.set(ylabel=METRICS[name], xscale="log")
        ticks = sorted({p["steps"] for p in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("steps (network evaluations per cell)")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(points: list[dict[str, Any]]) -> str:
    """Lay out the points, real-vs-real in the first row."""
    first = points[0]["metrics"]
    rows = [["real against real", None, None, None, *[first[name]["real_vs_real"] for name in METRICS]]]
    for p in points:
        values = [p["metrics"][name]["value"] for name in METRICS]
        rows.append([p["schedule"], p["steps"], p["predicted_kl"], p["cells_per_second"], *values])
    header = ["schedule", "steps", "predicted KL, nats per cell", "generated cells/s"]
    return markdown_table([*header, *METRICS.values()], rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("held_out", type=Path, metavar="HELDOUT.h5ad")
    parser.add_argument("train", type=Path, metavar="TRAIN.h5ad")
    parser.add_argument("--steps", default="3,8,16,32,64,128")
    parser.add_argument("--schedules", help="all that the run allows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-splits", type=int, default=2, help="random halvings of each evaluation (2)")
    parser.add_argument("--name", default="steps_front")
    return parser.parse_args()


def main() -> None:
    """Measure all points and write table, numbers and picture."""
    args, facts = parse(), environment()
    model = load_model(args.run, pick_device("auto"))
    possible = [name for name in SCHEDULES if name != "optimal" or model.curve is not None]
    schedules = args.schedules.split(",") if args.schedules else possible
    points = []
    for schedule, steps in product(schedules, map(int, args.steps.split(","))):
        point = measure_point(model, (args.held_out, args.train), steps, schedule, args.seed, args.n_splits)
        points.append(point)
        say(json.dumps({**point, "metrics": {name: m["value"] for name, m in point["metrics"].items()}}))
    plot(points, RESULTS / f"{args.name}.png")
    manifest = model.checkpoint.manifest
    about = (
        f"Cells of a trained `{model.config.preset}` ({manifest['n_training_cells']:,} training cells, step "
        f"{model.checkpoint.step:,}), generated with few to many steps of each schedule, judged against held-out "
        f"cells. Real-vs-real values are means over {args.n_splits} random halvings, those of the forest included."
    )
    body = {"preset": model.config.preset, "checkpoint_step": model.checkpoint.step, "points": points}
    write_result(args.name, about, facts, body, [f"![Quality against steps]({args.name}.png)", table(points)])


if __name__ == "__main__":
    sys.exit(main())
