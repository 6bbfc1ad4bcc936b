"""Losses from hidden states: every divergence, keyword and misuse against logits made whole, in float64."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, Path, Teacher, TokenTerms, Wants
from fdistill_kernels.carried import flat
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows

from .conftest import WHOLE, ready, relative

N, V, D, D_T = 13, 301, 24, 40
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def problem(dtype=torch.float32, n=N):
    """Hidden states and heads of both models; the student's require grad."""
    student = (torch.randn(n, D).to(dtype).requires_grad_(), (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_())
    return (*student, torch.randn(n, D_T).to(dtype), (torch.randn(V, D_T) / D_T**0.5).to(dtype))


def exact(x):
    return x.detach().double().requires_grad_()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


BY_ENTRY = [name for name, d in TABLE.items() if d.statistics is None]


@pytest.mark.grid
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", BY_ENTRY)
def test_agrees_with_whole_logits(name, dtype, backend):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 is the torch backend's")
    hidden, weight, teacher, teacher_weight = problem(dtype)
    loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, name, backend=backend, temperature=1.5,
                                  chunk_bytes=5 * 2 * V * dtype.itemsize)  # fmt: skip
    h, w = exact(hidden), exact(weight)
    expected = f_divergence_rows(h @ w.T, teacher.double() @ teacher_weight.double().T, name, 1.5).mean()
    assert relative(loss, expected) < TOLERANCE[dtype]
    steps = 10 if name == "tvd" else 2  # rounded logits change signs near ties
    for got, want in zip(gradients(loss, hidden, weight), gradients(expected, h, w), strict=True):
        assert got.dtype == dtype and (got - want).norm() < steps * TOLERANCE[dtype] * want.norm()


def test_all_keywords_together(backend):
    hidden, weight, teacher, teacher_weight = problem()
    bias, teacher_bias = torch.randn(V, requires_grad=True), torch.randn(V)
    labels = torch.randint(V, (N,))
    labels[2:5] = -100
    token_weight, t = torch.rand(N), torch.rand(N) + 0.5
    loss, parts = fk.linear_f_divergence(
        hidden, weight, teacher, teacher_weight, "js", student_bias=bias, teacher_bias=teacher_bias, logit_scale=0.7,
        teacher_logit_scale=1.3, logit_softcap=2.0, teacher_logit_softcap=3.0, labels=labels, ce_weight=0.3, label_smoothing=0.1, z_loss=1e-2,
        token_weight=token_weight, temperature=t, teacher_temperature=2.0, temperature_squared=True, num_items=17,
        chunk_bytes=4 * 2 * V * 4, backend=backend, return_parts=True,
    )  # fmt: skip
    h, w, b = exact(hidden), exact(weight), exact(bias)
    logits = 2 * ((0.7 * h @ w.T + b) / 2).tanh()
    teacher_logits = 1.3 * teacher.double() @ teacher_weight.double().T + teacher_bias
    teacher_logits = 3 * (teacher_logits / 3).tanh()
    rows = t.double() ** 2 * f_divergence_rows(logits, teacher_logits, "js", t, 2.0)
    ce = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    rows = rows + 0.3 * ce + 1e-2 * logits.logsumexp(-1) ** 2
    expected = (rows * token_weight * (labels != -100)).sum() / 17
    assert relative(loss, expected) < 1e-5 and parts.tokens == N - 3
    torch.testing.assert_close(loss.detach(), parts.divergence + 0.3 * parts.cross_entropy + parts.z_loss)
    for got, want in zip(gradients(loss, hidden, weight, bias), gradients(expected, h, w, b), strict=True):
        assert relative(got, want) < 2e-5


def test_teachers_of_every_kind(backend):
    hidden, weight, teacher, teacher_weight = problem()
    logits = teacher @ teacher_weight.T
    want = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, backend=backend)
    calls = []

    def rows(begin, end):
        calls.append((begin, end))
        return logits[begin:end]

    for given in (logits, rows):
        got = fk.linear_f_divergence(hidden, weight, given, chunk_bytes=4 * 2 * V * 4, backend=backend)
        torch.testing.assert_close(got, want)
    assert calls[0][0] == 0 and calls[-1][1] == N and all(a[1] == b[0] for a, b in itertools.pairwise(calls))
    tied = fk.linear_f_divergence(hidden, weight, hidden.detach() + 1, weight, backend=backend)
    h, w = exact(hidden), exact(weight)
    expected = f_divergence_rows(h @ w.T, ((h + 1) @ w.T).detach(), "js").mean()
    for got, want in zip(gradients(tied, hidden, weight), gradients(expected, h, w), strict=True):
        assert relative(got, want) < 2e-5


