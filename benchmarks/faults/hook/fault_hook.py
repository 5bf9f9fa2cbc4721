"""Stops a process at the n-th thing it does to files under a folder; that thing does not happen.

Counted are opening for writing, making, renaming, removing and truncating files and folders, and flushing them to the
disk. Installed in a forked child by :func:`install`, or in a whole process by ``sitecustomize`` beside this file.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

_KINDS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR


def install(folder: Path, at: int | None, signal_number: int, record: list[tuple[str, ...]] | None = None) -> None:
    """Send this process a signal before event ``at`` (1, 2, …); None for never.

    Parameters
    ----------
    folder
        Only what happens under it is counted.
    at
        Which event.
    signal_number
        The signal.
    record
        Takes every event: its kind and its paths, relative to the folder.
    """
    root = str(folder.resolve()) + "/"
    count = 0

    def take(kind: str, *paths: str) -> None:
        nonlocal count
        count += 1
        if record is not None:
            record.append((kind, *(path.removeprefix(root) if path + "/" != root else "." for path in paths)))
        if count == at:
            os.kill(os.getpid(), signal_number)

    def whole(path: object) -> str | None:
        try:
            text = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        except TypeError:
            return None  # a descriptor
        return text if (text + "/").startswith(root) else None

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            writes = (arguments[2] or 0) & _WRITING
            if writes and (path := whole(arguments[0])):
                take("write", path)
        elif event in _KINDS:
            paths = [
                found for one in arguments[:2] if isinstance(one, (str, bytes, os.PathLike)) and (found := whole(one))
            ]
            if paths:
                take(event.removeprefix("os."), *paths)

    sys.addaudithook(audit)
    os.fsync = _counted(os.fsync, take, root)


def _counted(fsync: Callable[[int], None], take: Callable[..., None], root: str) -> Callable[[int], None]:
    def counted(descriptor: int) -> None:
        path = os.path.realpath(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}")
        if (path + "/").startswith(root):
            take("flush", path)
        fsync(descriptor)

    return counted
