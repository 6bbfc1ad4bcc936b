"""The native CPU backend: row kernels of csrc/cpu, built for AVX2 and AVX-512 and chosen at run time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..divergences import Divergence
from .rows import RowCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Loads the extension; the reason when it cannot be."""
    library = next(Path(__file__).parent.parent.glob("_native*.so"), None)
    if library is None:
        return "the native extension is not built (it needs a C++ compiler at install time)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the native extension does not load with torch {torch.__version__}: {error}"
    return None


NOT_LOADED = _load()


def capability() -> str:
    """The instruction set the kernels run with: DEFAULT, AVX2 or AVX512."""
    return torch.ops.fdistill_native.capability()


def why_not(device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str | None:
    """The reason this backend cannot take a call, or None."""
    if device.type != "cpu":
        return f"the logits are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16 logits, not {dtype}"
    if divergence is not None and divergence.kernel is None:
        return f"{divergence} is a user's own generator, which only the torch backend runs"
    return NOT_LOADED


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`."""
    divergence = call.divergence
    scale = call.divergence_scale * divergence.scale if divergence else call.divergence_scale
    return torch.ops.fdistill_native.divergence_rows(
        call.student, call.teacher, call.row_scale, call.student_inverse_temperature, call.teacher_inverse_temperature,
        scale, call.cross_entropy_scale, call.z_loss_scale, call.labels, call.class_weight,
        (divergence.kernel or "") if divergence else "", divergence.parameter if divergence else 0.0,
        call.label_smoothing, call.student_gradient, call.teacher_gradient, call.inplace,
        call.student_softcap, call.teacher_softcap,
    )  # fmt: skip
