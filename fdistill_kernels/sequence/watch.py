"""What a training step shows while it runs: both models' distributions, each half's loss, and where the time goes."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..values import Metrics, SparseParts

#: Of a loss's parts, those that are logged.
OF_ROWS = ("student_entropy", "teacher_entropy", "agreement", "overlap")
OF_LISTS = ("teacher_mass", "student_mass", "overlap")


def wide(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device, for sums."""
    return torch.float32 if device.type == "mps" else torch.float64


class Watch(TrainerCallback):
    """Sums since the last log line. Nothing waits for a GPU until they are asked for. sources: of the objective's
    halves, whose losses are logged each. lists: whether the teacher is lists, of which there are no entropies.
    """

    def __init__(self, sources: list[str], lists: bool, device: torch.device):
        self.sources, self.parts, self.device = sources, OF_LISTS if lists else OF_ROWS, device
        self.ever = torch.zeros(2, dtype=wide(device), device=device)  # as `steps`, but since training began
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        # of each source: the loss, and its share of updates, as in `Trainer`'s; tokens beside a teacher, their parts
        self.sums = torch.zeros(len(self.sources), 3 + len(self.parts), dtype=wide(self.device), device=self.device)
        self.steps = torch.zeros_like(self.ever)  # all, and those of which batches count
        self.tokens = self.skipped = 0  # tokens of batches that count, and batches that do not
        self.times: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.begin = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        self.reset()
        self.ever.zero_()

    def passed(self, share: Tensor, counts: bool) -> None:
        """A batch, which is such a share of its step."""
        found = torch.stack([share, share * counts]).to(self.ever)
        self.steps += found
        self.ever += found

    def of_counted(self, mean: float, steps: Tensor, accelerator: Any) -> float:
        """A mean loss over steps, where what does not count is 0, as one over what counts: NaN if that is nothing. Over
        ranks, too: at the end of training `Trainer` adds to the logged ones what this rank alone has had since.
        """
        every, counted, mean = accelerator.reduce(torch.cat([steps, steps.new_tensor([mean])]), "mean").tolist()
        return mean if counted == every else mean * every / counted if counted else math.nan

    def add(self, source: str, loss: Tensor, parts: Metrics | SparseParts | None, items: Any, share: Tensor,
            count: int, tokens: int) -> None:  # fmt: skip
        """One half's loss of a batch of so many tokens, one of `count` in its update; its parts sum over `items`."""
        found = self.sums[self.sources.index(source)]
        found[:2] += torch.stack([loss.detach().to(found) / count, share])
        self.tokens += tokens
        if parts is not None:
            of_rows = torch.stack([getattr(parts, name) for name in self.parts]).to(found) * items
            found[2:] += torch.cat([found.new_tensor([tokens]), of_rows])

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts what is done inside as `name`'s time."""
        begin = self._now()
        try:
            yield
        finally:
            self.times[name].append((begin, self._now()))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is no training; one may be inside another."""
        before, times, begin = self.begin, self.times, time.perf_counter()
        self.times = defaultdict(list)
        try:
            yield
        finally:
            self.begin, self.times = before + time.perf_counter() - begin, times

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def line(self, accelerator: Any, copies: int) -> dict[str, float]:
        """What there is to log, over all ranks, which must all ask; begins anew. copies: ranks with the same rows."""
        counts = self.sums.new_tensor([self.tokens, self.skipped])
        every = (accelerator.reduce(torch.cat([self.sums.flatten(), counts]), "sum") / copies).cpu()
        tokens, skipped = every[-2:].tolist()
        seconds = time.perf_counter() - self.begin
        logs = {"tokens_per_second": tokens / seconds}
        if skipped:
            logs["skipped_batches"] = int(skipped)
        of_each = every[:-2].view(self.sums.shape).tolist()
        for source, (loss, updates, tokens, *parts) in zip(self.sources, of_each, strict=True):
            if updates:
                logs[f"loss_on_{source}"] = loss / updates
            if tokens:
                logs |= {f"{n}_on_{source}": x / tokens for n, x in zip(self.parts, parts, strict=True)}
        for name, spans in self.times.items():
            logs[f"{name}_share"] = sum(_seconds(*span) for span in spans) / seconds
        self.reset()
        return logs


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
