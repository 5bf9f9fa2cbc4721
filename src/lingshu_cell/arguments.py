"""Numbers and mappings that a caller hands over, checked before anything is computed with them."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from lingshu_cell.errors import LingshuError


def whole_number(value: Any, what: str, least: int = 0, most: int | None = None, remedy: str = "Change it") -> int:
    """Check a whole number.

    Parameters
    ----------
    value
        Anything; whole numbers of numpy are taken, booleans and fractions are not.
    what
        What it is, as in ``"The seed"``.
    least, most
        Bounds, both allowed.
    remedy
        Of the error.

    Returns
    -------
    int
        The number.

    Raises
    ------
    LingshuError
        If it is none, or out of bounds.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise LingshuError(f"{what} must be a whole number", repr(value), remedy)
    if least <= value and (most is None or value <= most):
        return int(value)
    bounds = f"must be {least} or more" if most is None else f"must lie between {least} and {most}"
    raise LingshuError(f"{what} {bounds}", f"{value}", remedy)


def is_finite(value: Any) -> bool:
    """Say whether a value is a number, of Python or numpy, and finite."""
    if not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def mapping(value: Any, what: str, example: str) -> Mapping[Any, Any]:
    """Check that a value maps names to something; None is empty.

    Raises
    ------
    LingshuError
        If it does not.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LingshuError(f"{what} must be a mapping", repr(value), f"Write e.g. {example}")
    return value
