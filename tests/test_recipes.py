"""The recipes of docs/recipes.md do what their formulas say, gradients included."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fdistill_kernels.reference import f_divergence_rows

from .conftest import relative

N, V, D = 9, 257, 16
PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES: dict[str, Any] = {}
exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), RECIPES)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def lk(s, t):
    return -(1 - f_divergence_rows(s, t, "tvd")).log().mean()


def renyi(s, t, alpha):
    return (torch.logsumexp(alpha * t.log_softmax(-1) + (1 - alpha) * s.log_softmax(-1), -1) / (alpha - 1)).mean()


def entropy_gated(s, t, tau):
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    gate = (-(log_p.exp() * log_p).sum(-1) > tau).double()
    assert 0 < gate.mean() < 1
    return (kl(log_q, log_p) + gate * kl(log_p, log_q)).mean()


def standardised(s, t, base=2.0):
    z_s, z_t = (z / (base * z.detach().std(-1, keepdim=True)) for z in (s, t))
    return kl(z_t.log_softmax(-1), z_s.log_softmax(-1)).mean()


def mixed(s, t, labels, alpha):
    return (1 - alpha) * f_divergence_rows(s, t, "js").mean() + alpha * F.cross_entropy(s, labels)


CASES = {"lk": (), "renyi": (0.3,), "entropy_gated": (4.6,), "standardised": (), "mixed": (torch.arange(N), 0.3)}


@pytest.mark.parametrize("name", CASES)
def test_of_logits(name):
    student, teacher = torch.randn(N, V, requires_grad=True), 1.5 * torch.randn(N, V)
    exact = student.detach().double().requires_grad_()
    got, want = RECIPES[name](student, teacher, *CASES[name]), globals()[name](exact, teacher.double(), *CASES[name])
    assert relative(got, want) < 1e-5
    assert relative(torch.autograd.grad(got, student)[0], torch.autograd.grad(want, exact)[0]) < 2e-5


def test_taid():
    hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    other, theirs = torch.randn(N, 2 * D), torch.randn(V, 2 * D)
    got = RECIPES["taid"](hidden, head, other, theirs, 0.4)
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    z = h @ w.T
    between = 0.6 * z.detach() + 0.4 * other.double() @ theirs.double().T
    want = kl(between.log_softmax(-1), z.log_softmax(-1)).mean()
    assert relative(got, want) < 1e-4
    for ours, exact in zip(torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(want, (h, w)), strict=True):
        assert relative(ours, exact) < 1e-4


def test_distillm_2():
    pairs = [(torch.randn(N, V, requires_grad=True), torch.randn(N, V)) for _ in range(2)]
    got = RECIPES["distillm_2"](*pairs)
    want = sum(
        f_divergence_rows(s.double(), t.double(), n).mean()
        for (s, t), n in zip(pairs, ("skew_kl", "skew_rkl"), strict=True)
    )
    assert relative(got, want) < 1e-5


def test_every_recipe_is_tried():
    assert set(re.findall(r"^def (\w+)", PAGE, re.MULTILINE)) == {*CASES, "taid", "distillm_2"}
