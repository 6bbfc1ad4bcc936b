"""Heads and teachers as users give them, by keywords or as values, checked and made what the linear losses take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, parallel, scattered
from .backends.rows import Path, Teacher
from .carried import replaced
from .chunks import MINIMAL_CHUNK_BYTES
from .divergences import Divergence
from .parallel import VocabShard
from .tokens import TEMPERATURES, sum_of_target_weights
from .values import Head, Hidden, Logits, LossTerms, RowFunction

#: The products of hidden states and heads take no factor beyond it.
LARGEST = torch.finfo(torch.float32).max
#: What a teacher's tensor without a head is.
AS_LOGITS = "teacher_hidden, taken as logits without teacher_weight,"


class Entries(NamedTuple):
    """The student's entries on this rank.

    Attributes:
        size, padded: their number, without padding and with it (0: the vocabulary is not split).
        vocab_size: to how many of the first entries the caller cut both vocabularies.
        shard: where they are in a split vocabulary.
    """

    size: int
    padded: int
    vocab_size: int | None
    shard: VocabShard | None

    def check_whole(self, name: str, own: VocabShard | None) -> None:
        """Raises ValueError for a teacher that is split beside a student that is not."""
        if self.shard is None and own is not None:
            raise ValueError(f"{name} is split over ranks, and the student's vocabulary is whole: split it, too")


def checked_cap(name: str, softcap: float | None) -> float | None:
    """A positive number whose inverse float32 holds, too; or None."""
    return None if softcap is None else checks.check_number(name, softcap, *TEMPERATURES)


def checked_scale(name: str, scale: float) -> float:
    """A factor that the products take."""
    return checks.check_number(name, scale, -LARGEST, LARGEST)


def logits_of(name: str, logits: Tensor | Logits, softcap_name: str, softcap: float | None) -> Logits:
    """Logits given as a tensor and a keyword, or as one value, which goes alone."""
    if not isinstance(logits, Logits):
        return Logits(logits, checked_cap(softcap_name, softcap))
    check_alone(name, logits, **{softcap_name: softcap})
    return Logits(logits.values, checked_cap(f"{name}.softcap", logits.softcap))


def head_of(name: str, weight: Tensor | Head, **keywords: Any) -> Head:
    """A head given as a weight and keywords (None: not given), or as one value, which goes alone."""
    bias, scale, softcap = keywords  # their names
    if isinstance(weight, Head):
        check_alone(name, weight, **keywords)
        head, names = weight, (f"{name}.scale", f"{name}.softcap")
    else:
        head = Head(weight, keywords[bias], 1.0 if keywords[scale] is None else keywords[scale], keywords[softcap])
        names = (scale, softcap)
    return Head(head.weight, head.bias, checked_scale(names[0], head.scale), checked_cap(names[1], head.softcap))


def checked_head(
    hidden: Tensor, head: Head, names: tuple[str, str, str], vocab_size: int | None
) -> tuple[Tensor, Head]:
    """Hidden states and a head that fit; names: of hidden states, weight and bias."""
    checks.check_hidden(names[0], hidden)
    weight, bias = checks.check_head(names[1], head.weight, names[2], head.bias, hidden, vocab_size)
    head = Head(weight, bias, head.scale, head.softcap)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # which torch leaves alone, too
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), head  # the head is cast later, so that its gradient stays in its own dtype
    for name, value in zip(names[1:], (weight, bias), strict=True):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{names[0]} is {hidden.dtype} but {name} {value.dtype}; cast one of them")
    return hidden, head


def check_alone(name: str, value: object, **keywords: Any) -> None:
    """Raises ValueError for keywords given beside a value that stands for them too."""
    given = [keyword for keyword, x in keywords.items() if x is not None]
    if given:
        raise ValueError(f"{', '.join(given)} beside {name}, a {type(value).__name__}, which has its own")


def check_hidden_value(name: str, value: Hidden) -> None:
    """Raises TypeError for a `Hidden` with something else in its head's place."""
    if not isinstance(value.head, Head):
        raise TypeError(f"{name}.head must be a Head, not {type(value.head).__name__}")


