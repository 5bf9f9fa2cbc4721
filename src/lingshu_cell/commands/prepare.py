"""The command ``lingshu prepare``: files of counts to one training store."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Aliases, GeneTables, Join, Json, Orthologs, SeparateSpecies, SpeciesOf
from lingshu_cell.console import clock, give, give_json, say

EXAMPLES = (
    "lingshu prepare cells.h5ad --out store",
    "lingshu prepare donor1/filtered_feature_bc_matrix.h5 donor2/filtered_feature_bc_matrix.h5 --out store --paper-qc",
    "lingshu prepare human.h5ad mouse.h5ad --out store --species-of mouse.h5ad=mouse --orthologs human_mouse.csv.gz "
    "--aliases hgnc_complete_set.txt --gene-table mouse=mouse_genes.csv",
)


def prepare(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA…", help="Raw UMI counts: h5ad, zarr, Cell Ranger h5 files or mtx folders."),
    ],
    out: Annotated[Path, typer.Option(metavar="STORE", help="Folder for the store.")],
    paper_qc: Annotated[
        bool,
        typer.Option(
            "--paper-qc",
            help="The preprint's rules: 200 genes, 500 counts, mito at most 0.2, 3 cells per gene, Scrublet.",
        ),
    ] = False,
    min_genes: Annotated[int | None, typer.Option(min=0, help="Least number of genes detected in a cell.")] = None,
    min_counts: Annotated[int | None, typer.Option(min=0, help="Least number of counts of a cell.")] = None,
    max_mito: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest share of mitochondrial counts of a cell.")
    ] = None,
    min_cells_per_gene: Annotated[
        int | None, typer.Option(min=0, help="Leave out genes detected in fewer cells of all files.")
    ] = None,
    scrublet: Annotated[bool | None, typer.Option("--scrublet/--no-scrublet", help="Drop doublets.")] = None,
    drop_read_counts: Annotated[
        bool, typer.Option("--drop-read-counts", help="Drop assays that count reads, told by obs assay and the counts.")
    ] = False,
    join: Join = "union",
    species_of: SpeciesOf = None,
    aliases: Aliases = None,
    gene_table: GeneTables = None,
    orthologs: Orthologs = None,
    separate_species: SeparateSpecies = False,
    obs_key: Annotated[
        list[str] | None, typer.Option(help="obs column to keep; may be repeated. All when not given.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts; X when not given.")] = None,
    cells_per_shard: Annotated[int, typer.Option(min=1, help="Cells of a shard.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")] = 0,
    json: Json = False,
) -> None:
    """Bring files of counts onto one gene list, shuffle all cells once, and write a training store.

    Files may be larger than memory. Genes are told apart by Ensembl ids, symbols, aliases and orthologs, and a report
    says what became of them; genes that a file lacks are unknown in it, never zero. No cell is dropped unless a rule is
    given. Interrupted, the same command goes on where it stopped; given again, it does nothing.
    """
    from dataclasses import replace

    from lingshu_cell.data.quality import PAPER_RULES, QualityRules
    from lingshu_cell.prepare import NameTables, joint_list, split_pair
    from lingshu_cell.prepare import prepare as prepare_store

    given = {
        "min_genes": min_genes, "min_counts": min_counts, "max_mito": max_mito,
        "min_cells_per_gene": min_cells_per_gene, "scrublet": scrublet, "drop_read_counts": drop_read_counts,
    }  # fmt: skip
    rules = replace(
        PAPER_RULES if paper_qc else QualityRules(), **{name: v for name, v in given.items() if v is not None}
    )
    result = prepare_store(
        data,
        out,
        rules=rules,
        name_tables=NameTables.from_texts(aliases, gene_table or (), orthologs or ()),
        species_of=dict(split_pair(text, "FILE=SPECIES") for text in species_of or ()),
        join=joint_list(join),
        separate_species=separate_species,
        layer=layer,
        obs_keys=obs_key or None,
        cells_per_shard=cells_per_shard,
        seed=seed,
        on_note=say,
    )
    told, n_bytes = result.manifest, sum(facts["bytes"] for facts in result.manifest["files"].values())
    n_genes, seconds = len(told["genes"]["names"]), sum(result.seconds.values())
    if json:
        counted = {key: told[key] for key in ("n_cells", "n_shards", "n_values", "quality", "gene_reports", "notes")}
        done = {"store": str(result.store), "up_to_date": result.up_to_date, "n_genes": n_genes, "bytes": n_bytes}
        give_json({**done, **counted, "seconds": result.seconds})
        return
    size = f"{told['n_cells']:,} cells × {n_genes:,} genes of {len(told['data_sets'])} data sets"
    shards = f"{told['n_shards']:,} shards, {n_bytes / 2**20:,.0f} MiB"
    give(f"{result.store}: {size}, {shards}, {'up to date' if result.up_to_date else clock(seconds)}")
