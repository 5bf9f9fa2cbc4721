"""What a user knows beforehand about genes, put into the cells while they are generated.

A *clamp* fixes a gene's count before the first step: the network sees it, and every other gene follows (the paper's
prior injection sets knocked-down genes to 1 UMI). A *tilt* multiplies a gene's mean at the moment it is drawn and
leaves its value to chance.

Shapes: B cells, G genes, M positions.
"""

from collections.abc import Mapping

from torch import Tensor

from lingshu_cell.diffusion.tilt import TiltedDistribution
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import CountDistribution, Denoiser, PartialCells, Positions


def clamp(x_t_BG: Tensor, token_of_gene: Mapping[int, int]) -> Tensor:
    """Make genes visible with given tokens in every cell.

    Parameters
    ----------
    x_t_BG
        Tokens to start from.
    token_of_gene
        Column → expression token.
    """
    clamped_BG = x_t_BG.clone()
    for gene, token in token_of_gene.items():
        clamped_BG[:, gene] = token
    return clamped_BG


class TiltedDenoiser(Denoiser):
    """A denoiser whose means are multiplied gene by gene.

    Parameters
    ----------
    denoiser
        The denoiser to be changed, guided or not.
    log_factor_G
        Natural logarithm of each gene's factor; 0 leaves a gene alone.
    count_of_token
        Expected count of each expression token.
    """

    def __init__(self, denoiser: Denoiser, log_factor_G: Tensor, count_of_token: Tensor) -> None:
        self._denoiser, self._log_factor_G, self._count_V = denoiser, log_factor_G, count_of_token

    def __call__(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions), tilted."""
        return self.answer(self.start(x_t_BG), conditions)

    def start(self, x_t_BG: Tensor) -> PartialCells:
        """Begin to follow cells."""
        return self._denoiser.start(x_t_BG)

    def answer(self, cells: PartialCells, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer for cells being followed."""
        return GeneTiltedDistribution(self._denoiser.answer(cells, conditions), self._log_factor_G, self._count_V)


class GeneTiltedDistribution(TiltedDistribution):
    """A distribution whose means are multiplied by a factor of each gene."""

    def __init__(self, base: CountDistribution, log_factor_G: Tensor, count_V: Tensor) -> None:
        super().__init__(base, count_V)
        self._log_factor_G = log_factor_G

    def log_shift(self, positions: Positions) -> Tensor:
        """See :meth:`TiltedDistribution.log_shift`."""
        return self._log_factor_G[positions.gene_M]
