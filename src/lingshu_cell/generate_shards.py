"""Generate many cells into a folder of shards, by any number of processes that know nothing of each other.

Each process goes through the shards in order and makes those that are neither there nor claimed by another one. A shard
depends on the request alone, so it does not matter who makes it, when, how often, or what was killed before.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import torch
from scipy import sparse

from lingshu_cell.arguments import whole_number
from lingshu_cell.checksums import checksum
from lingshu_cell.claims import Claims
from lingshu_cell.data.anndata_io import H5adWriter, read_counts
from lingshu_cell.data.cell_folder import FORMAT_VERSION, REQUEST, CellFolder
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import (
    GUIDANCE_SETTINGS,
    GeneratedChunk,
    Plan,
    TrainedModel,
    draw_chunks,
    plan_cells,
    provenance,
    var_of,
)
from lingshu_cell.input_files import expanded
from lingshu_cell.output_files import writable
from lingshu_cell.wanted_cells import Piece, WantedRow, cut_into_shards

_WRITABLE = "The folder of generated cells must be writable"
_REMEDY = "Check the rights and the space on the disk, then give the same command again: it goes on"
_VERSIONS = ("lingshu-cell", "torch", "numpy", "scipy", "pandas", "anndata", "h5py")  # whose bits are in the files
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 2.0


@dataclass(frozen=True)
class FolderResult:
    """What a process did: cells of the folder, and those that this process made."""

    path: Path
    n_cells: int
    n_made: int


def generate_folder(
    model: TrainedModel,
    rows: Sequence[WantedRow],
    out: Path | str,
    *,
    shard_cells: int | None = None,
    context: Path | str | ad.AnnData | None = None,
    on_progress: Callable[[int], None] = lambda n_done: None,
    on_note: Callable[[str], None] = lambda note: None,
    **settings: Any,
) -> FolderResult:
    """Generate cells into a folder, together with all processes that were asked for the same.

    Parameters
    ----------
    model
        What :func:`lingshu_cell.generate.load_model` gave.
    rows
        What cells are wanted.
    out
        The folder: new, or begun under the same request. A finished one is held against its checksums, and what is
        damaged made anew.
    shard_cells
        Most cells of a shard; the run's own when not given.
    context, settings
        As in :func:`lingshu_cell.generate.plan_cells`, for all rows.
    on_progress
        Called with the number of cells of the folder that are there, whoever made them.
    on_note
        Called with what a user should know of conditions and priors.

    Returns
    -------
    FolderResult
        When all shards are whole.

    Raises
    ------
    LingshuError
        If a row cannot be asked for, or the folder is of another request, holds other things or cannot be written.
    """
    path, tile = expanded(out), model.tile_size
    size = model.config.generation.shard_cells if shard_cells is None else shard_cells
    size = whole_number(size, "The number of cells of a shard", tile, remedy=f"A tile has {tile}; change --shard-cells")
    if not rows:
        raise LingshuError("Some cells must be wanted", "there is no row", "Ask for one or more")
    planned = _Planned(model, rows, context, settings)
    with writable(_WRITABLE, path, _REMEDY), _one_thread(model.device):
        folder = CellFolder(path)
        if not (path / REQUEST).exists():  # whoever is first looks at all rows, before anything is written
            for note in planned.notes():
                on_note(note)
        path.mkdir(parents=True, exist_ok=True)
        folder.fix_request(planned.request(size))
        return _Worker(model, folder, planned, cut_into_shards(rows, size, tile)).work(on_progress)


class _Planned:
    """Rows, and the plan of each as it is needed."""

    def __init__(
        self, model: TrainedModel, rows: Sequence[WantedRow], context: Path | str | ad.AnnData | None, settings: Any
    ) -> None:
        self.model, self.rows, self._settings = model, rows, dict(settings)
        self._fingerprint = None
        if context is not None:
            layer = model.config.data.layer
            cells = read_counts(context, layer)  # once for all rows
            self._fingerprint = cells.fingerprint
            layers = {layer: cells.counts} if layer else None
            self._settings["context"] = ad.AnnData(cells.counts, obs=cells.obs, var=cells.var, layers=layers)
        self._last: tuple[int, Plan] | None = None

    def notes(self) -> list[str]:
        """Check every row, and give what is to be said of them."""
        return list(dict.fromkeys(note for number in range(len(self.rows)) for note in self.plan(number).notes))

    def plan(self, number: int) -> Plan:
        """The plan of a row, all of its cells."""
        if self._last is None or self._last[0] != number:
            row = self.rows[number]
            asked = {"condition": row.condition, "dose": row.dose, "depth": row.depth, "seed": row.seed}
            self._last = number, plan_cells(self.model, row.n_cells, **asked, **self._settings)
        return self._last[1]

    def chunks(self, piece: Piece) -> Iterator[GeneratedChunk]:
        """Generate the cells of a piece, under their names."""
        name = self.rows[piece.row].name
        for chunk in draw_chunks(self.model, replace(self.plan(piece.row), n_cells=piece.n_cells, first=piece.first)):
            if name is not None:
                chunk.obs.index = pd.Index([f"{name}-{seed & 0xFFFFFFFF}" for seed in chunk.obs["seed"]])
            yield chunk

    def request(self, shard_cells: int) -> dict[str, Any]:
        """All that the bits of the shards depend on."""
        model, plan = self.model, self.plan(0)
        steering, schedule = plan.steering, plan.schedule
        prior = steering.silenced
        return {
            "format_version": FORMAT_VERSION,
            "model": model.checkpoint.manifest["checksum"],
            "weights": model.weights,
            "rows": [row.to_json() for row in self.rows],
            "schedule": [schedule.name, plan.asked["max_kl"], *map(int, schedule.grid)],
            "guidance": [getattr(steering, name) for name in GUIDANCE_SETTINGS],
            "clamp": {gene: int(count) for gene, count in steering.clamp.items()},
            "tilt": {gene: float(factor) for gene, factor in steering.tilt.items()},
            "prior": None if prior is None else checksum({"table": prior.table.to_csv(), "source": prior.source}),
            "context": self._fingerprint,
            "unseen": plan.asked["unseen"],
            "tile_size": model.tile_size,
            "shard_cells": shard_cells,
            "kind_of_machine": _kind_of_machine(model.device),
            "versions": {name: version(name) for name in _VERSIONS},
        }

    def said(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What is written into a shard of what made it; nothing that may differ from process to process."""
        record = provenance(self.model, self.plan(pieces[0].row))
        record["generation"].pop("minibatch_size")
        record["n_cells"] = sum(piece.n_cells for piece in pieces)
        if len(self.rows) > 1:
            record["generation"].pop("seed")
            record = {key: value for key, value in record.items() if key not in ("condition", "conditions_not_given")}
            record["rows"] = "conditions and seed of each cell are in obs, those asked for in request.json"
        return record


