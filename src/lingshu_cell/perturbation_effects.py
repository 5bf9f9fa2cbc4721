"""Measured and foretold effects of perturbations: differences of log mean expression, by simple rules.

An effect is ``Δ_g = log(m_g + ε) - log(c_g + ε)``: m and c are means over perturbed and control cells of one identity,
of counts normalised to ``TARGET_SUM`` per cell; ε is ``PSEUDOCOUNT`` on that scale, half a count in a cell of 10,000.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.data.condition_labels import components_of
from lingshu_cell.errors import LingshuError, offenders

TARGET_SUM = 1e4
PSEUDOCOUNT = 0.5
_LEAST_ROWS = 3  # of a ridge: fewer leave nothing to validate the penalty on
_PENALTIES = np.logspace(-3, 4, 22)  # rows have mean squared norm 1: from next to none to next to the plain mean

Identity = tuple[str, ...]
Condition = tuple[Identity, str]


def mean_after(before: np.ndarray, effect: np.ndarray, pseudocount: float = PSEUDOCOUNT) -> np.ndarray:
    """Give the normalised means that an effect leads to, with the same sum as before.

    Parameters
    ----------
    before
        Mean normalised counts of the control cells, ≥ 0, shape (genes,).
    effect
        Difference of log means with ``pseudocount``, natural logarithm, shape (genes,).
    pseudocount
        ε on the scale of ``before``, > 0.

    Returns
    -------
    numpy.ndarray
        ``(before + ε) exp(effect) - ε``, at least 0, rescaled to the sum of ``before``: a response is a change of
        composition, depth stays that of the control cells.
    """
    after = np.maximum(before + (before + pseudocount) * np.expm1(effect), 0.0)  # exactly `before` where effect is 0
    return after * (before.sum() / after.sum())


@dataclass(frozen=True, eq=False)
class Screen:
    """Training cells by identity and perturbation.

    Parameters
    ----------
    cells
        Raw counts.
    control
        Label of the control cells.
    separator
        Between the parts of a combination, as in ``A+B``; empty where there are none.
    cells_of
        Rows of the cells of every (identity, perturbation), controls included.
    """

    cells: CountMatrix
    control: str
    separator: str
    cells_of: dict[Condition, np.ndarray]
    _means: dict[Condition, np.ndarray] = field(default_factory=dict)

    @property
    def identities(self) -> list[Identity]:
        """Identities that have controls."""
        return [identity for identity, perturbation in self.cells_of if perturbation == self.control]

    @property
    def perturbations(self) -> list[str]:
        """Perturbations measured in an identity that has controls."""
        with_control = set(self.identities)
        found = {p for identity, p in self.cells_of if identity in with_control and p != self.control}
        return sorted(found)

    def mean(self, identity: Identity, perturbation: str) -> np.ndarray:
        """Mean counts, normalised to 10,000 per cell, of one condition's cells, shape (genes,)."""
        condition = (identity, perturbation)
        if condition not in self._means:
            counts = self.cells.counts[self.cells_of[condition]]
            totals = np.asarray(counts.sum(axis=1), dtype=float).ravel()
            weights = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
            if not weights.any():
                raise LingshuError(
                    "A mean needs cells that have counts",
                    f"all cells of {condition_name(condition)} are empty",
                    "Drop them",
                )
            self._means[condition] = counts.T @ weights / np.count_nonzero(weights)
        return self._means[condition]

    def log_control(self, identity: Identity) -> np.ndarray:
        """Log mean of an identity's controls, shape (genes,)."""
        return np.log(self.mean(identity, self.control) + PSEUDOCOUNT)

    def effect(self, identity: Identity, perturbation: str) -> np.ndarray:
        """Measured effect of a perturbation in one identity, shape (genes,)."""
        return np.log(self.mean(identity, perturbation) + PSEUDOCOUNT) - self.log_control(identity)

    def measured_in(self, perturbation: str) -> list[Identity]:
        """Identities with controls in which a perturbation was measured."""
        return [identity for identity in self.identities if (identity, perturbation) in self.cells_of]

    def n_cells(self, perturbation: str) -> int:
        """Number of cells of a perturbation over the identities it was measured in."""
        return sum(len(self.cells_of[identity, perturbation]) for identity in self.measured_in(perturbation))

    def shared_effect(self, perturbation: str) -> np.ndarray:
        """Mean effect of a perturbation over the identities it was measured in, each counting the same."""
        return np.mean([self.effect(identity, perturbation) for identity in self.measured_in(perturbation)], axis=0)

    def parts(self, label: str, known: set[str]) -> list[str]:
        """The single perturbations of a combination if all of them are known; otherwise the label itself."""
        parts = components_of(label, self.separator, self.control)
        return parts if all(part in known for part in parts) else [label]


