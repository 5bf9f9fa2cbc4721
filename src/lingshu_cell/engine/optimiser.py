"""AdamW, its learning rate and its gradient clipping; its state as named tensors."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lingshu_cell.config import TrainingConfig


def learning_rate(step: int, settings: TrainingConfig, share_of_time: float = 0.0) -> float:
    """Learning rate of optimiser step 0, 1, …: linear warm-up, then a cosine from the peak to the final rate.

    The cosine follows the share of the steps that is done or, if that is further on, the share of ``max_seconds``.
    """
    if step < settings.warmup_steps:
        return settings.peak_learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(max(share, share_of_time), 1.0))) / 2
    return settings.final_learning_rate + (settings.peak_learning_rate - settings.final_learning_rate) * cosine


def build_optimiser(parts: Mapping[str, Tensor], settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [p for name, p in parts.items() if p.dim() >= 2 and "bias" not in name]
    others = [p for name, p in parts.items() if p.dim() < 2 or "bias" in name]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.peak_learning_rate, betas=settings.betas, fused=True
    )


@torch.no_grad()
def clip(parts: Mapping[str, Tensor], most: float, total_square: Callable[[Tensor], Tensor]) -> float:
    """Scale gradients down to a global norm of at most ``most``; gives the norm before.

    Parameters
    ----------
    parts
        What this process holds of each parameter, with gradients.
    most
        The largest norm.
    total_square
        From the squared norm of this process's parts to that of the whole parameters.
    """
    gradients = [p.grad for p in parts.values() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    norm = total_square(square).sqrt()
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp_max(1.0))
    return float(norm)


def optimiser_tensors(optimiser: torch.optim.Optimizer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the state of each parameter under ``name/key``."""
    return {f"{name}/{key}": value for name, p in parts.items() for key, value in optimiser.state.get(p, {}).items()}


def restore_optimiser(
    optimiser: torch.optim.Optimizer,
    parts: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    cut: Callable[[Tensor], Tensor],
) -> None:
    """Take back what :func:`optimiser_tensors` gave; ``cut`` gives this process's part of a whole tensor."""
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        place = value if key == "step" else cut(value).clone()
        optimiser.state[parts[name]][key] = place.to(parts[name].device)
