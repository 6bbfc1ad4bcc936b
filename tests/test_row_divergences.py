"""Divergences that ask for statistics of their row: sets of entries, hidden states, and what a call may bring with it."""

import math

import mpmath
import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import RowCall, TokenTerms
from fdistill_kernels.carried import flat
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows

from .conftest import emulate_cuda, labelled, ready, reference, relative

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["torch", "cpu", "triton", "triton-spans"])
def backend(request, monkeypatch):
    """Without cuda, which leaves them all to Triton: `test_the_hopper_kernel_leaves_them_to_triton`."""
    return ready(request.param, monkeypatch)


NAMES = [name for name, d in TABLE.items() if d.statistics is not None]
N, V, D = 5, 1203, 24


def pair(scale=2.0, rows=N, vocabulary=V):
    return (scale * torch.randn(rows, vocabulary)).requires_grad_(), scale * torch.randn(rows, vocabulary)


def test_all_of_the_table_that_asks():
    assert NAMES == ["lk", "renyi", "akl", "entropy_gated", "tail_aware", "dkd", "csd"]


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", ["chunks", "minimal"])
def test_of_hidden_states(name, memory, backend):
    hidden, weight = torch.randn(N, D, requires_grad=True), (torch.randn(V, D) / D**0.5).requires_grad_()
    teacher, head = torch.randn(N, D), fk.Head(torch.randn(V, D) / D**0.5, softcap=3.0)
    loss = fk.linear_f_divergence(hidden, weight, fk.Hidden(teacher, head), None, name, logit_softcap=4.0, memory=memory,
                                  chunk_bytes=16 * V, backend=backend, **labelled(name, N))  # fmt: skip
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    student, other = (
        cap * (z / cap).tanh() for z, cap in ((h @ w.T, 4.0), (teacher.double() @ head.weight.double().T, 3.0))
    )
    expected = f_divergence_rows(student, other, name, **labelled(name, N)).mean()
    assert relative(loss, expected) < 2e-5
    got, want = (torch.autograd.grad(x, i) for x, i in ((loss, (hidden, weight)), (expected, (h, w))))
    assert all((g - e).norm() < 1e-4 * e.norm() for g, e in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_masks_weights_strides_and_in_place(name, backend):
    """Rows that do not count are not looked at; a strided call and one in place are the dense one's."""
    wide = 2 * torch.randn(N, 2 * V)
    student, teacher = wide[:, :V].detach().requires_grad_(), (2 * torch.randn(V, N)).t()
    labels = torch.arange(N)
    labels[2], weight = -100, torch.rand(N)
    keywords = dict(labels=labels, token_weight=weight, temperature=1.5, ce_weight=0.3, backend=backend)
    broken, other = student.detach().clone(), teacher.clone()
    broken[2] = math.nan
    other[2] = math.nan
    broken.requires_grad_()
    loss, clean = (fk.f_divergence(s, t, name, **keywords) for s, t in ((broken, other), (student, teacher)))
    (gradient,), (expected,) = (torch.autograd.grad(x, i) for x, i in ((loss, broken), (clean, student)))
    # Triton's sums follow the 16-byte lines that rows lie in, which are not the same in a copy
    close = 1e-6 if "triton" in backend else 0.0
    assert relative(loss, clean) <= close and relative(gradient, expected) <= close and (gradient[2] == 0).all()
    exact = student.detach().double().requires_grad_()
    rows = f_divergence_rows(exact, teacher.double(), name, 1.5, labels=labels.clamp_min(0))
    rows = rows + 0.3 * torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    whole = (rows * weight)[labels >= 0].sum() / 4
    assert relative(clean, whole) < 1e-5
    assert relative(expected, torch.autograd.grad(whole, exact)[0]) < 2e-5
    leaf = student.detach().clone().contiguous().requires_grad_()
    (overwritten,) = torch.autograd.grad(fk.f_divergence(leaf, teacher, name, inplace=True, **keywords), leaf)
    assert relative(overwritten, expected) <= close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [fk.TailAware(4, 0.5), fk.TailAware(1), fk.AKL(0.3), fk.AKL(0.999)], ids=str)
