"""Class probabilities as targets: a cross-entropy to them is a divergence, whose teacher they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .carried import replaced
from .divergences import CROSS_ENTROPY
from .values import LossTerms


def soft_targets(target: Tensor, logits: Tensor, terms: LossTerms) -> tuple[Tensor, LossTerms]:
    """Class probabilities as a teacher's logits (..., V), and the terms of the cross-entropy to them.

    ``−Σ w p log q`` is a token's mass times the cross-entropy to w p over the mass. For the z-loss every token counts.
    """
    checks.check_class_weight(terms.class_weight, logits.shape[-1], logits.device)
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(f"target of class probabilities must have the logits' shape {tuple(logits.shape)} on "
                         f"{logits.device}, not {tuple(target.shape)} on {target.device}")  # fmt: skip
    checks.check_tensor("target", target)
    checks.check_constant("target", target)
    smoothing = checks.check_number("label_smoothing", terms.label_smoothing, 0, 1)
    checks.check_integer("ignore_index", terms.ignore_index)
    if terms.ignore_index >= 0:
        raise ValueError("ignore_index is for class indices, and target holds class probabilities")
    _check_not_negative(target, "target holds negative class probabilities")
    wide = torch.promote_types(torch.promote_types(target.dtype, logits.dtype), torch.float32)
    p = target.detach().to(wide)
    if smoothing:
        p = p * (1 - smoothing) + smoothing / logits.shape[-1]
    if terms.class_weight is not None:
        _check_not_negative(terms.class_weight, "weight must not be negative where target holds class probabilities")
        p = p * terms.class_weight.to(wide)
    mass = p.sum(-1)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    of_loss = LossTerms(
        CROSS_ENTROPY, divergence_weight=mass, labels=labels, z_loss=terms.z_loss, token_weight=terms.token_weight,
        reduction=terms.reduction, num_items=terms.num_items,
    )  # fmt: skip
    return torch.where(mass.unsqueeze(-1) == 0, 0, p.log()), of_loss


def _check_not_negative(x: Tensor, message: str) -> None:
    if checks.looked_at(x):
        checks.require(~(x < 0).any(), message)


def as_cross_entropy(loss: Any, return_parts: bool | str) -> Any:
    """The loss; or with its parts, whose divergence is the cross-entropy."""
    if not return_parts:
        return loss
    loss, parts = loss
    nothing = torch.zeros_like(parts.divergence)
    no_label = {"label_log_prob": nothing} if return_parts == "metrics" else {}
    return loss, replaced(parts, divergence=nothing, cross_entropy=parts.divergence, **no_label)
