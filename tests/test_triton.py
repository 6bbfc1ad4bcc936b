"""What the Triton backend alone promises; its numerics are in test_divergences and test_functional."""

import collections
import functools
import json
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import fdistill_kernels as fk
from fdistill_kernels import cli
from fdistill_kernels.backends import triton as triton_backend
from fdistill_kernels.backends.rows import RowCall, TokenTerms
from fdistill_kernels.backends.triton import launch, why_not
from fdistill_kernels.reference import f_divergence_rows
from fdistill_kernels.verify import verify

from . import interpreter
from .conftest import WHOLE, assert_masks_of_two_kinds_agree, reference, relative

V, WIDE = 4096, 1 << 16


@pytest.fixture
def traffic(monkeypatch):
    """Bytes that the interpreter's loads and stores move, by blocks that are few of a WIDE row. What a stretch's end reads
    again (stretches.py's `ahead`), a chip has at hand.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    moved, recent = {"load": 0, "store": 0}, collections.deque(maxlen=4)

    def count(kind, original):
        def counted(self, ptrs, *args, **kwargs):
            mask = next(a for a in (args[1:] if kind == "store" else args) if hasattr(a, "data"))
            read = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].tobytes()
            if kind == "store" or read not in recent:
                moved[kind] += int(mask.data.sum()) * ptrs.dtype.scalar.element_ty.primitive_bitwidth // 8
            recent.append(read)
            return original(self, ptrs, *args, **kwargs)

        return counted

    for kind in moved:
        name = f"create_masked_{kind}"
        monkeypatch.setattr(InterpreterBuilder, name, count(kind, getattr(InterpreterBuilder, name)))
    with launch.forced(launch.Launch(1024, 4, 2)):
        yield moved


#: Passes over N·V·bytes: with the student's gradient, and without any.
PASSES = {"kl": (5, 4), "cross_entropy": (5, 4), "rkl": (7, 4), "engine": (7, 4), "js": (7, 4), "tvd": (7, 4),
          "jeffreys": (7, 4), "skew_kl": (7, 4), "alpha": (7, 4), "triangular": (7, 4)}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize(
    "name, dtype",
    [
        (n, d)
        for n in PASSES
        for d in (torch.float32, torch.bfloat16)
        if WHOLE or n in ("kl", "js") or (d is torch.bfloat16 and n in ("cross_entropy", "tvd", "skew_kl", "alpha"))
    ],
    ids=str,
)
def test_bytes_moved(name, dtype, traffic):
    student, teacher = torch.randn(2, WIDE).to(dtype), torch.randn(2, WIDE).to(dtype)
    for passes, needs_gradient in zip(PASSES[name], (True, False), strict=True):
        traffic.update(load=0, store=0)
        fk.f_divergence(student.clone().requires_grad_(needs_gradient), teacher, name, backend="triton")
        assert sum(traffic.values()) / student.nbytes == pytest.approx(passes, abs=0.15)
        assert (traffic["store"] > student.nbytes) == needs_gradient


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_labels_alone_move_three_passes_and_ignored_rows_none(traffic):
    logits, labels = torch.randn(4, WIDE, requires_grad=True), torch.randint(WIDE, (4,))
    fk.cross_entropy(logits, labels, backend="triton")
    assert sum(traffic.values()) / logits.nbytes == pytest.approx(3, abs=0.05)
    traffic.update(load=0, store=0)
    fk.cross_entropy(logits, labels.fill_(-100), backend="triton")
    assert traffic["load"] < 100 and traffic["store"] == pytest.approx(logits.nbytes, abs=100)


@triton.jit
def own_pearson(p, q, log_p, log_q, parameter):
    t = tl.exp(tl.where(q > 0, log_p - log_q, 0.0))
    return q * (1 - t * t), 2 * p * (t - 1)


@pytest.mark.parametrize(
    "given", [3, own_pearson.fn, triton.jit(lambda p, q: (p, q))], ids=["no function", "plain", "two"]
)
def test_pairs_that_no_kernel_can_call_are_refused(given):
    with pytest.raises(TypeError, match=r"own: triton must be a @triton\.jit function"):
        fk.FDivergence(lambda t: (t - 1) ** 2, triton=given, name="own")


def test_own_pair():
    own = fk.FDivergence(lambda t: (t - 1) ** 2, triton=own_pearson, name="own pearson")
    assert "without a Triton pair" in why_not(
        torch.device("cpu"), torch.float32, fk.FDivergence(lambda t: (t - 1) ** 2)
    )
    outcomes = list(verify("cpu", [torch.float32], (3, 1500), [own]))
    assert {o.backend for o in outcomes} == {"triton", "torch"} and all(o.ok for o in outcomes)
    student, teacher = torch.randn(3, 700, requires_grad=True), torch.randn(3, 700)
    loss = fk.f_divergence(student, teacher, own, backend="triton")
    assert relative(loss, fk.f_divergence(student, teacher, "pearson")) < 1e-5


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 1023, 1025])
@pytest.mark.parametrize("splits", [1, 4])
def test_vocabularies_and_launches_change_nothing(vocabulary, splits, monkeypatch):
    student, teacher = torch.randn(5, vocabulary, requires_grad=True), torch.randn(5, vocabulary)
    loss, expected_gradient, _ = reference(student, teacher, "js")
    for block, programs in ((64, 1), (256, 5), (2048, 3)):
        monkeypatch.setattr(launch, "choose", lambda *_, b=block, p=programs: launch.Launch(b, 4, p, splits))
        got = fk.f_divergence(student, teacher, "js", reduction="sum", backend="triton")
        (gradient,) = torch.autograd.grad(got, student)
        assert relative(got, loss) < 1e-5 or vocabulary == 1
        assert relative(gradient, expected_gradient) < 1e-5 or vocabulary == 1


@pytest.mark.parametrize("name", ["kl", "js", "jeffreys", "tail_aware", None])
def test_a_team_s_launch_is_its_phases(name, monkeypatch):
    """Its programs wait for each other, so here they take turns; the sums are the same, in the same order, bit by bit."""
    student, teacher = torch.randn(5, 300).bfloat16(), torch.randn(5, 300).bfloat16()
    student[2], teacher[4, 30:] = teacher[2], -torch.inf
    labels = torch.tensor([0, 299, 7, -100, 150])
    launches, same = [], functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

    def run(together, inplace):
        monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2, 3, together=together))
        x, options = student.clone().requires_grad_(), dict(reduction="sum", backend="triton", inplace=inplace)
        if name is None:
            loss = fk.cross_entropy(x, labels, **options)
        else:
            loss = fk.f_divergence(x, teacher, name, labels=labels, ce_weight=0.5, **options)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def at_once(fn, *of):
        launches.append(fn.__name__)
        return interpreter.AtOnce(fn, *of)

    expected = run(False, False)
    monkeypatch.setattr(triton_backend, "TEAMS_RUN", True)
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor", at_once)
    for inplace in (False, True):
        loss, gradient = run(True, inplace)
        # kl's sum is made in its last sweep, by its terms there
        (torch.testing.assert_close if name == "kl" else same)(loss, expected[0])
        same(gradient, expected[1])
    assert launches.count("row_kernel") == 2


def test_functions_of_one_name_are_two_kinds():
    """Triton keeps what it has compiled in files, which go by the sources of functions, not by their names."""
    from fdistill_kernels.backends.triton.kernels.entries import Kind

    functions = [types.SimpleNamespace(cache_key=source) for source in ("p - q", "q - p")]
    assert len({Kind(function, None, "own", False, False, 0).cache_key for function in functions}) == 2
    assert Kind(None, None, None, True, True, 0).cache_key == "None-None-None-True-True-0"


LINE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}


@pytest.mark.parametrize("dtype", LINE, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_start_anywhere_in_their_lines(dtype, offsets, splits, monkeypatch):
    """Both models' at the same places, or not; nothing beside a row is read as its own, or written."""
    vocabulary, beside, lines, original = 203, 11, [], triton_backend._line
    monkeypatch.setattr(triton_backend, "_line", lambda *a: lines.append(original(*a)) or lines[-1])
    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2, splits))
    buffers = [torch.full((2000,), 1e4).to(dtype) for _ in offsets]
    student, teacher = (
        b[16 + k :].as_strided((1, 5, vocabulary), (0, vocabulary + beside, 1))
        for b, k in zip(buffers, offsets, strict=True)
    )
    for x in (student, teacher):
        x.copy_(2 * torch.randn(x.shape))
    x, t = student[0].clone(), teacher[0].clone()
    labels = torch.tensor([0, 202, 77, 63, 64])
    ones, untouched = torch.ones(5), buffers[0].clone()
    terms = TokenTerms(ones, ones, ones, ones, 0.5 * ones, 0 * ones, labels, None, fk.TABLE["js"], 0.0)
    parts, *_ = triton_backend.divergence_rows(RowCall(student, teacher, terms, student_gradient=True, inplace=True))
    assert lines == [LINE[dtype] if offsets[0] == offsets[1] else 1]
    exact = x.double().requires_grad_()
    divergence = f_divergence_rows(exact, t.double(), "js")
    loss = divergence.sum() + 0.5 * torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    torch.testing.assert_close(parts[0].double(), divergence.detach(), rtol=1e-5, atol=1e-6)
    error = relative(student[0], torch.autograd.grad(loss, exact)[0])
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    student.copy_(x)
    assert torch.equal(buffers[0], untouched)


