"""Small values, as the field names them: what the functions take and build in their first lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .carried import carried
from .divergences import Divergence

Temperature = float | Tensor
#: Logits (end − begin, V) of a range of the flattened rows.
RowFunction = Callable[[int, int], Tensor]


@carried
class Head(NamedTuple):
    """A model's head: the logits ``softcap·tanh((scale·hidden weightᵀ + bias)/softcap)`` of hidden states (..., D).

    Attributes:
        weight, bias: (V, D) and (V), in the hidden states' dtype.
        scale: a factor on hidden weightᵀ (Cohere, Granite).
        softcap: c > 0 (Gemma 2, Gemma Team 2024, §2), or None: no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class Hidden(NamedTuple):
    """A teacher as hidden states (..., D) with its own head."""

    states: Tensor
    head: Head


class Logits(NamedTuple):
    """Logits (..., V) given without their cap: c·tanh(z/c) is taken of them where softcap is c > 0."""

    values: Tensor
    softcap: float | None = None


class LossTerms(NamedTuple):
    """The terms of a loss; each is a keyword of `f_divergence`, which says what it is.

    divergence_weight: a number or (...), a factor on each token's divergence alone. class_weight: (V) a factor on each
    class's cross-entropy, as `cross_entropy` has it.
    """

    divergence: str | Divergence | Callable[[Tensor], Tensor] | None = "js"
    divergence_weight: float | Tensor = 1.0
    labels: Tensor | None = None
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    class_weight: Tensor | None = None
    ignore_index: int = -100
    token_weight: Tensor | None = None
    temperature: Temperature = 1.0
    teacher_temperature: Temperature | None = None
    temperature_squared: bool = False
    reduction: str = "mean"
    num_items: float | Tensor | None = None


class LossParts(NamedTuple):
    """What a loss is made of, reduced like it, detached: loss = divergence + ce_weight·cross_entropy + z_loss.

    ``tokens`` is the number of unmasked tokens, a 0-dim tensor.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor


class Metrics(NamedTuple):
    """`LossParts`, and behind them what is worth a look while a loss falls, reduced like it, detached.

    Without a teacher those that need one are 0.

    Attributes:
        student_entropy, teacher_entropy: of the tempered distributions, in nats.
        agreement: 1 where both models' first largest entries are the same, else 0.
        overlap: ``Σ min(p, q)``, 1 less the total variation distance.
        log_sum_exp, label_log_prob: of the student at temperature 1; of the label 0 without labels.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    overlap: Tensor
    log_sum_exp: Tensor
    label_log_prob: Tensor


class SparseParts(NamedTuple):
    """`LossParts` beside a `TopK` teacher, and behind them what its ids hold, reduced like the loss, detached.

    Attributes:
        teacher_mass, student_mass: Σ_S p as given, and Σ_S q of the tempered student.
        overlap: the share of the row's ids that are among the student's own largest, as many as the row has ids.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    overlap: Tensor
