"""The table of docs/index.md: each call that it says a backend takes is made, by the backend it names, and no other."""

import re

import pytest
import torch
import triton
from triton import language as tl

import fdistill_kernels as fk
from fdistill_kernels import backends
from fdistill_kernels.backends.triton import cut

from .conftest import ready
from .pages import PAGES

N, V, D = 3, 320, 16
LINES = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGES["index"], re.MULTILINE)
NAMES = {"cpu": "cpu", "torch": "chunked", "triton": "triton", "cuda": "cuda"}  # of a backend, its module


@triton.jit
def pair(p, q, log_p, log_q, parameter):
    t = tl.exp(tl.where(q > 0, log_p - log_q, 0.0))
    return q * (1 - t * t), 2 * p * (t - 1)


def own(**more):
    return fk.FDivergence(lambda t: (t - 1) ** 2, **more)


def logits(dtype=torch.float32, teacher_trained=False):
    return torch.randn(N, V, dtype=dtype, requires_grad=True), torch.randn(
        N, V, dtype=dtype, requires_grad=teacher_trained
    )


def heads():
    return (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(N, D),
        torch.randn(V, D),
    )


def split(**keywords):
    group = torch.distributed.group.WORLD
    return fk.f_divergence(*logits(), "js", shard=fk.vocab_shard(group, V), **keywords)


LABELS = torch.arange(N)
CALLS = {
    "divergences that are sums over the vocabulary": lambda **k: fk.f_divergence(*logits(), "js", **k),
    "divergences that ask for statistics of the row": lambda **k: fk.f_divergence(*logits(), "akl", **k),
    "labels' terms: cross-entropy, smoothing, z-loss": lambda **k: fk.cross_entropy(logits()[0], LABELS, label_smoothing=0.1, z_loss=1e-4, **k),
    "class weights": lambda **k: fk.cross_entropy(logits()[0], LABELS, torch.rand(V), **k),
    "a teacher that is trained, too": lambda **k: fk.f_divergence(*logits(teacher_trained=True), "js", **k),
    "from hidden states, in chunks": lambda **k: fk.linear_f_divergence(*heads(), "js", **k),
    '`memory="minimal"`: logits on chip, elsewhere small chunks': lambda **k: fk.linear_f_divergence(*heads(), "js", memory="minimal", **k),
    "lists, `TopK`": lambda **k: fk.f_divergence(logits()[0], fk.top_k_of(torch.randn(N, V), 4), "js", **k),
    "a split vocabulary, `shard`": split,
    "metrics": lambda **k: fk.f_divergence(*logits(), "js", return_parts="metrics", **k)[0],
    "a user's own generator": lambda **k: fk.f_divergence(*logits(), own(), **k),
    "the same with a Triton pair": lambda **k: fk.f_divergence(*logits(), own(triton=pair), **k),
    "float64": lambda **k: fk.f_divergence(*logits(torch.float64), "js", **k),
    "bfloat16, float16": lambda **k: sum(fk.f_divergence(*logits(x), "js", **k) for x in (torch.bfloat16, torch.float16)),
}  # fmt: skip


def test_every_line_has_a_call():
    assert "| | `cpu` | `torch` | `triton` | `cuda` |" in PAGES["index"] and [line[0] for line in LINES] == list(CALLS)


@pytest.fixture(scope="module", autouse=True)
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("at, name", list(enumerate(NAMES, 1)), ids=list(NAMES))
def test_what_is_supported(at, name, monkeypatch):
    asked = ready(name, monkeypatch)
    made = []

    def watch(module, function, by):
        kept = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args: (made.append(by or args[1].__name__.rpartition(".")[2]), kept(*args))[1]
        )

    for module, by in ((backends.cpu, "cpu"), (backends.chunked, "chunked"), (backends.triton, "triton"),
                       (backends.cuda, "cuda"), (backends.sharded, "chunked"), (backends.sparse, None)):  # fmt: skip
        watch(module, "divergence_rows", by)
    watch(cut, "linear_rows", "triton")
    for line in LINES:
        cell = line[at].partition(" (")[0]
        if cell == "no":
            with pytest.raises(ValueError, match=f"backend '{name}' cannot take this call"):
                CALLS[line[0]](backend=asked)
            continue
        made.clear()
        CALLS[line[0]](backend=asked).backward()
        by = NAMES[name if cell == "yes" else cell.removeprefix("by ")]
        assert made and made[-1] == by, (line[0], cell, made)