@pytest.mark.parametrize("dtype", LINE, ids=str)
@pytest.mark.parametrize("name", ["akl", "dkd", "renyi", "csd", "js"])
def test_looks_at_rows_that_start_anywhere(name, dtype, monkeypatch):
    """Statistics of rows, and metrics, of views into something larger."""
    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2, 1))
    wide = [torch.full((5, 230), 100.0).to(dtype) for _ in range(2)]
    for x in wide:
        x[:, 3:206] = 2 * torch.randn(5, 203)
    student, teacher = (x[:, 3:206] for x in wide)
    labels = torch.tensor([0, 202, 77, 63, 64])
    keywords = dict(labels=labels, reduction="none", return_parts="metrics", backend="triton")
    got, want = (
        fk.f_divergence(s, t, name, **keywords)
        for s, t in ((student, teacher), (student.contiguous(), teacher.contiguous()))
    )
    flat = torch.utils._pytree.tree_leaves
    assert len(flat(got)) > 6
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("vocabulary", [2, 70, 203])
def test_rows_of_float32_s_lowest_number(vocabulary, splits, monkeypatch):
    """A uniform distribution, whose lanes without an entry have the same top."""
    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2, splits))
    for name in ("kl", "rkl", "js", "tvd", "jeffreys", "entropy_gated", "skew_kl"):
        student, teacher = torch.full((2, 3, vocabulary), torch.finfo(torch.float32).min)
        student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = fk.f_divergence(student, teacher, name, backend="triton")
        gradients = torch.autograd.grad(loss, (student, teacher))
        assert abs(loss) < 1e-7 and all(g.abs().max() < 1e-7 for g in gradients), name


