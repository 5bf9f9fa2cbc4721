"""Conditions as they stand in obs: labels, combinations, and the proof that two files share none."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders


def labels_of(obs: pd.DataFrame, key: str) -> np.ndarray:
    """Give a label column as text.

    Parameters
    ----------
    obs
        Labels of the cells.
    key
        Column.

    Returns
    -------
    np.ndarray
        str objects, shape [n_cells].

    Raises
    ------
    LingshuError
        If there is no such column, or a cell has no label.
    """
    if key not in obs.columns:
        remedy = f"{nearest(key, obs.columns)}Columns: {offenders(obs.columns)}"
        raise LingshuError("Keys must be obs columns", f"there is no '{key}'", remedy)
    missing = obs[key].isna().to_numpy()
    if missing.any():
        finding = f"cells without one: {offenders(obs.index[missing].astype(str))}"
        remedy = "Drop these cells or give them a label"
        raise LingshuError(f"Every cell needs a label in obs[{key!r}]", finding, remedy)
    return obs[key].astype(str).to_numpy(dtype=object)


def components_of(name: str, separator: str, control: str | None) -> list[str]:
    """Take a perturbation label apart.

    A separator within brackets, as in ``"(+)-JQ1"``, does not count, and a label with an empty part, such as ``"Na+"``,
    is a name and no combination.

    Parameters
    ----------
    name
        The label.
    separator
        What joins perturbations; empty if nothing does.
    control
        Name of the control, which is no part of a combination; None if there is none.

    Returns
    -------
    list of str
        The perturbations, sorted; for the control label that alone.

    Raises
    ------
    LingshuError
        If a perturbation stands twice, or there is nothing but control several times.
    """
    parts = [part.strip() for part in _split(name, separator)] if separator and name != control else [name]
    if len(parts) < 2 or not all(parts):
        return [name]
    applied = sorted(part for part in parts if part != control)
    if not applied or len(set(applied)) != len(applied):
        raise LingshuError(
            "A combination must join different perturbations",
            f"{name!r} taken apart at {separator!r} gives {offenders(parts)}",
            "Mend the label, or set combination_separator to what joins them (empty: labels stay whole)",
        )
    return applied


def _split(name: str, separator: str) -> list[str]:
    """Split at separators outside of brackets; a name whose brackets do not match stays whole."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(name):
        if depth == 0 and name.startswith(separator, at):
            parts.append(name[start:at])
            at = start = at + len(separator)
            continue
        depth += (name[at] in "([{") - (name[at] in ")]}")
        at += 1
    return [*parts, name[start:]] if depth == 0 else [name]


def canonical_name(name: str, separator: str, control: str | None) -> str:
    """Write a perturbation label in the one form that all its spellings share.

    Parameters
    ----------
    name, separator, control
        See :func:`components_of`.

    Returns
    -------
    str
        E.g. ``"A+B"`` for ``"B+A"``, and ``"A"`` for ``"A+control"``.
    """
    return separator.join(components_of(name, separator, control))


def nearest(name: str, known: Collection[str] | np.ndarray | pd.Index) -> str:
    """Say which known names are close to one that is not known; empty if none is.

    Parameters
    ----------
    name
        What was given.
    known
        What there is.

    Returns
    -------
    str
        A sentence and a blank, e.g. ``"For 'b cells', did you mean 'B cells'? "``.
    """
    lowered = {str(value).casefold(): str(value) for value in known}
    close = get_close_matches(name.casefold(), list(lowered), n=3, cutoff=0.6)
    return f"For {name!r}, did you mean {' or '.join(repr(lowered[key]) for key in close)}? " if close else ""


@dataclass(frozen=True)
class Disjointness:
    """What :func:`check_disjoint` counted: conditions and cells of two tables that share neither."""

    n_train_conditions: int
    n_test_conditions: int
    n_train_cells: int
    n_test_cells: int


def check_disjoint(
    obs_train: pd.DataFrame,
    obs_test: pd.DataFrame,
    keys: Sequence[str],
    *,
    control: str | None = None,
    allowed: Collection[tuple[str, ...]] = (),
    combination_separator: str = "+",
) -> Disjointness:
    """Prove that two tables share no cell and no condition.

    Parameters
    ----------
    obs_train, obs_test
        Labels of the cells of two files.
    keys
        Columns that together make a condition; the last one holds the perturbations.
    control
        Value of the last key in control cells, which may be in both tables as different cells; None if there are none.
    allowed
        Conditions, as values in the order of ``keys``, that are in both by intent (few-shot).
    combination_separator
        See :class:`ConditionSplit`.

    Returns
    -------
    Disjointness
        Conditions, without controls, and cells of each table.

    Raises
    ------
    LingshuError
        If a column is missing, or a cell name or condition is in both tables.
    """
    seen = []
    for obs in (obs_train, obs_test):
        columns = [labels_of(obs, key) for key in keys]
        names = {name: canonical_name(name, combination_separator, control) for name in set(columns[-1])}
        columns[-1] = np.array([names[name] for name in columns[-1]], dtype=object)
        seen.append({values for values in zip(*columns, strict=True) if values[-1] != control})
    cells = sorted(set(obs_train.index.astype(str)) & set(obs_test.index.astype(str)))
    if cells:
        raise LingshuError("A cell is in one part only", f"in both: {offenders(cells)}", "Split the cells again")
    both = sorted((seen[0] & seen[1]) - set(allowed))
    if both:
        raise LingshuError(
            "Training and test must share no condition",
            f"in both: {offenders(' · '.join(values) for values in both)}",
            "Split the cells by condition: lingshu split",
        )
    return Disjointness(len(seen[0]), len(seen[1]), len(obs_train), len(obs_test))
