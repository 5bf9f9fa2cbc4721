"""AdamW as train.py sets it up, and Muon for the matrices with AdamW for the rest."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

Optimisers = Callable[[Mapping[str, nn.Parameter], float], list[torch.optim.Optimizer]]
"""From named parameters and a peak learning rate to optimisers whose ``lr`` the race sets at every step."""

_BETAS, _WEIGHT_DECAY = (0.9, 0.95), 0.02  # the product's defaults
_CODES = "head.gene_GE"


def adamw(parameters: Mapping[str, nn.Parameter], peak: float) -> list[torch.optim.Optimizer]:
    """AdamW that decays matrices and leaves biases and norms alone, as in the product.

    Parameters
    ----------
    parameters
        All weights by name.
    peak
        Learning rate to start from.
    """
    matrices = [p for name, p in parameters.items() if _is_matrix(name, p)]
    others = [p for name, p in parameters.items() if not _is_matrix(name, p)]
    groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, betas=_BETAS, fused=True)]


def muon(parameters: Mapping[str, nn.Parameter], peak: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the linear maps of trunk and head, AdamW for the gene codes and the rest.

    The step is scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that learning rate
    and weight decay mean the same for both.
    """
    return _split(parameters, peak, with_codes=False)


def muon_and_codes(parameters: Mapping[str, nn.Parameter], peak: float) -> list[torch.optim.Optimizer]:
    """As :func:`muon`, with the gene codes G × E under Muon too."""
    return _split(parameters, peak, with_codes=True)


def _split(parameters: Mapping[str, nn.Parameter], peak: float, with_codes: bool) -> list[torch.optim.Optimizer]:
    chosen = {name: p for name, p in parameters.items() if _is_linear_map(name, p) or (with_codes and name == _CODES)}
    rest = {name: p for name, p in parameters.items() if name not in chosen}
    maps = torch.optim.Muon(
        list(chosen.values()), lr=peak, weight_decay=_WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [maps, *adamw(rest, peak)]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and "bias" not in name


def _is_linear_map(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 and name.endswith(".weight") and "norm" not in name and "condition" not in name
