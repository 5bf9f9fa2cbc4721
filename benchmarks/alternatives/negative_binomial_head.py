"""Alternative head: a mixture of discretised negative binomials and free probabilities of small counts.

p(v) = Σ_s π_s 1[v = s] + Σ_c ω_c NB(v; μ_c, θ_c), s = 0 … S-1, with the counts of a coarse token added up, so that
the 281 tokens are an exact categorical. What the cell changes: the log means, the weights, and the spike at zero.

Shapes: B cells, G genes, D trunk width, E gene width, C components, S spikes, W weights (S + C), M positions,
K = 281 tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lingshu_cell.data.tokenizer import bin_edges
from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

_FIRST_COARSE = 100  # tokens from here stand for several counts
_OVERFLOW = N_EXPRESSION_TOKENS - 1
_STEPS_OF_FIT, _RATE_OF_FIT = 300, 0.05


class NegativeBinomialHead(nn.Module):
    """Log means, weights and the zero spike tilt along the code of the gene; dispersions belong to the gene.

    Parameters
    ----------
    n_genes, width, gene_width
        As for the product's :class:`GateHead`.
    n_components, n_spikes
        C and S, both at least 1.
    """

    def __init__(self, n_genes: int, width: int, gene_width: int, n_components: int, n_spikes: int) -> None:
        super().__init__()
        self.n_components, self.n_spikes = n_components, n_spikes
        self.n_tilts = 2 * n_components + 1
        self.gene_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.query = nn.Linear(width, self.n_tilts * gene_width)
        self.log_mean_bias_GC = nn.Parameter(torch.zeros(n_genes, n_components))
        self.log_theta_bias_GC = nn.Parameter(torch.zeros(n_genes, n_components))
        self.weight_bias_GW = nn.Parameter(torch.zeros(n_genes, n_spikes + n_components))

    def forward(self, h_BD: Tensor, offsets: Sequence[object] = ()) -> "NegativeBinomialMixture":
        """Answer for every gene; the product's offsets by conditions are not known here."""
        if offsets:
            raise ValueError("this head knows no offsets")
        query_BQE = self.query(h_BD.float()).unflatten(1, (self.n_tilts, -1))
        tilt_QBG = torch.matmul(query_BQE.transpose(0, 1).flatten(0, 1), self.gene_GE.T)
        return NegativeBinomialMixture(self, tilt_QBG.unflatten(0, (self.n_tilts, len(h_BD))))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start with small codes; only the log means are asked for."""
        self.gene_GE.normal_(0.0, 0.01, generator=generator)
        self.query.weight.zero_()
        means = self.query.weight[: self.n_components * self.gene_GE.shape[1]]
        means.normal_(0.0, means.shape[1] ** -0.5, generator=generator)
        self.query.bias.zero_()

    @torch.enable_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Fit the untilted mixture of each gene to its token frequencies, from its mean and variance on.

        Parameters
        ----------
        token_counts_GV
            How many training cells show each token, G × 281.
        """
        counts = token_counts_GV.float()
        value_V = torch.arange(N_EXPRESSION_TOKENS, dtype=torch.float32)
        n_cells_G = counts.sum(1)
        mean_G = (counts @ value_V + 0.1) / n_cells_G
        excess_G = (counts @ value_V**2) / n_cells_G - mean_G**2 - mean_G
        theta_G = (mean_G**2 / excess_G.clamp_min(1e-9)).clamp(0.2, 50)
        spread_C = torch.arange(self.n_components) - (self.n_components - 1) / 2
        with torch.no_grad():
            self.log_mean_bias_GC.copy_(mean_G.log()[:, None] + spread_C)
            self.log_theta_bias_GC.copy_(theta_G.log()[:, None].expand(-1, self.n_components))
            self.weight_bias_GW.zero_()
            self.weight_bias_GW[:, : self.n_spikes] = -4.0
        gene_M, token_M = torch.nonzero(counts, as_tuple=True)
        weight_M = counts[gene_M, token_M] / n_cells_G[gene_M]
        static = [self.log_mean_bias_GC, self.log_theta_bias_GC, self.weight_bias_GW]
        start = [parameter.detach().clone() for parameter in static]
        optimiser = torch.optim.Adam(static, lr=_RATE_OF_FIT)
        for _ in range(_STEPS_OF_FIT):
            log_p_M = self.log_probability(*(p[gene_M] for p in static), token_M)
            # a pull to the start, worth some cells, so that genes seen in three cells are not fitted to them
            pull = sum(((p - p_0) ** 2 / n_cells_G[:, None]).sum() for p, p_0 in zip(static, start, strict=True))
            optimiser.zero_grad()
            (pull - (weight_M * log_p_M).sum()).backward()
            optimiser.step()
        for parameter in static:
            parameter.grad = None

    def log_probability(self, log_mean_MC: Tensor, log_theta_MC: Tensor, weight_MW: Tensor, token_M: Tensor) -> Tensor:
        """Log-probability of one token at each position from its mixture; unnormalised log weights."""
        log_nb_MC = log_negative_binomial_token(token_M, log_mean_MC, log_theta_MC)
        spike_MS = torch.arange(self.n_spikes, device=token_M.device) == token_M[:, None]
        log_part_MW = torch.cat([torch.where(spike_MS, 0.0, -torch.inf), log_nb_MC], dim=1)
        return torch.logsumexp(torch.log_softmax(weight_MW, -1) + log_part_MW, -1)