TIES = [(3, 4), (3, 3 + 8), (3, 3 + 256), (3, 130), (7, 499)]


@pytest.mark.parametrize(
    "name, peaks", [*((name, tie) for name in ("rkl", "js") for tie in TIES), *((n, (299,)) for n in PASSES)], ids=str
)
@pytest.mark.parametrize("splits", [1, 3])
def test_peaks_far_above_the_rest_keep_the_rest_s_digits(name, peaks, splits, monkeypatch):
    """Alone, or a tie within a group of entries, a lane, a block, or none of them: both models are the same there."""
    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(256, 1, 2, splits))
    student, teacher = torch.randn(3, 700), torch.randn(3, 700)
    for x in (student, teacher):
        x[:, list(peaks)] = 30.0
    student.requires_grad_()
    loss, expected, _ = reference(student, teacher, name)
    got = fk.f_divergence(student, teacher, name, reduction="sum", backend="triton")
    assert relative(got, loss) < 1e-4 and 0 < loss < 1e-7
    assert relative(torch.autograd.grad(got, student)[0], expected) < 1e-4


@pytest.fixture(params=["left", "right"])
def contracted(request, monkeypatch):
    """The interpreter with a card's arithmetic, where a product that is added is not rounded before; in small blocks."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2))
    product = Builder.create_fmul

    def multiplied(self, lhs, rhs):
        result = product(self, lhs, rhs)
        if result.data.dtype == np.float32:
            with np.errstate(all="ignore"):
                result.exact = lhs.data.astype(np.float64) * rhs.data.astype(np.float64)
        return result

    def summed(original, sign):
        def sum_of(self, lhs, rhs):
            result = original(self, lhs, rhs)
            of = [side for side in (lhs, rhs) if hasattr(side, "exact")]
            if of:
                fused = of[0] if request.param == "left" else of[-1]
                one, other = (side.exact if side is fused else side.data for side in (lhs, rhs))
                with np.errstate(all="ignore"):
                    result.data = (one + sign * other).astype(np.float32)
            return result

        return sum_of

    monkeypatch.setattr(Builder, "create_fmul", multiplied)
    monkeypatch.setattr(Builder, "create_fadd", summed(Builder.create_fadd, 1.0))
    monkeypatch.setattr(Builder, "create_fsub", summed(Builder.create_fsub, -1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize(
    "dtype, splits",
    [(d, n) for d in LINE for n in (1, 3) if WHOLE or (d is torch.bfloat16) == (n == 3)], ids=str,
)  # fmt: skip
def test_nothing_is_read_or_written_beside_a_tensor(dtype, splits, monkeypatch):
    """Not in the lines of 16 bytes that its first row starts in and its last row ends in, either."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2, splits))
    owned = []

    def checked(original):
        def access(self, ptrs, *args, **kwargs):
            arrays = [a.data for a in args if isinstance(getattr(a, "data", None), np.ndarray)]
            mask = next(a for a in reversed(arrays) if a.dtype.kind == "b")
            size = ptrs.dtype.scalar.element_ty.primitive_bitwidth // 8
            at = ptrs.data[np.broadcast_to(mask, ptrs.data.shape)].astype(np.int64)
            for first, begin, end, last in owned:  # of a storage, what the tensor has of it
                wrong = (at + size > first) & (at < last) & ((at < begin) | (at + size > end))
                assert not wrong.any(), "beside a tensor"
            return original(self, ptrs, *args, **kwargs)

        return access

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name)))

    def inside(offset, rows, vocabulary):
        storage = torch.randn(rows * vocabulary + 64).to(dtype)
        x = storage[offset : offset + rows * vocabulary].view(rows, vocabulary)
        owned.append((storage.data_ptr(), x.data_ptr(), x.data_ptr() + x.nbytes, storage.data_ptr() + storage.nbytes))
        return x

    for vocabulary in (7, 64, 203):
        for offsets in ((0, 0), (3, 3), (1, 2)):
            owned.clear()
            student, teacher = (inside(offset, 3, vocabulary) for offset in offsets)
            labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            for name in ("js", "kl", "lk"):
                of = student.detach().requires_grad_()
                loss = fk.f_divergence(of, teacher, name, labels=labels, ce_weight=0.5, backend="triton")
                torch.autograd.grad(loss, of)
            fk.f_divergence(student, teacher, "js", labels=labels, return_parts="metrics", backend="triton")


