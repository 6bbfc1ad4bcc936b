"""The table's formulas: every backend against the float64 reference, invariants, limits and hard inputs."""

import gc
import itertools
import math
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fdistill_kernels as fk
from fdistill_kernels.divergences import JEFFREYS, KL, PARAMETERS, RKL, TABLE
from fdistill_kernels.own import ALIASES, resolve
from fdistill_kernels.reference import f_divergence_rows

from .conftest import labelled, reference, relative

FAMILIES = [fk.GJS(0.1), fk.GJS(0.9), fk.GJS(0.0), fk.GJS(1.0), fk.SkewKL(0.5), fk.SkewKL(0.0), fk.SkewRKL(0.5),
            fk.SkewRKL(0.0), fk.Alpha(0.3), fk.Alpha(1.5), fk.Alpha(-0.5), fk.Alpha(0.0), fk.Alpha(1.0),
            fk.Alpha(0.9999), fk.Alpha(1e-4)]  # fmt: skip
ROW_FAMILIES = [fk.Renyi(2.0), fk.AB(0.3, 0.0), fk.AB(0.0, 0.4), fk.AB(0.5, -0.5), fk.AB(0.0, 0.0), fk.AB(0.6, 0.6),
                fk.AB(0.3, 0.7), fk.ToDi(3.0), fk.AKL(0.9), fk.EntropyGated(1.2), fk.EntropyGated(20.0),
                fk.TailAware(1, 0.3), fk.TailAware(10**5), fk.DKD(0.5, 0.0), fk.DKD(0.0, 2.0), fk.CSD("student")]  # fmt: skip
ALL = [*TABLE.values(), *FAMILIES]
#: Those of sums over their rows, which have every backend's in a test of their own.
BY_ENTRY = [d for d in ALL if d.statistics is None]
F_DIVERGENCES = [d for d in ALL if d.name not in ("engine", "cross_entropy")]
#: (loss, gradient): error relative to the largest entry of the reference
TOLERANCE = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3),
             torch.float16: (1e-5, 6e-4)}  # fmt: skip


@pytest.mark.grid
@pytest.mark.parametrize("dtype, divergence", [
    *((dtype, d) for dtype in (torch.float64, torch.float32) for d in BY_ENTRY),
    *((dtype, d) for dtype in (torch.bfloat16, torch.float16) for d in TABLE.values() if d in BY_ENTRY),
    *((dtype, d) for dtype in (torch.float64, torch.float32) for d in (*TABLE.values(), *ROW_FAMILIES) if d not in BY_ENTRY),
    *((dtype, d) for dtype in (torch.bfloat16, torch.float16) for d in (fk.LK, fk.AKL(), fk.DKD())),
], ids=str)  # fmt: skip
def test_agrees_with_reference(divergence, dtype, backend):
    if backend != "torch" and dtype == torch.float64:
        with pytest.raises(ValueError, match="bfloat16 and float16 logits"):
            zeros = torch.zeros(1, 2).double()
            fk.f_divergence(zeros, zeros, divergence, backend=backend, **labelled(divergence, 1))
        return
    interpreted = backend not in ("cpu", "torch")  # at NumPy's speed: three blocks, the last of one entry
    rows, vocabulary = (2, 2049) if interpreted else (3, 4097)
    student, teacher = ((2 * torch.randn(rows, vocabulary)).to(dtype).requires_grad_() for _ in range(2))
    keywords = dict(temperature=1.5, reduction="sum", backend=backend, **labelled(divergence, rows))
    loss = fk.f_divergence(student, teacher, divergence, **keywords)
    of_student, of_teacher = torch.autograd.grad(loss, (student, teacher))
    expected, expected_student, expected_teacher = reference(
        student, teacher, divergence, temperature=1.5, **labelled(divergence, rows)
    )
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    if backend == "cuda":  # a teacher that is trained too is Triton's
        alone = fk.f_divergence(student, teacher.detach(), divergence, **keywords)
        assert relative(torch.autograd.grad(alone, student)[0], expected_student) < gradient_tolerance
    if backend in ("triton", "cuda") and student.device.type == "cpu" and dtype == torch.bfloat16:
        gradient_tolerance *= 2  # the interpreter truncates
    near_limit = 10 if str(divergence) in ("alpha(0.9999)", "alpha(0.0001)") else 1
    assert relative(loss, expected) < loss_tolerance * near_limit
    assert relative(of_student, expected_student) < gradient_tolerance
    assert relative(of_teacher, expected_teacher) < gradient_tolerance
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert of_student.dtype == of_teacher.dtype == dtype


