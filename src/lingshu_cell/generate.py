"""Generate whole cells from a trained run: conditions and seeds in, integer counts with labels out.

Shapes: B cells of a tile, G modelled genes, C condition fields.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import nn

from lingshu_cell.arguments import is_finite, mapping, whole_number
from lingshu_cell.checkpoint import Checkpoint, load_best, load_checkpoint, reading
from lingshu_cell.conditioning import Conditioner
from lingshu_cell.config import Config, SetConfig
from lingshu_cell.curve_store import load_curve
from lingshu_cell.data.anndata_io import H5adWriter
from lingshu_cell.data.counts import MOST_COUNTS
from lingshu_cell.data.measured_genes import MeasuredGenes
from lingshu_cell.data.tokenizer import decode, encode, token_midpoints
from lingshu_cell.data.training_set import RareGenes
from lingshu_cell.data.vocabulary import ConditionVocabulary, GeneVocabulary
from lingshu_cell.diffusion.guidance import GUIDANCE_SPACES, GuidedDenoiser
from lingshu_cell.diffusion.information import InformationCurve
from lingshu_cell.diffusion.plan import Schedule, choose_schedule
from lingshu_cell.diffusion.priors import TiltedDenoiser, clamp
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.guidance_store import load_calibration
from lingshu_cell.network.denoiser import build_denoiser, make_fast
from lingshu_cell.network.distribution import Denoiser
from lingshu_cell.request import Request, describe_request, resolve_request
from lingshu_cell.shown_effects import with_effects_shown
from lingshu_cell.silenced import Silenced, describe_silenced, read_silenced
from lingshu_cell.tokens import MASK_TOKEN

_DECODE_STREAM, _RARE_STREAM, _CONDITION_STREAM = 1, 2, 3
_RARE = ("rare_gene", "rare_count", "rare_data_set", "data_set_cells")
GUIDANCE_SETTINGS = ("guidance_scale", "guidance_space", "guidance_clip", "guidance_ramp")
_TILE_CELLS = 64
_TILE_CELLS_ON_GPU = 1024  # of a set denoiser: with 64 an H100 waits for its host (docs/log.md)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A checkpoint in memory, ready to generate.

    Attributes
    ----------
    checkpoint
        Where it came from, with the manifest.
    config
        The configuration it was trained with.
    weights
        Which of its weights.
    network
        The denoiser with these weights, in evaluation mode.
    genes, modelled
        All genes in order, and the indices of those the network models.
    conditioner
        Condition fields and categories, and all else that the network can be told.
    condition_rows, condition_row_counts
        Combinations of conditions seen in training, R × C, and in how many cells each.
    rare
        Genes drawn from their frequency.
    measured
        Which data sets the training cells of each condition are from and what these measured; ``None``: there is one.
    curve
        How much the visible genes say about a hidden one; ``None`` where it was not measured.
    """

    checkpoint: Checkpoint
    config: Config
    weights: str
    network: nn.Module
    genes: GeneVocabulary
    modelled: np.ndarray
    conditioner: Conditioner
    condition_rows: np.ndarray
    condition_row_counts: np.ndarray
    rare: RareGenes
    measured: MeasuredGenes | None
    curve: InformationCurve | None

    @property
    def conditions(self) -> ConditionVocabulary:
        """Condition fields and categories."""
        return self.conditioner.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def tile_size(self) -> int:
        """Rows of every network call: what the run says, or as many as keep the device busy."""
        asked, on_gpu = self.config.generation.tile_size, self.device.type == "cuda"
        if asked != "auto":
            return asked
        return _TILE_CELLS_ON_GPU if on_gpu and isinstance(self.config.network, SetConfig) else _TILE_CELLS

    def autocast(self) -> torch.autocast:
        """The precision it was trained in: bf16 for the trunk or plain fp32; heads and draws stay in fp32."""
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)


def load_model(run: Path | str, device: torch.device | str = "cpu", weights: str | None = None) -> TrainedModel:
    """Load the best checkpoint of a run for generation: the newest, unless validation conditions say otherwise.

    Parameters
    ----------
    run
        Run folder, or one of its checkpoint folders.
    device
        Where to compute.
    weights
        ``"weights"`` for the last ones, or ``"ema_0.05"`` / ``"ema_0.10"`` (the first average when not given).

    Raises
    ------
    LingshuError
        If there is no whole checkpoint, or ``weights`` are not among its weights.
    """
    checkpoint = load_best(run)
    with reading(checkpoint):
        return _model_of(run, checkpoint, device, weights)


