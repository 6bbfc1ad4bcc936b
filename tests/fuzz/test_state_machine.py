"""Losses that live together: graphs, views, copies and changes in place, in any order, each still its float64 value."""

import copy
import gc
import os
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

import fdistill_kernels as fk

from .exact import TRAINED, exact, square

N, V, D = 4, 37, 5
WHOLE = bool(os.environ.get("FDISTILL_WHOLE"))
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])
DIVERGENCES = st.sampled_from(["js", "kl", "tvd", fk.Alpha(0.3), square, fk.FDivergence(square), fk.SkewRKL(0.2)])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-5, torch.bfloat16: 3e-2}


@dataclass
class Input:
    """A tensor that is given to losses, what it must still hold, and the gradient that has been asked for."""

    tensor: Tensor
    before: Tensor
    gradient: Tensor
    dtype: torch.dtype = field(init=False)

    def __init__(self, tensor: Tensor):
        self.tensor, self.before = tensor, tensor.detach().clone()
        self.gradient, self.dtype = torch.zeros(tensor.shape).double(), tensor.dtype


@dataclass
class Live:
    """A loss with its graph, its float64 twin, and the inputs by their argument's name."""

    loss: Tensor
    twin: Tensor
    leaves: dict[str, Tensor]
    inputs: dict[str, Input]
    spent: bool = False


