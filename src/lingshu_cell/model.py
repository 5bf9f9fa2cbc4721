"""The Python API: a trained model as one object that generates cells and scores them, and the judging of files."""

import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch

from lingshu_cell.aligned_cells import align_cells
from lingshu_cell.arguments import mapping
from lingshu_cell.checkpoint import Checkpoint, load_checkpoint, reading
from lingshu_cell.config import Config
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.evaluate import evaluate_files
from lingshu_cell.generate import TrainedModel, generate, generate_file, load_model, steering_of
from lingshu_cell.input_files import expanded
from lingshu_cell.output_files import write_atomically
from lingshu_cell.planner import find_minibatch_size
from lingshu_cell.report import write_report
from lingshu_cell.run_config import AUTOMATIC, run_config
from lingshu_cell.train import Progress, pick_device, train

Data = ad.AnnData | Path | str


class LingshuCell:
    """A trained model of whole single-cell transcriptomes.

    Make one with :meth:`train` or :meth:`load`.

    Parameters
    ----------
    trained
        What :func:`lingshu_cell.generate.load_model` gave.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained

    @classmethod
    def load(cls, run: Path | str, *, device: str = "auto", weights: str | None = None) -> "LingshuCell":
        """Load the newest checkpoint of a run.

        Parameters
        ----------
        run
            Folder that training wrote, or one of its checkpoint folders.
        device
            ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        weights
            ``"weights"`` for the last ones, ``"ema_0.05"`` or ``"ema_0.10"``; the first average when not given.

        Raises
        ------
        LingshuError
            If there is no whole checkpoint, or the device cannot be used.
        """
        return cls(load_model(run, pick_device(device), weights))

    @classmethod
    def train(
        cls,
        data: Data | Sequence[Data],
        *,
        out: Path | str,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
        condition_keys: Sequence[str] | str | None = AUTOMATIC,
        resume: bool = False,
        device: str = "auto",
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> "LingshuCell":
        """Train a model on raw counts and write it to a run folder.

        Parameters
        ----------
        data
            One or several AnnData objects or h5ad files of raw counts, or the folder of a store.
        out
            Run folder: new or empty, or with ``resume`` the folder of an interrupted run.
        preset
            ``small`` (the default), ``paper`` or ``paper-s32``; see ``docs/config.md``.
        settings
            Settings to change, as ``{"training.steps": 200}`` or ``{"training": {"steps": 200}}``.
        condition_keys
            obs columns to condition on; ``"auto"`` takes ``cell_type`` where every cell has one, ``None`` takes none.
        resume
            Go on from the newest checkpoint of ``out``, under its own settings.
        device
            Where the returned model computes; training follows the setting ``training.device``.
        on_progress, on_note
            Called after every optimiser step, and with each line a user should read.

        Returns
        -------
        LingshuCell
            The trained model. If Ctrl-C ended training early, what was learned so far, with a warning.

        Raises
        ------
        LingshuError
            For unusable data or settings, an output that exists, or a loss that is no longer finite.
        """
        sources = [data] if isinstance(data, (ad.AnnData, Path, str)) else list(data)
        config = run_config(
            sources,
            Path(out),
            preset=preset,
            overrides=_nested(settings or {}),
            condition_keys=condition_keys,
            resume=resume,
            on_note=on_note,
        )
        config = find_minibatch_size(sources, out, config, on_note)
        result = train(sources, out, config, resume=resume, on_progress=on_progress, on_note=on_note)
        if result.interrupted:
            warnings.warn(
                f"Training was interrupted at step {result.step} of {result.steps}; resume=True goes on",
                UserWarning,
                stacklevel=2,
            )
        return cls.load(out, device=device)

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self._trained.checkpoint.folder.parent

    @property
    def config(self) -> Config:
        """Every setting the model was trained with."""
        return self._trained.config

    @property
    def var_names(self) -> tuple[str, ...]:
        """Genes of every generated cell, in order."""
        return self._trained.genes.names

    @property
    def conditions(self) -> dict[str, tuple[str, ...]]:
        """Condition fields (obs columns) and the values the model knows."""
        return dict(self._trained.conditions.fields)

    def info(self) -> dict[str, Any]:
        """Say what the model is, see :func:`run_info`."""
        return run_info(self._trained.checkpoint.folder)

    def generate(
        self,
        n_cells: int,
        *,
        condition: Mapping[str, str] | None = None,
        dose: float | None = None,
        depth: float | str | None = None,
        context: Data | None = None,
        unseen: str = "error",
        guidance_scale: float | None = None,
        guidance_space: str | None = None,
        clamp: Mapping[str, int] | None = None,
        tilt: Mapping[str, float] | None = None,
        prior: str | None = None,
        de_tables: Path | str | None = None,
        steps: int | str | None = None,
        schedule: str | None = None,
        max_kl: float | None = None,
        seed: int | None = None,
        minibatch_size: int | None = None,
    ) -> ad.AnnData:
        """Generate cells with integer counts of every gene.

        Parameters
        ----------
        n_cells
            How many, 1 or more.
        condition
            Wanted labels, e.g. ``{"cell_type": "B cells", "perturbation": "IFNB"}``; others are drawn from matching
            training cells. Pairs that were never trained together are allowed, and combinations of perturbations.
        dose
            Dose of the perturbation, above 0, in the unit of training.
        depth
            UMI per cell, ``"model"`` (drawn as in training) or ``"open"`` (left to the network), for models trained
            with ``data.depth``.
        context
            Control cells of the identity wanted, for a cell type or line that was never trained.
        unseen
            ``"embedding"`` allows perturbations never trained, told by their embedding; ``"error"`` refuses them.
        guidance_scale
            Strength of the perturbation beyond control, 1 = as trained (the paper's w + 1); what ``lingshu calibrate``
            found, or the run's own, when not given.
        guidance_space
            ``"log-mean"`` or ``"logits"`` (paper).
        clamp
            Gene → count that every cell has before the first step.
        tilt
            Gene → factor of its mean.
        prior, de_tables
            ``"silenced"`` starts from 1 UMI in the perturbation's target and in the genes that it silences in other
            identities, by tables of ``lingshu de``, or those of training (``data.silenced``) when not given.
        steps
            Network evaluations per cell, 1 … number of modelled genes, or ``"auto"``: the fewest that keep to
            ``max_kl``; the run's own when not given.
        schedule
            How many genes each step reveals: ``optimal``, ``geometric``, ``cosine`` or ``uniform``; ``auto`` is
            ``optimal`` where the run has an information curve, else ``geometric``.
        max_kl
            With ``steps="auto"``: most nats per cell that few steps are predicted to cost.
        seed
            0 … 2³¹ − 1; cell i depends on the seed and i, not on ``n_cells`` or ``minibatch_size``.
        minibatch_size
            Cells computed at once, a matter of memory only.

        Returns
        -------
        anndata.AnnData
            CSR counts in ``X``, labels and seeds in ``obs``, what made them in ``uns["lingshu_cell"]``.

        Raises
        ------
        LingshuError
            On a condition, schedule, seed or number that is not possible.
        """
        steering = steering_of(
            self._trained,
            guidance_scale=guidance_scale,
            guidance_space=guidance_space,
            clamp=clamp,
            tilt=tilt,
            prior=prior,
            de_tables=de_tables,
        )
        return generate(
            self._trained,
            n_cells,
            condition=condition,
            dose=dose,
            depth=depth,
            context=context,
            unseen=unseen,
            steering=steering,
            steps=steps,
            schedule=schedule,
            max_kl=max_kl,
            seed=seed,
            minibatch_size=minibatch_size,
        )

    def generate_file(
        self,
        n_cells: int,
        out: Path | str,
        *,
        overwrite: bool = False,
        on_progress: Callable[[int], None] = lambda n_done: None,
        **settings: Any,
    ) -> Path:
        """Generate cells into an h5ad file, in memory that does not grow with their number.

        Parameters
        ----------
        n_cells, settings
            As in :func:`lingshu_cell.generate.plan_cells`; guidance and priors as ``steering``.
        out
            The file to write; it appears when it is whole.
        overwrite
            Whether an existing file may be replaced.
        on_progress
            Called with the number of cells done.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        LingshuError
            As :meth:`generate`, and if the file exists or cannot be written.
        """
        return generate_file(self._trained, n_cells, out, overwrite=overwrite, on_progress=on_progress, **settings)

    @torch.no_grad()
    def nelbo(
        self,
        data: Data,
        *,
        layer: str | None = None,
        use_conditions: bool = True,
        n_masks: int = 8,
        seed: int = 0,
        minibatch_size: int | None = None,
    ) -> dict[str, float]:
        """Bound the negative log-likelihood of cells under the model from above, mean over the cells.

        Genes are aligned to the model's; a gene the data lack is unknown: it is masked and not scored. Genes too rare
        to be modelled are not scored either.

        Parameters
        ----------
        data
            AnnData or h5ad file of raw counts.
        layer
            Layer of the counts; ``X`` when not given.
        use_conditions
            Score each cell given its own labels where ``obs`` has the model's condition fields; a field that ``obs``
            lacks is unknown. Otherwise every field is unknown.
        n_masks
            Random masks per cell, 1 or more; the error of the mean falls with their number.
        seed
            Seed of the masks.
        minibatch_size
            Cells at once; that of training when not given.

        Returns
        -------
        dict
            ``nats_per_cell``, and ``bits_per_gene`` = nats / (scored genes · ln 2).

        Raises
        ------
        LingshuError
            For unusable data, genes that do not fit, or a label the model does not know.
        """
        model, config = self._trained, self._trained.config
        cells = align_cells(model, read_counts(data, layer), use_conditions=use_conditions)
        generator = torch.Generator(model.device).manual_seed(seed)
        nats: list[float] = []
        for x_0_BG, conditions in cells.minibatches(minibatch_size or config.training.minibatch_size, model.device):
            with model.autocast():
                nats += validation_nelbo(model.network, x_0_BG, conditions, generator, n_masks).tolist()
        mean = float(np.mean(nats))
        return {"nats_per_cell": mean, "bits_per_gene": mean / int(cells.measured.sum()) / math.log(2)}


def run_info(run: Path | str) -> dict[str, Any]:
    """Say what a run is, from its manifest: JSON values only.

    Parameters
    ----------
    run
        Run folder or checkpoint folder.

    Raises
    ------
    LingshuError
        If there is no whole checkpoint.
    """
    checkpoint = load_checkpoint(run)
    with reading(checkpoint):
        return _facts_of(checkpoint)


def _facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    numbers = ("n_parameters", "n_modelled_genes", "n_training_cells", "n_validation_cells")
    if not all(isinstance(manifest[name], int) for name in numbers):
        raise ValueError(f"no whole numbers in {', '.join(numbers)}")
    if not all(isinstance(manifest[name], dict) for name in ("conditions", "versions")):
        raise ValueError("conditions or versions are no object")
    nelbo, n_modelled = manifest["validation_nelbo_nats_per_cell"], manifest["n_modelled_genes"]
    return {
        "run": str(checkpoint.folder.parent),
        "checkpoint": checkpoint.folder.name,
        "preset": manifest["config"]["preset"],
        "network": manifest["config"]["network"]["kind"],
        "n_parameters": manifest["n_parameters"],
        "step": checkpoint.step,
        "steps": manifest["config"]["training"]["steps"],
        "finished": manifest["finished"],
        "validation_nelbo_nats_per_cell": nelbo,
        "validation_nelbo_bits_per_gene": None if nelbo is None else nelbo / n_modelled / math.log(2),
        "n_genes": len(manifest["genes"]["names"]),
        "n_modelled_genes": n_modelled,
        "conditions": manifest["conditions"],
        "n_training_cells": manifest["n_training_cells"],
        "n_validation_cells": manifest["n_validation_cells"],
        "data_fingerprints": manifest["data_fingerprints"],
        "notes": manifest["notes"],
        "versions": manifest["versions"],
        "licence": manifest["licence"],
        "checksum": manifest["checksum"],
        "config": manifest["config"],
    }


def evaluate(
    real: Data,
    generated: Data,
    out: Path | str,
    *,
    training: Data | None = None,
    model: LingshuCell | None = None,
    layer: str | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Compare generated cells, any model's, with real cells that the model has not seen.

    Parameters
    ----------
    real
        Held-out real cells, raw counts: AnnData or h5ad file.
    generated
        Generated cells, raw counts.
    out
        Folder for ``metrics.json``, ``facts.json`` and the tables of the report; see ``docs/outputs.md``.
    training
        Cells the model was trained on; recommended, and needed to see copying.
    model
        The model that made the cells; adds its bound on the likelihood of the real cells and its training curve.
    layer
        Layer of the counts in the real and training cells.
    settings
        ``cell_type_key``, ``generated_layer``, ``target_sum``, ``n_splits``, ``seed``, ``max_cells``: see
        :func:`lingshu_cell.evaluate.evaluate_files`.

    Returns
    -------
    dict
        Name → value, real_vs_real, better, unit, description. ``pandas.DataFrame(metrics).T`` is a readable table.

    Raises
    ------
    LingshuError
        If data are refused, genes do not match, or the real cells are training cells.
    """
    nelbo = None if model is None else model.nelbo(real, layer=layer)
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            name: _as_file(data, Path(scratch) / f"{name}.h5ad")
            for name, data in (("real", real), ("generated", generated), ("training", training))
            if data is not None
        }
        metrics = evaluate_files(**files, out=Path(out), layer=layer, nelbo=nelbo, **settings)
    if model is not None and (model.run / "history.csv").is_file():
        write_atomically(Path(out) / "history.csv", lambda draft: shutil.copyfile(model.run / "history.csv", draft))
    return metrics


def report(directory: Path | str, *, title: str | None = None) -> Path:
    """Render the folder of an evaluation as ``report.html``, one page that opens offline.

    Parameters
    ----------
    directory
        Folder that :func:`evaluate` wrote.
    title
        Heading of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    LingshuError
        If the folder is no evaluation.
    """
    return write_report(Path(directory), title=title)


def _as_file(data: Data, path: Path) -> Path | str:
    """Give data as a file, written to ``path`` where they are in memory."""
    if not isinstance(data, ad.AnnData):
        return data if isinstance(data, str) and "://" in data else expanded(data)
    data.write_h5ad(path)
    return path


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"training.steps": 200}`` into ``{"training": {"steps": 200}}``; nested mappings stay."""
    nested: dict[str, Any] = {}
    for name, value in mapping(settings, "Settings", '{"training.steps": 200}').items():
        section, dot, key = name.partition(".")
        values = {key: value} if dot else value
        if isinstance(values, Mapping):
            nested.setdefault(section, {}).update(values)
        else:
            nested[section] = values
    return nested
