"""The command ``lingshu train``."""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lingshu_cell.commands.options import ConfigFile, DryRun, Json, Preset, Settings
from lingshu_cell.console import clock, give, give_json, say, training_bar
from lingshu_cell.errors import EXIT_CODE_INTERRUPTED, LingshuError
from lingshu_cell.launch import command_line, is_first, is_launched, launch

if TYPE_CHECKING:
    from lingshu_cell.config import Config

EXAMPLES = (
    "lingshu train cells.h5ad --out run",
    "lingshu train donor1.h5ad donor2.h5ad --out run --condition-key cell_type --condition-key donor",
    "lingshu train cells.h5ad --out run --set training.steps=5000 --set data.layer=counts",
    "lingshu train screen.h5ad --out run --perturbation-key gene --control non-targeting --condition-key cell_line",
    "lingshu train store --out run --condition-key data_set --condition-key cell_type",
    "lingshu train cells.h5ad --out run --resume",
    "lingshu train cells.h5ad --out run --processes 4",
    "lingshu train cells.h5ad --out run --preset paper --dry-run",
)


def train(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA.h5ad…",
            help="Raw UMI counts of every gene: one or more files, or a store that lingshu prepare made.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="New folder for the trained model.")],
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    condition_key: Annotated[
        list[str] | None,
        typer.Option(
            help="obs column to condition on; may be repeated. When not given: cell_type, if every cell has one."
        ),
    ] = None,
    no_conditions: Annotated[bool, typer.Option("--no-conditions", help="Condition on nothing.")] = False,
    perturbation_key: Annotated[
        str | None, typer.Option(help="obs column of perturbations; control cells have a label in it too.")
    ] = None,
    control: Annotated[str | None, typer.Option(help="Label of control cells in the perturbation key.")] = None,
    split: Annotated[
        Path | None, typer.Option(metavar="SPLIT.toml", help="Conditions to hold out; see lingshu split --help.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, under its settings.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share each step; see docs/distributed.md.")
    ] = 1,
    dry_run: DryRun = False,
    json: Json = False,
) -> int:
    """Learn a model from raw counts.

    Nothing is normalised and no genes are selected. Ctrl-C saves what was learned; --resume goes on exactly there.
    """
    if processes > 1 and not is_launched() and not dry_run:
        return launch(command_line(), processes)
    from lingshu_cell.run_config import AUTOMATIC, run_config
    from lingshu_cell.train import train as train_run

    if condition_key and no_conditions:
        raise LingshuError(
            "Conditions are given or not", "--condition-key and --no-conditions", "Leave one of them out"
        )
    chosen = run_config(
        data,
        out,
        preset=preset,
        file=config,
        settings=settings or (),
        condition_keys=[] if no_conditions else condition_key or AUTOMATIC,
        overrides=_perturbations(perturbation_key, control, split),
        resume=resume,
        on_note=say if is_first() else lambda note: None,
    )
    if dry_run:
        return _foretell(data, out, chosen, processes, json)
    if not is_launched():
        from lingshu_cell.planner import find_minibatch_size

        chosen = find_minibatch_size(data, out, chosen, say)
    started = time.monotonic()
    with training_bar() if is_first() else contextlib.nullcontext(lambda progress: None) as show:
        result = train_run(data, out, chosen, resume=resume, on_progress=show, on_note=say)
    seconds = time.monotonic() - started
    steps, nelbo = result.steps, result.validation_nelbo
    if not is_first():
        pass
    elif json:
        give_json(
            {
                "run": str(result.run),
                "preset": chosen.preset,
                "step": result.step,
                "steps": steps,
                "interrupted": result.interrupted,
                "validation_nelbo_nats_per_cell": nelbo,
                "condition_keys": list(chosen.data.condition_keys),
                "notes": list(result.notes),
                "seconds": round(seconds, 1),
            }
        )
    else:
        bound = "" if nelbo is None else f", {nelbo:,.1f} nats per held-out cell"
        stopped = "; go on with --resume" if result.interrupted else ""
        give(f"{result.run}: step {result.step} of {steps}{bound}, {clock(seconds)}{stopped}")
    return EXIT_CODE_INTERRUPTED if result.interrupted else 0


def _foretell(data: list[str], out: Path, chosen: "Config", processes: int, json: bool) -> int:
    """Say what training will take, and refuse what this machine has not."""
    from lingshu_cell.planner import check, describe, plan_training

    forecast, settled = plan_training(data, out, chosen, processes)
    if json:
        give_json(vars(forecast) | {"config": settled.model_dump(mode="json")})
    else:
        give("\n".join(describe(forecast, out)))
    check(forecast, out)
    return 0


def _perturbations(key: str | None, control: str | None, split: Path | None) -> dict[str, dict[str, str]]:
    """Give the settings that the options stand for; those not given are left to file and settings."""
    given = {"perturbation_key": key, "control": control, "split": None if split is None else str(split)}
    return {"data": {name: value for name, value in given.items() if value is not None}}
