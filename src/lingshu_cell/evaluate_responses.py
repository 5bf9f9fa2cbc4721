"""Judge predicted responses to perturbations against measured ones, from files, whatever model made them."""

import logging
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_json
from lingshu_cell.metrics import cell_eval, cell_eval2, depth, embedding, folder, responses
from lingshu_cell.metrics.clock import Clock
from lingshu_cell.response_libraries import (
    cell_eval2_record,
    cell_eval_record,
    judge_with_cell_eval,
    judge_with_cell_eval2,
    quiet,
)
from lingshu_cell.response_samples import (
    CEILING,
    LEAST_CELLS,
    Condition,
    Controls,
    Group,
    Protocol,
    Sample,
    Sides,
    aligned_counts,
    called,
    check_conditions,
    divide_controls,
    draw,
    read_side,
    refuse_training_cells,
)

RECORD = "responses.json"
TABLE = "conditions.csv"

_PACKAGES = ("cell-eval", "cell-eval2", "pdex", "polars")
_SETTING_FILES = ("real", "training")  # files that decide, with the protocol, which real cells are compared
_COMPONENTS = 50
_MOST_CELLS_PCA = 10_000
_LEAST_CELLS_PCA = 20
_SLOPE_SPLITS = 10
_LEAST_GENES_SLOPE = 2 * _SLOPE_SPLITS * 5  # changed genes: five in each split, on average
_PSEUDOCOUNT = 2.5e-5  # of the target sum: 0.25 in 10,000 counts
_PERMUTATIONS = 999

Source = Path | str | ad.AnnData

logger = logging.getLogger("lingshu_cell")


@dataclass(frozen=True, eq=False)
class _Judges:
    """Which libraries to run, on which genes, with how many threads; cell-eval's means of a baseline."""

    genes: pd.Index
    cell_eval: bool
    cell_eval2: bool
    threads: int
    baseline: dict[str, float | None] | None


