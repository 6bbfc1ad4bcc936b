"""Rows of text or messages as the token ids that the trainer takes."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from ..checks import check_choice, check_integer
from .encoding import Encoder, Ids, each_answer
from .models import context
from .reading import columns_read

Answers = Literal["together", "each"]
#: What happens to prompts and targets that are too long.
Policy = Literal["cut", "drop", "refuse"]
#: The fate of a row that is too long.
DROPPED = "rows dropped"


def tokenize(
    rows: Any, tokenizer: Any, config: Any, max_target: int | None = None, *, teacher: Any = None, new_tokens: int = 1,
    long_prompts: str = "refuse", long_targets: str = "cut", answers: str = "together",
    teacher_system: str | None = None, ends: Sequence[int] = (), begins: Sequence[int | None] = (), name: str = "data",
    tell: Callable[[str], Any] | None = None, numbered: bool = False,
) -> Any:  # fmt: skip
    """Rows as token ids, in the columns prompt_ids, labels (all that follows the prompt, usually with an end token),
    labels_mask (which labels count; only if some do not), teacher_prompt_ids (only if the teacher's prompts differ),
    length, and reference (the text of the first answer). Rows of prompts alone have no labels and no reference.

    Args:
        rows: a `datasets.Dataset`, of which the columns are read that `reading.read_pairs` keeps of a file's.
        config: the student's configuration; teacher: the teacher's. Their contexts limit the rows.
        max_target: maximum length of `labels`.
        new_tokens: room for a sample that the prompt of a causal model must leave.
        long_prompts, long_targets: "cut" (prompts from the left; targets lose their end token), "drop" the row, or
            "refuse".
        answers: a conversation "together" in one row, or "each" answer in its own row (`each_answer`).
        teacher_system: system message for the teacher's prompts alone.
        ends: tokens that also end an answer, besides the tokenizer's end token (as Gemma's <end_of_turn>), because
            generation stops at them.
        begins: what an encoder–decoder's generation begins with (`generation.beginning`), for targets to begin so.
        name: of the data, for error messages.
        tell: called with a line that says how many rows were cut or dropped.
        numbered: also the column row: the number of the row that each was made of.

    Raises:
        TypeError, ValueError: arguments, columns or rows that do not fit, with their names, or no rows that are left.
    """
    check_choice("answers", answers, get_args(Answers))
    check_choice("long_prompts", long_prompts, get_args(Policy))
    check_choice("long_targets", long_targets, get_args(Policy))
    check_integer("new_tokens", new_tokens, 0)
    if max_target is not None:
        check_integer("max_target", max_target, 1)
    for given, known, what in ((tokenizer, "eos_token_id", "tokenizer must be one of transformers"),
                               (config, "is_encoder_decoder", "config must be a model's configuration")):  # fmt: skip
        if not hasattr(given, known):
            raise TypeError(f"{what}, not {type(given).__name__}")
    rows = columns_read(_plain(rows, name), name)
    encode_row = Encoder(tokenizer, config.is_encoder_decoder, teacher_system, ends, begins)
    both = config, teacher or config
    lengths = _Lengths((context(both[0]), context(both[1])), min(context(of, target=True) for of in both),
                       not config.is_encoder_decoder, new_tokens, max_target, encode_row.before, long_prompts,
                       long_targets)  # fmt: skip
    lengths.check()
    own_prompts = teacher_system is not None or "teacher_prompt" in rows.column_names

    def fitted(row: dict[str, Any]) -> dict[str, Any]:
        return lengths.fit(*encode_row(row), own_prompts)

    made = _kept(_mapped(rows, fitted, answers == "each", own_prompts, name), name, tell)
    return made if numbered else made.remove_columns("row")


def _plain(rows: Any, name: str) -> Any:
    """A dataset in no format, whose rows are of Python's own values."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, as Dataset.from_list makes of a list, not "
                        f"{type(rows).__name__}")  # fmt: skip
    if rows.format["type"] == "custom":
        raise TypeError(f"{name} has a transform, which makes its rows anew at every access: take map in its place")
    return rows.with_format(None)


