"""The losses people use today, each as a function of (student_logits, teacher_logits); those installed are measured."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fdistill_kernels.bench import eager_loss
from fdistill_kernels.divergences import TABLE


def labels_of(logits: Tensor) -> Tensor:
    """The same labels for everyone."""
    return torch.arange(logits.shape[0], device=logits.device) % logits.shape[1]


def label_losses() -> dict[str, object]:
    """Every installed peer's cross-entropy to labels, from logits; the second argument is not looked at."""
    plain = torch.nn.functional.cross_entropy
    found = {"eager": plain, "torch.compile": torch.compile(plain)}
    with contextlib.suppress(ImportError, RuntimeError):  # the latter from a part of cutlass that is not there
        from quack import cross_entropy as quack

        found["quack"] = quack
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        found["liger-kernel"] = LigerCrossEntropyLoss()
    return {name: lambda z, _, loss=loss: loss(z, labels_of(z)) for name, loss in found.items()}


def row_losses(name: str) -> dict[str, object]:
    """Every installed peer's loss for kl, js, tvd or labels, from logits."""
    if name == "labels":
        return label_losses()
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


def linear_losses(name: str = "js") -> dict[str, object]:
    """Every installed peer's js or kl of (student_hidden, student_weight, teacher_hidden, teacher_weight)."""
    peers: dict[str, object] = {}
    beta = 0.5 if name == "js" else 0.0  # liger's and trl's limit for teacher ‖ student
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

        def liger_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
            labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
            return liger(hidden, weight, teacher, teacher_weight, labels)

        peers["liger-kernel"] = liger_loss
        if torch.cuda.is_available():  # its Triton kernel, beside the compiled chunks above
            from liger_kernel.transformers import LigerFusedLinearJSD

            fused = LigerFusedLinearJSD(jsd_beta=beta)
            peers["liger-kernel fused"] = lambda hidden, weight, teacher, teacher_weight: fused(
                hidden, weight, teacher, teacher_weight, None
            )
    except ImportError:
        pass
    try:
        import orda_kernel

        orda_options = {"kl_divergence": "skew_js", "kl_alpha": 0.5} if name == "js" else {"kl_divergence": "forward"}

        def orda_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
            labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
            teacher_model = orda_kernel.SeparateTeacher(teacher, teacher_weight)
            output = orda_kernel.distillation_loss(
                hidden, weight, labels, teacher=teacher_model, student_ce_weight=0.0, teacher_ce_weight=0.0,
                kl_weight=1.0, **orda_options,
            )  # fmt: skip
            return output.loss

        peers["orda-kernel"] = orda_loss
    except ImportError:
        pass
    with contextlib.suppress(ImportError):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
            return ChunkedDivergenceFunction.apply(
                hidden, weight, None, teacher, teacher_weight, None, beta
            )[0].mean()  # fmt: skip

        peers["trl"] = trl_loss
    return peers
