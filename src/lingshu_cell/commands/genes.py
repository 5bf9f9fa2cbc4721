"""The command ``lingshu genes``: how the genes of several files go together, without reading any counts."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.console import give, give_json

EXAMPLES = (
    "lingshu genes donor1.h5ad donor2.h5ad --aliases hgnc_complete_set.txt",
    "lingshu genes human.h5ad mouse.h5ad --species-of mouse.h5ad=mouse --orthologs human_mouse.csv.gz --json",
)


def genes(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA…", help="h5ad, zarr, Cell Ranger h5 files or mtx folders.")
    ],
    join: Annotated[
        str, typer.Option(metavar="union|intersection|GENES.txt", help="The joint gene list; a file has one per line.")
    ] = "union",
    species_of: Annotated[
        list[str] | None, typer.Option(metavar="FILE=SPECIES", help="Species of a file, if it does not say.")
    ] = None,
    aliases: Annotated[
        Path | None, typer.Option(metavar="HGNC.tsv", help="HGNC's complete set: former symbols of human genes.")
    ] = None,
    gene_table: Annotated[
        list[str] | None,
        typer.Option(metavar="SPECIES=FILE", help="Table of Ensembl ids and symbols of a species; may be repeated."),
    ] = None,
    orthologs: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPECIES=]FILE", help="Table of orthologs of two species; may be repeated."),
    ] = None,
    separate_species: Annotated[
        bool, typer.Option("--separate-species", help="Let species without a table of orthologs keep their own genes.")
    ] = False,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts, which may have its own genes (raw).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout in place of text.")] = False,
) -> None:
    """Report which genes of several files are the same: matched, renamed, ambiguous, missing.

    This is what lingshu prepare would do; nothing is written.
    """
    from lingshu_cell.prepare import NameTables, examine, joint_list, split_pair

    joined = examine(
        data,
        name_tables=NameTables.from_texts(aliases, gene_table or (), orthologs or ()),
        species_of=dict(split_pair(text, "FILE=SPECIES") for text in species_of or ()),
        join=joint_list(join),
        separate_species=separate_species,
        layer=layer,
    )
    everywhere = int(joined.measured.all(axis=0).sum())
    if json:
        reports = [report.to_json() for report in joined.reports]
        give_json({"n_joint": len(joined.vocabulary), "n_measured_everywhere": everywhere, "data_sets": reports})
        return
    for report in joined.reports:
        give(report.describe())
    give(f"joint list: {len(joined.vocabulary):,} genes, {everywhere:,} of them measured in every data set")
