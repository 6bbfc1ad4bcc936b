"""The cost model of docs/scaling.md is what runs do: products, collectives and bytes exactly, memory nearly."""

from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.scaling import CHECKED, FSDP, Loss, cheaper, checked, fsdp, on_the_wire

#: One of each kind of statistics, every term, lists, unequal shards, several pieces.
SMALL = replace(CHECKED, ranks=2, vocabulary=4096)
LOSSES = [
    *(replace(SMALL, divergence=name) for name in ("kl", "renyi", "akl", "entropy_gated", "tail_aware", "dkd")),
    replace(SMALL, labels=True, smoothing=True, metrics=True), replace(SMALL, listed=5, labels=True),
    replace(SMALL, vocabulary=4094), replace(SMALL, vocabulary=1 << 14, tokens=96, step=48), replace(SMALL, width=0),
]  # fmt: skip


def test_two_processes_do_what_the_model_says():
    """`checked` asserts it; and that both ways to an FSDP head give the same gradients."""
    rows = checked(LOSSES)
    assert [row["collectives"] for row in rows[:2]] == [1 + 3 * 3, 1 + 3 * 5]
    assert max(len(of) for of in LOSSES[-2].pieces()) > 1


def test_a_wrong_model_is_seen(monkeypatch):
    """The check fails where a run does more, or less, than the model says."""
    loss = Loss(32, 64, 8, 8, step=32, itemsize=4)
    for name, other in (("flops", {"student": 1}), ("sent", [("all_reduce", 8)]), ("memory", {"logits": 1})):
        with monkeypatch.context() as patched, pytest.raises(AssertionError):
            patched.setattr(Loss, name, lambda self, other=other: other)
            patched.setattr(scaling, "runs", lambda losses: ([scaling.counted(x) for x in losses], []))
            checked([loss])


def test_the_way_to_a_head():
    """Few tokens go to the head, a head to many; a head that does not fit is gathered by tiles at the most."""
    assert cheaper(1 << 18, 32000, 64, 64, 8, room=1e12) == "gather"
    assert cheaper(1 << 18, 32000, 64, 64, 8, room=0) == "tiles"
    assert cheaper(64, 32000, 64, 64, 8, room=1e12) == "split"
    assert on_the_wire(fsdp("tiles", *FSDP, 4), 4) > on_the_wire(fsdp("gather", *FSDP, 4), 4)
