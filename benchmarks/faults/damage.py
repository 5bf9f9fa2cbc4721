"""Files that are cut off or have a flipped bit: they must be found out before anything is computed from them."""

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from commands import Command, contents, differing
from forks import Disturbance, fork
from recording import markdown_table

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.data.store import open_store
from lingshu_cell.errors import LingshuError

_NOT_READ = ("history.csv", "conditions.csv", "config.json", "identities.json", "schedule.json", "schedule.png")
"""By the package's own readers: by commands only, or by people only."""
_FLIPS_READ, _CUTS_READ = 40, 10  # of each file, read by the package itself
_FLIPS_COMMAND, _CUTS_COMMAND = 2, 1  # of each file, given to commands


def run(
    commands: dict[str, Command], place: Callable[[str], Path], each: Callable[..., list], seed: int
) -> tuple[dict[str, Any], list[str], str]:
    """Damage every file of a run, of a store and of an unfinished store."""
    rows, problems = [], []
    wanted = {"a finished run", "a store", "an unfinished store"}
    made = {}
    if {"train", "schedule"} <= commands.keys():
        made["a finished run"] = _make_run(commands, place("run"))
    if "prepare" in commands:
        made["a store"] = place("store")
        _must(fork(commands["prepare"].words, made["a store"]))
        made["an unfinished store"] = _make_unfinished(commands["prepare"], place("unfinished"))
    for what in sorted(wanted & made.keys()):
        root = made[what]
        files = [file.relative_to(root) for file in sorted(root.rglob("*")) if file.is_file() and file.stat().st_size]
        rng = np.random.default_rng(seed)
        read = 0
        if what != "an unfinished store":
            for file in files:
                if file.name in (
                    "history.csv",
                    "conditions.csv",
                    "config.json",
                    "identities.json",
                    "schedule.json",
                    "schedule.png",
                ):
                    continue  # read by commands only, or by people only
                for how in _ways(root / file, rng, _FLIPS_READ, _CUTS_READ):
                    read += 1
                    if not _is_found_out(root, file, how):
                        problems.append(f"{what}: {file} {how} was read")
        given = [(words, _with_whole_files(words, root)) for words in _given(what, commands)]
        tasks = [
            (what, root, file, how, given)
            for file in files
            for how in _ways(root / file, rng, _FLIPS_COMMAND, _CUTS_COMMAND)
        ]
        outcomes = each(_by_commands, tasks)
        problems += [one for _, found in outcomes for one in found]
        refused = sum(outcome == "refused" for outcome, _ in outcomes)
        rows.append((what, len(files), read, len(tasks), refused, len(tasks) - refused))
    text = (
        "## Damaged files\n\nEvery file, cut off at many places and with single bits flipped. *read*: opened by the "
        "package itself, found out by checksum each time. *by commands*: given to the commands that use it "
        "(`generate`, `train --resume`, `schedule`; `prepare`): either *refused* (exit code 2, one line), or the "
        "damage *changed nothing*: the file is not read by them or is made anew, and their output is bit for bit the "
        "same.\n\n" + markdown_table(("what", "files", "read", "by commands", "refused", "changed nothing"), rows)
    )
    return {"rows": rows}, problems, text


def _make_run(commands: dict[str, Command], folder: Path) -> Path:
    """Train a run, with a schedule measured for it."""
    _must(fork(commands["train"].words, folder))
    _must(fork(commands["schedule"].words, folder))
    return folder


def _make_unfinished(prepare: Command, folder: Path) -> Path:
    """End ``prepare`` when it has made some of its shards."""
    for at in range(130, 10, -7):
        shutil.rmtree(folder)
        folder.mkdir()
        fork(prepare.words, folder, Disturbance(signal.SIGKILL, at=at))
        if (folder / "store" / ".work").is_dir() and len(list((folder / "store" / "shards").glob("*.h5ad"))) > 1:
            return folder
    raise SystemExit("prepare could not be ended half-way")


