"""Every command of the documents is one that the command line takes, and every row of docs/trainer.md one that data take."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

import fdistill_kernels as fk
from fdistill_kernels.sequence.arguments import ask
from fdistill_kernels.sequence.data import tokenize
from fdistill_kernels.sequence.options import BY_LENGTH, DEFAULTS, KINDS
from fdistill_kernels.sequence.reading import read_pairs

from .test_data import PLAIN, tokenizer_of
from .test_sequence import llama

ROOT = Path(__file__).parent.parent
PAGES = {p: (ROOT / p).read_text(encoding="utf-8") for p in ("docs/trainer.md", "docs/teachers.md", "README.md")}


def blocks(page, kind):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == kind]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page, monkeypatch):
    monkeypatch.setattr(
        "fdistill_kernels.sequence.arguments._yaml",
        lambda path, *_: dict(teacher="t", student="s", data="d") if path else {},
    )
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    commands = [
        re.split(r"fdistill |fdistill_kernels.cli ", line, maxsplit=1)[1]
        for line in lines
        if re.search(r"fdistill (train|evaluate|sample-teacher|teacher build)|cli train", line)
    ]
    assert commands
    built = re.findall(r"teacher build .*--output_dir (\w+)", "\n".join(commands))
    assert len(built) == len(set(built))  # a store takes one kind of targets
    for command in commands:
        name, *argv = shlex.split(command, comments=True)
        if name == "teacher":
            name, argv = f"teacher {argv[0]}", argv[1:]
        assert ask(name, argv).given or "config" in command, command


def test_files_are_taken_and_every_option_of_ours_is_on_the_page():
    for block in blocks("docs/trainer.md", "yaml"):
        assert ask("train", [], yaml.safe_load(block)).config.bf16
    page = PAGES["docs/trainer.md"]
    ours = {name for kind in ("model", "lora", "data", "run") for name in vars(KINDS[kind]())} - {"tokenizer"}
    assert not {name for name in ours if not re.search(rf"--{name}\b", page)}
    told = " ".join(re.search(r"These defaults differ.*?\n\n", page, re.DOTALL)[0].split())
    words = {
        "output_dir": "--output_dir fdistill-run`", "max_steps": "1000 steps", "learning_rate": "rate of 1e-4", "top_k": "--top_k 30`",
        "report_to": "no reporting", "eval_strategy": "evaluation", "eval_steps": "quarter of the steps (`--eval_steps`",
        "save_steps": "`--save_steps`", "save_total_limit": "--save_total_limit 1`", "logging_steps": "--logging_steps 0.02`",
        "per_device_eval_batch_size": "batches of 32 (`--per_device_eval_batch_size`", **dict.fromkeys(BY_LENGTH, "similar lengths"),
        **dict.fromkeys({"warmup_ratio", "warmup_steps"} & DEFAULTS.keys(), "a tenth of the steps"),
    }  # fmt: skip
    assert words.keys() == DEFAULTS.keys() and [name for name, said in words.items() if said not in told] == []
    assert DEFAULTS["max_steps"] == 1000 and DEFAULTS["learning_rate"] == 1e-4 and DEFAULTS["eval_steps"] == 0.25


def test_distillkits_missing_probabilities_are_the_tails_that_the_page_names():
    """Its losses of a list, of distillkit/lossfuncs/kl.py."""
    named = dict(re.findall(r"`(\w+)` is the tail `(\w+)`", PAGES["docs/trainer.md"]))
    student, teacher = torch.randn(2, 4, 60).unbind()
    log_p, ids = teacher.log_softmax(-1).topk(5)
    log_q = student.log_softmax(-1).gather(-1, ids)
    whole = log_p - log_p.logsumexp(-1, keepdim=True)
    rest_p, rest_q = (1 - x.exp().sum(-1) for x in (log_p, log_q))
    theirs = {"zero": (whole.exp() * (whole - log_q)).sum(-1),
              "symmetric_uniform": (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()}  # fmt: skip
    for handling, loss in theirs.items():
        ours = fk.f_divergence(student, fk.TopK(ids, log_p, named.pop(handling)), "kl", reduction="none")
        torch.testing.assert_close(ours, loss)
    assert not named


def test_a_document_begins_with_what_its_tokenizer_puts_before_a_text():
    """Not with a begin token that it only has."""
    assert "that begin token; a tokenizer that puts none there" in " ".join(PAGES["docs/trainer.md"].split())
    for bos in (True, False):
        tokenizer = tokenizer_of(PLAIN, bos=bos)
        row = tokenize(Dataset.from_list([{"text": "hello there"}]), tokenizer, llama(320).config)[0]
        assert row["prompt_ids"] == tokenizer("hello there")["input_ids"][:1]
        assert (row["prompt_ids"] == [tokenizer.bos_token_id]) == bos


def test_rows_are_taken(tmp_path):
    tokenizer = tokenizer_of(PLAIN)
    (rows,) = blocks("docs/trainer.md", "json")
    for row in rows.splitlines():
        path = tmp_path / "row.jsonl"
        path.write_text(row + "\n")
        made = tokenize(read_pairs(path), tokenizer, llama(320).config, long_prompts="cut")
        last = json.loads(row).get("messages", [{"role": "assistant"}])[-1]
        assert ("labels" in made.column_names) == (last["role"] == "assistant" and "alone" not in row), row
