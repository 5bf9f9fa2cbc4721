"""What a run is between two steps: saved as a checkpoint that does not depend on the number of processes, and read
back.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lingshu_cell.checkpoint import load_checkpoint, reading, save_checkpoint
from lingshu_cell.conditioning import Conditioner
from lingshu_cell.config import Config
from lingshu_cell.data.cell_states import CellStates
from lingshu_cell.data.measured_genes import MeasuredGenes
from lingshu_cell.data.training_set import TrainingCells
from lingshu_cell.ema import PowerEma
from lingshu_cell.engine.optimiser import optimiser_tensors, restore_optimiser
from lingshu_cell.engine.processes import World
from lingshu_cell.engine.sharding import HeldNetwork
from lingshu_cell.errors import LingshuError, offenders

LICENCE = "BSD-3-Clause code; the weights carry the licence of the data they were trained on"
_FREE = {"device", "tensorboard", "checkpoint_every", "sharding", "microbatch_size"}


def save(
    run: Path,
    world: World,
    held: HeldNetwork,
    averages: Sequence[PowerEma],
    optimiser: torch.optim.Optimizer,
    conditioner: Conditioner,
    tables: Callable[[], dict[str, torch.Tensor]],
    manifest: Mapping[str, Any],
) -> None:
    """Write a checkpoint: all processes bring their parts to the first, which writes, with the tables of
    :func:`data_tables`.
    """
    tensors = {
        "weights": held.whole(held.parts),
        **{f"ema_{ema.sigma_rel:.2f}": held.whole(ema.weights) for ema in averages},
        "optimizer": held.whole(optimiser_tensors(optimiser, held.parts)),
    }

    def write() -> None:
        tensors["buffers"] = held.buffers() or {"none": torch.zeros(0)}
        tensors["data"] = tables()
        tensors["conditioning"] = conditioner.to_tensors() or {"none": torch.zeros(0)}
        save_checkpoint(run, manifest["step"], tensors, manifest)

    world.agreed(write, only_first=True)


def data_tables(cells: TrainingCells) -> dict[str, torch.Tensor]:
    """Make the tables of the data that a checkpoint keeps; labels of all training cells are read for them."""
    rows, row_counts = cells.condition_frequencies()
    measured = MeasuredGenes.of_cells(cells, rows)
    return {
        "modelled": torch.from_numpy(cells.modelled),
        "rare_gene": torch.from_numpy(cells.rare.gene),
        "rare_count": torch.from_numpy(cells.rare.count),
        "rare_data_set": torch.from_numpy(cells.rare.data_set),
        "data_set_cells": torch.from_numpy(cells.rare.n_cells_S),
        "condition_rows": torch.from_numpy(rows),
        "condition_row_counts": torch.from_numpy(row_counts),
        **({} if measured is None else measured.to_tensors()),
    }


def restore(
    run: Path,
    held: HeldNetwork,
    averages: Sequence[PowerEma],
    optimiser: torch.optim.Optimizer,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Take back the newest checkpoint, each process its part; gives its manifest.

    Parameters
    ----------
    manifest
        That of the run to be continued, as it would be now.

    Raises
    ------
    LingshuError
        If the checkpoint is damaged, or of other data or settings.
    """
    checkpoint = load_checkpoint(run)
    with reading(checkpoint):
        _check_same(checkpoint.manifest, manifest)
        held.take(checkpoint.tensors("weights"))
        saved = checkpoint.tensors("buffers")
        for name, buffer in held.buffers().items():
            buffer.copy_(saved[name])
        for average in averages:
            held.take(checkpoint.tensors(f"ema_{average.sigma_rel:.2f}"), average.weights)
        best = checkpoint.manifest.get("best")
        if best is not None:
            best = {"step": int(best["step"]), "condition_explained": float(best["condition_explained"])}
        restore_optimiser(optimiser, held.parts, checkpoint.tensors("optimizer"), held.cut)
    return checkpoint.manifest | {"step": checkpoint.step, "best": best}


def saved_states(run: Path, n_genes: int) -> CellStates | None:
    """Give the cell states of the newest checkpoint; None where it has none, or is of other genes than so many."""
    checkpoint = load_checkpoint(run)
    with reading(checkpoint):
        states = Conditioner.from_saved(checkpoint.manifest["conditioning"], checkpoint.tensors("conditioning")).states
        if states is None or checkpoint.manifest["n_modelled_genes"] != n_genes:
            return None
        return states.checked(n_genes)


def describe(config: Config, cells: TrainingCells, conditioner: Conditioner, n_parameters: int) -> dict[str, Any]:
    """Give the part of a manifest that stays the same over a run."""
    return {
        "config": config.model_dump(mode="json"),
        "genes": cells.vocabulary.to_json(),
        "n_modelled_genes": len(cells.modelled),
        "conditions": cells.conditions.to_json(),
        "conditioning": conditioner.to_json(),
        "n_training_cells": len(cells.train),
        "n_validation_cells": len(cells.validation),
        "data_fingerprints": list(cells.fingerprints),
        "notes": list(cells.notes),
        "n_parameters": n_parameters,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("lingshu-cell", "torch", "numpy", "anndata")},
        "licence": LICENCE,
    }


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """A resumed run must see the same data under the same settings; only where, in how many parts and how often it
    reports may change.
    """
    settings = [{k: v for k, v in m["config"]["training"].items() if k not in _FREE} for m in (old, new)]
    changed = [f"training.{k}" for k in settings[0] if settings[0][k] != settings[1].get(k)]
    changed += [s for s in ("data", "network") if old["config"][s] != new["config"][s]]
    changed += ["the data"] if old["data_fingerprints"] != new["data_fingerprints"] else []
    read = ("n_training_cells", "n_validation_cells", "conditions", "conditioning")
    changed += ["files that the settings name, e.g. the split"] if not changed and _differ(old, new, read) else []
    if changed:
        raise LingshuError(
            "A resumed run needs the data and settings it began with",
            f"changed: {offenders(changed)}",
            "Pass the same ones, or train anew into another folder",
        )


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return any(json.dumps(old.get(key)) != json.dumps(new[key]) for key in keys)
