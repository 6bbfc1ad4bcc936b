"""Small values in place of keywords: the same loss, one of both refused, and fields that travel by their own names."""

import copy
import pickle
import sys

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, RowCall
from fdistill_kernels.carried import built, flat, in_place_of, leaf, schema

N, V, D, D_T = 7, 129, 16, 24


def problem():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randn(V, requires_grad=True), torch.randn(N, D_T), torch.randn(V, D_T)


def gradients(loss, *of):
    return torch.autograd.grad(loss, of, retain_graph=True)


def same(ours, theirs, *of):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for a, b in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
        assert torch.equal(a, b)


def test_heads_and_hidden_states():
    hidden, weight, bias, teacher, teacher_weight = problem()
    keywords = fk.linear_f_divergence(
        hidden, weight, teacher, teacher_weight, "js", student_bias=bias, logit_scale=0.5, teacher_logit_scale=2.0,
        logit_softcap=30.0, teacher_logit_softcap=20.0,
    )  # fmt: skip
    head, theirs = fk.Head(weight, bias, 0.5, 30.0), fk.Head(teacher_weight, None, 2.0, 20.0)
    same(fk.linear_f_divergence(hidden, head, fk.Hidden(teacher, theirs)), keywords, hidden, weight, bias)
    same(fk.linear_f_divergence(hidden, head, teacher, theirs), keywords, hidden, weight, bias)
    target = torch.randint(V, (N,))
    by_keywords = fk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, logit_scale=0.5, logit_softcap=30.0)
    same(fk.linear_cross_entropy(hidden, head, target), by_keywords, hidden, weight, bias)


def test_logits_with_their_cap():
    student, teacher = torch.randn(N, V, requires_grad=True), 3 * torch.randn(N, V)
    keywords = fk.f_divergence(student, teacher, "kl", logit_softcap=5.0, teacher_logit_softcap=2.0)
    same(fk.f_divergence(fk.Logits(student, 5.0), fk.Logits(teacher, 2.0), "kl"), keywords, student)
    hidden, weight, *_ = problem()
    capped = fk.linear_f_divergence(hidden, weight, 2 * (teacher / 2).tanh(), divergence="kl")
    ours = fk.linear_f_divergence(hidden, weight, fk.Logits(teacher, 2.0), divergence="kl")
    torch.testing.assert_close(ours, capped)
    target = torch.randint(V, (N,))
    same(
        fk.cross_entropy(fk.Logits(student, 5.0), target), fk.cross_entropy(student, target, logit_softcap=5.0), student
    )


def test_terms(backend):
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    settings = dict(labels=torch.randint(V, (N,)), ce_weight=0.5, label_smoothing=0.1, z_loss=0.01,
                    token_weight=torch.rand(N), temperature=2.0, temperature_squared=True, reduction="sum")  # fmt: skip
    keywords = fk.f_divergence(student, teacher, "tvd", backend=backend, **settings)
    same(fk.f_divergence(student, teacher, fk.LossTerms("tvd", **settings), backend=backend), keywords, student)
    weighted = fk.LossTerms("tvd", **settings, class_weight=torch.ones(V))
    torch.testing.assert_close(fk.f_divergence(student, teacher, weighted, backend=backend), keywords)


def test_divergence_weight(backend):
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    rows = fk.f_divergence(student, teacher, "js", reduction="none", backend=backend)
    weight = torch.rand(N)
    each = fk.f_divergence(student, teacher, "js", divergence_weight=weight, reduction="none", backend=backend)
    torch.testing.assert_close(each, weight * rows)
    labels = torch.randint(V, (N,))
    loss, parts = fk.f_divergence(student, teacher, "js", divergence_weight=0.25, labels=labels, ce_weight=2.0,
                                  return_parts=True, backend=backend)  # fmt: skip
    torch.testing.assert_close(parts.divergence, 0.25 * rows.mean())
    torch.testing.assert_close(loss, parts.divergence + 2 * parts.cross_entropy)
    for bad in ("1", float("nan"), torch.rand(N + 1), torch.rand(N, requires_grad=True)):
        with pytest.raises((TypeError, ValueError), match="divergence_weight"):
            fk.f_divergence(student, teacher, divergence_weight=bad)