#: Coefficients through which no gradient flows are none of the loss's slope.
@pytest.mark.parametrize(
    "divergence", [d for d in (*ALL, *ROW_FAMILIES) if d.name not in ("todi", "akl", "csd")], ids=str
)
def test_gradcheck(divergence):
    student, teacher = (torch.randn(2, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if divergence.name in ("tvd", "lk"):
        teacher = (student.detach() + torch.linspace(-1, 1, 7).double()).requires_grad_()  # away from ties
    assert torch.autograd.gradcheck(
        lambda s, t: fk.f_divergence(s, t, divergence, temperature=2.0, **labelled(divergence, 2)), (student, teacher)
    )


CALLED = {
    "forward_kl": "kl", "reverse_kl": "rkl", "reverse-kl": "rkl", "total_variation": "tvd", "tv": "tvd",
    "jensen_shannon": "js' or 'gjs", "Jensen-Shannon divergence": "js' or 'gjs", "jsd": "js' or 'gjs", "skl": "skew_kl",
    "srkl": "skew_rkl", "bhattacharyya": "renyi=0.5", "chi2": "pearson", "squared_hellinger": "hellinger",
    "ce": "cross_entropy", "KL": "kl", "kl_divergence": "kl", "kl_loss": "kl", "reverse_kl=1": "rkl", "jeffrey": "jeffreys",
    "skew-kl": "skew_kl",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_other_names_are_suggested(name):
    with pytest.raises(ValueError, match=re.escape(f"unknown divergence {name!r}; did you mean '{CALLED[name]}'?")):
        resolve(name)


def test_aliases_are_of_the_table():
    every = [word for words in ALIASES for word in words]
    assert len(set(every)) == len(every) and not set(every) & set(TABLE)
    assert all(resolve(name) for names in ALIASES.values() for name in names)


@pytest.mark.parametrize("name", ["wasserstein", "mse", "emd", "cosine", "="])
def test_no_silly_suggestion(name):
    with pytest.raises(ValueError, match=f"unknown divergence '{name}'; known: kl, "):
        resolve(name)


@pytest.mark.parametrize("given, shown", [
    ("gjs=beta=0.1", "gjs=0.1"), ("gjs(beta=0.1)", "gjs=0.1"), ("ab=beta=0.7", "ab=0.2,0.7"),
    ("ab(beta=0.3, alpha=0.4)", "ab=0.4,0.3"), ("csd=weight=student", "csd=student"), ("tail_aware=k=32", "tail_aware=32,1"),
])  # fmt: skip
def test_parameters_by_name(given, shown):
    with pytest.raises(ValueError, match=re.escape(f"parameters are given without their names: {shown}") + "$"):
        resolve(given)
    assert resolve(shown)
    with pytest.raises(ValueError, match=r"gjs takes beta, not (lam|0\.5)"):
        resolve("gjs=lam=0.1" if "gjs" in given else "gjs=0.5,beta=0.1")


@settings(max_examples=60, deadline=None)
@given(
    divergence=st.sampled_from(F_DIVERGENCES),
    rows=st.integers(1, 4),
    vocabulary=st.integers(1, 300),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 5.0]),
    temperature=st.floats(0.5, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_backends_agree_on_any_input(divergence, rows, vocabulary, scale, temperature, dtype, transposed, seed):
    torch.manual_seed(seed)
    shape = (vocabulary, rows) if transposed else (rows, vocabulary)
    student, teacher = ((scale * torch.randn(shape)).to(dtype) for _ in range(2))
    if transposed:
        student, teacher = student.t(), teacher.t()
    student.requires_grad_()
    results = []
    for backend in ("torch", "cpu"):
        labels = torch.arange(rows) % vocabulary
        loss = fk.f_divergence(student, teacher, divergence, labels=labels, temperature=temperature, reduction="none",
                               backend=backend)  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert (loss > -2e-6).all()
        assert (gradient.float().sum(-1).abs() <= 1e-5 + 2**-8 * gradient.float().abs().sum(-1)).all()
        results.append((loss, gradient))
    (a, grad_a), (b, grad_b) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(grad_a.float(), grad_b.float(), rtol=2e-2, atol=1e-6 + 2e-3 * float(grad_a.abs().max()))


@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
def test_equal_models(divergence, backend):
    logits = (5 * torch.randn(2, 1000)).requires_grad_()
    loss = fk.f_divergence(logits, logits.detach().clone(), divergence, backend=backend, **labelled(divergence, 2))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_row_shift_changes_nothing(divergence, backend):
    student, teacher = ((1024 * torch.randn(2, 600)).round() / 1024 for _ in range(2))  # shifts are then exact
    keywords = dict(backend=backend, **labelled(divergence, 2))
    a = fk.f_divergence(student, teacher, divergence, **keywords)
    b = fk.f_divergence(student + 64, teacher - 32, divergence, **keywords)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bounds_symmetry_and_pinsker(backend):
    student, teacher = 4 * torch.randn(16, 300), 4 * torch.randn(16, 300)

    def rows(name, s=student, t=teacher):
        return fk.f_divergence(s, t, name, reduction="none", backend=backend)

    assert (rows("tvd") <= 1).all() and (rows("js") <= math.log(2)).all()
    assert (rows("tvd") <= (rows("kl") / 2).sqrt()).all()
    for name in ("tvd", "js", "jeffreys", "hellinger", "triangular"):
        torch.testing.assert_close(rows(name), rows(name, teacher, student))
    torch.testing.assert_close(rows("kl"), rows("rkl", teacher, student))
    torch.testing.assert_close(rows("pearson"), rows("neyman", teacher, student))


def test_limits_of_the_families(backend):
    student, teacher = torch.randn(4, 400), torch.randn(4, 400)

    def value(divergence):
        return fk.f_divergence(student, teacher, divergence, backend=backend)

    torch.testing.assert_close(value(fk.Alpha(1 - 1e-5)), value(KL), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(value(fk.Alpha(1e-5)), value(RKL), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(value(fk.Alpha(0.5)), 4 * value("hellinger"))
    torch.testing.assert_close(value(KL) + value(RKL), value(JEFFREYS))
    torch.testing.assert_close(value(fk.GJS(0.01)) / 0.01, value(KL), rtol=5e-2, atol=0)
    torch.testing.assert_close(value(fk.GJS(0.0)), value(KL))
    torch.testing.assert_close(value(fk.GJS(1.0)), value(RKL))
    torch.testing.assert_close(value(fk.SkewKL(1e-5)), value(KL), rtol=1e-3, atol=1e-4)
    halves = (value(fk.SkewKL(0.5)) + value(fk.SkewRKL(0.5))) / 2
    torch.testing.assert_close(halves, value("js"))


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_entries_outside_both_vocabularies(divergence, backend):
    student, teacher = torch.randn(2, 300), torch.randn(2, 300)
    student[:, 250:] = teacher[:, 250:] = -math.inf
    student.requires_grad_()
    keywords = dict(backend=backend, **labelled(divergence, 2))
    loss = fk.f_divergence(student, teacher, divergence, **keywords)
    (gradient,) = torch.autograd.grad(loss, student)
    short = student[:, :250].detach().requires_grad_()
    expected = fk.f_divergence(short, teacher[:, :250].contiguous(), divergence, **keywords)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :250], torch.autograd.grad(expected, short)[0])
    assert (gradient[:, 250:] == 0).all()


@pytest.mark.parametrize("divergence", ["kl", "rkl", "jeffreys"])
def test_a_row_of_the_lowest_number_is_uniform(divergence, backend):
    """As of a mask that fills it, in the student and in a teacher that trains."""
    lowest = torch.full((1, 300), torch.finfo(torch.float32).min)
    other = torch.randn(1, 300)
    uniform, masked = [], []
    for outcome, row in ((uniform, torch.zeros(1, 300)), (masked, lowest)):
        for student, teacher in ((row, other), (other, row)):
            student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
            loss = fk.f_divergence(student, teacher, divergence, backend=backend)
            outcome += [loss, *torch.autograd.grad(loss, (student, teacher))]
    torch.testing.assert_close(masked, uniform)


@pytest.mark.parametrize(
    "divergence, student_missing, teacher_missing",
    [("kl", math.inf, None), ("rkl", None, math.inf), ("jeffreys", math.inf, math.inf), ("engine", None, math.inf),
     ("cross_entropy", math.inf, None), ("pearson", math.inf, None), ("neyman", None, math.inf), ("js", None, None),
     ("tvd", None, None), ("hellinger", None, None), ("triangular", None, None), ("skew_kl", None, None),
     ("skew_rkl", None, None), ("gjs", None, None), ("lk", None, None), ("renyi", None, None), (fk.Renyi(1.5), math.inf, None),
     ("ab", None, None),
     (fk.AB(0.0, 0.4), None, math.inf), ("todi", math.inf, math.inf), (fk.ToDi(0), math.inf, math.inf),
     ("akl", math.inf, math.inf),
     (fk.EntropyGated(20.0), None, math.inf), ("tail_aware", math.inf, None), ("csd", math.inf, None),
     (fk.CSD("student"), None, math.inf)],
)  # fmt: skip
def test_minus_infinity_on_one_side(divergence, student_missing, teacher_missing, backend):
    """inf where the divergence is infinite, its finite limit elsewhere, never NaN."""
    sides = ("student", student_missing), ("teacher", teacher_missing)
    for (side, expected), t in itertools.product(sides, (1.0, 0.7)):  # the teacher's, beside 1
        logits = {"student": torch.randn(1, 40), "teacher": torch.randn(1, 40)}
        logits[side][0, 7] = -math.inf
        loss = fk.f_divergence(*logits.values(), divergence, teacher_temperature=t, backend=backend)
        if expected is None:
            exact = f_divergence_rows(*(x.double() for x in logits.values()), divergence, 1.0, t)
            torch.testing.assert_close(loss.double(), exact.sum(), rtol=1e-5, atol=1e-6)
        else:
            assert loss.item() == expected


def test_kl_gradient_with_a_missing_teacher_entry_and_one_hot_teacher(backend):
    student = torch.randn(1, 50, requires_grad=True)
    teacher = torch.full((1, 50), -math.inf)
    teacher[0, 3] = 0.0
    loss = fk.f_divergence(student, teacher, "kl", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.nn.functional.cross_entropy(student, torch.tensor([3]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("divergence", ["kl", "rkl", "js", "tvd", "jeffreys", "skew_kl", "hellinger", "triangular"])
def test_logits_of_ten_thousand(divergence, backend):
    student, teacher = 1e4 * torch.randn(3, 200).sign(), 1e4 * torch.randn(3, 200).sign()
    student += torch.randn(3, 200)
    student.requires_grad_()
    loss = fk.f_divergence(student, teacher, divergence, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    expected, expected_gradient, _ = reference(student, teacher, divergence)
    assert relative(loss, expected) < 1e-5 and relative(gradient, expected_gradient) < 1e-4


def test_tvd_ties_have_zero_subgradient(backend):
    logits = torch.zeros(1, 33, requires_grad=True)
    (gradient,) = torch.autograd.grad(fk.f_divergence(logits, torch.zeros(1, 33), "tvd", backend=backend), logits)
    assert (gradient == 0).all()


def test_what_is_no_number_makes_no_finite_loss_of_its_token_alone(backend):
    for divergence in TABLE.values():
        for side, value in ((0, math.inf), (1, math.nan)):
            logits = [torch.randn(3, 100), torch.randn(3, 100)]
            logits[side][1, 55] = value
            keywords = dict(reduction="none", backend=backend, **labelled(divergence, 3))
            rows = fk.f_divergence(*logits, divergence, **keywords)
            assert rows.isfinite().tolist() == [True, False, True], divergence


def test_an_infinite_term_hides_no_nan(backend):
    """Of other entries: one that the student lacks, one that the teacher lacks, and then a NaN in either."""
    for divergence in TABLE.values():
        for side in (0, 1):
            logits = [torch.randn(2, 100), torch.randn(2, 100)]
            logits[0][0, 7], logits[1][0, 60], logits[side][0, 30] = -math.inf, -math.inf, math.nan
            more = labelled(divergence, 2)
            rows = fk.f_divergence(*logits, divergence, reduction="none", backend=backend, **more)
            want = f_divergence_rows(*(x.double() for x in logits), divergence, **more)
            assert rows.isnan().tolist() == want.isnan().tolist() == [True, False], (divergence, side)


def test_error_of_the_vector_exponential_and_logarithm(backend):
    """The docs state 1 ulp for exp and log: losses of two entries show them alone, to a few float32 roundings."""
    gap = torch.linspace(-80, 0, 401)
    student = torch.stack([gap, torch.zeros_like(gap)], 1)
    loss = fk.cross_entropy(student, torch.ones(401, dtype=torch.long), reduction="none", backend=backend)
    exact = torch.log1p(gap.double().exp())
    assert ((loss.double() - exact).abs() <= 3e-7 * (1 + exact)).all()


def test_a_generator_lives_no_longer_than_its_use():
    """What it holds may be large, and a garbage collector late."""
    logits = torch.randn(2, 3, 40, requires_grad=True)
    own = fk.FDivergence(lambda t: (t - 1) ** 2)
    gone = weakref.ref(own)
    gc.disable()
    try:
        fk.f_divergence(logits, logits.detach() * 2, own).backward()
        del own
        assert gone() is None
    finally:
        gc.enable()


def test_own_generator():
    student, teacher = torch.randn(5, 77, dtype=torch.float64, requires_grad=True), torch.randn(5, 77).double()
    own = fk.FDivergence(lambda t: 0.5 * (t * t.log() - (t + 1) * ((t + 1) / 2).log()), name="own js")
    stable = fk.FDivergence(from_log_ratio=lambda u: u.exp() * u)
    for ours, name in ((own, "js"), (stable, "kl"), (lambda t: (t - 1) ** 2, "pearson")):
        a, b = fk.f_divergence(student, teacher, ours), fk.f_divergence(student, teacher, name)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, student), torch.autograd.grad(b, student))
    assert torch.autograd.gradcheck(lambda s: fk.f_divergence(s, teacher, own), student)


@pytest.mark.parametrize("f", [lambda t: (t - 1) ** 2, lambda t: 1 / t - 1, lambda t: 1 / t**2 - 1, lambda t: t**3 - 1])
def test_own_generator_that_overflows_is_infinite(f):
    """Whichever of f and its slope is the first to: where their signs differ, their difference has no digits left."""
    for gap in (40.0, 43.9, 44.2, 60.0, 88.0, 200.0):
        student, teacher = torch.tensor([[0.0, gap], [gap, 0.0]]), torch.tensor([[gap, 0.0], [gap / 2, 0.0]])
        loss = fk.f_divergence(student, teacher, f, reduction="none", backend="torch")
        exact = fk.f_divergence(student.double(), teacher.double(), f, reduction="none")
        assert not loss.isnan().any()
        assert ((loss == torch.inf) | ((loss.double() - exact).abs() <= 1e-3 * exact.abs() + 1e-6)).all()


@pytest.mark.parametrize(
    "generator, message",
    [(lambda t: t * t, r"f\(1\) must be 0, but f\(1\) = 1"), (lambda t: -((t - 1) ** 2), "must be convex"),
     (lambda t: (t - 2).log(), "not finite"), (lambda t: t.sum(), "elementwise"),
     (lambda t: (t.detach() - 1) ** 2, "differentiable"), (math.log, "elementwise"),
     (lambda t: t.nothing(), "elementwise")],
)  # fmt: skip
def test_bad_generators(generator, message):
    with pytest.raises(ValueError, match=message):
        fk.FDivergence(generator)


def test_generator_is_given_once():
    with pytest.raises(ValueError, match="either f"):
        fk.FDivergence()


@pytest.mark.parametrize(
    "make, message",
    [(lambda: fk.GJS(1.5), r"beta must be a number in \[0, 1\]"), (lambda: fk.SkewKL(1.0), r"lam .* \[0, 0.999999\]"),
     (lambda: fk.SkewRKL(-0.1), "lam"), (lambda: fk.Alpha(math.nan), "alpha")],
)  # fmt: skip
def test_parameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family, name", [(f, n) for f, (_, names) in PARAMETERS.items() for n in names if f != "csd"])
def test_a_parameters_message_has_its_name_and_its_range(family, name):
    make = PARAMETERS[family][0]
    with pytest.raises(ValueError, match=f"^{name} must be a number in ") as refused:
        make(**{name: 1e9})
    for bound in re.search(r"\[(.+), (.+)\]", str(refused.value)).groups():
        make(**{name: float(bound)})
