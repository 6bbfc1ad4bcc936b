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
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student_logits and teacher_logits have vocabularies of {student.shape[-1]} and {teacher.shape[-1]}; "
            "where one is padded, give the shared size as vocab_size="
        )
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape, "
            f"not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.dtype != teacher.dtype:
        raise TypeError(f"student_logits are {student.dtype} but teacher_logits {teacher.dtype}; cast one of them")
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device} but teacher_logits on {teacher.device}")


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
