"""Power-function averages of the weights over training (Karras et al. 2023, EDM2, arXiv 2312.02696, section 3.1)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def gamma_of(sigma_rel: float) -> float:
    """Exponent gamma of the power-function profile whose relative width is ``sigma_rel`` (0 < sigma_rel < 0.28).

    Solves sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)) for its positive root: .05 gives 16.97, .10 gives 6.94.
    """
    roots = np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2])
    return float(roots.real.max())


class PowerEma:
    """One average: at step t it holds the mean of all weights so far, weighted by (step / t)^gamma.

    Parameters
    ----------
    sigma_rel
        Width of the profile relative to training time; .05 looks at about the last tenth.
    parameters
        Named weights to start from.
    """

    def __init__(self, sigma_rel: float, parameters: Mapping[str, Tensor]) -> None:
        self.sigma_rel = sigma_rel
        self._gamma = gamma_of(sigma_rel)
        self.weights = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int, every: int = 1) -> None:
        """Take in the weights after optimiser step ``step`` (1, 2, …), ``every`` steps after the last time."""
        keep = max(0.0, 1 - every / step) ** (self._gamma + 1)
        news = [parameters[name].detach() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), news, 1 - keep)
