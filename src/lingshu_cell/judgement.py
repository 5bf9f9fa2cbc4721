"""Marks and the plain-language verdict: each measurement judged against real-against-real by a stated rule."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARKS = ("good", "close", "off")
OTHER_GROUP = "Other"
_GUIDE = Path(__file__).parent / "templates" / "metric_guide.toml"
_GENERAL = {"group": OTHER_GROUP, "good": 0.10, "close": 0.30, "scale": "relative"}  # where the guide has no rule
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS_IN_LABEL = ("auc", "ratio", "correlation", "slope", "fraction", "0…1", "sum of", "cells")
_CLASSIFIERS = (
    "classifier_auc_random_forest",
    "classifier_auc_random_forest_all_cells",
    "classifier_auc_logistic",
)
LEVELS = (
    (0.05, "Indistinguishable", "The classifiers could not tell generated cells from real ones."),
    (0.15, "Hard to tell apart", "The classifiers are only a little better than a coin flip."),
    (0.30, "Partly distinguishable", "The classifiers recognise many generated cells, but far from all."),
    (0.45, "Clearly distinguishable", "The classifiers recognise most generated cells."),
    (1.00, "Recognised almost always", "The classifiers recognise nearly every generated cell."),
)


@dataclass(frozen=True)
class Tolerance:
    """How much worse than real-against-real a value may be, in its own unit, and the rule in words."""

    good: float
    close: float
    rule: str


@dataclass(frozen=True)
class Row:
    """One measurement as the page shows it; ``position`` is 0 at the shuffled floor and 1 at real-against-real."""

    name: str
    label: str
    group: str
    value: float | None
    real_vs_real: float | None
    shuffled: float | None
    spread: float | None
    value_spread: float | None
    unit: str
    how_to_read: str
    why: str
    mark: str | None
    rule: str
    severity: float
    position: float | None
    saying: str
    headline: bool


@dataclass(frozen=True)
class Verdict:
    """The headline: a level in two words, sentences that explain it, and what holds, is close and is off."""

    level: str
    tone: str
    sentences: tuple[str, ...]
    by_mark: dict[str, tuple[Row, ...]]
    not_judged: tuple[Row, ...]


def number(value: object) -> str:
    """Write a number as a reader wants it: three digits, thousands separated, a dash where there is none.

    Parameters
    ----------
    value
        A number, ``None``, or anything else, which is written as it is.

    Returns
    -------
    For example ``"0.1235"``, ``"2,197"``, ``"1.2 × 10⁻⁵"`` or ``"–"``.
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    if not np.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) < 5e-4 or abs(value) >= 1e7:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    decimals = 4 if 0.99 <= abs(value) < 1 else 2 - int(np.floor(np.log10(abs(value))))
    return f"{value:,.{min(max(decimals, 0), 4)}f}".replace("-", "−")


