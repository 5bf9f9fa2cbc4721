"""Several processes that train one model: who is who, what they agree on, and how all of them end when one does.

They are started by torchrun (or ``lingshu train --processes``), which says in the environment who is who. What all
must do together is agreed on: an error of one ends every one, and is said once.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lingshu_cell.data.positions import share_of
from lingshu_cell.errors import LingshuError, LostProcessError
from lingshu_cell.launch import LAUNCHED, LOST_REMEDY

_PATIENCE = timedelta(minutes=30)  # how long a process waits for one that lives but does not come
_SPOKEN = "lingshu/spoken"
_LOST = ("gloo", "nccl", "connection reset", "connection closed", "socket", "broken pipe", "timed out", "tcpstore")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen by one of them; the default is a run of one process.

    Attributes
    ----------
    rank
        Which process this is, 0 … size - 1; process 0 writes and reports.
    size
        How many there are.
    local_rank
        Which it is on its machine, so which GPU it takes.
    store
        Where they leave each other notes; ``None`` for one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of ``n`` rows are this process's; the shares of all are disjoint, cover all and differ by one row."""
        return share_of(n, self.rank, self.size)

    def largest_share(self, n: int) -> int:
        """Rows of the process that has most."""
        return -(-n // self.size)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over the processes, in float64; every process gets the same sums."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return self.sums([float(here)])[0] > 0

    def agreed(self, action: Callable[[], Any], *, only_first: bool = False) -> Any:
        """Do something in every process, or in the first while the others wait, and end together if it is refused.

        Parameters
        ----------
        action
            What is done; a :class:`LingshuError` ends all processes, and that which met it first says it.
        only_first
            Leave it to the first process; the others get ``None``.
        """
        result, error = None, None
        try:
            if self.is_first or not only_first:
                result = action()
        except LingshuError as refused:
            error = refused
        if self.size == 1:
            if error is not None:
                raise error
            return result
        failed = self.sums([float(error is not None and self.rank == rank) for rank in range(self.size)])
        if not any(failed):
            return result
        speaker = next(rank for rank, one in enumerate(failed) if one)
        error = error or LingshuError("Every process must go on", f"process {speaker} stopped", "See what it says")
        error.process = speaker
        raise error


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, for as long as the block runs; a lone process is a world of its own.

    Parameters
    ----------
    device
        Where the model lives, from :func:`pick_device`; it decides how tensors are exchanged: NCCL between GPUs, gloo
        between CPUs.

    Raises
    ------
    LostProcessError
        In place of the transport's error, when another process is no longer there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    world = World(rank, size, local_rank(), store)
    try:
        yield world
    except LingshuError as error:
        if error.process == rank:
            _first_to_speak(world)
        raise
    except Exception as error:
        if _is_loss(error):
            raise _lost(world) from None
        _first_to_speak(world)  # a traceback of this process; the others need not wonder
        raise
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """Which process this is on its machine; 0 for a lone one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``auto`` takes a GPU where there is one.

    Of several processes on a machine, each takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        n_there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
        usable = (device.index or 0) < n_there
    except RuntimeError:
        usable = False
    if not usable:
        raise LingshuError(
            "The device must be usable", f"'{name}'", "Choose auto, cpu, or cuda on a machine with a GPU"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if local_rank() == 0:
        return device
    if device.index is not None or local_rank() >= torch.cuda.device_count():
        asked = f"all ask for {name}" if device.index is not None else f"{torch.cuda.device_count()} GPUs are here"
        error = LingshuError(
            "Every process on a machine needs a GPU of its own",
            f"process {local_rank() + 1} has none: {asked}",
            "Start fewer processes, or choose --set training.device=cuda or cpu",
        )
        error.process = int(os.environ["RANK"])
        raise error
    return torch.device("cuda", local_rank())


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another process, or the way to it, is gone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def _lost(world: World) -> LostProcessError:
    """Say once, for all processes that are left, that one is not."""
    error = LostProcessError(
        "All processes must live to the end",
        f"process {world.rank} of {world.size} found another one gone",
        LOST_REMEDY,
    )
    error.process = world.rank if LAUNCHED not in os.environ and _first_to_speak(world) else -1
    return error


def _first_to_speak(world: World) -> bool:
    """Whether no other process has said yet why the run ends; where nobody can be asked, better twice than never."""
    try:
        return world.store.add(_SPOKEN, 1) == 1
    except Exception:
        return True
