"""Embeddings come back from every format bit for bit, are found by any name, and say what their sources say."""

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import typer
from safetensors.numpy import save_file
from scipy import sparse
from typer.testing import CliRunner

from lingshu_cell.commands.embeddings import embeddings as embeddings_command
from lingshu_cell.data.embedding_sources import from_coexpression, from_gene_sets, from_network
from lingshu_cell.data.gene_embeddings import (
    GeneEmbeddings,
    concatenate,
    other_names,
    read_embeddings,
    write_embeddings,
)
from lingshu_cell.data.gene_sets import read_edges, read_gmt
from lingshu_cell.errors import LingshuError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
NAMES = ("STAT1", "NA", "ENSG00000115415")
MATRIX = np.array([[0.1, -2.0], [3.0, 0.0], [1e-7, 5.0]], dtype=np.float32)


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("shared data absent")
    return SHARED / name


def as_file(folder: Path, kind: str) -> Path:
    path = folder / f"e.{kind.split('-')[0]}"
    frame = pd.DataFrame(MATRIX, index=pd.Index(NAMES, name="gene"), columns=["d0", "d1"])
    if kind == "npz":
        np.savez(path, symbols=np.array(NAMES), emb=MATRIX, note=np.array([1.0]))
    elif kind == "safetensors-genes":
        save_file({name: row for name, row in zip(NAMES, MATRIX, strict=True)}, path)
    elif kind == "safetensors-metadata":
        save_file({"embeddings": MATRIX}, path, metadata={"genes": json.dumps(NAMES)})
    elif kind == "safetensors-beside":
        save_file({"weights": MATRIX}, path)
        path.with_name(path.name + ".json").write_text(json.dumps(NAMES))
    elif kind.startswith("parquet"):
        pytest.importorskip("pyarrow")
        (frame if kind.endswith("index") else frame.reset_index()).to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if "tsv" in kind else ",")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "npz", "safetensors-genes", "safetensors-metadata", "safetensors-beside", "parquet-index", "parquet-column",
        "csv", "tsv", "csv.gz", "tsv.gz",
    ],
)  # fmt: skip
def test_every_format_gives_the_same_embeddings(tmp_path, kind):
    expected = GeneEmbeddings.of(NAMES, MATRIX, "here")
    found = read_embeddings(as_file(tmp_path, kind))
    order = [found.names.index(name) for name in NAMES]
    np.testing.assert_array_equal(found.matrix[order], MATRIX)
    assert found.matrix.dtype == np.float32
    assert found.sha256 == expected.sha256 or kind == "safetensors-genes"  # that format keeps no order


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_what_is_written_comes_back(tmp_path, ending):
    one = GeneEmbeddings.of(NAMES, MATRIX, "here")
    write_embeddings(one, tmp_path / f"e.{ending}")
    back = read_embeddings(tmp_path / f"e.{ending}")
    assert (back.names, back.sha256) == (one.names, one.sha256)
    with pytest.raises(LingshuError, match=r"as \.npz or \.safetensors"):
        write_embeddings(one, tmp_path / "e.pt")


def test_gene2vec_is_read():
    found = read_embeddings(shared("priors/embeddings/gene2vec_16906x200_fp16.npz"))
    assert found.matrix.shape == (16906, 200) and found.names[0] == "A1BG"


def test_nothing_pickled_is_opened(tmp_path):
    np.savez(tmp_path / "e.npz", genes=np.array(["A", None], dtype=object), embeddings=np.eye(2))
    with pytest.raises(LingshuError, match=r"must be whole.*Python objects"):
        read_embeddings(tmp_path / "e.npz")
    (tmp_path / "e.pt").write_bytes(b"x")
    with pytest.raises(LingshuError, match=r"pickled files \(.pt, .pkl\) are never opened"):
        read_embeddings(tmp_path / "e.pt")


def test_bad_files_are_refused_in_a_line(tmp_path):
    with pytest.raises(LingshuError, match="there is no"):
        read_embeddings(tmp_path / "nowhere.npz")
    for name in ("cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not whole")
        with pytest.raises(LingshuError, match="must be whole"):
            read_embeddings(tmp_path / name)
    np.savez(tmp_path / "two.npz", first=np.eye(2), second=np.eye(2), genes=np.array(["A", "B"]))
    with pytest.raises(LingshuError, match=r"holds 'first', 'second', 'genes' \(3\)"):
        read_embeddings(tmp_path / "two.npz")
    save_file({"weights": MATRIX}, tmp_path / "nameless.safetensors")
    with pytest.raises(LingshuError, match="needs the names of its rows"):
        read_embeddings(tmp_path / "nameless.safetensors")
    (tmp_path / "words.csv").write_text("gene,a,b\nX,1,much\nY,2,3\n")
    with pytest.raises(LingshuError, match=r"no numbers in 'b' \(1\)"):
        read_embeddings(tmp_path / "words.csv")


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    path = tmp_path / "e.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(LingshuError, match="Run pip install pyarrow, or convert"):
        read_embeddings(path)


