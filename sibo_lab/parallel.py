"""Many processes on many machines: all that passes between them. For a single one every call is the identity.

`torchrun train.py …` starts one per device; each holds the whole model (DistributedDataParallel) or, with --shard, a
slice of it (FSDP2: Zhao et al. 2023). The official code trains on one GPU."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import collect_all
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's number over all machines; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group() -> Iterator[None]:
    """Joins the processes that torchrun started, if any. ConnectionError when another ends, or is silent for half an
    hour."""
    if "RANK" not in os.environ:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # which GPU "cuda" means
    dist.init_process_group(timeout=timedelta(minutes=30))  # CPUs: gloo; GPUs: NCCL
    try:
        with redirect_stdout(None if rank() else sys.stdout):  # printing to None is silent
            yield
    except RuntimeError as e:  # gloo has no exception class of its own
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise ConnectionError("lost touch with another process of this run: it ended (its own error says why) or "
                              "is stuck; all end here") from e
    dist.destroy_process_group()


def first_to_say(line: str) -> bool:
    """Whether no other process did before."""
    try:
        return world() == 1 or dist.distributed_c10d._get_default_store().add(line, 1) == 1
    except dist.DistError:  # the process that counts is gone
        return True


def one_rank_at_a_time(work: Callable[[], Any], ranks: int | None = None) -> Any:
    """Calls `work` on each process (or the first `ranks`) in turn and returns its result there; a ValueError or OSError
    of one is raised on all."""
    if not dist.is_initialized():
        return work()
    result = None
    for turn in range(ranks or world()):
        error = [None]
        if turn == rank():
            try:
                result = work()
            except (ValueError, OSError) as e:
                error = [e]
        dist.broadcast_object_list(error, turn)
        if error[0]:
            raise error[0]
    return result


def wrap(m: nn.Module, device: str, shard: bool) -> nn.Module:
    """`m` as training calls it, with gradients averaged over the processes. `shard` slices it in place, block by block,
    into new parameters: make the optimizer afterwards."""
    if shard:
        from torch.distributed.fsdp import fully_shard  # takes a second

        mesh = dist.init_device_mesh(torch.device(device).type, (world(),))
        for unit in (*m.blocks, m):
            fully_shard(unit, mesh=mesh)
        return m
    if not dist.is_initialized():
        return m
    wrapped = DistributedDataParallel(m)
    wrapped.register_comm_hook(None, _mean)
    return wrapped


def _mean(_, bucket):
    """Tensor by tensor: DDP rearranges its buckets after the first step, even a resumed run's; no bit must change."""
    sums = [dist.all_reduce(grad.div_(world()), async_op=True).get_future() for grad in bucket.gradients()]
    return collect_all(sums).then(lambda _: bucket.buffer())


def is_sharded(m: nn.Module) -> bool:
    return hasattr(m, "set_requires_gradient_sync")


def accumulating(m: nn.Module, last: bool) -> AbstractContextManager:
    """Around a micro-batch's forward and backward: gradients are exchanged after the `last` only."""
    if is_sharded(m):
        m.set_requires_gradient_sync(last)
    return m.no_sync() if isinstance(m, DistributedDataParallel) and not last else nullcontext()


def all_reduce(x: Tensor) -> Tensor:
    """The sum of `x` over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor that may be sliced; every process must call."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local_shard(x: Tensor, like: Tensor) -> Tensor:
    """This process's slice of `x`, if `like`, of the same shape, is sliced; else `x`."""
    if x.shape != like.shape or not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def all_gather_dicts(mine: dict) -> dict:
    """The processes' dicts in one; their keys differ."""
    if not dist.is_initialized():
        return mine
    parts = [None] * world()
    dist.all_gather_object(parts, mine)
    return {k: v for part in parts for k, v in part.items()}


@contextmanager
def in_step(m: nn.Module) -> Iterator[None]:
    """Lets processes call a sharded `m` different numbers of times: as each call needs all of them, one that is done
    joins in, on one token, until all are."""
    if not is_sharded(m):
        yield
        return
    device = next(m.parameters()).device

    def any_busy(busy: int) -> bool:
        return bool(all_reduce(torch.tensor(busy, device=device)))

    hook = m.register_forward_pre_hook(lambda *_: any_busy(1) and None)
    yield
    hook.remove()
    with torch.no_grad():
        while any_busy(0):
            m(torch.zeros(1, 1, dtype=torch.int64, device=device))
