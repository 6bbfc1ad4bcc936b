"""A vocabulary that is split over ranks: which part is here, by a process group or by DTensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from . import checks
from .backends.rows import WHOLE, Shard
from .carried import replaced
from .values import Head


class VocabShard(NamedTuple):
    """The part of the vocabulary on this rank: of logits' last dimension, or of a head's rows. `vocab_shard` makes one.

    Attributes:
        group: the ranks that hold the whole vocabulary together, each a contiguous part, in any order.
        begin: id of the first entry here.
        size: V of the whole vocabulary. Entries from there on are padding of the last shards and are left out.
        sum_hidden: whether to sum the gradients of the hidden states, which are the same on all ranks, over the ranks
            (Megatron's copy to the tensor-parallel region). False if the operation that gathered the states does it, as
            in sequence parallelism.
        own_rows: whether each rank has its own rows, as when FSDP shards a head (`scattered`).
        width: number of entries here, with padding; 0: it is not known.
        last: where the last of the ranks' parts begins, by which every rank sees that one has nothing; 0: not known.
    """

    group: dist.ProcessGroup
    begin: int
    size: int
    sum_hidden: bool = True
    own_rows: bool = False
    width: int = 0
    last: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabShard:
        """Itself: of a process group there is no copy."""
        return self


def vocab_shard(
    group: dist.ProcessGroup | None, local_size: int, vocab_size: int | None = None, sum_hidden: bool = True
) -> VocabShard:
    """The shard of this rank, if the ranks hold the vocabulary in their order. All ranks of the group must call this.

    Args:
        group: from `torch.distributed.new_group` or a DeviceMesh's get_group; None: torch's default group.
        local_size: number of entries here; may differ from rank to rank.
        vocab_size: V without padding; default: the sum of all local sizes.
        sum_hidden: as in `VocabShard`.

    Raises:
        ValueError: on all ranks: a shard is empty or has padding alone, vocab_size is above the sum of the local sizes,
            or it or sum_hidden differs between ranks; on a rank that is not in the group: so.
        TypeError: an argument is of another type; told on all ranks, but for the group.
    """
    group = _joined(group)
    given: list[Any] = [None] * group.size()
    dist.all_gather_object(given, (local_size, vocab_size, sum_hidden), group=group)
    sizes = _sizes(given)  # checked on all ranks alike
    size, last = sum(sizes) if vocab_size is None else vocab_size, sum(sizes[:-1])
    if min(sizes) < 1 or not last < size <= sum(sizes):
        raise ValueError(f"vocab_size={vocab_size} does not fit shards of {sizes} entries, each at least 1, and none "
                         "of padding alone")  # fmt: skip
    return VocabShard(group, sum(sizes[: group.rank()]), size, sum_hidden, width=local_size, last=last)


def _joined(group: Any) -> dist.ProcessGroup:
    """The group, or torch's default one, of which this rank must be."""
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("group=None is torch's default group, and there is none: call init_process_group")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this rank is not in it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group, not {group!r}")
    return group


def _sizes(given: list[Any]) -> list[int]:
    """The checked local sizes of what each rank gave `vocab_shard`: local_size, vocab_size and sum_hidden."""
    for rank, (local_size, vocab_size, sum_hidden) in enumerate(given):
        checks.check_integer(f"local_size of rank {rank}", local_size)
        checks.check_integer(f"vocab_size of rank {rank}", 1 if vocab_size is None else vocab_size)
        checks.check_flag(f"sum_hidden of rank {rank}", sum_hidden)
        if (vocab_size, sum_hidden) != given[0][1:]:
            raise ValueError(
                f"rank {rank} has vocab_size={vocab_size} and sum_hidden={sum_hidden}, and rank 0 "
                f"vocab_size={given[0][1]} and sum_hidden={given[0][2]}: they must be the same on all ranks"
            )
    return [of_rank[0] for of_rank in given]


def carried_shard(shard: VocabShard | None) -> Shard:
    """The shard as operators carry it."""
    if shard is None:
        return WHOLE
    return Shard(_joined(shard.group).group_name, shard.begin, shard.size, shard.sum_hidden, shard.own_rows)


def check_shard(name: str, shard: object) -> None:
    """Raises TypeError unless it is a `VocabShard` of integers and flags, or None."""
    if shard is None:
        return
    if not isinstance(shard, VocabShard):
        raise TypeError(f"{name} must be a VocabShard (fk.vocab_shard), not {type(shard).__name__}")
    for of in ("begin", "size", "width", "last"):
        checks.check_integer(f"{name}.{of}", getattr(shard, of))
    for of in ("sum_hidden", "own_rows"):
        checks.check_flag(f"{name}.{of}", getattr(shard, of))


def local_part(name: str, values: Any, dim: int, shard: VocabShard | None = None) -> tuple[Any, VocabShard | None]:
    """The part on this rank of logits (dim −1) or of a head (dim 0), and its shard, which a DTensor knows itself; or
    whole hidden states.

    Raises:
        ValueError: a DTensor split on other dimensions than rows and this one, or a shard given beside a DTensor.
    """
    if not is_dtensor(values):
        return values, shard
    if shard is not None:
        raise ValueError(f"shard is given beside {name}, a DTensor, which says itself how it is split")
    return _of_dtensor(name, values, dim % values.dim())


def same_rows(hidden: Any) -> bool:
    """Whether hidden states are known to be the same on all ranks: a DTensor that is whole.

    A DTensor head does not tell: tensor parallelism splits it over ranks with the same rows, FSDP over ranks that have
    their own rows each, whose losses must not be mixed.
    """
    return is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements)


