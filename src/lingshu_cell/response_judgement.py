"""What an evaluation of responses says in plain words: each number beside what other real cells reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.judgement import number

LEVELS = (
    (0.95, "Direction right", "good"),
    (0.85, "Direction nearly right", "good"),
    (0.60, "Direction partly right", "close"),
    (0.30, "Direction mostly wrong", "off"),
    (-np.inf, "Direction not predicted", "off"),
)
"""Smallest share of the ceiling of Pearson-Δ, the words for it, and its mark."""

LEAST_CEILING = 0.2
"""Pearson-Δ of other real cells below which there is no response that could be judged."""

SLOPE_GOOD, SLOPE_CLOSE = 0.1, 0.3
FALSE_DE_GOOD, FALSE_DE_CLOSE = 0.01, 0.05
RELATIVE_GOOD, RELATIVE_CLOSE = 0.15, 0.40
ENERGY_GOOD, ENERGY_CLOSE = 0.10, 0.30
_MARKS = ("good", "close", "off")


@dataclass(frozen=True)
class Answer:
    """A question that a user comes with, its answer, and the mark of it (None where there is nothing to judge)."""

    question: str
    text: str
    mark: str | None = None


@dataclass(frozen=True)
class ResponseVerdict:
    """The headline, its tone (``good``, ``close``, ``off`` or ``none``), and answers to what a user asks."""

    level: str
    tone: str
    answers: tuple[Answer, ...]


def direction(value: float | None, ceiling: float | None) -> tuple[str, str | None]:
    """Judge a correlation of changes by the share that it reaches of the ceiling.

    Parameters
    ----------
    value, ceiling
        Pearson-Δ of the prediction and of other real cells, -1…1; None = not measured.

    Returns
    -------
    Words and mark; no mark without a ceiling, or where it is below 0.2.
    """
    if value is None:
        return "Not measured", None
    if ceiling is None:
        return "No verdict: no ceiling was measured", None
    if ceiling < LEAST_CEILING:
        return "No verdict: real cells hardly respond", None
    return next((words, mark) for least, words, mark in LEVELS if value / ceiling >= least)


def effect_size(slope: float | None, ceiling: float | None) -> tuple[str, str | None]:
    """Judge the slope of predicted on measured log fold change: 1 is calibrated.

    Parameters
    ----------
    slope, ceiling
        Slope of the prediction and of other real cells; None = not defined.

    Returns
    -------
    Words and mark; no mark where the slope is not defined, or that of other real cells is not near 1.
    """
    if slope is None:
        return "not known", None
    words = "calibrated" if abs(slope - 1) <= SLOPE_GOOD else "too weak" if slope < 1 else "too strong"
    if ceiling is not None and abs(ceiling - 1) > SLOPE_CLOSE:
        return "not known", None
    return words, within(abs(slope - 1), SLOPE_GOOD, SLOPE_CLOSE)


def within(excess: float | None, good: float, close: float) -> str | None:
    """Mark an excess by two limits; None stays None."""
    if excess is None or not np.isfinite(excess):
        return None
    return _MARKS[int(excess > good) + int(excess > close)]


def relative(value: float | None, ceiling: float | None, *, lower_is_better: bool = False) -> str | None:
    """Mark by how much worse than the ceiling a value is, as a share of the ceiling: good up to 15 %, close up to 40 %.

    Parameters
    ----------
    value, ceiling
        Of the prediction and of other real cells; None = not measured.
    lower_is_better
        Whether the value is an error.

    Returns
    -------
    ``good``, ``close``, ``off``, or None where there is nothing to compare.
    """
    if value is None or ceiling is None or ceiling <= 0:
        return None
    excess = (value - ceiling) if lower_is_better else (ceiling - value)
    return within(excess / ceiling, RELATIVE_GOOD, RELATIVE_CLOSE)


def finite(value: object) -> float | None:
    """Turn a cell of a table or a value of a record into a number, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return float(value) if np.isfinite(value) else None


def response_verdict(
    table: pd.DataFrame, record: Mapping[str, Any], score: Mapping[str, Any] | None, against: str
) -> ResponseVerdict:
    """Answer what a user asks of a prediction.

    Parameters
    ----------
    table
        conditions.csv with a column ``condition``, worst first.
    record
        responses.json.
    score
        ``average``, ``ceiling`` and ``left_out`` (names for readers) of the average score; None without a baseline.
    against
        Name of that baseline.

    Returns
    -------
    ResponseVerdict
    """
    summary = record["summary"]
    pearson, slope = summary.get("pearson_delta", {}), summary.get("lfc_slope", {})
    words, mark = direction(finite(pearson.get("mean")), finite(pearson.get("ceiling_mean")))
    size, size_mark = effect_size(finite(slope.get("pooled")), finite(slope.get("ceiling_pooled")))
    level = words if mark is None or size == "not known" else f"{words}, effect size {size}"
    tones = [m for m in (mark, size_mark) if m]
    return ResponseVerdict(
        level,
        max(tones, key=_MARKS.index) if mark else "none",
        (
            Answer("Can it predict these responses?", _can_it(table, summary), mark),
            Answer("Is the effect size right?", _how_large(table, summary, size), size_mark),
            _false_effects(summary),
            Answer("Against which control?", _which_control(record)),
            Answer("Better than a baseline?", _better(score, against)),
        ),
    )


