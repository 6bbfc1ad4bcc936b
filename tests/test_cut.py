"""The cut path (memory="minimal") in Triton's interpreter: every divergence and keyword, bands, skipping, memory."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, Path, Teacher, TokenTerms, Wants
from fdistill_kernels.backends.triton import cut
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows
from fdistill_kernels.values import Head

from .conftest import WHOLE, relative

N, V, D, D_T = 200, 301, 40, 72
MINIMAL = dict(memory="minimal", backend="triton")
OF_ENTRIES = [name for name, divergence in TABLE.items() if divergence.statistics is None]


@pytest.fixture(params=["one band", "bands of one tile"])
def bands(request, monkeypatch):
    if request.param == "one band":
        monkeypatch.setattr(cut.launch, "device_of", lambda _: cut.launch.Device("large", 32, 1 << 22, generation=9))
    else:
        monkeypatch.setattr(cut, "MEMORY", 1)
        monkeypatch.setattr(cut, "GROUP", 1)


def problem(dtype=torch.float32, n=N):
    student = (torch.randn(n, D).to(dtype).requires_grad_(), (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_())
    return (*student, torch.randn(n, D_T).to(dtype), (torch.randn(V, D_T) / D_T**0.5).to(dtype))


def exact(x):
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("name", OF_ENTRIES if WHOLE else OF_ENTRIES[::2])
def test_every_divergence(name, bands):
    hidden, weight, teacher, teacher_weight = problem()
    loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, name, temperature=1.5, **MINIMAL)
    h, w = exact(hidden), exact(weight)
    expected = f_divergence_rows(h @ w.T, teacher.double() @ teacher_weight.double().T, name, 1.5).mean()
    assert relative(loss, expected) < 2e-5
    got, want = (torch.autograd.grad(x, i) for x, i in ((loss, (hidden, weight)), (expected, (h, w))))
    assert all((g - e).norm() < 1e-4 * e.norm() for g, e in zip(got, want, strict=True))


@pytest.mark.parametrize("student, teacher, width", [("bfloat16", "float32", 96), ("float32", "bfloat16", 40),
                                                     ("float16", "float32", 32), ("float32", "float16", 72)])  # fmt: skip
def test_models_of_two_dtypes(student, teacher, width):
    """Each model's products are cut by its own dtype and width, in its own precision."""
    hidden, weight, *_ = problem(getattr(torch, student))
    other = [x.to(getattr(torch, teacher)) for x in (torch.randn(N, width), torch.randn(V, width) / width**0.5)]
    loss = fk.linear_f_divergence(hidden, weight, *other, "js", **MINIMAL)
    h, w = exact(hidden), exact(weight)
    expected = f_divergence_rows(h @ w.T, other[0].double() @ other[1].double().T, "js").mean()
    assert relative(loss, expected) < 1e-4
    got, want = (torch.autograd.grad(x, i) for x, i in ((loss, (hidden, weight)), (expected, (h, w))))
    assert all((g - e).norm() < 1e-2 * e.norm() for g, e in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["js", "kl", "rkl"])
