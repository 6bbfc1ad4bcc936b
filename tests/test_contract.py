"""Never wrong, never silent: memory, values and copies at the borders of what may be given."""

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import math
import pickle
import re
import types
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, RowCall, Targets, Teacher, TokenTerms, Wants
from fdistill_kernels.carried import flat, names_of
from fdistill_kernels.checks import INTEGERS
from fdistill_kernels.integrations.transformers import causal_loss
from fdistill_kernels.reference import f_divergence_rows
from fdistill_kernels.verify import verify

from .conftest import reference, relative
from .fuzz.layouts import Draw
from .fuzz.operators import operator_call

N, V, D = 6, 301, 24


def models(n=N, v=V, dtype=torch.float32):
    return torch.randn(n, v).to(dtype).requires_grad_(), torch.randn(n, v).to(dtype)


def heads(n=N, v=V, dtype=torch.float32):
    student, weight, teacher, teacher_weight = (torch.randn(size, D).to(dtype) for size in (n, v, n, v))
    return student.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight


VIEWS = {
    "every second": lambda x: torch.stack((x, x.roll(1)), 1)[:, 0],
    "reversed by index": lambda x: x.flip(0).flip(0).view(2, -1).t().contiguous().t().reshape(-1),
    "expanded": lambda x: x[:1].expand(len(x)),
    "offset": lambda x: torch.cat((x, x))[1 : len(x) + 1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_every_argument(view, backend):
    """Labels, weights and temperatures of any strides are their dense copies."""
    student, teacher = models()
    strided = VIEWS[view]
    arguments = dict(labels=strided(torch.randint(V, (N,))), token_weight=strided(torch.rand(N)),
                     temperature=strided(1 + torch.rand(N)), teacher_temperature=strided(1 + torch.rand(N)))  # fmt: skip
    loss = fk.f_divergence(student, teacher, ce_weight=0.5, backend=backend, **arguments)
    dense = {k: v.clone() for k, v in arguments.items()}
    want = fk.f_divergence(student, teacher, ce_weight=0.5, backend=backend, **dense)
    assert loss == want and torch.equal(*(torch.autograd.grad(x, student)[0] for x in (loss, want)))
    weight = torch.rand(V, 2)[:, 0]
    target = arguments["labels"]
    ours, theirs = fk.cross_entropy(student, target, weight, backend=backend), F.cross_entropy(student, target, weight)
    torch.testing.assert_close(ours, theirs)
    hidden, head, *_ = heads()
    ours = fk.linear_cross_entropy(hidden, head, target, weight=weight, linear_bias=weight, backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ head.T + weight, target, weight))


OPERATORS = torch.ops.fdistill_kernels
KEY = fk.TABLE["js"].key


def row_arguments(**changes):
    ones = torch.ones(N)
    terms = TokenTerms(*[ones] * 6, torch.zeros(N).long(), torch.ones(V), KEY, 0.1)
    call = RowCall(torch.randn(1, N, V), torch.randn(1, N, V), terms, student_gradient=True, teacher_gradient=True)
    backend = changes.pop("backend", "cpu")
    of_terms = {name: changes.pop(name) for name in TokenTerms._fields if name in changes}
    return (*flat(call._replace(terms=terms._replace(**of_terms), **changes)), backend)


BAD_ROWS = {
    "short row_scale": dict(row_scale=torch.ones(1)),
    "short labels": dict(labels=torch.zeros(2).long()),
    "labels beyond": dict(labels=torch.full((N,), V)),
    "negative labels": dict(labels=torch.full((N,), -1)),
    "short class_weight": dict(class_weight=torch.ones(3)),
    "short ce": dict(cross_entropy_scale=torch.ones(2)),
    "teacher's shape": dict(teacher=torch.randn(1, N, V - 1)),
    "teacher's dtype": dict(teacher=torch.randn(1, N, V).half()),
    "no teacher": dict(teacher=None),
    "strides": dict(student=torch.randn(1, V, N).mT),
    "two dimensions": dict(student=torch.randn(N, V), teacher=torch.randn(N, V)),
    "unknown kernel": dict(divergence="Nosuch 0.0 1.0"),
    "student's layout": dict(student=torch.randn(1, N, V).to_sparse()),
    "teacher's layout": dict(teacher=torch.randn(1, N, V).to_sparse()),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_operators_called_by_hand_read_nothing_foreign(name, backend):
    with pytest.raises(ValueError):
        OPERATORS.divergence_rows(*row_arguments(**BAD_ROWS[name], backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_a_vector_given_twice_is_looked_at_for_each_of_its_uses(backend):
    once = row_arguments(labels=torch.ones(N).long(), backend=backend)
    names, ones = [*names_of(RowCall), "backend"], once[names_of(RowCall).index("terms_row_scale")]
    twice = [ones if name == "terms_labels" else x for name, x in zip(names, once, strict=True)]
    for a, b in zip(OPERATORS.divergence_rows(*once), OPERATORS.divergence_rows(*twice), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="class_weight must be dense"):
        OPERATORS.divergence_rows(*[ones if n == "terms_class_weight" else x for n, x in zip(names, once, strict=True)])


@pytest.mark.parametrize("log_probs", [torch.zeros(N, 3), torch.zeros(2, 2), None])
def test_a_list_of_another_shape_is_named(log_probs):
    targets = Targets(torch.tensor([[0, 1]] * N), log_probs)
    call = row_arguments(teacher=None, teacher_gradient=False, class_weight=None, targets=targets)
    with pytest.raises(ValueError, match=rf"log_probs must be dense, of shape \({N}, 2\) on cpu, not"):
        OPERATORS.divergence_rows(*call)


def test_operators_by_hand_take_what_they_can():
    got = OPERATORS.divergence_rows(
        *row_arguments(labels=torch.zeros(2 * N).long()[::2], row_scale=torch.ones(N).double())
    )
    assert all(x.isfinite().all() for x in got)


def test_the_fuzzer_calls_operators_as_they_are():
    """By their names, which change with what a call holds."""
    called = {operator_call(Draw(0, index)) for index in range(60)}
    assert {"divergence_rows", "divergence_rows_", "linear_rows"} <= called


def test_operators_by_hand_have_no_derivative_and_tell_of_what_they_write():
    student = torch.randn(1, N, V, requires_grad=True)
    parts, *_ = OPERATORS.divergence_rows(*row_arguments(student=student))
    with pytest.raises(RuntimeError, match="no derivative"):
        parts.sum().backward()
    logits = torch.randn(1, N, V)
    before = logits._version
    OPERATORS.divergence_rows_(*row_arguments(student=logits, teacher_gradient=False, inplace=True))
    assert logits._version > before


BAD_ITEMS = {
    "vector": torch.tensor([1.0, 2, 3]), "empty": torch.tensor([]), "negative": torch.tensor(-4), "NaN": torch.tensor(math.nan),
    "complex": torch.tensor(4 + 1j), "bool": torch.tensor(True), "string": "4", "list": [4], "number": -1.0, "infinite": math.inf,
    "zero": 0, "zero tensor": torch.tensor(0), "grad": torch.tensor(4.0, requires_grad=True), "meta": torch.tensor(4, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_num_items_is_one_positive_number(name):
    student, teacher = models()
    with pytest.raises((ValueError, TypeError), match="num_items"):
        fk.f_divergence(student, teacher, num_items=BAD_ITEMS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_num_items_of_any_shape_and_type(dtype):
    student, teacher = models(dtype=dtype)
    want = fk.f_divergence(student, teacher, num_items=4)
    for items in (torch.tensor([4]), torch.tensor([[4.0]]).double(), torch.tensor(4, dtype=torch.int16)):
        got = fk.f_divergence(student, teacher, num_items=items)
        assert got == want and got.shape == () and got.dtype == torch.float32
    masked = torch.full((N,), -100)
    for items in (0, torch.tensor(0)):
        loss = fk.f_divergence(student, teacher, labels=masked, num_items=items)
        assert loss == 0 and (torch.autograd.grad(loss, student)[0] == 0).all()


def test_inplace_refuses_shared_memory():
    base = torch.randn(1, V, requires_grad=True)
    with pytest.raises(ValueError, match="rows share memory"):
        fk.cross_entropy((base * 1).expand(N, V), torch.zeros(N).long(), inplace=True)
    buffer = torch.randn(N * V + 40)
    windows = buffer.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match="rows share memory"):
        fk.f_divergence(windows.as_strided((N, V), (V - 1, 1)), torch.randn(N, V), inplace=True)
    logits = torch.randn(N, V, requires_grad=True) * 1
    foreign = torch.from_numpy(logits.detach().numpy())  # another storage of the same memory
    with pytest.raises(ValueError, match="overwrite teacher_logits"):
        fk.f_divergence(logits, foreign, inplace=True)
    with pytest.raises(ValueError, match="overwrite token_weight"):
        fk.f_divergence(logits, torch.randn(N, V), token_weight=foreign[:, 0], inplace=True)
    rows = row_arguments(student=foreign[None], teacher=foreign[None], inplace=True)
    with pytest.raises(ValueError, match="shares memory"):
        OPERATORS.divergence_rows_(*rows)
    pair = torch.randn(2, N, V, requires_grad=True) * 1  # neighbours in one storage share nothing
    fk.f_divergence(pair[0], pair[1].detach(), inplace=True)
    nothing = (base * 1).expand(N, V)[None, :0].expand(2, 0, V)  # and no rows nothing either
    assert fk.f_divergence(nothing, nothing.detach(), inplace=True) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_where_none_is_wanted(mode, monkeypatch):
    student, teacher = models(v=2500)
    hidden, weight, *other = heads(v=2500)
    asked = []
    from fdistill_kernels.backends import cpu

    run = cpu.divergence_rows

    def spy(call):
        asked.append((call.student_gradient, call.teacher_gradient, call.inplace))
        return run(call)

    monkeypatch.setattr(cpu, "divergence_rows", spy)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = student.detach().clone()
    with mode():
        losses = [fk.f_divergence(student, teacher, backend="cpu"),
                  fk.f_divergence(student, teacher, inplace=True, backend="cpu"),
                  fk.cross_entropy(student, torch.zeros(N).long(), inplace=True, backend="cpu"),
                  fk.linear_f_divergence(hidden, weight, *other, backend="cpu"),
                  fk.linear_cross_entropy(hidden, weight, torch.zeros(N).long(), backend="cpu")]  # fmt: skip
    torch.set_num_threads(threads)
    assert asked == [(False, False, False)] * 5 and torch.equal(student, before)
    assert all(x.isfinite() and not x.requires_grad for x in losses)


def square(t):
    return (t - 1) ** 2


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = fk.FDivergenceLoss(square)

    def forward(self, student, teacher):
        return self.loss(student, teacher)


def test_own_divergences_live_as_long_as_what_holds_them():
    student, teacher = models()
    want = fk.f_divergence(student, teacher, "pearson")
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded):
        module = fk.FDivergenceLoss(square)
        other = make(module)
        del module
        gc.collect()
        torch.testing.assert_close(other(student, teacher), want)
    assert pickle.loads(pickle.dumps(fk.FDivergence(square))) == fk.FDivergence(square)
    hidden, weight, *rest = heads()
    for reduction in ("mean", "none"):
        loss = fk.linear_f_divergence(hidden, weight, *rest, lambda t: (t - 1) ** 2, reduction=reduction).sum()
        gc.collect()
        expected = fk.linear_f_divergence(hidden, weight, *rest, "pearson", reduction=reduction).sum()
        torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (loss, expected)), rtol=1e-2, atol=1e-3)


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_own_divergence_in_a_saved_export():
    student, teacher = (x.detach() for x in models())
    want = fk.f_divergence(student, teacher, "pearson")
    module = Loss()
    program, buffer = torch.export.export(module, (student, teacher)), io.BytesIO()
    torch.export.save(program, buffer)
    del module, program
    gc.collect()
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(student, teacher), want)


def test_parts_in_a_saved_export():
    student, teacher = (x.detach() for x in models())
    log_probs, ids = teacher.log_softmax(-1).topk(3)

    class Parts(torch.nn.Module):
        def forward(self, s, t, ids, log_probs):
            of_list = fk.f_divergence(s, fk.TopK(ids, log_probs), return_parts=True)
            return of_list, *(fk.f_divergence(s, t, return_parts=which) for which in (True, "metrics"))

    given, buffer = (student, teacher, ids, log_probs), io.BytesIO()
    torch.export.save(torch.export.export(Parts(), given), buffer)
    buffer.seek(0)
    found, want = torch.export.load(buffer).module()(*given), Parts()(*given)
    torch.testing.assert_close(found, want)
    assert [type(parts) for _, parts in found] == [type(parts) for _, parts in want]


@pytest.mark.parametrize("f", [square, lambda t: square(t) * torch.ones(1, dtype=torch.float64)], ids=["", "wide"])
def test_own_divergence_compiled(f):
    student, teacher = models()
    own = fk.FDivergence(f)
    labels = torch.randint(V, (N,))
    labels[0] = -100

    def step(s, t):
        return fk.f_divergence(s, t, own, labels=labels, ce_weight=0.3, temperature=2.0)

    want, got = step(student, teacher), torch.compile(step, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)), rtol=1e-4, atol=1e-7)