HIDDEN, WEIGHT, _, TEACHER, TEACHER_WEIGHT = problem()
HEAD, THEIRS = fk.Head(WEIGHT), fk.Head(TEACHER_WEIGHT)
TWICE = {
    "bias beside a head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, TEACHER, THEIRS, student_bias=torch.zeros(V)),
    "scale beside a head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, TEACHER, THEIRS, logit_scale=1.0),
    "cap beside a head": lambda: fk.linear_cross_entropy(HIDDEN, HEAD, torch.zeros(N).long(), logit_softcap=3.0),
    "cap beside the teacher's head": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, TEACHER, THEIRS, teacher_logit_softcap=3.0
    ),
    "weight beside hidden states": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, fk.Hidden(TEACHER, THEIRS), TEACHER_WEIGHT
    ),
    "bias beside hidden states": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, fk.Hidden(TEACHER, THEIRS), teacher_bias=torch.zeros(V)
    ),
    "cap beside logits": lambda: fk.f_divergence(fk.Logits(torch.randn(N, V)), torch.randn(N, V), logit_softcap=3.0),
    "labels beside terms": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl"), labels=torch.zeros(N).long()
    ),
    "reduction beside terms": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl"), reduction="sum"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_what_is_given_twice_is_refused(name):
    with pytest.raises(ValueError, match="beside"):
        TWICE[name]()


BAD = {
    "head's scale": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT, scale="1"), TEACHER, THEIRS),
    "head's cap": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT, softcap=-1.0), TEACHER, THEIRS),
    "head's weight": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT.T), TEACHER, THEIRS),
    "teacher's head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, fk.Hidden(TEACHER, TEACHER_WEIGHT)),
    "logits' cap": lambda: fk.f_divergence(fk.Logits(torch.randn(N, V), 0.0), torch.randn(N, V)),
    "no divergence": lambda: fk.f_divergence(torch.randn(N, V), torch.randn(N, V), fk.LossTerms(None)),
    "class weights": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl", class_weight=torch.ones(3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_are_checked(name):
    with pytest.raises((ValueError, TypeError)):
        BAD[name]()


def test_values_are_copied_and_compiled():
    hidden, weight, bias, teacher, teacher_weight = problem()
    head = copy.deepcopy(fk.Head(weight.detach(), bias.detach(), 2.0))
    assert torch.equal(pickle.loads(pickle.dumps(head)).weight, weight)

    def loss(h, head, teacher):
        return fk.linear_f_divergence(h, head, teacher, divergence=fk.LossTerms("js", temperature=2.0))

    values = fk.Head(weight, bias, 2.0), fk.Hidden(teacher, fk.Head(teacher_weight))
    eager, compiled = loss(hidden, *values), torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, *values)
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(gradients(eager, hidden, weight, bias), gradients(compiled, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [RowCall, LinearCall])
def test_leaves_travel_by_name(kind):
    names = [argument.split()[-1] for argument in schema(kind).split(", ")]
    assert len(set(names)) == len(names)
    value = built(kind, names)
    assert list(flat(value)) == names and built(kind, flat(value)) == value
    for name in names:
        assert leaf(kind, name, names) == name and in_place_of(kind, **{name: 1}).index(1) == names.index(name)
    operator = {RowCall: "divergence_rows", LinearCall: "linear_rows"}[kind]
    arguments = getattr(torch.ops.fdistill_kernels, operator).default._schema.arguments
    assert [a.name for a in arguments] == [*names, "backend"]


def test_a_star_import_needs_no_extra(monkeypatch):
    monkeypatch.delattr(fk, "teachers", raising=False)
    monkeypatch.setitem(sys.modules, "fdistill_kernels.teachers", None)
    names = {}
    exec("from fdistill_kernels import *", names)
    assert names["f_divergence"] is fk.f_divergence
    with pytest.raises(ImportError, match="fdistill_kernels"):
        fk.TeacherStore  # noqa: B018