def test_all_keywords(name, bands):
    hidden, weight, teacher, teacher_weight = problem()
    bias, teacher_bias = torch.randn(V, requires_grad=True), torch.randn(V)
    labels = torch.randint(V, (N,))
    labels[2:150] = -100  # a whole block of rows among them
    t = torch.rand(N) + 0.5
    keywords = dict(
        student_bias=bias, teacher_bias=teacher_bias, logit_scale=0.7, teacher_logit_scale=1.3, logit_softcap=2.0,
        teacher_logit_softcap=3.0, labels=labels, ce_weight=0.3, label_smoothing=0.1, z_loss=1e-2, temperature=t,
        token_weight=torch.rand(N), teacher_temperature=2.0, temperature_squared=True, num_items=17, return_parts=True,
    )  # fmt: skip
    results = []
    for path in (MINIMAL, dict(backend="torch")):
        loss, parts = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, name, **keywords, **path)
        results.append((loss, *parts, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert all(relative(a, b) < 2e-5 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing, bands):
    hidden, weight, *_ = problem()
    class_weight, target = torch.rand(V), torch.randint(V, (N,))
    target[:30] = -100
    h, w = exact(hidden), exact(weight)
    loss = fk.linear_cross_entropy(hidden, weight, target, weight=class_weight, label_smoothing=smoothing, **MINIMAL)
    expected = F.cross_entropy(h @ w.T, target, class_weight.double(), label_smoothing=smoothing)
    got, want = (torch.autograd.grad(x, i) for x, i in ((loss, (hidden, weight)), (expected, (h, w))))
    assert relative(loss, expected) < 1e-5 and all(relative(g, e) < 2e-5 for g, e in zip(got, want, strict=True))


def test_narrow_dtypes_frozen_heads_and_rows_of_their_own():
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        hidden, weight, teacher, teacher_weight = problem(dtype, 40)
        loss = fk.linear_f_divergence(hidden, weight.detach(), teacher, teacher_weight, reduction="none", **MINIMAL)
        upstream = torch.rand(40)
        h = exact(hidden)
        expected = f_divergence_rows(h @ exact(weight).T, teacher.double() @ teacher_weight.double().T, "js")
        (got,) = torch.autograd.grad((loss * upstream).sum(), hidden)
        (want,) = torch.autograd.grad((expected * upstream).sum(), h)
        assert got.dtype == dtype and (got - want).norm() < bound * want.norm() and relative(loss, expected) < bound


def peaked_problem(dtype):
    """Both models put all their probability on the first 128 entries, but for about e^-40."""
    hidden, weight, teacher, teacher_weight = (x.detach() for x in problem(dtype))
    for states, head in ((hidden, weight), (teacher, teacher_weight)):
        states[:, 0], head[:, 0] = 8, 0
        head[128:, 0] = -5
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight


@pytest.mark.parametrize("name", ["js", "kl", "tvd", "skew_kl", "rkl"])
def test_skipped_tiles_are_within_the_bound(name, monkeypatch):
    hidden, weight, teacher, teacher_weight = peaked_problem(torch.float32)
    labels = torch.randint(128, (N,))
    labels[150] = 200  # a live tile among the others
    seen = []
    original = cut._Sweeps.weight_gradient
    monkeypatch.setattr(cut._Sweeps, "weight_gradient", lambda self, *x: (seen.append(self.live), original(self, *x)))
    results = []
    for skip in (True, False):
        loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, name, labels=labels, ce_weight=1.0,
                                      skip_tiles=skip, reduction="sum", **MINIMAL)  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    skipped, whole = results
    assert skipped[0] == whole[0] and seen[1] is None
    if name == "rkl":
        assert seen[0] is None  # no bound, no skipping
    else:
        assert seen[0].tolist() == [[1, 0, 0], [1, 1, 0]]
        bound = 3 * torch.finfo(torch.float32).eps  # of a row's L1 norm: the divergence's 2ε, the cross-entropy's ε
        assert ((skipped[1] - whole[1]).abs().sum(1) <= bound * weight.abs().max() * D + 1e-6 * whole[1].norm()).all()
        assert (skipped[2][128:256] != 0).any() and (skipped[2][256:] == 0).all()


def test_nothing_is_skipped_of_a_flat_distribution():
    hidden, weight = torch.zeros(4, D, requires_grad=True), torch.randn(V, D)
    teacher = torch.zeros(4, D_T)
    bias = torch.linspace(0, 1e-2, V)
    loss = fk.linear_f_divergence(hidden, weight, teacher, torch.randn(V, D_T), "kl", student_bias=bias, **MINIMAL)
    assert torch.autograd.grad(loss, hidden)[0].abs().min() > 0


def test_same_inputs_give_the_same_bits_and_nan_is_seen():
    inputs = problem()
    one, two = (torch.autograd.grad(fk.linear_f_divergence(*inputs, **MINIMAL), inputs[:2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with torch.no_grad():
        inputs[0][3, 1] = float("nan")
    loss = fk.linear_f_divergence(*inputs, reduction="none", **MINIMAL)
    assert loss[3].isnan() and not loss[[0, 1, 2, 4]].isnan().any()
    loss = fk.linear_f_divergence(*inputs, **MINIMAL)
    assert torch.autograd.grad(loss, inputs[0])[0][3].isnan().all()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_masked_rows_are_not_read_and_light_ones_count(dtype, bound, bands):
    """Sweep 4's rows have their shares: 0 of one that is NaN, and in float16 what its power is of the largest."""
    hidden, weight, teacher, teacher_weight = (x.detach() for x in problem(dtype))
    bias, labels, token_weight = torch.randn(V).to(dtype), torch.randint(V, (N,)), torch.logspace(-6, 0, N)
    labels[3:9] = -100
    results = []
    for rows, path in ((float("nan"), MINIMAL), (0.0, dict(backend="torch"))):
        hidden[5], teacher[5] = rows, rows
        of = [(x if path is MINIMAL else x.double()).clone().requires_grad_() for x in (hidden, weight, bias)]
        models = [x.to(of[0].dtype) for x in (teacher, teacher_weight)]
        loss = fk.linear_f_divergence(*of[:2], *models, student_bias=of[2], labels=labels, ce_weight=0.3,
                                      token_weight=token_weight, **path)  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, of)))
    assert all((a - b).norm() <= bound * b.norm() for a, b in zip(*results, strict=True))


def test_misuse():
    hidden, weight, teacher, teacher_weight = problem()
    with pytest.raises(ValueError, match="give teacher_hidden and teacher_weight"):
        fk.linear_f_divergence(hidden, weight, teacher @ teacher_weight.T, memory="minimal")
    with pytest.raises(ValueError, match="memory must be one of chunks, minimal"):
        fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, memory="little")
    with pytest.raises(ValueError, match="teacher_logit_softcap needs teacher_weight"):
        fk.linear_f_divergence(hidden, weight, teacher @ teacher_weight.T, teacher_logit_softcap=3.0)
    with pytest.raises(ValueError, match="logit_softcap must be in"):
        fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, logit_softcap=0.0)


