"""The commands that write, on small real data: how each is given, given again, and what must have come of it."""

import contextlib
import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from data_sets import SHARED
from forks import fork

from lingshu_cell.checkpoint import BEST_FILE, load_checkpoint
from lingshu_cell.data.store import open_store
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import read_checked_json

TRAINING = (
    "network.gene_width=8", "network.width=16", "network.n_blocks=1", "network.feedforward_width=32",
    "training.steps=24", "training.minibatch_size=16", "training.warmup_steps=5", "training.validate_every=6",
    "training.checkpoint_every=6", "training.device=cpu", "generation.steps=8", "generation.minibatch_size=16",
    "generation.tile_size=8",
)  # fmt: skip
_FEW_STEPS = ("training.steps=12", "training.validate_every=4", "training.checkpoint_every=4")
_SPLIT = """perturbation_key = "perturbation"
control = "control"
identity_key = "cell_type"
[validation]
pairs = [{ cell_type = "NK cells", perturbation = "IFNB" }]
"""
_GROWING = ("history.csv", "conditions.csv")
_NOT_COMPARED = (".lock",)


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes
    ----------
    name
        In the tables.
    words
        What is given, in a folder of its own.
    out
        What it writes there.
    resume
        What is given after it was ended; the same words where that is what the documentation says.
    begin
        Puts there what must be there before: a run that it writes into.
    overwrite
        Words to add where the output is there already.
    weight
        How many of the kills it gets, in proportion.
    holds
        Whether a second one on the same output is refused.
    processes
        How many it starts; those that are several are no forks of the harness.
    """

    name: str
    words: tuple[str, ...]
    out: str
    resume: tuple[str, ...] | None = None
    begin: Callable[[Path], None] = lambda folder: None
    overwrite: tuple[str, ...] = ()
    weight: int = 1
    holds: bool = field(default=True)
    processes: int = 1

    def again(self, folder: Path) -> tuple[str, ...]:
        """Say what a user gives after the command was ended in ``folder``."""
        begun = self.resume is not None and any((folder / self.out).glob("checkpoint-*"))
        return self.resume if begun else self.words


def make_data(work: Path) -> dict[str, Path]:
    """Write the input files: 300 cells of PBMC 3k × 2,000 genes, others held out, and some of Kang's."""
    cells = ad.read_h5ad(pbmc3k_path())
    detected = np.asarray((cells.X > 0).sum(0)).ravel()
    genes = np.sort(np.argsort(-detected, kind="stable")[:2_000])
    cells = cells[::6][:, genes].copy()
    files = {name: work / f"{name}.h5ad" for name in ("one", "two", "cells", "heldout", "predicted")}
    cells[:200].write_h5ad(files["one"])
    cells[200:300].write_h5ad(files["two"])
    cells[:300].write_h5ad(files["cells"])
    cells[300:].write_h5ad(files["heldout"])
    predicted = cells[:300].copy()
    predicted.obs["perturbation"] = np.array(["GENE1", "GENE2", "GENE3"])[np.arange(300) % 3]
    predicted.obs["cell_line"] = "blood"
    predicted.write_h5ad(files["predicted"])
    files["genes"] = work / "genes.txt"
    files["genes"].write_text("\n".join(cells.var_names) + "\n", encoding="utf-8")
    kang = SHARED / "kang_ifnb.h5ad"
    if kang.is_file():
        screen = ad.read_h5ad(kang)
        screen = screen[screen.obs["cell_type"].isin(["B cells", "CD14+ Monocytes", "CD4 T cells", "NK cells"])]
        screen = screen[np.random.default_rng(0).permutation(screen.n_obs)[:900]]
        detected = np.asarray((screen.X > 0).sum(0)).ravel()
        screen = screen[:, np.sort(np.argsort(-detected, kind="stable")[:600])].copy()
        kind = screen.obs["cell_type"].value_counts().index[0]
        control = screen.obs["perturbation"].astype(str).eq("control").to_numpy()
        heldout = (screen.obs["cell_type"] == kind).to_numpy()
        files |= {"screen": work / "screen.h5ad", "validation": work / "validation.h5ad"}
        screen[~heldout | (control & (np.arange(screen.n_obs) % 2 == 0))].write_h5ad(files["screen"])
        screen[heldout].write_h5ad(files["validation"])
    return files


