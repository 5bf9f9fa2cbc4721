"""The files of a training store: their names, the manifest, checksums, and what is said when one is damaged."""

import re
from pathlib import Path
from typing import Any

from lingshu_cell.checksums import checksum
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WORK = ".work"
"""Folder of an unfinished store."""

_FILE = re.compile(r"(shards/shard-\d{6}\.h5ad|arrays/[a-z0-9_]{1,40}\.npy)")
_MOST_MANIFEST_BYTES = 1 << 28
_WHOLE = "A store must be whole"
_REMEDY = "Copy it again from where it came, or prepare it again"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check ``manifest.json``, nothing else.

    Raises
    ------
    LingshuError
        If there is none, or it is damaged or of another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        begun = (path / WORK).is_dir()
        raise LingshuError(
            "A store must be finished" if begun else "A store must hold manifest.json",
            f"{path} is {'not: lingshu prepare was interrupted' if begun else 'no store'}",
            "Give the same command again, it goes on where it stopped" if begun else "Make one with lingshu prepare",
        )
    manifest = read_json(file, _WHOLE, _REMEDY, _MOST_MANIFEST_BYTES)
    if not isinstance(manifest.get("files"), dict):
        raise damaged(path, "manifest.json is no manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise LingshuError(
            f"The store must have format version {FORMAT_VERSION}",
            f"{path} has {manifest.get('format_version')!r}",
            "Install the version of lingshu-cell that wrote it, or prepare it again",
        )
    if manifest.get("checksum") != checksum(manifest):
        raise damaged(path, "manifest.json does not match its checksum")
    if strange := [name for name in manifest["files"] if not _FILE.fullmatch(name)]:
        raise damaged(path, f"manifest.json names {offenders(strange)}")
    return manifest


def shard_file(number: int) -> str:
    """Name the file of a shard within its store."""
    return f"shards/shard-{number:06d}.h5ad"


def damaged(path: Path, finding: str) -> LingshuError:
    """Say that a store is not whole."""
    return LingshuError(_WHOLE, f"{path}: {finding}", _REMEDY)