@pytest.mark.parametrize("name", ["js", "gjs=0.05", "gjs=0.9", "skew_rkl"])
def test_rows_of_almost_one_entry(name):
    """Their gradients, of 1e-7 and less, are made of log(1 + x) of such x; float64 has no digits of them from 30 on."""
    for spread in (0.3, 3.0, 10.0, 14.0):
        student, teacher = (spread * torch.randn(4, 700) for _ in range(2))
        student.requires_grad_()
        exact = fk.f_divergence(student.double(), teacher.double(), name, reduction="sum", backend="torch")
        got = fk.f_divergence(student, teacher, name, reduction="sum", backend="triton")
        gradient, found = (torch.autograd.grad(loss, student)[0].double() for loss in (exact, got))
        of_row = (found - gradient).abs().amax(1) / gradient.abs().amax(1)
        assert max(relative(got, exact), of_row.max().item()) < 1e-5


@pytest.mark.parametrize("name", [*sorted(set(fk.TABLE) - {"dkd"}), "gjs=0.1", "skew_kl=0.1", "todi=2", "alpha=0.3"])
def test_masks_of_two_kinds(name):
    assert_masks_of_two_kinds_agree(name, "triton", "cpu", "torch")


@pytest.mark.parametrize("name", ["js", "gjs=0.1", "skew_rkl", "tvd", "kl"])
def test_rows_that_differ_at_the_peak_alone(name):
    """Thousands of entries where the models agree: what a logarithm is wrong by in one direction is there in all."""
    student = 0.3 * torch.randn(2, 4096)
    teacher = student.clone()
    student[:, 7] += 4.0
    loss, gradient, _ = reference(student, teacher, name)
    student.requires_grad_()
    got = fk.f_divergence(student, teacher, name, reduction="sum", backend="triton")
    assert relative(got, loss) < 3e-5
    assert relative(torch.autograd.grad(got, student)[0], gradient) < 3e-5


