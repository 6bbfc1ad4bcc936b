"""quack's tests of its cross-entropy of logits and from hidden states."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .grid import BF16, F16, F32, WHOLE, agree, asks, close, points, true_cross_entropy, true_logits

PEER = "quack"
VOCABULARIES = [192, 668, 1024, 1128, 4096, 32768, 128256, 262144]
DTYPES = [BF16, F16, F32]
#: Gradients are compared in the dtype itself, where one rounding is the least that can be asked.
TOLERANCE = dict(atol=5e-5, rtol=1e-5)


def drawn(rows, vocabulary, dtype, weighted, ignored):
    target = torch.randint(vocabulary, (rows,))
    if ignored:
        target = torch.where(torch.rand(rows) < 0.3, -100, target)
    given = dict(input=0.1 * torch.randn(rows, vocabulary).to(dtype), target=target)
    return given | (dict(weight=torch.rand(vocabulary) + 0.1) if weighted else {})


def true_loss(input, target, weight=None, reduction="none", **keywords):
    return true_cross_entropy(input, target, class_weight=weight, reduction=reduction, **keywords)


def rounding(dtype, tolerance):
    return dict(atol=tolerance["atol"], rtol=max(tolerance["rtol"], torch.finfo(dtype).eps))


@asks("cross-entropy a token: vocabularies to 262144, one row and many, class weights, 30% ignored or none")
@points(vocabulary=VOCABULARIES, rows=[1, 289], dtype=DTYPES, weighted=[False, True], ignored=[False, True])
def test_cross_entropy(vocabulary, rows, dtype, weighted, ignored):
    def ours(backend, **given):
        return fk.cross_entropy(**given, reduction="none", backend=backend)

    agree(rows, vocabulary, lambda n: drawn(n, vocabulary, dtype, weighted, ignored), ours, true_loss,
          factor="random", wrt=("input",), **rounding(dtype, TOLERANCE))  # fmt: skip


@asks("ignored tokens are 0, every loss is finite, not negative, float32 and of the target's shape")
@points(dtype=DTYPES, vocabulary=[192, 32768], backend=["torch", "cpu"])
def test_every_loss(dtype, vocabulary, backend):
    given = drawn(77, vocabulary, dtype, True, True)
    loss = fk.cross_entropy(**given, reduction="none", backend=backend)
    assert loss.dtype == F32 and loss.shape == (77,) and loss.isfinite().all() and (loss >= 0).all()
    assert not loss[given["target"] == -100].any()


@asks("cross-entropy inside torch.compile(fullgraph=True)")
@points(vocabulary=[192, 4096], rows=[1, 289], dtype=DTYPES, weighted=[False, True])
def test_compiled(vocabulary, rows, dtype, weighted):
    """Traced and differentiated by the compiler; its code generator, which sees one operator, is left out."""
    torch.compiler.reset()
    compiled = torch.compile(fk.cross_entropy, fullgraph=True, backend="aot_eager")
    agree(rows, vocabulary, lambda n: drawn(n, vocabulary, dtype, weighted, True),
          lambda backend, **given: compiled(**given, reduction="none", backend=backend), true_loss,
          factor="random", backends=("cpu",), wrt=("input",), **rounding(dtype, TOLERANCE))  # fmt: skip


@asks("log-sum-exps of parts of the vocabulary, given (lse_partial)",
      cannot="a row's logits are read, not what is known of them; the loss is the same")  # fmt: skip
@points(dtype=[BF16])
def test_no_partial_sums(dtype):
    given = drawn(4, 128256, dtype, False, False)
    partial = given["input"].view(4, -1, 128).float().logsumexp(-1)
    with pytest.raises(TypeError, match="lse_partial"):
        fk.cross_entropy(**given, lse_partial=partial)
    at_target = given["input"].gather(1, given["target"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        fk.cross_entropy(**given, reduction="none"), partial.logsumexp(-1) - at_target, **TOLERANCE
    )


@asks("extreme logits: all 10, all −10, one-hot")
@points(dtype=[F16, F32], backend=["torch", "cpu"])
def test_extreme_values(dtype, backend):
    target = torch.randint(1024, (16,))
    for level in (10.0, -10.0):
        loss = fk.cross_entropy(torch.full((16, 1024), level, dtype=dtype), target, reduction="none", backend=backend)
        close(loss, torch.full((16,), 1024.0).double().log(), dtype, 0, 1e-6, value=True)
    x = torch.full((16, 1024), -10.0, dtype=dtype).scatter(1, target.unsqueeze(1), 10.0)
    assert (fk.cross_entropy(x, target, reduction="none", backend=backend) < 1e-5).all()


@asks("a row moved by a constant has the same loss")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_shift_invariance(backend):
    x, target = torch.randn(8, 512), torch.randint(512, (8,))
    moved = x + 100
    one, other = (
        fk.cross_entropy(logits, target, reduction="none", backend=backend) for logits in (moved - 100, moved)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@asks("edges: first and last class, ignore_index 0 and −1, all ignored, none ignored")
@points(case=[(0, -100), (1023, -100), (0, 0), (None, -1), (None, -100)], backend=["torch", "cpu"])
def test_edges(case, backend):
    label, index = case
    target = torch.randint(1024, (16,)) if label is None else torch.full((16,), label)
    x = 0.1 * torch.randn(16, 1024)
    got = fk.cross_entropy(x, target, ignore_index=index, reduction="none", backend=backend)
    close(got, true_loss(x.double(), target, ignore_index=index), F32, 0, 1e-6, value=True)
    assert label is None or index != 0 or not got.any()


@asks("gradient in the forward pass, written over the logits or not, with the log-sum-exp")
@points(vocabulary=[192, 1024, 32768, 128256], rows=[1, 77, 289], dtype=DTYPES, weighted=[False, True],
        inplace=[False, True], ignored=[False, True])  # fmt: skip
def test_inplace(vocabulary, rows, dtype, weighted, inplace, ignored):
    def ours(input, backend, **given):
        logits = input * 1 if inplace else input  # a leaf that asks for a gradient is not written to
        address = logits.data_ptr()
        loss = fk.cross_entropy(logits, **given, reduction="none", inplace=inplace, backend=backend)
        if inplace:
            logits.register_hook(lambda gradient: seen.append(gradient.data_ptr() == address))
        return loss

    seen = []
    tolerance = rounding(dtype, dict(atol=1e-4, rtol=1e-4))
    draw = functools.partial(drawn, vocabulary=vocabulary, dtype=dtype, weighted=weighted, ignored=ignored)
    agree(rows, vocabulary, draw, ours, true_loss, wrt=("input",), **tolerance)
    assert all(seen) and bool(seen) == inplace
    x = drawn(4, vocabulary, dtype, False, False)["input"]
    for backend in ("torch", "cpu"):
        lse = fk.log_sum_exp(x, backend=backend)
        close(lse, x.double().logsumexp(-1), dtype, 1e-4, 1e-4, value=True)


@asks("no rows: no loss, no gradient")
@points(reduction=["none", "mean", "sum"], backend=["torch", "cpu", "triton"])
def test_no_rows(reduction, backend):
    x, target = torch.empty(0, 4096, dtype=BF16, requires_grad=True), torch.empty(0, dtype=torch.long)
    loss = fk.cross_entropy(x, target, reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.sum()
    loss.sum().backward()
    assert x.grad.shape == (0, 4096) and fk.log_sum_exp(x, backend=backend).shape == (0,)


@asks("class weights in every reduction")
@points(vocabulary=[1024, 32768, 128256], rows=[77, 289], dtype=[BF16, F32], reduction=["none", "mean", "sum"])
def test_weight_reduction(vocabulary, rows, dtype, reduction):
    tolerance = rounding(dtype, dict(atol=1e-4, rtol=1e-4))
    agree(rows, vocabulary, lambda n: drawn(n, vocabulary, dtype, True, False),
          lambda backend, **given: fk.cross_entropy(**given, reduction=reduction, backend=backend),
          lambda **given: true_loss(**given, reduction=reduction), wrt=("input",), **tolerance)  # fmt: skip


@asks("an upstream gradient of stride 0")
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_upstream_of_stride_0(backend):
    given = drawn(8, 1024, BF16, False, False)
    given["input"].requires_grad_()
    loss = fk.cross_entropy(**given, reduction="none", backend=backend)
    (got,) = torch.autograd.grad(loss, given["input"], torch.ones(()).expand(8))
    x = given["input"].detach().double().requires_grad_()
    close(got, torch.autograd.grad(true_loss(x, given["target"]).sum(), x)[0], BF16, 1e-4, torch.finfo(BF16).eps)


#: Entries of a head: one of 128256 is cut in its depth, in the short form to a few.
HEAD = 2**22 if WHOLE else 2**18


def agree_on_linear(rows, vocabulary, depth, chunk, reduction, ignore_index=-100, ignored=0.0, batched=False):
    depth = min(depth, max(8, HEAD // vocabulary))

    def draw(n):
        n = n // 3 * 3 if batched else n
        target = torch.where(torch.rand(n) < ignored, ignore_index, torch.randint(vocabulary, (n,)))
        x, head = torch.randn(n, depth) * 0.1, torch.randn(vocabulary, depth) / depth**0.5
        x, target = (x.view(3, -1, depth), target.view(3, -1)) if batched else (x, target)
        return dict(x=x.to(BF16), head=head.to(BF16), target=target)

    def ours(x, head, target, backend):
        return fk.linear_cross_entropy(x, head, target, ignore_index=ignore_index, reduction=reduction,
                                       chunk_bytes=chunk * vocabulary * x.itemsize, backend=backend)  # fmt: skip

    def truth(x, head, target):
        logits = true_logits(x, head, None, BF16).flatten(0, -2)
        return true_cross_entropy(logits, target.flatten(), ignore_index=ignore_index, reduction=reduction)

    rtol = 1e-3 + 3 * torch.finfo(BF16).eps  # theirs is what an eager head misses, three times
    agree(rows, vocabulary, draw, ours, truth, wrt=("x", "head"), linear=True, atol=1e-3, rtol=rtol)


@asks("cross-entropy from hidden states in chunks of 16 rows, heads of 128256")
@points(vocabulary=[32000, 50264, 128256], depth=[768, 1024], rows=[8, 16, 24], reduction=["mean", "sum"])
def test_linear_cross_entropy(vocabulary, depth, rows, reduction):
    agree_on_linear(rows, vocabulary, depth, 16, reduction)


@asks("one chunk, several, a ragged last one; a batch of sequences; targets ignored")
@points(rows=[128, 600, 1024], vocabulary=[1536, 2048], depth=[512, 768], reduction=["mean", "sum"], batched=[0, 1])
def test_linear_chunks(rows, vocabulary, depth, reduction, batched):
    agree_on_linear(rows // 3 * 3, vocabulary, depth, 256, reduction, ignored=0.15, batched=batched)


@asks("from hidden states, the last class ignored")
@points(reduction=["mean", "sum"], chunk=[256, 1024])
def test_linear_ignore_index(reduction, chunk):
    agree_on_linear(1024, 2048, 512, chunk, reduction, ignore_index=2047, ignored=0.2)


HEADS = ("input", "linear_weight")


def small_linear():
    return dict(input=torch.randn(256, 64).to(BF16) * 0.1, linear_weight=torch.randn(2048, 64).to(BF16) / 8,
                target=torch.randint(2048, (256,)))  # fmt: skip


@asks("from hidden states: no gradients asked for, or of one of the two")
@points(wanted=[(), ("input",), ("linear_weight",), HEADS], chunk=[256, 1024], reduction=["mean", "sum"])
def test_linear_partial_gradients(wanted, chunk, reduction):
    given = small_linear()
    for backend in ("torch", "cpu"):
        leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
        some = {k: v.clone().requires_grad_(k in wanted) for k, v in given.items()}
        fixed = dict(reduction=reduction, chunk_bytes=chunk * 2048 * 2, backend=backend)
        full, part = (fk.linear_cross_entropy(**tensors, **fixed) for tensors in (leaves, some))
        assert part.requires_grad == bool(wanted)
        torch.testing.assert_close(part, full, atol=1e-5, rtol=1e-5)
        full.backward()
        if wanted:
            part.backward()
        assert all(torch.equal(some[k].grad, leaves[k].grad) for k in wanted)
        assert all(some[k].grad is None for k in given if k not in wanted)


@asks("from hidden states inside torch.compile(fullgraph=True), the same bits")
@points(reduction=["sum", "mean"])
def test_linear_compiled(reduction):
    torch.compiler.reset()
    given = small_linear()
    given["target"][::7] = -100
    leaves = {k: v.clone().requires_grad_() if k in HEADS else v for k, v in given.items()}
    functions = fk.linear_cross_entropy, torch.compile(fk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, compiled = (function(**leaves, reduction=reduction, backend="cpu") for function in functions)
    assert torch.equal(eager, compiled)
    gradients = (torch.autograd.grad(loss, [leaves[name] for name in HEADS]) for loss in (eager, compiled))
    assert all(map(torch.equal, *gradients))
    logits = true_logits(*(given[name].double() for name in HEADS), None, BF16)
    want = F.cross_entropy(logits, given["target"], reduction=reduction)
    close(compiled.detach(), want, BF16, 1e-6, 1e-6, linear=16.0, value=True)
