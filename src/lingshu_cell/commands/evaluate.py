"""The command ``lingshu evaluate``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lingshu_cell.commands.options import Device, Json, read_source
from lingshu_cell.console import give, give_json, give_metrics, give_responses
from lingshu_cell.errors import LingshuError

EXAMPLES = (
    "lingshu evaluate --real heldout.h5ad --generated generated.h5ad --training train.h5ad --run run --out judged",
    "lingshu evaluate --real heldout.h5ad --generated other_model.h5ad --out judged",
    "lingshu evaluate --real test.h5ad --generated predicted.h5ad --training train.h5ad --out judged "
    "--perturbation-key gene --control non-targeting --identity-key cell_line",
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
    perturbation_key: Annotated[
        str | None, typer.Option(help="obs column of perturbations: judge responses in place of single cells.")
    ] = None,
    control: Annotated[str | None, typer.Option(help="Its value for control cells.")] = None,
    identity_key: Annotated[
        str | None, typer.Option(help="obs column of identities; responses are per identity.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Evaluation of a baseline's cells, for the average score against it."),
    ] = None,
    only_predicted: Annotated[
        bool, typer.Option("--only-predicted", help="Leave out real conditions that GEN.h5ad does not have.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare generated cells with real cells; with --perturbation-key, predicted with measured responses.

    Every metric comes with its real-vs-real value, what two groups of real cells give, and where it helps with that of
    gene-wise shuffled cells. Needs the packages of the extra "evaluate".
    """
    if perturbation_key is not None or control is not None:
        responses = {
            "perturbation_key": perturbation_key,
            "control": control,
            "identity_key": identity_key,
            "training": read_source(training),
            "layer": layer,
            "predicted_layer": generated_layer,
            "baseline": baseline,
            "only_predicted": only_predicted,
            "seed": seed,
        } | ({} if max_cells is None else {"max_cells_per_condition": max_cells})
        _evaluate_responses(read_source(real), read_source(generated), out, responses, json)
        return
    settings = {
        "cell_type_key": cell_type_key or None,
        "generated_layer": generated_layer,
        "max_cells": max_cells,
        "n_splits": splits,
        "seed": seed,
    }
    if run is None:
        from lingshu_cell.evaluate import evaluate_files

        metrics = evaluate_files(
            read_source(real), read_source(generated), out, training=read_source(training), layer=layer, **settings
        )
    else:
        from lingshu_cell import model

        loaded = model.LingshuCell.load(run, device=device)
        metrics = model.evaluate(real, generated, out, training=training, model=loaded, layer=layer, **settings)
    if json:
        give_json({"out": str(out), "metrics": metrics})
    else:
        give_metrics(metrics)
        give(f"{out}: metrics.json and tables; for the page with pictures: lingshu report {out}")


def _evaluate_responses(
    real: Path | str, generated: Path | str, out: Path, settings: dict[str, Any], json: bool
) -> None:
    """Judge responses, and write DE tables of both sides against the same real control cells."""
    from lingshu_cell.evaluate_responses import evaluate_responses
    from lingshu_cell.metrics.differential import write_differential

    if settings["perturbation_key"] is None or settings["control"] is None:
        raise LingshuError(
            "Responses need a perturbation key and a control", "one is missing", "Pass --perturbation-key and --control"
        )
    found = evaluate_responses(real, generated, out, **settings)
    keys = {"perturbation_key": settings["perturbation_key"], "control": settings["control"]}
    keys["identity_keys"] = [settings["identity_key"]] if settings["identity_key"] else []
    write_differential(real, out / "de_real", layer=settings["layer"], **keys)
    controls = {"controls": real, "controls_layer": settings["layer"]}
    write_differential(generated, out / "de_predicted", layer=settings["predicted_layer"], **keys, **controls)
    if json:
        give_json({"out": str(out), "responses": found})
    else:
        give_responses(found)
        give(f"{out}: responses.json, conditions.csv, DE tables; for the page with pictures: lingshu report {out}")
