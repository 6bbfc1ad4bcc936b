"""What Python hands to the libraries of csrc, which link to no torch: csrc/row_task.h's structures."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .rows import RowCall

#: In the order of csrc/row_task.h's `Scalar`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


FOLDER = Path(__file__).parent.parent


def log_of(library: str) -> Path:
    """Where a build that failed has left its words."""
    return FOLDER / f"libfdistill_{library}.log"


def open_library(library: str, interface: int, path: Path | None = None) -> Any:
    """The library "cpu" or "cuda", or another build of it, as FDISTILL_CPU_LIBRARY (or CUDA) may name one.

    Raises:
        OSError: it was not built, and why; it cannot be loaded, or speaks another interface.
    """
    named = os.environ.get(f"FDISTILL_{library.upper()}_LIBRARY")
    path, log = path or Path(named or FOLDER / f"libfdistill_{library}.so"), log_of(library)
    if not path.exists():
        reason = log.read_text(encoding="utf-8").partition("\n")[0] if log.exists() else f"there is no {path}"
        raise OSError(f"the {library} library is not built: {reason}")
    try:
        opened = ctypes.CDLL(str(path))
        found = getattr(opened, f"fdistill_{library}_interface")()
    except (OSError, AttributeError) as error:
        raise OSError(f"the {library} library does not load: {error}") from error
    if found != interface:
        raise OSError(f"{path.name} is of interface {found}, not {interface}: it is left of another version")
    return opened


class Rows(ctypes.Structure):
    """Of a tensor (outer, inner, V)."""

    _fields_ = [("data", ctypes.c_void_p), *[(n, ctypes.c_int64) for n in ("inner", "outer_stride", "inner_stride")]]


class RowTask(ctypes.Structure):
    """csrc/row_task.h's, field by field."""

    _fields_ = [
        ("scalar", ctypes.c_int32), ("row_count", ctypes.c_int64), ("vocabulary", ctypes.c_int64),
        *[(n, Rows) for n in ("student", "teacher", "student_gradient", "teacher_gradient")],
        *[(n, ctypes.c_void_p) for n in ("row_scale", "student_inverse_temperature", "teacher_inverse_temperature",
                                         "divergence_scale", "cross_entropy_scale", "z_loss_scale")],
        ("parameter", ctypes.c_float), ("labels", ctypes.c_void_p), ("class_weight", ctypes.c_void_p),
        *[(n, ctypes.c_float) for n in ("class_weight_sum", "label_smoothing", "student_softcap", "teacher_softcap")],
        ("parts", ctypes.c_void_p),
    ]  # fmt: skip


def rows_of(x: Tensor | None) -> Rows:
    """Where the rows of a tensor (outer, inner, V) are; nowhere, of None."""
    return Rows(None, 1, 0, 0) if x is None else Rows(x.data_ptr(), max(1, x.shape[1]), x.stride(0), x.stride(1))


def row_task(
    call: RowCall, student_gradient: Tensor | None, teacher_gradient: Tensor | None, parts: Tensor
) -> tuple[str, RowTask, list[Any]]:
    """The kernel's symbol, its task, and what must live until the kernel has read the task."""
    divergence, class_weight = call.divergence, call.class_weight
    class_weight_sum = 0.0
    if call.label_smoothing:
        class_weight_sum = float(call.student.shape[2]) if class_weight is None else float(class_weight.sum())
    scale = call.divergence_scale * divergence.scale if divergence else call.divergence_scale
    vectors = (call.row_scale, call.student_inverse_temperature, call.teacher_inverse_temperature, scale,
               call.cross_entropy_scale, call.z_loss_scale, call.labels, class_weight)  # fmt: skip
    held = [None if x is None else x.contiguous() for x in vectors]
    *per_row, labels, weights = (None if x is None else x.data_ptr() for x in held)
    task = RowTask(
        DTYPES.index(call.student.dtype), call.row_scale.shape[0], call.student.shape[2], rows_of(call.student),
        rows_of(call.teacher), rows_of(student_gradient), rows_of(teacher_gradient), *per_row,
        divergence.parameter if divergence else 0.0, labels, weights, class_weight_sum, call.label_smoothing,
        call.student_softcap, call.teacher_softcap, parts.data_ptr(),
    )  # fmt: skip
    return (divergence.kernel or "") if divergence else "", task, held
