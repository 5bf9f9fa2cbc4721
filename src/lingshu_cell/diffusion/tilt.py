"""Count distributions whose means are moved position by position; guidance and priors are such.

The rates behind the counts are multiplied, see :mod:`lingshu_cell.network.rates`.

Shapes: B cells, G genes, M positions, V = 281 tokens.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.network.rates import move, moved

_NEGLIGIBLE = 0.01  # log shifts below this, 1 % of the mean, leave a position as it is


class TiltedDistribution(CountDistribution):
    """A distribution whose log means are moved by :meth:`log_shift`.

    Parameters
    ----------
    base
        The distribution to be moved; the shift of one that is moved itself is added, and both made in one go.
    count_of_token
        Expected count of each expression token, V.
    """

    def __init__(self, base: CountDistribution, count_of_token: Tensor) -> None:
        self._moved = base if isinstance(base, TiltedDistribution) else None
        self._base = base if self._moved is None else self._moved._base
        self._count_V = count_of_token

    @abstractmethod
    def log_shift(self, positions: Positions) -> Tensor:
        """Wanted change of each position's log mean, shape M."""

    def whole_shift(self, positions: Positions) -> Tensor:
        """Change of the log mean of the distribution beneath all that is moved, shape M."""
        shift_M = self.log_shift(positions)
        return shift_M if self._moved is None else shift_M + self._moved.whole_shift(positions)

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        positions = Positions.where(scored_BG)
        log_p_M = self.log_probabilities(positions).gather(1, positions.of(x_0_BG).long()[:, None])[:, 0]
        return torch.zeros(len(x_0_BG), device=x_0_BG.device).index_add(0, positions.cell_M, -log_p_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        return moved(self._base.log_probabilities(positions), self.whole_shift(positions), self._count_V)

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; positions whose mean stays within 1 % are not moved.

        The first uniform decides whether a count is 0; where it fell on its side of that is uniform again, and decides
        what is taken away or added.
        """
        shift_M = self.whole_shift(positions)
        token_M = self._base.draw(positions, uniform_M2)
        affected = torch.nonzero((shift_M > _NEGLIGIBLE) | ((shift_M < -_NEGLIGIBLE) & (token_M > 0)))[:, 0]
        if len(affected):
            where, old_M = positions[affected], token_M[affected]
            log_p_zero_M = self._base.log_p_zero(where)
            p_zero_M, first_M = log_p_zero_M.double().exp(), uniform_M2[affected, 0].double()
            within_M = torch.where(
                old_M == 0, first_M / p_zero_M.clamp_min(1e-12), (first_M - p_zero_M) / (1 - p_zero_M).clamp_min(1e-12)
            ).clamp(0, 1 - 2**-24)
            log_mean_M = self._base.log_mean(where, self._count_V)
            token_M[affected] = move(old_M, shift_M[affected], within_M, log_mean_M, log_p_zero_M, self._count_V)
        return token_M
