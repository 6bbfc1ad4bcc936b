"""The Hopper kernels without a Hopper: run by a CPU thread by thread, and read in the machine code that nvcc made."""

import collections
import ctypes
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import fdistill_kernels as fk
from benchmarks import counts
from fdistill_kernels.backends import choose, cuda, native, why_not_auto
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows

from .conftest import (
    WHOLE,
    assert_masks_of_two_kinds_agree,
    emulate_cuda,
    emulated_library,
    reference,
    relative,
)

ROOT = Path(__file__).parent.parent
#: Error relative to the reference's largest entry, of loss and gradient.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3), torch.float16: (1e-5, 6e-4)}
#: Tails that fill no vector, slices that fill no block, and blocks that have nothing of the row.
VOCABULARIES = (1, 5, 1024, 3001, 4100)


def models(rows, vocabulary, dtype=torch.float32, scale=1.5):
    student, teacher = ((scale * torch.randn(rows, vocabulary)).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def build_emulated(source, output):
    subprocess.run(["bash", ROOT / "tests" / "emulate.sh", source, output], check=True)


def gradient_of(loss, student):
    return torch.autograd.grad(loss, student)[0]


#: In `make test-all` every divergence with every cluster.
GRID = [(name, dtype, cluster) for name, d in TABLE.items() if d.statistics is None
        for dtype in TOLERANCE for cluster in (1, 2, 4, 8)
        if WHOLE or name in ("kl", "js", "ab") or cluster == 2]  # fmt: skip


@pytest.mark.parametrize("name, dtype, cluster", GRID, ids=str)
def test_every_cluster_agrees_with_the_reference(name, dtype, cluster, monkeypatch):
    emulate_cuda(monkeypatch, cluster)
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    for vocabulary in VOCABULARIES:
        student, teacher = models(3, vocabulary, dtype)
        keep = torch.tensor([1.0, 0.0, 1.0])
        loss = fk.f_divergence(
            student, teacher, name, token_weight=keep, temperature=1.5, reduction="sum", backend="cuda"
        )
        gradient = gradient_of(loss, student)
        expected, of_student, _ = reference(student, teacher, name, weights=keep.double(), temperature=1.5)
        if vocabulary > 1:
            assert relative(loss, expected) < loss_tolerance
            assert relative(gradient, of_student) < gradient_tolerance
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("cluster", [1, 3, 8])
def test_no_schedule_of_threads_and_copies_changes_a_bit(cluster, monkeypatch):
    """Seeds shuffle who goes on next, and make copies land at once, as late as can be, or some of them in any order."""
    emulate_cuda(monkeypatch, cluster)
    student, teacher = models(9, 4100, torch.bfloat16)
    labels = torch.randint(4100, (9,))
    labels[[1, 4, 5]] = -100
    results = []
    for seed in range(7 if WHOLE else 4):
        monkeypatch.setenv("FDISTILL_SEED", str(seed))
        for name in ("js", "kl"):  # that wait for S, and that do not
            rows = fk.f_divergence(student, teacher, name, labels=labels, ce_weight=0.3, label_smoothing=0.1,
                                   temperature=2.0, reduction="none", backend="cuda")  # fmt: skip
            results.append((rows.detach(), gradient_of(rows.sum(), student)))
    for one, other in zip(results[2:], results, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


#: What threads wait at. Each is left out of a build of its own, which takes its time: make test does so with every other.
BARRIERS = (
    "warp_barrier();  // my lanes are done",
    "block_barrier();  // every warp has told",
    "block_barrier();  // the speaker has heard\n",
    "block_barrier();  // the speaker has heard of S",
    "wait_for(&shared.met[meetings % 2], (meetings - 1) / 2 % 2);",
    "wait_for(&shared.arrived[thread() / kWarp], parity);",
)


@pytest.mark.parametrize("barrier", BARRIERS if WHOLE else BARRIERS[::2])
def test_a_missing_barrier_is_noticed(barrier, tmp_path, monkeypatch):
    """That the schedules above can tell: without one of its barriers the kernel gives other results, or stops."""
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    kernel = source / "cuda" / "row_kernel.h"
    text = kernel.read_text()
    assert text.count(barrier) == 1
    end = "\n" if barrier.endswith("\n") else ""
    kernel.write_text(text.replace(barrier, "//" + end if "//" in barrier else ""))
    rows = source / "cuda" / "rows.cu"
    rows.write_text(
        re.sub(r"FDISTILL_FOR_EACH_DIVERGENCE_OF_GPUS\(FDISTILL_FIND\)", "FDISTILL_FIND(Js)", rows.read_text())
    )
    build_emulated(source, tmp_path / "broken.so")
    emulate_cuda(monkeypatch, 2)
    student, teacher = models(9, 5003, torch.bfloat16)
    settings = dict(labels=torch.arange(9), ce_weight=0.3, temperature=2.0, backend="cuda")
    expected = gradient_of(fk.f_divergence(student, teacher, "js", **settings), student)
    monkeypatch.setattr(cuda, "LIBRARY", cuda.Library(tmp_path / "broken.so"))

    def noticed(seed):
        monkeypatch.setenv("FDISTILL_SEED", str(seed))
        try:
            got = gradient_of(fk.f_divergence(student, teacher, "js", **settings), student)
            return not torch.equal(got, expected)
        except RuntimeError as error:
            return "deadlock" in str(error)

    assert any(map(noticed, range(7)))


@pytest.mark.parametrize("name", ["kl", "js", "gjs=0.1", "tvd", "rkl", "hellinger"])
def test_hard_logits(name, monkeypatch):
    emulate_cuda(monkeypatch, 4)
    student, teacher = models(6, 1003)
    with torch.no_grad():
        student[0] += 1e4  # a shift of the row
        teacher[1] = -1e4
        teacher[1, 17] = 1e4  # one-hot
        teacher[2] = student[2]  # ties
        teacher[3, 100:] = student[3, 100:] = -torch.inf
        student[4] = teacher[4] = 0
        student[5, 900] = torch.nan
    rows, cpu = (fk.f_divergence(student, teacher, name, reduction="none", backend=b) for b in ("cuda", "cpu"))
    assert rows[5].isnan() and cpu[5].isnan()
    torch.testing.assert_close(rows[:5], cpu[:5], rtol=1e-5, atol=3e-7)
    labels = torch.where(rows.isfinite(), 0, -100)
    losses = [
        fk.f_divergence(student, teacher, name, labels=labels, reduction="sum", backend=b) for b in ("cuda", "cpu")
    ]
    for loss, ours, theirs in zip(rows, *(gradient_of(loss, student) for loss in losses), strict=True):
        # q (g - S) keeps the digits that S, as large as the loss, leaves it
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-7 + 3e-9 * loss.nan_to_num(0, 0).item())


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e30, torch.finfo(torch.bfloat16).min, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_that_fill_warps_and_blocks(dtype, mask, monkeypatch):
    """A padded or constrained vocabulary: warps, blocks and a whole row see nothing but the mask's value."""
    emulate_cuda(monkeypatch, 2)
    for vocabulary, kept in ((264, 256), (4100, 900), (4100, 4092)):
        student, teacher = models(3, vocabulary, dtype)
        with torch.no_grad():
            student[:, kept:] = teacher[0, kept:] = mask
            if mask > -torch.inf:
                student[2] = mask  # a uniform softmax
        for loss in (
            lambda b, s=student, t=teacher: fk.f_divergence(s, t, "js", temperature=2.0, reduction="none", backend=b),
            lambda b, s=student: fk.cross_entropy(s, torch.tensor([3, 7, 9]), reduction="none", backend=b),
        ):
            ours, cpu = loss("cuda"), loss("cpu")
            torch.testing.assert_close(ours, cpu, rtol=1e-5, atol=1e-6)
            assert ours.isfinite().all()
            got, want = (gradient_of(x.sum(), student) for x in (ours, cpu))
            assert relative(got, want) < TOLERANCE[dtype][1]


@pytest.mark.parametrize("name", ["js", "gjs=0.9", "skew_rkl", "rkl", "tvd"])
def test_models_that_barely_overlap(name, monkeypatch):
    """Each sure of entries that the other has nearly excluded: what is left of the gradient keeps its digits."""
    emulate_cuda(monkeypatch, 2)
    student, teacher = models(4, 3001)
    with torch.no_grad():
        student[:, :5] += torch.tensor([25.0, 16.0, 12.0, 8.0])[:, None]
        teacher[:, 9:12] += torch.tensor([25.0, 16.0, 12.0, 8.0])[:, None]
    got, want = (
        gradient_of(fk.f_divergence(student, teacher, name, reduction="none", backend=b).sum(), student)
        for b in ("cuda", "cpu")
    )
    for ours, cpu in zip(got, want, strict=True):
        assert relative(ours, cpu) < 2e-5


@pytest.mark.parametrize(
    "name", [*(n for n, d in TABLE.items() if d.statistics is None), "gjs=0.1", "skew_kl=0.1", "todi=2", "alpha=0.3"]
)
def test_masks_of_two_kinds(name, monkeypatch):
    emulate_cuda(monkeypatch, 2)
    assert_masks_of_two_kinds_agree(name, "cuda")


@pytest.mark.parametrize("name", ["js", "gjs=0.1", "gjs=0.9", "kl", "rkl"])
def test_rows_near_and_far(name, monkeypatch):
    """Models that differ a little everywhere, at the peak alone, or everywhere, and rows of almost one entry."""
    emulate_cuda(monkeypatch, 2)
    for spread, apart, peak in ((3.0, 1e-2, 0.0), (3.0, 0.5, 0.0), (0.3, 0.0, 4.0), (3.0, 4.0, 0.0), (14.0, 14.0, 0.0)):
        student = spread * torch.randn(3, 2000)
        teacher = student + apart * torch.randn(3, 2000)
        student[:, 7] += peak
        student.requires_grad_()
        exact = fk.f_divergence(student.double(), teacher.double(), name, reduction="sum", backend="torch")
        got = fk.f_divergence(student, teacher, name, reduction="sum", backend="cuda")
        of_row, found = (gradient_of(loss, student).double() for loss in (exact, got))
        error = ((found - of_row).abs().amax(1) / of_row.abs().amax(1)).max().item()
        assert max(relative(got, exact), error) < 3e-5, (spread, apart, peak)


def test_labels_smoothing_z_loss_and_caps(monkeypatch):
    from fdistill_kernels import linear_cross_entropy, linear_f_divergence

    emulate_cuda(monkeypatch, 4)
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (7, 1500))
    labels = torch.randint(1500, (7,))
    labels[2] = -100
    shared = dict(label_smoothing=0.2, z_loss=0.01, logit_softcap=5.0)
    for loss in (
        lambda b: linear_f_divergence(hidden, weight, hidden.detach() + 1, weight.detach(), "js", labels=labels,
                                      ce_weight=0.5, temperature=2.0, teacher_logit_softcap=3.0, backend=b, **shared),
        lambda b: linear_cross_entropy(hidden, weight, labels, backend=b, **shared),
    ):  # fmt: skip
        ours, theirs = ((x, *torch.autograd.grad(x, (hidden, weight))) for x in (loss("cuda"), loss("torch")))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_z_losses_of_infinite_logits(monkeypatch):
    emulate_cuda(monkeypatch, 2)
    logits, labels = torch.randn(3, 3001), torch.zeros(3).long()
    logits[1, 2000] = torch.inf
    _, parts = fk.cross_entropy(logits, labels, z_loss=0.5, reduction="none", return_parts=True, backend="cuda")
    torch.testing.assert_close(parts.z_loss, 0.5 * logits.logsumexp(1) ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_capped_logits_are_not_rounded(dtype, monkeypatch):
    emulate_cuda(monkeypatch, 2)
    weight = torch.nn.functional.normalize(torch.randn(1500, 64), dim=1)
    hidden = (torch.linspace(60, 90, 7)[:, None] * weight[:7]).to(dtype)  # sure of their label
    ours, cpu = (
        fk.linear_cross_entropy(
            hidden, weight.to(dtype), torch.arange(7), logit_softcap=30.0, reduction="none", backend=b
        )
        for b in ("cuda", "cpu")
    )
    torch.testing.assert_close(ours, cpu, rtol=1e-3, atol=1e-6)


def test_a_cap_keeps_small_logits(monkeypatch):
    """Against a teacher that has them capped already, in float64: nothing is left but its rounding."""
    emulate_cuda(monkeypatch, 2)
    weight = 1e-3 * torch.randn(1500, 4)
    capped = (30 * torch.tanh(weight.double() / 30)).float()
    loss = fk.linear_f_divergence(
        torch.eye(4), weight, torch.eye(4), capped, "tvd", logit_softcap=30.0, backend="cuda", reduction="mean"
    )
    assert loss < 1e-9


def test_nothing_beside_the_rows_is_written_or_used(monkeypatch):
    """Rows that start anywhere within 16 bytes, with NaN between them, and the gradient in their own place."""
    emulate_cuda(monkeypatch, 2)
    wide = torch.full((5, 1411), torch.nan, dtype=torch.bfloat16)
    other = torch.full((5, 1411), torch.nan, dtype=torch.bfloat16)
    student, teacher = wide[:, 3:1404], other[:, 3:1404]
    student.copy_(torch.randn(5, 1401))
    teacher.copy_(torch.randn(5, 1401))
    expected, of_student, _ = reference(student, teacher, "js", weights=torch.full((5,), 0.2).double())
    view = student.detach().requires_grad_()
    loss = fk.f_divergence(view, teacher, "js", inplace=True, backend="cuda")
    (gradient,) = torch.autograd.grad(loss, view)
    assert gradient.data_ptr() == student.data_ptr() and relative(loss, expected) < 1e-5
    assert relative(wide[:, 3:1404], of_student) < 4e-3
    assert wide[:, :3].isnan().all() and wide[:, 1404:].isnan().all()


def test_what_goes_to_triton_says_why(monkeypatch):
    emulate_cuda(monkeypatch)
    calls = []
    monkeypatch.setattr(cuda.triton, "divergence_rows", lambda call: calls.append(cuda.route(call)) or run(call))
    from fdistill_kernels.backends import cpu

    run = cpu.divergence_rows
    student, teacher = models(4, 1001)
    fk.f_divergence(student, teacher.clone().requires_grad_(), backend="cuda")
    fk.cross_entropy(student, torch.zeros(4, dtype=torch.long), torch.ones(1001), backend="cuda")
    fk.f_divergence(student[:, 1:], teacher[:, :-1], backend="cuda")
    monkeypatch.setattr(cuda, "plan", lambda *_: None)
    fk.f_divergence(student, teacher, backend="cuda")
    monkeypatch.setattr(cuda, "plan", lambda *_: cuda.Launch(32, 32, 1, 8, False))
    fk.f_divergence(student, teacher, backend="cuda")  # a cluster that no card holds
    assert [re.sub(r"\d+", "N", c) if isinstance(c, str) else None for c in calls] == [
        "the teacher wants a gradient", "classes have weights",
        "rows of student, teacher and gradient start at different offsets from N bytes",
        "rows of N entries are too long for a cluster's shared memory", None]  # fmt: skip


def blocks_of(launch, models):
    """Blocks that a multiprocessor holds at a time; the system takes 1 KB of shared memory for each."""
    slices = models * launch.threads * launch.depth * 16
    return min(768 // launch.threads, (228 << 10) // (slices + cuda.DESK + 1024))


@pytest.mark.parametrize("places", [cuda.PLACES, (*((4, c) for c in range(1, 17)), (1, 16))], ids=len)
def test_plans_fit_the_chip(places):
    for vocabulary in (1, 31, 32000, 50257, 128256, 151936, 256000, 262144):
        for itemsize, models, aligned in itertools.product((2, 4), (1, 2), (True, False)):
            launch = cuda.plan(vocabulary, itemsize, models, aligned, places)
            entries = 16 // itemsize
            assert launch.slice <= launch.depth * launch.threads and launch.threads <= cuda.MOST_THREADS
            assert vocabulary + (0 if aligned else entries - 1) <= launch.cluster * launch.slice * entries
            assert blocks_of(launch, models) >= 1


def test_plans_fill_the_chip():
    """bfloat16: while a block meets or waits two others work; the clusters are those that a card has liked best."""
    for vocabulary in (32000, 128256, 151936, 262144):
        assert blocks_of(cuda.plan(vocabulary, 2, 2, False), 2) == 3
    assert blocks_of(cuda.plan(50257, 2, 2, False), 2) == 2
    assert cuda.plan(128256, 2, 2, True) == cuda.Launch(8, threads=256, depth=8, slice=2008, aligned=True)
    assert cuda.plan(32000, 2, 2, True) == cuda.Launch(2, threads=256, depth=8, slice=2000, aligned=True)
    assert cuda.plan(400000, 4, 2, False) is not None and cuda.plan(10**6, 2, 2, True) is None


def test_auto_takes_no_emulation(monkeypatch):
    device = torch.device("cpu")
    assert why_not_auto("cuda", device) is None
    emulate_cuda(monkeypatch)
    assert "emulated, for tests alone" in why_not_auto("cuda", device)
    assert choose("auto", device, torch.float32, TABLE["js"]) == "cpu"


def test_errors_are_told(monkeypatch, tmp_path):
    emulate_cuda(monkeypatch)
    with pytest.raises(ValueError, match="bfloat16 and float16 logits"):
        fk.f_divergence(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), backend="cuda")
    with pytest.raises(RuntimeError, match=r"did not start.*no such kernel; .*csrc/cuda/build.sh \S+_cuda.so"):
        emulated_library().divergence_rows("Nothing", bytes(native.RowTask()), cuda.Launch(1, 32, 1, 1, True), 0)
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "LIBRARY", None)
    monkeypatch.setattr(cuda, "NOT_LOADED", "the CUDA library is not built")
    with pytest.raises(ValueError, match="cannot take this call: the CUDA library is not built"):
        fk.f_divergence(torch.zeros(1, 2), torch.zeros(1, 2), backend="cuda")


