"""What steps cost: the information curve of a run, predicted KL of every schedule, and the best grid for a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import torch

from lingshu_cell.aligned_cells import align_cells
from lingshu_cell.checkpoint import Checkpoint
from lingshu_cell.checksums import sha256
from lingshu_cell.curve_store import StoredCurve, load_curve, save_curve
from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.data.splits import split_cells
from lingshu_cell.diffusion.information import InformationCurve, knots, measure_curve, steps_for
from lingshu_cell.diffusion.plan import SCHEDULES, Schedule, choose_schedule
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import TrainedModel, load_model, resolve_schedule
from lingshu_cell.input_files import expanded
from lingshu_cell.output_files import writable, write_atomically

BUDGETS = (3, 8, 16, 32, 64, 128, 256)
PLOT = "schedule.png"
_MOST_CELLS = 512
_COLOURS = {"uniform": "#8e97a6", "cosine": "#d9722b", "geometric": "#2f9e73", "optimal": "#2f6db3"}


@dataclass(frozen=True, eq=False)
class ScheduleReport:
    """The information curve of a run and what follows from it.

    Attributes
    ----------
    checkpoint
        The checkpoint the curve was measured with.
    stored
        The curve, and the cells it comes from.
    table
        Steps → schedule → predicted KL in nats per cell.
    chosen
        The schedule that generation takes under the given wishes.
    max_kl, steps_for_max_kl
        Nats per cell, and the fewest steps of the optimal schedule that keep to them; ``None`` if 1,024 do not.
    plot
        The picture.
    """

    checkpoint: Checkpoint
    stored: StoredCurve
    table: dict[int, dict[str, float]]
    chosen: Schedule
    max_kl: float
    steps_for_max_kl: int | None
    plot: Path


def schedule_run(
    run: Path | str,
    data: Sequence[Path | str | ad.AnnData] = (),
    *,
    layer: str | None = None,
    steps: int | str | None = None,
    max_kl: float | None = None,
    device: torch.device | str = "cpu",
) -> ScheduleReport:
    """Predict what few steps cost a run, and write ``RUN/schedule.png``.

    Parameters
    ----------
    run
        Run folder or checkpoint folder.
    data
        Held-out cells to measure the information curve on, or the very files the run was trained on: then its own
        validation cells are used. When not given, the curve that training left.
    layer
        Layer of the counts in ``data``; that of training when not given.
    steps, max_kl
        See ``config.GenerationConfig``; the run's own when not given.
    device
        Where to compute.

    Raises
    ------
    LingshuError
        If there is no curve and no data, or the data do not fit or were trained on.
    """
    model = load_model(run, device)
    if data:
        save_curve(model.checkpoint, _measure(model, data, layer))
        model = load_model(run, device)
    stored = load_curve(model.checkpoint)
    if stored is None:
        raise LingshuError(
            "A schedule follows from the information curve of the run",
            f"{model.checkpoint.folder} has none",
            "Pass --data with held-out cells, or with the file it was trained on",
        )
    chosen = resolve_schedule(model, steps=steps, max_kl=max_kl)
    max_kl = model.config.generation.max_kl if max_kl is None else max_kl
    budgets = sorted({n for n in (*BUDGETS, chosen.steps) if n <= stored.curve.n_genes})
    table = {n: {name: _plan(stored.curve, n, name).predicted_kl for name in SCHEDULES} for n in budgets}
    try:
        enough = steps_for(stored.curve, max_kl)
    except LingshuError:
        enough = None
    plot = model.checkpoint.folder.parent / PLOT
    draw_schedules(stored.curve, table, chosen.steps, plot)
    return ScheduleReport(model.checkpoint, stored, table, chosen, max_kl, enough, plot)


def _plan(curve: InformationCurve, n_steps: int, name: str) -> Schedule:
    return choose_schedule(curve.n_genes, curve, steps=n_steps, schedule=name, max_kl=1.0)


def _measure(model: TrainedModel, data: Sequence[Path | str | ad.AnnData], layer: str | None) -> StoredCurve:
    """Measure the curve on cells that were not trained on."""
    layer = model.config.data.layer if layer is None else layer
    sets = [read_counts(source, layer) for source in data]
    files = [expanded(source) for source in data if isinstance(source, (str, Path))]
    if {sha256(file) for file in files if file.is_file()} & set(model.checkpoint.manifest["data_fingerprints"]):
        raise LingshuError(
            "The information curve needs cells that were not trained on",
            "the store that the run was trained on was made of these files",
            "Pass held-out cells, or leave --data out to use the curve that training measured",
        )
    held_out, words = _held_out(model, sets)
    # spread over all data sets and cell types, whatever their order
    held_out = held_out[:: -(-len(held_out) // _MOST_CELLS)]
    first = np.cumsum([0, *(s.n_cells for s in sets)])
    size = model.config.training.minibatch_size
    minibatches = (
        minibatch
        for i, counts in enumerate(sets)
        for minibatch in align_cells(model, counts).minibatches(
            size, model.device, held_out[(held_out >= first[i]) & (held_out < first[i + 1])] - first[i]
        )
    )
    generator = torch.Generator(model.device).manual_seed(1)
    with model.autocast():
        curve = measure_curve(model.network, minibatches, knots(len(model.modelled)), generator)
    return StoredCurve(curve, f"{len(held_out):,} {words}")


def _held_out(model: TrainedModel, sets: Sequence[CountMatrix]) -> tuple[np.ndarray, str]:
    """Indices over all data sets of the cells to measure on, and what they are."""
    n_cells = sum(s.n_cells for s in sets)
    given, trained = [s.fingerprint for s in sets], model.checkpoint.manifest["data_fingerprints"]
    settings = model.config.data
    if given == trained and settings.validation_fraction:
        held_out = split_cells(n_cells, settings.validation_fraction, settings.split_seed)[1]
        return held_out, "validation cells of the run, found again in the data it was trained on"
    if set(given) & set(trained):
        held_none = "" if settings.validation_fraction else ", and the run held none of their cells out"
        whole = "" if given == trained else f", or all files of the training ({len(trained)}) in their order"
        raise LingshuError(
            "The information curve needs cells that were not trained on",
            f"these data were{held_none}",
            f"Pass held-out cells{whole}",
        )
    return np.arange(n_cells), "cells, all taken as not trained on"


def draw_schedules(curve: InformationCurve, table: dict[int, dict[str, float]], n_steps: int, path: Path) -> None:
    """Draw the curve with its knots and the grids of ``n_steps`` steps, and predicted KL against steps, as PNG.

    Parameters
    ----------
    curve
        Information curve.
    table
        Steps → schedule → nats per cell.
    n_steps
        Steps of the grids that are drawn.
    path
        The picture.

    Raises
    ------
    LingshuError
        If matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LingshuError(
            "Pictures need matplotlib", "it is not installed", 'pip install "lingshu-cell[evaluate]"'
        ) from None
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    g, h_G = curve.n_genes, curve.everywhere
    left.plot(np.arange(g), g * h_G, color="black", lw=1.2, zorder=3)
    nats, error = g * np.array(curve.nats), g * np.array(curve.standard_error)
    left.errorbar(curve.visible, nats, error, fmt="o", ms=3.5, lw=0.8, color="black", label="measured, ± s.e.")
    low, high = float(nats.min()), float(nats.max())
    for row, name in enumerate(SCHEDULES):
        grid = _plan(curve, n_steps, name).grid[:-1]
        height = low - (high - low) * (0.10 + 0.06 * row)
        left.plot(grid, np.full(len(grid), height), "|", ms=8, color=_COLOURS[name], label=f"{name}, {n_steps} steps")
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="visible genes n", ylabel="G · h(n), nats per cell", title="What visible genes say of a hidden one")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for name in SCHEDULES:
        right.plot(list(table), [row[name] for row in table.values()], "o-", ms=4, color=_COLOURS[name], label=name)
    right.set(xscale="log", yscale="log", xlabel="steps N", ylabel="predicted KL, nats per cell")
    right.set_title("What few steps cost")
    right.set_xticks(list(table), [str(n) for n in table])
    right.minorticks_off()
    right.grid(alpha=0.25, which="major")
    right.legend(frameon=False, fontsize=8)
    with writable("The run folder must be writable", path, "Free some space or check the rights"):
        write_atomically(path, lambda draft: figure.savefig(draft, format=path.suffix.lstrip(".")))