def _can_it(table: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    pearson, energy = summary.get("pearson_delta", {}), summary.get("e_distance", {})
    value, ceiling = finite(pearson.get("mean")), finite(pearson.get("ceiling_mean"))
    if value is None:
        return "Not measured: too few cells in every condition."
    n = int(table["pearson_delta"].notna().sum())
    text = (
        f"Predicted and measured change from control correlate at {number(value)} (Pearson-Δ, "
        f"{'one condition' if n == 1 else f'mean of {n:,} conditions'})"
    )
    text += f"; other real cells of the same conditions reach {number(ceiling)}." if ceiling is not None else "."
    left, own = finite(energy.get("share_of_effect")), finite(energy.get("ceiling_share_of_effect"))
    if left is not None:
        beside = "" if own is None else f"; other real cells {_percent(own, 0)}"
        text += (
            f" Predicted cells lie {_percent(left, 0)} as far from the measured ones as control cells do "
            f"(energy distance{beside})."
        )
    if n > 1 and ceiling is not None:
        marks = [
            direction(finite(a), finite(b))[1]
            for a, b in zip(table["pearson_delta"], table["ceiling_pearson_delta"], strict=True)
        ]
        counts = [f"{marks.count(mark)} {mark}" for mark in _MARKS if mark in marks]
        if counts:
            text += f" One by one: {', '.join(counts)}"
            text += f", {marks.count(None)} not judged." if None in marks else "."
    return text


def _how_large(table: pd.DataFrame, summary: Mapping[str, Any], size: str) -> str:
    slope = summary.get("lfc_slope", {})
    pooled, ceiling = finite(slope.get("pooled")), finite(slope.get("ceiling_pooled"))
    if pooled is None:
        return "Not known: too few genes change measurably for a slope of the log fold changes."
    beside = "" if ceiling is None else f"; other real cells {number(ceiling)}"
    text = f"{size.capitalize()}: slope of predicted on measured log fold change {number(pooled)} (1 is right{beside})."
    if size == "not known":
        text = f"Not known: the slope is {number(pooled)}, but other real cells give {number(ceiling)} in place of 1."
    values = table["lfc_slope"].dropna() if "lfc_slope" in table else pd.Series(dtype=float)
    if len(values) > 1:
        text += f" From {number(values.min())} to {number(values.max())} over {len(values):,} conditions."
    return text


def _false_effects(summary: Mapping[str, Any]) -> Answer:
    question, found = "Does it invent effects?", summary.get("false_de_rate", {})
    rate, ceiling = finite(found.get("mean")), finite(found.get("ceiling_mean"))
    if rate is None:
        return Answer(question, "Not known: there are no generated control cells to compare with real ones.")
    beside = "" if ceiling is None else f"; between two groups of real control cells {_percent(ceiling, 1)}"
    text = f"In {_percent(rate, 1)} of the genes generated control cells differ from real ones (false DE{beside})."
    return Answer(question, text, within(rate - (ceiling or 0.0), FALSE_DE_GOOD, FALSE_DE_CLOSE))


def _which_control(record: Mapping[str, Any]) -> str:
    settings, controls = record["settings"], list(record["controls"].values())
    key, label, identity = (settings.get(name) for name in ("perturbation_key", "control", "identity_key"))
    own = settings.get("use_predicted_controls") and any(c.get("n_generated") for c in controls)
    text = f"Cells with {key} = {label}" + (f" of the same {identity}." if identity else ".")
    text += (
        " The prediction is measured from its own control cells, the truth from real ones."
        if own
        else " They are real cells, for the prediction too."
    )
    sizes = [
        _range([int(c[name]) for c in controls if finite(c.get(name)) is not None]) for name in ("n_truth", "n_judged")
    ]
    if settings.get("split_controls"):
        text += f" Truth and prediction have different ones ({sizes[0]} and {sizes[1]} cells"
        text += " per identity)." if len(controls) > 1 else ")."
    else:
        text += f" Truth and prediction share them ({sizes[0]} cells): agreement looks better than it is."
    of_training = {c.get("training_cells_behind_the_truth") for c in controls}
    if of_training == {False}:
        text += " Those behind the truth are held out from training."
    elif True in of_training:
        text += " Among those behind the truth are training cells."
    return text


def _better(score: Mapping[str, Any] | None, against: str) -> str:
    if score is None or score.get("average") is None:
        return "Not measured: no evaluation of a baseline was given."
    ceiling = finite(score.get("ceiling"))
    beside = "" if ceiling is None else f"; other real cells reach {number(ceiling)}"
    text = f"Average score {number(score['average'])} against {against}; 0 is no better, 1 perfect{beside}."
    if score.get("left_out"):
        text += f" Undefined here and left out: {', '.join(score['left_out'])}."
    return text


def _percent(share: float, decimals: int) -> str:
    """A share for a reader; unbiased distances may fall a little below 0 by noise."""
    return f"{max(share, 0.0) * 100:.{decimals}f}\xa0%"


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
