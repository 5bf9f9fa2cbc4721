"""Quality rules drop what they say, and read counts are told from molecules on real data."""

import anndata as ad
import numpy as np
import pytest
from conftest import SHARED_DATA, real_cells
from scipy import sparse

from lingshu_cell.data.quality import (
    PAPER_RULES,
    QualityRules,
    counts_reads,
    doublets,
    failing,
    is_mitochondrial,
    share_of_ones,
    valley,
)
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError


def ones(counts: sparse.csr_matrix) -> float | None:
    n = counts.shape[1]
    return share_of_ones(
        counts.shape[0],
        np.bincount(counts.indices, minlength=n),
        np.bincount(counts.indices[counts.data == 1], minlength=n),
    )


def test_rules_agree_with_scanpy():
    import scanpy as sc

    adata = ad.read_h5ad(pbmc3k_path())[:600].copy()
    adata.var["mt"] = adata.var_names.str.startswith("MT-")
    assert adata.var["mt"].sum() == 13 == is_mitochondrial(adata.var_names).sum()
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
    rules = QualityRules(min_genes=600, min_counts=1500, max_mito=0.03)
    broken = failing(adata.X, is_mitochondrial(adata.var_names), rules)
    expected = {
        "min_genes": adata.obs["n_genes_by_counts"] < 600,
        "min_counts": adata.obs["total_counts"] < 1500,
        "max_mito": adata.obs["pct_counts_mt"] > 3,
    }
    for rule, cells in expected.items():
        assert (broken[rule] == cells.to_numpy()).all() and 0 < cells.sum() < 600


def test_no_rule_drops_nothing():
    assert failing(real_cells(20, 30).X, np.zeros(30, dtype=bool), QualityRules()) == {}


def test_mitochondrial_names_of_species():
    names = ["MT-ND1", "mt-Nd1", "mt:ND1", "MTOR", "MT1X", "Mtor"]
    assert is_mitochondrial(names).tolist() == [True, True, True, False, False, False]


def test_doublets_that_were_made_are_called():
    adata = ad.read_h5ad(pbmc3k_path())
    adata = adata[adata.obs["cell_type"].isin(["B cells", "CD14+ Monocytes"])]
    is_b = (adata.obs["cell_type"] == "B cells").to_numpy()
    cells, rng = adata.X, np.random.default_rng(0)
    made = cells[rng.choice(np.flatnonzero(is_b), 60)] + cells[rng.choice(np.flatnonzero(~is_b), 60)]
    both = sparse.vstack([cells, made], format="csr")
    called = doublets(both, seed=0)
    assert called is not None and called.any()  # its threshold is known to be cautious
    assert called[-60:].mean() > 5 * called[:-60].mean()
    assert (called == doublets(both, seed=0)).all()
    assert doublets(cells[:20], seed=0) is None


def test_valley_lies_between_two_peaks():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0, 1, 4000), rng.normal(8, 1, 1000)])
    assert 2.5 < valley(values) < 6
    assert valley(np.zeros(100)) is None


def test_read_counts_are_told_by_rarely_detected_genes():
    pbmc = ad.read_h5ad(pbmc3k_path()).X[:1000]
    assert ones(pbmc) > 0.9 and counts_reads("10x 3' v1", ones(pbmc)) is None
    reads = pbmc.copy()  # every molecule is read 0 … many times
    reads.data = np.random.default_rng(0).negative_binomial(2, 0.2, len(reads.data)).astype(np.int32)
    reads.eliminate_zeros()
    assert "of the counts of rarely detected genes are 1" in counts_reads(None, ones(reads))
    assert ones(pbmc[:, :40]) is None
    assert counts_reads("Smart-seq2", None) == "the assay has no UMIs"
    assert counts_reads("Smart-seq3", None) is None and counts_reads("10x 3' v3", None) is None
    assert counts_reads("Smart-seq2", 0.95) is None  # the counts have the last word


def test_read_counts_in_real_data():
    path = SHARED_DATA / "pancreas_h2c.h5ad"
    if not path.exists():
        pytest.skip("shared data absent")
    adata = ad.read_h5ad(path)
    assay = adata.obs["assay"].astype(str).to_numpy()
    verdict = {name: counts_reads(name, ones(adata.X[np.flatnonzero(assay == name)])) for name in set(assay)}
    assert {name for name, why in verdict.items() if why} == {"CEL-seq2"}


def test_impossible_rules_are_refused():
    with pytest.raises(LingshuError, match="share at most 1"):
        QualityRules(max_mito=20)
    assert PAPER_RULES.to_json() == {
        "min_genes": 200, "min_counts": 500, "max_mito": 0.2, "min_cells_per_gene": 3, "scrublet": True,
        "drop_read_counts": False,
    }  # fmt: skip
