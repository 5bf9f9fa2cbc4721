"""The command ``lingshu demo``."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Json, Settings
from lingshu_cell.console import give, give_json, give_metrics, say, training_bar
from lingshu_cell.errors import EXIT_CODE_INTERRUPTED

EXAMPLES = (
    "lingshu demo",
    "lingshu demo --out try --set training.steps=200",
)


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything the demo makes.")] = Path("demo-run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in DIR.")] = False,
    settings: Settings = None,
    json: Json = False,
) -> int:
    """Do everything once on bundled blood cells: train, generate, evaluate, report. Minutes; no data needed."""
    from lingshu_cell.demo import run_demo

    with training_bar() as show:
        result = run_demo(out, overwrite=overwrite, settings=settings or (), on_note=say, on_progress=show)
    if result.interrupted:
        say(f"stopped while training; {result.out / 'run'} is saved")
        return EXIT_CODE_INTERRUPTED
    if json:
        made = {"out": str(result.out), "report": str(result.report), "seconds": result.seconds}
        counted = {"n_training_cells": result.n_training_cells, "n_generated_cells": result.n_generated_cells}
        give_json({**made, **counted, "metrics": result.metrics})
    else:
        give_metrics(result.metrics)
        give("seconds: " + ", ".join(f"{stage} {seconds:g}" for stage, seconds in result.seconds.items()))
        give(f"Open {result.report} in a browser.")
    return 0
