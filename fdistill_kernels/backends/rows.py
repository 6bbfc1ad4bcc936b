"""The requests that backends answer: rows of logits, and rows of hidden states with their heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..divergences import Divergence, by_key

#: An operator's type for a field's annotation; a divergence goes by its key.
OPERATOR_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "Divergence | None": "str?", "float": "float", "bool": "bool",
    "int": "int", "Tensor | Callable[[int, int], Tensor] | None": "Tensor?",
}  # fmt: skip


class TokenTerms(NamedTuple):
    """What a loss asks of each token, the fields that `RowCall` and `LinearCall` share; `RowCall` says what each is.

    The divergence is a key that operators take, or an object, which is how a user's own lives as long as the graph.
    """

    row_scale: Tensor
    student_inverse_temperature: Tensor
    teacher_inverse_temperature: Tensor
    divergence_scale: Tensor
    cross_entropy_scale: Tensor
    z_loss_scale: Tensor
    labels: Tensor | None
    class_weight: Tensor | None
    divergence: str | Divergence | None
    label_smoothing: float

    def replaced(self, **changes: Any) -> TokenTerms:
        """With other values in some fields; compilers of torch 2.8 do not trace ``_replace``."""
        return TokenTerms(**{**dict(zip(TokenTerms._fields, self, strict=True)), **changes})


#: The fields that are tensors, one entry a row (a class for `class_weight`).
VECTORS = TokenTerms._fields[:8]


def schema(call: type, mutated: str = "") -> str:
    """The fields of a request as an operator's arguments; `mutated` is the one written to."""
    types = {f.name: OPERATOR_TYPES[str(f.type)] for f in dataclasses.fields(call)}
    return ", ".join(f"{'Tensor(a!)' if name == mutated else kind} {name}" for name, kind in types.items())