def _model_of(run: Path | str, checkpoint: Checkpoint, device: torch.device | str, weights: str | None) -> TrainedModel:
    manifest = checkpoint.manifest
    config = Config.model_validate(manifest["config"])
    data = checkpoint.tensors("data")
    genes = GeneVocabulary.from_json(manifest["genes"])
    conditioner = Conditioner.from_saved(manifest["conditioning"], checkpoint.tensors("conditioning"))
    averages = [f"ema_{sigma_rel:.2f}" for sigma_rel in config.training.ema_sigma_rel]
    weights = weights or averages[0]
    if weights not in ("weights", *averages):
        raise LingshuError("The weights must exist", f"'{weights}'", f"Choose one of weights, {', '.join(averages)}")
    _check_data(data, len(genes), conditioner.vocabulary.sizes, manifest["n_training_cells"])
    stored = checkpoint.tensors(weights)
    _check_weights(config, len(data["modelled"]), stored)
    midpoints = torch.from_numpy(token_midpoints())
    network = build_denoiser(config.network, len(data["modelled"]), conditioner.sizes, midpoints, config.training.seed)
    buffers = {name: value for name, value in checkpoint.tensors("buffers").items() if name != "none"}
    network.load_state_dict(buffers | stored)
    network = network.to(device).eval()
    make_fast(network, config.training.precision)
    curve = load_curve(checkpoint) or load_curve(load_checkpoint(run))  # the best may be before the curve was measured
    rare = RareGenes(*(data[name].numpy() for name in _RARE))
    return TrainedModel(
        checkpoint=checkpoint,
        config=config,
        weights=weights,
        network=network,
        genes=genes,
        modelled=data["modelled"].numpy(),
        conditioner=conditioner,
        condition_rows=data["condition_rows"].numpy(),
        condition_row_counts=data["condition_row_counts"].numpy(),
        rare=rare,
        measured=MeasuredGenes.from_tensors(data, len(data["modelled"])),
        curve=None if curve is None else curve.curve,
    )


def _check_data(data: Mapping[str, torch.Tensor], n_genes: int, sizes: Sequence[int], n_training_cells: Any) -> None:
    """Refuse places of genes, and condition rows, that are out of range."""
    modelled, gene, count, data_set, n_of_set = (data[name].numpy() for name in ("modelled", *_RARE))
    rows, row_counts = data["condition_rows"].numpy(), data["condition_row_counts"].numpy()
    n_cells = whole_number(n_training_cells, "The number of training cells", 1)
    whole = [array.dtype.kind == "i" for array in (modelled, gene, count, data_set, n_of_set, rows, row_counts)]
    shapes = modelled.ndim == gene.ndim == n_of_set.ndim == row_counts.ndim == 1 and gene.shape == count.shape
    shapes = shapes and data_set.shape == gene.shape
    if not (all(whole) and shapes and len(modelled) and rows.shape == (len(row_counts), len(sizes))):
        raise ValueError("genes and condition rows of other types or shapes")
    in_range = modelled[0] >= 0 and modelled[-1] < n_genes and (np.diff(modelled) > 0).all()
    in_range = in_range and ((gene >= 0) & (gene < n_genes) & (count > 0)).all() and (n_of_set >= 0).all()
    in_range = in_range and ((data_set >= 0) & (data_set < len(n_of_set))).all() and n_of_set.sum() == n_cells
    if not (in_range and len(rows) and ((rows >= 0) & (rows < np.array(sizes, dtype=np.int64))).all()):
        raise ValueError("genes or condition rows out of range")
    if not ((row_counts > 0).all() and row_counts.sum() <= n_cells):
        raise ValueError(f"condition rows of {row_counts.sum():,} cells, {n_cells:,} in training")


