"""Files that appear whole or not at all: written beside, flushed to the disk, renamed; one process at a time.

What is promised of a file that was given its name here: after a kill or a power cut there is the old one or the new
one, never a part. Flushed before the rename, or the name could reach the disk before the bytes; the folder flushed
after it, or what follows (say, the removal of an older checkpoint) could reach the disk before the name.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lingshu_cell.checksums import checksum
from lingshu_cell.errors import LingshuError

LOCK = ".lock"


def draft_of(name: str) -> str:
    """Name of the file that is written before it gets its name."""
    return f".{name}.tmp"


class Draft:
    """A file on its way to its name; no other process can write it meanwhile, and none is kept out by a dead one.

    Parameters
    ----------
    file
        The file; its folder exists. What has this name stays as it is until :meth:`commit`.
    draft
        Where it is written first, in the same folder; ``.NAME.tmp`` when not given. A draft that a killed process left
        is overwritten.

    Raises
    ------
    LingshuError
        If another process is writing the same file.
    OSError
        If the folder cannot be written.
    """

    def __init__(self, file: Path, draft: Path | None = None) -> None:
        self.file = file
        self.path = file.with_name(draft_of(file.name)) if draft is None else draft
        held = _hold(self.path)
        if held is None:
            raise LingshuError(
                "A file is written by one process at a time",
                f"another one is writing {file}",
                "Wait until it is done, or name another file",
            )
        self._lock: int | None = held

    def commit(self) -> None:
        """Give the draft, which is whole and closed, its name; from now on it survives a power cut."""
        flush(self.path)
        os.replace(self.path, self.file)
        flush(self.file.parent)
        self._release()

    def abort(self) -> None:
        """Remove the draft; what had the name stays."""
        if self._lock is not None:
            self.path.unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside, flush it to the disk, and rename it.

    Parameters
    ----------
    file
        The file; its folder exists.
    write
        Called with the path to write to.
    """
    draft = Draft(file)
    try:
        write(draft.path)
        draft.commit()
    except BaseException:
        draft.abort()
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text atomically."""
    write_atomically(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(file, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_checked_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically with its ``checksum``, for :func:`read_checked_json`."""
    value = json.loads(json.dumps(value))
    write_json(file, {**value, "checksum": checksum(value)})


def read_checked_json(file: Path) -> dict[str, Any]:
    """Read what :func:`write_checked_json` wrote, without its checksum.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it does not match its checksum.
    """
    try:
        return checked(json.loads(file.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked(content: Any) -> dict[str, Any]:
    """Give what :func:`write_checked_json` was given, from what was read.

    Raises
    ------
    ValueError
        If it does not match its checksum.
    """
    if not isinstance(content, dict) or content.get("checksum") != checksum(content):
        raise ValueError("it does not match its checksum")
    return {key: value for key, value in content.items() if key != "checksum"}


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Make sure that a folder and the files in it are on the disk."""
    for file in sorted(folder.iterdir()):
        flush(file)
    flush(folder)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill leaves it whole under its name, or a rest under another one (``.NAME.old``)."""
    gone = folder.with_name(f".{folder.name.lstrip('.')}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def writable(rule: str, path: Path, remedy: str) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one clear error."""
    try:
        yield
    except OSError as error:
        raise LingshuError(rule, f"{path}: {error.strerror or error}", remedy) from error


@contextlib.contextmanager
def locked(folder: Path, rule: str, finding: str, remedy: str) -> Iterator[None]:
    """Make a folder and hold it for this process; the lock goes with the process, however it ends.

    Parameters
    ----------
    folder
        Made where it is absent; removed where an error leaves it as empty as it was made.
    rule, finding, remedy
        What is said when another process holds it.

    Raises
    ------
    LingshuError
        If another process holds the folder.
    OSError
        If it cannot be written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    held = _hold(lock)
    if held is None:
        raise LingshuError(rule, finding, remedy)
    done = False
    try:
        yield
        done = True
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
            if made and not done:
                folder.rmdir()
        os.close(held)


def _hold(file: Path) -> int | None:
    """Open and lock a file that is made where it is absent; None if another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor  # this file system knows no locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)  # who held it has meanwhile renamed or removed the file: what we locked is no longer it
