"""Digits kept in hard rows: barely overlapping models, almost one-hot rows, models that nearly agree."""

import json
import math
import os

import mpmath
import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels import cli
from fdistill_kernels.precision import ROWS, cases, errors, precision, results

from .conftest import labelled
from .test_cuda import emulate_cuda

DIVERGENCES = [*fk.TABLE.values(), *(make(x) for make, values in (
    (fk.Renyi, (0.3, 2.0)), (fk.CSD, ("student",)), (fk.GJS, (0.1, 0.9)), (fk.Alpha, (-0.5, 0.1, 0.3, 0.7, 1.5)), (fk.SkewKL, (0.5,)), (fk.SkewRKL, (0.5,))
) for x in values)]  # fmt: skip
#: Where float32 sums of the softmax leave fewer digits: equal rests of two peaks, models 1e-4 apart.
#: Of almost one-hot rows and near models: the peak's entry is the sum of all others, which cancel more than a divergence's.
CANCELLING = {"ab": 1e-4, "tail_aware": 3e-4, "dkd": 1e-4, "csd": 5e-5}
SUMS = {"kl", "rkl", "engine", "cross_entropy", "tvd"}


def rows_of(divergence, backend):
    keywords = dict(reduction="none", backend=backend, **labelled(divergence, ROWS))
    return lambda s, t: fk.f_divergence(s, t, divergence, **keywords)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_loss_and_gradients(divergence, backend):
    for name, logits in cases(9000):
        truth = results(rows_of(divergence, "torch"), tuple(x.double() for x in logits))
        loss, *gradients = errors(rows_of(divergence, backend), truth, logits)
        if divergence.name in ("tvd", "lk") and name == "0.0001 apart":  # its signs are of what is below a rounding
            gradients = [0.0]
        most = 2e-5 if name.startswith("randn") else CANCELLING.get(divergence.name, 2e-5)
        assert loss <= 1e-4 and max(gradients) <= most, (name, loss, gradients)


#: In `make test-all` every divergence on both, which is the interpreter's and the emulation's time.
GPU_KERNELS = [("triton", d) for d in DIVERGENCES] + [("cuda", d) for d in DIVERGENCES]
if not os.environ.get("FDISTILL_WHOLE"):
    GPU_KERNELS = [(b, d) for b, d in GPU_KERNELS if str(d) in ("kl", "js", "skew_rkl(0.5)" if b == "cuda" else "rkl")]


@pytest.mark.parametrize("backend, divergence", GPU_KERNELS, ids=str)
def test_loss_and_gradients_of_gpu_kernels(backend, divergence, monkeypatch):
    if backend == "cuda":
        emulate_cuda(monkeypatch, 2)
    for name, logits in cases(1500):
        if backend == "cuda":  # trained teachers are Triton's
            logits = logits[0], logits[1].requires_grad_(False)
        truth = results(rows_of(divergence, "torch"), tuple(x.double() for x in logits))
        loss, *gradients = errors(rows_of(divergence, backend), truth, logits)
        sums = divergence.name in SUMS and ("one peak" in name or "apart" in name)
        if sums and "0.0001" in name:
            continue
        assert loss <= 1e-4 and max(gradients) <= (1e-3 if sums else 2e-5), (name, loss, gradients)


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
    for distance in (1e-7, 1e-6, 1e-5, 1e-4):
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
    assert len(list(precision(fk.TABLE["js"], "cpu", "cpu", 500))) == len(list(cases(10)))
