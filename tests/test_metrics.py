"""The metrics that a loss brings with it, against their formulas in float64."""

from collections import namedtuple

import pytest
import torch

import fdistill_kernels as fk

N, V, D = 6, 2053, 16
LABELS = torch.tensor([3, -100, 17, 2052, 0, 900])
LIVE = LABELS >= 0


Expected = namedtuple("Expected", fk.Metrics._fields[4:])


def expected(student, teacher=None, labels=LABELS, t=1.0):
    z, (log_q, log_p) = (
        student.double(),
        [None if x is None else (x.double() / t).log_softmax(-1) for x in (student, teacher)],
    )
    q, nothing = log_q.exp(), torch.zeros(len(z)).double()
    of_labels = (
        z.log_softmax(-1).gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1) if labels is not None else nothing
    )
    if teacher is None:
        return Expected(-(q * log_q).sum(1), nothing, nothing, nothing, z.logsumexp(1), of_labels)
    p = log_p.exp()
    return Expected(-(q * log_q).sum(1), -(p * log_p).sum(1), (q.argmax(1) == p.argmax(1)).double(),
                      torch.minimum(p, q).sum(1), z.logsumexp(1), of_labels)  # fmt: skip


def compare(got, want, live=LIVE):
    for name, a, b in zip(want._fields, got[4:], want, strict=True):
        torch.testing.assert_close(a.double(), torch.where(live, b, 0), rtol=1e-5, atol=2e-6, msg=name)
        assert not a.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_of_logits(t, dtype, backend):
    student, teacher = (3 * torch.randn(N, V)).to(dtype).requires_grad_(), (3 * torch.randn(N, V)).to(dtype)
    teacher[2] = student.detach()[2]
    teacher[3, :5] = student.detach()[3, 7] = 100.0  # the first of those that tie
    keywords = dict(labels=LABELS, ce_weight=0.1, temperature=t, backend=backend)
    _, parts = fk.f_divergence(student, teacher, "js", reduction="none", return_parts="metrics", **keywords)
    want = expected(student.detach(), teacher, t=t)
    compare(parts, want)
    loss, of_mean = fk.f_divergence(student, teacher, "js", return_parts="metrics", **keywords)
    for got, each in zip(of_mean[4:], want, strict=True):
        torch.testing.assert_close(got.double(), each[LIVE].mean(), rtol=1e-5, atol=2e-6)
    plain = fk.f_divergence(student, teacher, "js", **keywords)
    assert torch.equal(loss, plain)
    for a, b in zip(*(torch.autograd.grad(x, student) for x in (loss, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", ["dkd", "lk", "kl"])
def test_in_place_with_caps_and_without_labels_terms(divergence, backend):
    student, teacher = 3 * torch.randn(N, V), 3 * torch.randn(N, V)
    leaf = student.clone().requires_grad_()
    _, parts = fk.f_divergence(leaf, teacher, divergence, labels=LABELS, logit_softcap=4.0, reduction="none",
                               inplace=True, return_parts="metrics", backend=backend)  # fmt: skip
    compare(parts, expected(4 * (student.double() / 4).tanh(), teacher))
    _, parts = fk.f_divergence(
        student, teacher, "kl", temperature=2.0, reduction="none", return_parts="metrics", backend=backend
    )
    compare(parts, expected(student, teacher, None, 2.0), LIVE | True)


def test_of_a_teacher_that_is_no_number(backend):
    student, teacher = torch.randn(N, V), torch.randn(N, V)
    teacher[1, 4] = torch.nan
    _, parts = fk.f_divergence(student, teacher, "kl", reduction="none", return_parts="metrics", backend=backend)
    assert parts.overlap.isnan().tolist() == parts.teacher_entropy.isnan().tolist() == [n == 1 for n in range(N)]
    assert parts.student_entropy.isfinite().all()


@pytest.mark.parametrize("offset", [1e4, torch.finfo(torch.float32).min])
def test_of_labels_whose_digits_an_offset_hides(offset, backend):
    student = torch.full((2, V), offset)
    _, parts = fk.cross_entropy(
        student, torch.tensor([3, 7]), reduction="none", return_parts="metrics", backend=backend
    )
    torch.testing.assert_close(parts.label_log_prob, -torch.tensor([V, V]).log(), rtol=2e-6, atol=0)


def test_of_cross_entropy(backend):
    logits = (2 * torch.randn(N, V)).requires_grad_()
    _, parts = fk.cross_entropy(logits, LABELS, reduction="none", return_parts="metrics", backend=backend)
    compare(parts, expected(logits.detach()))
    target = torch.rand(N, V).softmax(1)
    _, parts = fk.cross_entropy(logits, target, reduction="none", return_parts="metrics", backend=backend)
    want = expected(logits.detach(), target.log())
    for a, b in zip(parts[4:9], want[:5], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("memory", ["chunks", "minimal"])
def test_of_hidden_states(memory, backend):
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    teacher, head = torch.randn(N, D), torch.randn(V, D)
    keywords = dict(reduction="none", return_parts="metrics", memory=memory, chunk_bytes=16 * V, backend=backend)
    loss, parts = fk.linear_f_divergence(hidden, weight, teacher, head, "tvd", labels=LABELS, **keywords)
    compare(parts, expected((hidden @ weight.T).detach(), teacher @ head.T))
    loss.sum().backward()
    _, parts = fk.linear_cross_entropy(hidden, weight, LABELS, **keywords)
    compare(parts, expected((hidden @ weight.T).detach()))


@pytest.mark.parametrize("weight", [0.0, torch.tensor([0.0, 1, 1, 0, 0, 2])], ids=["all", "some"])
def test_of_rows_whose_terms_weigh_nothing(weight, backend):
    student, teacher = torch.randn(N, V), torch.randn(N, V)
    hidden, head = torch.randn(N, D), torch.randn(V, D)
    how = {
        "labels": LABELS,
        "divergence_weight": weight,
        "reduction": "none",
        "return_parts": "metrics",
        "backend": backend,
    }
    _, parts = fk.f_divergence(student, teacher, **how)
    for memory in ("chunks", "minimal"):
        _, of_states = fk.linear_f_divergence(hidden, head, hidden, head, memory=memory, **how)
        for found in (parts, of_states):
            assert (found.cross_entropy[LIVE] > 0).all() and not found.cross_entropy[1]
            torch.testing.assert_close(found.cross_entropy, -found.label_log_prob)


def test_of_an_own_divergence_and_compiled():
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    own = fk.FDivergence(lambda t: (t - 1) ** 2)
    want = expected(student.detach(), teacher, None)

    def step(divergence):
        return fk.f_divergence(student, teacher, divergence, reduction="none", return_parts="metrics")[1]

    for divergence in (own, "js"):
        compare(step(divergence), want, LIVE | True)
        compare(torch.compile(step, backend="eager", fullgraph=True)(divergence), want, LIVE | True)


def test_asked_for_or_not():
    student, teacher = torch.randn(2, 9), torch.randn(2, 9)
    parts, metrics = (fk.f_divergence(student, teacher, return_parts=x)[1] for x in (True, "metrics"))
    assert type(parts) is fk.LossParts and metrics[:4] == parts
    with pytest.raises(TypeError, match="return_parts, where it is not 'metrics'"):
        fk.f_divergence(student, teacher, return_parts="all")


def test_class_probabilities_have_no_label():
    logits, hidden, weight = torch.randn(5, 9), torch.randn(5, 4), torch.randn(9, 4)
    target = torch.randn(5, 9).softmax(-1)
    for _, found in (fk.cross_entropy(logits, target, return_parts="metrics"),
                     fk.linear_cross_entropy(hidden, weight, target, return_parts="metrics")):  # fmt: skip
        assert found.label_log_prob == 0 and found.cross_entropy > 0
