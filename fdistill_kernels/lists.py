"""Lists of ids from a model that is at hand: its largest entries, a student's, both, or a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, products
from .backends.rows import capped
from .heads import check_hidden_value, checked_head, head_of, logits_of
from .sparse import TopK, checked_tail
from .tokens import TEMPERATURES
from .values import Hidden, Logits

SUPPORTS = ("teacher", "student", "union")
#: Entries of the logits that are made at once.
PIECE = 1 << 24

Model = Tensor | Logits | Hidden


def top_k_of(
    teacher: Model, k: int, *, support: str = "teacher", student: Model | None = None, tail: str = "bucket",
    temperature: float = 1.0,
) -> TopK:  # fmt: skip
    """A teacher's log-probabilities at the k largest entries of each row.

    Args:
        teacher, student: logits (..., V), as a tensor or `Logits`; or `Hidden` states (..., D) with their head, whose
            logits are made a few rows at a time.
        k: number of ids per row; V if that is less: the list is then the whole row, where ``torch.topk`` raises.
        support: whose largest entries: "teacher"; "student", for a divergence that is exact where the student has its
            mass; or "union", of up to 2k ids, padded with −1.
        student: for support="student" and "union" only.
        tail: of the `TopK`; not "sampled".
        temperature: T of ``log_probs = log softmax(logits/T)``, in [1e-18, 1e18].

    Returns:
        `TopK` with ids (..., K), int64, and log_probs, float32 (float64 for float64), without a graph.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    checks.check_integer("k", k, low=1)
    temperature = checks.check_number("temperature", temperature, *TEMPERATURES)
    checked_tail(tail)
    checks.check_choice("support", support, SUPPORTS)
    if (support == "teacher") != (student is None):
        raise ValueError("student is for support='student' or 'union', which need it")
    (shape, rows_of_teacher), found = _rows("teacher", teacher), []
    others: Iterator[Tensor] | None = None
    if student is not None:
        student_shape, others = _rows("student", student)
        if student_shape != shape:
            raise ValueError(f"student has logits of shape {(*student_shape,)}, teacher of {(*shape,)}")
    for logits in rows_of_teacher:
        other = None if others is None else next(others)
        log_p, most = _log_softmax(logits, temperature), min(k, logits.shape[-1])
        if other is not None:
            _top("student", other)
        ids = (logits if other is None or support == "union" else other).topk(most, -1).indices
        if support == "union":
            assert other is not None
            ids = _union(ids, other.topk(most, -1).indices)
        listed = log_p.gather(1, ids.clamp_min(0))
        found.append((ids, torch.where(ids >= 0, listed, -torch.inf)))
    ids, log_probs = (_shaped(torch.cat(x), shape) for x in zip(*found, strict=True))
    return TopK(ids, log_probs, tail, temperature=temperature)


def sample_of(
    teacher: Model, draws: int, *, temperature: float = 1.0, proposal_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> TopK:  # fmt: skip
    """Ids drawn from a teacher, with importance weights that make the loss and its gradient unbiased.

    The ids are drawn n times with replacement from ``π ∝ p^(1/τ)``. An id drawn c times has the weight ``c/(n π)``
    (random sampling KD, Anshumann et al. 2025, arXiv 2503.16870).

    Args:
        teacher: as in `top_k_of`.
        draws: n, at least 1.
        temperature: of p = softmax(logits/temperature).
        proposal_temperature: τ, in [1e-18, 1e18]; with 1, π = p.
        generator: for torch.multinomial.

    Returns:
        `TopK` with tail="sampled" and ids (..., n), the distinct ones first, then −1.

    Raises:
        ValueError, TypeError: as in `top_k_of`.
    """
    checks.check_integer("draws", draws, low=1)
    temperature = checks.check_number("temperature", temperature, *TEMPERATURES)
    proposal_temperature = checks.check_number("proposal_temperature", proposal_temperature, *TEMPERATURES)
    (shape, rows), found = _rows("teacher", teacher), []
    for logits in rows:
        log_p = _log_softmax(logits, temperature)
        log_pi = _log_softmax(log_p, proposal_temperature)
        drawn = torch.multinomial(log_pi.exp(), draws, True, generator=generator).sort(1).values
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = torch.searchsorted(drawn, drawn, right=True) - torch.searchsorted(drawn, drawn)  # a row is sorted
        weights = counts / (draws * log_pi.gather(1, drawn).exp())
        order = first.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        every = torch.where(first, drawn, -1), log_p.gather(1, drawn), torch.where(first, weights, 0)
        found.append(tuple(x.gather(1, order) for x in every))
    ids, log_probs, weights = (_shaped(torch.cat(x), shape) for x in zip(*found, strict=True))
    return TopK(ids, torch.where(ids >= 0, log_probs, -torch.inf), "sampled", weights, temperature)


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """(rows, K) as (..., K), also where there is no row."""
    return x.reshape(*shape[:-1], x.shape[1])


def _union(one: Tensor, other: Tensor) -> Tensor:
    """Ids (n, K) and (n, K) as (n, 2 K), each once, −1 behind them."""
    both = torch.cat((one, other), 1).sort(1).values
    both[:, 1:] = torch.where(both[:, 1:] == both[:, :-1], -1, both[:, 1:])
    return both.sort(1, descending=True).values


def _rows(name: str, model: Model) -> tuple[torch.Size, Iterator[Tensor]]:
    """The logits' shape, and pieces of their rows in float32 (float64), capped."""
    if isinstance(model, Hidden):
        check_hidden_value(name, model)
        head = head_of(f"{name}.head", model.head, bias=None, scale=None, softcap=None)
        states, head = checked_head(model.states, head, (f"{name}.states", f"{name}.head", f"{name}.bias"), None)
        head = head.with_each(lambda x: x.detach().to(states.dtype))  # which autocast may have changed
        size, flat = head.weight.shape[0], states.detach().reshape(-1, states.shape[-1])
        shape = torch.Size((*states.shape[:-1], size))

        def of_states() -> Iterator[Tensor]:
            for some in flat.split(max(1, PIECE // size)):
                yield capped(_wide(products.logits(some, head)), head.softcap)

        return shape, of_states()
    values, cap = logits_of(name, model, "", None)
    checks.check_logits(name, values)
    pieces = values.detach().reshape(-1, values.shape[-1]).split(max(1, PIECE // values.shape[-1]))
    return values.shape, (capped(_wide(x), cap) for x in pieces)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of logits less their largest, whose differences a temperature leaves their digits; rows that have one."""
    return ((logits - _top("teacher", logits)) / temperature).log_softmax(-1)


def _top(name: str, logits: Tensor) -> Tensor:
    """Each row's largest; a GPU is not asked whether it is a number."""
    top = logits.amax(-1, keepdim=True)
    if checks.readable(logits) and not torch.isfinite(top).all():
        raise ValueError(f"{name} has a row of logits that holds a NaN or +inf, or nothing but -inf")
    return top


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