def head_here(
    hidden: Tensor, head: Head, names: tuple[str, str, str], vocab_size: int | None, shard: VocabShard | None,
    teacher: Any = None, teacher_weight: Any = None,
) -> tuple[Tensor, Head, VocabShard | None, int]:  # fmt: skip
    """`checked_head` of the rows of a head that are on this rank; their shard, which a DTensor says itself; and how
    many they are with padding.

    A DTensor beside hidden states that are a whole one is split over ranks with the same rows, as tensor parallelism
    has it; beside plain ones over ranks with rows of their own, as FSDP has it, which is right for the same ones, too.
    """
    states = hidden
    if parallel.same_rows(hidden) or shard is not None:
        weight, shard = parallel.local_part(names[1], head.weight, 0, shard)
        bias, _ = parallel.local_part(names[2], head.bias, 0)
        states, _ = parallel.local_part(names[0], hidden, 0)
        if shard is not None and bias is not None and bias.shape != weight.shape[:1]:
            bias = parallel.part_of(names[2], bias, shard, weight.shape[0])
        head = replaced(head, weight=weight, bias=bias)
    else:
        head, shard = scattered.head_here(names[0], hidden, head, teacher, teacher_weight, vocab_size)
    weight = head.weight
    if shard is None:
        return *checked_head(states, head, names, vocab_size), None, 0
    checks.check_tensor(names[1], weight)
    shard = cut_shard(shard, vocab_size)
    return *checked_head(states, parallel.local_head(names[1], head, shard), names, None), shard, weight.shape[0]


def cut_shard(shard: VocabShard, vocab_size: int | None) -> VocabShard:
    """The shard of the first `vocab_size` entries."""
    if vocab_size is None:
        return shard
    checks.check_vocab_size(vocab_size, shard.size, "the entries of all shards")
    return replaced(shard, size=vocab_size)


def check_no_divergence(weight: Any) -> None:
    """Raises TypeError for a divergence in the place of the teacher's head."""
    function = callable(weight) and not isinstance(weight, (torch.nn.Module, type))
    if function or isinstance(weight, (str, Divergence, LossTerms)):
        shown = repr(weight) if isinstance(weight, str) else f"a {type(weight).__name__}"
        raise TypeError(
            f"teacher_weight is the teacher's head, a tensor (V, D) or a Head, not {shown}: without one the divergence "
            "is given by keyword, divergence="
        )


def teacher_of(
    teacher: Tensor | RowFunction | Hidden | Logits, weight: Tensor | Head | None,
    student: Tensor, scale: float, of_student: Entries, own: VocabShard | None = None, **keywords: Any,
) -> Teacher:  # fmt: skip
    """The teacher beside the student's hidden states, its head's scale and entries; own: its shard; keywords: of its
    head (None: not given).
    """
    of_student.check_whole("teacher_hidden", own)
    if isinstance(teacher, (Hidden, Logits)):
        check_alone("teacher_hidden", teacher, teacher_weight=weight, **keywords)
    if isinstance(teacher, Hidden):
        check_hidden_value("teacher_hidden", teacher)
        teacher, weight = teacher
    if not isinstance(teacher, (Tensor, Logits)) and not _is_function(teacher):
        raise TypeError(
            f"teacher_hidden must be a tensor or a function of a range of rows, not {type(teacher).__name__}"
        )
    if weight is None:
        return _teacher_of_logits(teacher, student, of_student, own, **keywords)
    if not isinstance(teacher, Tensor):
        raise TypeError("teacher_weight is for hidden states; a function gives logits itself")
    head = head_of("teacher_weight", weight, **keywords)
    if not isinstance(weight, Head) and keywords["teacher_logit_scale"] is None:
        head = replaced(head, scale=scale)
    return _teacher_of_states(teacher, head, student, of_student, own)


def _is_function(value: object) -> bool:
    """Whether it may be a teacher's function: no class, whose instance would be meant."""
    return callable(value) and not isinstance(value, type)


