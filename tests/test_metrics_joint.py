"""Two-sample, cell-type, correlation, doublet and memorisation metrics on cases with a known answer."""

import numpy as np
import pytest
import scipy.sparse as sp

from lingshu_cell.metrics import cell_types, correlation, depth, memorisation, two_sample


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_mmd2_is_unbiased_and_grows_with_the_shift(rng):
    bandwidths = two_sample.kernel_bandwidths(rng.normal(size=(500, 5)))
    assert len(bandwidths) == 5 and bandwidths[2] == pytest.approx(10.0, rel=0.1)  # mean squared distance = 2 × 5
    null = [two_sample.mmd2(rng.normal(size=(60, 5)), rng.normal(size=(60, 5)), bandwidths) for _ in range(60)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(60) and min(null) < 0 < max(null)
    shifted = [two_sample.mmd2(rng.normal(size=(60, 5)), rng.normal(s, size=(60, 5)), bandwidths) for s in (0.5, 1, 2)]
    assert max(null) < shifted[0] < shifted[1] < shifted[2]


def test_mmd2_equals_the_formula_on_two_points_each():
    a, b = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    expected = np.exp(-1.0) + np.exp(-4.0) - 2 * (1 + np.exp(-4.0) + np.exp(-1.0) + np.exp(-1.0)) / 4
    assert two_sample.mmd2(a, b, np.array([1.0])) == pytest.approx(expected)


def test_ilisi_and_aucs_between_same_and_different_samples(rng):
    a, b, far = rng.normal(size=(150, 8)), rng.normal(size=(150, 8)), rng.normal(4.0, size=(150, 8))
    assert two_sample.ilisi(a, b) > 0.85
    assert two_sample.ilisi(a, far) < 0.02
    assert 0.35 < two_sample.forest_auc(a, b, 0, 50) < 0.65 < 0.99 < two_sample.forest_auc(a, far, 0, 50)
    assert 0.35 < two_sample.logistic_auc(a, b, 0) < 0.65 < 0.99 < two_sample.logistic_auc(a, far, 0)


def test_library_size_rule_sees_a_collapsed_spread(rng):
    wide, narrow = rng.normal(8.0, 0.5, size=300), rng.normal(8.0, 0.1, size=300)
    assert two_sample.logistic_auc(*two_sample.depth_features(wide, narrow), 0) > 0.7
    assert two_sample.logistic_auc(*two_sample.depth_features(wide, rng.normal(8.0, 0.5, size=300)), 0) < 0.62


def test_depth_of_a_small_matrix():
    real = depth.measure_depth(sp.csr_matrix(np.array([[1, 0, 3], [0, 0, 1]], dtype=np.int32)))
    assert real.log_umi.tolist() == [np.log(4), 0.0] and real.detected.tolist() == [2, 1]
    assert real.zero_fraction == pytest.approx(0.5)
    double = depth.measure_depth(sp.csr_matrix(np.array([[2, 0, 6], [0, 0, 2]], dtype=np.int32)))
    compared = depth.compare_depth(real, double)
    assert compared["sd_log_umi_ratio"] == pytest.approx(1.0) and compared["genes_detected_ratio"] == 1.0
    assert compared["mean_log_umi"] - real.log_umi.mean() == pytest.approx(np.log(2))
    assert depth.spread_ratio(np.array([1.0, 2.0]), np.array([1.0, 1.0])) is None


def test_proportions_and_what_sampling_costs(rng):
    types = ("a", "b", "c")
    shares = cell_types.proportions(np.array(["a"] * 70 + ["b"] * 28 + ["c"] * 2, dtype=object), types)
    assert shares.tolist() == [0.70, 0.28, 0.02]
    assert cell_types.proportion_error(shares, np.array([0.5, 0.28, 0.22])) == pytest.approx(0.2)  # c is rare, a counts
    few, many = (cell_types.expected_proportion_error(shares, n, n, rng) for n in (100, 10_000))
    assert 0.03 < few < 0.08 and few / many == pytest.approx(10, rel=0.15)  # falls with the root of the size


def test_classifier_needs_two_types_and_ignores_unlabelled_cells(rng):
    components = np.concatenate([rng.normal(-3, size=(40, 4)), rng.normal(3, size=(40, 4))])
    labels = np.array(["left"] * 40 + ["right"] * 40, dtype=object)
    labels[::10] = ""
    classifier = cell_types.fit_type_classifier(components, labels)
    assert classifier.types == ("left", "right")
    assert cell_types.label_accuracy(labels, classifier.predict(components)) == 1.0
    assert cell_types.fit_type_classifier(components, np.array(["one"] * 80, dtype=object)) is None
    assert cell_types.label_accuracy(np.array(["", ""], dtype=object), np.array(["a", "b"], dtype=object)) is None


def test_marker_overlap_by_hand():
    real = {"a": frozenset({1, 2, 3, 4}), "b": frozenset({5, 6, 7, 8}), "only": frozenset({9})}
    assert cell_types.marker_overlap(real, {"a": frozenset({1, 2, 3, 9}), "b": frozenset({1, 2, 7, 8})}) == 0.625
    assert cell_types.marker_overlap(real, {"a": frozenset({1})}) is None


def test_correlation_slope_is_one_for_real_and_zero_for_independent_genes(rng):
    loadings = rng.normal(size=(2, 60))

    def draw(n, strength=1.0):
        return strength * rng.normal(size=(n, 2)) @ loadings + 1.5 * rng.normal(size=(n, 60))

    reference, order = draw(600), rng.permutation(600)
    same, weak, none = (correlation.compare_correlations(reference, draw(60, s), order) for s in (1.0, 0.5, 0.0))
    assert same.slope == pytest.approx(1.0, abs=0.15) and abs(same.slope - 1) < 4 * same.slope_error
    assert none.slope == pytest.approx(0.0, abs=0.1)
    assert none.slope < weak.slope < same.slope and same.error < weak.error < none.error


def test_correlation_needs_reproducible_structure(rng):
    assert correlation.compare_correlations(np.ones((50, 8)), rng.normal(size=(50, 8)), np.arange(50)) is None


def test_nearest_distances_and_exact_copies():
    training = np.array([[0.0, 0.0], [3.0, 4.0]])
    cells = np.array([[0.0, 0.0], [0.0, 5.0]])
    np.testing.assert_allclose(memorisation.nearest_distances(cells, training), [0.0, np.sqrt(10.0)], atol=1e-6)
    a = memorisation.cell_fingerprints(sp.csr_matrix(np.array([[1, 0, 2], [0, 0, 0], [1, 0, 2]], dtype=np.int32)))
    b = memorisation.cell_fingerprints(sp.csr_matrix(np.array([[1, 2, 0], [1, 0, 2]], dtype=np.int64)))
    assert a[0] == a[2] == b[1] and len({*a, *b}) == 3
    assert memorisation.n_copies(b, a) == 1 and memorisation.n_repeats(a) == 1 and memorisation.n_repeats(b) == 0
