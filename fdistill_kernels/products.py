"""The three matrix products around a chunk of logits: into it, and from its gradient to hidden states and weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import cpu


def _native(like: Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype in cpu.DTYPES and cpu.NOT_LOADED is None


def empty(like: Tensor, *sizes: int) -> Tensor:
    """An uninitialised tensor of like's dtype and device; on the native backend in large pages, which fault less."""
    if _native(like):
        return torch.ops.fdistill_native.empty_in_large_pages(like, sizes)
    return like.new_empty(sizes)


def logits_(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """``out = scale·hidden weightᵀ + bias``: (n, D), (V, D), (V) to (n, V); computed in hidden's dtype."""
    if out.dtype != hidden.dtype:
        exact = torch.empty(out.shape, dtype=hidden.dtype, device=out.device)
        logits_(hidden, weight, bias, scale, exact)
        out.copy_(exact)
    elif _native(hidden):
        torch.ops.fdistill_native.logits_product_(hidden, weight, bias, scale, out)
    elif bias is not None:
        torch.addmm(bias, hidden, weight.t(), alpha=scale, out=out)
    else:
        torch.mm(hidden, weight.t(), out=out)
        if scale != 1:
            out.mul_(scale)


def hidden_gradient(gradient: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``scale·gradient weight``: (n, V), (V, D) to (n, D), in float32 where the product is summed so."""
    if _native(gradient):
        return torch.ops.fdistill_native.hidden_gradient(gradient, weight, scale)
    product = torch.mm(gradient, weight)
    return product.mul_(scale) if scale != 1 else product


def add_weight_gradient_(gradient: Tensor, hidden: Tensor, scale: float, keep: float, total: Tensor) -> None:
    """``total = keep·total + scale·gradientᵀ hidden``: (n, V), (n, D) into (V, D) float32; keep 0 reads no total.

    Narrow dtypes are multiplied as they are and accumulated in float32 where torch has such a product (CUDA, newer
    torch); elsewhere both are widened first, on the native backend tile by tile.
    """
    if _native(gradient):
        torch.ops.fdistill_native.add_weight_gradient_(gradient, hidden, scale, keep, total)
        return
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden, beta=keep, alpha=scale)
    elif gradient.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, beta=keep, alpha=scale, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype), beta=keep, alpha=scale)
