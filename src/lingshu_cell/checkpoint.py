"""A trained run on disk: safetensors and one JSON manifest, written beside and renamed, checked before it is read.

A run is a folder::

    RUN/config.json            the whole configuration
    RUN/history.csv            one row per validation
    RUN/conditions.csv         how well validation conditions are foretold, where there are any
    RUN/best.json              the step that foretells them best
    RUN/checkpoint-00001500/   manifest.json and the tensors it lists, with their sha256

The manifest says what the model is (configuration, genes in order, token bins, conditions, data fingerprints, versions,
metrics, licence). Nothing is ever pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lingshu_cell.checksums import checksum, sha256
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import expanded, read_json, refuse_special
from lingshu_cell.output_files import checked, discard, flush, flush_all, writable, write_checked_json

# 5: convergence of identities (docs/decisions/0014); 4: gates by log means (0013); 3: programmes of cell states (0011)
FORMAT_VERSION = 5
CHECKPOINTS_KEPT = 2
BEST_FILE = "best.json"
_NAME = re.compile(r"checkpoint-(\d{8})")
_TENSOR_FILE = re.compile(r"[a-z0-9_.]+\.safetensors")
_MOST_MANIFEST_BYTES = 1 << 28
_UNFINISHED = ".checkpoint-"
_WHOLE = "A checkpoint must be whole"
_REMEDY = "Delete this folder to use the checkpoint before it, or copy it again from where it came"


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
            refuse_special(self.folder / file, _WHOLE, _REMEDY)
            if sha256(self.folder / file) != expected:
                raise _damaged(self.folder, f"{file} does not match its checksum")
            return load_file(self.folder / file)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, f"{file}: {error}") from None


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what goes wrong while a model is built from a checkpoint into an error that names the folder.

    A checkpoint whose checksums fit may still hold what no run wrote: missing entries, other types, tensors of other
    shapes.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, LingshuError):
            raise
        finding = f"it holds what no run writes ({type(error).__name__}: {str(error)[:300]})"
        raise _damaged(checkpoint.folder, finding) from None


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
    keep: int = CHECKPOINTS_KEPT,
) -> Path:
    """Write a checkpoint beside, rename it when it is whole, and drop all but the newest ``keep`` and the best.

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
    final = run / _name(step)
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
    best = read_best(run)
    for old in _folders(run)[:-keep]:
        if best is None or old.name != _name(best["step"]):
            discard(old)
    return final


def sweep(run: Path) -> None:
    """Remove what a killed process left of checkpoints that it was writing or removing."""
    for rest in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(rest, ignore_errors=True)


def is_unfinished(name: str) -> bool:
    """Say whether a name in a run folder is that of such a rest."""
    return name.startswith(_UNFINISHED)


def holds_step(run: Path, step: int) -> bool:
    """Say whether a run folder holds the checkpoint of a step."""
    return (run / _name(step)).is_dir()


def mark_best(run: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Say in ``RUN/best.json`` that the checkpoint of a step, which exists, is the one to generate from."""
    with writable("The run folder must be writable", run / BEST_FILE, "Free some space, then go on with --resume"):
        write_checked_json(run / BEST_FILE, {"step": step, **facts})


def read_best(run: Path) -> dict[str, Any] | None:
    """Give what :func:`mark_best` wrote; ``None`` where there is none.

    Raises
    ------
    LingshuError
        If it cannot be read.
    """
    file, rule = run / BEST_FILE, "best.json must say which step is best"
    if not file.is_file():
        return None
    best = read_json(file, rule, "Delete this file")
    try:
        best = checked(best)
        if not isinstance(best["step"], int) or not isinstance(best["condition_explained"], float):
            raise ValueError("no step or score")
    except (ValueError, KeyError) as error:
        raise LingshuError(rule, f"{file}: {error}", "Delete this file") from None
    return best


def load_best(path: Path | str) -> Checkpoint:
    """Open the best checkpoint of a run, the newest where none is marked as such, or the checkpoint folder itself."""
    path = expanded(path)
    best = None if _NAME.fullmatch(path.name) else read_best(path)
    chosen = path if best is None else path / _name(best["step"])
    return load_checkpoint(chosen if chosen.is_dir() else path)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Open the newest checkpoint of a run, or the checkpoint folder itself.

    Raises
    ------
    LingshuError
        If there is none, or its manifest is damaged, of a newer format, or not ours.
    """
    path = expanded(path)
    folders = [path] if _NAME.fullmatch(path.name) else _folders(path)
    if not folders or not folders[-1].is_dir():
        raise LingshuError(
            "A run folder must hold a checkpoint",
            f"none found in {path}",
            "Pass the folder that lingshu train --out wrote; a run that ended before its first checkpoint starts anew "
            "without --resume",
        )
    folder = folders[-1]
    manifest = read_json(folder / "manifest.json", _WHOLE, _REMEDY, _MOST_MANIFEST_BYTES)
    if not isinstance(manifest.get("files"), dict):
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


def _name(step: int) -> str:
    return f"checkpoint-{step:08d}"


def _folders(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if _NAME.fullmatch(p.name)) if run.is_dir() else []


def _damaged(folder: Path, finding: str) -> LingshuError:
    return LingshuError(_WHOLE, f"{folder}: {finding}", _REMEDY)
