"""Log-probabilities of ids and entropies from hidden states, as policy gradients take them."""

import pytest
import torch

import fdistill_kernels as fk

from .conftest import relative

N, V, D = 7, 1503, 24
IDS = torch.tensor([0, 5, -100, 1502, 9, 77, 3])


def problem(dtype=torch.float32):
    return ((3 * torch.randn(N, D)).to(dtype).requires_grad_(), (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_(),
            torch.randn(V).to(dtype).requires_grad_())  # fmt: skip


def expected(hidden, weight, bias=None, t=1.0, scale=1.0, cap=None):
    z = scale * hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    log_q = ((z if cap is None else cap * (z / cap).tanh()) / t).log_softmax(-1)
    live = (IDS >= 0).double()
    return live * log_q.gather(1, IDS.clamp_min(0).unsqueeze(1)).squeeze(1), -live * (log_q.exp() * log_q).sum(1)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [1.0, 0.7])
def test_values_and_gradients(t, dtype, backend):
    inputs = problem(dtype)
    hidden, weight, bias = inputs
    head = fk.Head(weight, bias, 0.5, 6.0)
    got = fk.log_probs(hidden, head, IDS, entropy=True, temperature=t, chunk_bytes=12 * V, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = expected(*exact, t, 0.5, 6.0)
    loose = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    upstream = torch.randn(2, N)
    gradients = torch.autograd.grad(got, inputs, list(upstream))
    wanted = torch.autograd.grad(want, exact, list(upstream.double()))
    for g, w in zip(gradients, wanted, strict=True):
        assert g.dtype == dtype and (g.double() - w).norm() < 3 * loose * w.norm()
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32 and relative(g, w) < loose and g[2] == 0


def test_float16_logits_over_a_small_temperature(backend):
    """Beyond 65504, in float32; gradients after a scaler's factor."""
    inputs, t = problem(torch.float16), 1e-5
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (got, _), (want, _) = fk.log_probs(*inputs[:2], IDS, bias=inputs[2], entropy=True, temperature=t, backend=backend), expected(*exact, t)  # fmt: skip
    assert want.min() < -1e5 and relative(got, want) < 1e-5
    gradients, wanted = (torch.autograd.grad(1e-3 * x.sum(), of) for x, of in ((got, inputs), (want, exact)))
    assert all((g.double() - w).norm() < 2e-3 * w.norm() for g, w in zip(gradients, wanted, strict=True))


def test_one_of_the_two(backend):
    hidden, weight, _ = problem()
    alone, (both, entropies) = (fk.log_probs(hidden, weight, IDS, entropy=e, backend=backend) for e in (False, True))
    torch.testing.assert_close(alone, both)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = expected(*exact)
    for got, wanted in ((alone, want[0]), (entropies, want[1])):
        for g, w in zip(torch.autograd.grad(got.sum(), (hidden, weight), retain_graph=True),
                        torch.autograd.grad(wanted.sum(), exact, retain_graph=True), strict=True):  # fmt: skip
            assert relative(g, w) < 2e-5
    torch.testing.assert_close(entropies, fk.log_probs(hidden.detach(), weight, IDS, entropy=True, backend=backend)[1])


def test_a_sure_student_has_little_entropy_with_its_digits(backend):
    hidden = torch.tensor([[25.0, 0.0]], requires_grad=True)
    weight = torch.cat([torch.tensor([[1.0, 0.0]]), torch.randn(500, 2) * torch.tensor([0.0, 1.0])])
    _, entropy = fk.log_probs(hidden, weight, torch.tensor([0]), entropy=True, backend=backend)
    exact = hidden.detach().double().requires_grad_()
    log_q = (exact @ weight.double().T).log_softmax(1)
    want = -(log_q.exp() * log_q).sum()
    loss, gradient = (1e-4, 1e-3) if backend != "cuda" else (0.1, 0.1)  # which rounds a sum near 1
    assert relative(entropy, want) < loss
    assert relative(torch.autograd.grad(entropy.sum(), hidden)[0], torch.autograd.grad(want, exact)[0]) < gradient


def test_shapes_dtypes_and_double_precision():
    hidden, weight, bias = problem(torch.float64)
    got = fk.log_probs(hidden.view(1, N, D), weight, IDS.view(1, N), bias=bias, entropy=True)
    assert all(x.shape == (1, N) and x.dtype == torch.float64 for x in got)
    for g, w in zip(got, expected(hidden, weight, bias), strict=True):
        torch.testing.assert_close(g[0], w)
    few = IDS.clamp_min(0) % 5
    small = [torch.randn(*s).double().requires_grad_() for s in ((N, 3), (5, 3), (5,))]
    assert torch.autograd.gradcheck(
        lambda h, w, b: fk.log_probs(h, fk.Head(w, b), few, entropy=True, temperature=1.3), small
    )
    with torch.autocast("cpu", torch.bfloat16):
        hidden, weight, _ = problem()
        assert fk.log_probs(hidden, weight, IDS).dtype == torch.float32


def test_policy_gradient_step_compiles_and_fits_memory_of_chunks():
    hidden, weight, _ = problem()
    advantage = torch.randn(N)

    def step(h, w):
        found, entropies = fk.log_probs(h, w, IDS, entropy=True)
        return -(advantage * found).mean() - 0.01 * entropies.mean()

    loss, compiled = step(hidden, weight), torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)
    torch.testing.assert_close(loss, compiled)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, compiled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [(dict(ids=torch.tensor([V] * N)), r"ids must be in \[0, 1503\)"), (dict(ids=IDS.float()), "ids"), (dict(entropy=1), "entropy"),
     (dict(temperature=0.0), "temperature"), (dict(ids=IDS[:3]), "ids"), (dict(hidden=torch.randn(N, D + 1)), "hidden"),
     (dict(bias=torch.randn(3)), "bias")],
)  # fmt: skip
def test_errors(change, message):
    hidden, weight, _ = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        fk.log_probs(**{"hidden": hidden, "head": weight, "ids": IDS, **change})
