"""Cells of each optimiser step, on their way to the device: sparse, and for a GPU while the step before is computed.

Shapes: B cells of this process's share of a minibatch, G genes.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from lingshu_cell.data.training_set import CellRows
from lingshu_cell.tokens import MASK_TOKEN

_PIN_FROM = 1 << 20  # bytes; pinning costs about a millisecond, as much as copying a megabyte from plain memory


class Feeder:
    """Gives the cells of step 0, 1, …, and with ``ahead`` has those of the next step drawn meanwhile by a thread.

    Parameters
    ----------
    draw
        Gives the cells of a step, a function of the step alone.
    ahead
        Whether to draw ahead; on a CPU that would only take cores from the step itself.
    """

    def __init__(self, draw: Callable[[int], CellRows], ahead: bool) -> None:
        self._draw = draw
        self._thread = ThreadPoolExecutor(1, "lingshu-feeder") if ahead else None
        self._next: tuple[int, Future[CellRows]] | None = None

    def rows(self, step: int) -> CellRows:
        """Give the cells of a step; what drawing them raised is raised here."""
        if self._thread is None:
            return self._draw(step)
        known, self._next = self._next, None
        is_known = known is not None and known[0] == step
        rows = known[1].result() if is_known else self._draw(step)
        self._next = step + 1, self._thread.submit(self._draw, step + 1)
        return rows


def tokens_on(rows: CellRows, device: torch.device) -> Tensor:
    """Bring tokens to a device, B × G, int16: a GPU gets the non-zeros, a tenth of the bytes, and spreads them out."""
    return torch.from_numpy(rows.tokens_BG) if device.type == "cpu" else spread(rows, device)


def spread(rows: CellRows, device: torch.device) -> Tensor:
    """Send non-zeros to a device and spread them out there; B × G, int16."""
    tokens = rows.tokens
    indptr, gene_M, token_M = (_sent(a, device) for a in (tokens.indptr, tokens.indices, tokens.data))
    cell_M = torch.repeat_interleave(
        torch.arange(tokens.shape[0], device=device), indptr.diff(), output_size=tokens.nnz
    )
    x_0_BG = torch.zeros(tokens.shape, dtype=torch.int16, device=device)
    x_0_BG[cell_M, gene_M.long()] = token_M.to(torch.int16)
    if rows.unmeasured_BG is not None:
        x_0_BG.masked_fill_(_sent(rows.unmeasured_BG, device), MASK_TOKEN)
    return x_0_BG


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    here = torch.from_numpy(values)
    if device.type == "cuda" and values.nbytes >= _PIN_FROM:
        return here.pin_memory().to(device, non_blocking=True)
    return here.to(device)
