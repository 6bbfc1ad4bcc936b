"""What ranks send each other, counted; and errors that name the rank where one brings something else, dies or hangs."""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Seconds that a rank which was left alone waits to hear which others were.
PATIENCE = 60.0
#: A group's failures, of which each has its own place in the store.
_FAILURES: dict[str, Iterator[int]] = {}


class Collectives:
    """What is sent in a process group, by its name: `calls`, and `numbers` and `bytes` that this rank sends."""

    def __init__(self, group: Any):
        self.name = group
        self.group: Any = dist.distributed_c10d._resolve_process_group(group)
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.calls, self.numbers, self.bytes = 0, 0, 0

    def gathered(self, x: Tensor) -> Tensor:
        """(…) of each rank as (ranks, …)."""
        out = x.new_empty(self.ranks * x.shape[0], *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name for it
        with self._sent(x):
            gather(out, x.contiguous(), group=self.group)
        return out.view(self.ranks, *x.shape)

    def reduced(self, x: Tensor, how: Any = None) -> Tensor:
        """The sum over ranks, or another reduction."""
        x = x.contiguous()
        with self._sent(x):
            dist.all_reduce(x, dist.ReduceOp.SUM if how is None else how, group=self.group)
        return x

    def begin(self, operation: Any, x: Tensor, **rank: int) -> Any:
        """Begins an operation of torch.distributed on x, in place; `end` ends it. rank: its group_src or group_dst."""
        with self._sent(x):
            return operation(x, group=self.group, async_op=True, **rank)

    def end(self, work: Any) -> None:
        """Waits for what was begun."""
        with self._named():
            work.wait()

    def agree(self, device: torch.device, number: int | None, **things: int | bool | str) -> list[int]:
        """Every rank's number, after a look at whether all have the same things, texts by a checksum.

        number: None: a GPU is not waited for; where things differ it stops by itself.

        Raises:
            ValueError: a rank has another thing, by its number.
        """
        mine = [zlib.crc32(x.encode()) if isinstance(x, str) else int(x) for x in things.values()]
        every = self.gathered(torch.tensor([[*mine, number or 0]]).to(device))[:, 0]
        if device.type == "cuda" and number is None:
            torch._assert_async((every == every[0]).all(), "ranks of a split vocabulary made different calls")  # type: ignore[call-overload]
            return []
        first, *_ = found = every.tolist()
        for rank, theirs in enumerate(found):
            for (name, thing), one, other in zip(things.items(), first, theirs, strict=False):
                if one != other:
                    values = "" if isinstance(thing, str) else f" ({other}, and rank 0 {one})"
                    raise ValueError(f"rank {rank} of a split vocabulary brought other {name}{values} than rank 0: all "
                                     "ranks of its group must make the same call of the same rows")  # fmt: skip
        return [numbers[-1] for numbers in found]

    @contextlib.contextmanager
    def _sent(self, x: Tensor) -> Iterator[None]:
        self.calls, self.numbers = self.calls + 1, self.numbers + x.numel()
        self.bytes += x.numel() * x.element_size()
        with self._named():
            yield

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Raises RuntimeError with the numbers of the ranks that did not come to what failed."""
        try:
            yield
        except RuntimeError as error:
            missing = self._missing()
            who = (
                f"ranks {missing} of its group were not heard from" if missing else "a rank of its group came too late"
            )
            raise RuntimeError(f"a split vocabulary's loss ended on rank {self.rank}: {who} ({error})") from error

    def _missing(self) -> list[int]:
        """Ranks that did not end as this one does: each that is left alone says so in the group's store."""
        failure = next(_FAILURES.setdefault(self.name, itertools.count()))
        places = [f"fdistill_kernels/{self.name}/{failure}/{rank}" for rank in range(self.ranks)]
        left = set(range(self.ranks)) - {self.rank}
        with contextlib.suppress(RuntimeError):  # the store's own rank is gone
            store = dist.distributed_c10d._get_default_store()
            store.set(places[self.rank], "")
            until = time.monotonic() + min(PATIENCE, self._timeout() + 2)
            while left and time.monotonic() < until:
                left -= {rank for rank in left if store.check([places[rank]])}
                time.sleep(0.05)
        return sorted(left)

    def _timeout(self) -> float:
        """Seconds after which the group gives up."""
        with contextlib.suppress(RuntimeError, AttributeError):
            options = self.group._get_backend(torch.device("cpu")).options
            return float(options._timeout.total_seconds())
        return PATIENCE
