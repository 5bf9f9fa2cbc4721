"""The metrics of the Virtual Cell Challenge 2026, computed by cell-eval2 (Arc Institute)."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.errors import LingshuError

SIX = {
    "pds_cosine": "pds_cosine",
    "mse_norm": "expr_mse_unbiased_capped_norm",
    "direction_fidelity": "de_wilcoxon_direction_fidelity_yield_raw",
    "direction_reach": "de_wilcoxon_direction_reach_raw",
    "jaccard": "de_wilcoxon_sig_jaccard",
    "lfc_nmae": "de_wilcoxon_lfc_nmae",
}
"""Our names of the six scored metrics, and cell-eval2's; mse_norm is one number over all perturbations."""

LOWER_IS_BETTER = frozenset({"mse_norm", "lfc_nmae"})
PRESET = "vcc2026"
_KEY = "perturbation"
_LEAST_ROOM = 0.02  # between baseline and replicate: with less, a score is their noise divided by itself


@dataclass(frozen=True, eq=False)
class CellEval2Result:
    """One row per perturbation (NaN = undefined), and each of the six over all of them (None = undefined)."""

    metrics: pd.DataFrame
    overall: dict[str, float | None]


def require_cell_eval2() -> None:
    """Refuse to go on without cell-eval2 and pdex, its engine on CPUs.

    Raises
    ------
    LingshuError
        If a package is not installed.
    """
    absent = [name for name in ("cell_eval2", "pdex") if find_spec(name) is None]
    if absent:
        raise LingshuError(
            "The metrics of cell-eval2 need its package",
            f"not installed: {', '.join(absent)}",
            'Install it with: pip install "lingshu-cell[responses]", or do without (use_cell_eval2=False)',
        )


def cell_eval2_metrics(
    real: tuple[sp.csr_matrix, np.ndarray],
    predicted: tuple[sp.csr_matrix, np.ndarray],
    gene_names: pd.Index,
    *,
    control: str,
    threads: int = 1,
) -> CellEval2Result:
    """Run cell-eval2 with preset vcc2026 on one identity, differential expression by pdex on the CPU.

    The preset measures every response from the real control cells. A perturbation named like a gene loses that gene in
    PDS, as in the challenge; for every other label the library is told that it has no target gene.

    Parameters
    ----------
    real, predicted
        Raw integer counts, (cells, genes), at most 10⁶ per cell, and the perturbation of every cell, control included.
    gene_names
        Names of the genes, unique.
    control
        Label of the control cells.
    threads
        Threads, at least 1.

    Returns
    -------
    CellEval2Result; PDS is undefined with one perturbation.

    Raises
    ------
    LingshuError
        If cell-eval2 or pdex is missing.
    """
    require_cell_eval2()
    import cell_eval2
    from cell_eval2.run import metric_output_names

    config = _config(real[1], gene_names, control, threads)
    pair = [_anndata(*predicted, gene_names, "predicted"), _anndata(*real, gene_names, "real")]
    found = cell_eval2.compute_metrics(*pair, config=config)
    overall = cell_eval2.aggregate_metrics(found, metrics=metric_output_names(config))
    table = pd.DataFrame(found.to_dicts()).pivot(index="perturbation", columns="metric", values="value")
    per_perturbation = [ours for ours in SIX if ours != "mse_norm"]
    metrics = pd.DataFrame({ours: table.get(SIX[ours], np.nan) for ours in per_perturbation}, index=table.index)
    totals = {row["metric"]: row["mean"] for row in overall.to_dicts()}
    values = {ours: _finite(totals.get(theirs)) for ours, theirs in SIX.items()}
    if len(metrics) < 2:
        metrics["pds_cosine"], values["pds_cosine"] = np.nan, None
    return CellEval2Result(metrics.rename_axis(_KEY).reset_index(), values)


def mean_response_baseline(
    real: tuple[sp.csr_matrix, np.ndarray], gene_names: pd.Index, *, control: str, threads: int = 1, seed: int = 0
) -> dict[str, float | None]:
    """Score cell-eval2's own baseline, cells that all show the mean response of the real perturbations.

    Parameters
    ----------
    real, gene_names, control, threads
        As in :func:`cell_eval2_metrics`; at least two perturbations.
    seed
        Random state of the baseline's cells.

    Returns
    -------
    Value of each of the six metrics; None = undefined.
    """
    require_cell_eval2()
    import cell_eval2

    config = _config(real[1], gene_names, control, threads)
    result = cell_eval2.build_generic_baseline(
        _anndata(*real, gene_names, "real"), config=config, seed=seed, allow_degenerate=True
    )
    means = next(row for row in result.agg.to_dicts() if row["statistic"] == "mean")
    return {ours: _finite(means.get(theirs)) for ours, theirs in SIX.items()}


def anchored_scores(
    user: dict[str, float | None], baseline: dict[str, float | None], replicate: dict[str, float | None]
) -> dict[str, float | None]:
    """Place values between the mean-response baseline (0) and a replicate of the experiment (1).

    s = (u - b) / (r - b); above 1 is better than the replicate, below 0 worse than the baseline.

    Parameters
    ----------
    user, baseline, replicate
        Values of the six metrics of the prediction, of the baseline and of other real cells; None = undefined.

    Returns
    -------
    Score by metric; None where a value is undefined or the replicate is hardly better than the baseline.
    """
    scores: dict[str, float | None] = {}
    for name in SIX:
        u, b, r = user.get(name), baseline.get(name), replicate.get(name)
        defined = u is not None and b is not None and r is not None
        room = (b - r if name in LOWER_IS_BETTER else r - b) if defined else 0.0
        degenerate = name in LOWER_IS_BETTER and defined and b <= 0  # an unbiased error may fall below 0 by noise
        scores[name] = (u - b) / (r - b) if room >= _LEAST_ROOM and not degenerate else None
    return scores


def _config(labels: np.ndarray, gene_names: pd.Index, control: str, threads: int) -> Any:
    from cell_eval2 import EvalConfig

    config = EvalConfig.from_preset(PRESET)
    no_gene = {str(name): None for name in sorted(set(labels) - {control}) if name not in gene_names}
    return replace(
        config,
        pert_col=_KEY,
        control=control,
        num_threads=threads,
        device="cpu",
        de=replace(config.de, backend="pdex"),
        target_gene_map=no_gene or None,
    )


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _anndata(counts: sp.csr_matrix, labels: np.ndarray, gene_names: pd.Index, side: str) -> Any:
    import anndata as ad

    obs = pd.DataFrame({_KEY: labels.astype(str)}, index=[f"{side}{i}" for i in range(len(labels))])
    return ad.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=gene_names.astype(str)))
