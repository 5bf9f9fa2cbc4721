"""Train a denoiser on whole cells: from count files to a run folder, resumable bit for bit.

Shapes: N cells, B cells of a minibatch, G genes.
"""

import contextlib
import json
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from torch import Tensor, nn

from lingshu_cell.checkpoint import is_unfinished, load_checkpoint, save_checkpoint, sweep
from lingshu_cell.conditioning import build_conditioner, standard_doses
from lingshu_cell.config import Config, DataConfig, TrainingConfig
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.data.training_set import TrainingSet, assemble, balanced_probabilities, minibatch_cells
from lingshu_cell.diffusion.information import InformationCurve, knots, measure_curve
from lingshu_cell.diffusion.loss import nelbo_estimate, validation_nelbo
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.ema import PowerEma
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.history import History, lock_run
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.denoiser import build_denoiser
from lingshu_cell.output_files import writable, write_text

LICENCE = "BSD-3-Clause code; the weights carry the licence of the data they were trained on"
_VALIDATION_CELLS = 512
_VALIDATION_MASKS = 4
_CELL_VISITS_PER_CURVE_CELL = 400  # so that the information curve costs a few percent of training
_LEAST_CURVE_CELLS = 16
_DIVERGED = 3.0  # times the first loss
_PASSES, _FEWEST_STEPS, _MOST_STEPS = 40, 300, 4_000


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
) -> TrainingResult:
    """Train a model on one or several data sets and write it to a run folder.

    Parameters
    ----------
    sources
        h5ad files (or AnnData objects) of raw counts.
    out
        Run folder; new, or with ``resume`` one that an interrupted run left.
    config
        All settings.
    resume
        Go on from the newest checkpoint; on CPU the result is bit for bit that of an undisturbed run.
    on_progress
        Called after every optimiser step.
    on_note
        Called with what a user should read: genes not modelled, coverage, device.

    Returns
    -------
    TrainingResult
        ``interrupted`` is true when Ctrl-C or SIGTERM ended the run early; everything up to there is saved.

    Raises
    ------
    LingshuError
        For unusable data or settings, an output that exists, or a loss that is no longer finite.
    """
    run = Path(out).expanduser()
    _check_output(run, resume)
    try:
        data_sets = [read_counts(source, config.data.layer, _label_keys(config.data)) for source in sources]
        cells = assemble(data_sets, **config.data.assembly())
    except LingshuError:
        with contextlib.suppress(OSError):
            run.rmdir()  # only if it is empty: refused data leave nothing behind
        raise
    config = _with_steps(config, len(cells.train))
    for note in cells.notes:
        on_note(note)
    with lock_run(run):
        _check_output(run, resume)  # once more: another process may have trained here while we read the data
        sweep(run)
        return _Trainer(run, config, cells, resume).run_all(on_progress, on_note)


