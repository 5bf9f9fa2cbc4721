"""What training data say of a condition without looking at it: its effect in other identities, or by gene embeddings.

Each prediction is a weighted sum of measured effects. Weights of other identities: kriging, that is, a Gaussian process
of control profiles with noise by the number of cells; of other perturbations: a ridge regression on embeddings. Where
identities that start apart are found to end closer together, a share of what sets the control cells of an identity
apart is taken off (docs/decisions/0014-convergence.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from lingshu_cell.data.condition_labels import canonical_name, components_of
from lingshu_cell.data.effect_regression import FEWEST_FOR_RIDGE, Ridge, fit_ridge, ridge_weights
from lingshu_cell.data.effects import Effects, shrink
from lingshu_cell.data.gene_embeddings import GeneEmbeddings
from lingshu_cell.errors import LingshuError, offenders

FOLDS = 5
_RIDGE_ARRAYS = ("features", "effects", "own_effects", "out_of_fold")
OTHERS, RIDGE, SUM, NONE = "other identities", "ridge on embeddings", "sum of parts", "none"
_LENGTH = 2.0  # of the kernel exp(-d / length) over identities, d in median distances
_NOISE_CELLS = 50.0  # cells whose noise is as large as what identities differ by
_COUNTS_OF_A_PROFILE = 1e4


@dataclass(frozen=True, eq=False)
class PriorEffect:
    """A predicted effect.

    Parameters
    ----------
    delta
        Natural-log fold change against the control cells of the same identity, float32, shape [n_genes].
    source
        What it was taken from, for people.
    confidence
        Correlation, 0 … 1, that predictions of this kind had with the measured effects of training conditions.
    found
        Whether there was anything to take it from; without, ``delta`` is 0.
    """

    delta: np.ndarray
    source: str
    confidence: float
    found: bool


@dataclass(frozen=True, eq=False)
class PriorEffects:
    """Measured effects of the training conditions, and how to predict others from them; see :func:`prior_effects`.

    Parameters
    ----------
    measured
        Effects of the training conditions.
    control
        Label of control cells.
    separator
        What joins the parts of a combination; empty where labels are never combinations.
    gene_names
        Names of the genes, or none; needed to know a perturbation's own gene.
    ridge
        Fitted when embeddings were given.
    confidence
        Kind of prediction → correlation with measured effects over training conditions.
    convergence
        Share, 0 … 1, of an identity's deviation from others before a perturbation that is gone after it.
    """

    measured: Effects
    control: str
    separator: str
    gene_names: tuple[str, ...] = ()
    ridge: Ridge | None = None
    confidence: Mapping[str, float] = field(default_factory=dict)
    convergence: float = 0.0

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.measured.delta.shape[1]

    @cached_property
    def _distances(self) -> np.ndarray:
        return _distances(self.measured.profiles)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.measured.profile_identities)}

    @cached_property
    def _log_profiles(self) -> np.ndarray:
        return self.measured.log_profiles()

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: g for g, name in enumerate(self.gene_names)}

    @property
    def conditions(self) -> tuple[tuple[str, str], ...]:
        """``(identity, perturbation)`` of every training condition that is not control."""
        return tuple(zip(self.measured.identities, self.measured.perturbations, strict=True))

    def measured_effects(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the effect of every training condition, shrunk by its noise.

        Returns
        -------
        tuple
            float32 [number of conditions, n_genes] in the order of ``conditions``, and whether it could be measured.
        """
        effects = [_combine(self.measured, np.array([c]), np.ones(1)) for c in range(len(self.conditions))]
        return np.stack(effects), self.measured.n_cells > 0

    def predict(
        self,
        perturbation: str,
        identity: str | None = None,
        control_profile: np.ndarray | None = None,
        embeddings: GeneEmbeddings | None = None,
        other_names: Mapping[str, Sequence[str]] | None = None,
    ) -> PriorEffect:
        """Predict the effect of a perturbation in an identity, never from the cells of that very condition (but for
        ``convergence``, one number for all).

        Parameters
        ----------
        perturbation
            Its label; control has no effect. A combination that no other identity has is the sum of its parts, which
            count as measured where the same identity has them.
        identity
            Its label; None where there is only one, or for one without a name.
        control_profile
            Mean or summed counts of the control cells of an identity that is not in the training data, shape
            [n_genes], NaN where a gene was not measured; without, its likeness to others is not used.
        embeddings
            Those given to :func:`prior_effects`; needed for perturbations that training data have not.
        other_names
            Passed to :meth:`GeneEmbeddings.rows`.

        Returns
        -------
        PriorEffect

        Raises
        ------
        LingshuError
            If the embeddings are others than in training, or the profile has another number of genes.
        """
        if canonical_name(perturbation, self.separator, self.control) == self.control:
            return PriorEffect(np.zeros(self.n_genes, np.float32), "control", 1.0, True)
        if self.ridge and embeddings and embeddings.sha256 != self.ridge.sha256:
            raise LingshuError(
                "Embeddings must be those used in training",
                f"{embeddings.source} has checksum {embeddings.sha256[:12]} instead of {self.ridge.sha256[:12]}",
                "Give the same file and join it with the same others",
            )
        perturbation = canonical_name(perturbation, self.separator, self.control)
        owner = identity or ""
        by_others = self._from_others(perturbation, owner, control_profile)
        if by_others is not None:
            return by_others
        parts = components_of(perturbation, self.separator, self.control)
        if len(parts) == 1:
            return self._from_ridge(parts[0], embeddings, other_names) or self._nothing()
        answers = [
            self._own(part, owner) or self.predict(part, identity, control_profile, embeddings, other_names)
            for part in parts
        ]
        if not all(answer.found for answer in answers):
            return self._nothing()
        confidence = self.confidence.get(SUM, min(answer.confidence for answer in answers))
        source = f"{SUM}: {', '.join(f'{part} ({a.source})' for part, a in zip(parts, answers, strict=True))}"
        return PriorEffect(np.sum([answer.delta for answer in answers], axis=0), source, confidence, True)

    def own_gene(self, perturbation: str, other_names: Mapping[str, Sequence[str]] | None = None) -> int:
        """Find the gene that a perturbation is named after.

        Parameters
        ----------
        perturbation
            Label of a single perturbation.
        other_names
            Label → other names of its gene.

        Returns
        -------
        int
            Its position, −1 if there is none.
        """
        tried = (perturbation, *(other_names or {}).get(perturbation, ()))
        return next((self._positions[name] for name in tried if name in self._positions), -1)

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Give everything as arrays and as plain JSON types, for a checkpoint.

        Returns
        -------
        tuple
            Name → array, and a dictionary of JSON types.
        """
        m, r = self.measured, self.ridge
        names = ("delta", "variance", "n_cells", "profiles", "profile_variance")
        arrays = {name: getattr(m, name) for name in names}
        about: dict[str, Any] = {
            "identities": list(m.identities),
            "perturbations": list(m.perturbations),
            "profile_identities": list(m.profile_identities),
            "target_sum": m.target_sum,
            "pseudocount": m.pseudocount,
            "control": self.control,
            "separator": self.separator,
            "gene_names": list(self.gene_names),
            "confidence": dict(self.confidence),
            "convergence": self.convergence,
            "ridge": None,
        }
        if r:
            arrays |= {f"ridge_{name}": getattr(r, name) for name in _RIDGE_ARRAYS}
            names = ("perturbations", "penalty", "r2", "sha256")
            about["ridge"] = {name: getattr(r, name) for name in names} | {"perturbations": list(r.perturbations)}
        return arrays, about

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> "PriorEffects":
        """Rebuild from what :meth:`to_arrays` gave."""
        names = {one.name for one in fields(Effects)}
        labels = ("identities", "perturbations", "profile_identities")
        plain = {name: tuple(about[name]) if name in labels else about[name] for name in about if name in names}
        measured = Effects(**plain, **{name: arrays[name] for name in arrays if name in names})
        ridge = None
        if about["ridge"]:
            kept = {name: arrays[f"ridge_{name}"] for name in _RIDGE_ARRAYS}
            ridge = Ridge(**{**about["ridge"], "perturbations": tuple(about["ridge"]["perturbations"])}, **kept)
        settings = {name: about[name] for name in ("control", "separator", "confidence", "convergence")}
        return cls(measured, ridge=ridge, gene_names=tuple(about["gene_names"]), **settings)

    def _from_others(self, perturbation: str, owner: str, profile: np.ndarray | None) -> PriorEffect | None:
        others = self._others(perturbation, owner, profile)
        if others is None:
            return None
        delta, variance = _weighted(self.measured, others.rows, others.weights)
        source = f"{OTHERS}: {len(others.rows)}"
        own = self._places.get(owner) if profile is None else profile
        if self.convergence and own is not None:
            apart, noise = self._apart(own, others)
            delta, variance = delta - self.convergence * apart, variance + self.convergence**2 * noise
            source += f", {self.convergence:.0%} of what sets it apart taken off"
        return PriorEffect(_shrunk(delta, variance), source, self.confidence.get(OTHERS, 0.0), True)

    def _others(self, perturbation: str, owner: str, profile: np.ndarray | None = None) -> "_Others | None":
        """The conditions of a perturbation in other identities, and their weights."""
        m = self.measured
        found = [
            c
            for c, (identity, label) in enumerate(self.conditions)
            if identity != owner and label == perturbation and m.n_cells[c] > 0
        ]
        if not found:
            return None
        rows = np.array(found, dtype=np.int64)
        places = np.array([self._places[m.identities[c]] for c in rows])
        if profile is not None:
            near = _distances_of(profile, m.profiles)[places]
        else:
            near = self._distances[self._places[owner], places] if owner in self._places else None
        among = self._distances[np.ix_(places, places)]
        return _Others(rows, places, _kriging_weights(among, near, m.n_cells[rows]))

    def _apart(self, own: int | np.ndarray, others: "_Others") -> tuple[np.ndarray, np.ndarray]:
        """How far an identity lies from the weighted mean of others before the perturbation, in log shares of control
        cells, and the sampling variance of that; 0 in genes that were not measured in it.

        ``own`` is its place, or the counts of its control cells, whose noise is not known.
        """
        m, log_IG = self.measured, self._log_profiles
        noise_G = others.weights**2 @ m.profile_variance[others.places].astype(np.float64)
        mean_G = others.weights @ log_IG[others.places]
        if isinstance(own, np.ndarray):
            apart_G = m.log_profiles(np.nan_to_num(own)[None])[0] - mean_G
            return np.where(np.isnan(own), 0.0, apart_G), noise_G
        return log_IG[own] - mean_G, noise_G + m.profile_variance[own]

    def _own(self, part: str, owner: str) -> PriorEffect | None:
        """Effect of a single perturbation as measured in the identity itself."""
        m = self.measured
        rows = [c for c, key in enumerate(self.conditions) if key == (owner, part) and m.n_cells[c] > 0]
        return PriorEffect(_combine(m, np.array(rows), np.ones(1)), "measured", 1.0, True) if rows else None

    def _from_ridge(
        self, perturbation: str, embeddings: GeneEmbeddings | None, other_names: Mapping[str, Sequence[str]] | None
    ) -> PriorEffect | None:
        r = self.ridge
        if r is None:
            return None
        if perturbation in r.perturbations:
            weights = r.out_of_fold[r.perturbations.index(perturbation)].astype(np.float64)
        else:
            if embeddings is None:
                return None
            vector, found = embeddings.rows([perturbation], other_names)
            if not found[0]:
                return None
            weights = ridge_weights(r.features, r.penalty, vector)[0]
        delta = r.predict(weights, self.own_gene(perturbation, other_names))
        source = f"{RIDGE}: R2 out of fold {r.r2:.2f}"
        return PriorEffect(delta, source, self.confidence.get(RIDGE, 0.0), True)

    def _nothing(self) -> PriorEffect:
        return PriorEffect(np.zeros(self.n_genes, np.float32), NONE, 0.0, False)


@dataclass(frozen=True, eq=False)
class _Others:
    """Conditions of the same perturbation in other identities.

    Attributes
    ----------
    rows, places
        Which conditions, and where the control profiles of their identities are.
    weights
        Of their effects; they sum to 1.
    """

    rows: np.ndarray
    places: np.ndarray
    weights: np.ndarray


def prior_effects(
    measured: Effects,
    *,
    control: str,
    gene_names: Sequence[str] = (),
    embeddings: GeneEmbeddings | None = None,
    other_names: Mapping[str, Sequence[str]] | None = None,
    separator: str = "+",
    folds: int = FOLDS,
    seed: int = 0,
) -> PriorEffects:
    """Learn from measured effects how to predict those of conditions never measured.

    Parameters
    ----------
    measured
        Effects in **training** cells; perturbations in their canonical spelling.
    control
        Label of control cells.
    gene_names
        Names of the genes; with them, what a genetic perturbation does to its own gene is not carried over to others,
        and a gene never perturbed gets the mean effect that perturbed genes had on themselves.
    embeddings
        Vectors of perturbations; pass what :func:`~lingshu_cell.data.gene_embeddings.concatenate` gives.
    other_names
        Passed to :meth:`GeneEmbeddings.rows`.
    separator
        What joins the parts of a combination; empty for none.
    folds
        Folds over perturbations for out-of-fold predictions of the ridge, at least 2.
    seed
        Draws the folds.

    Returns
    -------
    PriorEffects

    Raises
    ------
    LingshuError
        If ``folds`` is below 2, a gene has no name, or no perturbation has an embedding.
    """
    if len(gene_names) not in (0, measured.delta.shape[1]):
        finding = f"{len(gene_names)} names for {measured.delta.shape[1]} genes"
        raise LingshuError("Each gene needs a name", finding, "Pass all var_names, or none")
    if folds < 2:
        raise LingshuError("Out-of-fold predictions need 2 folds or more", f"got {folds}", "Use 5")
    prior = PriorEffects(measured, control, separator, tuple(map(str, gene_names)))
    if embeddings is not None:
        prior = replace(prior, ridge=_fit_ridge(prior, embeddings, other_names, folds, seed))
    prior = replace(prior, convergence=_convergence(prior))
    return replace(prior, confidence=_confidence(prior))


def _kriging_weights(among: np.ndarray, near: np.ndarray | None, n_cells: np.ndarray) -> np.ndarray:
    r"""Weights of measured effects in the best linear unbiased prediction of another identity's; they sum to 1.

    The effects are a Gaussian process over identities with an unknown mean and the kernel exp(-d / 2), measured with
    noise of variance 50 / n.

    Parameters
    ----------
    among
        Distances between the R identities that were measured, R × R.
    near
        Their distances from the one asked for, R; None where nothing is known of it: the mean is predicted.
    n_cells
        Cells behind each effect, R, above 0.

    References
    ----------
    Cressie 1993, Statistics for Spatial Data, section 3.4.5 (universal kriging).
    """
    noise = np.diag(_NOISE_CELLS / n_cells.astype(np.float64))
    inverse = np.linalg.inv(np.exp(-among / _LENGTH) + noise)
    of_mean = inverse.sum(0) / inverse.sum()
    if near is None:
        return of_mean
    weights = np.exp(-near / _LENGTH) @ inverse
    return weights + (1 - weights.sum()) * of_mean


def _combine(measured: Effects, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of effects, shrunk by its noise."""
    return _shrunk(*_weighted(measured, rows, weights))