def _teacher_of_logits(
    teacher: Tensor | RowFunction | Logits, student: Tensor, of_student: Entries, own: VocabShard | None,
    **of_head: Any,
) -> Teacher:  # fmt: skip
    """A teacher's logits, or the function that makes a chunk's."""
    size, padded, vocab_size, shard = of_student
    cap = None
    if isinstance(teacher, Logits):
        cap, teacher = checked_cap("teacher_hidden.softcap", teacher.softcap), teacher.values
        if not _is_function(teacher):  # a value inside another is neither
            checks.check_tensor("teacher_hidden.values", teacher)
    for keyword, value in of_head.items():
        if value is not None:
            raise ValueError(f"{keyword} needs teacher_weight: logits given as such are taken as they are")
    if not isinstance(teacher, Tensor):
        checks.check_takes("teacher_hidden, a function,", teacher, "begin", "end")
        if own is not None:
            raise ValueError("teacher_shard is for tensors: a function gives the student's entries, or all")
        kind = student.device.type
        if torch.is_autocast_enabled(kind):  # which chunks do without, and a backward pass has left
            teacher = functools.partial(_under_autocast, teacher, kind, torch.get_autocast_dtype(kind))
        return Teacher(teacher, softcap=cap)
    logits, own = parallel.local_part("teacher_hidden", teacher, -1, own)
    _check_teacher(logits, student)
    checks.check_logits("teacher_hidden", logits)
    of_student.check_whole("teacher_hidden", own)
    if shard is not None:
        logits = parallel.teacher_part(AS_LOGITS, logits, -1, size, padded, shard, own)
    entries = logits.shape[-1]
    if entries < size or (entries > size and vocab_size is None):
        raise ValueError(
            f"{AS_LOGITS} has {entries} entries a row, and the student's vocabulary {size}: hidden states "
            "need teacher_weight, and padded logits vocab_size="
        )
    return Teacher(logits[..., :size].detach().reshape(-1, size), softcap=cap)