def between_kernels(shape, monkeypatch):
    """A call on a card, its kernels doing nothing: what nobody writes costs a test no memory. Also the grids to be."""
    grids = {}

    def stub(name):
        class Nothing:
            arg_names = ()

            def __getitem__(self, grid):
                return lambda *_, **__: grids.setdefault(name, []).append(math.prod(grid))

        return Nothing()

    for name in ("statistics_kernel", "tile_kernel", "product_kernel"):
        monkeypatch.setattr(cut, name, stub(name))
    n, v, d = shape
    monkeypatch.setattr(cut.launch, "device_of", lambda _: cut.launch.Device("H100", 132, 50 << 20, generation=9))
    hidden, weight = torch.empty(n, d, dtype=torch.bfloat16), torch.empty(v, d, dtype=torch.bfloat16)
    ones = torch.ones(n)
    terms = TokenTerms(ones, ones, ones, ones, 0.1 * ones, 0 * ones, ones.long(), None, TABLE["js"], 0.0)
    call = LinearCall(hidden, Head(weight), Teacher(hidden, weight), terms, Path(cut=True), Wants(True, True))
    return call, grids


def test_a_sweep_asks_triton_once_for_each_kind_of_launch():
    asked, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        arg_names = ("x", "out", "rows", "first", "BLOCK", "BLOCKS")

        def __getitem__(self, grid):
            return lambda *arguments, **keywords: asked.append((grid, arguments, keywords)) or Compiled()

    x, out = torch.empty(8), torch.empty(8, 64)
    run = cut._launch(Kernel(), x, rows=8, BLOCK=4, num_warps=8)
    first = {"out": out[0], "first": 0, "BLOCKS": 2}
    for grid, more in (((1, 2), {}), ((2, 2), {"first": 128}), ((3, 2), {"out": out[1]}), ((4, 2), {"first": 1}),
                       ((5, 2), {"first": 130}), ((6, 2), {"out": out[0][1:]}), ((7, 2), {"BLOCKS": 4}),
                       ((8, 2), {"first": 1 << 31}), ((9, 2), {"out": out[0].half()}), ((10, 2), {"first": 32})):  # fmt: skip
        run(grid, **first | more)
    assert [grid[0] for grid, *_ in asked] == [1, 4, 5, 6, 7, 8, 9]
    assert asked[0][1:] == ((x,), {"rows": 8, "BLOCK": 4, "num_warps": 8, **first})
    assert [grid for grid, _ in launched] == [(2, 2, 1), (3, 2, 1), (10, 2, 1)]
    assert launched[0][1][1] is first["out"] and launched[0][1][2:] == (8, 128, 4, 2) and launched[0][1][0] is x


