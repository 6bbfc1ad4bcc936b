"""What an objective and a teacher ask of the datasets, where their columns are known, before any work."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from .batches import COLUMNS, IDS, column_of, columns_of, given_sequences, of_example, prompts_of, prompts_of_teacher
from .config import BY_LENGTHS, FDistillConfig, sampling_strategy
from .generation import check_search
from .models import context, inputs_of
from .objectives import compared_sources, sources_of
from .pairing import models_of
from .ranks import copies_of_rows
from .teachers import Itself, OfRows, Served, Stored, Teacher
from .teachers.several import parts_of

#: What is said of a dataset, and of a column.
NO_LENGTHS = "batches by length need a datasets.Dataset as {} with the column {}, each example's tokens"
#: Inputs of a model that a dataset may have.
READ = (*IDS, "input_ids", "attention_mask")
#: What others call labels_mask: transformers' chat templates, and TRL.
MASKS = ("assistant_masks", "completion_mask")


def check_datasets(train: Any, evaluation: Any, student: Any, teacher: Teacher, args: FDistillConfig) -> None:
    """Raises TypeError or ValueError for a trainer's datasets: columns that are missing, that nobody reads, or that the
    student would read and is not given; sequences too long for a model, or that a store lacks.
    """
    halves, gold = args.halves(), ["gold"] if args.evaluates else []
    strategy, ranks = sampling_strategy(args), args.world_size // copies_of_rows(student)
    if isinstance(train, dict):  # as of load_dataset without a split
        raise TypeError(f"train_dataset must be one dataset, not several: give one of {', '.join(map(repr, train))}")
    for name, data in _datasets_of("train_dataset", train):
        _check_dataset(name, data, sources_of(halves), compared_sources(halves), student, teacher, args.max_new_tokens)
        if args.dataloader_drop_last and not hasattr(data, "__len__"):
            raise ValueError(f"dataloader_drop_last is not used by {name}, a stream, whose last batch is taken as it "
                             "is: leave it out")  # fmt: skip
        updates = args.gradient_accumulation_steps if strategy == "batch_rebalance" else 1
        _check_dropped(name, data, args, args.train_batch_size, ranks, updates)
        if strategy in BY_LENGTHS and not (hasattr(data, "__len__") and _has_lengths(data, args.length_column_name)):
            raise ValueError(NO_LENGTHS.format(name, args.length_column_name))
    for name, data in _datasets_of("eval_dataset", evaluation):
        _check_dataset(name, data, gold, gold, student, teacher, args.max_new_tokens)
        if gold:
            _check_dropped(name, data, args, args.eval_batch_size, ranks)
        if gold and strategy == "group_by_length" and not _has_lengths(data, args.length_column_name):
            raise ValueError(NO_LENGTHS.format(name, args.length_column_name))


def _check_dropped(name: str, data: Any, args: FDistillConfig, size: int, ranks: int, batches: int = 1) -> None:
    """Raises ValueError if dataloader_drop_last leaves nothing of so many batches at a time for each rank with rows."""
    loaders: Any = args.accelerator_config
    least = size * batches * (1 if loaders.split_batches else ranks)
    if args.dataloader_drop_last and hasattr(data, "__len__") and len(data) < least:
        of = "a batch" if least == size else f"{least // size} batches that go together"
        raise ValueError(f"dataloader_drop_last drops all of {name}, which has {len(data)} rows, fewer than the "
                         f"{least} of {of}: lower the batch size, or leave it out")  # fmt: skip


def _has_lengths(data: Any, column: str) -> bool:
    """Whether `Trainer` finds the lengths of rows: in a column, which it reads of a datasets.Dataset alone, or as those
    of input_ids. A stream needs none.
    """
    columns = columns_of(data)
    known = column in columns and hasattr(data, "column_names")
    return known or not columns or "input_ids" in columns or not hasattr(data, "__len__")


def check_collator(collator: Any, *datasets: Any) -> None:
    """Raises ValueError for a collator of one's own whose batches this trainer cannot read, by a first row at hand."""
    found = [data for given in datasets for _, data in _datasets_of("", given) if hasattr(data, "__getitem__")]
    if not found:
        return
    try:
        batch = collator([found[0][0]])
    except Exception as error:  # whatever it is that a collator of other data meets
        raise ValueError(f"data_collator fails on the data's first row ({error!r}): leave it out") from error
    prompts_of(batch)
    for source in COLUMNS:
        if column_of(source, batch):
            given_sequences(source, batch)


