"""A short measurement of what training and generation cost: the real thing, a few steps or cells, in its own process.

The process may run out of memory, or be ended for it, without taking this one along.
"""

import contextlib
import multiprocessing
import resource
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import torch

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import Config
from lingshu_cell.data.anndata_io import H5adWriter
from lingshu_cell.errors import LingshuError, out_of_memory
from lingshu_cell.generate import GeneratedChunk, draw_chunks, load_model, plan_cells, var_of
from lingshu_cell.train import Progress, pick_device, train

_STEPS, _VALIDATED, _SAVED = 8, 4, 6  # which steps validate and save; the last one measures the information curve too
_TILES = 4
_MOST_SECONDS = 60.0  # of generation; above, fewer steps are measured and the rest is foretold from them


class OutOfMemory(Exception):
    """Memory did not suffice for the measurement."""


@dataclass(frozen=True)
class TrainingCost:
    """What training costs, as measured.

    Attributes
    ----------
    n_training_cells, n_modelled_genes, n_parameters
        Sizes of the data and of the network.
    start_seconds
        Reading the data and building the network, up to the first step.
    step_seconds, validation_seconds, checkpoint_seconds, curve_seconds
        Of one step, validation, checkpoint, and of the information curve on the fewest cells.
    peak_bytes, device_bytes
        Most memory of the process, Python and libraries included, and of its GPU, if it has one.
    checkpoint_bytes
        Of one checkpoint.
    keeps_best
        Whether a third checkpoint, the best by validation conditions, is kept.
    """

    n_training_cells: int
    n_modelled_genes: int
    n_parameters: int
    start_seconds: float
    step_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    curve_seconds: float
    peak_bytes: int
    device_bytes: int | None
    checkpoint_bytes: int
    keeps_best: bool


@dataclass(frozen=True)
class GenerationCost:
    """What generation costs, as measured.

    Attributes
    ----------
    start_seconds
        Loading the model and checking what is asked for.
    cell_seconds
        Of one cell, written.
    cell_bytes, file_bytes
        On disk: of one cell, and of a file without cells.
    counts_per_cell
        Stored counts of a cell.
    peak_bytes, device_bytes
        As in :class:`TrainingCost`, with a few tiles.
    """

    start_seconds: float
    cell_seconds: float
    cell_bytes: float
    file_bytes: float
    counts_per_cell: float
    peak_bytes: int
    device_bytes: int | None


def measure_training(
    sources: Sequence[Path | str | ad.AnnData], config: Config, folder: Path, most_bytes: int | None = None
) -> TrainingCost:
    """Train for some steps and measure.

    Parameters
    ----------
    sources, config
        As for :func:`lingshu_cell.train.train`.
    folder
        Where a run may be put while it is measured, on the disk of the real one.
    most_bytes
        Limit on the memory of the process; it then fails instead of being ended for all that the machine has.

    Raises
    ------
    OutOfMemory
        If memory did not suffice.
    LingshuError
        What training refuses.
    """
    return _in_child(_measure_training, (list(sources), config, folder), folder, most_bytes)


def measure_generation(run: Path, device: str, asked: Mapping[str, Any], folder: Path) -> GenerationCost:
    """Generate some tiles of cells and measure.

    Parameters
    ----------
    run, device
        As for :func:`lingshu_cell.generate.load_model`.
    asked
        As for :func:`lingshu_cell.generate.plan_cells`.
    folder
        Where files may be put while they are measured.

    Raises
    ------
    OutOfMemory
        If memory did not suffice.
    LingshuError
        What generation refuses.
    """
    return _in_child(_measure_generation, (run, device, dict(asked), folder), folder, None)


