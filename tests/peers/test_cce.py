"""Cut Cross-Entropy's tests of its loss from hidden states: value, gradients, log-sum-exp and z-loss."""

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .grid import BACKENDS, BF16, F16, F32, WHOLE, agree, asks, close, points, reduced, softcapped, true_cross_entropy

PEER = "Cut Cross-Entropy"
SHAPES = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]  # rows, V, D; whole in every form but for Triton
FORWARD = {F32: 1e-5, F16: 1e-3, BF16: 1e-2}
BACKWARD = {F32: 5e-4, F16: 1e-3, BF16: 1e-2}
IGNORE = -100
#: Its implementations: tiles that the gradient may leave out, none of them, and a compiled one of stored logits.
PATHS = {
    "cce": dict(memory="minimal"),
    "cce_exact": dict(memory="minimal", skip_tiles=False),
    "torch_compile": dict(memory="chunks"),
}


def drawn(rows, shape, dtype, bias, invalids):
    """Four sequences of hidden states, of which the head knows the first rows; a fifth of the targets ignored."""
    _, vocabulary, depth = shape
    x, head = torch.randn(rows, depth, dtype=dtype) / depth**0.5, torch.randn(vocabulary, depth, dtype=dtype)
    known = min(rows, vocabulary) // 2
    head[:known] = x[:known]
    target = torch.randint(vocabulary, (rows,))
    if invalids:
        target[torch.randperm(rows)[: max(1, rows // 5)]] = IGNORE
    given = dict(x=x.view(4, -1, depth), head=head, target=target.view(4, -1))
    return given | (dict(bias=torch.randn(vocabulary, dtype=dtype) * 0.02) if bias else {})


def shifted(x, target, shift):
    """Each position's hidden state with the token `shift` places later: views, of no copy."""
    return (x[:, :-shift], target[:, shift:]) if shift else (x, target)


def ours(x, head, target, backend, bias=None, softcap=None, shift=0, **keywords):
    x, target = shifted(x, target, shift)
    return fk.linear_cross_entropy(
        x, head, target, linear_bias=bias, logit_softcap=softcap, backend=backend, **keywords
    )


def truth(x, head, target, bias=None, shift=0, reduction="mean", **keywords):
    x, target = shifted(x, target, shift)
    loss = true_cross_entropy(F.linear(x, head, bias).flatten(0, -2), target=target.flatten(), reduction=reduction,
                              **keywords)  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss


def agree_with(shape, dtype, tolerance, bias, invalids, path, wrt, factor=1.0, backends=BACKENDS, **keywords):
    def draw(rows):
        return drawn(max(rows, 12), shape, dtype, bias, invalids)  # four sequences, on Triton too

    agree(shape[0], shape[1], draw, lambda **kw: ours(**kw, **keywords, **path), lambda **kw: truth(**kw, **keywords),
          atol=tolerance, rtol=torch.finfo(dtype).eps, wrt=wrt, factor=factor, linear=True, backends=backends)  # fmt: skip


@asks("value: softcap, bias, shift by slices, ignored targets, odd shapes, a number a token")
@points(dtype=FORWARD, path=["cce", "torch_compile"], softcap=[None, 20.0], bias=[True, False], shift=[0, 2],
        invalids=[False, True], shape=SHAPES)  # fmt: skip
def test_forward(dtype, path, softcap, bias, shift, invalids, shape):
    given = drawn(shape[0], shape, dtype, bias, invalids)
    double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    fixed = dict(softcap=softcap, shift=shift, reduction="none")
    want = truth(**double, **fixed)
    for backend in ("torch", "cpu"):
        got = ours(backend=backend, **given, **fixed, **PATHS[path])
        close(got, want, dtype, narrow_head(FORWARD, dtype), 0, linear=16.0, value=True, name=backend)


def narrow_head(tolerances, dtype):
    """Its tolerance is beyond what an eager head in the dtype misses: the rounding of a logit, of up to 8 here."""
    return tolerances[dtype] + (0 if dtype == F32 else 4 * torch.finfo(dtype).eps)


@asks(
    "gradients: softcap, bias, shift by slices, ignored targets, reductions, z-loss, odd shapes, skipped tiles or none"
)
@points(path=PATHS, dtype=BACKWARD, softcap=[None, 20.0], bias=[False, True], shift=[0, 1], invalids=[False, True],
        reduction=["none", "mean", "sum"], z_loss=[1.0, 0.0], shape=SHAPES)  # fmt: skip
def test_backward(path, dtype, softcap, bias, shift, invalids, reduction, z_loss, shape):
    wrt = ("x", "head", "bias") if bias else ("x", "head")
    factor = {"none": 1 / shape[0], "sum": 1 / shape[0], "mean": 1.0}[reduction]  # it asks of the mean of each
    agree_with(shape, dtype, BACKWARD[dtype], bias, invalids, PATHS[path], wrt, factor, ("torch", "cpu"),
               softcap=softcap, shift=shift, reduction=reduction, z_loss=z_loss)  # fmt: skip


@asks("gradients on tiles that stay on chip (Triton, 12 rows)")
@points(path=PATHS, dtype=[BF16, F32] if WHOLE else [BF16])
def test_backward_on_chip(path, dtype):
    agree_with(SHAPES[2], dtype, BACKWARD[dtype], True, True, PATHS[path], ("x", "head", "bias"), backends=("triton",),
               softcap=20.0, shift=1, z_loss=1.0)  # fmt: skip


@asks("only the gradients that are asked for")
@points(wanted=[("x", "bias"), ("head",), ("bias",)], backend=["torch", "cpu"])
def test_partial_gradients(wanted, backend):
    given = drawn(256, SHAPES[0], BF16, True, False)
    for name in wanted:
        given[name].requires_grad_()
    ours(backend=backend, **given).backward()
    assert {name for name in ("x", "head", "bias") if given[name].grad is not None} == set(wanted)


LSE_SHAPES = [(256, 512, 128), (255, 507, 128), (255, 507, 123)]


@asks("log-sum-exp of a head's stored logits, and the label's logit")
@points(dtype=FORWARD, softcap=[None, 20.0], bias=[True, False], shape=LSE_SHAPES)
def test_log_sum_exp(dtype, softcap, bias, shape):
    given = drawn(256, shape, dtype, bias, False)
    x, target = F.linear(given["x"].flatten(0, 1), given["head"], given.get("bias")), given["target"].flatten()
    capped = softcapped(x.double(), softcap)
    label = capped.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    for backend in ("torch", "cpu"):
        lse = fk.log_sum_exp(x, logit_softcap=softcap, backend=backend)
        loss = fk.cross_entropy(x, target, logit_softcap=softcap, reduction="none", backend=backend)
        close(lse, capped.logsumexp(-1), dtype, 1e-5, 0, value=True, name=backend)
        close(lse - loss, label, dtype, FORWARD[dtype], 0, value=True, name=backend)


@asks("log-sum-exp's gradient, of a flat row too")
@points(softcap=[None, 20.0], dtype=FORWARD)
def test_log_sum_exp_gradient(softcap, dtype):
    agree(256, 507, lambda rows: dict(x=0.1 * torch.randn(rows, 507).to(dtype)),
          lambda x, backend: fk.log_sum_exp(x, logit_softcap=softcap, backend=backend),
          lambda x: softcapped(x, softcap).logsumexp(-1), factor="random")  # fmt: skip


@asks("log-sum-exp returned from hidden states (return_lse), differentiable",
      cannot="the parts of a loss are detached: z_loss/weight is its square; loss + the label's logit is itself")  # fmt: skip
@points(bias=[True, False], softcap=[None, 20.0])
def test_log_sum_exp_from_hidden_states(bias, softcap):
    given = drawn(32, SHAPES[2], F32, bias, False)
    x = given["x"].requires_grad_()
    fixed = dict(softcap=softcap, reduction="none")
    loss, parts = ours(backend="cpu", **given, **fixed, z_loss=1e-3, return_parts=True)
    logits = softcapped(F.linear(x.double(), given["head"].double(), given["bias"].double() if bias else None), softcap)
    want = logits.logsumexp(-1)
    torch.testing.assert_close((parts.z_loss / 1e-3).double(), want**2, atol=0, rtol=1e-5)
    assert loss.requires_grad and not parts.z_loss.requires_grad
    rows = given["head"][given["target"]]
    label = (x * rows).sum(-1) + (given["bias"][given["target"]] if bias else 0)
    built = ours(backend="cpu", **given, **fixed) + softcapped(label, softcap)
    for got, exact in ((built, want), (grad_of(built, x), grad_of(want, x))):
        torch.testing.assert_close(got.double(), exact.double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="return_lse"):
        ours(backend="cpu", **given, return_lse=True)


def grad_of(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


@asks("z-loss of given log-sum-exps: reductions, shift, ignored targets")
@points(reduction=["none", "mean", "sum"], shift=[False, True], invalids=[False, True])
def test_z_loss(reduction, shift, invalids):
    """A log-sum-exp of k is a row of one logit k, whose cross-entropy is 0."""
    x = torch.arange(1.0, 11).unsqueeze(-1)
    target = torch.zeros(10 + shift, dtype=torch.long)
    if invalids:
        target = torch.full_like(target, IGNORE)
        target[[3, 5]] = 0
    live = target[int(shift) :] != IGNORE
    for backend in ("torch", "cpu"):
        got = fk.cross_entropy(x, target[int(shift) :], z_loss=1.0, reduction=reduction, backend=backend)
        close(got, reduced(x.double().squeeze(-1) ** 2, reduction, live), F32, 0, 1e-6, value=True)


@asks("shift as an argument", cannot="slices of hidden states and targets are the caller's, and cost no copy")
@points(shift=[True, 2])
def test_no_shift(shift):
    given = drawn(32, SHAPES[0], F32, False, False)
    with pytest.raises(TypeError, match="shift"):
        fk.linear_cross_entropy(given["x"], given["head"], given["target"], shift=shift)


@asks("filter_eps, the threshold of its skipped tiles, of the user's own",
      cannot="skip_tiles is on or off; the threshold is the dtype's, with a stated bound")  # fmt: skip
@points(filter_eps=[None, 1e-3])
def test_no_threshold(filter_eps):
    given = drawn(32, SHAPES[0], F32, False, False)
    with pytest.raises(TypeError, match="filter_eps"):
        fk.linear_cross_entropy(given["x"], given["head"], given["target"], filter_eps=filter_eps)


@asks("a vocabulary sharded over ranks", differs="said by shard=, and compared over processes in tests/test_parallel.py; "
      "without it a part of a head is a vocabulary of its own")  # fmt: skip
def test_no_sharded_vocabulary():
    given = drawn(32, SHAPES[2], F32, False, False)
    with pytest.raises(TypeError, match="vocab_parallel_options"):
        fk.linear_cross_entropy(given["x"], given["head"], given["target"], vocab_parallel_options=object())
    given["target"][0, 0] = 500
    with pytest.raises(ValueError, match="target"):
        fk.linear_cross_entropy(given["x"], given["head"][:250], given["target"])
