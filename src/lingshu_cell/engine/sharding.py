"""How processes hold one network: each the whole of it (DDP), or each a part of every parameter (FSDP2).

Optimiser, averages and clipping see plain tensors only, this process's *part* of each parameter: the parameter itself
where every process holds the whole, else the rows that are here. Rows are cut like ``torch.chunk`` cuts them.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lingshu_cell.engine.processes import World
from lingshu_cell.network.conditions import Conditions
from lingshu_cell.network.distribution import Denoise
from lingshu_cell.network.layers import RowDropout


class _Nll(nn.Module):
    """The network together with its score, so that all it computes lies within one call, as DDP and FSDP2 want it."""

    def __init__(self, network: nn.Module, touch_all: bool) -> None:
        super().__init__()
        self.network = network
        self._touch_all = touch_all

    def forward(self, x_t_BG: Tensor, conditions: Conditions, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        nll_B = self.network(x_t_BG, conditions).nll(x_0_BG, scored_BG)
        if self._touch_all and torch.is_grad_enabled():
            # Processes exchange the gradients of all parameters, used by the cells at hand or not. Those that are in
            # parts here belong to blocks, which are always used.
            at_hand = (p for p in self.network.parameters() if not isinstance(p, DTensor))
            nll_B = nll_B + sum(p[..., :0].sum() for p in at_hand)
        return nll_B


class HeldNetwork:
    """A network as this process holds it.

    Parameters
    ----------
    network
        The network, the same in every process, on its device.
    world
        The processes.
    sharding
        ``"none"``: each holds it whole; ``"full"``: each holds a part of every parameter.

    Attributes
    ----------
    network
        The network.
    parts
        This process's part of each parameter; what an optimiser changes.
    is_sharded
        Whether parts are not the whole.
    """

    def __init__(self, network: nn.Module, world: World, sharding: str) -> None:
        self.network, self._world = network, world
        self.device = next(network.parameters()).device
        self.is_sharded = sharding == "full" and world.size > 1
        parameters = dict(network.named_parameters())
        self._buffers = [name for name in network.state_dict() if name not in parameters]
        self._dropouts = [m for m in network.modules() if isinstance(m, RowDropout)]
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self.n_parameters = sum(p.numel() for p in parameters.values())
        self._nll: nn.Module = _Nll(network, touch_all=world.size > 1)
        self._cut: dict[str, DTensor] = {}
        self.parts: dict[str, Tensor] = parameters
        if self.is_sharded:
            self._mesh = init_device_mesh(self.device.type, (world.size,))
            for block in network.blocks:
                fully_shard(block, mesh=self._mesh)
            fully_shard(self._nll, mesh=self._mesh)
            self._cut = dict(network.named_parameters())
            self.parts = {name: p.detach().to_local().requires_grad_() for name, p in self._cut.items()}
        elif world.size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the option has another name from torch 2.13 on
                self._nll = DistributedDataParallel(self._nll, broadcast_buffers=False)

    @property
    def denoise(self) -> Denoise:
        """The network as a denoising function; every process must call it equally often."""
        return self._answer if self.is_sharded else self.network

    def nll(self, x_t_BG: Tensor, conditions: Conditions, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """Nats of the scored genes of each cell; the backward pass exchanges gradients, see :meth:`local`."""
        return self._nll(x_t_BG, conditions, x_0_BG, scored_BG)

    @contextlib.contextmanager
    def local(self, apart: bool) -> Iterator[None]:
        """Leave out the exchange of gradients while the block runs, where ``apart`` and every process holds all."""
        exchanging = isinstance(self._nll, DistributedDataParallel)
        with self._nll.no_sync() if apart and exchanging else contextlib.nullcontext():
            yield

    def exchange(self) -> None:
        """Average gradients that were made apart over the processes; not for parts."""
        for p in self.parts.values():
            dist.all_reduce(p.grad.div_(self._world.size))

    def place(self, first: int, n_places: int) -> None:
        """Tell the network which places of the minibatch the next call's rows have."""
        for dropout in self._dropouts:
            dropout.first, dropout.n_places = first, n_places

    def collect_gradients(self) -> None:
        """Bring each part's gradient to it."""
        for name, p in self._cut.items():
            self.parts[name].grad = None if p.grad is None else p.grad.to_local()

    def forget_gradients(self) -> None:
        """Free all gradients."""
        for p in (*self.parts.values(), *self._cut.values()):
            p.grad = None

    def total_square(self, square: Tensor) -> Tensor:
        """From the squared norm of this process's parts to that of the whole."""
        if self.is_sharded:
            dist.all_reduce(square)
        return square

    def cut(self, whole: Tensor) -> Tensor:
        """Give this process's part of a whole parameter, or of a tensor like it."""
        if not self.is_sharded:
            return whole
        chunks = whole.chunk(self._world.size)
        return chunks[self._world.rank] if self._world.rank < len(chunks) else whole[:0]

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring parts together in the first process, on the CPU, one tensor at a time; all processes call it.

        Parameters
        ----------
        parts
            Tensors like the parameters' parts; ``name/…`` belongs to the parameter ``name``. Scalars stay as they are.

        Returns
        -------
        dict
            The whole tensors; empty in other processes.
        """
        whole = {}
        for name, part in parts.items():
            if self.is_sharded and part.dim():
                shape = self._shapes[name.rsplit("/", 1)[0]]
                stride = torch.empty(shape, device="meta").stride()
                part = DTensor.from_local(
                    part.detach(), self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
                ).full_tensor()
            if self._world.is_first:
                whole[name] = part.detach().cpu()
        return whole

    @torch.no_grad()
    def take(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor] | None = None) -> None:
        """Set the parts (the network's own when not given) from whole tensors."""
        for name, part in (self.parts if parts is None else parts).items():
            part.copy_(self.cut(whole[name]))

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to a checkpoint; every process holds them whole."""
        return {name: self.network.get_buffer(name) for name in self._buffers}

    @contextlib.contextmanager
    def with_parts(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other values in the place of the weights, in evaluation mode, while the block runs."""
        kept = {name: p.detach().clone() for name, p in self.parts.items()}
        self._set(parts)
        self.network.eval()
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, part in self.parts.items():
            part.copy_(values[name])
        for module in self._nll.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was brought together before is no longer so

    def _answer(self, x_t_BG: Tensor, conditions: Conditions) -> "_Scored":
        return _Scored(self, x_t_BG, conditions)


class _Scored:
    """An answer that is computed when it is scored, as a network in parts computes only within a call."""

    def __init__(self, held: HeldNetwork, x_t_BG: Tensor, conditions: Conditions) -> None:
        self._held, self._x_t_BG, self._conditions = held, x_t_BG, conditions

    def nll(self, x_0_BG: Tensor, scored_BG: Tensor) -> Tensor:
        """See :meth:`CountDistribution.nll`."""
        return self._held.nll(self._x_t_BG, self._conditions, x_0_BG, scored_BG)
