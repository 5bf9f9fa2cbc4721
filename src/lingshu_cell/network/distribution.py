"""What every denoiser answers: for each hidden gene, a categorical distribution over the 281 expression tokens.

Shapes: B cells, G genes, M asked-for positions (pairs of a cell and a gene), V = 281 tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """M pairs of a cell (row of the minibatch) and a gene.

    Attributes
    ----------
    cell_M, gene_M
        int64 indices, cells in rising order.
    """

    cell_M: Tensor
    gene_M: Tensor

    @staticmethod
    def where(chosen_BG: Tensor) -> "Positions":
        """Give the positions at which a boolean matrix is true."""
        return Positions(*torch.nonzero(chosen_BG, as_tuple=True))

    def __len__(self) -> int:
        return len(self.cell_M)

    def __getitem__(self, keep_M: Tensor) -> "Positions":
        return Positions(self.cell_M[keep_M], self.gene_M[keep_M])

    def of(self, values_BG: Tensor) -> Tensor:
        """Read a matrix at the positions."""
        return values_BG[self.cell_M, self.gene_M]


class CountDistribution(ABC):
    """Independent categorical distributions p(x_g | visible genes, conditions), one for each cell and gene."""

    @abstractmethod
    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """Negative log-likelihood of the true tokens, summed over the scored genes of each cell.

        Parameters
        ----------
        x_0_BG
            True expression tokens; ``MASK_TOKEN`` is allowed where not scored.
        scored_BG
            Boolean: which genes count.

        Returns
        -------
        Tensor
            Nats per cell, float32, shape B.
        """

    @abstractmethod
    def log_probabilities(self, positions: Positions) -> Tensor:
        """Normalised log-probabilities of all tokens at the positions, float32, shape M × V."""

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """Draw a token at each position from the plain categorical, by inverse distribution function in fp32.

        Parameters
        ----------
        positions
            Where to draw.
        uniform_M2
            Two independent uniforms in [0, 1) for each position: the first decides zero or not, the second the value.

        Returns
        -------
        Tensor
            Expression tokens, int64, shape M.
        """
        return draw_tokens(self.log_probabilities(positions), uniform_M2)


Denoise = Callable[[Tensor, Tensor], CountDistribution]
"""A denoising function: ``denoise(x_t_BG, condition_BC)``; guidance and priors wrap one and give another."""


def draw_tokens(log_p_MV: Tensor, uniform_M2: Tensor) -> Tensor:
    """Draw a token from each row of log-probabilities: the first uniform decides zero or not, the second the value."""
    p_zero_M = log_p_MV[:, 0].exp()
    values_M = 1 + invert_cdf(log_p_MV[:, 1:], uniform_M2[:, 1])
    return torch.where(uniform_M2[:, 0] < p_zero_M, 0, values_M)


def invert_cdf(logits_MK: Tensor, uniform_M: Tensor) -> Tensor:
    """Give the first category whose cumulative probability exceeds the uniform; logits need not be normalised."""
    cdf_MK = torch.cumsum(torch.softmax(logits_MK.float(), dim=-1), dim=-1)
    target_M1 = (uniform_M * cdf_MK[:, -1])[:, None]  # rounding may leave the last sum just below 1
    return torch.searchsorted(cdf_MK, target_M1, right=True)[:, 0].clamp_max(logits_MK.shape[-1] - 1)
