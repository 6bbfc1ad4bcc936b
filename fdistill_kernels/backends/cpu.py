"""The native CPU backend: row kernels of csrc/cpu, built for AVX2 and AVX-512 and chosen at run time."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from .native import DTYPES, NOWHERE, ListTask, RestTask, RowTask, open_library, row_task, rows_of, words
from .rows import RowCall

INTERFACE = 7  # of csrc/cpu/rows.cpp
LARGE_PAGE = 2 << 20  # bytes


def _load() -> tuple[Any, str | None]:
    """The library, which serves every version of torch; or None, with the reason."""
    try:
        library = open_library("cpu", INTERFACE)
    except OSError as error:
        return None, str(error)
    library.fdistill_cpu_divergence_rows.restype = ctypes.c_char_p
    library.fdistill_cpu_rest_rows.restype = ctypes.c_char_p
    library.fdistill_cpu_list_rows.restype = ctypes.c_char_p
    return library, None


LIBRARY, NOT_LOADED = _load()


def capability() -> str:
    """The instruction set the kernels run with: DEFAULT, AVX2 or AVX512."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in ("AVX2", "AVX512") else "DEFAULT"


#: Asked once: compilers cannot trace the question.
CAPABILITY = capability().encode()


def why_not(device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str | None:
    """The reason this backend cannot take a call, or None."""
    if device.type != "cpu":
        return f"the logits are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16 logits, not {dtype}"
    if divergence is not None and divergence.kernel is None:
        return f"{divergence} is a user's own generator, which only the torch backend runs"
    return NOT_LOADED


def empty(like: Tensor, *sizes: int) -> Tensor:
    """An uninitialised tensor of like's dtype, in large pages, which fault less."""
    fresh = like.new_empty(sizes)
    if fresh.nbytes >= LARGE_PAGE:
        LIBRARY.fdistill_cpu_large_pages(ctypes.c_void_p(fresh.data_ptr()), ctypes.c_int64(fresh.nbytes))
    return fresh


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`."""
    of_student, of_teacher = call.empty_gradients(empty)
    to = call.student if call.inplace else of_student
    parts = call.terms.row_scale.new_empty(call.parts, call.terms.row_scale.shape[0])
    gradients = to if call.student_gradient else None, of_teacher if call.teacher_gradient else None
    symbol, task, _held = row_task(call, *gradients, parts)
    error = LIBRARY.fdistill_cpu_divergence_rows(CAPABILITY, symbol.encode(), task, torch.get_num_threads())
    if error:
        raise RuntimeError(f"the CPU row kernel {symbol!r} did not run: {words('cpu', error)}")
    return parts, of_student, of_teacher


def rest_statistics(
    student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, ids: Tensor, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.rest_statistics`."""
    found = rate.new_empty(3, len(rate))
    _run_rest(student, softcap, row_scale, rate, ids, plain, statistics=found.data_ptr())
    return found[0], found[1], found[2]


def rest_gradient_(
    out: Tensor, student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, rest: Any, ids: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """As `chunked.rest_gradient_`."""
    coefficients, values = torch.stack([x for x in rest if x is not None]), values.contiguous()
    _run_rest(student, softcap, row_scale, rate, ids.contiguous(), rest.of_plain is not None, gradient=rows_of(out),
              coefficients=coefficients.data_ptr(), values=values.data_ptr())  # fmt: skip


def list_rows(call: RowCall, gradient: Tensor | None, teacher: Any, whole: bool) -> Tensor:
    """The parts of rows beside a `sparse.Listed`, read once; writes their gradient. whole: each entry of the rest has a
    teacher of its own, and metrics are not made.
    """
    rows, size = teacher.ids.shape
    parts = call.terms.row_scale.new_empty(call.parts, rows)
    symbol, packed, _held = row_task(call, gradient, None, parts)
    ids, log_p = teacher.ids.contiguous(), teacher.log_p.contiguous()
    task = ListTask(
        row=RowTask.from_buffer_copy(packed), list_size=size,
        ids=ids.data_ptr(), log_p=log_p.data_ptr(), hidden=teacher.hidden.data_ptr(), whole=whole,
        alone=call.targets.tail == "within", labelled=call.divergence is not None and call.divergence.needs_labels,
    )  # fmt: skip
    error = LIBRARY.fdistill_cpu_list_rows(CAPABILITY, symbol.encode(), ctypes.byref(task), torch.get_num_threads())
    if error:
        raise RuntimeError(f"the CPU kernel {symbol!r} for lists did not run: {words('cpu', error)}")
    if call.terms.metrics:
        parts[3] = call.terms.row_scale * teacher.given.exp().sum(1)
    return parts


def _run_rest(
    student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, ids: Tensor, plain: bool, **more: Any
) -> None:
    task = RestTask(
        scalar=DTYPES.index(student.dtype), row_count=len(rate), vocabulary=student.shape[2], list_size=ids.shape[1],
        student=rows_of(student), row_scale=row_scale.data_ptr(), rate=rate.data_ptr(), softcap=softcap or 0.0,
        ids=ids.data_ptr(), plain=plain, **{"gradient": NOWHERE, **more},
    )  # fmt: skip
    error = LIBRARY.fdistill_cpu_rest_rows(CAPABILITY, ctypes.byref(task), torch.get_num_threads())
    if error:
        raise RuntimeError(f"the CPU kernel for lists did not run: {error.decode()}")
