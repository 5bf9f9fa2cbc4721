"""The command ``lingshu``: train, generate, evaluate, report, schedule, info, config, demo.

Exit codes: 0 done; 2 a mistake in data, settings or arguments; 130 stopped by Ctrl-C; 1 anything else.
Results go to stdout, everything else to stderr.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: huge pages make a training step on CPUs much faster
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that spin cost several times the work

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lingshu_cell import __version__
from lingshu_cell.config import PRESETS, GenerationConfig, load_config
from lingshu_cell.console import (
    cells_bar,
    choices_of,
    clock,
    give,
    give_json,
    give_metrics,
    give_schedules,
    say,
    send_messages_to_stderr,
    settings_toml,
    training_bar,
)
from lingshu_cell.errors import EXIT_CODE_USER_ERROR, LingshuError

# Torch, AnnData and scanpy are imported inside the commands, so that help is there at once.

EXIT_CODE_TROUBLE = 1
EXIT_CODE_INTERRUPTED = 130
_UsageProblem = typer.BadParameter.__mro__[2]  # ClickException: typer has its own copy of click, or not, by version
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class _Stopped(Exception):
    """Ctrl-C outside of training, which handles it itself."""


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learn the distribution of whole single-cell transcriptomes from raw counts, generate cells, judge them.\n\n"
    "First try: [bold]lingshu demo[/]",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout in place of text.")]
Preset = Annotated[str | None, typer.Option(metavar="NAME", help=f"{', '.join(PRESETS)}; small when not given.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings; lingshu config prints one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated. See lingshu config."),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that lingshu train wrote.")]


def _of(setting: str) -> str:
    """Describe a setting of generation in the words of config.py."""
    return str(GenerationConfig.model_fields[setting].description)


Steps = Annotated[str | None, typer.Option(metavar="N|auto", help=f"{_of('steps')} The run's own when not given.")]
MaxKl = Annotated[float | None, typer.Option(metavar="NATS", help=_of("max_kl"))]


def _examples(*lines: str) -> str:
    """End a help text with command lines to copy."""
    return "\n\n".join(["[bold]Examples[/]", *(f"[cyan]{escape(line)}[/]" for line in lines)])


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        give(f"lingshu-cell {__version__}")
    elif context.invoked_subcommand is None:
        give(context.get_help())


@app.command(
    epilog=_examples(
        "lingshu train cells.h5ad --out run",
        "lingshu train donor1.h5ad donor2.h5ad --out run --condition-key cell_type --condition-key donor",
        "lingshu train cells.h5ad --out run --set training.steps=5000 --set data.layer=counts",
        "lingshu train cells.h5ad --out run --resume",
    )
)
def train(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA.h5ad…", help="Raw UMI counts of every gene, one or more files.")
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, under its settings.")
    ] = False,
    json: Json = False,
) -> int:
    """Learn a model from raw counts.

    Nothing is normalised and no genes are selected. Ctrl-C saves what was learned; --resume goes on exactly there.
    """
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
        resume=resume,
        on_note=say,
    )
    started = time.monotonic()
    with training_bar() as show:
        result = train_run(data, out, chosen, resume=resume, on_progress=show, on_note=say)
    seconds = time.monotonic() - started
    steps, nelbo = result.steps, result.validation_nelbo
    if json:
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


@app.command(
    epilog=_examples(
        "lingshu generate run --n 1000 --out generated.h5ad",
        'lingshu generate run --n 500 --out b_cells.h5ad --condition cell_type="B cells" --seed 1',
        "lingshu generate run --n 1000 --out generated.h5ad --steps auto --max-kl 0.5",
        "lingshu generate run --n 1000 --out generated.h5ad --steps 256 --schedule cosine",
    )
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
    steps: Steps = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"{_of('schedule')} {choices_of(GenerationConfig, 'schedule')}, or visible counts: 1,10,100,1000."
        ),
    ] = None,
    max_kl: MaxKl = None,
    seed: Annotated[int | None, typer.Option(min=0, help=_of("seed"))] = None,
    minibatch_size: Annotated[
        int | None, typer.Option(min=1, help=f"{_of('minibatch_size')} Changes memory and speed, never a cell.")
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace GEN.h5ad if it exists.")] = False,
    json: Json = False,
) -> None:
    """Generate cells from a trained model.

    Writes integer counts of every gene (AnnData, CSR), labels and seeds in obs, and what made them in uns.
    """
    from lingshu_cell.generate import generate_file, load_model, provenance
    from lingshu_cell.train import pick_device

    model = load_model(run, pick_device(device))
    wanted = _conditions(condition or ())
    plan = {"steps": _steps(steps), "schedule": schedule, "max_kl": max_kl}
    chosen = {**plan, "seed": seed, "minibatch_size": minibatch_size}
    started = time.monotonic()
    with cells_bar(n) as show:
        written = generate_file(model, n, out, overwrite=overwrite, on_progress=show, condition=wanted, **chosen)
    seconds = time.monotonic() - started
    if json:
        used = provenance(model, n, condition=wanted, **chosen)["generation"]
        give_json(
            {
                "out": str(written),
                "n_cells": n,
                "n_genes": len(model.genes),
                "condition": wanted,
                **{key: used[key] for key in ("steps", "schedule", "seed")},
                "seconds": round(seconds, 1),
            }
        )
    else:
        give(f"{written}: {n:,} cells x {len(model.genes):,} genes, {clock(seconds)}, {n / seconds:,.1f} cells/s")


@app.command(
    epilog=_examples(
        "lingshu evaluate --real heldout.h5ad --generated generated.h5ad --training train.h5ad --run run --out judged",
        "lingshu evaluate --real heldout.h5ad --generated other_model.h5ad --out judged",
    )
)
def evaluate(
    real: Annotated[str, typer.Option(metavar="REAL.h5ad", help="Real cells that the model has not seen, raw counts.")],
    generated: Annotated[str, typer.Option(metavar="GEN.h5ad", help="Generated cells, of any model, raw counts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for metrics.json and the tables of the report.")],
    training: Annotated[
        str | None, typer.Option(metavar="TRAIN.h5ad", help="Cells the model was trained on; needed to see copying.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Model that made the cells; adds its likelihood bound of the real ones."),
    ] = None,
    cell_type_key: Annotated[str, typer.Option(help="obs column of cell types; empty to do without.")] = "cell_type",
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in the real and training cells.")] = None,
    generated_layer: Annotated[str | None, typer.Option(help="Layer of the counts in the generated cells.")] = None,
    max_cells: Annotated[int | None, typer.Option(help="Use at most this many random cells of each file.")] = None,
    splits: Annotated[int, typer.Option(min=1, help="Random halvings of the real cells to average over.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of splits and classifiers.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare generated cells with real cells.

    Every metric comes with its real-vs-real value, what two groups of real cells give, and where it helps with that of
    gene-wise shuffled cells. Needs the extra packages: pip install "lingshu-cell[evaluate]"
    """
    settings = {
        "cell_type_key": cell_type_key or None,
        "generated_layer": generated_layer,
        "max_cells": max_cells,
        "n_splits": splits,
        "seed": seed,
    }
    if run is None:
        from lingshu_cell.evaluate import evaluate_files

        metrics = evaluate_files(_file(real), _file(generated), out, training=_file(training), layer=layer, **settings)
    else:
        from lingshu_cell import model

        loaded = model.LingshuCell.load(run, device=device)
        metrics = model.evaluate(real, generated, out, training=training, model=loaded, layer=layer, **settings)
    if json:
        give_json({"out": str(out), "metrics": metrics})
    else:
        give_metrics(metrics)
        give(f"{out}: metrics.json and tables; for the page with pictures: lingshu report {out}")


