"""Which conditions a model may see: held-out perturbations, pairs and identities, few-shot shares, control shares."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lingshu_cell.data.condition_labels import canonical_name, components_of, labels_of, nearest
from lingshu_cell.errors import LingshuError, offenders

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
_CELLS_AT_ONCE = 1 << 18
_MOST_LISTED = 20  # held-out conditions that describe() names


@dataclass(frozen=True)
class Condition:
    """A perturbation, an identity (cell type, line, donor …), or a pair of both; None stands for every one.

    Parameters
    ----------
    identity
        Value of ``obs[identity_key]``.
    perturbation
        Value of ``obs[perturbation_key]``; None for every perturbation, but never for control cells.
    """

    identity: str | None = None
    perturbation: str | None = None

    def __str__(self) -> str:
        return " · ".join(name for name in (self.identity, self.perturbation) if name is not None)


@dataclass(frozen=True)
class HeldOut:
    """Conditions kept from training.

    Parameters
    ----------
    conditions
        Perturbations (in every identity), identities (all perturbed cells, zero-shot), pairs.
    controls
        ``"train"``: control cells of a held-out identity stay in training, so that a model sees the identity at rest;
        ``"held out"``: they go where its perturbed cells go.
    """

    conditions: tuple[Condition, ...] = ()
    controls: str = "train"


@dataclass(frozen=True)
class ConditionSplit:
    """Which cells train, validate and test a model of perturbation responses, said by condition.

    A condition held out by both sections tests. Cells that no entry names train.

    Parameters
    ----------
    perturbation_key, control
        obs column of perturbations, and its value in control cells.
    identity_key
        obs column of cell types, lines or donors; None where only perturbations are held out.
    held_out, validation
        Conditions of the test and of the validation part.
    few_shot
        Held-out conditions of which a share of the cells, strictly between 0 and 1, trains; a pair has precedence over
        the perturbation or identity it belongs to.
    control_shares
        Share of each identity's control cells that goes to the validation and to the test part, to measure responses
        against controls which the model has not seen.
    seed
        Seed of the draws; each condition has draws of its own, which depend on the names of its cells only.
    combination_separator
        What joins perturbations in a label, as in ``"A+B"``; empty if labels are never combinations. ``"B+A"`` and
        ``"A+B"`` are one condition, and so are ``"A+control"`` and ``"A"``.
    allow_in_combinations
        Whether a held-out perturbation may be in training as a part of combinations.

    Examples
    --------
    >>> split = ConditionSplit("perturbation", "control", held_out=HeldOut((Condition(perturbation="A"),)))
    >>> split.assign(pd.DataFrame({"perturbation": ["control", "A", "B"]})).tolist()
    ['train', 'test', 'train']
    """

    perturbation_key: str
    control: str
    identity_key: str | None = None
    held_out: HeldOut = HeldOut()
    validation: HeldOut = HeldOut()
    few_shot: tuple[tuple[Condition, float], ...] = ()
    control_shares: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    combination_separator: str = "+"
    allow_in_combinations: bool = False

    def assign(self, obs: pd.DataFrame) -> np.ndarray:
        """Give each cell its part, and refuse a split that cannot be or that leaks.

        Parameters
        ----------
        obs
            Labels of the cells, one row per cell.

        Returns
        -------
        np.ndarray
            ``"train"``, ``"validation"`` or ``"test"``, shape [n_cells].

        Raises
        ------
        LingshuError
            If a column or label is missing, a name does not occur, an entry has no cells of its own, a held-out
            perturbation trains inside a combination, an identity has no control cells, or nothing is left to train.
        """
        return np.array(PARTS, dtype=object)[self._parts(_Found.read(obs, self))]

    def assign_codes(
        self, identity: "Labelled | None", perturbation: "Labelled", names_of: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Give each cell its part as :meth:`assign` does, from labels that are stored as codes.

        Parameters
        ----------
        identity, perturbation
            Labels of the cells; the identity is None where the split has no ``identity_key``.
        names_of
            Gives the names of cells by their position; asked only for conditions that are drawn from.

        Returns
        -------
        np.ndarray
            Index into ``PARTS``, int8, shape [n_cells].

        Raises
        ------
        LingshuError
            As :meth:`assign`.
        """
        return self._parts(_Found.of(identity, perturbation, names_of, self))

    def _parts(self, found: "_Found") -> np.ndarray:
        """Give the part of each cell as index into ``PARTS``, int8."""
        self._check_named(found)
        where = np.full(len(found.identity), TRAIN, dtype=object)  # part of each pair
        for part, section in ((VALIDATION, self.validation), (TEST, self.held_out)):
            for condition in section.conditions:
                where[found.matching(condition)] = part
                if section.controls == "held out" and condition.perturbation is None:
                    where[found.is_control & (found.identity == condition.identity)] = part
        for part, section in ((VALIDATION, self.validation), (TEST, self.held_out)):
            _check_each_has_cells(section, part, where, found)
        shares = self._few_shot_shares(where, found)
        parts = np.array([PARTS.index(part) for part in where], dtype=np.int8)[found.pair_of_cell]
        for pair, share in shares.items():
            parts[self._drawn(found, found.rows(pair), share, pair)] = PARTS.index(TRAIN)
        self._draw_controls(parts, where, found)
        self._check_combinations(where, found, set(shares))
        self._check_controls_exist(where, found)
        if not (parts == PARTS.index(TRAIN)).any():
            raise LingshuError("Training needs cells", "the split holds out every cell", "Hold out fewer conditions")
        return parts

    def summary(self, obs: pd.DataFrame) -> pd.DataFrame:
        """Count the cells of each condition in each part.

        Parameters
        ----------
        obs
            Labels of the cells.

        Returns
        -------
        pandas.DataFrame
            Columns ``identity``, ``perturbation``, ``control`` (bool), ``train``, ``validation``, ``test`` (cells).

        Raises
        ------
        LingshuError
            As :meth:`assign`.
        """
        found, parts = _Found.read(obs, self), self.assign(obs)
        counts = {part: np.bincount(found.pair_of_cell[parts == part], minlength=len(found.identity)) for part in PARTS}
        labels = {"identity": found.identity, "perturbation": found.perturbation, "control": found.is_control}
        return pd.DataFrame({**labels, **counts}).sort_values(["identity", "perturbation"], ignore_index=True)

    def describe(self, obs: pd.DataFrame) -> str:
        """Say what each part holds: conditions, cells, and which conditions are held out.

        Parameters
        ----------
        obs
            Labels of the cells.

        Returns
        -------
        str
            A table, the held-out conditions and, where there is something to know, notes.

        Raises
        ------
        LingshuError
            As :meth:`assign`.
        """
        counts = self.summary(obs)
        perturbed, controls = counts[~counts["control"]], counts[counts["control"]]
        lines = [f"{'part':<12}{'conditions':>12}{'perturbed cells':>18}{'control cells':>16}"]
        for part in PARTS:
            numbers = (int((perturbed[part] > 0).sum()), int(perturbed[part].sum()), int(controls[part].sum()))
            lines.append(f"{part:<12}{numbers[0]:>12,}{numbers[1]:>18,}{numbers[2]:>16,}")
        rows = [(part, row) for part in (TEST, VALIDATION) for row in perturbed[perturbed[part] > 0].to_dict("records")]
        for part, row in rows[:_MOST_LISTED]:
            few = f", {row[TRAIN]:,} in training" if row[TRAIN] else ""
            name = Condition(row["identity"] if self.identity_key else None, row["perturbation"])
            lines.append(f"{part}: {name} ({row[part]:,} cells{few})")
        if len(rows) > _MOST_LISTED:
            lines.append(f"… and {len(rows) - _MOST_LISTED:,} more held-out conditions")
        return "\n".join([*lines, *self._notes(perturbed)])

    def few_shot_conditions(self, obs: pd.DataFrame) -> set[tuple[str, str]]:
        """Name the conditions, as (identity, perturbation), that are in training and in another part by intent.

        Parameters
        ----------
        obs
            Labels of the cells.

        Raises
        ------
        LingshuError
            As :meth:`assign`.
        """
        counts = self.summary(obs)
        both = counts[~counts["control"] & (counts[TRAIN] > 0) & (counts[[VALIDATION, TEST]].sum(axis=1) > 0)]
        return set(zip(both["identity"], both["perturbation"], strict=True))

    def _named(self) -> Iterator[Condition]:
        yield from self.held_out.conditions
        yield from self.validation.conditions
        yield from (condition for condition, _ in self.few_shot)

    def _check_named(self, found: "_Found") -> None:
        """Refuse names that do not occur in the data, with what may have been meant."""
        named = list(dict.fromkeys(self._named()))
        perturbations = [found.canonical(c.perturbation) for c in named if c.perturbation is not None]
        if self.control in perturbations:
            remedy = "Say where control cells go with controls = … and [control_shares]"
            raise LingshuError("Only perturbations are held out", f"'{self.control}' is the control", remedy)
        identities = [c.identity for c in named if c.identity is not None]
        for key, names, known in (
            (self.identity_key, identities, set(found.identity)),
            (self.perturbation_key, perturbations, set(found.perturbation)),
        ):
            absent = [name for name in dict.fromkeys(names) if name not in known]
            if absent:
                near = "".join(nearest(name, known) for name in absent[:5])
                finding = f"obs[{key!r}] has no {offenders(absent)}"
                remedy = f"{near}Values: {offenders(sorted(known))}"
                raise LingshuError("Every name of a split must occur in the data", finding, remedy)
        empty = [str(condition) for condition in named if not found.matching(condition).any()]
        if empty:
            finding = f"no perturbed cell has {offenders(empty)}"
            raise LingshuError("Every condition of a split must have cells", finding, "Leave these entries out")

    def _few_shot_shares(self, where: np.ndarray, found: "_Found") -> dict[int, float]:
        """Give the share of each held-out pair that has one, the more special entry having precedence."""
        shares: dict[int, float] = {}
        general = [item for item in self.few_shot if None in (item[0].identity, item[0].perturbation)]
        for entries in (general, [item for item in self.few_shot if item not in general]):
            given: dict[int, float] = {}
            for condition, share in entries:
                held_out = np.flatnonzero(found.matching(condition) & (where != TRAIN)).tolist()
                if not held_out:
                    remedy = "Name it under [held_out] or [validation] too, or leave it out"
                    raise LingshuError("A few-shot condition must be held out", f"{condition} is not", remedy)
                for pair in held_out:
                    if given.get(pair, share) != share:
                        finding = f"{found.name(pair)} has two"
                        raise LingshuError("A condition has one few-shot share", finding, "Leave one out")
                    given[pair] = share
            shares |= given
        return shares

    def _draw_controls(self, parts: np.ndarray, where: np.ndarray, found: "_Found") -> None:
        """Move a share of every identity's training controls to the validation and test parts."""
        for pair in np.flatnonzero(found.is_control & (where == TRAIN)).tolist() if self.control_shares else ():
            rows = found.rows(pair)
            n_all = len(rows)
            for part, share in self.control_shares:
                chosen = self._drawn(found, rows, share * n_all / len(rows), pair)
                parts[chosen] = PARTS.index(part)
                rows = rows[~np.isin(rows, chosen)]

    def _drawn(self, found: "_Found", rows: np.ndarray, share: float, pair: int) -> np.ndarray:
        """Draw a share of a condition's cells, never all and, of two or more, never none."""
        rows = rows[np.argsort(found.names_of(rows).astype(str), kind="stable")]  # not in the order of the file
        n_drawn = min(max(round(share * len(rows)), 1), len(rows) - 1)
        key = hashlib.sha256(f"{found.identity[pair]}\x00{found.perturbation[pair]}".encode()).digest()[:8]
        draws = np.random.default_rng([self.seed, int.from_bytes(key, "little")]).permutation(len(rows))
        return rows[draws[:n_drawn]]

    def _check_combinations(self, where: np.ndarray, found: "_Found", few_shot: set[int]) -> None:
        if self.allow_in_combinations or not self.combination_separator:
            return
        components = {name: found.components(name) for name in set(found.perturbation)}
        shared = {(found.identity[pair], found.perturbation[pair]) for pair in few_shot}
        trained = [
            pair for pair in np.flatnonzero(~found.is_control).tolist() if where[pair] == TRAIN or pair in few_shot
        ]
        trained = [pair for pair in trained if len(components[found.perturbation[pair]]) > 1]
        leaks = []
        for held_out in {*self.held_out.conditions, *self.validation.conditions}:
            if held_out.perturbation is None:
                continue
            name = found.canonical(held_out.perturbation)
            leaks += [
                f"'{found.perturbation[pair]}' holds '{held_out.perturbation}'"
                for pair in trained
                if held_out.identity in (None, found.identity[pair])
                and components[name] < components[found.perturbation[pair]]
                and (found.identity[pair], name) not in shared
            ]
        if leaks:
            raise LingshuError(
                "A held-out perturbation must not be in training inside a combination",
                ", ".join(sorted(set(leaks))[:5]) + f" ({len(set(leaks))})",
                "Hold these combinations out too, or set allow_in_combinations = true",
            )

    def _check_controls_exist(self, where: np.ndarray, found: "_Found") -> None:
        asked = set(found.identity[(where != TRAIN) & ~found.is_control])
        without = sorted(asked - set(found.identity[found.is_control]))
        if without and self.identity_key:
            raise LingshuError(
                "An identity with held-out perturbations needs control cells, which its responses are measured against",
                f"none with obs[{self.perturbation_key!r}] == '{self.control}' for {offenders(without)}",
                "Add control cells, check the name of the control, or hold other identities out",
            )
        if without:
            known = sorted(set(found.perturbation))
            finding = f"obs[{self.perturbation_key!r}] has no '{self.control}'"
            remedy = f"{nearest(self.control, known)}Values: {offenders(known)}"
            raise LingshuError("There must be control cells", finding, remedy)

    def _notes(self, perturbed: pd.DataFrame) -> list[str]:
        """State what a reader should know of combinations and few-shot conditions."""
        separator = self.combination_separator
        if not separator:
            return []
        trained = set(perturbed.loc[perturbed[TRAIN] > 0, "perturbation"])
        unseen = perturbed[(perturbed[TRAIN] == 0) & (perturbed[[VALIDATION, TEST]].sum(axis=1) > 0)]
        known = [
            name
            for name in sorted(set(unseen["perturbation"]) - trained)
            if separator in name and set(components_of(name, separator, self.control)) <= trained
        ]
        if not known:
            return []
        return [f"note: held-out combinations whose every part is trained alone: {offenders(known)}"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """A label of every cell: its index among the labels there are."""

    codes: np.ndarray
    labels: Sequence[str]


@dataclass(frozen=True, eq=False)
class _Found:
    """The pairs of identity and perturbation that occur, perturbations in canonical form, and the pair of each cell."""

    names_of: Callable[[np.ndarray], np.ndarray]
    pair_of_cell: np.ndarray
    identity: np.ndarray
    perturbation: np.ndarray
    is_control: np.ndarray
    separator: str
    control: str

    @classmethod
    def read(cls, obs: pd.DataFrame, split: ConditionSplit) -> "_Found":
        identity = None if split.identity_key is None else Labelled(*pd.factorize(labels_of(obs, split.identity_key)))
        perturbation = Labelled(*pd.factorize(labels_of(obs, split.perturbation_key)))
        return cls.of(identity, perturbation, obs.index.to_numpy(dtype=object).__getitem__, split)

    @classmethod
    def of(
        cls,
        identity: Labelled | None,
        perturbation: Labelled,
        names_of: Callable[[np.ndarray], np.ndarray],
        split: ConditionSplit,
    ) -> "_Found":
        separator, control = split.combination_separator, split.control
        identity = identity or Labelled(np.zeros(1, np.int8), ("all cells",))
        spelt = np.array([canonical_name(str(one), separator, control) for one in perturbation.labels], dtype=object)
        canonical, names = pd.factorize(spelt)
        number = np.full((len(identity.labels), len(names)), -1, dtype=np.int32)
        n_cells, identities, perturbations = len(perturbation.codes), [], []
        pair_of_cell = np.empty(n_cells, dtype=np.int32)
        for i in range(0, n_cells, _CELLS_AT_ONCE):
            here = slice(i, i + _CELLS_AT_ONCE)
            p = canonical[perturbation.codes[here]]
            a = np.broadcast_to(identity.codes, (n_cells,))[here]
            for one, other in np.unique(np.stack([a, p], axis=1), axis=0).tolist():
                if number[one, other] < 0:
                    number[one, other] = len(identities)
                    identities.append(identity.labels[one])
                    perturbations.append(names[other])
            pair_of_cell[here] = number[a, p]
        named, given = np.array(identities, dtype=object), np.array(perturbations, dtype=object)
        return cls(names_of, pair_of_cell, named, given, given == control, separator, control)

    def rows(self, pair: int) -> np.ndarray:
        """Number the cells of a pair."""
        return np.flatnonzero(self.pair_of_cell == pair)

    def matching(self, condition: Condition) -> np.ndarray:
        """Mark the perturbed pairs that belong to a condition."""
        mask = ~self.is_control
        if condition.identity is not None:
            mask = mask & (self.identity == condition.identity)
        if condition.perturbation is not None:
            mask = mask & (self.perturbation == self.canonical(condition.perturbation))
        return mask

    def name(self, pair: int) -> Condition:
        return Condition(self.identity[pair], self.perturbation[pair])

    def canonical(self, name: str) -> str:
        return canonical_name(name, self.separator, self.control)

    def components(self, name: str) -> set[str]:
        return set(components_of(name, self.separator, self.control))


def _check_each_has_cells(section: HeldOut, part: str, where: np.ndarray, found: _Found) -> None:
    for condition in section.conditions:
        if not (where[found.matching(condition)] == part).any():
            raise LingshuError(
                "A condition is held out for validation or for test",
                f"every cell of {condition} is named by both",
                "Leave it out of [validation]",
            )
