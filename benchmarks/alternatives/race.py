"""Train several networks turn by turn in one process, so that the machine's noise hits all alike, and note the
held-out bound against steps and CPU seconds.

Shapes: B cells, G genes, C conditions.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alternatives.masks import Estimate, product_masks
from alternatives.optimisers import Optimisers, adamw
from lingshu_cell.data.training_set import TrainingSet, minibatch_cells
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.ema import PowerEma

_FINAL_RATE, _WARMUP_STEPS, _CLIP_NORM = 0.05, 50, 1.0  # the rates' ratio, warm-up and clipping of the product
_TURN_SECONDS = 2.0  # CPU seconds of a turn, about
_VALIDATION_MASKS = 2
_VALIDATION_PIECE = 90
SIGMAS = (0.05, 0.10)
_EXACT_HALF_LOG = product_masks(MaskLaw(0.5, 1.0))


@dataclass(frozen=True)
class Recipe:
    """What one runner of a race is made of.

    Attributes
    ----------
    name
        Row of the table.
    build
        From training cells and a seed to a network that has been started at the token frequencies.
    steps, cpu_seconds
        Its end: after so many optimiser steps, or after so many CPU seconds of training; the learning rate follows.
    estimate
        Draws masks and gives the loss, nats per cell.
    optimisers
        AdamW or another.
    peak_learning_rate
        After warm-up of 50 steps (or a tenth of the steps if that is less).
    minibatch_size
        Cells per step.
    seed
        Of initial weights, minibatches and masks.
    """

    name: str
    build: Callable[[TrainingSet, int], nn.Module]
    steps: int | None = None
    cpu_seconds: float | None = None
    estimate: Estimate = _EXACT_HALF_LOG
    optimisers: Optimisers = adamw
    peak_learning_rate: float = 2e-3
    minibatch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One validation: after how much training, and the bound under each average and under the last weights."""

    step: int
    cpu_seconds: float
    cell_visits: int
    training_loss: float
    nelbo: dict[str, float]


