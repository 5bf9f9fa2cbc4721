"""Perfect knowledge to test against: a joint distribution of 3 genes × 4 tokens small enough to enumerate."""

import itertools

import numpy as np
import torch
from torch import Tensor

from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

N_GENES, N_TOKENS = 3, 4
STATES = np.array(list(itertools.product(range(N_TOKENS), repeat=N_GENES)))
"""All 64 cells, in the order in which a joint table is flattened."""


def random_joint(seed: int) -> np.ndarray:
    """A joint of strongly dependent genes, 64 probabilities, none below 0.1 / 64."""
    return 0.9 * np.random.default_rng(seed).dirichlet(np.full(len(STATES), 0.2)) + 0.1 / len(STATES)


def product_of_marginals(joint_S: np.ndarray) -> np.ndarray:
    """The joint that has the same marginals and no dependence."""
    product = np.ones(len(STATES))
    for gene in range(N_GENES):
        marginal = np.bincount(STATES[:, gene], weights=joint_S)
        product *= marginal[STATES[:, gene]]
    return product


def state_counts(x_BG: Tensor) -> np.ndarray:
    """How often each of the 64 cells occurs."""
    index = x_BG.long() @ torch.tensor([N_TOKENS**2, N_TOKENS, 1])
    return np.bincount(index.numpy(), minlength=len(STATES))


class Oracle:
    """The denoising function that answers with the exact conditionals of a joint, tabulated for all 5³ masked cells."""

    def __init__(self, joint_S: np.ndarray) -> None:
        partial_PG = np.array(list(itertools.product(range(N_TOKENS + 1), repeat=N_GENES)))  # 4 stands for [MASK]
        fits_PS = ((partial_PG[:, None] == N_TOKENS) | (partial_PG[:, None] == STATES)).all(-1)
        posterior_PS = joint_S * fits_PS
        posterior_PS = posterior_PS / posterior_PS.sum(1, keepdims=True)
        p_PGV = np.zeros((len(partial_PG), N_GENES, N_EXPRESSION_TOKENS))
        p_PGV[..., :N_TOKENS] = np.einsum("ps,sgv->pgv", posterior_PS, np.eye(N_TOKENS)[STATES])
        self._log_p_PGV = torch.from_numpy(p_PGV).log().float()

    def __call__(self, x_t_BG: Tensor, condition_BC: Tensor) -> "TableDistribution":
        digit_BG = torch.where(x_t_BG == MASK_TOKEN, N_TOKENS, x_t_BG.long())
        return TableDistribution(self._log_p_PGV, digit_BG @ torch.tensor([(N_TOKENS + 1) ** 2, N_TOKENS + 1, 1]))


class TableDistribution(CountDistribution):
    """Each cell's row of a table of log-probabilities, P × G × V."""

    def __init__(self, log_p_PGV: Tensor, row_B: Tensor) -> None:
        self._log_p_PGV, self._row_B = log_p_PGV, row_B

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        safe_BG = torch.where(scored_BG, x_0_BG, 0).long()
        log_p_BG = self._log_p_PGV[self._row_B[:, None], torch.arange(N_GENES), safe_BG]
        return -torch.where(scored_BG, log_p_BG, 0.0).sum(1)

    def log_probabilities(self, positions: Positions) -> Tensor:
        return self._log_p_PGV[self._row_B[positions.cell_M], positions.gene_M]
