"""A trained run on disk: safetensors and one JSON manifest, written beside and renamed, checked before it is read.

A run is a folder::

    RUN/config.json            the whole configuration
    RUN/history.csv            one row per validation
    RUN/checkpoint-00001500/   manifest.json and the tensors it lists, with their sha256

The manifest says what the model is (configuration, genes in order, token bins, conditions, data fingerprints, versions,
metrics, licence). Nothing is ever pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lingshu_cell.checksums import checksum, sha256
from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import discard, flush, flush_all

FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{8})")
_TENSOR_FILE = re.compile(r"[a-z0-9_.]+\.safetensors")
_MOST_MANIFEST_BYTES = 1 << 28
_UNFINISHED = ".checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint whose manifest has been checked; tensors are read, and checked, when asked for.

    Attributes
    ----------
    folder
        ``RUN/checkpoint-NNNNNNNN``.
    manifest
        The manifest, see :func:`save_checkpoint`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(_NAME.fullmatch(self.folder.name)[1])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read ``name``.safetensors after comparing its checksum with the manifest's."""
        file = f"{name}.safetensors"
        expected = self.manifest["files"].get(file)
        if expected is None or not _TENSOR_FILE.fullmatch(file):
            raise _damaged(self.folder, f"the manifest lists no {file}")
        try:
            if sha256(self.folder / file) != expected:
                raise _damaged(self.folder, f"{file} does not match its checksum")
            return load_file(self.folder / file)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, f"{file}: {error}") from None


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint beside, rename it when it is whole, and drop all but the newest ``keep``.

    Parameters
    ----------
    run
        Folder of the run; it exists.
    step
        Optimiser steps done, which names the checkpoint.
    tensors
        For each file name (without ending) its tensors.
    manifest
        JSON values that describe the model; ``format_version``, ``files`` and ``checksum`` are added.
    keep
        How many checkpoints stay.

    Returns
    -------
    Path
        The folder of the checkpoint.

    Raises
    ------
    LingshuError
        If the disk is full or the folder cannot be written; the checkpoints before stay whole.
    """
    final = run / f"checkpoint-{step:08d}"
    draft = run / f"{_UNFINISHED}{step:08d}.tmp"
    try:
        sweep(run)
        draft.mkdir()
        for name, values in tensors.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in values.items()}, draft / f"{name}.safetensors"
            )
        files = {file.name: sha256(file) for file in sorted(draft.iterdir())}
        content = {"format_version": FORMAT_VERSION, **manifest, "files": files}
        content["checksum"] = checksum(content)
        (draft / "manifest.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        flush_all(draft)
        if final.exists():
            discard(final)
        os.replace(draft, final)
        flush(run)  # before older ones go: a power cut must not take both
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise LingshuError(
            "The run folder must be writable", f"{run}: {error}", "Free some space or change --out"
        ) from None
    for old in _folders(run)[:-keep]:
        discard(old)
    return final


def sweep(run: Path) -> None:
    """Remove what a killed process left of checkpoints that it was writing or removing."""
    for rest in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(rest, ignore_errors=True)


def is_unfinished(name: str) -> bool:
    """Say whether a name in a run folder is that of such a rest."""
    return name.startswith(_UNFINISHED)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Open the newest checkpoint of a run, or the checkpoint folder itself.

    Raises
    ------
    LingshuError
        If there is none, or its manifest is damaged, of a newer format, or not ours.
    """
    path = Path(path).expanduser()
    folders = [path] if _NAME.fullmatch(path.name) else _folders(path)
    if not folders or not folders[-1].is_dir():
        raise LingshuError(
            "A run folder must hold a checkpoint",
            f"none found in {path}",
            "Pass the folder that lingshu train --out wrote; a run that ended before its first checkpoint starts anew "
            "without --resume",
        )
    folder = folders[-1]
    try:
        if (folder / "manifest.json").stat().st_size > _MOST_MANIFEST_BYTES:
            raise _damaged(folder, "manifest.json is too large")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise _damaged(folder, "manifest.json is no manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise LingshuError(
            f"The checkpoint must have format version {FORMAT_VERSION}",
            f"{folder} has {manifest.get('format_version')!r}",
            "Install the version of lingshu-cell that wrote it",
        )
    if manifest.get("checksum") != checksum(manifest):
        raise _damaged(folder, "manifest.json does not match its checksum")
    return Checkpoint(folder, manifest)


def _folders(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if _NAME.fullmatch(p.name)) if run.is_dir() else []


def _damaged(folder: Path, finding: str) -> LingshuError:
    return LingshuError(
        "A checkpoint must be whole",
        f"{folder}: {finding}",
        "Delete this folder to use the checkpoint before it, or copy it again from where it came",
    )
