"""Compares a peer's loss with ours: first whether it is the same loss, then errors, time and memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fdistill_kernels.bench import median_seconds
from fdistill_kernels.divergences import Divergence

from . import FORMS, Loss, Peer, found, ours, truth

#: The losses that are compared by default.
DIVERGENCES = ("kl", "rkl", "js", "tvd", "lk", "labels")
DEPTH = 64
#: The standard deviations of the logits at which errors are measured, and the number of rows.
SCALES = (1.0, 4.0, 15.0, 30.0)
FEW = 8
#: The largest error, at scale 1, of a loss that is the same: a softmax in a narrow dtype costs a digit or two, another
#: scale, reduction or divergence costs all of them. Errors are relative to the loss, or to a gradient's largest entry.
SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
Step = Callable[[], None]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr when it starts and stops


def inputs(form: str, divergence: str | Divergence, shape: tuple[int, int], dtype: torch.dtype, device: str,
           scale: float = 1.0, depth: int = DEPTH) -> tuple[Tensor, ...]:  # fmt: skip
    """Random inputs of a form, whose logits have a standard deviation of `scale`; the student's require grad.

    Hidden states have `depth` features.
    """
    torch.manual_seed(0)
    (n, v), d = shape, depth
    sizes = {"student_logits": (n, v), "teacher_logits": (n, v), "hidden": (n, d), "weight": (v, d),
             "teacher_hidden": (n, d), "teacher_weight": (v, d)}  # fmt: skip
    made = []
    for name in FORMS[form]:
        factor = scale if "logits" in name else scale / d**0.5 if "weight" in name else 1.0
        made.append((factor * torch.randn(sizes[name])).to(device, dtype))
        made[-1].requires_grad_(name in ("student_logits", "hidden", "weight"))
    if divergence == "labels":
        made[1 if form == "rows" else 2 :] = [(torch.arange(n) % v).to(device)]
    return tuple(made)


def results(loss: Loss, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss and the gradients of the inputs that require grad, converted to float64."""
    trained = [x for x in given if x.requires_grad]
    value = loss(*given)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, trained))]


def errors(loss: Loss, wanted: list[Tensor], given: tuple[Tensor, ...]) -> tuple[float, float]:
    """The relative error of the loss, and the largest error of a gradient relative to that gradient's largest entry."""
    sizes = [_relative(x, y) for x, y in zip(results(loss, given), wanted, strict=True)]
    return sizes[0], max(sizes[1:])


def _relative(got: Tensor, wanted: Tensor) -> float:
    """The largest distance over the largest entry: 0 of equal ones, infinite where one is NaN."""
    distance = (got - wanted).abs().max()
    return 0.0 if distance == 0 else float((distance / wanted.abs().max()).nan_to_num(torch.inf))


def exact(loss: Loss, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The `results` of a loss, computed in float64 from the same inputs."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given]
    return results(loss, tuple(wide))


def peak_bytes(step: Step, device: str) -> int:
    """The peak of torch's allocator during a call, in bytes above its state before the call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@dataclass(frozen=True)
class Compared:
    """A comparison with the definition: a peer's errors and ours (of loss and gradients), or why there are none."""

    what: str
    form: str
    divergence: str
    call: str
    error: tuple[float, float] | None
    ours: tuple[float, float] | None
    reason: str | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the peer computes the same loss, or cannot run here."""
        return self.error is None or max(self.error) <= self.tolerance


def compare(peer: Peer, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> Compared:
    """Compares a peer with the definition. If a peer that could be imported fails, its errors are infinite."""
    torch._dynamo.reset()  # after eight graphs of one function, torch.compile would leave the next ones to eager
    error, our_error, reason = None, None, peer.why_not(device)
    if reason is None:
        given = inputs(peer.form, peer.divergence, shape, dtype, device)
        wanted = exact(truth(peer.form, peer.divergence), given)
        our_error = errors(ours(peer.form, peer.divergence), wanted, given)
        try:
            error = errors(peer.loss, wanted, given)
        except Exception as failure:  # another library's code, when it is first called
            error, reason = (torch.inf, torch.inf), f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
    return Compared(peer.name, peer.form, peer.divergence, peer.call, error, our_error, reason, SAME[dtype])


def measured(form: str, divergence: str | Divergence, loss: Loss, shape: tuple[int, int], dtype: torch.dtype,
             device: str, seconds: float, depth: int = DEPTH) -> dict[str, Any]:  # fmt: skip
    """The median `seconds` of a forward and backward pass, timed for about `seconds`, and its `peak_bytes`.

    `gradient_bytes` of them are the gradients' own.
    """
    given = inputs(form, divergence, shape, dtype, device, depth=depth)

    def step() -> None:
        for x in given:
            x.grad = None
        loss(*given).backward()

    step()
    for x in given:
        x.grad = None
    peak, held = peak_bytes(step, device), sum(x.nbytes for x in given if x.requires_grad)
    return {"peak_bytes": peak, "gradient_bytes": held, "seconds": median_seconds(step, seconds)}


def errors_by_scale(form: str, divergence: str | Divergence, losses: dict[str, Loss], shape: tuple[int, int],
                    dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields `loss_error` and `gradient_error` of each loss at each of `SCALES`, on at most FEW rows.

    Of models that hardly overlap, the definition's gradient is lost in float64, too. The exact one is of the torch
    backend's formulas, which tests compare with 60 digits.
    """
    truest = truth(form, divergence, ours("rows", divergence, "torch"))
    for scale in SCALES:
        given = inputs(form, divergence, (min(FEW, shape[0]), shape[1]), dtype, device, scale)
        wanted = exact(truest, given)
        for what, loss in losses.items():
            of_loss, of_gradient = errors(loss, wanted, given)
            yield {"what": what, "scale": scale, "loss_error": of_loss, "gradient_error": of_gradient}


def losses(form: str, divergence: str | Divergence, device: str, dtype: torch.dtype, backend: str = "auto",
           compiled: bool = True) -> tuple[dict[str, Loss], list[dict[str, str]]]:  # fmt: skip
    """Our loss and those of the peers that compute the same and can be timed here; the others, each with `why` not."""
    chosen, left_out = {"fdistill": ours(form, divergence, backend)}, []
    for peer in found(form, divergence):
        if peer.name == "torch.compile" and not compiled:
            continue
        beside = compare(peer, device, dtype, (4, 300))
        why = None if beside.ok else f"another loss: errors {beside.error}"
        if why := beside.reason or why or peer.why_not_timed(device):
            left_out.append({"what": peer.name, "form": form, "divergence": peer.divergence, "why": why})
        else:
            chosen[peer.name] = peer.loss
    return chosen, left_out
