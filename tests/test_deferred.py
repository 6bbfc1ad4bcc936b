"""Deferred logits are, after any operation, what the head's own logits would be."""

import operator

import pytest
import torch
from torch.nn.functional import cross_entropy

from fdistill_kernels.deferred import Deferral, Logits, active, watch

V, D = 7, 4
BIAS = torch.randn(1, V)
MASK = torch.tensor([[True, False, True], [False, True, True]])

#: Operations on logits (2, 3, V) that leave them deferred, and that do not.
DEFERRED = {
    "slice": lambda z: z[:, :-1], "ellipsis": lambda z: z[..., 1:, :], "row": lambda z: z[0], "last": lambda z: z[:, -1],
    "mask": lambda z: z[MASK], "new axis": lambda z: z[None, :, 0], "indices": lambda z: z[:, torch.tensor([2, 0])],
    "vocabulary": lambda z: z[..., :5], "both": lambda z: z[:, 1:, :-2].contiguous().view(-1, 5),
    "view": lambda z: z.view(-1, z.size(-1)), "reshape": lambda z: z.reshape((6, V)), "flat": lambda z: z.flatten(0, 1),
    "scale": lambda z: 2 * z / 3.0, "bias": lambda z: z + BIAS, "bias first": lambda z: BIAS + z * 2,
    "cap": lambda z: torch.tanh(z / 2.0) * 2.0, "other cap": lambda z: ((z + BIAS) / 3).tanh() * 2.0,
    "dtype": lambda z: z.float().to(z.device).clone(),
}  # fmt: skip
MADE = {
    "square": lambda z: z**2, "scale by a tensor": lambda z: z * torch.tensor(2.0), "softmax": lambda z: z.softmax(-1),
    "transpose": lambda z: z.transpose(1, 2), "stack": lambda z: torch.stack([z, z]), "matrix": lambda z: z + torch.ones(3, 1),
    "one token": lambda z: z[..., 3], "some tokens": lambda z: z[..., 2:], "after the cap": lambda z: z.tanh() + BIAS,
    "regrouped": lambda z: z.view(3, -1), "comparison": lambda z: z > 0, "minus": lambda z: 1 - z, "rows": lambda z: torch.stack(list(z)),
    "assignment": lambda z: (operator.setitem(z, (..., 0), 0.0), z + 0)[1], "axis at the end": lambda z: z[..., None],
    "keyword": lambda z: torch.tanh(input=z), "rounded": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "times": lambda z: z.add(BIAS, alpha=2.0), "shape": lambda z: z.reshape(shape=(6, V)),
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def head(request):
    made = torch.nn.Linear(D, V, bias=request.param)
    watch(made)
    return made


@pytest.mark.parametrize("name", [*DEFERRED, *MADE])
def test_operations(head, name):
    apply, hidden = {**DEFERRED, **MADE}[name], torch.randn(2, 3, D)
    want = apply(head(hidden))
    with Deferral(head) as deferral:
        got = apply(head(hidden))
    assert isinstance(got, Logits) == (name in DEFERRED) and bool(deferral.reason) == (name in MADE)
    if name in MADE:
        assert torch.equal(got, want)
        return
    assert got.shape == want.shape and got.dtype == want.dtype and len(got) == len(want)
    weight, bias, scale, cap = got.head(head.weight, head.bias)
    z = scale * got.hidden @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(z if cap is None else cap * (z / cap).tanh(), want)
    torch.testing.assert_close(got.tensor(), want)


@pytest.mark.parametrize("name", ["bias", "bias first", "other cap", "both", "reshape", "indices"])
def test_compiled_operations(name):
    head, hidden = torch.nn.Linear(D, V), torch.randn(2, 3, D)
    watch(head)
    want = DEFERRED[name](head(hidden))
    compiled = torch.compile(lambda x: DEFERRED[name](head(x)), backend="eager", fullgraph=True)
    with Deferral(head):
        got = compiled(hidden)
    assert isinstance(got, Logits)
    torch.testing.assert_close(got.tensor(), want)
    assert isinstance(compiled(hidden), torch.Tensor)


@pytest.mark.parametrize("keywords", [{}, dict(reduction="sum", ignore_index=3), dict(weight=torch.rand(V)),
                                      dict(label_smoothing=0.1)])  # fmt: skip
def test_cross_entropy(head, keywords):
    hidden, target = torch.randn(6, D, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 5])
    want = cross_entropy(torch.tanh(head(hidden) / 3) * 3, target, **keywords)
    with Deferral(head) as deferral:
        got = torch.nn.CrossEntropyLoss(**keywords)(torch.tanh(head(hidden) / 3) * 3, target)
    assert deferral.fused and not deferral.reason
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, [hidden, *head.parameters()]) for x in (got, want)))


def test_no_tokens_give_no_gradient_whatever_they_are_divided_by(head):
    hidden = torch.randn(6, D, requires_grad=True)
    with Deferral(head):
        loss = cross_entropy(head(hidden), torch.full((6,), -100), reduction="sum") / torch.tensor(0)
    loss.backward()
    assert loss.isnan() and not hidden.grad.any() and not any(p.grad.any() for p in head.parameters())


def test_cross_entropies_of_other_kinds_are_of_the_logits(head):
    hidden = torch.randn(2, 3, D)
    probabilities, classes = torch.rand(6, V), torch.randint(0, V, (2, 3))
    want = cross_entropy(head(hidden).view(6, V), probabilities) + cross_entropy(head(hidden).mT, classes)
    with Deferral(head) as deferral:
        got = cross_entropy(head(hidden).view(6, V), probabilities) + cross_entropy(head(hidden).mT, classes)
    assert not deferral.fused and torch.equal(got, want)


def test_only_its_own_head_and_only_inside(head):
    other = torch.nn.Linear(D, V)
    watch(other)
    with Deferral(other) as outer:
        with pytest.raises(ZeroDivisionError), Deferral(head):
            assert isinstance(other(torch.randn(2, D)), torch.Tensor)
            raise ZeroDivisionError
        assert active() is outer
    assert active() is None and isinstance(head(torch.randn(2, D)), torch.Tensor)


def test_other_heads_by_a_probe_row():
    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    head, hidden = Scaled(D, V), torch.randn(2, 3, D)
    watch(head)
    want = head(hidden) / 3
    with Deferral(head):
        assert torch.equal(head(hidden) / 3, want)
    with Deferral(head, other_heads=True):
        got = head(hidden) / 3
    assert isinstance(got, Logits) and torch.equal(got.tensor(), want)
