"""From labels to what a denoiser is told: which perturbations make up a label, which control cells are a cell's
context, which effect is expected, and how deep cells are.

Shapes: N cells, C condition fields, L labels of the perturbation field, P perturbations, G modelled genes, K profiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse

from lingshu_cell.data.cell_states import CellStates
from lingshu_cell.data.condition_rows import ConditionRows
from lingshu_cell.data.gene_embeddings import GeneEmbeddings
from lingshu_cell.data.perturbations import PerturbationVocabulary, check_log_doses
from lingshu_cell.data.prior_effects import PriorEffect, PriorEffects
from lingshu_cell.data.vocabulary import ConditionVocabulary
from lingshu_cell.network.conditions import Conditions, Profiles
from lingshu_cell.network.set_denoiser import ConditionSizes
from lingshu_cell.tokens import STATE_FIELDS

LEAST_CONTEXT_CELLS = 8
CELLS_OF_OVERALL = 4


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Profiles of control cells: for each identity that of all its control cells first, then of random parts of them.

    Attributes
    ----------
    profile_KJG
        Share of cells that detect a gene, and mean log(1 + count), float32; row 0, the average over all identities,
        stands for *none*.
    identity_IC
        The identities: indices in each condition field, 0 in the perturbation field.
    first_I, n_I
        First row of each identity and how many it has.
    """

    profile_KJG: np.ndarray
    identity_IC: np.ndarray
    first_I: np.ndarray
    n_I: np.ndarray

    @cached_property
    def _identities(self) -> ConditionRows:
        return ConditionRows(self.identity_IC)

    def rows(self, identity_NC: np.ndarray, uniform_N: np.ndarray | None) -> np.ndarray:
        """Give the profile of each cell, 0 = none: that of all control cells, or the random part that uniforms say."""
        if not len(self.first_I):
            return np.zeros(len(identity_NC), dtype=np.int64)
        place = self._identities.find(identity_NC)
        known = place >= 0
        row = np.where(known, self.first_I[place], 0)
        if uniform_N is not None:
            row += np.where(known, np.floor(uniform_N * self.n_I[place]).astype(np.int64), 0)
        return row


@dataclass(frozen=True, eq=False)
class EffectTable:
    """Prior effects: the expected change of each gene's log mean.

    Attributes
    ----------
    effect_KG
        float32; row 0 is empty and stands for *none*.
    condition_KC
        What each effect belongs to: indices of a whole condition row; row 0 is not used.
    """

    effect_KG: np.ndarray
    condition_KC: np.ndarray

    def rows(self, condition_NC: np.ndarray) -> np.ndarray:
        """Give the effect of each cell, 0 = none."""
        return np.maximum(self._conditions.find(condition_NC) + 1, 0)

    @cached_property
    def _conditions(self) -> ConditionRows:
        return ConditionRows(self.condition_KC[1:])