@folder.holding_output
def evaluate_responses(
    real: Source,
    predicted: Source,
    out: Path | str,
    *,
    perturbation_key: str,
    control: str,
    identity_key: str | None = None,
    training: Source | None = None,
    layer: str | None = None,
    predicted_layer: str | None = None,
    target_sum: float = 1e4,
    use_cell_eval: bool = True,
    use_cell_eval2: bool = True,
    use_predicted_controls: bool = False,
    split_controls: bool = True,
    ceiling: bool = True,
    only_predicted: bool = False,
    baseline: Path | str | None = None,
    threads: int = 1,
    seed: int = 0,
    max_cells_per_condition: int = 500,
) -> dict:
    """Compare predicted with measured responses, condition by condition, and write the numbers into a folder.

    A condition is a perturbation in one identity (cell type, line, donor). Which cells go where: the real cells of a
    condition are halved at random; the first half is the *truth*, and m cells of the second half are the *ceiling*:
    they stand in for the prediction and show what a perfect model can reach with so many cells; m random predicted
    cells are *judged*. m = min(half of the real cells, predicted cells, ``max_cells_per_condition``). The real control
    cells of each identity are halved as well: the truth's change is measured from one half, that of the prediction and
    of the ceiling from the other, for the noise of shared control cells would look like agreement.

    Parameters
    ----------
    real
        Held-out real cells, perturbed and control, raw counts (h5ad, zarr or AnnData).
    predicted
        Predicted cells, raw counts of the same genes in any order. Control cells in it are judged for false
        differential expression and otherwise left aside (see ``use_predicted_controls``).
    out
        Folder to write responses.json and conditions.csv into; created when absent.
    perturbation_key, control
        obs column of perturbations, and its value for unperturbed cells.
    identity_key
        obs column of identities; None = all cells are of one.
    training
        Training cells. The PCA of the energy distance is fitted on them, and real control cells that are not among them
        stand behind the truth where there are enough of both kinds. None = the PCA is fitted on a fifth of the real
        control cells, which are left out elsewhere.
    layer, predicted_layer
        Layer of the counts in the real and training data, and in the prediction; None = ``X``.
    target_sum
        Counts per cell after normalisation of either side, before log1p; above 0.
    use_cell_eval, use_cell_eval2
        Whether to run these libraries (extra ``responses``); once per identity, with the same cells as above.
    use_predicted_controls
        Measure the prediction's change from its own control cells instead of real ones.
    split_controls, ceiling
        False for the protocol of the challenges: all control cells on both sides; all real cells as the truth and no
        ceilings. The slope is measured with split cells in any case.
    only_predicted
        Leave out real conditions that the prediction does not have, instead of refusing.
    baseline
        Folder of an evaluation of a baseline's cells, on the same real data and settings, for the average score.
    threads
        Threads for the tests of the two libraries, at least 1.
    seed
        Random state of every choice of cells and every permutation.
    max_cells_per_condition
        Most cells of each group in a comparison, at least 20.

    Returns
    -------
    The content of responses.json: ``summary``, ``cell_eval``, ``cell_eval2``, ``controls``, ``notes``, ``settings``, …

    Raises
    ------
    LingshuError
        If a file is refused, genes or conditions differ, control cells are missing, the real perturbed cells are
        training cells, a library is not installed, or ``baseline`` does not fit.
    """
    out, clock = Path(out), Clock()
    protocol = Protocol(
        perturbation_key, control, identity_key, target_sum, max_cells_per_condition, ceiling, split_controls,
        use_predicted_controls, seed,
    )  # fmt: skip
    _check_arguments(out, protocol, threads, use_cell_eval, use_cell_eval2)
    with clock.time("read"):
        keys = [perturbation_key] if identity_key is None else [identity_key, perturbation_key]
        files = {"real": read_counts(real, layer, keys), "predicted": read_counts(predicted, predicted_layer, keys)}
        if training is not None:
            files["training"] = read_counts(training, layer)
        genes = files["real"].gene_names
        sides = Sides(*(read_side(files[name], genes, name, protocol) for name in ("real", "predicted")))
        conditions = check_conditions(sides, protocol, only_predicted)
        reference = None if training is None else aligned_counts(files["training"], genes, "training")
        prints = {f"{name}_fingerprint": files[name].fingerprint if name in files else None for name in _SETTING_FILES}
        settings = asdict(protocol) | prints
        compared_with = None if baseline is None else _read_baseline(Path(baseline), settings)
        copies = None if reference is None else refuse_training_cells(sides.real, conditions, reference)
    judges = _Judges(genes, use_cell_eval, use_cell_eval2, threads, compared_with)
    table, found = _judge_all(sides, conditions, reference, protocol, judges, clock)
    record = {
        **found,
        "settings": settings,
        "n": {
            "conditions": len(conditions),
            "identities": len({identity for identity, _ in conditions}),
            "genes": len(genes),
        },
        "real_perturbed_cells_also_in_training": copies,
        "pca": "training cells" if reference is not None else "a fifth of the real control cells, left out elsewhere",
        "versions": folder.package_versions() | {name: _version(name) for name in _PACKAGES},
        "files": {n: {"source": x.source, "cells": x.n_cells, "fingerprint": x.fingerprint} for n, x in files.items()},
        "provenance": folder.provenance(Path(predicted)) if isinstance(predicted, (str, Path)) else None,
        "seconds": clock.seconds,
    }
    folder.write_folder(out, {TABLE: table}, {RECORD: record})
    return folder.plain(record)


def _check_arguments(out: Path, protocol: Protocol, threads: int, use_cell_eval: bool, use_cell_eval2: bool) -> None:
    if not 0 < protocol.target_sum < float("inf"):
        raise LingshuError(
            "target_sum must be above 0", f"it is {protocol.target_sum}", "Use e.g. 10000 counts per cell"
        )
    least = 2 * LEAST_CELLS
    if protocol.max_cells_per_condition < least:
        raise LingshuError(
            f"max_cells_per_condition must be at least {least}",
            f"it is {protocol.max_cells_per_condition}",
            "Use e.g. 500 cells",
        )
    if threads < 1:
        raise LingshuError("threads must be at least 1", f"it is {threads}", "Use e.g. 1")
    if use_cell_eval:
        cell_eval.require_cell_eval()
    if use_cell_eval2:
        cell_eval2.require_cell_eval2()


def _read_baseline(path: Path, settings: dict) -> dict[str, float | None]:
    """Read cell-eval's means of a baseline, and refuse an evaluation that judged against other cells."""
    file = path / RECORD if path.is_dir() else path
    remedy = "Evaluate the baseline's cells with the same real data and settings, and pass that folder"
    record = read_json(file, f"The baseline must be a folder with {RECORD}", remedy)
    if not isinstance(record.get("cell_eval"), dict) or not isinstance(record["cell_eval"].get("mean"), dict):
        raise LingshuError("The baseline must have been judged by cell-eval", f"{file} has no cell_eval", remedy)
    theirs = record["settings"] if isinstance(record.get("settings"), dict) else {}
    differing = [name for name, value in folder.plain(settings).items() if theirs.get(name) != value]
    if differing:
        raise LingshuError(
            "The baseline must be judged against the same cells", f"different: {offenders(differing)}", remedy
        )
    return record["cell_eval"]["mean"]


