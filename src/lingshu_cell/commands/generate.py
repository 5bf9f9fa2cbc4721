"""The command ``lingshu generate``."""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingshu_cell.commands.options import (
    Device,
    DryRun,
    Json,
    MaxKl,
    RunFolder,
    Steps,
    Unseen,
    of_generation,
    read_steps,
)
from lingshu_cell.config import GenerationConfig
from lingshu_cell.console import cells_bar, choices_of, clock, give, give_json, say
from lingshu_cell.errors import LingshuError
from lingshu_cell.launch import LAUNCHED, command_line, is_first, is_launched, launch_apart

if TYPE_CHECKING:
    from lingshu_cell.data.vocabulary import GeneVocabulary
    from lingshu_cell.generate import TrainedModel
    from lingshu_cell.wanted_cells import WantedRow

EXAMPLES = (
    "lingshu generate run --n 1000 --out generated.h5ad",
    'lingshu generate run --n 500 --out b_cells.h5ad --condition cell_type="B cells" --seed 1',
    'lingshu generate run --n 500 --out b_ifn.h5ad --condition cell_type="B cells" --condition perturbation=IFNB',
    "lingshu generate run --n 500 --out new_line.h5ad --condition gene=KLF1 --context new_line_controls.h5ad",
    "lingshu generate run --n 1000 --out generated.h5ad --steps auto --max-kl 0.5",
    "lingshu generate run --n 1000 --out generated.h5ad --steps 256 --schedule cosine",
    "lingshu generate run --n 1000000 --out generated --processes 8",
    "lingshu generate run --requests wanted.csv --out generated --processes 8",
)


