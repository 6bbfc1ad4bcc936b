"""The linear losses on a card: both paths, every dtype and divergence, memory, capture; a dry run in the interpreter."""

import gc

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows

from ..conftest import relative

DRY = not torch.cuda.is_available()
DEVICE = "cpu" if DRY else "cuda"
N, V, D, D_T = (40, 301, 24, 40) if DRY else (1000, 12345, 320, 512)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PATHS = {"chunks": dict(chunk_bytes=2 * 2 * V * max(1, N // 3)), "minimal": dict(memory="minimal")}
card = pytest.mark.card


def problem(dtype, n=N, v=V, d=D, d_t=D_T):
    """Hidden states and heads of both models; the student's require grad."""
    student = torch.randn(n, d, device=DEVICE), torch.randn(v, d, device=DEVICE) / d**0.5
    teacher = torch.randn(n, d_t, device=DEVICE), torch.randn(v, d_t, device=DEVICE) / d_t**0.5
    return *(x.to(dtype).requires_grad_() for x in student), *(x.to(dtype) for x in teacher)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["js"] if DRY else [name for name, d in TABLE.items() if not d.needs_labels])
def test_agrees_with_whole_logits(name, dtype, path):
    hidden, weight, teacher, teacher_weight = problem(dtype)
    labels = torch.randint(V, (N,), device=DEVICE)
    labels[3 : N // 4] = -100
    bias = torch.randn(V, device=DEVICE).to(dtype).requires_grad_()
    loss = fk.linear_f_divergence(
        hidden, weight, teacher, teacher_weight, name, student_bias=bias, labels=labels, ce_weight=0.3, z_loss=1e-3,
        logit_softcap=20.0, temperature=1.5, backend="triton", **PATHS[path],
    )  # fmt: skip
    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    logits = 20 * ((h @ w.T + b) / 20).tanh()
    rows = f_divergence_rows(logits, teacher.double() @ teacher_weight.double().T, name, 1.5)
    rows = rows + 0.3 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = ((rows + 1e-3 * logits.logsumexp(-1) ** 2) * (labels >= 0)).sum() / (labels >= 0).sum()
    assert relative(loss, expected) < TOLERANCE[dtype]
    steps = 10 if name == "tvd" else 2  # rounded logits change signs near ties
    got, want = torch.autograd.grad(loss, (hidden, weight, bias)), torch.autograd.grad(expected, (h, w, b))
    for g, e in zip(got, want, strict=True):
        assert g.dtype == dtype and (g - e).norm() < steps * TOLERANCE[dtype] * e.norm()


@card
def test_memory_beyond_gradients_is_flat_and_small():
    """Above inputs, gradients and the head's float32 accumulator: two chunks, or 16 MB on the cut path."""
    for path, bound in (({}, 1.15e9), (dict(memory="minimal"), 16e6)):
        for n in (1024, 16384):
            hidden, weight, teacher, teacher_weight = problem(torch.bfloat16, n, 128256, 512, 512)
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, "js", **path)
            accumulator = 0 if path else 4 * weight.numel()
            beyond = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes - accumulator
            assert beyond <= bound, (path, n, beyond)
            del loss


@card
def test_same_bits_twice_and_under_capture():
    inputs = problem(torch.bfloat16)
    for path in PATHS.values():
        one, two = (torch.autograd.grad(fk.linear_f_divergence(*inputs, **path), inputs[:2]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(fk.linear_f_divergence(*inputs, **path), inputs[:2])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(one, captured, strict=True))


@card
def test_compile_and_autocast():
    hidden, weight, teacher, teacher_weight = problem(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(fk.linear_f_divergence, fullgraph=True)(hidden, weight, teacher, teacher_weight)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = torch.autograd.grad(fk.linear_f_divergence(hidden, weight, teacher, teacher_weight), (hidden, weight))
    assert all((g - e).norm() < 2e-2 * e.norm() for g, e in zip(gradients, exact, strict=True))
