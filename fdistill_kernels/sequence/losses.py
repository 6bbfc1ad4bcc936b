"""The steps of a batch that a loss is taken on, the student's and the teacher's, and the step-wise losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..deferred import is_plain, output_embedding
from ..divergences import Divergence
from ..functional import linear_cross_entropy, linear_f_divergence
from ..sparse import TopK
from ..values import Head, Hidden, RowFunction


class Rows(NamedTuple):
    """The steps of a batch's continuations that count, one after the other."""

    hidden: Tensor  # (M, D), what predicts the token
    tokens: Tensor  # (M,)
    head: Head | None  # None: it is not one floating matrix (LoRA's sum, quantised), and has only `logits`
    vocabulary: int
    logits: Callable[[Tensor], Tensor]  # of a few rows of hidden states


class TeacherRows(NamedTuple):
    """What a student's `Rows` are compared with, row by row: hidden states with their head, a list, or a function."""

    value: Hidden | TopK | RowFunction
    vocabulary: int


NOT_PLAIN = ("the student's output embedding is LoRA or quantised or has a forward of its own: leave that out, or "
             "train it as a whole")  # fmt: skip


def check_head(model: Any) -> None:
    """Raises ValueError for a student whose output embedding is not one plain weight."""
    if not is_plain(output_embedding(getattr(model, "_orig_mod", model))):
        raise ValueError(NOT_PLAIN)


def step_loss(
    student: Rows, teacher: Rows | TeacherRows | None, divergence: Divergence | None, temperature: float = 1.0,
    ce_weight: float = 0.0, reduction: str = "sum", **keywords: Any,
) -> Tensor:  # fmt: skip
    """The step-wise losses of a batch's rows: a divergence from the teacher, or, without one, the tokens' −log q."""
    head = student.head
    if head is None:
        raise ValueError(NOT_PLAIN)
    if divergence is None:
        return linear_cross_entropy(student.hidden, head, student.tokens, reduction=reduction, **keywords)
    assert teacher is not None
    if isinstance(teacher, Rows):
        teacher = of_model(teacher, student.hidden.device)
    shared, value = min(student.vocabulary, teacher.vocabulary), teacher.value
    if isinstance(value, TopK):  # ids beyond are of a padded head, and their mass is the tail's
        value = value._replace(ids=torch.where(value.ids < shared, value.ids, -1))
    elif not isinstance(value, Hidden):
        value = _first(value, shared)
    return linear_f_divergence(
        student.hidden, head, value, divergence=divergence, vocab_size=shared, labels=student.tokens,
        ce_weight=ce_weight, temperature=temperature, reduction=reduction, **keywords,
    )  # fmt: skip


def _first(logits: RowFunction, vocabulary: int) -> RowFunction:
    """The first entries of rows."""
    return lambda begin, end: logits(begin, end)[:, :vocabulary]


def of_model(rows: Rows, device: torch.device) -> TeacherRows:
    """A model's rows for a student on a device; as logits if the head is on another device or is not one matrix."""
    if rows.head is not None and rows.head.weight.device == device:
        return TeacherRows(Hidden(rows.hidden, rows.head.with_each(Tensor.detach)), rows.vocabulary)

    @torch.no_grad()
    def logits(begin: int, end: int) -> Tensor:
        return rows.logits(rows.hidden[begin:end]).to(device)

    return TeacherRows(logits, rows.vocabulary)


def of_nothing(loss: Tensor, student: nn.Module) -> Tensor:
    """0, whose backward is the loss's, with all that ranks send each other in it, but gives every weight 0."""
    nothing = loss.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)

    def begin(_: Tensor) -> None:
        weights = {p for p in student.parameters() if p.requires_grad} | _leaves(loss)  # FSDP's have others inside
        hooks = contextlib.ExitStack()
        for p in weights:
            hooks.callback(p.register_hook(torch.zeros_like).remove)
        torch.autograd.Variable._execution_engine.queue_callback(hooks.close)

    if nothing.requires_grad:
        nothing.register_hook(begin)
    return nothing


def _leaves(made: Tensor) -> set[Tensor]:
    """The tensors that a tensor's backward ends at."""
    nodes, seen = [made.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}
