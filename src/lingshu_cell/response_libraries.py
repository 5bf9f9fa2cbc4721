"""Run cell-eval and cell-eval2 on the cells drawn for one identity, and sum up what they say of all identities."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import pandas as pd

from lingshu_cell.metrics import cell_eval, cell_eval2
from lingshu_cell.response_samples import CEILING, Drawn, Protocol

_NUMBERS = re.compile(r"[\d.]+(e-?\d+)?")


def judge_with_cell_eval(identity: Drawn, genes: pd.Index, protocol: Protocol, threads: int) -> pd.DataFrame:
    """Run cell-eval on the prediction and on other real cells of one identity.

    Parameters
    ----------
    identity
        Its cells, at least one perturbation.
    genes
        Names of the genes.
    protocol
        Label of control cells, and whether there is a ceiling.
    threads
        Threads of the tests.

    Returns
    -------
    One row per perturbation, columns as in conditions.csv.
    """
    options = {"control": protocol.control, "threads": threads}
    truth, judged = (identity.stack(role, protocol.control)[1:] for role in ("truth", "judged"))
    found = cell_eval.cell_eval_metrics(truth, judged, genes, **options)
    ceiling = None
    if protocol.ceiling:
        other = identity.stack("ceiling", protocol.control)[1:]
        ceiling = cell_eval.cell_eval_metrics(truth, other, genes, **options, real_de=found.real_de).metrics
    return _table(identity.identity, found.metrics, ceiling, "cell_eval")


def judge_with_cell_eval2(
    identity: Drawn, genes: pd.Index, protocol: Protocol, threads: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run cell-eval2 on the prediction and on other real cells of one identity, and on its baseline where there is one.

    Parameters
    ----------
    identity, genes, protocol, threads
        As in :func:`judge_with_cell_eval`.

    Returns
    -------
    One row per perturbation, columns as in conditions.csv, and ``overall``, ``ceiling_overall``, ``baseline`` and
    ``scores`` of the identity; the last two need several perturbations and a ceiling.
    """
    options = {"control": protocol.control, "threads": threads}
    truth, judged = (identity.stack(role, protocol.control)[::2] for role in ("truth", "judged"))
    found, ceiling = cell_eval2.cell_eval2_metrics(truth, judged, genes, **options), None
    record: dict[str, Any] = {"overall": found.overall}
    if protocol.ceiling:
        other = cell_eval2.cell_eval2_metrics(truth, identity.stack("ceiling", protocol.control)[::2], genes, **options)
        ceiling, record[f"{CEILING}overall"] = other.metrics, other.overall
        if len(identity.samples) > 1:
            record["baseline"] = cell_eval2.mean_response_baseline(truth, genes, **options, seed=protocol.seed)
            record["scores"] = cell_eval2.anchored_scores(found.overall, record["baseline"], other.overall)
    return _table(identity.identity, found.metrics, ceiling, "cell_eval2"), record


def cell_eval_record(tables: Sequence[pd.DataFrame], baseline: dict[str, float | None] | None) -> dict[str, Any]:
    """Average cell-eval's metrics over all conditions, and score them against a baseline.

    Parameters
    ----------
    tables
        What :func:`judge_with_cell_eval` gave for each identity.
    baseline
        ``mean`` of the record of a baseline, or None.

    Returns
    -------
    ``mean`` and ``ceiling_mean`` over conditions, ``identities`` with the mean of each, and with a baseline
    ``average_score`` and ``ceiling_average_score``.
    """
    table, names = pd.concat(tables, ignore_index=True), [*cell_eval.SEVEN, "pds_paper"]
    record: dict[str, Any] = {}
    for prefix in ("", CEILING):
        record[f"{prefix}mean"] = _means(table, names, f"{prefix}cell_eval_")
        if baseline is not None:
            record[f"{prefix}average_score"] = cell_eval.average_score(record[f"{prefix}mean"], baseline)
    record["identities"] = {i: _means(part, names, "cell_eval_") for i, part in table.groupby("identity")}
    return record


def cell_eval2_record(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Average cell-eval2's values over identities.

    Parameters
    ----------
    records
        What :func:`judge_with_cell_eval2` gave for each identity, by name.

    Returns
    -------
    ``preset``, the means, and ``identities`` with the values of each.
    """
    names, parts = list(cell_eval2.SIX), ("overall", f"{CEILING}overall", "baseline", "scores")
    means = {part: _means(pd.DataFrame([found.get(part, {}) for found in records.values()]), names) for part in parts}
    return {"preset": cell_eval2.PRESET, **means, "identities": records}


def _table(identity: str, found: pd.DataFrame, ceiling: pd.DataFrame | None, library: str) -> pd.DataFrame:
    table = found.set_index("perturbation").add_prefix(f"{library}_")
    if ceiling is not None:
        table = table.join(ceiling.set_index("perturbation").add_prefix(f"{CEILING}{library}_"))
    return table.reset_index().assign(identity=identity)


def _means(table: pd.DataFrame, names: Sequence[str], prefix: str = "") -> dict[str, float | None]:
    """Average columns over the rows that have them; None where no row has."""
    values = {name: pd.to_numeric(table[prefix + name], errors="coerce") for name in names if prefix + name in table}
    return {name: float(x.mean()) if x.notna().any() else None for name, x in values.items()}


@contextmanager
def quiet(library: str, kept: list[str]) -> Iterator[None]:
    """Keep a library's warnings for the record, the first of each kind, and its progress bars off the screen.

    pdex and cell-eval draw a bar for every loop and have no setting for it; both log the same warnings per identity.
    """
    from tqdm import tqdm

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = f"{library}: {record.getMessage()}"
            if _NUMBERS.sub("", text) not in {_NUMBERS.sub("", known) for known in kept}:
                kept.append(text)

    handler, source, bar = Keep(logging.WARNING), logging.getLogger(library), tqdm.__init__
    propagate = source.propagate
    source.addHandler(handler)
    source.propagate, tqdm.__init__ = False, partialmethod(bar, disable=True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        source.removeHandler(handler)
        source.propagate, tqdm.__init__ = propagate, bar
    kept.extend(dict.fromkeys(f"{library}: {w.category.__name__}: {w.message}" for w in warned))