OWN = fk.FDivergence(square)


@pytest.mark.parametrize("wrong", [V, 10**9, -7])
@pytest.mark.parametrize("divergence", ["js", OWN], ids=str)
@pytest.mark.parametrize("teacher", ["logits", "list", "hidden"])
def test_labels_of_a_compiled_call_are_looked_at(teacher, divergence, wrong):
    """Whatever of it the graph holds."""
    student, logits, hidden, weight, labels, _ = given()
    labels = labels.clone()
    labels[2] = wrong
    student, logits = student.detach(), logits.detach()
    listed = logits.log_softmax(-1).topk(3)

    def loss(x):
        if teacher == "hidden":
            return fk.linear_f_divergence(hidden.detach(), weight.detach(), x, divergence=divergence, labels=labels,
                                          ce_weight=1.0)  # fmt: skip
        other = logits if teacher == "logits" else fk.TopK(listed.indices, listed.values)
        return fk.f_divergence(x, other, divergence, labels=labels, ce_weight=1.0)

    with pytest.raises(ValueError, match=f"labels, target or ids must be in .* but hold {wrong}"):
        torch.compile(loss, backend="aot_eager")(student)


@pytest.mark.parametrize("name, right, wrong", [
    ("labels", torch.tensor([0, -100, 2]), torch.tensor([0, V, 2])), ("num_items", torch.tensor(5.0), torch.tensor(-1.0)),
    ("num_items", torch.tensor([3]), torch.tensor([0])), ("num_items", torch.tensor(5.0), torch.tensor(torch.inf)),
    ("num_items", 2.5, 0), ("ignore_index", -1, 1.5),
    ("temperature", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])),
])  # fmt: skip
@pytest.mark.parametrize("linear", [False, True])
def test_what_a_graph_alone_knows_is_looked_at_there(name, right, wrong, linear):
    """Labels that are a mask, and denominators."""
    student, teacher = torch.randn(3, V, requires_grad=True), torch.randn(3, V)

    def loss(x, value):
        if linear:
            return fk.linear_f_divergence(x, torch.eye(V), teacher, **{name: value})
        return fk.f_divergence(x, teacher, **{name: value})

    torch.compiler.reset()  # one function's code has a graph for each case
    dynamic = "temperature" in name or None  # which makes a symbol of a float anywhere
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(student, right), loss(student, right))
    with pytest.raises((RuntimeError, TypeError), match=name):
        compiled(student, wrong)


def test_changed_table_entries_are_what_they_say(backend, monkeypatch):
    student, teacher = models()
    exact = student.detach().double(), teacher.double()

    def loss(divergence, **more):
        return fk.f_divergence(student.detach(), teacher, divergence, backend=more.get("backend", backend))

    torch.testing.assert_close(loss(dataclasses.replace(fk.GJS(0.3), scale=3.0)), 3 * loss(fk.GJS(0.3)))
    torch.testing.assert_close(loss(dataclasses.replace(fk.TABLE["js"], parameter=0.1)), loss(fk.GJS(0.1)))
    own = fk.Divergence("mine", fk.TABLE["kl"].terms)
    want = f_divergence_rows(*exact, "kl").mean().float()
    monkeypatch.setitem(fk.TABLE, "added", lambda t: t * t.log())
    torch.testing.assert_close(loss("added", backend="torch"), want)
    assert all(o.ok for o in verify("cpu", [torch.float32], (2, V), ["added", "kl"]))
    torch.testing.assert_close(loss(own, backend="torch"), want)
    swapped = dataclasses.replace(fk.TABLE["js"], terms=fk.TABLE["kl"].terms)
    torch.testing.assert_close(loss(swapped, backend="torch"), want)


def ulps(got, want):
    """The largest error in units of the last place, beyond what float32 arithmetic leaves of a row's largest entry."""
    info = torch.finfo(got.dtype)
    spacing = (info.eps * 2.0 ** want.abs().log2().floor()).clamp_min(info.smallest_normal * info.eps)
    arithmetic = 1e-6 * want.abs().amax(-1, keepdim=True)
    return (((got.double() - want).abs() - arithmetic) / spacing).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [3.0, 0.7, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_narrow_gradients_are_rounded_once(dtype, factor, reduction):
    student, teacher = models(dtype=dtype)
    teacher.requires_grad_()
    if dtype == torch.float16 and factor > 1000 and reduction != "mean":
        factor = 16.0
    loss = factor * fk.f_divergence(student, teacher, "kl", reduction=reduction, backend="cpu")
    got = torch.autograd.grad(loss.sum(), (student, teacher))
    weights = torch.full((N,), factor / (N if reduction == "mean" else 1))
    for g, want in zip(got, reference(student, teacher, "kl", weights)[1:], strict=True):
        assert ulps(g, want) < 0.501


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_float16_gradients_of_light_tokens_survive(reduction, backend):
    """A weight a token, a sum, a large denominator: whatever makes gradients small before the scaler's factor."""
    student, teacher = models(v=1000, dtype=torch.float16)
    weight = torch.logspace(0, -4, N)
    loss = fk.f_divergence(student, teacher, "js", token_weight=weight, reduction=reduction, backend=backend)
    (got,) = torch.autograd.grad(2.0**16 * loss.sum(), student)
    scale = 2.0**16 * weight / (N if reduction == "mean" else 1)
    want = reference(student, teacher, "js", scale)[1]
    assert ulps(got, want) < 1.001  # the interpreter truncates
    hidden, head, *rest = heads(dtype=torch.float16)
    loss = fk.linear_f_divergence(hidden, head, *rest, "js", token_weight=weight, reduction=reduction, backend=backend)
    of_hidden, of_head = torch.autograd.grad(2.0**13 * loss.sum(), (hidden, head))
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    rows = f_divergence_rows(h @ w.T, rest[0].double() @ rest[1].double().T, "js")
    wants = torch.autograd.grad((rows * scale / 2**3).sum(), (h, w))
    for row in range(N):  # each row to its own size
        assert relative(of_hidden[row], wants[0][row]) < 2e-2
    assert relative(of_head, wants[1]) < 2e-2


@pytest.mark.parametrize("way", ["linear", "minimal", "in place"])
def test_float16_gradients_of_heavy_tokens_survive(way):
    """A weight of the divergence before the mean: what is divided at the end need not fit into float16 before."""
    hidden, weight = torch.randn(300, D).half().requires_grad_(), (torch.randn(V, D) / 8).half().requires_grad_()
    teacher, head = torch.randn(300, D).half(), torch.randn(V, D).half()
    keywords = dict(divergence="kl", divergence_weight=1.5e5)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(
        fk.f_divergence(exact[0] @ exact[1].T, teacher.double() @ head.double().T, **keywords), exact
    )
    if way == "in place":
        student = hidden @ weight.T
        loss = fk.f_divergence(student, teacher @ head.T, inplace=True, **keywords)
    else:
        memory, backend = ("chunks", "cpu") if way == "linear" else ("minimal", "triton")
        loss = fk.linear_f_divergence(hidden, weight, teacher, head, memory=memory, backend=backend, **keywords)
    assert all(relative(g, w) < 3e-2 for g, w in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True))


def test_what_a_teacher_s_function_returns_is_checked():
    student, weight, *_ = heads()
    logits = torch.randn(N, V)
    for wrong, words in ((logits.to(torch.complex64), "must be floating point"), (logits > 0, "must be floating point"),
                         (logits.to_sparse(), "dense tensor, not a sparse_coo one"), (logits.to("meta"), "meta device")):  # fmt: skip
        with pytest.raises(TypeError, match=f"what teacher_hidden, a function, returns .*{words}"):
            fk.linear_f_divergence(student, weight, lambda begin, end, x=wrong: x)


@pytest.mark.parametrize("cap", [1e-46, 1e-300, 4e38, 1e300])
def test_soft_caps_beyond_float32_are_refused(cap):
    student, teacher = models()
    hidden, weight, *_ = heads()
    labels = torch.arange(N)
    for call in (
        lambda: fk.cross_entropy(student, labels, logit_softcap=cap), lambda: fk.log_sum_exp(student, logit_softcap=cap),
        lambda: fk.f_divergence(student, fk.Logits(teacher, cap)), lambda: fk.log_probs(hidden, weight, labels, logit_softcap=cap),
        lambda: fk.linear_cross_entropy(hidden, fk.Head(weight, softcap=cap), labels),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"softcap must be in \[1e-18, 1e\+18\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_soft_caps_are_not_rounded(dtype, backend):
    logits = (20 * torch.randn(N, V)).to(dtype).requires_grad_()
    target = torch.randint(V, (N,))
    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(5 * (exact / 5).tanh(), target)
    got = fk.cross_entropy(logits, target, logit_softcap=5.0, backend=backend)
    assert relative(got, want) < 1e-6
    truncating = 2 if backend == "triton" else 1  # the interpreter's bfloat16
    assert (
        relative(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, exact)[0])
        < truncating * torch.finfo(dtype).eps
    )
    both = fk.f_divergence(
        logits, logits.detach().flip(0), "kl", logit_softcap=5.0, teacher_logit_softcap=3.0, backend=backend
    )
    other = exact.detach().flip(0)
    assert relative(both, f_divergence_rows(5 * (exact / 5).tanh(), 3 * (other / 3).tanh(), "kl").mean()) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e5, 1e7])