def test_entries_that_tie_are_in_the_set_together(divergence, dtype, backend):
    student = torch.randn(4, 900).to(dtype).requires_grad_()
    teacher = torch.randint(-2, 3, (4, 900)).to(dtype)  # signs, zeros, a few hundred of each
    teacher[1] = 0.0
    teacher[2, 7] = 30.0
    teacher[3, 100:] = -math.inf
    loss = fk.f_divergence(student, teacher, divergence, reduction="none", backend=backend)
    exact = student.detach().double().requires_grad_()
    expected = f_divergence_rows(exact, teacher.double(), divergence)
    finite = expected.isfinite()
    assert torch.equal(loss.isfinite(), finite)
    torch.testing.assert_close(loss[finite].double(), expected[finite], rtol=2e-5, atol=1e-6)
    (got,), (want,) = (torch.autograd.grad(x[finite].sum(), i) for x, i in ((loss, student), (expected, exact)))
    error = 1e-4 if dtype == torch.float32 else 2e-2
    assert relative(got[finite], want[finite]) < error


def grouped(s, t, inside, weight, within):
    """Value and both gradients by 60 digits."""
    q, p = ([mpmath.exp(mpmath.mpf(float(x))) for x in z] for z in (s, t))
    q, p = ([x / mpmath.fsum(z) for x in z] for z in (q, p))
    a, b = (mpmath.fsum(x for x, i in zip(z, inside, strict=True) if not i) for z in (p, q))
    triples = list(zip(p, q, inside, strict=True))
    inner = mpmath.fsum(x / a * mpmath.log(x / a * b / y) for x, y, i in triples if not i)
    value = (
        weight * (mpmath.fsum(x * mpmath.log(x / y) for x, y, i in triples if i) + a * mpmath.log(a / b))
        + within * inner
    )
    student = [weight * (y - x) if i else weight * y * (1 - a / b) + within * (y / b - x / a) for x, y, i in triples]
    teacher = [weight * x * mpmath.log(x / y) if i else
               weight * x * mpmath.log(a / b) + within * x / a * (mpmath.log(x / a * b / y) - inner) for x, y, i in triples]  # fmt: skip
    total = mpmath.fsum(teacher)
    return value, student, [g - x * total for g, x in zip(teacher, p, strict=True)]


@pytest.mark.parametrize("scale", [0.01, 1, 8, 15])
@pytest.mark.parametrize("divergence", [fk.DKD(1, 0), fk.DKD(), fk.TailAware(5, 0.25)], ids=str)
def test_groups_by_sixty_digits(divergence, scale, backend):
    """Where one group holds nearly all of both models, which float64's textbook formula does not resolve."""
    student, teacher = pair(scale, 1, 60)
    teacher.requires_grad_()
    loss = fk.f_divergence(student, teacher, divergence, labels=torch.tensor([3]), backend=backend)
    gradients = torch.autograd.grad(loss, (student, teacher))
    with mpmath.workdps(60):
        last = teacher[0].topk(5).values[-1] if divergence.name == "tail_aware" else None
        inside = [bool(teacher[0, i] >= last) if last is not None else i == 3 for i in range(60)]
        numbers = (1.0, divergence.other) if last is not None else divergence.numbers
        value, *expected = grouped(student[0], teacher[0], inside, *numbers)
        assert abs(float(loss) - value) <= 1e-4 * value
        for got, want in zip(gradients, expected, strict=True):
            wrong = max(abs(mpmath.mpf(float(g)) - w) for g, w in zip(got[0], want, strict=True))
            assert wrong <= 2e-5 * max(map(abs, want))


CONFIDENT = {
    "both": (True, True, False), "student": (True, False, False), "teacher": (False, True, False),
    "all in one, apart": (False, True, True),
}  # fmt: skip


