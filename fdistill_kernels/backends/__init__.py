"""Choosing a backend, and the operator that runs it.

Each backend module has two functions:
    why_not(device, dtype, divergence) -> str | None      the reason it cannot take a call, or None
    divergence_rows(RowCall) -> (parts, student_gradient, teacher_gradient)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import Divergence, by_key
from . import chunked, cpu, cuda, triton
from .rows import RowCall

#: Fastest first; `auto` takes the first that can, and that `why_not_auto` has nothing against.
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": chunked}


def why_not_auto(backend: str, device: torch.device, vocabulary: int) -> str | None:
    """The reason `auto` passes over a backend that can take a call, or None."""
    if backend == "triton" and device.type == "cpu":
        return "on a CPU it is Triton's interpreter, for tests alone"
    return cuda.why_not_auto(vocabulary) if backend == "cuda" else None


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, divergence: Divergence | None, vocabulary: int
) -> str:
    """The backend's name for a call; `auto` is the fastest that can take it.

    Raises:
        ValueError: an unknown backend, or one that cannot take the call, with its reason.
    """
    if backend == "auto":
        able = (n for n, m in BACKENDS.items() if m.why_not(device, dtype, divergence) is None)
        return next(name for name in able if why_not_auto(name, device, vocabulary) is None)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].why_not(device, dtype, divergence)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot take this call: {reason}")
    return backend


def _run(
    student: Tensor, teacher: Tensor | None, row_scale: Tensor, student_inverse_temperature: Tensor,
    teacher_inverse_temperature: Tensor, divergence_scale: Tensor, labels: Tensor | None, class_weight: Tensor | None,
    divergence: str, parameter: float, cross_entropy_weight: float, label_smoothing: float, z_loss: float,
    student_gradient: bool, teacher_gradient: bool, backend: str, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_label_range(labels, row_scale, student.shape[-1])
    call = RowCall(
        student, teacher, row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale,
        labels, class_weight, by_key(divergence, parameter) if divergence else None, cross_entropy_weight,
        label_smoothing, z_loss, student_gradient, teacher_gradient, inplace,
    )  # fmt: skip
    return BACKENDS[backend].divergence_rows(call)


def check_label_range(labels: Tensor | None, row_scale: Tensor, vocabulary: int) -> None:
    """Raises ValueError for labels outside [0, V) in rows that count; on a GPU the device itself stops."""
    if labels is None:
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (row_scale != 0)
    if labels.is_cuda:  # no wait for the device: the error surfaces there, and the kernel never reads out of bounds
        torch._assert_async(~wrong.any(), "labels outside [0, V) that are not ignore_index")
    elif wrong.any():
        raise ValueError(f"labels must be in [0, {vocabulary}) or ignore_index, but hold {labels[wrong][0].item()}")


@torch.library.custom_op("fdistill_kernels::divergence_rows", mutates_args=())
def divergence_rows(
    student: Tensor, teacher: Tensor | None, row_scale: Tensor, student_inverse_temperature: Tensor,
    teacher_inverse_temperature: Tensor, divergence_scale: Tensor, labels: Tensor | None, class_weight: Tensor | None,
    divergence: str, parameter: float, cross_entropy_weight: float, label_smoothing: float, z_loss: float,
    student_gradient: bool, teacher_gradient: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss parts (3, N) and gradients of rows (outer, inner, V); a gradient not wanted is empty. See `RowCall`."""
    return _run(
        student, teacher, row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale,
        labels, class_weight, divergence, parameter, cross_entropy_weight, label_smoothing, z_loss, student_gradient,
        teacher_gradient, backend, inplace=False,
    )  # fmt: skip


@divergence_rows.register_fake
def _(student, teacher, row_scale, *args):  # type: ignore[no-untyped-def]
    student_gradient, teacher_gradient = args[-3], args[-2]
    parts = student.new_empty((3, row_scale.shape[0]), dtype=row_scale.dtype)
    return (
        parts,
        student.new_empty(student.shape if student_gradient else (0,)),
        student.new_empty(student.shape if teacher_gradient else (0,)),
    )


@torch.library.custom_op("fdistill_kernels::divergence_rows_", mutates_args=("student",))
def divergence_rows_(
    student: Tensor, teacher: Tensor | None, row_scale: Tensor, student_inverse_temperature: Tensor,
    teacher_inverse_temperature: Tensor, divergence_scale: Tensor, labels: Tensor | None, class_weight: Tensor | None,
    divergence: str, parameter: float, cross_entropy_weight: float, label_smoothing: float, z_loss: float,
    teacher_gradient: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`divergence_rows` that leaves the student's gradient where its logits were."""
    parts, _, of_teacher = _run(
        student, teacher, row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale,
        labels, class_weight, divergence, parameter, cross_entropy_weight, label_smoothing, z_loss, True,
        teacher_gradient, backend, inplace=True,
    )  # fmt: skip
    return parts, of_teacher


@divergence_rows_.register_fake
def _(student, teacher, row_scale, *args):  # type: ignore[no-untyped-def]
    parts = student.new_empty((3, row_scale.shape[0]), dtype=row_scale.dtype)
    return parts, student.new_empty(student.shape if args[-2] else (0,))