def test_label_smoothing_keeps_its_digits_under_an_offset(offset, backend):
    logits, target = torch.randn(2, 5000) + offset, torch.zeros(2).long()
    want = F.cross_entropy(logits.double(), target, label_smoothing=0.5)
    assert relative(fk.cross_entropy(logits, target, label_smoothing=0.5, backend=backend), want) < 2e-6
    huge = torch.full((2, 5000), 1e36)
    assert (
        relative(fk.cross_entropy(huge, target, label_smoothing=0.5, backend=backend), torch.tensor(5000.0).log())
        < 1e-5
    )


def test_class_weights(backend):
    logits, target = torch.randn(N, V, requires_grad=True), torch.randint(1, V, (N,))
    weight = torch.rand(V)
    got = fk.cross_entropy(logits, target, weight, z_loss=0.1, backend=backend)
    want = F.cross_entropy(logits, target, weight) + 0.1 * (logits.logsumexp(1) ** 2).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))
    for odd in (math.inf, math.nan):
        weight[0] = odd  # of a class that no target has
        torch.testing.assert_close(
            fk.cross_entropy(logits, target, weight, backend=backend), F.cross_entropy(logits, target, weight)
        )
        (gradient,) = torch.autograd.grad(fk.cross_entropy(logits, target, weight, backend=backend), logits)
        assert gradient.isfinite().all()
    loss = fk.cross_entropy(logits, target, torch.zeros(V), backend=backend)
    assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_label_smoothing_beside_masks(backend):
    """Of finfo.min, at whose sum float32 ends: as large as that, but a number."""
    logits = torch.randn(2, 300)
    logits[:, ::2] = torch.finfo(torch.float32).min
    for label in (0, 1):
        losses = fk.cross_entropy(logits, torch.tensor([label, label]), label_smoothing=0.1, backend=backend)
        assert losses > 1e37


@pytest.mark.parametrize("caps", [(None, None), (None, 3.0), (5.0, 3.0)], ids=str)
@pytest.mark.parametrize("name", ["kl", "rkl", "csd"])  # whose gradient waits for no sum, or for one, or for statistics
def test_a_divergence_that_weighs_nothing_is_nothing(name, caps, backend):
    """Whatever either model's logits are, and beside labels, whatever the teacher's are."""
    student, teacher = torch.randn(5, V), torch.randn(5, V)
    weight = torch.tensor([1.0, 0, 0, 0, 0])
    teacher[1, 3], teacher[2], student[3, 3], student[4] = math.nan, -math.inf, math.nan, -math.inf
    labels = torch.tensor([0, 1, 2, -100, -100])
    caps = dict(zip(("logit_softcap", "teacher_logit_softcap"), caps, strict=True))
    for labels_terms in ({}, dict(labels=labels, ce_weight=0.5)):
        for trained in (False, backend != "cuda"):  # which has Triton's kernels for it
            leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_(trained)
            loss, parts = fk.f_divergence(*leaves, name, divergence_weight=weight, temperature=0.5, reduction="none",
                                          return_parts=True, backend=backend, **labels_terms, **caps)  # fmt: skip
            assert (parts.divergence[1:] == 0).all() and loss.isfinite().all() and loss[0] > 0
            for gradient in torch.autograd.grad(loss.sum(), leaves[: 1 + trained]):
                assert gradient.isfinite().all() and (gradient[3:] == 0).all() and (gradient[0] != 0).any()
                assert labels_terms or (gradient[1:] == 0).all()


@pytest.mark.parametrize("memory", ["chunks", "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hidden_states_of_a_divergence_that_weighs_nothing(dtype, memory, backend):
    """0 times their NaN would be NaN in all of the weight's gradient."""
    hidden, weight, teacher, teacher_weight = heads(dtype=dtype)
    with torch.no_grad():
        hidden[1], teacher[2] = math.nan, math.nan
    for masked in (False, True):
        counts = (torch.arange(len(hidden)) != 3).float() if masked else None
        loss = fk.linear_f_divergence(
            hidden, weight, teacher, teacher_weight, "js", token_weight=counts, memory=memory, logit_softcap=5.0,
            divergence_weight=(torch.arange(len(hidden)) > 2).float(), backend=backend,
        )  # fmt: skip
        of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
        assert loss > 0 and of_weight.isfinite().all() and (of_weight != 0).any()
        assert of_hidden.isfinite().all() and (of_hidden[:3] == 0).all()


@pytest.mark.grid
@pytest.mark.parametrize("form", ["logits", "function", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by", ["label", "weight"])
def test_masked_rows_are_not_looked_at(form, reduction, by, backend):
    hidden, weight, teacher, teacher_weight = heads()
    logits = teacher @ teacher_weight.T
    with torch.no_grad():
        for x in (hidden, teacher, logits):
            x[2] = math.nan
    mask = torch.ones(N)
    mask[2] = 0
    masked = dict(token_weight=mask) if by == "weight" else dict(labels=torch.where(mask == 0, -100, 1))
    given = {
        "logits": (logits, None),
        "function": (lambda a, b: logits[a:b], None),
        "hidden": (teacher, teacher_weight),
    }[form]
    loss = fk.linear_f_divergence(hidden, weight, *given, reduction=reduction, backend=backend, **masked)
    gradients = torch.autograd.grad(
        loss, (hidden, weight), torch.where(mask == 0, math.nan, 1.0) if reduction == "none" else None
    )
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients) and (gradients[0][2] == 0).all()
    student = (hidden @ weight.T).detach().requires_grad_()
    both = logits.clone().requires_grad_()
    loss = fk.f_divergence(
        student, both, reduction=reduction, backend=backend, temperature=torch.where(mask == 0, -1.0, 2.0), **masked
    )
    gradients = torch.autograd.grad(
        loss, (student, both), torch.where(mask == 0, math.nan, 1.0) if reduction == "none" else None
    )
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_parameters_near_their_limits(backend):
    student, teacher = models()

    def loss(divergence, a=None, b=teacher):
        return fk.f_divergence(student.detach() if a is None else a, b, divergence, backend=backend)

    for near, limit in ((fk.Alpha(1e-40), "rkl"), (fk.Alpha(1 - 1e-9), "kl"), (fk.Alpha(1e-6), "rkl"), (fk.Alpha(1 - 2e-7), "kl"),
                        (fk.Alpha(-1e-9), "rkl"), (fk.SkewKL(1e-40), "kl"), (fk.SkewRKL(1e-12), "rkl")):  # fmt: skip
        torch.testing.assert_close(loss(near), loss(limit), rtol=1e-4, atol=0)
    for bad in (lambda: fk.GJS(1e-9), lambda: fk.GJS(1 - 1e-9), lambda: fk.SkewKL(1 - 1e-9), lambda: fk.Alpha(math.nan),
                lambda: dataclasses.replace(fk.Alpha(0.5), parameter=1.0)):  # fmt: skip
        with pytest.raises(ValueError):
            bad()
    for mask in (torch.finfo(torch.float32).min, -math.inf, -1e30):
        a, b = student.detach().clone(), teacher.clone()
        a[:, :7] = b[:, :7] = mask
        for alpha in (-8.0, -2.0, -1.5, 0.5, 3.0, 8.0):
            got = loss(fk.Alpha(alpha), a, b)
            want = loss(fk.Alpha(alpha), a[:, 7:], b[:, 7:])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    for bad in (math.inf, 1e-39, 0.0, math.nan, torch.full((N,), math.inf), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="temperature must be"):
            fk.f_divergence(student, teacher, temperature=bad, backend=backend)


def test_empty_batches(backend):
    for shape in ((0, V), (3, 0, V)):
        student, teacher = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
        hidden, weight = torch.zeros(*shape[:-1], D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        target = torch.zeros(shape[:-1]).long()
        for reduction in ("mean", "sum", "none", "batchmean"):
            options = dict(reduction=reduction, backend=backend)
            losses = (
                (fk.f_divergence(student, teacher, labels=target, ce_weight=1.0, **options), (student, teacher)),
                (fk.linear_f_divergence(hidden, weight, hidden.detach(), weight.detach(), **options), (hidden, weight)),
                (fk.linear_cross_entropy(hidden, weight, target, **options), (hidden, weight)),
            )
            for loss, inputs in losses:
                assert loss.shape == (shape[:-1] if reduction == "none" else ()) and loss.sum() == 0
                gradients = torch.autograd.grad(loss.sum(), inputs)
                assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))
    assert fk.cross_entropy(torch.zeros(0, V), torch.zeros(0).long(), torch.ones(V), backend=backend) == 0


GRADED = {
    "temperature": lambda x: fk.f_divergence(*models(), temperature=x),
    "teacher_temperature": lambda x: fk.f_divergence(*models(), teacher_temperature=x),
    "token_weight": lambda x: fk.f_divergence(*models(), token_weight=x.expand(N)),
    "weight": lambda x: fk.cross_entropy(models()[0], torch.zeros(N).long(), x.expand(V)),
    "ce_weight": lambda x: fk.f_divergence(*models(), labels=torch.zeros(N).long(), ce_weight=x),
    "z_loss": lambda x: fk.cross_entropy(models()[0], torch.zeros(N).long(), z_loss=x),
    "logit_scale": lambda x: fk.linear_f_divergence(*heads(), logit_scale=x),
    "logit_softcap": lambda x: fk.linear_f_divergence(*heads(), logit_softcap=x),
    "num_items": lambda x: fk.f_divergence(*models(), num_items=x),
    "target": lambda x: fk.cross_entropy(models()[0], x.expand(N, V)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADED)
def test_a_gradient_that_is_not_made_is_refused(name):
    with pytest.raises((ValueError, TypeError), match=name):
        GRADED[name](torch.ones((), requires_grad=True))


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_models_of_different_dtypes(dtypes, backend):
    student, teacher = (
        torch.randn(N, V).to(dtypes[0]).requires_grad_(),
        torch.randn(N, V).to(dtypes[1]).requires_grad_(),
    )
    if torch.float64 in dtypes and backend != "torch":
        backend = "auto"
    loss = fk.f_divergence(student, teacher, "js", backend=backend)
    want, *expected = reference(student, teacher, "js", torch.full((N,), 1 / N))
    assert relative(loss, want) < 1e-6
    for x, got, e in zip((student, teacher), torch.autograd.grad(loss, (student, teacher)), expected, strict=True):
        assert got.dtype == x.dtype and relative(got, e) < max(2e-5, torch.finfo(x.dtype).eps)


def test_second_backward_and_changes_in_place(backend):
    student, teacher = models()
    hidden, weight, *rest = heads()
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])
    for make, inputs in ((lambda r: fk.f_divergence(student, teacher, reduction=r, backend=backend), (student,)),
                         (lambda r: fk.linear_f_divergence(hidden, weight, *rest, reduction=r, backend=backend), (hidden, weight)),
                         (lambda r: fk.cross_entropy(student, torch.zeros(N).long(), reduction=r, backend=backend), (student,))):  # fmt: skip
        for reduction in ("mean", "none"):
            loss = (3 * make(reduction)).sum()
            first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
            for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
                assert torch.equal(a, b)
        loss = make("none")
        loss *= mask
        want = (make("none") * mask).sum()
        for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (loss.sum(), want)), strict=True):
            torch.testing.assert_close(a, b)
    value = fk.log_sum_exp(student, backend=backend)
    value *= mask
    (first,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(value.sum(), student)[0])
    torch.testing.assert_close(first, (student.detach().softmax(1) * mask.unsqueeze(1)))