@pytest.mark.grid
@pytest.mark.parametrize("who", CONFIDENT)
@pytest.mark.parametrize("gap", [60.0, 95.0, 300.0, 1e4])
@pytest.mark.parametrize("divergence", [*NAMES, fk.TailAware(1), fk.Renyi(2.0)], ids=str)
def test_rows_that_leave_nothing_in_float(divergence, gap, who, backend):
    """An entry ahead of all others by more than a dtype's exponents: what is left of the row, or of the models' overlap,
    is below its smallest number, and has its share of the loss all the same.
    """
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 300, generator=generator)
    labels = torch.tensor([1, 128, 299])
    of_student, of_teacher, apart = CONFIDENT[who]
    student[range(3), labels] += gap * of_student
    teacher[range(3), labels] += gap * of_teacher
    student[:, 140:] -= gap * apart
    for dtype in (torch.float32, *[torch.float64][: backend == "torch"]):
        models = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        exact = [x.double().detach().requires_grad_() for x in models]
        wanted = {"labels": labels} if str(divergence) == "dkd" else {}
        loss = fk.f_divergence(*models, divergence, reduction="none", backend=backend, **wanted)
        expected = f_divergence_rows(*exact, divergence, **wanted)
        unit = max(torch.finfo(dtype).eps * gap, 1e-5 if dtype == torch.float32 else 1e-12)  # that a gap has
        beyond = expected.abs() > torch.finfo(dtype).max
        wrong = (loss - expected).abs()[~beyond] / expected.abs()[~beyond].clamp_min(0.5)
        assert not len(wrong) or wrong.max() <= 32 * unit
        assert (loss[beyond] == math.inf).all()
        got, want = (torch.autograd.grad(x[~beyond].sum(), y) for x, y in ((loss, models), (expected, exact)))
        for g, e in zip(got, want, strict=True):
            assert (g - e).abs().max() / e.abs().max().clamp_min(0.5) <= 32 * unit


