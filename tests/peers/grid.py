"""What the peers' tests share: points of a grid, a float64 truth, a comparison, and the rows of TABLE.md.

A test is a row of the table; each point of its grid, as the peer has it, is a case. In every case our loss and its
gradients, on each backend that takes it, are held to the same loss written in plain torch in float64. Triton, which
runs in its interpreter, takes part in three points of each test, in both forms.
"""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

WHOLE = bool(os.environ.get("FDISTILL_WHOLE"))
TABLE = Path(__file__).with_name("TABLE.md")
BACKENDS = ("torch", "cpu", "triton")
#: Logits of one comparison. The peers' 4096 and more rows of a 32k to 262k vocabulary are cut to as few rows as this
#: leaves, at least 4: a row's loss does not see the others, and the denominators keep ignored and live rows.
LOGITS = 2**18 if WHOLE else 2**16
#: Triton gets few rows of a case, and in the short form no wide ones.
TRITON_ROWS, TRITON_VOCABULARY = 3, 2**19 if WHOLE else 2**11
#: Set before each test: whether its case is one that the interpreter gets.
INTERPRETED = [True]
#: What a row kernel may miss the truth by before rounding, in float32 epsilons of the largest entry of its row: 2e-5.
ROW_UNITS = 168
#: And a loss, which is float32 whatever the logits are, in those of itself or of 1.
VALUE_UNITS = 16
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: And a loss from hidden states, in epsilons of the products' dtype and of the tensor's largest entry; a float32
#: logit is itself rounded, to an epsilon of its size. (A narrow one is rounded in the truth too.)
LINEAR_UNITS = 8


def asks(what, *, differs=None, cannot=None):
    """The row that a test is counted in: what the peer asks, and why we do not do the same where we do not."""

    def mark(test):
        verdict = "differs" if differs else "cannot say" if cannot else "agrees"
        test.row = (test.__globals__["PEER"], what, verdict, differs or cannot or "", test.__code__.co_firstlineno)
        return test

    return mark


def points(**axes):
    """The product of the axes; in the short form as many points as its longest axis has values, each value in one."""
    values = [list(axis) for axis in axes.values()]
    short = [tuple(i % len(axis) for axis in values) for i in range(max(map(len, values)))]
    whole = itertools.product(*(range(len(axis)) for axis in values))
    chosen = [
        pytest.param(
            *(axis[k] for axis, k in zip(values, at, strict=True)), marks=[pytest.mark.interpreted] * (at in short[:3])
        )
        for at in (whole if WHOLE else short)
    ]
    return pytest.mark.parametrize(",".join(axes), chosen)


def depth(width):
    """A hidden size: the short form has narrow ones."""
    return width if WHOLE else min(width, 128)


