"""Perturbation labels taken apart: control, single perturbations, combinations.

A label is control, one perturbation, or several joined by a separator ("KLF1+BAK1"); what the parts of a combination
are called alone is what they are called in it, so a combination never seen can be asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders


@dataclass(frozen=True)
class PerturbationVocabulary:
    """The perturbations a model knows.

    Attributes
    ----------
    names
        Control first, then the single perturbations, sorted.
    separator
        What joins the parts of a combination; empty where a label is never a combination.
    """

    names: tuple[str, ...]
    separator: str = "+"

    @property
    def control(self) -> str:
        """The label of control cells."""
        return self.names[0]

    @classmethod
    def from_labels(cls, labels: Iterable[str], control: str, separator: str = "+") -> "PerturbationVocabulary":
        """Collect the parts of all labels.

        Parameters
        ----------
        labels
            Label of every cell.
        control
            The label of control cells; it is never taken apart.
        separator
            What joins the parts of a combination.

        Raises
        ------
        LingshuError
            If no cell has the control label, if a label is nothing but control, or if a part is empty or stands twice.
        """
        distinct = sorted(set(labels))
        if control not in distinct:
            raise LingshuError(
                "Control cells must be there", f"no cell is labelled {control!r}", f"Labels: {offenders(distinct)}"
            )
        if len(distinct) == 1:
            raise LingshuError(
                "There must be perturbed cells", f"every cell is labelled {control!r}", "Check data.control"
            )
        singles = {part for label in distinct if label != control for part in _parts(label, control, separator)}
        return cls((control, *sorted(singles - {control})), separator)

    def parts(self, label: str) -> list[str]:
        """Take a label apart: the control label alone, or the names of one or several perturbations.

        Raises
        ------
        LingshuError
            If a part is empty or stands twice.
        """
        return [label] if label == self.control else _parts(label, self.control, self.separator)

    def encode(self, labels: Iterable[str]) -> np.ndarray:
        """Give for each label which perturbations were applied, float32, shape [number of labels, number of names].

        Raises
        ------
        LingshuError
            If a part is not known.
        """
        position = {name: i for i, name in enumerate(self.names)}
        parts = [self.parts(label) for label in labels]
        unknown = [part for some in parts for part in some if part not in position]
        if unknown:
            raise LingshuError(
                "Perturbations must be among those the model knows",
                f"it does not know {offenders(dict.fromkeys(unknown))}",
                f"Known: {offenders(self.names)}; others need an embedding, see --unseen",
            )
        applied = np.zeros((len(parts), len(self.names)), dtype=np.float32)
        for row, some in zip(applied, parts, strict=True):
            row[[position[part] for part in some]] = 1
        return applied

    def extended(self, names: Iterable[str]) -> "PerturbationVocabulary":
        """Give a vocabulary with further perturbations behind those known."""
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        return PerturbationVocabulary((*self.names, *new), self.separator)

    def to_json(self) -> dict[str, Any]:
        """Give the vocabulary as plain JSON types."""
        return {"names": list(self.names), "separator": self.separator}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PerturbationVocabulary":
        """Rebuild the vocabulary from what :meth:`to_json` gave."""
        return cls(tuple(value["names"]), value["separator"])


def standardise_doses(doses: np.ndarray, is_control: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Give log doses with mean 0 and standard deviation 1 over the perturbed cells, 0 for control cells.

    Parameters
    ----------
    doses
        Dose of each cell in one unit, above 0 in perturbed cells.
    is_control
        Which cells are control cells; their dose is not read.

    Returns
    -------
    tuple
        Standardised doses, float32, and the mean and standard deviation of the log doses.

    Raises
    ------
    LingshuError
        If a perturbed cell has no dose, or one that is not above 0.
    """
    log_dose = check_log_doses(doses[~is_control])
    mean, sd = float(log_dose.mean()), float(log_dose.std())
    sd = sd if sd > 1e-6 else 1.0  # one dose for all
    standardised = np.zeros(len(doses), dtype=np.float32)
    standardised[~is_control] = (log_dose - mean) / sd
    return standardised, mean, sd


def check_log_doses(doses: np.ndarray) -> np.ndarray:
    """Give the logarithm of doses, refusing what is not a finite number above 0."""
    values = pd.to_numeric(pd.Series(np.asarray(doses)), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        raise LingshuError(
            "A dose must be a number above 0 in every perturbed cell",
            f"{int(wrong.sum())} of {len(values)} perturbed cells have {offenders(map(str, np.asarray(doses)[wrong]))}",
            "Give every perturbed cell its dose in one unit; control cells may lack it",
        )
    return np.log(values)


def _parts(label: str, control: str, separator: str) -> list[str]:
    parts = [part.strip() for part in label.split(separator)] if separator else [label]
    parts = [part for part in parts if part != control] or [""]
    if not all(parts) or len(set(parts)) != len(parts):
        raise LingshuError(
            "A combination must join different perturbations",
            f"{label!r} taken apart at {separator!r} gives {offenders(map(repr, parts))}",
            "Mend the label, or set data.combination_separator to what joins them (empty: labels stay whole)",
        )
    return parts
