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
    "beyond float32": lambda z: z.double() * 1e300, "times": lambda z: z.add(BIAS, alpha=2.0), "shape": lambda z: z.reshape(shape=(6, V)),
}  # fmt: skip


def written(write, *parts):
    """What a function writes to logits, and what is a view or a copy of them then."""

    def apply(z):
        seen = [part(z) for part in parts]
        write(z, *seen)
        return z, *seen

    return apply


def scaled(z, *_):
    z *= 3.0


#: Who writes to logits, or to a part of them, writes to all that share their memory, and to nothing else.
WRITTEN = {
    "alias": written(lambda z, y: scaled(y), lambda z: z), "dtype": written(lambda z, y: scaled(y), lambda z: z.float()),
    "bias": written(lambda z: operator.iadd(z, BIAS)), "divided": written(lambda z: operator.itruediv(z, 0.2)),
    "minus": written(lambda z: operator.isub(z, 1.0)), "other dtype": written(lambda z: operator.iadd(z, BIAS.double())),
    "view": written(lambda z, y: scaled(y), lambda z: z.view(-1, V)), "flat": written(scaled, lambda z: z.flatten(0, 1)),
    "method of a view": written(lambda z, y: y.mul_(3.0), lambda z: z.reshape(-1, V)),
    "method of a row": written(lambda z: z[:, 0].mul_(5.0)), "rows": written(lambda z, y: scaled(y), lambda z: z[:, :1]),
    "row's number": written(lambda z, y: scaled(y), lambda z: z[torch.tensor(1)]),
    "two views": written(lambda z, x, y: scaled(x), lambda z: z[:, 1:], lambda z: z[0]),
    "view of a view": written(lambda z, y: scaled(y), lambda z: z[:, 1:][0].view(2, 1, V)),
    "before": written(scaled, lambda z: z[..., :-1, :], lambda z: z[..., :5]), "mask": written(scaled, lambda z: z[MASK]),
    "copy of a mask": written(lambda z, y: scaled(y), lambda z: z[MASK]), "clone": written(scaled, lambda z: z.clone()),
    "method of a clone": written(lambda z, y: y.mul_(3.0), lambda z: z.clone()),
    "contiguous": written(lambda z, y: scaled(y), lambda z: z.contiguous()),
    "copy of a slice": written(lambda z, y: scaled(y), lambda z: z[:, :-1].contiguous()),
    "slice of one": written(lambda z, y: scaled(y), lambda z: z[:1, :-1].contiguous()),
    "logits of a copied slice": written(scaled, lambda z: z[:, :-1].contiguous().view(-1, V)),
    "copied by to": written(lambda z, y: scaled(y), lambda z: z.to(torch.float32, copy=True)),
    "entries": written(lambda z, y: operator.setitem(z, (..., slice(2)), 0.0), lambda z: z.view(-1, V)),
    "some entries": written(lambda z, y: operator.setitem(y, (..., 0), 0.0), lambda z: z[0]),
    "out": written(lambda z, y: torch.add(z, 1.0, out=z), lambda z: z[0]), "logits": written(lambda z: operator.iadd(z, z)),
    "relu": written(lambda z, y: torch.nn.functional.relu(y, inplace=True), lambda z: z[:, 1:]),
    "scaled before": lambda z: written(scaled, lambda z: z[0])(z * 2), "both": written(lambda z, y: (scaled(y), scaled(z)), lambda z: z[0]),
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


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_in_place(head, name):
    hidden = torch.randn(2, 3, D)
    with torch.no_grad():
        want = WRITTEN[name](head(hidden))
        with Deferral(head) as deferral:
            got = WRITTEN[name](head(hidden))
            assert not deferral.reason or name not in ("alias", "dtype", "bias", "divided")
            got = [x.tensor() if isinstance(x, Logits) else x for x in got]
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y)


