"""Ranks of a training run: their process group, those that share rows, and what tells that one is lost."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.fsdp import is_fsdp_managed_module


def rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(seconds: float, backend: str | None = None) -> None:
    """Begins the process group of torchrun or accelerate launch; `transformers` leaves out a CPU's ``ddp_timeout``."""
    if rank()[1] > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))


#: Of each command in this process, where the group's store has the rank that has ended with an error.
_ENDED: list[str] = []


def _store() -> Any:
    """What the ranks of a command share beside what they send each other; None: there is no group of them."""
    if rank()[1] == 1 or not (_ENDED and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells those who `wait` of an error inside, a command, which all ranks run."""
    _ENDED.append(f"fdistill_kernels/ended/{len(_ENDED)}")
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the store's own rank is gone
            if (store := _store()) is not None:
                store.set(_ENDED[-1], str(rank()[0]))
        raise


def wait(lacking: Callable[[], Any], seconds: float = 0.1) -> None:
    """Waits, however long, until nothing is lacking of what other ranks make; ConnectionError if one has failed."""
    store = _store()
    while lacking():
        try:
            ended = store.get(_ENDED[-1]).decode() if store is not None and store.check(_ENDED[-1:]) else None
        except RuntimeError:  # the store was of the first rank
            ended = "0"
        if ended is not None:
            raise ConnectionError(f"rank {ended} has ended before its part was made: read its own output first")
        time.sleep(seconds)


def row_group(model: Any) -> dist.ProcessGroup | None:
    """The ranks that work on the same rows, each with a part of every layer (a mesh's "tp"); None: each has its own."""
    for p in model.parameters():
        if isinstance(p, DTensor) and "tp" in (p.device_mesh.mesh_dim_names or ()):
            group: dist.ProcessGroup = p.device_mesh["tp"].get_group()
            return group
    return None


def is_split(model: Any) -> bool:
    """Whether weights of a model are DTensors, as of FSDP2, and of one that was split as it was loaded."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def is_partitioned(model: Any) -> bool:
    """Whether each rank has a part of a model's weights, by FSDP or ZeRO-3: a forward pass waits for all ranks'."""
    return is_partitioned_by_zero(model) or isinstance(model, FSDPModule) or is_fsdp_managed_module(model)


def is_partitioned_by_zero(model: Any) -> bool:
    """Whether ZeRO-3 has given each rank a part of a model's weights."""
    return any(hasattr(p, "ds_id") for p in model.parameters())  # as DeepSpeed marks them


def copies_of_rows(model: Any) -> int:
    """How many ranks, one after another, work on the same rows."""
    group = row_group(model)
    return 1 if group is None else group.size()


def generators_kept(device: torch.device, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """What is done inside leaves torch's generators, the device's too, where they are."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=enabled)


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators begin at a seed, and afterwards they are where they were; None: they just go on."""
    with generators_kept(device, seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def own_noise(number: int, of: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Lets each of so many ranks with rows of their own draw by other random numbers: the seed made torch's generators
    the same on all. Afterwards they are so again.
    """
    return seeded(int(torch.randint(2**62, ())) + number if of > 1 else None, device)


def from_first(model: Any, value: Any) -> Any:
    """The value of the first of a model's `row_group`, on all of them."""
    held = [value]
    if (group := row_group(model)) is not None:
        dist.broadcast_object_list(held, group=group, group_src=0)
    return held[0]


def of_all_rows(found: Tensor, accelerator: Any, copies: int, streamed: int | None) -> Tensor:
    """What all ranks have found of an evaluation's rows (B, ...), each once: so many ranks one after another have the
    same, and some have their last batch filled up. streamed: how many rows a stream has given so far.
    """
    loader = accelerator.gradient_state
    every = accelerator.gather(found).unflatten(0, (-1, copies, len(found)))[:, 0].flatten(0, 1)
    own = loader.remainder if streamed is None else streamed % len(every)
    return every[:own] if loader.end_of_dataloader and own > 0 else every


def is_of_ranks(error: BaseException) -> bool:
    """Whether an error is of what ranks send each other; gloo's have no class of their own."""
    words = "gloo", "Connection closed by peer", "Application timeout caused pair closure"
    return isinstance(error, dist.DistError) or any(of_gloo in str(error) for of_gloo in words)


def device(use_cpu: bool = False) -> torch.device:
    """The device of this process's models: its GPU, or the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())
