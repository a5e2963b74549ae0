"""The few distributed calls, no-ops on one process.

Collectives on CPU tensors go through gloo, those on GPU tensors through NCCL: what concerns only the hosts (objects,
signals, barriers) never touches a GPU.
"""

from __future__ import annotations

import gc
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from featcache import launch
from featcache.errors import UserError

if TYPE_CHECKING:
    from trainer.models import Transformer

T = TypeVar("T")

# How gloo says that it has lost a rank: a plain RuntimeError. NCCL's errors have a class.
_BROKEN = re.compile(r"gloo/transport|Connection (closed|reset) by peer")


# Where all wait while one judges samples, or computes the statistics of a reference: hours on a CPU.
JUDGING = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This rank's device: on a machine with several GPUs each rank takes its own."""
        return torch.device("cuda", self.local_rank) if name == "cuda" else torch.device(name)


def join(device: str, *, patience: timedelta | None = None) -> World:
    """Joins the process group that `torchrun` describes in the environment.

    Args:
        patience: how long a rank waits for the others before it takes them for lost; None: as long as the backend does
            (gloo half an hour, NCCL ten minutes).

    Raises:
        UserError: several ranks were told to share one GPU (`cuda:N`), or the environment is not torchrun's.
    """
    size, local_rank = launch.world_size(), launch.local_rank()
    if size == 1:
        return World()
    if device.startswith("cuda:"):
        raise UserError(
            f"{size} ranks cannot share {device}",
            remedy="Type --device cuda: each rank takes its own GPU.",
        )
    if not dist.is_initialized():
        launch.rank()
        launch.require_meeting_point()
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=patience)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank)


def leave() -> None:
    """Leaves the process group. Whatever was trained in it must be out of use by now.

    Wrapped and sharded models are cycles of objects that hold on to the group. Left to the end of the process, they let
    its threads run into an interpreter that is gone, and the process aborts after all its work is done.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def joined(device: str, *, patience: timedelta | None = None) -> Iterator[World]:
    """`join` for the length of a block; a group that was there before stays, with its own patience.

    After an error the other ranks are not waited for: torchrun ends them.

    Raises:
        UserError: another rank ended in the middle of an exchange.
    """
    ours = not dist.is_initialized()
    world = join(device, patience=patience)
    try:
        yield world
    except SystemExit as leaving:  # all ranks leave together
        traceback.clear_frames(leaving.__traceback__)  # which hold what was trained
        if ours:
            leave()
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
            raise
        raise UserError(
            "the connection to the other ranks broke: one has ended, or is out of reach",
            remedy="The error that it printed says why. Saved work is kept, and the same command continues it "
            "(trainer run: with --resume).",
        ) from error
    if ours:
        leave()


def is_main() -> bool:
    """Whether this process speaks for all of torchrun's: also before it joins them and after it left."""
    return launch.rank() == 0


def barrier() -> None:
    """Waits until all ranks are here (the hosts, not their GPUs)."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def from_main(value: T) -> T:
    """The main rank's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def like_main(module: nn.Module) -> None:
    """Gives a module's parameters and buffers the main rank's values on every rank."""
    if dist.is_initialized():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def min_over_ranks(values: Tensor) -> Tensor:
    """Minimum of a small tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def most_over_ranks(values: list[float]) -> list[float]:
    """The largest of each of a few numbers of the hosts, over all ranks."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduces the gradients of a small module in one flat buffer; parameters without one stay without one."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not dist.is_initialized() or not grads:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(mean.view_as(grad))


class StopSignal:
    """Lets all ranks stop after the same step when any of them was told to, without touching the GPU.

    Signals reach ranks at different times. Every step the hosts exchange one number in the background and read the
    answer one step later, so nobody waits and everybody agrees.
    """

    def __init__(self) -> None:
        self._sent: tuple[dist.Work, Tensor] | None = None

    def agree(self, number: int) -> int:
        """The largest signal number that any rank passed: now for one process, in the step before for several."""
        if not dist.is_initialized():
            return number
        known = self.wait()
        flag = torch.tensor([number], dtype=torch.int32)
        self._sent = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag)
        return known

    def wait(self) -> int:
        """Finishes the exchange under way (before leaving) and gives its result."""
        if self._sent is None:
            return 0
        work, flag = self._sent
        work.wait()
        self._sent = None
        return int(flag)


def shard(model: Transformer, world: World, device: torch.device, *, autocast: torch.dtype | None = None) -> None:
    """FSDP2 in place: every block's parameters, and the rest's, are split over the ranks and gathered when needed.

    Nothing stays gathered after a forward pass, so that between steps `model.parameters()` are always the shards (an
    EMA teacher has no backward pass that would free them).

    Args:
        autocast: dtype of the autocast that the model runs in, or None. What it would cast after gathering is gathered in
            it: the same numbers, half the bytes. Shards stay in float32, and gradients are added up in it.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    low = model.autocast_parameters() if autocast is not None else set()
    for module in (*model.blocks, model):  # the model's own: what its blocks have not taken
        own = [p for p in module.parameters() if not isinstance(p, DTensor)]
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=_gathered_as(own, low, autocast))


def _gathered_as(
    parameters: Sequence[nn.Parameter], low: Set[nn.Parameter], dtype: torch.dtype | None
) -> MixedPrecisionPolicy:
    """Policy that gathers those of `parameters` that are in `low` in `dtype`, and casts nothing else.

    Before PyTorch 2.15 a group has one dtype: one with others beside them, norms with weights for example, stays whole.
    """
    chosen: dict[str, Any] = {}
    if any(p not in low for p in parameters):
        if "param_dtype_override_fn" not in inspect.signature(MixedPrecisionPolicy).parameters:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        chosen["param_dtype_override_fn"] = lambda p: None if p in low else p.dtype
    if not any(p in low for p in parameters):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False, **chosen)


@contextmanager
def exchange_gradients(forward: object, model: nn.Module, *, now: bool) -> Iterator[None]:
    """A micro-batch after whose backward pass the ranks reduce the gradients gathered so far, or (not `now`) do not yet.

    Waiting costs a sharded model memory: until then each rank holds the gradients of all weights, whole.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
    if now or not isinstance(forward, nn.parallel.DistributedDataParallel):
        yield
        return
    with forward.no_sync():
        yield


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (a view); a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as `target` is: on its device, and this rank's part of it if it is sharded."""
    value = value.to(local(target).device)
    if not isinstance(target, DTensor):
        return value
    # src_data_rank=None: every rank has read the same file, so each cuts out its own part and nothing is sent.
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory where `keep`; sharded ones are put together one at a time, by all ranks."""
    whole = {}
    for name, value in tensors.items():
        full = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
        if keep:
            whole[name] = full.cpu()
    return whole
