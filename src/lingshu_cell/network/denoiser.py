"""Build the denoiser a configuration asks for."""

import torch
from torch import Tensor, nn

from lingshu_cell.config import SetConfig, TransformerConfig
from lingshu_cell.network.set_denoiser import ConditionSizes, SetDenoiser
from lingshu_cell.network.transformer_denoiser import TransformerDenoiser


def build_denoiser(
    config: TransformerConfig | SetConfig,
    n_genes: int,
    condition_sizes: ConditionSizes,
    count_of_token: Tensor,
    seed: int,
) -> nn.Module:
    """Make a denoiser with fresh weights.

    Parameters
    ----------
    config
        The ``network`` section of a configuration; its kind decides which denoiser.
    n_genes
        Length of the gene list.
    condition_sizes
        What the denoiser can be told; the paper's transformer knows categories only.
    count_of_token
        Expected count of each expression token, shape 281.
    seed
        Seed of the gene permutation and the initial weights.

    Returns
    -------
    nn.Module
        Called as ``denoiser(x_t_BG, condition_BC) -> CountDistribution``.
    """
    sizes = config.model_dump(exclude={"kind"})
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, TransformerConfig):
        return TransformerDenoiser(n_genes, condition_sizes.categories, **sizes, generator=generator)
    return SetDenoiser(n_genes, condition_sizes, count_of_token, **sizes, generator=generator)


def make_fast(network: nn.Module, precision: str) -> None:
    """Prepare a denoiser on a GPU for many calls; on a CPU nothing is done.

    The blocks of a transformer are compiled, one program for all of them: their elementwise work takes as long as
    their products otherwise. With ``bf16``, products that stay in fp32 (heads) may round their factors to TF32, from
    24 to 11 bits; sums stay in fp32.

    Parameters
    ----------
    network
        A denoiser, already on its device.
    precision
        ``"fp32"`` or ``"bf16"``, as in the configuration.
    """
    if next(network.parameters()).device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    if isinstance(network, TransformerDenoiser):
        network.compile_blocks()
