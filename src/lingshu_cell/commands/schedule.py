"""The command ``lingshu schedule``."""

from collections.abc import Sequence
from typing import Annotated

import typer

from lingshu_cell.commands.options import Device, Json, MaxKl, RunFolder, Steps, read_steps
from lingshu_cell.console import give, give_json, give_schedules

EXAMPLES = (
    "lingshu schedule run",
    "lingshu schedule run --steps 16",
    "lingshu schedule run --steps auto --max-kl 0.5 --json",
    "lingshu schedule run --data heldout.h5ad",
)


def schedule(
    run: RunFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA.h5ad",
            help="Measure the information curve anew: on held-out cells, or on the file of the training, whose "
            "validation cells are then used. May be repeated.",
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in DATA; that of training by default.")] = None,
    steps: Steps = None,
    max_kl: MaxKl = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Say what few steps cost, and choose the best schedule.

    Predicts the KL divergence of every schedule from one curve, measured when training ends; draws RUN/schedule.png.
    """
    from lingshu_cell.schedule import schedule_run
    from lingshu_cell.train import pick_device

    found = schedule_run(
        run, data or (), layer=layer, steps=read_steps(steps), max_kl=max_kl, device=pick_device(device)
    )
    grid, kl = found.chosen.grid.tolist(), found.chosen.predicted_kl
    if json:
        give_json(
            {
                "run": str(found.checkpoint.folder.parent),
                "checkpoint": found.checkpoint.folder.name,
                "measured_on": found.stored.measured_on,
                "information_curve": found.stored.curve.to_json(),
                "predicted_kl_nats_per_cell": found.table,
                "max_kl": found.max_kl,
                "steps_for_max_kl": found.steps_for_max_kl,
                "steps": found.chosen.steps,
                "schedule": found.chosen.name,
                "visible_counts": grid,
                "plot": str(found.plot),
            }
        )
        return
    give(f"information curve of {found.checkpoint.folder.name}, measured on {found.stored.measured_on}")
    give_schedules(found.table)
    enough = "more than 1,024" if found.steps_for_max_kl is None else f"{found.steps_for_max_kl:,}"
    give(f"at most {found.max_kl:g} nats per cell: {enough} steps (--steps auto)")
    give(f"{found.chosen.name}, {found.chosen.steps:,} steps, {kl:.3g} nats per cell: visible genes {_short(grid)}")
    give(str(found.plot))


def _short(grid: Sequence[int]) -> str:
    """Write a grid, its middle left out where it is long."""
    shown = [f"{n:,}" for n in grid]
    return " ".join(shown if len(shown) <= 40 else [*shown[:25], "…", *shown[-8:]])
