"""Thousands of calls of everything leave no memory behind: graphs, gradients, own divergences, errors."""

import gc
import os
import subprocess
import sys

import torch

import fdistill_kernels as fk

#: Resident bytes and Python objects more at the end than after the warm-up. Few calls make a divergence of their own, and
#: one that stays weighs a kilobyte, which an allocator hides: objects are counted as well.
MOST_BYTES, MOST_OBJECTS = 6e6, 100
WARM_UP, CALLS = 2000, 10000


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def calls():
    """One function a call: a loss and its gradients, or an error."""
    n, v, d = 4, 50, 8
    s, t, y = torch.randn(n, v, requires_grad=True), torch.randn(n, v), torch.zeros(n).long()
    h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    both = h.detach(), w.detach()
    module = fk.FDivergenceLoss("jeffreys", temperature=2.0)
    weighted = fk.CrossEntropyLoss(torch.rand(v), label_smoothing=0.1)
    many = torch.randn(v, 2, d, requires_grad=True)
    refused = (
        lambda: fk.cross_entropy(s, y + v),
        lambda: fk.f_divergence(s, t[:, 1:]),
        lambda: fk.linear_f_divergence(h, w, *both, "nosuch"),
        lambda: fk.linear_f_divergence(h, w, lambda a, b: t[a:b, 1:]),  # in the middle of the work
        lambda: fk.f_divergence((s * 1).expand(2, n, v), t.expand(2, n, v), inplace=True),
    )

    def raises(function):
        try:
            function()
        except ValueError:
            return
        raise AssertionError("it should have been refused")

    def twice():
        loss = fk.f_divergence(s, t, "kl")
        loss.backward(retain_graph=True)
        loss.backward()

    def never_backward():
        return fk.f_divergence(s, t, lambda x: (x - 1) ** 2) + fk.linear_cross_entropy(h, w, y)

    return [
        lambda: fk.f_divergence(s, t, "js", labels=y, ce_weight=0.5, return_parts=True)[0].backward(),
        lambda: fk.f_divergence(s.half(), t.bfloat16(), "alpha").backward(),
        lambda: fk.f_divergence(s.double(), t, "tvd", reduction="none").sum().backward(),
        lambda: fk.f_divergence(s, t, fk.FDivergence(lambda x: (x - 1) ** 2)).backward(),
        lambda: module(s, t, token_weight=torch.rand(n)).backward(),
        twice,
        lambda: fk.cross_entropy(s * 1, y, inplace=True).backward(),
        lambda: fk.cross_entropy(s.bfloat16(), t.softmax(1)).backward(),
        lambda: weighted(s, y).backward(),
        lambda: fk.log_sum_exp(s).sum().backward(),
        lambda: fk.linear_f_divergence(h, w, *both).backward(),
        lambda: fk.linear_f_divergence(h, w, *both, reduction="none", chunk_bytes=500).sum().backward(),
        lambda: fk.linear_f_divergence(h, w, lambda a, b: t[a:b]).backward(),
        lambda: fk.linear_cross_entropy(h.half(), w.half(), y, memory="minimal").backward(),
        lambda: fk.linear_cross_entropy(h, many, y.unsqueeze(1).expand(n, 2)).backward(),
        never_backward,
        *(lambda function=function: raises(function) for function in refused),
    ]


def growth(count: int = CALLS) -> tuple[int, int]:
    """Bytes and objects between the warm-up and the end; gradients of the leaves keep their size."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    each = calls()
    for i in range(WARM_UP):
        each[i % len(each)]()
    gc.collect()
    objects_before, bytes_before = len(gc.get_objects()), resident()  # after the list of them, which has its own
    for i in range(count):
        each[i % len(each)]()
    gc.collect()
    return resident() - bytes_before, len(gc.get_objects()) - objects_before


def test_memory_over_thousands_of_calls():
    """In make test half of them, and of the bytes: of each kind enough to leave more objects behind, one a call."""
    count = CALLS if os.environ.get("FDISTILL_WHOLE") else CALLS // 2
    code = f"from tests.fuzz.test_memory import growth; print(*growth({count}))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    more_bytes, more_objects = map(int, run.stdout.split())
    found = f"{more_bytes / 1e6:.1f} MB, {more_objects} objects"
    assert more_bytes < MOST_BYTES * count / CALLS and more_objects < MOST_OBJECTS, found


if __name__ == "__main__":
    print(*growth())
