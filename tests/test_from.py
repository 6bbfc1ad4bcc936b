"""docs/from.md: each call as it was and ours have one value and one gradient.

The peers' functions are written out in torch, and where their packages can be imported theirs as well.
"""

import contextlib
import enum
import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .conftest import relative
from .pages import blocks

B, L, V, D = 2, 6, 61, 8


def rows_of_jsd(log_q, log_p, beta):
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + torch.tensor(beta).log(), log_q + torch.tensor(1 - beta).log())
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def generalized_jsd_loss(student, teacher, labels=None, beta=0.5, temperature=1.0, num_items_in_batch=None):
    """TRL 1.16, trl/experimental/gkd."""
    rows = rows_of_jsd((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), beta)
    rows = rows if labels is None else rows[labels != -100]
    return rows.sum() / (num_items_in_batch or (len(student) if labels is None else len(rows)))


def of_live(rows, labels):
    return rows[labels != -100].mean()


def LigerJSD(beta):
    """liger-kernel 0.8, as the rest below."""
    return lambda log_q, log_p, labels: of_live(rows_of_jsd(log_q, log_p, beta), labels)


def LigerTVDLoss():
    return lambda q, p, labels: of_live((q - p).abs().sum(-1) / 2, labels)


def LigerKLDIVLoss(reduction):
    return lambda log_q, p: (p * (p.clamp_min(1e-10).log() - log_q)).sum() / len(p)


def LigerFusedLinearJSD(jsd_beta, temperature):
    def loss(hidden, head, other, teacher_head, labels):
        log_q, log_p = ((h @ w.T / temperature).log_softmax(-1) for h, w in ((hidden, head), (other, teacher_head)))
        return of_live(rows_of_jsd(log_q, log_p, jsd_beta), labels)

    return loss


def LigerFusedLinearJSDLoss(beta, temperature, compiled):
    soft = LigerFusedLinearJSD(beta, temperature)
    return lambda hidden, head, *rest: (
        0.5 * soft(hidden, head, *rest) + 0.5 * F.cross_entropy(hidden @ head.T, rest[-1])
    )


def LigerFusedLinearCrossEntropyLoss(lse_square_scale, softcap, label_smoothing):
    def loss(head, hidden, labels, bias):
        logits = softcap * ((hidden @ head.T + bias) / softcap).tanh()
        z_loss = lse_square_scale * of_live(logits.logsumexp(-1) ** 2, labels)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing) + z_loss

    return loss


def linear_cross_entropy(e, c, targets, bias, softcap, shift):
    """Cut Cross-Entropy 25.1."""
    logits = softcap * ((e[:, :-shift] @ c.T + bias) / softcap).tanh()
    return F.cross_entropy(logits.flatten(0, 1), targets[:, shift:].flatten())


def dense_kl_div(logits, target_logits, mask, temperature):
    """DistillKit, as the two below."""
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits, target_logits))
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * mask).sum()


MissingProbabilityHandling = enum.Enum("MissingProbabilityHandling", ["ZERO", "SYMMETRIC_UNIFORM"])


def sparse_kl_div(logits, target_ids, target_values, missing):
    zero, log_q = missing is MissingProbabilityHandling.ZERO, logits.log_softmax(-1).gather(-1, target_ids)
    log_p = target_values.log_softmax(-1) if zero else target_values
    rest_q, rest_p = (1 - x.exp().sum(-1) for x in (log_q, log_p))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (rows if zero else rows + rest_p * (rest_p / rest_q).log()).sum()


PEERS = ("Liger", "generalized_jsd_loss", "linear_cross", "dense_kl", "sparse_kl", "Missing")
WRITTEN = {k: v for k, v in globals().items() if k.startswith(PEERS)}


#: Liger's kernels that Triton's interpreter takes; the others need a card.
INTERPRETED = "LigerJSD", "LigerFusedLinearJSD", "LigerFusedLinearJSDLoss"


def of_packages():
    """Those that are installed, and run here."""
    found = {}
    with contextlib.suppress(ImportError):
        from liger_kernel import chunked_loss, transformers

        names = [k for k in WRITTEN if k in INTERPRETED or (torch.cuda.is_available() and k.startswith("Liger"))]
        found |= {k: getattr(transformers, k, None) or getattr(chunked_loss, k) for k in names}
    with contextlib.suppress(ImportError):
        from trl.experimental.gkd import GKDTrainer

        found["generalized_jsd_loss"] = GKDTrainer.generalized_jsd_loss
    with contextlib.suppress(ImportError):
        import cut_cross_entropy

        found["linear_cross_entropy"] = functools.partial(cut_cross_entropy.linear_cross_entropy, impl="torch_compile")
    with contextlib.suppress(ImportError):
        from distillkit.lossfuncs.kl import dense_kl_div, sparse_kl_div
        from distillkit.missing_probability import MissingProbabilityHandling

        found |= {f.__name__: f for f in (dense_kl_div, sparse_kl_div, MissingProbabilityHandling)}
    return found


PACKAGES = of_packages()
CASES = [
    pytest.param(block, functions, id=f"{at}-{name}")
    for at, block in enumerate(blocks("from"))
    for name, functions in (("written", WRITTEN), ("package", PACKAGES))
    if functions is WRITTEN or any(re.search(rf"(?<!\.)\b{f}\b", block) for f in functions)
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")
@pytest.mark.parametrize("block, functions", CASES)
def test_before_and_after(block, functions):
    trained = dict(
        logits=2 * torch.randn(B, L, V), hidden=torch.randn(B, L, D), head=torch.randn(V, D), bias=torch.randn(V)
    )
    trained = {name: x.requires_grad_() for name, x in trained.items()}
    names = dict(
        teacher_logits=2 * torch.randn(B, L, V), teacher_hidden=torch.randn(B, L, D), teacher_head=torch.randn(V, D),
        ids=torch.randint(V, (B, L)), labels=torch.randint(V, (B, L)), num_items=7, fk=fk, torch=torch, F=F,
    )  # fmt: skip
    names["labels"][0, 3:] = -100
    exec(block, names := names | trained | WRITTEN | functions)
    assert relative(names["after"], names["before"]) < 1e-5
    was, ours = (torch.autograd.grad(names[k], list(trained.values()), allow_unused=True) for k in ("before", "after"))
    for name, a, b in zip(trained, was, ours, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or relative(b, a) < 2e-5, name


def test_every_function_is_on_the_page():
    assert len(blocks("from")) == 21 and all(any(f in block for block in blocks("from")) for f in WRITTEN)


@pytest.mark.parametrize("log_target", [True, False])
def test_zeros_of_kl_div(log_target):
    log_q, log_p = (torch.tensor(x, dtype=torch.float64).log() for x in ([1.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.0, 1.0]))
    found = F.kl_div(log_q, log_p if log_target else log_p.exp(), log_target=log_target, reduction="none")
    assert found.isnan().tolist() == [False, log_target, True, False] and found[3] == torch.inf


def test_the_log_that_liger_holds_off():
    """Where p is below 1e-10 its value is larger by p log(1e-10/p)."""
    p, log_q = torch.tensor([[1 - 1e-12, 1e-12]], dtype=torch.float64), torch.tensor([[0.5, 0.5]]).double().log()
    more = LigerKLDIVLoss("batchmean")(log_q, p) - fk.f_divergence(log_q, p.log(), "kl")
    assert more.item() == pytest.approx(1e-12 * math.log(100), rel=1e-3)
