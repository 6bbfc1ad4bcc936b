import fcntl
import functools
import gc
import itertools
import os
import random
import shutil
import subprocess
from pathlib import Path
from zlib import crc32

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated: Triton's interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

from fdistill_kernels import backends, f_divergence
from fdistill_kernels.backends.triton import interpreting
from fdistill_kernels.carried import flat
from fdistill_kernels.own import resolve
from fdistill_kernels.reference import f_divergence_rows

from . import interpreter

ROOT = Path(__file__).parent.parent
#: `make test-all`: whole grids where `make test` takes a part; of those marked so, one in which all pairs meet.
WHOLE = bool(os.environ.get("FDISTILL_WHOLE"))
#: Where there is no browser, its tests are not there: `make look` then fails.
BROWSERS = ("chromium", "google-chrome")
collect_ignore = [] if any(map(shutil.which, BROWSERS)) else ["browser"]
THREADS = torch.get_num_threads()
#: Triton's row kernel with a program for each row, and with rows cut into spans.
TRITON_WAYS = ("triton", "triton-spans")
#: What takes longest begins first, so that no worker is left with it at the end.
LONGEST = ("test_demo_survives", "test_an_sdist", "test_nothing_is_worse", "test_a_fault_in_each_step", "test_runs_dry",
           "test_memory_of_the_sizes", "test_verify_passes", "test_every_instruction_set", "test_two_processes",
           "test_killed_and_gone_on_with", "test_sigkill", "test_float16_gradients", "test_opcheck")  # fmt: skip


def _run(call, backend, run=backends._run, **how):
    """Every call that a loss makes past the operator is one that the operator would take as it is."""
    assert all(given is taken for given, taken in zip(flat(call), flat(call.checked()), strict=True)), call
    return run(call, backend, **how)


backends._run = _run
if interpreting():
    interpreter.hurry(whole=WHOLE)


def one_way_each(cells):
    """Of a test's cells, those with one of Triton's two ways through a row each, not always the same one of a value."""

    def taken(cell):
        backend = cell.callspec.params["backend"]
        name = cell.originalname + cell.callspec.id.replace(backend, "")
        return backend not in TRITON_WAYS or backend == TRITON_WAYS[crc32(name.encode()) % 2]

    return [cell for cell in cells if taken(cell)]


def every_pair(cells):
    """Of a grid's cells, a sample in which each pair of its parameters' values still meets; the same one each time.

    Only of the interpreted and emulated backends, where the time goes, which all refuse float64.
    """
    found, kept, pairs = set(), set(), {}
    for cell in random.Random(0).sample(cells, len(cells)):
        values = {name: str(value) for name, value in cell.callspec.params.items()}
        if values["backend"] in ("torch", "cpu") or values.get("dtype") == "torch.float64":
            kept.add(cell)
        else:
            pairs[cell] = set(itertools.combinations(sorted(values.items()), 2))
    for least in range(max(map(len, pairs.values()), default=0), 0, -1):  # those that bring most new ones first
        for cell, its in pairs.items():
            if len(its - found) >= least:
                found |= its
                kept.add(cell)
    return kept


def sampled(items):
    """What `make test` takes of all tests."""
    tests, left_out = {}, set()
    for item in items:
        if hasattr(item, "callspec"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cells in tests.values():
        ways = {cell.callspec.params.get("backend") for cell in cells}
        kept = one_way_each(cells) if ways >= {*TRITON_WAYS} else cells
        left_out |= {*cells} - {*(every_pair(kept) if cells[0].get_closest_marker("grid") else kept)}
    return [item for item in items if item not in left_out]


def pytest_collection_modifyitems(config, items):
    if not WHOLE:
        kept = sampled(items)
        config.hook.pytest_deselected(items={*items} - {*kept})
        items[:] = kept
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if item.name.startswith(name)), len(LONGEST)))


def pytest_collection_finish():
    _keep()


def pytest_runtest_logstart():
    """After what collected all garbage at least once."""
    if gc.get_stats()[2]["collections"] > _keep.collections:
        _keep()


def _keep():
    """Trainers collect garbage as they begin, by the hundreds: what modules have made is none, nor what graphs that were
    compiled leave behind. Looking through it each time took most of the trainers' tests' time.
    """
    gc.collect()
    gc.freeze()
    _keep.collections = gc.get_stats()[2]["collections"]


