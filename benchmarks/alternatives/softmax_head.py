"""Control: a plain softmax over all 281 tokens of every gene, low-rank in the tokens, on the set denoiser's trunk.

What the gate-and-values head avoids: logits of all genes × all tokens. They exist in pieces here, and are computed
again on the way back, where their gradient is written down rather than traced: 1.6 times the speed of autograd.

Shapes: B cells, G genes, D trunk width, E gene width, R rank, V = 281 tokens, M positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.network.gate_head import GateHead
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

_POSITIONS_AT_ONCE = 1 << 12  # 4,096 × 281 float32 = 4.6 MB: larger pieces are slower
_N_STATISTICS = 5


class SoftmaxHead(nn.Module):
    """log p(x_g = v) = Σ_r (q_r(h) · U_g) W_rv + c_gv + constant.

    The first rows of W start at statistics of the count that let a Poisson, a negative binomial or a log-normal move,
    as in the gate-and-values head, and c at the same distribution; only the parametrisation differs.

    Parameters
    ----------
    n_genes, width, gene_width, count_of_token
        As for :class:`GateHead`.
    rank
        R, at least 5.
    """

    def __init__(self, n_genes: int, width: int, gene_width: int, rank: int, count_of_token: Tensor) -> None:
        super().__init__()
        self.rank, self._count_of_token = rank, count_of_token.float()
        self.gene_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.query = nn.Linear(width, rank * gene_width)
        self.token_RV = nn.Parameter(torch.empty(rank, N_EXPRESSION_TOKENS))
        self.bias_GV = nn.Parameter(torch.zeros(n_genes, N_EXPRESSION_TOKENS))

    def forward(self, h_BD: Tensor, offsets: Sequence[object] = ()) -> "LowRankSoftmax":
        """Answer for every gene; the product's offsets by conditions are not known here."""
        if offsets:
            raise ValueError("this head knows no offsets")
        return LowRankSoftmax(self, h_BD.float())

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start as the gate-and-values head does: codes small, only the first statistic (zero or not) asked for."""
        self.gene_GE.normal_(0.0, 0.01, generator=generator)
        self.query.weight.zero_()
        first = self.query.weight[: self.gene_GE.shape[1]]
        first.normal_(0.0, first.shape[1] ** -0.5, generator=generator)
        self.query.bias.zero_()
        positive_V = (self._count_of_token > 0).float()
        log_V = torch.log1p(self._count_of_token)
        statistics = [positive_V, log_V - log_V[1] * positive_V, self._count_of_token.clamp_max(60) / 8]
        statistics += [log_V**2 / 4, (self._count_of_token / 100).clamp_max(20)]
        self.token_RV.normal_(0.0, 0.1, generator=generator)
        self.token_RV[:_N_STATISTICS] = torch.stack(statistics)

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Take the biases from an untrained gate-and-values head that has been started at the token frequencies.

        Parameters
        ----------
        token_counts_GV
            How many training cells show each token, G × 281.
        """
        model = GateHead(len(token_counts_GV), 1, 1, 16, self._count_of_token)
        model.initialise(torch.Generator())
        model.start_at_frequencies(token_counts_GV)
        model.gene_GE.zero_()
        everything = Positions.where(torch.ones(1, len(token_counts_GV), dtype=torch.bool))
        self.bias_GV.copy_(model(torch.zeros(1, 1)).log_probabilities(everything))


class LowRankSoftmax(CountDistribution):
    """The softmaxes of one minibatch."""

    def __init__(self, head: SoftmaxHead, h_BD: Tensor) -> None:
        self._head = head
        query = head.query(h_BD).unflatten(1, (head.rank, -1))  # B × R × E
        self._tilt_GBR = torch.matmul(head.gene_GE, query.flatten(0, 1).T).unflatten(1, (len(h_BD), head.rank))

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`; a piece is all cells of some genes."""
        total_B = torch.zeros(len(x_0_BG))
        genes = max(_POSITIONS_AT_ONCE // len(x_0_BG), 1)
        target_GB = torch.where(scored_BG, x_0_BG, 0).T.long()
        parts = (values.split(genes) for values in (self._tilt_GBR, self._head.bias_GV, target_GB, scored_BG.T))
        for tilt_gBR, bias_gV, target_gB, scored_gB in zip(*parts, strict=True):
            nll_gB = _CrossEntropy.apply(tilt_gBR, self._head.token_RV, bias_gV, target_gB)
            total_B = total_B + (nll_gB * scored_gB).sum(0)
        return total_B

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        tilt_MR = self._tilt_GBR[positions.gene_M, positions.cell_M]
        return torch.log_softmax(tilt_MR @ self._head.token_RV + self._head.bias_GV[positions.gene_M], dim=-1)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits z W + c, which are made twice and kept never; G is the genes of one piece here."""

    @staticmethod
    def forward(ctx: Any, tilt_GBR: Tensor, token_RV: Tensor, bias_GV: Tensor, target_GB: Tensor) -> Tensor:
        ctx.save_for_backward(tilt_GBR, token_RV, bias_GV, target_GB)
        return -_log_softmax(tilt_GBR, token_RV, bias_GV).gather(2, target_GB[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, weight_GB: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        tilt_GBR, token_RV, bias_GV, target_GB = ctx.saved_tensors
        change_GBV = _log_softmax(tilt_GBR, token_RV, bias_GV).exp_()
        change_GBV.scatter_add_(2, target_GB[..., None], torch.full_like(weight_GB, -1.0)[..., None])
        change_GBV *= weight_GB[..., None]
        token_grad_RV = tilt_GBR.flatten(0, 1).T @ change_GBV.flatten(0, 1)
        return torch.matmul(change_GBV, token_RV.T), token_grad_RV, change_GBV.sum(1), None


def _log_softmax(tilt_GBR: Tensor, token_RV: Tensor, bias_GV: Tensor) -> Tensor:
    weights_GRV = token_RV.expand(len(tilt_GBR), -1, -1)
    return torch.log_softmax(torch.baddbmm(bias_GV[:, None], tilt_GBR, weights_GRV), dim=-1)
