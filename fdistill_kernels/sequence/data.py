"""Rows of a file or a hub dataset, with prompts and targets as text or messages; and their token ids."""

from __future__ import annotations

import collections
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..checks import check_choice
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


class Ids(NamedTuple):
    """Token ids of a row: prompt, what follows it (None: nothing), and which of those tokens count (None: all)."""

    prompt: list[int]
    rest: list[int] | None
    counted: list[bool] | None


def plain(value: Any) -> Any:
    """Messages or tools without the nulls that a table puts in where other rows have more keys."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def _answers(turns: list[dict[str, Any]], begin: int) -> list[int]:
    """The indices of answers from turn `begin` on. One that opens a conversation answers nothing, and is only read."""
    return [i for i in range(max(begin, 1), len(turns)) if turns[i]["role"] == "assistant"]


def conversation(
    tokenizer: Any, turns: list[dict[str, Any]], begin: int = 0, tools: Any = None, ends: Sequence[int] = ()
) -> Ids:
    """A conversation by the tokenizer's chat template. Answers from turn `begin` on count, up to their end token.

    The end token is the tokenizer's or one of `ends`. If the template marks answers ({% generation %}), its marks
    decide; otherwise what rendering one more turn adds. The prompt is what generation gets before the first of these
    answers. If the last turn is no answer, all is prompt.

    Raises:
        ValueError: the template renders turns differently when more turns follow, so that an answer's tokens are
            unknown.
    """

    def ids(count: int, ask: bool = False) -> list[int]:
        return list(_rendered(tokenizer, turns[:count], tools, add_generation_prompt=ask)["input_ids"])

    if len(turns) == 1 and turns[0]["role"] == "assistant":
        raise ValueError("an answer alone has no prompt")
    answers = _answers(turns, begin)
    if not answers or answers[-1] != len(turns) - 1:
        return Ids(ids(len(turns), True), None, None)
    prompt, stops = ids(answers[0], True), {tokenizer.eos_token_id, *ends}
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)):
        marked = _rendered(tokenizer, turns, tools, return_assistant_tokens_mask=True)
        whole, counted = list(marked["input_ids"]), [bool(m) for m in marked["assistant_masks"]]
        agrees = whole[: len(prompt)] == prompt and any(counted[len(prompt) :])
    else:
        whole = ids(len(turns))
        counted, agrees = [False] * len(whole), True
        for i in answers:
            before, after = ids(i, True), ids(i + 1)
            agrees &= len(before) < len(after) and after[: len(before)] == before and whole[: len(after)] == after
            said = after[len(before) :]
            stop = len(before) + next((i for i, token in enumerate(said, 1) if token in stops), len(said))
            counted[len(before) : stop] = [True] * (stop - len(before))
    if not agrees:
        raise ValueError("the chat template renders turns otherwise when an answer follows, so that its tokens are not "
                         "told apart: --answers each makes a row of every answer, or give --chat_template_path one "
                         "with {% generation %} that only adds")  # fmt: skip
    counted = counted[: len(whole)]
    last = len(whole) - counted[::-1].index(True)
    return Ids(prompt, whole[len(prompt) : last], counted[len(prompt) : last])


def _rendered(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=True, **options)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses: {error}") from error


def _around(tokenizer: Any, **text: str) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text (text=, or text_target=)."""
    one, among = tokenizer(**text, add_special_tokens=False)["input_ids"], list(tokenizer(**text)["input_ids"])
    at = next((i for i in range(len(among)) if among[i : i + len(one)] == one), None)
    return ([], []) if at is None else (among[:at], among[at + len(one) :])


