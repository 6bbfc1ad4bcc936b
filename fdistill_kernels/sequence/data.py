"""Rows of a file or a hub dataset, with prompts and targets as text or messages; and their token ids."""

from __future__ import annotations

import collections
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..checks import check_choice
from .encoding import Encoder, each_answer
from .models import context

COLUMNS = ("prompt", "target")
#: Other columns that rows may have.
OTHERS = ("teacher_prompt", "messages", "tools", "text")
Answers = Literal["together", "each"]
#: What happens to prompts and targets that are too long.
Policy = Literal["cut", "drop", "refuse"]


def read_pairs(path: str | Path, limit: int | None = None, columns: tuple[str, str] = COLUMNS,
               config: str | None = None, split: str = "train") -> Any:  # fmt: skip
    """A `datasets.Dataset` with the columns prompt and target, or only prompt, messages or text, and `OTHERS`.

    Args:
        path: a .jsonl, .json, .csv or .tsv file (.tsv: two columns, without a header or with two of the names here),
            also as .gz, or a .parquet file; or the name of a hub dataset, with its config and split.
        limit: read only the first rows, this many.
        columns: names of the prompt and target columns in the file; a column completion also counts as target.

    Raises:
        ValueError: an unknown kind of file, a line that cannot be read, a missing column, no rows. OSError: no file.
    """
    rows = _load(str(path), columns, config, split)
    if not len(rows):
        raise ValueError(f"{path} has no rows")
    has = rows.column_names
    target = "completion" if columns[1] not in has and columns[1] == COLUMNS[1] else columns[1]
    wanted = next(
        (w for w in ((columns[0], target), ("messages",), (columns[0],), ("text",)) if set(w) <= set(has)), ()
    )
    named = [name for name, usual in zip(columns, COLUMNS, strict=True) if name != usual and name not in has]
    if named or not wanted:
        lacking = repr(named[0]) if named else f"{columns[0]!r}, and messages and text"
        raise ValueError(f"{path} lacks the column {lacking}; it has {', '.join(has)}")
    kept = [n for n in dict.fromkeys((*wanted, "teacher_prompt", "tools")) if n in has]
    rows = rows.select_columns(kept)
    names = dict(zip((columns[0], target), COLUMNS, strict=True))
    rows = rows.rename_columns({a: b for a, b in names.items() if a in kept and a != b})
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def _load(path: str, columns: tuple[str, str], config: str | None, split: str) -> Any:
    from datasets import load_dataset

    kind = Path(path).name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("jsonl", "json", "csv", "tsv", "parquet"):
        if Path(path).is_file():
            raise ValueError(f"{path} must be .jsonl, .json, .csv, .tsv or .parquet, not .{kind}")
        return load_dataset(path, config, split=split)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read(path, kind, columns)
    except (OSError, EOFError, zlib.error) as error:
        if not path.endswith(".gz"):
            raise
        raise ValueError(f"{path} cannot be read as gzip: {error}") from error


