"""A row of text or messages as token ids, as a model reads and writes them."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple


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

    The end token is the tokenizer's or one of `ends`, possibly the one that the next turn begins with. If the template
    marks answers ({% generation %}), its marks say where they are; otherwise what rendering one more turn adds. The
    prompt is what generation gets before the first of these answers. If the last turn is no answer, all is prompt.
    Raises ValueError where the template renders turns differently when more follow, or an answer otherwise than it asks
    for one, so that its tokens are unknown, or where it leaves out what is given.
    """

    @functools.cache
    def ids(count: int, ask: bool = False) -> list[int]:
        return list(_rendered(tokenizer, turns[:count], tools, add_generation_prompt=ask)["input_ids"])

    if len(turns) == 1 and turns[0]["role"] == "assistant":
        raise ValueError("an answer alone has no prompt")
    _check_written(tokenizer, turns, tools)
    answers = _answers(turns, begin)
    if not answers or answers[-1] != len(turns) - 1:
        return Ids(ids(len(turns), True), None, None)
    prompt, stops = ids(answers[0], True), {tokenizer.eos_token_id, *ends}
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)):
        marked = _rendered(tokenizer, turns, tools, return_assistant_tokens_mask=True)
        whole = list(marked["input_ids"])
        counted = _up_to_ends(whole, [bool(m) for m in marked["assistant_masks"]], stops)
        begun = ids(answers[0] + 1)[: len(prompt)] == prompt
        agrees = whole[: len(prompt)] == prompt and any(counted[len(prompt) :])
    else:
        whole = ids(len(turns))
        if not stops & {*whole[len(ids(answers[-1], True)) :]}:
            whole = whole + _end_behind(tokenizer, turns, tools, stops)
        counted, begun, agrees = [False] * len(whole), True, True
        for i in answers:
            before, after = ids(i, True), ids(i + 1)
            begun &= len(before) < len(after) and after[: len(before)] == before
            agrees &= whole[: len(after)] == after
            said = whole[len(before) : len(after) + 1]  # with the next turn's first, where generation may stop
            length = next((n for n, token in enumerate(said, 1) if token in stops), len(after) - len(before))
            counted[len(before) : len(before) + length] = [True] * length
    if not begun:
        raise ValueError("the chat template asks for answers that begin otherwise than those it writes (with <think>, "
                         "say), so that their tokens are not told apart: give answers that begin so, or "
                         "--chat_template_path another")  # fmt: skip
    if not agrees:
        raise ValueError("the chat template renders turns otherwise when an answer follows, so that its tokens are not "
                         "told apart: --answers each makes a row of every answer, or give --chat_template_path one "
                         "with {% generation %} that only adds")  # fmt: skip
    counted = counted[: len(whole)]
    last = len(whole) - counted[::-1].index(True)
    return Ids(prompt, whole[len(prompt) : last], counted[len(prompt) : last])


def _end_behind(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, stops: Collection[int | None]) -> list[int]:
    """The token that the next turn begins with, if generation stops there: GLM's answers have no end of their own."""
    calls = {name: value for name, value in turns[-1].items() if name == "tool_calls" and value}
    short = [*turns[:-1], {"role": "assistant", "content": "x", **calls}]  # thoughts are dropped when a turn follows
    with contextlib.suppress(ValueError):  # the template takes no such turn
        longer = [*short, {"role": "tool" if calls else "user", "content": "x"}]
        ends, more = (list(_rendered(tokenizer, one, tools)["input_ids"]) for one in (short, longer))
        if more[: len(ends)] == ends and {*more[len(ends) : len(ends) + 1]} & {*stops}:
            return more[len(ends) : len(ends) + 1]
    return []


def _up_to_ends(ids: list[int], marks: list[bool], stops: Collection[int | None]) -> list[bool]:
    """Marks without what is behind the first end token of each marked stretch, where generation stops."""
    made, ended = [], False
    for token, mark in zip(ids, marks, strict=True):
        made.append(mark and not ended)
        ended = mark and (ended or token in stops)
    return made