def test_frozen_head_and_no_grad(backend):
    hidden, weight, teacher, teacher_weight = problem()
    frozen = weight.detach()
    (gradient,) = gradients(fk.linear_f_divergence(hidden, frozen, teacher, teacher_weight, backend=backend), hidden)
    want = gradients(fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, backend=backend), hidden)[0]
    assert torch.equal(gradient, want)
    with torch.no_grad():
        assert not fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, backend=backend).requires_grad


@pytest.mark.parametrize("reduction", ["sum", "none", "batchmean", "mean"])
def test_reductions_and_upstream(reduction, backend):
    hidden, weight, teacher, teacher_weight = problem()
    shaped = hidden.detach()[:12].view(3, 4, D).requires_grad_()
    loss = fk.linear_f_divergence(shaped, weight, teacher[:12].view(3, 4, D_T), teacher_weight, "kl",
                                  reduction=reduction, backend=backend)  # fmt: skip
    h, w = exact(shaped), exact(weight)
    rows = f_divergence_rows(h @ w.T, (teacher[:12].double() @ teacher_weight.double().T).view(3, 4, V), "kl")
    expected = {"sum": rows.sum(), "none": rows, "batchmean": rows.sum() / 3, "mean": rows.mean()}[reduction]
    assert loss.shape == expected.shape
    upstream = torch.rand_like(loss)
    got, want = (
        torch.autograd.grad((x * upstream).sum(), i) for x, i in ((loss, (shaped, weight)), (expected, (h, w)))
    )
    for g, e in zip(got, want, strict=True):
        assert relative(g, e) < 2e-5


def test_cross_entropy(backend):
    hidden, weight, *_ = problem()
    bias, class_weight, target = torch.randn(V, requires_grad=True), torch.rand(V), torch.randint(V, (N,))
    target[3] = -100
    h, w, b = exact(hidden), exact(weight), exact(bias)
    for arguments in ({}, dict(weight=class_weight, label_smoothing=0.1), dict(reduction="sum")):
        loss = fk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, chunk_bytes=4 * V * 4, backend=backend,
                                       **arguments)  # fmt: skip
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        expected = F.cross_entropy(h @ w.T + b, target, **wide)
        assert relative(loss, expected) < 1e-5
        for got, want in zip(gradients(loss, hidden, weight, bias), gradients(expected, h, w, b), strict=True):
            assert relative(got, want) < 2e-5


def test_all_masked(backend):
    hidden, weight, teacher, teacher_weight = problem()
    loss = fk.linear_f_divergence(
        hidden, weight, teacher, teacher_weight, labels=torch.full((N,), -100), backend=backend
    )
    assert loss == 0 and all((g == 0).all() for g in gradients(loss, hidden, weight))


def test_accuracy_is_within_twice_the_eager_error(backend):
    hidden, weight, teacher, teacher_weight = problem(torch.bfloat16, n=64)
    h, w = exact(hidden), exact(weight)
    expected = f_divergence_rows(h @ w.T, teacher.double() @ teacher_weight.double().T, "js").mean()
    eager = f_divergence_rows((hidden @ weight.T).float(), (teacher @ teacher_weight.T).float(), "js").mean()
    ours = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, "js", chunk_bytes=20 * V, backend=backend)
    want = gradients(expected, h, w)
    errors = [[(g.double() - e).norm() / e.norm() for g, e in zip(gradients(x, hidden, weight), want, strict=True)]
              for x in (ours, eager)]  # fmt: skip
    truncating = 2 if backend == "triton" else 1  # the interpreter's bfloat16
    assert all(a <= truncating * 2 * b for a, b in zip(*errors, strict=True))
    assert (ours - expected).abs() <= 2 * (eager - expected).abs() + 1e-3 * expected.abs()


