"""The command ``lingshu calibrate``."""

from typing import Annotated

import typer

from lingshu_cell.commands.options import Device, Json, RunFolder, Steps, Unseen, read_steps
from lingshu_cell.console import give, give_json, say
from lingshu_cell.errors import LingshuError

EXAMPLES = (
    "lingshu calibrate run --data parts/validation.h5ad",
    "lingshu calibrate run --data parts/validation.h5ad --scales 1,2,3 --space logits",
    "lingshu calibrate run --data parts/validation.h5ad --unseen embedding",
)


def calibrate(
    run: RunFolder,
    data: Annotated[
        str,
        typer.Option(metavar="VALIDATION.h5ad", help="Perturbed cells of conditions not trained, and control cells."),
    ],
    scales: Annotated[
        str | None, typer.Option(metavar="S,S,…", help="Strengths to try; several from 0.5 to 3 when not given.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="log-mean or logits; the run's own when not given.")] = None,
    n: Annotated[int, typer.Option(min=20, help="Cells to generate for each condition and strength.")] = 200,
    steps: Steps = None,
    unseen: Unseen = "error",
    layer: Annotated[str | None, typer.Option(help="Layer of the counts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of generation.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fit guidance so that predicted effects are as large as measured ones.

    Generates validation conditions (never those of the test) under several strengths and takes the one with slope 1 of
    predicted on measured log fold change. Writes RUN/guidance.json, which lingshu generate uses from then on.
    """
    from dataclasses import asdict

    from lingshu_cell.calibrate import SCALES
    from lingshu_cell.calibrate import calibrate as calibrate_run
    from lingshu_cell.train import pick_device

    found = calibrate_run(
        run,
        data,
        scales=SCALES if scales is None else _numbers(scales),
        space=space,
        n_cells=n,
        steps=read_steps(steps),
        unseen=unseen,
        layer=layer,
        seed=seed,
        device=pick_device(device),
        on_progress=say,
    )
    if not min(found.slopes) <= 1 <= max(found.slopes):
        say(f"no strength tried gives slope 1: {found.scale:g} is the nearest, and others may do better (--scales)")
    if json:
        give_json({"run": str(run), **asdict(found)})
    else:
        give(f"{run}: guidance_scale {found.scale:.3g} in {found.space}, from {len(found.conditions)} conditions")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LingshuError(
            "Strengths must be numbers joined by commas", f"'{text}'", "Write e.g. 0.5,1,1.5,2"
        ) from None
