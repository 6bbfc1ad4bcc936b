"""The requests that backends answer: rows of logits, and rows of hidden states with their heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..carried import Value, carried, replaced, tensors
from ..divergences import Divergence, by_key
from ..values import Head, Metrics, RowFunction, SparseParts


def gpu_symbol(divergence: Divergence) -> str:
    """What kernels of GPUs call a divergence: js has a name there, and no shares to multiply with; "own": a user's."""
    symbol = divergence.kernel or "own"
    return "Js" if symbol == "Gjs" and divergence.parameter == 0.5 else symbol


@carried
class Targets(NamedTuple):
    """A `sparse.TopK` as operators carry it: N rows.

    Attributes:
        ids: (N, K) int64; None: the teacher is no list.
        log_probs, weights: (N, K) float32 (float64 with float64 logits).
        tail, temperature: as in `sparse.TopK`.
        rounding: the unit of log_probs' rounding, as they were given.
    """

    ids: Tensor | None = None
    log_probs: Tensor | None = None
    weights: Tensor | None = None
    tail: str = "bucket"
    temperature: float = 1.0
    rounding: float = 0.0

    def of_rows(self, rows: slice | Tensor) -> Targets:
        """Some of the rows."""
        return _of_rows(self, LISTS, rows)


NO_LIST = Targets()


@carried
class Shard(NamedTuple):
    """Which part of the vocabulary rows have here: entries from `begin` on of `size`, of the ranks of a process group,
    by its name; "": all of it. sum_hidden, own_rows: as in `parallel.VocabShard`.
    """

    group: str = ""
    begin: int = 0
    size: int = 0
    sum_hidden: bool = True
    own_rows: bool = False


WHOLE = Shard()


@carried
class TokenTerms(NamedTuple):
    """What a loss asks of each of N rows.

    The loss of a row is ``row_scale·(divergence_scale·D + cross_entropy_scale·CE + z_loss_scale·lse²)``, where CE and
    lse are of the student at temperature 1. A row whose row_scale is 0 is not looked at.

    Attributes:
        row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale, cross_entropy_scale,
            z_loss_scale: (N,) float32 (float64 with float64 logits).
        labels: (N,) int64, in [0, V) wherever row_scale is not 0; None: no label terms.
        class_weight: (V,) float32, a factor on each class's cross-entropy.
        divergence: a key that operators take; or an object, which is how a user's own lives as long as the graph.
        metrics: whether `values.Metrics` are wanted, behind the three parts.
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
    metrics: bool = False

    def parts(self, targets: Targets) -> int:
        """How many numbers of each row are wanted."""
        beside: Any = Metrics if targets.ids is None else SparseParts
        return len(beside._fields) - 1 if self.metrics else 3  # tokens are no row's

    def without_metrics(self, factor: float | Tensor = 1.0) -> TokenTerms:
        """The terms times a factor (of each row), for calls that no metrics are asked of: rows whose terms weigh
        nothing are ignored then, whatever their logits are.
        """
        ignored = None if self.divergence is None else self.divergence_scale == 0
        if self.labels is not None:
            of_class = self.cross_entropy_scale == 0
            if self.class_weight is not None and not self.label_smoothing:
                known = self.labels.clamp(0, self.class_weight.shape[0] - 1)  # one that is no class is an error's
                of_class = of_class | ((self.class_weight[known] == 0) & (known == self.labels))
            of_labels = of_class & (self.z_loss_scale == 0)
            ignored = of_labels if ignored is None else ignored & of_labels
        assert ignored is not None
        ignored = ignored | (self.row_scale == 0)
        return replaced(self, metrics=False, row_scale=torch.where(ignored, 0, self.row_scale * factor))

    def of_rows(self, rows: slice | Tensor) -> TokenTerms:
        """The terms of some of the rows."""
        return _of_rows(self, (*SCALES, "labels"), rows)


#: The fields that are tensors, one entry a row (a class for `class_weight`); those of numbers; and a list's.
VECTORS, LISTS = tensors(TokenTerms), tensors(Targets)
SCALES = VECTORS[:6]


def _of_rows(value: Value, names: tuple[str, ...], rows: slice | Tensor) -> Value:
    return replaced(value, **{n: x[rows] for n in names if (x := getattr(value, n)) is not None})


def _dense(name: str, value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Raises ValueError unless it is a dense tensor of the shape on the device."""
    if value is None or value.shape != shape or value.device != device or value.layout != torch.strided:
        given = value if value is None else f"{value.layout} of shape {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{name} must be dense, of shape {shape} on {device}, not {given}")
    return value