class _Trainer:
    """The state of one run: weights, averages, optimiser, step."""

    def __init__(self, run: Path, config: Config, cells: TrainingSet, resume: bool) -> None:
        self.run, self.config, self.cells = run, config, cells
        self.settings = settings = config.training
        self.device = pick_device(settings.device)
        midpoints = torch.from_numpy(token_midpoints())
        self.conditioner = build_conditioner(cells, config)
        self.dose_N = standard_doses(cells, self.conditioner)
        rows_NC = cells.condition_NC[cells.train]
        self.probabilities = balanced_probabilities(rows_NC, settings.balance) if settings.balance else None
        network = build_denoiser(config.network, len(cells.modelled), self.conditioner.sizes, midpoints, settings.seed)
        if hasattr(network, "start_at_frequencies") and not resume:
            network.start_at_frequencies(torch.from_numpy(cells.token_counts()))
            if network.depth is not None:
                log_library = np.log(np.maximum(cells.library[cells.train], 1))
                network.depth.start_at(float(log_library.mean()), float(log_library.std()))
        self.network = network.to(self.device)
        self.parameters = dict(self.network.named_parameters())
        self.averages = [PowerEma(sigma, self.parameters) for sigma in settings.ema_sigma_rel]
        self.optimiser = _optimiser(self.parameters, settings)
        self.law = MaskLaw(0.5 if settings.masking == "log-uniform" else 0.0, settings.weight_power)
        self.step, self.saved_step = 0, None
        self.seconds = 0.0  # spent training, earlier parts of a resumed run counted in
        self.best_known: float | None = None
        self.curve: InformationCurve | None = None
        self.first_loss: float | None = None
        self.smooth_loss: float | None = None
        if resume:
            self._restore()
        self.history = History(run, self.step, settings.tensorboard)

    def run_all(self, on_progress: Callable[[Progress], None], on_note: Callable[[str], None]) -> TrainingResult:
        """Train to the last step, or until asked to stop."""
        settings = self.settings
        n_parameters = sum(p.numel() for p in self.parameters.values())
        on_note(
            f"{self.config.preset}: {n_parameters / 1e6:.1f} M parameters on {self.device}, "
            f"{len(self.cells.train):,} training cells"
        )
        with writable("The run folder must be writable", self.run, "Free some space, then go on with --resume"):
            write_text(self.run / "config.json", self.config.model_dump_json(indent=1))
        started, first_step, seconds_before = time.monotonic(), self.step, self.seconds
        with _stop_signals() as stop_asked, contextlib.closing(self.history):
            while not self._finished() and not stop_asked():
                gradient_norm = self._optimise()
                seconds = time.monotonic() - started
                self.seconds = seconds_before + seconds
                if self.step % settings.validate_every == 0 or self._finished():
                    self._validate(gradient_norm, seconds)
                if self._finished():
                    self._measure_curve()
                if self.step % settings.checkpoint_every == 0:
                    self._save()
                speed = (self.step - first_step) / max(seconds, 1e-9)
                left = (settings.steps - self.step) / speed
                if settings.max_seconds is not None:
                    left = min(left, max(settings.max_seconds - self.seconds, 0.0))
                cells_per_second = speed * settings.minibatch_size
                on_progress(
                    Progress(self.step, settings.steps, self.smooth_loss, self.best_known, cells_per_second, left)
                )
            if self.step != self.saved_step:
                self._save()
        return TrainingResult(
            self.run, self.step, settings.steps, self.best_known, not self._finished(), self.cells.notes
        )

    def _finished(self) -> bool:
        return self.step >= self.settings.steps or self._share_of_time() >= 1

    def _share_of_time(self) -> float:
        """Share of ``max_seconds`` that is spent; 0 where there is no such limit."""
        return 0.0 if self.settings.max_seconds is None else self.seconds / self.settings.max_seconds

    def _optimise(self) -> float:
        """One optimiser step; gives the gradient norm."""
        settings, cells = self.settings, self.cells
        chosen = minibatch_cells(cells.train, settings.minibatch_size, self.step, settings.seed, self.probabilities)
        generator = torch.Generator(self.device).manual_seed(_step_seed(settings.seed, self.step))
        torch.manual_seed(_step_seed(settings.seed, self.step))  # dropout draws from the global state
        x_0_BG, conditions = self._on_device(chosen, np.random.default_rng(_step_seed(settings.seed, self.step)))
        conditions = self._with_dropout(conditions, generator)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, settings, self._share_of_time())
        self.network.train()
        with self._autocast():
            nelbo_B = nelbo_estimate(self.network, x_0_BG, conditions, self.law, generator)
        loss = nelbo_B.mean()
        self.optimiser.zero_grad(set_to_none=True)
        (loss / x_0_BG.shape[1]).backward()  # nats per gene: gradients do not grow with the gene list
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip_norm)
        self._take_in(loss.item(), float(norm))
        self.optimiser.step()
        self.step += 1
        if self.step % settings.ema_every == 0:
            for average in self.averages:
                average.update(self.parameters, self.step, settings.ema_every)
        return float(norm)

    def _with_dropout(self, conditions: Conditions, generator: torch.Generator) -> Conditions:
        """Forget all conditions of some cells, so that each may be left open; the identity labels of others, so that
        their context alone must tell; the library size of others; and of all cells, at first, the perturbation.
        """
        settings, n = self.settings, len(conditions)

        def kept(share: float) -> Tensor:
            return torch.rand(n, 1, generator=generator, device=self.device)[:, 0] >= share

        conditions = conditions.only(kept(settings.condition_dropout))
        at_rest = max(self.step / settings.steps, self._share_of_time()) < settings.rest_share
        if at_rest and conditions.perturbation_BP is not None:
            conditions = conditions.without_perturbation(torch.zeros(n, dtype=torch.bool, device=self.device))
        if conditions.context is not None:
            conditions = conditions.without_categories(kept(settings.identity_dropout) | ~conditions.context.known())
        if conditions.depth_B is not None:
            conditions = conditions.without_depth(kept(settings.depth_dropout))
        return conditions

    def _take_in(self, loss: float, norm: float) -> None:
        """Smooth the loss and stop on NaN or divergence; one loss alone may be huge, as 1/t has no finite variance."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.smooth_loss = loss if self.smooth_loss is None else 0.98 * self.smooth_loss + 0.02 * loss
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and self.smooth_loss < _DIVERGED * max(self.first_loss, 1.0):
            return
        step = self.saved_step
        saved = "No checkpoint was saved" if step is None else f"The checkpoint of step {step} is whole"
        raise LingshuError(
            "Training must stay finite",
            f"at step {self.step + 1} the loss is {loss:.4g} nats per cell and the gradient norm {norm:.4g}",
            f"{saved}; lower training.peak_learning_rate and start again",
        )

    @torch.no_grad()
    def _validate(self, gradient_norm: float, seconds: float) -> None:
        """Estimate the NELBO of held-out cells with the first average, always under the same masks."""
        nelbo = None
        if len(self.cells.validation):
            nelbo = float(np.mean(self._validation_nelbo()))
            self.best_known = nelbo
        g = len(self.cells.modelled)
        self.history.add(
            step=self.step,
            loss=self.smooth_loss,
            validation_nelbo=nelbo,
            bits_per_gene=None if nelbo is None else nelbo / g / math.log(2),
            learning_rate=self.optimiser.param_groups[0]["lr"],
            gradient_norm=gradient_norm,
            seconds=seconds,
        )

    def _validation_nelbo(self) -> list[float]:
        generator = torch.Generator(self.device).manual_seed(0)
        nelbo: list[float] = []
        with self._averaged_weights(), self._autocast():
            for x_0_BG, conditions in self._held_out(_VALIDATION_CELLS):
                nelbo += validation_nelbo(self.network, x_0_BG, conditions, generator, _VALIDATION_MASKS).tolist()
        return nelbo

    def _measure_curve(self) -> None:
        """Measure the information curve on held-out cells, for the schedules of generation."""
        affordable = self.step * self.settings.minibatch_size // _CELL_VISITS_PER_CURVE_CELL
        n_cells = min(max(affordable, _LEAST_CURVE_CELLS), _VALIDATION_CELLS)
        if not len(self.cells.validation):
            return
        generator = torch.Generator(self.device).manual_seed(1)
        visible = knots(len(self.cells.modelled))
        with self._averaged_weights(), self._autocast():
            self.curve = measure_curve(self.network, self._held_out(n_cells), visible, generator)

    def _held_out(self, n_cells: int) -> Iterator[tuple[Tensor, Conditions]]:
        """At most ``n_cells`` validation cells, spread over all data sets and cell types, whatever their order."""
        cells = self.cells.validation[:: -(-len(self.cells.validation) // n_cells)]
        for piece in np.array_split(cells, -(-len(cells) // self.settings.minibatch_size)):
            yield self._on_device(piece)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Put the first average in the place of the weights while the block runs."""
        swap_in = {name: p.detach().clone() for name, p in self.parameters.items()}
        _copy(self.averages[0].weights, self.parameters)
        self.network.eval()
        yield
        _copy(swap_in, self.parameters)

    def _on_device(self, cells: np.ndarray, rng: np.random.Generator | None = None) -> tuple[Tensor, Conditions]:
        """Tokens and conditions of some cells; with ``rng`` as in training: random contexts, and their library size."""
        x_0_BG = torch.from_numpy(self.cells.dense_tokens(cells)).to(self.device)
        conditions = self.conditioner.conditions(
            self.cells.condition_NC[cells],
            dose_N=None if self.dose_N is None else self.dose_N[cells],
            log_depth_N=None if rng is None else np.log(np.maximum(self.cells.library[cells], 1)),
            rng=rng,
        )
        return x_0_BG, conditions.to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _save(self) -> None:
        buffers = {name: b for name, b in self.network.state_dict().items() if name not in self.parameters}
        rows, row_counts = self.cells.condition_frequencies()
        rare = self.cells.rare
        tensors = {
            "weights": self.parameters,
            "buffers": buffers or {"none": torch.zeros(0)},
            **{f"ema_{ema.sigma_rel:.2f}": ema.weights for ema in self.averages},
            "optimizer": _optimiser_tensors(self.optimiser, self.parameters),
            "data": {
                "modelled": torch.from_numpy(self.cells.modelled),
                "rare_gene": torch.from_numpy(rare.gene),
                "rare_count": torch.from_numpy(rare.count),
                "condition_rows": torch.from_numpy(rows),
                "condition_row_counts": torch.from_numpy(row_counts),
            },
            "conditioning": self.conditioner.to_tensors() or {"none": torch.zeros(0)},
        }
        save_checkpoint(self.run, self.step, tensors, self._manifest())
        self.saved_step = self.step

    def _manifest(self) -> dict[str, Any]:
        cells = self.cells
        return {
            "config": self.config.model_dump(mode="json"),
            "genes": cells.vocabulary.to_json(),
            "n_modelled_genes": len(cells.modelled),
            "conditions": cells.conditions.to_json(),
            "conditioning": self.conditioner.to_json(),
            "n_training_cells": len(cells.train),
            "n_validation_cells": len(cells.validation),
            "data_fingerprints": list(cells.fingerprints),
            "notes": list(cells.notes),
            "step": self.step,
            # Only a run with a time limit needs it; all others are the same files whenever they are repeated.
            "seconds": None if self.settings.max_seconds is None else self.seconds,
            "finished": self._finished(),
            "first_loss": self.first_loss,
            "smooth_loss": self.smooth_loss,
            "validation_nelbo_nats_per_cell": self.best_known,
            "information_curve": None if self.curve is None else self.curve.to_json(),
            "n_parameters": sum(p.numel() for p in self.parameters.values()),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("lingshu-cell", "torch", "numpy", "anndata")},
            "licence": LICENCE,
        }

    def _restore(self) -> None:
        checkpoint = load_checkpoint(self.run)
        manifest = checkpoint.manifest
        _check_same(manifest, self._manifest())
        _copy(checkpoint.tensors("weights"), self.parameters)
        self.network.load_state_dict(checkpoint.tensors("buffers"), strict=False)
        for average in self.averages:
            _copy(checkpoint.tensors(f"ema_{average.sigma_rel:.2f}"), average.weights)
        _restore_optimiser(self.optimiser, self.parameters, checkpoint.tensors("optimizer"))
        self.step = self.saved_step = checkpoint.step
        self.best_known = manifest["validation_nelbo_nats_per_cell"]
        self.first_loss, self.smooth_loss = manifest["first_loss"], manifest["smooth_loss"]
        self.seconds = manifest["seconds"] or 0.0


