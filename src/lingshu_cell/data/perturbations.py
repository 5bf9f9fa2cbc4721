"""Perturbation labels taken apart: control, single perturbations, combinations.

A label is control, one perturbation, or several joined by a separator ("KLF1+BAK1"); what the parts of a combination
are called alone is what they are called in it, so a combination never seen can be asked for.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.data.condition_labels import components_of
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
            If a label is blank, no cell has the control label, all cells have it, a perturbation stands twice in a
            label, or if a label looks like a combination but no part of it is in any other label: it may be one name.
        """
        distinct = sorted(set(labels))
        if blank := [label for label in distinct if not label.strip()]:
            remedy = "Name what was done, or leave them out"
            raise LingshuError("Every cell needs a perturbation label", f"some are {blank[0]!r}", remedy)
        if control not in distinct:
            raise LingshuError(
                "Control cells must be there", f"no cell is labelled {control!r}", f"Labels: {offenders(distinct)}"
            )
        if len(distinct) == 1:
            raise LingshuError(
                "There must be perturbed cells", f"every cell is labelled {control!r}", "Check data.control"
            )
        parts = {label: components_of(label, separator, control) for label in distinct}
        in_labels = Counter(part for some in parts.values() for part in some)
        alone = [label for label, some in parts.items() if len(some) > 1 and all(in_labels[p] == 1 for p in some)]
        if alone:
            raise LingshuError(
                "A combination must have a part that is also in another label; otherwise it may be one name",
                f"joined by {separator!r}, with no part in any other label: {offenders(alone)}",
                'Set data.combination_separator="" if labels are names, or to another sign that joins yours',
            )
        return cls((control, *sorted(set(in_labels) - {control})), separator)

    def parts(self, label: str) -> list[str]:
        """Take a label apart: the control label alone, or the names of one or several perturbations; see
        :func:`lingshu_cell.data.condition_labels.components_of`.
        """
        return components_of(label, self.separator, self.control)

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
