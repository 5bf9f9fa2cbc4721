"""How the trunk of the set denoiser reads what its categories do not say: perturbations, a context of control cells,
library size. What of it makes up the average cell of a condition is in ``average_cell.py``.

A context is a profile over genes. It is read as evidence, like visible genes: summed along the head's own gene codes,
so that a gene's meaning is learned once.

Shapes: B cells, P perturbations, Q embedding, G genes, E gene width, D trunk width, R distinct profiles.
"""

import math

import torch
from torch import Tensor, nn

from lingshu_cell.network.conditions import Conditions, Profiles

_N_DEPTH_FREQUENCIES = 5
_RESIDUAL_DROPOUT = 0.2  # share of perturbations trained by their embedding alone, so that unseen ones are in range


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
