"""How the set denoiser reads what its categories do not say: perturbations, a context of control cells, a prior effect,
library size.

A context and a prior effect are profiles over genes. They are read as evidence, like visible genes: summed along the
head's own gene codes, so that a gene's meaning is learned once.

Shapes: B cells, P perturbations, Q embedding, G genes, E gene width, D trunk width, R distinct profiles.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lingshu_cell.network.conditions import Conditions, Profiles

_N_DEPTH_FREQUENCIES = 5
_RESIDUAL_DROPOUT = 0.2  # share of perturbations trained by their embedding alone, so that unseen ones are in range
EFFECT_PSEUDOCOUNT = 1e-4  # of effects: one count in a cell of 10,000
_LEAST_DETECTION = 1e-4
_MOST_FOLD = 5.0
_RATIOS_OF_EFFECT = (1e-2, 1e3)
_RATIOS_OF_DEPTH = (1e-2, 1e2)


class PerturbationReader(nn.Module):
    """Σ_p applied_p (r_p + W e_p) + dose_p d_p, with learned r_p and d_p and a known embedding e_p.

    In training, r_p is left out for a random fifth of the perturbations where they have an embedding; a perturbation
    that was never trained has r_p = 0.
    """

    def __init__(self, n_perturbations: int, embedding_width: int, width: int) -> None:
        super().__init__()
        self.residual_PD = nn.Parameter(torch.zeros(n_perturbations, width))
        self.dose_PD = nn.Parameter(torch.zeros(n_perturbations, width))
        self.embedding = nn.Linear(embedding_width, width, bias=False) if embedding_width else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Start at 0: a perturbation is what training finds it to be, and one never trained is its embedding alone."""
        if self.embedding is not None:
            self.embedding.weight.zero_()

    def forward(self, conditions: Conditions) -> Tensor:
        """Give what the perturbations of each cell add to the trunk, B × D."""
        applied_BP = conditions.perturbation_BP
        n_known = len(self.residual_PD)
        residual_PD = self.residual_PD
        if self.embedding is not None and self.training:
            keep_P1 = torch.rand(n_known, 1, device=residual_PD.device) >= _RESIDUAL_DROPOUT
            embedded_P1 = (conditions.embedding_PQ[:n_known] != 0).any(1, keepdim=True)
            residual_PD = residual_PD * (keep_P1 | ~embedded_P1)  # control and others without one would say nothing
        h_BD = applied_BP[:, :n_known] @ residual_PD
        if conditions.dose_BP is not None:
            h_BD = h_BD + conditions.dose_BP[:, :n_known] @ self.dose_PD
        if self.embedding is not None:
            h_BD = h_BD + applied_BP @ self.embedding(conditions.embedding_PQ)
        return h_BD


@dataclass(frozen=True)
class Offsets:
    """What the average cell of a condition adds to the head.

    Attributes
    ----------
    gate_RG
        Added to the logit of p(x_g > 0).
    fold_RG
        Log fold of the mean of counts above 0, weighted by gene; the statistics take it in the amounts.
    amount_A
        For each statistic of small values and of the tail, how much of the fold it takes.
    place_B
        Which of the R average cells is a cell's.
    """

    gate_RG: Tensor
    fold_RG: Tensor
    amount_A: Tensor
    place_B: Tensor


@dataclass(frozen=True)
class AverageCells:
    """Average cells of R conditions: how often each gene is detected, its mean log(1 + count), and which cell is whose.

    Where nothing is known of a gene, the values are those of all training cells.
    """

    detected_RG: Tensor
    log_RG: Tensor
    place_B: Tensor


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
        log_total_R = torch.log((detected_RG * _typical(detected_RG, log_RG)).sum(1))
        log_total = torch.log((detection_G * _typical(detection_G.clamp_min(_LEAST_DETECTION), mean_log_G)).sum())
        usual_B = log_library + (log_total_R - log_total).index_select(0, place_B)
        ratio_B1 = torch.exp((depth_B - usual_B).nan_to_num())[:, None].clamp(*_RATIOS_OF_DEPTH)
        detected_BG, log_BG = _scaled(detected_RG.index_select(0, place_B), log_RG.index_select(0, place_B), ratio_B1)
        return AverageCells(detected_BG, log_BG, torch.arange(len(place_B), device=place_B.device))

    def offsets(self, average: AverageCells, detection_G: Tensor, mean_log_G: Tensor) -> Offsets:
        """Give what takes the head from the marginals of all training cells to those of the average cells."""
        all_G = detection_G.clamp(_LEAST_DETECTION, 1 - _LEAST_DETECTION)
        gate_RG = torch.logit(average.detected_RG) - torch.logit(all_G)
        fold_RG = torch.log(_typical(average.detected_RG, average.log_RG) / _typical(all_G, mean_log_G))
        fold_RG = fold_RG.clamp(-_MOST_FOLD, _MOST_FOLD) * self.value_weight_G
        return Offsets(gate_RG * self.gate_weight_G, fold_RG, self.amount_A, average.place_B)


