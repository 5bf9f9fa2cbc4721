"""Random mutations of whole files: bits flipped, bytes cut off, moved, repeated or put to 0 and 255."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from malformed.examples import tiny
from malformed.harness import EITHER, Case


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage bytes in one of six ways."""
    data = bytearray(content)
    place = int(rng.integers(len(data)))
    end = min(place + int(rng.integers(1, 64)), len(data))
    kind = int(rng.integers(6))
    if kind == 0:
        for bit in rng.integers(0, 8 * len(data), int(rng.integers(1, 9))):
            data[bit // 8] ^= 1 << (bit % 8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place:end]
    elif kind == 3:
        data[place:place] = data[place:end]
    elif kind == 4:
        data[place:end] = bytes(end - place)
    else:
        data[place:end] = b"\xff" * (end - place)
    return bytes(data)


def _h5ad(examples: Path) -> tuple[Path, Sequence[str]]:
    shutil.copy(examples / "cells.h5ad", "bad.h5ad")
    return Path("bad.h5ad"), ["train", "bad.h5ad", "--out", "run", *tiny()]


def _streamed(examples: Path) -> tuple[Path, Sequence[str]]:
    return _h5ad(examples)[0], ["prepare", "bad.h5ad", "--out", "store"]


def _npz(examples: Path) -> tuple[Path, Sequence[str]]:
    shutil.copy(examples / "genes.npz", "bad.npz")
    return Path("bad.npz"), ["embeddings", "--from-file", "bad.npz", "--out", "out.npz"]


def _safetensors(examples: Path) -> tuple[Path, Sequence[str]]:
    from safetensors.numpy import save_file

    with np.load(examples / "genes.npz") as arrays:
        save_file({str(g): v for g, v in zip(arrays["genes"], arrays["embeddings"], strict=True)}, "bad.safetensors")
    return Path("bad.safetensors"), ["embeddings", "--from-file", "bad.safetensors", "--out", "out.npz"]


def _toml(examples: Path) -> tuple[Path, Sequence[str]]:
    from lingshu_cell.config import load_config
    from lingshu_cell.console import settings_toml

    Path("my.toml").write_text(settings_toml(load_config("small")), encoding="utf-8")
    return Path("my.toml"), ["config", "--config", "my.toml"]


def _any_of(folder: str, pattern: str, rng: np.random.Generator) -> Path:
    files = sorted(path for path in Path(folder).rglob(pattern) if path.is_file() and path.stat().st_size)
    return files[int(rng.integers(len(files)))]


WHOLE: dict[str, Callable[[Path], tuple[Path, Sequence[str]]]] = {
    "h5ad": _h5ad, "h5ad-streamed": _streamed, "npz": _npz, "safetensors": _safetensors, "toml": _toml,
}  # fmt: skip
KINDS = (*WHOLE, "zarr", "run", "manifest", "store", "evaluation", "responses")


def mutation(kind: str, seed: int) -> Case:
    """Give the case of one random mutation; the same for the same seed."""

    def make(examples: Path) -> Sequence[str] | Callable[[], Any]:
        from malformed import folder_cases

        rng = np.random.default_rng([seed, KINDS.index(kind)])
        if kind in WHOLE:
            file, work = WHOLE[kind](examples)
        elif kind == "zarr":
            shutil.copytree(examples / "cells.zarr", "bad.zarr")
            file, work = _any_of("bad.zarr", "*", rng), ["prepare", "bad.zarr", "--out", "store"]
        elif kind in ("run", "manifest"):
            shutil.copytree(examples / "run", "model")
            pattern = "checkpoint-*/*" if kind == "run" else "manifest.json"
            file, work = _any_of("model", pattern, rng), folder_cases.GENERATE
        elif kind == "store":
            work = folder_cases._store(lambda folder: None)(examples)
            file = _any_of("store", "*", rng)
        else:
            source = folder_cases.GOLDEN / "ours" if kind == "responses" else examples / kind
            shutil.copytree(source, "judged")
            file, work = _any_of("judged", "*", rng), ["report", "judged"]
        file.write_bytes(mutated(file.read_bytes(), rng))
        return work

    return Case(f"mutation:{kind}:{seed}", f"mutated {kind}", EITHER, make)