def judge(metrics: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Judge every measurement against its real-against-real value.

    A value may be worse than real-against-real by the *good* tolerance of its row and still be good, by the *close*
    tolerance and be close; where the evaluation states the spread (SD) of real-against-real, twice that is always good
    and three times that always close.

    Parameters
    ----------
    metrics
        Name to ``value``, ``real_vs_real``, ``better`` (``higher``, ``lower`` or ``closer_to_real``), ``unit`` and,
        where known, ``shuffled``, ``value_sd``, ``real_vs_real_sd`` (over random splits), ``description`` and ``why``.

    Returns
    -------
    One row per measurement, in the order of the guide, unknown ones last.
    """
    guide = {entry["name"]: entry for entry in _guide_entries()}
    known = [name for name in guide if name in metrics]
    unknown = [name for name in metrics if name not in guide]
    return [_row(name, metrics[name], guide.get(name)) for name in known + unknown]


def group_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sort rows into the guide's groups; groups without a row are left out.

    Parameters
    ----------
    rows
        From :func:`judge`.

    Returns
    -------
    Groups with ``name``, ``intro`` and ``rows``.
    """
    groups = [{"name": g["name"], "intro": g["intro"]} for g in _guide()]
    for group in groups:
        group["rows"] = [row for row in rows if row.group == group["name"]]
    return [group for group in groups if group["rows"]]


def verdict(rows: Sequence[Row]) -> Verdict:
    """Say in plain language how distinguishable the generated cells are and what is off.

    Parameters
    ----------
    rows
        From :func:`judge`.

    Returns
    -------
    The level comes from the strongest classifier's AUC, the rest from the marks.
    """
    by_mark = {mark: tuple(row for row in rows if row.mark == mark) for mark in MARKS}
    by_mark["off"] = tuple(sorted(by_mark["off"], key=lambda row: -row.severity))
    judged = sum(len(found) for found in by_mark.values())
    level, tone, sentences = _level(rows)
    if judged:
        good, close, off = (len(by_mark[mark]) for mark in MARKS)
        sentences.append(
            f"Of {judged} measurements with a real-against-real value, {good} {_are(good)} as good as real cells, "
            f"{close} {_are(close)} close and {off} {_are(off)} off."
        )
    said = list(dict.fromkeys(row.saying for row in by_mark["off"] if row.saying))[:4]
    if said:
        sentences.append("Most in need of work: " + "; ".join(said) + ".")
    not_judged = tuple(row for row in rows if row.mark is None)
    return Verdict(level=level, tone=tone, sentences=tuple(sentences), by_mark=by_mark, not_judged=not_judged)


def _level(rows: Sequence[Row]) -> tuple[str, str, list[str]]:
    tests = [row for row in rows if row.name in _CLASSIFIERS and row.value is not None]
    if not tests:
        return "Not tested", "none", ["No classifier was trained to tell generated from real cells."]
    trusted = [row for row in tests if row.mark is not None]
    if not trusted:
        found = number(max(row.real_vs_real or 0.0 for row in tests))
        return (
            "No verdict",
            "none",
            [f"The classifiers tell real cells from real cells (AUC {found}): the test is unfit."],
        )
    strongest = max(trusted, key=lambda row: row.value)
    excess = strongest.value - max(0.5, strongest.real_vs_real)
    rank = next((i for i, (limit, _, _) in enumerate(LEVELS) if excess <= limit), len(LEVELS) - 1)
    rank = 0 if strongest.mark == "good" else rank  # no more than real cells spread around their own value
    _, level, meaning = LEVELS[rank]
    share = "more than 99" if strongest.value >= 0.99 else f"{max(strongest.value, 0.5) * 100:.0f}"
    explained = (
        f"Shown one real and one generated cell, the strongest classifier points at the generated one in {share} % "
        f"of cases (AUC {number(strongest.value)}; a coin flip is 0.5; "
        f"two groups of real cells give {number(strongest.real_vs_real)})."
    )
    return level, ("good", "good", "close", "off", "off")[rank], [meaning, explained]


def _row(name: str, entry: Mapping[str, Any], guide: Mapping[str, Any] | None) -> Row:
    value, reference, shuffled = (_finite(entry.get(key)) for key in ("value", "real_vs_real", "shuffled"))
    better, unit = str(entry.get("better") or "closer_to_real"), str(entry.get("unit") or "")
    spread = _finite(entry.get("real_vs_real_sd"))
    guide = guide if guide is not None else _GENERAL
    excess = _excess(value, reference, better)
    floor = _excess(shuffled, reference, better)
    tolerance = None if excess is None else _tolerance(guide, reference, floor, spread)
    mark, saying = None, ""
    if tolerance is not None:
        mark = "good" if excess <= tolerance.good else "close" if excess <= tolerance.close else "off"
        saying = guide.get("too_high" if value > reference else "too_low", "") if mark == "off" else ""
    plain = name.replace("_", " ")
    return Row(
        name=name,
        label=guide.get("label") or plain[:1].upper() + plain[1:],
        group=guide["group"],
        value=value,
        real_vs_real=reference,
        shuffled=shuffled,
        spread=spread,
        value_spread=_finite(entry.get("value_sd")),
        unit="" if unit.lower().startswith(_UNITS_IN_LABEL) else unit,
        how_to_read=str(entry.get("description") or ""),
        why=str(entry.get("why") or "") if value is None else "",
        mark=mark,
        rule=tolerance.rule if tolerance else _no_mark(guide, value, reference),
        severity=excess / max(tolerance.close, 1e-12) if tolerance else 0.0,
        position=_position(excess, floor, tolerance.good if tolerance else 0.0),
        saying=saying,
        headline=bool(guide.get("headline")),
    )


def _no_mark(guide: Mapping[str, Any], value: float | None, reference: float | None) -> str:
    if value is None or reference is None or "good" not in guide:
        return ""
    if reference > guide.get("trust", np.inf):
        return f"real cells are told from real cells: the test is unfit above {guide['trust']:g}"
    return "no shuffled floor to compare with"


def _excess(value: float | None, reference: float | None, better: str) -> float | None:
    """How much worse than real-against-real, in the unit of the value; negative is better than it."""
    if value is None or reference is None:
        return None
    return {"higher": reference - value, "lower": value - reference}.get(better, abs(value - reference))


def _tolerance(
    guide: Mapping[str, Any], reference: float, floor: float | None, spread: float | None
) -> Tolerance | None:
    """What excess is still good and close, in the unit of the value; None without a rule or a ground for it."""
    if "good" not in guide or reference > guide.get("trust", np.inf):
        return None
    good, close, scale = guide["good"], guide["close"], guide.get("scale")
    if scale is None:
        rule = f"good within {good:g}, close within {close:g}"
    else:
        rule = f"good within {good * 100:g} %, close within {close * 100:g} %"
        if scale == "floor":
            if floor is None or floor <= 0:
                return None
            rule += " of the way to the floor"
        size = abs(reference) if scale == "relative" else floor
        good, close = good * size, close * size
    if spread is not None and 2 * spread > good:
        good, close = 2 * spread, max(close, 3 * spread)
        rule = f"good within {number(good)} (2 × spread), close within {number(close)}"
    return Tolerance(good, close, rule)


def _position(excess: float | None, floor: float | None, good: float) -> float | None:
    """Where the value lies between the shuffled floor (0) and real-against-real (1), if the floor is clearly worse."""
    if excess is None or floor is None or floor <= max(good, 1e-12):
        return None
    return float(np.clip(1.0 - excess / floor, 0.0, 1.0))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _guide() -> list[dict[str, Any]]:
    return tomllib.loads(_GUIDE.read_text(encoding="utf-8"))["group"]


def _guide_entries() -> list[dict[str, Any]]:
    return [{**metric, "group": group["name"]} for group in _guide() for metric in group.get("metric", ())]