class _Lengths(NamedTuple):
    """How long rows may be, by some arguments of `tokenize` and by the models."""

    contexts: tuple[float, float]  # of student and teacher; a causal model's holds prompt and target
    of_target: float  # of an encoder–decoder's target, the smaller of both models'
    causal: bool
    new_tokens: int
    max_target: int | None
    before: list[int]  # what the tokenizer begins a prompt with, which a cut prompt keeps
    long_prompts: str
    long_targets: str

    def check(self) -> None:
        """Raises ValueError where no prompt would have room."""
        if self.causal and min(self.contexts) - self.new_tokens <= len(self.before):
            raise ValueError(
                f"{self.new_tokens} new tokens leave a prompt no room in a context of {min(self.contexts):g}"
            )

    def fit(self, found: Ids, own: list[int] | None, reference: str, own_prompts: bool) -> dict[str, Any]:
        """A row's columns; own: the teacher's prompt, if it has its own."""
        fate: list[str] = []
        prompts = [found.prompt, found.prompt if own is None else list(own)]
        rooms = [min(self.contexts)] * 2 if own is None else self.contexts  # one prompt is cut once
        if not all(prompts):
            raise ValueError("the prompt is empty")
        prompts = [self._cut(ids, room - self.new_tokens * self.causal, self.long_prompts, "prompt", fate)
                   for ids, room in zip(prompts, rooms, strict=True)]  # fmt: skip
        left = min(room - len(ids) for ids, room in zip(prompts, self.contexts, strict=True))
        left = left if self.causal else self.of_target
        limit = left if self.max_target is None else min(left, self.max_target)
        rest = None if found.rest is None else self._cut(found.rest, limit, self.long_targets, "target", fate)
        counted = None if rest is None else (found.counted or [True] * len(rest))[: len(rest)]
        return {"prompt_ids": prompts[0], "labels": rest, "labels_mask": counted, "reference": reference,
                "length": len(prompts[0]) + len(rest or ()), "fate": sorted(set(fate)),
                **({"teacher_prompt_ids": prompts[1]} if own_prompts else {})}  # fmt: skip

    def _cut(self, ids: list[int], room: float, policy: str, what: str, fate: list[str]) -> list[int]:
        """Ids that fit: a prompt's last behind what it begins with, a target's first; fate: what befell the row."""
        if len(ids) <= room:
            return ids
        if policy == "refuse":
            raise ValueError(f"{what} has {len(ids)} tokens, and there is room for {room:g}: see --long_{what}s")
        fate.append(f"{what}s cut" if policy == "cut" else DROPPED)
        if what == "target":
            return ids[: int(room)]
        kept = self.before if ids[: len(self.before)] == self.before else []
        return [*kept, *ids[len(ids) - (int(room) - len(kept)) :]]


def _mapped(
    rows: Any, fitted: Callable[[dict[str, Any]], dict[str, Any]], each: bool, own_prompts: bool, name: str
) -> Any:
    """The columns that `fitted` makes of each row, or of each of its answers; with the row's number."""
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            made = [fitted(part) for part in (each_answer(row) if each else [row])]
        except ValueError as error:  # of text that is not UTF-8, too: it is decoded here
            raise ValueError(f"{name}, row {index}: {error}") from error
        found = {column: [one[column] for one in made] for column in made[0]} if each else made[0]
        return {**found, "row": [index] * len(made) if each else index}

    ids, number = ListOf(Value("int64")), Value("int64")  # what the first thousand rows lack has no type of its own
    columns = {"prompt_ids": ids, "labels": ids, "labels_mask": ListOf(Value("bool")), "reference": Value("string"),
               "length": number, "fate": ListOf(Value("string")),
               **({"teacher_prompt_ids": ids} if own_prompts else {}), "row": number}  # fmt: skip
    of_rows = {name: ListOf(kind) for name, kind in columns.items()} if each else columns
    made = rows.map(encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False,
                    features=Features(of_rows), desc="tokenizing")  # fmt: skip
    if each:
        made = made.map(lambda batch: {column: list(itertools.chain(*batch[column])) for column in batch}, batched=True,
                        load_from_cache_file=False, features=Features(columns))  # fmt: skip
    return made


def _kept(made: Any, name: str, tell: Callable[[str], Any] | None) -> Any:
    """The rows that are not dropped, with the columns that the trainer reads and the row's number."""
    fates = collections.Counter(f for found in made["fate"] for f in found)
    kept = [(row, labels is None) for row, (labels, fate) in enumerate(zip(made["labels"], made["fate"], strict=True))
            if DROPPED not in fate]  # fmt: skip
    bare = [row for row, lacks in kept if lacks]
    if 0 < len(bare) < len(kept):
        row = made[bare[0]]["row"]
        raise ValueError(f"{name}: some rows have no target, and others have one: row {row} ends in no answer; "
                         "--answers each leaves out what follows a conversation's last")  # fmt: skip
    if fates and tell is not None:
        tell(f"{name}: " + ", ".join(f"{count} of {len(made)} {fate}" for fate, count in sorted(fates.items())))
    if fates[DROPPED]:
        made = made.select([row for row, _ in kept])
    if not len(made):
        raise ValueError(f"{name} has no rows that are short enough")
    dull = ["fate"]
    if bare:
        dull += ["labels", "reference"]
    some = not bare and any(not all(mask) for mask in made["labels_mask"])
    return made.remove_columns(dull if some else [*dull, "labels_mask"])
