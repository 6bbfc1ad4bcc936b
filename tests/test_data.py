"""Rows of data as token ids: text and messages, what counts, what is too long; and what is told of bad ones."""

import gzip
import json
import os
import shutil
from types import SimpleNamespace
from typing import get_args, get_type_hints
from unittest.mock import patch

import pytest
import yaml
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LEDConfig, LlamaConfig, PreTrainedTokenizerFast

from fdistill_kernels.sequence.arguments import KINDS, ask
from fdistill_kernels.sequence.config import FDistillConfig
from fdistill_kernels.sequence.data import tokenize
from fdistill_kernels.sequence.encoding import conversation
from fdistill_kernels.sequence.reading import read_pairs

from .test_sequence import bart, llama

SPECIAL = ["</s>", "<s>", "<|im_start|>"]
TURN = "<|im_start|>{{ m['role'] }}\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}</s>\n{% endif %}"
PLAIN = f"{{{{ bos_token }}}}{TOOLS}{{% for m in messages %}}{TURN}{{{{ m['content'] }}}}</s>\n{{% endfor %}}{OPEN}"
MARKED = (
    f"{{{{ bos_token }}}}{TOOLS}{{% for m in messages %}}{TURN}{{% if m['role'] == 'assistant' %}}{{% generation %}}"
    f"{{{{ m['content'] }}}}</s>{{% endgeneration %}}{{% else %}}{{{{ m['content'] }}}}</s>{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{OPEN}"
)
#: Answers that are no longer the last are shortened, as templates of models that think do.
CHANGING = PLAIN.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][:2] }}"
)
TURNS = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"},
         {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "the end"}]  # fmt: skip


