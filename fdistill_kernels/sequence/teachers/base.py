"""What every teacher has: the rows that a batch's steps are compared with, and sequences that it draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import products
from ...backends.rows import capped
from ...sparse import TopK
from ...values import Hidden, RowFunction
from ..losses import TeacherRows
from ..sampling import Sampling

#: Logits that are made at a time where no more are needed at once: 16 MiB in float32.
ENTRIES = 1 << 22


class Batch(NamedTuple):
    """What a teacher is asked about; counted: as in `teacher_forced`."""

    prompts: Sequence[Tensor]
    continuations: Sequence[Tensor]
    device: torch.device
    pack: bool
    counted: Sequence[Tensor] | None


class Teacher:
    """What the trainer needs of a teacher."""

    vocabulary: int  # number of ids it knows
    encoder_decoder: bool  # otherwise it is causal
    anything: bool  # whether it has rows for sequences it has not been given before, such as the student's samples
    whole: bool  # whether it knows the probability of every id, as a mixture needs
    temperature: float | None = None  # the one at which its lists can be compared; None: any will do

    def rows(
        self, prompts: Sequence[Tensor], continuations: Sequence[Tensor], device: torch.device, pack: bool = False,
        counted: Sequence[Tensor] | None = None,
    ) -> TeacherRows:  # fmt: skip
        """The rows of a batch's continuations, one after the other; counted: as in `teacher_forced`."""
        return self._rows(Batch(prompts, continuations, device, pack, counted))

    def _rows(self, batch: Batch) -> TeacherRows:
        raise NotImplementedError

    def ends(self) -> list[int]:
        """The tokens that end its sequences, where it knows them."""
        return []

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """A continuation of each prompt."""
        raise NotImplementedError


def check_given(what: str, given: object, kind: type) -> None:
    """Raises TypeError for what a teacher cannot be made of."""
    if not isinstance(given, kind):
        raise TypeError(f"{what}, not a {type(given).__name__}")


def logits_function(rows: TeacherRows, device: torch.device) -> RowFunction:
    """A teacher's rows as a function from a range to logits; TypeError for lists, without logits for other ids."""
    value = rows.value
    if isinstance(value, TopK):
        raise TypeError("a list of ids has no logits of the others")
    if isinstance(value, Hidden):
        states, head = value

        @torch.no_grad()
        def logits(begin: int, end: int) -> Tensor:
            return capped(products.logits(states[begin:end], head).float(), head.softcap).to(device)

        return logits
    return value


def logits_in_pieces(
    rows: TeacherRows, device: torch.device, begin: int, end: int
) -> Iterator[tuple[int, int, Tensor]]:
    """The logits of a few rows at a time: the first row, the row after the last, and the logits (n, V) in float32."""
    logits, step = logits_function(rows, device), max(1, ENTRIES // rows.vocabulary)
    for n in range(begin, end, step):
        yield n, min(n + step, end), logits(n, min(n + step, end))[:, : rows.vocabulary].float()
