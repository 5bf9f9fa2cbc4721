"""Gene sets, links, wishes and DE tables are read as they are meant or refused; the rule of the preprint holds."""

import gzip
from itertools import product
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu

from lingshu_cell.data.de_tables import join_de_tables, read_de_table, silenced_genes, strongly_down_regulated
from lingshu_cell.data.gene_sets import read_edges, read_gene_tilts, read_gmt, read_table
from lingshu_cell.errors import LingshuError
from lingshu_cell.metrics.differential import COLUMNS, INDEX_NAME

PRIORS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "priors"


def shared(name: str) -> Path:
    if not (PRIORS / name).exists():
        pytest.skip("shared data absent")
    return PRIORS / name


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


# --- files ----------------------------------------------------------------------------------------------------------


def test_msigdb_hallmarks_are_read_whole():
    sets = read_gmt(shared("genesets/msigdb_h.all.v2025.1.Hs.symbols.gmt.gz"))
    assert len(sets) == 50
    assert {"STAT1", "IRF1", "JAK2"} <= set(sets["HALLMARK_INTERFERON_GAMMA_RESPONSE"])
    assert len(sets["HALLMARK_INTERFERON_GAMMA_RESPONSE"]) == 200


def test_gmt_drops_repeats_and_refuses_what_is_none(tmp_path):
    assert read_gmt(written(tmp_path, "A\tabout\tX\tY\tX\t\n\nB\t\tY\n", "a.gmt")) == {"A": ("X", "Y"), "B": ("Y",)}
    with pytest.raises(LingshuError, match=r"line 2 of .* is 'B,about,X'"):
        read_gmt(written(tmp_path, "A\tabout\tX\nB,about,X\n", "b.gmt"))
    with pytest.raises(LingshuError, match="must be unique: 'A' comes twice"):
        read_gmt(written(tmp_path, "A\t\tX\nA\t\tY\n", "c.gmt"))
    with pytest.raises(LingshuError, match=r"there is no .*nowhere\.gmt"):
        read_gmt(tmp_path / "nowhere.gmt")
    whole = gzip.compress(b"A\t\tX\n" * 1000)
    (tmp_path / "cut.gmt.gz").write_bytes(whole[:-20])
    with pytest.raises(LingshuError, match="must be whole text"):
        read_gmt(tmp_path / "cut.gmt.gz")


def test_collectri_has_signs_and_string_has_none():
    regulons = read_edges(shared("networks/collectri_from_omnipath_human.tsv.gz"))
    assert set(regulons.sign) == {-1.0, 1.0} and 0.05 < (regulons.sign < 0).mean() < 0.2
    assert regulons.first[0] == "MYC" and len(regulons) > 60_000
    links = read_edges(shared("networks/string_interactome_human_symbols.tsv.gz"))
    assert set(links.sign) == {1.0} and links.first[:2] == ("ARF5", "ARF5")
    assert links.second[:2] == ("COPG1", "KIF19")


def test_links_take_numbers_and_words_as_signs(tmp_path):
    for column, values in (("mor", ("1", "-1", "0.5")), ("effect", ("activation", "repression", "+"))):
        text = f"source\ttarget\t{column}\n" + "".join(f"NA\tB{i}\t{value}\n" for i, value in enumerate(values))
        edges = read_edges(written(tmp_path, text, f"{column}.tsv.gz"))
        assert edges.first == ("NA",) * 3 and edges.second == ("B0", "B1", "B2")  # NA is a name here
        np.testing.assert_array_equal(edges.sign, [1, -1, 0.5] if column == "mor" else [1, -1, 1])
    kept = read_edges(written(tmp_path, "a,b,sign\nX,X,1\nX,,1\nX,Y,0\nX,Z,unclear\nX,W,-1\n"))
    assert (kept.first, kept.second, kept.sign.tolist()) == (("X",), ("W",), [-1.0])
    with pytest.raises(LingshuError, match="must hold links"):
        read_edges(written(tmp_path, "a,b\nX,X\n"))
    with pytest.raises(LingshuError, match="two columns of genes"):
        read_edges(written(tmp_path, "a\nX\n"))


# --- wishes ---------------------------------------------------------------------------------------------------------


def test_wishes_lie_in_the_order_of_the_model(tmp_path):
    path = written(tmp_path, "gene,direction,log2_fold_change,strength\nC,up,,0.5\nA,down,-3,\nD,,1.5,1\n")
    with pytest.raises(LingshuError, match=r"strength must lie in 0 … 1: it does not for 'A' \(1\)"):
        read_gene_tilts(path, "ABCD")
    tilts = read_gene_tilts(
        written(tmp_path, "Gene\tDirection\tlog2_fold_change\nC\tup\t\nA\tDOWN\t-3\nD\t\t1.5\n", "t.tsv"), "ABCD"
    )
    assert tilts.log2_fold_change.tolist() == [-3, 0, 1, 1.5] and tilts.strength.tolist() == [1, 0, 1, 1]
    assert tilts.strength.dtype == tilts.log2_fold_change.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,direction\nX,up\n", r"must be genes of the model: unknown: 'X' \(1\)"),
        ("gene,direction\nA,up\nA,up\n", "wished once"),
        ("gene,direction\nA,sideways\n", r"neither is given for 'A'"),
        ("gene,log2_fold_change\nA,0\n", "other than 0"),
        ("gene,direction,log2_fold_change\nA,up,-1\n", r"must agree: they do not for 'A'"),
        ("gene,strength\nA,1\n", "needs the columns gene, and direction or log2_fold_change"),
        ("gene,direction,strength\nA,up,2\n", "strength must lie in 0 … 1"),
        ("", "must have a header"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path, text, message):
    with pytest.raises(LingshuError, match=message):
        read_gene_tilts(written(tmp_path, text), "ABC")