def make_commands(work: Path, only: Sequence[str] | None = None) -> list[Command]:
    """Write the input, train the runs that other commands need, and give all commands, or those named."""
    files = make_data(work)
    settings = [word for one in TRAINING for word in ("--set", one)]
    few = [word for one in _FEW_STEPS for word in ("--set", one)]  # as each step waits for the other process
    run, screen_run = work / "run", work / "screen-run"
    _must(fork(["train", files["cells"], "--out", run, *settings], work))
    _must(fork(["generate", run, "--n", "150", "--out", work / "generated.h5ad", "--device", "cpu"], work))
    if only is None or "report" in only:
        _must(fork(["evaluate", *_evaluation(work, files), "--out", work / "judged"], work))

    def with_run(folder: Path) -> None:
        shutil.copytree(run, folder / "run")

    def with_judged(folder: Path) -> None:
        shutil.copytree(work / "judged", folder / "judged")

    plain = [
        "export",
        "vcc2026",
        files["predicted"],
        "--genes",
        files["genes"],
        "--n-genes",
        0,
        "--cells-per-condition",
        0,
    ]
    found = [
        Command(
            "prepare", _words("prepare", files["one"], files["two"], "--out", "store", "--cells-per-shard", 64),
            "store", weight=4,
        ),
        Command(
            "train", _words("train", files["cells"], "--out", "run", *settings), "run",
            _words("train", files["cells"], "--out", "run", "--resume"), weight=6,
        ),
        Command(
            "train, 2 processes",
            _words("train", files["cells"], "--out", "run", *settings, *few, "--processes", 2), "run",
            _words("train", files["cells"], "--out", "run", "--resume", "--processes", 2), weight=3, processes=2,
        ),
        Command(
            "generate", _words("generate", run, "--n", 150, "--out", "generated.h5ad", "--device", "cpu"),
            "generated.h5ad", overwrite=("--overwrite",), weight=4,
        ),
        Command("export", _words(*plain, "--out", "out.h5ad"), "out.h5ad", overwrite=("--overwrite",), weight=4),
        Command("evaluate", _words("evaluate", *_evaluation(work, files), "--out", "judged"), "judged", weight=1),
        Command("schedule", _words("schedule", "run", "--data", files["heldout"]), "run", begin=with_run, weight=2),
        Command("report", _words("report", "judged"), "judged/report.html", begin=with_judged, holds=False),
        Command(
            "embeddings",
            _words("embeddings", "--from-counts", files["cells"], "--components", 8, "--out", "genes.npz"),
            "genes.npz", holds=False,
        ),
    ]  # fmt: skip
    if "screen" in files:
        labels = ["--perturbation-key", "perturbation", "--control", "control"]
        trained = ["train", files["screen"], *labels, "--condition-key", "cell_type", "--out", screen_run, *settings]
        _must(fork(trained, work))

        def with_screen_run(folder: Path) -> None:
            shutil.copytree(screen_run, folder / "run")

        split = work / "split.toml"
        split.write_text(_SPLIT, encoding="utf-8")
        parts = ["--set", f"data.split={split}", "--set", "data.silenced=true", "--condition-key", "cell_type"]
        found += [
            Command(
                "train, split",
                _words("train", files["screen"], *labels, *parts, "--out", "run", *settings), "run",
                _words("train", files["screen"], "--out", "run", "--resume"), weight=3,
            ),
            Command(
                "calibrate", _words("calibrate", "run", "--data", files["validation"], "--n", 20, "--scales", "1,2"),
                "run", begin=with_screen_run,
            ),
            Command("de", _words("de", files["screen"], *labels, "--identity-key", "cell_type", "--out", "de"), "de"),
            Command(
                "baseline",
                _words("baseline", "additive", "--training", files["screen"], "--like", files["validation"], *labels,
                       "--identity-key", "cell_type", "--out", "additive.h5ad"),
                "additive.h5ad", overwrite=("--overwrite",),
            ),
        ]  # fmt: skip
    return [command for command in found if only is None or command.name in only]


