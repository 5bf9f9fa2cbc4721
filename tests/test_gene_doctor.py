"""Genes of several data sets and species meet on one list exactly where they are the same gene."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from lingshu_cell.data.gene_doctor import GeneList, join_genes
from lingshu_cell.data.gene_tables import GeneTables, read_tables, species_name, species_of_id
from lingshu_cell.data.sources import open_source
from lingshu_cell.errors import LingshuError

PRIORS = SHARED_DATA / "priors"
HGNC = """hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
1\tMARCHF1\tApproved\tRNF171\tMARCH1\tENSG00000000001
2\tQARS1\tApproved\tGLNRS\tQARS\tENSG00000000002
3\tIARS1\tApproved\tGLNRS\t\tENSG00000000003
4\tACTB\tApproved\t\t\tENSG00000000004
5\tCD8A\tApproved\tCD8\t\tENSG00000000005
6\tDEPP1\tApproved\t\tC10orf10\tENSG00000000006
7\tGONE\tEntry Withdrawn\t\tACTB2\t
"""
ORTHOLOGS = """homo_sapiens,mus_musculus,percent
ENSG00000000004,ENSMUSG00000000004,99
ENSG00000000005,ENSMUSG00000000005,80
ENSG00000000005,ENSMUSG00000000055,90
ENSG00000000006,ENSMUSG00000000006,50
ENSG00000000001,ENSMUSG00000000006,50
"""
MOUSE = "ENSMUSG00000000004,Actb\nENSMUSG00000000005,Cd8a\nENSMUSG00000000055,Cd8a2\nENSMUSG00000000007,H19\n"


@pytest.fixture
def tables(tmp_path: Path) -> GeneTables:
    with gzip.open(tmp_path / "hgnc.tsv.gz", "wt") as file:
        file.write(HGNC)
    (tmp_path / "orthologs.csv").write_text(ORTHOLOGS)
    (tmp_path / "mouse.csv").write_text(MOUSE)
    return read_tables(
        tmp_path / "hgnc.tsv.gz", {"mouse": tmp_path / "mouse.csv"}, [(None, tmp_path / "orthologs.csv")]
    )


def ids(*numbers: int, prefix: str = "ENSG") -> pd.DataFrame:
    return pd.DataFrame({"gene_ids": [f"{prefix}{n:011d}" if n else "" for n in numbers]})


def named(joined, i: int) -> list[str | None]:
    """Joint name of each gene of data set ``i``."""
    return [joined.vocabulary.names[c] if c >= 0 else None for c in joined.columns[i]]


def test_aliases_ids_and_names_meet(tables):
    old = GeneList("old", ["MARCH1", "QARS", "ACTB", "C10ORF10", "RP11-1", "GLNRS"])
    new = GeneList("new", ["MARCHF1", "QARS1", "X", "CD8A"], ids(1, 2, 4, 5))
    by_id = GeneList("by_id", [f"ENSG{n:011d}.3" for n in (5, 1, 99)])
    joined = join_genes([old, new, by_id], tables)
    assert named(joined, 0) == ["MARCHF1", "QARS1", "ACTB", "DEPP1", "RP11-1", "GLNRS"]
    assert named(joined, 1) == ["MARCHF1", "QARS1", "ACTB", "CD8A"]
    assert named(joined, 2) == ["CD8A", "MARCHF1", "ENSG00000000099.3"]
    first = joined.reports[0]
    assert first.counts["alias"] == 3 and first.counts["ambiguous"] == 1 and first.examples["ambiguous"] == ("GLNRS",)
    assert first.counts["unlisted"] == 1 and "MARCH1 → MARCHF1" in first.describe()
    assert joined.reports[1].counts["Ensembl id"] == 1 and joined.reports[1].examples["Ensembl id"] == ("X → ACTB",)
    assert joined.measured.sum(axis=1).tolist() == [6, 4, 3]
    assert joined.vocabulary.ensembl_ids[joined.vocabulary.names.index("CD8A")] == "ENSG00000000005"


def test_an_approved_name_is_not_taken_by_an_alias(tables):
    both = GeneList("both", ["MARCH1", "MARCHF1"])
    joined = join_genes([both], tables)
    assert named(joined, 0) == ["MARCH1", "MARCHF1"]
    assert joined.reports[0].counts["ambiguous"] == 1


def test_data_sets_teach_each_other_without_tables():
    symbols = GeneList("symbols", ["A", "B", "C"], ids(11, 12, 0))
    by_id = GeneList("by_id", ["ENSG00000000012", "ENSG00000000011", "ENSG00000000013"])
    other = GeneList("other", ["A2", "B", "D"], ids(11, 0, 0))
    joined = join_genes([symbols, by_id, other])
    assert named(joined, 1) == ["B", "A", "ENSG00000000013"] and named(joined, 2) == ["A", "B", "D"]


def test_an_old_symbol_is_dated_by_a_data_set_with_ids(tables):
    with_ids = GeneList("with_ids", ["RP11-7", "ACTB"], ids(5, 4))
    without = GeneList("without", ["RP11-7"])
    assert named(join_genes([with_ids, without], tables), 1) == ["CD8A"]


def test_orthologs_join_mouse_to_human(tables):
    human = GeneList("human", ["ACTB", "CD8A", "DEPP1", "H19"], ids(4, 5, 6, 0))
    mouse = GeneList("mouse", ["Actb", "Cd8a", "Cd8a2", "Gm1", "H19"], species="Mus musculus")
    joined = join_genes([mouse, human], tables)
    # the better ortholog has the name; a gene without one keeps its own, apart from human genes so called
    assert named(joined, 0) == ["ACTB", "Cd8a", "CD8A", "Gm1", "H19 (mus_musculus)"]
    assert named(joined, 1) == ["ACTB", "CD8A", "DEPP1", "H19"]
    assert joined.reports[0].counts["ortholog"] == 2
    spelt = join_genes([human, GeneList("spelt", ["Qars", "Depp1", "Glnrs"], species="mouse")], tables)
    assert named(spelt, 1) == ["QARS1", "DEPP1", "Glnrs"] and spelt.reports[1].counts["spelling"] == 2
    # ENSMUSG…6 is equally like two human genes, so it is no one's ortholog
    tied = join_genes([human, GeneList("tied", ["x", "Actb"], ids(6, 4, prefix="ENSMUSG"))], tables)
    assert named(tied, 1) == ["x", "ACTB"]


def test_a_species_without_orthologs_is_refused_or_kept_apart(tables):
    human, fly = GeneList("human", ["ACTB", "w"], species="human"), GeneList("fly", ["w", "Act5C"], species="fly")
    with pytest.raises(LingshuError, match=r"no table of orthologs to homo_sapiens for 'fly \(drosophila_melanogaster"):
        join_genes([human, fly], tables)
    joined = join_genes([human, fly], tables, separate_species=True)
    assert named(joined, 1) == ["w (drosophila_melanogaster)", "Act5C"]
    assert not (joined.measured[0] & joined.measured[1]).any()


def test_one_species_needs_no_human(tables):
    joined = join_genes(
        [GeneList("a", ["Actb", "Xy"], species="mouse"), GeneList("b", ["Xy"], species="mouse")], tables
    )
    assert joined.vocabulary.names == ("Actb", "Xy")


def test_intersection_and_lists(tables):
    a, b = GeneList("a", ["MARCH1", "ACTB", "Z"]), GeneList("b", ["ACTB", "MARCHF1"])
    assert join_genes([a, b], tables, join="intersection").vocabulary.names == ("MARCHF1", "ACTB")
    wanted = join_genes([a, b], tables, join=["ENSG00000000005", "MARCH1", "Z"])
    assert wanted.vocabulary.names == ("ENSG00000000005", "MARCHF1", "Z")
    assert wanted.measured.tolist() == [[False, True, True], [False, True, False]]
    assert wanted.reports[0].n_dropped == 1 and wanted.reports[0].dropped == ("ACTB",)
    with pytest.raises(LingshuError, match="found more than once: 'MARCHF1'"):
        join_genes([a, b], tables, join=["MARCH1", "MARCHF1"])
    with pytest.raises(LingshuError, match="the intersection is empty"):
        join_genes([GeneList("a", ["A"]), GeneList("b", ["B"])], join="intersection")
    with pytest.raises(LingshuError, match="'b' \\(1\\) has none"):
        join_genes([GeneList("a", ["A"]), GeneList("b", ["B"])], join=["A"])


def test_a_species_that_ids_deny_is_refused():
    with pytest.raises(LingshuError, match="said to be mus_musculus, but most ids are of homo_sapiens"):
        join_genes([GeneList("a", ["A", "B"], ids(1, 2), "mouse")])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(["MARCH1", "MARCHF1", "QARS", "GLNRS", "ACTB", "Q", "R"]), st.integers(0, 8)),
            min_size=1, max_size=7, unique_by=lambda pair: pair[0],
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_genes_are_never_lost_or_merged(lists):
    tables = GeneTables(
        approved={"MARCHF1": "ENSG00000000001", "ACTB": "ENSG00000000004"},
        former={"MARCH1": ("MARCHF1",), "GLNRS": ("X", "Y")},
        symbol_of_id={"ENSG00000000001": "MARCHF1", "ENSG00000000004": "ACTB"},
    )
    joined = join_genes(
        [GeneList(str(i), [n for n, _ in one], ids(*(k for _, k in one))) for i, one in enumerate(lists)], tables
    )
    for one, places, row in zip(lists, joined.columns, joined.measured, strict=True):
        assert len(places) == len(one) == len(set(places.tolist())) and (places >= 0).all()
        assert row.sum() == len(one)
    for report, one in zip(joined.reports, lists, strict=True):
        assert sum(report.counts.values()) == len(one) == report.n_genes
        assert report.describe() and report.to_json()["counts"] == dict(report.counts)


def test_tables_that_are_none_are_refused(tmp_path):
    (tmp_path / "one.csv").write_text("a\nb\n")
    (tmp_path / "broken.csv.gz").write_bytes(b"\x1f\x8bno")
    (tmp_path / "pairs.csv").write_text("x,y\nA,B\n")
    for call, words in (
        (lambda: read_tables(tmp_path / "absent"), "there is no"),
        (lambda: read_tables(tmp_path / "one.csv"), "at least 2 columns"),
        (lambda: read_tables(tmp_path / "broken.csv.gz"), "must be readable"),
        (lambda: read_tables(orthologs=[(None, tmp_path / "pairs.csv")]), "must name two species"),
    ):
        with pytest.raises(LingshuError, match=words):
            call()
    assert read_tables(orthologs=[("rhesus", tmp_path / "pairs.csv")]).orthologs[("macaca_mulatta", "homo_sapiens")][
        "B"
    ]


def test_species_have_one_spelling():
    assert {species_name(s) for s in ("human", "Homo sapiens", "homo_sapiens", " HOMO  sapiens")} == {"homo_sapiens"}
    assert species_of_id("ENSMUSG00000000001") == "mus_musculus" and species_of_id("ACTB") is None


def test_real_data_sets_of_two_species_meet():
    if not PRIORS.is_dir():
        pytest.skip("shared data absent")
    tables = read_tables(
        PRIORS / "genes/hgnc_complete_set.tsv.gz",
        {"mouse": PRIORS / "genes/genes_mus_musculus.csv.gz"},
        [(None, PRIORS / "orthologs/human2mouse_ensembl_best.csv.gz")],
    )
    lists = []
    for name in ("pbmc3k", "pbmc8k", "marrow_cd34", "dentate_gyrus_mouse"):
        with open_source(SHARED_DATA / f"{name}.h5ad") as source:
            lists.append(GeneList(name, source.gene_names, source.var, source.species))
    joined = join_genes(lists, tables)
    where = {name: i for i, name in enumerate(joined.vocabulary.names)}
    for gene in ("GAPDH", "HNRNPU", "ATP5F1B", "NARS1"):  # the last two had other names in older sets
        assert joined.measured[:, where[gene]].all(), gene
    assert not {"MARCH1", "CTGF", "ATP5B", "NARS"} & set(where)
    assert (joined.measured[:2].all(axis=0)).sum() > 30_000  # symbols of pbmc3k against Ensembl ids of pbmc8k
    assert joined.reports[3].counts["ortholog"] > 12_000 and joined.reports[2].counts["alias"] > 300
    assert np.unique(joined.columns[3]).size == 14_545