def _typical(detected_RG: Tensor, log_RG: Tensor) -> Tensor:
    """Typical count of a gene where it is not 0."""
    return torch.expm1(log_RG / detected_RG).clamp_min(1.0)


def _ratios_of_effect(detected_RG: Tensor, log_RG: Tensor, delta_RG: Tensor) -> Tensor:
    """Ratios of means after and before effects, differences of log(share of all counts + ε); the total stays."""
    mean_RG = detected_RG * _typical(detected_RG, log_RG)
    share_RG = mean_RG / mean_RG.sum(1, keepdim=True)
    after_RG = ((share_RG + EFFECT_PSEUDOCOUNT) * delta_RG.exp() - EFFECT_PSEUDOCOUNT).clamp_min(0.0)
    after_RG = after_RG / after_RG.sum(1, keepdim=True)
    return torch.where(delta_RG == 0, 1.0, after_RG / share_RG.clamp_min(1e-12)).clamp(*_RATIOS_OF_EFFECT)


def _scaled(detected_RG: Tensor, log_RG: Tensor, ratio_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the means of average cells; how often a gene is then detected is as of a Poisson count."""
    mean_RG = detected_RG * _typical(detected_RG, log_RG)
    after_detected_RG = -torch.expm1(ratio_RG * torch.log1p(-detected_RG))
    after_detected_RG = after_detected_RG.clamp(_LEAST_DETECTION, 1 - _LEAST_DETECTION)
    after_typical_RG = (mean_RG * ratio_RG / after_detected_RG).clamp_min(1.0)
    return after_detected_RG, after_detected_RG * torch.log1p(after_typical_RG)


class ContextReader(nn.Module):
    """What an average control cell of the same identity shows, as evidence along the gene codes; NaN tells nothing."""

    def __init__(self, gene_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * gene_width)
        self.into = nn.Linear(2 * gene_width, width)

    def forward(self, context: Profiles, codes_GE: Tensor, weights_2G: Tensor, expected_2G: Tensor) -> Tensor:
        """Give what the context of each cell adds to the trunk, B × D; 0 for a cell without one."""
        profile_RJG, place_B = context.distinct()
        evidence = [
            (profile_RJG[:, j] - expected_2G[j]).nan_to_num() @ (codes_GE * weights_2G[j][:, None])
            for j in range(len(weights_2G))
        ]
        h_RD = self.into(self.norm(torch.cat(evidence, dim=1)))
        return h_RD.index_select(0, place_B) * context.known()[:, None]


class Response(nn.Module):
    """State of a cell at rest, and what a perturbation adds to it: h + p + W_out (silu(W_push p) * W_state norm(h)).

    The push p is added behind the trunk, and only a narrow product lets it depend on the state. It starts at 0: from a
    random start, nothing would ever correct what it does to identities that were never perturbed in training.
    """

    def __init__(self, width: int, rank: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.push = nn.Linear(width, rank, bias=False)
        self.state = nn.Linear(width, rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Start additive."""
        self.out.weight.zero_()

    def forward(self, h_BD: Tensor, push_BD: Tensor) -> Tensor:
        """Give the state under the perturbation, B × D; h itself where the push is 0."""
        return h_BD + push_BD + self.out(nn.functional.silu(self.push(push_BD)) * self.state(self.norm(h_BD)))


class DepthReader(nn.Module):
    """The library size asked for, as Fourier features of its standardised logarithm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("sd", torch.ones(()))
        self.into = nn.Linear(2 * _N_DEPTH_FREQUENCIES + 2, width, bias=False)

    @torch.no_grad()
    def start_at(self, mean: float, sd: float) -> None:
        """Set the mean and the standard deviation of log library sizes in training."""
        self.mean.fill_(mean)
        self.sd.fill_(max(sd, 1e-3))

    @property
    def log_library(self) -> Tensor:
        """Log of the mean library size, as library sizes are about log-normal."""
        return self.mean + self.sd**2 / 2

    def forward(self, depth_B: Tensor) -> Tensor:
        """Give what the depth of each cell adds to the trunk, B × D; 0 where none is asked for."""
        known_B1 = ~depth_B.isnan()[:, None]
        z_B1 = ((depth_B.nan_to_num() - self.mean) / self.sd)[:, None]
        angle = z_B1 * (2.0 ** torch.arange(_N_DEPTH_FREQUENCIES, device=z_B1.device)) * (math.pi / 8)
        return self.into(torch.cat([angle.sin(), angle.cos(), z_B1, torch.ones_like(z_B1)], dim=1) * known_B1)