def _check_dataset(name: str, data: Any, sources: list[str], compared: list[str], student: Any, teacher: Teacher,
                   new_tokens: int) -> None:  # fmt: skip
    """One of them: sources whose sequences are used, and those that are compared with the teacher's word."""
    known = isinstance(data, (list, tuple)) or (
        hasattr(data, "column_names") and hasattr(data, "__len__") and columns_of(data)
    )
    first = data[0] if known and len(data) else {}
    readable = hasattr(data, "__getitem__") or isinstance(data, IterableDataset)
    if isinstance(data, str) or not readable or not isinstance(first, Mapping):
        found = type(data).__name__ + ("" if isinstance(first, Mapping) else f" of {type(first).__name__}")
        raise TypeError(f"{name} must be a dataset, or a list of examples by column, not a {found}")
    if hasattr(data, "__len__") and len(data) == 0:
        raise ValueError(f"{name} is empty")
    columns = columns_of(data)
    if not columns or not sources:
        return
    _check_columns(name, columns, sources, teacher)
    if unread := [column for column in columns if column in inputs_of(student) and column not in READ]:
        raise ValueError(f"{name} has the column {unread[0]}, an input of the student's forward that this trainer "
                         "makes itself or leaves out: leave it out, too")  # fmt: skip
    if "labels_mask" not in columns and (other := [column for column in MASKS if column in columns]):
        raise ValueError(f"{name} has the column {other[0]}, which is not read: name it labels_mask, or leave it out "
                         "where labels are −100 at what does not count")  # fmt: skip
    _check_teachers(name, data, columns, compared, teacher)
    theirs, at_hand = prompts_of_teacher(columns), models_of(teacher)
    for source in sources:
        column = column_of(source, columns)
        new = 0 if column else new_tokens
        if source == "beam" and not column and isinstance(teacher, Served):
            raise ValueError(f"{name} has no beam_ids, and a server is asked for samples, not for beams: take method "
                             "kl, or a teacher that is at hand")  # fmt: skip
        for searching in at_hand if source == "beam" and not column else ():
            check_search(searching)
        for other in at_hand if source in compared or source == "student" else ():
            _check_contexts(name, data, theirs, column, new, "the teacher's", other)
        _check_contexts(name, data, "prompt_ids", column, new, "the student's", student)


def _check_columns(name: str, columns: Collection[str], sources: Collection[str], teacher: Teacher) -> None:
    """Raises ValueError for columns that are missing, or of which one has two meanings."""
    if not {"prompt_ids", "input_ids"} & set(columns):
        raise ValueError(f"{name} needs the column prompt_ids; it has {', '.join(columns)}")
    if "gold" in sources and "labels" not in columns:
        raise ValueError(f"{name} needs the column labels: the objective, or the evaluation, is on gold targets")
    if not teacher.anything and any(not column_of(s, columns) for s in sources):
        raise ValueError("the objective is on the teacher's samples, and a store draws none: give the data the "
                         "column sample_ids")  # fmt: skip
    if {"teacher", "beam"} <= set(sources) and "sample_ids" in columns and "beam_ids" not in columns:
        raise ValueError(f"{name}: the objective is on the teacher's samples and its beams, sample_ids are one of "
                         "them: give both sample_ids and beam_ids, or none")  # fmt: skip
    if ("teacher" in columns) != isinstance(teacher, OfRows):
        raise ValueError(f"{name}: the column teacher names each example's, of OfRows: give both, or neither")


