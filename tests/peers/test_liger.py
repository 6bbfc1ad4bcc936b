"""Liger-Kernel's tests of its JSD, KL, TVD and cross-entropy losses, and of those from hidden states."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from . import grid
from .grid import BACKENDS, BF16, F16, F32, agree, asks, close, points, some_ignored

PEER = "Liger-Kernel"
#: (rows, V) and each dtype's (atol, rtol), as Liger has them.
JSD_SHAPES = [(2 * 1024, 3200), (41 * 401, 1271)]
JSD_TOLERANCES = {BF16: (1e-7, 5e-2), F32: (1e-7, 1e-6), F16: (1e-3, 1e-3)}
KL_SHAPES = [(4096, 32000), (41 * 401, 1271)]
KL_TOLERANCES = {BF16: (1e-8, 5e-2), F32: (1e-8, 1e-6), F16: (1e-3, 1e-3)}
TVD_SHAPES = [(4096, 32000), (32 * 4096, 1024), (41 * 401, 1271), (4096, 128256), (3 * 423, 32000)]
TVD_TOLERANCES = {BF16: (1e-8, 1e-6), F32: (1e-8, 1e-6)}


def logits_of(rows, vocabulary, dtype, **more):
    """Log-probabilities of both models, which are logits too, and labels."""
    x, teacher = (torch.randn(rows, vocabulary, dtype=dtype).log_softmax(-1) for _ in "xt")
    return dict(x=x, teacher=teacher, labels=torch.randint(vocabulary, (rows,)), **more)


def agree_on_jsd(shape, dtype, beta, factor=1.0, ignore_index=None):
    def draw(rows):
        given = logits_of(rows, shape[1], dtype)
        given["labels"] = None if ignore_index is None else some_ignored(given["labels"], ignore_index)
        return given

    def ours(x, teacher, labels, backend):
        index = -100 if ignore_index is None else ignore_index
        return fk.f_divergence(x, teacher, fk.GJS(beta), labels=labels, ignore_index=index, backend=backend)

    def truth(x, teacher, labels):
        live = torch.ones(len(x), dtype=torch.bool) if labels is None else labels != ignore_index
        return grid.reduced(grid.true_jsd(x.log_softmax(-1), teacher.log_softmax(-1), beta), "mean", live)

    atol, rtol = JSD_TOLERANCES[dtype]
    agree(*shape, draw, ours, truth, atol=atol, rtol=rtol, factor=factor)


@asks("JSD of log-probabilities: betas, dtypes, shapes, as the last layer and not")
@points(shape=JSD_SHAPES, dtype=JSD_TOLERANCES, beta=[0.0, 0.1, 0.5, 0.9, 1.0], factor=[1.0, 2.0])
def test_jsd(shape, dtype, beta, factor):
    agree_on_jsd(shape, dtype, beta, factor)


@asks("JSD with labels ignored, by function")
@points(shape=JSD_SHAPES, dtype=JSD_TOLERANCES, ignore_index=[2, 42], beta=[0.5, 0.1], factor=[2.0, 1.0])
def test_jsd_with_ignored_labels(shape, dtype, ignore_index, beta, factor):
    agree_on_jsd(shape, dtype, beta, factor, ignore_index)


@asks("JSD of both orders is one")
@points(shape=JSD_SHAPES, dtype=JSD_TOLERANCES)
def test_jsd_is_symmetric(shape, dtype):
    given = logits_of(16, shape[1], dtype)
    for backend in ("torch", "cpu"):
        one, other = (fk.f_divergence(x, y, "js", backend=backend)
                      for x, y in ((given["x"], given["teacher"]), (given["teacher"], given["x"])))  # fmt: skip
        torch.testing.assert_close(one, other, atol=0, rtol=1e-6)


@asks("JSD with every label ignored is 0, with zero gradient")
@pytest.mark.parametrize("backend", BACKENDS)
def test_jsd_of_no_token(backend):
    given = logits_of(20, 32, BF16)
    x = given["x"].requires_grad_()
    loss = fk.f_divergence(x, given["teacher"], "js", labels=torch.full((20,), -100), backend=backend)
    loss.backward()
    assert loss == 0 and not x.grad.any()


@asks("gradients to the log-probabilities as free variables",
      differs="log-probabilities are logits: what does not change the distribution has no gradient; through the "
      "caller's log_softmax both are one")  # fmt: skip
@points(beta=[0.0, 0.1, 0.5, 0.9, 1.0])
def test_log_probabilities_are_logits(beta):
    z, teacher = torch.randn(2, 8, 301, dtype=torch.float64)
    z.requires_grad_()
    x = z.log_softmax(-1)
    theirs = grid.true_jsd(x, teacher.log_softmax(-1), beta).sum()
    free, through = torch.autograd.grad(theirs, (x, z), retain_graph=True)
    ours = fk.f_divergence(x, teacher, fk.GJS(beta), reduction="sum")
    projected, ours_through = torch.autograd.grad(ours, (x, z))
    torch.testing.assert_close(projected, free - x.exp() * free.sum(-1, keepdim=True))
    torch.testing.assert_close(ours_through, through)
    assert not torch.allclose(projected, free)
    moved = fk.f_divergence(x + 3, teacher, fk.GJS(beta), reduction="sum")
    torch.testing.assert_close(moved, ours)  # of what is not normalised, the distribution


def agree_on_kl(shape, dtype, log_target, reduction, factor):
    def draw(rows):
        x = torch.randn(rows, shape[1], dtype=dtype).log_softmax(-1)
        return dict(x=x, teacher=torch.randn(rows, shape[1]).softmax(-1))

    def ours(x, teacher, backend):  # a log target is itself logits
        loss = fk.f_divergence(x, teacher.log(), "kl", reduction=reduction, backend=backend)
        return loss / shape[1] if reduction == "mean" else loss

    def truth(x, teacher):
        log_q, p = x.log_softmax(-1), teacher / teacher.sum(-1, keepdim=True)
        entries = F.kl_div(log_q, p.log() if log_target else p, reduction="none", log_target=log_target)
        sums = {"none": entries.sum(-1), "sum": entries.sum(), "batchmean": entries.sum() / len(x)}
        return sums[reduction] if reduction in sums else entries.mean()

    atol, rtol = KL_TOLERANCES[dtype]
    agree(*shape, draw, ours, truth, atol=atol, rtol=rtol, factor=factor)


@asks("KL: log_target, batchmean and sum, as the last layer and not")
@points(shape=KL_SHAPES, log_target=[True, False], reduction=["sum", "batchmean"], dtype=KL_TOLERANCES, factor=[1, 2])
def test_kl(shape, log_target, reduction, dtype, factor):
    agree_on_kl(shape, dtype, log_target, reduction, factor)


ENTRIES = "a loss is a token's: our mean is theirs times V, our none their sum over the vocabulary"


@asks("KL: mean and none over entries", differs=ENTRIES)
@points(shape=KL_SHAPES, log_target=[True, False], reduction=["mean", "none"], dtype=KL_TOLERANCES, factor=[2.0, 1.0])
def test_kl_over_entries(shape, log_target, reduction, dtype, factor):
    agree_on_kl(shape, dtype, log_target, reduction, factor)


def agree_on_tvd(shape, dtype, reduction, factor=1.0, ignore_index=None):
    def draw(rows):
        labels = torch.randint(shape[1], (rows,))
        x, teacher = torch.randn(rows, shape[1], dtype=dtype), torch.randn(rows, shape[1]).softmax(-1)
        near = (x.double().softmax(-1) / teacher - 1).abs() < 1e-4  # ties in float32, where the gradient jumps
        labels = None if ignore_index is None else some_ignored(labels, ignore_index)
        return dict(x=torch.where(near, x + 1, x), teacher=teacher, labels=labels)

    def ours(x, teacher, labels, backend):
        name = "mean" if reduction == "batchmean" else reduction  # theirs is over the tokens that count
        loss = fk.f_divergence(x, teacher.log(), "tvd", labels=labels, reduction=name, backend=backend,
                               ignore_index=-100 if ignore_index is None else ignore_index)  # fmt: skip
        return loss / shape[1] if reduction == "mean" else loss

    def truth(x, teacher, labels):
        p = teacher / teacher.sum(-1, keepdim=True)
        losses = 0.5 * (x.softmax(-1) - p).abs().sum(-1)
        live = torch.ones(len(x), dtype=torch.bool) if labels is None else labels != ignore_index
        loss = grid.reduced(losses, "mean" if reduction == "batchmean" else reduction, live)
        return loss / shape[1] if reduction == "mean" else loss

    atol, rtol = TVD_TOLERANCES[dtype]
    rtol = max(rtol, torch.finfo(dtype).eps)  # theirs is of ±½, exact in any dtype; a softmax's gradient is rounded
    agree(*shape, draw, ours, truth, atol=atol, rtol=rtol, factor=factor)


@asks("TVD: batchmean and sum, as the last layer and not")
@points(shape=TVD_SHAPES, reduction=["batchmean", "sum"], dtype=TVD_TOLERANCES, factor=[1.0, 2.0])
def test_tvd(shape, reduction, dtype, factor):
    agree_on_tvd(shape, dtype, reduction, factor)


@asks("TVD: batchmean and sum with labels ignored")
@points(shape=TVD_SHAPES, reduction=["batchmean", "sum"], dtype=TVD_TOLERANCES, ignore_index=[-100, 0, 1])
def test_tvd_with_ignored_labels(shape, reduction, dtype, ignore_index):
    agree_on_tvd(shape, dtype, reduction, ignore_index=ignore_index)


@asks("TVD: mean and none over entries", differs=ENTRIES)
@points(shape=TVD_SHAPES, reduction=["mean", "none"], dtype=TVD_TOLERANCES, ignore_index=[None, -100, 0, 1])
def test_tvd_over_entries(shape, reduction, dtype, ignore_index):
    agree_on_tvd(shape, dtype, reduction, ignore_index=ignore_index)


@asks("TVD's gradient where p = q is 0")
@pytest.mark.parametrize("backend", BACKENDS)
def test_tvd_at_ties(backend):
    x = torch.randn(4, 41, requires_grad=True)
    fk.f_divergence(x, x.detach().clone(), "tvd", backend=backend).backward()
    assert not x.grad.any()


@asks("TVD of inputs that are no distributions, and its gradient to probabilities",
      cannot="both models are given as logits, whose softmax is compared")  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_tvd_of_what_is_no_distribution(backend):
    x, teacher = torch.randn(4, 41), torch.randn(4, 41).softmax(-1)
    ours = fk.f_divergence(x, teacher.log(), "tvd", backend=backend)
    theirs = 0.5 * (x - teacher).abs().sum(-1).mean()
    assert ours <= 1 < theirs
    named = fk.f_divergence(x.softmax(-1).log(), teacher.log(), "tvd", backend=backend)
    torch.testing.assert_close(named, ours)


CE_SHAPES = [(2 * 4096, 32000), (3 * 423, 32000)]
CE_TOLERANCES = {BF16: (1e-8, 5e-2), F32: (1e-8, 1e-6)}
CE_TERMS = {
    "plain": {},
    "ignore": dict(ignore_index=2),
    "ignore beyond": dict(ignore_index=-123),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing, ignore": dict(label_smoothing=0.1, ignore_index=1),
    "smoothing, ignore beyond": dict(label_smoothing=0.2, ignore_index=-300),
    "softcap": dict(softcap=30.0),
    "z PaLM": dict(z_loss=1e-4),
    "z Chameleon": dict(z_loss=1e-5),
    "z, smoothing, ignore": dict(z_loss=1e-4, label_smoothing=0.1, ignore_index=42),
    "z, smoothing, ignore beyond": dict(z_loss=1e-5, label_smoothing=0.2, ignore_index=-42),
    "weight": dict(class_weight=torch.rand),
    "all": dict(z_loss=1e-4, label_smoothing=0.1, softcap=30.0),
    "all, ignore": dict(z_loss=1e-5, label_smoothing=0.2, softcap=40.0, ignore_index=42),
    "weight, all": dict(class_weight=torch.rand, z_loss=1e-4, label_smoothing=0.1, softcap=30.0),
    "weight, all, ignore": dict(class_weight=torch.rand, z_loss=1e-5, label_smoothing=0.2, softcap=40.0, ignore_index=42),
}  # fmt: skip


def our_cross_entropy(x, target, class_weight=None, softcap=None, **keywords):
    return fk.cross_entropy(x, target, class_weight, logit_softcap=softcap, **keywords)


def labelled(rows, vocabulary, terms):
    """Targets, some ignored where the terms say so, and class weights, drawn by what the terms say."""
    target = torch.randint(vocabulary, (rows,))
    given = dict(target=some_ignored(target, terms["ignore_index"]) if "ignore_index" in terms else target)
    return given | (dict(class_weight=terms["class_weight"](vocabulary)) if "class_weight" in terms else {})


def settings(terms):
    return {name: value for name, value in terms.items() if name != "class_weight"}


def agree_on_cross_entropy(shape, dtype, terms, reduction, factor=1.0, tolerance=None, wrt=("x",)):
    def draw(rows):
        return dict(x=torch.randn(rows, shape[1], dtype=dtype), **labelled(rows, shape[1], terms))

    fixed = dict(settings(terms), reduction=reduction)
    atol, rtol = tolerance or CE_TOLERANCES[dtype]
    agree(*shape, draw, functools.partial(our_cross_entropy, **fixed), functools.partial(grid.true_cross_entropy, **fixed),
          atol=atol, rtol=rtol, wrt=wrt, factor=factor)  # fmt: skip


@asks("cross-entropy: ignore_index, smoothing, softcap, z-loss, class weights, alone and together")
@points(terms=CE_TERMS, reduction=["sum", "mean", "none"], dtype=CE_TOLERANCES, shape=CE_SHAPES)
def test_cross_entropy(terms, reduction, dtype, shape):
    agree_on_cross_entropy(shape, dtype, CE_TERMS[terms], reduction)


@asks("cross-entropy that is not the last layer")
@points(terms=["plain", "all", "all, ignore"], reduction=["sum", "mean"], dtype=CE_TOLERANCES, shape=CE_SHAPES,
        factor=[3.0, "random"])  # fmt: skip
def test_cross_entropy_not_last(terms, reduction, dtype, shape, factor):
    tolerance = (1e-8, 5e-2 if dtype == BF16 else 1e-5)
    agree_on_cross_entropy(shape, dtype, CE_TERMS[terms], reduction, factor, tolerance)


@asks("cross-entropy by function and by module are one, small shapes")
@points(shape=[(4, 8), (63, 41)], dtype=CE_TOLERANCES)
def test_function_and_module(shape, dtype):
    terms = dict(ignore_index=0, z_loss=1e-4, label_smoothing=0.1)
    x, target = torch.randn(*shape, dtype=dtype), torch.randint(shape[1], shape[:1])
    module = fk.CrossEntropyLoss(logit_softcap=30.0, **terms)
    assert torch.equal(module(x, target), fk.cross_entropy(x, target, logit_softcap=30.0, **terms))
    agree_on_cross_entropy(shape, dtype, dict(terms, softcap=30.0), "mean", "random")


@asks("cross-entropy without gradients: the value, and no graph")
@points(shape=CE_SHAPES, ignore_index=[-100, 2], reduction=["mean", "sum", "none"], dtype=[F32, F16, BF16])
def test_cross_entropy_forward_only(shape, ignore_index, reduction, dtype):
    terms = dict(ignore_index=ignore_index)
    agree_on_cross_entropy(shape, dtype, terms, reduction, tolerance=(1e-4, 1e-4), wrt=())


@asks("arithmetic is in float32 whatever the dtype")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_arithmetic_in_float32(backend):
    narrow = torch.randn(4, 128256, dtype=BF16, requires_grad=True)
    wide, target = narrow.detach().float().requires_grad_(), torch.randint(128256, (4,))
    losses = [fk.cross_entropy(x, target, backend=backend) for x in (narrow, wide)]
    of_narrow, of_wide = (torch.autograd.grad(*pair)[0] for pair in zip(losses, (narrow, wide), strict=True))
    torch.testing.assert_close(*losses, atol=0, rtol=1e-6)
    close(of_narrow, of_wide.double(), BF16, 0, 0)


@asks("targets out of range are an error")
@points(ignore_index=[2, -123], backend=["torch", "cpu"])
def test_targets_out_of_range(ignore_index, backend):
    target = some_ignored(torch.randint(32000, (16,)), ignore_index).index_fill(0, torch.tensor([3, 7]), 32001)
    with pytest.raises(ValueError, match="target"):
        fk.cross_entropy(torch.randn(16, 32000), target, ignore_index=ignore_index, backend=backend)


@asks("the z-loss beside the loss (return_z_loss)")
@points(z_loss=[1e-4, 1e-5], reduction=["mean", "sum", "none"], dtype=CE_TOLERANCES)
def test_z_loss_is_returned(z_loss, reduction, dtype):
    x, target = torch.randn(16, 32000, dtype=dtype), some_ignored(torch.randint(32000, (16,)), 42)
    live = target != 42
    for backend in ("torch", "cpu"):
        loss, parts = fk.cross_entropy(x, target, z_loss=z_loss, ignore_index=42, reduction=reduction, backend=backend,
                                       return_parts=True)  # fmt: skip
        want = grid.reduced(z_loss * x.double().logsumexp(-1) ** 2, reduction, live)
        close(parts.z_loss, want, F32, 1e-8, 1e-6, value=True)
        torch.testing.assert_close(parts.cross_entropy + parts.z_loss, loss)
        assert parts.tokens == live.sum()


@asks("the predicted tokens and the accuracy beside the loss",
      cannot="LossParts has the loss's terms and the number of tokens; an argmax is the caller's")  # fmt: skip
@pytest.mark.parametrize("function", [fk.cross_entropy, fk.linear_cross_entropy])
def test_no_predictions(function):
    assert fk.LossParts._fields == ("divergence", "cross_entropy", "z_loss", "tokens")
    for name in ("return_token_accuracy", "return_predicted_tokens"):
        with pytest.raises(TypeError, match=name):
            function(torch.randn(3, 5), torch.tensor([0, 1, 2]), **{name: True})


@asks("the true class's gradient of a confident model is as good as torch's")
@points(dtype=[BF16, F16], label_smoothing=[0.0, 0.1], reduction=["sum", "mean"], backend=["torch", "cpu"])
def test_confident_predictions(dtype, label_smoothing, reduction, backend):
    logits, target, rows = torch.randn(128, 4096), torch.randint(4096, (128,)), torch.arange(128)
    logits[rows, target] = logits.amax(-1) + 10
    narrow = logits.to(dtype)

    def of_true_class(function, x, **keywords):
        x = x.clone().requires_grad_()
        function(x, target, label_smoothing=label_smoothing, reduction=reduction, **keywords).backward()
        return x.grad[rows, target].double()

    want = of_true_class(F.cross_entropy, narrow.double())
    theirs, ours = of_true_class(F.cross_entropy, narrow), of_true_class(fk.cross_entropy, narrow, backend=backend)
    assert (ours - want).abs().max() <= max((theirs - want).abs().max(), torch.finfo(dtype).tiny)


LINEAR_SHAPES = [(8 * 128, 4096, grid.depth(1024)), (4 * 47, 123, 31)]
LINEAR_TOLERANCES = {
    ("mean", BF16): (5e-3, 5e-2),
    ("mean", F32): (1e-5, 5e-4),
    ("sum", BF16): (5, 50),
    ("sum", F32): (1e-3, 5e-2),
}
LINEAR_TERMS = {
    "plain": dict(ignore_index=-100),
    "all": dict(class_weight=torch.rand, label_smoothing=0.1, ignore_index=42, z_loss=1e-4, softcap=30.0),
}


def agree_on_linear(
    shape, dtype, terms, reduction, bias, factor=1.0, draw_head=torch.rand, tolerance=None, forward=False
):
    rows, vocabulary, depth = shape
    fixed = dict(settings(terms), reduction=reduction)

    def draw(n):
        x = torch.randn(n, depth, dtype=dtype)
        given = dict(x=x, head=draw_head(vocabulary, depth, dtype=dtype), **labelled(n, vocabulary, terms))
        return given | (dict(bias=torch.rand(vocabulary, dtype=dtype)) if bias else {})

    def ours(x, head, target, backend, class_weight=None, bias=None, softcap=None, **fixed):
        return fk.linear_cross_entropy(x, head, target, linear_bias=bias, weight=class_weight, logit_softcap=softcap,
                                       backend=backend, **fixed)  # fmt: skip

    def truth(x, head, bias=None, **rest):
        return grid.true_cross_entropy(grid.true_logits(x, head, bias, dtype), **rest)

    atol, rtol = tolerance or LINEAR_TOLERANCES[reduction, dtype]
    wrt = () if forward else ("x", "head", "bias") if bias else ("x", "head")
    agree(rows, vocabulary, draw, functools.partial(ours, **fixed), functools.partial(truth, **fixed), atol=atol,
          rtol=rtol, wrt=wrt, factor=factor, linear=True)  # fmt: skip


@asks("cross-entropy from hidden states: biases, every term, both reductions")
@points(shape=LINEAR_SHAPES, case=LINEAR_TOLERANCES, bias=[True, False], terms=LINEAR_TERMS)
def test_linear_cross_entropy(shape, case, bias, terms):
    agree_on_linear(shape, case[1], LINEAR_TERMS[terms], case[0], bias)


@asks("cross-entropy from hidden states by function, class weights of either sign")
@points(shape=[(4, 8, 8), (63, 41, 41)], dtype=[BF16, F32], weighted=[True, False], bias=[True, False])
def test_linear_cross_entropy_functional(shape, dtype, weighted, bias):
    terms = dict(z_loss=1e-4, label_smoothing=0.1, softcap=30.0) | (dict(class_weight=torch.randn) if weighted else {})
    agree_on_linear(shape, dtype, terms, "mean", bias, "random", torch.randn)


@asks("cross-entropy from hidden states without gradients")
@points(shape=LINEAR_SHAPES, case=LINEAR_TOLERANCES, bias=[True, False], terms=LINEAR_TERMS)
def test_linear_cross_entropy_forward_only(shape, case, bias, terms):
    agree_on_linear(shape, case[1], LINEAR_TERMS[terms], case[0], bias, forward=True)


@asks("an upstream gradient of each token's own under reduction none")
@points(shape=[(32, 64, 32), (32, 128, 64)], bias=[True, False])
def test_linear_upstream_of_each_token(shape, bias):
    def draw_head(*sizes, dtype):
        return 0.1 * torch.randn(*sizes)

    agree_on_linear(shape, F32, {}, "none", bias, "random", draw_head, tolerance=(1e-4, 1e-4))


@asks("token scaling by the label's probability, detached, ignored labels too",
      cannot="no flag of its own: a second call with token_weight = exp(−loss) is the same")  # fmt: skip
@points(reduction=["none", "sum"], ignored=[False, True], backend=["torch", "cpu"])
def test_token_scaling(reduction, ignored, backend):
    x, head, bias = torch.randn(8, 8, requires_grad=True), torch.randn(1000, 8), torch.randn(1000)
    target = some_ignored(torch.randint(1000, (8,)), -100) if ignored else torch.randint(1000, (8,))
    fixed = dict(linear_bias=bias, backend=backend)
    with torch.no_grad():
        weight = (-fk.linear_cross_entropy(x, head, target, reduction="none", **fixed)).exp()
    ours = fk.linear_cross_entropy(x, head, target, token_weight=weight, reduction=reduction, **fixed)
    z = x.detach().double().requires_grad_()
    losses = F.cross_entropy(F.linear(z, head.double(), bias.double()), target, reduction="none")
    theirs = losses * (-losses.detach()).exp()
    theirs = theirs.sum() if reduction == "sum" else theirs
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    (got,), (want,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), z)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="use_token_scaling"):
        fk.linear_cross_entropy(x, head, target, use_token_scaling=True)


@asks("cross-entropy from hidden states under autocast")
@points(shape=LINEAR_SHAPES, narrow=[BF16, F16], bias=[True, False])
def test_linear_cross_entropy_under_autocast(shape, narrow, bias):
    rows, vocabulary, width = shape

    def draw(n):
        x, head = torch.randn(n, width), torch.rand(vocabulary, width)
        return dict(x=x, head=head, target=torch.randint(vocabulary, (n,))) | (
            dict(bias=torch.rand(vocabulary)) if bias else {}
        )

    def ours(x, head, target, backend, bias=None):
        with torch.autocast("cpu", dtype=narrow):
            return fk.linear_cross_entropy(x, head, target, linear_bias=bias, backend=backend)

    def truth(x, head, target, bias=None):  # of the operands that autocast rounds
        x, head = (grid.rounded(tensor, narrow) for tensor in (x, head))
        bias = None if bias is None else grid.rounded(bias, narrow)
        return F.cross_entropy(grid.true_logits(x, head, bias, narrow), target)

    agree(rows, vocabulary, draw, ours, truth, atol=5e-3, rtol=5e-2, wrt=("x", "head"), linear=True, dtype=narrow,
          backends=("torch", "cpu"))  # fmt: skip


JSD_LINEAR_SHAPES = [(8 * 128, 4096, grid.depth(1024)), (4 * 423, 1423, 167)]
JSD_LINEAR_TOLERANCES = {BF16: (5e-3, 5e-2), F32: (1e-5, 5e-4)}


def agree_on_linear_jsd(shape, dtype, temperature, beta, ignore_index=None, factor=1.0, scale=1.0, narrow=None):
    rows, vocabulary, width = shape

    def draw(n):
        student, teacher = width // 2, width
        labels = torch.randint(vocabulary, (n,))
        kind = narrow or dtype
        return dict(x=torch.rand(n, student, dtype=kind) * scale, head=torch.rand(vocabulary, student, dtype=dtype),
                    teacher=torch.rand(n, teacher, dtype=kind) * scale, teacher_head=torch.rand(vocabulary, teacher, dtype=dtype),
                    labels=None if ignore_index is None else some_ignored(labels, ignore_index))  # fmt: skip

    def ours(x, head, teacher, teacher_head, labels, backend):
        with torch.autocast("cpu", dtype=narrow, enabled=narrow is not None):
            return fk.linear_f_divergence(
                x, head, teacher, teacher_head, fk.GJS(beta), labels=labels, temperature=temperature, backend=backend,
                ignore_index=-100 if ignore_index is None else ignore_index,
            )  # fmt: skip

    def truth(x, head, teacher, teacher_head, labels):
        if narrow:
            head, teacher_head = grid.rounded(head, narrow), grid.rounded(teacher_head, narrow)
        logits = (grid.true_logits(h, w, None, narrow or dtype) for h, w in ((x, head), (teacher, teacher_head)))
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in logits)
        live = torch.ones(len(x), dtype=torch.bool) if labels is None else labels != ignore_index
        return grid.reduced(grid.true_jsd(log_q, log_p, beta), "mean", live)

    atol, rtol = (5e-3, 5e-2) if narrow else JSD_LINEAR_TOLERANCES[dtype]
    agree(rows, vocabulary, draw, ours, truth, atol=atol, rtol=rtol, wrt=("x", "head"), linear=True, factor=factor,
          dtype=narrow or dtype, logit=max(16, width / 4), backends=("torch", "cpu") if narrow else BACKENDS)  # fmt: skip


@asks("JSD from hidden states: heads of two widths, temperatures, betas")
@points(shape=JSD_LINEAR_SHAPES, dtype=JSD_LINEAR_TOLERANCES, case=[(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_linear_jsd(shape, dtype, case):
    agree_on_linear_jsd(shape, dtype, *case)


@asks("JSD from hidden states with labels ignored")
@points(shape=JSD_LINEAR_SHAPES, dtype=JSD_LINEAR_TOLERANCES,
        case=[(1.0, 0.5, 2), (1.0, 0.0, 2), (2.0, 0.1, 42), (1.0, 1.0, 2)])  # fmt: skip
def test_linear_jsd_with_ignored_labels(shape, dtype, case):
    agree_on_linear_jsd(shape, dtype, *case)


@asks("JSD from hidden states by function, small shapes")
@points(shape=[(4, 8, 8), (63, 41, 41)], dtype=JSD_LINEAR_TOLERANCES, case=[(1.0, 0.5, -100), (2.0, 0.1, 42)])
def test_linear_jsd_functional(shape, dtype, case):
    agree_on_linear_jsd(shape, dtype, *case, factor="random", scale=0.5)


@asks("JSD from hidden states with every label ignored is 0, with zero gradients")
@points(shape=JSD_LINEAR_SHAPES, dtype=JSD_LINEAR_TOLERANCES, case=[(1.0, 0.5, 2), (2.0, 0.1, 42)])
def test_linear_jsd_of_no_token(shape, dtype, case):
    (_, vocabulary, width), (temperature, beta, index) = shape, case
    x, head = (torch.rand(n, width // 2, dtype=dtype, requires_grad=True) for n in (16, vocabulary))
    teacher, teacher_head = torch.rand(16, width, dtype=dtype), torch.rand(vocabulary, width, dtype=dtype)
    for backend in ("torch", "cpu"):
        loss = fk.linear_f_divergence(x, head, teacher, teacher_head, fk.GJS(beta), labels=torch.full((16,), index),
                                      ignore_index=index, temperature=temperature, backend=backend)  # fmt: skip
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (x, head)))


@asks("JSD from hidden states under autocast, hidden states narrow and heads wide")
@points(narrow=[BF16, F16])
def test_linear_jsd_under_autocast(narrow):
    agree_on_linear_jsd((8, 3200, grid.depth(2048)), F32, 1.0, 0.5, -100, narrow=narrow)