def _evaluation(work: Path, files: dict[str, Path]) -> list[Any]:
    return [
        "--real", files["heldout"], "--generated", work / "generated.h5ad", "--training", files["cells"],
        "--splits", 1, "--max-cells", 100,
    ]  # fmt: skip


def _words(*words: object) -> tuple[str, ...]:
    return tuple(map(str, words))


def _must(ended: Any) -> None:
    if ended.code:
        raise SystemExit(f"the work cannot be set up: {ended.err[-2000:]}")


# --- what came of it ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Give the sha256 of what must be the same each time of every file in a folder; of a run the newest checkpoint."""
    newest = {run.parent: max(run.parent.glob("checkpoint-*")) for run in folder.rglob("checkpoint-*")}
    found = {}
    for file in sorted(folder.rglob("*")):
        older = any(run in file.parents and file != new and new not in file.parents and _in_checkpoint(file, run)
                    for run, new in newest.items())  # fmt: skip
        if file.is_dir() or older or file.name in _NOT_COMPARED:
            continue
        found[str(file.relative_to(folder))] = hashlib.sha256(_lasting(file)).hexdigest()
    return found


def _in_checkpoint(file: Path, run: Path) -> bool:
    return file.relative_to(run).parts[0].startswith("checkpoint-")


def _lasting(file: Path) -> bytes:
    """What a file says without wall times; all of it where it is damaged."""
    with contextlib.suppress(ValueError, csv.Error):
        if file.name == "history.csv":
            with open(file, newline="", encoding="utf-8") as stream:
                rows = [{**row, "seconds": None} for row in csv.DictReader(stream)]
            return json.dumps(rows).encode()
        if file.name in ("facts.json", "responses.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            content.pop("seconds", None)
            return json.dumps(content).encode()
    if file.name == "report.html":
        return b"".join(line for line in file.read_bytes().splitlines() if b"202" not in line)  # dates
    return file.read_bytes()


def differing(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Say which files are missing, too many, or others."""
    return [
        *(f"missing {name}" for name in wanted.keys() - found.keys()),
        *(f"left over {name}" for name in found.keys() - wanted.keys()),
        *(f"other bytes in {name}" for name in found.keys() & wanted.keys() if found[name] != wanted[name]),
    ]


def half_written(folder: Path, wanted: dict[str, str], before: Iterable[str]) -> list[str]:
    """Look for files that are not whole though they have their final names, right after a process was ended.

    Files that are written once must be there as they will be, as they were before, or not at all. Of a run each
    checkpoint must match its checksums; a store without a manifest must be refused.
    """
    problems = []
    known = set(before)
    for name, digest in contents(folder).items():
        parts = Path(name).parts
        if any(part.startswith(".") or part.endswith(".tmp") for part in parts) or name.endswith(_GROWING):
            continue  # a draft, or a log that grows
        in_run = any(part.startswith("checkpoint-") for part in parts)
        if (
            not in_run
            and name in wanted
            and digest not in (wanted[name], *known)
            and not _says_it_is_whole(folder / name)
        ):
            problems.append(f"half-written {name}")
    for checkpoint in folder.rglob("checkpoint-*"):
        try:
            loaded = load_checkpoint(checkpoint)
            for file in loaded.manifest["files"]:
                loaded.tensors(file.removesuffix(".safetensors"))
        except LingshuError as error:
            problems.append(f"checkpoint: {error}")
    for manifest in folder.glob("store*/manifest.json"):
        try:
            open_store(manifest.parent, verify=True)
        except LingshuError as error:
            problems.append(f"store: {error}")
    return problems


def _says_it_is_whole(file: Path) -> bool:
    """Whether a file that is written again and again, ``best.json`` of a run, matches the checksum in it."""
    if file.name != BEST_FILE:
        return False
    try:
        read_checked_json(file)
    except ValueError:
        return False
    return True


def by_weight(commands: Sequence[Command], n: int) -> list[Command]:
    """Repeat the commands in turn, each as often as its weight says, ``n`` in all."""
    deck = [command for command in commands for _ in range(command.weight)]
    order = np.random.default_rng(1).permutation(len(deck))
    return [deck[order[i % len(deck)]] for i in range(n)]
