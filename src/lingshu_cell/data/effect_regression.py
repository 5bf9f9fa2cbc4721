"""Effects of perturbations never measured: a ridge regression of measured effects on gene embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST_FOR_RIDGE = 5
_FEWEST_OWN = 3
_PENALTIES = np.geomspace(1e-2, 1e5, 29)


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge regression of perturbation effects on embeddings, in its dual form.

    Parameters
    ----------
    perturbations
        Single perturbations with an embedding, P of them.
    features
        Their embeddings, float32, shape [P, n_dimensions].
    effects
        Their shrunk effects, averaged over identities, float16, shape [P, n_genes]; where a gene was itself perturbed,
        the mean of the other perturbations stands, as that effect says nothing of other perturbations.
    own_effects
        Effect of each perturbation on its own gene, float32, shape [P]; NaN where it is none of the genes.
    penalty
        Chosen by leave-one-out over perturbations.
    out_of_fold
        Row p: weights of all perturbations in the prediction of p, 0 for those of its own fold; float32, shape [P, P].
    r2
        Share of the summed squares of effects that out-of-fold predictions explain; negative: worse than no effect.
    sha256
        Of the embeddings.
    """

    perturbations: tuple[str, ...]
    features: np.ndarray
    effects: np.ndarray
    own_effects: np.ndarray
    penalty: float
    out_of_fold: np.ndarray
    r2: float
    sha256: str

    def predict(self, weights: np.ndarray, own_gene: int) -> np.ndarray:
        """Give the effect that weights of the training perturbations stand for.

        Parameters
        ----------
        weights
            Shape [P]; 0 for perturbations that must not be looked at.
        own_gene
            Position of the perturbed gene, −1 where it is none of the genes: it gets the mean effect that perturbed
            genes had on themselves, where at least three did.

        Returns
        -------
        np.ndarray
            float32, shape [n_genes].
        """
        delta = np.asarray(weights.astype(np.float64) @ self.effects.astype(np.float64), dtype=np.float32)
        own = self.own_effects[np.isfinite(self.own_effects) & (weights != 0)]
        if own_gene >= 0 and len(own) >= _FEWEST_OWN:
            delta[own_gene] = own.mean()
        return delta


def fit_ridge(
    names: Sequence[str],
    features: np.ndarray,
    effects: np.ndarray,
    own_genes: np.ndarray,
    sha256: str,
    folds: int,
    seed: int,
) -> Ridge:
    """Fit a ridge of all genes' effects on embeddings, and predict each perturbation from those of other folds.

    One penalty for all genes, by leave-one-out over the perturbations a fit may see; the intercept is their mean.

    Parameters
    ----------
    names
        Perturbations, P of them, at least ``FEWEST_FOR_RIDGE``.
    features
        Their embeddings, shape [P, n_dimensions].
    effects
        Their shrunk effects, shape [P, n_genes].
    own_genes
        Position of each perturbation's own gene, −1 where it is none of the genes; int, shape [P].
    sha256
        Of the embeddings.
    folds
        Folds over perturbations, at least 2.
    seed
        Draws them.

    Returns
    -------
    Ridge
    """
    from sklearn.linear_model import RidgeCV

    truth = effects.astype(np.float64)
    effects, own_effects = truth.copy(), np.full(len(names), np.nan)
    for p in np.flatnonzero(own_genes >= 0):
        own_effects[p] = truth[p, own_genes[p]]
        effects[p, own_genes[p]] = np.delete(truth[:, own_genes[p]], p).mean()

    def penalty_for(chosen: np.ndarray) -> float:
        return float(RidgeCV(_PENALTIES).fit(features[chosen], effects[chosen]).alpha_)

    order = np.random.default_rng(seed).permutation(len(names))
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % min(folds, len(names))
    out_of_fold = np.zeros((len(names), len(names)))
    for k in range(fold.max() + 1):
        kept, left = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        out_of_fold[np.ix_(left, kept)] = ridge_weights(features[kept], penalty_for(kept), features[left])
    ridge = Ridge(
        perturbations=tuple(names),
        features=features.astype(np.float32),
        effects=effects.astype(np.float16),
        own_effects=own_effects.astype(np.float32),
        penalty=penalty_for(np.arange(len(names))),
        out_of_fold=out_of_fold.astype(np.float32),
        r2=0.0,
        sha256=sha256,
    )
    predicted = np.stack([ridge.predict(ridge.out_of_fold[p], own_genes[p]) for p in range(len(names))])
    return replace(ridge, r2=float(1 - ((predicted - truth) ** 2).sum() / max(float((truth**2).sum()), 1e-12)))


def ridge_weights(features: np.ndarray, penalty: float, wanted: np.ndarray) -> np.ndarray:
    """Weights of the training perturbations in each prediction: a ridge is linear in its targets.

    Parameters
    ----------
    features
        Embeddings of the P training perturbations, shape [P, n_dimensions].
    penalty
        Of the ridge.
    wanted
        Embeddings to predict for, shape [n, n_dimensions].

    Returns
    -------
    np.ndarray
        Shape [n, P]; each row sums to 1.
    """
    from sklearn.linear_model import Ridge as RidgeRegression

    return RidgeRegression(penalty).fit(features, np.eye(len(features))).predict(wanted)
