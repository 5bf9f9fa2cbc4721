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
_MOST_GATE_WEIGHT = 3.0
_LEAST_LOG_COUNT = 0.02  # mean log(1 + count) below which folds of a context are noise


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
    """What a profile adds to the head: amounts of the cells, and the profile's log fold of each gene.

    Attributes
    ----------
    amount_BA
        For the gate, then for each statistic of small values and of the tail, how much of the fold a cell takes.
    gate_RG, fold_RG
        The log fold, weighted for the gate, and as it is.
    place_B
        Which of the R profiles is a cell's.
    """

    amount_BA: Tensor
    gate_RG: Tensor
    fold_RG: Tensor
    place_B: Tensor


class GeneOffsets(nn.Module):
    """A log fold of each gene's mean, taken straight to its own distribution in learned amounts.

    For a Poisson count of mean m the gate's logit moves by fold · m / (1 - e^-m); this is where the gate's weights
    start. The network then starts as an additive model, and learns what is not additive.
    """

    def __init__(self, n_genes: int, width: int, n_statistics: int) -> None:
        super().__init__()
        self.gate_weight_G = nn.Parameter(torch.ones(n_genes))
        self.amount = nn.Linear(width, 1 + 2 * n_statistics)

    @torch.no_grad()
    def initialise(self) -> None:
        """Start with the whole fold at the gate and half of it on log counts."""
        self.amount.weight.zero_()
        self.amount.bias.zero_()
        n_statistics = (len(self.amount.bias) - 1) // 2
        self.amount.bias[0], self.amount.bias[1], self.amount.bias[1 + n_statistics] = 1.0, 0.5, 0.5

    @torch.no_grad()
    def start_at_means(self, mean_G: Tensor) -> None:
        """Set the gate's weights from the genes' mean counts."""
        self.gate_weight_G.copy_((mean_G / -torch.expm1(-mean_G.clamp_min(1e-4))).clamp(1.0, _MOST_GATE_WEIGHT))

    def forward(self, fold_RG: Tensor, place_B: Tensor, h_BD: Tensor) -> Offsets:
        """Give what the folds add to the head."""
        return Offsets(self.amount(h_BD), fold_RG * self.gate_weight_G, fold_RG, place_B)


class ContextReader(nn.Module):
    """What an average control cell of the same identity shows: as evidence along the gene codes, and each gene's fold
    against all cells straight to its own distribution. NaN tells nothing.
    """

    def __init__(self, n_genes: int, gene_width: int, width: int, n_statistics: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * gene_width)
        self.into = nn.Linear(2 * gene_width, width)
        self.offsets = GeneOffsets(n_genes, width, n_statistics)

    def forward(self, context: Profiles, codes_GE: Tensor, weights_2G: Tensor, expected_2G: Tensor) -> Tensor:
        """Give what the context of each cell adds to the trunk, B × D; 0 for a cell without one."""
        profile_RJG, place_B = context.distinct()
        evidence = [
            (profile_RJG[:, j] - expected_2G[j]).nan_to_num() @ (codes_GE * weights_2G[j][:, None])
            for j in range(len(weights_2G))
        ]
        h_RD = self.into(self.norm(torch.cat(evidence, dim=1)))
        return h_RD.index_select(0, place_B) * context.known()[:, None]

    def offset(self, context: Profiles, mean_log_G: Tensor, h_BD: Tensor) -> Offsets:
        """Give what the context adds to the head: the fold of each gene's mean log count against all cells."""
        profile_RJG, place_B = context.distinct()
        fold_RG = torch.log((profile_RJG[:, 1] + _LEAST_LOG_COUNT) / (mean_log_G + _LEAST_LOG_COUNT)).nan_to_num()
        present_R1 = (profile_RJG[:, 1].nan_to_num().sum(1, keepdim=True) > 0).float()  # row 0 is no profile
        return self.offsets(fold_RG * present_R1, place_B, h_BD)


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


class EffectReader(nn.Module):
    """A prior effect Δ, the expected change of each gene's log mean: as evidence into the trunk, and straight to each
    gene's own distribution.
    """

    def __init__(self, n_genes: int, gene_width: int, width: int, n_statistics: int) -> None:
        super().__init__()
        self.weight_G = nn.Parameter(torch.ones(n_genes))
        self.norm = nn.RMSNorm(gene_width)
        self.into = nn.Linear(gene_width + 1, width)
        self.offsets = GeneOffsets(n_genes, width, n_statistics)

    def forward(self, effect: Profiles, codes_GE: Tensor) -> Tensor:
        """Give what the effect of each cell adds to the trunk, B × D."""
        profile_RJG, place_B = effect.distinct()
        sum_RE = (profile_RJG[:, 0] * self.weight_G) @ codes_GE
        strength_R1 = torch.log(sum_RE.norm(dim=1, keepdim=True) + 0.01)
        h_RD = self.into(torch.cat([self.norm(sum_RE), strength_R1], dim=1))
        return h_RD.index_select(0, place_B) * effect.known()[:, None]

    def offset(self, effect: Profiles, h_BD: Tensor) -> Offsets:
        """Give what the effect adds to the head."""
        profile_RJG, place_B = effect.distinct()
        return self.offsets(profile_RJG[:, 0], place_B, h_BD)


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

    def forward(self, depth_B: Tensor) -> Tensor:
        """Give what the depth of each cell adds to the trunk, B × D; 0 where none is asked for."""
        known_B1 = ~depth_B.isnan()[:, None]
        z_B1 = ((depth_B.nan_to_num() - self.mean) / self.sd)[:, None]
        angle = z_B1 * (2.0 ** torch.arange(_N_DEPTH_FREQUENCIES, device=z_B1.device)) * (math.pi / 8)
        return self.into(torch.cat([angle.sin(), angle.cos(), z_B1, torch.ones_like(z_B1)], dim=1) * known_B1)
