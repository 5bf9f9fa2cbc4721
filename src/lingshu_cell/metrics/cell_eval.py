"""The seven metrics of cell-eval (Arc Institute, 2025), computed by that library."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.errors import LingshuError, offenders

SEVEN = {
    "des": "overlap_at_N",
    "pds": "discrimination_score_l1",
    "mae": "mae",
    "spearman_n_de": "de_spearman_sig",
    "spearman_lfc": "de_spearman_lfc_sig",
    "auprc": "pr_auc",
    "pearson_delta": "pearson_delta",
}
"""Our names of the seven metrics, and cell-eval's."""

LOWER_IS_BETTER = frozenset({"mae"})
_LEAST_PERTURBATIONS = {"pds": 2, "spearman_n_de": 3}  # with fewer, the value says nothing about the prediction
_LOG_CEILING = 15.0
_KEY = "perturbation"


@dataclass(frozen=True, eq=False)
class CellEvalResult:
    """One row per perturbation with the seven metrics (NaN = undefined), and cell-eval's DE table of the real cells."""

    metrics: pd.DataFrame
    real_de: Any


def require_cell_eval() -> None:
    """Refuse to go on without cell-eval.

    Raises
    ------
    LingshuError
        If the package is not installed.
    """
    if find_spec("cell_eval") is None:
        raise LingshuError(
            "The metrics of cell-eval need its package",
            "cell_eval is not installed",
            'Install it with: pip install "lingshu-cell[responses]", or do without (use_cell_eval=False)',
        )


def cell_eval_metrics(
    real: tuple[sp.csr_matrix, np.ndarray],
    predicted: tuple[sp.csr_matrix, np.ndarray],
    gene_names: pd.Index,
    *,
    control: str,
    real_de: Any = None,
    threads: int = 1,
) -> CellEvalResult:
    """Run cell-eval on one identity: DES, PDS, MAE, Spearman #DEG, Spearman LFC, AUPRC, Pearson-Δ.

    Parameters
    ----------
    real, predicted
        log(1 + counts per target sum), (cells, genes), and the perturbation of every cell, control included. Both sides
        with **one** target sum: cell-eval would normalise integers to each side's own median.
    gene_names
        Names of the genes, unique; a perturbation of that name is left out of its own PDS.
    control
        Label of the control cells.
    real_de
        DE table of the real cells from an earlier call with the same ``real``, to save the time.
    threads
        Threads of the Wilcoxon tests (pdex), at least 1.

    Returns
    -------
    CellEvalResult. ``pds`` is cell-eval's, 1 - rank / N; ``pds_paper`` is the preprint's, 1 - 2 rank / N. With one
    perturbation PDS, and with fewer than three Spearman #DEG, are undefined.

    Raises
    ------
    LingshuError
        If cell-eval is missing, the two sides have different labels, or values are not logarithms.
    """
    require_cell_eval()
    from cell_eval import MetricsEvaluator
    from cell_eval.metrics import metrics_registry

    _check_sides(real, predicted, control)
    pair = [_anndata(*real, gene_names, "real"), _anndata(*predicted, gene_names, "predicted")]
    unwanted = [name for name in metrics_registry.list_metrics() if name not in SEVEN.values()]
    with tempfile.TemporaryDirectory() as folder:
        evaluator = MetricsEvaluator(
            adata_pred=pair[1],
            adata_real=pair[0],
            de_real=real_de,
            control_pert=control,
            pert_col=_KEY,
            num_threads=threads,
            outdir=str(Path(folder) / "cell-eval"),
        )
        found, _ = evaluator.compute(skip_metrics=unwanted, write_csv=False, break_on_error=True)
    table = pd.DataFrame(found.to_dicts())
    columns = {ours: pd.to_numeric(table[theirs], errors="coerce") for ours, theirs in SEVEN.items() if theirs in table}
    metrics = pd.DataFrame({_KEY: table["perturbation"].astype(str), **columns}).reindex(columns=[_KEY, *SEVEN])
    for name, least in _LEAST_PERTURBATIONS.items():
        if len(metrics) < least:
            metrics[name] = np.nan
    metrics["pds_paper"] = 2.0 * metrics["pds"] - 1.0
    return CellEvalResult(metrics, evaluator.de_comparison.real.data)


def average_score(user: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> dict[str, Any]:
    """Score the seven metrics against a baseline: 0 = no better than it, 1 = perfect.

    max(0, (u - b) / (1 - b)), and for MAE max(0, (b - u) / b); a metric undefined on either side is left out of the
    average, and one in which the baseline is already perfect scores 0 (both as the sums of cell-eval do for what they
    cannot divide).

    Parameters
    ----------
    user, baseline
        Mean of each of the seven metrics over perturbations; None = undefined. The baseline of the literature predicts
        the mean over all perturbed training cells.

    Returns
    -------
    ``average`` (None when no metric is defined), ``scores`` by metric, and ``left_out``, the undefined metrics.
    """
    scores: dict[str, float] = {}
    for name in SEVEN:
        u, b = user.get(name), baseline.get(name)
        if u is None or b is None or not np.isfinite([u, b]).all():
            continue
        gain, room = (b - u, b) if name in LOWER_IS_BETTER else (u - b, 1.0 - b)
        scores[name] = max(0.0, gain / room) if room > 0 else 0.0
    return {
        "average": float(np.mean(list(scores.values()))) if scores else None,
        "scores": scores,
        "left_out": [name for name in SEVEN if name not in scores],
    }


def _check_sides(
    real: tuple[sp.csr_matrix, np.ndarray], predicted: tuple[sp.csr_matrix, np.ndarray], control: str
) -> None:
    labels = [set(side[1]) for side in (real, predicted)]
    if labels[0] != labels[1] or control not in labels[0]:
        raise LingshuError(
            "Both sides need the same perturbations and the control",
            f"only on one side: {offenders(sorted(labels[0] ^ labels[1]))}; control {control!r}",
            "Keep the perturbations both have, and add control cells to both",
        )
    values = np.concatenate([side[0].data for side in (real, predicted)])
    if values.size and (values.min() < 0 or values.max() >= _LOG_CEILING):
        raise LingshuError(
            "cell-eval takes log(1 + normalised counts)",
            f"values from {values.min():.4g} to {values.max():.4g}",
            "Normalise both sides to one target sum and take log1p",
        )


def _anndata(expression: sp.csr_matrix, labels: np.ndarray, gene_names: pd.Index, side: str) -> Any:
    import anndata as ad

    obs = pd.DataFrame({_KEY: labels.astype(str)}, index=[f"{side}{i}" for i in range(len(labels))])
    return ad.AnnData(expression.astype(np.float32), obs=obs, var=pd.DataFrame(index=gene_names.astype(str)))