def _weighted(measured: Effects, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of effects, and its sampling variance."""
    weights = np.asarray(weights, dtype=np.float64)
    delta = weights @ measured.delta[rows].astype(np.float64)
    return delta, weights**2 @ measured.variance[rows].astype(np.float64)


def _shrunk(delta: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return shrink(delta, np.maximum(variance, 1e-8)).astype(np.float32)


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _log_profiles(profiles: np.ndarray) -> np.ndarray:
    profiles = profiles.astype(np.float64)
    return np.log1p(_COUNTS_OF_A_PROFILE * profiles / np.maximum(profiles.sum(axis=1, keepdims=True), 1e-12))


def _distances(profiles: np.ndarray) -> np.ndarray:
    """1 − correlation of all pairs of log control profiles, over the median of different ones; [I, I]."""
    if len(profiles) < 2:
        return np.zeros((len(profiles), len(profiles)))
    between = 1 - np.corrcoef(_log_profiles(profiles))
    return between / max(float(np.median(between[np.triu_indices(len(profiles), 1)])), 1e-12)


def _distances_of(profile: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    """The same for one more identity and the others, in the same unit; [I]."""
    profile = np.nan_to_num(np.asarray(profile, dtype=np.float64).ravel())
    if len(profile) != profiles.shape[1]:
        raise LingshuError(
            "A control profile needs one value per gene",
            f"{len(profile)} values for {profiles.shape[1]} genes",
            "Align the genes first",
        )
    if len(profiles) < 2:
        return np.zeros(len(profiles))
    logs = _log_profiles(profiles)
    unit = np.median((1 - np.corrcoef(logs))[np.triu_indices(len(logs), 1)])
    return (1 - np.corrcoef(np.vstack([_log_profiles(profile[None]), logs])))[0, 1:] / max(float(unit), 1e-12)


def _fit_ridge(
    prior: PriorEffects,
    embeddings: GeneEmbeddings,
    other_names: Mapping[str, Sequence[str]] | None,
    folds: int,
    seed: int,
) -> Ridge | None:
    m = prior.measured
    rows_of: dict[str, list[int]] = {}
    for c, name in enumerate(m.perturbations):
        if m.n_cells[c] > 0 and len(components_of(name, prior.separator, prior.control)) == 1:
            rows_of.setdefault(name, []).append(c)
    singles = sorted(rows_of)
    features, found = embeddings.rows(singles, other_names)
    if singles and not found.any():
        raise LingshuError(
            "Perturbations must have embeddings",
            f"none of {offenders(singles)} is in {embeddings.source} ({', '.join(embeddings.names[:3])}, …)",
            "Use one name style, or give aliases",
        )
    names = [name for name, there in zip(singles, found, strict=True) if there]
    if len(names) < FEWEST_FOR_RIDGE:
        return None
    effects = np.stack([_combine(m, np.array(rows_of[n]), _shares(np.sqrt(m.n_cells[rows_of[n]]))) for n in names])
    own_genes = np.array([prior.own_gene(name, other_names) for name in names], dtype=np.int64)
    return fit_ridge(names, features[found], effects, own_genes, embeddings.sha256, folds, seed)


def _convergence(prior: PriorEffects) -> float:
    """How much of what sets an identity apart a perturbation takes away, 0 … 1, by least squares over genes and the
    training conditions that two other identities or more foretell.

    A control mean that is too high by chance makes the effect too low as well, which would look the same: what
    sampling noise does to both sums is taken out of them.
    """
    m, joint, square = prior.measured, 0.0, 0.0
    for c, (identity, perturbation) in enumerate(prior.conditions):
        others = prior._others(perturbation, identity) if m.n_cells[c] > 0 else None
        if others is None or len(others.rows) < 2:
            continue
        left = m.delta[c].astype(np.float64) - _weighted(m, others.rows, others.weights)[0]
        apart, noise = prior._apart(prior._places[identity], others)
        joint -= float(left @ apart + noise.sum())
        square += float(apart @ apart - noise.sum())
    return float(np.clip(joint / square, 0, 1)) if square > 0 else 0.0


def _confidence(prior: PriorEffects) -> dict[str, float]:
    """Correlate out-of-fold predictions with the shrunk measured effects, over all genes and conditions of a kind."""
    m = prior.measured
    sums: dict[str, np.ndarray] = {}
    for c, (identity, perturbation) in enumerate(prior.conditions):
        answer = prior.predict(perturbation, identity)
        if not answer.found or m.n_cells[c] == 0:
            continue
        truth = _combine(m, np.array([c]), np.ones(1)).astype(np.float64)
        x = answer.delta.astype(np.float64)
        kind = answer.source.split(":")[0]
        sums[kind] = sums.get(kind, np.zeros(3)) + np.array([x @ truth, x @ x, truth @ truth])
    # About 0, not about the mean: no effect is the reference.
    return {kind: float(max(0.0, xy / max(np.sqrt(xx * yy), 1e-12))) for kind, (xy, xx, yy) in sums.items()}
