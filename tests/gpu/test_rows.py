"""The Triton backend on a card: numerics at full size, memory, graphs, bounds."""

import subprocess
import sys

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import example_labels, f_divergence_rows

from ..conftest import reference, relative
from .conftest import DEVICE, DRY, size

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7 if DRY else 2**-8, torch.float16: 2**-10}


def models(shape, dtype, scale=1.5):
    return ((scale * torch.randn(shape, device=DEVICE)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["kl", "js", "akl", "dkd"] if DRY else list(TABLE))
@pytest.mark.parametrize("shape", [(257, 32003), (4, 128256), (150, 4096)], ids=str)
def test_agrees_with_reference(name, dtype, shape, backend):
    student, teacher = models(size(*shape), dtype)
    wanted = [student, teacher] if backend == "triton" else [student]  # a teacher that is trained too is Triton's
    for x in wanted:
        x.requires_grad_()
    labels = example_labels(TABLE[name], student)
    loss = fk.f_divergence(student, teacher, name, labels=labels, reduction="sum", backend=backend)
    expected, *expected_gradients = reference(student, teacher, name, labels=labels)
    assert relative(loss, expected) < 1e-5
    apart = student.detach().double().log_softmax(-1) - teacher.detach().double().log_softmax(-1)
    # of an entry so near to p = q float32 cannot say which side it is on, and the signs' sum is off by as much
    decided, steps = (apart.abs() > 4e-6, 4) if name in ("tvd", "lk") else (True, 1)
    for got, exact in zip(torch.autograd.grad(loss, wanted), expected_gradients, strict=False):
        assert relative(got * decided, exact * decided) < steps * TOLERANCE[dtype]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["js", "gjs=0.1"])
@pytest.mark.parametrize("vocabulary", [3001, 20000, 128256])
def test_uniform_students_of_sure_teachers(name, vocabulary, inplace, backend):
    """Row by row: the CUDA kernels read such rows again, between others and rows that are left out."""
    student, teacher = models(size(270, vocabulary), torch.bfloat16)
    student[::3], student[::3, 5], teacher[::3, 5] = 0, 0.5, 9
    labels = torch.randint(student.shape[1], student.shape[:1], device=DEVICE)
    labels[::5] = -100
    exact, given = student.double().requires_grad_(), student.requires_grad_()
    settings = dict(labels=labels, ce_weight=0.01, reduction="sum")
    loss = fk.f_divergence(given, teacher, name, backend=backend, inplace=inplace, **settings)
    (gradient,) = torch.autograd.grad(loss, given)
    wanted = fk.f_divergence(exact, teacher.double(), name, backend="torch", **settings)
    assert relative(loss, wanted) < 1e-5
    (of_student,) = torch.autograd.grad(wanted, exact)
    # of a row, by norm; the interpreter does not round to the nearest
    most = (8 if DRY else 1.5) * (of_student.bfloat16().double() - of_student).norm(dim=1) + 1e-3 * of_student.norm(
        dim=1
    )
    assert ((gradient.double() - of_student).norm(dim=1) <= most).all()


@pytest.mark.parametrize("name", ["kl", "js"])
def test_torch_agrees_as_triton_does(name):
    """The backend of torch's own operations, which takes what the others cannot."""
    student, teacher = models(size(300, 32003), torch.bfloat16)
    labels = torch.randint(600, student.shape[:1], device=DEVICE)
    labels[::3] = -100
    student.requires_grad_()
    loss = fk.f_divergence(student, teacher, name, labels=labels, ce_weight=0.3, reduction="sum", backend="torch")
    exact = student.detach().double().requires_grad_()
    rows = f_divergence_rows(exact, teacher.double(), name)
    rows = rows + 0.3 * torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected = rows[labels >= 0].sum()
    assert relative(loss, expected) < 1e-5
    of_student = torch.autograd.grad(expected, exact)[0]
    assert relative(torch.autograd.grad(loss, student)[0], of_student) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["kl", "js", "tvd", "rkl"])
@pytest.mark.parametrize("shape", [(8192, 128256), (17000, 128256)], ids=str)
def test_large(name, shape, backend):
    """The second has more than 2³¹ elements. Rows are judged one by one, from both ends."""
    shape = size(*shape)
    student = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    teacher = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    rows = fk.f_divergence(student, teacher, name, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    for n in (0, 1, shape[0] // 2, shape[0] - 1):
        expected, of_student, _ = reference(student[n : n + 1], teacher[n : n + 1], name)
        assert relative(rows[n], expected) < 1e-5
        assert relative(gradient[n : n + 1], of_student) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 8, 60])
