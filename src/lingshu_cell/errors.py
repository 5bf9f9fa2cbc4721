"""One kind of error for every mistake a user can make: rule, finding, remedy, on one line."""

from collections.abc import Iterable

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_TROUBLE = 1
_MOST_OFFENDERS = 5


class LingshuError(ValueError):
    """A user's mistake, said in one line as rule, finding and remedy; the command line exits with code 2.

    Parameters
    ----------
    rule
        What must hold, e.g. ``"Counts must be non-negative integers"``.
    finding
        What was found instead, with at most five offenders and their number (see :func:`offenders`).
    remedy
        What the user can do about it.

    Attributes
    ----------
    exit_code
        Of the command line.
    process
        Which of several processes says it; the others end silently.
    """

    exit_code = EXIT_CODE_USER_ERROR
    process = 0

    def __init__(self, rule: str, finding: str, remedy: str) -> None:
        self.rule, self.finding, self.remedy = (_one_line(part) for part in (rule, finding, remedy))
        super().__init__(f"{self.rule}: {self.finding}. {self.remedy}.")


class LostProcessError(LingshuError):
    """One of several processes is gone, so the others cannot go on: nobody's mistake, and the command exits with 1."""

    exit_code = EXIT_CODE_TROUBLE


def offenders(items: Iterable[object]) -> str:
    """Name at most five of ``items`` and say how many there are, e.g. ``"'A', 'B' (2)"``."""
    names = [repr(item) if isinstance(item, str) else str(item) for item in items]
    shown = ", ".join(names[:_MOST_OFFENDERS])
    more = ", …" if len(names) > _MOST_OFFENDERS else ""
    return f"{shown}{more} ({len(names)})"


def _one_line(text: str) -> str:
    return " ".join(str(text).split()).rstrip(".")