_keep.collections = 0


def pytest_unconfigure():
    gc.unfreeze()  # which libraries count as leaked


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "DYNAMO_MODE"):  # which trainers leave behind in this process
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def native_backend_is_built() -> bool:
    return backends.cpu.NOT_LOADED is None


def instruction_sets() -> list[str]:
    """Those that this CPU has; torch takes ATEN_CPU_CAPABILITY's word for more, and dies of it."""
    names = ["DEFAULT", "AVX2", "AVX512"]
    found = torch.backends.cpu.get_cpu_capability()
    return names[: names.index(found) + 1] if found in names else names[:1]


def assert_masks_of_two_kinds_agree(name: str, *names: str) -> None:
    """Of models that each have a mask of their own for the same entries: a number, which leaves 0 of the probability and a
    finite logarithm, and −inf. names: of backends, beside float64.
    """
    student, teacher = torch.randn(4, 300), torch.randn(4, 300)
    teacher[2:] = student[2:] + 0.1 * teacher[2:]  # close rows, too
    for row, mask in enumerate((-1e3, -1e4, -1e3, -1e4)):
        student[row, 3:40], teacher[row, 3:40] = mask, -torch.inf
        student[row, 50:90], teacher[row, 50:90] = -torch.inf, mask
    student.requires_grad_()
    exact = f_divergence(student.double(), teacher.double(), name, reduction="none", backend="torch")
    (of_row,) = torch.autograd.grad(exact.sum(), student)
    finite = exact.isfinite()
    for backend in names:
        got = f_divergence(student, teacher, name, reduction="none", backend=backend)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-7)
        found = torch.autograd.grad(got.sum(), student)[0][finite]
        assert found.isfinite().all() and (not finite.any() or relative(found, of_row[finite].double()) < 1e-4)


@functools.cache
def emulated_library() -> backends.cuda.Library:
    """The CUDA kernels built for a CPU, by the first process that needs them."""
    path = ROOT / "build" / "libfdistill_emulated.so"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "--silent", path.relative_to(ROOT)], cwd=ROOT, check=True)
    return backends.cuda.Library(path)


def emulate_cuda(monkeypatch, cluster: int = 2) -> None:
    """The CUDA backend on CPU tensors, with clusters of that many blocks of the fewest threads that hold a row."""

    def plan(vocabulary, itemsize, models, aligned):
        entries = 16 // itemsize
        vectors = -(-(vocabulary + (0 if aligned else entries - 1)) // entries)
        slice = -(-vectors // cluster)
        return backends.cuda.Launch(cluster, *backends.cuda.cut(slice), slice, aligned)

    monkeypatch.setattr(backends.cuda, "LIBRARY", emulated_library())
    monkeypatch.setattr(backends.cuda, "plan", plan)


def small_triton(monkeypatch, spans: bool) -> None:
    """Triton with blocks so small that rows cross several; and rows cut into spans."""
    from fdistill_kernels.backends.triton import launch

    small = launch.Launch(block=1024, warps=4, programs=2, splits=3 if spans else 1)
    monkeypatch.setattr(launch, "choose", lambda *_, **__: small)


def ready(name, monkeypatch) -> str:
    """The backend of that name, made ready for a CPU and for small rows."""
    if name == "cuda":
        emulate_cuda(monkeypatch)
    if name == "cpu":
        assert native_backend_is_built(), backends.cpu.NOT_LOADED  # a failure, not a skip: `make` builds it
        torch.set_num_threads(2)  # which it cuts rows among, until the next test
    if name.startswith("triton"):
        small_triton(monkeypatch, name == "triton-spans")
    return name.partition("-")[0]


@pytest.fixture(params=["torch", "cpu", "triton", "triton-spans", "cuda"])
def backend(request, monkeypatch):
    return ready(request.param, monkeypatch)


def labelled(divergence, rows):
    """The labels of a call, where the divergence needs them."""
    return {"labels": torch.arange(rows)} if resolve(divergence).needs_labels else {}


def reference(student, teacher, divergence, weights=None, **kw):
    """Weighted sum of the reference's rows in float64 and its gradients to both models."""
    s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
    rows = f_divergence_rows(s, t, divergence, **kw)
    total = (rows * (torch.ones_like(rows) if weights is None else weights)).sum()
    return total.detach(), *torch.autograd.grad(total, (s, t))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()
