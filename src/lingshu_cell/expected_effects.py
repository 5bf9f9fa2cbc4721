"""Effects expected of conditions that no training cell has, added to what a denoiser is told."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lingshu_cell.conditioning import Conditioner, EffectTable


def with_expected_effects(
    conditioner: Conditioner, rows: np.ndarray, known_rows: np.ndarray, profile: np.ndarray | None = None
) -> tuple[Conditioner, Sequence[str]]:
    """Add the effects expected of condition rows that no training cell has.

    Parameters
    ----------
    conditioner
        That of the model.
    rows, known_rows
        Condition rows wanted, and those of the training cells.
    profile
        Summed counts of control cells of an identity that training data do not have.

    Returns
    -------
    tuple
        The conditioner with these effects, and what to tell of them.
    """
    if conditioner.effects is None or conditioner.prior is None:
        return conditioner, []
    table, known = conditioner.effects, {tuple(row) for row in conditioner.states_open(known_rows).tolist()}
    effects, added, notes = [], [], []
    for row in np.unique(conditioner.states_open(rows), axis=0):
        if tuple(row.tolist()) in known or not conditioner.is_perturbed(row[None])[0]:
            continue
        predicted = conditioner.predict_effect(row, profile)
        if not predicted.found:
            notes.append("no effect to expect: neither other identities nor embeddings tell of it")
            continue
        notes.append(f"expected effect from {predicted.source}; confidence {predicted.confidence:.2f}")
        effects.append(predicted.delta)
        added.append(row)
    if not added:
        return conditioner, notes
    extended = EffectTable(
        np.concatenate([table.effect_KG, np.stack(effects)]), np.concatenate([table.condition_KC, np.stack(added)])
    )
    return replace(conditioner, effects=extended), notes
