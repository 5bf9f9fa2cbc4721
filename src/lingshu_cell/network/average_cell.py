"""The average cell of a condition: control cells of the same identity, moved by the effect of a perturbation, at the
library size asked for. The head starts at it, and the evidence of visible genes is relative to it.

Shapes: B cells, G genes, R distinct conditions, K profiles in a table, J numbers of a profile, A statistics.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.detection import log_mean_of, share_of_values
from lingshu_cell.tokens import EFFECT_PSEUDOCOUNT

_LEAST_DETECTION = 1e-4
_MOST_FOLD = 5.0
_MOST_COUNT = 2e4  # what the last count token reaches to
_RATIOS_OF_EFFECT = (1e-2, 1e3)
_RATIOS_OF_DEPTH = (1e-2, 1e2)
_LEFT_PSEUDOCOUNT = 4.0
_MOST_LEFT = 2.0


@dataclass(frozen=True)
class Offsets:
    """What the average cell of a condition adds to the head.

    Attributes
    ----------
    gate_RG
        Added to the log mean that says how often a gene is detected.
    fold_RG
        Log fold of the mean of counts above 0, weighted by gene; the statistics take it in the amounts.
    amount_A
        For each statistic of small values and of the tail, how much of the fold it takes.
    place_B
        Which of the R average cells is a cell's.
    fold_slope_RG
        How the log fold moves with the logarithm of a gene's mean; detection has that logarithm itself.
    left_B
        Log ratio of what hidden genes of a cell have left to show and what they would show of the average cell; None
        where no library size is asked for.
    most_B
        Count that no hidden gene can be above, as the cell's library has no more; infinite where that is not known.
    """

    gate_RG: Tensor
    fold_RG: Tensor
    amount_A: Tensor
    place_B: Tensor
    fold_slope_RG: Tensor | None = None
    left_B: Tensor | None = None
    most_B: Tensor | None = None


@dataclass(frozen=True)
class AverageCells:
    """Average cells of R conditions: how often each gene is detected, its mean log(1 + count), and which cell is whose.

    Where nothing is known of a gene, the values are those of all training cells. Where a library size is asked for,
    ``depth_B`` is its logarithm (NaN = not for this cell) and ``share_RG`` the share of it that each gene has.
    """

    detected_RG: Tensor
    log_RG: Tensor
    place_B: Tensor
    depth_B: Tensor | None = None
    share_RG: Tensor | None = None

    def left(self, share_B: Tensor, total_B: Tensor) -> Tensor:
        """Compare what hidden genes of each cell have left of its library with their shares of it, as a log ratio.

        Parameters
        ----------
        share_B
            Sum of the shares of the visible genes.
        total_B
            Counts of the visible genes.
        """
        depth_B = torch.exp(self.depth_B.nan_to_num())
        left_B = ((depth_B - total_B).clamp_min(0) + _LEFT_PSEUDOCOUNT) / (
            depth_B * (1 - share_B).clamp_min(0) + _LEFT_PSEUDOCOUNT
        )
        left_B = torch.log(left_B).clamp(-_MOST_LEFT, _MOST_LEFT)
        return torch.where(self.depth_B.isnan(), 0.0, left_B)

    def most(self, total_B: Tensor, is_open_B: Tensor) -> Tensor:
        """Give the count that no hidden gene of a cell can be above.

        Parameters
        ----------
        total_B
            Counts of the visible genes by the middles of their tokens, which are at most a twentieth above the truth.
        is_open_B
            Whether a visible gene has the last token, which reaches from 10,000 to no end.
        """
        most_B = 1.001 * torch.exp(self.depth_B.nan_to_num()) + 1 - 0.95 * total_B
        return most_B.masked_fill(self.depth_B.isnan() | is_open_B, torch.inf)


class AverageCell(nn.Module):
    """The average cell of a condition: that of its context, moved by its effect, at the depth asked for.

    Everything else the network says and reads is relative to it. The head starts at its marginals, through offsets of
    each gene's gate and values; and what a visible gene tells is how it differs from the average cell, the score of the
    head's families at that point: (S(x_g) - E S(x_g)) U_g with the expectation under the condition. A gene that a
    perturbation switches on says nothing, then, where it is found switched on, and a cell type's own markers do not
    count twice.
    """

    def __init__(self, n_genes: int, n_statistics: int) -> None:
        super().__init__()
        self.gate_weight_G = nn.Parameter(torch.ones(n_genes))
        self.value_weight_G = nn.Parameter(torch.ones(n_genes))
        self.amount_A = nn.Parameter(torch.zeros(2 * n_statistics))
        self.left_amount_1 = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def initialise(self) -> None:
        """Start with the whole fold on the first statistics, the log counts."""
        n_statistics = len(self.amount_A) // 2
        self.amount_A.zero_()
        self.amount_A[0], self.amount_A[n_statistics] = 1.0, 0.5

    def forward(
        self, conditions: Conditions, detection_G: Tensor, mean_log_G: Tensor, log_library: Tensor | None = None
    ) -> AverageCells:
        """Give the average cells of the conditions that occur in a minibatch.

        Parameters
        ----------
        conditions
            What is told of each cell.
        detection_G, mean_log_G
            The average of all training cells.
        log_library
            Log of the mean library size of all training cells; depth is only read with it.
        """
        context, effect, depth_B = conditions.context, conditions.effect, conditions.depth_B
        none_B = torch.zeros(len(conditions), dtype=torch.int64, device=detection_G.device)
        row_B2 = torch.stack([none_B if one is None else one.row_B for one in (context, effect)], dim=1)
        rows_R2, place_B = torch.unique(row_B2, dim=0, return_inverse=True)
        detected_RG, log_RG = (one.expand(len(rows_R2), -1) for one in (detection_G, mean_log_G))
        if context is not None:
            profile_RJG = context.table_KJG[rows_R2[:, 0]].float()
            known_RG = (rows_R2[:, :1] > 0) & ~profile_RJG[:, 0].isnan()
            detected_RG = torch.where(known_RG, profile_RJG[:, 0], detected_RG)
            log_RG = torch.where(known_RG, profile_RJG[:, 1], log_RG)
        detected_RG = detected_RG.clamp(_LEAST_DETECTION, 1 - _LEAST_DETECTION)
        if effect is not None:
            delta_RG = effect.table_KJG[rows_R2[:, 1], 0].float().masked_fill(rows_R2[:, 1:] == 0, 0.0)
            detected_RG, log_RG = _scaled(detected_RG, log_RG, _ratios_of_effect(detected_RG, log_RG, delta_RG))
        if depth_B is None or log_library is None:
            return AverageCells(detected_RG, log_RG, place_B)
        mean_RG = _mean(detected_RG, log_RG)
        total_R1 = mean_RG.sum(1, keepdim=True)
        total = (detection_G * _typical(detection_G.clamp_min(_LEAST_DETECTION), mean_log_G)).sum()
        usual_B = log_library + torch.log(total_R1[:, 0] / total).index_select(0, place_B)
        ratio_B1 = torch.exp((depth_B - usual_B).nan_to_num())[:, None].clamp(*_RATIOS_OF_DEPTH)
        detected_BG, log_BG = _scaled(detected_RG.index_select(0, place_B), log_RG.index_select(0, place_B), ratio_B1)
        share_BG = (mean_RG / total_R1).index_select(0, place_B)
        return AverageCells(detected_BG, log_BG, torch.arange(len(place_B), device=place_B.device), depth_B, share_BG)

    def offsets(self, average: AverageCells, detection_G: Tensor, mean_log_G: Tensor) -> Offsets:
        """Give what takes the head from the marginals of all training cells to those of the average cells."""
        all_G = detection_G.clamp(_LEAST_DETECTION, 1 - _LEAST_DETECTION)
        gate_RG = log_mean_of(average.detected_RG) - log_mean_of(all_G)
        fold_RG = torch.log(_typical(average.detected_RG, average.log_RG) / _typical(all_G, mean_log_G))
        fold_RG = fold_RG.clamp(-_MOST_FOLD, _MOST_FOLD) * self.value_weight_G
        offsets = Offsets(gate_RG * self.gate_weight_G, fold_RG, self.amount_A, average.place_B)
        if average.depth_B is None:
            return offsets
        return replace(offsets, fold_slope_RG=share_of_values(average.detected_RG))


def _typical(detected_RG: Tensor, log_RG: Tensor) -> Tensor:
    """Typical count of a gene where it is not 0."""
    return torch.expm1(log_RG / detected_RG).clamp(1.0, _MOST_COUNT)


def _mean(detected_RG: Tensor, log_RG: Tensor) -> Tensor:
    """Mean count of a gene."""
    return detected_RG * _typical(detected_RG, log_RG)


def _ratios_of_effect(detected_RG: Tensor, log_RG: Tensor, delta_RG: Tensor) -> Tensor:
    """Ratios of means after and before effects, differences of log(share of all counts + ε); the total stays."""
    mean_RG = _mean(detected_RG, log_RG)
    share_RG = mean_RG / mean_RG.sum(1, keepdim=True)
    after_RG = ((share_RG + EFFECT_PSEUDOCOUNT) * delta_RG.exp() - EFFECT_PSEUDOCOUNT).clamp_min(0.0)
    after_RG = after_RG / after_RG.sum(1, keepdim=True)
    return torch.where(delta_RG == 0, 1.0, after_RG / share_RG.clamp_min(1e-12)).clamp(*_RATIOS_OF_EFFECT)


def _scaled(detected_RG: Tensor, log_RG: Tensor, ratio_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the means of average cells; how often a gene is then detected is as of a Poisson count."""
    mean_RG = _mean(detected_RG, log_RG)
    after_detected_RG = -torch.expm1(ratio_RG * torch.log1p(-detected_RG))
    after_detected_RG = after_detected_RG.clamp(_LEAST_DETECTION, 1 - _LEAST_DETECTION)
    after_typical_RG = (mean_RG * ratio_RG / after_detected_RG).clamp(1.0, _MOST_COUNT)
    same_RG = ratio_RG == 1
    after_log_RG = after_detected_RG * torch.log1p(after_typical_RG)
    return torch.where(same_RG, detected_RG, after_detected_RG), torch.where(same_RG, log_RG, after_log_RG)