def read_screen(
    training: Path | str | ad.AnnData,
    *,
    perturbation_key: str,
    control: str,
    identity_keys: Sequence[str] = (),
    layer: str | None = None,
    separator: str = "+",
) -> Screen:
    """Read training cells and sort them by identity and perturbation.

    Parameters
    ----------
    training
        Raw counts with controls.
    perturbation_key, control, identity_keys
        obs column of perturbations, its value for controls, obs columns of identities.
    layer
        Layer of the counts; ``X`` by default.
    separator
        Between the parts of a combination.

    Returns
    -------
    Screen
        The sorted cells.

    Raises
    ------
    LingshuError
        If a key or the control is not there, or the values are no counts.
    """
    identity_keys = list(identity_keys)
    cells = read_counts(training, layer=layer, obs_keys=[*identity_keys, perturbation_key])
    labels = cells.obs[perturbation_key].astype(str).to_numpy(object)
    if control not in labels:
        raise LingshuError(
            "Training cells must include controls",
            f"no cell has {perturbation_key}={control!r}",
            f"Its values are {offenders(sorted(set(labels)))}: name one of them as control",
        )
    identities = pd.MultiIndex.from_frame(cells.obs[identity_keys].astype(str)) if identity_keys else [()] * len(labels)
    frame = pd.DataFrame({"condition": list(zip(identities, labels, strict=True))})
    return Screen(cells, control, separator, {k: np.asarray(v) for k, v in frame.groupby("condition").indices.items()})


def additive_effects(screen: Screen, conditions: Sequence[Condition]) -> dict[Condition, np.ndarray]:
    """Foretell each condition's effect as the mean over the identities it was measured in; A+B as A plus B.

    Parameters
    ----------
    screen
        Training cells.
    conditions
        (identity, perturbation) pairs.

    Returns
    -------
    dict
        Condition → effect, shape (genes,).

    Raises
    ------
    LingshuError
        If a perturbation, or a part of a combination, is not in training.
    """
    known = set(screen.perturbations)
    parts = {label: screen.parts(label, known) for _, label in conditions}
    remedy = "Take ridge or nearest_neighbour with embeddings for them"
    _refuse_unknown(parts, "Additive effects need every perturbation in training", known, remedy)
    shared = {part: screen.shared_effect(part) for part in sorted({p for found in parts.values() for p in found})}
    return {condition: sum(shared[part] for part in parts[condition[1]]) for condition in conditions}


def ridge_effects(
    screen: Screen, conditions: Sequence[Condition], embeddings: pd.DataFrame | None
) -> dict[Condition, np.ndarray]:
    """Foretell effects by ridge regression, the penalty chosen by leave-one-out cross-validation.

    With embeddings, the mean effect of every training perturbation is regressed on its embedding, and a combination
    is the sum of its parts. Without, the effects of the same perturbation in other identities are regressed on the log
    mean expression of those identities' controls. An infinite penalty gives the mean effect.

    Parameters
    ----------
    screen
        Training cells.
    conditions
        (identity, perturbation) pairs.
    embeddings
        One numeric row per perturbation, or None.

    Returns
    -------
    dict
        Condition → effect, shape (genes,).

    Raises
    ------
    LingshuError
        If a perturbation has no embedding, or there are fewer than three rows to learn from.
    """
    if embeddings is None:
        return {condition: _ridge_over_identities(screen, *condition) for condition in conditions}
    table = _checked_embeddings(embeddings)
    parts = {label: screen.parts(label, set(table.index)) for _, label in conditions}
    remedy = "Add their rows, or take additive where training has them"
    _refuse_unknown(parts, "Ridge needs an embedding of every perturbation", set(table.index), remedy)
    fitted = _with_embedding(screen, table)
    asked = sorted({part for found in parts.values() for part in found})
    effects = np.stack([screen.shared_effect(label) for label in fitted])
    sizes = np.array([screen.n_cells(label) for label in fitted], dtype=float)
    both = _standardised(table.loc[[*fitted, *asked]].to_numpy())
    foretold = dict(zip(asked, _fit_ridge(both[: len(fitted)], effects, both[len(fitted) :], sizes), strict=True))
    return {condition: sum(foretold[part] for part in parts[condition[1]]) for condition in conditions}


def _ridge_over_identities(screen: Screen, identity: Identity, perturbation: str) -> np.ndarray:
    measured = [other for other in screen.measured_in(perturbation) if other != identity]
    if len(measured) < _LEAST_ROWS:
        raise LingshuError(
            f"Without embeddings, ridge needs the perturbation in {_LEAST_ROWS} other identities",
            f"{perturbation!r} was measured in {offenders(['/'.join(other) for other in measured])}",
            "Give embeddings of the perturbations (--embeddings), or take additive",
        )
    profiles = np.stack([screen.log_control(other) for other in measured])
    effects = np.stack([screen.effect(other, perturbation) for other in measured])
    sizes = np.array([len(screen.cells_of[other, perturbation]) for other in measured], dtype=float)
    return _fit_ridge(profiles, effects, screen.log_control(identity)[None], sizes)[0]


