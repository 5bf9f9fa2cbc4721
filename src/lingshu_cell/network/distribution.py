"""What every denoiser answers: for each hidden gene, a categorical distribution over the 281 expression tokens.

Shapes: B cells, G genes, M asked-for positions (pairs of a cell and a gene), V = 281 tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingshu_cell.network.conditions import Conditions


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

    def log_p_zero(self, positions: Positions) -> Tensor:
        """Log-probability of a count of 0 at the positions, float32, shape M."""
        return self.log_probabilities(positions)[:, 0]

    def log_mean(self, positions: Positions, count_V: Tensor) -> Tensor:
        """Logarithm of the mean count at the positions, float32, shape M; ``count_V`` is the count of each token."""
        p_MV = self.log_probabilities(positions).exp()
        return torch.log((p_MV * count_V).sum(-1).clamp_min(1e-30))  # a product of matrices would obey an autocast

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


Denoise = Callable[[Tensor, Conditions | Tensor], CountDistribution]
"""A denoising function: ``denoise(x_t_BG, conditions)``; a plain int64 tensor B × C stands for categories alone."""


class PartialCells:
    """Cells on their way from all hidden to whole, as a denoiser likes to keep them.

    Attributes
    ----------
    x_t_BG
        Tokens, ``MASK_TOKEN`` where hidden.
    """

    def __init__(self, x_t_BG: Tensor) -> None:
        self.x_t_BG = x_t_BG.clone()

    def reveal(self, positions: Positions, token_M: Tensor) -> None:
        """Make some hidden genes visible."""
        self.x_t_BG[positions.cell_M, positions.gene_M] = token_M.to(self.x_t_BG.dtype)


class Denoiser(ABC):
    """A denoising function that can also follow cells while they are revealed; guidance and priors wrap one and give
    another.
    """

    @abstractmethod
    def __call__(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions) for every gene."""

    def start(self, x_t_BG: Tensor) -> PartialCells:
        """Begin to follow cells."""
        return PartialCells(x_t_BG)

    def answer(self, cells: PartialCells, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer for cells being followed; the same as calling the denoiser with their tokens."""
        return self(cells.x_t_BG, conditions)


class DenoisingFunction(Denoiser):
    """A plain function as a :class:`Denoiser`."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise

    def __call__(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        return self._denoise(x_t_BG, conditions)


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
