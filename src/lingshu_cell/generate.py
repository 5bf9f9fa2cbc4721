"""Generate whole cells from a trained run: conditions and seeds in, integer counts with labels out.

Shapes: B cells of a tile, G modelled genes, C condition fields.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import nn

from lingshu_cell.checkpoint import Checkpoint, load_checkpoint
from lingshu_cell.config import Config
from lingshu_cell.curve_store import load_curve
from lingshu_cell.data.anndata_io import H5adWriter
from lingshu_cell.data.tokenizer import decode, token_midpoints
from lingshu_cell.data.training_set import RareGenes
from lingshu_cell.data.vocabulary import ConditionVocabulary, GeneVocabulary
from lingshu_cell.diffusion.information import InformationCurve
from lingshu_cell.diffusion.plan import Schedule, choose_schedule
from lingshu_cell.diffusion.randomness import cell_seeds, draw_cell_noise
from lingshu_cell.diffusion.sampler import sample_cells
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.network.denoiser import build_denoiser
from lingshu_cell.tokens import MASK_TOKEN

_DECODE_STREAM, _RARE_STREAM, _CONDITION_STREAM = 1, 2, 3


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A checkpoint in memory, ready to generate.

    Attributes
    ----------
    checkpoint
        Where it came from, with the manifest.
    config
        The configuration it was trained with.
    network
        The denoiser with averaged weights, in evaluation mode.
    genes, modelled
        All genes in order, and the indices of those the network models.
    conditions
        Condition fields and categories.
    condition_rows, condition_row_counts
        Combinations of conditions seen in training, R × C, and in how many cells each.
    rare
        Genes drawn from their frequency.
    curve
        How much the visible genes say about a hidden one; ``None`` where it was not measured.
    """

    checkpoint: Checkpoint
    config: Config
    network: nn.Module
    genes: GeneVocabulary
    modelled: np.ndarray
    conditions: ConditionVocabulary
    condition_rows: np.ndarray
    condition_row_counts: np.ndarray
    rare: RareGenes
    curve: InformationCurve | None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def autocast(self) -> torch.autocast:
        """The precision it was trained in: bf16 for the trunk or plain fp32; heads and draws stay in fp32."""
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)


