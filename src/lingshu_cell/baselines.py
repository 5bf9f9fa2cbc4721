"""Baselines of perturbation responses: simple predictions, as integer-count cells, that a model must beat."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.data.anndata_io import H5adWriter, read_obs
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.metrics.folder import package_versions
from lingshu_cell.perturbation_effects import (
    PSEUDOCOUNT,
    TARGET_SUM,
    Condition,
    Screen,
    additive_effects,
    condition_name,
    mean_after,
    nearest_effects,
    read_screen,
    ridge_effects,
)

N_CELLS = 200
BASELINES: dict[str, str] = {
    "control_bootstrap": "control cells of the same identity: no response at all",
    "perturbation_mean": "training cells of the same perturbation, whatever their identity",
    "context_mean": "training cells of the same identity under any other perturbation",
    "additive": "control cells of the identity, moved by the perturbation's mean effect over "
    "identities; A+B is A plus B",
    "ridge": "as additive, the effect foretold from embeddings of perturbations, or without them from control "
    "profiles of identities",
    "nearest_neighbour": "as additive, the effect of the most similar identity, or of the perturbation nearest by "
    "embedding",
}


def predict_baseline(
    name: str,
    training: Path | str | ad.AnnData,
    conditions: Sequence[Mapping[str, Any]],
    *,
    perturbation_key: str,
    control: str,
    identity_keys: Sequence[str] = (),
    embeddings: pd.DataFrame | None = None,
    n_cells: int = N_CELLS,
    separator: str = "+",
    layer: str | None = None,
    seed: int = 0,
) -> ad.AnnData:
    """Predict the cells of each condition by one of the :data:`BASELINES`.

    A condition gives the same cells whatever else is asked for in the same call.

    Parameters
    ----------
    name
        One of :data:`BASELINES`.
    training
        Raw counts of training cells with their controls; the only cells that are looked at.
    conditions
        What to predict: for each, the value of every identity key, that of ``perturbation_key``, and ``"n"``, how many
        cells (``n_cells`` where it is left out); :func:`conditions_of` lists those of a held-out file.
    perturbation_key
        obs column of perturbations.
    control
        Its value for control cells.
    identity_keys
        obs columns that together say what a cell is (cell type, line, donor, …); none where all cells are alike.
    embeddings
        One row per perturbation, any number of columns; for ``ridge`` and ``nearest_neighbour``.
    n_cells
        Cells of a condition that does not say how many, ≥ 1.
    separator
        Between the parts of a combination, as in ``A+B``.
    layer
        Layer of the counts; ``X`` by default.
    seed
        Of all random draws.

    Returns
    -------
    anndata.AnnData
        Integer counts (CSR) of the training genes; obs has the identity columns, ``perturbation_key`` and
        ``source_cell``, the training cell that each was made from; ``uns["lingshu_cell"]`` says what made them.

    Raises
    ------
    LingshuError
        If the name, a key or a condition is unknown, or training has not what the baseline needs for a condition.
    """
    pools = {"control_bootstrap": _controls, "perturbation_mean": _same_perturbation, "context_mean": _same_identity}
    if name not in BASELINES:
        raise LingshuError("A baseline has a known name", repr(name), f"Choose one of {', '.join(BASELINES)}")
    keys = list(identity_keys)
    labels = {"perturbation_key": perturbation_key, "control": control, "identity_keys": keys, "separator": separator}
    screen = read_screen(training, layer=layer, **labels)
    wanted = [_as_condition(condition, keys, perturbation_key, n_cells) for condition in conditions]
    asked = [condition for condition, _ in wanted]
    _check_conditions(screen, asked)
    if name in pools:
        drawn_from, move = pools[name](screen, asked), {}
    else:
        drawn_from, move = _controls(screen, asked), _effects(name, screen, asked, embeddings)
    pieces, sources = [], []
    for condition, n in wanted:
        rng = np.random.default_rng([seed, _digest(condition)])
        rows = rng.choice(drawn_from[condition], size=n, replace=True)
        cells = screen.cells.counts[rows]
        if condition in move:
            before = screen.mean(condition[0], control)
            cells = respond(cells, before, mean_after(before, move[condition]), rng)
        pieces.append(cells)
        sources.append(screen.cells.obs_names[rows])
    obs = _labels_of(wanted, keys, perturbation_key).assign(source_cell=np.concatenate(sources))
    made_by = _provenance(name, screen, labels, embeddings, seed)
    counts = sparse.vstack(pieces, format="csr").astype(np.int32)
    return ad.AnnData(counts, obs=obs, var=screen.cells.var.copy(), uns={"lingshu_cell": made_by})


def conditions_of(
    source: Path | str | ad.AnnData, *, perturbation_key: str, control: str, identity_keys: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """List the perturbed conditions of a file with their numbers of cells, as :func:`predict_baseline` takes them.

    Parameters
    ----------
    source
        Cells, usually held-out ones; only their labels are read.
    perturbation_key, control, identity_keys
        As in :func:`predict_baseline`.

    Returns
    -------
    list of dict
        Identity columns, ``perturbation_key`` and ``"n"``; controls are left out.

    Raises
    ------
    LingshuError
        If a column is missing, a cell has no label, or there are only controls.
    """
    obs, keys = read_obs(source), [*identity_keys, perturbation_key]
    absent = [key for key in keys if key not in obs]
    if absent:
        raise LingshuError(
            "Keys must be obs columns", f"there is no {offenders(absent)}", f"Available: {offenders(obs)}"
        )
    if obs[keys].isna().to_numpy().any():
        raise LingshuError(
            "Every cell needs its labels",
            f"cells without one: {offenders(obs.index[obs[keys].isna().any(axis=1)])}",
            "Drop these cells or give them a label",
        )
    labels = obs[keys].astype(str)
    found = labels[labels[perturbation_key] != control].value_counts(sort=False).sort_index()
    if not len(found):
        raise LingshuError(
            "There must be perturbed cells to predict",
            f"every cell has {perturbation_key}={control!r}",
            "Check the control's name",
        )
    return [dict(zip(keys, labels_of_one, strict=True)) | {"n": int(n)} for labels_of_one, n in found.items()]


def write_prediction(
    prediction: ad.AnnData, out: Path | str, *, overwrite: bool = False, chunk_cells: int = 20_000
) -> Path:
    """Write predicted cells to an h5ad file, which appears when it is whole.

    Parameters
    ----------
    prediction
        From :func:`predict_baseline`.
    out
        The file to write.
    overwrite
        Whether an existing file may be replaced.
    chunk_cells
        Cells written at a time, ≥ 1.

    Returns
    -------
    pathlib.Path
        The file.
    """
    with H5adWriter(Path(out), prediction.var, prediction.n_obs, overwrite=overwrite) as writer:
        for start in range(0, prediction.n_obs, chunk_cells):
            rows = slice(start, start + chunk_cells)
            writer.append(prediction.X[rows], prediction.obs.iloc[rows])
        writer.close(uns=dict(prediction.uns))
    return Path(out)


def respond(
    counts: sparse.csr_matrix, before: np.ndarray, after: np.ndarray, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Move cells from one vector of means to another: binomial thinning down, Poisson counts added up.

    A gene whose mean falls keeps each count with probability ``after / before``. A gene whose mean rises gains
    ``Poisson((after - before) · total / Σ before)`` counts in every cell, in proportion to the cell's total, so that
    genes silent in controls can be switched on. Both change the expected mean exactly as asked.

    Parameters
    ----------
    counts
        Counts of control cells, CSR of integers, shape (cells, genes).
    before, after
        Normalised means of one and the same sum, shape (genes,).
    rng
        Source of randomness.

    Returns
    -------
    scipy.sparse.csr_matrix
        int32 counts, same shape; ``counts`` themselves where ``after`` equals ``before``.
    """
    counts = counts.tocsr()
    keep = np.ones(len(before))
    np.divide(after, before, out=keep, where=after < before)
    kept = counts.copy()
    falling = keep[counts.indices] < 1
    kept.data[falling] = rng.binomial(counts.data[falling], keep[counts.indices[falling]])
    totals = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    rising = np.flatnonzero(after > before)
    if len(rising) and totals.sum() > 0:
        # The sum over cells is Poisson, and given the sum the counts fall on cells by their totals: sparse and exact.
        n_added = rng.poisson((after - before)[rising] * totals.sum() / before.sum())
        cell = rng.choice(len(totals), size=n_added.sum(), p=totals / totals.sum())
        gene = np.repeat(rising, n_added)
        kept = kept + sparse.csr_matrix((np.ones(len(cell), np.int32), (cell, gene)), shape=counts.shape)
    kept.eliminate_zeros()
    kept.sort_indices()
    return kept.astype(np.int32)


