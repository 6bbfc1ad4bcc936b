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


def standardised(s, t, base=2.0):
    z_s, z_t = (z / (base * z.detach().std(-1, keepdim=True)) for z in (s, t))
    return kl(z_t.log_softmax(-1), z_s.log_softmax(-1)).mean()


def mixed(s, t, labels, alpha):
    return (1 - alpha) * f_divergence_rows(s, t, "js").mean() + alpha * F.cross_entropy(s, labels)


CASES = {"standardised": (), "mixed": (torch.arange(N), 0.3)}


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
    want = 0.5 * sum(
        f_divergence_rows(s.double(), t.double(), n).mean()
        for (s, t), n in zip(pairs, ("skew_kl", "skew_rkl"), strict=True)
    )
    assert relative(got, want) < 1e-5


def test_spans():
    """Two tokenizers' cuts of one text into four spans."""
    hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    labels, spans = torch.randint(V, (N,)), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    theirs = -torch.rand(4) * 40
    student = RECIPES["span_log_probs"](hidden, head, labels, spans, 4)
    got = RECIPES["span_likelihoods"](student, theirs, 10.0)
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    of_tokens = (h @ w.T).log_softmax(-1)[torch.arange(N), labels]
    log_q, p = torch.stack([of_tokens[spans == i].sum() for i in range(4)]), (theirs.double() / 10).exp()
    q = (log_q / 10).exp()
    want = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert relative(got, want) < 1e-5
    for ours, exact in zip(torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(want, (h, w)), strict=True):
        assert relative(ours, exact) < 1e-4


def test_every_recipe_is_tried():
    tried = {*CASES, "taid", "distillm_2", "span_log_probs", "span_likelihoods"}
    assert set(re.findall(r"^def (\w+)", PAGE, re.MULTILINE)) == tried