def test_batchmean_and_one_vector(backend):
    student, teacher = (x[0].detach() for x in models())
    row = fk.f_divergence(student[None], teacher[None], "kl", backend=backend)
    for reduction in ("mean", "sum", "batchmean", "none"):
        loss = fk.f_divergence(student, teacher, "kl", reduction=reduction, backend=backend)
        assert loss.shape == () and relative(loss, row) < 1e-6


@pytest.mark.grid
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.0), (False, 0.2), (True, 0.2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_probabilities(weighted, smoothing, reduction, backend):
    for shape in ((13,), (N, 13), (2, 13, 5)):
        logits = torch.randn(shape, requires_grad=True)
        target = torch.rand(shape)
        target = target / target.sum(1 if len(shape) > 1 else 0, keepdim=True) * 1.1  # torch asks for no sum of 1
        keywords = dict(weight=torch.rand(13) if weighted else None, label_smoothing=smoothing, reduction=reduction)
        ours, theirs = (
            fk.cross_entropy(logits, target, backend=backend, **keywords),
            F.cross_entropy(logits, target, **keywords),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)), rtol=1e-4, atol=1e-6
        )
    hidden, weight, *_ = heads(v=13)
    target = torch.rand(N, 13).softmax(1)
    ours = fk.linear_cross_entropy(hidden, weight, target, backend=backend, **keywords)
    theirs = F.cross_entropy(hidden @ weight.T, target, **keywords)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_token_weight_and_log_sum_exp(backend):
    logits, target, weight = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,)), torch.rand(N)
    want = (F.cross_entropy(logits, target, reduction="none") * weight).mean()
    torch.testing.assert_close(fk.cross_entropy(logits, target, token_weight=weight, backend=backend), want)
    hidden, head, *_ = heads()
    want = (F.cross_entropy(hidden @ head.T, target, reduction="none") * weight).mean()
    torch.testing.assert_close(
        fk.linear_cross_entropy(hidden, head, target, token_weight=weight, backend=backend), want
    )
    ours, theirs = fk.log_sum_exp(logits, backend=backend), logits.logsumexp(-1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad((x**2).sum(), logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_heads_of_more_dimensions(reduction):
    hidden, weight, bias = (
        torch.randn(N, D, requires_grad=True),
        torch.randn(13, 2, 3, D, requires_grad=True),
        torch.randn(13, 2, 3),
    )
    target, class_weight = torch.randint(13, (N, 2, 3)), torch.rand(13)
    target[0, 0, 0] = -100
    logits = torch.einsum("nd,vabd->nvab", hidden, weight) + bias
    for of_logits in (target, torch.rand(N, 13, 2, 3)):
        keywords = dict(weight=class_weight, label_smoothing=0.1, reduction=reduction)
        ours = fk.linear_cross_entropy(hidden, weight, of_logits, linear_bias=bias, **keywords)
        theirs = F.cross_entropy(logits, of_logits, **keywords)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            *(torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def graphs(function, values):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter)
    for value in values:
        compiled(value)
    return counter.frame_count


def test_floats_that_change_make_no_new_graphs():
    student, teacher = models()
    labels = torch.zeros(N).long()
    hidden, weight, *rest = heads()
    values = [0.1 * i + 0.1 for i in range(12)]
    for function in (lambda x: fk.f_divergence(student, teacher, labels=labels, ce_weight=x),
                     lambda x: fk.f_divergence(student, teacher, temperature=x, temperature_squared=True),
                     lambda x: fk.cross_entropy(student, labels, z_loss=x),
                     lambda x: fk.linear_f_divergence(hidden, weight, *rest, temperature=x, labels=labels, ce_weight=x)):  # fmt: skip
        assert graphs(function, values) <= 2
    assert graphs(lambda n: fk.cross_entropy(student, labels, num_items=n), range(3, 15)) <= 2


def test_what_compilers_trace_replaces_fields_as_they_can():
    """Those of torch 2.8 break a graph at ``_replace``, of which newer ones know nothing."""
    sources = [path for path in Path(fk.__file__).parent.glob("*.py") if path.name != "row_formulas.py"]  # operators'
    assert len(sources) > 20 and not [path.name for path in sources if "._replace(" in path.read_text()]


def test_dynamic_batches_in_export_and_compile():
    class Both(torch.nn.Module):
        def forward(self, x, t, y, w):
            logits = fk.f_divergence(x, t, "js", labels=y, ce_weight=1.0)
            return logits + fk.linear_cross_entropy(x, w, y)

    def arguments(n):
        return torch.randn(n, 40), torch.randn(n, 40), torch.zeros(n).long(), torch.randn(30, 40)

    batch = torch.export.Dim("batch")
    example = arguments(3)
    program = torch.export.export(Both(), example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, None)).module()
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5, 9):
        given = arguments(n)
        torch.testing.assert_close(program(*given), Both()(*given))
        torch.testing.assert_close(compiled(*given), Both()(*given))


@pytest.mark.parametrize("leading", [(), (3,)], ids=str)
def test_dynamic_batches_of_lists_in_export(leading):
    class Listed(torch.nn.Module):
        def forward(self, student, ids, log_probs):
            return fk.f_divergence(student, fk.TopK(ids, log_probs), "kl")

    def example(batch):
        found = torch.randn(batch, *leading, V).log_softmax(-1).topk(4)
        return torch.randn(batch, *leading, V), found.indices, found.values

    program = torch.export.export(Listed(), example(4), dynamic_shapes=({0: torch.export.Dim("batch")},) * 3).module()
    given = example(7)
    torch.testing.assert_close(program(*given), Listed()(*given))


def test_compiled_teacher_functions_break_the_graph_and_are_right():
    hidden, weight, teacher, teacher_weight = heads()
    logits = teacher @ teacher_weight.T

    def step(h, w):
        return fk.linear_f_divergence(h, w, lambda a, b: logits[a:b], None, "js")

    want, got = step(hidden, weight), torch.compile(step, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("of", ["logits", "hidden"])
def test_probabilities_of_a_compiled_call_are_looked_at(of):
    student, target, head = torch.randn(3, V), torch.randn(3, V).softmax(1), torch.eye(V)

    def loss(x, target, weight):
        if of == "hidden":
            return fk.linear_cross_entropy(x, head, target, weight=weight)
        return fk.cross_entropy(x, target, weight)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    weight = torch.rand(V)
    torch.testing.assert_close(compiled(student, target, weight), loss(student, target, weight))
    for words, wrong, factor in (("target holds neg", -target, weight), ("weight must not be neg", target, -weight)):
        with pytest.raises(RuntimeError, match=words):
            compiled(student, wrong, factor)


@pytest.mark.parametrize("name, wrong", [("temperature", [1.0]), ("ce_weight", 1j), ("ignore_index", {})])
def test_wrong_types_in_a_compiled_call_name_the_argument(name, wrong):
    """They were taken for symbols of an exported program: an imaginary weight made an imaginary loss."""
    student = torch.randn(3, V)
    with pytest.raises(TypeError, match=f"{name} must be"):
        torch.compile(lambda x: fk.f_divergence(x, -x, **{name: wrong}), backend="eager")(student)


ODD = {"None": None, "list": [1.0], "string": "x", "dict": {}, "complex": torch.ones(3) + 1j, "sparse": torch.eye(3).to_sparse(),
       "meta": torch.ones(3, device="meta"), "NaN": math.nan, "infinity": math.inf, "object": object(), "nested": torch.nested.nested_tensor([torch.ones(2)]),
       "numbers": torch.ones(7, 5, 3), "71 bits": 2**70, "no float": 10**400, "small": 1e-300, "great": 1e300, "yes": True,
       "lazy": torch.nn.UninitializedParameter(), "long": np.ones((40, 40)), "class": fk.FDivergence, "array": np.ones(4), "numpy's": np.float32(0.5), "fraction": Fraction(1, 3), "a tensor's": torch.tensor(3)}  # fmt: skip
S, T, Y = torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4).long()
H, W = torch.randn(4, 5), torch.randn(8, 5)
OF_LABELS, DEPRECATED = dict(labels=Y, ce_weight=0.5), ("size_average", "reduce")
CALLS = [
    (fk.f_divergence, dict(student_logits=S, teacher_logits=T, **OF_LABELS)),
    (fk.f_divergence, dict(student_logits=S, teacher_logits=fk.top_k_of(T, 2))),
    (fk.cross_entropy, dict(input=S, target=Y)), (fk.cross_entropy, dict(input=S, target=T.softmax(1))),
    (fk.linear_f_divergence, dict(student_hidden=H, student_weight=W, teacher_hidden=H, teacher_weight=W, **OF_LABELS)),
    (fk.linear_f_divergence, dict(student_hidden=H, student_weight=W, teacher_hidden=lambda begin, end: T[begin:end])),
    (fk.linear_cross_entropy, dict(input=H, linear_weight=W, target=Y)),
    (fk.linear_cross_entropy, dict(input=H, linear_weight=W, target=T.softmax(1))),
    (fk.log_probs, dict(hidden=H, head=W, ids=Y)), (fk.log_sum_exp, dict(logits=S)), (fk.top_k_of, dict(teacher=T, k=3)),
    (fk.top_k_of, dict(teacher=T, k=3, support="union", student=S)), (fk.sample_of, dict(teacher=T, draws=3)),
]  # fmt: skip