LARGEST = [(65536, 128256, 2048)] if WHOLE else []


@pytest.mark.parametrize("shape", [(1024, 128256, 4096), (8192, 128256, 4096), *LARGEST])
def test_memory_of_the_sizes_that_matter(shape, monkeypatch):
    """Every allocation of the sweeps."""
    call, _ = between_kernels(shape, monkeypatch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outputs = cut.linear_rows(call)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    beyond = max(alive) - sum(x.nbytes for x in outputs)
    assert 8e6 < beyond <= 16e6, f"{beyond / 1e6:.1f} MB"


@pytest.mark.parametrize("megabytes", [16, 32, 4 * 8.192 * 2.048 + 32, 4 * 8.192 * 2.048 + 64])
def test_the_memory_that_is_given_is_used(megabytes, monkeypatch):
    """chunk_bytes: the more, the fewer launches; from 4·N·D + 32 MB on each tile of the gradient is made once."""
    n, v, d = 8192, 128256, 2048
    call, grids = between_kernels((n, v, d), monkeypatch)
    call = call._replace(path=Path(cut=True, chunk_bytes=round(1e6 * megabytes)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outputs = cut.linear_rows(call)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    beyond = max(alive) - sum(x.nbytes for x in outputs)
    assert 0.8e6 * megabytes < beyond <= 1.03e6 * megabytes, f"{beyond / 1e6:.1f} MB"  # besides: numbers of each row
    once = megabytes > 64
    assert sum(grids["tile_kernel"][1:]) == (1 if once else 2) * (n * v // 128**2)
    assert len(grids["tile_kernel"]) < (1100 if megabytes == 16 else 400 if not once else 200)


def test_launches_fill_the_card_with_nothing_between(monkeypatch):
    """A pair of sweeps 3 and 4 is two launches, of almost as many programs as the card has multiprocessors; torch is
    asked for a band's sum alone.
    """
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    (n, v, d), (high, long) = (4096, 128 * 256, 2048), (8, 16)
    call, grids = between_kernels((n, v, d), monkeypatch)
    with Seen():
        cut.linear_rows(call)
    pairs = 2 * n * v // (128 * 128 * high * long)
    assert len(grids["statistics_kernel"]) == 2
    assert grids["tile_kernel"][1:] == grids["product_kernel"] == [high * long] * pairs
    assert grids["tile_kernel"][0] > 0.95 * 132 * math.ceil(grids["tile_kernel"][0] / 132)  # a full last wave
    bands = (n + v) // (128 * high)
    assert len(seen) <= 110 + 4 * bands < 2 * pairs + 4 * bands


@pytest.mark.parametrize("masked", [False, True])
def test_a_loop_without_questions_gives_the_same_bits(masked, monkeypatch):
    """Where every tile is live and every row counts, loads wait for no flag and no share."""
    hidden, weight = (torch.randn(n, 32, requires_grad=True) for n in (300, 400))
    teacher, teacher_weight = torch.randn(300, 32), torch.randn(400, 32)
    labels = torch.zeros(300, dtype=torch.long)
    labels[5:200] = -100 if masked else 0
    results = []
    for number in (3, 4):
        monkeypatch.setattr(cut, "stages", lambda _, number=number: number)
        loss = fk.linear_f_divergence(hidden, weight, teacher, teacher_weight, "js", labels=labels, **MINIMAL)
        results.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
