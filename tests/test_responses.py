"""Metrics of perturbation responses: equal to brute force and to scipy, right on simulated truth, able to fail."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind

from lingshu_cell.metrics import responses
from lingshu_cell.metrics.cell_eval import SEVEN, average_score
from lingshu_cell.metrics.cell_eval2 import anchored_scores
from lingshu_cell.metrics.embedding import log_normalise

TARGET_SUM = 1e4


def simulated(rng, n_cells, mean, dispersion=2.0):
    """Gamma-Poisson counts with a gamma library size: overdispersed and mostly zeros, as real ones."""
    depth = rng.gamma(8.0, 1 / 8.0, (n_cells, 1))
    rate = depth * mean * rng.gamma(dispersion, 1 / dispersion, (n_cells, mean.size))
    return log_normalise(sp.csr_matrix(rng.poisson(rate)), TARGET_SUM)


def test_gene_statistics_equal_numpy():
    rng = np.random.default_rng(0)
    x = log_normalise(sp.csr_matrix(rng.poisson(0.4, (31, 17))), TARGET_SUM)
    dense, found = x.toarray().astype(np.float64), responses.gene_statistics(x)
    np.testing.assert_allclose(found.mean_log, dense.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.variance_log, dense.var(axis=0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(found.mean, np.expm1(dense).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found.detected, (dense > 0).mean(axis=0))


@pytest.mark.parametrize("sizes", [(13, 29), (40, 40), (1, 5)])
def test_rank_sum_equals_scipy_with_ties_and_zeros(sizes):
    rng = np.random.default_rng(1)
    rate = np.append(0.0, rng.uniform(0, 2, 59))  # the first gene nobody has
    a, b = (rng.poisson(rate, (n, 60)).astype(np.float64) for n in sizes)
    expected = np.nan_to_num(mannwhitneyu(a, b, axis=0, method="asymptotic").pvalue, nan=1.0)
    found = responses.rank_sum_p_values(*(sp.csr_matrix(x.astype(np.float32)) for x in (a, b)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_rank_sum_of_all_zero_matrices_is_one():
    empty = sp.csr_matrix((4, 3), dtype=np.float32)
    assert responses.rank_sum_p_values(empty, empty).tolist() == [1.0, 1.0, 1.0]
    assert responses.rank_sum_test(empty, empty).rate is None


def test_significant_genes_are_few_without_and_many_with_a_difference():
    rng = np.random.default_rng(2)
    mean = rng.gamma(0.5, 1.0, 400)
    a, b, c = (simulated(rng, 150, m) for m in (mean, mean, np.where(np.arange(400) < 100, 3 * mean, mean)))
    null, changed = responses.rank_sum_test(a, b), responses.rank_sum_test(a, c)
    assert null.rate < 0.01
    assert changed.significant[:100].mean() > 0.4 and changed.rate > 0.1
    assert not (changed.significant & ~changed.tested).any()


def test_changed_genes_equal_welch_and_benjamini_hochberg():
    rng = np.random.default_rng(3)
    mean = np.full(50, 3.0)
    a, b = simulated(rng, 60, mean), simulated(rng, 40, np.where(np.arange(50) < 10, 3 * mean, mean))
    found = responses.changed_genes(*(responses.gene_statistics(x) for x in (a, b)))
    p = ttest_ind(a.toarray().astype(float), b.toarray().astype(float), equal_var=False).pvalue
    np.testing.assert_array_equal(found, false_discovery_control(p) < 0.05)
    assert found[:10].sum() >= 8


def test_differences_that_agree_and_constant_ones():
    rng = np.random.default_rng(4)
    x = rng.normal(size=200)
    perfect = responses.compare_differences(x, 2 * x)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert responses.compare_differences(x, -x)["pearson_delta"] == pytest.approx(-1.0)
    assert abs(responses.compare_differences(x, rng.permutation(x))["spearman_delta"]) < 0.2
    assert set(responses.compare_differences(x, np.zeros(200)).values()) == {None}
    assert responses.mean_absolute_error(x, x + 0.5) == pytest.approx(0.5)


def slope_of(rng, scale, n_cells, n_rounds):
    """Slope of a prediction with ``scale`` times the measured fold changes: ours and that of least squares."""
    sums, ordinary = responses.SlopeSums(), []
    for _ in range(n_rounds):
        mean = rng.gamma(0.6, 2.0, 600) + 0.02
        lfc = np.where(rng.random(600) < 0.25, rng.normal(0, 1.2, 600), 0.0)
        statistics = {
            name: responses.gene_statistics(simulated(rng, n_cells, mean * 2.0**change))
            for name, change in (
                ("z", lfc), ("x", lfc), ("y", scale * lfc), ("control z", 0), ("control x", 0), ("control y", 0),
            )
        }  # fmt: skip
        z, x, y = (responses.log2_fold_change(statistics[s], statistics[f"control {s}"], 0.25) for s in "zxy")
        sums += responses.slope_sums(z, x, y, responses.changed_genes(statistics["z"], statistics["control z"]))
        genes = responses.changed_genes(statistics["x"], statistics["control x"])
        ordinary.append(x[genes] @ y[genes] / (x[genes] @ x[genes]))
    return sums.slope(20), np.mean(ordinary)


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.5])
def test_the_slope_is_right_in_spite_of_noise(scale):
    # Larger changes move the total as well, and with it every normalised gene: 1.5 is not exact, 1 is.
    slope, _ = slope_of(np.random.default_rng(5), scale, n_cells=150, n_rounds=8)
    assert slope == pytest.approx(scale, abs=0.03)


def test_least_squares_would_call_a_perfect_prediction_too_weak():
    slope, ordinary = slope_of(np.random.default_rng(5), 1.0, n_cells=40, n_rounds=16)
    assert slope == pytest.approx(1.0, abs=0.03) and ordinary < 0.9


def test_the_slope_of_unrelated_changes_is_none_or_zero():
    rng = np.random.default_rng(6)
    z, x, y = rng.normal(size=(3, 500))
    every = np.ones(500, dtype=bool)
    assert responses.slope_sums(z, x, y, every).slope(10) is None  # the instrument does not repeat itself
    assert abs(responses.slope_sums(z, z + 0.1 * x, y, every).slope(10)) < 0.15
    assert responses.slope_sums(z, z, y, np.arange(500) < 9).slope(10) is None
    assert responses.SlopeSums().slope(0) is None


def brute_energy(a, b):
    n, m = len(a), len(b)
    within = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 2 * cdist(a, b).sum() / (n * m) - sum(within)


def test_energy_distance_is_the_formula_and_unbiased():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(20, 5)), rng.normal(0.5, 1, (35, 5))
    assert responses.energy_test(a, b, 0, rng) == (pytest.approx(brute_energy(a, b)), None)
    for sizes in ((10, 10), (10, 200)):
        found = [responses.energy_test(*(rng.normal(size=(n, 5)) for n in sizes), 0, rng)[0] for _ in range(300)]
        assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300) + 1e-3


def test_energy_test_sees_a_shift_and_a_lost_spread_and_nothing_else():
    rng = np.random.default_rng(8)
    a, same = rng.normal(size=(80, 10)), rng.normal(size=(80, 10))
    narrow = 0.5 * rng.normal(size=(80, 10))
    narrow += a.mean(axis=0) - narrow.mean(axis=0)  # the same mean: squared distances would be blind
    assert responses.energy_test(a, rng.normal(0.5, 1, (80, 10)), 199, rng)[1] == pytest.approx(1 / 200)
    assert responses.energy_test(a, narrow, 199, rng)[1] == pytest.approx(1 / 200)
    assert responses.energy_test(a, same, 199, rng)[1] > 0.05
    assert responses.energy_test(a, a.copy(), 199, rng)[1] > 0.9


def test_p_values_of_equal_groups_are_uniform():
    rng = np.random.default_rng(9)
    found = [responses.energy_test(*rng.normal(size=(2, 15, 3)), 99, rng)[1] for _ in range(200)]
    assert 0.4 < np.mean(found) < 0.6 and 0.01 <= np.mean(np.array(found) <= 0.05) < 0.1


def test_average_score_is_the_formula():
    baseline = {"des": 0.2, "pds": 0.5, "mae": 0.1, "spearman_n_de": 0.0, "spearman_lfc": 1.0, "auprc": 0.5}
    user = {"des": 0.6, "pds": 0.4, "mae": 0.05, "spearman_n_de": None, "spearman_lfc": 1.0, "auprc": float("nan")}
    found = average_score(user, baseline)
    assert found["scores"] == pytest.approx({"des": 0.5, "pds": 0.0, "mae": 0.5, "spearman_lfc": 0.0})
    assert found["average"] == pytest.approx(0.25)
    assert found["left_out"] == ["spearman_n_de", "auprc", "pearson_delta"]
    assert average_score({}, {})["average"] is None
    perfect = dict.fromkeys(SEVEN, 1.0) | {"mae": 0.0}
    assert average_score(perfect, dict.fromkeys(SEVEN, 0.5))["average"] == 1.0


def test_anchored_scores_run_from_baseline_to_replicate():
    names = ("pds_cosine", "mse_norm", "jaccard", "lfc_nmae")
    user, baseline, replicate = (
        dict(zip(names, v, strict=True)) for v in ((0.7, 0.6, 0.5, 1), (0.5, 1, 0.5, 0), (0.9, 0.2, 0.505, 0))
    )
    found = anchored_scores(user, baseline, replicate)
    assert found["pds_cosine"] == pytest.approx(0.5) and found["mse_norm"] == pytest.approx(0.5)
    assert found["jaccard"] is None and found["lfc_nmae"] is None and found["direction_reach"] is None
