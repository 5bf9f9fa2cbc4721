"""Our denoiser: the visible genes are a set, summed as evidence; a residual trunk reads the sum and the head answers.

Where the paper spends a transformer token on every S genes, we give every gene one code U_g and one sum per cell. The
head says log p(x_g) = θ_g(h) · S(x_g) + … with θ_g(h) linear in U_g; what a visible gene tells about h is then the
score of that family, (S(x_g) - E S(x_g)) U_g. So the encoder adds up just that, with the same codes: visible zeros
speak through their expectation, and what is learned of a gene as an output serves it as an input. Separate input
weights learn slower and fit noise (docs/log.md). A cell costs about 6 · G · E multiplications, thousands of times
below the paper's.

Shapes: B cells, G genes, C condition fields, E gene width, D trunk width, F features of the visible set.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lingshu_cell.network.average_cell import AverageCell, AverageCells, Offsets
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import CountDistribution, Denoiser, PartialCells, Positions
from lingshu_cell.network.gate_head import N_STATISTICS, GateHead
from lingshu_cell.network.layers import RowDropout, SwiGLU
from lingshu_cell.network.perturbation import ContextReader, DepthReader, PerturbationReader, Response
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_N_FREQUENCIES = 8
_N_FEATURES = 4 * _N_FREQUENCIES + 4
_MOST_LOG_WEIGHT = 10.0  # first weight of a gene's log count: half its mean, as a Poisson score has it, at most this


Relative = tuple[AverageCells, Offsets]  # the average cells of conditions, and what they add to the head


@dataclass(frozen=True)
class ConditionSizes:
    """What a set denoiser can be told.

    Attributes
    ----------
    categories
        For each condition field, the number of its indices; index 0 of a field means *unknown*.
    perturbations
        Number of perturbations, control included; 0 = the model knows none.
    embedding
        Length of the known embedding of a perturbation; 0 = none.
    context, effect, depth
        Whether there are contexts of control cells, prior effects, and library sizes to be asked for.
    """

    categories: tuple[int, ...] = ()
    perturbations: int = 0
    embedding: int = 0
    context: bool = False
    effect: bool = False
    depth: bool = False


@dataclass(frozen=True)
class Evidence:
    """What the visible genes of each cell add up to, relative to an average cell.

    Attributes
    ----------
    detected_BE, log_BE
        Along the gene codes: detected or not, and log counts, less their expectations.
    n_visible_B, total_B
        How many genes are visible, and their counts.
    share_B
        Share that they have of the average cell's counts; 0 where it has no shares.
    """

    detected_BE: Tensor
    log_BE: Tensor
    n_visible_B: Tensor
    total_B: Tensor
    share_B: Tensor


class SetDenoiser(nn.Module, Denoiser):
    """Sum over visible genes, residual SwiGLU trunk, gate-and-values head.

    Parameters
    ----------
    n_genes
        G, the length of the gene list.
    condition_sizes
        What it can be told; a plain tuple stands for categories alone.
    count_of_token
        Expected count of each expression token, float, shape 281.
    gene_width, width, n_blocks, feedforward_width, n_small_values, dropout
        Sizes, see ``config.SetConfig``.
    generator
        Source of the initial weights.
    """

    def __init__(
        self,
        n_genes: int,
        condition_sizes: ConditionSizes | tuple[int, ...],
        count_of_token: Tensor,
        *,
        gene_width: int,
        width: int,
        n_blocks: int,
        feedforward_width: int,
        n_small_values: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        count_T = torch.zeros(MASK_TOKEN + 1)
        count_T[:N_EXPRESSION_TOKENS] = count_of_token
        self.register_buffer("count_T", count_T, persistent=False)
        told = condition_sizes if isinstance(condition_sizes, ConditionSizes) else ConditionSizes(condition_sizes)
        sizes = torch.tensor([0, *told.categories])
        self.register_buffer("first_row_C", torch.cumsum(sizes, 0)[:-1], persistent=False)
        self.register_buffer("detection_G", torch.zeros(n_genes))  # E 1[x > 0]
        self.register_buffer("mean_log_G", torch.zeros(n_genes))  # E log(1 + x)
        self.detection_weight_G = nn.Parameter(torch.ones(n_genes))
        self.log_weight_G = nn.Parameter(torch.zeros(n_genes))
        self.detection_norm, self.log_norm = nn.RMSNorm(gene_width), nn.RMSNorm(gene_width)
        self.detection_in = nn.Linear(gene_width, width, bias=False)
        self.log_in = nn.Linear(gene_width, width, bias=False)
        self.feature_in = nn.Linear(_N_FEATURES, width)
        self.condition = nn.Embedding(max(int(sizes.sum()), 1), width)
        self.blocks = nn.ModuleList(_TrunkBlock(width, feedforward_width, dropout) for _ in range(n_blocks))
        self.norm = nn.RMSNorm(width)
        self.head = GateHead(n_genes, width, gene_width, n_small_values, count_of_token)
        self.perturbation = (
            PerturbationReader(told.perturbations, told.embedding, width) if told.perturbations else None
        )
        self.response = Response(width) if told.perturbations else None
        self.context = ContextReader(gene_width, width) if told.context else None
        self.average_cell = AverageCell(n_genes, N_STATISTICS) if told.context or told.effect or told.depth else None
        self.depth = DepthReader(width) if told.depth else None
        self._initialise(generator)

    def forward(self, x_t_BG: Tensor, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer p(x_0 | x_t, conditions) for every gene; arguments as in :class:`TransformerDenoiser`."""
        conditions = Conditions.of(conditions)
        relative = self.relative_to(conditions)
        return self._answer(self.read(x_t_BG, relative), x_t_BG, conditions, relative)

    def start(self, x_t_BG: Tensor) -> PartialCells:
        """Begin to follow cells; see :class:`SummedCells`."""
        return SummedCells(self, x_t_BG)

    def answer(self, cells: PartialCells, conditions: Conditions | Tensor) -> CountDistribution:
        """Answer for cells being followed; their evidence is kept up to date for each conditions asked about."""
        if not isinstance(cells, SummedCells):
            return self.forward(cells.x_t_BG, conditions)
        relative, evidence = cells.of(conditions)
        return self._answer(evidence, cells.x_t_BG, Conditions.of(conditions), relative)

    def read(self, x_t_BG: Tensor, relative: Relative | None) -> Evidence:
        """Sum the evidence of the visible genes along the gene codes: detected or not, and log count, each less what
        is expected of the average cell of the conditions, or of all training cells.
        """
        average = None if relative is None else relative[0]
        visible_BG = (x_t_BG != MASK_TOKEN).float()
        count_BG = self.count_T.index_select(0, x_t_BG.int().flatten()).view(x_t_BG.shape)  # 0 where hidden
        codes_GE, (detection, mean_log) = self.head.gene_GE, self.expected(average)
        detected_BG = (count_BG > 0).float() - visible_BG * detection
        detected_BE = (detected_BG @ (codes_GE * self.detection_weight_G[:, None])).float()
        log_BG = torch.log1p(count_BG) - visible_BG * mean_log
        log_BE = (log_BG @ (codes_GE * self.log_weight_G[:, None])).float()
        total_B = count_BG.sum(1)
        share_B = torch.zeros_like(total_B)
        if average is not None and average.share_RG is not None:
            share_B = (visible_BG * average.share_RG.index_select(0, average.place_B)).sum(1)
        return Evidence(detected_BE, log_BE, visible_BG.sum(1), total_B, share_B)

    def expected(self, average: AverageCells | None) -> tuple[Tensor, Tensor]:
        """Detection and log counts expected of each gene: of all cells alike, G, or of each its own, B × G."""
        if average is None:
            return self.detection_G, self.mean_log_G
        return tuple(one.index_select(0, average.place_B) for one in (average.detected_RG, average.log_RG))

    def relative_to(self, conditions: Conditions) -> Relative | None:
        """Give the average cells of the conditions, which all else is relative to; None without such conditions."""
        if self.average_cell is None:
            return None
        log_library = None if self.depth is None else self.depth.log_library
        with torch.autocast(self.detection_G.device.type, enabled=False):
            average = self.average_cell(conditions, self.detection_G, self.mean_log_G, log_library)
            return average, self.average_cell.offsets(average, self.detection_G, self.mean_log_G)

    def _answer(
        self, evidence: Evidence, x_t_BG: Tensor, conditions: Conditions, relative: Relative | None
    ) -> CountDistribution:
        detected_BE, log_BE, offsets, left_B = evidence.detected_BE, evidence.log_BE, None, None
        if relative is not None:
            average, offsets = relative
            if average.depth_B is not None:
                left_B = average.left(evidence.share_B, evidence.total_B)
                most_B = average.most(evidence.total_B, (x_t_BG == N_EXPRESSION_TOKENS - 1).any(1))
                offsets = replace(offsets, left_B=left_B * self.average_cell.left_amount_1, most_B=most_B)
        feature_BF = self._features(evidence.n_visible_B, evidence.total_B, detected_BE, log_BE)
        h_BD = self.detection_in(self.detection_norm(detected_BE)) + self.log_in(self.log_norm(log_BE))
        h_BD = h_BD + self.feature_in(feature_BF) + self._at_rest(conditions, left_B)
        for block in self.blocks:
            h_BD = block(h_BD, feature_BF)
        if self.perturbation is not None and conditions.perturbation_BP is not None:
            h_BD = self.response(h_BD, self.perturbation(conditions))
        return self.head(self.norm(h_BD), offsets)

    def _at_rest(self, conditions: Conditions, left_B: Tensor | None) -> Tensor:
        """What the conditions say of a cell before anything is done to it: categories, context, library size; B × D."""
        h_BD = self.condition(conditions.category_BC + self.first_row_C).sum(1)
        if self.context is not None and conditions.context is not None:
            weights_2G = torch.stack([self.detection_weight_G, self.log_weight_G])
            expected_2G = torch.stack([self.detection_G, self.mean_log_G])
            h_BD = h_BD + self.context(conditions.context, self.head.gene_GE, weights_2G, expected_2G)
        if self.depth is not None and conditions.depth_B is not None:
            h_BD = h_BD + self.depth(conditions.depth_B, left_B)
        return h_BD

    @torch.no_grad()
    def start_at_frequencies(self, token_counts_GV: Tensor) -> None:
        """Start at the token frequencies of the training cells, G × 281, see :meth:`GateHead.start_at_frequencies`."""
        frequency_GV = token_counts_GV.double() / token_counts_GV.sum(1, keepdim=True).clamp_min(1)
        count_V = self.count_T[:N_EXPRESSION_TOKENS].double().cpu()
        mean_G = frequency_GV @ count_V
        self.detection_G.copy_(1 - frequency_GV[:, 0])
        self.mean_log_G.copy_(frequency_GV @ torch.log1p(count_V))
        self.log_weight_G.copy_(torch.where(mean_G > 0.5, mean_G / 2, 0.0).clamp_max(_MOST_LOG_WEIGHT))
        self.head.start_at_frequencies(token_counts_GV)

    def _features(self, n_visible_B: Tensor, total_B: Tensor, detected_BE: Tensor, log_BE: Tensor) -> Tensor:
        """How much is visible, the library size it suggests (both as Fourier features), and how strong the evidence
        is; B × F.
        """
        seen = torch.log1p(n_visible_B) / math.log1p(self.n_genes)
        library = (torch.log1p(total_B) - torch.log(n_visible_B.clamp_min(1) / self.n_genes)) / 4 - 2
        frequency = 2.0 ** torch.arange(_N_FREQUENCIES, device=seen.device)
        angle = torch.cat([1.5 * seen[:, None] * frequency, library[:, None] * frequency], dim=1)
        strength = [
            torch.log(sum_BE.norm(dim=1) / torch.sqrt(n_visible_B + 1) + 0.01) for sum_BE in (detected_BE, log_BE)
        ]
        return torch.cat([angle.sin(), angle.cos(), torch.stack([seen, library, *strength], dim=1)], dim=1)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        self.condition.weight.normal_(0.0, 1.0, generator=generator)
        for block in self.blocks:
            block.start_as_identity()
        self.head.initialise(generator)
        if self.perturbation is not None:
            self.perturbation.initialise()
            self.response.initialise()
        if self.average_cell is not None:
            self.average_cell.initialise()


