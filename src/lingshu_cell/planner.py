"""What training or generation will take – memory, disk, time – foretold from a short measurement, and held against the
machine.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import torch

from lingshu_cell.calibration import (
    GenerationCost,
    OutOfMemory,
    TrainingCost,
    measure_generation,
    measure_training,
)
from lingshu_cell.checkpoint import CHECKPOINTS_KEPT
from lingshu_cell.config import PRESETS, Config, TrainingConfig
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import expanded
from lingshu_cell.train import curve_cells, with_steps

GIB = 1 << 30
SMALLEST_MINIBATCH = 8
_SHARE_OF_MEMORY = 0.9  # of what is free that a plan may take
_BYTES_PER_COUNT, _COPIES = 8, 3  # of a shard while it is written
_BYTES_PER_LABEL = 400  # of the labels of a cell, which a file keeps in memory until its end
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Forecast:
    """What a command will take.

    Attributes
    ----------
    what
        ``"training"`` or ``"generation"``.
    sizes
        Name → number of what it is about: cells, genes, steps, ….
    seconds
        From start to end.
    memory_bytes, device_bytes
        Most main memory of all processes on this machine, and memory of a GPU.
    disk_bytes, kept_bytes
        On the disk at most, and at the end.
    """

    what: str
    sizes: dict[str, int]
    seconds: float
    memory_bytes: int
    device_bytes: int | None
    disk_bytes: int
    kept_bytes: int


def plan_training(
    sources: Sequence[Path | str | ad.AnnData], out: Path | str, config: Config, n_processes: int = 1
) -> tuple[Forecast, Config]:
    """Foretell what a training takes.

    Parameters
    ----------
    sources, out, config
        As for :func:`lingshu_cell.train.train`.
    n_processes
        On this machine; one is measured, with its share of the minibatch, and what they exchange is not.

    Returns
    -------
    tuple
        The forecast, and the configuration with the numbers that ``auto`` stands for.

    Raises
    ------
    LingshuError
        If training is refused, or memory does not suffice for a few steps of it.
    """
    config = find_minibatch_size(sources, out, config)
    share = -(-config.training.minibatch_size // n_processes)
    measured = _with_training(config, minibatch_size=share)
    try:
        cost = measure_training(sources, measured, _scratch(out))
    except OutOfMemory:
        raise _no_memory("a few steps of training ran out of it") from None
    config = with_steps(config, cost.n_training_cells)
    return forecast_training(cost, config, n_processes), config


def forecast_training(cost: TrainingCost, config: Config, n_processes: int = 1) -> Forecast:
    """Foretell from what was measured; see :func:`plan_training`."""
    training, steps = config.training, int(config.training.steps)
    n_validations = -(-steps // training.validate_every)
    n_checkpoints = -(-steps // training.checkpoint_every)
    seconds = steps * cost.step_seconds
    seconds += n_validations * cost.validation_seconds + n_checkpoints * cost.checkpoint_seconds
    if training.max_seconds is not None:
        seconds = min(seconds, training.max_seconds)
    curve = cost.curve_seconds * curve_cells(steps, training.minibatch_size) / curve_cells(1, 1)
    kept = CHECKPOINTS_KEPT + cost.keeps_best
    sizes = {
        "training_cells": cost.n_training_cells,
        "modelled_genes": cost.n_modelled_genes,
        "parameters": cost.n_parameters,
        "steps": steps,
        "minibatch_size": training.minibatch_size,
        "processes": n_processes,
    }
    return Forecast(
        "training",
        sizes,
        cost.start_seconds + seconds + curve,
        n_processes * cost.peak_bytes,
        cost.device_bytes,
        min(kept + 1, n_checkpoints) * cost.checkpoint_bytes,
        min(kept, n_checkpoints) * cost.checkpoint_bytes,
    )


def plan_generation(
    run: Path | str,
    out: Path | str,
    n_cells: int,
    *,
    device: str = "auto",
    n_processes: int = 1,
    shard_cells: int | None = None,
    **asked: Any,
) -> Forecast:
    """Foretell what a generation takes.

    Parameters
    ----------
    run, out, n_cells, device
        As on the command line.
    n_processes
        On this machine.
    shard_cells
        Most cells of a shard; None for a file.
    asked
        As for :func:`lingshu_cell.generate.plan_cells`.

    Raises
    ------
    LingshuError
        If generation is refused, or memory does not suffice for a few cells.
    """
    try:
        cost = measure_generation(expanded(run), device, asked, _scratch(out))
    except OutOfMemory:
        raise _no_memory("a few cells ran out of it") from None
    return forecast_generation(cost, n_cells, n_processes, shard_cells)


def forecast_generation(
    cost: GenerationCost, n_cells: int, n_processes: int = 1, shard_cells: int | None = None
) -> Forecast:
    """Foretell from what was measured; see :func:`plan_generation`."""
    n_files = 1 if shard_cells is None else -(-n_cells // shard_cells)
    held = n_cells * _BYTES_PER_LABEL
    if shard_cells is not None:
        held = min(n_cells, shard_cells) * cost.counts_per_cell * _BYTES_PER_COUNT * _COPIES
    at_once = min(n_processes, n_files, len(os.sched_getaffinity(0)))
    disk = int(n_cells * cost.cell_bytes + n_files * cost.file_bytes)
    return Forecast(
        "generation",
        {"cells": n_cells, "files": n_files, "processes": n_processes},
        cost.start_seconds + n_cells * cost.cell_seconds / at_once,
        n_processes * int(cost.peak_bytes + held),
        cost.device_bytes,
        disk,
        disk,
    )


def check(forecast: Forecast, out: Path | str) -> None:
    """Hold a forecast against this machine.

    Raises
    ------
    LingshuError
        If memory or disk will not suffice.
    """
    free = available_memory()
    if forecast.memory_bytes > free:
        raise _no_memory(f"about {_gib(forecast.memory_bytes)} will be needed, {_gib(free)} are free")
    if forecast.device_bytes is not None:
        _, total = torch.cuda.mem_get_info()
        if forecast.device_bytes > total:
            raise _no_memory(f"about {_gib(forecast.device_bytes)} of the GPU will be needed, it has {_gib(total)}")
    left = free_disk(out)
    if forecast.disk_bytes > left:
        raise LingshuError(
            "The disk must have space",
            f"about {_gib(forecast.disk_bytes)} will be needed, {_gib(left)} are free",
            "Free some, or name another --out" + ("" if forecast.what == "generation" else ", or a smaller network"),
        )


def find_minibatch_size(
    sources: Sequence[Path | str | ad.AnnData],
    out: Path | str,
    config: Config,
    on_note: Callable[[str], None] = lambda note: None,
) -> Config:
    """Turn ``training.minibatch_size = "auto"`` into a number, by trying: that of the preset, or half, and so on.

    Each is tried as one microbatch, in a process of its own with no more memory than is free.

    Parameters
    ----------
    sources, out, config
        As for :func:`lingshu_cell.train.train`.
    on_note
        Called with the number found.

    Raises
    ------
    LingshuError
        If memory does not suffice for the smallest.
    """
    if config.training.minibatch_size != "auto":
        return config
    default = TrainingConfig.model_fields["minibatch_size"].default
    size = preset_size = PRESETS[config.preset].get("training", {}).get("minibatch_size", default)
    while True:
        tried = _with_training(config, minibatch_size=size)
        one_piece = _with_training(tried, microbatch_size=size)
        limit = int(_SHARE_OF_MEMORY * available_memory())
        try:
            if measure_training(sources, one_piece, _scratch(out), limit).peak_bytes <= limit:
                break
        except OutOfMemory:
            pass
        if size <= SMALLEST_MINIBATCH:
            raise _no_memory(f"it ran out with minibatches of {size} cells")
        size = max(size // 2, SMALLEST_MINIBATCH)
    half = "" if size == preset_size else f", as memory does not suffice for {preset_size}"
    on_note(f"minibatches of {size} cells{half}")
    return tried


def available_memory() -> int:
    """Give the bytes of main memory that a new process may take, of the machine or of its container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    for most, used in _CGROUPS:
        limit, taken = _lines(most), _lines(used)
        if limit and taken and limit[0].isdigit():
            free = min(free, max(int(limit[0]) - int(taken[0]), 0))
    return free