@dataclass(frozen=True, eq=False)
class DepthTable:
    """Library sizes of the training cells of each condition row: their modelled UMI counts.

    Attributes
    ----------
    condition_RC
        The condition rows.
    n_R
        How many library sizes of each there are; of a row of very many cells they are a random part.
    library_M
        Library sizes, int64, those of one row after those of another, rising in each.
    """

    condition_RC: np.ndarray
    n_R: np.ndarray
    library_M: np.ndarray

    def __post_init__(self) -> None:
        if not (
            len(self.condition_RC) == len(self.n_R) and (self.n_R > 0).all() and self.n_R.sum() == len(self.library_M)
        ):
            raise ValueError("library sizes that do not fit the condition rows")

    @cached_property
    def _rows(self) -> ConditionRows:
        return ConditionRows(self.condition_RC)

    def log_moments(self, weight_R: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the log library size over condition rows of given weights."""
        weight_M = np.repeat(weight_R / weight_R.sum() / self.n_R, self.n_R)
        log_M = np.log(np.maximum(self.library_M, 1))
        mean, square = (float(weight_M @ log_M**k) for k in (1, 2))
        return mean, max(square - mean**2, 0.0) ** 0.5

    def draw(self, condition_NC: np.ndarray, uniform_N: np.ndarray, perturbation_field: int | None) -> np.ndarray:
        """Draw a log library size for each cell: that of some training cell of its condition row, or where none has it,
        of the rows like it (:meth:`ConditionRows.like`).
        """
        place_N, first_R = self._rows.find(condition_NC), np.cumsum(self.n_R) - self.n_R
        drawn_N, seen_N = np.empty(len(place_N), dtype=np.int64), place_N >= 0
        row = place_N[seen_N]
        drawn_N[seen_N] = self.library_M[first_R[row] + _rank(uniform_N[seen_N], self.n_R[row])]
        for row in np.unique(condition_NC[~seen_N], axis=0):
            like_M = np.sort(self.library_M[np.repeat(self._rows.like(row, perturbation_field), self.n_R)])
            cells = ~seen_N & (condition_NC == row).all(1)
            drawn_N[cells] = like_M[_rank(uniform_N[cells], len(like_M))]
        return np.log(np.maximum(drawn_N, 1))


@dataclass(frozen=True, eq=False)
class Conditioner:
    """All that turns condition rows into what a denoiser is told.

    Attributes
    ----------
    vocabulary
        Condition fields and categories; the perturbation labels are one of the fields.
    perturbation_key
        Which field that is; ``None`` where there is none.
    perturbations
        The labels taken apart.
    dose_mean, dose_sd
        Of the log doses in training; ``None`` where doses are not read.
    embedding_PQ
        Known embedding of every perturbation, float32.
    contexts, effects, depths
        Tables, where the model uses them.
    embeddings
        All known embeddings, so that perturbations never trained can be told.
    prior
        What foretells effects of conditions never trained.
    states
        What groups cells into states, where these are the first condition fields.
    as_category
        Whether the network takes a perturbation label as one more category, control being one of them (the paper's).
    """

    vocabulary: ConditionVocabulary
    perturbation_key: str | None = None
    perturbations: PerturbationVocabulary | None = None
    dose_mean: float | None = None
    dose_sd: float | None = None
    embedding_PQ: np.ndarray | None = None
    contexts: ContextTable | None = None
    effects: EffectTable | None = None
    depths: DepthTable | None = None
    embeddings: GeneEmbeddings | None = None
    prior: PriorEffects | None = None
    states: CellStates | None = None
    as_category: bool = False

    @property
    def n_state_fields(self) -> int:
        """How many of the condition fields, the first ones, say the state of a cell."""
        return sum(name in self.vocabulary.fields for name in STATE_FIELDS)

    def states_open(self, condition_NC: np.ndarray) -> np.ndarray:
        """Give the condition rows without the state of the cells: what contexts and effects belong to."""
        opened_NC = condition_NC.copy()
        opened_NC[:, : self.n_state_fields] = 0
        return opened_NC

    @property
    def perturbation_field(self) -> int | None:
        """Column of the perturbation labels in a condition row."""
        return None if self.perturbation_key is None else list(self.vocabulary.fields).index(self.perturbation_key)

    @property
    def sizes(self) -> ConditionSizes:
        """What a denoiser of these conditions must have room for."""
        field = None if self.as_category else self.perturbation_field
        return ConditionSizes(
            categories=tuple(size for i, size in enumerate(self.vocabulary.sizes) if i != field),
            perturbations=0 if field is None else len(self.perturbations.names),
            embedding=0 if self.embedding_PQ is None else self.embedding_PQ.shape[1],
            context=self.contexts is not None,
            effect=self.effects is not None,
            depth=self.depths is not None,
        )

    def conditions(
        self,
        condition_NC: np.ndarray,
        *,
        dose_N: np.ndarray | None = None,
        log_depth_N: np.ndarray | None = None,
        context_uniform_N: np.ndarray | None = None,
    ) -> Conditions:
        """Tell a denoiser about cells.

        Parameters
        ----------
        condition_NC
            Condition rows, int64, 0 = unknown.
        dose_N
            Standardised log doses; mean dose where not given.
        log_depth_N
            log library sizes to be had, NaN = open; all open where not given.
        context_uniform_N
            Uniforms in [0, 1) that choose the random parts of control cells, in training; without them contexts are of
            all control cells.

        Returns
        -------
        Conditions
            Tensors on the CPU.
        """
        field = self.perturbation_field
        if field is None or self.as_category:
            told = Conditions(torch.from_numpy(condition_NC))
        else:
            applied_NP = self.applied[condition_NC[:, field]]
            told = Conditions(
                torch.from_numpy(np.delete(condition_NC, field, axis=1)),
                torch.from_numpy(applied_NP),
                embedding_PQ=None if self.embedding_PQ is None else torch.from_numpy(self.embedding_PQ),
            )
            if self.dose_mean is not None and dose_N is not None:
                dose_NP = applied_NP * np.asarray(dose_N, dtype=np.float32)[:, None]
                told = replace(told, dose_BP=torch.from_numpy(dose_NP))
        if self.contexts is not None or self.effects is not None:
            opened_NC = self.states_open(condition_NC)
        if self.effects is not None:
            row_N = self.effects.rows(opened_NC)
            told = replace(told, effect=_profiles(self.effects.effect_KG[:, None], row_N))
        if self.contexts is not None:
            opened_NC[:, field] = 0
            row_N = self.contexts.rows(opened_NC, context_uniform_N)
            told = replace(told, context=_profiles(self.contexts.profile_KJG, row_N))
        if self.depths is not None:
            depth_N = np.full(len(condition_NC), np.nan) if log_depth_N is None else log_depth_N
            told = replace(told, depth_B=torch.from_numpy(np.asarray(depth_N, dtype=np.float32)))
        return told

    @cached_property
    def applied(self) -> np.ndarray:
        """Which perturbations each label of the perturbation field stands for, float32, (L + 1) × P; row 0 is none."""
        labels = self.vocabulary.fields[self.perturbation_key]
        return np.concatenate(
            [np.zeros((1, len(self.perturbations.names)), np.float32), self.perturbations.encode(labels)]
        )

    def is_perturbed(self, condition_NC: np.ndarray) -> np.ndarray:
        """Which condition rows are of perturbed cells, boolean, N."""
        label = self.vocabulary.fields[self.perturbation_key].index(self.perturbations.control) + 1
        return ~np.isin(condition_NC[:, self.perturbation_field], [0, label])

    def as_control(self, condition_NC: np.ndarray) -> np.ndarray:
        """Give the condition rows with the perturbation replaced by control."""
        field = self.perturbation_field
        control_NC = condition_NC.copy()
        control_NC[:, field] = 1 + self.vocabulary.fields[self.perturbation_key].index(self.perturbations.control)
        return control_NC

    def identity_names(self, condition_NC: np.ndarray) -> list[str]:
        """Name the identity of each condition row: its labels but state and perturbation, ``?`` where unknown."""
        field, first = self.perturbation_field, self.n_state_fields
        labels = [("?", *names) for names in self.vocabulary.fields.values()]
        return [
            " / ".join(labels[i][k] for i, k in enumerate(row) if i >= first and i != field)
            for row in np.asarray(condition_NC).tolist()
        ]

    def predict_effect(self, row_C: np.ndarray, control_profile: np.ndarray | None = None) -> PriorEffect:
        """Foretell the effect in a condition row; ``control_profile`` are the summed counts of control cells of an
        identity that training data do not have.
        """
        field = self.perturbation_field
        label = self.vocabulary.fields[self.perturbation_key][row_C[field] - 1]
        name = self.identity_names(row_C[None])[0]
        return self.prior.predict(label, name, control_profile, self.embeddings)

    def to_json(self) -> dict[str, Any]:
        """Give what is not a table as plain JSON types."""
        e = self.embeddings
        return {
            "embeddings": None if e is None else {"names": list(e.names), "source": e.source},
            "prior": None if self.prior is None else self.prior.to_arrays()[1],
            "vocabulary": self.vocabulary.to_json(),
            "perturbation_key": self.perturbation_key,
            "perturbations": None if self.perturbations is None else self.perturbations.to_json(),
            "dose_mean": self.dose_mean,
            "dose_sd": self.dose_sd,
            "as_category": self.as_category,
        }

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Give the tables; with :meth:`to_json` they make the conditioner anew."""
        arrays: dict[str, np.ndarray] = {}
        if self.embedding_PQ is not None:
            arrays["embedding"] = self.embedding_PQ
        tables = {"context": self.contexts, "effect": self.effects, "depth": self.depths, "states": self.states}
        for name, table in tables.items():
            if table is not None:
                arrays |= {f"{name}.{part.name}": getattr(table, part.name) for part in fields(table)}
        if self.embeddings is not None:
            arrays["embeddings"] = self.embeddings.matrix
        if self.prior is not None:
            arrays |= {f"prior.{part}": value for part, value in self.prior.to_arrays()[0].items()}
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}

    @classmethod
    def from_saved(cls, value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Conditioner":
        """Make the conditioner anew from what :meth:`to_json` and :meth:`to_tensors` gave, the latter perhaps with a
        tensor ``none``, as files of no tensors are not written.
        """
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if name != "none"}

        def table(kind: type, name: str) -> Any:
            parts = {key.split(".", 1)[1]: a for key, a in arrays.items() if key.startswith(f"{name}.")}
            return kind(**parts) if parts else None

        known, embeddings = value["perturbations"], value["embeddings"]
        prior = {key.split(".", 1)[1]: a for key, a in arrays.items() if key.startswith("prior.")}
        return cls(
            vocabulary=ConditionVocabulary.from_json(value["vocabulary"]),
            perturbation_key=value["perturbation_key"],
            perturbations=None if known is None else PerturbationVocabulary.from_json(known),
            dose_mean=value["dose_mean"],
            dose_sd=value["dose_sd"],
            embedding_PQ=arrays.get("embedding"),
            contexts=table(ContextTable, "context"),
            effects=table(EffectTable, "effect"),
            depths=table(DepthTable, "depth"),
            states=table(CellStates, "states"),
            embeddings=embeddings
            and GeneEmbeddings.of(embeddings["names"], arrays["embeddings"], embeddings["source"]),
            prior=PriorEffects.from_arrays(prior, value["prior"]) if prior else None,
            as_category=value.get("as_category", False),
        )


def scaled_rows(embeddings: GeneEmbeddings, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Look up embeddings, which have length 1 or so, scaled to numbers of size 1; and which names have one."""
    vectors, found = embeddings.rows(names)
    return vectors * np.float32(embeddings.n_dimensions**0.5), found


def standard_doses(dose_N: np.ndarray | None, condition_NC: np.ndarray, conditioner: Conditioner) -> np.ndarray | None:
    """Standardised log dose of each cell, 0 in control cells; ``None`` where doses are not read."""
    if conditioner.dose_mean is None:
        return None
    perturbed = conditioner.is_perturbed(condition_NC)
    standard = np.zeros(len(perturbed), dtype=np.float32)
    standard[perturbed] = (check_log_doses(dose_N[perturbed]) - conditioner.dose_mean) / conditioner.dose_sd
    return standard


def average_profile(counts: sparse.csr_matrix, overall_JG: np.ndarray | None = None) -> np.ndarray:
    """Average cells: share that detects each gene and mean log(1 + count), float32, 2 × G.

    ``overall_JG``, the average over all identities, counts like 4 more cells, so that no gene is certain to be silent.
    """
    detected = np.bincount(counts.indices, minlength=counts.shape[1])
    log_sum = np.bincount(counts.indices, weights=np.log1p(counts.data), minlength=counts.shape[1])
    sums, n_cells = np.stack([detected, log_sum]), counts.shape[0]
    if overall_JG is not None:
        sums, n_cells = sums + CELLS_OF_OVERALL * overall_JG, n_cells + CELLS_OF_OVERALL
    return (sums / max(n_cells, 1)).astype(np.float32)


def _rank(uniform_N: np.ndarray, n: np.ndarray | int) -> np.ndarray:
    """Uniforms in [0, 1] as places among n, int64."""
    return np.minimum((uniform_N * n).astype(np.int64), np.asarray(n) - 1)


def _profiles(table_KJG: np.ndarray, row_N: np.ndarray) -> Profiles:
    """Hand over only the rows that occur, so that a minibatch does not carry the whole table to the device."""
    rows, place = np.unique(row_N, return_inverse=True)
    rows = np.concatenate([[0], rows[rows > 0]])
    place = np.searchsorted(rows, row_N)
    return Profiles(torch.from_numpy(table_KJG[rows]), torch.from_numpy(place))