def load_model(run: Path | str, device: torch.device | str = "cpu", weights: str | None = None) -> TrainedModel:
    """Load the newest checkpoint of a run for generation.

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
    checkpoint = load_checkpoint(run)
    manifest = checkpoint.manifest
    config = Config.model_validate(manifest["config"])
    data = checkpoint.tensors("data")
    conditions = ConditionVocabulary.from_json(manifest["conditions"])
    midpoints = torch.from_numpy(token_midpoints())
    network = build_denoiser(config.network, len(data["modelled"]), conditions.sizes, midpoints, config.training.seed)
    averages = [f"ema_{sigma_rel:.2f}" for sigma_rel in config.training.ema_sigma_rel]
    weights = weights or averages[0]
    if weights not in ("weights", *averages):
        raise LingshuError("The weights must exist", f"'{weights}'", f"Choose one of weights, {', '.join(averages)}")
    buffers = {name: value for name, value in checkpoint.tensors("buffers").items() if name != "none"}
    network.load_state_dict(buffers | checkpoint.tensors(weights))
    stored = load_curve(checkpoint)
    rare = RareGenes(data["rare_gene"].numpy(), data["rare_count"].numpy(), manifest["n_training_cells"])
    return TrainedModel(
        checkpoint=checkpoint,
        config=config,
        network=network.to(device).eval(),
        genes=GeneVocabulary.from_json(manifest["genes"]),
        modelled=data["modelled"].numpy(),
        conditions=conditions,
        condition_rows=data["condition_rows"].numpy(),
        condition_row_counts=data["condition_row_counts"].numpy(),
        rare=rare,
        curve=None if stored is None else stored.curve,
    )


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


def generate_chunks(
    model: TrainedModel,
    n_cells: int,
    *,
    condition: Mapping[str, str] | None = None,
    steps: int | str | None = None,
    schedule: str | None = None,
    max_kl: float | None = None,
    seed: int | None = None,
    minibatch_size: int | None = None,
    first: int = 0,
) -> Iterator[GeneratedChunk]:
    """Generate cells chunk by chunk, in memory that does not grow with their number.

    Every cell depends on its seed, its conditions and the settings alone: the network always sees tiles of the same
    number of rows, so that not even rounding depends on the minibatch size or on where a run was restarted.

    Parameters
    ----------
    model
        What :func:`load_model` gave.
    n_cells
        How many cells.
    condition
        Wanted value of some condition fields; the others are drawn, jointly, from the training cells that match.
    steps, schedule, max_kl, seed, minibatch_size
        See ``config.GenerationConfig``; the run's own when not given.
    first
        Index of the first cell, to go on where another call ended.

    Yields
    ------
    GeneratedChunk

    Raises
    ------
    LingshuError
        On an unknown condition or schedule, or an impossible number of steps or cells.
    """
    if n_cells < 1:
        raise LingshuError("The number of cells must be 1 or more", f"{n_cells}", "Change --n")
    if first < 0:
        raise LingshuError("The index of the first cell must be 0 or more", f"{first}", "Change first")
    defaults = model.config.generation
    minibatch_size = defaults.minibatch_size if minibatch_size is None else minibatch_size
    if minibatch_size < 1:
        raise LingshuError("The minibatch size must be 1 or more", f"{minibatch_size}", "Change it")
    seed = defaults.seed if seed is None else seed
    if not 0 <= seed < 2**31:
        raise LingshuError("The seed must lie between 0 and 2147483647", f"{seed}", "Change --seed")
    grid = resolve_schedule(model, steps=steps, schedule=schedule, max_kl=max_kl).grid
    tile = defaults.tile_size
    per_chunk = -(-minibatch_size // tile) * tile
    rows, probabilities = _matching_rows(model, condition or {})
    start = first // tile * tile  # whole tiles only: a cell always sits in the same row of the same tile
    for chunk in range(start, first + n_cells, per_chunk):
        end = min(chunk + per_chunk, -(-(first + n_cells) // tile) * tile)
        seeds = cell_seeds(seed, chunk, end - chunk)
        conditions = np.stack([rows[_stream(s, _CONDITION_STREAM).choice(len(rows), p=probabilities)] for s in seeds])
        tokens = np.concatenate(
            [
                _tile_tokens(model, seeds[i : i + tile], conditions[i : i + tile], grid)
                for i in range(0, len(seeds), tile)
            ]
        )
        wanted = slice(max(first - chunk, 0), min(first + n_cells, end) - chunk)
        yield _chunk(model, tokens[wanted], seeds[wanted], conditions[wanted])


def generate(model: TrainedModel, n_cells: int, **settings: Any) -> ad.AnnData:
    """Generate cells in memory; settings as in :func:`generate_chunks`."""
    chunks = list(generate_chunks(model, n_cells, **settings))
    adata = ad.AnnData(
        sparse.vstack([chunk.counts for chunk in chunks], format="csr"),
        obs=pd.concat([chunk.obs for chunk in chunks]),
        var=_var(model),
    )
    adata.uns["lingshu_cell"] = provenance(model, n_cells, **settings)
    return adata


def generate_file(
    model: TrainedModel,
    n_cells: int,
    out: Path | str,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda n_done: None,
    **settings: Any,
) -> Path:
    """Generate cells into an h5ad file, chunk by chunk; the file appears when it is whole.

    Parameters
    ----------
    model, n_cells, settings
        As in :func:`generate_chunks`.
    out
        The file to write.
    overwrite
        Whether an existing file may be replaced.
    on_progress
        Called with the number of cells done after each chunk.
    """
    with H5adWriter(Path(out), _var(model), n_cells, overwrite=overwrite) as writer:
        for chunk in generate_chunks(model, n_cells, **settings):
            writer.append(chunk.counts, chunk.obs)
            on_progress(writer.n_written)
        writer.close(uns={"lingshu_cell": provenance(model, n_cells, **settings)})
    return Path(out)


def provenance(model: TrainedModel, n_cells: int, **settings: Any) -> dict[str, Any]:
    """What made the cells, for ``uns["lingshu_cell"]``: text and numbers only."""
    manifest, defaults = model.checkpoint.manifest, model.config.generation
    chosen = {**defaults.model_dump(), **{k: v for k, v in settings.items() if v is not None}}
    condition = chosen.pop("condition", None) or {}
    used = resolve_schedule(model, **{key: chosen[key] for key in ("steps", "schedule", "max_kl")})
    chosen |= {"steps": used.steps, "schedule": used.name, "visible_counts": " ".join(map(str, used.grid))}
    if used.predicted_kl is not None:
        chosen["predicted_kl_nats_per_cell"] = used.predicted_kl
    return {
        "what": "cells generated by a masked discrete diffusion model; X holds integer UMI counts of every gene",
        "n_cells": n_cells,
        "preset": model.config.preset,
        "checkpoint_step": model.checkpoint.step,
        "checkpoint_checksum": manifest["checksum"],
        "condition": {key: str(value) for key, value in condition.items()},
        "conditions_not_given": "drawn jointly from the training cells that match",
        "generation": {key: value for key, value in chosen.items() if isinstance(value, (int, float, str))},
        "n_genes": len(model.genes),
        "n_modelled_genes": len(model.modelled),
        "data_fingerprints": list(manifest["data_fingerprints"]),
        "n_training_cells": manifest["n_training_cells"],
        "validation_nelbo_nats_per_cell": manifest["validation_nelbo_nats_per_cell"] or float("nan"),
        "versions": manifest["versions"],
    }


def _matching_rows(model: TrainedModel, condition: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Condition rows to draw from and their probabilities."""
    wanted = model.conditions.encode(dict(condition), 1)[0]
    given = wanted > 0
    if given.all() and len(wanted):
        return wanted[None], np.ones(1)
    match = (model.condition_rows[:, given] == wanted[given]).all(1)
    if not match.any():
        raise LingshuError(
            "Fields left open are drawn from the training cells that match the given ones",
            f"no training cell has {', '.join(f'{k}={v}' for k, v in condition.items())}",
            f"Give every field: {offenders(model.conditions.fields)}",
        )
    counts = model.condition_row_counts[match]
    return model.condition_rows[match], counts / counts.sum()