def tokenizer_of(template=None, bos=True, end=False, words=None):
    trained = ByteLevelBPETokenizer()
    words = words or [t["content"] for t in TURNS] * 5 + ["user assistant system tools\n"]
    trained.train_from_iterator(words, vocab_size=320, special_tokens=SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>", bos_token="<s>")
    if bos or end:
        surround(made, f"{'<s> ' * bos}$A{' </s>' * end}")
    made.chat_template = template
    return made


def surround(tokenizer, around):
    """Makes a tokenizer put special tokens around each text, $A."""
    special = [(token, i) for i, token in enumerate(SPECIAL) if token in around]
    tokenizer._tokenizer.post_processor = TemplateProcessing(around, special_tokens=special)


def ids_of(tokenizer, rows, tmp_path, model=None, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenize(read_pairs(path), tokenizer, (model or llama(320)).config, **{"name": "rows.jsonl", **options})


def counted(tokenizer, row):
    """The text that counts, and all that follows the prompt."""
    mask = row.get("labels_mask") or [True] * len(row["labels"])
    kept = [i for i, m in zip(row["labels"], mask, strict=True) if m]
    return tokenizer.decode(kept), tokenizer.decode(row["labels"])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by marks"])
def test_assistant_turns_count(template, tmp_path):
    tokenizer = tokenizer_of(template)
    several, one, tools = {"messages": TURNS}, {"messages": TURNS[:2]}, {"messages": TURNS, "tools": [{"name": "f"}]}
    row = ids_of(tokenizer, [several], tmp_path)[0]
    opened = "<|im_start|>assistant\n"
    assert tokenizer.decode(row["prompt_ids"]) == "<s><|im_start|>user\nhello there</s>\n" + opened
    text, whole = counted(tokenizer, row)
    assert text == "good day</s>the end</s>" and row["reference"] == "good day"
    assert whole == f"good day</s>\n<|im_start|>user\nand now?</s>\n{opened}the end</s>"  # nothing after the end token
    assert row["length"] == len(row["prompt_ids"]) + len(row["labels"])
    row = ids_of(tokenizer, [one], tmp_path)[0]
    assert "labels_mask" not in row and counted(tokenizer, row)[0] == "good day</s>"
    shown = tokenizer.decode(ids_of(tokenizer, [tools], tmp_path)[0]["prompt_ids"])
    assert shown.startswith('<s><|im_start|>tools\n[{"name": "f"}]')
    parts = [{"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": TURNS[:3], "completion": "the end"}]
    for part in parts:  # an answer within the prompt is prompt
        row = ids_of(tokenizer, [part], tmp_path)[0]
        assert counted(tokenizer, row)[0] == "the end</s>" and "and now?" in tokenizer.decode(row["prompt_ids"])
    alone = ids_of(tokenizer, [{"messages": TURNS[:3]}], tmp_path)  # the last turn asks: a prompt, to be answered
    assert "labels" not in alone.column_names and tokenizer.decode(alone[0]["prompt_ids"]).endswith(opened)


def test_an_answer_in_parts_is_its_text(tmp_path):
    tokenizer = tokenizer_of(PLAIN.replace("m['content']", "(m['content'] | map(attribute='text') | join)"))
    turns = [{**turn, "content": [{"type": "text", "text": x} for x in turn["content"]]} for turn in TURNS[:2]]
    row = ids_of(tokenizer, [{"messages": turns}], tmp_path)[0]
    assert row["reference"] == "good day" and tokenizer.decode(row["labels"]) == "good day</s>"


def test_the_teacher_s_own_prompts(tmp_path):
    tokenizer = tokenizer_of(PLAIN)
    system = [{"role": "system", "content": "be brief"}]
    for row in ({"messages": TURNS[:2]}, {"messages": system + TURNS[:2]},
                {"prompt": TURNS[:1], "completion": TURNS[1:2]}):  # fmt: skip
        row = ids_of(tokenizer, [row], tmp_path, teacher_system="be kind")[0]
        shown = tokenizer.decode(row["teacher_prompt_ids"])
        assert shown.startswith("<s><|im_start|>system\nbe kind</s>\n<|im_start|>user\nhello")
        assert "kind" not in tokenizer.decode(row["prompt_ids"])
    row = ids_of(tokenizer, [{"messages": TURNS[:2], "teacher_prompt": system + TURNS[:1]}], tmp_path)[0]
    assert "be brief" in tokenizer.decode(row["teacher_prompt_ids"]) and counted(tokenizer, row)[0] == "good day</s>"
    with pytest.raises(ValueError, match=r"row 0: --teacher_system is of messages"):
        ids_of(tokenizer, [{"prompt": "a", "target": "b"}], tmp_path, teacher_system="be kind")


def test_conversations_that_begin_with_an_answer_or_end_in_none(tmp_path):
    """What opens a conversation is to nothing, and read alone; bad ends are refused by their row."""
    tokenizer = tokenizer_of(PLAIN)
    row = ids_of(tokenizer, [{"messages": [TURNS[1], *TURNS[:2]]}], tmp_path)[0]
    assert tokenizer.decode(row["prompt_ids"]).count("good day") == 1 and row["reference"] == "good day"
    assert counted(tokenizer, row)[0] == "good day</s>"
    empty = [TURNS[0], {"role": "assistant", "content": ""}]
    assert counted(tokenizer, ids_of(tokenizer, [{"messages": empty}], tmp_path)[0])[0] == "</s>"
    for rows, words in (([{"messages": TURNS[1:2]}], "row 0: an answer alone has no prompt"),
                        ([{"prompt": [], "completion": TURNS[1:2]}], "row 0: an answer alone has no prompt"),
                        ([{"messages": t} for t in (TURNS, TURNS[:3], TURNS[:2])], "row 1 ends in no answer")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ids_of(tokenizer, rows, tmp_path)


def test_prompts_of_the_teacher_s_own_are_text_or_messages_beside_either(tmp_path):
    tokenizer = tokenizer_of(PLAIN)
    text, chat = {"prompt": "hello", "target": "day"}, {"messages": TURNS[:2]}
    for row in (text, chat):
        kept = ids_of(tokenizer, [row], tmp_path)[0]["prompt_ids"]
        rendered = "<s><|im_start|>user\nand now?</s>\n<|im_start|>assistant\n"
        for own, told in (("now?", "<s>now?"), (TURNS[2:3], rendered)):
            made = ids_of(tokenizer, [{**row, "teacher_prompt": own}, {**row, "teacher_prompt": own[:0]}], tmp_path)
            assert tokenizer.decode(made[0]["teacher_prompt_ids"]) == told
            assert made[1]["teacher_prompt_ids"] == kept == made[0]["prompt_ids"]  # an empty one is none
    whole = ids_of(tokenizer, [{"text": "hello there", "teacher_prompt": "now?"}], tmp_path)[0]
    assert tokenizer.decode(whole["teacher_prompt_ids"]) == "<s>now?" and tokenizer.decode(whole["prompt_ids"]) == "<s>"
    with pytest.raises(ValueError, match="row 0: --teacher_system is of messages, and teacher_prompt is text"):
        ids_of(tokenizer, [{**chat, "teacher_prompt": "now?"}], tmp_path, teacher_system="x")


def test_an_answer_ends_where_generation_does(tmp_path):
    """Gemma's and Phi's templates end a turn with a token that is not the tokenizer's own."""
    tokenizer = tokenizer_of(PLAIN.replace("</s>", "<s>"))
    row, known = {"messages": TURNS}, ids_of(tokenizer_of(PLAIN), [{"messages": TURNS}], tmp_path)[0]
    found = ids_of(tokenizer, [row], tmp_path, ends=[1, 0])[0]
    assert found["labels_mask"] == known["labels_mask"] and len(found["labels"]) == len(known["labels"])
    assert counted(tokenizer, found)[0] == "good day<s>the end<s>"
    assert counted(tokenizer, ids_of(tokenizer, [row], tmp_path)[0])[0] == "good day<s>\nthe end<s>\n"


@pytest.mark.parametrize("template", [PLAIN, MARKED, CHANGING])
def test_each_answer_is_a_row_behind_what_generation_meets(template, tmp_path):
    tokenizer, roomy = tokenizer_of(template), llama(320)
    roomy.config.max_position_embeddings = 256
    system = {"role": "system", "content": "be brief"}
    chats = [{"messages": TURNS}, {"messages": [system, *TURNS, TURNS[0]]}, {"messages": TURNS[:2]},
             {"messages": json.dumps(TURNS)}]  # fmt: skip
    for given, turns in (([chats[0]], [TURNS]), (chats[1:3], [chats[1]["messages"], TURNS[:2]]), ([chats[3]], [TURNS])):
        rows = ids_of(tokenizer, given, tmp_path, roomy, answers="each")
        asked = [chat[:i] for chat in turns for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        want = [tokenizer.apply_chat_template(a, add_generation_prompt=True, return_dict=False) for a in asked]
        assert rows["prompt_ids"][:] == want and "labels_mask" not in rows.column_names
        said = [tokenizer.decode(labels) for labels in rows["labels"]]
        assert said == [f"{text}</s>" for text in ("good day", "the end", "good day")[: len(said)]]
        assert rows["reference"][:] == [text.removesuffix("</s>") for text in said]
    parts = [{"prompt": TURNS[:2], "completion": TURNS[2:]}, {"prompt": TURNS[:3], "completion": "so?"}]
    rows = ids_of(tokenizer, parts, tmp_path, answers="each")
    assert [tokenizer.decode(labels) for labels in rows["labels"]] == ["the end</s>", "so?</s>"]
    assert "labels" not in ids_of(tokenizer, [{"messages": TURNS[:1]}], tmp_path, answers="each").column_names
    text = [{"prompt": "hello", "target": "day"}]
    assert ids_of(tokenizer, text, tmp_path, answers="each")[:] == ids_of(tokenizer, text, tmp_path)[:]
    kind = ids_of(tokenizer, chats[:1], tmp_path, answers="each", teacher_system="be kind")["teacher_prompt_ids"]
    assert [tokenizer.decode(ids).count("system") for ids in kind] == [1, 1]
    with pytest.raises(ValueError, match=r"row 1 ends in no answer; --answers each leaves out"):
        ids_of(tokenizer, [{"messages": TURNS[:2]}, {"messages": TURNS[:3]}], tmp_path)
    with pytest.raises(ValueError, match="row 0: teacher_prompt is of one answer, and there are 2"):
        ids_of(tokenizer, [{"messages": TURNS, "teacher_prompt": TURNS[:1]}], tmp_path, answers="each")


def test_templates_that_tell_no_answer_apart_are_refused(tmp_path):
    assert conversation(tokenizer_of(CHANGING), TURNS[:2]).rest is not None  # of one answer they are right
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: the chat template renders turns otherwise"):
        ids_of(tokenizer_of(CHANGING), [{"messages": TURNS[:2]}, {"messages": TURNS}], tmp_path)
    strict = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + PLAIN
    with pytest.raises(ValueError, match="row 0: the chat template refuses: no system"):
        ids_of(tokenizer_of(strict), [{"messages": TURNS}], tmp_path, teacher_system="x")
    with pytest.raises(ValueError, match="chat_template"):
        ids_of(tokenizer_of(), [{"messages": TURNS}], tmp_path)
    with pytest.raises(ValueError, match="row 0: the chat template refuses: can only concatenate"):
        ids_of(tokenizer_of("{{ messages[0]['content'] + 3 }}"), [{"messages": TURNS}], tmp_path)
    with pytest.raises(ValueError, match="messages are for causal models"):
        ids_of(tokenizer_of(PLAIN), [{"messages": TURNS}], tmp_path, bart(320))


def test_marks_behind_an_end_token_do_not_count(tmp_path):
    """Generation stops there; published templates also mark the line's end."""
    marked = tokenizer_of(MARKED.replace("</s>{% endgeneration %}", "</s>\n{% endgeneration %}"))
    rows = ids_of(marked, [{"messages": TURNS}], tmp_path)
    assert counted(marked, rows[0])[0] == "good day</s>the end</s>"


@pytest.mark.parametrize("answers", ["together", "each"])
def test_answers_that_end_where_the_next_turn_begins(answers, tmp_path):
    """As GLM's, whose generation stops at the next turn's first token: it is of the answer, also of the last one."""
    tokenizer, end = tokenizer_of(PLAIN.replace("</s>\n", "")), SPECIAL.index("<|im_start|>")
    rows = ids_of(tokenizer, [{"messages": TURNS}], tmp_path, ends=[end], answers=answers)
    said = ["good day<|im_start|>", "the end<|im_start|>"]
    assert [counted(tokenizer, row)[0] for row in rows] == (said if answers == "each" else ["".join(said)])
    rows = ids_of(tokenizer, [{"messages": TURNS}], tmp_path, answers=answers)  # generation does not stop there
    assert counted(tokenizer, rows[0])[0] == ("good day" if answers == "each" else "good daythe end")
    no_tool = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"
    tokenizer.chat_template = no_tool + tokenizer.chat_template
    none = {"messages": [turn | {"tool_calls": []} for turn in TURNS]}  # nothing is called, and no tool answers
    rows = ids_of(tokenizer, [none], tmp_path, ends=[end], answers=answers)
    assert [counted(tokenizer, row)[0] for row in rows] == (said if answers == "each" else ["".join(said)])


@pytest.mark.parametrize("answers", ["together", "each"])
def test_an_answer_that_does_not_begin_as_it_is_asked_for_is_refused_in_either_way(answers, tmp_path):
    thinking = tokenizer_of(PLAIN.replace(OPEN, OPEN.replace("{% endif %}", "<think>\n{% endif %}")))
    assert (
        len(thinking.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False).split("<think>")) == 2
    )
    for turns in (TURNS[:2], TURNS):
        with pytest.raises(
            ValueError, match=r"row 0: the chat template asks for answers that begin otherwise than those"
        ):
            ids_of(thinking, [{"messages": turns}], tmp_path, answers=answers)


def test_what_a_template_writes_nothing_of_is_refused(tmp_path):
    parts = tokenizer_of(PLAIN.replace("m['content']", "(m['content'] | map(attribute='text') | join)"))
    silent, text = tokenizer_of(PLAIN.replace(TOOLS, "")), [{"type": "text", "text": "hello"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    for tokenizer, row, what in (
        (parts, {"messages": TURNS}, "content that is text"), (parts, {"prompt": TURNS[:1]}, "content that is text"),
        (parts, {"messages": [{"role": "user", "content": text}, TURNS[1]]}, "content that is text"),
        (silent, {"messages": TURNS, "tools": [{"name": "f"}]}, "tools"),
        (silent, {"messages": [*TURNS[:1], call, {"role": "tool", "content": "2"}, TURNS[1]]}, "tool_calls"),
        (silent, {"messages": TURNS, "teacher_prompt": [*TURNS[:1], call, *TURNS[2:3]]}, "tool_calls"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"row 0: the chat template writes nothing of {what}: leave it out"):
            ids_of(tokenizer, [row], tmp_path)
    none = {"messages": [turn | {"tool_calls": []} for turn in TURNS]}  # as tables have where nothing is called
    assert ids_of(silent, [none], tmp_path)[0] == ids_of(silent, [{"messages": TURNS}], tmp_path)[0]


def test_end_and_begin_tokens_are_there_once(tmp_path):
    tokenizer = tokenizer_of(PLAIN, end=True)
    said = ids_of(tokenizer, [{"prompt": "hello</s>there</s>", "completion": "day</s>"}], tmp_path)[0]
    assert tokenizer.decode(said["prompt_ids"]) == "<s>hello</s>there</s>"  # an end token of the text's own stays
    assert tokenizer.decode(said["labels"]) == "day</s>"
    rendered = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    row = ids_of(tokenizer, [{"prompt": rendered, "target": "x"}], tmp_path)[0]
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    row = ids_of(tokenizer, [{"text": "hello there"}], tmp_path)[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<s>" and tokenizer.decode(row["labels"]) == "hello there</s>"
    surround(tokenizer, "$A </s> <|im_start|>")
    row = ids_of(tokenizer, [{"prompt": "hello", "target": "day"}], tmp_path, bart(320))[0]  # a language's code follows
    assert tokenizer.decode(row["prompt_ids"]) == "hello</s><|im_start|>"
    assert tokenizer.decode(row["labels"]) == "day</s>"


@pytest.mark.parametrize("around", ["$A", "$A </s>", "<s> $A", "<s> $A </s>", "</s> $A", "</s> $A </s>"])
def test_targets_are_whole_whatever_a_tokenizer_puts_around_them(around, tmp_path):
    """OPT's puts its end token before a text; an end token inside a text is the text's own."""
    tokenizer = tokenizer_of()
    surround(tokenizer, around)
    before = around.partition("$A")[0].strip()
    for model, target in (None, ""), (bart(320), before):  # an encoder–decoder model writes what begins its texts, too
        row = ids_of(tokenizer, [{"prompt": "hello</s>there", "target": "good</s>day"}], tmp_path, model)[0]
        end = "</s>" if model is not None else ""
        assert tokenizer.decode(row["prompt_ids"]) == f"{before}hello</s>there{end}"
        assert tokenizer.decode(row["labels"]) == f"{target}good</s>day</s>"


@pytest.mark.parametrize("around", ["<|im_start|> $A </s>", "$A </s> <|im_start|>"])
def test_targets_are_of_the_language_that_generation_begins_with(around, tmp_path):
    """NLLB's and mBART's tokenizers put a language's code before a target or behind its end token."""
    tokenizer, rows = tokenizer_of(), [{"prompt": "hello", "target": "day"}]
    surround(tokenizer, around)
    plain = ids_of(tokenizer, rows, tmp_path, bart(320), begins=(0, 2))[0]["labels"]
    assert tokenizer.decode(plain) == "<|im_start|>day</s>"  # as generation writes it
    tokenizer.tgt_lang = "ron_Latn"
    assert ids_of(tokenizer, rows, tmp_path, bart(320), begins=(0, 2))[0]["labels"] == plain
    for begins in ((0, 1), (0, None)):
        with pytest.raises(ValueError, match="language tgt_lang='ron_Latn', and generation begins with </s>"):
            ids_of(tokenizer, rows, tmp_path, bart(320), begins=begins)


def test_what_is_too_long_is_cut_dropped_or_refused(tmp_path):
    tokenizer, told = tokenizer_of(), []
    texts = ("hello", "there " * 40), ("now " * 200, "the end"), ("a", "b")
    rows = [dict(prompt=prompt, target=target) for prompt, target in texts]
    common = dict(new_tokens=8, tell=told.append)
    made = ids_of(tokenizer, rows, tmp_path, max_target=9, long_prompts="cut", **common)
    assert len(made[0]["labels"]) == 9 and made[0]["labels"][-1] != tokenizer.eos_token_id
    assert len(made[1]["prompt_ids"]) == 64 - 8 and made[1]["prompt_ids"][0] == tokenizer.bos_token_id
    assert made[1]["labels"][-1] == tokenizer.eos_token_id and made[0]["reference"] == rows[0]["target"]
    assert told.pop() == "rows.jsonl: 1 of 3 prompts cut, 1 of 3 targets cut"
    made = ids_of(tokenizer, rows, tmp_path, max_target=9, long_prompts="drop", long_targets="drop", **common)
    assert made["reference"][:] == ["b"] and told.pop() == "rows.jsonl: 2 of 3 rows dropped"
    for row, settings, words in ((rows[1], {}, "row 0: prompt has .* room for 56: see --long_prompts"),
                                 (rows[0], dict(max_target=9, long_targets="refuse"), "target has .* room for 9"),
                                 (rows[0], dict(max_target=9, long_targets="drop"), "no rows that are short enough")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ids_of(tokenizer, [row], tmp_path, **common, **settings)
    for bos, new in ((True, 63), (False, 64), (False, 80)):
        with pytest.raises(ValueError, match=f"{new} new tokens leave a prompt no room in a context of 64"):
            ids_of(tokenizer_of(bos=bos), [rows[2]], tmp_path, new_tokens=new, long_prompts="cut")
    shorter = LlamaConfig(max_position_embeddings=40)
    long = ids_of(tokenizer, [{"prompt": "hello", "target": "x" * 200}], tmp_path, teacher=shorter, **common)[0]
    assert len(long["prompt_ids"]) + len(long["labels"]) == 40  # the shorter of both models' contexts
    cut = ids_of(tokenizer, rows[1:2], tmp_path, teacher=shorter, long_prompts="cut", **common)[0]
    assert len(cut["prompt_ids"]) == 40 - 8  # one prompt, which both must hold
    led = SimpleNamespace(config=LEDConfig(max_encoder_position_embeddings=32, max_decoder_position_embeddings=16))
    made = ids_of(tokenizer, rows[:2], tmp_path, led, long_prompts="cut", **common)
    assert len(made[1]["prompt_ids"]) == 32 and len(made[0]["labels"]) == 16  # each by its own


@pytest.mark.parametrize("answers", ["together", "each"])
def test_what_the_first_thousand_rows_lack(answers, tmp_path):
    """`datasets` takes types from those."""
    tokenizer, told = tokenizer_of(PLAIN), []
    rows = [{"messages": TURNS[:2]}] * 1000 + [{"messages": [TURNS[0], {"role": "assistant", "content": "day " * 99}]}]
    made = ids_of(tokenizer, rows, tmp_path, tell=told.append, answers=answers)
    assert len(made) == 1001 and told == ["rows.jsonl: 1 of 1001 targets cut"]
    with pytest.raises(ValueError, match="some rows have no target, and others have one: row 0"):
        ids_of(tokenizer, [{"messages": TURNS[:1]}] * 1000 + rows[:1], tmp_path, answers=answers)


def test_files_of_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    cells = [("1", "null"), ("NA", 'say "so"')]  # what looks like a number or a null is a word
    (tmp_path / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in cells))
    (tmp_path / "b.tsv").write_text("prompt\ttarget\n" + (tmp_path / "a.tsv").read_text())
    (tmp_path / "c.csv").write_text('id,prompt,target\n7,1,null\n8,NA,"say ""so"""\n')
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress((tmp_path / "c.csv").read_bytes()))
    rows = [dict(zip(("prompt", "target"), row, strict=True)) for row in cells]
    (tmp_path / "e.json").write_text(json.dumps(rows))
    (tmp_path / "f.jsonl").write_text("".join(json.dumps({**row, "id": 3}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "g.parquet")
    for name in "bcef":  # as Excel begins a file
        path = next(p for p in tmp_path.iterdir() if p.name.startswith(name))
        path.with_name("marked_" + path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "[a] b").mkdir()  # a path, and no pattern
    for name in ("f.jsonl", "g.parquet"):
        shutil.copy(tmp_path / name, tmp_path / "[a] b" / f"[c] *{name}")
        shutil.copy(tmp_path / name, tmp_path / f"s3::{name}")  # a name, and no chain of addresses
    (tmp_path / "[a] b" / "f.jsonl.gz").write_bytes(gzip.compress((tmp_path / "f.jsonl").read_bytes()))
    for path in sorted(tmp_path.rglob("*.*")):
        assert read_pairs(path).to_list() == rows, path
    assert read_pairs(tmp_path / "a.tsv", 1).to_list() == rows[:1]
    (tmp_path / "h.tsv").write_text("text\ta word\n")  # no header
    with pytest.raises(ValueError, match="one is the name of a column: begin it with two names, or with none"):
        read_pairs(tmp_path / "h.tsv")
    (tmp_path / "i.tsv").write_text("text\ttools\na\t\n")
    assert read_pairs(tmp_path / "i.tsv")["text"][:] == ["a"]
    (tmp_path / "chat.csv").write_text('messages,tools\n"' + json.dumps(TURNS[:2]).replace('"', '""') + '",\n')
    tokenizer, config = tokenizer_of(PLAIN), llama(320).config
    row = tokenize(read_pairs(tmp_path / "chat.csv"), tokenizer, config)[0]
    assert counted(tokenizer, row)[0] == "good day</s>"
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": "a", "x": x}, TURNS[1]]}) + "\n"
                                                  for x in ({"q": 1}, {"r": "s"})))  # fmt: skip
    tokenizer.chat_template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.x | tojson if m.x }}")
    told = tokenizer.batch_decode(tokenize(read_pairs(tmp_path / "calls.jsonl"), tokenizer, config)["prompt_ids"][:])
    assert '{"q": 1}' in told[0] and '{"r": "s"}' in told[1]  # without the nulls of a table's other rows


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    for text in ("before", "after!"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
        os.utime(tmp_path / "a.jsonl", (1e9, 1e9))  # as of files in an archive
        assert read_pairs(tmp_path / "a.jsonl")["text"][:] == [text]


def test_text_of_json_that_is_a_date_stays_text(tmp_path):
    rows = [
        {"prompt": "on the first", "target": "2020-05-01", "at": "2020-05-01"},
        {"prompt": "then", "target": "2020-05-02T00:00:00Z"},
    ]
    lines = "\r\n\r\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in tmp_path.iterdir():
        assert read_pairs(path).to_list() == [{"prompt": r["prompt"], "target": r["target"]} for r in rows], path
    turns = [{"role": "user", "content": "2020-05-01"}, {"role": "assistant", "content": "2020-05-02"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_pairs(tmp_path / "d.jsonl").to_list() == [{"messages": turns}]


def test_names_of_columns_may_have_spaces_around_them(tmp_path):
    (tmp_path / "a.csv").write_text("prompt, target\na,b\n")
    assert read_pairs(tmp_path / "a.csv").to_list() == [{"prompt": "a", "target": "b"}]


def test_cells_of_any_length(tmp_path):
    long = "word " * 400_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    (tmp_path / "b.tsv").write_text(f"{long}\tb\n")
    assert read_pairs(tmp_path / "a.csv")["text"][0] == read_pairs(tmp_path / "b.tsv")["prompt"][0] == long


def test_bad_rows_are_named(tmp_path):
    good = b'{"prompt": "a", "target": "b"}\n'
    for name, content, words in (
        ("cut.jsonl", good + b'{"prompt": "a", "targ', "cut.jsonl, line 2: Unterminated string"),
        ("latin.jsonl", good + '{"prompt": "é", "target": "b"}\n'.encode("latin-1"), "latin.jsonl, row 1: 'utf-8'"),
        ("latin.tsv", b"a\tb\n" + "é\tb\n".encode("latin-1"), "latin.tsv, line 2: 'utf-8'"),
        ("latin.csv", b"prompt,target\n" + "é,b\n".encode("latin-1"), "latin.csv, line 2: 'utf-8'"),
        ("null.jsonl", good + b'{"prompt": "a", "target": null}\n', "row 1: target must be text, not None"),
        ("ints.jsonl", b'{"prompt": "a", "target": 3}\n', "row 0: target must be text, not 3"),
        ("odd.tsv", b"a\tb\nc\td\te\n", "odd.tsv: CSV parse error: Row #2: Expected 2 columns, got 3"),
        ("none.tsv", b"", "none.tsv has no rows"), ("none.jsonl", b"", "none.jsonl has no rows"), ("none.csv", b"prompt,target\n", "no rows"),
        ("blank.jsonl", b"\xef\xbb\xbf\r\n \r\n", "blank.jsonl has no rows"), ("list.json", b"[\n]", "list.json has no rows"),
        ("blank.csv", b"\n\n", "blank.csv has no rows"), ("void.jsonl", b"null\n" + good, "void.jsonl begins with null, which is no row"),
        ("lacks.jsonl", b'{"source": "a", "target": "b"}\n', "lacks the column 'prompt', and messages and text; it has source, target"),
        ("plain.jsonl.gz", good, "plain.jsonl.gz cannot be read as gzip: Not a gzipped file"),
        ("short.jsonl.gz", gzip.compress(good * 99)[:-20], "short.jsonl.gz cannot be read as gzip: Compressed file ended"),
        ("short.tsv.gz", gzip.compress(b"a\tb\n" * 99)[:-9], "short.tsv.gz cannot be read as gzip: "),
        ("kind.txt", b"a", "must be .jsonl, .json, .csv, .tsv or .parquet, not .txt"),
        ("twice.csv", b"prompt,prompt,target\na,b,c\n", "twice.csv: two columns have one name, among prompt, prompt"),
        ("empty.jsonl", b'{"prompt": "", "target": "b"}\n', "row 0: the prompt is empty"),
        ("turns.jsonl", b'{"messages": [{"content": "b"}]}\n', "row 0: messages must be a list of role and content"),
        ("silent.jsonl", b'{"messages": [{"role": "user"}]}\n', "row 0: messages must be a list of role and content"),
        ("answer.jsonl", b'{"prompt": [{"role": "user", "content": "a"}], "target": 7}\n', "target must be text or a list"),
        ("own.jsonl", b'{"text": "a", "teacher_prompt": 5}\n', "teacher_prompt must be text or a list of role"),
        ("none.jsonl", b'{"text": "a", "teacher_prompt": 0}\n', "teacher_prompt must be text or a list of role"),
        ("parts.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n',
         "row 0: the chat template takes content for text, and would write [{'type': 'text', 'text': 'a'}]: give text"),
        ("word.jsonl", b'{"messages": "hello"}\n', "row 0: messages must be a list, or its JSON, not 'hello' (Expecting value"),
        ("tools.jsonl", b'{"messages": "[]", "tools": "{"}\n', "row 0: tools must be a list, or its JSON, not '{' (Expecting"),
        ("mixed.jsonl", json.dumps({"messages": TURNS[:2]}).encode() + b"\n" + json.dumps({"messages": TURNS[:1]}).encode(),
         "some rows have no target"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as told:
            tokenize(read_pairs(tmp_path / name), tokenizer_of(PLAIN, bos=False), llama(320).config, name=name)
        assert words in str(told.value), str(told.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(good)
    (tmp_path / "folder" / "b.jsonl").write_bytes(b'{"source": "a", "words": "b"}\n')
    with pytest.raises(ValueError, match=r"(?s)folder: .*words"):
        read_pairs(tmp_path / "folder")
    rows = read_pairs(tmp_path / "null.jsonl")
    for saved in (rows, DatasetDict(train=rows)):
        saved.save_to_disk(tmp_path / "saved" / type(saved).__name__)
        with pytest.raises(ValueError, match=r"saved.* was written by save_to_disk, .* write its rows by to_parquet"):
            read_pairs(tmp_path / "saved" / type(saved).__name__)
    for name, columns, words in (("null.jsonl", ("prompt", "answer"), "'answer'; it has prompt, target"),
                                 ("turns.jsonl", ("question", "target"), "'question'; it has messages")):  # fmt: skip
        with pytest.raises(ValueError, match=f"lacks the column {words}"):
            read_pairs(tmp_path / name, columns=columns)
    with pytest.raises(ValueError, match="prompt_column and target_column are both prompt"):
        read_pairs(tmp_path / "null.jsonl", columns=("prompt", "prompt"))


@pytest.mark.parametrize(("name", "text", "kept", "bad"), [
    ("debug", "underflow_overflow", ["underflow_overflow"], "overflow"),
    ("liger_kernel_config", '{"rope": true}', {"rope": True}, "rope"),
    ("parallelism_config", '{"dp_replicate_size": 1}', {"dp_replicate_size": 1}, '{"foo": 1}'),
])  # fmt: skip
def test_options_whose_values_are_no_words(name, text, kept, bad):
    if not hasattr(FDistillConfig, name):
        pytest.skip(f"this version of transformers has no {name}")
    beside = ["--use_liger_kernel"] if name == "liger_kernel_config" else []
    base = ["--teacher", "t", "--student", "s", "--data", "d", *beside, f"--{name}"]
    found = ask("train", [*base, text])
    assert found.given[name] == kept == yaml.safe_load(yaml.safe_dump(found.given))[name]  # a run's config.yaml
    used = getattr(found.config, name)
    assert all(getattr(used, n) == x for n, x in kept.items()) if name == "parallelism_config" else used == kept
    with pytest.raises(ValueError, match=name):
        ask("train", [*base, bad])


@pytest.mark.parametrize(("option", "kept"), [
    ("revision: 7e10", "7e10"), ("revision: 0123456", "0123456"), ("teacher_system: no", "no"), ("teacher_system: 2030-01-01", "2030-01-01"),
    ("revision: null", None), ("fsdp: true", True), ("fsdp: false", False), ("fsdp: full_shard", "full_shard"),
])  # fmt: skip
def test_text_in_yaml_is_as_it_is_written(option, kept, tmp_path):
    """YAML reads some words as numbers, truths and dates; what a run's config.yaml has is read back as it was given."""
    name, path = option.partition(":")[0], tmp_path / "run.yaml"
    beside = {"teacher": "t", "student": "s", "data": "d"}
    path.write_text(option)
    for _ in range(2):
        with patch.dict(os.environ):  # in which a configuration says that there is FSDP
            found = ask("train", ["--config", str(path)], beside)
        assert found.given[name] == kept
        path.write_text(yaml.safe_dump(found.given))
    reading, writing = os.pipe()
    os.write(writing, option.encode())
    os.close(writing)
    assert ask("train", ["--config", f"/dev/fd/{reading}"], beside).given[name] == kept  # which is read once
    os.close(reading)
    path.write_text(f"<<: {{{option}}}")
    assert ask("train", ["--config", str(path)], beside).given[name] == kept
    path.write_text("student_layers: [3, 1]")
    with pytest.raises(ValueError, match=r"--student_layers takes one value, not \[3, 1\]"):
        ask("train", ["--config", str(path)], {"teacher": "t", "data": "d"})


@pytest.mark.parametrize("name", ["answers", "long_prompts", "long_targets"])
def test_unknown_policies_are_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, not 'trim'"):
        ids_of(tokenizer_of(PLAIN), [{"messages": TURNS}], tmp_path, **{name: "trim"})


def test_rows_given_in_python_are_read_as_a_file_s():
    tokenizer, config = tokenizer_of(PLAIN), llama(320).config
    text, chat = {"prompt": "hello there", "completion": "good day"}, {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    for row, beside in (
        (text, {}),
        (chat, {}),
        (text, {"text": "the end"}),
        ({"messages": TURNS}, {"prompt": "hello"}),
    ):
        data = Dataset.from_list([{**row, **beside}])
        found = [tokenize(data.with_format(kind), tokenizer, config)[0] for kind in (None, "numpy", "torch", "pandas")]
        assert found == found[:1] * 4
        assert ("and now?" if "messages" in row else "good day</s>") in tokenizer.decode(found[0]["labels"])


def test_what_tokenize_cannot_take_is_refused_by_name():
    data, tokenizer, config = (
        Dataset.from_list([{"prompt": "a", "target": "b"}]),
        tokenizer_of(PLAIN),
        llama(320).config,
    )
    for rows, told in (([{"prompt": "a"}], "not list"), (DatasetDict(train=data), "not DatasetDict"),
                       (data.to_iterable_dataset(), "not IterableDataset"),
                       (data.with_transform(lambda batch: batch), "data has a transform"),
                       (Dataset.from_list([]), "data has no rows"),
                       (Dataset.from_list([{"question": "a"}]), "data lacks the column 'prompt'")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=told):
            tokenize(rows, tokenizer, config)
    for options in ({"max_target": 0}, {"max_target": -1}, {"new_tokens": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            tokenize(data, tokenizer, config, **options)
    with pytest.raises(TypeError, match="config must be a model's configuration, not LlamaForCausalLM"):
        tokenize(data, tokenizer, llama(320))
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, not str"):
        tokenize(data, "gpt2", config)


QUANTO = '{"quant_method": "quanto", "weights": "int4"}'


def test_options_and_what_they_were_called(tmp_path):
    base = ["--teacher", "t", "--student", "s", "--data", "d"]
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nmax-steps: '7'\nbf16: false\nlr_scheduler_type: cosine\n"
                                       "shares: {student: 0.5, gold: 0.5}\ndivergence: js\nlora_target_modules: [q, v]\nuse_peft: true\n")  # fmt: skip
    file = ("--config", str(tmp_path / "run.yaml"))
    found = ask("train", [*base, *file, "--max_steps", "9", "--gradient_accumulation_steps=2"])
    config = found.config
    assert (config.learning_rate, config.max_steps, config.lr_scheduler_type) == (1e-3, 9, "cosine")
    assert config.shares == {"student": 0.5, "gold": 0.5} and found.lora.lora_target_modules == ["q", "v"]
    assert config.gradient_accumulation_steps == 2 and found.given["max_steps"] == 9 and "top_k" not in found.given
    assert ask("train", [*base, "--num-train-epochs", "2"]).config.max_steps == -1
    assert ask("train", [*base, *file, "--num_train_epochs", "2"]).config.max_steps == -1
    (tmp_path / "no.yaml").write_text("save_strategy: no\neval_strategy: no\nreport_to: []\nlr_scheduler_type: cosine_with_min_lr\n"
                                      "lr_scheduler_kwargs: {min_lr: 1e-6}\n")  # fmt: skip
    config = ask("train", [*base, "--config", str(tmp_path / "no.yaml")]).config
    assert config.save_strategy == config.eval_strategy == "no" and config.report_to == []
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6} and config.save_steps == FDistillConfig.save_steps
    (tmp_path / "a.jinja").write_bytes(b"\xef\xbb\xbf{{ bos_token }}")  # as some editors begin a file
    assert (
        ask("train", [*base, "--chat_template_path", str(tmp_path / "a.jinja")]).model.chat_template()
        == "{{ bos_token }}"
    )
    (tmp_path / "home.yaml").write_text("samples: ~/samples\noutput_dir: ~/run\nteacher_system: ~ and so on\n")
    found = ask(
        "train", [*base, "--config", str(tmp_path / "home.yaml"), "--eval_data=~/a.tsv"]
    )  # which no shell expands
    assert [found.run.samples, str(found.folder), found.data.eval_data] == [
        os.path.expanduser(f"~/{x}") for x in ("samples", "run", "a.tsv")
    ]
    assert found.data.teacher_system == "~ and so on"
    assert not ask("train", [*base, "--lr_scheduler_type", "constant"]).config.warmup_steps  # whose default is a tenth
    assert "hub_token" not in ask("train", [*base, "--hub_token", "secret"]).settings()  # which report.html shows
    assert ask("train", [*base, "--report_to", "wandb", "tensorboard"]).config.report_to == ["wandb", "tensorboard"]
    (tmp_path / "bad.yaml").write_text("steps: 3\nstepz: 4\n")
    (tmp_path / "empty.yaml").write_text("k:\nseed: null\neval_steps: null\n")
    (tmp_path / "twice.yaml").write_text("max_steps: 3\nk: 5\nmax-steps: 4\n")
    (tmp_path / "nested.yaml").write_text("config: run.yaml\njson: true\n")
    for argv, words in {
        ("--steps", "4", "--batch=2"): "--steps is --max_steps; --batch is --per_device_train_batch_size",
        ("--out", "x"): "--out is --output_dir", ("--evaluate-every", "2"): "--eval_steps", ("--stepz", "4"): "unrecognized arguments: --stepz",
        ("--model_name_or_path", "x"): "--model_name_or_path is --student",
        ("--config", str(tmp_path / "bad.yaml")): "bad.yaml has unknown keys: steps, stepz (--steps is --max_steps)",
        ("--config", str(tmp_path / "empty.yaml")): "--k, --seed needs a value: leave it out for the default",
        ("--config", str(tmp_path / "nested.yaml")): "nested.yaml has unknown keys: config, json",
        ("--config", str(tmp_path / "twice.yaml")): "twice.yaml is no YAML: max_steps is given twice",
        ("--num_train_epochs", "2", "--max_steps", "9"): "both say how long the run is",
        ("--torch_dtype", "auto"): "--torch_dtype is --dtype", ("--num_train_epochs", "0"): "--num_train_epochs must be positive",
        ("--max_steps", "many"): "argument --max_steps/--max-steps: invalid int value: 'many'",
        ("--student_layers", "1"): "--student_layers makes a student, and --student names another",
        ("--eval_measures", "--eval_strategy", "no"): "--eval_measures measures at every evaluation",
        ("--shares", "gold=1"): "is not used without a divergence", ("--lora_r", "4"): "--lora_r: of an adapter, which --use_peft asks for",
        ("--warmup_steps", "30", "--max_steps", "20"): "--warmup_steps 30 are more than --max_steps 20",
        ("--warmup_steps", "30", "--predistill_steps", "5"): "more than --predistill_steps 5",
        ("--per_device_train_batch_size", "0"): "must be at least 1, not 0", ("--limit", "-1"): "--limit must be at least 1",
        ("--quantization", "4bit"): "train an adapter, --use_peft", ("--long_targets", "snip"): "invalid choice: 'snip'",
        ("--dtype", "float17"): "--dtype must be auto or a floating", ("--teacher_dtype", "int8"): "--teacher_dtype must be auto or",
        ("--vllm_url", "localhost:8000"): "--vllm_url must begin with http", ("--method", "tv"): "unknown method 'tv'",
        ("--resume_from_checkpoint", "x"): "--resume_from_checkpoint", ("--sample_temperature", "0"): "sample_temperature must be in",
    }.items():  # fmt: skip
        with pytest.raises(ValueError) as told:
            ask("train", [*base, *argv])
        assert words in str(told.value), (argv, str(told.value))
    found = ask("train", [*base, "--teacher_quantization", QUANTO, "--teacher_revision", "main"])
    options = found.model.options("teacher_")
    assert (options["revision"], options["trust_remote_code"]) == ("main", False)
    assert options["quantization_config"].weights == "int4"


#: Numbers that are 0 or less and mean something: as the option's help says, or nothing of what it is a share or weight of.
MEANT = {
    "0": {"adam_beta1", "adam_beta2", "adam_epsilon", "beta", "ce_weight", "data_seed", "dataloader_num_workers",
          "eval_accumulation_steps", "eval_delay", "hidden_weight", "label_smoothing_factor", "learning_rate", "local_rank",
          "lora_dropout", "max_grad_norm", "neftune_noise_alpha", "predistill_steps", "seed", "top_k", "warmup_steps",
          "warmup_ratio", "weight_decay"},
    "-1": {"data_seed", "local_rank", "past_index"},
    "nan": set(),
}  # fmt: skip


@pytest.mark.parametrize("value", MEANT)
def test_numbers_that_mean_nothing_are_refused_by_name(value):
    """Of every option that is a number; transformers takes some of them for another number, or for none."""
    kinds = [*KINDS.values(), FDistillConfig]
    hints = {name: kind for of in kinds for name, kind in get_type_hints(of).items()}
    numbers = {name for name, kind in hints.items() if {int, float} & {kind, *get_args(kind)}}
    assert len(numbers) > 40
    for name in numbers - MEANT[value]:
        command = "teacher build" if name == "head_rank" else "train"
        student = {} if name == "head_rank" else {"student": "s", "use_peft": True}
        with pytest.raises((ValueError, TypeError), match=name):
            ask(command, [f"--{name}={value}"], {"teacher": "t", "data": "d", **student})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "[a].jsonl"])
def test_a_home_that_cannot_hold_the_rows_is_told_with_what_moves_them(name, tmp_path, monkeypatch):
    import datasets

    (tmp_path / "home").touch()  # no folder, which even root cannot write into
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    row = b'{"prompt": "a", "target": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    with pytest.raises(
        OSError, match=r"cannot keep the rows in \S+home/datasets \(.*: set HF_DATASETS_CACHE to a folder"
    ):
        read_pairs(tmp_path / name)
