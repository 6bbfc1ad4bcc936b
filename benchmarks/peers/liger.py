"""Liger-Kernel. Its row losses take log-probabilities (kl, js) or probabilities (tvd), so the softmax is timed too, as
in a training step. "batchmean" divides their sums by the number of rows. β is the weight of the teacher: 0 is kl and
1 is rkl.

The chunked JSD compiles torch's operators, and adds a cross-entropy, whose weight is 0 here. The fused KL takes the
teacher's probabilities and clamps them at 1e-10 before the logarithm, so smaller entries have only a part of their
loss. The cosine similarity of the chunked losses is left out: it does not compare two distributions.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import Loss, Peer

BETAS = {"kl": 0.0, "js": 0.5, "rkl": 1.0}


def kl() -> Loss:
    """KL with log_target, which does not clamp."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda student, teacher: loss(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(divergence: str) -> Loss:
    """The generalised JSD of GKD."""
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(BETAS[divergence])
    return lambda student, teacher: loss(student.log_softmax(-1), teacher.log_softmax(-1))


def tvd() -> Loss:
    """TVD: half the L1 distance, like ours."""
    from liger_kernel.transformers.tvd import LigerTVDLoss

    loss = LigerTVDLoss(reduction="batchmean")
    return lambda student, teacher: loss(student.softmax(-1), teacher.softmax(-1))


def tvd_of_logits() -> Loss:
    """TVD from logits; the kernel computes a cross-entropy in the same pass, whose weight is 0 here."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    loss = LigerFusedCETVDLoss()

    def of_rows(student: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
        return loss(student, teacher, labels)[1].mean()

    return of_rows


def labels() -> Loss:
    """The cross-entropy."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def chunked(divergence: str) -> Loss:
    """The chunked JSD without its cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence])
    return lambda hidden, *rest: loss(hidden, *rest, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device))


def fused(divergence: str) -> Loss:
    """The JSD of hidden states by a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETAS[divergence])
    return lambda *inputs: loss(*inputs, None)


def fused_labels() -> Loss:
    """The fused linear cross-entropy, whose first argument is the weight."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def fused_kl() -> Loss:
    """KL to a teacher's logits; their softmax is timed with it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    loss = LigerFusedLinearKLDivLoss()

    def beside(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return loss(hidden, weight, teacher.softmax(-1))

    return beside


NAME = "liger-kernel"
PEERS = [
    Peer(NAME, "rows", "kl", kl, "card"),
    *(Peer(NAME, "rows", name, partial(jsd, name), "triton") for name in ("js", "rkl")),
    Peer(NAME, "rows", "tvd", tvd, "card"),
    Peer(f"{NAME} fused", "rows", "tvd", tvd_of_logits, "triton"),
    Peer(NAME, "rows", "labels", labels, "triton"),
    *(Peer(NAME, "linear", name, partial(chunked, name)) for name in BETAS),
    *(Peer(f"{NAME} fused", "linear", name, partial(fused, name), "triton") for name in BETAS),
    Peer(NAME, "linear", "labels", fused_labels, "triton"),
    Peer(NAME, "beside", "kl", fused_kl, "triton"),
]
