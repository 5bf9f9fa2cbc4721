"""Count distributions whose means are moved position by position; guidance and priors are such.

Shapes: B cells, G genes, M positions, V = 281 tokens.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from lingshu_cell.network.distribution import CountDistribution, Positions

_NEGLIGIBLE = 0.01  # log shifts below this, 1 % of the mean, leave a position as it is


class TiltedDistribution(CountDistribution):
    """A distribution whose log means are moved by :meth:`log_shift`; see :mod:`lingshu_cell.network.tilting`.

    Parameters
    ----------
    base
        The distribution to be moved.
    count_of_token
        Expected count of each expression token, V.
    """

    def __init__(self, base: CountDistribution, count_of_token: Tensor) -> None:
        self._base, self._count_V = base, count_of_token

    @abstractmethod
    def log_shift(self, positions: Positions) -> Tensor:
        """Wanted change of each position's log mean, shape M."""

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        positions = Positions.where(scored_BG)
        log_p_M = self.log_probabilities(positions).gather(1, positions.of(x_0_BG).long()[:, None])[:, 0]
        return torch.zeros(len(x_0_BG), device=x_0_BG.device).index_add(0, positions.cell_M, -log_p_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        tilt_M = self._base.tilts(positions, self.log_shift(positions), self._count_V)
        return self._base.tilted_log_probabilities(positions, tilt_M, self._count_V)

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; positions whose mean stays within 1 % are not tilted."""
        shift_M = self.log_shift(positions)
        token_M = self._base.draw(positions, uniform_M2)
        moved = torch.nonzero(shift_M.abs() > _NEGLIGIBLE)[:, 0]
        if len(moved):
            where = positions[moved]
            tilt = self._base.tilts(where, shift_M[moved], self._count_V)
            token_M[moved] = self._base.draw_tilted(where, uniform_M2[moved], tilt, self._count_V)
        return token_M
