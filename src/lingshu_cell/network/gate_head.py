"""Gate-and-values head: the same categorical over 281 tokens as a tree, paid for only where counts are not zero.

A cell has about 90 % zeros. The head first says zero or not for every gene (one low-rank matmul), then, only for the
genes that are not zero, which of 1, 2, …, K - 1, "K or more", and only for those of K and more, which token exactly.
The product of the three is a categorical distribution over all tokens (a test adds it up to one).

Values are exponential families: each gene has a base measure, started at its own frequencies, and the cell tilts it
along a few statistics of the count (log v, v, log² v: enough for a Poisson, a negative binomial or a log-normal to
change its mean and its width). The tilt of gene g is an inner product with the code U_g that the gate uses too, so
what is learned of a gene from its zeros serves its values.

The more of a cell is visible, the nearer a count is to a Poisson variable. That is worth a nat of thousands, too little
for the tilts to learn it, and yet generated cells are told from real ones by counts that scatter too much. So each
distribution is multiplied by a power of one as wide as a Poisson distribution about the gene's mean; the power is the
cell's and the gene's own.

Shapes: B cells, G genes, D trunk width, E gene width, M positions, K small values, J statistics, L tokens from K up,
V = 281.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingshu_cell.network.average_cell import Offsets
from lingshu_cell.network.detection import detection_nll, log_detected, log_mean_of, undetected_rate
from lingshu_cell.network.distribution import CountDistribution, Positions, invert_cdf
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

N_STATISTICS = 3
_TAIL_CENTRE = 3.5  # log count around which the tail's statistics turn
_LEAST_TAIL = 1e-4  # probability of counts of K and more, given that there are any, below which means do without
_RULED_OUT = 30.0  # nats
_SIZE_OVERALL = 2.0  # of a negative binomial: a gene's counts over all cells
_FIRST_TAIL_SD = 0.5  # of log counts from K up of a gene that hardly reaches them
_REACH, _LEAST_REACH = 3.0, 60.0  # times the largest count of the training cells, and at least: common up to there
_BEYOND = 8.0  # nats for a count e times as large
_FIRST_POWER = -3.0
_NO_POWER = math.log1p(math.exp(_FIRST_POWER))  # .05: the power is 0 at the start, and never below -.05
_LOG_MEANS = (-3.0, 10.0)
_DENSE_FROM = 100  # below 1 position in 100, gathered rows cost less than one dense product


class GateHead(nn.Module):
    """From one hidden vector per cell to a distribution per gene.

    * gate: p(x_g > 0) is how often a gene with log mean u(h) · U_g + b_g is detected, see ``detection.py``
    * small values: log p(v) = c_gv + Σ_j (q_j(h) · U_g + s_gj) S_j(v) + κ_g(h) N_g(v) + constant,
      v = 1 … K-1 and "K or more"
    * tail: log p(v | v ≥ K) = d_v + Σ_j (r_j(h) · U_g + t_gj) T_j(v) + κ_g(h) N_g(v) - 8 max(log v - log R_g, 0)² +
      constant, v = tokens K … 280; R_g is three times the largest count of the training cells, and 60 at least
    * narrowing: N_g(v) = -m_g (log v - log m_g)² / 2, a Poisson distribution near its mean m_g with heavier tails; its
      power is κ_g(h) = softplus(k · h + k_g) - .05
    """

    def __init__(self, n_genes: int, width: int, gene_width: int, n_small_values: int, count_of_token: Tensor) -> None:
        super().__init__()
        n_tail = N_EXPRESSION_TOKENS - n_small_values
        self.n_small_values = n_small_values
        self.register_buffer("tail_count_L", count_of_token[n_small_values:].float(), persistent=False)
        # No count of a token is below: the last reaches from 2/3 of its middle, others from 95 % of it or more.
        least_L = 0.95 * count_of_token[n_small_values:].float()
        least_L[-1] = 0.66 * count_of_token[-1]
        self.register_buffer("tail_least_L", least_L, persistent=False)
        self.gene_GE = nn.Parameter(torch.empty(n_genes, gene_width))
        self.gate_query = nn.Linear(width, gene_width)
        self.gate_bias_G = nn.Parameter(torch.zeros(n_genes))
        self.small_query = nn.Linear(width, N_STATISTICS * gene_width, bias=False)
        self.small_bias_GJ = nn.Parameter(torch.zeros(n_genes, N_STATISTICS))
        self.small_bias_GK = nn.Parameter(torch.zeros(n_genes, n_small_values))
        self.small_statistic_JK = nn.Parameter(torch.zeros(N_STATISTICS, n_small_values))
        self.tail_query = nn.Linear(width, N_STATISTICS * gene_width, bias=False)
        self.tail_bias_GJ = nn.Parameter(torch.zeros(n_genes, N_STATISTICS))
        self.tail_statistic_JL = nn.Parameter(torch.zeros(N_STATISTICS, n_tail))
        self.tail_bias_L = nn.Parameter(torch.zeros(n_tail))
        self.power_D = nn.Parameter(torch.zeros(width))
        self.power_bias_G = nn.Parameter(torch.full((n_genes,), _FIRST_POWER))
        self.log_mean_G = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("reach_G", torch.full((n_genes,), math.log(_LEAST_REACH)))
        self.register_buffer("small_log_K", torch.arange(1.0, n_small_values + 1).log(), persistent=False)
        self.register_buffer("tail_log_L", self.tail_count_L.log(), persistent=False)

    def forward(self, h_BD: Tensor, offsets: Offsets | None = None) -> "GatedDistribution":
        """Answer for every gene; heads run in fp32 whatever the trunk's precision.

        Parameters
        ----------
        h_BD
            State of each cell.
        offsets
            What is added to the logits of gate and values, to start at the average cells of the conditions.
        """
        with torch.autocast(h_BD.device.type, enabled=False):
            return GatedDistribution(self, h_BD.float(), offsets)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start without tilt, with statistics that let a Poisson, a negative binomial or a log-normal move and
        widen.
        """
        self.gene_GE.normal_(0.0, 0.01, generator=generator)
        self.gate_query.weight.normal_(0.0, self.gate_query.in_features**-0.5, generator=generator)
        self.gate_query.bias.zero_()
        self.small_query.weight.zero_()
        self.tail_query.weight.zero_()
        self.power_D.zero_()
        self.power_bias_G.fill_(_FIRST_POWER)
        v = torch.arange(1.0, self.n_small_values + 1)
        log_v = v.log() - v.log().mean()
        self.small_statistic_JK.copy_(torch.stack([log_v, (v - v.mean()) / 4, log_v**2 - (log_v**2).mean()]))
        z = self.tail_count_L.log() - _TAIL_CENTRE
        self.tail_statistic_JL.copy_(torch.stack([2 * z, 5 * z**2, (self.tail_count_L / 30).clamp_max(20)]))
        # A smooth density over counts becomes bin probabilities through the bins' widths, 1, 10, 100 and more.
        self.tail_bias_L.copy_(torch.gradient(self.tail_count_L.double())[0].clamp_min(1).log())

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor, pseudocount: float = 30.0) -> None:
        """Set the biases so that the untrained head gives each gene's own token frequencies.

        The small values of a gene are shrunk towards those of the genes with the nearest mean, worth ``pseudocount``
        cells, and so is its tail, a log-normal by moments: a gene never seen above 20 may be seen at 25, not at 10,000.

        Parameters
        ----------
        token_counts_GV
            How many training cells show each token, G × 281.
        """
        counts = token_counts_GV.float()
        n_cells_G = counts.sum(1)
        small, tail_GL = counts[:, 1 : self.n_small_values], counts[:, self.n_small_values :]
        value_K = torch.arange(1.0, self.n_small_values + 1)
        sum_G = counts[:, 1:] @ torch.cat([value_K[:-1], self.tail_count_L.cpu()])
        self._start_gates(counts[:, 0], n_cells_G, sum_G)
        small_GK = torch.cat([small, tail_GL.sum(1, keepdim=True)], dim=1)
        floor_K = value_K**-3
        floor_K[-1] = 0.5 * (self.n_small_values - 0.5) ** -2  # and all above
        by_mean = torch.argsort(((small_GK * value_K).sum(1) + 1) / (small_GK.sum(1) + 1), stable=True)
        near = _near(small_GK, by_mean)
        prior_GK = (near + 0.5 * floor_K / floor_K.sum()) / (near.sum(1, keepdim=True) + 0.5)
        frequency = (small_GK + pseudocount * prior_GK) / (small_GK.sum(1, keepdim=True) + pseudocount)
        self.small_bias_GK.copy_(frequency.log())
        self.log_mean_G.copy_(((sum_G + 1) / (counts[:, 1:].sum(1) + 1)).log())
        self._start_tails(tail_GL, by_mean)
        largest_G = ((tail_GL > 0) * self.tail_count_L.cpu()).amax(1)
        self.reach_G.copy_((_REACH * largest_G).clamp_min(_LEAST_REACH).log())

    def _start_gates(self, zeros_G: Tensor, n_cells_G: Tensor, sum_G: Tensor) -> None:
        """Shrink the frequency of zeros towards that of a negative binomial, worth a cell: where no training cell lacks
        a gene, that tells how far from it they are.
        """
        mean_G = sum_G.double() / n_cells_G.clamp_min(1)
        expected_G = ((1 + mean_G / _SIZE_OVERALL) ** -_SIZE_OVERALL).clamp_max(0.5)
        undetected_G = (zeros_G.double() + expected_G) / (n_cells_G + 1)
        self.gate_bias_G.copy_(log_mean_of(1 - undetected_G))

    def _start_tails(self, tail_GL: Tensor, by_mean: Tensor, pseudocount: float = 5.0) -> None:
        """Fit log-normals by moments, those of a gene seen there in few cells shrunk towards those of genes with the
        nearest mean, and these towards one that hardly leaves the first counts.
        """
        log_L = self.tail_count_L.log().cpu()
        n_G = tail_GL.sum(1)
        mean_G = tail_GL @ log_L / n_G.clamp_min(1)
        square_G = (tail_GL * (log_L - mean_G[:, None]) ** 2).sum(1)
        weight_G = n_G.clamp_max(pseudocount)  # so that no gene speaks for all its neighbours
        moments = torch.stack([torch.ones_like(mean_G), mean_G, mean_G**2 + square_G / n_G.clamp_min(1)], dim=1)
        first = log_L[0] + _FIRST_TAIL_SD
        near = _near(weight_G[:, None] * moments, by_mean)
        near = near + pseudocount * torch.stack([torch.ones(()), first, first**2 + _FIRST_TAIL_SD**2])
        near_mean_G = near[:, 1] / near[:, 0]
        near_variance_G = near[:, 2] / near[:, 0] - near_mean_G**2
        total_G = n_G + pseudocount
        variance_G = (square_G + pseudocount * near_variance_G) / total_G
        variance_G = variance_G + n_G * pseudocount * (mean_G - near_mean_G) ** 2 / total_G**2 + 0.01
        mean_G = (mean_G * n_G + near_mean_G * pseudocount) / total_G
        # log N(log v; mean, variance) in the statistics 2 z and 5 z², z = log v - centre
        self.tail_bias_GJ[:, 0] = (mean_G - _TAIL_CENTRE) / variance_G / 2
        self.tail_bias_GJ[:, 1] = -1 / (2 * variance_G) / 5


