"""The one request every backend answers."""

from __future__ import annotations

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