def rows_on(backend, rows, vocabulary):
    """How many of the peer's rows a backend gets: none where they would take it minutes."""
    if backend == "triton":
        return min(rows, TRITON_ROWS) if vocabulary <= TRITON_VOCABULARY else 0
    return min(rows, max(4, LOGITS // vocabulary // 4 * 4))


def agree(rows, vocabulary, draw, ours, truth, *, atol=0.0, rtol=0.0, wrt=("x",), factor=1.0, linear=False,
          dtype=None, logit=16.0, backends=BACKENDS):  # fmt: skip
    """`ours(backend=, **tensors)` is `truth(**tensors)` in float64, value and gradients, for what `draw(rows)` gives.

    atol, rtol: the peer's own tolerance, which is kept beside ours. factor: what comes upstream, "random" for one of
    each entry's own. wrt: no names for the value alone, without a graph. linear: from hidden states, in products of
    `dtype`, the first tensor's by default, with logits of that size.
    """
    if not INTERPRETED[0] and len(backends) > 1:
        backends = [name for name in backends if name != "triton"]
    for count, group in itertools.groupby(backends, lambda name: rows_on(name, rows, vocabulary)):
        if not count:
            continue
        torch.manual_seed(0)
        given = draw(count)
        products = dtype or given["x" if "x" in given else wrt[0]].dtype
        above = atol * rows / count if linear else atol  # a mean over fewer rows has the larger gradients
        double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                  for k, v in given.items()}  # fmt: skip
        want = value_and_gradients(truth, double, wrt, factor)
        for backend in group:
            got = value_and_gradients(lambda backend=backend, **kw: ours(backend=backend, **kw), given, wrt, factor)
            for name, x, y in zip(("value", *wrt), got, want, strict=True):
                if name != "value":
                    assert x.dtype == given[name].dtype, (backend, name, x.dtype)
                close(x, y, products, above, rtol, linear and logit, name == "value", f"{name} on {backend}")


def value_and_gradients(function, given, wrt, factor):
    """The loss and its gradients to the tensors named; where none is, no graph is made."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in wrt or ("x",)}
    with torch.set_grad_enabled(bool(wrt)):
        loss = function(**{**given, **leaves})
    if not wrt:
        assert not loss.requires_grad
        return (loss,)
    torch.manual_seed(1)
    upstream = torch.rand(loss.shape) + 0.5 if factor == "random" else torch.full(loss.shape, factor)
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss.dtype))


def close(got, want, dtype, atol, rtol, linear=0.0, value=False, name=""):
    """Within our bound, in epsilons, and within the peer's where it has one. linear: the size of logits made here."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if not want.numel():
        return
    size, eps = want.abs(), torch.finfo(dtype).eps
    if value and linear:
        bound = LINEAR_UNITS * eps * size.clamp_min(1) * (linear if eps < 1e-6 else 1)
    elif linear:
        bound = LINEAR_UNITS * eps * size.max() * (linear if eps < 1e-6 else 1)
    else:
        exact = torch.finfo(F32).eps
        bound = VALUE_UNITS * exact * size.clamp_min(1)
        if not value:  # rounded once to the dtype, to its subnormals too
            rounding = eps * size + torch.finfo(dtype).smallest_normal * eps
            bound = ROW_UNITS * exact * size.amax(-1, keepdim=True) + rounding
    peer = atol + rtol * size if atol or rtol else bound
    error = (got.double() - want).abs()
    excess = error / torch.minimum(bound, peer).clamp_min(1e-300)
    excess = torch.where(error == 0, 0, excess)
    worst = excess.argmax()
    assert excess.max() <= 1, (
        f"{name}: {got.flatten()[worst].item()} for {want.flatten()[worst].item()}, {excess.max().item():.3g} bounds "
        f"(largest {size.max().item():.3g})"
    )


def some_ignored(labels, ignore_index):
    """Labels of which a random part is ignored, never all."""
    chosen = torch.randperm(len(labels))[: int(torch.randint(1, max(2, len(labels) // 2), ()))]
    return labels.index_fill(0, chosen, ignore_index) if len(labels) > 1 else labels


def rounded(tensor, dtype):
    """The values that the dtype holds, with the gradient of the tensor as it is."""
    return tensor + (tensor.detach().to(dtype).to(tensor.dtype) - tensor.detach())


def true_logits(x, head, bias, dtype):
    """In float64, then in the products' dtype, as a model's own head gives them."""
    return rounded(F.linear(x, head, bias), dtype)


def softcapped(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


def reduced(losses, reduction, live):
    """Losses of tokens (n,), of which the live ones count."""
    losses = torch.where(live, losses, 0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / live.sum()}[reduction]


def true_cross_entropy(x, target, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                       softcap=None, reduction="mean"):  # fmt: skip
    """`F.cross_entropy` of capped logits (n, V) and the z-loss beside it."""
    x = softcapped(x, softcap)
    loss = F.cross_entropy(x, target, class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
                           reduction=reduction)  # fmt: skip
    return loss + reduced(z_loss * x.logsumexp(-1) ** 2, reduction, target != ignore_index) if z_loss else loss


def kl(log_p, log_q):
    """Σ p (log p − log q), a number a token."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def true_jsd(log_q, log_p, beta):
    """The generalised JSD of Agarwal et al. 2024, eq. (1), whose ends Liger and TRL take for KL and reverse KL."""
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


class Tally:
    """Cases that passed and failed, by row, and the reasons of known failures."""

    def __init__(self):
        self.passed, self.failed, self.reasons = Counter(), Counter(), {}

    def add(self, report):
        properties = dict(report.user_properties)
        if "row" in properties and (report.when == "call" or report.failed):
            row = tuple(properties["row"])
            (self.passed if report.outcome == "passed" else self.failed)[row] += properties.get("cases", 1)
            if hasattr(report, "wasxfail"):
                self.reasons[row] = f", a known fault: {report.wasxfail}"

    def markdown(self):
        lines = [
            "# The peers' tests, asked of us",
            "",
            "Written by `make peers`. A case is a point of a peer's grid, compared on the backends torch and cpu, and at",
            "some points of each test in Triton's interpreter, with the same loss in float64 in plain torch. Rows of",
            "wide vocabularies are cut (`tests/peers/grid.py` says to how many).",
            "",
            "| peer | what its tests ask | cases | verdict |",
            "|---|---|---|---|",
        ]
        words = {"agrees": "agrees", "differs": "differs on purpose", "cannot say": "cannot say in our API"}
        rows = dict.fromkeys([*self.passed, *self.failed])
        for row in sorted(rows, key=lambda row: (row[0].lower(), list(words).index(row[2]), row[4])):
            peer, what, verdict, why, _ = row
            said = [words[verdict] + (f": {why}" if why else "")] if self.passed[row] else []
            said += [f"**{self.failed[row]} FAIL**{self.reasons.get(row, '')}"] if self.failed[row] else []
            lines.append(f"| {peer} | {what} | {self.passed[row] + self.failed[row]} | {'; '.join(said)} |")
        counts = Counter()
        for row in rows:
            counts[row[2]] += self.passed[row]
        total = ", ".join(f"{counts[verdict]} {words[verdict]}" for verdict in words)
        lines += ["", f"Cases: {total}, {sum(self.failed.values())} fail."]
        return "\n".join(lines) + "\n"
