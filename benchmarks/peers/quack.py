"""quack: its cross-entropy of logits, and the linear one, which makes the logits of a chunk of rows at a time."""

from __future__ import annotations

from functools import partial

from . import Loss, Peer


def labels() -> Loss:
    """Of logits and labels; without `reduction`, quack returns a loss for each row."""
    from quack import cross_entropy

    return partial(cross_entropy, reduction="mean")


def linear_labels() -> Loss:
    """Of hidden states, the weight and labels."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


PEERS = [Peer("quack", "rows", "labels", labels, "card"), Peer("quack", "linear", "labels", linear_labels, "card")]
