"""The command ``lingshu embeddings``: gene embeddings from gene sets, networks, cells or files, in one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lingshu_cell.commands.options import Json
from lingshu_cell.console import give, give_json, say
from lingshu_cell.errors import LingshuError

if TYPE_CHECKING:
    from lingshu_cell.data.gene_embeddings import GeneEmbeddings

EXAMPLES = (
    "lingshu embeddings --from-gene-sets reactome.gmt.gz --from-network string.tsv.gz --out embeddings.npz "
    "--for screen.h5ad --perturbation-key target",
    "lingshu embeddings --from-counts train.h5ad --components 50 --out coexpression.safetensors",
    "lingshu embeddings --from-file esm2.safetensors --from-network string.tsv.gz --out embeddings.npz",
)


def embeddings(
    out: Annotated[Path, typer.Option(metavar="OUT.npz", help="File to write: .npz or .safetensors.")],
    from_gene_sets: Annotated[
        list[Path] | None, typer.Option(metavar="SETS.gmt", help="Gene sets, may be zipped; several are pooled.")
    ] = None,
    from_network: Annotated[
        list[Path] | None,
        typer.Option(metavar="LINKS.tsv", help="Pairs of genes, with a sign or without; a block for each file."),
    ] = None,
    from_counts: Annotated[
        list[str] | None,
        typer.Option(metavar="CELLS.h5ad", help="Raw counts of training cells: co-expression; a block for each file."),
    ] = None,
    from_file: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Finished embeddings: npz, safetensors, parquet, csv, tsv; a block each."),
    ] = None,
    components: Annotated[int, typer.Option(min=1, help="Dimensions of each computed block.")] = 64,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="CELLS.h5ad", help="Tell how many perturbations of it are covered.")
    ] = None,
    perturbation_key: Annotated[str, typer.Option(help="obs column of the perturbation in --for.")] = "perturbation",
    control: Annotated[
        list[str] | None,
        typer.Option(help="Label of control cells in --for; may be repeated. control and non-targeting if not given."),
    ] = None,
    separator: Annotated[str, typer.Option(help="What joins the parts of a combination; empty for nothing.")] = "+",
    aliases: Annotated[
        Path | None, typer.Option(metavar="HGNC.tsv", help="Former and current symbols: HGNC's complete set, or pairs.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the counts in --from-counts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Starts the decompositions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.npz if it exists.")] = False,
    json: Json = False,
) -> None:
    """Make gene embeddings, for perturbations that were never measured.

    Each source is a block: vectors of length 1, centred, with a total variance of 1; blocks are put side by side. In a
    screen of 25 targets, a network and pathways together did better than either alone.
    """
    from lingshu_cell.data.gene_embeddings import concatenate, write_embeddings

    if out.exists() and not overwrite:
        raise LingshuError("The output must not exist yet", f"{out} does", "Choose another name or allow overwriting")
    targets = None if for_ is None else _targets(for_, perturbation_key, control, separator)
    blocks = _blocks(
        from_gene_sets or (), from_network or (), from_counts or (), from_file or (), components, layer, seed
    )
    joined = concatenate(blocks)
    write_embeddings(joined, out)
    names = None if targets is None else _other_names(targets, aliases)
    covered = {} if targets is None else {b.source: int(b.rows(targets, names)[1].sum()) for b in (*blocks, joined)}
    if json:
        give_json(
            {
                "out": str(out),
                "n_genes": len(joined.names),
                "n_dimensions": joined.n_dimensions,
                "sha256": joined.sha256,
                "sources": [block.source for block in blocks],
                "n_perturbations": None if targets is None else len(targets),
                "covered": covered,
                "missing": None
                if targets is None
                else [t for t, there in zip(targets, joined.rows(targets, names)[1], strict=True) if not there],
            }
        )
        return
    give(f"{out}: {len(joined.names):,} genes x {joined.n_dimensions} dimensions")
    for block in blocks:
        share = "" if targets is None else f"; {block.coverage(targets, names)}"
        give(f"  {block.source}: {len(block.names):,} genes x {block.n_dimensions}{share}")
    if targets is not None:
        give(f"perturbations in {for_}: {joined.coverage(targets, names)}")


def _blocks(
    gene_sets: Sequence[Path],
    networks: Sequence[Path],
    counts: Sequence[str],
    files: Sequence[Path],
    components: int,
    layer: str | None,
    seed: int,
) -> "list[GeneEmbeddings]":
    from lingshu_cell.data.anndata_io import read_counts
    from lingshu_cell.data.embedding_sources import from_coexpression, from_gene_sets, from_network
    from lingshu_cell.data.gene_embeddings import read_embeddings
    from lingshu_cell.data.gene_sets import read_edges, read_gmt

    if not (gene_sets or networks or counts or files):
        raise LingshuError(
            "Embeddings need a source",
            "none was given",
            "Give --from-gene-sets, --from-network, --from-counts or --from-file",
        )
    blocks = [read_embeddings(path) for path in files]
    if gene_sets:
        say("gene sets …")
        pooled: dict[str, tuple[str, ...]] = {}
        for path in gene_sets:
            # The same set may be in several collections.
            pooled |= read_gmt(path)
        blocks.append(from_gene_sets(pooled, components, seed=seed))
    for path in networks:
        say(f"network {path} …")
        edges = read_edges(path)
        blocks.append(from_network(edges.first, edges.second, edges.sign, components, seed=seed))
    for source in counts:
        say(f"co-expression in {source} …")
        cells = read_counts(source, layer)
        blocks.append(from_coexpression(cells.counts, list(cells.gene_names), components, seed=seed))
    return blocks


def _targets(source: str, key: str, control: list[str] | None, separator: str) -> list[str]:
    """Single perturbations of a file, parts of combinations included."""
    from lingshu_cell.data.anndata_io import read_obs
    from lingshu_cell.data.condition_labels import components_of, labels_of

    controls = set(control or ("control", "non-targeting"))
    labels = set(labels_of(read_obs(source), key)) - controls
    parts = {part for label in labels for part in components_of(label, separator, None)} - controls
    if not parts:
        raise LingshuError(
            "There must be perturbations to cover", f"all cells of {source} are control", "Check --perturbation-key"
        )
    return sorted(parts)


def _other_names(targets: list[str], aliases: Path | None) -> dict[str, tuple[str, ...]] | None:
    if aliases is None:
        return None
    from lingshu_cell.data.gene_embeddings import other_names
    from lingshu_cell.data.gene_tables import read_tables

    tables = read_tables(aliases)
    return other_names(targets, tables.approved, tables.former)
