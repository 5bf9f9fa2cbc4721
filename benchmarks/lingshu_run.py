"""One of our models from cells to cells, stage by stage, each to be called in a process of its own."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
from cost import generation_flops_per_cell, network_cost, training_flops_per_cell
from recording import Stopwatch, say

from lingshu_cell.generate import TrainedModel, generate_file, load_model, resolve_schedule
from lingshu_cell.model import LingshuCell
from lingshu_cell.run_config import AUTOMATIC, run_config
from lingshu_cell.train import Progress, pick_device, train

_SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Budget:
    """What one of our models may use.

    Attributes
    ----------
    seconds, steps
        End of training: after so many CPU seconds of training steps (on a GPU: seconds) if the preset does not end
        earlier by itself, or after so many steps; one of them is None.
    n_cells
        Cells to generate.
    nelbo_cells, nelbo_masks
        Held-out cells and masks per cell of the likelihood bound; ``nelbo_cells`` None = all.
    conditioned
        Whether to condition on ``cell_type`` where every cell has one.
    settings
        ``section.key=value`` strings.
    """

    seconds: float | None
    steps: int | None
    n_cells: int
    nelbo_cells: int | None
    nelbo_masks: int
    conditioned: bool
    settings: tuple[str, ...]


def train_model(preset: str, train_file: Path, run: Path, budget: Budget, seed: int) -> dict[str, Any]:
    """Train a preset on the cells of a file, a tenth of which it keeps for its own validation, and say how fast."""
    end = f"training.max_seconds={budget.seconds}" if budget.steps is None else f"training.steps={budget.steps}"
    config = run_config(
        [train_file],
        run,
        preset=preset,
        settings=[end, f"training.seed={seed}", *budget.settings],
        condition_keys=AUTOMATIC if budget.conditioned else None,
        on_note=say,
    )
    reporter = _Reporter(preset)
    watch = Stopwatch()
    result = train([train_file], run, config, on_progress=reporter, on_note=say, clock=_clock())
    if result.interrupted:
        raise KeyboardInterrupt
    last = reporter.last
    return {
        "training_cpu_seconds": result.step * config.training.minibatch_size / last.cells_per_second,
        "training_wall_seconds_with_reading_and_saving": watch.seconds(),
        "training_steps": result.step,
        "training_cells_per_cpu_second": last.cells_per_second,
        "minibatch_size": config.training.minibatch_size,
        "final_smooth_loss": last.loss,
        "device": str(pick_device(config.training.device)),
    }


def _clock() -> Callable[[], float]:
    """CPU seconds of this process, however busy the machine is; where a GPU computes, seconds."""
    return time.monotonic if pick_device("auto").type == "cuda" else time.process_time


def generate_cells(run: Path, out: Path, budget: Budget, seed: int) -> dict[str, Any]:
    """Generate into a file and say how fast it went; the time to load the model is not counted."""
    model = load_model(run, pick_device("auto"))
    clock = _clock()
    start = clock()
    generate_file(model, budget.n_cells, out, seed=seed)
    seconds = clock() - start
    schedule = resolve_schedule(model)
    return {
        "generation_cpu_seconds": seconds,
        "generated_cells_per_cpu_second": budget.n_cells / seconds,
        "generation_steps": schedule.steps,
        "schedule": schedule.name,
        "predicted_kl_nats_per_cell": schedule.predicted_kl,
    }


def bound_likelihood(run: Path, train_file: Path, held_out_file: Path, budget: Budget) -> dict[str, Any]:
    """Bound the likelihood of held-out cells, and count operations and parameters."""
    trained = load_model(run, pick_device("auto"))
    model = LingshuCell(trained)
    held_out = ad.read_h5ad(held_out_file)
    n_cells = min(held_out.n_obs, budget.nelbo_cells or held_out.n_obs)
    info, config = model.info(), model.config
    return {
        "nelbo": model.nelbo(held_out[:n_cells].copy(), n_masks=budget.nelbo_masks),
        "nelbo_cells": n_cells,
        "nelbo_masks": budget.nelbo_masks,
        "n_parameters": info["n_parameters"],
        "n_modelled_genes": info["n_modelled_genes"],
        "condition_keys": list(config.data.condition_keys),
        "config": config.model_dump(mode="json"),
        "n_training_cells": info["n_training_cells"],
        **_operations(trained, train_file),
    }


def bound_early(
    preset: str, files: tuple[Path, Path], run: Path, budget: Budget, subsets: Sequence[tuple[int, int]], seed: int
) -> dict[str, Any]:
    """Train a few steps and bound the likelihood of several numbers of held-out cells.

    Parameters
    ----------
    preset, files, run, budget, seed
        As for the other stages; the budget is one of steps.
    subsets
        Numbers of held-out cells (from the first on) and of masks per cell.

    Returns
    -------
    dict
        Steps, the CPU seconds they took, and the bound in nats per cell for each ``"cells×masks"``.
    """
    trained = train_model(preset, files[0], run, budget, seed)
    model = LingshuCell(load_model(run, pick_device("auto")))
    held_out = ad.read_h5ad(files[1])
    return {
        "steps": trained["training_steps"],
        "cpu_seconds": trained["training_cpu_seconds"],
        "nelbo": {
            f"{n}×{masks}": model.nelbo(held_out[:n].copy(), n_masks=masks)["nats_per_cell"] for n, masks in subsets
        },
    }


def _operations(model: TrainedModel, train_file: Path) -> dict[str, float]:
    counts, config, n_genes = ad.read_h5ad(train_file).X, model.config, len(model.modelled)
    sizes = config.network, n_genes, len(config.data.condition_keys), counts.nnz / (counts.shape[0] * n_genes)
    training, generation = network_cost(*sizes, training=True), network_cost(*sizes, training=False)
    steps, tile = resolve_schedule(model).steps, model.tile_size
    return {
        "training_flops_per_cell": training_flops_per_cell(training, n_genes, config.training.minibatch_size),
        "generation_flops_per_cell": generation_flops_per_cell(generation, n_genes, steps, tile),
    }


class _Reporter:
    """Keeps the last progress and prints one now and then."""

    def __init__(self, preset: str) -> None:
        self._preset, self._watch, self._next = preset, Stopwatch(), 0.0
        self.last: Progress

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        if self._watch.seconds() >= self._next:
            say(
                f"{self._preset}: step {progress.step}, loss {progress.loss:.0f} nats per cell, "
                f"{progress.cells_per_second:.1f} cells/s, {progress.seconds_left:.0f} s left"
            )
            self._next = self._watch.seconds() + _SECONDS_BETWEEN_LINES


def settings_for(preset: str, chosen: Sequence[str], on_gpu: bool) -> tuple[str, ...]:
    """Settings of a preset: what the user chose, and on a CPU smaller pieces for the paper's networks.

    One minibatch of 256 cells, or one tile of 64, of the paper's networks takes minutes on a CPU: no step would end
    within the budget, and neither would the passes over validation cells, which are therefore trained on instead. CPUs
    without bf16 arithmetic are faster in fp32. Cells are drawn in 4 steps, as 256 would take an hour each.
    """
    small_pieces = (
        "training.minibatch_size=4",
        "training.warmup_steps=1",
        "training.precision=fp32",
        "data.validation_fraction=0.0",
        "generation.tile_size=4",
        "generation.minibatch_size=4",
        "generation.steps=4",
    )
    return (*(small_pieces if preset.startswith("paper") and not on_gpu else ()), *chosen)