@pytest.mark.parametrize(
    "dtype, beyond", [(torch.bfloat16, 1e39), (torch.float32, -(10**300)), (torch.float64, 10**400)]
)
@pytest.mark.parametrize("name", ["ce_weight", "z_loss", "divergence_weight"])
def test_weights_beyond_the_arithmetic_are_refused(name, dtype, beyond):
    """They were infinite, and NaN beside a row that is masked out; what float64 holds is taken in float64."""
    student, labels = torch.randn(4, 8, dtype=dtype), torch.tensor([1, -100, 2, -100])
    with pytest.raises(ValueError, match=f"{name} must be in "):
        fk.f_divergence(student, T.to(dtype), "kl", labels=labels, **{name: beyond})
    within = 1e300 if dtype == torch.float64 else 1e35
    assert fk.f_divergence(student, T.to(dtype), "kl", labels=labels, **{name: within}).isfinite()
    if name == "divergence_weight":
        with pytest.raises(ValueError, match=r"divergence_weight·temperature², .* must be in "):
            fk.f_divergence(student, T.to(dtype), divergence_weight=within, temperature=1e9, temperature_squared=True)


@pytest.mark.parametrize("call", range(len(CALLS)))
@pytest.mark.parametrize("odd", ODD)
def test_wrong_types_name_the_argument(call, odd):
    """Every argument of every public function: it is taken, or the message begins with its name."""
    function, given = CALLS[call]
    for name in {*inspect.signature(function).parameters} - {*DEPRECATED}:
        try:
            function(**{**given, name: ODD[odd]})
        except (ValueError, TypeError) as error:
            two_sides = odd in ("numbers", "None")  # of a shape that does not fit
            names = inspect.signature(function).parameters if two_sides else [name]
            assert any(n in str(error) for n in names) or "vocabularies" in str(error), f"{name}={odd}: {error!r}"
            assert "\n" not in str(error) and len(str(error)) < 300, error
        except NotImplementedError as error:
            raise AssertionError(f"{name}={odd}: {error}") from error


@pytest.mark.parametrize("call", range(len(CALLS)))
def test_integers_of_numpy_are_integers(call):
    """As torch's own functions take them."""
    function, given = CALLS[call]
    for name, value in dict(ignore_index=0, vocab_size=8, chunk_bytes=4096, k=2, draws=3).items():
        if name not in inspect.signature(function).parameters or (name == "ignore_index" and "target" in given):
            continue  # class probabilities have no index to ignore
        for kind in (np.int64, np.uint8 if value < 256 else np.int32):
            results = []
            for number in (value, kind(value)):
                torch.manual_seed(0)
                made = function(**{**given, name: number})
                results.append(made[:2] if isinstance(made, fk.TopK) else made)
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_both_models_caps_have_their_slope(inplace, backend):
    """A cap of given logits, of the student, the teacher or both, in both gradients."""
    student, teacher = (3 * torch.randn(3, 307)).requires_grad_(), (3 * torch.randn(3, 307)).requires_grad_()
    for caps in ((2.0, 3.0), (None, 3.0), (2.0, None)):
        loss = fk.f_divergence(student * 1, teacher, "js", logit_softcap=caps[0], teacher_logit_softcap=caps[1],
                               inplace=inplace, backend=backend)  # fmt: skip
        got = torch.autograd.grad(loss, (student, teacher))
        exact = [x.detach().double().requires_grad_() for x in (student, teacher)]
        capped = [x if cap is None else cap * (x / cap).tanh() for x, cap in zip(exact, caps, strict=True)]
        want = torch.autograd.grad(f_divergence_rows(*capped, "js").mean(), exact)
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 2e-5, caps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_own_generators_without_autograd(mode):
    student, teacher = models()
    made = fk.FDivergence(square)
    want = fk.f_divergence(student, teacher, "pearson").item()
    with mode():
        for divergence in (made, square, fk.FDivergence(square), copy.deepcopy(made)):
            assert math.isclose(fk.f_divergence(student, teacher, divergence).item(), want, rel_tol=1e-5)
        hidden = heads()
        assert fk.linear_f_divergence(*hidden, made).isfinite()


def test_a_generator_s_parameter_that_is_unfrozen_later_is_refused():
    """It was looked at when the generator was given alone, and got no gradient."""
    student, logits, hidden, weight, *_ = given()
    factor = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    own = fk.FDivergence(lambda t: (factor * 1) * (t - 1) ** 2)
    assert fk.f_divergence(student, logits, own).isfinite()
    factor.requires_grad_()
    for loss in (
        lambda: fk.f_divergence(student, logits, own),
        lambda: fk.linear_f_divergence(hidden, weight, logits.detach(), divergence=own),
    ):
        with pytest.raises(ValueError, match="has a parameter that requires grad"):
            loss()


def test_an_own_generator_hands_a_nan_on():
    student, teacher = models()
    teacher[0, 3] = math.nan
    losses = fk.f_divergence(student, teacher, square, reduction="none")
    assert losses[0].isnan() and losses[1:].isfinite().all()
    assert torch.autograd.grad(losses.sum(), student)[0].isnan().any(1).tolist() == [True] + [False] * (N - 1)
    far = torch.zeros(1, 5)
    far[0, 1] = -60.0  # where t² is beyond float32
    assert fk.f_divergence(far, torch.zeros(1, 5), square) == torch.inf


