"""Train a denoiser on whole cells: from count files to a run folder, resumable bit for bit.

Shapes: N cells, B cells of a minibatch, G genes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from torch import Tensor

from lingshu_cell.checkpoint import is_unfinished, sweep
from lingshu_cell.conditioning import standard_doses
from lingshu_cell.conditioning_of_cells import build_conditioner
from lingshu_cell.config import Config, DataConfig
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.cell_states import number_of_states
from lingshu_cell.data.cells_with_states import teaching_cells, with_states
from lingshu_cell.data.store import is_store
from lingshu_cell.data.stored_cells import open_cells
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.data.training_set import CellRows, TrainingCells, assemble
from lingshu_cell.diffusion.information import InformationCurve, knots, measure_curve
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.ema import PowerEma
from lingshu_cell.engine.feeder import Feeder, tokens_on
from lingshu_cell.engine.gradients import Gradients
from lingshu_cell.engine.minibatch import Share, StepDraws, first_rows, parts_of
from lingshu_cell.engine.optimiser import build_optimiser, clip, learning_rate
from lingshu_cell.engine.processes import World, pick_device, processes
from lingshu_cell.engine.run_state import data_tables, describe, restore, save, saved_states
from lingshu_cell.engine.sharding import HeldNetwork
from lingshu_cell.engine.stopping import Losses, stop_signals
from lingshu_cell.errors import LingshuError
from lingshu_cell.history import History, lock_run
from lingshu_cell.input_files import expanded
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.denoiser import build_denoiser, make_fast
from lingshu_cell.output_files import LOCK, draft_of, writable, write_text
from lingshu_cell.silenced import SILENCED_FILE, keep_silenced
from lingshu_cell.validation_conditions import FILE as CONDITIONS_FILE
from lingshu_cell.validation_conditions import ValidationConditions

__all__ = ["Progress", "TrainingResult", "learning_rate", "pick_device", "train"]

_VALIDATION_CELLS = 512
_VALIDATION_MASKS = 4
_CELL_VISITS_PER_CURVE_CELL = 400  # so that the information curve costs a few percent of training
_LEAST_CURVE_CELLS = 16
_PASSES, _PASSES_WITH_PERTURBATIONS, _FEWEST_STEPS, _MOST_STEPS = 40, 5, 300, 4_000


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows after an optimiser step: loss in nats per cell, speed, seconds left."""

    step: int
    steps: int
    loss: float
    validation_nelbo: float | None
    cells_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class TrainingResult:
    """What a finished (or interrupted) run reports."""

    run: Path
    step: int
    steps: int
    validation_nelbo: float | None
    interrupted: bool
    notes: tuple[str, ...]