@pytest.mark.parametrize(
    "name, dtype",
    [(n, d) for n in (*PASSES, "lk", "csd") for d in (torch.bfloat16, torch.float16)
     if WHOLE or d is torch.bfloat16 or n in ("kl", "js", "csd")], ids=str,
)  # fmt: skip
def test_one_temperature_and_two(name, dtype):
    """Of 16-bit logits at one temperature u is made of what is exact; at two, or of float32, otherwise."""
    outcomes = []
    for spread, apart in ((1e-3, 1e-3), (0.3, 1e-2), (3.0, 1e-3), (3.0, 1e-1), (10.0, 1.0), (3.0, 3.0), (100.0, 20.0)):
        student = (spread * torch.randn(3, 700)).to(dtype)
        teacher = (student + apart * torch.randn(3, 700)).to(dtype)
        if spread < 0.01:  # entries far below the top, whose distance from it has not all of their digits
            student[:, 5], teacher[:, 5] = 9.0, 9.0
        student, teacher = student.requires_grad_(), teacher + (50.0 if spread == 3.0 else 0.0)
        loss, gradient, _ = reference(student.float(), teacher.float(), name, temperature=2.0)
        for temperature in (2.0, torch.full((3,), 2.0)):
            got = fk.f_divergence(student, teacher, name, reduction="sum", backend="triton", temperature=temperature)
            found = torch.autograd.grad(got, student)[0]
            # of the row's largest, in what the dtype has of it
            steps = (found.double() - gradient).abs().max() / (torch.finfo(dtype).eps * gradient.abs().max() + 6e-8)
            outcomes.append((spread, apart, relative(got, loss), steps.item()))
    assert not [o for o in outcomes if o[2] > 2e-5 or o[3] > 1], outcomes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["kl", "rkl", "js", "gjs=0.05", "tvd", "csd", "todi", "jeffreys", "ab"])
