"""Several teachers: mixed into one, or one for each example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...values import RowFunction
from ..losses import TeacherRows
from ..sampling import Sampling
from ..teacher_forcing import tokens_counted
from .base import Batch, Teacher, check_given, logits_function
from .given import teacher_of
from .itself import Itself


class Mixture(Teacher):
    """Several teachers as one, with weights w: ``p = Σ w p_i``, or with geometric=True ``p ∝ Π p_i^w``.

    Args:
        teachers: anything that `teacher_of` takes. Vocabularies may be padded differently; the shared part counts.
        weights: one positive number for each, scaled to a sum of 1. Default: equal.
        geometric: as above. The mixture is of the distributions at temperature 1; the loss applies its temperature to
            it.

    Raises:
        ValueError: weights that do not fit, causal teachers together with encoder–decoder ones, or a teacher that knows
            only lists of ids, which cannot be mixed.
    """

    whole = True

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float] | None = None, geometric: bool = False):
        check_given("a Mixture takes a list of teachers", teachers, Iterable)
        self.teachers = [teacher_of(t) for t in teachers]
        weights = [1.0] * len(self.teachers) if weights is None else list(weights)
        if not self.teachers or len(weights) != len(self.teachers) or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"a Mixture needs a positive weight for each of {len(self.teachers)} teachers: {weights}")
        self.weights, self.geometric = [w / sum(weights) for w in weights], geometric
        self.vocabulary, self.encoder_decoder = _alike(self.teachers)
        self.anything = all(t.anything for t in self.teachers)

    def _rows(self, batch: Batch) -> TeacherRows:
        of_each = [logits_function(t.rows(*batch), batch.device) for t in self.teachers]

        @torch.no_grad()
        def logits(begin: int, end: int) -> Tensor:
            logs = [f(begin, end)[:, : self.vocabulary].float().log_softmax(-1) for f in of_each]
            if self.geometric:
                return sum(w * x for w, x in zip(self.weights, logs, strict=True))  # type: ignore[return-value]
            return torch.stack([x + math.log(w) for w, x in zip(self.weights, logs, strict=True)]).logsumexp(0)

        return TeacherRows(logits, self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """A continuation of each prompt by one teacher, chosen by weight: a sample of the mixture of sequences."""
        if self.geometric:
            raise ValueError("a geometric Mixture draws nothing: give the data the column sample_ids")
        chosen = torch.multinomial(torch.tensor(self.weights), len(prompts), replacement=True).tolist()
        return _by_teacher(dict(enumerate(self.teachers)), chosen, prompts, sampling, vocabulary)


class OfRows(Teacher):
    """One teacher for each example, named in its column `teacher`: OfRows({"math": ..., "code": ...})."""

    whole = True

    def __init__(self, teachers: dict[str, Any]):
        check_given("OfRows takes a dict of teachers by their names", teachers, Mapping)
        if not teachers:
            raise ValueError("OfRows needs a teacher at least")
        self.teachers = {str(name): teacher_of(t) for name, t in teachers.items()}
        self.vocabulary, self.encoder_decoder = _alike(list(self.teachers.values()))
        self.anything = all(t.anything for t in self.teachers.values())
        self.names: list[str] = []  # of the batch's examples

    def choose(self, names: Sequence[str]) -> None:
        """Sets the teachers of the next batch's examples."""
        unknown = [n for n in names if n not in self.teachers]
        if unknown:
            raise ValueError(f"an example names the teacher {unknown[0]!r}; known: {', '.join(self.teachers)}")
        self.names = list(names)

    def _rows(self, batch: Batch) -> TeacherRows:
        """The examples of each teacher are computed together, then put in the batch's order."""
        prompts, continuations, device, pack, counted = batch
        if len(self.names) != len(prompts):
            raise ValueError(f"{len(prompts)} examples, and the column teacher names {len(self.names)} teachers")
        order = list(self.teachers)
        owner = torch.tensor([order.index(name) for name in self.names])
        owner = owner.repeat_interleave(torch.tensor(tokens_counted(continuations, counted)))
        place, functions = torch.empty_like(owner), {}
        for i, (name, teacher) in enumerate(self.teachers.items()):
            if mine := [n for n, known in enumerate(self.names) if known == name]:
                place[owner == i] = torch.arange(int((owner == i).sum()))
                of_mine = None if counted is None else [counted[n] for n in mine]
                rows = teacher.rows([prompts[n] for n in mine], [continuations[n] for n in mine], device, pack, of_mine)
                functions[i] = logits_function(rows, device)
        return TeacherRows(_interleaved(functions, owner, place, self.vocabulary), self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        return _by_teacher(self.teachers, self.names, prompts, sampling, vocabulary)


def _interleaved(functions: dict[int, RowFunction], owner: Tensor, place: Tensor, vocabulary: int) -> RowFunction:
    """Rows of several functions, each by its teacher's number: row n is the owner's row at place."""

    @torch.no_grad()
    def logits(begin: int, end: int) -> Tensor:
        out: Tensor | None = None
        for i, function in functions.items():
            here = (owner[begin:end] == i).nonzero().squeeze(1)
            if not len(here):
                continue
            places = place[begin:end][here]  # one after the other, since examples keep their order
            made = function(int(places[0]), int(places[-1]) + 1)[:, :vocabulary].float()
            out = made.new_empty(end - begin, vocabulary) if out is None else out
            out[here.to(out.device)] = made
        assert out is not None
        return out

    return logits


def _by_teacher(
    teachers: Mapping[Any, Teacher], chosen: Sequence[Any], prompts: Sequence[Tensor], sampling: Sampling,
    vocabulary: int,
) -> list[Tensor]:  # fmt: skip
    """Continuations of prompts, each by the teacher that is chosen for it, by its key."""
    made: list[Any] = [None] * len(prompts)
    for key, teacher in teachers.items():
        if mine := [n for n, one in enumerate(chosen) if one == key]:
            for n, row in zip(mine, teacher.draw([prompts[n] for n in mine], sampling, vocabulary), strict=True):
                made[n] = row
    return made


def _alike(teachers: Sequence[Teacher]) -> tuple[int, bool]:
    """The vocabulary that they share, and which kind they are."""
    if any(isinstance(t, (Itself, OfRows)) for t in teachers):
        raise ValueError("Itself and OfRows are a run's teacher, and not one of several")
    if len({t.encoder_decoder for t in teachers}) > 1:
        raise ValueError("the teachers must all be causal, or all encoder–decoder")
    if not all(t.whole for t in teachers):
        raise ValueError("one of several teachers knows lists of ids alone: a mixture needs whole distributions, of "
                         "models or of stores of hidden states")  # fmt: skip
    return min(t.vocabulary for t in teachers), teachers[0].encoder_decoder


def parts_of(teacher: Teacher) -> list[Teacher]:
    """A teacher, or of a `Mixture` or `OfRows` those that it is of."""
    several = getattr(teacher, "teachers", None)
    if several is None:
        return [teacher]
    return [part for one in (several.values() if isinstance(several, dict) else several) for part in parts_of(one)]