class SummedCells(PartialCells):
    """Cells being revealed, with the evidence of their visible genes kept up to date: a step costs what it reveals.

    Gathering rows for M genes costs about as much as 20 M multiplied densely, so steps that reveal more than a
    twentieth of all genes are read anew.
    """

    _DENSE_FROM = 20

    def __init__(self, network: SetDenoiser, x_t_BG: Tensor) -> None:
        super().__init__(x_t_BG)
        self._network = network
        self._detection_GE = network.head.gene_GE * network.detection_weight_G[:, None]
        self._log_GE = network.head.gene_GE * network.log_weight_G[:, None]
        self._followed: list[tuple[Conditions | Tensor | None, Relative | None, Evidence]] = []

    def of(self, conditions: Conditions | Tensor) -> tuple[Relative | None, Evidence]:
        """Give the average cells of conditions, which stay the same from step to step, and the evidence relative to
        them.
        """
        key = None if self._network.average_cell is None else conditions
        for known, relative, evidence in self._followed:
            if known is key:
                return relative, evidence
        relative = self._network.relative_to(Conditions.of(conditions))
        self._followed.append((key, relative, self._network.read(self.x_t_BG, relative)))
        return self._followed[-1][1:]

    def reveal(self, positions: Positions, token_M: Tensor) -> None:
        """Make some hidden genes visible and add their evidence."""
        super().reveal(positions, token_M)
        is_many = len(positions) * self._DENSE_FROM > self.x_t_BG.numel()
        for i, (key, relative, evidence) in enumerate(self._followed):
            read = self._network.read(self.x_t_BG, relative) if is_many else None
            self._followed[i] = key, relative, read or self._with(evidence, relative, positions, token_M)

    def _with(self, evidence: Evidence, relative: Relative | None, positions: Positions, token_M: Tensor) -> Evidence:
        """Add what genes say that were just revealed."""
        network, cell_M, gene_M = self._network, positions.cell_M, positions.gene_M
        count_M, share_B = network.count_T[token_M], evidence.share_B
        if relative is None:
            detection_M, mean_log_M = network.detection_G[gene_M], network.mean_log_G[gene_M]
        else:
            average = relative[0]
            place_M = average.place_B[cell_M]
            detection_M, mean_log_M = average.detected_RG[place_M, gene_M], average.log_RG[place_M, gene_M]
            if average.share_RG is not None:
                share_B = share_B.index_add(0, cell_M, average.share_RG[place_M, gene_M])
        detected_M1 = ((count_M > 0).float() - detection_M)[:, None]
        log_M1 = (torch.log1p(count_M) - mean_log_M)[:, None]
        return Evidence(
            evidence.detected_BE.index_add(0, cell_M, self._detection_GE[gene_M] * detected_M1),
            evidence.log_BE.index_add(0, cell_M, self._log_GE[gene_M] * log_M1),
            evidence.n_visible_B.index_add(0, cell_M, torch.ones_like(count_M)),
            evidence.total_B.index_add(0, cell_M, count_M),
            share_B,
        )


class _TrunkBlock(nn.Module):
    """Residual SwiGLU whose norm is scaled and shifted by how much is visible (FiLM, arXiv 1709.07871)."""

    def __init__(self, width: int, feedforward_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.modulation = nn.Linear(_N_FEATURES, 2 * width)
        self.feedforward = SwiGLU(width, feedforward_width)
        self.dropout = RowDropout(dropout)

    def forward(self, h_BD: Tensor, feature_BF: Tensor) -> Tensor:
        scale_BD, shift_BD = self.modulation(feature_BF).chunk(2, dim=-1)
        return h_BD + self.dropout(self.feedforward(self.norm(h_BD) * (1 + scale_BD) + shift_BD))

    def start_as_identity(self) -> None:
        self.modulation.weight.zero_()
        self.feedforward.down.weight.zero_()