def test_logits_of_other_sizes(name, dtype):
    """Models whose tops are so far apart that a difference between them has no digits left for the entries' own."""
    flat, lowest = torch.tensor([[0.15, 0.05, 0.0, 0.1]]), torch.finfo(dtype).min
    pairs = [(torch.full((1, 4), lowest), flat), (torch.full((1, 65), lowest), torch.randn(1, 65))]
    pairs += [
        (torch.full((1, 65), -1e4), 0.3 * torch.randn(1, 65)),
        (0.1 * torch.randn(3, 65), 1e3 + 0.1 * torch.randn(3, 65)),
    ]
    pairs += [(-0.9 * torch.tensor([[lowest, 0.97 * lowest]]), 0.9 * torch.tensor([[lowest, 0.97 * lowest]]))]
    for pair in pairs:
        for student, teacher in (pair, pair[::-1]):
            student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
            got, loss = (
                fk.f_divergence(x, y, name, reduction="sum", backend=backend)
                for x, y, backend in ((student, teacher, "triton"), (student.double(), teacher.double(), "torch"))
            )
            found, gradient = (torch.autograd.grad(x, student)[0].double() for x in (got, loss))
            torch.testing.assert_close(got.double(), loss, rtol=2e-5, atol=1e-8)
            steps = (found - gradient).abs().max() / (torch.finfo(dtype).eps * gradient.abs().max() + 6e-8)
            assert steps < 1


@pytest.mark.parametrize("mask", [-1e4, -1e6, -1e30, torch.finfo(torch.float32).min, -torch.inf])
def test_contracted_sums_of_masked_models(mask, contracted):
    """Models that have nothing in common but entries that neither has."""
    student, teacher = torch.full((2, 300), mask), torch.full((2, 300), mask)
    student[:, 5], teacher[:, 200] = 0.0, 0.0
    for name in ("js", "gjs=0.1", "tvd"):
        student.requires_grad_()
        loss = fk.f_divergence(student, teacher, name, reduction="none", backend="triton")
        wanted, gradient, _ = reference(student, teacher, name)
        assert relative(loss.sum(), wanted) < 1e-6, name
        got = torch.autograd.grad(loss.sum(), student)[0]
        assert (got.double() - gradient).abs().max() < 1e-6


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("name", [*PASSES, "lk"])
def test_contracted_sums_of_equal_models(name, cap, contracted):
    logits = (3 * torch.randn(3, 300)).requires_grad_()
    keywords = dict(logit_softcap=cap, teacher_logit_softcap=cap)
    loss = fk.f_divergence(logits, logits.detach(), name, backend="triton", **keywords)
    (gradient,) = torch.autograd.grad(loss, logits)
    if name in ("tvd", "lk"):
        assert loss == 0 and (gradient == 0).all()
    elif name not in ("engine", "cross_entropy"):
        assert loss.abs() < 1e-9 and gradient.abs().max() < 1e-9


