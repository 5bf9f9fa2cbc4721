"""The command ``lingshu genes``: how the genes of several files go together, without reading any counts."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Aliases, GeneTables, Join, Json, Orthologs, SeparateSpecies, SpeciesOf
from lingshu_cell.console import give, give_json

EXAMPLES = (
    "lingshu genes donor1.h5ad donor2.h5ad --aliases hgnc_complete_set.txt",
    "lingshu genes human.h5ad mouse.h5ad --species-of mouse.h5ad=mouse --orthologs human_mouse.csv.gz --json",
)


def genes(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA…", help="h5ad, zarr, Cell Ranger h5 files or mtx folders.")
    ],
    join: Join = "union",
    species_of: SpeciesOf = None,
    aliases: Aliases = None,
    gene_table: GeneTables = None,
    orthologs: Orthologs = None,
    separate_species: SeparateSpecies = False,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts, which may have its own genes (raw).")] = None,
    json: Json = False,
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