def test_identities(backend):
    """KL is tail_aware and dkd with what is left weighing as the teacher has it, and ab at (1, 0)."""
    student, teacher = pair()
    labels = torch.arange(N)

    def rows(divergence, s=student):
        return fk.f_divergence(s, teacher, divergence, labels=labels, reduction="none", backend=backend).detach()

    kl = rows("kl")
    rest = 1 - teacher.softmax(1)[0, 0].item()
    torch.testing.assert_close(rows(fk.DKD(1, rest))[0], kl[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows(fk.TailAware(V)), kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows(fk.AB(1, 0)), kl)
    torch.testing.assert_close(rows(fk.AB(0, 1)), rows("rkl"))
    torch.testing.assert_close(rows(fk.AB(0.3, 0.7)), rows(fk.Alpha(0.3)))
    torch.testing.assert_close(rows(fk.AB(0.3, 0.7001)), rows(fk.Alpha(0.3)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(rows(fk.Renyi(1)), kl)
    torch.testing.assert_close(rows(fk.EntropyGated(0)), rows("jeffreys"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows(fk.EntropyGated(100)), rows("rkl"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows(fk.ToDi(0)), rows("jeffreys") / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows("lk"), -(1 - rows("tvd")).log(), rtol=1e-5, atol=1e-6)


def test_a_sum_of_powers_beyond_float32_has_its_logarithm(backend):
    """Its largest entry is neither model's peak."""
    student, teacher = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True), torch.tensor([[1e4 - 1, 1e4, -1e4]])
    for alpha in (1.5, 2.5):
        loss = fk.f_divergence(student, teacher, fk.Renyi(alpha), backend=backend)
        exact = student.detach().double().requires_grad_()
        want = f_divergence_rows(exact, teacher.double(), fk.Renyi(alpha)).sum()
        assert relative(loss, want) < 1e-6
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0].double(), torch.autograd.grad(want, exact)[0],
                                   rtol=1e-2, atol=1e-2)  # fmt: skip


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_models_whose_overlap_float32_does_not_hold(alpha, backend):
    """Two peaks so far apart that Σ p^α q^(1−α) underflows have a loss and a gradient; without a common entry it is inf."""
    student, teacher = torch.randn(4, 300), torch.randn(4, 300)
    for row, gap in enumerate((100.0, 200.0, 2000.0)):
        student[row, 3], teacher[row, 7] = gap, gap
    student[3, :9], teacher[3, 9:] = -math.inf, -math.inf
    student.requires_grad_()
    loss = fk.f_divergence(student, teacher, fk.Renyi(alpha), reduction="none", backend=backend)
    want, wanted, _ = reference(student[:3], teacher[:3], fk.Renyi(alpha))
    assert relative(loss[:3].sum(), want) < 1e-6 and loss[3] == math.inf
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert relative(gradient[:3], wanted) < 1e-3 and (gradient[3] == 0).all()


def test_csd_is_infinite_where_a_weighed_entry_is(backend):
    """The other model lacks the weights' largest entry, or another one; beside entries that both have."""
    for weight in ("teacher", "student"):
        weighed, other = torch.randn(3, 300), torch.randn(3, 300)
        weighed[0, 7] = 9.0
        other[0, 7] = other[1, 5] = -math.inf
        weighed[2, 5] = -math.inf  # which no weight sees
        models = (other, weighed) if weight == "teacher" else (weighed, other)
        loss = fk.f_divergence(*models, fk.CSD(weight), reduction="none", backend=backend)
        want = f_divergence_rows(*(x.double() for x in models), fk.CSD(weight))
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


def test_few_rows_of_a_long_vocabulary(backend):
    student, teacher = pair(3.0, 1, 40_000)
    for name in ("akl", "tail_aware", "csd"):
        got = fk.f_divergence(student, teacher, name, backend=backend)
        exact = student.detach().double().requires_grad_()
        want = f_divergence_rows(exact, teacher.double(), name).sum()
        assert relative(got, want) < 2e-5
        assert relative(torch.autograd.grad(got, student)[0], torch.autograd.grad(want, exact)[0]) < 2e-5


def test_the_hopper_kernel_leaves_them_to_triton(monkeypatch):
    emulate_cuda(monkeypatch)
    student, teacher = pair(rows=2, vocabulary=300)
    for name in NAMES:
        keywords = labelled(name, 2)
        rows = [fk.f_divergence(student, teacher, name, backend=b, **keywords) for b in ("cuda", "triton")]
        assert torch.equal(*rows)


def test_compiles_in_one_graph():
    student, teacher = pair(rows=3, vocabulary=400)
    for name in ("dkd", "akl", "ab"):
        keywords = labelled(name, 3)
        loss = torch.compile(
            lambda s, t, n=name, k=keywords: fk.f_divergence(s, t, n, **k), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(loss(student, teacher), fk.f_divergence(student, teacher, name, **keywords))


def test_empty_and_masked_batches_are_zero(backend):
    for name in NAMES:
        for rows, labels in ((0, []), (2, [-100, -100])):
            student, teacher = pair(rows=rows, vocabulary=9)
            loss = fk.f_divergence(
                student, teacher, name, labels=torch.tensor(labels, dtype=torch.long), backend=backend
            )
            assert loss == 0 and (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize(
    "make, message",
    [(lambda: fk.AKL(0), r"mu .* \[1e-06, 0.999999\]"), (lambda: fk.TailAware(0), "k must be"), (lambda: fk.TailAware(1.5), "an integer"),
     (lambda: fk.TailAware(2, -1), "beta"), (lambda: fk.DKD(-1), "alpha"), (lambda: fk.CSD("both"), "'teacher' or 'student'"),
     (lambda: fk.AB(0.0001, 1), "alpha must be 0 or at least 1e-3"), (lambda: fk.AB(9, 0), "alpha"), (lambda: fk.Renyi(0), "alpha"),
     (lambda: fk.ToDi(-1), "beta"), (lambda: fk.EntropyGated(-1), "tau"),
     (lambda: fk.f_divergence(*pair(), "dkd"), "needs labels"),
     (lambda: fk.linear_f_divergence(torch.randn(2, 4), torch.randn(9, 4), torch.randn(2, 9), divergence="dkd"), "needs labels"),
     (lambda: TABLE["lk"].terms(*[torch.rand(1, 4)] * 4, 0.0), "sums over their row"),
    ])  # fmt: skip
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_an_operator_called_by_hand_without_labels():
    ones = torch.ones(2)
    terms = TokenTerms(ones, ones, ones, ones, ones, ones, None, None, TABLE["dkd"].key, 0.0)
    with pytest.raises(ValueError, match="needs labels"):
        torch.ops.fdistill_kernels.divergence_rows(
            *flat(RowCall(torch.randn(1, 2, 9), torch.randn(1, 2, 9), terms)), "cpu"
        )
