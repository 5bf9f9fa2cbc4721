"""What cells are asked for: labels, dose, depth, context, guidance and priors, checked against what a model knows.

Shapes: R condition rows, C condition fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from lingshu_cell.arguments import mapping
from lingshu_cell.conditioning import (
    LEAST_CONTEXT_CELLS,
    Conditioner,
    ContextTable,
    average_profile,
    scaled_rows,
)
from lingshu_cell.data.anndata_io import CountMatrix, read_counts
from lingshu_cell.data.perturbations import check_log_doses
from lingshu_cell.data.vocabulary import ConditionVocabulary, GeneVocabulary, align_genes, apply_alignment
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.expected_effects import with_expected_effects
from lingshu_cell.tokens import STATE_FIELDS

UNSEEN = ("error", "embedding")


@dataclass(frozen=True, eq=False)
class Request:
    """Conditions to generate under.

    Attributes
    ----------
    conditioner
        That of the model, extended by what the request brings along: labels, a context, an expected effect.
    rows, probabilities
        Condition rows to draw from, R × C, and how often.
    standard_dose
        Standardised log dose; ``None`` = mean dose.
    log_depth
        log library size of every cell; NaN = drawn from the library sizes of training cells like these; ``None`` =
        open.
    notes
        What a user should know: combinations and effects that no training cell shows, and how far to trust them.
    """

    conditioner: Conditioner
    rows: np.ndarray
    probabilities: np.ndarray
    standard_dose: float | None = None
    log_depth: float | None = None
    notes: tuple[str, ...] = field(default=())


def resolve_request(
    conditioner: Conditioner,
    known_rows: np.ndarray,
    known_counts: np.ndarray,
    condition: Mapping[str, str],
    *,
    genes: GeneVocabulary,
    modelled: np.ndarray,
    min_coverage: float,
    dose: float | None = None,
    depth: float | str | None = None,
    context: Path | str | ad.AnnData | None = None,
    unseen: str = "error",
    layer: str | None = None,
) -> Request:
    """Check what is asked for, and extend the conditioner by what is new in it.

    Parameters
    ----------
    conditioner
        That of the model.
    known_rows, known_counts
        Condition rows of the training cells, and in how many cells each occurs.
    condition
        Wanted label of some fields. A combination of known perturbations is allowed whether it was seen or not. Fields
        left open are drawn, jointly, from the training cells that match, or else from control cells that do.
    genes, modelled, min_coverage
        The model's genes, and the least share of them that a context must have.
    dose
        Dose of the perturbation in the unit of training.
    depth
        UMI per cell (of the modelled genes); ``"model"`` draws it from training cells of these conditions, the default
        of a model trained with depth; ``"open"`` leaves it to the network.
    context
        Control cells of the identity wanted: an AnnData, file or URL. Identity labels may then be left out.
    unseen
        ``"embedding"`` lets a perturbation that was never trained be told by its embedding; ``"error"`` refuses it.
    layer
        Layer with the counts of the context; ``X`` when not given.

    Raises
    ------
    LingshuError
        On labels, doses, depths or contexts that the model cannot be asked for.
    """
    if unseen not in UNSEEN:
        raise LingshuError("The policy for unseen perturbations must exist", f"'{unseen}'", f"Choose {UNSEEN}")
    condition = mapping(condition, "A condition", '{"cell_type": "B cells"}')
    condition = {str(key): str(value) for key, value in condition.items()}
    conditioner, notes = _with_label(conditioner, condition, unseen)
    wanted = conditioner.vocabulary.encode(dict(condition), 1)[0]
    profile = None
    if context is not None:
        cells = read_counts(context, layer)
        conditioner, profile = _with_context(conditioner, wanted, cells, genes, modelled, min_coverage, notes)
        rows, probabilities = wanted[None], np.ones(1)
    else:
        rows, probabilities = _matching_rows(conditioner, known_rows, known_counts, wanted, condition, notes)
    conditioner, of_effects = with_expected_effects(conditioner, rows, known_rows, profile)
    notes += of_effects
    return Request(
        conditioner,
        rows,
        probabilities,
        _standard_dose(conditioner, dose),
        _log_depth(conditioner, depth),
        tuple(notes),
    )


def _with_label(conditioner: Conditioner, condition: dict[str, str], unseen: str) -> tuple[Conditioner, list[str]]:
    """Add a perturbation label that no training cell has, a combination of known parts or one with an embedding; or put
    the label of training cells in its place if only the order of its parts differs.
    """
    key = conditioner.perturbation_key
    label = condition.get(key) if key else None
    if label is None or conditioner.as_category or label in conditioner.vocabulary.fields[key]:
        return conditioner, []
    parts = conditioner.perturbations.parts(label)
    for known in conditioner.vocabulary.fields[key]:
        if set(conditioner.perturbations.parts(known)) == set(parts):  # B+A is A+B
            condition[key] = known
            return conditioner, [f"{label} is {known} of the training cells"]
    new = [part for part in parts if part not in conditioner.perturbations.names]
    notes = []
    if new:
        conditioner = _with_perturbations(conditioner, new, unseen)
        notes.append(f"{offenders(new)} was never trained: told by its embedding")
    if len(parts) > 1:
        notes.append(f"the combination {label} was not in training: told as its parts together")
    fields = {**conditioner.vocabulary.fields, key: (*conditioner.vocabulary.fields[key], label)}
    return replace(conditioner, vocabulary=ConditionVocabulary(fields)), notes


def _with_perturbations(conditioner: Conditioner, new: Sequence[str], unseen: str) -> Conditioner:
    known = conditioner.perturbations
    if unseen == "error":
        has = "" if conditioner.embedding_PQ is None else ", or allow embeddings to stand in (--unseen embedding)"
        raise LingshuError(
            "Perturbations must be among those the model was trained on",
            f"it does not know {offenders(new)}",
            f"Known: {offenders(known.names)}{has}",
        )
    if conditioner.embeddings is None:
        raise LingshuError(
            "An unseen perturbation needs a model trained with embeddings",
            f"this one has none for {offenders(new)}",
            "Train with data.embeddings",
        )
    rows, found = scaled_rows(conditioner.embeddings, new)
    if not found.all():
        raise LingshuError(
            "An unseen perturbation needs an embedding",
            f"there is none of {offenders(name for name, there in zip(new, found, strict=True) if not there)}",
            f"Embeddings are from {conditioner.embeddings.source}; train with a file that has it",
        )
    return replace(
        conditioner,
        perturbations=known.extended(new),
        embedding_PQ=np.concatenate([conditioner.embedding_PQ, rows]),
    )


def _with_context(
    conditioner: Conditioner,
    wanted: np.ndarray,
    cells: CountMatrix,
    genes: GeneVocabulary,
    modelled: np.ndarray,
    min_coverage: float,
    notes: list[str],
) -> tuple[Conditioner, np.ndarray]:
    """Put the average of control cells in the place of an identity; also give their summed counts, NaN of genes that
    are not in them.
    """
    if conditioner.contexts is None:
        raise LingshuError(
            "A context needs a model trained with contexts",
            "this one was not",
            "Train with data.perturbation_key and data.context",
        )
    field = conditioner.perturbation_field
    if wanted[field] == 0:
        raise LingshuError(
            "With a context, the perturbation must be given",
            f"no {conditioner.perturbation_key} is asked for",
            f"Add it as a condition; control cells are {conditioner.perturbations.control!r}",
        )
    if cells.n_cells < LEAST_CONTEXT_CELLS:
        raise LingshuError(
            f"A context needs {LEAST_CONTEXT_CELLS} control cells or more", f"{cells.n_cells}", "Pass more cells"
        )
    if conditioner.perturbation_key in cells.obs:
        labels = cells.obs[conditioner.perturbation_key].astype(str)
        others = sorted(set(labels) - {conditioner.perturbations.control})
        if others:
            raise LingshuError(
                "A context holds control cells only", f"it also has {offenders(others)}", "Take the others out"
            )
    alignment = align_genes(genes, list(cells.gene_names), cells.var, min_coverage=min_coverage)
    counts, present = apply_alignment(cells.counts, alignment)
    profile_JG = average_profile(counts[:, modelled], conditioner.contexts.profile_KJG[0])
    profile_JG[:, ~present[modelled]] = np.nan  # not measured: tells nothing
    identity = conditioner.states_open(wanted[None])[0]
    identity[field] = 0
    table = conditioner.contexts
    extended = ContextTable(
        np.concatenate([table.profile_KJG, profile_JG[None]]),
        np.concatenate([table.identity_IC[(table.identity_IC != identity).any(1)], identity[None]]),
        np.concatenate([table.first_I[(table.identity_IC != identity).any(1)], [len(table.profile_KJG)]]),
        np.concatenate([table.n_I[(table.identity_IC != identity).any(1)], [1]]),
    )
    notes.append(f"identity told by {cells.n_cells:,} control cells; {alignment.coverage:.0%} of the genes are in them")
    sum_G = np.asarray(counts[:, modelled].sum(0), dtype=np.float64).ravel()
    return replace(conditioner, contexts=extended), np.where(present[modelled], sum_G, np.nan)


def _matching_rows(
    conditioner: Conditioner,
    known_rows: np.ndarray,
    known_counts: np.ndarray,
    wanted: np.ndarray,
    condition: Mapping[str, str],
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Condition rows to draw from and their probabilities.

    What is left open is drawn from the training cells that are as wanted. Where there are none, as under a perturbation
    never measured there, it is drawn from the control cells that are, and where labels are open the notes say so; where
    there are none either, states stay open.
    """
    given = wanted > 0
    if given.all() and len(wanted):
        return wanted[None], np.ones(1)
    match = _agreeing(known_rows, wanted)
    if match.any():
        counts = known_counts[match]
        return known_rows[match], counts / counts.sum()
    if conditioner.perturbation_key is not None and given[conditioner.perturbation_field]:
        match = _agreeing(known_rows, conditioner.as_control(wanted[None])[0])
    said = ", ".join(f"{key}={value}" for key, value in condition.items())
    fields = zip(conditioner.vocabulary.fields, given, strict=True)
    open_labels = [name for name, known in fields if not known and name not in STATE_FIELDS]
    if match.any():
        if open_labels:
            notes.append(f"{offenders(open_labels)}: drawn as in control cells, as no training cell has {said}")
        rows, counts = known_rows[match].copy(), known_counts[match]
        rows[:, conditioner.perturbation_field] = wanted[conditioner.perturbation_field]
        return rows, counts / counts.sum()
    if not open_labels:
        return wanted[None], np.ones(1)  # states stay open
    raise LingshuError(
        "Fields left open are drawn from the training cells that match the given ones",
        f"no training cell has {said}",
        f"Give every field: {offenders(conditioner.vocabulary.fields)}",
    )


