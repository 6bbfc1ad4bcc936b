"""Choosing a backend, and the operator that runs it.

Each backend module has two functions:
    why_not(device, dtype, divergence) -> str | None      the reason it cannot take a call, or None
    divergence_rows(RowCall) -> (parts, student_gradient, teacher_gradient)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..carried import flat, operator, watched
from ..divergences import Divergence
from . import chunked, cpu, cuda, sharded, sparse, triton
from .rows import RowCall

#: Fastest first; `auto` takes the first that can, and that `why_not_auto` has nothing against.
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": chunked}


#: What the losses' users call class indices, where it is not known which of them calls.
CLASSES = "labels, target or ids"


def why_not_auto(backend: str, device: torch.device) -> str | None:
    """The reason `auto` passes over a backend that can take a call, or None."""
    if backend == "triton" and device.type == "cpu":
        return "on a CPU it is Triton's interpreter, for tests alone"
    return cuda.why_not_auto() if backend == "cuda" else None


def check_backend(backend: object) -> None:
    """Raises ValueError for a name that no backend has."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {checks.shown(backend)}; known: auto, {', '.join(BACKENDS)}")


def choose(backend: str, device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str:
    """The backend's name for a call; `auto` is the fastest that can take it.

    Raises:
        ValueError: an unknown backend, or one that cannot take the call, with its reason.
    """
    if isinstance(backend, str) and backend == "auto":
        for name, module in BACKENDS.items():  # the last takes all
            if module.why_not(device, dtype, divergence) is None and why_not_auto(name, device) is None:
                return name
    check_backend(backend)
    reason = BACKENDS[backend].why_not(device, dtype, divergence)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot take this call: {reason}")
    return backend


def divergence_rows(call: RowCall, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss parts (3 or more, N) and both models' gradients, one not wanted empty; see `RowCall`.

    Through an operator, which compilers see as one; but for a user's own divergence, which is an object, and where
    nobody would see it, since its 40 arguments take longer than the call. The call fits as it is (`RowCall.checked`),
    and the backend can take it (`choose`).

    Raises:
        ValueError: labels outside [0, V) in rows that count, or such a list.
    """
    own = isinstance(call.terms.divergence, Divergence)
    if own or not watched(call.student, call.teacher, *call.terms, *call.targets):
        return _run(call, backend)
    if call.inplace:
        version = None if checks.imagined(call.student) else call.student._version
        parts, of_teacher = divergence_rows_operator_(*flat(call), backend)
        if version is not None and call.student._version == version:
            raise RuntimeError("inplace=True in a checkpoint that keeps this operator's results: the logits that it "
                               "made again were not overwritten with their gradient")  # fmt: skip
        return parts, call.student.new_empty(0), of_teacher
    return divergence_rows_operator(*flat(call), backend)


def _operator(call: RowCall, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whoever calls it."""
    call = call.checked()
    return _run(call, choose(backend, call.student.device, call.student.dtype, call.divergence), anybody=True)


def _run(call: RowCall, backend: str, anybody: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """anybody: it may not be a loss's, which has looked at labels on a CPU, by the name that its user knows."""
    terms, labels = call.terms, call.terms.labels
    if call.shard.group:
        sharded.agree(call, rows=len(terms.row_scale))
    if labels is not None and (anybody or labels.device.type != "cpu"):
        check_label_range(labels, terms.row_scale, call.vocabulary)
    sparse.check_targets(call.targets, terms.row_scale, call.vocabulary)
    if not terms.row_scale.numel():
        return _empty(call)
    rows = rows_by(backend, call)
    if call.inplace:
        torch.autograd.graph.increment_version(call.student)
    return rows


def rows_by(name: str, call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """A checked call's rows by a backend; those beside a list or over ranks, which `cuda` has no kernels for, by
    Triton's there.
    """
    if name != "torch":  # whose operations a wrapper's class sees
        checks.check_memory(student=call.student, teacher=call.teacher)
    if name == "cuda" and (call.targets.ids is not None or call.shard.group):
        reason = triton.why_not(call.student.device, call.student.dtype, call.divergence)
        name = "triton" if reason is None else "torch"
    if call.targets.ids is None:
        split = call.shard.group and not (name == "triton" and triton.takes_split(call))
        return (sharded if split else BACKENDS[name]).divergence_rows(call)
    return sparse.divergence_rows(call, BACKENDS[name])


def _empty(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the right shapes and dtypes, their values not set."""
    like = call.terms.row_scale
    return like.new_empty(call.parts, like.shape[0]), *call.empty_gradients()


def check_label_range(labels: Tensor | None, row_scale: Tensor, vocabulary: int, name: str = CLASSES) -> None:
    """Raises ValueError for labels outside [0, V) in rows that count; a GPU or a graph stops when it comes there."""
    if labels is None:
        return
    inside = labels.clamp(0, vocabulary - 1)
    if labels.is_cuda or torch.compiler.is_compiling():  # no wait: the error comes there, before a read out of bounds
        fits = ((inside == labels) | (row_scale == 0)).all()
        torch._assert_async(fits, f"{name} outside [0, V) that are not ignore_index")
    elif not checks.imagined(labels) and not torch.equal(inside, labels):
        wrong = (inside != labels) & (row_scale != 0)
        if wrong.any():
            raise ValueError(f"{name} must be in [0, {vocabulary}) or ignore_index, but hold {labels[wrong][0].item()}")


divergence_rows_operator = operator("divergence_rows", RowCall, _operator, _empty, 3)
divergence_rows_operator_ = operator(
    "divergence_rows_", RowCall, lambda *of: _operator(*of)[::2], lambda call: _empty(call)[::2], 2, mutated="student"
)
