"""Small values with the field's names, which the functions take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from .carried import carried
from .divergences import Divergence

Temperature = float | Tensor
#: Logits (end − begin, V) of a range of the flattened rows.
RowFunction = Callable[[int, int], Tensor]


@carried
class Head(NamedTuple):
    """A model's head: hidden states (..., D) have the logits ``softcap·tanh((scale·hidden weightᵀ + bias)/softcap)``.

    Attributes:
        weight: (V, D), in the dtype of the hidden states.
        bias: (V), in the same dtype; None: no bias.
        scale: factor on hidden weightᵀ (Cohere, Granite).
        softcap: c > 0 (Gemma 2, Gemma Team 2024, §2); None: no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Head:
        """With its weight and bias changed alike."""
        return Head(change(self.weight), None if self.bias is None else change(self.bias), self.scale, self.softcap)


class Hidden(NamedTuple):
    """A teacher given by hidden states (..., D) and its own head."""

    states: Tensor
    head: Head


class Logits(NamedTuple):
    """Logits (..., V) with their soft-cap: if softcap is c > 0, the loss is that of c·tanh(values/c)."""

    values: Tensor
    softcap: float | None = None


class LossTerms(NamedTuple):
    """The terms of a loss. Each field is a keyword argument of `f_divergence` and is described there.

    divergence_weight: a number or (...), factor on each token's divergence only. class_weight: (V) factor on each class
    in the cross-entropy, as `weight` in `cross_entropy`.
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
    """The parts of a loss, reduced in the same way, detached: loss = divergence + ce_weight·cross_entropy + z_loss.

    ``tokens`` is the number of unmasked tokens, a 0-dim int64 tensor.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor


class Metrics(NamedTuple):
    """`LossParts` and further measures to watch during training, reduced like the loss, detached.

    Without a teacher, those that need one are 0.

    Attributes:
        student_entropy: entropy of q in nats, at the temperature of the loss.
        teacher_entropy: entropy of p in nats, at the teacher's temperature.
        agreement: 1 if both models have the same largest entry (the first of ties), else 0.
        overlap: ``Σ min(p, q)``, which is 1 − total variation distance, of the same distributions.
        log_sum_exp: of the student's logits, at temperature 1.
        label_log_prob: the student's log-probability of the label, at temperature 1; 0 without labels.
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
    """`LossParts` with a `TopK` teacher, and measures of its lists, reduced like the loss, detached.

    Attributes:
        teacher_mass: Σ_S p as given, over a row's ids S.
        student_mass: Σ_S q, at the temperature of the loss.
        overlap: share of a row's n ids that are among the student's n largest entries.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    overlap: Tensor


#: What a program may return: torch.export saves those alone that it knows by name, and its error names this function.
for _kind in (LossParts, Metrics, SparseParts):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"fdistill_kernels.{_kind.__name__}")
#: What a file may hold for torch.load(weights_only=True): tensors and plain values.
torch.serialization.add_safe_globals([Head, Hidden, Logits, LossTerms, LossParts, Metrics, SparseParts])