def _judge_all(
    sides: Sides,
    conditions: list[Condition],
    reference: sp.csr_matrix | None,
    protocol: Protocol,
    judges: _Judges,
    clock: Clock,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Judge identity by identity, so that only the cells of one are held beside the files."""
    identities = sorted({identity for identity, _ in conditions})
    aside, rows = divide_controls(sides.real, identities, protocol, reference)
    with clock.time("pca"):
        space = _fit_space(sides.real.counts[aside] if reference is None else reference, protocol)
    table, controls, slopes, warned = [], {}, {}, []
    tables: dict[str, list[pd.DataFrame]] = {"cell_eval": [], "cell_eval2": []}
    records: dict[str, dict] = {}
    for name in identities:
        logger.info("evaluate responses: %s", name or "all cells")
        perturbations = [p for i, p in conditions if i == name]
        with clock.time("draw"):
            drawn = draw(sides, name, rows[name], perturbations, protocol)
        with clock.time("control cells"):
            controls[name] = _judge_controls(drawn.controls)
        for p in perturbations:
            row = {key: controls[name][key] for key in ("false_de_rate", f"{CEILING}false_de_rate")}
            if p in drawn.samples:
                rng = protocol.rng("judge", name, p)
                values, slopes[name, p] = _judge(drawn.samples[p], drawn.controls, space, protocol, rng, clock)
                row = values | row
            counted = {"n_real": len(sides.real.rows[name, p]), "n_predicted": len(sides.predicted.rows[name, p])}
            table.append({"identity": name, "perturbation": p, **counted, **row})
        if judges.cell_eval and drawn.samples:
            with clock.time("cell_eval"), quiet("cell_eval", warned):
                tables["cell_eval"].append(judge_with_cell_eval(drawn, judges.genes, protocol, judges.threads))
        if judges.cell_eval2 and drawn.samples:
            with clock.time("cell_eval2"), quiet("cell_eval2", warned):
                found, records[name] = judge_with_cell_eval2(drawn, judges.genes, protocol, judges.threads)
                tables["cell_eval2"].append(found)
    if not slopes:
        raise LingshuError(
            f"Judging needs {LEAST_CELLS} cells on each side of a comparison",
            f"too few in every condition: {offenders(called(condition) for condition in conditions)}",
            "Predict more cells, or measure with more real ones",
        )
    frame = pd.DataFrame(table)
    summary, notes = _summary(frame, slopes), _notes(frame, controls, sides, space is not None, protocol)
    for of_library in filter(None, tables.values()):
        frame = frame.merge(pd.concat(of_library), how="left", on=["identity", "perturbation"])
    return frame, {
        "summary": summary,
        "cell_eval": cell_eval_record(tables["cell_eval"], judges.baseline) if tables["cell_eval"] else None,
        "cell_eval2": cell_eval2_record(records) if records else None,
        "controls": controls,
        "notes": notes,
        "library_warnings": warned,
    }


def _fit_space(reference: sp.csr_matrix, protocol: Protocol) -> embedding.PcaSpace | None:
    """Fit the PCA on cells that are in no comparison; None when there are too few."""
    if reference.shape[0] < _LEAST_CELLS_PCA:
        return None
    fitted = np.sort(protocol.rng("pca").permutation(reference.shape[0])[:_MOST_CELLS_PCA])
    counts = reference[fitted]
    genes = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 3)
    return embedding.fit_pca(counts, genes, protocol.target_sum, _COMPONENTS, protocol.seed) if len(genes) > 2 else None


def _judge_controls(controls: Controls) -> dict[str, Any]:
    """Share of genes in which generated control cells differ from real ones, and real from real, equally many."""
    result = {
        "n_truth": controls.truth.n,
        "n_judged": controls.judged.n,
        "training_cells_behind_the_truth": None if controls.unseen is None else not controls.unseen,
        "generated_are_copies": controls.copied,
        "n_generated": 0 if controls.generated is None else controls.generated.n,
    }
    names = ("n_generated_judged", "false_de_rate", f"{CEILING}false_de_rate", "n_genes_tested")
    if controls.generated is None:
        return result | dict.fromkeys(names)
    truth, other = (half.expression for half in controls.halves)
    n = min(controls.generated.n, other.shape[0])
    test = responses.rank_sum_test(truth, controls.generated.expression[:n])
    real = responses.rank_sum_test(truth, other[:n])
    return result | dict(zip(names, (n, test.rate, real.rate, int(test.tested.sum())), strict=True))


def _judge(
    sample: Sample,
    controls: Controls,
    space: embedding.PcaSpace | None,
    protocol: Protocol,
    rng: np.random.Generator,
    clock: Clock,
) -> tuple[dict[str, Any], dict[str, responses.SlopeSums]]:
    """Compute our own metrics of one condition; also the sums of its slopes."""
    with clock.time("slope"):
        slopes = _slopes(sample, controls, protocol.target_sum, rng)
    with clock.time("differential expression"):
        truth_de = responses.rank_sum_test(sample.truth.expression, controls.truth.expression)
    result: dict[str, Any] = {
        "n_truth": sample.truth.n,
        "n_judged": sample.judged.n,
        "n_controls": controls.judged.n,
        "n_de_real": truth_de.n_significant,
    }
    if space is not None:
        with clock.time("energy distance"):
            places = {
                name: space.project(g.counts) for name, g in (("truth", sample.truth), ("control", controls.truth))
            }
            effect, p_value = responses.energy_test(places["truth"], places["control"], _PERMUTATIONS, rng)
        result |= {"e_distance_effect": effect, "e_test_effect_p": p_value}
    for prefix, judged, control in (
        ("", sample.judged, controls.judged),
        (CEILING, sample.ceiling, controls.ceiling),
    ):
        if judged is None:
            continue
        found = _compare(sample.truth, judged, controls.truth, control)
        with clock.time("differential expression"):
            found["n_de_predicted"] = responses.rank_sum_test(judged.expression, control.expression).n_significant
        found["lfc_slope"] = _slope(slopes[prefix])
        if space is not None:
            with clock.time("energy distance"):
                place = space.project(judged.counts)
                found["e_distance"], found["e_test_p"] = responses.energy_test(
                    places["truth"], place, _PERMUTATIONS, rng
                )
        result |= {f"{prefix}{name}": value for name, value in found.items()}
    result["lfc_slope_strength"] = slopes[""].strength
    result["lfc_slope_genes"] = slopes[""].n_genes / (2 * _SLOPE_SPLITS)
    return result, slopes


def _compare(truth: Group, judged: Group, truth_control: Group, judged_control: Group) -> dict[str, float | None]:
    """Compare means and library sizes of the two sides."""
    measured, predicted = truth.statistics.mean_log, judged.statistics.mean_log
    deltas = measured - truth_control.statistics.mean_log, predicted - judged_control.statistics.mean_log
    log_umi = [depth.measure_depth(group.counts).log_umi for group in (judged, truth)]
    return {
        **responses.compare_differences(*deltas),
        "mae_log1p": responses.mean_absolute_error(measured, predicted),
        "mae_delta": responses.mean_absolute_error(*deltas),
        "sd_log_umi_ratio": depth.spread_ratio(*log_umi),
        "mean_log_umi_difference": float(log_umi[0].mean() - log_umi[1].mean()),
    }


def _slopes(
    sample: Sample, controls: Controls, target_sum: float, rng: np.random.Generator
) -> dict[str, responses.SlopeSums]:
    """Sums for the fold-change slope of the prediction and of other real cells, by prefix, over ten random splits.

    In each split half of the truth is the instrument and chooses the genes, the other half is the measurement, and then
    the other way round. The control cells behind the truth are halved alike; those of the prediction are others.
    """
    pseudocount, (base, other_base) = _PSEUDOCOUNT * target_sum, controls.halves
    own = controls.generated is not None and controls.judged is controls.generated
    sides = {"": (sample.judged, controls.judged if own else other_base), CEILING: (sample.ceiling, other_base)}
    changes = {
        prefix: responses.log2_fold_change(group.statistics, control.statistics, pseudocount)
        for prefix, (group, control) in sides.items()
        if group is not None
    }
    sums = dict.fromkeys(changes, responses.SlopeSums())
    enough = min(sample.truth.n, base.n) >= 2 * LEAST_CELLS
    for _ in range(_SLOPE_SPLITS if enough else 0):
        halves = [_halves(group.expression, rng) for group in (sample.truth, base)]
        measured = [responses.log2_fold_change(*pair, pseudocount) for pair in zip(*halves, strict=True)]
        for z, x in ((0, 1), (1, 0)):
            genes = responses.changed_genes(halves[0][z], halves[1][z])
            for prefix, y in changes.items():
                sums[prefix] += responses.slope_sums(measured[z], measured[x], y, genes)
    return sums


def _slope(sums: responses.SlopeSums | None) -> float | None:
    return None if sums is None else sums.slope(_LEAST_GENES_SLOPE)


def _halves(expression: sp.csr_matrix, rng: np.random.Generator) -> list[responses.GeneStatistics]:
    parts = np.array_split(rng.permutation(expression.shape[0]), 2)
    return [responses.gene_statistics(expression[part]) for part in parts]


def _summary(table: pd.DataFrame, slopes: dict[Condition, dict[str, responses.SlopeSums]]) -> dict[str, dict[str, Any]]:
    """Average each metric over conditions, beside its ceiling; the slope pooled over conditions as well."""
    found: dict[str, dict[str, Any]] = {}
    for name in table.columns.drop(["identity", "perturbation"]):
        if name.startswith((CEILING, "n_")) and not name.startswith("n_de"):
            continue
        found[name] = {"n": int(table[name].notna().sum())}
        for prefix in ("", CEILING):
            values = pd.to_numeric(table.get(f"{prefix}{name}", pd.Series(dtype=float)), errors="coerce").dropna()
            if len(values):
                found[name] |= {f"{prefix}mean": values.mean(), f"{prefix}median": values.median()}
    for prefix in ("", CEILING):
        pooled = sum((s[prefix] for s in slopes.values() if _slope(s.get(prefix)) is not None), responses.SlopeSums())
        found["lfc_slope"][f"{prefix}pooled"] = _slope(pooled)
        if f"{prefix}e_distance" in table and table["e_distance_effect"].sum() > 0:
            ratio = table[f"{prefix}e_distance"].sum() / table["e_distance_effect"].sum()
            found["e_distance"][f"{prefix}share_of_effect"] = float(ratio)
        counts = [table["n_de_real"], table.get(f"{prefix}n_de_predicted", pd.Series(dtype=float))]
        if len(table) > 2 and all(count.nunique() > 1 for count in counts):
            found["n_de_predicted"][f"{prefix}spearman_with_real"] = counts[0].corr(counts[1], method="spearman")
    return found


def _notes(
    table: pd.DataFrame, controls: dict[str, dict], sides: Sides, with_pca: bool, protocol: Protocol
) -> list[str]:
    """Say what a reader of the numbers has to know about the choices made."""
    label, notes = protocol.control, []
    copied = [name or "all cells" for name, c in controls.items() if c["generated_are_copies"]]
    without = [name or "all cells" for name, c in controls.items() if not c["n_generated"]]
    reference = "real control cells of the same identity"
    if protocol.use_predicted_controls and len(without) < len(controls):
        reference = "its own control cells" + (f" (real ones in {offenders(without)})" if without else "")
    notes.append(f"The change of the prediction is measured from {reference}.")
    if protocol.split_controls:
        notes.append("Truth and prediction are measured from different halves of the real control cells.")
    else:
        notes.append("Truth and prediction share control cells: changes of independent samples correlate too well.")
    if any(c["training_cells_behind_the_truth"] for c in controls.values()):
        notes.append(
            "Control cells behind the truth are training cells: a model that repeats their noise is rated too low "
            "(hold some control cells of every identity out of training)."
        )
    if len(without) == len(controls):
        notes.append(f"The prediction holds no generated {label!r} cells: no false-DE rate.")
    if copied:
        notes.append(f"The control cells of the prediction are copies of real ones in {offenders(copied)}.")
    if not with_pca:
        notes.append(f"No energy distances: fewer than {_LEAST_CELLS_PCA} cells for the PCA.")
    judged = table["n_truth"].notna()
    if not judged.all():
        small = (called(condition) for condition in table.loc[~judged, ["identity", "perturbation"]].to_numpy())
        notes.append(f"Too few cells to be judged: {offenders(small)}.")
    if (table[judged].groupby("identity").size() == 1).any():
        notes.append("PDS compares the perturbations of one identity: undefined where there is only one.")
    left_out = {c for c in sides.real.rows if c[1] != label} - set(
        zip(table["identity"], table["perturbation"], strict=True)
    )
    if left_out:
        notes.append(f"Real conditions without a prediction were left out: {len(left_out)}.")
    return notes


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
