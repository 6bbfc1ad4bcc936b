"""PyTorch: the losses as people write them, eager and compiled, and `linear_cross_entropy` in releases that have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fdistill_kernels.bench import eager_loss
from fdistill_kernels.divergences import TABLE

from . import Loss, Peer


def written(compiler: Callable[[Loss], Loss] | None, form: str, divergence: str) -> Loss:
    """The loss of logits; from hidden states, the logits are computed first."""
    of_logits: Loss = F.cross_entropy if divergence == "labels" else eager_loss(TABLE[divergence])

    def of_hidden(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor | None = None) -> Tensor:
        return of_logits(hidden @ weight.T, teacher if teacher_weight is None else teacher @ teacher_weight.T)

    loss = of_logits if form == "rows" else of_hidden
    return compiler(loss) if compiler else loss


LINEAR = ("labels", *(name for name, divergence in TABLE.items() if not divergence.needs_labels))
PEERS = [
    Peer(name, form, divergence, partial(written, compiler, form, divergence))
    for form, divergences in {"rows": (*TABLE, "labels"), "linear": LINEAR, "beside": ("kl",)}.items()
    for divergence in divergences
    for name, compiler in (("eager", None), ("torch.compile", torch.compile))
]
PEERS.append(Peer("torch.nn.functional", "linear", "labels", lambda: F.linear_cross_entropy))
