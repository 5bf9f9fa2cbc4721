"""What the planner foretells against what then happens: memory, disk and seconds of trainings and generations.

Each forecast and each real run is a process of its own. Seconds are those of a clock, so they also say how the other
work of the machine changed between the two.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from recording import ROOT, environment, markdown_table, run_in_child, say, write_result

from lingshu_cell.config import Config, load_config
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.generate import generate_file, load_model
from lingshu_cell.planner import plan_generation, plan_training
from lingshu_cell.train import train

TRAININGS = (  # preset, genes, steps, settings
    ("small", 2_000, 60, {}),
    ("small", 12_000, 30, {"network": {"width": 256}}),
    ("small", 12_000, 20, {"training": {"minibatch_size": 256}}),
    ("paper", 600, 12, {"network": {"width": 64, "n_blocks": 2, "n_heads": 2}, "training": {"minibatch_size": 32}}),
)
GENERATIONS = ((0, 2_000, 8), (1, 300, 8))  # training, cells, steps


def settings(preset: str, steps: int, more: dict[str, Any]) -> Config:
    """Configuration of a run."""
    training = {"steps": steps, "validate_every": 10, "checkpoint_every": 10, "device": "cpu", "precision": "fp32"}
    sections = {"data": {"condition_keys": ["cell_type"]}, **more}
    return load_config(preset, overrides=sections | {"training": training | more.get("training", {})})


def real_training(source: str, config: dict[str, Any], run: str) -> dict[str, Any]:
    """Train; give seconds and bytes."""
    started = time.perf_counter()
    train([source], run, Config.model_validate(config))
    seconds = time.perf_counter() - started
    files = [file for folder in Path(run).glob("checkpoint-*") for file in folder.iterdir()]
    return {"seconds": seconds, "disk": sum(file.stat().st_size for file in files)}


def real_generation(run: str, n_cells: int, steps: int, out: str) -> dict[str, Any]:
    """Generate a file; give seconds and bytes."""
    started = time.perf_counter()
    generate_file(load_model(run), n_cells, out, steps=steps)
    return {"seconds": time.perf_counter() - started, "disk": Path(out).stat().st_size}


def row(what: str, forecast: Any, told: dict[str, Any]) -> dict[str, Any]:
    """Foretold and measured side by side."""
    found = {
        "what": what,
        "memory_foretold_mib": forecast.memory_bytes / 2**20,
        "memory_measured_mib": told["peak_memory_gib"] * 1024,
        "disk_foretold_mib": forecast.kept_bytes / 2**20,
        "disk_measured_mib": told["disk"] / 2**20,
        "seconds_foretold": forecast.seconds,
        "seconds_measured": told["seconds"],
    }
    say(str(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", type=int, nargs="*", default=list(range(len(TRAININGS))), help="which of them")
    asked = parser.parse_args()
    facts, folder = environment(), ROOT / "build" / "planner"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = ad.read_h5ad(pbmc3k_path())
    by_detection = np.argsort(-np.asarray((whole.X > 0).sum(0)).ravel(), kind="stable")
    rows = []
    for number in asked.trainings:
        preset, genes, steps, more = TRAININGS[number]
        source, run = folder / f"cells-{genes}.h5ad", folder / f"run-{number}"
        whole[:, np.sort(by_detection[:genes])].write_h5ad(source)
        forecast, config = plan_training([source], run, settings(preset, steps, more))
        told = run_in_child(real_training, str(source), config.model_dump(mode="json"), str(run))
        sizes = (
            f"{forecast.sizes['parameters'] / 1e6:.1f} M parameters, minibatches of {config.training.minibatch_size}"
        )
        rows.append(row(f"train, {preset}, {genes:,} genes, {sizes}, {steps} steps", forecast, told))
    for number, n_cells, steps in GENERATIONS:
        if number in asked.trainings:
            run, out = folder / f"run-{number}", folder / f"cells-{number}-generated.h5ad"
            forecast = plan_generation(run, out, n_cells, device="cpu", steps=steps)
            told = run_in_child(real_generation, str(run), n_cells, steps, str(out))
            rows.append(row(f"generate, run {number}, {n_cells:,} cells, {steps} steps", forecast, told))
    kinds = (("memory", "mib", "MiB"), ("disk", "mib", "MiB"), ("seconds", "", ""))
    header, lines = ["", *(f"{kind} {unit}, foretold / measured = ratio" for kind, _, unit in kinds)], []
    for one in rows:
        line = [one["what"]]
        for kind, suffix, _ in kinds:
            foretold, measured = (one[f"{kind}_{w}{'_' + suffix if suffix else ''}"] for w in ("foretold", "measured"))
            line.append(f"{foretold:,.1f} / {measured:,.1f} = {foretold / measured:.2f}")
        lines.append(line)
    about = (
        "PBMC 3k, its most detected genes, on CPU, one thread. Foretold by `lingshu … --dry-run` (eight steps, or a "
        "few tiles); memory is the peak of the process, disk what is kept. Other work shared the machine, so seconds "
        "differ by what it did meanwhile."
    )
    write_result("planner", about, facts, {"rows": rows}, [markdown_table(header, lines)])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
