"""NVIDIA Model Optimizer: its KL of logits. "batchmean" divides by rows, while its own "mean" divides by entries.

The softmax is computed in the logits' dtype.
"""

from __future__ import annotations

from . import Loss, Peer


def kl() -> Loss:
    """KL of logits, at temperature 1."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return LogitsDistillationLoss(reduction="batchmean")


PEERS = [Peer("modelopt", "rows", "kl", kl)]
