"""Digits kept in hard rows: barely overlapping models, almost one-hot rows, models that nearly agree."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels import cli
from fdistill_kernels import precision as measured
from fdistill_kernels.precision import (
    EXCEPTIONS,
    ROWS,
    TOLERANCES,
    Precision,
    cases,
    errors,
    precision,
    results,
    tolerances,
)

from .conftest import WHOLE, labelled
from .test_cuda import emulate_cuda

DIVERGENCES = [*fk.TABLE.values(), *(make(x) for make, values in (
    (fk.Renyi, (0.3, 2.0)), (fk.CSD, ("student",)), (fk.GJS, (0.1, 0.9)), (fk.Alpha, (-0.5, 0.1, 0.3, 0.7, 1.5)), (fk.SkewKL, (0.5, 0.9)), (fk.SkewRKL, (0.5, 0.9))
) for x in values)]  # fmt: skip


def rows_of(divergence, backend):
    keywords = dict(reduction="none", backend=backend, **labelled(divergence, ROWS))
    return lambda s, t: fk.f_divergence(s, t, divergence, **keywords)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_loss_and_gradients(divergence):
    for name, logits in cases(9000):
        truth = results(rows_of(divergence, "torch"), tuple(x.double() for x in logits))
        for backend in ("cpu", "torch"):
            found = errors(rows_of(divergence, backend), truth, logits)
            assert Precision("", name, found, found).within(tolerances(divergence, backend, name)), (name, found)


#: In `make test-all` every divergence on both, which is the interpreter's and the emulation's time.
GPU_KERNELS = [("triton", d) for d in DIVERGENCES] + [("cuda", d) for d in DIVERGENCES]
if not WHOLE:
    SOME = {"triton": ("js", "rkl", "skew_kl(0.9)"), "cuda": ("js", "skew_rkl(0.5)")}
    GPU_KERNELS = [(b, d) for b, d in GPU_KERNELS if str(d) in SOME[b]]


@pytest.mark.parametrize("backend, divergence", GPU_KERNELS, ids=str)
def test_loss_and_gradients_of_gpu_kernels(backend, divergence, monkeypatch):
    if backend == "cuda":
        emulate_cuda(monkeypatch, 2)
    for name, logits in cases(1500):
        if backend == "cuda":  # trained teachers are Triton's
            logits = logits[0], logits[1].requires_grad_(False)
        truth = results(rows_of(divergence, "torch"), tuple(x.double() for x in logits))
        found = errors(rows_of(divergence, backend), truth, logits)
        assert Precision("", name, found, found).within(tolerances(divergence, backend, name)), (name, found)


GENERATORS = {
    "kl": lambda t: t * mpmath.log(t), "rkl": lambda t: -mpmath.log(t), "jeffreys": lambda t: (t - 1) * mpmath.log(t),
    "js": lambda t: (t * mpmath.log(t) - (t + 1) * mpmath.log((t + 1) / 2)) / 2,
    "hellinger": lambda t: (mpmath.sqrt(t) - 1) ** 2 / 2, "triangular": lambda t: (t - 1) ** 2 / (t + 1),
    "pearson": lambda t: (t - 1) ** 2, "neyman": lambda t: (t - 1) ** 2 / t,
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
def test_the_truth_is_true(name):
    """The torch backend in float64 against 60 digits."""
    f = GENERATORS[name]
    with mpmath.workdps(60):
        for case, (student, teacher) in cases(30):
            s, t = ([mpmath.mpf(float(x)) for x in z[0]] for z in (student, teacher))
            q, p = ([mpmath.exp(x) / mpmath.fsum(map(mpmath.exp, z)) for x in z] for z in (s, t))
            ratios = [a / b for a, b in zip(p, q, strict=True)]
            g = [f(x) - x * mpmath.diff(f, x, h=x * mpmath.mpf(10) ** -25) for x in ratios]
            mean = mpmath.fsum(a * b for a, b in zip(q, g, strict=True))
            value = mpmath.fsum(b * f(x) for b, x in zip(q, ratios, strict=True))
            gradient = [b * (x - mean) for b, x in zip(q, g, strict=True)]
            logits = student[:1].double(), teacher[:1].double()
            got, of_student, _ = results(rows_of(name, "torch"), logits)
            top = max(map(abs, gradient))
            assert abs(float(got) - value) <= 1e-9 * abs(value), case
            wrong = max(abs(mpmath.mpf(float(a)) - b) for a, b in zip(of_student[0], gradient, strict=True))
            assert wrong <= 1e-8 * top, (case, float(wrong / top))


@pytest.mark.parametrize("name", [n for n in fk.TABLE if n not in ("engine", "cross_entropy")])
def test_never_negative_and_zero_of_equal_models(name, backend):
    logits = torch.cat([torch.randn(3, 700), 8 * torch.randn(1, 700), torch.zeros(1, 700)]).requires_grad_()
    same = logits.detach().clone().requires_grad_()
    keywords = dict(reduction="none", backend=backend, **labelled(name, 5))
    rows = fk.f_divergence(logits, same, name, **keywords)
    assert (rows == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(rows.sum(), (logits, same)))
    for distance in (1e-7, 1e-6, 1e-5, 1e-4) if WHOLE else (1e-7, 1e-5):
        near = logits.detach() + distance * torch.randn(5, 700)
        assert (fk.f_divergence(logits.detach(), near, name, **keywords) >= 0).all()


def test_command(capsys):
    assert (
        cli.main(["verify", "--precision", "--divergence", "js", "--shape", "4,2000", "--backend", "cpu", "--json"])
        == 0
    )
    lines = json.loads(capsys.readouterr().out)
    assert {line["case"] for line in lines} == {name for name, _ in cases(10)} and all(line["ok"] for line in lines)
    assert max(line["eager"][1] for line in lines) > 1  # eager PyTorch has no digit left there
    assert not any(math.isnan(x) for line in lines for x in line["ours"])


def test_precision_yields_every_case():
    assert len(list(precision(fk.TABLE["js"], "cpu", "cpu", 1000))) == len(list(cases(10)))


#: In `make test-all` every divergence; else those that missed the limits before they had their own, and js.
OF_TABLE = list(fk.TABLE) if WHOLE else ["kl", "tvd", "ab", "tail_aware", "dkd", "csd", "js"]


@pytest.mark.parametrize("vocabulary", [1000, 2000, 5003, 32000] if WHOLE else [1000, 5003])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_command_passes_on_a_healthy_machine(vocabulary, backend, capsys):
    call = ["verify", "--precision", "--backend", backend, "--shape", f"4,{vocabulary}", "--divergence", *OF_TABLE]
    assert cli.main(call) == 0, [line for line in capsys.readouterr().out.splitlines() if "MISS" in line]


@pytest.mark.parametrize("name", fk.TABLE if WHOLE else ["kl", "js", "tvd", "ab", "tail_aware", "dkd", "csd", "akl"])
def test_lost_digits_are_a_miss(name, capsys, monkeypatch):
    """Eager PyTorch's digits in our place, which no divergence's own limits let pass."""

    def eager(s, t, divergence, labels, reduction, backend):
        if s.dtype == torch.float64:
            return fk.f_divergence(s, t, divergence, labels=labels, reduction=reduction, backend=backend)
        return measured.f_divergence_rows(s, t, divergence, labels=labels)

    monkeypatch.setattr(measured, "f_divergence", eager)
    call = ["verify", "--precision", "--backend", "cpu", "--shape", "4,1000", "--divergence", name]
    assert cli.main(call) == 1 and "MISS" in capsys.readouterr().out


def test_exceptions_are_narrow():
    """Each is of divergences that exist, of cases that exist, and not of independent logits of any usual scale."""
    names = [name for name, _ in cases(10)]
    for exception in EXCEPTIONS:
        assert set(exception.names) <= set(fk.TABLE) and exception.gradient > TOLERANCES[1]
        assert all(any(words in name for name in names) for words in exception.cases)
    for divergence in fk.TABLE.values():
        assert all(
            tolerances(divergence, "cpu", f"randn·{x}") == TOLERANCES for x in ("0.1", "1", "4", "8", "15", "30")
        )
    page = (Path(__file__).parent.parent / "docs" / "precision.md").read_text(encoding="utf-8")
    told = page[page.index("## The exceptions") :]
    assert [f"{e.gradient:g}" for e in EXCEPTIONS if f" {e.gradient:g} " not in told] == []
    assert [name for e in EXCEPTIONS for name in e.names if f"`{name}`" not in told] == []


@pytest.mark.parametrize(
    "more, message",
    [
        (["--shape", "8,5003"], "--precision has 4 rows of each kind: give --shape 4,5003"),
        (["--shape", "4,5"], "at least 1000 entries, not 5"),
        (["--backend", "cuda"], "backend 'cuda' cannot take this call: "),
        (["--dtype", "float32"], "--dtype is not used with --precision"),
    ],
)
def test_refused(more, message, capsys):
    assert cli.main(["verify", "--precision", "--divergence", "js", *more]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out


def test_cases_need_eight_entries():
    with pytest.raises(ValueError, match="at least 8 entries, not 7"):
        list(cases(7))
