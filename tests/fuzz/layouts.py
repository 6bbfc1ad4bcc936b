"""Where a tensor may lie: any strides and offsets, rows that overlap, another storage's memory.

Each lies in a larger buffer of NaN or absurd integers, so that what is read beyond it shows in the value, and what is
written beyond it in the buffer.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 17, 63, 64, 65, 300, 2047, 2048, 2049, 4999)


class Draw(random.Random):
    """The choices of one call, and the buffers its tensors lie in."""

    backend: str | None = None  #: of all calls, instead of one at random

    def __new__(cls, *_: int) -> "Draw":
        return super().__new__(cls)  # which takes one argument before Python 3.11

    def __init__(self, seed: int, index: int):
        super().__init__(f"{seed}/{index}")
        torch.manual_seed(self.getrandbits(60))
        torch.set_num_threads(self.choice([1, 1, 2]))
        self.buffers: list[Tensor] = []
        self.said = ""
        self.strange = False  # arguments that may not fit
        self.wild = False  # values at which float32 is at its end

    def maybe(self, probability: float) -> bool:
        return self.random() < probability

    def one_of(self, *backends: str) -> str:
        """A backend."""
        drawn = self.choice(backends)
        return self.backend or drawn

    def sizes(self) -> tuple[tuple[int, ...], int]:
        """Leading shape and vocabulary."""
        v = self.choice(SIZES)
        leads = [(), (1,), (2,), (5,), (17,), (65,), (2, 3), (3, 1, 2), (0,), (2, 0)]
        return self.choice([lead for lead in leads if math.prod(lead) * v <= 10000]), v

    def say(self, name: str, a: dict[str, Any]) -> None:
        """What is called, kept for a failure."""
        self.said = "\n".join([name, *(f"    {k} = {shown(x)}" for k, x in a.items())])

    def place(self, values: Tensor) -> Tensor:
        """The values, or such as a layout makes of them, somewhere in a buffer."""
        layout = self.choice([plain, plain, transposed, sliced, stepped, shifted, expanded, windows, foreign])
        buffer, view = layout(self, values)
        self.buffers.append(buffer)
        return view


def shown(x: Any) -> str:
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return "".join(f"\n        {k} = {shown(field)}" for k, field in x._asdict().items())
    if not isinstance(x, Tensor):
        return repr(x)
    if x.layout != torch.strided:
        return f"{x.layout} {x.dtype} {tuple(x.shape)}"
    return f"{x.device} {x.dtype} {tuple(x.shape)} strides {x.stride()} offset {x.storage_offset()}"


def poison(values: Tensor, *shape: int) -> Tensor:
    bad = (
        float("nan")
        if values.is_floating_point()
        else 1
        if values.dtype == torch.bool
        else torch.iinfo(values.dtype).max
    )
    return torch.full(shape, bad, dtype=values.dtype)


def plain(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    buffer = values.clone()
    return buffer, buffer.view(values.shape)


def transposed(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    order = draw.sample(range(values.dim()), values.dim())
    buffer = values.permute(order).contiguous()
    return buffer, buffer.permute([order.index(i) for i in range(values.dim())])


def sliced(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    before = [draw.randint(0, 3) for _ in values.shape]
    buffer = poison(values, *(n + b + draw.randint(0, 3) for n, b in zip(values.shape, before, strict=True)))
    view = buffer[tuple(slice(b, b + n) for n, b in zip(values.shape, before, strict=True))]
    view.copy_(values)
    return buffer, view


def stepped(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    at = draw.randrange(max(1, values.dim()))
    buffer = poison(values, *(2 * n + 1 if i == at else n for i, n in enumerate(values.shape)))
    view = buffer[tuple(slice(1, None, 2) if i == at else slice(None) for i in range(values.dim()))]
    view.copy_(values)
    return buffer, view


def shifted(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    odd = 2 * draw.randint(0, 8) + 1
    buffer = poison(values, values.numel() + odd + draw.randint(0, 3))
    view = buffer[odd : odd + values.numel()].view(values.shape)
    view.copy_(values)
    return buffer, view


def expanded(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    some = [i for i, n in enumerate(values.shape) if n > 1]
    if not some:
        return shifted(draw, values)
    buffer, view = shifted(draw, values.narrow(draw.choice(some), 0, 1))
    return buffer, view.expand(values.shape)


def windows(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that overlap."""
    if values.dim() < 2 or not values.numel():
        return shifted(draw, values)
    buffer, flat = shifted(draw, values.reshape(-1))
    step = draw.choice([1, max(1, values.shape[-1] - 1), values.shape[-1]])
    strides = [*(step for _ in values.shape[:-1]), 1]
    return buffer, flat.as_strided(values.shape, strides)


def foreign(draw: Draw, values: Tensor) -> tuple[Tensor, Tensor]:
    """Memory that another storage owns."""
    buffer, view = shifted(draw, values)
    return buffer, torch.from_dlpack(view)