def _measure_training(sources: list[Path | str | ad.AnnData], config: Config, folder: Path) -> TrainingCost:
    short = {"steps": _STEPS, "validate_every": _VALIDATED, "checkpoint_every": _SAVED, "max_seconds": None}
    trained = config.model_copy(update={"training": config.training.model_copy(update=short | {"tensorboard": False})})
    started, ends = time.perf_counter(), []

    def note(progress: Progress) -> None:
        ends.append(time.perf_counter())

    train(sources, folder / "run", trained, on_progress=note)
    took = {step: ends[step - 1] - ends[step - 2] for step in range(2, _STEPS + 1)}
    plain = statistics.median(took[step] for step in took if step not in (_VALIDATED, _SAVED, _STEPS))
    validation = max(took[_VALIDATED] - plain, 0.0)
    checkpoint = load_checkpoint(folder / "run")
    manifest = checkpoint.manifest
    has_validation = manifest["n_validation_cells"] > 0
    return TrainingCost(
        manifest["n_training_cells"],
        manifest["n_modelled_genes"],
        manifest["n_parameters"],
        start_seconds=ends[0] - started - plain,
        step_seconds=plain,
        validation_seconds=validation,
        checkpoint_seconds=max(took[_SAVED] - plain, 0.0),
        curve_seconds=max(took[_STEPS] - plain - validation, 0.0) if has_validation else 0.0,
        peak_bytes=_peak_bytes(),
        device_bytes=_device_bytes(),
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint.folder.iterdir()),
        keeps_best=(folder / "run" / "best.json").is_file(),
    )


def _measure_generation(run: Path, device: str, asked: dict[str, Any], folder: Path) -> GenerationCost:
    started = time.perf_counter()
    model = load_model(run, pick_device(device))
    tile = model.tile_size
    plan = plan_cells(model, tile, **asked)
    start_seconds = time.perf_counter() - started

    def generated(n_tiles: int, name: str, **changed: Any) -> tuple[float, int, list[GeneratedChunk]]:
        before, path = time.perf_counter(), folder / name
        chunks = list(draw_chunks(model, plan_cells(model, n_tiles * tile, **(asked | changed))))
        with H5adWriter(path, var_of(model), n_tiles * tile, overwrite=True) as writer:
            for chunk in chunks:
                writer.append(chunk.counts, chunk.obs)
        return time.perf_counter() - before, path.stat().st_size, chunks

    fewest = {"steps": 1, "schedule": "geometric"}
    one = generated(1, "one.h5ad", **fewest)
    if one[0] < _MOST_SECONDS / 10:
        one = generated(1, "one.h5ad", **fewest)  # the first time also warms up
    steps, few = plan.schedule.steps, min(plan.schedule.steps, 5)
    if one[0] * steps * _TILES < _MOST_SECONDS:
        many = generated(_TILES, "many.h5ad")
        one = generated(1, "whole.h5ad")
        cell_seconds = many[0] / (_TILES * tile)
    else:
        many = generated(1, "few.h5ad", **fewest | {"steps": few})
        slope = (many[0] - one[0]) / max(few - 1, 1)
        cell_seconds = (one[0] + slope * (steps - 1)) / tile
    n_tiles = sum(len(chunk.obs) for chunk in many[2]) / tile
    per_cell = (many[1] - one[1]) / ((n_tiles - 1) * tile) if n_tiles > 1 else many[1] / tile
    return GenerationCost(
        start_seconds,
        cell_seconds,
        cell_bytes=per_cell,
        file_bytes=max(many[1] - per_cell * n_tiles * tile, 0.0),
        counts_per_cell=sum(chunk.counts.nnz for chunk in many[2]) / (n_tiles * tile),
        peak_bytes=_peak_bytes(),
        device_bytes=_device_bytes(),
    )


def _in_child(function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, most_bytes: int | None) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(sender, function, arguments, most_bytes))
    with _scratch(folder):
        child.start()
        sender.close()
        try:
            kind, told = receiver.recv()
        except EOFError:  # ended from outside: on Linux that is what running out of memory looks like
            kind, told = "memory", None
        finally:
            child.kill()
            child.join()
    if kind == "memory":
        raise OutOfMemory
    if kind == "refused":
        raise LingshuError(*told)
    if kind == "failed":
        raise RuntimeError(told)
    return told


def _tell(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...], most_bytes: int | None) -> None:
    with contextlib.suppress(OSError):  # if memory runs out, end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    try:
        sender.send(("done", function(*arguments)))
    except Exception as error:
        if out_of_memory(error):
            sender.send(("memory", None))
        elif isinstance(error, LingshuError):
            sender.send(("refused", (error.rule, error.finding, error.remedy)))
        else:
            sender.send(("failed", traceback.format_exc()))


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _device_bytes() -> int | None:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None
