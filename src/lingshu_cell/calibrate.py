"""Fit the strength of guidance so that predicted effects are as large as measured ones, on validation conditions."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.evaluate_responses import evaluate_responses
from lingshu_cell.generate import TrainedModel, generate, load_model, steering_of
from lingshu_cell.guidance_store import Calibration, save_calibration
from lingshu_cell.tokens import STATE_FIELDS

SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)


def calibrate(
    run: Path | str,
    data: Path | str | ad.AnnData,
    *,
    scales: Sequence[float] = SCALES,
    space: str | None = None,
    n_cells: int = 200,
    steps: int | str | None = None,
    unseen: str = "error",
    layer: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Generate validation conditions under several strengths, and take the one whose pooled slope is 1.

    Parameters
    ----------
    run
        Run folder; ``guidance.json`` is written into it and used by generation from then on.
    data
        Real cells of validation conditions, which must not be those of the test: perturbed cells that the model was
        not trained on, and control cells of the same identities.
    scales
        Strengths to try, two or more, rising. Between them the slope is taken to be linear.
    space
        ``log-mean`` or ``logits``; the run's own when not given.
    n_cells
        Cells to generate for each condition and strength, 20 or more; all strengths use the same seeds.
    steps
        Network evaluations per cell; the run's own when not given.
    unseen
        What stands in for perturbations that no training cell has: ``error`` (nothing) or ``embedding``.
    layer
        Layer of the counts in ``data``.
    seed
        Seed of generation.
    device
        Where to compute.
    on_progress
        Called with a line for each strength.

    Returns
    -------
    Calibration
        Its scale lies within those tried.

    Raises
    ------
    LingshuError
        If the model knows no perturbations, the data have no conditions to compare, one of them cannot be generated
        (see ``unseen``), or no slope can be measured.
    """
    if len(scales) < 2 or list(scales) != sorted(set(scales)):
        raise LingshuError("Strengths must be two or more, rising", f"{list(scales)}", "Write e.g. 0.5,1,1.5,2")
    model = load_model(run, device)
    key = model.conditioner.perturbation_key
    if key is None:
        raise LingshuError(
            "Calibration needs a model of perturbations", "this one knows none", "Train with data.perturbation_key"
        )
    identity_keys = [name for name in model.conditions.fields if name not in (key, *STATE_FIELDS)]
    cells = read_counts(data, layer, [*identity_keys, key])
    wanted = _conditions(model, cells, identity_keys, key)
    names = tuple(" / ".join(condition.values()) for condition in wanted)
    control = model.conditioner.perturbations.control
    real = ad.AnnData(cells.counts, obs=_joined(cells, identity_keys, key))
    real.var_names = cells.gene_names
    slopes = []
    for scale in scales:
        steering = steering_of(model, guidance_scale=scale, guidance_space=space)
        parts = [
            generate(model, n_cells, condition=condition, steps=steps, seed=seed, unseen=unseen, steering=steering)
            for condition in wanted
        ]
        for part, condition in zip(parts, wanted, strict=True):
            part.obs = part.obs.assign(identity=_name(condition, identity_keys), perturbation=condition[key])
        predicted = ad.concat(parts, index_unique="-")[:, real.var_names]  # all conditions have the same seeds
        with tempfile.TemporaryDirectory() as scratch:
            found = evaluate_responses(
                real,
                predicted,
                Path(scratch) / "responses",
                perturbation_key="perturbation",
                control=control,
                identity_key="identity",
                use_cell_eval=False,
                use_cell_eval2=False,
                ceiling=False,
                only_predicted=True,
            )
        slope = found["summary"]["lfc_slope"]["pooled"]
        if slope is None:
            raise LingshuError(
                "The validation conditions must have effects to measure a slope on",
                f"too few genes change in {offenders(names)}",
                "Use conditions with more cells or stronger effects",
            )
        slopes.append(float(slope))
        on_progress(f"guidance_scale {scale:g}: slope {slope:.3f}")
    calibration = Calibration(
        scale=fit_scale(scales, slopes),
        space=steering.guidance_space,
        checkpoint_step=model.checkpoint.step,
        scales=tuple(float(scale) for scale in scales),
        slopes=tuple(slopes),
        conditions=names,
        data_fingerprint=cells.fingerprint,
    )
    save_calibration(model.checkpoint.folder.parent, calibration)
    return calibration


def fit_scale(scales: Sequence[float], slopes: Sequence[float]) -> float:
    """Give the strength at which the slope, made monotone and linear between the strengths tried, is 1.

    Outside of what was tried the nearest strength is given: guidance is not extrapolated.
    """
    rising = np.maximum.accumulate(np.asarray(slopes, dtype=float))
    if rising[-1] <= 1:
        return float(scales[-1])
    if rising[0] >= 1:
        return float(scales[0])
    i = int(np.searchsorted(rising, 1.0))
    share = (1.0 - rising[i - 1]) / (rising[i] - rising[i - 1])
    return float(scales[i - 1] + share * (scales[i] - scales[i - 1]))


def _conditions(
    model: TrainedModel, cells: CountMatrix, identity_keys: Sequence[str], key: str
) -> list[dict[str, str]]:
    """List the perturbed conditions of the data that were not trained."""
    labels = cells.obs[[*identity_keys, key]].astype(str)
    control = model.conditioner.perturbations.control
    found = labels[labels[key] != control].drop_duplicates().sort_values([*identity_keys, key])
    if not len(found):
        raise LingshuError(
            "Calibration needs perturbed cells", f"all are {control!r}", "Pass cells of validation conditions"
        )
    trained = model.conditioner.vocabulary.decode(model.condition_rows).astype(str)
    seen = {tuple(row) for row in trained[[*identity_keys, key]].to_numpy()}
    conditions = [row for row in found.to_dict("records") if tuple(row.values()) not in seen]
    if not conditions:
        raise LingshuError(
            "Calibration needs conditions that were not trained",
            f"the model was trained on all {len(found)} of them",
            "Hold validation conditions out of training (data.split)",
        )
    return conditions


def _joined(cells: CountMatrix, identity_keys: Sequence[str], key: str) -> pd.DataFrame:
    labels = cells.obs[[*identity_keys, key]].astype(str)
    names = [_name(row, identity_keys) for row in labels.to_dict("records")]
    return labels.assign(identity=names, perturbation=labels[key])[["identity", "perturbation"]]


def _name(condition: dict[str, str], identity_keys: Sequence[str]) -> str:
    return " / ".join(condition[name] for name in identity_keys) or "all cells"
