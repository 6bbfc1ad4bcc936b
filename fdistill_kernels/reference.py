"""The definition of what is right: each divergence from its textbook formula, differentiated by autograd.

Plain PyTorch in the dtype of its input (use float64), N×V temporaries and all. Nothing here is shared with the
backends it judges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .divergences import Divergence
from .own import FDivergence, resolve


def _xlogy_difference(x: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """x (log a − log b), 0 where x = 0; written so that autograd sees no infinity there."""
    dead = x == 0
    return torch.where(dead, 0, x * (log_a.masked_fill(dead, 0) - log_b.masked_fill(dead, 0)))


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share·p + (1−share)·q)."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    a, b = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    one = torch.ones((), dtype=a.dtype, device=a.device)
    return torch.logaddexp(a + (one * share).log(), b + (one * (1 - share)).log()).masked_fill(neither, -torch.inf)


def _skew(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return _xlogy_difference(log_p.exp(), log_p, _mixture(log_p, log_q, share))


def _kl(log_p: Tensor, log_q: Tensor, _: float = 0) -> Tensor:
    return _xlogy_difference(log_p.exp(), log_p, log_q)


def _gjs(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return _kl(log_q, log_p) if beta else _kl(log_p, log_q)
    log_m = _mixture(log_p, log_q, beta)
    first = _xlogy_difference(log_p.exp(), log_p, log_m)
    return beta * first + (1 - beta) * _xlogy_difference(log_q.exp(), log_q, log_m)


def _alpha(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1):
        return _kl(log_p, log_q) if alpha else _kl(log_q, log_p)
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_w = alpha * log_p.masked_fill(neither, 0) + (1 - alpha) * log_q.masked_fill(neither, 0)
    power = log_w.exp().masked_fill(neither, 0)
    return (power - alpha * log_p.exp() - (1 - alpha) * log_q.exp()) / (alpha * (alpha - 1))


def _tvd(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def _triangular(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    total = p + q  # of nothing, or nearly, 1: an upstream gradient over so little would be infinite
    return (p - q) ** 2 / total.masked_fill(total < torch.finfo(p.dtype).tiny, 1)


def _engine(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return _xlogy_difference(log_q.exp(), torch.zeros_like(log_p), log_p)


def _cross_entropy(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return _xlogy_difference(log_p.exp(), torch.zeros_like(log_q), log_q)


#: (log p, log q, parameter) -> the vocabulary's entries of the loss.
_FORMULAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": _kl,
    "rkl": lambda log_p, log_q, _: _kl(log_q, log_p),
    "js": lambda log_p, log_q, _: _gjs(log_p, log_q, 0.5),
    "tvd": _tvd,
    "jeffreys": lambda log_p, log_q, _: _kl(log_p, log_q) + _kl(log_q, log_p),
    "gjs": _gjs,
    "skew_kl": _skew,
    "skew_rkl": lambda log_p, log_q, lam: _skew(log_q, log_p, lam),
    "alpha": _alpha,
    "hellinger": lambda log_p, log_q, _: 0.5 * ((log_p / 2).exp() - (log_q / 2).exp()) ** 2,
    "pearson": lambda log_p, log_q, _: 2 * _alpha(log_p, log_q, 2.0),
    "neyman": lambda log_p, log_q, _: 2 * _alpha(log_p, log_q, -1.0),
    "triangular": _triangular,
    "engine": _engine,
    "cross_entropy": _cross_entropy,
}


def _lk(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    return -_log_sum(torch.minimum(log_p, log_q))


def _renyi(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    alpha = numbers[0]
    if alpha == 1:
        return _kl(log_p, log_q).sum(-1)
    return torch.logsumexp(torch.where(log_p == -torch.inf, log_p, alpha * log_p + (1 - alpha) * log_q), -1) / (
        alpha - 1
    )


def _ab(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    (a, b), u = numbers, log_p - log_q
    if a and b and a + b:
        value = -((a * log_p + b * log_q).exp() - (a * ((a + b) * log_p).exp() + b * ((a + b) * log_q).exp()) / (a + b))
        value = value / (a * b)
    elif a and not b:
        value = ((a * log_p).exp() * (a * u - 1) + (a * log_q).exp()) / a**2
    elif b and not a:
        value = ((b * log_q).exp() * (-b * u - 1) + (b * log_p).exp()) / b**2
    else:
        value = ((a * u).exp() - a * u - 1) / a**2 if a else u**2 / 2
    if b > 0 and a + b:  # what q = 0 leaves
        value = torch.where(log_q == -torch.inf, ((a + b) * log_p).exp() / (b * (a + b)), value)
    return value.masked_fill(neither, 0).sum(-1)


def _todi(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    ratio = (log_p - log_q).masked_fill(neither | (numbers[0] == 0), 0)
    a = torch.sigmoid(numbers[0] * ratio).detach()
    return (_times_kl(a, log_p, log_q) + _times_kl(1 - a, log_q, log_p)).sum(-1)


def _times_kl(a: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``a p log(p/q)``, 0 where a is."""
    dead = a == 0
    return torch.where(dead, 0, a * _kl(log_p.masked_fill(dead, 0), log_q.masked_fill(dead, 0)))


def _weighed(weight: Tensor, term: Tensor) -> Tensor:
    """``weight·term``, 0 where the weight is, however large the term."""
    return torch.where(weight == 0, 0, weight * term)


def _largest(log_p: Tensor, count: Tensor) -> Tensor:
    """Whether an entry is among the `count` (..., 1) largest, with all that tie."""
    last = log_p.sort(-1, descending=True).values.gather(-1, count - 1)
    return log_p >= last