def test_few_rows_of_a_huge_vocabulary(rows, backend):
    student, teacher = models((rows, 256000) if not DRY else (1, 9000), torch.bfloat16)
    labels = torch.randint(student.shape[1], student.shape[:1], device=DEVICE)
    student.requires_grad_()
    loss = fk.f_divergence(student, teacher, "js", labels=labels, ce_weight=0.5, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = f_divergence_rows(exact, teacher.double(), "js").sum()
    expected = expected + 0.5 * torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    assert relative(loss, expected) < 1e-5
    assert relative(gradient, torch.autograd.grad(expected, exact)[0]) < TOLERANCE[torch.bfloat16]


def test_masks_temperatures_and_strides(backend):
    student, teacher = models(size(64, 32000), torch.float32)
    rows = student.shape[0] - 1
    labels = torch.randint(600, (rows,), device=DEVICE)
    labels[::2] = -100
    t = torch.rand(rows, device=DEVICE) + 0.5
    student = student[1:, 1:].requires_grad_()
    loss = fk.f_divergence(
        student, teacher[1:, 1:], "js", labels=labels, temperature=t, reduction="sum", backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, student)
    kept = (labels != -100).double()
    expected, of_student, _ = reference(student, teacher[1:, 1:], "js", weights=kept, temperature=t)
    assert relative(loss, expected) < 1e-5 and relative(gradient, of_student) < 2e-5
    assert (gradient[::2] == 0).all()


def test_cross_entropy(backend):
    logits, _ = models(size(300, 32001), torch.float32)
    labels = torch.randint(logits.shape[1], logits.shape[:1], device=DEVICE)
    weight = torch.rand(logits.shape[1], device=DEVICE)
    logits.requires_grad_()
    for arguments in ({}, dict(weight=weight), dict(label_smoothing=0.1), dict(weight=weight, label_smoothing=0.1)):
        loss = fk.cross_entropy(logits, labels, backend=backend, **arguments)
        expected = torch.nn.functional.cross_entropy(logits, labels, **arguments)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        got, want = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
        assert relative(got, want) < 2e-5


@pytest.mark.card
def test_memory_is_the_gradient_and_order_n(backend):
    student, teacher = models((8192, 32000), torch.bfloat16)
    for needs, above in ((True, student.nbytes), (False, 0)):
        student.requires_grad_(needs)
        fk.f_divergence(student, teacher, "js", backend=backend)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = fk.f_divergence(student, teacher, "js", backend=backend)
        if needs:
            loss.backward()
            student.grad = None
        assert torch.cuda.max_memory_allocated() - before < above + 8192 * 256


@pytest.mark.card
def test_cuda_graph_replays_the_same(backend):
    student, teacher = models((64, 32000), torch.bfloat16)
    student.requires_grad_()

    def step():
        return torch.autograd.grad(fk.f_divergence(student, teacher, "js", backend=backend), student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    assert torch.equal(captured, step())


@pytest.mark.card
def test_compiles_without_graph_breaks_and_with_autocast(backend):
    hidden = torch.randn(64, 128, device=DEVICE, requires_grad=True)
    head, teacher = torch.randn(32000, 128, device=DEVICE), torch.randn(64, 32000, device=DEVICE).bfloat16()

    def loss(h):
        with torch.autocast(DEVICE, torch.bfloat16):
            return fk.f_divergence(h @ head.T, teacher, "js", backend=backend)

    plain, compiled = (torch.autograd.grad(f(hidden), hidden)[0] for f in (loss, torch.compile(loss, fullgraph=True)))
    torch.testing.assert_close(plain, compiled, rtol=2e-2, atol=1e-4)


@pytest.mark.card
def test_labels_out_of_range_stop_the_device_and_read_nothing():
    code = """
import torch, fdistill_kernels as fk
fk.cross_entropy(torch.randn(4, 1000, device="cuda"), torch.full((4,), 10**9, device="cuda"))
torch.cuda.synchronize()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0 and "assert" in process.stderr and "illegal memory" not in process.stderr


def test_same_bits_every_time(backend):
    student, teacher = models(size(999, 50257), torch.bfloat16)
    student.requires_grad_()
    one, two = (
        torch.autograd.grad(fk.f_divergence(student, teacher, "js", backend=backend), student)[0] for _ in range(2)
    )
    assert torch.equal(one, two)


def test_upstream_gradients(backend):
    student, teacher = models(size(32, 5000), torch.float32)
    student.requires_grad_()
    loss = 3 * fk.f_divergence(student, teacher, "js", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert relative(gradient, 3 * reference(student, teacher, "js")[1] / len(student)) < 2e-5