def _check_teachers(name: str, data: Any, columns: Collection[str], compared: list[str], teacher: Teacher) -> None:
    """Raises ValueError for teachers that are not known, sequences that a store has not, and prompts of the student's
    where it is its own teacher. A stream is not read for that.
    """
    same = isinstance(teacher, Itself) and teacher.decay is None and teacher.adapter
    if same and "teacher_prompt_ids" not in columns:
        raise ValueError("Itself() is the student with another prompt: give the data the column "
                         "teacher_prompt_ids, or Itself(decay=...), or Itself(adapter=False)")  # fmt: skip
    if not hasattr(data, "__len__"):
        return
    named: list[str] = []
    if isinstance(teacher, OfRows):
        named = list(map(str, [e["teacher"] for e in data] if isinstance(data, (list, tuple)) else data["teacher"]))
        teacher.choose(named)
    wanted = sorted({column for source in compared if (column := column_of(source, columns))})
    for mark, one in teacher.teachers.items() if isinstance(teacher, OfRows) else [("", teacher)]:
        for part in parts_of(one):
            if isinstance(part, Stored) and wanted:
                of_it = ((n, of_example(e, part.encoder_decoder)) for n, e in enumerate(data)
                         if not named or named[n] == mark)  # fmt: skip
                part.check(name, of_it, wanted)


def _datasets_of(name: str, data: Any) -> Iterator[tuple[str, Any]]:
    """A dataset by its name; if there are several, each by its own."""
    if isinstance(data, dict):
        yield from ((f"{name}[{part!r}]", found) for part, found in data.items())
    elif data is not None:
        yield name, data


def _lengths(data: Any, column: str) -> np.ndarray | None:
    """The number of tokens in a column of each example; None if the data would have to be read for it."""
    if isinstance(data, (list, tuple)):
        return np.array([0 if (ids := e.get(column)) is None else len(ids) for e in data])
    if not (hasattr(data, "select_columns") and hasattr(data, "with_format") and hasattr(data, "__len__")):
        return None
    import pyarrow.compute

    found = pyarrow.compute.list_value_length(data.select_columns([column]).with_format("arrow")[:].column(0))
    return pyarrow.compute.fill_null(found, 0).to_numpy()


def _check_contexts(name: str, data: Any, prompt: str, column: str | None, new: int, whose: str, model: Any) -> None:
    """Raises ValueError where prompts with their continuations do not fit a model, which is `whose` in the error.
    prompt, column: of token ids; column None: `new` tokens are drawn.
    """
    limits = context(model), context(model, target=True)
    columns, causal = columns_of(data), not model.config.is_encoder_decoder
    if "prompt_ids" not in columns and prompt == "prompt_ids":
        prompt = "input_ids"
    one_text = prompt == "input_ids" and causal  # which holds its labels
    if min(limits) == math.inf or {prompt, column or prompt} - set(columns) or (one_text and column != "labels"):
        return
    prompts = _lengths(data, prompt)
    more = np.array(0 if one_text else new) if column is None or one_text else _lengths(data, column)
    if prompts is None or more is None or not len(prompts):
        return
    over = prompts + more - limits[0] if causal else np.maximum(prompts - limits[0], more - limits[1])
    for row in (-over).argsort(kind="stable")[: (over > 0).sum()].tolist():
        example = of_example(data[row], not causal)  # without padding, which a batch has not
        of_prompt = len(example.get(prompt.replace("input", "prompt"), ()))
        lengths = of_prompt, len(example.get(column, ())) if column else new
        found = ((sum(lengths), limits[0]),) if causal else zip(lengths, limits, strict=True)
        beside = f"its {column}" if column else f"{new} new tokens"
        for tokens, limit in found:
            if tokens > limit:
                raise ValueError(f"{name}: row {row}'s {prompt} with {beside} has {tokens} tokens, {whose} context "
                                 f"{limit}")  # fmt: skip