def test_kl_of_rows_matches_eager_where_labels_mask(monkeypatch):
    emulate_cuda(monkeypatch, 4)
    student, teacher = models(12, 2000, torch.bfloat16)
    labels = torch.where(torch.rand(12) < 0.5, -100, 3)
    loss = fk.f_divergence(student, teacher, "kl", labels=labels, backend="cuda")
    rows = f_divergence_rows(student.double(), teacher.double(), "kl")
    assert relative(loss, rows[labels >= 0].mean()) < 1e-5


# --- what nvcc made


def nvcc_is_here() -> bool:
    return shutil.which("nvcc") is not None


@pytest.fixture(scope="module")
def machine_code():
    if not nvcc_is_here():
        pytest.skip("needs nvcc, which made no library here")
    assert cuda.LIBRARY is not None, cuda.NOT_LOADED  # a failure, not a skip: `make` builds it where nvcc is
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    library = ROOT / "fdistill_kernels" / "libfdistill_cuda.so"
    usage, code = (
        subprocess.check_output([tools / "cuobjdump", flag, library], text=True) for flag in ("-res-usage", "-sass")
    )
    return usage, re.split(r"\n\s+Function : ", code)[1:]


def test_registers_and_every_variant_is_there(machine_code):
    usage, kernels = machine_code
    found = re.findall(r"Function (\w*row_kernel\w*):\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == len(kernels) == 3 * 15  # scalars; every divergence by entry, js apart, and the labels alone
    for name, registers, stack, local in found:
        # three blocks on a multiprocessor
        assert int(registers) <= 80 and int(stack) <= 48 and int(local) == 0, (name, registers, stack)


def test_instructions_of_an_entry_are_those_of_the_table(machine_code):
    """What `benchmarks/counts.py` predicts from; another nvcc may make a tenth more of them."""
    committed = json.loads(Path(__file__).with_name("counts.json").read_text())["cuda"]
    for name, found in counts.measured_in_cuda().items():
        before = committed[name]
        assert len(found["sweeps"]) == {"kl": 3, "labels": 3}.get(name, 4), (name, found)
        assert all(found[way] <= 1.1 * before[way] for way in ("instructions", "close")), (name, before, found)


def test_wide_accesses_copies_and_cluster_instructions(machine_code):
    assert "sm_90a" in cuda.LIBRARY.architectures
    for text in machine_code[1]:
        count = collections.Counter(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", text, re.MULTILINE)
        )
        least = {"LDS.128": 4, "STG.E.EF.128": 4, "UBLKCP.S.G": 1, "UCGABAR_ARV": 1, "UCGABAR_WAIT": 1, "STAS.128": 1, "MUFU.EX2": 32,
                 "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1}  # fmt: skip
        assert all(count[name] >= n for name, n in least.items()), (text.split()[0], count)
        families = collections.Counter()
        for name, n in count.items():
            families[name.partition(".")[0]] += n
        assert not families.keys() & {"DADD", "DMUL", "DFMA", "DSETP"}
        assert families["LDL"] + families["STL"] <= 24, (text.split()[0], families)  # of a row, not of an entry


def test_doctor_names_the_library(machine_code):
    report = subprocess.check_output([sys.executable, "-m", "fdistill_kernels.cli", "doctor"], cwd=ROOT, text=True)
    assert f"cuda_library: interface {cuda.INTERFACE}, for sm_90a" in report
    assert "backend cuda on cpu: the logits are on cpu" in report


@pytest.mark.parametrize("name", ["js", "gjs=0.1", "gjs=0.0001", "tvd"])
@pytest.mark.parametrize("case", ["a peak unlike the rest", "agreement but at the peak", "hot"])
def test_slopes_kept_in_sixteen_bits_are_as_good_as_a_rounding(name, case, monkeypatch):
    """Where they are not, a row's logits are read again: near-uniform students of sure teachers, tiny slopes."""
    emulate_cuda(monkeypatch, 2)
    torch.manual_seed(0)
    student = torch.randn(3, 8200) * (0.0 if case == "a peak unlike the rest" else 0.05)
    teacher = student + torch.randn(3, 8200) * (0.0 if case == "a peak unlike the rest" else 0.2)
    student[:, 7], teacher[:, 7] = 0.5, 9.0 if case != "hot" else 0.5
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    settings = dict(temperature=1e4 if case == "hot" and name != "tvd" else 1.0, reduction="sum")
    gradient = gradient_of(fk.f_divergence(student, teacher, name, backend="cuda", **settings), student).double()
    exact = student.detach().double().requires_grad_()
    wanted = gradient_of(fk.f_divergence(exact, teacher.double(), name, backend="torch", **settings), exact)
    rounding = (wanted.bfloat16().double() - wanted).norm(dim=1)
    assert ((gradient - wanted).norm(dim=1) < 1.5 * rounding + 1e-3 * wanted.norm(dim=1)).all()
    assert (gradient.sum(1).abs() < 0.05 * wanted.norm(dim=1)).all()


def test_rows_are_read_again_where_that_helps_alone(tmp_path, monkeypatch):
    """Counted in a copy of the kernels: of sure students and teachers, models that agree, and the rows that need it."""
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    kernel, call = source / "cuda" / "row_kernel.h", "this->read_again(row, logits);"
    text = kernel.read_text()
    assert text.count(call) == 1
    text = text.replace(call, f"rows_read_again += first(); {call}")
    kernel.write_text(
        text.replace("namespace fdistill {", 'extern "C" { int rows_read_again; }\nnamespace fdistill {', 1)
    )
    rows = source / "cuda" / "rows.cu"
    each = "FDISTILL_FIND(Js) FDISTILL_FIND(Tvd)"
    rows.write_text(re.sub(r"FDISTILL_FOR_EACH_DIVERGENCE_OF_GPUS\(FDISTILL_FIND\)", each, rows.read_text()))
    build_emulated(source, tmp_path / "counting.so")
    emulate_cuda(monkeypatch, 2)
    monkeypatch.setattr(cuda, "LIBRARY", cuda.Library(tmp_path / "counting.so"))
    counted = ctypes.c_int.in_dll(ctypes.CDLL(tmp_path / "counting.so"), "rows_read_again")

    def sure(of_student, of_teacher):
        """Rows whose models put so much of their mass on one entry, and the rest on tails that are alike."""
        tail = 0.7 * torch.randn(4, 4099)
        noisy = tail + 0.1 * torch.randn(4, 4099)
        for z, mass in ((tail, of_student), (noisy, of_teacher)):
            z[:, 7] = -torch.inf
            z[:, 7] = z.logsumexp(1) + math.log(mass / (1 - mass))
        return tail, noisy

    uniform, spiked = torch.zeros(4, 4099), torch.zeros(4, 4099)
    uniform[:, 5], spiked[:, 5], spiked[:, 9] = 0.5, 9.0, 6.0
    for name, (student, teacher), again in (
        ("js", sure(0.3, 0.9), 0), ("js", sure(0.9, 0.999), 0), ("tvd", sure(0.5, 0.9), 0), ("js", models(4, 4099), 0),
        ("js", sure(0.5, 0.5)[:1] * 2, 0), ("tvd", (uniform, spiked), 0), ("js", (uniform, spiked), 4),
    ):  # fmt: skip
        counted.value = 0
        x, y = student.detach().bfloat16().requires_grad_(), teacher.detach().bfloat16()
        gradient = gradient_of(fk.f_divergence(x, y, name, reduction="sum", backend="cuda"), x).double()
        exact = x.detach().double().requires_grad_()
        wanted = gradient_of(fk.f_divergence(exact, y.double(), name, reduction="sum", backend="torch"), exact)
        assert counted.value == again, (name, counted.value)
        rounding = (wanted.bfloat16().double() - wanted).norm(dim=1)
        assert ((gradient - wanted).norm(dim=1) <= 1.5 * rounding + 1e-3 * wanted.norm(dim=1)).all(), name


def test_the_interface_is_the_one_python_speaks(tmp_path):
    """Offsets of RowTask's fields, and what plans count with, from the compiler."""
    source = (
        '#include <cstddef>\n#include <cstdio>\n#include "cuda/row_kernel.h"\nusing namespace fdistill;\nint main() {\n'
    )
    for field, _ in native.RowTask._fields_:
        source += f'printf("%zu\\n", offsetof(fdistill::RowTask, {field}));\n'
    for number in ("sizeof(RowTask)", "sizeof(Launch)", "sizeof(Shared)"):
        source += f'printf("%zu\\n", size_t({number}));\n'
    source += "}"
    include = ["-I", ROOT / "csrc", "-I", ROOT / "tests"]
    command = ["g++", "-x", "c++", "-std=c++17", *include, "-o", tmp_path / "offsets", "-"]
    subprocess.run(command, input=source, check=True, text=True)
    offsets = [int(x) for x in subprocess.check_output([tmp_path / "offsets"], text=True).split()]

    assert native.ROW_TASK.size == ctypes.sizeof(native.RowTask) and offsets == [
        *(getattr(native.RowTask, f).offset for f, _ in native.RowTask._fields_),
        ctypes.sizeof(native.RowTask), ctypes.sizeof(cuda._Launch), cuda.DESK,
    ]  # fmt: skip


def test_without_nvcc_and_with_it_asked_for(tmp_path):
    """FDISTILL_CUDA: auto goes on without nvcc, 1 does not, 0 builds nothing."""
    code = """
import os, sys
sys.argv = ["setup.py", "--name"]
import setup
for wanted in ("auto", "0", "1", "yes"):
    os.environ["FDISTILL_CUDA"] = wanted
    try:
        setup.build_libraries(sys.path[0])
        print(wanted, "went on")
    except SystemExit as error:
        print(wanted, error)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "CXX": "nosuch", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, env=environment)
    auto, never, always, other = done.stdout.splitlines()[-4:]
    assert (auto, never) == ("auto went on", "0 went on")
    assert "no compiler 'nvcc'" in always and "must be 0, 1 or auto" in other
    assert not list(tmp_path.glob("*.so"))
