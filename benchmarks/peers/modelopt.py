"""NVIDIA Model Optimizer: the KL of its logits' distillation; its own mean is over entries, "batchmean" over rows.

The softmax is in the logits' dtype.
"""

from __future__ import annotations

from . import Loss, Peer


def kl() -> Loss:
    """Of logits, at temperature 1."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return LogitsDistillationLoss(reduction="batchmean")


PEERS = [Peer("modelopt", "rows", "kl", kl)]
