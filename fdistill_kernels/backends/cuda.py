"""The CUDA backend: Hopper kernels of csrc/cuda, which read each logit once; what they cannot take goes to Triton."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..divergences import Divergence
from . import triton
from .native import DTYPES, open_library, row_task, words
from .rows import RowCall, gpu_symbol

INTERFACE, NO_ROOM = 9, b"the card holds no such cluster"  # of csrc/cuda/rows.cu
WARP = 32
MOST_THREADS = 256  # of a block, as csrc/cuda/hopper.cuh bounds its kernels
SHARED_MEMORY = 228 << 10  # of a multiprocessor, in bytes
SYSTEM, DESK = 1 << 10, 2592  # of it a block's, for the driver and for csrc/cuda/row_kernel.h's `Shared`
LINE = 8  # vectors of a 128-byte line, which blocks do not share
#: Blocks of a multiprocessor, and of a cluster, in the order tried. While one block meets or waits for its row, others
#: work; clusters fill a card's groups of 16 or 18 multiprocessors. The order is an H200's, where 3 and 9 were slower.
PLACES = (
    (3, 1), (3, 2), (2, 2), (3, 4), (3, 6), (3, 8), (3, 12), (3, 16), (2, 12), (2, 16), (1, 12), (1, 16),
)  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("cluster", "threads", "depth", "slice", "aligned")]


@dataclass(frozen=True)
class Launch:
    """Blocks of a cluster, threads of a block, 16-byte vectors of a row in a thread, vectors of a row in a block, and
    whether every row starts at a multiple of 16 bytes.
    """

    cluster: int
    threads: int
    depth: int
    slice: int
    aligned: bool

    @functools.cached_property
    def request(self) -> _Launch:
        """As the library takes it."""
        return _Launch(*astuple(self))


def cut(slice: int) -> tuple[int, int]:
    """Threads and depth that take so many vectors."""
    threads = min(MOST_THREADS, -(-slice // WARP) * WARP)
    return threads, -(-slice // threads)


@functools.lru_cache
def plan(
    vocabulary: int, itemsize: int, models: int, aligned: bool, places: tuple[tuple[int, int], ...] = PLACES
) -> Launch | None:
    """The first of the places whose shared memory holds a row; None if the row is too long for any.

    models: 2, or 1 without a teacher. aligned: every row starts at a multiple of 16 bytes.
    """
    entries = 16 // itemsize
    vectors = -(-(vocabulary + (0 if aligned else entries - 1)) // entries)
    for blocks, cluster in places:
        slice = -(-vectors // (cluster * LINE)) * LINE
        threads, depth = cut(slice)
        if models * threads * depth * 16 <= SHARED_MEMORY // blocks - SYSTEM - DESK:
            return Launch(cluster, threads, depth, slice, aligned)
    return None


class Library:
    """The kernels' shared library, which links to no torch and so serves every version of it."""

    def __init__(self, path: Path | None = None):
        """Raises OSError where it was not built, cannot be loaded, or is of another version of this package."""
        library = open_library("cuda", INTERFACE, path)
        for function in ("architectures", "divergence_rows", "trouble"):
            getattr(library, f"fdistill_cuda_{function}").restype = ctypes.c_char_p
        self.architectures = library.fdistill_cuda_architectures().decode()
        self.emulated = self.architectures == "emulation"
        self.version = f"interface {INTERFACE}, for {self.architectures}"
        self._divergence_rows = library.fdistill_cuda_divergence_rows
        trouble = library.fdistill_cuda_trouble()
        #: Why the driver cannot run the library, or None; asked once, since compilers cannot trace the question.
        self.trouble: str | None = trouble and trouble.decode()

    def divergence_rows(self, symbol: str, task: bytes, launch: Launch, stream: int) -> bool:
        """Starts the kernel; False where the card holds no such cluster, RuntimeError with the driver's words else."""
        error = self._divergence_rows(symbol.encode(), task, ctypes.byref(launch.request),
                                      ctypes.c_void_p(stream))  # fmt: skip
        if error and error != NO_ROOM:
            raise RuntimeError(f"the CUDA row kernel did not start with {launch}: {words('cuda', error)}")
        return not error


def _load() -> tuple[Library | None, str]:
    try:
        return Library(), ""
    except OSError as error:
        return None, str(error)


LIBRARY, NOT_LOADED = _load()


def why_not(device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str | None:
    """The reason this backend cannot take a call, or None."""
    if LIBRARY is None:
        return NOT_LOADED
    if device.type != ("cpu" if LIBRARY.emulated else "cuda"):
        return f"the logits are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16 logits, not {dtype}"
    if divergence is not None and divergence.kernel is None:
        return f"{divergence} is a user's own generator, which only the torch and triton backends run"
    if device.type == "cuda" and triton.capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not sm_90"
    return LIBRARY.trouble


def why_not_auto() -> str | None:
    """The reason `auto` does not take this backend, though it could run; at no vocabulary is Triton faster."""
    return "it is emulated, for tests alone" if LIBRARY is not None and LIBRARY.emulated else None


def route(call: RowCall) -> Launch | str:
    """How a call is cut, or the reason it is Triton's."""
    vocabulary, starts = call.student.shape[2], _starts(call)
    if call.teacher_gradient:
        return "the teacher wants a gradient"
    if call.terms.class_weight is not None:
        return "classes have weights"
    if call.divergence is not None and call.divergence.statistics is not None:
        return "the divergence asks for statistics of its row"
    if (call.student_softcap or call.teacher_softcap) and call.student.element_size() == 2:
        return "capped logits would be rounded to 16 bits"
    if len(starts) > 1:
        return "rows of student, teacher and gradient start at different offsets from 16 bytes"
    if call.terms.row_scale.shape[0] >= 2**31:
        return "there are 2**31 rows or more"
    launch = plan(vocabulary, call.student.element_size(), 1 if call.teacher is None else 2, starts == {(0, 0, 0)})
    return launch or f"rows of {vocabulary} entries are too long for a cluster's shared memory"


def _starts(call: RowCall) -> set[tuple[int, ...]]:
    """Where each tensor's rows start within 16 bytes, by address and strides; a fresh gradient's are dense."""
    (outer, inner, vocabulary), size = call.student.shape, call.student.element_size()
    places = [(x.data_ptr(), x.stride(0), x.stride(1)) for x in (call.student, call.teacher) if x is not None]
    if call.student_gradient and not call.inplace:
        places.append((0, inner * vocabulary, vocabulary))
    return {(address % 16, size * over % 16 * (outer > 1), size * within % 16 * (inner > 1))
            for address, over, within in places}  # fmt: skip


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`."""
    launch = route(call)
    if isinstance(launch, str):
        return triton.divergence_rows(call)
    student = call.student
    assert LIBRARY is not None
    parts = torch.empty(call.parts, call.terms.row_scale.shape[0], dtype=torch.float32, device=student.device)
    asked = call
    if call.terms.metrics:
        triton.write_metrics(call, parts)
        asked = call._replace(terms=call.terms.without_metrics())
    fresh, nothing = call.empty_gradients()
    gradient = student if call.inplace else fresh
    _, task, _held = row_task(asked, gradient if call.student_gradient else None, None, parts)
    symbol = gpu_symbol(call.divergence) if call.divergence else ""
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if student.is_cuda else 0
        if not LIBRARY.divergence_rows(symbol, task, launch, stream):
            return triton.divergence_rows(call)
    return triton.with_left_out(parts, call.terms), fresh, nothing
