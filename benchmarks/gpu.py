"""What the GPU benchmarks share: how a step is measured, and a result file that holds what there is at any time.

A dry run takes the same lines on a CPU, where events are of the host's clock and a peak of memory is 0.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fdistill_kernels.bench import floor_seconds
from fdistill_kernels.options import written
from fdistill_kernels.provenance import provenance, versions

PEERS = ("triton", "liger-kernel", "orda-kernel", "quack-kernels", "trl", "numpy")
CARD = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "memory.total")


WRONG = 2e-2  # of a bfloat16 gradient, by norm


def arguments(description: str | None, who: list[str]) -> argparse.Namespace:
    """Whose losses, where to, and how much: the benchmarks' command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=who, required=True, help="whose losses")
    parser.add_argument("--out", type=written, required=True, help="the result file")
    parser.add_argument("--first", action="store_true", help="what matters most alone")
    parser.add_argument("--dry", action="store_true", help="toy shapes, on any machine")
    return parser.parse_args()


class _HostEvent:
    """torch.cuda.Event where there is no card."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1e3 * (end.at - self.at)


class Device:
    """The card, or with `dry` the CPU in its place."""

    def __init__(self, dry: bool):
        self.dry, self.type = dry, "cpu" if dry else "cuda"
        self.fewest = 1 if dry else 3  # steps of a measurement

    def event(self) -> Any:
        return _HostEvent() if self.dry else torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def peak(self, into: dict[str, Any]) -> Iterator[None]:
        """Bytes at the worst moment inside, above what was there before."""
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = 0 if self.dry else torch.cuda.memory_allocated()
        yield
        self.synchronize()
        into["peak_bytes"] = 0 if self.dry else torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        """The card as it is found: multiprocessors, L2 in bytes, driver, clocks in MHz, power limit in W."""
        if self.dry:
            return {"device": "interpreter"}
        card = torch.cuda.get_device_properties(0)
        facts = {
            "cuda": torch.version.cuda,
            "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
        }
        command = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            facts |= dict(zip(CARD, answer.splitlines()[0].split(", "), strict=False))
        return facts


def measured(step: Callable[[], object], clear: Callable[[], object], device: Device, seconds: float) -> dict[str, Any]:
    """One step, forward and backward: `milliseconds`, the median by the device's own events; `host_milliseconds`, until
    the host has asked for it; `device_milliseconds`, the sum of its kernels, and `kernels`, the longest by name;
    `peak_bytes` above inputs.

    clear: frees what a step leaves. seconds: about how long to measure.
    """
    found: dict[str, Any] = {}
    for _ in range(2):  # compiles; finds its buffers
        step()
    clear()
    with device.peak(found):
        step()
    start = time.perf_counter()
    step()
    device.synchronize()
    count = max(device.fewest, min(200, int(seconds / (time.perf_counter() - start))))
    events = [device.event() for _ in range(count + 1)]
    start = time.perf_counter()
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    device.synchronize()
    whole = time.perf_counter() - start
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    found |= {"milliseconds": statistics.median(times), "fastest_milliseconds": times[0], "steps": count}
    start = time.perf_counter()
    for _ in range(min(count, 10)):  # few enough for the queue
        step()
    found["host_milliseconds"] = min(1e3 * (time.perf_counter() - start) / min(count, 10), 1e3 * whole / count)
    device.synchronize()
    found |= _kernels(step, device)
    clear()
    return found


def loss_measured(step: Callable[[], object], clear: Callable[[], object], error: Callable[[], float],
                  device: Device, floor: float, seconds: float) -> dict[str, Any]:  # fmt: skip
    """See `measured`; with the ratio to the floor, the `error`, and whether that is right.

    floor: in seconds. error: after a step, of its gradient by norm.
    """
    torch._dynamo.reset()
    step()
    found: dict[str, Any] = {"gradient_error": error()}
    found["right"] = found["gradient_error"] < WRONG
    clear()
    found |= measured(step, clear, device, seconds)
    return {**found, "over_floor": found["milliseconds"] / (1e3 * floor)}


def few_rows(x: Tensor) -> Tensor:
    """Rows to be held beside float64, from both ends and between."""
    return torch.linspace(0, len(x) - 1, 4).long().unique().to(x.device)


def error_of_mean(gradient: Tensor | None, rows: Tensor, wanted: Tensor) -> float:
    """Of some rows of the gradient of a mean over all, by norm; wanted: that of their sum."""
    assert gradient is not None
    return float((gradient[rows].double() * len(gradient) - wanted).norm() / wanted.norm())


def _kernels(step: Callable[[], object], device: Device) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU if device.dry else ProfilerActivity.CUDA]) as profiled:
        for _ in range(device.fewest):
            step()
        device.synchronize()
    kind = "self_cpu_time_total" if device.dry else "self_device_time_total"
    thousands = 1e3 * device.fewest
    times = {e.key[:80]: getattr(e, kind) / thousands for e in profiled.key_averages() if getattr(e, kind) > 0}
    longest = sorted(times.items(), key=lambda pair: -pair[1])[:6]
    return {"device_milliseconds": sum(times.values()), "kernels": {name: round(ms, 4) for name, ms in longest}}


def rates(device: Device) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a large bfloat16 product of random matrices."""
    like = torch.empty(2**16 if device.dry else 2**29, dtype=torch.bfloat16, device=device.type)
    copy = 3 * like.nbytes / floor_seconds(like)
    n = 64 if device.dry else 8192
    a, b = (torch.randn(n, n, device=device.type).bfloat16() for _ in range(2))
    product = measured(lambda: a @ b, lambda: None, device, 0.3)["milliseconds"]
    return {"copy_bytes_per_second": copy, "matrix_flop_per_second": 2e3 * n**3 / product}


class Results:
    """A result file, written anew after each entry: a run that is stopped leaves what it has."""

    def __init__(self, path: Path, device: Device, **rates: float):
        command = ["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        self.path, self.failed = path, False
        self.content: dict[str, Any] = {
            **provenance(" ".join(x for x in command if x not in ("--out", str(path))), device.type),
            **device.facts(), "versions": versions(PEERS),
            "dtype": "bfloat16", **rates, "results": [],
        }  # fmt: skip
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def add(self, measure: Callable[[], dict[str, Any]], ours: bool, **what: Any) -> None:
        """The entry that `measure` finds, or how it failed: nobody's failure keeps the others from being measured."""
        try:
            found = measure()
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):  # after an illegal access nothing more is to be had of this process
                torch.cuda.empty_cache()
        self.failed |= ours and ("error" in found or not found.get("right", True))
        self.content["results"].append({**what, **found})
        self.save()
        shown = found.get("error") or {k: v for k, v in found.items() if k not in ("kernels", "steps")}
        print(*what.values(), shown, flush=True)