def generate(
    run: RunFolder,
    out: Annotated[
        Path, typer.Option(metavar="GEN.h5ad|FOLDER", help="File to write, or folder of shards (no ending).")
    ],
    n: Annotated[int | None, typer.Option(min=1, help="How many cells.")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="WANTED.csv",
            help="A row for each condition: columns of conditions, n, and if wanted dose and depth. Needs a folder.",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Wanted label; may be repeated. Others are drawn as often as in training."
        ),
    ] = None,
    dose: Annotated[float | None, typer.Option(help="Dose of the perturbation, in the unit of training.")] = None,
    depth: Annotated[
        str | None,
        typer.Option(metavar="UMI|model|open", help="UMI per cell, drawn as in training, or left to the network."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="CONTROLS.h5ad", help="Control cells of the identity wanted, e.g. of a new cell line."),
    ] = None,
    unseen: Unseen = "error",
    guidance_scale: Annotated[
        float | None,
        typer.Option(help=f"{of_generation('guidance_scale')} What lingshu calibrate found when not given."),
    ] = None,
    guidance_space: Annotated[str | None, typer.Option(help=of_generation("guidance_space"))] = None,
    clamp: Annotated[
        list[str] | None,
        typer.Option(metavar="GENE=COUNT", help="Fix a gene before the first step; other genes follow. Repeatable."),
    ] = None,
    tilt: Annotated[
        list[str] | None,
        typer.Option(metavar="GENE=FACTOR|FILE.csv", help="Multiply the mean of a gene, or of all in a file."),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="silenced",
            help="Start from 1 UMI in the perturbation's target and in all genes that it silences in other identities.",
        ),
    ] = None,
    de_tables: Annotated[
        Path | None,
        typer.Option(
            metavar="DE|TABLE.csv", help="What --prior goes by: of lingshu de; those of training if not given."
        ),
    ] = None,
    steps: Steps = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"{of_generation('schedule')} {choices_of(GenerationConfig, 'schedule')}, "
            "or visible counts: 1,10,100,1000."
        ),
    ] = None,
    max_kl: MaxKl = None,
    seed: Annotated[int | None, typer.Option(min=0, help=of_generation("seed"))] = None,
    minibatch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"{of_generation('minibatch_size')} Changes memory and speed, never a cell."),
    ] = None,
    shard_cells: Annotated[int | None, typer.Option(min=2, help=of_generation("shard_cells"))] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine that fill the folder, each with one thread on a CPU."),
    ] = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace GEN.h5ad if it exists.")] = False,
    json: Json = False,
) -> int:
    """Generate cells from a trained model.

    Writes integer counts of every gene (AnnData, CSR), labels and seeds in obs, and what made them in uns. A folder is
    filled shard by shard by any number of processes, on any number of machines: give the same command again, or on
    another one at the same time. See docs/generation.md.
    """
    to_folder = _is_folder(out, requests, processes, shard_cells, overwrite)
    if n is None and requests is None:
        raise LingshuError("A number of cells must be asked for", "neither --n nor --requests is given", "Add --n")
    started = time.monotonic()
    if to_folder and (processes or 1) > 1 and not is_launched() and not dry_run:
        code, ended = launch_apart(command_line(), processes or 1)
        for line in ended:
            say(line)
        if code == 0:
            _report(out, started, json)
        return code
    from lingshu_cell.generate import load_model, plan_cells, steering_of, write_cells
    from lingshu_cell.train import pick_device

    model = load_model(run, pick_device(device))
    wanted = _conditions(condition or ())
    steering = steering_of(
        model,
        guidance_scale=guidance_scale,
        guidance_space=guidance_space,
        clamp=_amounts(clamp or (), "clamp", int),
        tilt=_tilts(tilt or (), model.genes),
        prior=prior,
        de_tables=de_tables,
    )
    common = {
        "context": context,
        "unseen": unseen,
        "steering": steering,
        "steps": read_steps(steps),
        "schedule": schedule,
        "max_kl": max_kl,
        "minibatch_size": minibatch_size,
    }
    asked = {"condition": wanted, "dose": dose, "depth": depth}
    chosen_seed = model.config.generation.seed if seed is None else seed
    if to_folder or dry_run:
        rows = _rows(requests, model, n, chosen_seed, asked)
        size = (shard_cells or model.config.generation.shard_cells) if to_folder else None
        if dry_run:
            return _foretell(run, rows, out, device, processes or 1, size, common, json)
        return _fill(model, rows, out, shard_cells, common, started, json)
    plan = plan_cells(model, n, seed=seed, **asked, **common)
    for note in plan.notes:
        say(note)
    started = time.monotonic()
    with cells_bar(n) as show:
        written = write_cells(model, plan, out, overwrite=overwrite, on_progress=show)
    seconds = time.monotonic() - started
    if json:
        give_json(
            {
                "out": str(written),
                "n_cells": n,
                "n_genes": len(model.genes),
                "condition": wanted,
                "steps": plan.schedule.steps,
                "schedule": plan.schedule.name,
                "seed": plan.seed,
                "seconds": round(seconds, 1),
            }
        )
    else:
        give(f"{written}: {n:,} cells x {len(model.genes):,} genes, {clock(seconds)}, {n / seconds:,.1f} cells/s")
    return 0


def _is_folder(
    out: Path, requests: Path | None, processes: int | None, shard_cells: int | None, overwrite: bool
) -> bool:
    """Whether ``--out`` is a folder of shards, and whether other options agree."""
    if out.suffix == "" and (out.is_dir() or not out.exists()):
        if overwrite:
            remedy = "Leave --overwrite out, or name a new folder"
            raise LingshuError("A folder of cells is filled, never replaced", "--overwrite", remedy)
        return True
    only = {"--requests": requests, "--processes": processes, "--shard-cells": shard_cells}
    given = [name for name, value in only.items() if value is not None]
    if given:
        finding = f"{' and '.join(given)} with --out {out}"
        raise LingshuError("Shards are written to a folder", finding, "Name a folder, without an ending")
    return False


def _rows(
    requests: Path | None, model: "TrainedModel", n: int | None, seed: int, asked: dict[str, Any]
) -> "list[WantedRow]":
    """The rows of a table, or the one that the options ask for: the cells that a file would hold."""
    from lingshu_cell.wanted_cells import WantedRow, read_wanted_cells

    if requests is None:
        return [WantedRow(n_cells=n or 0, seed=seed, **asked)]
    return read_wanted_cells(requests, list(model.conditions.fields), seed, n_cells=n, **asked)


