"""The command ``lingshu baseline``: predict responses by a simple rule, in the files that a model would write."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Json, read_source
from lingshu_cell.console import give, give_json

EXAMPLES = (
    "lingshu baseline additive --training train.h5ad --like heldout.h5ad --perturbation-key perturbation "
    "--control control --identity-key cell_type --out additive.h5ad",
    "lingshu baseline ridge --training train.h5ad --like heldout.h5ad --perturbation-key target "
    "--control non-targeting --embeddings genes.npz --out ridge.h5ad",
)
NAMES = ("control_bootstrap", "perturbation_mean", "context_mean", "additive", "ridge", "nearest_neighbour")


def baseline(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    training: Annotated[
        str, typer.Option(metavar="TRAIN.h5ad", help="Training cells with their controls, raw counts.")
    ],
    like: Annotated[
        str,
        typer.Option(metavar="HELDOUT.h5ad", help="File whose conditions are predicted; only its labels are read."),
    ],
    perturbation_key: Annotated[str, typer.Option(help="obs column of perturbations.")],
    control: Annotated[str, typer.Option(help="Its value for control cells.")],
    out: Annotated[Path, typer.Option(metavar="PREDICTED.h5ad", help="File to write.")],
    identity_key: Annotated[
        list[str] | None, typer.Option(help="obs column of what a cell is (cell type, line, donor); may be repeated.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Vectors of perturbations (npz, safetensors, parquet, csv), for ridge and nearest_neighbour.",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Cells of each condition; as many as HELDOUT.h5ad has when not given.")
    ] = None,
    separator: Annotated[str, typer.Option(help="Between the parts of a combination, as in A+B; may be empty.")] = "+",
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in TRAIN.h5ad.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace PREDICTED.h5ad if it exists.")] = False,
    json: Json = False,
) -> None:
    """Predict responses to perturbations by a simple rule, to see what a model adds.

    Writes integer counts and the same labels as a model would, so that lingshu evaluate judges both alike.
    control_bootstrap: control cells as they are. perturbation_mean: cells of the same perturbation in other identities.
    context_mean: cells of the same identity under other perturbations. additive: control cells moved by the
    perturbation's mean effect. ridge, nearest_neighbour: moved by an effect foretold from embeddings or from similar
    identities.
    """
    import pandas as pd

    from lingshu_cell.baselines import conditions_of, predict_baseline, write_prediction
    from lingshu_cell.data.gene_embeddings import read_embeddings

    keys = {"perturbation_key": perturbation_key, "control": control, "identity_keys": identity_key or []}
    wanted = conditions_of(read_source(like), **keys)
    if n is not None:
        wanted = [condition | {"n": n} for condition in wanted]
    table = None
    if embeddings is not None:
        found = read_embeddings(embeddings)
        table = pd.DataFrame(found.matrix, index=list(found.names))
    predicted = predict_baseline(
        name,
        read_source(training),
        wanted,
        embeddings=table,
        separator=separator,
        layer=layer,
        seed=seed,
        **keys,
    )
    written = write_prediction(predicted, out, overwrite=overwrite)
    if json:
        facts = {"out": str(written), "baseline": name, "n_conditions": len(wanted), "n_cells": predicted.n_obs}
        give_json(facts | {"n_genes": predicted.n_vars, "seed": seed})
    else:
        give(f"{written}: {len(wanted):,} conditions, {predicted.n_obs:,} cells x {predicted.n_vars:,} genes ({name})")
