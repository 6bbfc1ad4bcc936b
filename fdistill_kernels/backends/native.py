"""What Python hands to the libraries of csrc, which link to no torch: csrc/row_task.h's structures."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..divergences import by_key
from ..formulas import TERMS
from .rows import VECTORS, RowCall

#: In the order of csrc/row_task.h's `Scalar`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FOLDER = Path(__file__).parent.parent
NO_KERNEL = b"there is no such kernel"  # of csrc/cpu/rows.cpp and csrc/cuda/rows.cu


def log_of(library: str) -> Path:
    """Where a build that failed has left its words."""
    return FOLDER / f"libfdistill_{library}.log"


def open_library(library: str, interface: int, path: Path | None = None) -> Any:
    """The library "cpu" or "cuda", or another build of it, as FDISTILL_CPU_LIBRARY (or CUDA) may name one.

    Raises:
        OSError: it was not built, and why; it cannot be loaded, or speaks another interface.
    """
    own, log = FOLDER / f"libfdistill_{library}.so", log_of(library)
    path = path or Path(os.environ.get(f"FDISTILL_{library.upper()}_LIBRARY") or own)
    if not path.exists():
        failed = path == own and log.exists()  # else the log is of another build
        reason = log.read_text(encoding="utf-8").partition("\n")[0] if failed else f"there is no {path}"
        raise OSError(f"the {library} library is not built: {reason}")
    try:
        opened = ctypes.CDLL(str(path))
        found = getattr(opened, f"fdistill_{library}_interface")()
    except (OSError, AttributeError) as error:
        raise OSError(f"the {library} library does not load: {error}") from error
    if found != interface:
        raise OSError(f"{path.name} is of interface {found}, not {interface}: it is left over from another version")
    return opened


def words(library: str, error: bytes) -> str:
    """What the library "cpu" or "cuda" says of a call that failed, and what to do about a divergence that it lacks."""
    remedy = ("; the library is older than the divergence: build it again, in a checkout by "
              f"bash csrc/{library}/build.sh {FOLDER / f'libfdistill_{library}.so'}")  # fmt: skip
    return error.decode() + (remedy if error == NO_KERNEL else "")


class Rows(ctypes.Structure):
    """Of a tensor (outer, inner, V)."""

    _fields_ = [("data", ctypes.c_void_p), *[(n, ctypes.c_int64) for n in ("inner", "outer_stride", "inner_stride")]]


class Parameter(ctypes.Structure):
    """A divergence's parameter and what is made of it: `Formula.constants`."""

    _fields_ = [
        *[(n, ctypes.c_float) for n in ("value", "rest", "log", "log_rest")],
        ("series", ctypes.c_float * TERMS),
    ]


@functools.lru_cache(maxsize=256)
def parameters(key: str) -> tuple[Parameter, Parameter]:
    """Those of the divergence of a key, and those of it with the models exchanged; kernels read them only."""
    own, exchanged = (Parameter(*constants[:4], constants[4:]) for constants in by_key(key).constants)
    return own, exchanged


class RowTask(ctypes.Structure):
    """csrc/row_task.h's, field by field."""

    _fields_ = [
        ("scalar", ctypes.c_int32), ("row_count", ctypes.c_int64), ("vocabulary", ctypes.c_int64),
        *[(n, Rows) for n in ("student", "teacher", "student_gradient", "teacher_gradient")],
        *[(n, ctypes.c_void_p) for n in VECTORS],
        ("parameter", Parameter), ("exchanged", Parameter),
        *[(n, ctypes.c_float) for n in ("label_smoothing", "class_weight_sum", "student_softcap", "teacher_softcap")],
        ("parts", ctypes.c_void_p), ("metrics", ctypes.c_int32),
    ]  # fmt: skip


class RestTask(ctypes.Structure):
    """csrc/rest_task.h's, field by field."""

    _fields_ = [
        ("scalar", ctypes.c_int32), *[(n, ctypes.c_int64) for n in ("row_count", "vocabulary", "list_size")],
        ("student", Rows), ("gradient", Rows), ("row_scale", ctypes.c_void_p), ("rate", ctypes.c_void_p),
        ("softcap", ctypes.c_float), ("plain", ctypes.c_int32),
        *[(n, ctypes.c_void_p) for n in ("ids", "statistics", "coefficients", "values")],
    ]  # fmt: skip


NOWHERE = Rows(None, 1, 0, 0)


def rows_of(x: Tensor | None) -> Rows:
    """Where the rows of a tensor (outer, inner, V) are; nowhere, of None."""
    return NOWHERE if x is None else Rows(x.data_ptr(), max(1, x.shape[1]), x.stride(0), x.stride(1))


def row_task(
    call: RowCall, student_gradient: Tensor | None, teacher_gradient: Tensor | None, parts: Tensor
) -> tuple[str, RowTask, Any]:
    """The kernel's symbol, its task, and what must live until the kernel has read the task."""
    divergence, terms = call.divergence, call.terms
    vectors = {name: getattr(terms, name) for name in VECTORS}
    if divergence and divergence.scale != 1:
        vectors["divergence_scale"] = terms.divergence_scale * divergence.scale
    weight_sum = 0.0
    if terms.label_smoothing:
        weight_sum = call.student.shape[2] if terms.class_weight is None else float(terms.class_weight.sum())
    task = RowTask(
        scalar=DTYPES.index(call.student.dtype), row_count=terms.row_scale.shape[0], vocabulary=call.student.shape[2],
        student=rows_of(call.student), teacher=rows_of(call.teacher), student_gradient=rows_of(student_gradient),
        teacher_gradient=rows_of(teacher_gradient),
        **{name: x.data_ptr() for name, x in vectors.items() if x is not None},
        label_smoothing=terms.label_smoothing, class_weight_sum=weight_sum,
        student_softcap=call.student_softcap or 0.0, teacher_softcap=call.teacher_softcap or 0.0,
        parts=parts.data_ptr(), metrics=terms.metrics,
    )  # fmt: skip
    if divergence and divergence.kernel:
        task.parameter, task.exchanged = parameters(divergence.key)
    return (divergence and divergence.kernel) or "", task, vectors
