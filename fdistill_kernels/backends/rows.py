"""The requests that backends answer: rows of logits, and rows of hidden states with their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..divergences import Divergence


@dataclass(frozen=True)
class RowCall:
    """Rows of logits in, losses and gradients out. N = outer·inner rows; arguments are checked already.

    The loss of row n is ``row_scale·(divergence_scale·D + cross_entropy_weight·CE + z_loss·lse²)``, where CE and lse
    are of the student at temperature 1; a backend returns the parts (3, N) ``row_scale·[divergence_scale·D, CE, lse²]``
    and the gradient of the sum of losses, in the logits' dtype. A row whose row_scale is 0 is not looked at.

    Attributes:
        student, teacher: (outer, inner, V), dense in V, any outer strides; no teacher: no divergence.
        row_scale, student_inverse_temperature, teacher_inverse_temperature, divergence_scale: (N,) float32
            (float64 with float64 logits).
        labels: (N,) int64, in [0, V) wherever row_scale is not 0; None: no label terms.
        class_weight: (V,) float32, a factor on each class's cross-entropy.
        student_gradient, teacher_gradient: which gradients are wanted; one that is not comes back empty.
        inplace: the student's gradient overwrites its logits and comes back empty.
        student_softcap, teacher_softcap: c > 0 makes every logit c·tanh(z/c) first; both models' logits may then be
            overwritten. 0: none.
    """

    student: Tensor
    teacher: Tensor | None
    row_scale: Tensor
    student_inverse_temperature: Tensor
    teacher_inverse_temperature: Tensor
    divergence_scale: Tensor
    labels: Tensor | None
    class_weight: Tensor | None
    divergence: Divergence | None
    cross_entropy_weight: float
    label_smoothing: float
    z_loss: float
    student_gradient: bool
    teacher_gradient: bool
    inplace: bool
    student_softcap: float = 0.0
    teacher_softcap: float = 0.0


@dataclass(frozen=True)
class LinearCall:
    """Rows of hidden states and heads in, losses and gradients out. The logits of a model are
    ``softcap·tanh((scale·hidden weightᵀ + bias)/softcap)``, without the cap where it is 0.

    Attributes:
        hidden, weight, bias: (N, D), (V, D), (V) of the student, in one dtype.
        teacher, teacher_weight, teacher_bias: (N, D_t), (V, D_t), (V); without a weight, `teacher` is logits (N, V) or
            a function of a range of rows; None: no divergence.
        want_hidden, want_weight, want_bias: which gradients are wanted.
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
    row_scale: Tensor
    student_inverse_temperature: Tensor
    teacher_inverse_temperature: Tensor
    divergence_scale: Tensor
    labels: Tensor | None
    class_weight: Tensor | None
    divergence: Divergence | None
    cross_entropy_weight: float
    label_smoothing: float
    z_loss: float
    want_hidden: bool
    want_weight: bool
    want_bias: bool
