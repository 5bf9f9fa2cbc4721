"""The command ``lingshu export vcc2026``: write and check a submission to the Virtual Cell Challenge 2026."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Json
from lingshu_cell.console import give, give_json, say
from lingshu_cell.errors import EXIT_CODE_USER_ERROR, LingshuError

EXAMPLES = (
    "lingshu export vcc2026 a.h5ad b.h5ad c.h5ad --genes gene_names.csv --targets pert_counts.csv --contexts A,B,C "
    "--out submission.h5ad",
    "lingshu export vcc2026 predicted.h5ad --genes gene_names.csv --target-key target_gene --context-key context "
    "--out submission.h5ad",
    "lingshu export vcc2026 --check submission.h5ad --genes gene_names.csv --targets pert_counts.csv",
)


def vcc2026(
    genes: Annotated[
        Path, typer.Option(metavar="GENES.txt", help="The challenge's genes in order: one per line, or a CSV column.")
    ],
    predicted: Annotated[
        list[str] | None, typer.Argument(metavar="PREDICTED.h5ad…", help="Predicted counts, one or more files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="SUBMISSION.h5ad", help="File to write.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE.h5ad", help="Write nothing; hold this file against every rule.")
    ] = None,
    target_key: Annotated[str, typer.Option(help="obs column of the perturbed gene in PREDICTED.")] = "perturbation",
    context_key: Annotated[str, typer.Option(help="obs column of the context in PREDICTED.")] = "cell_line",
    control: Annotated[str, typer.Option(help="Label of control cells, which are left out.")] = "non-targeting",
    contexts: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Contexts that must be there; any when not given.")
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(metavar="TARGETS.csv", help="Targets every context must have: pert_counts.csv, or one per line."),
    ] = None,
    cells_per_condition: Annotated[
        int, typer.Option(min=0, help="Cells of each target in each context; 0 for any number.")
    ] = 400,
    n_genes: Annotated[int, typer.Option(min=0, help="Length the gene list must have; 0 for any.")] = 18_533,
    fill_genes: Annotated[
        bool, typer.Option("--fill-genes", help="Write genes that PREDICTED lacks as 0, leave out those not listed.")
    ] = False,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in PREDICTED.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace SUBMISSION.h5ad if it exists.")] = False,
    json: Json = False,
) -> int:
    """Write predicted cells as a submission to the Virtual Cell Challenge 2026, and check it.

    Genes are put in order, control cells are left out, and every rule of the challenge is checked. Counts pass block by
    block; only labels are held in memory. Exit code 2 if a rule fails.
    """
    from lingshu_cell.check_vcc2026 import read_gene_list, read_panel, validate_vcc2026
    from lingshu_cell.export_vcc2026 import write_vcc2026

    if (check is None) == (not predicted) or (check is None and out is None):
        remedy = "Give PREDICTED.h5ad … and --out, or --check FILE"
        raise LingshuError("Files are written or one is checked", "the arguments fit neither or both", remedy)
    rules = {
        "control": control,
        "contexts": None if contexts is None else [name.strip() for name in contexts.split(",") if name.strip()],
        "panel": None if targets is None else read_panel(targets, control),
        "cells_per_condition": cells_per_condition or None,
        "n_genes": n_genes or None,
    }
    gene_list = read_gene_list(genes)
    if check is not None:
        report = validate_vcc2026(check, gene_list, **rules)
        give_json(report.to_json()) if json else give(report.to_text())
        return 0 if report.passed else EXIT_CODE_USER_ERROR
    made = write_vcc2026(
        predicted or (),
        out or Path(),
        gene_list,
        target_key=target_key,
        context_key=context_key,
        fill_genes=fill_genes,
        layer=layer,
        overwrite=overwrite,
        **rules,
    )
    if made.report is None:
        raise RuntimeError("an export is checked unless it is told not to")
    facts = {
        "n_controls_dropped": made.n_controls_dropped,
        "n_genes_filled": made.n_genes_filled,
        "n_genes_dropped": made.n_genes_dropped,
    }
    if json:
        give_json({**made.report.to_json(), **facts})
    else:
        give(made.report.to_text())
        say(f"left out: {made.n_controls_dropped:,} control cells, {made.n_genes_dropped:,} genes that are not listed")
        if made.n_genes_filled:
            say(f"warning: {made.n_genes_filled:,} genes are 0 in every cell, as the predictions lack them")
        say("next, with the challenge's own tool: vcc prep " + str(made.path))
    return 0 if made.report.passed else EXIT_CODE_USER_ERROR
