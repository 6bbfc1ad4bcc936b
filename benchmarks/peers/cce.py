"""Cut Cross-Entropy: on a card its kernel, which leaves out gradients below a rounding of bfloat16 (`filter_eps`), and
elsewhere what it compiles of torch's operators.
"""

from __future__ import annotations

from torch import Tensor

from . import Loss, Peer


def labels() -> Loss:
    """Of hidden states, the weight and labels."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, impl="cce" if hidden.is_cuda else "torch_compile")

    return loss


PEERS = [Peer("cut-cross-entropy", "linear", "labels", labels)]
