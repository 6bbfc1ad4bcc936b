"""Heads whose rows are scattered over ranks that have each tokens of their own, as FSDP leaves them.

Either way costs the same products; what is sent decides (`takes_turns`):

    gathered    the head comes whole to every rank, and its gradient goes back, as in FSDP's own forward: O(V·D)
    in turns    each rank's hidden states come to all, which make its loss together, the vocabulary split over them as
                in tensor parallelism; ∂hidden goes back: O(N·D) of all ranks' tokens, and no rank ever has V×D

A rank's loss is of its own tokens. The head's gradient is the mean over the mesh, as FSDP makes it for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .backends import sharded
from .backends.collectives import Collectives
from .backends.rows import LinearCall
from .carried import built, flat, names_of, replaced
from .parallel import VocabShard, is_dtensor, scattered_shard
from .sparse import TopK
from .values import Head, Hidden

#: Parts, and the gradients of hidden states, weight and bias.
Results = tuple[Tensor, Tensor, Tensor, Tensor]
#: Tensors of a call that no rank sends, but has its part of.
OF_ALL = ("head_weight", "head_bias", "teacher_weight", "teacher_bias")
#: One number a class: what a rank's mean divides by is in them, and is of its own labels.
OF_CLASSES = "terms_class_weight"


def takes_turns(
    rows: int, vocabulary: int, width: int, teacher_width: int, itemsize: int, teacher_scattered: bool
) -> bool:
    """Whether less is sent where hidden states go to the head than where the head goes to them.

    A gradient is sent in float32, beside what it is of: in turns ``rows·(D_s (itemsize + 4) + D_t itemsize)`` bytes,
    gathered ``V·(D_s (itemsize + 4) + D_t itemsize)``, the last where the teacher's head is scattered too.

    Args:
        rows: N of all ranks together.
        teacher_width: D_t of a teacher's hidden states; 0: there are none.
    """
    of_student, of_teacher = width * (itemsize + 4), teacher_width * itemsize
    return rows * (of_student + of_teacher) < vocabulary * (of_student + of_teacher * teacher_scattered)


def head_here(
    name: str, hidden: Tensor, head: Head, teacher: Any, teacher_weight: Any, vocab_size: int | None
) -> tuple[Head, VocabShard | None]:
    """A head that may be a DTensor beside hidden states that are this rank's own: whole; or its rows here, and which.

    teacher, teacher_weight: as the losses take them; None: there is none. All ranks of the head's mesh must ask.

    Raises:
        ValueError: another layout of the bias than of the weight.
    """
    tensors: tuple[Any, ...] = (head.weight, head.bias)
    layouts = {x.placements if is_dtensor(x) else None for x in tensors if x is not None}
    if layouts <= {None}:
        return head, None
    checks.check_hidden(name, hidden)
    if len(layouts) > 1:
        raise ValueError("of a head's weight and bias both must be DTensors, of the same placements, or neither")
    head, device = cast(head, hidden), hidden.device.type
    weight: Any = head.weight
    itemsize = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype).itemsize
    size = weight.shape[0] if vocab_size is None else vocab_size
    shard = scattered_shard(weight, size) if size <= weight.shape[0] else None
    if isinstance(teacher, Hidden):
        teacher, teacher_weight = teacher
    if isinstance(teacher_weight, Head):
        teacher_weight = teacher_weight.weight
    if shard is not None:
        of_teacher = _teacher_width(teacher, teacher_weight, weight)
        states = f"{hidden.shape[-1]} of {weight.dtype}, beside a teacher of {of_teacher}"
        wire = Collectives(shard.group.group_name)
        rows = sum(wire.agree(hidden.device, hidden.shape[:-1].numel(), hidden_states=states, vocabulary=size))
        split = is_dtensor(teacher_weight)
        if of_teacher >= 0 and takes_turns(rows, size, weight.shape[1], of_teacher, itemsize, split):
            return head.with_each(lambda x: x.to_local()), shard  # type: ignore[attr-defined]
    return whole(head), None


def cast(head: Head, states: Tensor) -> Head:
    """A head that is a DTensor in the dtype of hidden states, as FSDP's mixed precision does; autocast casts later."""
    if not is_dtensor(head.weight) or torch.is_autocast_enabled(states.device.type):
        return head
    return head.with_each(lambda x: x.to(states.dtype))


def _teacher_width(teacher: Any, teacher_weight: Any, weight: Any) -> int:
    """Of a teacher's hidden states, 0: it has none; −1: of one that has no part of the vocabulary on each rank: logits,
    of which a rank has its own rows, or a head that is split otherwise.
    """
    if teacher_weight is None:
        return 0 if teacher is None or isinstance(teacher, TopK) else -1
    if is_dtensor(teacher_weight) and (
        teacher_weight.device_mesh != weight.device_mesh
        or teacher_weight.placements != weight.placements
        or teacher_weight.shape[0] != weight.shape[0]
    ):
        return -1
    return int(teacher.shape[-1])


