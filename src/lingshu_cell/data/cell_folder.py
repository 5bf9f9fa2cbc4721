"""A folder of generated cells in shards, each an h5ad file that anything of the ecosystem reads.

    FOLDER/request.json             what is asked for, fixed by the first process
    FOLDER/shards/shard-000000.h5ad cells
    FOLDER/shards/shard-000000.json their number and the checksum of the file: the shard is whole
    FOLDER/manifest.json            all shards with their checksums: the folder is whole
    FOLDER/.work/                   claims and drafts, while it is made

Nothing in it depends on who made it, when, or in how many processes.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingshu_cell.checksums import checksum, sha256
from lingshu_cell.claims import Claims
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.output_files import flush, read_checked_json, write_checked_json

FORMAT_VERSION = 1
REQUEST, MANIFEST, SHARDS, WORK = "request.json", "manifest.json", "shards", ".work"
_RULE = "A folder of generated cells must be whole"
_WHO = f"{os.uname().nodename}-{secrets.token_hex(8)}"  # containers may share names of hosts and numbers of processes
_AGAIN = "Give the command that made it again: it makes anew what is missing or damaged"


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard: cells, bytes and sha256 of its file."""

    n_cells: int
    n_bytes: int
    sha256: str


class CellFolder:
    """The files of a folder of generated cells, while it is made.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path / WORK

    def shard(self, number: int) -> Path:
        """File of a shard."""
        return self.path / shard_name(number)

    def record(self, number: int, check: bool = False) -> ShardRecord | None:
        """What is known of a shard that is whole; None of others.

        Parameters
        ----------
        number
            Of the shard.
        check
            Whether to read all of it; if not, its size must do.
        """
        file = self.shard(number)
        try:
            record = ShardRecord(**read_checked_json(file.with_suffix(".json")))
            is_whole = file.stat().st_size == record.n_bytes and (not check or sha256(file) == record.sha256)
        except (OSError, ValueError, TypeError):
            return None
        return record if is_whole else None

    def keep(self, number: int, draft: Path, n_cells: int) -> None:
        """Give a shard that is written its name, and note that it is whole; after a kill in between it is made again.

        Raises
        ------
        OSError
            If it cannot be written, or the draft is gone.
        """
        file = self.shard(number)
        record = ShardRecord(n_cells, draft.stat().st_size, sha256(draft))
        flush(draft)
        os.replace(draft, file)
        flush(file.parent)
        write_checked_json(file.with_suffix(".json"), vars(record))

    def draft(self, number: int) -> Path:
        """Where this process writes a shard; drafts that others, which no longer hold its claim, left are removed."""
        stem = self.shard(number).stem
        for left in self.work.glob(f"{stem}.*"):
            left.unlink(missing_ok=True)
        return self.work / f"{stem}.{_WHO}.h5ad"

    def claims(self) -> Claims:
        """Open the claims on shards."""
        self.work.mkdir(exist_ok=True)
        return Claims(self.work / "claims")

    def fix_request(self, request: Mapping[str, Any]) -> None:
        """Write what is asked for, unless somebody did.

        Raises
        ------
        LingshuError
            If something else is in the folder, or was asked for.
        """
        file = self.path / REQUEST
        others = [p.name for p in self.path.iterdir() if p.name not in (REQUEST, MANIFEST, SHARDS, WORK)]
        if others and not file.exists():
            finding = f"{self.path} holds {others[0]} and more" if len(others) > 1 else f"{self.path} holds {others[0]}"
            raise LingshuError("Shards of cells need a folder of their own", finding, "Name a new folder with --out")
        for name in (SHARDS, WORK):
            (self.path / name).mkdir(exist_ok=True)
        if not file.exists():
            self._link(file, request)
        try:
            fixed = read_checked_json(file)
        except (OSError, ValueError) as error:
            remedy = "Remove the folder, or restore the file"
            raise LingshuError("request.json must be whole", f"{file}: {error}", remedy) from None
        differ = [key for key in {**request, **fixed} if request.get(key) != fixed.get(key)]
        if differ:
            raise LingshuError(
                "A folder holds the cells of one request",
                f"{self.path} was begun with other {offenders(differ)}"
                + _difference(fixed.get(differ[0]), request.get(differ[0])),
                "Give the same command again, or name another folder with --out",
            )

    def _link(self, file: Path, request: Mapping[str, Any]) -> None:
        draft = self.work / f"request.{_WHO}.json"
        write_checked_json(draft, request)
        try:
            os.link(draft, file)  # fails where another process was first
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(draft, file)
        flush(self.path)
        draft.unlink(missing_ok=True)

    def finish(self, n_shards: int, n_genes: int) -> None:
        """Write the manifest: all shards are whole."""
        records = [self.record(number) for number in range(n_shards)]
        if None in records:
            raise RuntimeError("a folder is finished when its shards are whole")
        request = read_checked_json(self.path / REQUEST)
        manifest = {
            "format_version": FORMAT_VERSION,
            "request": checksum(request),
            "n_cells": sum(record.n_cells for record in records),
            "n_genes": n_genes,
            "shards": {shard_name(number): vars(record) for number, record in enumerate(records)},
        }
        write_checked_json(self.path / MANIFEST, manifest)

    @property
    def is_finished(self) -> bool:
        """Whether there is a manifest."""
        return (self.path / MANIFEST).is_file()

    def tidy(self) -> None:
        """Remove what only the making needs."""
        shutil.rmtree(self.work, ignore_errors=True)


def shard_name(number: int) -> str:
    """Name a shard within its folder."""
    return f"{SHARDS}/shard-{number:06d}.h5ad"


def is_cell_folder(path: Path) -> bool:
    """Whether a path is such a folder, finished or not."""
    with suppress(OSError):
        return (path / REQUEST).is_file() and (path / SHARDS).is_dir()
    return False


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a finished folder.

    Raises
    ------
    LingshuError
        If there is none, or it is damaged or of another format.
    """
    try:
        manifest = read_checked_json(path / MANIFEST)
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {manifest['format_version']!r}")
        if list(manifest["shards"]) != [shard_name(number) for number in range(len(manifest["shards"]))]:
            raise ValueError("its manifest names other files")
        for record in manifest["shards"].values():
            ShardRecord(**record)
    except FileNotFoundError:
        raise LingshuError(_RULE, f"{path} is not finished", _AGAIN) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LingshuError(_RULE, f"{path}: {error}", _AGAIN) from None
    return manifest


def shard_files(path: Path, check: bool = True) -> list[Path]:
    """Give the shards of a finished folder, in order.

    Parameters
    ----------
    path
        The folder.
    check
        Whether to hold every file against its checksum.

    Raises
    ------
    LingshuError
        If the folder is not finished, or a file is missing or damaged.
    """
    records = {name: ShardRecord(**record) for name, record in read_manifest(path)["shards"].items()}
    for name, record in records.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != record.n_bytes or (check and sha256(file) != record.sha256):
            raise LingshuError(_RULE, f"{file} is missing or damaged", _AGAIN)
    return [path / name for name in records]


def _difference(before: Any, now: Any) -> str:
    short = [value for value in (before, now) if isinstance(value, (int, float, str))]
    return f" ({before}, now {now})" if len(short) == 2 else ""
