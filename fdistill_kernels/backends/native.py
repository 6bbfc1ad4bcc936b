"""What Python hands to the libraries of csrc, which link to no torch: csrc/row_task.h's structures."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..divergences import by_key
from ..formulas import TERMS
from .rows import VECTORS, RowCall

#: In the order of csrc/row_task.h's `Scalar`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALARS = {dtype: place for place, dtype in enumerate(DTYPES)}

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
def parameters(key: str) -> tuple[float, ...]:
    """Those of the divergence of a key, and those of it with the models exchanged."""
    own, exchanged = by_key(key).constants
    return (*own, *exchanged)


NO_PARAMETERS = (0.0,) * (2 * ctypes.sizeof(Parameter) // ctypes.sizeof(ctypes.c_float))


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


class ListTask(ctypes.Structure):
    """csrc/rest_task.h's, field by field."""

    _fields_ = [
        ("row", RowTask), ("list_size", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("ids", "log_p", "hidden")],
        *[(n, ctypes.c_int32) for n in ("whole", "alone", "labelled")],
    ]  # fmt: skip


def _codes(kind: Any) -> str:
    """A structure's fields as Python's `struct` names them."""
    if issubclass(kind, ctypes.Array):
        return kind._length_ * _codes(kind._type_)
    fields = getattr(kind, "_fields_", None)
    return CODES[kind] if fields is None else "".join(_codes(of) for _, of in fields)


CODES = {ctypes.c_int32: "i", ctypes.c_int64: "q", ctypes.c_void_p: "P", ctypes.c_float: "f"}
#: A `RowTask` by its fields in order, which takes less time than the structure itself; it ends as C aligns it.
ROW_TASK = struct.Struct(_codes(RowTask) + "0P")
NOWHERE = 0, 1, 0, 0


def rows_of(x: Tensor | None) -> tuple[int, int, int, int]:
    """The `Rows` of a tensor (outer, inner, V); nowhere, of None."""
    if x is None:
        return NOWHERE
    over, within, _ = x.stride()
    return x.data_ptr(), x.shape[1] or 1, over, within


def row_task(
    call: RowCall, student_gradient: Tensor | None, teacher_gradient: Tensor | None, parts: Tensor
) -> tuple[str, bytes, Any]:
    """The kernel's symbol, its `RowTask`, and what must live until the kernel has read it."""
    divergence, terms, student = call.divergence, call.terms, call.student
    if divergence is not None and divergence.scale != 1:
        terms = terms._replace(divergence_scale=terms.divergence_scale * divergence.scale)
    weight_sum = 0.0
    if terms.label_smoothing:
        weight_sum = student.shape[2] if terms.class_weight is None else float(terms.class_weight.sum())
    vectors: tuple[Any, ...] = terms[: len(VECTORS)]
    symbol = (divergence and divergence.kernel) or ""
    task = ROW_TASK.pack(
        SCALARS[student.dtype], len(terms.row_scale), student.shape[2], *rows_of(student), *rows_of(call.teacher),
        *rows_of(student_gradient), *rows_of(teacher_gradient),
        *[0 if x is None else x.data_ptr() for x in vectors],
        *(parameters(divergence.key) if symbol else NO_PARAMETERS),  # type: ignore[union-attr]
        terms.label_smoothing, weight_sum, call.student_softcap or 0.0, call.teacher_softcap or 0.0,
        parts.data_ptr(), terms.metrics,
    )  # fmt: skip
    return symbol, task, vectors
