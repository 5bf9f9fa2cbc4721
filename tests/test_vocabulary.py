"""Genes are found by name, id, alias or capitals, absent ones stay unknown, and conditions are never guessed."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.data.vocabulary import (
    ConditionVocabulary,
    GeneVocabulary,
    align_genes,
    apply_alignment,
    union_vocabulary,
)
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="module")
def pbmc3k() -> CountMatrix:
    return read_counts(pbmc3k_path())


def shared(name: str) -> CountMatrix:
    if not (SHARED / f"{name}.h5ad").exists():
        pytest.skip("shared data absent")
    return read_counts(SHARED / f"{name}.h5ad")


def vocabulary_of(data: CountMatrix) -> GeneVocabulary:
    return GeneVocabulary.from_var(data.gene_names, data.var)


# --- genes ----------------------------------------------------------------------------------------------------------


def test_gene_vocabulary_comes_back_from_json(pbmc3k):
    vocabulary = vocabulary_of(pbmc3k)
    assert len(vocabulary) == 32738 and vocabulary.ensembl_ids[:2] == ("ENSG00000243485", "ENSG00000237613")
    for one in (vocabulary, GeneVocabulary(("A", "B"))):
        assert GeneVocabulary.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_gene_vocabulary_gives_positions_and_refuses_unknown_genes(pbmc3k):
    vocabulary = vocabulary_of(pbmc3k)
    positions = vocabulary.index(["CD3D", "LYZ"])
    assert positions.dtype == np.int64 and [vocabulary.names[i] for i in positions] == ["CD3D", "LYZ"]
    assert vocabulary.index("LYZ").tolist() == [positions[1]]
    with pytest.raises(
        LingshuError, match=r"must be in the vocabulary: 'cd3d', 'X' \(2\) are not among its 32738 genes"
    ):
        vocabulary.index(["cd3d", "LYZ", "X"])


def test_bad_gene_vocabularies_are_refused():
    with pytest.raises(LingshuError, match="needs genes: the list is empty"):
        GeneVocabulary(())
    with pytest.raises(LingshuError, match=r"must be unique: found more than once: 'A' \(1\)"):
        GeneVocabulary(("A", "B", "A"))
    with pytest.raises(LingshuError, match="one Ensembl id per gene: 2 genes and 1 ids"):
        GeneVocabulary(("A", "B"), ("ENSG00000000001",))


def test_each_way_of_matching_is_named():
    vocabulary = GeneVocabulary(
        ("CD3D", "LYZ", "ADGRL1", "C1orf112", "MS4A1", "NKG7", "GNLY"),
        ("", "ENSG00000090382.6", "", "", "ENSG00000156738", "", ""),
    )
    names = ["ENSG00000156738.19", "CD3D", "lysozyme", "LPHN1", "C1ORF112", "OTHER", "ENSG00000105374"]
    var = pd.DataFrame(
        {
            "Gene_IDs": [None, None, "ENSG00000090382.11", None, None, None, None],
            "feature_name": ["?", "CD3D", "?", "?", "?", "?", "NKG7"],
        },
        index=names,
    )
    alignment = align_genes(vocabulary, names, var, aliases={"LPHN1": "ADGRL1"})
    assert alignment.columns.tolist() == [1, 2, 3, 4, 0, 6, -1]
    assert alignment.matched == ("CD3D",)
    assert alignment.renamed == (
        ("lysozyme", "LYZ", "Ensembl id"),
        ("LPHN1", "ADGRL1", "alias"),
        ("C1ORF112", "C1orf112", "capitals"),
        ("ENSG00000156738.19", "MS4A1", "Ensembl id"),
        ("ENSG00000105374", "NKG7", "symbol"),
    )
    assert alignment.missing == ("GNLY",) and alignment.extra == ("OTHER",) and alignment.ambiguous == ()
    assert alignment.coverage == 6 / 7
    assert alignment.describe().splitlines() == [
        "6 of 7 genes of the model found in the data (85.7%)",
        "  2 by Ensembl id: lysozyme → LYZ, ENSG00000156738.19 → MS4A1",
        "  1 by alias: LPHN1 → ADGRL1",
        "  1 by capitals: C1ORF112 → C1orf112",
        "  1 by symbol: ENSG00000105374 → NKG7",
        "  1 absent, treated as unknown and not as zero: GNLY",
        "  1 only in the data, not used: OTHER",
    ]


def test_several_candidates_are_left_unknown():
    vocabulary = GeneVocabulary(("SCX", "LYZ", "CD3D"))
    alignment = align_genes(vocabulary, ["SCXA", "SCXB", "LYZ", "CD3D"], aliases={"SCXA": "SCX", "SCXB": "SCX"})
    assert alignment.columns.tolist() == [-1, 2, 3]
    assert alignment.ambiguous == ("SCX",) and alignment.missing == () and alignment.extra == ("SCXA", "SCXB")
    assert "1 with several candidates, treated as unknown: SCX" in alignment.describe()


def test_a_match_by_name_with_another_id_is_told():
    vocabulary = GeneVocabulary(("A", "B"), ("ENSG00000000001", "ENSG00000000002"))
    var = pd.DataFrame({"gene_ids": ["ENSG00000000001", "ENSG00000000009"]}, index=["A", "B"])
    alignment = align_genes(vocabulary, ["A", "B"], var)
    assert alignment.matched == ("A", "B") and alignment.conflicting == ("B",)


def test_a_dot_in_a_symbol_is_no_version():
    vocabulary = GeneVocabulary(("AL627309.1", "Y74C9A.3", "CD3D"))
    alignment = align_genes(vocabulary, ["AL627309.2", "Y74C9A.3", "CD3D"])
    assert alignment.columns.tolist() == [-1, 1, 2]


def test_real_symbols_find_their_ensembl_ids(pbmc3k):
    pbmc8k = shared("pbmc8k")
    alignment = align_genes(vocabulary_of(pbmc3k), pbmc8k.gene_names, pbmc8k.var)
    assert len(alignment.renamed) == 31_232 and not alignment.matched and not alignment.ambiguous
    back = align_genes(vocabulary_of(pbmc8k), pbmc3k.gene_names, pbmc3k.var)
    there = np.flatnonzero(alignment.columns >= 0)
    np.testing.assert_array_equal(back.columns[alignment.columns[there]], there)
    counts, present = apply_alignment(pbmc8k.counts, alignment)
    b_cells = np.asarray((counts[:, vocabulary_of(pbmc3k).index(["CD79A", "MS4A1"])] > 0).mean(axis=0))
    assert ((b_cells > 0.05) & (b_cells < 0.3)).all()  # B cells are 5 – 20 % of blood mononuclear cells
    assert counts.shape == (8381, 32738) and present.sum() == 31_232


def test_real_kang_cells_fit_a_pbmc3k_model(pbmc3k):
    kang = shared("kang_ifnb")
    with pytest.raises(
        LingshuError, match=r"At least 50% of the model's genes must be in the data: 14030 of 32738 are"
    ):
        align_genes(vocabulary_of(pbmc3k), kang.gene_names, kang.var)
    alignment = align_genes(vocabulary_of(pbmc3k), kang.gene_names, kang.var, min_coverage=0.4)
    assert alignment.coverage == 14_030 / 32_738 and len(alignment.extra) == 23
    counts, present = apply_alignment(kang.counts, alignment)
    used = alignment.columns[present]
    assert counts.sum() == kang.counts[:, used].sum()
    assert (counts[:, np.flatnonzero(present)] != kang.counts[:, used]).nnz == 0
    assert counts[:, np.flatnonzero(~present)].nnz == 0


def test_hgnc_aliases_rescue_renamed_genes(pbmc3k):
    marrow = shared("marrow_cd34")
    hgnc = pd.read_csv(SHARED / "priors/genes/hgnc_complete_set.tsv.gz", sep="\t", low_memory=False).dropna(
        subset="prev_symbol"
    )
    aliases = {old: new for new, olds in zip(hgnc.symbol, hgnc.prev_symbol, strict=True) for old in olds.split("|")}
    plain = align_genes(vocabulary_of(marrow), pbmc3k.gene_names, pbmc3k.var)
    helped = align_genes(vocabulary_of(marrow), pbmc3k.gene_names, pbmc3k.var, aliases)
    assert len(plain.missing) - len(helped.missing) > 200
    assert ("LPHN1", "ADGRL1", "alias") in helped.renamed and len(helped.ambiguous) < 10


@pytest.mark.parametrize("name", ["dentate_gyrus_mouse", "fly_embryo", "worm_embryo", "chicken_embryo"])
def test_another_species_is_refused(pbmc3k, name):
    other = shared(name)
    with pytest.raises(LingshuError, match="Genes must be those of one species: most "):
        align_genes(vocabulary_of(pbmc3k), other.gene_names, other.var, min_coverage=0)


def test_a_model_of_several_species_takes_the_genes_of_each():
    both = GeneVocabulary(("ACTB", "GAPDH", "OVAL"), ("ENSG00000075624", "ENSG00000111640", "ENSGALG00000036420"))
    chicken = pd.DataFrame({"gene_ids": ["ENSGALG00000036420"]}, index=["OVAL"])
    assert align_genes(both, ["OVAL"], chicken, min_coverage=0.0).coverage == pytest.approx(1 / 3)
    mouse = pd.DataFrame({"gene_ids": ["ENSMUSG00000029580"]}, index=["ACTB"])
    with pytest.raises(LingshuError, match="Genes must be those of one species"):
        align_genes(both, ["ACTB"], mouse, min_coverage=0.0)


def test_species_are_told_by_ids_or_by_capitals(pbmc3k):
    mouse = GeneVocabulary(("Actb", "Gapdh", "H2-K1"), ("ENSMUSG00000029580", "ENSMUSG00000057666", ""))
    with pytest.raises(LingshuError, match="ids of the model begin with ENSMUSG, most ids of the data with ENSG"):
        align_genes(mouse, pbmc3k.gene_names, pbmc3k.var)
    with pytest.raises(LingshuError, match=r"only when capitals are ignored, e\.g\. GAPDH for Gapdh, ACTB for Actb"):
        align_genes(GeneVocabulary(("Gapdh", "Actb", "H2-K1")), pbmc3k.gene_names)


def test_two_name_styles_without_a_bridge_are_refused():
    symbols = GeneVocabulary(("CD3D", "LYZ", "NKG7", "GNLY"))
    with pytest.raises(LingshuError) as caught:
        align_genes(symbols, ["ENSG00000167286", "ENSG00000090382"], min_coverage=0)
    assert str(caught.value) == (
        "At least 0% of the model's genes must be in the data: 0 of 4 are (0.0%); the model has CD3D, LYZ, NKG7, …, "
        "the data ENSG00000167286, ENSG00000090382. Use the same species and name style, put Ensembl ids in "
        "var['gene_ids'], pass aliases, or lower min_coverage if the data only measure fewer genes."
    )
    with pytest.raises(LingshuError, match="one row per gene: 1 genes and 2 rows"):
        align_genes(symbols, ["CD3D"], pd.DataFrame(index=["CD3D", "LYZ"]))


@given(st.permutations(range(12)), st.integers(6, 12), st.integers(0, 2**32 - 1))
def test_alignment_moves_every_count_to_its_gene(order, n_kept, seed):
    """Reading back by name gives the same counts, whatever the order and whichever genes are absent."""
    names = [f"g{i}" for i in range(12)]
    source = [names[i] for i in order[:n_kept]] + ["extra"]
    dense = np.random.default_rng(seed).poisson(1.0, (5, n_kept + 1)).astype(np.int32)
    alignment = align_genes(GeneVocabulary(tuple(names)), source)
    counts, present = apply_alignment(sparse.csr_matrix(dense), alignment)
    assert counts.dtype == np.int32 and counts.has_sorted_indices and counts.shape == (5, 12)
    moved = pd.DataFrame(counts.toarray(), columns=names)
    np.testing.assert_array_equal(moved[source[:-1]], dense[:, :-1])
    assert present.tolist() == [name in source for name in names]
    assert moved.loc[:, ~present].to_numpy().sum() == 0


def test_counts_of_another_data_set_are_refused():
    alignment = align_genes(GeneVocabulary(("A", "B")), ["B", "A", "C"])
    with pytest.raises(LingshuError, match="must have the genes that were aligned: 2 columns instead of 3"):
        apply_alignment(sparse.csr_matrix((4, 2), dtype=np.int32), alignment)


def test_union_keeps_the_order_and_says_who_has_what(pbmc3k):
    vocabulary, coverage = union_vocabulary([["B", "A"], ["C", "A"], ["A", "B", "C", "D"]])
    assert vocabulary.names == ("B", "A", "C", "D") and coverage == (0.5, 0.5, 1.0)
    kang = shared("kang_ifnb")
    vocabulary, coverage = union_vocabulary([pbmc3k.gene_names, kang.gene_names])
    assert len(vocabulary) == 32738 + 23 and vocabulary.names[:32738] == tuple(pbmc3k.gene_names)
    assert coverage == (32738 / len(vocabulary), 14053 / len(vocabulary))
    with pytest.raises(LingshuError, match=r"must share genes: list 3 \(ENSG1\) shares none with the others \(A, B\)"):
        union_vocabulary([["A", "B"], ["B"], ["ENSG1"]])
    with pytest.raises(LingshuError, match="needs gene lists: none was given"):
        union_vocabulary([])


# --- conditions -----------------------------------------------------------------------------------------------------


OBS = pd.DataFrame(
    {"cell_type": pd.Categorical(["T", "B", "T"], categories=["T", "B", "unused"]), "donor": [10, 9, 10]},
    index=["c0", "c1", "c2"],
)


def test_conditions_are_sorted_text_with_0_for_unknown():
    conditions = ConditionVocabulary.from_obs(OBS, ["cell_type", "donor"])
    assert conditions.fields == {"cell_type": ("B", "T"), "donor": ("10", "9")}
    assert conditions.sizes == (3, 3)
    codes = conditions.encode(OBS)
    assert codes.dtype == np.int64 and codes.tolist() == [[2, 1], [1, 2], [2, 1]]
    assert conditions.encode({"cell_type": "B"}, 2).tolist() == [[1, 0], [1, 0]]
    assert conditions.encode({"cell_type": None, "donor": [9, "10"]}, 2).tolist() == [[0, 2], [0, 1]]
    assert conditions.encode({}, 1).tolist() == [[0, 0]]
    labels = conditions.decode(np.array([[2, 0], [0, 1]]))
    assert labels["cell_type"].isna().tolist() == [False, True] and labels["cell_type"][0] == "T"
    assert labels["donor"].isna().tolist() == [True, False] and labels["donor"][1] == "10"
    assert list(labels["donor"].cat.categories) == ["10", "9"]


def test_no_conditions_are_possible():
    nothing = ConditionVocabulary.from_obs(OBS, [])
    assert (
        nothing.sizes == () and nothing.encode(OBS).shape == (3, 0) and nothing.decode(np.zeros((3, 0))).shape == (3, 0)
    )
    with pytest.raises(LingshuError, match="This model was trained without conditions"):
        nothing.encode({"cell_type": "B"}, 1)


def test_conditions_come_back_from_json_and_from_codes(pbmc3k):
    conditions = ConditionVocabulary.from_obs(pbmc3k.obs, ["cell_type"])
    assert len(conditions.fields["cell_type"]) == 9
    assert ConditionVocabulary.from_json(json.loads(json.dumps(conditions.to_json()))) == conditions
    labels = conditions.decode(conditions.encode(pbmc3k.obs))
    assert labels["cell_type"].tolist() == pbmc3k.obs["cell_type"].tolist()


@pytest.mark.parametrize(
    ("obs", "n", "words"),
    [
        ({"tissue": "x"}, 1, r"must be those of the model: 'tissue' \(1\) is not one of its fields. Use 'cell_type', "),
        ({"cell_type": "b"}, 1, r"cell_type has no 'b' \(1\)\. Known values: 'B', 'T' \(2\)\."),
        ({"cell_type": ["B", "X", "X"]}, 3, r"cell_type has no 'X' \(1\)"),
        ({"cell_type": ["B", "T"]}, 3, "one label per cell: 2 labels of 'cell_type' for 3 cells"),
        ({"cell_type": "B"}, None, "number of cells must be given"),
        (OBS[["donor"]], None, r"must be obs columns: there is no 'cell_type'. Available: 'donor' \(1\)"),
        (OBS, 5, "one label per cell: 3 labels of 'cell_type' for 5 cells"),
        (OBS.assign(donor=["9", None, "9"]), None, "a label in every cell: 1 of 3 cells have none in 'donor'"),
    ],
)
def test_unknown_conditions_are_refused(obs, n, words):
    with pytest.raises(LingshuError, match=words):
        ConditionVocabulary.from_obs(OBS, ["cell_type", "donor"]).encode(obs, n)


def test_keys_that_cannot_be_conditions_are_refused():
    with pytest.raises(LingshuError, match="there is no 'tissue'"):
        ConditionVocabulary.from_obs(OBS, ["tissue"])
    with pytest.raises(LingshuError, match="must be labels: 'score' holds decimal numbers"):
        ConditionVocabulary.from_obs(OBS.assign(score=[0.1, 0.2, 0.3]), ["score"])
    with pytest.raises(LingshuError, match="a list of different obs columns: got 'cell_type'"):
        ConditionVocabulary.from_obs(OBS, "cell_type")
    with pytest.raises(LingshuError, match="a list of different obs columns"):
        ConditionVocabulary.from_obs(OBS, ["donor", "donor"])