def test_broken_numbers_and_repeats_are_refused():
    with pytest.raises(LingshuError, match=r"NaN or infinite numbers for 'B' \(1\)"):
        GeneEmbeddings.of(["A", "B"], np.array([[1.0], [np.nan]]), "x")
    with pytest.raises(LingshuError, match=r"x has different ones for 'A' \(1\)"):
        GeneEmbeddings.of(["A", "B", "A"], np.array([[1.0], [2.0], [3.0]]), "x")
    same = GeneEmbeddings.of(["A", "B", "A"], np.array([[1.0], [2.0], [1.0]]), "x")
    assert same.names == ("A", "B") and same.matrix.tolist() == [[1], [2]]
    with pytest.raises(LingshuError, match="one row per gene"):
        GeneEmbeddings.of(["A"], np.eye(2), "x")


def test_rows_are_found_by_name_id_alias_and_capitals():
    emb = GeneEmbeddings.of(["ENSG00000115415", "MARCHF8", "Actb", "ACTB", "Gapdh"], np.diag(np.arange(1.0, 6)), "x")
    names = other_names(["STAT1", "MARCH8"], {"STAT1": "ENSG00000115415"}, {"MARCH8": ("MARCHF8",)})
    assert names == {"STAT1": ("ENSG00000115415",), "MARCH8": ("MARCHF8",)}
    matrix, found = emb.rows(["STAT1", "MARCH8", "GAPDH", "Actb", "actb", "NOSUCH"], names)
    assert found.tolist() == [True, True, True, True, False, False]  # actb could be either
    assert matrix.sum(axis=1).tolist() == [1, 2, 5, 3, 0, 0]
    assert "2 of 3 have an embedding, none: 'NOSUCH' (1)" in emb.coverage(["STAT1", "GAPDH", "NOSUCH"], names)
    # the other way round: the data use ids or the former symbol, the file the current one
    back = other_names(["ENSG00000115415", "OLD"], {"NEW": "ENSG00000115415"}, {"OLD": ("NEW",)})
    assert back["ENSG00000115415"] == ("NEW", "OLD") and back["OLD"] == ("NEW", "ENSG00000115415")


def test_blocks_weigh_the_same_and_keep_all_genes():
    generator = np.random.default_rng(0)
    one = GeneEmbeddings.of([f"g{i}" for i in range(50)], 1000 * generator.standard_normal((50, 3)), "one")
    two = GeneEmbeddings.of([f"g{i}" for i in range(20, 80)], generator.standard_normal((60, 7)) + 5, "two")
    joined = concatenate([one, two])
    assert joined.matrix.shape == (80, 10) and joined.source == "one + two"
    for block, columns in ((one, slice(0, 3)), (two, slice(3, 10))):
        values = joined.rows(block.names)[0][:, columns]
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose((values**2).sum(axis=1).mean(), 1, rtol=1e-5)
    assert not joined.rows(["g0"])[0][0, 3:].any() and joined.rows(["g0"])[0][0, :3].any()
    scaled = GeneEmbeddings.of(one.names, one.matrix * 7, "one")
    np.testing.assert_allclose(concatenate([scaled, two]).matrix, joined.matrix, atol=1e-5)
    with pytest.raises(LingshuError, match="must share genes: one: g0, g1, g2; three: X"):
        concatenate([one, GeneEmbeddings.of(["X"], np.ones((1, 2)), "three")])


def test_coexpression_is_the_correlation_of_genes(pbmc):
    counts = sparse.csr_matrix(pbmc.X)
    found = from_coexpression(counts, list(pbmc.var_names), n_components=40)
    dense = counts.toarray().astype(float)
    dense = np.log1p(dense / dense.sum(axis=1, keepdims=True) * np.median(dense.sum(axis=1)))
    kept = (counts.toarray() > 0).sum(axis=0) >= 10
    standardised = (dense - dense.mean(axis=0))[:, kept] / dense.std(axis=0)[kept]
    assert found.names == tuple(pbmc.var_names[kept])
    values, vectors = np.linalg.eigh(standardised.T @ standardised / len(dense))
    cut_changes_little = np.abs(standardised).max() < 16
    assert cut_changes_little
    ours = np.sort((found.matrix.astype(float) ** 2).sum(axis=0))[::-1]
    np.testing.assert_allclose(ours[:5], values[::-1][:5], rtol=0.05)
    first = vectors[:, -1] * np.sqrt(values[-1])
    assert abs(np.corrcoef(first, found.matrix[:, 0])[0, 1]) > 0.99
    assert from_coexpression(counts, list(pbmc.var_names), 40).sha256 == found.sha256
    with pytest.raises(LingshuError, match="Ask for 1 … "):
        from_coexpression(counts, list(pbmc.var_names), 10_000)