def _label_keys(data: DataConfig) -> list[str]:
    """obs columns that must hold a label in every cell."""
    return [*data.condition_keys, *([data.perturbation_key] if data.perturbation_key else [])]


def _with_steps(config: Config, n_training_cells: int) -> Config:
    """Turn ``training.steps = "auto"`` into a number: cells get better up to about 40 passes (docs/log.md)."""
    if config.training.steps != "auto":
        return config
    steps = math.ceil(_PASSES * n_training_cells / config.training.minibatch_size)
    steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def learning_rate(step: int, settings: TrainingConfig, share_of_time: float = 0.0) -> float:
    """Learning rate of optimiser step 0, 1, …: linear warm-up, then a cosine from the peak to the final rate.

    The cosine follows the share of the steps that is done or, if that is further on, the share of ``max_seconds``.
    """
    if step < settings.warmup_steps:
        return settings.peak_learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(max(share, share_of_time), 1.0))) / 2
    return settings.final_learning_rate + (settings.peak_learning_rate - settings.final_learning_rate) * cosine


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``auto`` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        usable = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        usable = False
    if not usable:
        raise LingshuError(
            "The device must be usable", f"'{name}'", "Choose auto, cpu, or cuda on a machine with a GPU"
        )
    return device


def _optimiser(parameters: dict[str, nn.Parameter], settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for name, p in parameters.items() if p.dim() >= 2 and "bias" not in name]
    others = [p for name, p in parameters.items() if p.dim() < 2 or "bias" in name]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.peak_learning_rate, betas=settings.betas, fused=True
    )


