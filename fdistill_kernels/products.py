"""The three matrix products around a chunk of logits: into it, and from its gradient to hidden states and weight."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .backends import cpu
from .values import Head


class _Torch(ctypes.Structure):
    """csrc/cpu/products.cpp's: torch's C functions for compiled programs, which every version keeps."""

    NAMES = ("create_tensor_from_blob", "delete_tensor_object", "copy_", "cpu_addmm_out")
    _fields_ = [*[(name, ctypes.c_void_p) for name in NAMES], ("float32", ctypes.c_int32)]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")],
        *[(name, ctypes.c_int32) for name in ("dtype", "itemsize")],
    ]


def _find_torch() -> tuple[_Torch, dict[torch.dtype, int]] | None:
    """torch's functions and how they call the dtypes; None in a build of torch without them."""
    try:
        library: Any = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        dtypes = {dtype: getattr(library, f"aoti_torch_dtype_{str(dtype)[6:]}")() for dtype in cpu.DTYPES}
        addresses = [ctypes.cast(getattr(library, f"aoti_torch_{name}"), ctypes.c_void_p) for name in _Torch.NAMES]
    except (OSError, AttributeError):
        return None
    return _Torch(*[a.value for a in addresses], dtypes[torch.float32]), dtypes


FOUND = _find_torch() if cpu.NOT_LOADED is None else None
TILE = 1024  # csrc/cpu/products.cpp's kTile


def _native(like: Tensor) -> bool:
    return FOUND is not None and like.device.type == "cpu" and like.dtype in cpu.DTYPES and checks.has_memory(like)


def _matrix(x: Tensor | None) -> Any:
    """How products.cpp finds a matrix; a vector is every row of one."""
    assert FOUND is not None
    if x is None:
        return ctypes.byref(_Matrix(None, 0, 0, 0, 0, 0, 1))
    (rows, columns), (over, within) = (x.shape, x.stride()) if x.dim() == 2 else ((1, x.shape[0]), (0, x.stride(0)))
    return ctypes.byref(_Matrix(x.data_ptr(), rows, columns, over, within, FOUND[1][x.dtype], x.element_size()))


def _run(name: str, *arguments: Any) -> None:
    """Runs a product of products.cpp on torch's threads."""
    assert FOUND is not None
    given = [ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) if isinstance(x, int) else _matrix(x)
             for x in arguments]  # fmt: skip
    if not getattr(cpu.LIBRARY, f"fdistill_cpu_{name}")(ctypes.byref(FOUND[0]), *given, torch.get_num_threads()):
        raise RuntimeError(f"{name} did not run: torch's own message is on stderr, or there is no memory")


#: torch 2.8 and 2.9 have narrow products with a wide result, but none that adds to a wide one.
WIDE_SUM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
SLICE = 8192  # rows of the weight whose product is made aside where WIDE_SUM is not to be had


def empty(like: Tensor, *sizes: int) -> Tensor:
    """An uninitialised tensor of like's dtype and device; on the native backend in large pages."""
    return cpu.empty(like, *sizes) if _native(like) else like.new_empty(sizes)


BLOCK = 32  # entries of a row that oneDNN's narrow products take at once


def in_blocks(rows: Tensor) -> Tensor:
    """The same rows (n, any), of a narrow dtype on a CPU with zeros behind each of them to a whole number of blocks.

    oneDNN multiplies what is behind a row by 0 where AMX makes the product (oneDNN issue 5717): were that the next row
    or unwritten memory, a NaN there would be in the product.
    """
    if rows.device.type != "cpu" or rows.itemsize > 2 or rows.shape[1] % BLOCK == 0:
        return rows
    return nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))[:, : rows.shape[1]]


def logits_(hidden: Tensor, head: Head, out: Tensor) -> None:
    """``out = scale·hidden weightᵀ + bias``: (n, D) to (n, V), before any cap; computed in hidden's dtype."""
    if out.dtype != hidden.dtype:
        exact = torch.empty(out.shape, dtype=hidden.dtype, device=out.device)
        logits_(hidden, head, exact)
        out.copy_(exact)
        return
    hidden = in_blocks(hidden)
    if _native(hidden) and checks.has_memory(head.weight):
        _run("logits_product", hidden, head.weight, head.bias, float(head.scale), out)
    elif head.bias is not None:
        torch.addmm(head.bias, hidden, head.weight.t(), alpha=head.scale, out=out)
    else:  # beta 0: what is in the buffer is not read
        torch.addmm(out, hidden, head.weight.t(), beta=0, alpha=head.scale, out=out)


def logits(hidden: Tensor, head: Head) -> Tensor:
    """What `logits_` makes, as a new tensor; in a graph by operations that it can hold."""
    if checks.traced():
        bias = hidden.new_zeros(1) if head.bias is None else head.bias
        return torch.addmm(bias, in_blocks(hidden), head.weight.t(), alpha=head.scale)
    out = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
    logits_(hidden, head, out)
    return out


def hidden_gradient(gradient: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``scale·gradient weight``: (n, V), (V, D) to (n, D), in float32 where the product is summed so."""
    if _native(gradient):
        parts = max(1, min(torch.get_num_threads(), -(-weight.shape[0] // TILE)))
        sums = gradient.new_zeros(parts, gradient.shape[0], weight.shape[1], dtype=torch.float32)
        _run("hidden_gradient", gradient, weight, float(scale), sums.flatten(0, 1), parts)
        return sums.sum(0)
    product = gradient.new_empty(gradient.shape[0], weight.shape[1])
    return torch.addmm(product, in_blocks(gradient), weight, beta=0, alpha=scale, out=product)


def add_weight_gradient_(gradient: Tensor, hidden: Tensor, scale: float, keep: float, total: Tensor) -> None:
    """``total = keep·total + scale·gradientᵀ hidden``: (n, V), (n, D) into (V, D) float32; keep 0 reads no total.

    Narrow dtypes are multiplied as they are and accumulated in float32 where torch has such a product (CUDA, newer
    torch); elsewhere both are widened first, on the native backend tile by tile.
    """
    if _native(gradient):
        _run("add_weight_gradient", gradient, hidden.float(), float(scale), float(keep), total)
        return
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden, beta=keep, alpha=scale)
    elif gradient.is_cuda and torch.version.hip is None and WIDE_SUM:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, beta=keep, alpha=scale, out=total)
    elif gradient.is_cuda and torch.version.hip is None:
        _add_in_slices_(gradient, hidden, scale, keep, total)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype), beta=keep, alpha=scale)


def _add_in_slices_(gradient: Tensor, hidden: Tensor, scale: float, keep: float, total: Tensor) -> None:
    for begin in range(0, len(total), SLICE):
        rows = slice(begin, begin + SLICE)
        product = torch.mm(gradient[:, rows].t(), hidden, out_dtype=total.dtype)
        if keep:
            total[rows].mul_(keep).add_(product, alpha=scale)
        else:
            torch.mul(product, scale, out=total[rows])
