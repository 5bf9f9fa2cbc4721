"""Gate-and-values head: the same categorical over 281 tokens as a tree, paid for only where counts are not zero.

A cell has about 90 % zeros. The head first says zero or not for every gene (one low-rank matmul), then, only for the genes
that are not zero, which of 1, 2, …, K - 1, "K or more", and only for those of K and more, which token exactly. The product of
the three is a categorical distribution over all tokens (method notes, section 7, point 7; a test compares it with the sum).

Shapes: B cells, G genes, D trunk width, E gene width, M positions, K small values, W value width, V = 281.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingshu_cell.network.distribution import CountDistribution, Positions, invert_cdf
from lingshu_cell.tokens import N_EXPRESSION_TOKENS


class GateHead(nn.Module):
    """From one hidden vector per cell to a distribution per gene.

    * gate: logit p(x_g > 0) = U_g · (W h) + b_g
    * small values: logits over 1 … K-1 and "K or more" = T (q(h) ⊙ s_g) + c_g
    * large values: logits over the tokens K … 280 = L (r(h) + l_g) + d
    """

    def __init__(self, n_genes: int, width: int, gene_width: int, value_width: int, n_small_values: int) -> None:
        super().__init__()
        n_large = N_EXPRESSION_TOKENS - n_small_values
        self.n_small_values = n_small_values
        self.gate_query = nn.Linear(width, gene_width)
        self.gate_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.gate_bias_G = nn.Parameter(torch.zeros(n_genes))
        self.small_query = nn.Linear(width, value_width)
        self.small_scale_GW = nn.Parameter(torch.empty(n_genes, value_width))
        self.small_basis_KW = nn.Parameter(torch.empty(n_small_values, value_width))
        self.small_bias_GK = nn.Parameter(torch.zeros(n_genes, n_small_values))
        self.large_query = nn.Linear(width, value_width)
        self.large_code_GW = nn.Parameter(torch.zeros(n_genes, value_width))
        self.large_basis_VW = nn.Parameter(torch.empty(n_large, value_width))
        self.large_bias_V = nn.Parameter(torch.zeros(n_large))

    def forward(self, h_BD: Tensor) -> "GatedDistribution":
        """Answer for every gene; heads run in fp32 whatever the trunk's precision."""
        with torch.autocast(h_BD.device.type, enabled=False):
            return GatedDistribution(self, h_BD.float())

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start small, with the first directions of the value bases as smooth functions of the count."""
        for parameter, std in (
            (self.gate_query.weight, self.gate_query.in_features**-0.5),
            (self.gate_GE, 0.01),
            (self.small_scale_GW, 0.1),
            (self.small_basis_KW, 0.1),
            (self.large_basis_VW, 0.05),
        ):
            parameter.normal_(0.0, std, generator=generator)
        for linear in (self.small_query, self.large_query):
            linear.weight.zero_()
            linear.bias.zero_()
        self.gate_query.bias.zero_()
        log_small_K = torch.log(torch.arange(1.0, self.n_small_values + 1))
        self.small_basis_KW[:, :2] = torch.stack([log_small_K, log_small_K**2 / 2], dim=1)
        log_large_V = torch.linspace(math.log(self.n_small_values), math.log(1e4), N_EXPRESSION_TOKENS - self.n_small_values)
        self.large_basis_VW[:, :2] = torch.stack([log_large_V, log_large_V**2 / 4], dim=1)

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor, pseudocount: float = 10.0, neighbours: int = 200) -> None:
        """Set the biases so that the untrained head gives each gene's own token frequencies.

        The values of a gene are shrunk towards those of the genes with the nearest mean, worth ``pseudocount`` cells.

        Parameters
        ----------
        token_counts_GV
            How many training cells show each token, G × 281.
        """
        counts = token_counts_GV.float()
        n_cells_G = counts.sum(1)
        detected_G = (n_cells_G - counts[:, 0] + 0.5) / (n_cells_G + 1)
        self.gate_bias_G.copy_(torch.logit(detected_G))
        small, large = counts[:, 1 : self.n_small_values], counts[:, self.n_small_values :]
        small_GK = torch.cat([small, large.sum(1, keepdim=True)], dim=1)
        overall_K = (small_GK.sum(0) + 0.1) / (small_GK.sum(0) + 0.1).sum()
        value_K = torch.arange(1.0, self.n_small_values + 1)
        by_mean = torch.argsort(((small_GK * value_K).sum(1) + 1) / (small_GK.sum(1) + 1), stable=True)
        cumulative = F.pad(torch.cumsum(small_GK[by_mean].double(), 0), (0, 0, 1, 0))
        i = torch.arange(len(counts))
        near = cumulative[(i + neighbours).clamp_max(len(counts))] - cumulative[(i - neighbours).clamp_min(0)]
        near = ((near + 0.5 * overall_K) / (near.sum(1, keepdim=True) + 0.5)).float()
        prior_GK = torch.empty_like(near).index_copy_(0, by_mean, near)
        frequency = (small_GK + pseudocount * prior_GK) / (small_GK.sum(1, keepdim=True) + pseudocount)
        self.small_bias_GK.copy_(frequency.log())
        tail_V = large.sum(0) + 0.02
        self.large_bias_V.copy_((tail_V / tail_V.sum()).log())


class GatedDistribution(CountDistribution):
    """The tree of one minibatch; its parts are computed when they are asked for."""

    def __init__(self, head: GateHead, h_BD: Tensor) -> None:
        self._head, self._h_BD = head, h_BD
        self._gate_BE = head.gate_query(h_BD)
        self._small_BW = head.small_query(h_BD)

    def gate_logits(self) -> Tensor:
        """Logit of p(x_g > 0), B × G, float32."""
        return torch.addmm(self._head.gate_bias_G, self._gate_BE, self._head.gate_GE.T)

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        k = self._head.n_small_values
        positive_BG = x_0_BG > 0
        gate_BG = F.binary_cross_entropy_with_logits(self.gate_logits(), positive_BG.float(), reduction="none")
        nll_B = (gate_BG * scored_BG).sum(1)
        nonzero = Positions.where(positive_BG & scored_BG)
        value_M = nonzero.of(x_0_BG).long()
        small_M = F.cross_entropy(self._small_logits(nonzero), value_M.clamp_max(k) - 1, reduction="none")
        nll_B = nll_B.index_add(0, nonzero.cell_M, small_M)
        large = value_M >= k
        tail = nonzero[large]
        tail_M = F.cross_entropy(self._large_logits(tail), value_M[large] - k, reduction="none")
        return nll_B.index_add(0, tail.cell_M, tail_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        gate_M1 = self._gate_logits_at(positions)[:, None]
        small_MK = torch.log_softmax(self._small_logits(positions), -1) + F.logsigmoid(gate_M1)
        large_MV = torch.log_softmax(self._large_logits(positions), -1) + small_MK[:, -1:]
        return torch.cat([F.logsigmoid(-gate_M1), small_MK[:, :-1], large_MV], dim=1)

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; values are drawn only for the genes that come out non-zero."""
        p_zero_M = torch.sigmoid(-self._gate_logits_at(positions))
        token_M = torch.zeros(len(positions), dtype=torch.int64, device=p_zero_M.device)
        nonzero = torch.nonzero(uniform_M2[:, 0] >= p_zero_M)[:, 0]
        where = positions[nonzero]
        token_M[nonzero] = self._draw_values(where, uniform_M2[nonzero, 1])
        return token_M

    def _draw_values(self, positions: Positions, uniform_M: Tensor) -> Tensor:
        k = self._head.n_small_values
        p_MK = torch.softmax(self._small_logits(positions), -1)
        value_M = 1 + invert_cdf(p_MK.log(), uniform_M)
        tail = torch.nonzero(value_M >= k)[:, 0]
        below_T = p_MK[tail, :-1].sum(1)
        # Given that the uniform fell into the last category, where it fell inside is uniform again.
        inside_T = ((uniform_M[tail] - below_T) / (1 - below_T).clamp_min(1e-7)).clamp(0, 1 - 2**-24)
        value_M[tail] = k + invert_cdf(self._large_logits(positions[tail]), inside_T)
        return value_M

    def _gate_logits_at(self, positions: Positions) -> Tensor:
        return positions.of(self.gate_logits())

    def _small_logits(self, positions: Positions) -> Tensor:
        head = self._head
        query_MW = self._small_BW[positions.cell_M] * head.small_scale_GW[positions.gene_M]
        return F.linear(query_MW, head.small_basis_KW) + head.small_bias_GK[positions.gene_M]

    def _large_logits(self, positions: Positions) -> Tensor:
        head = self._head
        query_MW = head.large_query(self._h_BD)[positions.cell_M] + head.large_code_GW[positions.gene_M]
        return F.linear(query_MW, head.large_basis_VW, head.large_bias_V)