def _optimiser_tensors(optimiser: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _restore_optimiser(
    optimiser: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        place = value if key == "step" else value.to(parameters[name].device)
        optimiser.state[parameters[name]][key] = place


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])


def _step_seed(seed: int, step: int) -> int:
    """A seed for each optimiser step, so that a resumed run draws the masks an undisturbed one would."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_output(run: Path, resume: bool) -> None:
    if resume and not run.is_dir():
        raise LingshuError("--resume needs a run to go on with", f"{run} does not exist", "Leave --resume out")
    # A run that ended before its first checkpoint leaves only these; starting again over them loses nothing.
    bare = {".lock", "config.json", "history.csv", "tensorboard", ".config.json.tmp", ".history.csv.tmp"}
    names = [p.name for p in run.iterdir()] if run.is_dir() else []
    taken = any(name not in bare and not is_unfinished(name) for name in names)
    if not resume and run.exists() and (not run.is_dir() or taken):
        raise LingshuError("A new run needs a new folder", f"{run} exists", "Pass --resume, or another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LingshuError("The run folder must be writable", f"{run}: {error}", "Change --out") from None


def _check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A resumed run must see the same data under the same settings; only where and how often it reports may change."""
    free = {"device", "tensorboard", "checkpoint_every"}
    settings = [{k: v for k, v in m["config"]["training"].items() if k not in free} for m in (old, new)]
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


def _differ(old: dict[str, Any], new: dict[str, Any], keys: Sequence[str]) -> bool:
    return any(json.dumps(old.get(key)) != json.dumps(new[key]) for key in keys)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; a second one stops at once."""
    asked: list[int] = []
    handlers: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            handlers[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
