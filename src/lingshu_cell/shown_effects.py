"""Foretold effects, told so strongly that a network shows them whole.

Of an effect that it is told a network shows a part, .8 to .95 (docs/log.md), as those of training are noisy. Where no
training cell has a condition, the effect is all that it knows of it: then what is shown should be what is foretold.

Shapes: A conditions that no training cell has, G modelled genes, V tokens.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from lingshu_cell.conditioning import Conditioner, EffectTable
from lingshu_cell.network.distribution import Denoiser
from lingshu_cell.network.stated_means import stated_log_shares
from lingshu_cell.tokens import EFFECT_PSEUDOCOUNT

_ROUNDS = 2  # what is shown is nearly linear in what is told
_STRENGTHS = (1.0, 2.0)  # effects are shrunk by their noise: never told more weakly
_LEAST_SHOWN = 0.1
_ROWS_AT_ONCE = 32


def with_effects_shown(
    conditioner: Conditioner, n_known: int, denoiser: Denoiser, count_V: Tensor
) -> tuple[Conditioner, list[str]]:
    """Tell foretold effects as strongly as it takes for the mean of every gene, all genes hidden, to change by them.

    Parameters
    ----------
    conditioner
        With the effects foretold of conditions that no training cell has.
    n_known
        How many effects it had before, those of the training cells and *none*; they stay.
    denoiser
        The network.
    count_V
        Count that each token stands for, on the network's device.

    Returns
    -------
    tuple
        The conditioner, and what to tell of it. With doses nothing is changed: an effect is foretold for the mean dose.
    """
    table = conditioner.effects
    if table is None or len(table.effect_KG) == n_known or conditioner.dose_mean is not None:
        return conditioner, []
    row_AC, told_AG = table.condition_KC[n_known:], table.effect_KG[n_known:].astype(np.float64)
    strength_A = np.ones(len(row_AC))
    asked_AG = np.where(_own_genes(conditioner, row_AC), 0.0, told_AG)
    square_A = np.maximum((asked_AG**2).sum(1), 1e-12)
    none_1G, none_1C = table.effect_KG[:1], table.condition_KC[:1]
    effect_AG = table.effect_KG[n_known:]
    for _ in range(_ROUNDS):
        foretold = EffectTable(np.concatenate([none_1G, effect_AG]), np.concatenate([none_1C, row_AC]))
        shown_AG = _shown(replace(conditioner, effects=foretold), row_AC, denoiser, count_V)
        share_A = np.maximum((asked_AG * shown_AG).sum(1) / square_A, _LEAST_SHOWN)
        strength_A = np.clip(strength_A / share_A, *_STRENGTHS)
        effect_AG = (told_AG * strength_A[:, None]).astype(np.float32)
    effect_KG = np.concatenate([table.effect_KG[:n_known], effect_AG])
    conditioner = replace(conditioner, effects=replace(table, effect_KG=effect_KG))
    low, high = (f"{strength:.2f}" for strength in (strength_A.min(), strength_A.max()))
    return conditioner, [f"told {low if low == high else f'{low} to {high}'} times as strongly, so that it shows whole"]


def _own_genes(conditioner: Conditioner, row_AC: np.ndarray) -> np.ndarray:
    """Which genes a perturbation is named after, A × G: the fall of a knocked-out gene would outweigh all others."""
    labels = conditioner.vocabulary.fields[conditioner.perturbation_key]
    own_AG = np.zeros((len(row_AC), conditioner.prior.n_genes), dtype=bool)
    for own_G, row in zip(own_AG, row_AC, strict=True):
        parts = conditioner.perturbations.parts(labels[row[conditioner.perturbation_field] - 1])
        own_G[[gene for part in parts if (gene := conditioner.prior.own_gene(part)) >= 0]] = True
    return own_AG


def _shown(conditioner: Conditioner, row_AC: np.ndarray, denoiser: Denoiser, count_V: Tensor) -> np.ndarray:
    """Log fold change of every gene against control in the means of a network that sees nothing, A × G."""

    def log_shares(row_BC: np.ndarray, deep_as_BC: np.ndarray) -> np.ndarray:
        depth_B = None  # the median library size of the condition, for control too
        if conditioner.depths is not None:
            depth_B = conditioner.depths.draw(deep_as_BC, np.full(len(row_BC), 0.5), conditioner.perturbation_field)
        conditions = conditioner.conditions(row_BC, log_depth_N=depth_B).to(count_V.device)
        return stated_log_shares(denoiser, conditions, conditioner.prior.n_genes, count_V, EFFECT_PSEUDOCOUNT)

    pieces = np.array_split(row_AC, -(-len(row_AC) // _ROWS_AT_ONCE))
    return np.concatenate([log_shares(row, row) - log_shares(conditioner.as_control(row), row) for row in pieces])
