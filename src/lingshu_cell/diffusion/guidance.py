r"""Classifier-free guidance: go further than the conditions alone would, away from a reference (arXiv 2207.12598).

``guidance_scale`` s: 1 = as trained, 0 = the reference, above 1 = a stronger effect. The paper's w is s - 1: its
:math:`\tilde a = a_{ref} + (w + 1) (a - a_{ref})` is ``logits`` here, with control as the reference.

On logits, fold changes multiply and heavy tails explode. ``log-mean`` therefore moves only the mean of each count, by
:math:`(s - 1) (\log \mu - \log \mu_{ref})`, clipped; see :mod:`lingshu_cell.diffusion.tilt`.

Shapes: B cells, G genes, M positions, V = 281 tokens.
"""

import torch
from torch import Tensor

from lingshu_cell.diffusion.tilt import TiltedDistribution
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import CountDistribution, Denoiser, PartialCells, Positions
from lingshu_cell.tokens import MASK_TOKEN

GUIDANCE_SPACES = ("log-mean", "logits")

_IMPOSSIBLE = -1e3  # log-probability that stands for 0: the difference of two infinities is no number
_POSITIONS_AT_ONCE = 1 << 15  # 281 numbers each


class GuidedDenoiser(Denoiser):
    """A denoiser that exaggerates (s > 1) or weakens (s < 1) what its conditions say beyond reference conditions.

    Parameters
    ----------
    denoiser
        The denoiser to be guided.
    reference
        Conditions of the other branch, cell by cell: control, or unknown.
    scale
        s; 1 changes nothing.
    space
        ``"log-mean"`` or ``"logits"``.
    count_of_token
        Expected count of each expression token, V.
    clip
        In log-mean space: largest change of a log mean by guidance.
    ramp
        The strength s - 1 is multiplied by (share of visible genes)^ramp: 0 = the same at every step, more = later.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        reference: Conditions,
        scale: float,
        space: str,
        count_of_token: Tensor,
        *,
        clip: float = 2.0,
        ramp: float = 0.0,
    ) -> None:
        self._denoiser, self._reference = denoiser, reference
        self._scale, self._space, self._count_V = scale, space, count_of_token
        self._clip, self._ramp = clip, ramp

    def __call__(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions), guided."""
        return self.answer(self.start(x_t_BG), conditions)

    def start(self, x_t_BG: Tensor) -> PartialCells:
        """Begin to follow cells; both branches see the same ones."""
        return self._denoiser.start(x_t_BG)

    def answer(self, cells: PartialCells, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer for cells being followed."""
        asked = self._denoiser.answer(cells, conditions)
        reference = self._denoiser.answer(cells, self._reference)
        strength_B = torch.full((len(cells.x_t_BG),), self._scale - 1.0, device=cells.x_t_BG.device)
        if self._ramp:
            strength_B = strength_B * (cells.x_t_BG != MASK_TOKEN).float().mean(1) ** self._ramp
        if self._space == "logits":
            return LogitGuidedDistribution(asked, reference, strength_B)
        return MeanGuidedDistribution(asked, reference, strength_B, self._count_V, self._clip)


class LogitGuidedDistribution(CountDistribution):
    """The paper's guidance: log p + (s - 1) (log p - log p_ref), normalised."""

    def __init__(self, asked: CountDistribution, reference: CountDistribution, strength_B: Tensor) -> None:
        self._asked, self._reference, self._strength_B = asked, reference, strength_B

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        positions = Positions.where(scored_BG)
        log_p_M = self.log_probabilities(positions).gather(1, positions.of(x_0_BG).long()[:, None])[:, 0]
        return torch.zeros(len(x_0_BG), device=x_0_BG.device).index_add(0, positions.cell_M, -log_p_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        log_p_MV = self._asked.log_probabilities(positions).clamp_min(_IMPOSSIBLE)
        difference_MV = log_p_MV - self._reference.log_probabilities(positions).clamp_min(_IMPOSSIBLE)
        return torch.log_softmax(log_p_MV + self._strength_B[positions.cell_M, None] * difference_MV, -1)

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; piece by piece, as every position takes all 281 tokens."""
        pieces = torch.arange(len(positions), device=uniform_M2.device).split(_POSITIONS_AT_ONCE)
        return torch.cat([super(LogitGuidedDistribution, self).draw(positions[m], uniform_M2[m]) for m in pieces])


class MeanGuidedDistribution(TiltedDistribution):
    """Guidance of the mean: log μ + (s - 1) (log μ - log μ_ref), the change clipped."""

    def __init__(
        self,
        asked: CountDistribution,
        reference: CountDistribution,
        strength_B: Tensor,
        count_V: Tensor,
        clip: float,
    ) -> None:
        super().__init__(asked, count_V)
        self._reference, self._strength_B, self._clip = reference, strength_B, clip

    def log_shift(self, positions: Positions) -> Tensor:
        """See :meth:`TiltedDistribution.log_shift`."""
        difference_M = self._base.log_mean(positions, self._count_V) - self._reference.log_mean(
            positions, self._count_V
        )
        return (self._strength_B[positions.cell_M] * difference_M).clamp(-self._clip, self._clip)