def valid(name: str, values: Tensor, shard: VocabShard, dim: int) -> Tensor:
    """Values without the entries that pad the vocabulary.

    Raises:
        ValueError: a rank's shard holds only padding, does not begin within the vocabulary, or leaves none of it to the
            other ranks; or the values here are of another width than the shard.
    """
    begin, given = max(shard.begin, shard.last), values.shape[dim]
    count = min(given, shard.size - shard.begin)
    if shard.begin < 0 or begin >= shard.size or count < 1:
        raise ValueError(f"{name}: entries from {begin} on hold nothing of a vocabulary of {shard.size}")
    if count > shard.size - (others := _joined(shard.group).size() - 1):
        raise ValueError(f"shard has {count} of {shard.size} entries here, which leaves less than one to each of its "
                         f"group's {others} other ranks: shards must not overlap")  # fmt: skip
    if shard.width and given not in (shard.width, min(shard.width, shard.size - shard.begin)):
        raise ValueError(f"{name} has {given} entries here, and its shard {shard.width}")
    return values if count == values.shape[dim] else values.narrow(dim, 0, count)


def teacher_part(
    name: str, values: Tensor, dim: int, local: int, given: int, student: VocabShard, own: VocabShard | None
) -> Tensor:
    """The student's entries of a teacher's logits or head, which may have the same shard, a larger one, or the whole.

    Args:
        local, given: the number of the student's entries here, without padding and with it.

    Raises:
        ValueError: some entries of the student's shard are not here; or it may be either, the whole or a padded shard.
    """
    if own is None and values.shape[dim] == student.size == given != local:
        raise ValueError(f"{name} has {given} entries here, as many as the whole vocabulary and as the student's shard "
                         f"with padding: give the {local} without it, or teacher_shard=")  # fmt: skip
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


def part_of(name: str, values: Tensor, shard: VocabShard, rows: int) -> Tensor:
    """This rank's rows of a whole bias, for a weight that is split.

    Raises:
        ValueError: the bias has neither these rows nor all, or requires grad.
    """
    if values.dim() != 1 or values.shape[0] < shard.size:  # on all ranks alike
        raise ValueError(f"{name} has shape {tuple(values.shape)}, neither the head's {rows} here nor all {shard.size}")
    check_untrained(name, values)
    return values[shard.begin : shard.begin + rows]


def check_untrained(name: str, values: Tensor) -> None:
    """Raises ValueError for values that are trained, of which more is here than the student's part."""
    if checks.needs_gradient(values):
        raise ValueError(f"{name} requires grad, and is not split as the student is: each rank would have the gradient "
                         "of its own part alone; split it likewise, or detach it")  # fmt: skip


def local_head(name: str, head: Head, shard: VocabShard) -> Head:
    """A head's rows on this rank, without padding."""
    return head.with_each(lambda x: valid(name, x, shard, 0))


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor; torch may be built without them."""
    if not isinstance(value, Tensor) or type(value) is Tensor or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _of_dtensor(name: str, value: Any, dim: int) -> tuple[Tensor, VocabShard | None]:
    """This rank's part of a DTensor, and the shard of its dimension; None if it is whole."""
    from torch.distributed.tensor import Shard as Split

    mesh, placements = value.device_mesh, value.placements
    ways = [i for i, p in enumerate(placements) if isinstance(p, Split) and p.dim % value.dim() == dim]
    if any(p.is_partial() for p in placements) or len(ways) > 1:
        raise ValueError(f"{name} is a DTensor of {placements}: its dimension {dim} may be split over one of the "
                         "mesh's, and nothing of it partial")  # fmt: skip
    local = value.to_local()
    if not ways:
        return local, None
    size, ranks = value.shape[dim], mesh.size(ways[0])
    stretch = -(-size // ranks)  # as torch.chunk
    last = (ranks - 1) * stretch
    if last >= size:  # on all ranks alike
        raise ValueError(f"{name} is a DTensor whose {size} entries are split over {ranks} ranks by {stretch}, so that "
                         "the last have none")  # fmt: skip
    here = mesh.get_coordinate()[ways[0]]  # compilers of torch 2.8 know no get_local_rank
    return local, VocabShard(mesh.get_group(ways[0]), here * stretch, size, last=last)


def scattered_shard(weight: Any, size: int) -> VocabShard | None:
    """The shard of a head whose rows are split over a mesh of one dimension; None: it is split differently.

    Each rank must have some of the first `size` rows. Its tokens are its own.
    """
    ranks, rows = weight.device_mesh.size(), weight.shape[0]
    if len(weight.placements) > 1 or not weight.placements[0].is_shard(0) or (ranks - 1) * -(-rows // ranks) >= size:
        return None
    _, shard = _of_dtensor("", weight, 0)
    return shard and replaced(shard, size=size, sum_hidden=False, own_rows=True)
