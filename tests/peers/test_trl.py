"""TRL's generalised JSD of its GKD and GOLD trainers: its meaning written anew, and itself where it is installed."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .grid import BACKENDS, BF16, F32, agree, asks, close, points, true_jsd

PEER = "TRL"
SHAPES = [(2, 3, 5), (3, 4, 301)]  # theirs, and one of several vectors' width
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
IGNORE = -100


def drawn(shape, masked, dtype=F32):
    """Logits of both models, labels of which one sequence is ignored and a part of the others."""
    x, teacher = torch.randn(2, *shape).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1])
    labels[0, 1:] = labels[-1] = IGNORE
    return dict(x=x, teacher=teacher, labels=labels if masked else None)


def ours(x, teacher, labels, backend, beta=0.5, temperature=1.0, reduction="batchmean", num_items=None):
    """TRL's reductions in ours: its batchmean is over the tokens that count, or the batch where none is ignored."""
    name = "mean" if reduction == "mean" or (reduction == "batchmean" and labels is not None) else reduction
    loss = fk.f_divergence(x, teacher, fk.GJS(beta), labels=labels, temperature=temperature, num_items=num_items,
                           reduction="mean" if num_items else name, backend=backend)  # fmt: skip
    return loss / x.shape[-1] if reduction == "mean" and not num_items else loss


def truth(x, teacher, labels, beta=0.5, temperature=1.0, reduction="batchmean", num_items=None):
    losses = true_jsd((x / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), beta)
    live = torch.ones_like(losses, dtype=torch.bool) if labels is None else labels != IGNORE
    losses = torch.where(live, losses, 0)
    if reduction == "none" and not num_items:
        return losses
    tokens = live.sum()
    batch = tokens if labels is not None else len(x)
    return losses.sum() / (num_items or {"batchmean": batch, "sum": 1, "mean": tokens * x.shape[-1]}[reduction])


def agree_on(shape, masked, dtype=F32, **keywords):
    agree(1, 1, lambda rows: drawn(shape, masked, dtype), functools.partial(ours, **keywords),
          functools.partial(truth, **keywords), atol=1e-7, rtol=1e-5 + torch.finfo(dtype).eps, factor="random")  # fmt: skip


@asks("generalised JSD: betas, temperatures, batchmean and sum, labels ignored")
@points(beta=BETAS, temperature=[1.0, 2.0, 0.5], reduction=["batchmean", "sum"], masked=[False, True], shape=SHAPES,
        dtype=[F32, BF16])  # fmt: skip
def test_generalized_jsd(beta, temperature, reduction, masked, shape, dtype):
    agree_on(shape, masked, dtype, beta=beta, temperature=temperature, reduction=reduction)


@asks("generalised JSD: mean over entries, and none of entries of the tokens that count",
      differs="a loss is a token's: our mean is theirs times V; our none is theirs summed over V, with 0 in place of "
      "what is ignored")  # fmt: skip
@points(beta=BETAS, temperature=[1.0, 2.0], reduction=["mean", "none"], masked=[False, True], shape=SHAPES)
def test_generalized_jsd_over_entries(beta, temperature, reduction, masked, shape):
    agree_on(shape, masked, beta=beta, temperature=temperature, reduction=reduction)


@asks("num_items_in_batch as the denominator, a number or a tensor")
@points(beta=BETAS, number=[7, torch.tensor(7)], masked=[True, False])
def test_num_items(beta, number, masked):
    agree_on(SHAPES[0], masked, beta=beta, num_items=number)


@asks("every label ignored: 0 with a gradient")
@points(backend=BACKENDS, beta=[0.0, 0.5, 1.0])
def test_no_token(backend, beta):
    given = drawn(SHAPES[0], True)
    x = given["x"].requires_grad_()
    loss = ours(x, given["teacher"], torch.full(SHAPES[0][:2], IGNORE), backend, beta)
    loss.backward()
    assert loss == 0 and x.grad is not None and not x.grad.any()


@asks("equal logits: 0; other temperatures and betas: other losses; symmetry at β = ½ alone")
@pytest.mark.parametrize("backend", BACKENDS)
def test_invariants(backend):
    given = drawn(SHAPES[0], False)
    x, teacher = given["x"], given["teacher"]

    def loss(*models, **keywords):
        return ours(*models, None, backend, **keywords)

    assert loss(torch.ones(1, 1, 5), torch.ones(1, 1, 5)) == 0 and abs(loss(x, x.clone())) < 5e-7
    assert loss(x, teacher, beta=0.0) != loss(x, teacher, beta=1.0)
    assert loss(x, teacher) != loss(x, teacher, temperature=2.0)
    torch.testing.assert_close(loss(x, teacher), loss(teacher, x), atol=0, rtol=1e-6)
    assert loss(x, teacher, beta=0.1) != loss(teacher, x, beta=0.1)


@asks("the ends by hand: β = 0 is KL(teacher‖student), β = 1 the reverse")
@points(backend=BACKENDS, beta=[0.0, 1.0])
def test_ends(backend, beta):
    x, teacher = torch.tensor([[[0.1, 0.9]]]).log(), torch.tensor([[[0.9, 0.1]]]).log()
    p, log_q = (teacher, x) if beta == 0 else (x, teacher)
    want = F.kl_div(log_q.double(), p.double().exp(), reduction="batchmean")
    close(ours(x, teacher, None, backend, beta), want, F32, 1e-5, 0, value=True)


@asks("GOLD: probabilities given as such (logits_are_probs)", cannot="no flag: their logarithms are logits")
@points(backend=BACKENDS, beta=BETAS)
def test_probabilities(backend, beta):
    q, p = torch.tensor([[[0.6, 0.3, 0.1]]]), torch.tensor([[[0.5, 0.4, 0.1]]])
    want = true_jsd(q.double().log(), p.double().log(), beta).sum()
    close(ours(q.log(), p.log(), None, backend, beta), want, F32, 1e-7, 1e-5, value=True)
    with pytest.raises(TypeError, match="logits_are_probs"):
        fk.f_divergence(q, p, logits_are_probs=True)


def their_function():
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        try:
            from trl import GKDTrainer
        except ImportError:
            return None
    return GKDTrainer.generalized_jsd_loss


THEIRS = their_function()
CALLED = dict() if THEIRS else dict(cannot="not called: TRL is not installed here; the rows above are its meaning")


@asks("its own function beside ours", **CALLED)
@points(beta=BETAS, temperature=[1.0, 2.0], reduction=["batchmean", "sum", "mean", "none"], masked=[False, True])
def test_its_own_function(beta, temperature, reduction, masked):
    if THEIRS is None:  # what would be compared with it is compared with the truth
        agree_on(SHAPES[0], masked, beta=beta, temperature=temperature, reduction=reduction)
        return
    given = drawn(SHAPES[0], masked)
    theirs = THEIRS(given["x"], given["teacher"], given["labels"], beta, temperature, reduction)
    for backend in BACKENDS:
        loss = ours(**given, backend=backend, beta=beta, temperature=temperature, reduction=reduction)
        if reduction == "none":
            loss = loss if given["labels"] is None else loss[given["labels"] != IGNORE]
            torch.testing.assert_close(loss, theirs.sum(-1), atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(loss, theirs, atol=1e-6, rtol=1e-5)
