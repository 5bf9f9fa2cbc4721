"""Train models on the same cells for the same CPU time, generate as many cells as were held out, and judge them alike.

    python benchmarks/fidelity.py --data pbmc3k --models small,scvi,halves,shuffled --seconds 480

Models: ``small``, ``paper``, ``paper-s32`` (ours); ``scvi`` (peers/make_venv.sh first); ``halves`` (one half of the
held-out cells judged against the other: what cannot be beaten); ``shuffled`` (training cells with each gene shuffled
over the cells: every gene right, no cell right).
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from cost import scvi_generation_flops_per_cell, scvi_training_flops_per_cell
from data_sets import NAMES, read_cells, split_files
from lingshu_run import Budget, bound_early, bound_likelihood, generate_cells, settings_for, train_model
from recording import ROOT, environment, markdown_table, run_in_child, say, show, write_result
from scipy import sparse

from lingshu_cell.config import PRESETS
from lingshu_cell.metrics.genes import shuffle_genes

PEER_PYTHON = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
SCVI = ROOT / "benchmarks" / "peers" / "scvi_prior.py"
MODELS = (*PRESETS, "scvi", "halves", "shuffled")
_SPEED = (
    ("parameters", "n_parameters"),
    ("genes modelled", "n_modelled_genes"),
    ("conditioned on", "condition_keys"),
    ("CPU seconds of training", "training_cpu_seconds"),
    ("training steps", "training_steps"),
    ("minibatch", "minibatch_size"),
    ("training cells per CPU second", "training_cells_per_cpu_second"),
    ("peak memory of training, GiB", "training_peak_memory_gib"),
    ("training GFLOP per cell", "training_gflop_per_cell"),
    ("network evaluations per generated cell", "generation_steps"),
    ("schedule", "schedule"),
    ("generated cells", "n_generated"),
    ("generated cells per CPU second", "generated_cells_per_cpu_second"),
    ("peak memory of generation, GiB", "generation_peak_memory_gib"),
    ("generation GFLOP per cell", "generation_gflop_per_cell"),
    ("held-out cells of the NELBO", "nelbo_cells"),
    ("masks per cell of the NELBO", "nelbo_masks"),
    ("NELBO of `small` after one step, same cells", "small_after_one_step"),
    ("steps of `small` to the NELBO of the column, at most", "small_steps"),
    ("CPU seconds of `small` to the NELBO of the column, at most", "small_cpu_seconds"),
    ("÷ CPU seconds of the column's training", "small_share"),
    ("operations of these steps ÷ those of the column's training", "small_share_of_operations"),
)
_EARLY_STEPS = (1, 4, 8, 16, 32, 64, 128, 256)
_SCVI_MASKS = 8  # scVI's bound has none; ours is then measured as usual


def run_ours(preset: str, folder: Path, files: tuple[Path, Path], budget: Budget, seed: int) -> dict[str, Any]:
    """Train, generate and bound the likelihood, each in its own process.

    Parameters
    ----------
    preset
        One of ``config.PRESETS``.
    folder
        Folder of this model.
    files
        Training and held-out file.
    budget
        Time and sizes.
    seed
        Seed of training and generation.
    """
    run = folder / "run"
    trained = run_in_child(train_model, preset, files[0], run, budget, seed)
    generated = run_in_child(generate_cells, run, folder / "generated.h5ad", budget, seed)
    bounded = run_in_child(bound_likelihood, run, *files, budget)
    memory = {
        "training_peak_memory_gib": trained.pop("peak_memory_gib"),
        "generation_peak_memory_gib": generated.pop("peak_memory_gib"),
        "nelbo_peak_memory_gib": bounded.pop("peak_memory_gib"),
    }
    return {**trained, **generated, **bounded, **memory}


def run_scvi(folder: Path, files: tuple[Path, Path], budget: Budget, seed: int) -> dict[str, Any]:
    """Train scVI in its own environment for the same time and draw cells from its prior."""
    command = [PEER_PYTHON, SCVI, *files, folder / "generated.h5ad", "--n", str(budget.n_cells)]
    command += ["--cpu-seconds", str(budget.seconds), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("scvi failed; its message stands above")
    facts = json.loads(done.stdout.splitlines()[-1])
    n_genes = facts["n_modelled_genes"]
    return {
        **facts,
        "generated_cells_per_cpu_second": budget.n_cells / facts["generation_cpu_seconds"],
        "training_peak_memory_gib": facts["peak_memory_gib"],
        "training_flops_per_cell": scvi_training_flops_per_cell(n_genes),
        "generation_flops_per_cell": scvi_generation_flops_per_cell(n_genes),
        "nelbo_cells": ad.read_h5ad(files[1], backed="r").n_obs,
        "condition_keys": [],
    }


def write_reference(model: str, folder: Path, files: tuple[Path, Path], n_cells: int, seed: int) -> Path:
    """Write the cells of ``halves`` or ``shuffled``; give the file of real cells they are to be judged against."""
    rng = np.random.default_rng(seed)
    if model == "halves":
        held_out = ad.read_h5ad(files[1])
        order = rng.permutation(held_out.n_obs)
        half = held_out.n_obs // 2
        held_out[order[half:]].copy().write_h5ad(folder / "generated.h5ad")
        held_out[order[:half]].copy().write_h5ad(folder / "real.h5ad")
        return folder / "real.h5ad"
    cells = ad.read_h5ad(files[0])
    counts = sparse.csr_matrix(cells.X)[np.sort(rng.permutation(cells.n_obs)[:n_cells])]
    shuffled = ad.AnnData(shuffle_genes(counts, rng), var=cells.var)
    shuffled.obs_names = [f"shuffled-{i}" for i in range(shuffled.n_obs)]
    shuffled.write_h5ad(folder / "generated.h5ad")
    return files[1]


def run_model(model: str, work: Path, files: tuple[Path, Path], budget: Budget, seed: int) -> dict[str, Any]:
    """Make the cells of one model, and keep the record in the model's folder."""
    folder = work / model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"--- {model}")
    real, record = files[1], {}
    if model in PRESETS:
        budget = replace(budget, settings=settings_for(model, budget.settings, torch.cuda.is_available()))
        record = run_ours(model, folder, files, budget, seed)
    elif model == "scvi":
        record = run_scvi(folder, files, budget, seed)
    else:
        real = write_reference(model, folder, files, budget.n_cells, seed)
    for stage in ("training", "generation"):
        if f"{stage}_flops_per_cell" in record:
            record[f"{stage}_gflop_per_cell"] = record[f"{stage}_flops_per_cell"] / 1e9
    record["n_generated"] = ad.read_h5ad(folder / "generated.h5ad", backed="r").n_obs
    record["real"] = real.name
    record["made_with"] = {
        key: value for key, value in environment().items() if key in ("cpu", "gpu", "date", "commit")
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def judge(model: str, work: Path, files: tuple[Path, Path], record: dict[str, Any], seed: int) -> None:
    """Judge the cells of a model, if that is not done yet, and complete its record."""
    if "metrics" in record:
        return
    from lingshu_cell.evaluate import evaluate_files

    folder = work / model
    real = folder / "real.h5ad" if record["real"] == "real.h5ad" else files[1]
    record["metrics"] = evaluate_files(
        real, folder / "generated.h5ad", folder / "evaluation", training=files[0], nelbo=record.get("nelbo"), seed=seed
    )
    (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def small_to_the_same_bound(
    records: dict[str, dict[str, Any]], work: Path, files: tuple[Path, Path], budget: Budget, seed: int
) -> None:
    """Find after how few steps `small` has the bound that each other model ended with, on the same held-out cells.

    Each number of steps is a training of its own with the learning rate's whole course. Fills in the records.
    """
    others = {name: r for name, r in records.items() if name != "small" and "nelbo" in r}
    shutil.rmtree(work / "early", ignore_errors=True)
    cells = {name: (r["nelbo_cells"], r.get("nelbo_masks", _SCVI_MASKS)) for name, r in others.items()}
    for steps in _EARLY_STEPS:
        left = {name for name, r in others.items() if "small_steps" not in r}
        if not left:
            return
        early = replace(budget, seconds=None, steps=steps)
        subsets = sorted({cells[name] for name in left})
        found = run_in_child(bound_early, "small", files, work / "early" / str(steps), early, subsets, seed)
        for name in left:
            record, bound = others[name], found["nelbo"]["×".join(map(str, cells[name]))]
            record.setdefault("small_after_one_step", bound)
            if bound <= record["nelbo"]["nats_per_cell"]:
                record |= {"small_steps": steps, "small_cpu_seconds": found["cpu_seconds"]}
                record["small_share"] = found["cpu_seconds"] / record["training_cpu_seconds"]
                if "training_steps" in record and "small" in records:
                    spent = _operations(record, record["training_steps"])
                    record["small_share_of_operations"] = _operations(records["small"], steps) / spent
                (work / name / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _operations(record: dict[str, Any], steps: int) -> float:
    return steps * record["minibatch_size"] * record["training_flops_per_cell"]


def metric_table(records: dict[str, dict[str, Any]]) -> str:
    """Lay out all metrics: a column per model, then real-vs-real and shuffled as the first evaluation has them."""
    judged = [r["metrics"] for name, r in records.items() if name != "halves"] or [
        r["metrics"] for r in records.values()
    ]
    names = list(dict.fromkeys(name for r in records.values() for name in r["metrics"]))
    rows = []
    for name in names:
        known = next(r["metrics"][name] for r in records.values() if name in r["metrics"])
        values = [show(r["metrics"].get(name, {}).get("value")) for r in records.values()]
        beside = [judged[0].get(name, {}).get(side) for side in ("real_vs_real", "shuffled")]
        rows.append([name, *values, *beside, known["better"].replace("_", " "), known["unit"]])
    return markdown_table(["metric", *records, "real vs real", "shuffled held-out cells", "better", "unit"], rows)


def speed_table(records: dict[str, dict[str, Any]]) -> str:
    """Lay out sizes, speeds and memory of the models that learn."""
    learnt = {name: r for name, r in records.items() if "n_parameters" in r}
    if not learnt:
        return ""
    rows = []
    for label, key in _SPEED:
        cells = [r.get(key) for r in learnt.values()]
        if all(cell is None for cell in cells):
            continue
        rows.append([label, *[", ".join(c) or "nothing" if isinstance(c, list) else c for c in cells]])
    return markdown_table(["", *learnt], rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pbmc3k", help=f"{', '.join(NAMES)}, or an h5ad file of raw counts")
    parser.add_argument("--models", default="small,scvi,halves,shuffled", help=f"of {','.join(MODELS)}")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--cpu-seconds", type=float, default=480.0, help="CPU seconds of each training at most (480)")
    end.add_argument("--steps", type=int, help="optimiser steps in place of a time; ours only")
    parser.add_argument("--seed", type=int, default=0, help="of training and generation; the split is always seed 0")
    parser.add_argument(
        "--n-generated", type=int, help="cells to generate; as many as are held out (paper on a CPU: 16)"
    )
    parser.add_argument("--nelbo-cells", type=int, help="held-out cells of the bound; all (paper on a CPU: 16)")
    parser.add_argument("--nelbo-masks", type=int, help="masks per cell of the bound; 8 (paper on a CPU: 2)")
    parser.add_argument("--no-conditions", action="store_true", help="do not condition on cell_type")
    parser.add_argument(
        "--set", action="append", default=[], metavar="MODEL:SECTION.KEY=VALUE", help="e.g. paper:generation.steps=32"
    )
    parser.add_argument("--max-cells", type=int, help="use so many random cells of the data set, for trying out")
    parser.add_argument("--work", type=Path, help="folder of runs and cells; build/fidelity/NAME")
    parser.add_argument("--reuse", action="store_true", help="take models that --work already holds as they are")
    parser.add_argument(
        "--cells-only", action="store_true", help="end before judging, which another machine does with --reuse"
    )
    parser.add_argument("--name", help="name of the result; fidelity-DATA")
    args = parser.parse_args()
    args.models = args.models.split(",")
    unknown = [model for model in args.models if model not in MODELS]
    if unknown:
        parser.error(f"--models: no {', '.join(unknown)}; choose of {', '.join(MODELS)}")
    if "scvi" in args.models and not PEER_PYTHON.exists():
        parser.error("scvi needs its environment: run benchmarks/peers/make_venv.sh")
    if "scvi" in args.models and args.steps:
        parser.error("scvi is given a time: use --cpu-seconds")
    if bad := [s for s in args.set if s.split(":", 1)[0] not in PRESETS or "=" not in s]:
        parser.error(f"--set {bad[0]}: write MODEL:section.key=value with one of {', '.join(PRESETS)}")
    args.name = args.name or f"fidelity-{Path(args.data).stem}"
    args.work = args.work or ROOT / "build" / "fidelity" / args.name
    return args


def budget_of(model: str, args: argparse.Namespace, n_held_out: int) -> Budget:
    """Give a model its share, equal but for what the paper's networks cannot do on a CPU."""
    slow = model.startswith("paper") and not torch.cuda.is_available()
    return Budget(
        seconds=None if args.steps else args.cpu_seconds,
        steps=args.steps,
        n_cells=args.n_generated or (16 if slow else n_held_out),
        nelbo_cells=args.nelbo_cells or (16 if slow else None),
        nelbo_masks=args.nelbo_masks or (2 if slow else 8),
        conditioned=not args.no_conditions,
        settings=tuple(s.split(":", 1)[1] for s in args.set if s.split(":", 1)[0] == model),
    )


def main() -> None:
    """Run the models, judge them and write the result."""
    args, facts = parse(), environment()
    cells = read_cells(args.data, args.max_cells)
    files = split_files(cells, args.work)
    n_held_out = ad.read_h5ad(files[1], backed="r").n_obs
    records = {}
    for model in args.models:
        kept = args.work / model / "record.json"
        if args.reuse and kept.is_file():
            records[model] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            records[model] = run_model(model, args.work, files, budget_of(model, args, n_held_out), args.seed)
    if args.cells_only:
        return
    for model, record in records.items():
        judge(model, args.work, files, record, args.seed)
    small_to_the_same_bound(records, args.work, files, budget_of("small", args, n_held_out), args.seed)
    end = f"{args.steps} steps" if args.steps else f"{args.cpu_seconds:g} CPU seconds, or what a model needs if less"
    n_train = cells.n_obs - n_held_out
    about = (
        f"{Path(args.data).name}: {cells.n_obs:,} cells × {cells.n_vars:,} genes; {n_train:,} cells for training, "
        f"{n_held_out:,} held out (split seed 0); seed {args.seed}. Training: {end}. Of the training cells each model "
        "keeps a tenth for its own validation, as it does by default (paper on a CPU: none). The bound of scvi counts "
        "its library size in and is over counts, ours is over tokens, which merge counts of 100 and more. Real-vs-real "
        "and shuffled are those of the first model's evaluation."
    )
    gpus = sorted({r["made_with"]["gpu"] for r in records.values() if r.get("made_with", {}).get("gpu")})
    if gpus:
        about += f" Trained and generated on {' and '.join(gpus)}, where seconds are seconds of the GPU, not of a CPU."
    body = {"data": Path(args.data).name, "n_cells": cells.n_obs, "n_held_out": n_held_out, "models": records}
    write_result(args.name, about, facts, body, [metric_table(records), speed_table(records)])


if __name__ == "__main__":
    sys.exit(main())
