"""What a step costs its host: operations around the kernel, each of which a GPU's host must launch. Counts, not times."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fdistill_kernels as fk
from fdistill_kernels import backends, logits, tokens

N, V = 8, 64
#: What allocates, looks at a tensor from another side, or names its device launches nothing.
FREE = ("view", "select", "detach", "device", "new_empty", "empty", "scalar_tensor", "_local_scalar_dense")


class Operations(TorchDispatchMode):
    """Counts operations by name, but for those that are free."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


LOSSES = {
    "divergence": lambda s, t, y: fk.f_divergence(s, t, "js"),
    "tempered": lambda s, t, y: fk.f_divergence(s, t, "js", temperature=2.0, temperature_squared=True),
    "scaled divergence": lambda s, t, y: fk.f_divergence(s, t, "hellinger"),
    "divergence and labels": lambda s, t, y: fk.f_divergence(s, t, "js", labels=y, ce_weight=0.5),
    "three terms": lambda s, t, y: fk.f_divergence(s, t, "js", labels=y, ce_weight=0.5, z_loss=0.1, temperature=2.0),
    "cross-entropy": lambda s, t, y: fk.cross_entropy(s, y),
}
#: Of a step on a CPU, the kernel and autograd's own 1 at its end included; and of one on a GPU, without that 1.
MOST = {
    "divergence": (5, 5), "tempered": (7, 7), "scaled divergence": (5, 5), "divergence and labels": (15, 11),
    "three terms": (16, 12), "cross-entropy": (13, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_a_step_on_a_cpu(name, dtype):
    student, teacher = torch.randn(N, V).to(dtype).requires_grad_(), torch.randn(N, V).to(dtype)
    with Operations() as found:
        LOSSES[name](student, teacher, torch.randint(V, (N,))).backward()
    del found.counts["randint"]
    assert found.counts["divergence_rows"] == 1 and found.counts.total() <= MOST[name][0], found.counts


def compiled(run):
    return torch.compile(run, backend="aot_eager")(torch.randn(N, V))


def within(mode):
    def given(run):
        with mode:
            run(torch.randn(N, V))

    return given


#: Those around a call, and how often it passes through the operator.
WATCHERS = {
    "nobody": (lambda run: run(torch.randn(N, V)), 0),
    "autocast": (within(torch.autocast("cpu", torch.bfloat16)), 0),
    "inference": (within(torch.inference_mode()), 0),
    "a mode": (within(Operations()), 1), "fake tensors": (within(FakeTensorMode()), 1), "a compiler": (compiled, 1),
    "a mode of functions": (within(BaseTorchFunctionMode()), 1),
    "a transform": (lambda run: torch.func.functionalize(run)(torch.randn(N, V)), 1),
    "a subclass": (lambda run: run(torch.randn(N, V).as_subclass(Other)), 1),
}  # fmt: skip


class Other(torch.Tensor):
    """Not torch's own."""


@pytest.mark.parametrize("who", WATCHERS)
def test_the_operator_is_for_those_who_see_it(who, monkeypatch):
    by, times = WATCHERS[who]
    calls, operator = [], backends.divergence_rows_operator
    monkeypatch.setattr(backends, "divergence_rows_operator", lambda *leaves: calls.append(1) or operator(*leaves))
    by(lambda x: fk.f_divergence(x, x, "js"))
    assert len(calls) == times


class Context:
    """What autograd hands to a function: without a card it takes no tensors that claim to be on one."""

    needs_input_grad = (False, False, False, True, *[False] * 30)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_):
        pass

    def set_materialize_grads(self, _):
        pass


@pytest.mark.parametrize("name", LOSSES)
def test_operations_of_a_step_on_a_gpu(name, monkeypatch):
    """On tensors without data the kernels are not run, and nothing may wait for a value."""
    contexts, scaled = [], []

    def rows_loss(student, teacher, terms, backend, per_row, inplace, known, targets, shard):
        rows = logits._rows(student.values), teacher and logits._rows(teacher.values)
        contexts.append(Context())
        return logits._RowsLoss.forward(
            contexts[0], per_row, backend, known, *logits.flat(logits.RowCall(*rows, terms, student_gradient=True))
        )

    monkeypatch.setattr(logits, "rows_loss", rows_loss)
    monkeypatch.setattr(tokens, "graph_is_kept", lambda: False)
    monkeypatch.setattr(backends.triton, "capability", lambda device: (9, 0))
    monkeypatch.setattr(backends.triton, "scale_", lambda *arguments: scaled.append(arguments))
    monkeypatch.setattr(tokens.checks, "imagined", lambda _: False)  # as of those with data, which a kernel scales
    with FakeTensorMode(), torch.no_grad():
        student, teacher = (torch.empty(N, V, dtype=torch.bfloat16, device="cuda:0") for _ in range(2))
        labels, upstream = torch.empty(N, dtype=torch.long, device="cuda:0"), torch.empty((), device="cuda:0")
        with Operations() as found:
            LOSSES[name](student, teacher, labels)
            logits._RowsLoss.backward(contexts[0], upstream, None)
    assert len(scaled) == 1  # a launch of its own, of no operation
    assert found.counts["divergence_rows"] == 1 and found.counts.total() + 1 <= MOST[name][1], found.counts


def test_operations_of_the_labels_check_on_a_gpu():
    with FakeTensorMode(), torch.no_grad(), Operations() as found:
        labels, row_scale = torch.empty(N, dtype=torch.long, device="cuda:0"), torch.empty(N, device="cuda:0")
        backends.check_label_range(labels, row_scale, V)
    assert found.counts.total() <= 6, found.counts