def _read(path: str, kind: str, columns: tuple[str, str]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    with _open(path, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} has no rows")
    try:
        if kind in ("csv", "tsv"):
            return _read_table(path, "\t" if kind == "tsv" else ",", columns)
        return load_dataset("parquet" if kind == "parquet" else "json", data_files=path, split="train")
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(_culprit(path, kind) or f"{path}: {error.__cause__ or error}") from error


def _open(path: str, mode: str, **keywords: Any) -> Any:
    return (gzip.open if path.endswith(".gz") else open)(path, mode, **keywords)


def _culprit(path: str, kind: str) -> str | None:
    """The line that is not UTF-8 or not JSON, and why."""
    if kind == "parquet":
        return None
    with _open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode().strip()
                if kind == "json" and text.startswith("["):  # one value over many lines
                    kind = "array"
                if kind in ("json", "jsonl") and text:
                    json.loads(text)
            except ValueError as error:
                return f"{path}, line {number}: {error}"
    return None


def _read_table(path: str, separator: str, columns: tuple[str, str]) -> Any:
    """Reads every cell as text: what looks like a number or a null is a word."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import csv as arrow

    tabs = separator == "\t"
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark, which arrow skips
        quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        first = next(csv.reader(file, delimiter=separator, quoting=quoting))
    known = [name in {*columns, "completion", *OTHERS} for name in first]
    if tabs and len(known) == 2 and sum(known) == 1:
        raise ValueError(f"{path} begins with {first}, of which one is the name of a column: begin it with two names, "
                         "or with none")  # fmt: skip
    header = not tabs or any(known)
    names = first if header else list(columns)
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name, among {', '.join(names)}")
    table = arrow.read_csv(
        path, arrow.ReadOptions(use_threads=False, column_names=names, skip_rows=int(header)),
        arrow.ParseOptions(delimiter=separator, quote_char=False if tabs else '"', newlines_in_values=not tabs),
        arrow.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False),
    )  # fmt: skip
    return Dataset(table)


def tokenize(
    rows: Any, tokenizer: Any, config: Any, max_target: int | None = None, *, teacher: Any = None, new_tokens: int = 1,
    long_prompts: str = "refuse", long_targets: str = "cut", answers: str = "together",
    teacher_system: str | None = None, ends: Sequence[int] = (), begins: Sequence[int | None] = (), name: str = "data",
    tell: Callable[[str], Any] | None = None,
) -> Any:  # fmt: skip
    """Rows as token ids, in the columns prompt_ids, labels (all that follows the prompt, usually with an end token),
    labels_mask (which labels count; only if some do not), teacher_prompt_ids (only if the teacher's prompts differ),
    length, and reference (the text of the first answer). Rows of prompts alone have no labels and no reference.

    Args:
        rows: from `read_pairs`.
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

    Raises:
        ValueError: an unknown policy; a row that is neither text nor messages, an empty or too long prompt; new tokens
            leave no room for a prompt; no rows are left; or the tokenizer's target language is not the one that
            generation begins with.
    """
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    check_choice("answers", answers, get_args(Answers))
    check_choice("long_prompts", long_prompts, get_args(Policy))
    check_choice("long_targets", long_targets, get_args(Policy))
    causal = not config.is_encoder_decoder
    encode_row = Encoder(tokenizer, config.is_encoder_decoder, teacher_system, ends, begins)
    contexts = [context(config), context(teacher or config)]
    if causal and min(contexts) - new_tokens <= len(encode_row.before):
        raise ValueError(f"{new_tokens} new tokens leave a prompt no room in a context of {min(contexts):g}")
    own_prompts = teacher_system is not None or "teacher_prompt" in rows.column_names

    def fitted(ids: list[int], room: float, policy: str, what: str, fate: list[str]) -> list[int]:
        if len(ids) <= room:
            return ids
        if policy == "refuse":
            raise ValueError(f"{what} has {len(ids)} tokens, and there is room for {room:g}: see --long_{what}s")
        fate.append(f"{what}s cut" if policy == "cut" else "rows dropped")
        if what == "target":
            return ids[: int(room)]
        kept = encode_row.before if ids[: len(encode_row.before)] == encode_row.before else []
        return [*kept, *ids[len(ids) - (int(room) - len(kept)) :]]

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            if answers == "together":
                return {**encode_one(row), "row": index}
            made = [{**encode_one(part), "row": index} for part in each_answer(row)]
        except ValueError as error:
            raise ValueError(f"{name}, row {index}: {error}") from error
        return {column: [one[column] for one in made] for column in made[0]}

    def encode_one(row: dict[str, Any]) -> dict[str, Any]:
        fate: list[str] = []
        found, own, reference = encode_row(row)
        prompts = [found.prompt, found.prompt if own is None else list(own)]
        rooms = [min(contexts)] * 2 if own is None else contexts  # one prompt is cut once
        if not all(prompts):
            raise ValueError("the prompt is empty")
        prompts = [fitted(ids, room - new_tokens * causal, long_prompts, "prompt", fate)
                   for ids, room in zip(prompts, rooms, strict=True)]  # fmt: skip
        left = min(room - len(ids) * causal for ids, room in zip(prompts, contexts, strict=True))
        limit = left if max_target is None else min(left, max_target)
        rest = None if found.rest is None else fitted(found.rest, limit, long_targets, "target", fate)
        counted = None if rest is None else (found.counted or [True] * len(rest))[: len(rest)]
        return {"prompt_ids": prompts[0], "labels": rest, "labels_mask": counted, "reference": reference,
                "length": len(prompts[0]) + len(rest or ()), "fate": sorted(set(fate)),
                **({"teacher_prompt_ids": prompts[1]} if own_prompts else {})}  # fmt: skip

    ids, number = ListOf(Value("int64")), Value("int64")  # what the first thousand rows lack has no type of its own
    columns = {"prompt_ids": ids, "labels": ids, "labels_mask": ListOf(Value("bool")), "reference": Value("string"),
               "length": number, "fate": ListOf(Value("string")),
               **({"teacher_prompt_ids": ids} if own_prompts else {}), "row": number}  # fmt: skip
    each = {name: ListOf(kind) for name, kind in columns.items()} if answers == "each" else columns
    made = rows.map(encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False,
                    features=Features(each), desc="tokenizing")  # fmt: skip
    if answers == "each":
        made = made.map(lambda batch: {column: list(itertools.chain(*batch[column])) for column in batch}, batched=True,
                        load_from_cache_file=False, features=Features(columns))  # fmt: skip
    fates = collections.Counter(f for found in made["fate"] for f in found)
    kept = [(row, labels is None) for row, (labels, fate) in enumerate(zip(made["labels"], made["fate"], strict=True))
            if "rows dropped" not in fate]  # fmt: skip
    bare = [row for row, lacks in kept if lacks]
    if 0 < len(bare) < len(kept):
        row = made[bare[0]]["row"]
        raise ValueError(f"{name}: some rows have no target, and others have one: row {row} ends in no answer; "
                         "--answers each leaves out what follows a conversation's last")  # fmt: skip
    if fates and tell is not None:
        tell(f"{name}: " + ", ".join(f"{count} of {len(made)} {fate}" for fate, count in sorted(fates.items())))
    if fates["rows dropped"]:
        made = made.select([row for row, _ in kept])
    if not len(made):
        raise ValueError(f"{name} has no rows that are short enough")
    dull = ["fate", "row"]
    if bare:
        dull += ["labels", "reference"]
    some = not bare and any(not all(mask) for mask in made["labels_mask"])
    return made.remove_columns(dull if some else [*dull, "labels_mask"])
