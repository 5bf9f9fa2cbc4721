"""Files that users name: looked at before they are opened, and never read further than their size on disk warrants."""

import gzip
import io
import json
import os
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lingshu_cell.errors import LingshuError

if TYPE_CHECKING:
    import numpy as np

MOST_SETTINGS_BYTES = 1 << 26
HARMLESS_BYTES = 1 << 26
"""What may be unpacked whatever is stored: more must be stored in proportion."""
MOST_UNPACKED = 200
"""Times its size on disk that a zipped file of names, numbers or counts may unpack to; real ones stay below 30."""


def expanded(path: Path | str) -> Path:
    """Put the home folder in the place of ``~``; a home that is not there stays as it is written."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def refuse_special(path: Path, rule: str, remedy: str = "Check the path") -> None:
    """Refuse what is neither a file nor a folder (devices and pipes may never end), and what cannot be looked at.

    Parameters
    ----------
    path
        May be absent: that is said by whoever reads it.
    rule, remedy
        Of the error.

    Raises
    ------
    LingshuError
        For devices, pipes, sockets, links in circles, names that are too long and folders without rights.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        finding = f"{path} cannot be looked at ({getattr(error, 'strerror', None) or error})"
        raise LingshuError(rule, finding, remedy) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise LingshuError(rule, f"{path} is a device, a pipe or a socket", "Name a file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise LingshuError(rule, f"{path} may not be read", "Ask for the right to read it")


@contextmanager
def said_as(rule: str, called: Path | str, remedy: str) -> Iterator[None]:
    """Turn what the readers of text, JSON, TOML and gzip raise on broken bytes into one error."""
    try:
        yield
    except LingshuError:
        raise
    except (OSError, EOFError, zlib.error, UnicodeError, ValueError, RecursionError) as error:
        text = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise LingshuError(rule, f"{called}: {getattr(error, 'strerror', None) or text}", remedy) from None


def read_text(path: Path | str, rule: str, remedy: str = "Mend the file", most: int = MOST_SETTINGS_BYTES) -> str:
    """Read a text file in UTF-8, with a byte order mark or without.

    Raises
    ------
    LingshuError
        If there is no such file, it has more than ``most`` bytes, or is no text.
    """
    path = expanded(path)
    refuse_special(path, rule)
    with said_as(rule, path, remedy):
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than the {most:,} that make sense")
        return path.read_text(encoding="utf-8-sig")


def read_toml(path: Path | str, rule: str, remedy: str = "Mend the file") -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    LingshuError
        If there is no such file or it is no TOML.
    """
    text = read_text(path, rule, remedy)
    with said_as(rule, path, remedy):  # a number of 5,000 digits is a ValueError, but none of TOML's
        return tomllib.loads(text)


def read_json(path: Path | str, rule: str, remedy: str, most: int = MOST_SETTINGS_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    LingshuError
        If there is no such file, it is no JSON, or holds something else than an object.
    """
    text = read_text(path, rule, remedy, most)
    with said_as(rule, path, remedy):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that ends with an error where it unpacks to far more than is stored."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._most = max(HARMLESS_BYTES, MOST_UNPACKED * path.stat().st_size)

    def read(self, size: int = -1) -> bytes:
        """Read all in pieces, or a piece."""
        return self._looked_at(super().read(size)) if size >= 0 else b"".join(iter(lambda: self.read(1 << 20), b""))

    def read1(self, size: int = -1) -> bytes:
        """Read a piece, as text layers do."""
        return self._looked_at(super().read1(size if size >= 0 else 1 << 16))

    def _looked_at(self, piece: bytes) -> bytes:
        if self.tell() > self._most:
            raise OSError(f"its zipped bytes unpack to more than {self._most:,}, which no such file holds")
        return piece


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, unzipped where its name ends with ``.gz``."""
    return _BoundedGzip(path) if path.suffix == ".gz" else open(path, "rb")


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> IO[str]:
    """Open a text file for reading, unzipped where its name ends with ``.gz``."""
    return io.TextIOWrapper(open_binary(path), encoding=encoding, newline=newline)


def read_npz(path: Path) -> "Mapping[str, np.ndarray]":
    """Read all arrays of an npz file whose headers announce what is stored; no pickles.

    Raises
    ------
    ValueError, OSError, zipfile.BadZipFile
        If the file is damaged, or an array would be larger than its bytes.
    """
    import numpy as np  # here, as help must not wait for it

    most = max(HARMLESS_BYTES, MOST_UNPACKED * path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > most:
            raise ValueError(f"its zipped bytes unpack to more than {most:,}, which no such file holds")
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as stream:
                    _check_header(stream, member)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _check_header(stream: IO[bytes], member: zipfile.ZipInfo) -> None:
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    n_values = 1
    for length in shape:
        n_values *= int(length)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects, which are never loaded")
    if n_values < 0 or n_values * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} announces {shape} of {dtype} in {member.file_size:,} bytes")
