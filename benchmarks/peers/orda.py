"""orda-kernel: its distillation loss, with a weight of 0 for the cross-entropies. Its skew_js with α = ½ is js.

Its fused kernel is for GPUs. On a CPU its reference in plain torch takes the call, with a warning.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import Loss, Peer

OPTIONS: dict[str, dict[str, Any]] = {
    "js": {"kl_divergence": "skew_js", "kl_alpha": 0.5}, "kl": {"kl_divergence": "forward"},
}  # fmt: skip


def linear(divergence: str) -> Loss:
    """The loss of both models' hidden states and weights."""
    import orda_kernel

    options = dict(student_ce_weight=0.0, teacher_ce_weight=0.0, kl_weight=1.0, **OPTIONS[divergence])

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        beside = orda_kernel.SeparateTeacher(teacher, teacher_weight)
        return orda_kernel.distillation_loss(hidden, weight, labels, teacher=beside, **options).loss

    return loss


PEERS = [Peer("orda-kernel", "linear", name, partial(linear, name), timed="card") for name in OPTIONS]