def _as_condition(
    condition: Mapping[str, Any], identity_keys: list[str], perturbation_key: str, n_cells: int
) -> tuple[Condition, int]:
    expected = [*identity_keys, perturbation_key]
    wrong = [key for key in expected if key not in condition] + [k for k in condition if k not in (*expected, "n")]
    if wrong:
        raise LingshuError(
            f"A condition gives {', '.join(expected)} and, if wanted, n",
            f"missing or unknown: {offenders(wrong)}",
            "Give every one of them and no other",
        )
    n = condition.get("n", n_cells)
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise LingshuError("A number of cells is 1 or more", f"n = {n!r}", "Ask for at least one cell per condition")
    return (tuple(str(condition[key]) for key in identity_keys), str(condition[perturbation_key])), int(n)


def _check_conditions(screen: Screen, conditions: list[Condition]) -> None:
    if not conditions:
        raise LingshuError("There must be something to predict", "no condition was given", "Name at least one")
    twice = pd.Series(conditions)[pd.Series(conditions).duplicated()]
    if len(twice):
        names = [condition_name(condition) for condition in twice]
        raise LingshuError("A condition is asked for once", f"more than once: {offenders(names)}", "Add up their n")
    lonely = sorted(
        {"/".join(identity) for identity, _ in conditions if (identity, screen.control) not in screen.cells_of}
    )
    if lonely:
        raise LingshuError(
            "Every identity needs control cells in training",
            f"none for {offenders(lonely)}",
            "Add their control cells to the training file, or leave these identities out",
        )