def _near(values_GX: Tensor, order: Tensor) -> Tensor:
    """Sum the rows of each gene, and of 20 or one in 200 before and after it in an order, G × X."""
    cumulative = F.pad(torch.cumsum(values_GX[order].double(), 0), (0, 0, 1, 0))
    i, neighbours = torch.arange(len(order)), max(len(order) // 200, 20)
    near = cumulative[(i + neighbours).clamp_max(len(order))] - cumulative[(i - neighbours).clamp_min(0)]
    return torch.empty_like(values_GX).index_copy_(0, order, near.to(values_GX.dtype))


class GatedDistribution(CountDistribution):
    """The tree of one minibatch; its parts are computed when they are asked for.

    Rows are taken by ``index_select``, whose gradient adds up in a fixed order; that of plain indexing does not with
    several threads, and a resumed run would differ in the last bit.
    """

    def __init__(self, head: GateHead, h_BD: Tensor, offsets: Offsets | None = None) -> None:
        self._head, self._h_BD, self._offsets = head, h_BD, offsets
        self._gate_BE = head.gate_query(h_BD)

    def log_means(self) -> Tensor:
        """Log mean that says how often each gene is detected, B × G, float32."""
        with self._fp32():
            log_mean_BG = torch.addmm(self._head.gate_bias_G, self._gate_BE, self._head.gene_GE.T)
            if self._offsets is not None:
                log_mean_BG = log_mean_BG + self._offsets.gate_RG.index_select(0, self._offsets.place_B)
                if self._offsets.left_B is not None:
                    log_mean_BG = log_mean_BG + self._offsets.left_B[:, None]
            return log_mean_BG

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        k = self._head.n_small_values
        positive_BG = x_0_BG > 0
        nonzero = Positions.where(positive_BG & scored_BG)
        nll_B = detection_nll(self.log_means(), nonzero, scored_BG)
        value_M = nonzero.of(x_0_BG).long()
        small_M = F.cross_entropy(self._small_logits(nonzero), value_M.clamp_max(k) - 1, reduction="none")
        nll_B = nll_B.index_add(0, nonzero.cell_M, small_M)
        in_tail = value_M >= k
        tail = nonzero[in_tail]
        tail_M = F.cross_entropy(self._tail_logits(tail), value_M[in_tail] - k, reduction="none")
        return nll_B.index_add(0, tail.cell_M, tail_M)

    def log_probabilities(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_probabilities`."""
        rate_M1 = self._undetected_rate(positions)[:, None]
        small_MK = torch.log_softmax(self._small_logits(positions), -1) + log_detected(rate_M1)
        tail_MV = torch.log_softmax(self._tail_logits(positions), -1) + small_MK[:, -1:]
        return torch.cat([-rate_M1, small_MK[:, :-1], tail_MV], dim=1)

    def log_p_zero(self, positions: Positions) -> Tensor:
        """See :meth:`CountDistribution.log_p_zero`."""
        return -self._undetected_rate(positions)

    def log_mean(self, positions: Positions, count_V: Tensor) -> Tensor:
        """See :meth:`CountDistribution.log_mean`; the tail is looked at only where it has weight."""
        k = self._head.n_small_values
        p_MK = torch.softmax(self._small_logits(positions), -1)
        heavy = torch.nonzero(p_MK[:, -1] > _LEAST_TAIL)[:, 0]
        with self._fp32():
            mean_M = p_MK[:, :-1] @ count_V[1:k]
            tail_T = torch.softmax(self._tail_logits(positions[heavy]), -1) @ count_V[k:]
        mean_M = mean_M.index_add(0, heavy, p_MK[heavy, -1] * tail_T)
        return log_detected(self._undetected_rate(positions)) + torch.log(mean_M.clamp_min(1e-30))

    def draw(self, positions: Positions, uniform_M2: Tensor) -> Tensor:
        """See :meth:`CountDistribution.draw`; values are drawn only for the genes that come out non-zero."""
        p_zero_M = torch.exp(-self._undetected_rate(positions))
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
        value_M[tail] = k + invert_cdf(self._tail_logits(positions[tail]), inside_T)
        return value_M

    def _undetected_rate(self, positions: Positions) -> Tensor:
        """-log p(x_g = 0) at the positions, M."""
        return undetected_rate(self._log_means_at(positions))

    def _log_means_at(self, positions: Positions) -> Tensor:
        n_all = self._gate_BE.shape[0] * self._head.gene_GE.shape[0]
        if len(positions) > n_all // _DENSE_FROM:
            return positions.of(self.log_means())
        codes_ME = self._head.gene_GE[positions.gene_M]
        log_mean_M = (self._gate_BE[positions.cell_M] * codes_ME).sum(-1) + self._head.gate_bias_G[positions.gene_M]
        if self._offsets is not None:
            log_mean_M = log_mean_M + self._offsets.gate_RG[self._offsets.place_B[positions.cell_M], positions.gene_M]
            if self._offsets.left_B is not None:
                log_mean_M = log_mean_M + self._offsets.left_B[positions.cell_M]
        return log_mean_M

    def _small_logits(self, positions: Positions) -> Tensor:
        head = self._head
        with self._fp32():
            tilt_MJ = self._tilt(head.small_query, positions) + head.small_bias_GJ.index_select(0, positions.gene_M)
            fold_M = self._fold(positions)
            tilt_MJ = tilt_MJ + self._offset(fold_M, 0)
            logits_MK = tilt_MJ @ head.small_statistic_JK + head.small_bias_GK.index_select(0, positions.gene_M)
            logits_MK = logits_MK + self._narrowed(positions, fold_M, head.small_log_K, head.n_small_values)
            return self._within(logits_MK, positions, torch.arange(1, head.n_small_values + 1, device=logits_MK.device))

    def _tail_logits(self, positions: Positions) -> Tensor:
        head = self._head
        with self._fp32():
            tilt_MJ = self._tilt(head.tail_query, positions) + head.tail_bias_GJ.index_select(0, positions.gene_M)
            fold_M = self._fold(positions)
            tilt_MJ = tilt_MJ + self._offset(fold_M, N_STATISTICS)
            logits_ML = tilt_MJ @ head.tail_statistic_JL + head.tail_bias_L
            logits_ML = logits_ML + self._narrowed(positions, fold_M, head.tail_log_L)
            reach_M = head.reach_G.index_select(0, positions.gene_M)
            reach_M = reach_M if fold_M is None else reach_M + fold_M.clamp_min(0)
            logits_ML = logits_ML - _BEYOND * (head.tail_log_L - reach_M[:, None]).clamp_min(0) ** 2
            return self._within(logits_ML, positions, head.tail_least_L)

    def _narrowed(
        self, positions: Positions, fold_M: Tensor | None, log_count_V: Tensor, or_more: int | None = None
    ) -> Tensor:
        """κ_g(h) log N(log v; log m_g, 1 / m_g) but for a constant, M × V; the last of the counts may stand for that
        and more.
        """
        head = self._head
        power_M = (
            F.softplus(self._power_of_cells(positions) + head.power_bias_G.index_select(0, positions.gene_M))
            - _NO_POWER
        )
        log_mean_M = head.log_mean_G.index_select(0, positions.gene_M)
        log_mean_M = (log_mean_M if fold_M is None else log_mean_M + fold_M).clamp(*_LOG_MEANS)
        narrow_MV = -0.5 * log_mean_M.exp()[:, None] * (log_count_V - log_mean_M[:, None]) ** 2
        if or_more is not None:
            more_M = torch.special.log_ndtr(2 * (torch.exp(log_mean_M / 2) - (or_more - 0.5) ** 0.5))
            more_M = more_M + 0.5 * (log_mean_M + math.log(2 * math.pi))
            narrow_MV = torch.cat([narrow_MV[:, :-1], more_M[:, None]], dim=1)
        return power_M[:, None] * narrow_MV

    def _power_of_cells(self, positions: Positions) -> Tensor:
        """k · h at the positions, M."""
        return (self._h_BD @ self._head.power_D).index_select(0, positions.cell_M)

    def _within(self, logits_MV: Tensor, positions: Positions, least_V: Tensor) -> Tensor:
        """Rule out counts above what is left of a cell's library; the first value always remains."""
        if self._offsets is None or self._offsets.most_B is None:
            return logits_MV
        beyond_MV = least_V > self._offsets.most_B.index_select(0, positions.cell_M)[:, None]
        beyond_MV[:, 0] = False
        return logits_MV - _RULED_OUT * beyond_MV

    def _offset(self, fold_M: Tensor | None, first: int) -> Tensor | float:
        """What log folds add to the statistics whose amounts begin at ``first``, M × J."""
        return 0.0 if fold_M is None else self._offsets.amount_A[first : first + N_STATISTICS] * fold_M[:, None]

    def _fold(self, positions: Positions) -> Tensor | None:
        """Log folds of the means of counts above 0, M."""
        if self._offsets is None:
            return None
        fold_RG = self._offsets.fold_RG
        place_M = self._offsets.place_B.index_select(0, positions.cell_M) * fold_RG.shape[1] + positions.gene_M
        fold_M = fold_RG.flatten().index_select(0, place_M)
        if self._offsets.left_B is not None:
            slope_M = self._offsets.fold_slope_RG.flatten().index_select(0, place_M)
            fold_M = fold_M + self._offsets.left_B.index_select(0, positions.cell_M) * slope_M
        return fold_M

    def _fp32(self) -> torch.autocast:
        """Keep out of an autocast around the caller, as the parts are computed when asked for."""
        return torch.autocast(self._h_BD.device.type, enabled=False)

    def _tilt(self, query: nn.Linear, positions: Positions) -> Tensor:
        """q_j(h) · U_g at the positions, M × J: one dense product where many are asked for, gathered rows where few
        are.
        """
        query_BJE = query(self._h_BD).unflatten(1, (N_STATISTICS, -1))
        codes_GE = self._head.gene_GE
        if len(positions) > len(query_BJE) * len(codes_GE) // _DENSE_FROM:
            tilt_BJG = torch.matmul(query_BJE.flatten(0, 1), codes_GE.T)
            first_M1 = (positions.cell_M * N_STATISTICS * len(codes_GE) + positions.gene_M)[:, None]
            place_MJ = first_M1 + torch.arange(N_STATISTICS, device=first_M1.device) * len(codes_GE)
            return tilt_BJG.flatten().index_select(0, place_MJ.flatten()).unflatten(0, (-1, N_STATISTICS))
        query_MJE = query_BJE.index_select(0, positions.cell_M)
        return (query_MJE * codes_GE.index_select(0, positions.gene_M)[:, None]).sum(-1)