def test_a_bias_of_all_rows_before_they_are_flattened(head):
    hidden, bias = torch.randn(2, 3, D), BIAS[None]
    with Deferral(head):
        got = (head(hidden) + bias).view(-1, V)[torch.tensor([0, 4])].softmax(-1)
    assert torch.equal(got, (head(hidden) + bias).view(-1, V)[torch.tensor([0, 4])].softmax(-1))


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


#: A loss of a head, hidden states and targets, some of it without gradients.
WITHOUT_GRADIENTS = {
    "looked at": lambda head, x, y, off: (z := head(x), off(lambda: z.argmax(-1))(), cross_entropy(z, y))[-1],
    "a view looked at": lambda head, x, y, off: (z := head(x), k := z[1:], off(lambda: k.softmax(-1))(), cross_entropy(z, y))[-1],
    "scaled": lambda head, x, y, off: (z := head(x), k := off(lambda: z * 2)(), cross_entropy(k, y) + cross_entropy(z, y))[-1],
    "cut": lambda head, x, y, off: (z := head(x), k := off(lambda: z[1:])(), cross_entropy(k, y[1:]) + x.sum())[-1],
    "in place": lambda head, x, y, off: (z := head(x), off(lambda: operator.imul(z, 2))(), cross_entropy(z, y))[-1],
    "head": lambda head, x, y, off: (z := off(lambda: head(x))(), cross_entropy(z, y) + cross_entropy(head(x), y))[-1],
    "loss": lambda head, x, y, off: (z := head(x), off(lambda: cross_entropy(z, y))() * cross_entropy(z, y))[-1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("off", "name"),
    [(torch.no_grad, name) for name in WITHOUT_GRADIENTS]
    + [(torch.inference_mode, name) for name in ("looked at", "a view looked at", "in place")],  # the others refuse it
)
def test_gradients_flow_where_they_are_switched_on(head, name, off):
    hidden, target = torch.randn(6, D, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 5])
    want = WITHOUT_GRADIENTS[name](head, hidden, target, off())
    with Deferral(head):
        got = WITHOUT_GRADIENTS[name](head, hidden, target, off())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, [hidden, *head.parameters()], allow_unused=True) for x in (got, want))
    )


def test_only_its_own_head_and_only_inside(head):
    other = torch.nn.Linear(D, V)
    watch(other)
    with Deferral(other) as outer:
        with pytest.raises(ZeroDivisionError), Deferral(head):
            assert isinstance(other(torch.randn(2, D)), torch.Tensor)
            raise ZeroDivisionError
        assert active() is outer
    assert active() is None and isinstance(head(torch.randn(2, D)), torch.Tensor)


@pytest.mark.parametrize("part", [lambda z: z, lambda z: z[:, 1:] * 2.0, lambda z: z.view(-1, V).float()])
@pytest.mark.parametrize("written", [lambda hidden: hidden, lambda hidden: hidden[0]])
def test_hidden_states_that_are_written_to_are_refused(head, part, written):
    labels = torch.zeros(6, dtype=torch.long)
    for use in (
        lambda z: z.tensor(),
        lambda z: z + 1.0,
        lambda z: cross_entropy(z.reshape(-1, V), labels[: z.shape[0]]),
        lambda z: z[0],
    ):
        hidden = torch.randn(2, 3, D)
        with Deferral(head):
            z = part(head(hidden))
            written(hidden).mul_(2.0)
            with pytest.raises(RuntimeError, match="writes to its hidden states in place"):
                use(z)


def test_a_head_without_data_has_the_loss_of_its_logits():
    """Not linear_cross_entropy, which has no kernel there."""
    head = torch.nn.Linear(D, V, device="meta")
    watch(head)
    with Deferral(head) as deferral:
        loss = cross_entropy(head(torch.empty(6, D, device="meta")), torch.empty(6, dtype=torch.long, device="meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == () and not deferral.fused and head.weight.grad.shape == (V, D)


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
