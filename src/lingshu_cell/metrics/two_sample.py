"""Two-sample comparisons in a common space: maximum mean discrepancy, iLISI and classifiers."""

import numpy as np

_BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_LISI_NEIGHBOURS = 90
_FOLDS = 5


def kernel_bandwidths(reference: np.ndarray) -> np.ndarray:
    """Choose five Gaussian bandwidths: the mean squared distance between reference cells times ¼, ½, 1, 2 and 4.

    Parameters
    ----------
    reference
        Principal components of reference cells, (cells, components).

    Returns
    -------
    Five squared length scales s for the kernels exp(-|x - y|² / s); the same for every comparison.
    """
    return 2.0 * float(reference.var(axis=0, ddof=1).sum()) * np.asarray(_BANDWIDTH_FACTORS)


def mmd2(a: np.ndarray, b: np.ndarray, bandwidths: np.ndarray) -> float:
    r"""Estimate the squared maximum mean discrepancy without bias, kernel = sum of Gaussians.

    MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean_{i,j} k(a_i, b_j), k(x, y) = Σ_s exp(-|x-y|²/s).
    Unbiased, so it is 0 on average, and sometimes below 0, for two samples of one distribution.

    Parameters
    ----------
    a, b
        Principal components, (cells, components), at least two cells each.
    bandwidths
        Squared length scales of :func:`kernel_bandwidths`.

    Returns
    -------
    Estimate, at most 2 × the number of kernels.

    Source
    ------
    Gretton et al. 2012, J. Mach. Learn. Res. 13, lemma 6.
    """
    within_a, within_b, between = (_kernel(x, y, bandwidths) for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    mean_a = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    mean_b = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(mean_a + mean_b - 2.0 * between.mean())


def _kernel(x: np.ndarray, y: np.ndarray, bandwidths: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    squared = cdist(x, y, "sqeuclidean")
    return sum(np.exp(-squared / bandwidth) for bandwidth in bandwidths)


def ilisi(a: np.ndarray, b: np.ndarray) -> float:
    """Measure how well two samples mix locally: the iLISI of scib-metrics, scaled to 0 (apart) … 1 (mixed).

    Parameters
    ----------
    a, b
        Principal components, (cells, components).

    Returns
    -------
    Median over cells of (inverse Simpson index - 1); 90 neighbours, or a third of the cells when there are fewer.

    Source
    ------
    Korsunsky et al. 2019, Nat. Methods; Luecken et al. 2022, Nat. Methods; scib-metrics.
    """
    from scib_metrics import ilisi_knn
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    cells = np.concatenate([a, b])
    n_neighbours = max(3, min(_LISI_NEIGHBOURS, len(cells) // 3))
    distances, indices = NearestNeighbors(n_neighbors=n_neighbours).fit(cells).kneighbors(cells)
    side = np.repeat([0, 1], [len(a), len(b)])
    return float(ilisi_knn(NeighborsResults(indices=indices, distances=distances), side))


def forest_auc(a: np.ndarray, b: np.ndarray, seed: int, n_trees: int) -> float:
    """Try to tell two samples apart with a random forest.

    Parameters
    ----------
    a, b
        Features, (cells, features), at least five cells each.
    seed
        Folds and trees.
    n_trees
        Trees of the forest of each fold; 50 lose about .02 of AUC against 200.

    Returns
    -------
    Area under the ROC curve on held-out cells, mean of five stratified folds; 0.5 = indistinguishable, 1 = told apart.
    """
    from sklearn.ensemble import RandomForestClassifier

    return _cross_validated_auc(RandomForestClassifier(n_trees, random_state=seed), a, b, seed)


def logistic_auc(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Try to tell two samples apart with a logistic regression on standardised features; see :func:`forest_auc`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _cross_validated_auc(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), a, b, seed)


def _cross_validated_auc(classifier, a: np.ndarray, b: np.ndarray, seed: int) -> float:
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    side = np.repeat([0, 1], [len(a), len(b)])
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, np.concatenate([a, b]), side, cv=folds, scoring="roc_auc").mean())


def depth_features(log_umi_a: np.ndarray, log_umi_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give log totals around their common mean and the squares, so that a linear rule sees location and spread.

    Parameters
    ----------
    log_umi_a, log_umi_b
        Log total counts of two samples, (cells,).

    Returns
    -------
    Features of both, (cells, 2) each.
    """
    centre = np.concatenate([log_umi_a, log_umi_b]).mean()
    return tuple(np.stack([x - centre, (x - centre) ** 2], axis=1) for x in (log_umi_a, log_umi_b))