def test_autocast_scaler_and_accumulation():
    hidden, weight, teacher, teacher_weight = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients(loss, hidden, weight))
    half = [x.detach().half() for x in problem(n=8)]
    half[0].requires_grad_(), half[1].requires_grad_()
    scaled = gradients(65536 * fk.linear_f_divergence(*half, "kl"), *half[:2])
    h, w = exact(half[0]), exact(half[1])
    want = gradients(65536 * f_divergence_rows(h @ w.T, half[2].double() @ half[3].double().T, "kl").mean(), h, w)
    assert all(relative(g, e) < 5e-3 for g, e in zip(scaled, want, strict=True))
    whole = gradients(fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, num_items=N), weight)[0]
    parts = [fk.linear_f_divergence(hidden[s], weight, teacher[s], teacher_weight, num_items=N)
             for s in (slice(0, 5), slice(5, N))]  # fmt: skip
    assert relative(sum(gradients(p, weight)[0] for p in parts), whole) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_s_function_runs_under_its_caller_s_autocast(reduction):
    hidden, weight, teacher, teacher_weight = problem()
    narrow, seen = teacher.bfloat16(), []  # as a model has them there, beside a head of 32 bits

    def logits(begin, end):
        seen.append(narrow[begin:end] @ teacher_weight.T)
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16):
        loss = fk.linear_f_divergence(hidden, weight, logits, reduction=reduction)
    loss.sum().backward()
    assert {x.dtype for x in seen} == {torch.bfloat16} and len(seen) == (1 if reduction == "mean" else 2)


def test_modules_and_compile():
    hidden, weight, teacher, teacher_weight = problem()
    target = torch.randint(V, (N,))
    loss = fk.LinearFDivergenceLoss("tvd", temperature=2.0)
    want = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, "tvd", temperature=2.0)
    torch.testing.assert_close(loss(hidden, weight, teacher, teacher_weight), want)
    assert "tvd" in repr(loss) and "z_loss=0.1" in repr(fk.LinearCrossEntropyLoss(z_loss=0.1))
    torch.testing.assert_close(fk.LinearCrossEntropyLoss()(hidden, weight, target),
                               fk.linear_cross_entropy(hidden, weight, target))  # fmt: skip
    ignored = target.index_fill(0, torch.tensor([1]), -100)  # None: torch's own default
    torch.testing.assert_close(fk.LinearCrossEntropyLoss(ignore_index=None)(hidden, weight, ignored),
                               fk.linear_cross_entropy(hidden, weight, ignored))  # fmt: skip
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, teacher, teacher_weight)
    torch.testing.assert_close(compiled, want)
    for got, expected in zip(gradients(compiled, hidden, weight), gradients(want, hidden, weight), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_opcheck(backend, monkeypatch):
    ready(backend, monkeypatch)
    hidden, weight, teacher, teacher_weight = (x.detach() for x in problem())
    ones = torch.ones(N)
    terms = TokenTerms(*[ones] * 6, None, None, fk.TABLE["js"].key, 0.0)
    call = LinearCall(hidden, fk.Head(weight), Teacher(teacher, teacher_weight), terms, Path(False, True, 5 * 8 * V),
                      Wants(True, True))  # fmt: skip
    torch.library.opcheck(fk.linear.linear_rows, (*flat(call), backend))


def test_second_backward():
    hidden, weight, teacher, teacher_weight = problem()
    loss = 3 * fk.linear_f_divergence(hidden, weight, teacher, teacher_weight)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.autograd.grad(loss, hidden, retain_graph=True)  # of one alone, as GradNorm asks
    for first, second in zip(once, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()
    loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


MEMORY = """
import sys, torch, fdistill_kernels as fk
n, d, v = map(int, sys.argv[1:])
torch.set_num_threads(2)
def status(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) / 1000 * 1.024
def step(h, w, t, u):
    fk.linear_f_divergence(h, w, t, u, "js").backward()
student = [torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)]
teacher = torch.randn(n, d), torch.randn(v, d)
step(torch.randn(9, d, requires_grad=True), torch.randn(99, d, requires_grad=True), torch.randn(9, d), torch.randn(99, d))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(*student, *teacher)
print(status("VmHWM") - before - sum(x.nbytes for x in student) / 1e6)
"""


@pytest.mark.parametrize("shape", [(2048, 512, 32000), (1000, 64, 4000), (64000, 64, 4000)] if WHOLE else
                         [(512, 512, 32000), (1000, 64, 4000), (16000, 64, 4000)], ids=str)  # fmt: skip
def test_memory_beyond_the_gradients_is_under_64_mb_and_flat(shape):
    """The first is the size that the benchmark times (in make test fewer rows of it, in three chunks); the others are 64
    times apart in N (16 in make test).
    """
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, shape)], capture_output=True, text=True, check=True
    )
    assert float(process.stdout) < 64 + 2e-6 * shape[0] * 20  # and a few numbers a row


HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT = problem()
MISUSES = {
    "vocabularies": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT[:-1]), "vocabularies of 301 and 300.*vocab_size"),
    "hidden states for logits": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, TEACHER), "taken as logits without teacher_weight, has 40 entries a row, and the student's vocabulary 301"),
    "the same, of a value": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, fk.Logits(TEACHER), vocab_size=300), "has 40 entries a row, and the student's vocabulary 300: hidden states need teacher_weight"),
    "padded logits": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, torch.zeros(N, V + 3)), "padded logits vocab_size="),
    "a scalar": (lambda: fk.linear_f_divergence(HIDDEN[0], WEIGHT, torch.zeros(())), "teacher_hidden must have shape .*, but is a scalar"),
    "a name for the head": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, torch.zeros(N, V), "kl"), "not 'kl': without one the divergence is given by keyword"),
    "a divergence for it": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, lambda a, b: None, fk.Alpha(0.3)), "teacher_weight is the teacher's head.*given by keyword"),
    "a function for it": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, fk.Logits(torch.zeros(N, V)), lambda t: t * t.log()), "not a function: .*divergence="),
    "terms for it": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, fk.TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1)), fk.LossTerms("kl")), "not a LossTerms: .*divergence="),
    "sizes": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT[:, 1:], TEACHER, TEACHER_WEIGHT), r"student_weight must have shape \(V, 24\)"),
    "lora": (lambda: fk.linear_f_divergence(HIDDEN, torch.nn.Linear(D, V), TEACHER, TEACHER_WEIGHT), "not Linear.*merge a LoRA"),
    "quantised": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT.detach().char(), TEACHER, TEACHER_WEIGHT), "dequantise"),
    "dtypes": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT.bfloat16(), TEACHER, TEACHER_WEIGHT), "float32 but student_weight torch.bfloat16"),
    "teacher's grad": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, HIDDEN, WEIGHT), "teacher_hidden requires grad.*detach"),
    "teacher's rows": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, TEACHER[1:], TEACHER_WEIGHT), r"leading shape \(13,\)"),
    "teacher's type": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, None), "a function of a range of rows, not NoneType"),
    "function's shape": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, lambda a, b: torch.zeros(1)), r"must return logits \(13, 301\)"),
    "function and head": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, lambda a, b: None, TEACHER_WEIGHT), "gives logits itself"),
    "bias": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT, student_bias=torch.ones(3)), r"student_bias must have shape \(301,\)"),
    "chunk": (lambda: fk.linear_f_divergence(HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT, chunk_bytes=0), "chunk_bytes must be at least 1"),
    "labels": (lambda: fk.linear_cross_entropy(HIDDEN, WEIGHT, torch.full((N,), V)), r"target must be in \[0, 301\)"),
    "vocab_size": (lambda: fk.linear_cross_entropy(HIDDEN, WEIGHT, torch.zeros(N).long(), vocab_size=999), r"vocab_size must be in \[1, 301\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_a_clear_error(name):
    call, message = MISUSES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_vocab_size_compares_the_shared_part():
    hidden, weight, teacher, teacher_weight = problem()
    padded = torch.cat([teacher_weight, torch.randn(5, D_T)])
    got = fk.linear_f_divergence(hidden, weight, teacher, padded, vocab_size=V)
    torch.testing.assert_close(got, fk.linear_f_divergence(hidden, weight, teacher, teacher_weight))
