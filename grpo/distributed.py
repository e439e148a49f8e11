"""Processes that work together: rank, world size, sums and exchanges. With one process every exchange is the identity.

`torchrun` starts the processes and gives each its rank through the environment. All functions except `lost`, `rank`,
`world_size`, `nearby`, `is_main`, `alone` and `carrier` are collective calls: every rank must make them, in the same
order. Left out: when gradients are summed (`update.py`), how a model is sharded (`policy/sharding.py`), and what the
exchanged values mean.
"""

import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

S, T = TypeVar("S"), TypeVar("T")


def init(device: str = "auto", timeout: float = 600.0) -> torch.device:
    """Join the processes that `torchrun` started, if it did, and choose the device of this process.

    The backend is gloo on CPU and NCCL on CUDA, where process k of a machine takes GPU k. If a rank dies or makes no
    progress for `timeout`, the collective calls of the others raise, so that they stop too.

    Args:
      device: `auto` (cuda if there is one), `cpu` or `cuda`.
      timeout: seconds that a collective call waits for the other ranks. No rank may work alone for longer.

    Returns:
      The device of this process.

    Raises:
      ValueError: `cuda` was chosen, but this machine has no GPU or fewer GPUs than processes.
    """
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device is {device!r}: process {local_rank} of this machine has no GPU, {torch.cuda.device_count()} "
                "are visible; start fewer processes or use --device cpu"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = chosen.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), device_id=chosen if cuda else None
        )
    return chosen


def shutdown() -> None:
    """Leave the group. Do not call it after an error: the other ranks notice the error because this process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error: RuntimeError, timeout: float) -> str:
    """A sentence, if `error` says that another process is gone or silent; empty for all other errors.

    Gloo has no type of its own for it. NCCL's watchdog ends the process itself, with a message of its own.

    Args:
      error: what a collective call raised.
      timeout: seconds that it has waited.
    """
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return ""
    reason = re.split(r"\.? *\n|\. ", str(error).rpartition("] ")[2])[0]
    return f"another process ended, or did not answer for {timeout:g} s (ddp_timeout); see what it printed ({reason})"


def rank() -> int:
    """The number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def nearby() -> int:
    """The number of processes on this machine, all if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this is rank 0, the only rank that writes files."""
    return rank() == 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, as a new tensor of the same shape.

    It adds in rank order, so the result has the same bits on every rank and in every run. Use it for counts and
    statistics only, since every rank briefly holds the tensors of all ranks.
    """
    return _gather(tensor).sum(0, dtype=tensor.dtype)


def all_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum over ranks, as a new tensor of the same shape; NaN where any rank has NaN."""
    return _gather(tensor).amax(0)


def any_true(flag: bool) -> bool:
    """Whether `flag` is True on any rank. With it all ranks agree to stop, or to skip an update."""
    return bool(all_max(torch.tensor(int(flag))))


def gather_objects(item: T) -> list[T]:
    """The `item` of each rank, in rank order, on every rank. Items are pickled; use lists and dicts of plain values."""
    items = [item] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def broadcast_object(item: T) -> T:
    """Rank 0's `item`, on every rank."""
    items = [item]
    if dist.is_initialized():
        dist.broadcast_object_list(items, src=0)
    return items[0]


def broadcast_tensor(tensor: Tensor) -> None:
    """Overwrite a tensor, in place, with that of rank 0, which has the same shape and dtype."""
    if not dist.is_initialized():
        return
    sent = tensor.detach().to(carrier()).contiguous()
    dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)  # as bytes: not every dtype can be sent
    if not is_main():
        with torch.no_grad():
            tensor.copy_(sent)


def whole(tensor: Tensor, dtype: torch.dtype | None = None, host: bool = False) -> Tensor:
    """A tensor gathered from its shards, without gradient. One that is not sharded stays where it is.

    Args:
      tensor: the same on all ranks but for the numbers of its shard.
      dtype: of the result. Shards are rounded before they are sent. None: the tensor's own.
      host: put what was gathered into the memory of the host.
    """
    tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.to("cpu", copy=True) if host else full  # a copy: `full` may be part of a larger one, with padding


def hand_to_main(pieces: Iterable[S], action: Callable[[Iterator[S]], T]) -> T:
    """`on_main(action)` with pieces of which each is a collective call, so that one at a time lies in memory.

    Args:
      pieces: all ranks walk through them, also if rank 0 fails on the way.
      action: gets them on rank 0.
    """
    walk = iter(pieces)

    def act() -> T:
        try:
            return action(walk)
        finally:
            deque(walk, maxlen=0)

    if not is_main():
        deque(walk, maxlen=0)
    return on_main(act)


def put(tensor: Tensor, value: Tensor | None) -> None:
    """Overwrite a tensor in place, whole or sharded, with rank 0's `value`, which has the same shape.

    Args:
      tensor: the same on all ranks but for its numbers.
      value: read on rank 0 only. It gets the tensor's dtype.
    """
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            if is_main():
                tensor.copy_(value)
            return broadcast_tensor(tensor)
        all_of_it = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        put(all_of_it, value)
        tensor.copy_(distribute_tensor(all_of_it, tensor.device_mesh, tensor.placements, src_data_rank=None))


def on_main(action: Callable[[], T]) -> T:
    """Call `action` on rank 0. Every rank returns its result, or raises its ValueError or OSError."""
    outcome: Any = None
    if is_main():
        try:
            outcome = action()
        except (ValueError, OSError) as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def data_parallel(module: nn.Module) -> nn.Module:
    """The module in DistributedDataParallel, which averages its gradients over ranks; as it is on a single rank."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in torch 2.9
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def alone(module: nn.Module) -> AbstractContextManager:
    """A context in which the backward pass of a `data_parallel` module exchanges nothing with other ranks."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def carrier() -> torch.device:
    """Where contiguous tensors must lie to be sent: NCCL moves those of its own device only, gloo those of the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _gather(tensor: Tensor) -> Tensor:
    """[...] on each rank -> [world size, ...] on every rank, without gradient, on the tensor's own device."""
    if not dist.is_initialized():
        return tensor.detach().clone()[None]
    sent = tensor.detach().to(carrier()).contiguous()
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    return torch.stack(received).to(tensor.device)
