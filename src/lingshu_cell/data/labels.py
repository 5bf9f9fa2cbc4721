"""obs columns of several data sets brought together: categories as codes, numbers as numbers, absent ones unknown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders

RESERVED = ("data_set", "species")
"""Columns that a store has of its own; a data set's own column of this name gets ``_of_source`` behind it."""

_MOST_CATEGORIES = 50_000
_MOST_WHOLE_NUMBERS = 256  # integer columns with no more different values are labels


@dataclass(frozen=True, eq=False)
class Label:
    """One column over all cells.

    Attributes
    ----------
    name
        Name of the column.
    values
        Codes of categories, −1 where unknown, in the smallest integer type; or numbers, NaN where unknown.
    categories
        Sorted as text; None for numbers.
    """

    name: str
    values: np.ndarray
    categories: tuple[str, ...] | None


def label_names(tables: Sequence[pd.DataFrame], keys: Sequence[str] | None) -> list[str]:
    """Choose the columns to keep.

    Parameters
    ----------
    tables
        obs of each data set.
    keys
        Columns wanted, or None for all.

    Raises
    ------
    LingshuError
        If no data set has one of the keys.
    """
    present = list(dict.fromkeys(str(column) for table in tables for column in table.columns))
    if keys is None:
        return present
    if absent := [key for key in keys if key not in present]:
        raise LingshuError(
            "Keys must be obs columns of some data set",
            f"there is no {offenders(absent)}",
            f"Available: {offenders(present)}" if present else "The data have no obs columns",
        )
    return list(dict.fromkeys(keys))


def joined_labels(
    tables: Sequence[pd.DataFrame], keep: Sequence[np.ndarray], names: Sequence[str], notes: list[str]
) -> Iterator[Label]:
    """Join columns of all data sets, one at a time.

    Parameters
    ----------
    tables
        obs of each data set.
    keep
        Which of its cells are kept, boolean.
    names
        The columns.
    notes
        Gets a line for every column that cannot be kept.

    Yields
    ------
    Label
        Values of the kept cells of all data sets, one data set after the other.
    """
    sizes = [int(mask.sum()) for mask in keep]
    for name in names:
        parts = [t[name][mask] if name in t.columns else None for t, mask in zip(tables, keep, strict=True)]
        called = f"{name}_of_source" if name in RESERVED else name
        present = [part for part in parts if part is not None]
        if all(_is_number(part) for part in present) and not _few_whole_numbers(present):
            yield Label(called, _numbers(parts, sizes), None)
            continue
        label = category_label(called, [_texts(p, n) for p, n in zip(parts, sizes, strict=True)])
        if label is None:
            notes.append(f"obs column {name!r} is left out: it has more than {_MOST_CATEGORIES:,} different values")
        else:
            yield label


def constant_label(name: str, values: Sequence[str], sizes: Sequence[int]) -> Label:
    """Label all cells of a data set alike; the categories are the distinct values in order of first appearance."""
    categories = tuple(dict.fromkeys(values))
    dtype = np.int8 if len(categories) <= np.iinfo(np.int8).max else np.int32
    codes = np.array([categories.index(value) for value in values], dtype=dtype)
    return Label(name, np.repeat(codes, sizes), categories)


def category_label(name: str, parts: Sequence[pd.Series]) -> Label | None:
    """Number the values of text columns; None where they are too many."""
    factors = [pd.factorize(part) for part in parts]
    categories = tuple(sorted({str(value) for _, values in factors for value in values}))
    if len(categories) > _MOST_CATEGORIES:
        return None
    position = {value: i for i, value in enumerate(categories)}
    dtype = next(t for t in (np.int8, np.int16, np.int32) if len(categories) <= np.iinfo(t).max)
    codes = [
        np.append([position[str(v)] for v in values], -1).astype(dtype)[found] for found, values in factors
    ]  # a missing value is −1 and takes the last entry
    return Label(name, np.concatenate(codes), categories)


def _is_number(part: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(part) and not pd.api.types.is_bool_dtype(part)


def _few_whole_numbers(parts: Sequence[pd.Series]) -> bool:
    whole = all(pd.api.types.is_integer_dtype(part) for part in parts)
    return whole and len(set().union(*(part.dropna().unique() for part in parts))) <= _MOST_WHOLE_NUMBERS


def _numbers(parts: Sequence[pd.Series | None], sizes: Sequence[int]) -> np.ndarray:
    whole = all(part is not None and pd.api.types.is_integer_dtype(part) and not part.isna().any() for part in parts)
    dtype = np.int64 if whole else np.float64
    filled = [
        np.full(n, np.nan) if part is None else part.to_numpy(dtype=dtype, na_value=0 if whole else np.nan)
        for part, n in zip(parts, sizes, strict=True)
    ]
    return np.concatenate(filled).astype(dtype)


def _texts(part: pd.Series | None, n: int) -> pd.Series:
    if part is None:
        return pd.Series([None] * n, dtype=object)
    if isinstance(part.dtype, pd.CategoricalDtype):
        part = part.cat.rename_categories([str(one) for one in part.cat.categories])
        return part.astype(object)
    return part.astype(object).map(str, na_action="ignore")
