"""Cut Cross-Entropy. On a GPU its kernel, which leaves out gradients that bfloat16 would round away (`filter_eps`);
elsewhere its version that torch.compile makes of torch's operators.
"""

from __future__ import annotations

from torch import Tensor

from . import Loss, Peer


def labels() -> Loss:
    """The cross-entropy of hidden states, a weight and labels."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, impl="cce" if hidden.is_cuda else "torch_compile")

    return loss


PEERS = [Peer("cut-cross-entropy", "linear", "labels", labels)]
