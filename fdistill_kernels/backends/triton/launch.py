"""How a call is cut into programs: block, warps, programs in flight, and splits of a row."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """Entries of a block, warps of a program, programs in the grid, spans that share a row (1: whole rows), the most
    registers of a thread (0: as many as the compiler likes), and whether a row's spans meet within one launch: programs
    is then the number of teams. Teams have not run on a card, and no heuristic takes them.
    """

    block: int
    warps: int
    programs: int
    splits: int = 1
    registers: int = 0
    together: bool = False

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.warps, **({"maxnreg": self.registers} if self.registers else {}), **ALWAYS}


#: What one instruction loads or stores for a thread.
LINE_BYTES = 16
#: Of a multiprocessor, from sm_80 on.
REGISTERS = 1 << 16
#: Options of every launch: a product and a sum may be one instruction, which newer Triton does not take for granted.
ALWAYS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Device:
    """What the choice depends on. L2 in bytes; lanes of a warp; whether matrix products take their operands by way of
    registers, as they do without the instructions of sm_90 and sm_100; which of the two it is, 9 or 10, else 0; and the
    registers of a multiprocessor, where the compiler can be told how many of them a thread may have, else 0.
    """

    name: str
    processors: int
    l2: int
    lanes: int = 32
    without_wide_products: bool = False
    generation: int = 0
    registers: int = 0


@functools.lru_cache
def device_of(device: torch.device) -> Device:
    """The card; for the interpreter a small one, so that a test's rows outnumber its programs."""
    if device.type == "cpu":
        return Device("interpreter", 2, 1 << 22)
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    generation = properties.major if nvidia and properties.major in (9, 10) else 0
    return Device(
        properties.name, properties.multi_processor_count, properties.L2_cache_size,
        getattr(properties, "warp_size", 32), nvidia and not generation, generation, REGISTERS if nvidia else 0,
    )  # fmt: skip


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels that are launched inside run on that device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


#: Warps of a multiprocessor, all programs' together: 128 registers a thread of 32 lanes; and on sm_90 three programs of
#: 8 warps, 80 registers a thread, which took a tenth less time on an H200, whether L2 held their rows or not.
WARPS, MORE_WARPS = 16, 24
#: Symbols whose sweeps put nothing aside then, as long as the teacher is not trained, too.
LIGHT = ("Kl", "Rkl", "Jeffreys", "Js", "Gjs", "Tvd", "Engine", "CrossEntropy", "labels")
#: What is beside the row kernel and waits for each of its blocks: twice as many warps.
WAITING = ("rest", "statistics", "scale")


@functools.lru_cache
def heuristic(
    rows: int, vocabulary: int, itemsize: int, device: Device, symbol: str = "", trained: bool = False
) -> Launch:
    """The launch for a call that nobody tuned. trained: the teacher is, too.

    A 16-byte load a thread and tensor: with two, registers spill. WARPS a multiprocessor: two blocks are on their way
    while one is worked on (stretches.py), and with more warps a thread would have too few registers for that. One
    program has them where L2 would not hold the rows of two for the sweeps after the first; two where it does, so that
    one works while the other waits for its sums; more where rows are short, and three on sm_90. Where a few rows would
    leave multiprocessors idle, spans share a row.
    """
    entries = LINE_BYTES // itemsize  # of a thread
    many = device.generation == 9 and symbol in LIGHT and not trained
    together = 2 * WARPS if symbol in WAITING else MORE_WARPS if many else WARPS
    pairs = device.processors * 2 * vocabulary * itemsize  # bytes, of a program on each multiprocessor
    alone = 2 * pairs > 0.75 * device.l2 and symbol not in WAITING
    block = min(1 << (vocabulary - 1).bit_length(), together // (3 if many else 1 if alone else 2) * 32 * entries)
    warps = max(1, block // (device.lanes * entries))
    per_processor = together * 32 // (warps * device.lanes)
    programs = min(rows, per_processor * device.processors)
    blocks = -(-vocabulary // block)
    splits = min(device.processors // rows, blocks, 64) if 2 * rows <= device.processors else 1
    return Launch(block, warps, programs, max(1, splits), registers_of(device, warps, per_processor))


def registers_of(device: Device, warps: int, per_processor: int) -> int:
    """What a thread may have, so that so many programs fit on a multiprocessor; 0 where the compiler is not told."""
    most = device.registers // (warps * device.lanes * per_processor) // 8 * 8
    return most if 0 < most < 255 else 0


def candidates(rows: int, vocabulary: int, itemsize: int, device: Device) -> Iterator[Launch]:
    """What `fdistill bench --tune` tries."""
    splits = heuristic(rows, vocabulary, itemsize, device).splits
    for block in (1024, 2048, 4096, 8192, 16384):
        if block >= 2 * vocabulary and block > 1024:
            continue
        for threads in (128, 256, 512, 1024):
            warps = threads // device.lanes
            if not 4 * threads <= block <= 32 * threads:
                continue
            for per_processor in (1, 2, 4):
                if per_processor * threads <= 2048:
                    registers = registers_of(device, warps, per_processor)
                    yield Launch(block, warps, min(rows, per_processor * device.processors), splits, registers)


@functools.lru_cache
def _kernels() -> str:
    """What a launch is tuned for, in a few letters: the kernels' sources and their compiler's version."""
    from triton import __version__

    sources = [path.read_bytes() for path in sorted(Path(__file__).with_name("kernels").glob("*.py"))]
    return hashlib.sha256(b"".join([__version__.encode(), *sources])).hexdigest()[:12]


def cache_file() -> Path:
    """Where tuned launches of these kernels are kept: in $FDISTILL_CACHE, or ~/.cache/fdistill_kernels."""
    folder = os.environ.get("FDISTILL_CACHE") or os.path.expanduser("~/.cache/fdistill_kernels")  # there may be no home
    return Path(folder) / f"launches-{_kernels()}.json"


@functools.lru_cache
def _tuned() -> dict[str, Launch]:
    """What is kept; nothing of a file that is damaged, whatever JSON it holds."""
    try:
        return {key: Launch(**of) for key, of in json.loads(cache_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _key(device: Device, symbol: str, vocabulary: int, itemsize: int) -> str:
    return f"{device.name}|{symbol}|{vocabulary}|{8 * itemsize} bit"


def remember(launch: Launch, device: Device, symbol: str, vocabulary: int, itemsize: int) -> None:
    """Keeps a tuned launch for all later processes."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    _tuned.cache_clear()  # other processes have tuned since
    every = {**_tuned(), _key(device, symbol, vocabulary, itemsize): launch}
    partial.write_text(json.dumps({key: asdict(kept) for key, kept in every.items()}, indent=1))
    partial.replace(path)
    _tuned.cache_clear()


_forced: Launch | None = None


@contextlib.contextmanager
def forced(launch: Launch) -> Iterator[None]:
    """Every call inside runs with this launch."""
    global _forced
    before, _forced = _forced, launch
    try:
        yield
    finally:
        _forced = before


def choose(
    rows: int, vocabulary: int, itemsize: int, device: torch.device, symbol: str, trained: bool = False
) -> Launch:
    """The tuned launch where there is one, for whole rows; else the heuristic. trained: the teacher is, too."""
    if _forced is not None:
        return _forced
    card = device_of(device)
    launch = heuristic(rows, vocabulary, itemsize, card, symbol, trained)
    every = _tuned()
    tuned = every.get(_key(card, symbol, vocabulary, itemsize)) if every else None
    if tuned is None or launch.splits > 1:
        return launch
    return replace(tuned, programs=min(rows, tuned.programs))
