"""One kind of error for every mistake a user can make: rule, finding, remedy, on one line."""

from collections.abc import Iterable, Iterator

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_TROUBLE = 1
EXIT_CODE_INTERRUPTED = 130  # as shells say of what Ctrl-C ended
_MOST_OFFENDERS = 5
_LONGEST_NAME = 80
_LONGEST_PART = 900
_OUT_OF_MEMORY = (  # as torch, HDF5, numpy, the system and C++ say it
    "out of memory", "can't allocate memory", "not enough memory", "memory allocation failed", "unable to allocate",
    "cannot allocate memory", "bad_alloc",
)  # fmt: skip


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
        self.rule, self.finding, self.remedy = (one_line(part) for part in (rule, finding, remedy))
        super().__init__(f"{self.rule}: {self.finding}. {self.remedy}.")


class LostProcessError(LingshuError):
    """One of several processes is gone, so the others cannot go on: nobody's mistake, and the command exits with 1."""

    exit_code = EXIT_CODE_TROUBLE


def and_behind(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and those that it was made of, or was raised beside, one by one."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """Find what says that memory ran out, of a GPU or of the machine, in an error or behind it; else ``None``.

    Libraries that read files say it with errors of every kind, of which readers make one of a damaged file.
    """
    for one in and_behind(error):
        is_said = any(words in str(one).lower() for words in _OUT_OF_MEMORY) and not isinstance(one, LingshuError)
        if is_said or isinstance(one, MemoryError):
            return one
    return None


def offenders(items: Iterable[object]) -> str:
    """Name at most five of ``items`` and say how many there are, e.g. ``"'A', 'B' (2)"``; long names are cut."""
    items = list(items)
    names = [
        repr(_shortened(item, _LONGEST_NAME)) if isinstance(item, str) else _shortened(str(item), _LONGEST_NAME)
        for item in items[:_MOST_OFFENDERS]
    ]
    more = ", …" if len(items) > _MOST_OFFENDERS else ""
    return f"{', '.join(names)}{more} ({len(items)})"


def printable(text: str) -> str:
    r"""Write what would move a terminal's cursor, colour it or hide from the eye as ``\x1b``; ends of lines stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Put a text of any length and origin on one line that fits a screen."""
    return _shortened(printable(" ".join(str(text).split())).rstrip("."), _LONGEST_PART)


def _shortened(text: str, most: int) -> str:
    """Cut a text in its middle."""
    return text if len(text) <= most else f"{text[: most - most // 4]} … {text[-most // 4 :]}"