@app.command(epilog=_examples("lingshu report judged"))
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that lingshu evaluate wrote.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    json: Json = False,
) -> None:
    """Make one HTML page of an evaluation, with pictures and how to read them; it opens offline."""
    from lingshu_cell.report import write_report

    page = write_report(directory, title=title)
    give_json({"report": str(page)}) if json else give(str(page))


@app.command(
    epilog=_examples(
        "lingshu schedule run",
        "lingshu schedule run --steps 16",
        "lingshu schedule run --steps auto --max-kl 0.5 --json",
        "lingshu schedule run --data heldout.h5ad",
    )
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

    found = schedule_run(run, data or (), layer=layer, steps=_steps(steps), max_kl=max_kl, device=pick_device(device))
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


@app.command(epilog=_examples("lingshu info run", "lingshu info run --json"))
def info(run: RunFolder, json: Json = False) -> None:
    """Say what a trained model is: data, genes, conditions, settings, quality."""
    from lingshu_cell.model import run_info

    facts = run_info(run)
    if json:
        give_json(facts)
        return
    conditions = {
        key: f"{', '.join(values[:5])}{', …' if len(values) > 5 else ''} ({len(values)})"
        for key, values in facts["conditions"].items()
    }
    nelbo, bits = facts["validation_nelbo_nats_per_cell"], facts["validation_nelbo_bits_per_gene"]
    rows = {
        "run": f"{facts['run']} ({facts['checkpoint']})",
        "model": f"{facts['preset']}, {facts['network']} denoiser, {facts['n_parameters']:,} parameters",
        "training": f"step {facts['step']:,} of {facts['steps']:,}"
        + ("" if facts["finished"] else "; --resume goes on"),
        "quality": "not validated"
        if nelbo is None
        else f"{nelbo:,.1f} nats per held-out cell, {bits:.4f} bits per gene",
        "cells": f"{facts['n_training_cells']:,} for training, {facts['n_validation_cells']:,} held out for validation",
        "genes": f"{facts['n_genes']:,}, of which {facts['n_modelled_genes']:,} are modelled",
        "conditions": "; ".join(f"{key}: {text}" for key, text in conditions.items()) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "licence": facts["licence"],
    }
    for name, text in rows.items():
        give(f"{name:<11} {text}")


@app.command(
    "config",
    epilog=_examples(
        "lingshu config > my.toml",
        "lingshu train cells.h5ad --out run --config my.toml",
        "lingshu config --preset paper",
    ),
)
def show_config(
    preset: Preset = None, config: ConfigFile = None, settings: Settings = None, json: Json = False
) -> None:
    """Print every setting with its meaning, as a TOML file to edit."""
    chosen = load_config(preset, config, settings or ())
    give_json(chosen.model_dump(mode="json")) if json else give(settings_toml(chosen))


@app.command(epilog=_examples("lingshu demo", "lingshu demo --out try --set training.steps=200"))
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


def _steps(text: str | None) -> int | str | None:
    """Read ``--steps``: a whole number, ``auto``, or nothing."""
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def _short(grid: Sequence[int]) -> str:
    """Write a grid, its middle left out where it is long."""
    shown = [f"{n:,}" for n in grid]
    return " ".join(shown if len(shown) <= 40 else [*shown[:25], "…", *shown[-8:]])


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


def _file(name: str | None) -> Path | str | None:
    """A path, or a URL as it is."""
    return name if name is None or "://" in name else Path(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; what goes wrong is one line on stderr."""
    send_messages_to_stderr()
    try:
        code = app(None if arguments is None else list(arguments), prog_name="lingshu", standalone_mode=False)
    except Exception as error:
        line, code = _one_line(error)
        if line is None:
            raise
        say(line)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> tuple[str | None, int]:
    """What to say of an error and the exit code; nothing for a fault of this program, which deserves its traceback."""
    if isinstance(error, LingshuError):
        return f"error: {error}", EXIT_CODE_USER_ERROR
    if isinstance(error, _UsageProblem):
        return f"error: {' '.join(error.format_message().split())} See lingshu --help.", EXIT_CODE_USER_ERROR
    if isinstance(error, (_Stopped, typer.Abort)):
        return "stopped by Ctrl-C", EXIT_CODE_INTERRUPTED
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        remedy = "Lower --minibatch-size or training.minibatch_size, use fewer cells, or a smaller network"
        return f"error: Memory must suffice: {text[:200] or 'it ran out'}. {remedy}.", EXIT_CODE_TROUBLE
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has gone; so may we
        return "stopped: nobody reads the output", EXIT_CODE_TROUBLE
    if isinstance(error, OSError):
        return f"error: Files must be readable and the disk must have space: {text}.", EXIT_CODE_TROUBLE
    return None, EXIT_CODE_TROUBLE


if __name__ == "__main__":
    main()