def _check_weights(config: Config, n_genes: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that no training leaves, before a network as large as the settings say is built for them."""
    network = config.network
    least = network.n_blocks * network.width * network.feedforward_width
    least += n_genes * network.gene_width if isinstance(network, SetConfig) else network.genes_per_group * network.width
    n_stored = sum(value.numel() for value in weights.values())
    if least > n_stored:
        raise ValueError(f"its settings need {least:,} weights or more, {n_stored:,} are stored")
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"weights that are not finite: {offenders(broken)}")


def resolve_schedule(
    model: TrainedModel, *, steps: int | str | None = None, schedule: str | None = None, max_kl: float | None = None
) -> Schedule:
    """Give the schedule that :func:`generate_chunks` takes under these settings, with what it is predicted to cost.

    Parameters
    ----------
    model
        What :func:`load_model` gave.
    steps, schedule, max_kl
        See ``config.GenerationConfig``; the run's own when not given.

    Raises
    ------
    LingshuError
        On an unknown schedule, an impossible number of steps, or a wish that needs a curve the model does not have.
    """
    defaults = model.config.generation
    return choose_schedule(
        len(model.modelled),
        model.curve,
        steps=defaults.steps if steps is None else steps,
        schedule=defaults.schedule if schedule is None else schedule,
        max_kl=defaults.max_kl if max_kl is None else max_kl,
    )


@dataclass(frozen=True)
class GeneratedChunk:
    """Some generated cells: counts of all genes (CSR int32) and obs with conditions and seeds."""

    counts: sparse.csr_matrix
    obs: pd.DataFrame


@dataclass(frozen=True)
class Steering:
    """How generation is pushed beyond what the conditions say.

    Attributes
    ----------
    guidance_scale
        1 = as trained, 0 = control, above 1 = a stronger effect; the paper's w + 1.
    guidance_space
        ``"log-mean"`` or ``"logits"`` (the paper's), see :mod:`lingshu_cell.diffusion.guidance`.
    guidance_clip, guidance_ramp
        Largest change of a log mean, and how late guidance sets in.
    clamp
        Gene → count that it is given before the first step, in every cell.
    tilt
        Gene → factor that its mean is multiplied by.
    silenced
        Where given, the target of a perturbation and the genes that it silences in other identities are given 1 UMI
        before the first step, in each condition its own.
    fitted
        What is to be said of guidance that nobody chose, as a calibration found it; empty otherwise.
    """

    guidance_scale: float = 1.0
    guidance_space: str = "log-mean"
    guidance_clip: float = 2.0
    guidance_ramp: float = 0.0
    clamp: Mapping[str, int] = field(default_factory=dict)
    tilt: Mapping[str, float] = field(default_factory=dict)
    silenced: Silenced | None = None
    fitted: str = ""


@dataclass(frozen=True, eq=False)
class Plan:
    """A generation that was checked and can be begun; :func:`plan_cells` makes it.

    Attributes
    ----------
    n_cells, first
        How many cells, and the index of the first one.
    request, steering, schedule
        Conditions, guidance and priors, and how many genes each step reveals.
    clamped
        Column among the modelled genes → count that it is given before the first step, in every cell.
    silenced
        Condition row → columns that are given 1 UMI before the first step.
    notes
        What a user should know of conditions and priors.
    seed, minibatch_size
        As they will be used.
    asked
        What was asked for in words, for :func:`provenance`.
    """

    n_cells: int
    first: int
    request: Request
    steering: Steering
    schedule: Schedule
    clamped: Mapping[int, int]
    silenced: Mapping[tuple[int, ...], list[int]]
    notes: tuple[str, ...]
    seed: int
    minibatch_size: int
    asked: Mapping[str, Any]


def plan_cells(
    model: TrainedModel,
    n_cells: int,
    *,
    condition: Mapping[str, str] | None = None,
    dose: float | None = None,
    depth: float | str | None = None,
    context: Path | str | ad.AnnData | None = None,
    unseen: str = "error",
    steering: Steering | None = None,
    steps: int | str | None = None,
    schedule: str | None = None,
    max_kl: float | None = None,
    seed: int | None = None,
    minibatch_size: int | None = None,
    first: int = 0,
) -> Plan:
    """Check what is asked for, and look up all that its generation needs.

    Parameters
    ----------
    model
        What :func:`load_model` gave.
    n_cells
        How many cells.
    condition
        Wanted value of some condition fields; the others are drawn, jointly, from the training cells that match.
    dose, depth, context, unseen
        Dose of the perturbation, UMI per cell or ``"model"``, control cells that stand for the identity, and the policy
        for perturbations never trained; see :func:`lingshu_cell.request.resolve_request`.
    steering
        Guidance and priors; the run's own guidance when not given.
    steps, schedule, max_kl, seed, minibatch_size
        See ``config.GenerationConfig``; the run's own when not given.
    first
        Index of the first cell, to go on where another call ended.

    Raises
    ------
    LingshuError
        On unknown conditions, genes or schedules, or an impossible number of steps or cells.
    """
    defaults = model.config.generation
    minibatch_size = defaults.minibatch_size if minibatch_size is None else minibatch_size
    seed = defaults.seed if seed is None else seed
    n_cells = whole_number(n_cells, "The number of cells", 1, remedy="Change --n")
    first = whole_number(first, "The index of the first cell")
    minibatch_size = whole_number(minibatch_size, "The minibatch size", 1, remedy="Change --minibatch-size")
    seed = whole_number(seed, "The seed", 0, 2**31 - 1, "Change --seed")
    chosen = resolve_schedule(model, steps=steps, schedule=schedule, max_kl=max_kl)
    request = request_of(model, condition, dose=dose, depth=depth, context=context, unseen=unseen)
    request = _with_effects_shown(model, request)
    steering = steering or steering_of(model)
    _check_steering(model, request, steering)
    asked = {"condition": {key: str(value) for key, value in (condition or {}).items()}, "dose": dose, "unseen": unseen}
    limits = {"max_kl": defaults.max_kl if max_kl is None else max_kl}
    silenced, notes = _silenced_columns(model, request, steering)
    if steering.fitted and request.conditioner.is_perturbed(request.rows).any():
        notes.append(steering.fitted)
    if model.measured is not None and not model.measured.measured_SG.all():
        n_unmeasured = (~model.measured.genes(request.rows, request.conditioner.perturbation_field)).sum(1)
        notes.append(
            f"{n_unmeasured.min():,} to {n_unmeasured.max():,} of {len(model.modelled):,} modelled genes are 0, as "
            "training cells of a cell's conditions were not measured for them"
        )
    return Plan(
        n_cells,
        first,
        request,
        steering,
        chosen,
        _columns(model, steering.clamp),
        silenced,
        (*request.notes, *notes),
        seed,
        minibatch_size,
        asked | limits,
    )


def generate_chunks(model: TrainedModel, n_cells: int, **settings: Any) -> Iterator[GeneratedChunk]:
    """Generate cells chunk by chunk, in memory that does not grow with their number; see :func:`draw_chunks`.

    Parameters
    ----------
    model, n_cells, settings
        As in :func:`plan_cells`.
    """
    return draw_chunks(model, plan_cells(model, n_cells, **settings))


def draw_chunks(model: TrainedModel, plan: Plan) -> Iterator[GeneratedChunk]:
    """Generate the cells of a plan chunk by chunk, in memory that does not grow with their number.

    Every cell depends on its seed, its conditions and the settings alone: the network always sees tiles of the same
    number of rows, so that not even rounding depends on the minibatch size or on where a run was restarted.

    Yields
    ------
    GeneratedChunk
    """
    tile, request, grid = model.tile_size, plan.request, plan.schedule.grid
    per_chunk = -(-plan.minibatch_size // tile) * tile
    steered = _Steered(model, plan)
    start, stop = plan.first // tile * tile, plan.first + plan.n_cells  # whole tiles only: a cell always sits in the
    for chunk in range(start, stop, per_chunk):  # same row of the same tile
        end = min(chunk + per_chunk, -(-stop // tile) * tile)
        seeds = cell_seeds(plan.seed, chunk, end - chunk)
        streams = [_stream(s, _CONDITION_STREAM) for s in seeds]
        rows = np.stack([request.rows[s.choice(len(request.rows), p=request.probabilities)] for s in streams])
        log_depth = _log_depths(request, rows, np.array([s.random() for s in streams]))
        tokens = np.concatenate(
            [
                steered.tile_tokens(seeds[i], rows[i], None if log_depth is None else log_depth[i], grid)
                for i in (slice(first_row, first_row + tile) for first_row in range(0, len(seeds), tile))
            ]
        )
        wanted = slice(max(plan.first - chunk, 0), min(stop, end) - chunk)
        yield _chunk(model, request, tokens[wanted], seeds[wanted], rows[wanted], plan.clamped)


def steering_of(
    model: TrainedModel,
    *,
    clamp: Mapping[str, int] | None = None,
    tilt: Mapping[str, float] | None = None,
    prior: str | None = None,
    de_tables: Path | str | None = None,
    **guidance: Any,
) -> Steering:
    """Give guidance and priors as asked for.

    ``prior`` is ``None`` or ``"silenced"``, by the tables in ``de_tables`` or those of training; see
    :mod:`lingshu_cell.silenced`. Guidance not given (or ``None``) is what a calibration found, or else the run's own.
    """
    defaults = model.config.generation
    calibrated = load_calibration(model.checkpoint.folder.parent, model.checkpoint.step)
    fits = calibrated is not None and guidance.get("guidance_space") in (None, calibrated.space)
    fitted = ""
    if fits and guidance.get("guidance_scale") is None:
        guidance |= {"guidance_scale": calibrated.scale, "guidance_space": calibrated.space}
        fitted = f"guidance {calibrated.scale:.3g} in {calibrated.space}, fitted by lingshu calibrate"
    chosen = {n: getattr(defaults, n) if guidance.get(n) is None else guidance[n] for n in GUIDANCE_SETTINGS}
    if prior not in (None, "silenced"):
        raise LingshuError("The prior must exist", f"'{prior}'", "Choose silenced, or leave it out")
    if prior is None and de_tables is not None:
        raise LingshuError("Tables of differential expression serve a prior", "none is chosen", "Add --prior silenced")
    checkpoint = model.checkpoint
    expected = checkpoint.manifest.get("silenced_sha256")
    silenced = None if prior is None else read_silenced(checkpoint.folder.parent, de_tables, expected)
    clamp = mapping(clamp, "Clamped genes", '{"STAT1": 0}')
    tilt = mapping(tilt, "Tilted genes", '{"STAT1": 0.5}')
    return Steering(**chosen, clamp=clamp, tilt=tilt, silenced=silenced, fitted=fitted)


def request_of(model: TrainedModel, condition: Mapping[str, str] | None = None, **asked: Any) -> Request:
    """Check what is asked of a model; arguments as in :func:`lingshu_cell.request.resolve_request`."""
    return resolve_request(
        model.conditioner,
        model.condition_rows,
        model.condition_row_counts,
        condition or {},
        genes=model.genes,
        modelled=model.modelled,
        min_coverage=model.config.data.min_coverage,
        layer=model.config.data.layer,
        **asked,
    )


def _with_effects_shown(model: TrainedModel, request: Request) -> Request:
    if model.conditioner.effects is None:
        return request
    n_known = len(model.conditioner.effects.effect_KG)
    count_V = torch.from_numpy(token_midpoints()).float().to(model.device)
    with model.autocast():
        conditioner, notes = with_effects_shown(request.conditioner, n_known, model.network, count_V)
    return replace(request, conditioner=conditioner, notes=(*request.notes, *notes))


def generate(model: TrainedModel, n_cells: int, **settings: Any) -> ad.AnnData:
    """Generate cells in memory; settings as in :func:`plan_cells`."""
    plan = plan_cells(model, n_cells, **settings)
    chunks = list(draw_chunks(model, plan))
    adata = ad.AnnData(
        sparse.vstack([chunk.counts for chunk in chunks], format="csr"),
        obs=pd.concat([chunk.obs for chunk in chunks]),
        var=var_of(model),
    )
    adata.uns["lingshu_cell"] = provenance(model, plan)
    return adata


def generate_file(model: TrainedModel, n_cells: int, out: Path | str, **settings: Any) -> Path:
    """Generate cells into an h5ad file; settings as in :func:`plan_cells` and :func:`write_cells`."""
    writing = {name: settings.pop(name) for name in ("overwrite", "on_progress") if name in settings}
    return write_cells(model, plan_cells(model, n_cells, **settings), out, **writing)


def write_cells(
    model: TrainedModel,
    plan: Plan,
    out: Path | str,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda n_done: None,
) -> Path:
    """Generate the cells of a plan into an h5ad file, chunk by chunk; the file appears when it is whole.

    Parameters
    ----------
    model, plan
        What :func:`load_model` and :func:`plan_cells` gave.
    out
        The file to write.
    overwrite
        Whether an existing file may be replaced.
    on_progress
        Called with the number of cells done after each chunk.
    """
    with H5adWriter(Path(out), var_of(model), plan.n_cells, overwrite=overwrite) as writer:
        for chunk in draw_chunks(model, plan):
            writer.append(chunk.counts, chunk.obs)
            on_progress(writer.n_written)
        writer.close(uns={"lingshu_cell": provenance(model, plan)})
    return Path(out)


def provenance(model: TrainedModel, plan: Plan) -> dict[str, Any]:
    """What made the cells, for ``uns["lingshu_cell"]``: text and numbers only."""
    manifest, used, steering = model.checkpoint.manifest, plan.schedule, plan.steering
    chosen = {
        **model.config.generation.model_dump(exclude={"shard_cells", *GUIDANCE_SETTINGS}),
        "steps": used.steps,
        "schedule": used.name,
        "visible_counts": " ".join(map(str, used.grid)),
        "max_kl": plan.asked["max_kl"],
        "seed": plan.seed,
        "minibatch_size": plan.minibatch_size,
    }
    if plan.first:
        chosen["first"] = plan.first
    if used.predicted_kl is not None:
        chosen["predicted_kl_nats_per_cell"] = used.predicted_kl
    record = {
        "what": "cells generated by a masked discrete diffusion model; X holds integer UMI counts of every gene",
        "n_cells": plan.n_cells,
        "preset": model.config.preset,
        "checkpoint_step": model.checkpoint.step,
        "checkpoint_checksum": manifest["checksum"],
        "condition": dict(plan.asked["condition"]),
        "conditions_not_given": "drawn jointly from the training cells that match",
        "generation": {key: value for key, value in chosen.items() if isinstance(value, (int, float, str))},
        "n_genes": len(model.genes),
        "n_modelled_genes": len(model.modelled),
        "data_fingerprints": list(manifest["data_fingerprints"]),
        "n_training_cells": manifest["n_training_cells"],
        "validation_nelbo_nats_per_cell": manifest["validation_nelbo_nats_per_cell"] or float("nan"),
        "versions": manifest["versions"],
    }
    plain = {name: plan.asked[name] for name in ("dose", "unseen") if plan.asked[name] is not None}
    steered = {**plain, **describe_request(plan.request), **_described(plan)}
    if model.conditioner.perturbation_key is not None:
        keys = {"perturbation_key": model.conditioner.perturbation_key}
        record["perturbation"] = keys | {"control": model.conditioner.perturbations.control} | steered
    elif steering.clamp or steering.tilt or plan.request.log_depth is not None:
        record["steering"] = steered
    return record


class _Steered:
    """Sampler over priors over guidance over the network, in plain sight."""

    def __init__(self, model: TrainedModel, plan: Plan) -> None:
        self._model, self._request, self._steering, self._plan = model, plan.request, plan.steering, plan
        self._count_V = torch.from_numpy(token_midpoints()).float().to(model.device)
        self._token_of_gene = {gene: int(encode(np.array([count]))[0]) for gene, count in plan.clamped.items()}
        self._log_factor_G = torch.zeros(len(model.modelled), device=model.device)
        for column, factor in _columns(model, plan.steering.tilt).items():
            self._log_factor_G[column] = float(np.log(factor))

    def tile_tokens(
        self, seeds: np.ndarray, rows: np.ndarray, log_depth: np.ndarray | None, grid: np.ndarray
    ) -> np.ndarray:
        """Generate the tokens of one tile of cells."""
        model, steering, conditioner = self._model, self._steering, self._request.conditioner
        told = {"log_depth_N": log_depth, "dose_N": self._doses(rows)}
        conditions = conditioner.conditions(rows, **told).to(model.device)
        denoiser: Denoiser = model.network
        if steering.guidance_scale != 1:
            reference = conditioner.conditions(conditioner.as_control(rows), **told).to(model.device)
            denoiser = GuidedDenoiser(
                denoiser,
                reference,
                steering.guidance_scale,
                steering.guidance_space,
                self._count_V,
                clip=steering.guidance_clip,
                ramp=steering.guidance_ramp,
            )
        if steering.tilt:
            denoiser = TiltedDenoiser(denoiser, self._log_factor_G, self._count_V)
        n_genes = len(model.modelled)
        start_BG = torch.full((len(seeds), n_genes), MASK_TOKEN, dtype=torch.int16, device=model.device)
        for row in np.unique(rows, axis=0):
            columns = self._plan.silenced.get(tuple(row.tolist()), [])
            start_BG[np.ix_((rows == row).all(1).nonzero()[0], columns)] = 1
        start_BG = clamp(start_BG, self._token_of_gene)
        noise = draw_cell_noise(seeds.tolist(), n_genes, model.device)
        with model.autocast():
            made_BG = sample_cells(denoiser, start_BG, conditions, noise, grid.tolist(), self._unmeasured(rows))
        return made_BG.masked_fill_(made_BG == MASK_TOKEN, 0).cpu().numpy()

    def _unmeasured(self, rows: np.ndarray) -> torch.Tensor | None:
        measured = self._model.measured
        if measured is None or measured.measured_SG.all():
            return None
        measured_BG = measured.genes(rows, self._request.conditioner.perturbation_field)
        return torch.from_numpy(~measured_BG).to(self._model.device)

    def _doses(self, rows: np.ndarray) -> np.ndarray | None:
        dose = self._request.standard_dose
        return None if dose is None else np.where(self._request.conditioner.is_perturbed(rows), dose, 0.0)


def _columns(model: TrainedModel, amounts: Mapping[str, Any]) -> dict[int, Any]:
    """Gene → amount by the gene's place among the modelled genes."""
    place = np.searchsorted(model.modelled, model.genes.index(amounts))
    return dict(zip(place.tolist(), amounts.values(), strict=True))


def _silenced_columns(
    model: TrainedModel, request: Request, steering: Steering
) -> tuple[dict[tuple[int, ...], list[int]], list[str]]:
    """Columns to be held low in each perturbed condition row, and what to tell of them."""
    silenced, conditioner = steering.silenced, request.conditioner
    if silenced is None:
        return {}, []
    names = [model.genes.names[g] for g in model.modelled]
    column_of = {name: column for column, name in enumerate(names)}
    rows = request.rows[conditioner.is_perturbed(request.rows)]
    labels = conditioner.vocabulary.decode(rows)[conditioner.perturbation_key].astype(str)
    columns, held = {}, {}
    for row, label, identity in zip(rows.tolist(), labels, conditioner.identity_names(rows), strict=True):
        genes = silenced.genes(label, identity, names, model.config.data.combination_separator)
        columns[tuple(row)], held[identity, label] = [column_of[gene] for gene in genes], genes
    return columns, describe_silenced(silenced, held)


def _described(plan: Plan) -> dict[str, Any]:
    """Guidance and priors as text and numbers, for ``uns``."""
    steering = plan.steering
    described = {f.name: getattr(steering, f.name) for f in fields(steering) if f.name not in ("silenced", "fitted")}
    described |= {"clamp": dict(steering.clamp), "tilt": dict(steering.tilt)}
    notes = {"notes": list(plan.notes)}
    return described | notes | ({} if steering.silenced is None else {"prior": f"silenced: {steering.silenced.source}"})


def _check_steering(model: TrainedModel, request: Request, steering: Steering) -> None:
    if steering.guidance_space not in GUIDANCE_SPACES:
        raise LingshuError(
            "The space of guidance must exist", f"'{steering.guidance_space}'", f"Choose {', '.join(GUIDANCE_SPACES)}"
        )
    if not (is_finite(steering.guidance_scale) and steering.guidance_scale >= 0):
        raise LingshuError(
            "The strength of guidance must be a number of 0 or more", f"{steering.guidance_scale}", "1 is as trained"
        )
    if steering.guidance_scale != 1 and request.conditioner.perturbation_key is None:
        raise LingshuError(
            "Guidance goes from control to a perturbation",
            "this model knows no perturbations",
            "Train with data.perturbation_key and data.control",
        )
    if steering.silenced is not None and request.conditioner.perturbation_key is None:
        raise LingshuError(
            "Silenced genes are those of a perturbation",
            "this model knows no perturbations",
            "Train with data.perturbation_key and data.control",
        )
    for name, given in (("clamped", steering.clamp), ("tilted", steering.tilt)):
        is_modelled = np.isin(model.genes.index(given), model.modelled)
        rare = [gene for gene, there in zip(given, is_modelled, strict=True) if not there]
        if rare:
            raise LingshuError(
                f"Only modelled genes can be {name}", f"{offenders(rare)} was too rare in training", "Leave it out"
            )
    if any(
        not (is_finite(count) and 0 <= count <= MOST_COUNTS and count % 1 == 0) for count in steering.clamp.values()
    ):
        raise LingshuError("A clamped gene needs a whole count", f"{dict(steering.clamp)}", "Write for example STAT1=1")
    if any(not (is_finite(factor) and factor > 0) for factor in steering.tilt.values()):
        raise LingshuError("A tilt is a factor above 0", f"{dict(steering.tilt)}", "Write for example STAT1=0.2")


def _log_depths(request: Request, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray | None:
    """Log library size of each cell: as asked for, or drawn from training cells of its conditions."""
    if request.log_depth is None:
        return None
    if not np.isnan(request.log_depth):
        return np.full(len(rows), request.log_depth)
    return request.conditioner.depths.draw(rows, uniform, request.conditioner.perturbation_field)


def _chunk(
    model: TrainedModel,
    request: Request,
    tokens: np.ndarray,
    seeds: np.ndarray,
    rows: np.ndarray,
    clamped: Mapping[int, int],
) -> GeneratedChunk:
    modelled = sparse.csr_matrix(tokens)
    uniform = np.concatenate(
        [_stream(seed, _DECODE_STREAM).random(n) for seed, n in zip(seeds, np.diff(modelled.indptr), strict=True)]
    )
    values = decode(modelled.data, uniform)
    for column, count in clamped.items():  # a token above 99 stands for many counts, the user asked for one
        values[modelled.indices == column] = count
    gene, cell = model.modelled[modelled.indices], np.repeat(np.arange(len(seeds)), np.diff(modelled.indptr))
    sets_NS = np.ones((len(seeds), len(model.rare.n_cells_S)), dtype=bool)
    if model.measured is not None:
        sets_NS = model.measured.data_sets(rows, request.conditioner.perturbation_field)
    rare_cell, rare_gene, rare_count = _draw_rare(model.rare, seeds, sets_NS)
    counts = sparse.csr_matrix(
        (
            np.concatenate([values, rare_count]),
            (np.concatenate([cell, rare_cell]), np.concatenate([gene, rare_gene])),
        ),
        shape=(len(seeds), len(model.genes)),
        dtype=np.int32,
    )
    obs = request.conditioner.vocabulary.decode(rows)
    obs["seed"] = seeds
    obs.index = pd.Index([f"generated-{seed >> 32}-{seed & 0xFFFFFFFF}" for seed in seeds])
    return GeneratedChunk(counts, obs)


def _draw_rare(rare: RareGenes, seeds: np.ndarray, sets_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each cell every rare count of its data sets with probability 1 / (their training cells)."""
    cells, entries = [], []
    of_sets = {sets_S.tobytes(): np.flatnonzero(sets_S[rare.data_set]) for sets_S in np.unique(sets_NS, axis=0)}
    for cell, seed in enumerate(seeds):
        stream, own = _stream(seed, _RARE_STREAM), of_sets[sets_NS[cell].tobytes()]
        # distinct entries, as one cell cannot show the same entry twice
        n_chosen = stream.binomial(len(own), 1 / rare.n_cells_S[sets_NS[cell]].sum())
        chosen = own[stream.choice(len(own), n_chosen, replace=False)]
        # a gene twice in one cell would add up; keep the first
        _, first = np.unique(rare.gene[chosen], return_index=True)
        entries.append(chosen[first])
        cells.append(np.full(len(first), cell))
    entry = np.concatenate(entries)
    return np.concatenate(cells), rare.gene[entry], rare.count[entry]


def _stream(seed: int, purpose: int) -> np.random.Generator:
    """A cell's random stream for one purpose, apart from the noise of its genes."""
    return np.random.Generator(np.random.Philox(key=[int(seed), purpose]))


def var_of(model: TrainedModel) -> pd.DataFrame:
    """Annotation of the genes of generated cells."""
    is_modelled = np.zeros(len(model.genes), dtype=bool)
    is_modelled[model.modelled] = True
    var = pd.DataFrame({"modelled": is_modelled}, index=pd.Index(model.genes.names))
    if model.genes.ensembl_ids:
        var["gene_ids"] = list(model.genes.ensembl_ids)
    return var