def train(
    sources: Sequence[Path | str | ad.AnnData],
    out: Path | str,
    config: Config,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Train a model on one or several data sets, or on a store, and write it to a run folder.

    Started by torchrun in several processes, all of them call this with the same arguments; see docs/distributed.md.

    Parameters
    ----------
    sources
        h5ad files (or AnnData objects) of raw counts, which are held in memory; or one folder that ``lingshu prepare``
        wrote, whose counts stay on disk.
    out
        Run folder; new, or with ``resume`` one that an interrupted run left.
    config
        All settings.
    resume
        Go on from the newest checkpoint; on CPU the result of one process is bit for bit that of an undisturbed run.
    on_progress
        Called after every optimiser step, in the first process.
    on_note
        Called with what a user should read, in the first process: genes not modelled, coverage, device.
    clock
        Gives the seconds that ``training.max_seconds`` and speeds count; ``time.process_time`` counts this process
        alone, however busy the machine is.

    Returns
    -------
    TrainingResult
        ``interrupted`` is true when Ctrl-C or SIGTERM ended the run early; everything up to there is saved.

    Raises
    ------
    LingshuError
        For unusable data or settings, an output that exists, or a loss that is no longer finite.
    """
    run = expanded(out)
    if config.training.minibatch_size == "auto":
        raise LingshuError(
            "The minibatch size must be a number here",
            "training.minibatch_size = auto",
            "One process finds it: lingshu train --dry-run prints it; then give it to all",
        )
    device = pick_device(config.training.device)
    with processes(device) as world:
        world.agreed(lambda: _check_output(run, resume), only_first=True)
        try:
            cells = world.agreed(lambda: _read(sources, config))
            n_states = world.agreed(lambda: _number_of_states(cells, config))
        except LingshuError:
            if world.is_first:
                with contextlib.suppress(OSError):
                    run.rmdir()  # only if it is empty: refused data leave nothing behind
            raise
        config = with_steps(config, len(cells.train))
        world.agreed(lambda: _check_sizes(config, world))
        if not world.is_first:
            on_progress = on_note = _say_nothing
        with contextlib.ExitStack() as held:

            def hold() -> None:
                held.enter_context(lock_run(run))
                _check_output(run, resume)  # once more: another run may have trained here while we read the data
                sweep(run)

            world.agreed(hold, only_first=True)
            if n_states:
                cells = world.agreed(lambda: _in_states(cells, n_states, config, run if resume else None))
            for note in cells.notes:
                on_note(note)
            return _Trainer(run, config, cells, resume, device, world, on_note).run_all(on_progress, clock)


class _Trainer:
    """The state of one run: weights, averages, optimiser, step."""

    def __init__(
        self,
        run: Path,
        config: Config,
        cells: TrainingCells,
        resume: bool,
        device: torch.device,
        world: World,
        on_note: Callable[[str], None],
    ) -> None:
        self.run, self.config, self.cells = run, config, cells
        self.settings = settings = config.training
        self.device, self.world = device, world
        self.on_note = on_note
        self.conditioner = world.agreed(lambda: build_conditioner(cells, config))
        draw = world.agreed(
            lambda: cells.draws(settings.minibatch_size, settings.seed, settings.balance, world.rank, world.size)
        )
        self.feeder = Feeder(draw, ahead=device.type == "cuda")
        network = self._network(at_frequencies=not resume)
        if settings.sharding == "none":
            make_fast(network, settings.precision)
        self.held = HeldNetwork(network, world, settings.sharding)
        self.averages = [PowerEma(sigma, self.held.parts) for sigma in settings.ema_sigma_rel]
        self.optimiser = build_optimiser(self.held.parts, settings)
        self.gradients = Gradients(self.held, world, settings, self._autocast, on_note)
        self.law = MaskLaw(0.5 if settings.masking == "log-uniform" else 0.0, settings.weight_power)
        self.step, self.saved_step = 0, None
        self.seconds = 0.0  # spent training, earlier parts of a resumed run counted in
        self.best_known: float | None = None
        self.curve: InformationCurve | None = None
        self.losses = Losses()
        self.conditions: ValidationConditions | None = None
        self.silenced_sha256: str | None = None
        best = world.agreed(self._restore) if resume else None
        self.conditions = self._validation_conditions()
        if self.conditions is not None:
            if best is not None:
                self.conditions.best, self.conditions.best_step = best["condition_explained"], best["step"]
            begin = partial(self.conditions.begin, run, self.step, best, settings.keep_best)
            world.agreed(begin, only_first=True)
        self.history = world.agreed(lambda: History(run, self.step, settings.tensorboard), only_first=True)

    def run_all(self, on_progress: Callable[[Progress], None], clock: Callable[[], float]) -> TrainingResult:
        """Train to the last step, or until asked to stop."""
        settings, world = self.settings, self.world
        self.on_note(
            f"{self.config.preset}: {self.held.n_parameters / 1e6:.1f} M parameters on {self.device}, "
            f"{len(self.cells.train):,} training cells" + ("" if world.size == 1 else f", {world.size} processes")
        )
        world.agreed(self._describe, only_first=True)
        started, first_step, seconds_before = clock(), self.step, self.seconds
        asked = False
        history = contextlib.closing(self.history) if self.history else contextlib.nullcontext()
        with stop_signals(world.size > 1) as stop_asked, history:
            while not self._finished() and not asked:
                gradient_norm, asked, seconds = self._optimise(stop_asked, lambda: clock() - started)
                self.seconds = seconds_before + seconds
                if self._finished():
                    self._measure_curve()
                if self.step % settings.validate_every == 0 or self._finished():
                    self._validate(gradient_norm, seconds)
                if self.step % settings.checkpoint_every == 0:
                    self._save()
                speed = (self.step - first_step) / max(seconds, 1e-9)
                left = (settings.steps - self.step) / speed
                if settings.max_seconds is not None:
                    left = min(left, max(settings.max_seconds - self.seconds, 0.0))
                cells_per_second = speed * settings.minibatch_size
                on_progress(
                    Progress(self.step, settings.steps, self.losses.smooth, self.best_known, cells_per_second, left)
                )
                asked = asked or (world.size == 1 and stop_asked())
            if self.step != self.saved_step:
                self._save()
        return TrainingResult(
            self.run, self.step, settings.steps, self.best_known, not self._finished(), self.cells.notes
        )

    def _describe(self) -> None:
        """Leave in the run folder what is known before the first step."""
        if self.config.data.silenced:
            names, data = self.conditioner.identity_names, self.config.data
            self.silenced_sha256 = keep_silenced(self.run, self.cells.states_open, names, data, self.silenced_sha256)
        with writable("The run folder must be writable", self.run, "Free some space, then go on with --resume"):
            write_text(self.run / "config.json", self.config.model_dump_json(indent=1))

    def _network(self, at_frequencies: bool) -> torch.nn.Module:
        cells, midpoints = self.cells, torch.from_numpy(token_midpoints())
        network = build_denoiser(
            self.config.network, len(cells.modelled), self.conditioner.sizes, midpoints, self.settings.seed
        )
        if at_frequencies and hasattr(network, "start_at_frequencies"):
            network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
            if network.depth is not None:
                _, n_cells = cells.condition_frequencies(cells.seen)
                network.depth.start_at(*self.conditioner.depths.log_moments(n_cells))
        return network.to(self.device)

    def _finished(self) -> bool:
        return self.step >= self.settings.steps or self._share_of_time() >= 1

    def _share_of_time(self) -> float:
        """Share of ``max_seconds`` that is spent; 0 where there is no such limit."""
        return 0.0 if self.settings.max_seconds is None else self.seconds / self.settings.max_seconds

    def _optimise(self, stop_asked: Callable[[], bool], elapsed: Callable[[], float]) -> tuple[float, bool, float]:
        """One optimiser step; gives the gradient norm, and what the processes agree on: whether one was asked to stop,
        and the first one's seconds since the start.
        """
        settings = self.settings
        share = self._share()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, settings, self._share_of_time())
        self.held.network.train()
        nats = self.gradients.make(share)
        norm = clip(self.held.parts, settings.clip_norm, self.held.total_square)
        now = elapsed() if self.world.is_first else 0.0
        nats, asked, seconds = self.world.sums([nats, float(stop_asked()), now])
        self.losses.take_in(nats / settings.minibatch_size, norm, self.step + 1, self.saved_step)
        self.optimiser.step()
        self.held.forget_gradients()
        self.step += 1
        if self.step % settings.ema_every == 0:
            for average in self.averages:
                average.update(self.held.parts, self.step, settings.ema_every)
        return norm, asked > 0, seconds

    def _share(self) -> Share:
        """This process's cells of the step."""
        settings = self.settings
        n, g = settings.minibatch_size, len(self.cells.modelled)
        draws = StepDraws.of(self.step, n, g, self.law, settings.seed, self.device)
        mine = self.world.share(n)
        try:
            rows = self.feeder.rows(self.step)
        except LingshuError as error:  # a damaged shard
            error.process = self.world.rank  # the others only find this one gone
            raise
        x_0_BG, conditions = self._on_device(rows, draws.context_uniforms(mine))
        told = draws.thinned(conditions, mine, settings, self.conditioner.n_state_fields)
        return Share(mine.start, x_0_BG, told, draws)

    def _validate(self, gradient_norm: float, seconds: float) -> None:
        """Estimate the NELBO of held-out cells with the first average, always under the same masks."""
        nelbo = None
        if len(self.cells.validation):
            nelbo = self.best_known = self._validation_nelbo()
        of_conditions, is_best = self._measure_conditions()
        if self.history is not None:
            self._note_down(nelbo, gradient_norm, seconds, of_conditions)
        if is_best and self.settings.keep_best:
            self._save()
            if self.world.is_first:
                self.conditions.keep(self.run)

    def _note_down(
        self, nelbo: float | None, gradient_norm: float, seconds: float, of_conditions: dict[str, float]
    ) -> None:
        g = len(self.cells.modelled)
        self.history.add(
            step=self.step,
            loss=self.losses.smooth,
            validation_nelbo=nelbo,
            bits_per_gene=None if nelbo is None else nelbo / g / math.log(2),
            learning_rate=self.optimiser.param_groups[0]["lr"],
            gradient_norm=gradient_norm,
            seconds=seconds,
            **of_conditions,
        )

    def _validation_conditions(self) -> ValidationConditions | None:
        """Find the validation conditions; a network in parts has no whole answer to measure them by."""
        if self.settings.sharding == "full":
            return None
        return self.world.agreed(lambda: ValidationConditions.of(self.cells.states_open, self.conditioner))

    def _measure_conditions(self) -> tuple[dict[str, float], bool]:
        """Columns of validation conditions, and whether this step foretells them best; nothing where there are none."""
        if self.conditions is None:
            return {}, False
        with self.held.with_parts(self.averages[0].weights), self._autocast():
            scores = self.conditions.measure(self.held.network, self.device)
        if self.world.is_first:
            self.conditions.write(self.step, scores)
        return self.conditions.take_in(self.step, scores)

    def _validation_nelbo(self) -> float:
        """Mean over the held-out cells, of which each process computes its share."""
        generator = torch.Generator(self.device).manual_seed(0)
        nats, n_cells = 0.0, 0
        with self.held.with_parts(self.averages[0].weights), self._autocast():
            for x_0_BG, conditions in self._held_out(_VALIDATION_CELLS):
                mine = self.world.share(len(x_0_BG))
                n_parts = -(-self.world.largest_share(len(x_0_BG)) // self.gradients.most_cells)
                rows = first_rows(parts := parts_of(mine, n_parts))
                nelbo = validation_nelbo(self.held.denoise, x_0_BG, conditions, generator, _VALIDATION_MASKS, rows)
                by_part = nelbo.double().split([one.stop - one.start for one in rows])
                nats += sum(float(one.sum()) for one, p, r in zip(by_part, parts, rows, strict=True) if p == r)
                n_cells += len(x_0_BG)
        return self.world.sums([nats])[0] / n_cells

    def _measure_curve(self) -> None:
        """Measure the information curve on held-out cells, for the schedules of generation; each process all of it."""
        n_cells = curve_cells(self.step, self.settings.minibatch_size)
        if not len(self.cells.validation):
            return
        generator = torch.Generator(self.device).manual_seed(1)
        visible = knots(len(self.cells.modelled))
        with self.held.with_parts(self.averages[0].weights), self._autocast():
            cells, most = self._held_out(n_cells), self.gradients.most_cells
            self.curve = measure_curve(self.held.denoise, cells, visible, generator, most)

    def _held_out(self, n_cells: int) -> Iterator[tuple[Tensor, Conditions]]:
        """At most ``n_cells`` validation cells, spread over all data sets and cell types, whatever their order."""
        cells = np.asarray(self.cells.validation[:: -(-len(self.cells.validation) // n_cells)], dtype=np.int64)
        for piece in np.array_split(cells, -(-len(cells) // self.settings.minibatch_size)):
            yield self._on_device(self.cells.rows(piece))

    def _on_device(self, rows: CellRows, context_uniform_B: np.ndarray | None = None) -> tuple[Tensor, Conditions]:
        """Tokens and conditions of some cells; with uniforms as in training: random contexts, library sizes and states,
        which are left open else.
        """
        x_0_BG = tokens_on(rows, self.device)
        in_training = context_uniform_B is not None
        conditions = self.conditioner.conditions(
            rows.condition_BC,
            dose_N=standard_doses(rows.dose_B, rows.condition_BC, self.conditioner),
            log_depth_N=np.log(np.maximum(rows.library_B, 1)) if in_training else None,
            context_uniform_N=context_uniform_B,
        )
        if not in_training:
            open_B = torch.zeros(len(conditions), dtype=torch.bool)
            conditions = conditions.without_categories(open_B, self.conditioner.n_state_fields)
        return x_0_BG, conditions.to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16")

    @cached_property
    def _data_tables(self) -> dict[str, Tensor]:
        return data_tables(self.cells)

    def _save(self) -> None:
        save(
            self.run,
            self.world,
            self.held,
            self.averages,
            self.optimiser,
            self.conditioner,
            lambda: self._data_tables,
            self._manifest(),
        )
        self.saved_step = self.step

    def _manifest(self) -> dict[str, Any]:
        return describe(self.config, self.cells, self.conditioner, self.held.n_parameters) | {
            "step": self.step,
            # Only a run with a time limit needs it; all others are the same files whenever they are repeated.
            "seconds": None if self.settings.max_seconds is None else self.seconds,
            "finished": self._finished(),
            "first_loss": self.losses.first,
            "smooth_loss": self.losses.smooth,
            "validation_nelbo_nats_per_cell": self.best_known,
            "best": None if self.conditions is None else self.conditions.best_so_far(),
            "silenced_sha256": self.silenced_sha256,
            "information_curve": None if self.curve is None else self.curve.to_json(),
        }

    def _restore(self) -> dict[str, Any] | None:
        """Take back the newest checkpoint; gives the best step so far and its score."""
        manifest = restore(self.run, self.held, self.averages, self.optimiser, self._manifest())
        self.step = self.saved_step = manifest["step"]
        self.best_known = manifest["validation_nelbo_nats_per_cell"]
        self.losses = Losses(manifest["first_loss"], manifest["smooth_loss"])
        self.seconds = manifest["seconds"] or 0.0
        self.silenced_sha256 = manifest.get("silenced_sha256")
        return manifest["best"]


def _say_nothing(anything: object) -> None:
    """Other processes than the first do not report."""


def _read(sources: Sequence[Path | str | ad.AnnData], config: Config) -> TrainingCells:
    if any(is_store(source) for source in sources):
        if len(sources) > 1:
            raise LingshuError("A store is trained on alone", f"{len(sources)} sources", "Prepare them as one store")
        if config.data.layer is not None:
            raise LingshuError(
                "A store holds the counts of one layer",
                f"data.layer is {config.data.layer!r}",
                "Leave it out here, and choose the layer with lingshu prepare --layer",
            )
        settings = config.data.assembly()
        del settings["min_coverage"]  # prepare reports how genes go together; other species share few of them
        return open_cells(sources[0], **settings)
    data_sets = [read_counts(source, config.data.layer, _label_keys(config.data)) for source in sources]
    return assemble(data_sets, **config.data.assembly())


def _number_of_states(cells: TrainingCells, config: Config) -> int:
    data = config.data
    if data.states == "auto" and (config.network.kind != "set" or data.perturbation_key is not None):
        return 0
    kind = "training cells" if data.control_field is None else "control cells"
    return number_of_states(data.states, len(teaching_cells(cells, data.control_field)), kind)


def _in_states(cells: TrainingCells, n_states: int, config: Config, resumed: Path | None) -> TrainingCells:
    """Group cells into states, those of the newest checkpoint where a run is resumed."""
    saved = None if resumed is None else saved_states(resumed, len(cells.modelled))
    data = config.data
    asked = {"control": data.control_field, "needed": data.states != "auto"}
    return with_states(cells, n_states, config.training.seed, saved, **asked)


def _label_keys(data: DataConfig) -> list[str]:
    """obs columns that must hold a label in every cell."""
    return [*data.condition_keys, *([data.perturbation_key] if data.perturbation_key else [])]


def curve_cells(steps: int, minibatch_size: int) -> int:
    """Cells that the information curve is measured on after a training."""
    affordable = steps * minibatch_size // _CELL_VISITS_PER_CURVE_CELL
    return min(max(affordable, _LEAST_CURVE_CELLS), _VALIDATION_CELLS)


def with_steps(config: Config, n_training_cells: int) -> Config:
    """Turn ``training.steps = "auto"`` into a number: cells get better up to about 40 passes, and what is foretold of
    conditions never trained gets worse after few (docs/log.md).
    """
    if config.training.steps != "auto":
        return config
    passes = _PASSES if config.data.perturbation_key is None else _PASSES_WITH_PERTURBATIONS
    steps = math.ceil(passes * n_training_cells / config.training.minibatch_size)
    steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def _check_sizes(config: Config, world: World) -> None:
    if world.size > config.training.minibatch_size:
        raise LingshuError(
            "Every process needs cells of the minibatch",
            f"{config.training.minibatch_size} cells, {world.size} processes",
            "Start fewer processes, or raise training.minibatch_size",
        )


def _check_output(run: Path, resume: bool) -> None:
    if resume and not run.is_dir():
        raise LingshuError("--resume needs a run to go on with", f"{run} does not exist", "Leave --resume out")
    # A run that ended before its first checkpoint leaves only these; starting again over them loses nothing.
    files = ("config.json", "history.csv", CONDITIONS_FILE, SILENCED_FILE)
    bare = {LOCK, "tensorboard", *files, *map(draft_of, files)}
    names = [p.name for p in run.iterdir()] if run.is_dir() else []
    taken = any(name not in bare and not is_unfinished(name) for name in names)
    if not resume and run.exists() and (not run.is_dir() or taken):
        raise LingshuError("A new run needs a new folder", f"{run} exists", "Pass --resume, or another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LingshuError("The run folder must be writable", f"{run}: {error}", "Change --out") from None