def _agreeing(known_rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which known rows are as wanted in all that is given."""
    given = wanted > 0
    return (known_rows[:, given] == wanted[given]).all(1)


def _standard_dose(conditioner: Conditioner, dose: float | None) -> float | None:
    if dose is None:
        return None
    if conditioner.dose_mean is None:
        raise LingshuError("A dose needs a model trained with doses", "this one was not", "Train with data.dose_key")
    return float((check_log_doses(np.array([dose]))[0] - conditioner.dose_mean) / conditioner.dose_sd)


def _log_depth(conditioner: Conditioner, depth: float | str | None) -> float | None:
    if depth == "open" or (depth is None and conditioner.depths is None):
        return None
    if conditioner.depths is None:
        raise LingshuError(
            "A depth needs a model trained with depth", "this one was not", "Train without data.depth=false"
        )
    if depth in (None, "model"):
        return float("nan")
    try:
        value = float(depth)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value >= 1):
        raise LingshuError(
            "The depth must be UMI per cell, 'model' or 'open'", f"{depth!r}", "Write for example --depth 5000"
        )
    return float(np.log(value))


def describe_request(request: Request) -> dict[str, Any]:
    """Give dose and depth asked for as text and numbers, for ``uns``."""
    described: dict[str, Any] = {}
    if request.standard_dose is not None:
        described["standard_log_dose"] = request.standard_dose
    if request.log_depth is not None:
        described["depth"] = "model" if np.isnan(request.log_depth) else float(np.exp(request.log_depth))
    return described