# --- differential expression ----------------------------------------------------------------------------------------


def table(**changes: object) -> pd.DataFrame:
    row = {"target": "T", "feature": "G", "target_mean": 0.9, "ref_mean": 2.1, "log2_fold_change": -1.2, "fdr": 0.049}
    return pd.DataFrame([row | changes])


def test_the_rule_of_the_preprint_needs_all_five():
    assert strongly_down_regulated(table()) == {"T": ("G",)}
    for change in (
        {"fdr": 0.05},
        {"log2_fold_change": -1.0},
        {"log2_fold_change": 1.2},
        {"ref_mean": 2.0},
        {"target_mean": 1.0},
        {"fdr": np.nan},
    ):
        assert strongly_down_regulated(table(**change)) == {}, change
    assert strongly_down_regulated(table(ref_mean=2.5), mean_difference=1.7) == {}
    assert strongly_down_regulated(table(fdr=0.2), fdr=0.5) == {"T": ("G",)}


def test_columns_may_have_the_names_of_other_tools(tmp_path):
    renamed = table().rename(columns={"target": "Perturbation", "feature": "names", "fdr": "padj"})
    path = tmp_path / "de.csv"
    pd.concat([renamed, renamed.assign(names="H", padj="NA")]).to_csv(path, index=False)
    assert strongly_down_regulated(read_de_table(path)) == {"T": ("G",)}
    with pytest.raises(LingshuError, match=r"lacks 'ref_mean', 'fdr' \(2\)"):
        strongly_down_regulated(table().drop(columns=["ref_mean", "fdr"]))
    renamed.assign(padj="much").to_csv(path, index=False)
    with pytest.raises(LingshuError, match=r"fdr must be numbers: it is not for 'G'"):
        read_de_table(path)


def test_silenced_genes_are_the_target_and_the_union_over_other_identities():
    tables = {("a", "T"): table(feature="G1"), ("b", "T"): table(feature="G2"), ("b", "U"): table(feature="G3")}
    joined = join_de_tables({key: one.drop(columns="target") for key, one in tables.items()})
    genes = ["G1", "G2", "G3", "T"]
    assert silenced_genes(joined, "T", genes) == ("T", "G1", "G2")
    assert silenced_genes(joined, "T", genes, except_identity="a") == ("T", "G2")
    assert silenced_genes(joined, "T+U", genes, except_identity="a") == ("T", "G2", "G3")
    assert silenced_genes(joined, "T+U", genes, separator=None) == ()
    assert silenced_genes(joined, "X", genes) == () and silenced_genes(joined, "T", ["T"]) == ("T",)
    with pytest.raises(LingshuError, match="no column identity"):
        silenced_genes(table(), "T", genes, except_identity="a")


def test_the_folder_of_lingshu_de_is_read(tmp_path):
    path = PRIORS.parent / "papalexi_eccite_299g.h5ad"
    if not path.exists():
        pytest.skip("shared data absent")
    adata = ad.read_h5ad(path)
    rows = []
    for replicate, target in product(("rep_1", "rep_3"), ("JAK2", "CAV1")):
        own = adata[adata.obs["bio_rep"] == replicate]
        counts = own.X.toarray() / own.X.sum(axis=1) * 1e4
        perturbed, control = (np.asarray(counts[own.obs["perturbation"] == label]) for label in (target, "control"))
        means = {"mean_control": control.mean(axis=0), "mean_perturbed": perturbed.mean(axis=0)}
        fold = np.log2((means["mean_perturbed"] + 0.05) / (means["mean_control"] + 0.05))
        p = mannwhitneyu(perturbed, control).pvalue
        columns = {"gene": own.var_names, **means, "log2_fold_change": fold, "p_value": p}
        columns |= {"fdr": false_discovery_control(p), "fraction_control": 0, "fraction_perturbed": 0}
        name = f"{replicate}_{target}.csv"
        pd.DataFrame(columns)[list(COLUMNS)].to_csv(tmp_path / name, index=False)
        rows.append(
            {"condition": f"{replicate} / {target}", "bio_rep": replicate, "perturbation": target, "file": name}
        )
    untested = {"condition": "rep_4 / X", "bio_rep": "rep_4", "perturbation": "X", "file": ""}
    pd.DataFrame([*rows, untested]).to_csv(tmp_path / INDEX_NAME, index=False)

    de = read_de_table(tmp_path)
    assert set(de["target"]) == {"JAK2", "CAV1"} and set(de["identity"]) == {"rep_1", "rep_3"}
    assert len(de) == 4 * 299
    assert set(silenced_genes(de, "JAK2", adata.var_names)) == {"JAK2", "BMX", "STAMBPL1"}  # the panel's STAT1 targets
    assert silenced_genes(de, "JAK2", adata.var_names, except_identity="rep_3") == ("JAK2",)
    assert silenced_genes(de, "CAV1", adata.var_names) == ()  # not in the panel, and nothing all but silenced
    (tmp_path / INDEX_NAME).write_text("a,b\n1,2\n")
    with pytest.raises(LingshuError, match="must have the index of lingshu de"):
        read_de_table(tmp_path)


def test_a_gene_called_na_stays_one(tmp_path):
    assert read_table(written(tmp_path, "gene,x\nNA,1\n"))["gene"].tolist() == ["NA"]