class Encoder:
    """Turns rows into token ids, for a causal or an encoder–decoder model."""

    def __init__(
        self, tokenizer: Any, encoder_decoder: bool, teacher_system: str | None = None, ends: Sequence[int] = (),
        begins: Sequence[int | None] = (),
    ):  # fmt: skip
        self.tokenizer, self.encoder_decoder, self.teacher_system = tokenizer, encoder_decoder, teacher_system
        self.ends = ends
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token")
        self.end: int = tokenizer.eos_token_id
        self.before, self.behind = _around(tokenizer, text="a")
        before, target = _around(tokenizer, text_target="a") if encoder_decoder else ([], [])
        # a language's code may follow the end token, where generation stops
        self.beyond = target[::-1].index(self.end) if self.end in target else 0
        codes = {*before, *target} - {self.end} if hasattr(tokenizer, "tgt_lang") else set()
        if codes and begins and not codes & set(begins):
            first = tokenizer.convert_ids_to_tokens([i for i in begins if i is not None])
            raise ValueError(f"the tokenizer's targets are of the language tgt_lang={tokenizer.tgt_lang!r}, and "
                             f"generation begins with {', '.join(first)}: set forced_bos_token_id in the models' "
                             "generation configs, or tgt_lang")  # fmt: skip
        self.forced = [i for i in begins[1:] if i is not None and i not in before]  # as generation writes it

    def __call__(self, row: dict[str, Any]) -> tuple[Ids, list[int] | None, str]:
        """A row's ids, the ids of the teacher's prompt if it has its own, and the text of the answer.

        Raises:
            ValueError: the row has neither text nor messages.
        """
        row = _parsed(row)
        if _is_chat(row):
            return self._chat(row)
        if self.teacher_system:
            raise ValueError("--teacher_system is of messages, and this is text: give it a teacher_prompt")
        own = self._teacher_prompt(row)
        if "text" in row:
            if self.encoder_decoder:
                raise ValueError("text without a prompt is for causal models")
            whole = self._prompt(_text(row, "text"))
            begin = max(len(self.before), 1)
            return Ids(whole[:begin], self._ended(whole[begin:]), None), own, row["text"]
        rest = self._target(_text(row, "target")) if "target" in row else None
        return Ids(self._prompt(_text(row, "prompt")), rest, None), own, row.get("target", "")

    def _chat(self, row: dict[str, Any]) -> tuple[Ids, list[int] | None, str]:
        (turns, begin), tools = _turns(row), plain(row.get("tools")) or None
        if self.encoder_decoder:
            raise ValueError("messages are for causal models: give an encoder–decoder model text")
        found = conversation(self.tokenizer, turns, begin, tools, self.ends)
        asked = len(turns) if found.rest is None else _answers(turns, begin)[0]
        if self.teacher_system:
            if isinstance(row.get("teacher_prompt"), str) and row["teacher_prompt"]:
                raise ValueError("--teacher_system is of messages, and teacher_prompt is text")
            shown = [t for t in plain(row.get("teacher_prompt")) or turns[:asked] if t["role"] != "system"]
            row = {**row, "teacher_prompt": [{"role": "system", "content": self.teacher_system}, *shown]}
        said = _said(turns[asked]) if found.rest is not None else ""
        return found, self._teacher_prompt(row), said

    def _teacher_prompt(self, row: dict[str, Any]) -> list[int] | None:
        """The ids of the teacher's own prompt, which may be text or messages; None if there is none."""
        own = plain(row.get("teacher_prompt"))
        if not own or isinstance(own, str):
            return self._prompt(own) if own else None
        tools = plain(row.get("tools")) or None
        return list(_rendered(self.tokenizer, own, tools, add_generation_prompt=True)["input_ids"])

    def _prompt(self, text: str) -> list[int]:
        """As the model reads it. A causal model continues it, so an end token stays only if the text has it."""
        if self.encoder_decoder:
            found = self.tokenizer(text=text)["input_ids"]
            return found if self.end in self.behind else self._ended(found)
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found if found[: len(self.before)] == self.before else [*self.before, *found]

    def _target(self, text: str) -> list[int]:
        """As generation writes it: up to its end token."""
        if not self.encoder_decoder:
            return self._ended(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        found = self.tokenizer(text_target=text)["input_ids"]
        return [*self.forced, *self._ended(found[: len(found) - self.beyond])]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.end else [*ids, self.end]


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    """Messages and tools that a file has as JSON text, parsed."""
    return {k: _of_text(k, v) if k in ("messages", "tools") and v and isinstance(v, str) else v for k, v in row.items()}


def _of_text(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a list, or its JSON, not {text[:40]!r} ({error})") from error


def _said(turn: dict[str, Any]) -> str:
    """A turn's text, which may be listed in parts."""
    content = turn.get("content") or ""
    return "".join(str(p.get("text") or "") for p in content) if isinstance(content, list) else str(content)


def _is_chat(row: dict[str, Any]) -> bool:
    return "messages" in row or isinstance(row.get("prompt"), list)


def _turns(row: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """A row's conversation, and the turn from which on answers count."""
    turns, begin = plain(row.get("messages") or row.get("prompt")), 0
    if "prompt" in row:
        begin, answer = len(turns), plain(row.get("target"))
        turns = turns + ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or [])
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and "role" in t for t in turns):
        raise ValueError(f"messages must be a list of role and content, not {turns!r}")
    return turns, begin


def each_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation as one row per answer, with the turns before it, as generation sees them.

    Turns after the last answer are left out. Other rows, and conversations without an answer, stay as they are.

    Raises:
        ValueError: the teacher has its own prompt, and there are several answers.
    """
    row = _parsed(row)
    turns, begin = _turns(row) if _is_chat(row) else ([], 0)
    answers = _answers(turns, begin)
    if len(answers) > 1 and row.get("teacher_prompt"):
        raise ValueError(f"teacher_prompt is of one answer, and there are {len(answers)}")
    rest = {name: value for name, value in row.items() if name != "messages"}
    return [{**rest, "prompt": turns[:i], "target": [turns[i]]} for i in answers] or [row]


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be text, not {row[name]!r}")
    return str(row[name])


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
        begins: what an encoder–decoder model's generation begins with (`models.beginning`), for targets to begin so.
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
