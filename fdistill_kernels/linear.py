"""Losses of hidden states and heads, without ever holding N×V: the operator, and autograd around it.

The loss is the end of the graph, so gradients are made in the forward pass, chunk by chunk or on chip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, chunks, scattered
from .backends import sparse
from .backends.rows import WHOLE, LinearCall, Path, Shard, Teacher, TokenTerms, Wants
from .carried import built, flat, in_place_of, keep, kept, leaf, operator, replaced
from .divergences import Divergence
from .tokens import divergence_of, graph_is_kept, has_metrics, of_parts, once, reduced, token_terms
from .values import Head, LossTerms


def loss_of_hidden(
    hidden: Tensor, head: Head, teacher: Teacher, terms: LossTerms, path: Path, backend: str,
    return_parts: bool | str, shard: Shard = WHOLE,
) -> Any:  # fmt: skip
    """The loss of hidden states (..., D), all of it checked; with its parts, if asked for."""
    backend = backends.choose(backend, hidden.device, hidden.dtype, divergence_of(terms))
    of_rows, tokens, _ = token_terms(terms, hidden, has_metrics(return_parts, teacher.targets))
    call = LinearCall(
        hidden.reshape(-1, hidden.shape[-1]), head.with_each(checks.in_graph), teacher, of_rows,
        _taken(path, backend, terms, of_rows), shard=shard,
    )  # fmt: skip
    objects = callable(teacher.rows) or isinstance(of_rows.divergence, Divergence)
    run = _outside_graphs if objects and torch.compiler.is_compiling() else _rows_loss
    loss, parts = run(call, terms.reduction == "none", backend)
    return reduced(loss, parts, terms, tokens, hidden, return_parts)


def _taken(path: Path, backend: str, terms: LossTerms, of_rows: TokenTerms) -> Path:
    """The path, or small chunks where it is not to be had: off Triton, and for statistics of rows."""
    divergence = divergence_of(terms)
    asks_rows = of_rows.metrics or (divergence is not None and divergence.statistics is not None)
    if not path.cut or (backend in ("triton", "cuda") and not asks_rows):
        return path
    return replaced(path, cut=False, chunk_bytes=path.chunk_bytes or chunks.MINIMAL_CHUNK_BYTES)


def _rows_loss(call: LinearCall, per_row: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The loss, summed or of each row, and the parts (3, N)."""
    if _is_trained(call):
        return _LinearLoss.apply(per_row, backend, *flat(call))
    parts, *_ = _rows(call, backend)
    return of_parts(parts, call.terms, per_row), parts


def _is_trained(call: LinearCall) -> bool:
    """Whether a gradient is expected; else there is no graph, which a transform of other tensors would not take."""
    leaves = (call.hidden, call.head.weight, call.head.bias)
    return any(x is not None and checks.needs_gradient(x) for x in leaves)


#: A teacher's function and a user's own divergence are Python objects, which no graph holds.
_outside_graphs = checks.outside_graphs(_rows_loss)


def _rows(call: LinearCall, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts and gradients of hidden states, weight and bias; through the operator, but for what only Python holds."""
    if callable(call.teacher.rows) or isinstance(call.terms.divergence, Divergence):
        own = "divergence, one of your own beside hidden states,"
        name = "teacher_hidden, a function," if callable(call.teacher.rows) else own
        checks.check_unrecorded(name)
        checks.check_transformed(name, call.hidden)
        return _run_outside(call, backend)
    return linear_rows(*flat(call), backend)


def _run(call: LinearCall, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = call.checked()
    backends.check_label_range(call.terms.labels, call.terms.row_scale, call.vocabulary)
    sparse.check_targets(call.teacher.targets, call.terms.row_scale, call.vocabulary)
    hidden = call.hidden
    backend = backends.choose(backend, hidden.device, hidden.dtype, call.divergence)
    if call.path.cut and hidden.shape[0]:
        from .backends.triton import cut

        return cut.linear_rows(call)
    if call.shard.own_rows:
        return scattered.rows_in_turns(call, lambda turn: chunks.linear_rows(turn, backend), _like(call))
    return chunks.linear_rows(call, backend)


def _like(call: LinearCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of the right shapes and dtypes, their values not set."""
    (hidden, weight, bias), wide = call.wants, call.terms.row_scale
    narrow = call.hidden if call.path.cut else wide
    return (
        wide.new_empty(call.parts, call.hidden.shape[0]),
        narrow.new_empty(call.hidden.shape if hidden else (0,)),
        narrow.new_empty(call.head.weight.shape if weight else (0,)),
        wide.new_empty(call.head.weight.shape[:1] if bias else (0,)),
    )


_run_outside = checks.outside_graphs(_run)  # of a backward pass, too, which a compiler may see alone
linear_rows = operator("linear_rows", LinearCall, _run, _like, 4)


def _detached(call: LinearCall, terms: TokenTerms, wants: Wants) -> LinearCall:
    """The call without its graph, for an operator."""
    head = call.head.with_each(Tensor.detach)
    return replaced(call, hidden=call.hidden.detach(), head=head, terms=terms, wants=wants)


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; where each row has its own upstream gradient, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, per_row: bool, backend: str, *leaves: Any) -> Any:
        call, wants = built(LinearCall, leaves), _wants(ctx)
        parts, *gradients = _rows(_detached(call, call.terms, Wants() if per_row else wants), backend)
        ctx.dtypes = _dtypes(call)
        ctx.backend, ctx.group, ctx.again = backend, call.shard.group, per_row or call.shard.own_rows
        ctx.gradients, ctx.in_graph = None, torch.compiler.is_compiling()  # which a backward pass may not be, too
        if ctx.again:
            ctx.made = ctx.in_graph and not per_row
            keep(ctx, leaves, *(gradients if ctx.made else ()))
            ctx.gradients = None if per_row or ctx.in_graph else gradients
        elif ctx.in_graph:
            ctx.save_for_backward(call.terms.row_scale, *gradients)
        else:  # kept so that nothing else holds them in the backward pass: a leaf then takes them without a copy
            ctx.gradients = gradients
            ctx.save_for_backward(call.terms.row_scale)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return of_parts(parts, call.terms, per_row), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = _wants(ctx)
        if upstream is None:
            return (None, None, *in_place_of(LinearCall))
        factor: Any = once(upstream)
        gradients: list[Any]
        made = ctx.again and (ctx.made or ctx.gradients is not None)
        if ctx.again and not (made and scattered.same_factor(factor, ctx.group)):
            call = built(LinearCall, kept(ctx))
            gradients = list(_rows(_detached(call, call.terms.without_metrics(factor), wants), ctx.backend)[1:])
            factor = None
        else:
            if not ctx.again:
                live = (ctx.saved_tensors[0] != 0).any()
                factor = torch.where(live, factor, 1)  # zeros stay, whatever comes for them
            gradients = _handed_over(ctx)
        results: list[Tensor | None] = [None, None, None]
        for i, (want, dtype) in enumerate(zip(wants, ctx.dtypes, strict=True)):
            gradient, gradients[i] = gradients[i], None
            if want:
                results[i] = _rounded(gradient, factor, dtype)
        hidden, weight, bias = results
        return (None, None, *in_place_of(LinearCall, hidden=hidden, head_weight=weight, head_bias=bias))


