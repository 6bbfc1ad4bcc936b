"""Batches from examples of token ids, and the sequences that losses are taken on.

An example is {prompt_ids, labels}, or one text as tokenizers and chat collators make it: {input_ids, labels}, with
labels −100 where nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler

from .teacher_forcing import IGNORE, padded, tokens_counted, unpadded

#: Columns of token ids.
IDS = ("prompt_ids", "labels", "sample_ids", "beam_ids", "teacher_prompt_ids")
#: Which columns have a source's sequences, the first that is there.
COLUMNS = {"gold": ("labels",), "teacher": ("sample_ids",), "beam": ("beam_ids", "sample_ids"), "student": ()}


@dataclass
class Sequences:
    """The sequences that a loss is taken on: token ids of a batch, (L_i,) each."""

    prompts: list[Tensor]
    teacher_prompts: list[Tensor]  # as the teacher sees them
    continuations: list[Tensor]
    counted: Sequence[Tensor] | None = None  # a bool a token, False: read but not in the loss; None: all count
    teachers: list[str] = field(default_factory=list)  # the examples' column teacher, if there is one

    def tokens(self) -> list[int]:
        """The number of tokens of each continuation that count."""
        return tokens_counted(self.continuations, self.counted)

    def number(self, of_tokens: bool) -> int:
        """The number of tokens that count, or the number of sequences."""
        return sum(self.tokens()) if of_tokens else len(self.continuations)


class Counted(IterableDataset[Any]):
    """A stream that counts its rows: `number` is how many there were. Of one in several files accelerate gives each
    rank some, and ranks would not end together; of this one it takes each rank's rows.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Called by loaders: a stream may have another order in each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        self.number = 0
        for row in self.rows:
            self.number += 1
            yield row


class OfEpoch(Sampler[int]):
    """A sampler's order of rows, which the seed and the epoch alone decide: a run that is gone on with has the batches
    that it would have had. What accelerate's loaders make of a sampler tells it no epoch on several ranks, nor in the
    middle of one with transformers 5.0.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], float | None]):
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + int(self.epoch() or 0))
        return iter(self.sampler)


def balanced(sampler: Any, seed: int, epoch: Callable[[], float | None], copies: int) -> Any:
    """Batches of balanced cost, whose order the seed and the epoch alone decide, as in `OfEpoch`: accelerate's loader
    tells no epoch to those of several ranks in its middle. copies: how many ranks, one after another, have one's rows.
    """

    class Balanced(type(sampler)):  # type: ignore[misc]  # by which `Trainer` knows them
        def __iter__(self) -> Iterator[list[int]]:
            self.epoch = int(epoch() or 0)
            yield from super().__iter__()

    ranks, rank, size = (x // copies for x in (sampler.dp_size, sampler.rank, sampler.effective_batch_size))
    return Balanced(sampler.lengths, size, ranks, sampler.grad_accum, seed=seed, rank=rank, drop_last=sampler.drop_last)


def column_of(source: str, columns: Collection[str]) -> str | None:
    """The column with a source's sequences, if there is one."""
    return next((name for name in COLUMNS[source] if name in columns), None)


def prompts_of_teacher(columns: Collection[str]) -> str:
    """The column with the prompts that the teacher sees."""
    return "teacher_prompt_ids" if "teacher_prompt_ids" in columns else "prompt_ids"


def prompts_of(batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """A batch's prompts, and the prompts that the teacher sees."""
    if "prompt_ids" not in batch:
        raise ValueError(f"a batch needs prompt_ids, as collate makes it, and has {', '.join(batch)}: leave out "
                         "data_collator")  # fmt: skip
    prompts = _rows_of(batch, "prompt_ids")
    return prompts, _rows_of(batch, "teacher_prompt_ids") if "teacher_prompt_ids" in batch else prompts


def _rows_of(batch: dict[str, Any], name: str) -> list[Tensor]:
    """A batch's rows of ids, without padding."""
    ids = batch[name]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"a batch needs {name} as integers (B, L) in a tensor, padded with −100, as collate makes it: "
                         "leave out data_collator")  # fmt: skip
    return unpadded(ids)


def given_sequences(source: str, batch: dict[str, Any]) -> Sequences | None:
    """A source's sequences if the batch has them: gold targets, or the teacher's stored samples. None: to be drawn."""
    column = column_of(source, batch.keys())
    if column is None:
        if source == "gold":
            raise ValueError("the objective or the evaluation is on gold targets: the data needs the column labels")
        return None
    (prompts, teacher_prompts), continuations = prompts_of(batch), _rows_of(batch, column)
    masks, counted = batch.get("labels_mask") if column == "labels" else None, None
    if masks is not None:
        if not isinstance(masks, Tensor) or masks.shape != batch[column].shape:
            raise ValueError("a batch's labels_mask must be a tensor of its labels' shape, as collate makes it: leave "
                             "out data_collator")  # fmt: skip
        counted = [mask[row != IGNORE].bool() for mask, row in zip(masks, batch[column], strict=True)]
    return Sequences(prompts, teacher_prompts, continuations, counted, batch.get("teacher", []))


