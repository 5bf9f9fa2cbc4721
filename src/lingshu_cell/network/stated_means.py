"""The means that a denoiser states of genes of which it sees none.

Shapes: A conditions, G genes, V tokens.
"""

import numpy as np
import torch

from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoise, Positions
from lingshu_cell.tokens import MASK_TOKEN


@torch.no_grad()
def stated_log_shares(
    denoise: Denoise, conditions: Conditions, n_genes: int, count_V: torch.Tensor, pseudocount: float
) -> np.ndarray:
    """Ask for the mean of every gene, all genes hidden: the average cell of a condition as the network states it.

    Parameters
    ----------
    denoise
        The network, in evaluation mode.
    conditions
        A of them.
    n_genes
        G.
    count_V
        Count that each token stands for, on the network's device.
    pseudocount
        ε, added to shares of the sum over genes.

    Returns
    -------
    numpy.ndarray
        log(share + ε), float64, A × G. A difference of two rows is a log fold change.
    """
    hidden_AG = torch.full((len(conditions), n_genes), MASK_TOKEN, dtype=torch.int16, device=count_V.device)
    everywhere = Positions.where(torch.ones_like(hidden_AG, dtype=torch.bool))
    mean_AG = denoise(hidden_AG, conditions).log_mean(everywhere, count_V).double().exp().view(hidden_AG.shape)
    return torch.log(mean_AG / mean_AG.sum(1, keepdim=True) + pseudocount).cpu().numpy()
