"""The cost model of docs/scaling.md is what runs do: products, collectives and bytes exactly, memory nearly."""

from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.scaling import CHECKED, GATHERED, IN_TURNS, Loss, checked

#: One of each kind of statistics, every term, lists, unequal shards, several pieces, FSDP's heads.
SMALL = replace(CHECKED, ranks=2, vocabulary=2048)
LOSSES = [
    *(replace(SMALL, divergence=name) for name in ("kl", "renyi", "akl", "entropy_gated", "tail_aware", "dkd")),
    replace(SMALL, labels=True, smoothing=True, metrics=True), replace(SMALL, listed=5, labels=True),
    replace(SMALL, vocabulary=2046), replace(SMALL, heads=GATHERED), replace(SMALL, heads=IN_TURNS),
    replace(SMALL, vocabulary=1 << 14, tokens=96, step=48), replace(SMALL, width=0),
]  # fmt: skip


def test_two_processes_do_what_the_model_says():
    """`checked` asserts it."""
    rows = checked(LOSSES)
    assert [row["collectives"] for row in rows[:2]] == [1 + 3 * 3, 1 + 3 * 5]
    assert max(len(of) for of in LOSSES[-2].pieces()) > 1


def test_a_wrong_model_is_seen(monkeypatch):
    """The check fails where a run does more, or less, than the model says."""
    loss = Loss(32, 64, 8, 8, step=32, itemsize=4)
    counts = [scaling.counted(loss)]
    monkeypatch.setattr(scaling, "runs", lambda losses: counts)
    checked([loss])
    for name, other in (("flops", 1), ("sent", [("all_reduce", 8)]), ("memory", {"logits": 1})):
        with monkeypatch.context() as patched, pytest.raises(AssertionError):
            patched.setattr(Loss, name, lambda self, other=other: other)
            checked([loss])
