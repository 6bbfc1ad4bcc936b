"""Times a loss, forward and backward, beside the memory floor and the plain PyTorch that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import backends
from .backends.rows import gpu_symbol
from .divergences import Divergence
from .functional import f_divergence
from .reference import example_labels, f_divergence_rows


@dataclass(frozen=True)
class Timing:
    """The median seconds of one forward and backward pass of `what`, and of the floor (see `floor_seconds`)."""

    what: str
    seconds: float
    floor: float


def median_seconds(call: Callable[[], object], min_run_time: float = 1.0) -> float:
    """The median time of a call in seconds, after a warm-up, with as many threads as torch is set to use."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def floor_seconds(like: Tensor, min_run_time: float = 0.5) -> float:
    """The seconds to read two matrices of this size and write one, at the measured rate of a copy (two passes)."""
    target = torch.empty_like(like)
    return 1.5 * median_seconds(lambda: target.copy_(like), min_run_time)


def make_logits(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random student logits (N, V), which require grad, and teacher logits (N, V)."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def training_step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Callable[[], None]:
    """A function without arguments that runs the loss forward and backward, into a new gradient."""

    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return step


def our_loss(divergence: Divergence, backend: str = "auto") -> Callable[[Tensor, Tensor], Tensor]:
    """The fused loss of a pair of logits; a divergence that needs labels gets example labels."""
    return lambda s, t: f_divergence(s, t, divergence, labels=example_labels(divergence, s), backend=backend)


def eager_loss(divergence: Divergence) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss in plain PyTorch: kl, js and tvd as people write them, and the others as the reference does."""

    def js(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)).mean()

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def tvd(student: Tensor, teacher: Tensor) -> Tensor:
        return 0.5 * (student.float().softmax(-1) - teacher.float().softmax(-1)).abs().sum(-1).mean()

    written = {"js": js, "kl": kl, "tvd": tvd}
    if divergence.name in written:
        return written[divergence.name]
    return lambda s, t: f_divergence_rows(s.float(), t.float(), divergence, labels=example_labels(divergence, s)).mean()


def tune(divergence: Divergence, shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[tuple[Any, float]]:
    """Times every launch that the Triton backend could use for a shape (N, V), and saves the fastest.

    Later processes use the saved launch.

    Returns:
        All launches with their seconds, the fastest first.

    Raises:
        ValueError: the Triton backend cannot run there.
    """
    from .backends.triton import launch

    backends.choose("triton", torch.device(device), dtype, divergence)
    student, teacher = make_logits(shape, dtype, device)
    card = launch.device_of(student.device)
    step = training_step(our_loss(divergence, "triton"), student, teacher)
    timed = []
    for candidate in launch.candidates(*shape, dtype.itemsize, card):
        with launch.forced(candidate):
            timed.append((candidate, median_seconds(step, 0.1)))
    timed.sort(key=lambda pair: pair[1])
    launch.remember(timed[0][0], card, gpu_symbol(divergence), shape[1], dtype.itemsize)
    return timed


def measure(
    divergence: Divergence, shape: tuple[int, int], dtype: torch.dtype, device: str, backend: str, compiled: bool
) -> list[Timing]:
    """Times our loss, the eager one, and with `compiled` also torch.compile's, on the same logits."""
    student, teacher = make_logits(shape, dtype, device)
    floor = floor_seconds(teacher)
    eager = eager_loss(divergence)
    calls = {"fdistill": our_loss(divergence, backend), "eager": eager}
    if compiled:
        calls["torch.compile"] = torch.compile(eager)
    return [Timing(w, median_seconds(training_step(call, student, teacher)), floor) for w, call in calls.items()]