def _fit_ridge(features: np.ndarray, effects: np.ndarray, asked: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Foretell effects by closed-form ridge regression, the penalty chosen by leave-one-out cross-validation.

    Rows count by ``weights``, their numbers of cells, for the effect of few cells is mostly noise.
    """
    from sklearn.linear_model import RidgeCV

    rows, new = features - features.mean(axis=0), asked - features.mean(axis=0)
    size = np.sqrt((rows**2).sum(axis=1).mean()) or 1.0
    axes = np.linalg.svd(rows, full_matrices=False)[2]  # ridge sees only the rows' own span: the same answer, faster
    fitted = RidgeCV(alphas=_PENALTIES).fit(rows @ axes.T / size, effects, sample_weight=weights / weights.mean())
    return fitted.predict(new @ axes.T / size)


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Scale columns to mean 0 and standard deviation 1; a constant column becomes 0."""
    spread = rows.std(axis=0)
    return (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, np.inf)


def nearest_effects(
    screen: Screen, conditions: Sequence[Condition], embeddings: pd.DataFrame | None
) -> dict[Condition, np.ndarray]:
    """Take each condition's effect from its nearest neighbour in training.

    A perturbation that training has not is replaced by the training perturbation whose embedding has the highest cosine
    (columns standardised); a perturbation not measured in the identity is looked up in the identity whose controls
    correlate best, gene by gene on log means. A combination is the sum of its parts.

    Parameters
    ----------
    screen
        Training cells.
    conditions
        (identity, perturbation) pairs.
    embeddings
        One numeric row per perturbation, or None.

    Returns
    -------
    dict
        Condition → effect, shape (genes,).

    Raises
    ------
    LingshuError
        If a perturbation is neither in training nor has an embedding.
    """
    known = set(screen.perturbations)
    table = None if embeddings is None else _checked_embeddings(embeddings)
    reachable = known if table is None else known | set(table.index)
    parts = {label: screen.parts(label, reachable) for _, label in conditions}
    rule = "A nearest neighbour needs the perturbation in training, or its embedding"
    _refuse_unknown(parts, rule, reachable, "Add rows to the embeddings (--embeddings)")
    unseen = sorted({part for found in parts.values() for part in found} - known)
    stands_for = dict(
        zip(unseen, _nearest_rows(table, unseen, _with_embedding(screen, table)), strict=True) if unseen else ()
    )
    return {
        (identity, label): sum(_nearest_measured(screen, identity, stands_for.get(part, part)) for part in parts[label])
        for identity, label in conditions
    }


def _nearest_rows(table: pd.DataFrame, asked: list[str], candidates: list[str]) -> list[str]:
    """For each row asked for, the candidate row with the highest cosine."""
    rows = _standardised(table.loc[[*candidates, *asked]].to_numpy())
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    nearest = (rows[len(candidates) :] @ rows[: len(candidates)].T).argmax(axis=1)
    return [candidates[i] for i in nearest]


def _nearest_measured(screen: Screen, identity: Identity, perturbation: str) -> np.ndarray:
    """The effect in the identity itself, or in the one whose controls are most alike."""
    measured = screen.measured_in(perturbation)
    if identity in measured:
        return screen.effect(identity, perturbation)
    own = screen.log_control(identity)
    alike = [np.corrcoef(own, screen.log_control(other))[0, 1] for other in measured]
    return screen.effect(measured[int(np.argmax(alike))], perturbation)


def _with_embedding(screen: Screen, table: pd.DataFrame) -> list[str]:
    """Training perturbations that have an embedding; the others are named in a warning."""
    found = [label for label in screen.perturbations if label in table.index]
    without = [label for label in screen.perturbations if label not in table.index]
    if len(found) < _LEAST_ROWS:
        raise LingshuError(
            f"At least {_LEAST_ROWS} training perturbations need an embedding",
            f"{len(found)} have one; without: {offenders(without)}",
            "Name the rows of the embeddings as the perturbations are named",
        )
    if without:
        warnings.warn(f"Training perturbations without embedding are not used: {offenders(without)}", stacklevel=2)
    return found


def _checked_embeddings(embeddings: pd.DataFrame) -> pd.DataFrame:
    table = embeddings.set_axis(embeddings.index.astype(str))
    numeric = all(pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes)
    if not numeric or not table.shape[1] or not np.isfinite(table.to_numpy(float)).all():
        raise LingshuError(
            "Embeddings are finite numbers", "some value is none", "Give one numeric row per perturbation"
        )
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()].unique()
        raise LingshuError("An embedding is given once", f"more than once: {offenders(twice)}", "Keep one row of each")
    return table.astype(float)


def _refuse_unknown(parts: Mapping[str, list[str]], rule: str, known: set[str], remedy: str) -> None:
    unknown = sorted({part for found in parts.values() for part in found if part not in known})
    if unknown:
        raise LingshuError(rule, f"none for {offenders(unknown)}", remedy)


def condition_name(condition: Condition) -> str:
    """Write a condition for people, as in ``"B cells / IFNB"``."""
    return " / ".join((*condition[0], condition[1]))