def describe(forecast: Forecast, out: Path | str) -> list[str]:
    """Say what is foretold, a line each, beside what this machine has."""
    minutes, rest = divmod(round(forecast.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    sizes = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in forecast.sizes.items())
    lines = [
        f"{forecast.what}: {sizes}",
        f"time    {hours}:{minutes:02d}:{rest:02d}, if the machine stays as busy as it is",
        f"memory  {_gib(forecast.memory_bytes)} of {_gib(available_memory())} that are free",
        f"disk    {_gib(forecast.disk_bytes)} at most, {_gib(forecast.kept_bytes)} kept, of {_gib(free_disk(out))}",
    ]
    if forecast.device_bytes is not None:
        lines.insert(3, f"GPU     {_gib(forecast.device_bytes)}")
    return lines


def free_disk(out: Path | str) -> int:
    """Give the bytes that are free where an output will be."""
    path = expanded(out).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _with_training(config: Config, **changed: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changed)})


def _scratch(out: Path | str) -> Path:
    """A folder beside the output, on the same disk."""
    path = expanded(out)
    return path.with_name(f".{path.name}.plan-{os.getpid()}")


def _no_memory(finding: str) -> LingshuError:
    return LingshuError(
        "Memory must suffice",
        finding,
        "Start fewer processes, lower training.microbatch_size, use fewer cells or a smaller network",
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.1f} GiB" if n_bytes >= GIB else f"{n_bytes / (1 << 20):,.0f} MiB"
