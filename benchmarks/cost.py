"""Floating-point operations of each network, from its sizes: 2 per multiplication and addition of a matrix product.

Element-wise work, look-ups, norms and the optimiser are left out, as is usual. A backward pass costs two forward
passes, or one for a product with data. ``paper_step.py`` compares the formulas with PyTorch's counter (which does not
know attention on a CPU).

G genes, S genes per group, P = ceil(G / S) + C tokens (C condition fields), D width, F feed-forward width, L blocks,
V = 281 expression tokens, T = 282 + conditions input tokens, E gene width, J = 3 statistics, K small values.
"""

from dataclasses import dataclass

from lingshu_cell.config import SetConfig, TransformerConfig
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

_J = 3  # statistics of the gate-and-values head
_N_FEATURES = 36  # features of the visible set, see network/set_denoiser.py


@dataclass(frozen=True)
class ForwardCost:
    """Operations of one forward pass.

    Attributes
    ----------
    per_cell
        What every cell costs, whatever is asked of the answer.
    per_gene
        What each scored or drawn gene adds.
    per_step
        What a step costs once, for all cells of the minibatch.
    with_data
        Part of ``per_cell`` that multiplies data, which need no gradient.
    """

    per_cell: float
    per_gene: float
    per_step: float = 0.0
    with_data: float = 0.0

    def of(self, n_cells: int, n_genes_asked: float) -> float:
        """Operations of a step with ``n_genes_asked`` scored or drawn genes in each of ``n_cells`` cells."""
        return n_cells * (self.per_cell + n_genes_asked * self.per_gene) + self.per_step

    def with_backward(self, n_cells: int, n_genes_asked: float) -> float:
        """Operations of a training step."""
        return 3 * self.of(n_cells, n_genes_asked) - n_cells * self.with_data


def transformer_cost(network: TransformerConfig, n_genes: int, n_fields: int = 0) -> ForwardCost:
    """Count the paper's network as it is implemented here.

    * blocks: L (2 P (4 D² + 3 D F) + 4 P² D): projections and SwiGLU, then q·k and attention·v
    * compression: a table of S T rows, 2 S T D² once a step; a cell only looks up and adds
    * answer: the product of spreading and head, 2 S V D² once a step; then 2 D V per gene asked for

    Parameters
    ----------
    network
        Sizes.
    n_genes
        G.
    n_fields
        C, condition fields.
    """
    s, d, f = network.genes_per_group, network.width, network.feedforward_width
    p = -(-n_genes // s) + n_fields
    blocks = network.n_blocks * (2 * p * (4 * d**2 + 3 * d * f) + 4 * p**2 * d)
    per_step = 2 * s * d**2 * (MASK_TOKEN + 1 + N_EXPRESSION_TOKENS)
    return ForwardCost(blocks, 2 * d * N_EXPRESSION_TOKENS, per_step)


def set_cost(network: SetConfig, n_genes: int, nonzero_share: float, training: bool) -> ForwardCost:
    """Count our network.

    * evidence: 2 · 2 G E (detected or not, and log count)
    * trunk: 2 D (2 E + 36) in, L · 2 (3 D F + 2 · 36 D)
    * gate: 2 D E + 2 G E, for all genes (generation asks for less in the first steps of a geometric schedule)
    * values: queries 2 · 2 D J E; tilt 2 J G E in training, where half of all genes are scored in one dense product,
      2 J E per gene that is not zero in generation, where few are drawn at a time; then 2 J K per gene that is not zero
    * the tail's values (of a percent of the genes at most) are left out

    Parameters
    ----------
    network
        Sizes.
    n_genes
        G.
    nonzero_share
        Share of the counts that are not zero; only these have values.
    training
        Whether the step scores half of the genes or draws a few.
    """
    e, d, f = network.gene_width, network.width, network.feedforward_width
    evidence = 4 * n_genes * e
    trunk = 2 * d * (2 * e + _N_FEATURES) + network.n_blocks * 2 * (3 * d * f + 2 * _N_FEATURES * d)
    gate = 2 * d * e + 2 * n_genes * e
    values = 4 * d * _J * e + (2 * _J * n_genes * e if training else 0)
    per_value = 2 * _J * (network.n_small_values + (0 if training else e))
    return ForwardCost(evidence + trunk + gate + values, nonzero_share * per_value, with_data=evidence)


def network_cost(
    network: TransformerConfig | SetConfig, n_genes: int, n_fields: int, nonzero_share: float, training: bool
) -> ForwardCost:
    """Count whichever network a configuration asks for; see the two functions above."""
    if isinstance(network, TransformerConfig):
        return transformer_cost(network, n_genes, n_fields)
    return set_cost(network, n_genes, nonzero_share, training)


def training_flops_per_cell(cost: ForwardCost, n_genes: int, minibatch_size: int) -> float:
    """Count forward and backward pass of one cell, half of its genes scored on average."""
    return cost.with_backward(minibatch_size, n_genes / 2) / minibatch_size


def generation_flops_per_cell(cost: ForwardCost, n_genes: int, n_steps: int, tile_size: int) -> float:
    """Count N network evaluations and one draw of every gene."""
    return (n_steps * cost.of(tile_size, 0) + tile_size * n_genes * cost.per_gene) / tile_size


def scvi_training_flops_per_cell(n_genes: int, n_hidden: int = 128, n_latent: int = 20) -> float:
    """Count scVI with one hidden layer: encoder G H + 2 H Z, decoder Z H + 2 G H (scale and dropout); 3 · forward."""
    return 3 * 2 * (n_genes * n_hidden + 3 * n_hidden * n_latent + 2 * n_genes * n_hidden)


def scvi_generation_flops_per_cell(n_genes: int, n_hidden: int = 128, n_latent: int = 20) -> float:
    """Count one pass of scVI's decoder."""
    return 2 * (n_hidden * n_latent + 2 * n_genes * n_hidden)
