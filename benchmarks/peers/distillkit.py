"""DistillKit. Its losses of logits (batch, sequence, V) are sums over tokens; its trainer divides by their number.
kl and js are computed in the logits' dtype. If it is not installed, its definitions are written here, and named so.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import partial

import torch
from torch import Tensor

from . import Loss, Peer

FUNCTIONS = {"kl": ("kl", "dense_kl_div"), "js": ("jsd", "dense_js_div"), "tvd": ("tvd", "dense_tvd")}
INSTALLED = importlib.util.find_spec("distillkit") is not None


def summed(divergence: str) -> Loss:
    """The library's function, or the definition: KL(p ‖ q), the mean of both KLs to ½(p + q), ½ Σ|p − q|."""
    if INSTALLED:
        module, function = FUNCTIONS[divergence]
        return getattr(importlib.import_module(f"distillkit.lossfuncs.{module}"), function)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        if divergence == "tvd":
            return 0.5 * (p - q).abs().sum()
        if divergence == "kl":
            return (p * (log_p - log_q)).sum().to(student.dtype)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (0.5 * (p * (log_p - log_m) + q * (log_q - log_m))).sum().to(student.dtype)

    return loss


def mean(divergence: str) -> Loss:
    """The same as a mean over rows."""
    loss = summed(divergence)
    return lambda student, teacher: loss(student[None], teacher[None]) / len(student)


PEERS = [
    Peer("DistillKit" if INSTALLED else "DistillKit's formula", "rows", name, partial(mean, name)) for name in FUNCTIONS
]
