"""TRL: the chunked divergence of its distillation trainer, which returns a loss for each row, and the generalised JSD
of its GKD trainer, whose "batchmean" divides by the first dimension. β is the weight of the teacher: 0 is kl, 1 is rkl.

If TRL is not installed, the latter is written here from its definition (Agarwal et al. 2024, eq. 1), and named so.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import partial

import torch
from torch import Tensor

from . import Loss, Peer

BETAS = {"kl": 0.0, "js": 0.5, "rkl": 1.0}
INSTALLED = importlib.util.find_spec("trl") is not None


def chunked(divergence: str) -> Loss:
    """The loss of both models' hidden states and weights."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        of_rows = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher, teacher_weight, None, BETAS[divergence]
        )
        return of_rows[0].mean()

    return loss


def jsd(divergence: str) -> Loss:
    """The trainer's function of logits, which different releases keep in different places."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer
    return partial(GKDTrainer.generalized_jsd_loss, beta=BETAS[divergence])


def formula(divergence: str) -> Loss:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, and KL(p ‖ q), KL(q ‖ p) at the ends."""
    beta = BETAS[divergence]

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1).mean()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        if beta in (0, 1):
            return kl(log_q, log_p) if beta else kl(log_p, log_q)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    return loss


PEERS = [
    *(Peer("trl", "linear", name, partial(chunked, name)) for name in BETAS),
    *(Peer("trl" if INSTALLED else "trl's formula", "rows", name,
           partial(jsd if INSTALLED else formula, name)) for name in BETAS),
]  # fmt: skip