def collate(
    examples: Sequence[dict[str, Any]], vocabulary: int | None = None, teacher_vocabulary: int | None = None,
    encoder_decoder: bool = False, ids_read: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Token ids as (B, L) padded with −100: prompt_ids, and labels, sample_ids, beam_ids, teacher_prompt_ids if there;
    labels_mask as bool (B, L), false of padding; and the teachers' names.

    Args:
        examples: ids as lists or tensors, −100 at their ends cut. Of {input_ids, labels} the prompt is what comes
            before the first label that is not −100, the continuation what follows up to the last, and what is −100 in
            between is read and does not count; of an encoder–decoder model they are the prompt and the continuation.
            Tokens whose attention_mask (of input_ids, or else of prompt_ids) is 0 are padding. labels_mask says which
            labels count, of either form.
        vocabulary, teacher_vocabulary: ids that student and teacher share, and that the teacher has.
        ids_read: those of prompts, where they are others, as an encoder–decoder model's may be.
    """
    rows = [of_example(e, encoder_decoder) for e in examples]
    names = [n for n in IDS if any(n in row for row in rows)]
    if "prompt_ids" not in names:
        raise ValueError(f"an example needs the column prompt_ids; it has {', '.join(examples[0])}")
    batch: dict[str, Any] = {}
    for name in names:
        if not all(name in row for row in rows):
            raise ValueError(f"some examples of a batch have the column {name}, and others have none")
        batch[name] = padded([row[name] for row in rows], IGNORE)
        most = teacher_vocabulary if name == "teacher_prompt_ids" else vocabulary
        whose = "the teacher has" if name == "teacher_prompt_ids" else "student and teacher share"
        most = ids_read if ids_read is not None and name.endswith("prompt_ids") else most
        for found in (int(x) for row in rows if len(row[name]) for x in torch.aminmax(row[name])):
            if found < 0 or (most is not None and found >= most):
                raise ValueError(f"{name} has the id {found}, but {whose} {most} ids")
        if name.endswith("prompt_ids") and not all(len(row[name]) for row in rows):
            raise ValueError(f"a prompt is empty: {name} needs a token at least")
    if any("labels_mask" in row for row in rows):
        masks = [row.get("labels_mask", torch.ones(len(row["labels"]), dtype=torch.bool)) for row in rows]
        batch["labels_mask"] = padded(masks, False)
    if named := [str(e["teacher"]) for e in examples if "teacher" in e]:
        if len(named) < len(examples):
            raise ValueError("some examples of a batch have the column teacher, and others have none")
        batch["teacher"] = named
    return batch


def of_example(example: dict[str, Any], encoder_decoder: bool) -> dict[str, Tensor]:
    """An example's ids and mask as tensors, without padding; TypeError or ValueError where they do not fit."""
    if not isinstance(example, Mapping):
        raise TypeError(f"an example must be a row by column, not a {type(example).__name__}: where that is the "
                        "dataset's format, take data.with_format(None)")  # fmt: skip
    rows = {n: _ids(n, example[n]) for n in (*IDS, "input_ids") if example.get(n) is not None}
    if example.get("labels_mask") is not None:
        rows["labels_mask"] = torch.as_tensor(example["labels_mask"], dtype=torch.bool)
        if "labels" not in rows or rows["labels_mask"].shape != rows["labels"].shape:
            raise ValueError("labels_mask must have a bool for each of an example's labels")
    one_text = {"input_ids", "labels"} <= rows.keys() and "prompt_ids" not in rows and not encoder_decoder
    of = "input_ids" if "input_ids" in rows else "prompt_ids"  # which the attention_mask is of
    if of in rows and example.get("attention_mask") is not None:
        here = torch.as_tensor(example["attention_mask"], dtype=torch.bool)
        for name in ({of, "labels", "labels_mask"} if one_text else {of}) & rows.keys():
            if rows[name].shape != here.shape:
                raise ValueError(f"attention_mask must be as long as {name}, {len(rows[name])}, not {len(here)}")
            rows[name] = rows[name][here]
    if one_text:
        text, labels = rows.pop("input_ids"), rows.pop("labels")
        if "labels_mask" in rows:
            labels = labels.masked_fill(~rows["labels_mask"], IGNORE)
        return rows | _of_one_text(text, labels)
    if "input_ids" in rows:
        rows.setdefault("prompt_ids", rows.pop("input_ids"))
    for name in set(IDS) & rows.keys():
        kept = (rows[name] != IGNORE).nonzero().flatten()
        inside = slice(int(kept[0]), int(kept[-1]) + 1) if len(kept) else slice(0)
        if len(kept) < len(rows[name][inside]):
            raise ValueError(f"{name} has −100 between its ids, and the text there is not known: give input_ids with "
                             "labels, or labels whole and a labels_mask")  # fmt: skip
        rows[name] = rows[name][inside]
        if name == "labels" and "labels_mask" in rows:
            rows["labels_mask"] = rows["labels_mask"][inside]
    return rows


def _ids(name: str, given: Any) -> Tensor:
    """A column's ids; an empty list's dtype is none of its own."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # of texts, of None among ids, of lists that differ in length
        found = torch.empty(())
    if found.dim() != 1 or (len(found) and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ValueError(f"{name} must be an example's token ids, one list of integers, not {str(given)[:40]}")
    return found.long()


def _of_one_text(text: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A causal model's text, parted where its labels begin."""
    if text.shape != labels.shape:
        raise ValueError(f"input_ids and labels must be of one length, not {len(text)} and {len(labels)}")
    counted = labels != IGNORE
    if (labels != text)[counted].any():
        raise ValueError("labels must be the input_ids, or −100: nothing is shifted")
    at = counted.nonzero().flatten()
    begin = max(1, int(at[0])) if len(at) else len(text)  # the first token is predicted by nothing
    end = int(at[-1]) + 1 if len(at) else len(text)
    return {"prompt_ids": text[:begin], "labels": text[begin:end], "labels_mask": counted[begin:end]}


def columns_of(data: Any) -> list[str]:
    """A dataset's columns; none if they cannot be known without reading it, as those that a transform makes of rows."""
    form = getattr(data, "format", None)
    if isinstance(form, dict) and form.get("type") == "custom":  # with_transform's, and column_names are of its input
        return []
    if getattr(data, "column_names", None):
        return list(data.column_names)
    return list(data[0]) if isinstance(data, (list, tuple)) and data else []