@pytest.mark.parametrize("logits, weights", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_class_weights_keep_their_digits(logits, weights):
    x, y, w = torch.randn(N, 13, dtype=logits, requires_grad=True), torch.randint(13, (N,)), torch.rand(13).to(weights)
    for reduction in ("mean", "sum"):
        ours, theirs = (
            fk.cross_entropy(x, y, w, reduction=reduction),
            F.cross_entropy(x, y, w.to(logits), reduction=reduction),
        )
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float64_teacher_beside_narrower_hidden_states(dtype):
    hidden, weight, *_ = heads(dtype=dtype)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    teacher, target = torch.randn(N, V).double(), torch.rand(N, V).double()
    ours = (
        fk.linear_f_divergence(hidden, weight, teacher, divergence="js"),
        fk.linear_cross_entropy(hidden, weight, target),
    )
    want = f_divergence_rows(h @ w.T, teacher, "js").mean(), F.cross_entropy(h @ w.T, target)
    for a, b in zip(ours, want, strict=True):
        assert relative(a.detach(), b.detach()) < (1e-5 if dtype == torch.float32 else 2e-2)
        gradients = torch.autograd.grad(a, (hidden, weight)), torch.autograd.grad(b, (h, w))
        assert all(relative(x, y) < (2e-5 if dtype == torch.float32 else 3e-2) for x, y in zip(*gradients, strict=True))


def test_nothing_of_any_layout():
    """Batches without a token, whatever their strides; and small integers as targets of several heads."""
    empty = torch.zeros(2, 0, 17)[..., ::2].requires_grad_()
    assert fk.log_sum_exp(empty).shape == (2, 0)
    fk.f_divergence(empty, torch.zeros(2, 0, 9)).backward()
    assert empty.grad.shape == empty.shape
    assert fk.cross_entropy(torch.zeros(2, 5, 0), torch.zeros(2, 0).long()) == 0
    assert causal_loss(types.SimpleNamespace(logits=torch.zeros(2, 0, 9)), torch.zeros(2, 0).long()) == 0
    x, head, weight, target = torch.randn(6, 8), torch.randn(13, 2, 8), torch.rand(13), torch.randint(13, (6, 2))
    want = fk.linear_cross_entropy(x, head, target, weight=weight)
    outputs = types.SimpleNamespace(logits=torch.randn(6, 13))
    for kind in INTEGERS:
        assert fk.linear_cross_entropy(x, head, target.to(kind), weight=weight) == want
        assert causal_loss(outputs, target[:, 0].to(kind)) == causal_loss(outputs, target[:, 0])
    logits = torch.randn(2, 5)
    want = fk.f_divergence(logits, 2 * logits, temperature=2.0, divergence_weight=2.0)
    for kind in (torch.float8_e4m3fn, torch.int64):
        for two in (torch.tensor(2).to(kind), torch.full((2,), 2.0).to(kind)):
            assert fk.f_divergence(logits, 2 * logits, temperature=two, divergence_weight=two) == want


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["scattered", "flat", "normalised", "masked", "all masked"])
def test_the_gradient_of_log_sum_exp_is_the_softmax(kind, dtype, cap):
    x = torch.zeros(5, 3001) if kind == "flat" else torch.randn(5, 3001)
    x = x.log_softmax(-1) if kind == "normalised" else x
    x[0, :: 1 if kind == "all masked" else 2] = -torch.inf if kind.endswith("masked") else 0
    x, upstream = x.to(dtype).requires_grad_(), torch.randn(5)
    value = fk.log_sum_exp(x, logit_softcap=cap)
    (got,) = torch.autograd.grad((value * upstream).sum(), x)
    exact = x.detach().double().requires_grad_()
    want = (cap * (exact / cap).tanh() if cap else exact).logsumexp(-1)
    torch.testing.assert_close(value, want.to(value.dtype), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((want * upstream.double()).sum(), exact)
    live = slice(1, None) if kind.endswith("masked") and (cap or kind == "all masked") else slice(None)
    spacing = 2.0**-25 if dtype == torch.float16 else 0  # half of its subnormal numbers'
    off = ((got.double() - gradient).abs().amax(1) - spacing) / gradient.abs().amax(1)
    assert (off[live] < 2e-5 + 1.01 * torch.finfo(dtype).eps / 2).all(), off


BAD_HEADS = {
    "integer hidden": dict(hidden=torch.ones(N, D).long()), "complex hidden": dict(hidden=torch.ones(N, D) * 1j),
    "integer weight": dict(head_weight=torch.ones(V, D).int()), "float8 teacher": dict(teacher_rows=torch.ones(N, D).to(torch.float8_e4m3fn)),
    "mixed teacher": dict(teacher_weight=torch.ones(V, D).double()), "sparse scale": dict(terms_row_scale=torch.ones(N).to_sparse()),
    "short labels": dict(terms_labels=torch.zeros(2).long()), "no such kernel": dict(terms_divergence="Nosuch 0.0 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADS)
def test_the_linear_operator_checks_for_itself(name):
    hidden, weight, teacher, teacher_weight = (x.detach() for x in heads())
    terms = TokenTerms(*[torch.ones(N)] * 6, torch.zeros(N).long(), None, KEY, 0.0)
    call = LinearCall(hidden, fk.Head(weight), Teacher(teacher, teacher_weight), terms, wants=Wants(True, True))
    assert all(x.isfinite().all() for x in OPERATORS.linear_rows(*flat(call), "cpu"))
    given = dict(zip((argument.name for argument in OPERATORS.linear_rows.default._schema.arguments),
                     (*flat(call), "cpu"), strict=True))  # fmt: skip
    assert given.keys() > BAD_HEADS[name].keys()
    with pytest.raises(ValueError):
        OPERATORS.linear_rows(**(given | BAD_HEADS[name]))


def every_loss(student, teacher, hidden, weight, labels, listed, backend="auto", **keywords):
    """A loss of each kind: of logits, a list, hidden states and probabilities; those without terms of their own last."""
    terms = dict(labels=labels, ce_weight=0.5, reduction="none", backend=backend, **keywords)
    return (
        fk.f_divergence(student, teacher, "akl", **terms), fk.f_divergence(student, listed, "js", **terms),
        fk.f_divergence(student, listed._replace(tail="uniform"), "js", **terms),
        fk.linear_f_divergence(hidden, weight, teacher, divergence="kl", **terms),
        fk.linear_f_divergence(hidden, weight, hidden.detach(), weight.detach().roll(1, 0), "kl", memory="minimal",
                               student_bias=weight[:, 0], **terms),
        fk.cross_entropy(student, labels, backend=backend), fk.cross_entropy(student, teacher.softmax(-1), backend=backend),
        fk.linear_cross_entropy(hidden, weight, labels, backend=backend), fk.log_sum_exp(student, backend=backend),
        fk.log_probs(hidden, weight, labels, backend=backend),
    )  # fmt: skip


def given(dtype=torch.float32, n=3, v=41):
    """The arguments of `every_loss`, the teacher's made in inference mode."""
    student, hidden = (torch.randn(n, size).to(dtype).requires_grad_() for size in (v, D))
    weight = torch.randn(v, D).to(dtype).requires_grad_()
    with torch.inference_mode():
        teacher, labels = torch.randn(n, v).to(dtype), torch.arange(n)
        found = teacher.float().log_softmax(-1).topk(5)
        return student, teacher, hidden, weight, labels, fk.TopK(found.indices, found.values)


def results_of(losses, inputs):
    """Losses, and the gradients of their sum with a factor that rounds."""
    return *losses, *torch.autograd.grad(sum(x.sum() for x in losses) * 3, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_inference_mode(dtype):
    """A teacher's forward, and whatever else has no gradient, may come of it; and a frozen head."""
    student, teacher, hidden, weight, labels, listed = made = given(dtype)
    normal = [x.clone() for x in (teacher, labels)]
    lists = listed._replace(ids=listed.ids.clone(), log_probs=listed.log_probs.clone())
    got = results_of(every_loss(*made, token_weight=labels + 1), (student, hidden, weight))
    want = results_of(every_loss(student, normal[0], hidden, weight, normal[1], lists, token_weight=normal[1] + 1),
                      (student, hidden, weight))  # fmt: skip
    assert all(map(torch.equal, got, want))
    with torch.inference_mode():
        head = torch.randn(41, D).to(dtype)
    frozen = [fk.log_probs(hidden, w, labels) + fk.linear_cross_entropy(hidden, w, labels, reduction="none")
              for w in (head, head.clone())]  # fmt: skip
    assert torch.equal(*(torch.autograd.grad(x.sum() * 3, hidden)[0] for x in frozen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_of_inference_mode_is_let_go_of(dtype):
    """After a backward pass, though the loss is still held; not while the graph is kept."""
    student = torch.randn(N, V).to(dtype).requires_grad_()
    with torch.inference_mode():
        teacher = torch.randn(N, V).to(dtype)
    loss, held = fk.f_divergence(student, teacher), weakref.ref(teacher)
    del teacher
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    loss.backward()
    assert held() is None and torch.equal(student.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_default_of_torch_s_is_asked(backend):
    made = given()
    inputs = made[0], made[2], made[3]
    want = results_of(every_loss(*made, backend=backend), inputs)
    for dtype in (torch.float64, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            got = results_of(every_loss(*made, backend=backend), inputs)
        finally:
            torch.set_default_dtype(before)
        assert all(map(torch.equal, got, want))
    if backend in ("torch", "cpu"):
        with torch.device("meta"):
            got = results_of(every_loss(*made, backend=backend), inputs)
            assert fk.FDivergenceLoss(square)(*made[:2]).isfinite()
        assert all(map(torch.equal, got, want))


AUTOGRAD = torch.autograd.functional
#: What asks for derivatives that are not made, of a loss (...) at x; the error, and a part of its message.
DERIVATIVES = {
    "grad": (lambda loss, x: torch.func.grad(lambda y: loss(y).sum())(x), NotImplementedError, ": torch.func"),
    "func.jvp": (lambda loss, x: torch.func.jvp(loss, (x,), (x,)), NotImplementedError, ": torch.func"),
    "vmap": (lambda loss, x: torch.func.vmap(loss)(torch.stack((x, x))), NotImplementedError, ": torch.func"),
    "dual": (lambda loss, x: loss(forward_ad.make_dual(x, x)), NotImplementedError, "forward-mode AD do not reach"),
    "forward": (lambda loss, x: AUTOGRAD.jacobian(loss, x, strategy="forward-mode", vectorize=True), NotImplementedError,
                "forward-mode AD do not reach"),
    "vectorize": (lambda loss, x: AUTOGRAD.jacobian(loss, x, vectorize=True), NotImplementedError, "one upstream gradient"),
    "hessian": (lambda loss, x: AUTOGRAD.hessian(lambda y: loss(y).sum(), x), RuntimeError, "no second derivative"),
    "jvp": (lambda loss, x: AUTOGRAD.jvp(loss, x, x), RuntimeError, "no second derivative"),
    "hvp": (lambda loss, x: AUTOGRAD.hvp(lambda y: loss(y).sum(), x, x), RuntimeError, "no second derivative"),
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_that_are_not_made_are_refused(name):
    """No zeros, and none left out of a sum, wherever one is asked for."""
    student, teacher, hidden, weight, labels, listed = (x.clone() if torch.is_tensor(x) else x for x in given())
    student, hidden, weight = student.detach(), hidden.detach(), weight.detach()
    of_logits = [lambda x, i=i: every_loss(x, teacher, hidden, weight, labels, listed)[i] for i in (0, 1, 2, 5, 6, 8)]
    of_hidden = [lambda x, i=i: every_loss(student, teacher, x, weight, labels, listed)[i] for i in (3, 4, 7, 9)]
    ask, error, words = DERIVATIVES[name]
    of_logits.append(lambda x: fk.f_divergence(x, teacher, square))  # whose slope is autograd's
    for losses, x in ((of_logits, student), (of_hidden, hidden)):
        for loss in losses:
            assert AUTOGRAD.jacobian(loss, x).isfinite().all()
            with (
                forward_ad.dual_level() if name == "dual" else contextlib.nullcontext(),
                pytest.raises(error, match=words),
            ):
                ask(loss, x)


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("divergence", ["js", square], ids=["js", "own"])
def test_losses_inside_a_transform_of_other_tensors_are_as_outside(divergence):
    student, teacher, *_, listed = given()
    student = student.detach()
    for other in (teacher, listed, fk.TopK(listed.ids, listed.log_probs, "ignore")):
        loss = fk.f_divergence(student, other, divergence)
        slope = torch.func.grad(lambda x, other=other: x * fk.f_divergence(student, other, divergence))
        assert slope(torch.tensor(2.0)) == loss


def test_what_is_not_trained_is_no_graph_inside_a_transform_of_other_tensors():
    student, head, labels = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
    for call in (
        lambda: fk.log_sum_exp(student).sum(), lambda: fk.log_probs(student, head, labels, entropy=True)[1].sum(),
        lambda: fk.linear_cross_entropy(student, head, labels),
    ):  # fmt: skip
        assert torch.func.grad(lambda x, call=call: x * call())(torch.tensor(2.0)) == call()
        assert (torch.vmap(lambda x, call=call: x * call())(torch.ones(3)) == call()).all()


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(torch.tensor(1.0)), "vmap": lambda f: torch.vmap(f)(torch.ones(2)),
    "jvp": lambda f: torch.func.jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),))[0],
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_trained_is_refused_inside_a_transform_of_other_tensors(transform):
    """Its gradient was lost, or torch's error was about a setup_context."""
    student, head, labels = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.arange(N)
    still = student.detach()
    for trained, call in (
        ("logits", lambda: fk.log_sum_exp(student).sum()), ("hidden", lambda: fk.log_probs(student, head, labels).sum()),
        ("linear_weight", lambda: fk.linear_cross_entropy(still, head, labels)),
        ("student_logits", lambda: fk.f_divergence(student, still)), ("teacher_logits", lambda: fk.f_divergence(still, student)),
    ):  # fmt: skip
        with pytest.raises(
            NotImplementedError, match=f"{trained} requires grad inside a torch.func transform of other"
        ):
            TRANSFORMS[transform](lambda x, call=call: x * call())
        with torch.no_grad():
            assert (TRANSFORMS[transform](lambda x, call=call: x * call()) == call()).all()


@pytest.mark.parametrize("name", ["teacher_hidden, a function,", "divergence, one of your own"])
def test_what_no_operator_runs_is_refused_inside_a_transform_of_other_tensors(name):
    hidden, head, teacher = torch.randn(N, D), torch.randn(V, D), torch.randn(N, V)
    given = {"teacher_hidden": lambda begin, end: teacher[begin:end]} if "teacher" in name else {"divergence": square}

    def loss(x):
        return x * fk.linear_f_divergence(hidden, head, **{"teacher_hidden": teacher, **given})

    assert (torch.vmap(loss)(torch.ones(2)) == loss(1)).all()
    with pytest.raises(NotImplementedError, match=f"{name} .*does not run inside torch.func's grad"):
        torch.func.grad(loss)(torch.tensor(1.0))


def of_dual(loss, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x))).tangent


#: Those that compilers would trace, and make zeros of.
TRACED = {
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "dual": of_dual,
    "twice": lambda loss, x: torch.func.grad(lambda y: torch.func.grad(loss)(y).square().sum())(x),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("loss", [
    lambda x: fk.f_divergence(x, x.detach().flip(0)), lambda x: fk.log_sum_exp(x).sum(),
    lambda x: fk.linear_cross_entropy(x, x[:5].detach(), torch.zeros(len(x), dtype=torch.long)),
])  # fmt: skip
def test_compiled_derivatives_that_are_not_made_are_refused_too(loss, name):
    x = torch.randn(N, 17)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.compile(lambda x: TRACED[name](loss, x), backend="aot_eager")(x)


def test_a_dual_number_in_what_was_compiled_before_is_refused():
    torch._dynamo.reset()
    x, teacher = torch.randn(N, V), torch.randn(N, V)
    compiled = torch.compile(lambda x: fk.f_divergence(2 * x, teacher), backend="aot_eager")
    assert compiled(x).isfinite()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        compiled(forward_ad.make_dual(x, x))


FEW = torch.arange(3).expand(N, 3)
#: What no gradient is made of, however a compiler is asked for it.
CONSTANTS = {
    "target": (lambda x, z, h: fk.cross_entropy(z, x), (N, V)),
    "log_probs": (lambda x, z, h: fk.f_divergence(z, fk.TopK(FEW, x)), (N, 3)),
    "teacher_hidden": (lambda x, z, h: fk.linear_f_divergence(h, z.T[:, :5].contiguous(), x), (N, V)),
    "token_weight": (lambda x, z, h: fk.f_divergence(z, -z, token_weight=x), (N,)),
    "divergence_weight": (lambda x, z, h: fk.f_divergence(z, -z, divergence_weight=x), (N,)),
    "temperature": (lambda x, z, h: fk.f_divergence(z, -z, temperature=x), (N,)),
    "weight": (lambda x, z, h: fk.cross_entropy(z, z.argmax(-1), weight=x), (V,)),
    "num_items": (lambda x, z, h: fk.f_divergence(z, -z, num_items=x), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_compiled_transform_of_a_constant_is_refused(name):
    torch._dynamo.reset()
    loss, shape = CONSTANTS[name]
    logits, hidden = torch.randn(N, V), torch.randn(N, 5)
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        torch.compile(torch.func.grad(lambda x: loss(x, logits, hidden)), backend="eager")(torch.rand(shape) / V)


#: Losses by what a transform is asked the gradient of; of logits, hidden states, a weight, a bias, a teacher and labels.
BY = {
    "logits": lambda z, h, w, b, t, y: fk.f_divergence(z, t) + fk.log_sum_exp(z).sum() + fk.cross_entropy(z, y),
    "teacher": lambda z, h, w, b, t, y: fk.f_divergence(z, t),
    **dict.fromkeys(("hidden", "weight", "bias"), lambda z, h, w, b, t, y: (
        fk.linear_f_divergence(h, w, t, student_bias=b) + fk.linear_cross_entropy(h, w, y, linear_bias=b)
        + sum(x.sum() for x in fk.log_probs(h, w, y, bias=b, entropy=True))
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", BY)
def test_a_compiled_transform_s_gradient_is_autograd_s(name):
    """Compilers do not see at once of what a transform requires a gradient, and a function without one is passed by."""
    shapes = {"logits": (N, 17), "hidden": (N, 4), "weight": (17, 4), "bias": (17,), "teacher": (N, 17)}
    given, labels = {n: torch.randn(*shape) for n, shape in shapes.items()}, torch.randint(17, (N,))

    def loss(x):
        return BY[name](*{**given, name: x}.values(), labels)

    torch._dynamo.reset()  # which does not compile again what has raised once, as in the test above
    x = given[name].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    try:
        got = torch.compile(torch.func.grad(loss), backend="aot_eager")(given[name])
    except RuntimeError as error:  # older compilers take no autograd.Function inside a transform
        assert "setup_context" in str(error) and torch.__version__ < "2.13"
    else:
        torch.testing.assert_close(got, want)


class Quantised(torch.Tensor):
    """A wrapper: int8 and each row's scale, and no memory of its own."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        return function(*(x.values * x.scale if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def test_what_has_no_memory_is_not_read():
    """By torch's operations it gives what its values give; where none stands before the kernels, it is refused."""
    hidden, weight, teacher, labels = torch.randn(N, D), torch.randn(V, D), torch.randn(N, V), torch.arange(N)
    scale = weight.abs().amax(1, keepdim=True) / 127
    wrapped = Quantised((weight / scale).round().to(torch.int8), scale)
    plain = wrapped.values * scale
    own = fk.FDivergence(lambda t: (t - 1) ** 2 / (1 + t))
    for call in (
        lambda w: fk.linear_f_divergence(hidden, w, fk.Logits(teacher), divergence="js"),
        lambda w: fk.linear_cross_entropy(hidden, w, labels), lambda w: fk.log_probs(hidden, w, labels),
        lambda w: fk.top_k_of(fk.Hidden(hidden, fk.Head(w)), 5).log_probs,
        lambda w: fk.f_divergence(teacher, hidden @ w.t(), own),
    ):  # fmt: skip
        torch.testing.assert_close(call(wrapped), call(plain))
    for name, call in {
        "weight": lambda w: fk.linear_f_divergence(hidden, w, lambda begin, end: teacher[begin:end]),
        "teacher_weight": lambda w: fk.linear_f_divergence(hidden, plain, hidden, w, divergence=own),
    }.items():
        assert call(plain).isfinite()
        with pytest.raises(TypeError, match=f"{name} is a Quantised, whose memory no kernel can read"):
            call(wrapped)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("teacher", [torch.randn(N, V), lambda begin, end: torch.ones(end - begin, V)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_pass_alone_may_be_compiled(teacher, reduction):
    """The forward pass has laid the gradients where it found itself, which is outside."""
    hidden, weight, found = torch.randn(N, D), torch.randn(V, D), []
    for compiled in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        rows = teacher if callable(teacher) else fk.Logits(teacher)
        enabled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))
        with enabled if compiled else contextlib.nullcontext():
            fk.linear_f_divergence(torch.nn.functional.silu(x), w, rows, reduction=reduction).sum().backward()
        found.append((x.grad, w.grad))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore::UserWarning")  # they are a prototype
def test_masked_tensors_are_refused_by_name():
    def masked(*shape):
        return torch.masked.masked_tensor(torch.rand(shape), torch.rand(shape) > 0.5)

    student, teacher = models()
    hidden, weight, *_ = heads()
    labels = torch.zeros(N).long()
    for name, call in {
        "student_logits": lambda: fk.f_divergence(masked(N, V), teacher),
        "teacher_logits": lambda: fk.f_divergence(student, masked(N, V)),
        "token_weight": lambda: fk.f_divergence(student, teacher, token_weight=masked(N)),
        "temperature": lambda: fk.f_divergence(student, teacher, temperature=masked(N)),
        "divergence_weight": lambda: fk.f_divergence(student, teacher, divergence_weight=masked(N)),
        "weight": lambda: fk.cross_entropy(student, labels, weight=masked(V)),
        "num_items": lambda: fk.cross_entropy(student, labels, num_items=masked(1)),
        "student_hidden": lambda: fk.linear_f_divergence(masked(*hidden.shape), weight, teacher),
        "linear_bias": lambda: fk.linear_cross_entropy(hidden, weight, labels, linear_bias=masked(V)),
    }.items():
        with pytest.raises(TypeError, match=f"{name} is a MaskedTensor"):
            call()


def test_views_that_are_negated_when_they_are_read():
    hidden = torch.randn(N, D)
    for name, call in {
        "student_logits": lambda x: fk.f_divergence(x, torch.randn(N, V)),
        "linear_weight": lambda x: fk.linear_cross_entropy(hidden, x[:, :D], torch.zeros(N).long()),
    }.items():
        with pytest.raises(TypeError, match=f"{name} is a view that is negated when it is read"):
            call(torch._neg_view(torch.randn(N, V)))


def test_float64_stays_so_under_autocast():
    hidden, weight, teacher, teacher_weight = (x.detach() for x in heads(dtype=torch.float64))
    want = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.linear_f_divergence(hidden, weight, teacher, teacher_weight) == want


@pytest.mark.parametrize("size", [1e20, -1e25, 1e4, 1e-20, -1e-22])
def test_log_sum_exp_where_its_square_is_lost(size):
    x = torch.full((2, 4), size, requires_grad=True)
    for some, each in ((x, 0.25), (x[:, :1], 1.0)):
        (got,) = torch.autograd.grad(fk.log_sum_exp(some).sum(), some)
        torch.testing.assert_close(got, torch.full_like(some, each))


def test_makers_are_not_what_they_make():
    for given in (fk.Alpha, fk.TailAware, fk.FDivergence):
        with pytest.raises(TypeError, match=rf"divergence is {given.__name__} itself: call it"):
            fk.f_divergence(*models(), given)
    with pytest.raises(ValueError, match="holds no head"):
        fk.linear_cross_entropy(torch.randn(N, D), torch.randn(V, 0, D), torch.zeros(N, 0).long())
    shard, heads = fk.VocabShard(None, 0, V), torch.randn(V, 2, D)
    with pytest.raises(ValueError, match="shard splits one head; linear_weight has several"):
        fk.linear_cross_entropy(torch.randn(N, D), heads, torch.zeros(N, 2).long(), shard=shard)


def test_terms_of_labels_that_nothing_would_use_are_refused():
    student, teacher = models()
    for terms in (
        fk.LossTerms("kl", class_weight=torch.rand(V)),
        fk.LossTerms("kl", labels=torch.arange(N), class_weight=torch.rand(V)),
    ):
        with pytest.raises(ValueError, match="class_weight is of the labels' cross-entropy: give ce_weight"):
            fk.f_divergence(student, teacher, terms)
    terms = fk.LossTerms("kl", labels=torch.arange(N), ce_weight=1.0, class_weight=torch.rand(V))
    with pytest.raises(ValueError, match="class_weight goes with logits of both models, and not with teacher_logits"):
        fk.f_divergence(student, fk.top_k_of(teacher, 3), terms)
    with pytest.raises(ValueError, match="logit_scale / temperature must be in"):
        fk.log_probs(torch.randn(N, D), torch.randn(V, D), torch.arange(N), logit_scale=1e21, temperature=1e-18)
    with pytest.raises(ValueError, match="f has a parameter that requires grad"):
        factor = torch.nn.Parameter(torch.ones(()))
        fk.f_divergence(student, teacher, lambda t: (1 + factor**2) * (t - 1) ** 2)


def test_several_heads_share_a_smaller_vocabulary():
    hidden, weight, target = torch.randn(N, D), torch.randn(V, 2, D), torch.rand(N, V - 1, 2)
    got = fk.linear_cross_entropy(hidden, weight, target, vocab_size=V - 1)
    torch.testing.assert_close(got, F.cross_entropy(torch.einsum("nd,vhd->nvh", hidden, weight[:-1]), target))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_several_heads_take_targets_of_any_integers(dtype):
    """As bytes, 156 and -100 are one."""
    hidden, weight, high = torch.randn(N, D), torch.randn(V, 2, D), min(torch.iinfo(dtype).max, V - 1)
    target = torch.stack((torch.arange(N), torch.arange(high - N, high)), 1)
    for of_bytes, mask in ((156, -100), (high - 1, high - 1 - 2 * (high + 1))):
        target[2] = min(of_bytes, high)
        got = fk.linear_cross_entropy(hidden, weight, target.to(dtype), ignore_index=mask)
        assert got == fk.linear_cross_entropy(hidden, weight, target, ignore_index=mask)
    with pytest.raises(TypeError, match=r"target must be integer class indices, not torch\.bool"):
        fk.linear_cross_entropy(hidden, weight, target.bool())


def test_log_sum_exp_of_infinite_logits():
    logits = torch.tensor([[1.0, torch.inf], [-torch.inf, -torch.inf], [torch.nan, torch.inf]])
    want = logits.logsumexp(1)
    torch.testing.assert_close(fk.log_sum_exp(logits), want, equal_nan=True)
    keywords = dict(labels=torch.zeros(3).long(), z_loss=0.5, reduction="none", return_parts="metrics")
    for backend, rows in (("torch", 3), ("cpu", 3), ("triton", 2)):  # Triton's +inf beside a NaN is +inf
        for z, other in ((logits, {}), (logits.bfloat16(), dict(temperature=2.0))):
            _, parts = fk.f_divergence(z, torch.zeros_like(z), backend=backend, **keywords, **other)
            found, true = (parts.log_sum_exp, parts.z_loss), (want, 0.5 * want**2)
            told = slice(1 if backend == "triton" else 2)  # whose z-loss is NaN there: registers are short
            torch.testing.assert_close(*([x[:rows] for x in y[told]] for y in (found, true)), equal_nan=True)
            bias = dict(linear_bias=z[0].nan_to_num(0.0, posinf=torch.inf), memory="minimal", reduction="none")
            _, parts = fk.linear_cross_entropy(z.new_zeros(1, 3), z.new_ones(2, 3), torch.zeros(1).long(), **bias,
                                               z_loss=0.5, return_parts=True, backend=backend)  # fmt: skip
            assert parts.z_loss.item() == torch.inf


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("listed", [0, 1])
def test_z_losses_of_infinite_logits_beside_lists(backend, listed):
    """In the list, and in the rest."""
    logits = torch.tensor([[1.0, torch.inf], [-torch.inf, -torch.inf], [torch.nan, 0.0]])
    teacher = fk.TopK(torch.full((3, 1), listed), torch.full((3, 1), -0.5))
    _, parts = fk.f_divergence(logits, teacher, labels=torch.zeros(3).long(), z_loss=0.5, reduction="none",
                               return_parts=True, backend=backend)  # fmt: skip
    torch.testing.assert_close(parts.z_loss, 0.5 * logits.logsumexp(1) ** 2, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_measures_of_two_models_are_0_without_a_teacher(backend):
    logits = torch.tensor([[1.0, torch.nan], [0.0, torch.inf], [0.0, 0.0]])
    _, parts = fk.cross_entropy(logits, torch.zeros(3).long(), reduction="none", return_parts="metrics",
                                backend=backend)  # fmt: skip
    for measure in (parts.teacher_entropy, parts.agreement, parts.overlap):
        assert not measure.any()


@pytest.mark.parametrize("numbers", [
    (np.uint8(16), np.uint8(1)), (np.uint8(16), 2), (np.int64(2**31), 2), (np.float16(300), 1.0),
    (10**18, 10), (1.0, 10**37), (Fraction(1, 3), Fraction(5, 2)), (True + 1, np.float64(0.5)),
], ids=repr)  # fmt: skip
def test_numbers_of_any_kind_are_the_floats_that_they_are(numbers):
    """NumPy's own wrap around, or overflow where float32 does not."""
    temperature, weight = numbers
    student, teacher, labels = torch.randn(4, 7), torch.randn(4, 7), torch.arange(4)
    hidden, head = torch.randn(4, 3), torch.randn(7, 3)

    def losses(temperature, weight, small):
        terms = dict(temperature=temperature, divergence_weight=weight, temperature_squared=True, labels=labels,
                     ce_weight=small, z_loss=small, label_smoothing=small, return_parts=True)  # fmt: skip
        rows = fk.f_divergence(student, teacher, "kl", **terms)
        return *rows[1], rows[0], fk.linear_f_divergence(hidden, head, hidden + 1, head, "kl", **terms)[0]

    found = losses(temperature, weight, Fraction(1, 4))
    assert list(found) == list(losses(float(temperature), float(weight), 0.25))


@pytest.mark.parametrize("divergence", fk.TABLE)
def test_a_list_of_nothing_is_a_list_of_padding(divergence):
    student, labels = torch.randn(4, 7), torch.arange(4)
    for tail in ("bucket", "within", "uniform", "renormalize", "sampled"):
        weights = torch.zeros(4, 0) if tail == "sampled" else None
        none = fk.TopK(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0), tail, weights)
        padded = fk.TopK(
            torch.full((4, 1), -1), torch.zeros(4, 1), tail, weights if weights is None else torch.zeros(4, 1)
        )
        given = dict(labels=labels) if fk.TABLE[divergence].needs_labels else {}
        try:
            wanted = fk.f_divergence(student, padded, divergence, **given)
        except ValueError as refused:
            with pytest.raises(ValueError, match=re.escape(str(refused))):
                fk.f_divergence(student, none, divergence, **given)
        else:
            torch.testing.assert_close(fk.f_divergence(student, none, divergence, **given), wanted, equal_nan=True)


@pytest.mark.parametrize("generator, what", [
    (lambda t: ((t - 1) ** 2).sqrt(), "f has no finite slope at t = 1"),
    (lambda t: t.sub_(1).pow_(2), "f must be differentiable by autograd: .*inplace"),
    (lambda t: t.numpy(), "f must be an elementwise function of a tensor"),
    (lambda t: (t - 1) ** 2 / t.max(), "f must be elementwise: its values at some t depend on the others"),
    (lambda t: (t - 1) ** 2 + 0.1 * (t - t.mean().detach()).relu(), "f must be elementwise: its values"),
    (lambda t: (t - 1) ** 2 * torch.ones(601), "f must be an elementwise function of a tensor"),
    (lambda p, q: (p - q) ** 2, "f must be an elementwise function of a tensor: .*argument: 'q'"),
    (lambda t: (t.float() - 1).abs(), "f must keep the dtype of its argument, but made torch.float32 of torch.float64"),
])  # fmt: skip
def test_generators_that_have_no_slope_are_refused(generator, what):
    with pytest.raises(ValueError, match=what):
        fk.FDivergence(generator)


@pytest.mark.parametrize("terms", [
    lambda *_: None, lambda p, *_: (p,), lambda *_: (1.0, 2.0), lambda p, *_: (p.sum(1, keepdim=True),) * 2,
    lambda p, *_: (p > 0, p),
])  # fmt: skip
def test_an_own_divergence_s_terms_that_do_not_fit_are_refused(terms):
    with pytest.raises(TypeError, match=r"mine: its terms must be two floating tensors of p's shape \(4, 7\)"):
        fk.f_divergence(torch.randn(4, 7), torch.randn(4, 7), fk.Divergence("mine", terms))


class _Reader:
    def __call__(self, begin, end):
        return T[begin:end]

    def one(self, rows):
        return T[rows]


@pytest.mark.parametrize("teacher, what", [
    (lambda begin: T[begin:], "too many positional arguments"), (_Reader().one, "too many positional arguments"),
    (lambda begin, end, *, layer: T, "missing a required .*argument: 'layer'"), (lambda a, b, c: T, "missing .*: 'c'"),
    (torch.nn.Identity(), "too many positional arguments"),
])  # fmt: skip
def test_a_teacher_s_function_of_other_arguments_is_refused(teacher, what):
    for given in (teacher, fk.Logits(teacher)):
        with pytest.raises(TypeError, match=rf"teacher_hidden, a function, must take \(begin, end\): {what}"):
            fk.linear_f_divergence(H, W, given)
    for takes in (_Reader(), lambda *rows: T[slice(*rows)], lambda begin, end=0, layer=3: T[begin:end]):
        assert fk.linear_f_divergence(H, W, takes).isfinite()


def test_an_own_divergence_s_terms_of_other_arguments_are_refused():
    with pytest.raises(TypeError, match=r"mine: terms must take \(p, q, log_p, log_q, parameter\): too many"):
        fk.Divergence("mine", lambda p, q: (p, q))


def test_values_that_are_refused_by_name():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    with pytest.raises(ValueError, match="labels, temperature beside divergence, a LossTerms"):
        fk.f_divergence(student, teacher, fk.LossTerms("kl"), labels=np.arange(4), temperature=np.ones(1))
    with pytest.raises(ValueError, match=r"num_items must be one number, not torch\.qint8"):
        fk.f_divergence(student, teacher, num_items=torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.qint8))
    for shard, what in (
        (fk.VocabShard(None, 0, 7), "group=None is torch's default group, and there is none"),
        (fk.VocabShard("x", 0, 7), "group must be a process group, not 'x'"),
        (fk.VocabShard(None, 0.0, 7), "shard.begin must be an int"),
        (fk.VocabShard(None, 0, "7"), "shard.size must be an int"),
        (fk.VocabShard(None, 0, 7, None), "shard.sum_hidden must be True or False"),
    ):
        with pytest.raises((ValueError, TypeError), match=what):
            fk.f_divergence(student, teacher, shard=shard)
    nested, labels = torch.nested.nested_tensor([student, student]), torch.zeros(4).long()
    with pytest.raises(TypeError, match="input must be a dense tensor, not a nested one"):
        fk.cross_entropy(nested, labels)
    with pytest.raises(TypeError, match="linear_weight must be a dense tensor, not a nested one"):
        fk.linear_cross_entropy(student, nested, labels)


STRIDED = {
    "4 dimensions": lambda: torch.randn(2, 4, 3, 65)[:, :-1],
    "a dimension of 1": lambda: torch.randn(2, 2, 3, 65)[:, :-1],
    "exchanged": lambda: torch.randn(2, 3, 4, 65).transpose(0, 2),
    "none": lambda: torch.randn(2, 0, 3, 65)[:, :-1],
}


@pytest.mark.parametrize("name", STRIDED)
def test_rows_that_no_stride_walks_inside_compilers(name):
    student, teacher = STRIDED[name]().requires_grad_(), STRIDED[name]()

    def loss(s, t):
        return fk.f_divergence(s, t, "kl", reduction="sum") + fk.log_sum_exp(s).sum()

    wanted = torch.autograd.grad(loss(student, teacher), student)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(student, teacher)
    torch.testing.assert_close(found, loss(student, teacher))
    torch.testing.assert_close(torch.autograd.grad(found, student), wanted)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x.detach()) for x in (student, teacher)]
    with mode:
        assert loss(*fakes).shape == ()


def test_rows_whose_number_is_of_the_data():
    class Masked(torch.nn.Module):
        def forward(self, student, teacher, mask):
            return fk.f_divergence(student[mask], teacher[mask], "kl", reduction="none").square().sum()

    given = [(*(torch.randn(6, 7, requires_grad=True) for _ in range(2)), torch.arange(6) % n == 0) for n in (2, 3)]
    plain = [tuple(x.detach() for x in each) for each in given]
    program = torch.export.export(Masked(), plain[0], strict=False)
    torch.testing.assert_close(program.module()(*plain[1]), Masked()(*plain[1]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(Masked(), backend="aot_eager", fullgraph=True)
        for each in given:
            torch.testing.assert_close(*(torch.autograd.grad(run(*each), each[:2]) for run in (compiled, Masked())))


@pytest.mark.parametrize("divergence", ["gjs(0.9)", "csd(student)", "akl", "entropy_gated"])
def test_divergences_made_in_a_dynamic_graph(divergence):
    torch._dynamo.reset()
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    run = torch.compile(
        lambda s, t: fk.f_divergence(s, t, divergence), backend="aot_eager", fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(run(student, teacher), fk.f_divergence(student, teacher, divergence))
