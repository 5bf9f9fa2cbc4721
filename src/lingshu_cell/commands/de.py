"""The command ``lingshu de``: tables and pictures of differential expression, one per condition."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Json, read_source
from lingshu_cell.console import give, give_json

EXAMPLES = (
    "lingshu de heldout.h5ad --perturbation-key perturbation --control control --identity-key cell_type --out de_real",
    "lingshu de predicted.h5ad --controls train.h5ad --perturbation-key perturbation --control control "
    "--identity-key cell_type --out de_predicted",
)
_SHOWN = 12


def de(
    cells: Annotated[str, typer.Argument(metavar="CELLS.h5ad", help="Perturbed cells, real or generated, raw counts.")],
    perturbation_key: Annotated[str, typer.Option(help="obs column of perturbations.")],
    control: Annotated[str, typer.Option(help="Its value for control cells.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tables and pictures.")],
    identity_key: Annotated[
        list[str] | None,
        typer.Option(help="obs column of what a cell is; cells are compared within it. May be repeated."),
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(metavar="FILE.h5ad", help="Take the control cells from here, e.g. for generated cells."),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in CELLS.h5ad.")] = None,
    controls_layer: Annotated[str | None, typer.Option(help="Layer of the counts in the file of controls.")] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=3, help="Draw at most so many cells of a side, so that files have equal power.")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw volcano plots and a dot plot.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the test.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that draw.")] = 0,
    json: Json = False,
) -> None:
    """Say which genes every perturbation changes, against control cells of the same identity.

    One CSV per condition (means, log2 fold change, Mann-Whitney p-value, FDR), index.csv over all of them, and
    README.txt on which control and which test. Needs the packages of the extra "responses".
    """
    from lingshu_cell.metrics.differential import write_differential

    index = write_differential(
        read_source(cells),
        out,
        perturbation_key=perturbation_key,
        control=control,
        identity_keys=identity_key or [],
        controls=None if controls is None else read_source(controls),
        layer=layer,
        controls_layer=controls_layer,
        max_cells=max_cells,
        threads=threads,
        seed=seed,
    )
    drawn: list[Path] = []
    if figures:
        from lingshu_cell.response_section import write_differential_figures

        drawn = write_differential_figures(out)
    if json:
        rows = index.astype(object).where(index.notna(), None).to_dict("records")
        give_json({"out": str(out), "conditions": rows, "figures": [str(path) for path in drawn]})
        return
    strongest = index.sort_values("n_significant", ascending=False, kind="stable").head(_SHOWN)
    for row in strongest.itertuples():
        tested = f"{row.n_significant:,} genes, {row.n_up:,} up: {row.top_genes}" if row.file else "too few cells"
        give(f"{row.condition}: {tested}")
    if len(index) > _SHOWN:
        give(f"… {len(index) - _SHOWN:,} more in {out / 'index.csv'}")
    give(f"{out}: {(index['file'] != '').sum():,} tables, {len(drawn):,} pictures")