def _under_autocast(function: RowFunction, device: str, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    with torch.autocast(device, dtype):
        return function(begin, end)


def _teacher_of_states(
    states: Tensor, head: Head, student: Tensor, of_student: Entries, own: VocabShard | None
) -> Teacher:
    """A teacher's hidden states and head."""
    names = "teacher_hidden", "teacher_weight", "teacher_bias"
    size, padded, vocab_size, shard = of_student
    states, _ = parallel.local_part(names[0], states, 0)
    _check_teacher(states, student)
    head = scattered.cast(head, states)
    if shard is None:
        head = scattered.whole(head)
    else:
        rows, own = parallel.local_part(names[1], head.weight, 0, own)
        bias, of_bias = parallel.local_part(names[2], head.bias, 0)
        if bias is not None and of_bias is None and bias.shape == rows.shape[:1]:
            of_bias = own  # else it is whole beside a weight that is not
        part = [None if x is None else parallel.teacher_part(n, x, 0, size, padded, shard, of)
                for n, x, of in zip(names[1:], (rows, bias), (own, of_bias), strict=True)]  # fmt: skip
        assert part[0] is not None
        head = replaced(head, weight=part[0], bias=part[1])
    states, head = checked_head(states, head, names, None if shard else vocab_size)
    checks.check_vocabularies(size, head.weight.shape[0])
    head = head.with_each(lambda x: x.detach().to(states.dtype))
    return Teacher(states.detach().reshape(-1, states.shape[-1]), *head)


def _check_teacher(teacher: Tensor, student: Tensor) -> None:
    checks.check_tensor("teacher_hidden", teacher)
    if checks.needs_gradient(teacher):
        raise ValueError(
            "teacher_hidden requires grad, but linear_f_divergence trains the student alone; detach it, or give "
            "both models' logits to f_divergence"
        )
    if teacher.shape[:-1] != student.shape[:-1] or teacher.device != student.device:
        raise ValueError(f"teacher_hidden must have student_hidden's leading shape {tuple(student.shape[:-1])} on "
                         f"{student.device}, not {tuple(teacher.shape[:-1])} on {teacher.device}")  # fmt: skip


def path_of(
    memory: str, skip_tiles: bool, chunk_bytes: int | None, teacher: Teacher, shard: VocabShard | None = None
) -> Path:
    """The path that `memory` names."""
    checks.check_flag("skip_tiles", skip_tiles)
    checks.check_choice("memory", memory, ("chunks", "minimal"))
    if chunk_bytes is not None:
        checks.check_integer("chunk_bytes", chunk_bytes, low=1)
    if memory == "chunks":
        return Path(False, skip_tiles, chunk_bytes or 0)
    if teacher.targets.ids is not None or shard is not None:
        return Path(False, skip_tiles, chunk_bytes or MINIMAL_CHUNK_BYTES)
    if teacher.rows is not None and teacher.weight is None:
        raise ValueError("memory='minimal' makes the teacher's logits on chip: give teacher_hidden and teacher_weight")
    return Path(True, skip_tiles, chunk_bytes or 0)


def many_heads(
    loss: Callable[..., Any], input: Tensor, weights: Tensor, target: Tensor, *, linear_bias: Tensor | None,
    weight: Tensor | None, reduction: str, num_items: Any, return_parts: bool | str, z_loss: float,
    token_weight: Tensor | None, ignore_index: int, **keywords: Any,
) -> Tensor:  # fmt: skip
    """A head (V, D) for each of the places (d1, ...) of weights (V, d1, ..., D), and their losses' common reduction.

    loss: `linear_cross_entropy`, of one head.
    """
    checks.check_hidden("input", input)
    checks.check_tensor("linear_weight", weights)
    checks.check_reduction(reduction)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_parts(return_parts)
    if return_parts or (z_loss and weight is not None) or reduction == "batchmean":
        raise ValueError("linear_weight of more than two dimensions goes without return_parts, without batchmean, and "
                         "without z_loss beside weight")  # fmt: skip
    places = weights.shape[1:-1]
    for name, value, shape in (("linear_bias", linear_bias, weights.shape[:-1]),
                               ("token_weight", token_weight, (*input.shape[:1], *places))):  # fmt: skip
        if value is not None:
            checks.check_tensor(name, value, floating=False)
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(value.shape)}")
    if 0 in places:
        raise ValueError(f"linear_weight of shape {tuple(weights.shape)} holds no head")
    soft, vocab_size = target.is_floating_point(), keywords["vocab_size"]
    if not soft:
        checks.check_classes("target", target)
        target = target.long()  # bytes would be compared with an ignore_index of a byte
    if vocab_size is not None:
        checks.check_vocab_size(vocab_size, weights.shape[0], "the rows of linear_weight")
    wanted = (input.shape[0], *([vocab_size or weights.shape[0]] if soft else []), *places)
    if input.dim() != 2 or target.shape != wanted:
        raise ValueError(f"linear_weight of shape {tuple(weights.shape)} needs input (N, D) and target {wanted}, not "
                         f"{tuple(input.shape)} and {tuple(target.shape)}")  # fmt: skip
    mask = torch.ones_like(target, dtype=torch.bool)[:, 0] if soft else target != ignore_index
    tokens = mask.sum()
    items = None if num_items is None else checks.checked_items(num_items, reduction, tokens, tokens.device)
    heads = weights.flatten(1, -2).unbind(1)
    each_bias = [None] * len(heads) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    each_target = target.flatten(2 if soft else 1).unbind(-1)
    each_weight = [None] * len(heads) if token_weight is None else token_weight.flatten(1).unbind(-1)
    each = [
        loss(input, head, of_head, linear_bias=bias, weight=weight, token_weight=factor, z_loss=z_loss,
             ignore_index=ignore_index, reduction="none", **keywords)
        for head, of_head, bias, factor in zip(heads, each_target, each_bias, each_weight, strict=True)
    ]  # fmt: skip
    losses = torch.stack(each, -1).reshape(input.shape[0], *places)
    if items is not None:
        items = items.to(losses.dtype) if isinstance(items, Tensor) else items  # float8 does not divide
        return losses.sum() / torch.where(tokens == 0, 1, items)
    if reduction in ("none", "sum"):
        return losses if reduction == "none" else losses.sum()
    if weight is not None and not soft:
        return losses.sum() / sum_of_target_weights(weight.to(losses.dtype), target, mask)
    return losses.sum() / tokens.clamp_min(1)