class NegativeBinomialMixture(CountDistribution):
    """The mixtures of one minibatch; zeros are scored for all genes at once, other values where they are."""

    def __init__(self, head: NegativeBinomialHead, tilt_QBG: Tensor) -> None:
        self._head, self._tilt_QBG = head, tilt_QBG

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        zero_BG = scored_BG & (x_0_BG == 0)
        nll_B = -(self._log_p_zero() * zero_BG).sum(1)
        nonzero = Positions.where(scored_BG & (x_0_BG > 0))
        log_p_M = self._head.log_probability(*self._parameters(nonzero), nonzero.of(x_0_BG).long())
        return nll_B.index_add(0, nonzero.cell_M, -log_p_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`; every token is added up from its counts, so it is slow."""
        parameters = self._parameters(positions)
        tokens = torch.arange(N_EXPRESSION_TOKENS, device=positions.cell_M.device)
        columns = [self._head.log_probability(*parameters, t.expand(len(positions))) for t in tokens]
        return torch.stack(columns, dim=1).float()

    def _log_p_zero(self) -> Tensor:
        head, n = self._head, self._head.n_components
        log_weights, log_norm = [], None
        for w in range(head.n_spikes + n):
            bias_G = head.weight_bias_GW[:, w]
            tilt = w if w == 0 else w - head.n_spikes + 1  # spikes 1 … S-1 do not tilt
            log_weights.append(bias_G + self._tilt_QBG[n + tilt] if w == 0 or w >= head.n_spikes else bias_G)
            log_norm = log_weights[-1] if log_norm is None else torch.logaddexp(log_norm, log_weights[-1])
        log_p = log_weights[0]
        for c in range(n):
            log_theta_G = head.log_theta_bias_GC[:, c]
            log_mean_BG = head.log_mean_bias_GC[:, c] + self._tilt_QBG[c]
            log_zero_BG = -log_theta_G.exp() * nn.functional.softplus(log_mean_BG - log_theta_G)
            log_p = torch.logaddexp(log_p, log_weights[head.n_spikes + c] + log_zero_BG)
        return log_p - log_norm

    def _parameters(self, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        head, n = self._head, self._head.n_components
        tilt_MQ = self._tilt_QBG[:, positions.cell_M, positions.gene_M].T
        still_MS = tilt_MQ.new_zeros(len(positions), head.n_spikes - 1)
        weight_tilt_MW = torch.cat([tilt_MQ[:, n : n + 1], still_MS, tilt_MQ[:, n + 1 :]], dim=1)
        log_mean_MC = head.log_mean_bias_GC[positions.gene_M] + tilt_MQ[:, :n]
        return (
            log_mean_MC,
            head.log_theta_bias_GC[positions.gene_M],
            head.weight_bias_GW[positions.gene_M] + weight_tilt_MW,
        )


def log_negative_binomial_token(token_M: Tensor, log_mean_MC: Tensor, log_theta_MC: Tensor) -> Tensor:
    """Log-probability of a token under negative binomials: of its count, or of all counts of a coarse token.

    Parameters
    ----------
    token_M
        Tokens 0 … 280.
    log_mean_MC, log_theta_MC
        Log mean and log dispersion θ (variance μ + μ² / θ).
    """
    log_p_MC = log_negative_binomial(token_M.clamp_max(_FIRST_COARSE - 1).float()[:, None], log_mean_MC, log_theta_MC)
    first_V, last_V = (torch.from_numpy(edge.astype("float32")) for edge in bin_edges())
    for width in (10, 100):
        coarse = torch.nonzero((token_M >= _FIRST_COARSE) & (token_M < _OVERFLOW) & (_width(token_M) == width))[:, 0]
        count_TN = first_V[token_M[coarse]][:, None] + torch.arange(width)
        parameters = (p[coarse][:, None] for p in (log_mean_MC, log_theta_MC))
        log_sum_TC = torch.logsumexp(log_negative_binomial(count_TN[..., None], *parameters), 1)
        log_p_MC = log_p_MC.index_copy(0, coarse, log_sum_TC)
    overflow = torch.nonzero(token_M == _OVERFLOW)[:, 0]
    if len(overflow):
        count_N = torch.arange(last_V[_OVERFLOW - 1] + 1)[:, None]
        parameters = (p[overflow][:, None] for p in (log_mean_MC, log_theta_MC))
        below_TC = torch.logsumexp(log_negative_binomial(count_N, *parameters), 1).exp()
        log_p_MC = log_p_MC.index_copy(0, overflow, torch.log1p(-below_TC.clamp_max(1 - 1e-7)))
    return log_p_MC


def _width(token_M: Tensor) -> Tensor:
    """Counts in a coarse token: 10 up to 999, then 100."""
    return torch.where(token_M < _FIRST_COARSE + 90, 10, 100)


def log_negative_binomial(count: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability of a count under a negative binomial; all arguments broadcast."""
    theta = log_theta.exp()
    log_sum = torch.logaddexp(log_theta, log_mean)
    ways = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
    return ways + theta * (log_theta - log_sum) + count * (log_mean - log_sum)