class Runner:
    """One network in training."""

    def __init__(self, recipe: Recipe, cells: TrainingSet, n_held_out: int) -> None:
        self.recipe, self.cells = recipe, cells
        self.held_out = cells.validation[:: max(len(cells.validation) // n_held_out, 1)]
        self.network = recipe.build(cells, recipe.seed)
        self.parameters = dict(self.network.named_parameters())
        self.optimisers = recipe.optimisers(self.parameters, recipe.peak_learning_rate)
        self.averages = [PowerEma(sigma, self.parameters) for sigma in SIGMAS]
        self.step, self.cpu_seconds, self.loss = 0, 0.0, math.nan
        self.points: list[Point] = []
        self.flops_per_cell = self._count_flops()

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        recipe = self.recipe
        by_steps = self.step / recipe.steps if recipe.steps else 0.0
        return max(by_steps, self.cpu_seconds / recipe.cpu_seconds if recipe.cpu_seconds else 0.0)

    def turn(self, seconds: float, until_share: float) -> None:
        """Train for some CPU seconds, not beyond a share of the budget."""
        end = self.cpu_seconds + seconds
        while self.cpu_seconds < end and self.share < until_share:
            start = time.process_time()
            self._optimise()
            self.cpu_seconds += time.process_time() - start

    def validate(self, weights: Sequence[str]) -> Point:
        """Measure the bound on held-out cells, always the same ones under the same masks."""
        nelbo = {name: self._nelbo(name) for name in weights}
        visits = self.step * self.recipe.minibatch_size
        self.points.append(Point(self.step, self.cpu_seconds, visits, self.loss, nelbo))
        return self.points[-1]

    def to_json(self) -> dict[str, Any]:
        """Everything measured, JSON values."""
        recipe = self.recipe
        return {
            "name": recipe.name,
            "steps": recipe.steps,
            "cpu_seconds": recipe.cpu_seconds,
            "peak_learning_rate": recipe.peak_learning_rate,
            "minibatch_size": recipe.minibatch_size,
            "seed": recipe.seed,
            "n_parameters": sum(p.numel() for p in self.parameters.values()),
            "training_flops_per_cell": self.flops_per_cell,
            "cpu_seconds_per_step": self.cpu_seconds / max(self.step, 1),
            "points": [asdict(point) for point in self.points],
        }

    def _optimise(self) -> None:
        recipe, rate = self.recipe, self._learning_rate()
        chosen = minibatch_cells(self.cells.train, recipe.minibatch_size, self.step, recipe.seed)
        self.network.train()
        nelbo_B = self._estimate(chosen)
        loss = nelbo_B.mean()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate
        (loss / self.cells.tokens.shape[1]).backward()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), _CLIP_NORM)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        for average in self.averages:
            average.update(self.parameters, self.step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{recipe.name}: the loss is {value} at step {self.step}")
        self.loss = value if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * value

    def _estimate(self, chosen: np.ndarray) -> Tensor:
        seed = int(np.random.SeedSequence([self.recipe.seed, self.step]).generate_state(1)[0])
        x_0_BG, condition_BC = self._tensors(chosen)
        return self.recipe.estimate(self.network, x_0_BG, condition_BC, torch.Generator().manual_seed(seed))

    def _learning_rate(self) -> float:
        peak, recipe = self.recipe.peak_learning_rate, self.recipe
        warmup = min(_WARMUP_STEPS, recipe.steps // 10) if recipe.steps else _WARMUP_STEPS
        share = self.share
        if recipe.cpu_seconds and share < 0.1:  # in a budget of seconds, warm up in steps or in a tenth of it
            warmup = min(warmup, self.step / max(share, 1e-9) * 0.1 + 1)
        if self.step < warmup:
            return peak * (self.step + 1) / (warmup + 1)
        cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
        return peak * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    @torch.no_grad()
    def _nelbo(self, weights: str) -> float:
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        if weights != "last":
            self._put(self.averages[SIGMAS.index(float(weights))].weights)
        self.network.eval()
        generator, nelbo = torch.Generator().manual_seed(0), []
        for piece in np.array_split(self.held_out, max(len(self.held_out) // _VALIDATION_PIECE, 1)):
            nelbo += validation_nelbo(self.network, *self._tensors(piece), generator, _VALIDATION_MASKS).tolist()
        self._put(own)
        return float(np.mean(nelbo))

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def _tensors(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.cells.rows(chosen).tokens_BG), torch.from_numpy(self.cells.condition_NC[chosen])

    def _count_flops(self) -> float:
        """Matrix products of one training step per cell, the optimiser's left out; also warms up the allocator."""
        chosen = minibatch_cells(self.cells.train, self.recipe.minibatch_size, 0, self.recipe.seed)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
            (self._estimate(chosen).mean() / self.cells.tokens.shape[1]).backward()
        for parameter in self.parameters.values():
            parameter.grad = None
        return counter.get_total_flops() / len(chosen)


def race(
    recipes: Sequence[Recipe],
    cells: TrainingSet,
    shares: Sequence[float],
    weights: Callable[[float], Sequence[str]],
    log: Path,
    say: Callable[[str], None],
    n_held_out: int = 1_000,
) -> list[dict[str, Any]]:
    """Train all recipes turn by turn and validate each at shares of its budget.

    Parameters
    ----------
    recipes
        The runners; all are held in memory at once.
    cells
        The same for all.
    shares
        Rising, the last 1: when to validate.
    weights
        Which weights to validate at a share: ``last``, ``0.05``, ``0.1``.
    log
        JSON file that is written after every validation, so that a stopped race loses little.
    say
        Told of every validation.
    n_held_out
        About so many of the validation cells are used, or all if there are fewer.

    Returns
    -------
    list of dict
        One per recipe, see :meth:`Runner.to_json`.
    """
    runners = [Runner(recipe, cells, n_held_out) for recipe in recipes]
    for share in shares:
        active = list(runners)
        while active:
            for runner in active:
                runner.turn(_TURN_SECONDS, share)
            active = [runner for runner in active if runner.share < share]
        for runner in runners:
            point = runner.validate(weights(share))
            bounds = ", ".join(f"{name} {value:.1f}" for name, value in point.nelbo.items())
            say(f"{runner.recipe.name}: step {point.step}, {point.cpu_seconds:.0f} CPU s, NELBO {bounds}")
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(json.dumps([r.to_json() for r in runners], indent=1) + "\n", encoding="utf-8")
    return [runner.to_json() for runner in runners]


def crossing(points: Sequence[dict[str, Any]], target: float, weights: str, axis: str) -> float | None:
    """Where the bound first reaches a target, interpolated between validations; None if it never does.

    Parameters
    ----------
    points
        ``points`` of a runner.
    target
        Nats per cell.
    weights
        Which bound.
    axis
        ``step`` or ``cpu_seconds``.
    """
    known = [(point[axis], point["nelbo"][weights]) for point in points if weights in point["nelbo"]]
    for (x_0, y_0), (x_1, y_1) in pairwise(known):
        if y_0 > target >= y_1:
            return x_0 + (x_1 - x_0) * (y_0 - target) / (y_0 - y_1)
    return known[0][0] if known and known[0][1] <= target else None


def _attention_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """2 · 2 · queries · keys · width per head: q·k and weights·v."""
    *many, queries, width = q
    return 4 * math.prod(many) * queries * k[-2] * width


def _attention_backward_flops(grad: Any, q: Any, k: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """As PyTorch counts it on a GPU: 5 products for the 2 of the forward pass."""
    return _attention_flops(q, k, None) * 5 // 2


_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