def checked_vectors(call: Any, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The request with dense vectors of the length, dtype and device that kernels read by pointer, and its divergence.

    Raises:
        ValueError: a vector of another length or device, or no such divergence.
    """
    found: dict[str, Any] = {}
    for name in VECTORS:
        value = getattr(call, name)
        if value is None:
            continue
        size, kind = vocabulary if name == "class_weight" else rows, torch.int64 if name == "labels" else dtype
        if value.shape != (size,) or value.device != device or value.layout != torch.strided:
            raise ValueError(f"{name} must be dense, of shape ({size},) on {device}, "
                             f"not {value.layout} of shape {tuple(value.shape)} on {value.device}")  # fmt: skip
        found[name] = value.to(kind).contiguous()
    if isinstance(call.divergence, str):
        found["divergence"] = by_key(call.divergence)
    return dataclasses.replace(call, **found)


def split(row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``row_scale = mantissa·power``, a power of two: float16 gradients of the mantissa alone do not underflow."""
    power = (row_scale.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    power = torch.where((power == 0) | power.isinf(), 1, power)
    return row_scale / power, power


def capped(z: Tensor, softcap: float) -> Tensor:
    """Logits as c·tanh(z/c); 0: as they are."""
    return softcap * (z / softcap).tanh() if softcap else z


def cap_slope(capped: Tensor, softcap: float) -> Tensor | float:
    """The slope of a cap, by the logits that it gave."""
    return 1 - (capped / softcap) ** 2 if softcap else 1.0


@dataclass(frozen=True)
class RowCall:
    """Rows of logits in, losses and gradients out. N = outer·inner rows; arguments are checked already.

    The loss of row n is ``row_scale·(divergence_scale·D + cross_entropy_scale·CE + z_loss_scale·lse²)``, where CE and
    lse are of the student at temperature 1; a backend returns the parts (3, N) ``row_scale·[divergence_scale·D, CE,
    lse²]`` and the gradient of the sum of losses, in the logits' dtype. A row whose row_scale is 0 is not looked at.

    Attributes:
        student, teacher: (outer, inner, V), dense in V, any outer strides; no teacher: no divergence.
        row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale, cross_entropy_scale,
            z_loss_scale: (N,) float32 (float64 with float64 logits).
        labels: (N,) int64, in [0, V) wherever row_scale is not 0; None: no label terms.
        class_weight: (V,) float32, a factor on each class's cross-entropy.
        student_gradient, teacher_gradient: which gradients are wanted; one that is not comes back empty.
        inplace: the student's gradient overwrites its logits and comes back empty.
        student_softcap, teacher_softcap: c > 0 makes every logit c·tanh(z/c) first. 0: none.
    """

    student: Tensor
    teacher: Tensor | None
    row_scale: Tensor
    student_inverse_temperature: Tensor
    teacher_inverse_temperature: Tensor
    divergence_scale: Tensor
    cross_entropy_scale: Tensor
    z_loss_scale: Tensor
    labels: Tensor | None
    class_weight: Tensor | None
    divergence: Divergence | None
    label_smoothing: float
    student_gradient: bool
    teacher_gradient: bool
    inplace: bool
    student_softcap: float = 0.0
    teacher_softcap: float = 0.0

    def checked(self) -> RowCall:
        """The call as kernels may take it, whoever made it.

        Raises:
            ValueError: shapes, dtypes, strides or devices that do not fit, or in-place logits that overlap.
        """
        student, teacher = self.student, self.teacher
        rows = student if teacher is None else teacher
        if student.dim() != 3 or rows.shape != student.shape or not student.shape[2] > 0:
            raise ValueError("student and teacher must be rows (outer, inner, V) of one shape, "
                             f"not {tuple(student.shape)} and {tuple(rows.shape)}")  # fmt: skip
        if not student.is_floating_point() or rows.dtype != student.dtype or rows.device != student.device:
            raise ValueError(f"student is {student.dtype} on {student.device}, teacher {rows.dtype} on {rows.device}")
        if student.shape[2] > 1 and (student.stride(2) != 1 or rows.stride(2) != 1):
            raise ValueError("student and teacher must be dense in V")
        if teacher is None and (self.divergence is not None or self.labels is None or self.teacher_gradient):
            raise ValueError("without a teacher there are the labels' terms alone")
        if teacher is not None and self.divergence is None:
            raise ValueError("a teacher needs a divergence")
        if self.inplace:
            others = {name: getattr(self, name) for name in ("teacher", *VECTORS)}
            checks.check_overwritten("student", student, others)
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        count = student.shape[0] * student.shape[1]
        return checked_vectors(self, count, student.shape[2], wide, student.device)


@dataclass(frozen=True)
class LinearCall:
    """Rows of hidden states and heads in, losses and gradients out. The logits of a model are
    ``softcap·tanh((scale·hidden weightᵀ + bias)/softcap)``, without the cap where it is 0.

    Attributes:
        hidden, weight, bias: (N, D), (V, D), (V) of the student, in one dtype.
        teacher, teacher_weight, teacher_bias: (N, D_t), (V, D_t), (V); without a weight, `teacher` is logits (N, V) or
            a function of a range of rows; None: no divergence.
        want_hidden, want_weight, want_bias: which gradients are wanted. They come in float32 (float64), to be rounded
            once with the upstream factor; from the cut path, whose memory is the least, in the inputs' dtype.
        cut_path, skip_tiles, chunk_bytes: which path is taken, and what a chunk's logits may take (0: the default).
        The rest: as in `RowCall`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Tensor | Callable[[int, int], Tensor] | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    logit_scale: float
    teacher_logit_scale: float
    student_softcap: float
    teacher_softcap: float
    cut_path: bool
    skip_tiles: bool
    chunk_bytes: int
    row_scale: Tensor
    student_inverse_temperature: Tensor
    teacher_inverse_temperature: Tensor
    divergence_scale: Tensor
    cross_entropy_scale: Tensor
    z_loss_scale: Tensor
    labels: Tensor | None
    class_weight: Tensor | None
    divergence: Divergence | None
    label_smoothing: float
    want_hidden: bool
    want_weight: bool
    want_bias: bool

    def checked(self) -> LinearCall:
        """The call as kernels may take it, whoever made it.

        Raises:
            ValueError: shapes or devices that do not fit.
        """
        models = [("student", self.hidden, self.weight, self.bias)]
        if isinstance(self.teacher, Tensor) and self.teacher_weight is not None:
            models.append(("teacher", self.teacher, self.teacher_weight, self.teacher_bias))
        rows, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        for whose, hidden, weight, bias in models:
            if hidden.dim() != 2 or hidden.shape[0] != rows or weight.shape != (vocabulary, hidden.shape[1]):
                raise ValueError(f"{whose}: hidden (N, D) and weight (V, D), not {tuple(hidden.shape)} and "
                                 f"{tuple(weight.shape)}, for N = {rows} and V = {vocabulary}")  # fmt: skip
            if bias is not None and bias.shape != (vocabulary,):
                raise ValueError(f"{whose}: bias must have shape ({vocabulary},), not {tuple(bias.shape)}")
        tensors = {
            n: getattr(self, n) for n in ("hidden", "weight", "bias", "teacher", "teacher_weight", "teacher_bias")
        }
        for name, value in tensors.items():
            if isinstance(value, Tensor) and (value.dtype not in checks.DTYPES or value.layout != torch.strided
                                              or value.device != self.hidden.device):  # fmt: skip
                raise ValueError(f"{name} must be dense and floating, on {self.hidden.device}, "
                                 f"not {value.layout} of {value.dtype} on {value.device}")  # fmt: skip
        for name in ("teacher_weight", "teacher_bias"):
            if tensors[name] is not None and tensors[name].dtype != self.teacher.dtype:  # type: ignore[union-attr]
                raise ValueError(f"{name} is {tensors[name].dtype}, but teacher {self.teacher.dtype}")  # type: ignore
        given = self.teacher if self.teacher_weight is None and isinstance(self.teacher, Tensor) else None
        if given is not None and given.shape != (rows, vocabulary):
            raise ValueError(f"the teacher's logits must be ({rows}, {vocabulary}), not {tuple(given.shape)}")
        if (self.teacher is None) != (self.divergence is None):
            raise ValueError("a divergence needs a teacher, and a teacher a divergence")
        wide = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        return checked_vectors(self, rows, vocabulary, wide, self.hidden.device)
