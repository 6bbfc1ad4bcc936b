"""quack: its cross-entropy of logits, and that of hidden states, which makes the logits of some rows at a time."""

from __future__ import annotations

from functools import partial

from . import Loss, Peer


def labels() -> Loss:
    """The cross-entropy of logits. Without `reduction`, quack returns a loss for each row."""
    from quack import cross_entropy

    return partial(cross_entropy, reduction="mean")


def linear_labels() -> Loss:
    """The cross-entropy of hidden states, a weight and labels."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


PEERS = [Peer("quack", "rows", "labels", labels, "card"), Peer("quack", "linear", "labels", linear_labels, "card")]