def _tile_tokens(model: TrainedModel, seeds: np.ndarray, conditions: np.ndarray, grid: np.ndarray) -> np.ndarray:
    n_genes = len(model.modelled)
    noise = draw_cell_noise(seeds.tolist(), n_genes, model.device)
    start_BG = torch.full((len(seeds), n_genes), MASK_TOKEN, dtype=torch.int16, device=model.device)
    condition_BC = torch.from_numpy(conditions).to(model.device)
    with model.autocast():
        return sample_cells(model.network, start_BG, condition_BC, noise, grid.tolist()).cpu().numpy()


def _chunk(model: TrainedModel, tokens: np.ndarray, seeds: np.ndarray, conditions: np.ndarray) -> GeneratedChunk:
    modelled = sparse.csr_matrix(tokens)
    uniform = np.concatenate(
        [_stream(seed, _DECODE_STREAM).random(n) for seed, n in zip(seeds, np.diff(modelled.indptr), strict=True)]
    )
    values = decode(modelled.data, uniform)
    gene, cell = model.modelled[modelled.indices], np.repeat(np.arange(len(seeds)), np.diff(modelled.indptr))
    rare_cell, rare_gene, rare_count = _draw_rare(model.rare, seeds)
    counts = sparse.csr_matrix(
        (
            np.concatenate([values, rare_count]),
            (np.concatenate([cell, rare_cell]), np.concatenate([gene, rare_gene])),
        ),
        shape=(len(seeds), len(model.genes)),
        dtype=np.int32,
    )
    obs = model.conditions.decode(conditions)
    obs["seed"] = seeds
    obs.index = pd.Index([f"generated-{seed >> 32}-{seed & 0xFFFFFFFF}" for seed in seeds])
    return GeneratedChunk(counts, obs)


def _draw_rare(rare: RareGenes, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each cell every rare count of the training cells with probability 1 / n_cells."""
    cells, entries = [], []
    for cell, seed in enumerate(seeds):
        stream = _stream(seed, _RARE_STREAM)
        # distinct entries, as one cell cannot show the same entry twice
        chosen = stream.choice(len(rare.gene), stream.binomial(len(rare.gene), 1 / rare.n_cells), replace=False)
        # a gene twice in one cell would add up; keep the first
        _, first = np.unique(rare.gene[chosen], return_index=True)
        entries.append(chosen[first])
        cells.append(np.full(len(first), cell))
    entry = np.concatenate(entries)
    return np.concatenate(cells), rare.gene[entry], rare.count[entry]


def _stream(seed: int, purpose: int) -> np.random.Generator:
    """A cell's random stream for one purpose, apart from the noise of its genes."""
    return np.random.Generator(np.random.Philox(key=[int(seed), purpose]))


def _var(model: TrainedModel) -> pd.DataFrame:
    is_modelled = np.zeros(len(model.genes), dtype=bool)
    is_modelled[model.modelled] = True
    var = pd.DataFrame({"modelled": is_modelled}, index=pd.Index(model.genes.names))
    if model.genes.ensembl_ids:
        var["gene_ids"] = list(model.genes.ensembl_ids)
    return var
