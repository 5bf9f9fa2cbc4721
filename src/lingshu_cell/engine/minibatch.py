"""The random numbers of one optimiser step, and what one process computes of it.

Every random number belongs to a place in the minibatch. Each process draws the few numbers per cell for the whole
minibatch, and masks for its own places, so a cell is hidden and told the same however many processes there are.

Shapes: B cells of the minibatch, or of this process's share; G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lingshu_cell.config import TrainingConfig
from lingshu_cell.diffusion.noising import MaskLaw, hide_by_place
from lingshu_cell.network.conditions import Conditions


@dataclass(frozen=True)
class StepDraws:
    """Random numbers of a step; those of a cell are at its place.

    Attributes
    ----------
    seed, step
        Of the run, and which step.
    visible_B, weight_B
        Visible share and weight of each cell.
    keeps_B4
        Uniforms that decide which conditions a cell is told: any, its identity, its library size; the last chooses its
        context.
    keeps_state_B
        Uniforms that decide whether a cell is told its state.
    """

    seed: int
    step: int
    visible_B: Tensor
    weight_B: Tensor
    keeps_B4: Tensor
    keeps_state_B: Tensor

    @staticmethod
    def of(step: int, n_cells: int, n_genes: int, law: MaskLaw, seed: int, device: torch.device) -> "StepDraws":
        """Draw for a whole minibatch: a function of seed and step alone."""
        generator = torch.Generator(device).manual_seed(step_seed(seed, step))
        visible_B, weight_B = law.draw(n_cells, n_genes, generator)
        keeps_B4 = torch.rand(n_cells, 4, generator=generator, device=device)
        keeps_state_B = torch.rand(n_cells, generator=generator, device=device)
        return StepDraws(seed, step, visible_B, weight_B, keeps_B4, keeps_state_B)

    def __len__(self) -> int:
        return len(self.visible_B)

    def context_uniforms(self, rows: slice) -> np.ndarray:
        """Uniforms that choose the contexts of some cells, float64."""
        return self.keeps_B4[rows, 3].double().cpu().numpy()

    def thinned(
        self, conditions: Conditions, rows: slice, settings: TrainingConfig, n_state_fields: int = 0
    ) -> Conditions:
        """Forget conditions of some cells: all of them, so that each may be left open; the identity labels, so that
        their context alone must tell; the library size; and the cell state, which the first fields say.
        """
        any_B, identity_B, depth_B, _ = self.keeps_B4[rows].unbind(1)
        conditions = conditions.only(any_B >= settings.condition_dropout)
        if conditions.context is not None:
            kept_B = identity_B >= settings.identity_dropout
            conditions = conditions.without_categories(kept_B | ~conditions.context.known())
        if conditions.depth_B is not None:
            conditions = conditions.without_depth(depth_B >= settings.depth_dropout)
        return conditions.without_categories(self.keeps_state_B[rows] >= settings.state_dropout, n_state_fields)

    def hide(self, x_0_BG: Tensor, first: int) -> Tensor:
        """Hide genes of the cells from place ``first`` on."""
        visible_B = self.visible_B[first : first + len(x_0_BG)]
        return hide_by_place(x_0_BG, visible_B, lambda tile: step_seed(self.seed, self.step, tile), first)


@dataclass(frozen=True)
class Share:
    """Cells that one process computes in a step.

    Attributes
    ----------
    first
        Place of the first in the minibatch.
    x_0_BG, conditions
        The cells, and what the network is told of them.
    draws
        The random numbers of the whole minibatch.
    """

    first: int
    x_0_BG: Tensor
    conditions: Conditions
    draws: StepDraws

    def __len__(self) -> int:
        return len(self.x_0_BG)

    def part(self, rows: slice) -> "Share":
        """Give some of the cells."""
        start = rows.indices(len(self))[0]
        return replace(self, first=self.first + start, x_0_BG=self.x_0_BG[rows], conditions=self.conditions.rows(rows))

    @property
    def weight_B(self) -> Tensor:
        """Weight of each cell's cross-entropy in the bound."""
        rows = slice(self.first, self.first + len(self))
        return self.draws.weight_B[rows] / (1 - self.draws.visible_B[rows])


def parts_of(rows: slice, n_parts: int) -> list[slice]:
    """Cut rows into parts that differ by one row at most; some are empty if there are more parts than rows."""
    edges = [rows.start + (rows.stop - rows.start) * i // n_parts for i in range(n_parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def step_seed(*numbers: int) -> int:
    """A seed for what the numbers name, so that a resumed run draws the masks an undisturbed one would."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def first_rows(parts: Sequence[slice]) -> list[slice]:
    """Replace empty parts by the first row, for processes that must compute equally often."""
    return [part if part.start < part.stop else slice(0, 1) for part in parts]