def _akl(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    p = log_p.exp()
    mass = p.sort(-1, descending=True).values.cumsum(-1)
    count = (mass < numbers[0]).sum(-1, keepdim=True) + 1
    head = _largest(log_p, count.clamp_max(log_p.shape[-1]))
    gap = (p - log_q.exp()).abs().detach()
    share = ((gap * head).sum(-1) / gap.sum(-1)).nan_to_num(0.5)
    return _weighed(share, _kl(log_p, log_q).sum(-1)) + _weighed(1 - share, _kl(log_q, log_p).sum(-1))


def _entropy_gated(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    gate = -_xlogy_difference(log_p.exp(), log_p, torch.zeros_like(log_p)).sum(-1) > numbers[0]
    return _kl(log_q, log_p).sum(-1) + torch.where(gate, _kl(log_p, log_q).sum(-1), 0)


def _log_sum(log: Tensor) -> Tensor:
    """logsumexp, of nothing −inf; written so that autograd makes no softmax of nothing."""
    nothing = (log == -torch.inf).all(-1)
    return log.masked_fill(nothing.unsqueeze(-1), 0).logsumexp(-1).masked_fill(nothing, -torch.inf)


def _grouped(log_p: Tensor, log_q: Tensor, inside: Tensor, weight: float, within: float) -> Tensor:
    """weight·KL(the set's entries and the rest as one) + within·KL(inside the rest)."""
    rest_p, rest_q = (_log_sum(x.masked_fill(inside, -torch.inf)) for x in (log_p, log_q))
    coarse = _kl(log_p, log_q).masked_fill(~inside, 0).sum(-1) + _kl(rest_p, rest_q)
    dead = (rest_p == -torch.inf) | (rest_q == -torch.inf)
    rest = ((log_p, rest_p), (log_q, rest_q))
    # what is no part of the rest is equal in both models: masked before exp(log p − rest) may be infinite
    within_p, within_q = ((x - r.masked_fill(dead, 0).unsqueeze(-1)).masked_fill(inside, 0) for x, r in rest)
    inner = _kl(within_p, within_q).sum(-1)
    return _weighed(coarse.new_tensor(weight), coarse) + _weighed(within * (~dead).to(inner), inner)


def _tail_aware(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    count = torch.full_like(log_p[..., :1], min(int(numbers[0]), log_p.shape[-1]), dtype=torch.long)
    return _grouped(log_p, log_q, _largest(log_p, count), 1.0, numbers[1])


def _dkd(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    assert labels is not None
    inside = torch.arange(log_p.shape[-1], device=log_p.device) == labels.unsqueeze(-1)
    return _grouped(log_p, log_q, inside, *numbers)


def _csd(log_p: Tensor, log_q: Tensor, numbers: tuple[float, float], labels: Tensor | None) -> Tensor:
    weight = (log_p if numbers[0] else log_q).exp().detach()
    dead = weight == 0
    infinite = ((log_q == -torch.inf) | (log_p == -torch.inf)) & ~dead
    u = log_q.masked_fill(infinite | dead, 0) - log_p.masked_fill(infinite | dead, 0)
    value = (weight * (u - (weight * u).sum(-1, keepdim=True)) ** 2).sum(-1)
    return value + torch.where(infinite.any(-1), torch.inf, 0.0)  # a NaN stays one


#: (log p, log q, the divergence's two numbers, labels) -> the loss of each row, where it is no sum of entries' own.
_ROW_FORMULAS: dict[str, Callable[[Tensor, Tensor, tuple[float, float], Tensor | None], Tensor]] = {
    "lk": _lk, "renyi": _renyi, "ab": _ab, "todi": _todi, "akl": _akl, "entropy_gated": _entropy_gated,
    "tail_aware": _tail_aware, "dkd": _dkd, "csd": _csd,
}  # fmt: skip


def example_labels(divergence: Divergence, logits: Tensor) -> Tensor | None:
    """Labels 0, 1, 2, ... for rows of logits (N, V), where the divergence needs any."""
    n, vocabulary = logits.shape
    return torch.arange(n, device=logits.device) % vocabulary if divergence.needs_labels else None


def f_divergence_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str | Divergence = "js",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``D_f(softmax(z_t/T_t) ‖ softmax(z_s/T_s))`` of each row: (..., V) logits to (...) losses.

    Temperatures are numbers or tensors of shape (...), labels (...) integers, for those that need them.
    """
    divergence = resolve(divergence)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

    def log_softmax(logits: Tensor, t: float | Tensor) -> Tensor:
        return (logits / (t.to(logits.dtype).unsqueeze(-1) if isinstance(t, Tensor) else t)).log_softmax(-1)

    log_q, log_p = log_softmax(student_logits, temperature), log_softmax(teacher_logits, teacher_temperature)
    if isinstance(divergence, FDivergence):
        return (log_q.exp() * divergence.generator(log_p - log_q)).sum(-1)  # type: ignore[attr-defined]
    return of_log_probs(divergence, log_p, log_q, labels)


def of_log_probs(divergence: Divergence, log_p: Tensor, log_q: Tensor, labels: Tensor | None = None) -> Tensor:
    """A divergence's formula of log-probabilities (..., V), whose masses need not be 1: (...) losses."""
    if divergence.name in _ROW_FORMULAS:
        return _ROW_FORMULAS[divergence.name](log_p, log_q, divergence.numbers, labels)
    return _FORMULAS[divergence.name](log_p, log_q, divergence.parameter).sum(-1)
