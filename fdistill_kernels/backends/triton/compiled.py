"""Launches of what Triton has compiled: to find it, Triton looks at each of the row kernel's 60 arguments anew, for
longer than the kernel itself takes for few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What Triton has made, by what it tells apart. Its interpreter makes nothing.
_COMPILED: dict[tuple[Any, ...], Any] = {}
_AMD = torch.version.hip is not None


def start(
    kernel: Any, grid: tuple[int, int], arguments: Sequence[Any], constants: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """``kernel[grid](*arguments, *constants, **options)``; the first argument is a tensor on the current device."""
    key = (kernel.fn, arguments[0].get_device(), *constants, *options.values(), *map(kind_of, arguments))
    found = _COMPILED.get(key)
    if found is None:
        _COMPILED[key] = kernel[grid](*arguments, *constants, **options)
    else:
        whole = (*grid, 1)  # of three dimensions
        found[whole](*arguments, *constants)


def kind_of(x: Any) -> Any:
    """What Triton may tell apart in an argument that is no constant: a tensor, an integer, a float or None."""
    if x is None or type(x) is float:
        return x is None
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0, _AMD and x.untyped_storage().nbytes() < 1 << 31
    return x == 1, x % 16 == 0, x < 1 << 31