def _fill(
    model: "TrainedModel",
    rows: "list[WantedRow]",
    out: Path,
    shard_cells: int | None,
    common: dict[str, Any],
    started: float,
    json: bool,
) -> int:
    """Fill a folder together with others, and report as the first of the processes of one command."""
    from lingshu_cell.generate_shards import generate_folder

    n_cells = sum(row.n_cells for row in rows)
    with cells_bar(n_cells) if is_first() else contextlib.nullcontext(lambda n_done: None) as show:
        note = say if is_first() else lambda note: None
        generate_folder(model, rows, out, shard_cells=shard_cells, on_progress=show, on_note=note, **common)
    if is_first() and LAUNCHED not in os.environ:
        _report(out, started, json)
    return 0


def _foretell(
    run: Path,
    rows: "list[WantedRow]",
    out: Path,
    device: str,
    processes: int,
    shard_cells: int | None,
    common: dict[str, Any],
    json: bool,
) -> int:
    """Say what generation will take, and refuse what this machine has not; the first row stands for all."""
    from lingshu_cell.planner import check, describe, plan_generation

    first, n_cells = rows[0], sum(row.n_cells for row in rows)
    asked = common | {"condition": first.condition, "dose": first.dose, "depth": first.depth, "seed": first.seed}
    sizes = {"device": device, "n_processes": processes, "shard_cells": shard_cells}
    forecast = plan_generation(run, out, n_cells, **sizes, **asked)
    give_json(vars(forecast)) if json else give("\n".join(describe(forecast, out)))
    check(forecast, out)
    return 0


def _report(out: Path, started: float, json: bool) -> None:
    """Say what is in a folder, whoever filled it."""
    from lingshu_cell.data.cell_folder import read_manifest

    manifest, seconds = read_manifest(out), time.monotonic() - started
    n_cells, n_genes, n_shards = manifest["n_cells"], manifest["n_genes"], len(manifest["shards"])
    if json:
        facts = {"out": str(out), "n_cells": n_cells, "n_genes": n_genes, "n_shards": n_shards}
        give_json({**facts, "seconds": round(seconds, 1)})
    else:
        give(f"{out}: {n_cells:,} cells x {n_genes:,} genes in {n_shards:,} shards, {clock(seconds)}")


def _conditions(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` pairs."""
    wanted: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key or not value:
            raise LingshuError(
                "A condition must read KEY=VALUE", f"'{pair}'", 'Write e.g. --condition cell_type="B cells"'
            )
        if key in wanted:
            raise LingshuError("A condition has one value", f"{key} is given twice", "Generate one file for each value")
        wanted[key] = value
    return wanted


def _tilts(texts: Sequence[str], genes: "GeneVocabulary") -> dict[str, float]:
    """Read ``GENE=FACTOR`` pairs and files of genes."""
    from lingshu_cell.data.gene_sets import read_gene_tilts

    files = [text for text in texts if "=" not in text]
    tilts = _amounts([text for text in texts if "=" in text], "tilt", float)
    for file in files:
        wished = read_gene_tilts(file, genes.names)
        log2_factor = wished.log2_fold_change * wished.strength
        tilts |= {genes.names[g]: float(2 ** log2_factor[g]) for g in log2_factor.nonzero()[0]}
    return tilts


def _amounts(pairs: Sequence[str], option: str, kind: type) -> dict[str, Any]:
    """Read ``GENE=NUMBER`` pairs."""
    amounts: dict[str, Any] = {}
    for pair in pairs:
        gene, _, number = pair.partition("=")
        try:
            amounts[gene] = kind(number)
        except ValueError:
            what = "COUNT" if kind is int else "FACTOR"
            raise LingshuError(
                f"--{option} must read GENE={what}", f"'{pair}'", f"Write for example --{option} STAT1=1"
            ) from None
    return amounts
