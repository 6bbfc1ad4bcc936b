"""One vocabulary over many ranks: which part of it is here, of shards with a process group and of DTensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.rows import WHOLE, Shard
from .values import Head


class VocabShard(NamedTuple):
    """The part of the vocabulary that is here: logits' last dimension, a head's rows. `vocab_shard` makes one.

    Attributes:
        group: the ranks that have the whole vocabulary together, each a stretch of it, in any order.
        begin: the id of the first entry here.
        size: V of the whole; entries from there on, which pad the last shards, are left out.
        sum_hidden: whether gradients by hidden states, which are the same on all ranks, are summed over them
            (Megatron's copy to the tensor-parallel region); False where what has gathered the states sums them itself,
            as sequence parallelism's gather does.
    """

    group: dist.ProcessGroup
    begin: int
    size: int
    sum_hidden: bool = True


def vocab_shard(
    group: dist.ProcessGroup, local_size: int, vocab_size: int | None = None, sum_hidden: bool = True
) -> VocabShard:
    """The shard of this rank, where each rank has the next stretch of the vocabulary; all ranks of the group must ask.

    Args:
        group: as `torch.distributed.new_group` or a DeviceMesh's get_group gives it.
        local_size: entries here; they may differ from rank to rank.
        vocab_size: V without padding; default: the sum of all.
        sum_hidden: as in `VocabShard`.

    Raises:
        ValueError: the sizes do not hold a vocabulary of that size.
    """
    sizes: list[Any] = [None] * group.size()
    dist.all_gather_object(sizes, local_size, group=group)
    begin, held = sum(sizes[: group.rank()]), sum(sizes)
    if min(sizes) < 1 or not 1 <= (held if vocab_size is None else vocab_size) <= held:
        raise ValueError(f"vocab_size={vocab_size} does not fit shards of {sizes} entries, each at least 1")
    return VocabShard(group, begin, held if vocab_size is None else vocab_size, sum_hidden)


def carried_shard(shard: VocabShard | None) -> Shard:
    """What operators carry of it."""
    if shard is None:
        return WHOLE
    return Shard(shard.group.group_name, shard.begin, shard.size, shard.sum_hidden)


def check_shard(name: str, shard: object) -> None:
    """Raises TypeError unless it is a `VocabShard` or None."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"{name} must be a VocabShard (fk.vocab_shard), not {type(shard).__name__}")


def local_logits(name: str, logits: Any, shard: VocabShard | None) -> tuple[Any, VocabShard | None]:
    """Logits here (..., V_local), and their shard; a DTensor says its own.

    Raises:
        ValueError: a DTensor split on other dimensions than rows and the last one, or a shard beside one.
    """
    if _is_dtensor(logits):
        if shard is not None:
            raise ValueError(f"shard is given beside {name}, a DTensor, which says itself how it is split")
        logits, shard = _of_dtensor(name, logits, logits.dim() - 1)
    return logits, shard


def same_rows(hidden: Any) -> bool:
    """Whether hidden states say that they are the same on all ranks: a DTensor that is whole.

    A head that is a DTensor does not: tensor parallelism splits it over ranks with the same rows, FSDP over ranks that
    have each their own, whose losses would be mixed.
    """
    return _is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements)


def local_rows(name: str, values: Any, shard: VocabShard | None) -> tuple[Any, VocabShard | None]:
    """A head's rows here, and their shard: a DTensor says its own; hidden states, whole, are taken out of theirs."""
    if not _is_dtensor(values):
        return values, shard
    if shard is not None:
        raise ValueError(f"shard is given beside {name}, a DTensor, which says itself how it is split")
    return _of_dtensor(name, values, 0)


def valid(name: str, values: Tensor, shard: VocabShard, dim: int) -> Tensor:
    """Without the entries that pad the vocabulary.

    Raises:
        ValueError: a shard that holds padding alone, or does not begin within the vocabulary.
    """
    count = min(values.shape[dim], shard.size - shard.begin)
    if shard.begin < 0 or count < 1:
        raise ValueError(f"{name}: entries from {shard.begin} on hold nothing of a vocabulary of {shard.size}")
    return values if count == values.shape[dim] else values.narrow(dim, 0, count)


def teacher_part(
    name: str, values: Tensor, dim: int, local: int, given: int, student: VocabShard, own: VocabShard | None
) -> Tensor:
    """The student's entries of a teacher's logits or head: its own shard, one that is larger, or the whole vocabulary.

    Args:
        local, given: the student's entries here, without padding and with it.

    Raises:
        ValueError: entries of the student's shard are not here.
    """
    if own is None and values.shape[dim] in (local, given):
        return values.narrow(dim, 0, local)
    begin = 0 if own is None else own.begin
    if own is not None:
        values = valid(name, values, own, dim)
    end, last = begin + values.shape[dim], student.begin + local
    if begin > student.begin or end < last:
        raise ValueError(
            f"{name} has entries {begin} to {end} of the vocabulary here, and the student {student.begin} to {last}: a "
            "teacher is split as the student is, or so that each of its shards holds whole ones of the student's"
        )
    return values.narrow(dim, student.begin - begin, local)


def local_head(name: str, head: Head, shard: VocabShard) -> Head:
    """A head's rows here, without padding."""
    bias = None if head.bias is None else valid(name, head.bias, shard, 0)
    return head._replace(weight=valid(name, head.weight, shard, 0), bias=bias)


def _is_dtensor(value: Any) -> bool:
    if not isinstance(value, Tensor) or type(value) is Tensor or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _of_dtensor(name: str, value: Any, dim: int) -> tuple[Tensor, VocabShard | None]:
    """A DTensor's part here, and the shard of its dimension; None where it is whole."""
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    ways = [i for i, p in enumerate(placements) if isinstance(p, Split) and p.dim % value.dim() == dim]
    if any(p.is_partial() for p in placements) or len(ways) > 1:
        raise ValueError(f"{name} is a DTensor of {placements}: its dimension {dim} may be split over one of the "
                         "mesh's, and nothing of it partial")  # fmt: skip
    local = value.to_local()
    if not ways:
        return local, None
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    return local, VocabShard(mesh.get_group(ways[0]), offset[dim], value.shape[dim])


def summed(x: Tensor, group: Any) -> Any:
    """Begins to sum x over a group, in place; the result's `wait` ends it."""
    return dist.all_reduce(x, group=dist.distributed_c10d._resolve_process_group(group), async_op=True)


def agreed(step: int, group: Any, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    found = torch.tensor(step, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=dist.distributed_c10d._resolve_process_group(group))
    return int(found)