def cosine(embeddings: GeneEmbeddings, one: str, other: str) -> float:
    a, b = embeddings.rows([one, other])[0].astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_network_neighbours_are_near_and_signs_count():
    cliques = [(f"{c}{i}", f"{c}{j}") for c in "ab" for i in range(8) for j in range(i)] + [("a0", "b0")]
    first, second = zip(*cliques, strict=True)
    plain = from_network(first, second, np.ones(len(first)), 3)
    assert cosine(plain, "a1", "a2") > 0.99 and abs(cosine(plain, "a1", "b1")) < 0.1
    # An activator's and a repressor's targets lie opposite.
    regulator = [("T", f"up{i}") for i in range(9)] + [("T", f"down{i}") for i in range(9)]
    first, second = zip(*regulator, strict=True)
    signed = from_network(first, second, np.repeat([1.0, -1.0], 9), 2)
    assert cosine(signed, "up0", "up1") > 0.99 and cosine(signed, "up0", "down0") < -0.99
    with pytest.raises(LingshuError, match="2 dimensions of 2 genes in the network"):
        from_network(["A"], ["B"], np.ones(1), 2)


def test_string_knows_complexes():
    edges = read_edges(shared("priors/networks/string_interactome_human_symbols.tsv.gz"))
    found = from_network(edges.first, edges.second, edges.sign, 32)
    assert found.matrix.shape[0] > 10_000
    near = np.mean([cosine(found, "PSMA1", other) for other in ("PSMA2", "PSMB1", "PSMC2")])
    assert near > 0.9 and near > np.mean([cosine(found, "PSMA1", o) for o in ("JAK2", "MYC", "COL1A1")]) + 0.5


def test_gene_sets_put_members_together():
    sets = read_gmt(shared("priors/genesets/msigdb_h.all.v2025.1.Hs.symbols.gmt.gz"))
    found = from_gene_sets(sets, 20)
    assert set(found.names) == {gene for genes in sets.values() for gene in genes}
    assert cosine(found, "COX6A1", "COX7B") > max(0.8, cosine(found, "COX6A1", "COL4A1") + 0.3)
    twins = from_gene_sets({"s": "ABC", "t": "ABD", "u": "CDE"}, 2)
    np.testing.assert_allclose(*twins.rows(["A", "B"])[0], atol=1e-6)
    with pytest.raises(LingshuError, match="1 sets of 2 genes"):
        from_gene_sets({"s": "AB"}, 1, min_genes=2)


def test_the_command_writes_and_tells_the_coverage(tmp_path):
    app = typer.Typer()
    app.command()(embeddings_command)
    links = tmp_path / "links.tsv"
    genes = [f"g{i}" for i in range(30)]
    links.write_text("a\tb\n" + "".join(f"{x}\t{y}\n" for i, x in enumerate(genes) for y in genes[:i:3]))
    sets = tmp_path / "sets.gmt"
    sets.write_text("".join(f"s{i}\t\t" + "\t".join(genes[i : i + 8]) + "\n" for i in range(20)))
    obs = pd.DataFrame({"target": ["control", "g1", "g2+g3", "OLD4", "elsewhere"]}, index=list("abcde"))
    ad.AnnData(sparse.csr_matrix(np.ones((5, 2), np.int32)), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "aliases.tsv").write_text("OLD4\tg4\n")
    command = [
        "--from-network", str(links), "--from-gene-sets", str(sets), "--components", "4", "--out",
        str(tmp_path / "e.npz"), "--for", str(tmp_path / "cells.h5ad"), "--perturbation-key", "target", "--aliases",
        str(tmp_path / "aliases.tsv"),
    ]  # fmt: skip
    said = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    answer = json.loads(said.stdout.strip().splitlines()[-1])
    assert answer["missing"] == ["elsewhere"] and answer["n_perturbations"] == 5
    assert answer["n_dimensions"] == 8 and read_embeddings(tmp_path / "e.npz").sha256 == answer["sha256"]
    assert list(answer["covered"].values())[-1] == 4
    with pytest.raises(LingshuError, match="must not exist yet"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    said = CliRunner().invoke(app, [*command, "--overwrite"], catch_exceptions=False)
    assert "4 of 5 have an embedding, none: 'elsewhere' (1)" in said.stdout
    with pytest.raises(LingshuError, match="need a source"):
        CliRunner().invoke(app, ["--out", str(tmp_path / "f.npz")], catch_exceptions=False)


def test_reading_needs_no_torch():
    import subprocess

    code = "import sys, lingshu_cell.data.prior_effects; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