def _controls(screen: Screen, conditions: list[Condition]) -> dict[Condition, np.ndarray]:
    return {condition: screen.cells_of[condition[0], screen.control] for condition in conditions}


def _same_perturbation(screen: Screen, conditions: list[Condition]) -> dict[Condition, np.ndarray]:
    def cells(wanted: Condition) -> list[np.ndarray]:
        return [rows for (_, perturbation), rows in screen.cells_of.items() if perturbation == wanted[1]]

    return _pooled(conditions, cells, "cells of the perturbation in another identity", "additive or ridge")


def _same_identity(screen: Screen, conditions: list[Condition]) -> dict[Condition, np.ndarray]:
    def cells(wanted: Condition) -> list[np.ndarray]:
        others = {screen.control, wanted[1]}
        return [rows for (identity, p), rows in screen.cells_of.items() if identity == wanted[0] and p not in others]

    return _pooled(conditions, cells, "cells of the identity under another perturbation", "perturbation_mean")


def _pooled(
    conditions: list[Condition], cells: Callable[[Condition], list[np.ndarray]], needed: str, instead: str
) -> dict[Condition, np.ndarray]:
    found = {condition: cells(condition) for condition in conditions}
    without = [condition_name(condition) for condition, rows in found.items() if not rows]
    if without:
        raise LingshuError(
            f"This baseline needs training {needed}",
            f"there are none for {offenders(without)}",
            f"Take another baseline for them, such as {instead}",
        )
    return {condition: np.concatenate(rows) for condition, rows in found.items()}


def _labels_of(wanted: list[tuple[Condition, int]], identity_keys: list[str], perturbation_key: str) -> pd.DataFrame:
    rows = [(*identity, perturbation) for (identity, perturbation), n in wanted for _ in range(n)]
    obs = pd.DataFrame(rows, columns=[*identity_keys, perturbation_key])
    return obs.astype("category").set_axis([f"predicted_{i}" for i in range(len(obs))])


def _effects(
    name: str, screen: Screen, conditions: list[Condition], embeddings: pd.DataFrame | None
) -> dict[Condition, np.ndarray]:
    if name == "additive":
        return additive_effects(screen, conditions)
    return (ridge_effects if name == "ridge" else nearest_effects)(screen, conditions, embeddings)


def _provenance(
    name: str, screen: Screen, labels: Mapping[str, Any], embeddings: pd.DataFrame | None, seed: int
) -> dict[str, Any]:
    versions = package_versions()
    return {
        "what": f"cells predicted by the baseline {name} ({BASELINES[name]}); X holds integer counts",
        "baseline": name,
        **labels,
        "target_sum": TARGET_SUM,
        "pseudocount": PSEUDOCOUNT,
        "embeddings": "none" if embeddings is None else f"{embeddings.shape[0]} rows x {embeddings.shape[1]} columns",
        "seed": seed,
        "training": screen.cells.source,
        "training_fingerprint": screen.cells.fingerprint,
        "versions": {key: str(versions[key]) for key in ("lingshu-cell", "numpy", "scipy", "scikit-learn")},
    }


def _digest(condition: Condition) -> int:
    text = json.dumps([list(condition[0]), condition[1]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