def _dtypes(call: LinearCall) -> list[Any]:
    """Of hidden states, weight and bias."""
    return [None if x is None else x.dtype for x in (call.hidden, call.head.weight, call.head.bias)]


def _wants(ctx: Any, before: int = 2) -> Wants:
    """Of a graph's leaves, with so many plain arguments before them."""
    needs = ctx.needs_input_grad[before:]
    return Wants(*(leaf(LinearCall, name, needs) for name in ("hidden", "head_weight", "head_bias")))


class _LogProbs(torch.autograd.Function):
    """Labels' log-probabilities and entropies of each row, and in the backward pass the chunks again: the entropy's
    gradient is engine's, ``−Σ q log p``, of a student that is its own teacher.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, *leaves: Any) -> tuple[Tensor, Tensor]:
        found = _log_probs(built(LinearCall, leaves), backend)
        keep(ctx, leaves)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = _wants(ctx, 1)
        call = built(LinearCall, kept(ctx))
        live = call.terms.row_scale != 0
        of_label, of_entropy = (
            torch.zeros_like(call.terms.row_scale) if g is None else torch.where(live, once(g), 0) for g in upstream
        )
        size = torch.maximum(of_label.abs(), of_entropy.abs())  # in the row's factor, which no dtype lets underflow
        share = torch.where(size == 0, 1, size)
        terms = replaced(call.terms, row_scale=size, cross_entropy_scale=-of_label / share,
                         divergence_scale=of_entropy / share)  # fmt: skip
        gradients = _rows(_detached(call, terms, wants), ctx.backend)[1:]
        every = zip(gradients, _dtypes(call), wants, strict=True)
        found = [_rounded(g, None, dtype) if want else None for g, dtype, want in every]
        return (None, *in_place_of(LinearCall, hidden=found[0], head_weight=found[1], head_bias=found[2]))


def _log_probs(call: LinearCall, backend: str) -> tuple[Tensor, Tensor]:
    """Labels' log-probabilities and entropies of each row."""
    parts, *_ = _rows(_detached(call, call.terms, Wants()), backend)
    return -parts[1], parts[0].clone()


def log_probs_of_hidden(
    hidden: Tensor, head: Head, terms: LossTerms, entropy: bool, path: Path, backend: str, shard: Shard = WHOLE
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the terms' labels, and entropies, in the labels' shape; all of it checked."""
    backend = backends.choose(backend, hidden.device, hidden.dtype, divergence_of(terms))
    of_rows, *_ = token_terms(terms, hidden)
    flat_hidden, head = hidden.reshape(-1, hidden.shape[-1]), head.with_each(checks.in_graph)
    call = LinearCall(flat_hidden, head, Teacher(itself=entropy), of_rows, replaced(path, cut=False), shard=shard)
    log_probs, entropies = _LogProbs.apply(backend, *flat(call)) if _is_trained(call) else _log_probs(call, backend)
    shape = hidden.shape[:-1]
    return log_probs.view(shape), entropies.view(shape) if entropy else None


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient·factor in an input's dtype, rounded once."""
    if torch.compiler.is_compiling():
        return (gradient if factor is None else gradient * factor).to(dtype)
    if factor is not None and graph_is_kept():
        gradient = gradient * factor
    elif factor is not None and not (checks.readable(factor) and bool(factor == 1)):
        gradient = gradient.mul_(factor)
    return gradient.to(dtype)


def _handed_over(ctx: Any) -> list[Any]:
    """The gradients, out of the graph's hands unless it is kept for another backward pass."""
    if ctx.in_graph:
        return list(ctx.saved_tensors[-len(Wants._fields) :])
    gradients = list(ctx.gradients)  # a second pass through a graph that is not kept has ended at the saved tensors
    if not graph_is_kept():
        ctx.gradients = None
    return gradients
