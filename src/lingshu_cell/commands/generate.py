"""The command ``lingshu generate``."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingshu_cell.commands.options import Device, Json, MaxKl, RunFolder, Steps, of_generation, read_steps
from lingshu_cell.config import GenerationConfig
from lingshu_cell.console import cells_bar, choices_of, clock, give, give_json, say
from lingshu_cell.errors import LingshuError

if TYPE_CHECKING:
    from lingshu_cell.data.vocabulary import GeneVocabulary

EXAMPLES = (
    "lingshu generate run --n 1000 --out generated.h5ad",
    'lingshu generate run --n 500 --out b_cells.h5ad --condition cell_type="B cells" --seed 1',
    'lingshu generate run --n 500 --out b_ifn.h5ad --condition cell_type="B cells" --condition perturbation=IFNB',
    "lingshu generate run --n 500 --out new_line.h5ad --condition gene=KLF1 --context new_line_controls.h5ad",
    "lingshu generate run --n 1000 --out generated.h5ad --steps auto --max-kl 0.5",
    "lingshu generate run --n 1000 --out generated.h5ad --steps 256 --schedule cosine",
)


def generate(
    run: RunFolder,
    n: Annotated[int, typer.Option(min=1, help="How many cells.")],
    out: Annotated[Path, typer.Option(metavar="GEN.h5ad", help="File to write.")],
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
    unseen: Annotated[
        str, typer.Option(help="Perturbations never trained: error, or embedding (models with data.embeddings).")
    ] = "error",
    guidance_scale: Annotated[
        float | None, typer.Option(help=f"{of_generation('guidance_scale')} The run's own when not given.")
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
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace GEN.h5ad if it exists.")] = False,
    json: Json = False,
) -> None:
    """Generate cells from a trained model.

    Writes integer counts of every gene (AnnData, CSR), labels and seeds in obs, and what made them in uns.
    """
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
    plan = plan_cells(
        model,
        n,
        condition=wanted,
        dose=dose,
        depth=depth,
        context=context,
        unseen=unseen,
        steering=steering,
        steps=read_steps(steps),
        schedule=schedule,
        max_kl=max_kl,
        seed=seed,
        minibatch_size=minibatch_size,
    )
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