def _ways(file: Path, rng: np.random.Generator, n_flips: int, n_cuts: int) -> list[tuple[str, int]]:
    """Choose bits to flip and lengths to cut to: the ends and random places."""
    size = file.stat().st_size
    bits = sorted({0, 8 * size - 1, *rng.integers(8 * size, size=max(n_flips - 2, 0)).tolist()})[:n_flips]
    last = size - 2 if file.suffix == ".json" else size - 1  # without its last end of line JSON is the same
    cuts = sorted({0, last, *rng.integers(size, size=max(n_cuts - 2, 0)).tolist()})
    chosen = cuts[:n_cuts] if n_cuts > 1 else [int(rng.choice(cuts))]
    return [("flip", int(bit)) for bit in bits] + [("cut", int(cut)) for cut in chosen]


def _damaged(content: bytes, how: tuple[str, int]) -> bytes:
    kind, at = how
    if kind == "cut":
        return content[:at]
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def _is_found_out(root: Path, file: Path, how: tuple[str, int]) -> bool:
    """Read a run or store with one damaged file; the file is mended afterwards."""
    path = root / file
    whole = path.read_bytes()
    path.write_bytes(_damaged(whole, how))
    try:
        if file.parts[0] == "store":
            open_store(root / "store", verify=True).close()
        else:
            checkpoint = load_checkpoint(path.parent)
            for name in checkpoint.manifest["files"]:
                checkpoint.tensors(name.removesuffix(".safetensors"))
    except LingshuError:
        return True
    finally:
        path.write_bytes(whole)
    return False


def _given(what: str, commands: dict[str, Command]) -> list[tuple[str, ...]]:
    """Say which commands read it."""
    if what != "a finished run":
        return [commands["prepare"].words]
    generate = ("generate", "run", "--n", "8", "--out", "cells.h5ad", "--device", "cpu", "--overwrite")
    return [generate, commands["train"].resume or (), ("schedule", "run")]


def _with_whole_files(words: tuple[str, ...], root: Path) -> dict[str, str]:
    """Give what a command leaves where nothing is damaged."""
    folder = root.with_name(f"{root.name}-whole")
    shutil.copytree(root, folder)
    _must(fork(words, folder))
    left = contents(folder)
    shutil.rmtree(folder)
    return left


def _by_commands(
    what: str, root: Path, file: Path, how: tuple[str, int], given: Sequence[tuple[tuple[str, ...], dict[str, str]]]
) -> tuple[str, list[str]]:
    """Give damage to the commands that read it; a command must refuse it or be unmoved by it."""
    outcome, problems = "nothing", []
    folder = root.with_name(f"{root.name}-{file.name}-{how[0]}-{how[1]}")
    shutil.copytree(root, folder)
    (folder / file).write_bytes(_damaged((root / file).read_bytes(), how))
    damaged = contents(folder)
    for words, wanted in given:
        ended = fork(words, folder)
        if ended.code == 0:
            others = [
                one
                for one in differing(contents(folder), wanted)
                if (str(file) not in one and not one.endswith("cells.h5ad"))
                or one.startswith("other bytes in cells.h5ad")
            ]
            if others:
                problems.append(f"{what}: {file} {how}, {words[0]}: taken for whole: {others[:4]}")
        else:
            outcome = "refused"
            if wrong := ended.refused_well():
                problems.append(f"{what}: {file} {how}, {words[0]}: {wrong}")
            if what != "an unfinished store" and (changed := differing(contents(folder), damaged)):
                changed = [one for one in changed if "cells.h5ad" not in one and "schedule.png" not in one]
                if changed:
                    problems.append(f"{what}: {file} {how}, {words[0]}: refused, but {changed[:4]}")
    shutil.rmtree(folder)
    return outcome, problems


def _must(ended: Any) -> None:
    if ended.code:
        raise RuntimeError(ended.err[-2000:])
