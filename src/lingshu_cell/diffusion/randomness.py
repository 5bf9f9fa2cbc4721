"""All the randomness of one generated cell comes from one seed: the order of its genes and two uniforms for each of
them.

Because every gene is revealed exactly once, its uniforms can be drawn beforehand; a cell then depends on its seed
alone, not on the minibatch, the device count or a restart, and two conditions under one seed are a matched pair.

Shapes: B cells, G genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CellNoise:
    """Random numbers of a minibatch of cells.

    Attributes
    ----------
    order_BG
        Uniforms whose ranks are the order in which genes are revealed.
    uniform_BG2
        The uniforms that decide each gene's token: zero or not, and which value.
    """

    order_BG: Tensor
    uniform_BG2: Tensor


def draw_cell_noise(seeds: Sequence[int], n_genes: int, device: torch.device | str = "cpu") -> CellNoise:
    """Draw the noise of each cell from its own Philox stream (Salmon et al. 2011), float32 in [0, 1).

    Parameters
    ----------
    seeds
        One seed per cell, 0 … 2⁶³ - 1.
    n_genes
        G.
    device
        Where the noise goes; it is drawn on the CPU, so that it is the same for every device.
    """
    noise_B3G = np.empty((len(seeds), 3, n_genes), dtype=np.float32)
    for row, seed in zip(noise_B3G, seeds, strict=True):
        np.random.Generator(np.random.Philox(key=int(seed))).random(dtype=np.float32, out=row)
    noise = torch.from_numpy(noise_B3G).to(device)
    return CellNoise(noise[:, 0], noise[:, 1:].transpose(1, 2))


def cell_seeds(run_seed: int, first: int, n: int) -> np.ndarray:
    """Seeds of cells ``first … first + n - 1`` of a run: run_seed · 2³² + index, int64; run_seed < 2³¹."""
    return (np.int64(run_seed) << np.int64(32)) + np.arange(first, first + n, dtype=np.int64)


def reveal_ranks(order_BG: Tensor, hidden_BG: Tensor) -> Tensor:
    """Rank of each hidden gene among its cell's hidden genes, 0 first; other genes get G, which no step reaches.

    Parameters
    ----------
    order_BG
        Uniforms in [0, 1) whose ranks are the order.
    hidden_BG
        Boolean: which genes are to be ranked.
    """
    order_BG = torch.where(hidden_BG, order_BG, 2.0)
    by_order_BG = torch.argsort(order_BG, dim=1, stable=True)
    rank_BG = torch.empty_like(by_order_BG)
    rank_BG.scatter_(1, by_order_BG, torch.arange(order_BG.shape[1], device=order_BG.device).expand_as(by_order_BG))
    return torch.where(hidden_BG, rank_BG, order_BG.shape[1])
