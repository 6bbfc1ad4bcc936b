"""The definition of what is right: each divergence from its textbook formula, differentiated by autograd.

Plain PyTorch in the dtype of its input (use float64), N×V temporaries and all. Nothing here is shared with the
backends it judges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .divergences import Divergence, FDivergence, resolve


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
    return (p - q) ** 2 / (p + q).clamp_min(torch.finfo(p.dtype).tiny)


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


def f_divergence_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str | Divergence = "js",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
) -> Tensor:
    """``D_f(softmax(z_t/T_t) ‖ softmax(z_s/T_s))`` of each row: (..., V) logits to (...) losses.

    Temperatures are numbers or tensors of shape (...).
    """
    divergence = resolve(divergence)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

    def log_softmax(logits: Tensor, t: float | Tensor) -> Tensor:
        return (logits / (t.to(logits.dtype).unsqueeze(-1) if isinstance(t, Tensor) else t)).log_softmax(-1)

    log_q, log_p = log_softmax(student_logits, temperature), log_softmax(teacher_logits, teacher_temperature)
    if isinstance(divergence, FDivergence):
        return (log_q.exp() * divergence.generator(log_p - log_q)).sum(-1)  # type: ignore[attr-defined]
    return _FORMULAS[divergence.name](log_p, log_q, divergence.parameter).sum(-1)
