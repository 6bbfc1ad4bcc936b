"""Teachers that are not at hand: a store of what one said, and a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sparse import WHOLE, TopK, checked_tail
from ...teachers import Endpoint, TeacherStore
from ...values import Hidden
from ..batches import prompts_of_teacher
from ..losses import TeacherRows
from ..sampling import Sampling
from .base import Batch, Teacher, check_given


class Stored(Teacher):
    """A `TeacherStore`: no weights of the teacher, but only sequences in the store; tail: of lists, as in `TopK`."""

    anything = False

    def __init__(self, store: TeacherStore, tail: str = "bucket"):
        check_given("Stored takes a TeacherStore", store, TeacherStore)
        self.store, self.tail, self.vocabulary = store, checked_tail(tail), store.vocabulary
        self.whole = store.kind == "hidden"
        if self.whole and tail != "bucket":
            raise ValueError(f"tail={tail!r} is of lists, and {store.folder} holds hidden states")
        self.temperature = None if self.whole or tail in WHOLE else float(store.settings["temperature"])
        self.encoder_decoder = bool(store.extra.get("encoder_decoder", False))

    def _rows(self, batch: Batch) -> TeacherRows:
        pairs = [(p.tolist(), c.tolist()) for p, c in zip(batch.prompts, batch.continuations, strict=True) if len(c)]
        if pairs:
            found = self.store.targets([p for p, _ in pairs], [c for _, c in pairs], tail=self.tail)
        elif self.whole:
            return TeacherRows(lambda begin, end: torch.empty(0, self.vocabulary), self.vocabulary)
        else:  # what is logged of a list is other than of whole rows
            temperature = self.store.settings["temperature"]
            found = TopK(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1), self.tail, None, temperature)
        return TeacherRows(_moved(found, batch), self.vocabulary)

    def ends(self) -> list[int]:
        """As `Teacher.ends`: of its teacher's, which `build` has kept."""
        return list(self.store.extra.get("end_tokens", []))

    def check(self, name: str, examples: Iterable[tuple[int, dict[str, Tensor]]], columns: Sequence[str]) -> None:
        """Raises ValueError where sequences of columns are not in the store; examples: numbered, of `of_example`."""
        asked, lacking = 0, {column: list[int]() for column in columns}
        for number, row in examples:
            asked += 1
            for column in lacking.keys() & row.keys():
                if len(row[column]) and (row.get(prompts_of_teacher(row), ()), row[column]) not in self.store:
                    lacking[column].append(number)
        for column, numbers in lacking.items():
            if numbers:
                shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
                made = self.store.extra.get("job", {})
                of = ", ".join(f"{n} {made[n]}" for n in ("data", "limit", "max_new_tokens", "sequences") if n in made)
                damaged = f"; damaged: {', '.join(self.store.damaged)}" if self.store.damaged else ""
                raise ValueError(
                    f"{len(numbers)} of {asked} sequences of {name} ({column}: {shown}) are not in the store "
                    f"{self.store.folder}{', which was built of ' + of if of else ''}{damaged}"
                )

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """Refused: a store cannot draw."""
        raise ValueError(
            f"the teacher is the store {self.store.folder}, which draws nothing: give the data the column sample_ids, "
            "or take a teacher that is at hand"
        )


class Served(Teacher):
    """An `Endpoint`: a server scores any sequence by top-k lists or hidden states."""

    anything, encoder_decoder = True, False

    def __init__(self, endpoint: Endpoint, tail: str = "bucket"):
        check_given("Served takes an Endpoint", endpoint, Endpoint)
        self.endpoint, self.tail, self.vocabulary = endpoint, checked_tail(tail), endpoint.vocabulary
        self.whole = endpoint.kind == "vllm_hidden"
        self.temperature = None if self.whole or tail in WHOLE else 1.0
        self._ahead: dict[Any, tuple[Any, int]] = {}  # what has been asked for, and how often it is still needed

    def expect(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], most: int) -> None:
        """Starts the requests for a batch whose rows are needed soon; most: batches that may wait to be used."""
        key = _batch_key(prompts, continuations)
        begun, uses = self._ahead.pop(key, (None, 0))
        while len(self._ahead) >= most:  # of batches that nobody came for
            self._ahead.pop(next(iter(self._ahead)))
        self._ahead[key] = begun or self.endpoint.ask(prompts, continuations), uses + 1

    def _rows(self, batch: Batch) -> TeacherRows:
        asked = [p.tolist() for p in batch.prompts], [c.tolist() for c in batch.continuations]
        key = _batch_key(*asked)
        begun, uses = self._ahead.pop(key, (None, 1))
        begun = begun or self.endpoint.ask(*asked)
        if uses > 1:
            self._ahead[key] = begun, uses - 1
        return TeacherRows(_moved(begun(self.tail), batch), self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`; the seed of a batch is the next number of torch's generator."""
        seed = int(torch.randint(2**31, ()))
        return self.endpoint.draw([p.cpu() for p in prompts], sampling, seed, vocabulary)


def _batch_key(prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Any:
    return tuple((tuple(p), tuple(c)) for p, c in zip(prompts, continuations, strict=True))


def _moved(value: Any, batch: Batch) -> Any:
    """A list or hidden states on the batch's device, without the rows that do not count."""
    here = slice(None) if batch.counted is None else torch.cat(list(batch.counted)).cpu()
    if isinstance(value, TopK):
        return value._replace(ids=value.ids[here].to(batch.device), log_probs=value.log_probs[here].to(batch.device))
    states, head = value
    return Hidden(states[here].to(batch.device), head.with_each(lambda x: x.to(batch.device)))