@pytest.mark.parametrize("spread", [1.0, 4.0, 15.0])
def test_contracted_sums_keep_every_divergence(spread, contracted):
    outcomes = []
    for name in PASSES:
        student, teacher = (spread * torch.randn(3, 700) for _ in range(2))
        student.requires_grad_()
        loss, gradient, _ = reference(student, teacher, name)
        got = fk.f_divergence(student, teacher, name, reduction="sum", backend="triton")
        outcomes.append((name, relative(got, loss), relative(torch.autograd.grad(got, student)[0], gradient)))
    assert not [o for o in outcomes if max(o[1:]) > 5e-5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_told(value):
    logits = torch.randn(2, 300)
    logits[0, 77] = value
    logits.requires_grad_()
    losses = fk.cross_entropy(logits, torch.tensor([5, 5]), reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert not losses[0].isfinite() and losses[1].isfinite()
    assert gradient[0].isnan().any() and gradient[1].isfinite().all()
    for name in (*PASSES, "gjs=0.1"):
        student = torch.randn(2, 300, requires_grad=True)
        loss = fk.f_divergence(student, logits.detach(), name, reduction="none", backend="triton")
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert not loss[0].isfinite() and loss[1].isfinite(), name
        assert gradient[1].isfinite().all() and gradient[0].nan_to_num(0.0).abs().max() <= 1, name


@pytest.mark.parametrize("name", [*PASSES, "gjs=0.1", "lk"])
def test_lowest_logits_beside_masks(name, monkeypatch):
    """A lane of −inf alone has no more than LOWEST, as have the row's largest logits, which another lane holds."""
    monkeypatch.setattr(launch, "choose", lambda *_: launch.Launch(64, 1, 2))
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [20, 90, 150]] = torch.finfo(torch.float32).min
    student = logits.clone().requires_grad_()
    loss = fk.f_divergence(student, logits, name, backend="triton")
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.tensor(3.0 if name in ("engine", "cross_entropy") else 1.0).log()  # entropies
    assert (loss - expected).abs() < 1e-6 and gradient.abs().max() < 1e-7


H100 = launch.Device("H100", 132, 50 << 20, registers=launch.REGISTERS)


@pytest.mark.parametrize("symbol", ["Kl", "Js", "SkewKl"])
@pytest.mark.parametrize("rows, vocabulary, itemsize", [(8192, 128256, 2), (4096, 32000, 2), (8192, 262144, 4),
                                                        (8, 256000, 2), (1, 1000000, 4)])  # fmt: skip
def test_heuristic(rows, vocabulary, itemsize, symbol):
    chosen = launch.heuristic(rows, vocabulary, itemsize, H100, symbol)
    assert chosen.block // (32 * chosen.warps) * itemsize in (16, 32)  # a thread's share is whole 16-byte loads
    assert chosen.programs * chosen.splits >= min(rows, H100.processors) * 0.9
    if rows < H100.processors:
        assert chosen.splits > 1 and chosen.splits * rows <= H100.processors  # a few rows fill the card
    else:
        shared = 1 if vocabulary > 32000 else 2  # where L2 does not hold so many rows
        assert chosen.programs == shared * H100.processors
        assert 0.95 < shared * 32 * chosen.warps * chosen.registers / H100.registers <= 1
    assert chosen.options["maxnreg"] == chosen.registers
    other = launch.heuristic(rows, vocabulary, itemsize, launch.Device("MI300X", 304, 4 << 20, lanes=64), symbol)
    assert "maxnreg" not in other.options  # it cannot be told


@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_heuristic_of_hopper(vocabulary):
    """Three programs a multiprocessor of what puts nothing aside with 80 registers a thread."""
    hopper = replace(H100, generation=9)
    chosen = launch.heuristic(8192, vocabulary, 2, hopper, "Js")
    assert chosen == launch.Launch(2048, 8, 3 * hopper.processors, registers=80)
    for symbol, trained in (("Js", True), ("SkewKl", False), ("own", False), ("Dkd", False)):
        chosen = launch.heuristic(8192, vocabulary, 2, hopper, symbol, trained)
        assert chosen == launch.heuristic(8192, vocabulary, 2, H100, symbol)


def test_more_rows_than_kernels_count(monkeypatch):
    """Numbers of a row lie rows apart, up to nine times, which 32 bits count."""
    monkeypatch.setattr("fdistill_kernels.backends.triton.MOST_ROWS", 7)
    for rows in (7, 8):
        student = torch.randn(rows, 9)
        if rows == 7:
            fk.f_divergence(student, torch.randn(rows, 9), backend="triton", return_parts="metrics")
        else:
            with pytest.raises(ValueError, match="8 rows of logits: the Triton kernels take 7 at once"):
                fk.f_divergence(student, torch.randn(rows, 9), backend="triton", return_parts="metrics")


def test_tuned_launch_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    launch._tuned.cache_clear()
    cpu = torch.device("cpu")
    tuned = launch.Launch(512, 4, 2)
    assert launch.choose(10, 3000, 4, cpu, "Kl") != tuned
    launch.remember(tuned, launch.device_of(cpu), "Kl", 3000, 4)
    assert launch.choose(10, 3000, 4, cpu, "Kl") == tuned
    assert launch.choose(1, 3000, 4, cpu, "Kl").programs == 1 and launch.choose(10, 3001, 4, cpu, "Kl") != tuned
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_kernels", lambda: "others")
        launch._tuned.cache_clear()
        assert launch.choose(10, 3000, 4, cpu, "Kl") != tuned
    launch._tuned.cache_clear()
    path = launch.cache_file()
    path.write_text(path.read_text().replace("|Kl|", "|Rkl|"))  # another process's, since
    launch.remember(tuned, launch.device_of(cpu), "Tvd", 3000, 4)
    assert {key.split("|")[1] for key in json.loads(path.read_text())} == {"Rkl", "Tvd"}
    with launch.forced(tuned):
        with launch.forced(launch.Launch(1024, 8, 2)):
            pass
        assert launch.choose(10, 77, 4, cpu, "Kl") == tuned
    launch._tuned.cache_clear()


@pytest.mark.parametrize("text", ["{", "[1]", '{"of": 5}', '{"of": {"block": 8}}', '{"of": {"shape": 8}}'])
def test_damaged_launches_are_none(text, tmp_path, monkeypatch):
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    cpu, tuned = torch.device("cpu"), launch.Launch(512, 4, 2)
    launch.cache_file().write_text(text.replace('"of"', '"interpreter|Kl|3000|32 bit"'))
    launch._tuned.cache_clear()
    assert launch.choose(10, 3000, 4, cpu, "Kl") == launch.heuristic(10, 3000, 4, launch.device_of(cpu), "Kl")
    launch.remember(tuned, launch.device_of(cpu), "Kl", 3000, 4)
    assert launch.choose(10, 3000, 4, cpu, "Kl") == tuned
    launch._tuned.cache_clear()


def test_a_launch_is_chosen_without_a_home(monkeypatch):
    """As in a container whose user has no entry in /etc/passwd."""
    for name in ("FDISTILL_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    launch._tuned.cache_clear()
    assert launch.choose(10, 3000, 4, torch.device("cpu"), "Kl")
    launch._tuned.cache_clear()


def test_tune_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    arguments = ["bench", "--tune", "--divergence", "js", "--shape", "2,1100", "--json"]
    assert cli.main(arguments) == 0
    tried = json.loads(capsys.readouterr().out)
    assert len(tried) > 3 and tried == sorted(tried, key=lambda row: row["seconds"])
    (kept,) = json.loads(launch.cache_file().read_text()).values()
    assert kept == {k: tried[0][k] for k in ("block", "warps", "programs", "splits", "registers", "together")}
    launch._tuned.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(arguments) == 2 and "the logits are on cpu" in capsys.readouterr().err


def test_same_bits_every_time(backend):
    student, teacher = torch.randn(3, 3000, requires_grad=True), torch.randn(3, 3000)
    runs = [torch.autograd.grad(fk.f_divergence(student, teacher, "js", backend=backend), student)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_upstream_gradient_of_one_moves_nothing(traffic):
    from fdistill_kernels.backends.triton import scale_

    gradient = torch.randn(1, 3, 5000)
    expected = gradient.clone()
    scale_(gradient, torch.tensor(1.0))
    assert torch.equal(gradient, expected) and traffic["load"] + traffic["store"] < 100
    scale_(gradient, torch.tensor([1.0, 0.5, -2.0]))
    assert torch.equal(gradient, expected * torch.tensor([1.0, 0.5, -2.0]).view(1, 3, 1))
    gradient[0, 1] = 0
    for factor in (torch.tensor(torch.inf), torch.tensor([2.0, torch.nan, 2.0])):
        scale_(gradient, factor, torch.tensor([1.0, 0.0, 1.0]))
        assert (gradient[0, 1] == 0).all() and not gradient[0, 0].isnan().any()


def test_vmap_is_refused(backend):
    with pytest.raises(NotImplementedError, match=r"torch.func.*leading dimensions"):
        torch.func.vmap(lambda s, t: fk.f_divergence(s, t, backend=backend))(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
