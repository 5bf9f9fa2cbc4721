"""Gene-level metrics against scipy, scanpy and dense arithmetic."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import wasserstein_distance

from lingshu_cell.metrics import embedding, genes
from lingshu_cell.metrics.outliers import counts_far_above, type_shares, zeros_of_abundant_genes


def _counts(rng, n_cells=60, n_genes=80):
    return sp.csr_matrix(rng.negative_binomial(0.5, 0.2, size=(n_cells, n_genes)).astype(np.int32))


def test_log_normalise_equals_scanpy(rng):
    counts = _counts(rng)
    adata = ad.AnnData(counts.astype(np.float32))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    ours = embedding.log_normalise(counts, 1e4)
    np.testing.assert_allclose(ours.toarray(), adata.X.toarray(), rtol=1e-5)
    np.testing.assert_allclose(embedding.mean_log_expression(counts, 1e4), ours.toarray().mean(axis=0), rtol=1e-5)


def test_log_normalise_keeps_empty_cells_empty():
    counts = sp.csr_matrix(np.array([[0, 0], [1, 3]], dtype=np.int32))
    np.testing.assert_allclose(embedding.log_normalise(counts, 4.0).toarray(), np.log1p([[0, 0], [1, 3]]), rtol=1e-6)


def test_moments_equal_dense_arithmetic(rng):
    counts = _counts(rng, n_cells=5000, n_genes=7)  # more than one chunk
    moments, dense = genes.gene_moments(counts), counts.toarray()
    np.testing.assert_allclose(moments.mean, dense.mean(axis=0))
    np.testing.assert_allclose(moments.variance, dense.var(axis=0))
    np.testing.assert_allclose(moments.zero_fraction, (dense == 0).mean(axis=0))


def test_wasserstein_equals_scipy_gene_by_gene(rng):
    a, b = _counts(rng), _counts(rng)
    expected = [wasserstein_distance(x, y) for x, y in zip(a.toarray().T, b.toarray().T, strict=True)]
    np.testing.assert_allclose(genes.wasserstein_per_gene(a, b), expected, atol=1e-12)


def test_shuffling_keeps_every_gene_and_breaks_every_cell(rng):
    counts = _counts(rng)
    shuffled = genes.shuffle_genes(counts, rng)
    np.testing.assert_array_equal(np.sort(shuffled.toarray(), axis=0), np.sort(counts.toarray(), axis=0))
    assert (shuffled.toarray() != counts.toarray()).any(axis=1).mean() > 0.9
    assert genes.gene_mean_correlations(counts, shuffled) == pytest.approx((1.0, 1.0), abs=1e-3)  # ties up to rounding


def test_constant_means_have_no_correlation():
    same = sp.csr_matrix(np.ones((3, 4)))
    assert genes.gene_mean_correlations(same, same) == (None, None)


def test_mean_variance_error_sees_lost_overdispersion(rng):
    mean = rng.gamma(1.0, 3.0, size=400) + 0.2

    def negative_binomial(n):
        return sp.csr_matrix(rng.poisson(mean * rng.gamma(2.0, 0.5, size=(n, 400))).astype(np.int32))

    trend = genes.fit_mean_variance_trend(negative_binomial(2000), 0.1)
    real = negative_binomial(400)
    same = genes.mean_variance_error(real, negative_binomial(400), trend)
    poisson = genes.mean_variance_error(real, sp.csr_matrix(rng.poisson(mean, size=(400, 400)).astype(np.int32)), trend)
    assert same[0] < 0.05 and abs(same[1]) < 0.05
    assert poisson[0] > 0.5 and poisson[1] < -0.5


def test_no_trend_for_hardly_expressed_genes():
    assert genes.fit_mean_variance_trend(sp.csr_matrix((10, 50), dtype=np.int32), 0.1) is None


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_counts_far_above_by_hand():
    reference = sp.csr_matrix([[1, 0, 40], [3, 0, 10]])
    counts = sp.csr_matrix([[15, 15, 200], [16, 16, 201], [0, 0, 0], [2, 0, 7]])
    largest = reference.max(axis=0).toarray().ravel()
    assert counts_far_above(counts, largest) == 1 / 4
    assert counts_far_above(reference, largest) == 0


def test_zeros_of_abundant_genes_by_hand():
    reference = sp.csr_matrix([[50, 50, 0], [90, 0, 10], [0, 80, 20]])
    shares = type_shares(reference, np.array(["a", "b", "b"]))
    # a: shares .5 .5 0; b: .45 .4 .15
    counts = sp.csr_matrix([[0, 40, 0], [20, 19, 0], [0, 0, 200], [0, 10, 0]])
    found = zeros_of_abundant_genes(counts, np.array(["a", "a", "b", "b"]), shares)
    assert found == 3 / 5  # one of two genes of the first cell, two of three of the third
    assert zeros_of_abundant_genes(counts[3:], np.array(["b"]), shares) is None