class Losses(RuleBasedStateMachine):
    """The tensors made so far, and the losses alive."""

    logits, hidden, heads, losses, modules = (Bundle(x) for x in ("logits", "hidden", "heads", "losses", "modules"))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs: list[Input] = []
        self.live: list[Live] = []

    def made(self, *shape: int, dtype: torch.dtype, view: bool) -> Input:
        wide = torch.randn(*shape[:-1], 2 * shape[-1] if view else shape[-1]).to(dtype)
        self.inputs.append(Input((wide[..., ::2] if view else wide).detach().requires_grad_()))
        return self.inputs[-1]

    @rule(target=logits, dtype=DTYPES, view=st.booleans())
    def make_logits(self, dtype, view):
        return self.made(N, V, dtype=dtype, view=view)

    @rule(target=hidden, view=st.booleans())
    def make_hidden(self, view):
        return self.made(N, D, dtype=torch.float32, view=view)

    @rule(target=heads, view=st.booleans())
    def make_head(self, view):
        return self.made(V, D, dtype=torch.float32, view=view)

    @rule(target=logits, of=logits)
    def make_a_view(self, of):
        """The same memory in a leaf of its own."""
        self.inputs.append(Input(of.tensor.detach().view_as(of.tensor).requires_grad_()))
        return self.inputs[-1]

    def begin(self, name: str, inputs: dict[str, Input], rest: dict[str, Any], function: Any = None):
        """Call a function, and its twin."""
        a = {**{k: x.tensor for k, x in inputs.items()}, **rest}
        want = exact(name, a)
        loss = (function or getattr(fk, name))(**a)
        trained = {k: x for k, x in inputs.items() if k in TRAINED[name]}
        self.live.append(Live(loss, want.loss, want.leaves, trained))
        return self.live[-1]

    @rule(target=losses, s=logits, t=logits, d=DIVERGENCES, reduction=REDUCTIONS, labels=st.booleans(), data=st.data())
    def f_divergence(self, s, t, d, reduction, labels, data):
        rest = {"divergence": d, "reduction": reduction} | self.labels(data, "labels" if labels else None)
        return self.begin("f_divergence", {"student_logits": s, "teacher_logits": t}, rest)

    @rule(target=losses, z=logits, reduction=REDUCTIONS, smoothing=st.sampled_from([0.0, 0.1]), data=st.data())
    def cross_entropy(self, z, reduction, smoothing, data):
        rest = {"label_smoothing": smoothing, "reduction": reduction, "z_loss": 0.01} | self.labels(data, "target")
        return self.begin("cross_entropy", {"input": z}, rest)

    @rule(target=losses, h=hidden, w=heads, t=hidden, tw=heads, d=DIVERGENCES, reduction=REDUCTIONS, data=st.data())
    def linear_f_divergence(self, h, w, t, tw, d, reduction, data):
        rest = {"teacher_hidden": t.tensor.detach(), "teacher_weight": tw.tensor, "divergence": d, "reduction": reduction,
                "chunk_bytes": data.draw(st.sampled_from([100, None]))}  # fmt: skip
        return self.begin("linear_f_divergence", {"student_hidden": h, "student_weight": w}, rest)

    @rule(target=losses, h=hidden, w=heads, reduction=REDUCTIONS, data=st.data())
    def linear_cross_entropy(self, h, w, reduction, data):
        rest = {"reduction": reduction} | self.labels(data, "target")
        return self.begin("linear_cross_entropy", {"input": h, "linear_weight": w}, rest)

    def labels(self, data: Any, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        y = torch.tensor(data.draw(st.lists(st.sampled_from([-100, 0, 5, V - 1]), min_size=N, max_size=N)))
        return {name: y, **({"ce_weight": 0.5} if name == "labels" else {})}

    @rule(target=modules, d=DIVERGENCES)
    def make_module(self, d):
        return fk.FDivergenceLoss(d, reduction="sum")

    @rule(target=modules, module=modules, how=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def copy_module(self, module, how):
        return how(module)

    @rule(target=losses, module=modules, s=logits, t=logits)
    def call_module(self, module, s, t):
        rest = {"reduction": "sum", "divergence": module.divergence}
        return self.begin("f_divergence", {"student_logits": s, "teacher_logits": t}, rest,
                          lambda student_logits, teacher_logits, **_: module(student_logits, teacher_logits))  # fmt: skip

    @rule(live=losses, keep=st.booleans(), factor=st.sampled_from([1.0, 3.0, 0.5]))
    def backward(self, live, keep, factor):
        """Gradients add up in the leaves; a graph that was not kept says so."""
        if live.spent or not live.loss.requires_grad:
            return
        live.spent = not keep
        (live.loss * factor).sum().backward(retain_graph=keep)
        gradients = torch.autograd.grad((live.twin * factor).sum(), list(live.leaves.values()), retain_graph=True)
        for k, gradient in zip(live.leaves, gradients, strict=True):
            live.inputs[k].gradient += gradient

    @rule(live=losses)
    def backward_of_a_spent_graph(self, live):
        if live.spent:
            try:
                live.loss.sum().backward()
            except RuntimeError as error:
                assert "second" in str(error) or "modified" in str(error), error
            else:
                raise AssertionError("a second backward pass through a graph that was freed")

    @rule(live=losses, factor=st.sampled_from([0.0, 2.0]))
    def change_in_place(self, live, factor):
        if not live.spent:
            live.loss *= factor
            live.twin = live.twin * factor

    @rule(s=logits, t=logits, mode=st.sampled_from([torch.no_grad, torch.inference_mode]), d=DIVERGENCES)
    def without_a_graph(self, s, t, mode, d):
        a = {"student_logits": s.tensor, "teacher_logits": t.tensor, "divergence": d}
        with mode():
            loss = fk.f_divergence(**a, inplace=s.dtype == t.dtype)  # nothing is overwritten where there is no gradient
        assert not loss.requires_grad
        self.agrees(loss, exact("f_divergence", a).loss.detach())

    @rule(threads=st.sampled_from([1, 2]))
    def change_threads(self, threads):
        torch.set_num_threads(threads)

    @rule(live=consumes(losses))
    def forget(self, live):
        self.live = [x for x in self.live if x is not live]
        del live
        gc.collect()

    @rule(target=losses, s=logits, t=logits)
    def overwrite(self, s, t):
        """In place on what a model made: gradient and value as if it were not."""
        made, teacher = (s.tensor * 1).contiguous(), t.tensor.detach().to(s.dtype)
        loss = fk.f_divergence(made, teacher, "kl", inplace=True)
        a = {"student_logits": s.tensor, "teacher_logits": teacher, "divergence": "kl"}
        want = exact("f_divergence", a)
        self.live.append(
            Live(loss, want.loss, {"student_logits": want.leaves["student_logits"]}, {"student_logits": s})
        )
        return self.live[-1]

    def agrees(self, got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
        rtol = TOLERANCE[dtype]
        torch.testing.assert_close(
            got.detach().double(), want.detach(), rtol=rtol, atol=rtol * float(want.detach().abs().max() + 1e-2)
        )

    @invariant()
    def live_losses_are_right(self):
        for live in self.live:
            self.agrees(live.loss, live.twin)

    @invariant()
    def inputs_are_unchanged(self):
        assert all(torch.equal(x.tensor, x.before) for x in self.inputs)

    @invariant()
    def gradients_add_up(self):
        for x in self.inputs:
            if x.tensor.grad is not None:
                assert x.tensor.grad.dtype == x.dtype
                self.agrees(x.tensor.grad, x.gradient, x.dtype)
            else:
                assert (x.gradient == 0).all()

    def teardown(self):
        torch.set_num_threads(1)


TestLosses = Losses.TestCase
TestLosses.settings = settings(  # shrinking takes minutes: a failure is printed as it was found
    derandomize=not WHOLE, max_examples=600 if WHOLE else 25, stateful_step_count=60 if WHOLE else 30, deadline=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
