"""Calls whose tensors have no values: fake ones, as memory is estimated with, and those of a graph that is recorded."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fdistill_kernels as fk
from fdistill_kernels import tokens

from .test_triton import own_pearson

N, V, D = 6, 40, 5


def own(t):
    return t * t.log()


LOSSES = {
    "js": lambda s, t, y: fk.f_divergence(s, t, "js"),
    "labels": lambda s, t, y: fk.f_divergence(s, t, "tvd", labels=y, ce_weight=0.5, z_loss=0.1),
    "cross-entropy": lambda s, t, y: fk.cross_entropy(s, y),
    "class weights": lambda s, t, y: fk.cross_entropy(s, y, weight=t[0].exp(), label_smoothing=0.1),
    "probabilities": lambda s, t, y: fk.cross_entropy(s, t.softmax(-1)),
    "in place": lambda s, t, y: fk.cross_entropy(s * 1, y, inplace=True) * 3,
    "a factor": lambda s, t, y: fk.f_divergence(s, t, "kl") * t[0, 0],
    "16 bits": lambda s, t, y: fk.cross_entropy(s.bfloat16(), y) * 3,
    "temperatures": lambda s, t, y: fk.f_divergence(s, t, "js", temperature=t[:, 0].exp()),
    "items": lambda s, t, y: fk.f_divergence(s, t, "js", labels=y, num_items=(y >= 0).sum()),
    "parts": lambda s, t, y: sum(x.sum() for x in fk.f_divergence(s, t, "dkd", labels=y, return_parts="metrics")[:1]),
    "a list": lambda s, t, y: fk.f_divergence(s, fk.top_k_of(t, 4), "js"),
    "an own divergence": lambda s, t, y: fk.f_divergence(s, t, own),
    "an own divergence and labels": lambda s, t, y: fk.f_divergence(s, t, own, labels=y, ce_weight=1.0),
    "an own divergence of a list": lambda s, t, y: fk.f_divergence(s, fk.top_k_of(t, 4), own),
    "log_sum_exp": lambda s, t, y: fk.log_sum_exp(s).sum(),
    "hidden states": lambda s, t, y: fk.linear_f_divergence(s[:, :D], s.T[:, :D], t[:, :D], t.T[:, :D], "js", labels=y),
    "hidden states and labels": lambda s, t, y: fk.linear_cross_entropy(s[:, :D], s.T[:, :D], y),
    "hidden states and a list": lambda s, t, y: fk.linear_f_divergence(
        s[:, :D], s.T[:, :D], fk.top_k_of(t, 4), divergence="js"
    ),
}  # fmt: skip


def arguments(seed):
    """Logits, and labels of which others are masked for each seed."""
    torch.manual_seed(seed)
    labels = torch.randint(V, (N,)).masked_fill(torch.arange(N) % 3 == seed % 3, -100)
    return torch.randn(N, V), torch.randn(N, V), labels


def step(loss):
    """Loss and gradient."""

    def run(student, teacher, labels):
        student = student.detach().requires_grad_()
        value = loss(student, teacher, labels)
        return value.detach(), *torch.autograd.grad(value, student)

    return run


@pytest.mark.parametrize("name", LOSSES)
def test_fake_tensors(name):
    real = step(LOSSES[name])(*arguments(0))
    mode = FakeTensorMode()
    given = [mode.from_tensor(x) for x in arguments(0)]
    with mode:
        fake = step(LOSSES[name])(*given)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "real") for name in LOSSES), *((name, "symbolic") for name in ("labels", "hidden states and labels"))],
)
def test_a_recorded_step_is_right_for_other_values(name, mode):
    run = step(LOSSES[name])
    graph = make_fx(run, tracing_mode=mode)(*arguments(0))
    for found, wanted in zip(graph(*arguments(1)), run(*arguments(1)), strict=True):
        # in a graph a factor of 3 rounds bfloat16 a second time
        torch.testing.assert_close(found, wanted, rtol=8e-3 if name == "16 bits" else 1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [
    lambda s, t: fk.f_divergence(s, t), lambda s, t: fk.f_divergence(s, t, reduction="batchmean"),
    lambda s, t: fk.f_divergence(s, fk.top_k_of(t, 4), num_items=s.shape[0] + 1),
    lambda s, t: fk.f_divergence(s, t, temperature=s.shape[0], temperature_squared=True, divergence_weight=s.shape[1]),
    lambda s, t: fk.linear_f_divergence(s[:, :D], s.T[:, :D], t[:, :D], t.T[:, :D], vocab_size=s.shape[1] - 1),
])  # fmt: skip
def test_what_is_recorded_with_symbols_is_right_for_other_sizes(loss):
    """The number of tokens was written into the graph."""
    graph = make_fx(loss, tracing_mode="symbolic")(*arguments(0)[:2])
    student, teacher = torch.randn(N + 5, V + 3), torch.randn(N + 5, V + 3)
    torch.testing.assert_close(graph(student, teacher), loss(student, teacher))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "an own divergence of a list"])  # torch's refusal
def test_a_traced_loss_is_right_for_other_values(name):
    loss = torch.jit.trace(LOSSES[name], arguments(0), check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(loss(*arguments(1)), LOSSES[name](*arguments(1)), rtol=1e-5, atol=1e-6)


def terms(p, q, log_p, log_q, _):
    return q * (1 - (p / q) ** 2), 2 * p * (p / q - 1)


#: What is no operator's, by the argument that says so.
BESIDE_OPERATORS = [
    ("teacher_hidden", lambda s, t: fk.linear_f_divergence(s[:, :D], s.T[:, :D], lambda begin, end: t[begin:end])),
    ("divergence", lambda s, t: fk.linear_f_divergence(s[:, :D], s.T[:, :D], t, divergence=own)),
    ("divergence", lambda s, t: fk.f_divergence(s, t, fk.Divergence("", terms, triton=own_pearson), backend="triton")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [make_fx, lambda loss: lambda *given: torch.jit.trace(loss, given)])
def test_what_a_recorded_graph_would_lack_is_refused(record):
    student, teacher, _ = arguments(0)
    for name, loss in BESIDE_OPERATORS:
        assert loss(student, teacher).isfinite()
        with pytest.raises(ValueError, match=rf"^{name}, .* is in no graph that"):
            record(loss)(student[:], teacher)


def test_an_own_divergence_of_a_list_is_in_no_exported_program():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return fk.f_divergence(student, fk.top_k_of(teacher, 4), own)

    with pytest.raises(ValueError, match="with a kernel or beside a list"):
        torch.export.export(Loss(), arguments(0)[:2], strict=False)


def test_a_kernel_of_one_s_own_breaks_a_compiler_s_graph_and_is_right():
    student, teacher, _ = arguments(0)
    _, loss = BESIDE_OPERATORS[-1]
    found = []
    for run in (loss, torch.compile(loss, backend="eager")):
        x = student.clone().requires_grad_()
        found.append(torch.autograd.grad(run(x, teacher), x))
    torch.testing.assert_close(*found)


def test_a_gradient_without_values_is_scaled_by_an_operator(monkeypatch):
    monkeypatch.setattr(tokens, "graph_is_kept", lambda: False)
    monkeypatch.setattr(tokens.backends.triton, "why_not", lambda *_: None)
    with FakeTensorMode():
        gradient, factor = torch.empty(2, 3, V, device="cuda"), torch.empty((), device="cuda")
        assert tokens.scaled(gradient, factor, None) is gradient  # no kernel was started