class _Worker:
    """One process at work on a folder."""

    def __init__(
        self, model: TrainedModel, folder: CellFolder, planned: _Planned, shards: Sequence[tuple[Piece, ...]]
    ) -> None:
        self._model, self._folder, self._planned, self._shards = model, folder, planned, shards
        self._whole: set[int] = set()
        self._n_cells = self._n_made = 0  # in whole shards, and those made here

    def work(self, on_progress: Callable[[int], None]) -> FolderResult:
        """Make shards until all are whole, then leave the manifest."""
        folder, n_shards, wait = self._folder, len(self._shards), _SHORTEST_WAIT
        check = folder.is_finished
        with folder.claims() as claims:
            while True:
                before = len(self._whole)
                self._go_through(claims, check, on_progress)
                if len(self._whole) == n_shards:
                    if claims.take(n_shards):
                        folder.finish(n_shards, len(self._model.genes))
                        folder.tidy()
                        break
                    if folder.is_finished:
                        break
                wait = _SHORTEST_WAIT if len(self._whole) > before else min(2 * wait, _LONGEST_WAIT)
                time.sleep(wait)  # others have claims: wait for their shards, or for their end
        return FolderResult(folder.path, self._n_cells, self._n_made)

    def _go_through(self, claims: Claims, check: bool, on_progress: Callable[[int], None]) -> None:
        for number, pieces in enumerate(self._shards):
            if number in self._whole:
                continue
            if self._folder.record(number, check) is None:
                if not claims.take(number):
                    continue
                try:
                    if self._folder.record(number, check) is None:
                        self._make(number, pieces)
                finally:
                    claims.free(number)
            self._whole.add(number)
            self._n_cells += sum(piece.n_cells for piece in pieces)
            on_progress(self._n_cells)

    def _make(self, number: int, pieces: Sequence[Piece]) -> None:
        try:
            n_cells = self._write(number, pieces)
        except (LingshuError, OSError):
            if self._folder.record(number) is None:
                raise  # if it is whole: without locks, another process was as fast
        else:
            self._n_made += n_cells

    def _write(self, number: int, pieces: Sequence[Piece]) -> int:
        draft, n_cells = self._folder.draft(number), sum(piece.n_cells for piece in pieces)
        chunks = [chunk for piece in pieces for chunk in self._planned.chunks(piece)]
        with H5adWriter(draft, var_of(self._model), n_cells) as writer:
            # at once: where HDF5 puts its blocks depends on how they come, and that on the minibatch
            counts = sparse.vstack([chunk.counts for chunk in chunks], format="csr")
            writer.append(counts, pd.concat([chunk.obs for chunk in chunks]))
            writer.close(uns={"lingshu_cell": self._planned.said(pieces)})
        self._folder.keep(number, draft, n_cells)
        return n_cells


def _kind_of_machine(device: torch.device) -> str:
    """What sums are computed by: other kinds round differently, and then single draws differ."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute in one thread on a CPU: how sums are split among threads changes how they round."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
