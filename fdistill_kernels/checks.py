"""Argument checks: each error names the argument, what it got and what it wanted, before any kernel starts."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none", "batchmean")


def check_logits(name: str, logits: Tensor) -> None:
    """Floating logits (..., V) with at least one row and one entry."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError(f"{name} must have shape (..., V), but is a scalar")
    if logits.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(logits.shape)}; a batch needs at least one row and one entry")


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Two models' logits: one shape, dtype and device."""
    check_logits("student_logits", student)
    check_logits("teacher_logits", teacher)
    check_vocabularies(student.shape[-1], teacher.shape[-1])
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape, "
            f"not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.dtype != teacher.dtype:
        raise TypeError(f"student_logits are {student.dtype} but teacher_logits {teacher.dtype}; cast one of them")
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device} but teacher_logits on {teacher.device}")


def check_vocabularies(student: int, teacher: int) -> None:
    """Two models' vocabularies of one size."""
    if student != teacher:
        raise ValueError(
            f"student and teacher have vocabularies of {student} and {teacher}; where one is padded, give the shared "
            "size as vocab_size="
        )


def check_hidden(name: str, hidden: Tensor) -> None:
    """Floating hidden states (..., D) with at least one row."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(hidden).__name__}")
    if not hidden.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {hidden.dtype}")
    if hidden.dim() == 0 or hidden.numel() == 0:
        raise ValueError(f"{name} must have shape (..., D) with at least one row, not {tuple(hidden.shape)}")


def check_head(
    whose: str, weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """A plain head, (V, D) and (V), cut to `vocab_size`."""
    name = f"{whose}_weight"
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a tensor (V, D), not {type(weight).__name__}; of a plain nn.Linear give .weight, and "
            "merge a LoRA or quantised head into one weight first"
        )
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"{name} is sharded (DTensor): give {name}.full_tensor(), or call from the unsharded module")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(f"{name} is partitioned by ZeRO-3: call inside deepspeed.zero.GatheredParameters")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {weight.dtype}: dequantise it first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name} must have shape (V, {hidden.shape[-1]}), as hidden states do, not {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name} is on {weight.device} but the hidden states on {hidden.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"{whose}_bias must have shape ({weight.shape[0]},) on {weight.device}, not {tuple(bias.shape)}"
        )
    if vocab_size is not None:
        if not 0 < vocab_size <= weight.shape[0]:
            raise ValueError(f"vocab_size must be in [1, {weight.shape[0]}], the rows of {name}, not {vocab_size}")
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return weight, bias


def check_chunk(logits: object, like: Tensor) -> Tensor:
    """What a teacher's function returned for a range of rows."""
    if not isinstance(logits, Tensor) or logits.shape != like.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the teacher's function must return logits {tuple(like.shape)} for these rows, not {got}")
    return logits.detach()


def check_class_weight(weight: Tensor | None, vocabulary: int, device: torch.device) -> None:
    """A constant factor on each class."""
    if weight is None:
        return
    if weight.shape != (vocabulary,):
        raise ValueError(f"weight must have shape ({vocabulary},), not {tuple(weight.shape)}")
    if weight.requires_grad or weight.device != device or not weight.is_floating_point():
        raise ValueError("weight must be floating point, on the logits' device, and not require grad")


def shared_vocabulary(name: str, logits: Tensor, vocab_size: int | None) -> Tensor:
    """The first `vocab_size` entries of padded logits."""
    if vocab_size is None or not isinstance(logits, Tensor) or logits.dim() == 0:
        return logits
    if not 0 < vocab_size <= logits.shape[-1]:
        raise ValueError(f"vocab_size must be in [1, {logits.shape[-1]}], the vocabulary of {name}, not {vocab_size}")
    return logits[..., :vocab_size]


def check_labels(labels: Tensor, logits: Tensor, name: str = "labels") -> None:
    """Class indices of the logits' leading shape."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name} must be integer class indices, not {labels.dtype}")
    check_tokens(name, labels, logits)


def check_tokens(name: str, value: Tensor, logits: Tensor) -> None:
    """One value a token: the logits' leading shape, on their device."""
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have the logits' leading shape {tuple(logits.shape[:-1])}, not {tuple(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} but the logits on {logits.device}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss is not differentiable in it; detach it")


def check_number(name: str, value: float, low: float, high: float = float("inf"), open_low: bool = False) -> None:
    """A number in [low, high], or (low, high] with `open_low`."""
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], not {value!r}")


def check_reduction(reduction: str, num_items: object) -> None:
    """A known reduction, and num_items only where there is a denominator to override."""
    if reduction not in REDUCTIONS:
        near = difflib.get_close_matches(str(reduction), REDUCTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REDUCTIONS)}"
        raise ValueError(f"unknown reduction {reduction!r}; {hint}")
    if num_items is not None and reduction in ("sum", "none"):
        raise ValueError(f"num_items overrides the denominator of a mean; reduction={reduction!r} has none")
    if isinstance(num_items, (int, float)) and not num_items > 0:
        raise ValueError(f"num_items must be positive, not {num_items!r}")