def _check_written(tokenizer: Any, turns: list[dict[str, Any]], tools: Any) -> None:
    """Raises ValueError for text, calls of tools, or tools that a chat template makes nothing of."""
    from jinja2 import TemplateError

    longer = [{**t, "content": t["content"] + "x"} if isinstance(t.get("content"), str) else t for t in turns]
    quiet = [{name: value for name, value in t.items() if name != "tool_calls" or not value} for t in turns]
    given, written = (turns, tools), None
    for what, other in {"content that is text": (longer, tools), "tool_calls": (quiet, tools),
                        "tools": (turns, None)}.items():  # fmt: skip
        if other == given:
            continue
        with contextlib.suppress(TemplateError, TypeError):  # it reads what it cannot be without
            written = written or tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
            if tokenizer.apply_chat_template(other[0], tools=other[1], tokenize=False) == written:
                raise ValueError(f"the chat template writes nothing of {what}: leave it out, or give "
                                 "--chat_template_path one that reads it")  # fmt: skip


def _rendered(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
    from jinja2 import TemplateError

    parts = [str(turn["content"]) for turn in turns if isinstance(turn.get("content"), (list, dict))]
    try:
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False) if parts else ""
        found = tokenizer.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=True, **options)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses: {error}") from error
    if written := next((part for part in parts if part in text), None):
        raise ValueError(f"the chat template takes content for text, and would write {written[:40]}: give text, or "
                         "--chat_template_path one that reads parts")  # fmt: skip
    return found


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
        """A row's ids, the ids of the teacher's prompt if it has its own, and the text of the answer."""
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
            own = row.get("teacher_prompt") or turns[:asked]
            shown = [t for t in _messages("teacher_prompt must be text or", own) if t["role"] != "system"]
            row = {**row, "teacher_prompt": [{"role": "system", "content": self.teacher_system}, *shown]}
        said = _said(turns[asked]) if found.rest is not None else ""
        return found, self._teacher_prompt(row), said

    def _teacher_prompt(self, row: dict[str, Any]) -> list[int] | None:
        """The ids of the teacher's own prompt, which may be text or messages; None if there is none."""
        own = row.get("teacher_prompt")
        if own in (None, []) or isinstance(own, str):
            return self._prompt(own) if own else None
        own = _messages("teacher_prompt must be text or", own)
        tools = plain(row.get("tools")) or None
        _check_written(self.tokenizer, own, tools)
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
    """A row whose messages and tools, which a file may have as JSON text, are parsed."""
    found = dict(row)
    for name in ("messages", "tools"):
        if isinstance(text := row.get(name), str) and text:
            try:
                found[name] = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{name} must be a list, or its JSON, not {text[:40]!r} ({error})") from error
    return found


def _said(turn: dict[str, Any]) -> str:
    """A turn's text, which may be listed in parts."""
    content = turn.get("content") or ""
    return "".join(str(p.get("text") or "") for p in content) if isinstance(content, list) else str(content)


def _is_chat(row: dict[str, Any]) -> bool:
    return "messages" in row or isinstance(row.get("prompt"), list)


def _messages(must_be: str, given: Any) -> list[dict[str, Any]]:
    """Messages without nulls; ValueError where they are none."""
    turns = plain(given)
    if not (
        isinstance(turns, list) and turns and all(isinstance(t, dict) and "role" in t and len(t) > 1 for t in turns)
    ):
        raise ValueError(f"{must_be} a list of role and content, not {turns!r}")
    return turns


def _turns(row: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """A row's conversation, and the turn from which on answers count."""
    given, answer = row.get("messages") or row.get("prompt"), row.get("target") if "prompt" in row else None
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    after = [] if said in (None, []) else _messages("target must be text or", said)
    turns = [] if given == [] and after else _messages("messages must be", given)
    return turns + after, len(turns) if "prompt" in row else 0


def each_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation as one row per answer, with the turns before it, as generation sees them. Turns after the last
    answer are left out. Other rows, and conversations without an answer, stay as they are.
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
