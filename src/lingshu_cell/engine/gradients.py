"""The gradient of one step: this process's share in microbatches that fit into memory, exchanged with the others.

Several processes begin apart: for the first steps each computes alone, they agree that all had the memory, and only
then exchange gradients. From then on DDP exchanges them while it computes. A network in parts (FSDP2) exchanges all the
time, so there memory that does not suffice ends the run.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from lingshu_cell.config import TrainingConfig
from lingshu_cell.diffusion.loss import hidden_nll
from lingshu_cell.engine.minibatch import Share, first_rows, parts_of, step_seed
from lingshu_cell.engine.processes import World
from lingshu_cell.engine.sharding import HeldNetwork
from lingshu_cell.errors import LingshuError, out_of_memory

_TRIALS = 2  # steps apart at the start, and after microbatches became smaller


class Gradients:
    """Makes gradients, and finds the microbatch that fits.

    Parameters
    ----------
    held
        The network.
    world
        The processes.
    settings
        Of training.
    autocast
        Gives the context of the precision asked for.
    on_note
        Called when microbatches become smaller.

    Attributes
    ----------
    most_cells
        Cells of a microbatch.
    """

    def __init__(
        self,
        held: HeldNetwork,
        world: World,
        settings: TrainingConfig,
        autocast: Callable[[], torch.autocast],
        on_note: Callable[[str], None],
    ) -> None:
        self._held, self._world, self._settings = held, world, settings
        self._autocast, self._on_note = autocast, on_note
        largest = world.largest_share(settings.minibatch_size)
        self._is_auto = settings.microbatch_size == "auto"
        self.most_cells = largest if self._is_auto else min(settings.microbatch_size, largest)
        self._trials = _TRIALS

    def make(self, share: Share) -> float:
        """Leave the gradient of the mean over the minibatch, in nats per gene, with the parts of the network.

        Returns
        -------
        float
            Nats of this process's cells, summed.

        Raises
        ------
        LingshuError
            If memory does not suffice and cannot be made to.
        """
        while True:
            self._held.forget_gradients()
            apart = self._world.size > 1 and self._trials > 0 and not self._held.is_sharded
            nats = self._try(share, apart)
            failed = self._world.any(nats is None) if apart else nats is None
            if not failed:
                break
            self._make_smaller(apart)
        if apart:
            self._held.exchange()
        self._trials -= self._trials > 0
        self._held.collect_gradients()
        return nats

    def _try(self, share: Share, apart: bool) -> float | None:
        """Compute all microbatches; ``None`` if memory ran out."""
        try:
            return self._compute(share, apart)
        except (MemoryError, RuntimeError) as error:
            can_go_on = apart or self._world.size == 1
            if not out_of_memory(error):
                raise
            if can_go_on and self._is_auto and self.most_cells > 1:
                return None
            if not self._is_auto or self.most_cells == 1:
                raise
        raise self._too_large()

    def _compute(self, share: Share, apart: bool) -> float:
        n_parts = -(-self._world.largest_share(len(share.draws)) // self.most_cells)
        parts = parts_of(slice(0, len(share)), n_parts)
        scale = self._world.size / len(share.draws) / share.x_0_BG.shape[1]  # exchange takes the mean of the processes
        nats = torch.zeros((), device=share.x_0_BG.device)
        for i, (part, rows) in enumerate(zip(parts, first_rows(parts), strict=True)):
            counts = float(part == rows)  # a row computed only to keep step with the others does not
            with self._held.local(apart or i + 1 < n_parts):
                nelbo_B = self._nelbo(share.part(rows)) * counts
                loss = nelbo_B.sum()
                (loss * scale).backward()
            nats += loss.detach()
        return nats.item()

    def _nelbo(self, share: Share) -> Tensor:
        self._held.place(share.first, len(share.draws))
        torch.manual_seed(step_seed(share.draws.seed, share.draws.step))  # dropout draws from the global state
        x_t_BG = share.draws.hide(share.x_0_BG, share.first)
        with self._autocast():
            return hidden_nll(self._held.nll, x_t_BG, share.x_0_BG, share.conditions) * share.weight_B

    def _make_smaller(self, apart: bool) -> None:
        self._held.forget_gradients()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.most_cells = -(-self.most_cells // 2)
        self._trials = _TRIALS
        if self._world.is_first:
            self._on_note(f"memory ran out: going on in microbatches of {self.most_cells} cells, with the same result")

    def _too_large(self) -> LingshuError:
        """Say that others wait for this process, which cannot go on."""
        error = LingshuError(
            "Memory must suffice for a microbatch",
            f"it ran out at {self.most_cells} cells per process while gradients were exchanged",
            f"Add --set training.microbatch_size={-(-self.most_cells // 2)}, and --resume where there is a checkpoint",
        )
        error.process = self._world.rank
        return error
