"""The losses people use today, each as a function of (student_logits, teacher_logits); those installed are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill_kernels.bench import eager_loss
from fdistill_kernels.divergences import TABLE


def row_losses(name: str) -> dict[str, object]:
    """Every installed peer's loss for kl, js, tvd or cross-entropy, from logits."""
    eager = eager_loss(TABLE[name])
    peers = {"eager": eager, "torch.compile": torch.compile(eager)}
    try:
        from liger_kernel.transformers.jsd import LigerJSD
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss
        from liger_kernel.transformers.tvd import LigerTVDLoss
    except ImportError:
        return peers
    kl, js, tvd = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD(0.5), LigerTVDLoss()

    def liger(student: Tensor, teacher: Tensor) -> Tensor:
        if name == "tvd":
            return tvd(student.softmax(-1), teacher.softmax(-1))
        return (kl if name == "kl" else js)(student.log_softmax(-1), teacher.log_softmax(-1))

    return {**peers, "liger-kernel": liger} if name in ("kl", "js", "tvd") else peers