def checked_terms(
    terms: TokenTerms, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> TokenTerms:
    """The terms with dense vectors of the length, dtype and device that kernels read by pointer.

    Raises:
        ValueError: a vector of another length or device, or no such divergence.
    """
    found: dict[str, Any] = {}
    before = None
    for name in VECTORS:
        value = getattr(terms, name)
        if value is None or (value is before and name in SCALES):  # many are one, of equal numbers
            continue
        size, kind = vocabulary if name == "class_weight" else rows, torch.int64 if name == "labels" else dtype
        _dense(name, value, (size,), device)
        if value.dtype == kind and value.is_contiguous():
            before = value
        else:
            found[name] = value.to(kind).contiguous()
    divergence = _known(terms.divergence)
    if divergence is not None and divergence.needs_labels and terms.labels is None:
        raise ValueError(f"{terms.divergence!r} needs labels")
    return terms._replace(**found) if found else terms


def checked_targets(
    targets: Targets, teacher: object, terms: TokenTerms, rows: int, dtype: torch.dtype, device: torch.device
) -> Targets:
    """The list as kernels may take it, dense and of the arithmetic's dtype.

    Raises:
        ValueError: another shape or device, or a teacher beside it.
    """
    if targets.ids is None:
        return targets
    if teacher is not None or terms.class_weight is not None:
        raise ValueError("a teacher that is a list goes without another one, and without class weights")
    found: dict[str, Any] = {}
    for name in LISTS:
        if (value := getattr(targets, name)) is not None or name != "weights":
            value = _dense(name, value, (rows, targets.ids.shape[-1]), device)
            found[name] = value.to(torch.int64 if name == "ids" else dtype).contiguous()
    return replaced(targets, **found)


def _known(divergence: str | Divergence | None) -> Divergence | None:
    return by_key(divergence) if isinstance(divergence, str) else divergence


def split(terms: TokenTerms) -> tuple[TokenTerms, Tensor]:
    """The terms with ``row_scale/power``, and each row's power of two, that of the largest weight of its terms: float16
    gradients of what is left neither underflow nor overflow because of the weights.
    """
    largest = terms.divergence_scale.abs()
    if terms.labels is not None:
        of_labels = torch.maximum(terms.cross_entropy_scale.abs(), terms.z_loss_scale.abs())
        largest = of_labels if terms.divergence is None else torch.maximum(largest, of_labels)
    power = ((terms.row_scale * largest).float().view(torch.int32) & 0x7F800000).view(torch.float32)
    power = torch.where((power == 0) | power.isinf(), 1, power)
    return terms._replace(row_scale=terms.row_scale / power), power


def log_sum_exp(top: Tensor, log_total: Tensor) -> Tensor:
    """Of logits whose largest is `top`; log_total: that of their distances from it, which is NaN of ±inf."""
    return torch.where(top.isinf(), top, top + log_total)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Logits as c·tanh(z/c), without a cap as they are."""
    return softcap * (z / softcap).tanh() if softcap else z


def cap_slope(capped: Tensor, softcap: float | None) -> Tensor | float:
    """The slope of a cap, by the logits that it gave."""
    return 1 - (capped / softcap) ** 2 if softcap else 1.0


@carried
class RowCall(NamedTuple):
    """Rows of logits in, losses and gradients out. N = outer·inner rows.

    A backend returns the parts (3, N) ``row_scale·[divergence_scale·D, CE, lse²]``, with row_scale·metrics behind them
    where asked for, and the gradient of the sum of losses, in the logits' dtype.

    Attributes:
        student, teacher: (outer, inner, V), dense in V, any outer strides; no teacher: no divergence.
        student_softcap, teacher_softcap: c > 0 makes every logit c·tanh(z/c) first; None or 0: they are as they are.
        student_gradient, teacher_gradient: which gradients are wanted; one that is not comes back empty.
        inplace: the student's gradient overwrites its logits and comes back empty.
        targets: a list in the teacher's place.
        shard: which part of the vocabulary it is.
    """

    student: Tensor
    teacher: Tensor | None
    terms: TokenTerms
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_gradient: bool = False
    teacher_gradient: bool = False
    inplace: bool = False
    targets: Targets = NO_LIST
    shard: Shard = WHOLE

    @property
    def parts(self) -> int:
        """How many numbers of each row are wanted."""
        return self.terms.parts(self.targets)

    @property
    def vocabulary(self) -> int:
        """V, of all ranks together."""
        return self.shard.size if self.shard.group else self.student.shape[2]

    @property
    def divergence(self) -> Divergence | None:
        """The object, whose key the terms may have."""
        return _known(self.terms.divergence)

    def empty_gradients(self, make: Callable[..., Tensor] = Tensor.new_empty) -> tuple[Tensor, Tensor]:
        """Both models' gradients, their values not set, dense; one that is not wanted, or in place, is of size 0."""
        shape, fresh = self.student.shape, self.student_gradient and not self.inplace
        of_student = make(self.student, *shape) if fresh else self.student.new_empty(0)
        return of_student, make(self.student, *shape) if self.teacher_gradient else self.student.new_empty(0)

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
        if {student.layout, rows.layout} != {torch.strided}:
            raise ValueError(f"student is {student.layout}, teacher {rows.layout}: both must be dense tensors")
        if student.shape[2] > 1 and student.numel() and (student.stride(2) != 1 or rows.stride(2) != 1):
            raise ValueError("student and teacher must be dense in V")
        listed = self.targets.ids is not None
        if teacher is None and not listed and (self.terms.divergence is not None or self.terms.labels is None):
            raise ValueError("without a teacher there are the labels' terms alone")
        if (teacher is not None or listed) and self.terms.divergence is None:
            raise ValueError("a teacher needs a divergence")
        if teacher is None and self.teacher_gradient:
            raise ValueError("there are no teacher's logits to have a gradient")
        if self.inplace:
            others = {name: getattr(self.terms, name) for name in VECTORS}
            lists = {name: getattr(self.targets, name) for name in LISTS}
            checks.check_overwritten("student", student, {"teacher": teacher, **others, **lists})
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        count = student.shape[0] * student.shape[1]
        return self._replace(
            terms=checked_terms(self.terms, count, self.vocabulary, wide, student.device),
            targets=checked_targets(self.targets, teacher, self.terms, count, wide, student.device),
        )


@carried
class Teacher(NamedTuple):
    """A teacher beside rows of hidden states.

    Attributes:
        rows: hidden states (N, D_t) with a weight; without one logits (N, V), or a function of a range of rows; None:
            no teacher, and no divergence.
        weight, bias, scale, softcap: its `Head`; a soft-cap without a weight is of the logits.
        itself: no rows; the student is its own teacher, held still, whose logits are there already.
        targets: no rows either, but a list in their place.
    """

    rows: Tensor | RowFunction | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    itself: bool = False
    targets: Targets = NO_LIST

    @property
    def head(self) -> Head:
        """Of hidden states."""
        assert self.weight is not None
        return Head(self.weight, self.bias, self.scale, self.softcap)


@carried
class Path(NamedTuple):
    """Which path is taken: on chip, with or without tiles that do not matter, or through a buffer; and bytes for either
    (0: the default).
    """

    cut: bool = False
    skip_tiles: bool = True
    chunk_bytes: int = 0


@carried
class Wants(NamedTuple):
    """Which gradients are wanted. They come in float32 (float64), to be rounded once with the upstream factor; from the
    cut path, whose memory is the least, in the inputs' dtype.
    """

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@carried
class LinearCall(NamedTuple):
    """Rows of hidden states (N, D) and heads in, losses and gradients out."""

    hidden: Tensor
    head: Head
    teacher: Teacher
    terms: TokenTerms
    path: Path = Path()
    wants: Wants = Wants()
    shard: Shard = WHOLE

    @property
    def parts(self) -> int:
        """How many numbers of each row are wanted."""
        return self.terms.parts(self.teacher.targets)

    @property
    def vocabulary(self) -> int:
        """V, of all ranks together."""
        return self.shard.size if self.shard.group else self.head.weight.shape[0]

    @property
    def divergence(self) -> Divergence | None:
        """The object, whose key the terms may have."""
        return _known(self.terms.divergence)

    def checked(self) -> LinearCall:
        """The call as kernels may take it, whoever made it; the head in the hidden states' dtype.

        Raises:
            ValueError: shapes or devices that do not fit.
        """
        hidden, head, teacher = self.hidden, self.head, self.teacher
        checks.check_memory(hidden=hidden, weight=head.weight, bias=head.bias, teacher=teacher.rows,
                            teacher_weight=teacher.weight, teacher_bias=teacher.bias)  # fmt: skip
        models = [("student", hidden, head.weight, head.bias)]
        if isinstance(teacher.rows, Tensor) and teacher.weight is not None:
            models.append(("teacher", teacher.rows, teacher.weight, teacher.bias))
        rows, vocabulary = hidden.shape[0], head.weight.shape[0]
        for whose, states, weight, bias in models:
            if states.dim() != 2 or states.shape[0] != rows or weight.shape != (vocabulary, states.shape[1]):
                raise ValueError(f"{whose}: hidden (N, D) and weight (V, D), not {tuple(states.shape)} and "
                                 f"{tuple(weight.shape)}, for N = {rows} and V = {vocabulary}")  # fmt: skip
            if bias is not None and bias.shape != (vocabulary,):
                raise ValueError(f"{whose}: bias must have shape ({vocabulary},), not {tuple(bias.shape)}")
        tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias, "teacher": teacher.rows,
                   "teacher_weight": teacher.weight, "teacher_bias": teacher.bias}  # fmt: skip
        for name, value in tensors.items():
            if isinstance(value, Tensor) and (value.dtype not in checks.DTYPES or value.layout != torch.strided
                                              or value.device != hidden.device):  # fmt: skip
                raise ValueError(f"{name} must be dense and floating, on {hidden.device}, "
                                 f"not {value.layout} of {value.dtype} on {value.device}")  # fmt: skip
        for name, value in (("teacher_weight", teacher.weight), ("teacher_bias", teacher.bias)):
            if value is not None and value.dtype != getattr(teacher.rows, "dtype", None):
                raise ValueError(f"{name} is {value.dtype}, but teacher {getattr(teacher.rows, 'dtype', None)}")
        given = teacher.rows if teacher.weight is None and isinstance(teacher.rows, Tensor) else None
        if given is not None and given.shape != (rows, vocabulary):
            raise ValueError(f"the teacher's logits must be ({rows}, {vocabulary}), not {tuple(given.shape)}")
        listed = teacher.targets.ids is not None
        if teacher.itself and teacher.rows is not None:
            raise ValueError("a student that is its own teacher needs no rows beside it")
        if (teacher.rows is None and not teacher.itself and not listed) != (self.terms.divergence is None):
            raise ValueError("a divergence needs a teacher, and a teacher a divergence")
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        other = teacher.rows if teacher.rows is not None else teacher.itself or None
        targets = checked_targets(teacher.targets, other, self.terms, rows, wide, hidden.device)
        return self._replace(
            head=head.with_each(lambda x: x.to(hidden.dtype)),
            teacher=teacher._replace(targets=targets),
            terms=checked_terms(self.terms, rows, self.vocabulary, wide, hidden.device),
        )