def whole(head: Head) -> Head:
    """All of a head that is a DTensor, differentiable: its gradient is the mean of the ranks'. Another is as it is."""
    return head.with_each(lambda x: _Whole.apply(x) if is_dtensor(x) else x)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Tensor:
        ctx.layout = value.device_mesh, value.placements, value.dtype
        return value.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements, dtype = ctx.layout
        mean = gradient.to(torch.promote_types(dtype, torch.float32)) / mesh.size()
        partial = DTensor.from_local(mean, mesh, [Partial()] * mesh.ndim, run_check=False)
        return partial.redistribute(placements=placements).to(dtype)


def rows_in_turns(call: LinearCall, run: Callable[[LinearCall], Results], results: Results) -> Results:
    """Parts (3 or more, N) and ∂hidden of this rank's rows; the gradients of the weight and bias here, of the mean of
    all ranks' losses.

    Args:
        run: makes them of a call whose rows are the same on all ranks.
        results: of their shapes and dtypes, their values not set.
    """
    wire = Collectives(call.shard.group)
    of_teacher = call.teacher.rows.dtype if isinstance(call.teacher.rows, Tensor) else None
    states = f"{call.hidden.shape[1]} of {call.hidden.dtype}, beside {of_teacher}"
    counts = sharded.agree(call, len(call.hidden), hidden_states=states)
    turns = [rank for rank in range(wire.ranks) if counts[rank]]
    parts, of_hidden, of_weight, of_bias = (x.zero_() for x in results)
    coming = _begin(call, wire, turns[0], counts) if turns else None
    under_way: tuple[Any, int, Tensor] | None = None  # a turn's ∂hidden, while the next one's products are made
    for i, rank in enumerate(turns):
        assert coming is not None
        of_rank = _end(call, wire, coming)
        coming = _begin(call, wire, turns[i + 1], counts) if i + 1 < len(turns) else None  # under this turn's products
        some_parts, of_states, weight, bias = run(of_rank)
        if rank == wire.rank:
            parts = some_parts
        if call.wants.hidden:
            of_hidden = _ended(wire, under_way, of_hidden)
            under_way = wire.begin(dist.reduce, of_states, group_dst=rank), rank, of_states
        of_weight += weight
        of_bias += bias
    of_hidden = _ended(wire, under_way, of_hidden)
    return parts, of_hidden, of_weight / wire.ranks, of_bias / wire.ranks


def _ended(wire: Collectives, under_way: tuple[Any, int, Tensor] | None, of_hidden: Tensor) -> Tensor:
    """This rank's ∂hidden, once the sum under way has ended; the others' are dropped."""
    if under_way is None:
        return of_hidden
    work, rank, of_states = under_way
    wire.end(work)
    return of_states if rank == wire.rank else of_hidden


def _begin(call: LinearCall, wire: Collectives, rank: int, counts: list[int]) -> tuple[list[Any], list[Any]]:
    """Begins to send the tensors of a rank's rows: what is under way, and where they come to. Vectors go as one."""
    leaves, names, under_way, places = flat(call), names_of(LinearCall), [], []
    sent = [i for i, n in enumerate(names) if n not in OF_ALL and isinstance(leaves[i], Tensor)]
    vectors = [i for i in sent if names[i] != OF_CLASSES and leaves[i].dim() == 1 and leaves[i].is_floating_point()]
    for where in (vectors, *[[i] for i in sent if i not in vectors]):
        given = torch.stack([leaves[i] for i in where], 1) if len(where) > 1 else leaves[where[0]]
        length = len(given) if names[where[0]] == OF_CLASSES else counts[rank]
        out = given.contiguous() if rank == wire.rank else given.new_empty(length, *given.shape[1:])
        under_way.append(wire.begin(dist.broadcast, out, group_src=rank))
        places.append((where, out))
    return under_way, places


def _end(call: LinearCall, wire: Collectives, coming: tuple[list[Any], list[Any]]) -> LinearCall:
    """The call of the rows that have come, the same on all ranks."""
    leaves, (under_way, places) = flat(call), coming
    for work, (where, out) in zip(under_way, places, strict=True):
        wire.end(work)
        for i, x in zip(where, out.unbind(1) if len(where) > 1 else (out,), strict=True):
            leaves[i] = x.contiguous()
    of_rank = built(LinearCall, leaves)
    return replaced(of_rank, shard=replaced(call.shard, own_rows=False, sum_hidden=False))


def same_factor(factor: Tensor, group: str) -> bool:
    """Whether all ranks' losses have the same upstream gradient, as their common head's gradient was made for."""
    every = Collectives(group).gathered(factor.reshape(1)).tolist()
    return all(x == every[0] or (math.isnan(x[0]) and math.isnan(every[0][0])) for x in every)
