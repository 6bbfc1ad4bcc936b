"""`fdistill train` end to end on a tiny encoder–decoder teacher: a student, a report, resumption, bad input."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import peft
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from fdistill_kernels import cli
from fdistill_kernels.sequence import asked_models, build, metrics, report, run, run_folder, samples, stages
from fdistill_kernels.sequence.arguments import ask
from fdistill_kernels.sequence.loading import load_config, load_model, load_student
from fdistill_kernels.sequence.sampling import Sampling
from fdistill_kernels.sequence.tokenizers import load_tokenizer
from fdistill_kernels.teachers import TeacherStore

from . import processes
from .openai_server import Server
from .test_data import PLAIN
from .test_data import tokenizer_of as chat_tokenizer
from .test_sequence import bart, gpt2, llama, t5
from .test_student_server import Student, StudentServer

PAIRS = [(f"the number {i} and {i + 1}", f"numărul {i} și {i + 1}") for i in range(60)]


def make_files(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([x for pair in PAIRS for x in pair], vocab_size=300, special_tokens=["</s>", "<s>"])
    special = dict(eos_token="</s>", pad_token="</s>", bos_token="<s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)
    teacher = bart(len(tokenizer))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tokenizer


def strict(text):
    """JSON, which has no NaN and no infinity."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def lines_of(folder):
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def drawn_once(request, monkeypatch):
    """A run's curves take longer to draw than it takes to train: one test has what a whole run draws."""
    if request.function is not test_train_then_again_then_evaluate:
        monkeypatch.setattr(run, "plot", lambda folder, _: (folder / "curves.png").write_bytes(b""))


@pytest.fixture
def files(tmp_path):
    make_files(tmp_path)
    return tmp_path


def changed_call(call, *more):
    """A command with more options, or other values of those that it has."""
    names = {str(word).replace("-", "_") for word in more if str(word).startswith("--")}
    left_out = [i for i, word in enumerate(call) if str(word).replace("-", "_") in names]
    return [word for i, word in enumerate(call) if i not in left_out and i - 1 not in left_out] + [*more]


def arguments(files, *more):
    return changed_call(
        ["train", "--teacher", f"{files}/teacher", "--student-layers", "2,1", "--data", f"{files}/pairs.tsv", "--output-dir",
         f"{files}/run", "--max-steps", "4", "--predistill-steps", "4", "--max-new-tokens", "8", "--warmup-steps", "1",
         "--eval-pairs", "5", "--learning-rate", "0.01", "--seed", "0", "--json"], *more)  # fmt: skip


def test_train_then_again_then_evaluate(files, capsys, monkeypatch):
    best = ("--hidden-weight", "2", "--save-steps", "2", "--load-best-model-at-end", "yes", "--metric-for-best-model",
            "perplexity")  # fmt: skip
    assert cli.main(arguments(files, "--method", "tvd", "--eval-steps", "2", "--eval-measures", *best)) == 0
    results = json.loads(capsys.readouterr().out)
    assert {"perplexity", "likelihood_risk", "coverage_risk", "bleu", "chrf", "ter"} <= results.keys()
    folder = files / "run"
    for name in ("config.yaml", "metrics.jsonl", "results.json", "curves.png", "report.html", "teacher_samples",
                 "sentences.parquet"):  # fmt: skip
        assert (folder / name).exists(), name
    assert "http" not in (folder / "report.html").read_text().split("Configuration")[0]
    student = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    assert len(student.model.decoder.layers) == 1
    assert AutoTokenizer.from_pretrained(folder / "student").eos_token == "</s>"
    logged = lines_of(folder)
    assert any("eval_bleu" in line for line in logged) and {line["stage"] for line in logged} == {"predistill", "tvd"}
    perplexities = [line["eval_perplexity"] for line in logged if "eval_perplexity" in line]
    assert len(perplexities) == 2 and results["perplexity"] == pytest.approx(min(perplexities), rel=1e-4)  # the best's
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "fit", lambda *_: pytest.fail("nothing is left to train"))
        assert cli.main(["train", "--config", f"{folder}/config.yaml", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == results
        assert cli.main(["train", "--config", f"{folder}/config.yaml", "--max_steps", "3"]) == 2
        assert "max_steps was 4 and is 3" in capsys.readouterr().err
        assert cli.main(["train", "--config", f"{folder}/config.yaml", "--beta", "0.25"]) == 2
        assert "holds another run: beta was 0.5 and is 0.25" in capsys.readouterr().err
    assert cli.main(["train", "--config", f"{folder}/config.yaml", "--max-steps", "6", "--json"]) == 0  # it grows
    assert json.loads(capsys.readouterr().out) != results
    logged = lines_of(folder)
    assert [line["step"] for line in logged if line["stage"] == "tvd" and "loss" in line] == [1, 2, 3, 4, 5, 6]
    rows, measured = [], stages.measured
    monkeypatch.setattr(stages, "measured", lambda *a: rows.append(len(a[2])) or measured(*a))
    command = ["evaluate", "--teacher", f"{files}/teacher", "--student", f"{folder}/student", "--max-new-tokens", "8"]
    assert cli.main([*command, "--data", f"{files}/pairs.tsv", "--output_dir", f"{files}/measured", "--json"]) == 0
    whole = capsys.readouterr().out
    assert "teacher_dist" in json.loads(whole) and (files / "measured" / "sentences.parquet").exists()
    assert cli.main([*command, "--eval-data", f"{files}/pairs.tsv", "--json"]) == 0  # all of the file it is given
    assert capsys.readouterr().out == whole and "coverage_risk" in whole and rows == [len(PAIRS)] * 2
    assert cli.main([*command, "--data", f"{files}/pairs.tsv", "--eval-data", f"{files}/pairs.tsv"]) == 2
    assert cli.main([*command, "--data", f"{files}/pairs.tsv", "--learning-rate", "1"]) == 2
    assert "makes nothing of --learning_rate" in capsys.readouterr().err


def test_killed_in_training_goes_on_to_the_same_student(files, capsys, monkeypatch):
    assert cli.main(arguments(files, "--method", "kl")) == 0
    whole = AutoModelForSeq2SeqLM.from_pretrained(files / "run" / "student")
    (files / "run").rename(files / "whole")
    original = stages.FDistillTrainer.compute_loss

    def killed(self, *args, **keywords):
        if self.args.method == "kl" and self.state.global_step == 2 and self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **keywords)

    monkeypatch.setattr(stages.FDistillTrainer, "compute_loss", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(arguments(files, "--method", "kl")) == 130
    assert signal.getsignal(signal.SIGTERM) is before  # this process has its own again
    monkeypatch.setattr(stages.FDistillTrainer, "compute_loss", original)
    assert not (files / "run" / "student").exists()
    assert cli.main(arguments(files, "--method", "kl")) == 0
    again = AutoModelForSeq2SeqLM.from_pretrained(files / "run" / "student")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(
    not hasattr(stages.FDistillConfig, "enable_jit_checkpoint"), reason="transformers has no such option"
)
def test_a_signal_that_is_answered_with_a_checkpoint_leaves_no_finished_student(causal, tmp_path, capsys, monkeypatch):
    from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

    monkeypatch.setattr(CheckpointManager, "setup_signal_handler", lambda _: None)
    asked = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "rkl", "--max_steps", "4", "--eval_strategy",
               "no", "--save_steps", "4", "--eval_pairs", "4", "--enable_jit_checkpoint", "--output_dir", f"{tmp_path}/run")  # fmt: skip
    original = JITCheckpointCallback.on_step_end

    def signalled(self, args, state, control, **more):
        self.jit_manager.is_checkpoint_requested = state.global_step == 2
        original(self, args, state, control, **more)

    monkeypatch.setattr(JITCheckpointCallback, "on_step_end", signalled)
    assert cli.main(asked) == 130 and not (tmp_path / "run" / "student").exists()
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(JITCheckpointCallback, "on_step_end", original)
    assert cli.main(asked) == 0
    steps = [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert steps == [1, 3, 4]  # the checkpoint came before the second step's line
    assert (tmp_path / "run" / "student").exists()


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
    for name in ("checkpoint-best", "checkpoint-9", "checkpoint-10", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert run_folder.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert (tmp_path / "checkpoint-best").exists() and not (tmp_path / "checkpoint-11").exists(), "partly written"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch, number):
    """It may be whole: of too many open files, or a disk that is not there for a moment, nothing is known of it."""
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(OSError, match=re.escape(os.strerror(number))):
        patched.setattr(run_folder.Path, "read_text", fails)
        run_folder.last_checkpoint(tmp_path)
    assert run_folder.last_checkpoint(tmp_path) == str(state.parent)


def killed(moment, arguments):
    """The command gets SIGKILL with half of a shard of samples written, or half of a log line."""
    write, log = samples.write_whole, run_folder.Log.on_log

    def half_a_shard(path, content):
        if path.suffix == ".parquet":
            path.with_suffix(".partial").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    def half_a_line(self, args, state, *rest, **more):
        log(self, args, state, *rest, **more)
        if (self.stage, state.global_step) == ("tvd", 3):
            with self.path.open("a") as file:
                file.write('{"stage": "tv')
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "shard":
        samples.write_whole = half_a_shard
    else:
        run_folder.Log.on_log = half_a_line
    cli.main(arguments)


def test_sigkill_loses_and_doubles_nothing(files, capsys):
    settings = ("--method", "tvd", "--eval-steps", "2", "--eval-measures")
    assert cli.main(arguments(files, *settings, "--output-dir", f"{files}/whole")) == 0
    for moment in ("shard", "line"):
        process = processes.begin(killed, moment, arguments(files, *settings), output=files / "words.txt")
        process.join()
        assert process.exitcode == -signal.SIGKILL, (files / "words.txt").read_text()[-2000:]
        assert (files / "run" / "teacher_samples" / "shard-00000.parquet").exists() == (moment == "line")
    assert (files / "run" / "metrics.jsonl").read_text().endswith('{"stage": "tv')
    assert cli.main(arguments(files, *settings)) == 0
    whole, again = (AutoModelForSeq2SeqLM.from_pretrained(files / name / "student") for name in ("whole", "run"))
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # a softmax does not feel it: Adam follows its gradient's rounding
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")

    def logged(name):
        timed = ("runtime", "second", "share", "train_loss")
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines_of(files / name)]

    assert logged("whole") == logged("run")


def test_full_disk_is_told_in_a_line_and_gone_on_after(files, capsys, monkeypatch):
    from safetensors import SafetensorError
    from transformers import Trainer

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_checkpoint", full)
        assert cli.main(arguments(files)) == 2
    assert "fdistill: no space left on the disk (Error while" in capsys.readouterr().err
    assert cli.main(arguments(files)) == 0


def test_causal_students_left_padding_and_prompts_of_the_teachers_own(files, capsys, monkeypatch):
    tokenizer = make_files(files)
    tokenizer._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.padding_side = "left"
    llama(len(tokenizer)).save_pretrained(files / "llama")
    tokenizer.save_pretrained(files / "llama")
    rows = [{"prompt": a, "target": b, "teacher_prompt": None if i == 0 else f"translate: {a}"}
            for i, (a, b) in enumerate(PAIRS)]  # fmt: skip
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = arguments(files, "--teacher", f"{files}/llama", "--student-layers", "1", "--data", f"{files}/pairs.jsonl")
    asked, draw = [], metrics.draw
    monkeypatch.setattr(metrics, "draw", lambda *a: asked.append(a) or draw(*a))
    prepared = run.Run(ask("train", command[1:]), run.Console(quiet=True))
    first, second = prepared.pairs[0], prepared.pairs[1]
    assert first["teacher_prompt_ids"] == first["prompt_ids"] == [tokenizer.bos_token_id, *tokenizer.encode(
        rows[0]["prompt"], add_special_tokens=False)]  # fmt: skip
    assert tokenizer.decode(second["teacher_prompt_ids"]) == "<s>translate: " + rows[1]["prompt"]
    assert tokenizer.bos_token_id not in second["labels"] and second["labels"][-1] == tokenizer.eos_token_id
    assert cli.main(command) == 0
    assert AutoModelForCausalLM.from_pretrained(files / "run" / "student").config.num_hidden_layers == 1
    by_teacher = [len(prompts[0]) for model, prompts, *_ in asked if model.config.num_hidden_layers == 2]
    by_student = [len(prompts[0]) for model, prompts, *_ in asked if model.config.num_hidden_layers == 1]
    assert by_teacher and by_student and min(by_teacher) > max(by_student)


@pytest.mark.parametrize(
    "command, words", [("evaluate", "stopped"), ("sample-teacher", "stopped; the same command goes on")]
)
def test_a_command_that_is_stopped_says_what_goes_on(command, words, capsys, monkeypatch):
    monkeypatch.setitem(run.WORK, command, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    asked = [command, "--teacher", "t", "--data", "d", *(["--student", "s"] if command == "evaluate" else [])]
    assert cli.main(asked) == 130
    assert capsys.readouterr().err.strip().removesuffix(" from here") == words


def test_measures_of_few_and_empty_outputs(files):
    teacher, tokenizer = bart(), AutoTokenizer.from_pretrained(files / "teacher")
    teacher.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(60).index_fill(0, torch.tensor(0), 1e4))
    ends = [torch.tensor([teacher.config.eos_token_id])]
    prompts = [torch.tensor([5, 6, 0])]
    _, measured = metrics.measured(teacher, teacher, prompts, prompts, ends, [""], tokenizer, Sampling(4))
    assert measured["perplexity"] == pytest.approx(1) and measured["bleu"] == 0
    assert measured["likelihood_risk"] == pytest.approx(0, abs=1e-5)


def test_the_end_tokens_of_an_adapter_are_its_base_models(tmp_path):
    """Where the teacher is not at hand, whose model says them else."""
    base = llama()
    base.generation_config.eos_token_id = [1, 7]
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(load_model(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    for folder in ("base", "adapter"):
        asked = SimpleNamespace(model=SimpleNamespace(student=str(tmp_path / folder), revision=None))
        speaker = stages.Run._speaker(SimpleNamespace(model=None, asked=asked), base.config)
        assert speaker.generation_config.eos_token_id == [1, 7], folder


def test_held_out_answers_are_of_other_conversations(causal, tmp_path):
    for numbers, count, begin in (([0, 1, 2], 1, 2), ([0, 1, 1], 1, 1), ([0, 0, 0, 1], 3, 3), ([0, 0], 1, 1),
                                  ([0, 1, 1], 3, 0), ([0], 1, 0)):  # fmt: skip
        assert stages._border(numbers, len(numbers) - count) == begin
    call = of(causal, "train", "teacher", None, "chats.jsonl", "--student", f"{causal}/teacher", "--answers", "each",
              "--output_dir", f"{tmp_path}/run")  # fmt: skip
    made = run.Run(ask("train", call[1:]), run.Console(quiet=True))
    assert len(made.held_out) == 2 and len(made.pairs) == 16 and "row" not in made.pairs.column_names


def test_the_first_answer_is_measured_also_behind_what_does_not_count():
    """As empty thoughts that a template writes before what it marks."""
    masks = [[True, True, False, True], [False, True, True, False], [True] * 4, [False] * 4]
    rows = {"prompt_ids": [[3]] * 4, "labels": [[4, 5, 6, 7]] * 4, "labels_mask": masks, "reference": ["a"] * 4}
    given = SimpleNamespace(held_out=Dataset.from_dict(rows), teacher_prompts=lambda: "prompt_ids")
    answers = stages.Run.held_out_rows(given)[2]
    assert [x.tolist() for x in answers] == [[4, 5], [4, 5, 6], [4, 5, 6, 7], []]


def test_sample_teacher_and_seqkd(files, capsys):
    common = arguments(files, "--method", "seqkd", "--predistill-steps", "0", "--samples", f"{files}/kept")[1:]
    assert cli.main(["sample-teacher", *common]) == 0 and (files / "kept" / "teacher_beams" / "manifest.json").exists()
    assert json.loads(capsys.readouterr().out)["folder"] == f"{files}/kept"
    assert cli.main(["train", *common]) == 0


def test_mixture_and_half_written_checkpoints(files, capsys):
    mixed = arguments(files, "--divergence", "gjs", "--shares", "student=0.7,gold=0.3", "--predistill-steps", "0")
    (files / "run" / "trainer-gjs" / "checkpoint-1").mkdir(parents=True)  # as a kill would leave it
    assert cli.main(mixed) == 0
    assert not (files / "run" / "trainer-gjs" / "checkpoint-1" / "config.json").exists()
    assert (
        cli.main(changed_call(mixed, "--shares", "student")) == 2 and "shares must be as in" in capsys.readouterr().err
    )


LOGGED = ("loss_on_teacher", "loss_on_student", "student_entropy_on_teacher", "teacher_entropy_on_teacher",
          "agreement_on_student", "tokens_per_second", "sampling_share", "teacher_share")  # fmt: skip


def test_curves_say_what_they_are_of(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    lines = [{"stage": stage, "step": i, key: 1.0} for stage in ("predistill", "x") for i in (1, 2)
             for key in ("loss", "eval_loss", *(LOGGED if stage == "x" else ()))]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage"')
    for settings, label in ((dict(method="seqkd"), "loss, nats a token"), (dict(method="tvd"), "loss, mean of tokens"),
                            (dict(divergence="gjs", shares="gold=1"), "loss, nats a token")):  # fmt: skip
        config = ask("train", ["--teacher", "t", "--data", "d"], settings).config
        report.plot(tmp_path, config)
        first, second, third, *others = figures[-1].axes
        assert first.get_ylabel() == "loss, KL, CE and MSE" and second.get_ylabel() == label
        assert report.name_of(config) in second.get_title() and third.get_ylabel().endswith("nats a token")
        assert len(third.get_legend().get_texts()) == 2
        assert [axis.get_title() for axis in others] == list(report.PANELS)
        assert [len(axis.get_legend().get_texts()) for axis in others] == [2, 2, 1, 1, 2]


def test_what_is_not_finite_is_null_in_files_and_missing_in_curves(tmp_path):
    log = run_folder.Log(tmp_path / "metrics.jsonl", "rkl")
    state = SimpleNamespace(is_world_process_zero=True, global_step=2, log_history=[{"loss": math.inf, "step": 1}])
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": math.nan, "eval_loss": 1.0})
    assert [line["loss"] for line in lines_of(tmp_path)] == [None, None]
    report.plot(tmp_path, ask("train", ["--teacher", "t", "--data", "d"], {"method": "rkl"}).config)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Small Llamas that share a tokenizer with a chat template, and some that do not; prompts and chats."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer, other = chat_tokenizer(PLAIN), chat_tokenizer(words=["zq xw vv kk"] * 9)

    def save(name, made, tokenizer=tokenizer):
        made.save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)

    config = dict(eos_token_id=0, bos_token_id=1, pad_token_id=0)
    for name, size, own in (("teacher", 320, tokenizer), ("student", 320, tokenizer), ("padded", 384, tokenizer),
                            ("bare", 320, None), ("stranger", 320, other)):  # fmt: skip
        made = llama(size, seed=len(name))
        made.config.update(config)
        made.generation_config.update(**config)
        save(name, made, own)
    stopping = llama(320)
    stopping.generation_config.stop_strings = ["."]
    save("stopping", stopping)
    shorter = llama(320)
    shorter.config.max_position_embeddings = 24
    save("shorter", shorter)
    save("bart", bart(320))
    save("cut", llama(len(tokenizer) - 1))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    write(folder / "pairs.jsonl", [{"prompt": f"say {i}", "target": f"{i} and {i + 1}"} for i in range(24)])
    write(folder / "own.jsonl", [{"prompt": "a", "target": "b", "teacher_prompt": "c"}] * 3)
    write(folder / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(6)])
    write(folder / "long.jsonl", [{"prompt": "numărul " * 6, "target": "b"}] * 3)
    turns = [{"role": "assistant" if i % 2 else "user", "content": said}
             for i, said in enumerate(("say it", "it!", "say 3", "3!"))]  # fmt: skip
    write(folder / "chats.jsonl", [{"messages": turns[: 2 + i % 2 * 2]} for i in range(12)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def of(causal, command, teacher, student, data, *more):
    return [command, *(("--teacher", f"{causal}/{teacher}") if teacher else ()), *(("--student", f"{causal}/{student}") if student else ()),
            "--data", f"{causal}/{data}", "--max_new_tokens", "8", *more]  # fmt: skip


def test_what_is_refused_before_any_work(causal, tmp_path, capsys, monkeypatch):
    for name in ("drawn", "fit", "measure"):
        monkeypatch.setattr(run.Run, name, lambda *_: pytest.fail("work was begun"))

    def call(*more, command="train", teacher="teacher", student="student", data="pairs.jsonl"):
        out = () if command == "evaluate" else ("--output_dir", f"{tmp_path}/run")
        return of(causal, command, teacher, student, data, *more, *out)

    pairs, url = ("--eval_data", f"{causal}/pairs.jsonl"), "http://127.0.0.1:9"
    for words, asked in {
        "--top_k, --top_p: not used, as no samples are asked for":
            ["teacher", "build", *call("--sequences", "gold", "--top_p", "0.5", "--top_k", "3", student=None)[1:]],
        "row 0: prompt has": call(student="shorter", data="long.jsonl"),  # the student's context
        "room for 16: see --long_prompts": call(teacher="shorter", data="long.jsonl"),
        "lacks the column teacher_prompt, which": call(*pairs, data="own.jsonl"),
        "pairs.jsonl gives one row, which cannot be held out and": call("--limit", "1"),
        "chats.jsonl gives one row, which": call("--answers", "each", "--limit", "1", data="chats.jsonl"),
        "prompts.jsonl has prompts alone, and held-out rows need targets: give --eval_data that has them, or --target_column":
            call(data="prompts.jsonl"),
        "--sequences gold,teacher: ": ["teacher", "build", *call(*pairs, student=None, data="prompts.jsonl")[1:]],
        "prompts.jsonl has prompts alone: give --target_column": call(*pairs, "--method", "mle", data="prompts.jsonl"),
        "bare has no tokenizer that can be loaded": call(student="bare"),
        "different tokenizers": call(student="stranger"),
        "the teacher's tokenizer has 281 ids, the teacher 280: ": call(command="sample-teacher", teacher="cut", student=None),
        "the teacher 280: it is another model's, or": ["teacher", "build", *call(teacher="cut", student=None)[1:]],
        "the student's tokenizer has 281 ids, the student 280": call(command="evaluate", student="cut"),
        "stopping has stop_strings in its generation config": call(student="stopping"),
        "must both be causal, or both encoder–decoder": call(teacher="bart"),
        "must both be causal": call(command="evaluate", teacher="bart"),
        "have different tokenizers": call(command="evaluate", student="stranger"),
        "rkl asks for no sequences of the teacher": call("--method", "rkl", command="sample-teacher", student=None),
        "--online_teacher: not used, as samples that are kept": call("--online_teacher", command="sample-teacher"),
        "--predistill_steps: not used, as the method": call("--method", "predistill", "--predistill_steps", "2"),
        "--use_peft makes a new adapter, and": call("--use_peft", student="adapter"),
        "there is no file": call(data="nothing.tsv"),
        "--student or --student_layers is needed": call(student=None),
        "--teacher is needed": call(teacher=None),
        "there is no folder": call(teacher="nosuch"),
        "bitsandbytes": call("--teacher_quantization", "4bit"),
        "bitsandbytes_8bit says neither 4 nor 8 bits": call("--teacher_quantization", "bitsandbytes_8bit"),  # read as 4
        "QuantoConfig makes nothing of weight": call("--teacher_quantization", '{"quant_method": "quanto", "weight": "int4"}'),
        "--teacher_quantization torchao: ": call("--teacher_quantization", "torchao"),
        "--quantization {no: JSONDecodeError": call("--use_peft", "--quantization", "{no"),
        "adapter_config.json names no base": call("--quantization", "8bit", student="adapter"),  # which is trained on
        "lr_scheduler_kwargs={}: ": call("--lr_scheduler_type", "warmup_stable_decay"),
        "lomo": call("--optim", "lomo"),
        "--dataset_train_split is of a hub dataset": call("--dataset_train_split", "x"),
        "--dataset_test_split is of a hub": call("--dataset_test_split", "x"),
        "output embedding is LoRA or quantised": call("--use_peft", "--lora_target_modules", "lm_head"),
        "must be loss, or beside --eval_measures one of bleu": call("--metric_for_best_model", "bleu"),
        "--device_map, --teacher_dtype: not used, as the teacher's weights":
            call("--teacher", url, "--device_map", "auto", "--teacher_dtype", "float32", teacher=None),
        "--revision: not used, as no --student": call("--student_layers", "1", "--revision", "main", student=None),
        "--revision: not used, as a model's folder has no": call("--revision", "main"),
        "--teacher_revision: not used, as a model's folder": call("--teacher_revision", "main"),
        "--vllm_url: not used, as a server is asked for samples, not for beams": call("--method", "seqkd", "--vllm_url", url),
        "--samples, --vllm_url: not used, as the objective is": call("--method", "rkl", "--samples", "x", "--vllm_url", url),
        "--served_model_name: not used, as no server of the teacher": call("--served_model_name", "x"),
        "--server_kind: not used, as --teacher is no server": call("--server_kind", "vllm"),
        "--samples: not used, as --online_teacher draws": call("--online_teacher", "--samples", "x"),
        "--beams: not used, as no beams are asked for": call("--beams", "2"),
        "--hub_model_id, --hub_token: not used, as nothing is pushed": call("--hub_model_id", "a", "--hub_token", "b"),
        "--lora_target_modules nosuch: LlamaForCausalLM has no": call("--use_peft", "--lora_target_modules", "q_proj", "nosuch"),
        "--lora_modules_to_save nosuch: LlamaForCausalLM has no": call("--use_peft", "--lora_modules_to_save", "nosuch"),
        "hub_strategy='end' is not used without push_to_hub": call("--hub_strategy", "end"),
        "--run_name: not used, as --report_to names nobody": call("--run_name", "a"),
        **{f"--{name}: not used, as --report_to names nobody": call(f"--{name}", "a")
           for name in ("trackio_space_id", "trackio_bucket_id") if hasattr(stages.FDistillConfig, name)},
        "--bf16_full_eval: not used, as evaluations while training": call("--bf16_full_eval"),
        "--per_device_eval_batch_size: not used, as --eval_strategy no":
            call("--eval_strategy", "no", "--per_device_eval_batch_size", "4"),
        "--fsdp_config: not used, as --fsdp is not given": call("--fsdp_config", '{"min_num_params": 1}'),
        "--save_steps, --save_strategy: not used, as a student that is split":
            call("--tensor_parallel", "2", "--save_strategy", "steps", "--save_steps", "5"),
        "--use_dora: an adapter of whole weights": call("--tensor_parallel", "2", "--use_peft", "--use_dora"),
        "hidden_weight=0.1 is not used but by predistill": call("--hidden_weight", "0.1"),
        "nosuch is not supported": call("--report_to", "nosuch"),
        "argument --beta: given twice, and only the last would count": call("--beta", "0.1", "--beta", "0.2"),
    }.items():  # fmt: skip
        assert cli.main(asked) == 2, asked
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in told and told.startswith("fdistill: "), told
    assert not (tmp_path / "run" / "config.yaml").exists()  # so that the folder is free for the command put right


def test_paths_that_lead_nowhere_are_told_before_a_model_is_loaded(causal, tmp_path, capsys, monkeypatch):
    for module, name in (
        (asked_models, "load_model"),
        (asked_models, "load_student"),
        (stages, "load_model"),
        (build, "load_model"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "broken.jinja").write_text("{{ bos_token }}\n{% if %}")
    shutil.copytree(causal / "teacher", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "folder").mkdir()
    models = {"--teacher": causal / "teacher", "--student": causal / "student"}
    base = {"train": models | {"--data": causal / "pairs.jsonl"}, "evaluate": models | {"--data": causal / "pairs.jsonl"},
            "teacher build": {"--teacher": causal / "teacher", "--data": causal / "pairs.jsonl"}}  # fmt: skip
    (tmp_path / "before").mkdir()
    shutil.copytree(causal / "student", tmp_path / "before" / "student")
    paths = [(("--chat_template_path",), "nosuch", "latin.jinja", "broken.jinja", "folder"), (("--output_dir",), "file", "file/x"),
             (("--data",), "nosuch.jsonl"), (("--teacher",), "nosuch", "damaged", "before"), (("--tokenizer",), "nosuch"),
             (("--config",), "nosuch", "folder", "latin.jinja")]  # fmt: skip
    served = ("--method", "rkl", "--student_server", "http://127.0.0.1:9", "--student_server_path")
    of_train = [(("--samples",), "file"), (served, "file"), (("--eval_data",), "nosuch.jsonl"), (("--student",), "nosuch", "damaged", "before"),
                (("--accelerator_config",), "nosuch")]  # fmt: skip
    for command, given in base.items():
        for (*more, option), *names in paths + (of_train if command == "train" else []):
            for name in names:
                named = {"--output_dir": tmp_path / "run", **given, option: tmp_path / name}
                asked = [*command.split(), *more, *(str(x) for pair in named.items() for x in pair)]
                assert cli.main(asked) == 2, asked
                told = capsys.readouterr().err.strip().splitlines()[-1]
                assert told.startswith("fdistill: ") and name in told, (asked, told)
    with pytest.raises(ValueError, match=r"before is a run's folder and no model's: give .*before/student"):
        load_config(tmp_path / "before")
    for name in ("output_dir", "samples"):
        with pytest.raises(ValueError, match=f"--{name} is empty: name a folder"):
            ask("train", ["--teacher", "t", "--student", "s", "--data", "d", f"--{name}", ""])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fdistill-run").write_text("")  # where nothing is said
    with pytest.raises(ValueError, match=r"--output_dir fdistill-run: .* is a file"):
        ask("train", ["--teacher", "t", "--student", "s", "--data", "d"])


def test_a_quantised_student_is_checkpointed_only_if_that_is_asked_for(monkeypatch):
    said = []
    monkeypatch.setattr(
        peft, "prepare_model_for_kbit_training", lambda model, checkpoint: said.append(bool(checkpoint)) or model
    )
    for more in ((), ("--gradient_checkpointing",)):
        asked = ask(
            "train",
            ["--teacher", "t", "--student", "s", "--data", "d", "--use_peft", "--quantization", "quanto", *more],
        )
        asked_models._adapted(asked, llama(320))
    assert said == [False, True]


def test_a_card_that_a_way_to_quantise_needs_is_named(causal):
    with (
        patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=NotImplementedError("only on GPU")),
        pytest.raises(ValueError, match="teacher cannot be quantised here: only on GPU"),
    ):
        load_model(causal / "teacher", quantization_config={})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "adapter_model.safetensors",
                                  "base/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_model_s_file_that_is_damaged_is_named(whose, name, causal, tmp_path, capsys):
    shutil.copytree(causal / "teacher", tmp_path / whose / "base")
    if name != "model.safetensors":
        peft.get_peft_model(llama(320), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / whose)
        chat_tokenizer(PLAIN).save_pretrained(tmp_path / whose)
        settings = tmp_path / whose / "adapter_config.json"
        named = {**json.loads(settings.read_text()), "base_model_name_or_path": f"{tmp_path}/{whose}/base"}
        settings.write_text(json.dumps(named))
    else:
        shutil.copytree(causal / whose, tmp_path / whose, dirs_exist_ok=True)
    cut(tmp_path / whose / name)
    asked = of(causal, "evaluate", "teacher", "student", "pairs.jsonl")
    asked[asked.index(f"{causal}/{whose}")] = str(tmp_path / whose)
    assert cli.main(asked) == 2
    assert f"fdistill: {tmp_path}/{whose}/{name} is damaged (" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_s_file_that_is_damaged_is_named(causal, tmp_path, capsys):
    asked = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--max_steps", "1", "--warmup_steps",
               "0", "--eval_pairs", "4", "--output_dir", f"{tmp_path}/run")  # fmt: skip
    assert cli.main(asked) == 0
    for name, content in {"results.json": '{"a": 1', "data.json": "{", "config.yaml": "a: [1",
                          "student/model.safetensors": ""}.items():  # fmt: skip
        kept = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text(content)
        if "student" in name:
            (tmp_path / "run" / "results.json").unlink()
        assert cli.main(asked) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"fdistill: {tmp_path}/run/{name} is "), told
        (tmp_path / "run" / name).write_bytes(kept)
    (tmp_path / "options.yaml").write_text("a: [1")
    assert cli.main([*asked, "--config", f"{tmp_path}/options.yaml"]) == 2
    assert f"fdistill: {tmp_path}/options.yaml is no YAML: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaModel])
@pytest.mark.parametrize("load", [load_model, load_student])
def test_weights_that_are_in_no_file_are_refused_by_name(load, kind, tmp_path):
    kind(llama(60).config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no weights for lm_head\.weight of LlamaForCausalLM, which would be random"
    ):
        load(tmp_path)


@pytest.mark.parametrize("make", [llama, gpt2, bart, t5])
def test_tied_weights_are_in_their_files(make, tmp_path):
    made = make(60)
    made.save_pretrained(tmp_path)
    assert load_model(tmp_path).state_dict().keys() == made.state_dict().keys()


@pytest.mark.parametrize("make", [llama, gpt2, bart, t5])
def test_a_folder_without_a_tokenizer(make, tmp_path):
    """In whose place transformers 5 makes one of special tokens alone, which has an empty text of every word."""
    make(320).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)


def test_a_chat_s_adapter_with_a_system_message_of_the_teacher_s_own(causal, tmp_path, capsys):
    """From messages to an adapter: of a student of the teacher's layers, whose base is kept; one epoch."""
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes((causal / "chats.jsonl").read_bytes())
    call = of(causal, "train", "teacher", None, "pairs.jsonl", "--student_layers", "1", "--use_peft", "--lora_r", "2", "--method", "tvd", "--ce_weight", "0.5",
              "--teacher_system", "be kind", "--num_train_epochs", "1", "--output_dir", f"{tmp_path}/run", "--json")  # fmt: skip
    call[call.index("--data") + 1] = str(chats)
    assert cli.main(call) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    adapter = json.loads((tmp_path / "run" / "student" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["base_model_name_or_path"] == f"{tmp_path}/run/predistilled"
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["teacher_system"] == "be kind" and "learning_rate" not in kept  # what was said
    prepared = run.Run(ask("train", call[1:]), run.Console(quiet=True))
    assert "be kind" in prepared.tokenizer.decode(prepared.pairs[0]["teacher_prompt_ids"])
    assert False in prepared.pairs[1]["labels_mask"] and prepared.held_out_rows()[3] == ["it!"]
    assert prepared.tokenizer.decode(prepared.held_out_rows()[2][0]) == "it!</s>"  # measured: the first answer
    chats.write_text(chats.read_text().replace("say 3", "tell 3"))
    for epochs in ("1", "2"):  # more of them would train the finished student on
        call[call.index("--num_train_epochs") + 1] = epochs
        assert cli.main(call) == 2
        assert f"{chats} is not the data that {tmp_path}/run was begun with" in capsys.readouterr().err
        assert all((tmp_path / "run" / name).exists() for name in ("student", "results.json"))


def test_a_finished_run_goes_on_in_steps_or_in_epochs(causal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.Run, "measure", lambda *_: {})
    call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--eval_pairs", "4", "--eval_strategy", "no",
              "--per_device_train_batch_size", "11", "--output_dir", f"{tmp_path}/run")  # fmt: skip
    config = yaml.safe_load
    for more, steps in (("--max_steps", "1"), 1), (("--num_train_epochs", "1"), 2), (("--max_steps", "3"), 3):
        assert cli.main([*call, *more]) == 0
        assert (tmp_path / "run" / "trainer-mle" / f"checkpoint-{steps}").exists()
        assert more[0][2:] in config((tmp_path / "run" / "config.yaml").read_text())
    assert cli.main([*call, "--num_train_epochs", "1"]) == 2
    assert "holds another run: num_train_epochs was 1.5 and is 1" in capsys.readouterr().err
    call[-1] = f"{tmp_path}/weights"
    assert cli.main([*call, "--save_only_model", "--max_steps", "1"]) == 0
    assert cli.main([*call, "--save_only_model", "--max_steps", "2"]) == 2
    assert "checkpoint-1 has no optimizer, as --save_only_model says" in capsys.readouterr().err
    assert (tmp_path / "weights" / "student").exists()


def test_a_run_goes_on_where_its_updates_have_as_many_rows(causal, tmp_path, capsys, monkeypatch):
    """Of other batches, or ranks, whose updates divide the 20 rows; what is refused leaves the finished student."""
    monkeypatch.setattr(run.Run, "measure", lambda *_: {})

    def call(steps, size, parts, ranks=1, *more):
        monkeypatch.setattr(run_folder, "rank", lambda: (0, ranks))
        return cli.main(of(
            causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--limit", "22", "--eval_strategy", "no",
            "--output_dir", f"{tmp_path}/run", "--max_steps", str(steps), "--per_device_train_batch_size", str(size),
            "--gradient_accumulation_steps", str(parts), *more))  # fmt: skip

    assert call(1, 4, 1) == call(2, 2, 2) == 0
    assert call(2, 4, 1) == 2 and "holds another run: gradient_acc" in capsys.readouterr().err  # there is nothing to do
    for more in ((2, 1), (2, 2, 2)):
        assert call(3, *more) == 2
        assert re.search(
            "checkpoint-2 has lost its place .* rows of an update was 4 and is [28]\n", capsys.readouterr().err
        )
    assert (tmp_path / "run" / "student").exists() and call(3, 4, 1) == 0
    assert call(4, 2, 1, 1, "--ignore_data_skip", "True") == 0  # what the error says


@pytest.mark.parametrize("more", [(), ("--use_peft",), ("--predistill_steps", "1")], ids=str)
def test_a_compiled_student_is_saved_as_it_would_be(causal, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(run.Run, "measure", lambda *_: {})
    found = []
    for compiled in ((), ("--torch_compile", "--torch_compile_backend", "eager")):
        folder = tmp_path / f"run{len(compiled)}"
        call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--eval_pairs", "4", "--eval_strategy",
                  "no", "--max_steps", "1", "--warmup_steps", "0", "--output_dir", str(folder), *more, *compiled)  # fmt: skip
        assert cli.main(call) == 0, capsys.readouterr().err
        found.append({path.name: load_file(path) for path in (folder / "student").glob("*.safetensors")})
    (weights,) = found[0].values()
    assert weights and found[0].keys() == found[1].keys()
    torch.testing.assert_close(*(next(iter(x.values())) for x in found))


def test_a_start_that_failed_binds_nobody(causal, tmp_path, capsys):
    """What nothing foresees, here the weights' end, leaves the folder free for other settings; a checkpoint binds."""
    call = of(causal, "train", "teacher", "padded", "pairs.jsonl", "--method", "rkl", "--eval_pairs", "4", "--use_peft",
              "--lora_target_modules", "all-linear", "--output_dir", f"{tmp_path}/run")  # fmt: skip
    failing = ("--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--learning_rate", "1e30")
    assert cli.main([*call, *failing]) == 2
    assert "has logits that are not finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").exists()
    assert cli.main([*call, "--max_steps", "2"]) == 0
    adapter = json.loads((tmp_path / "run" / "student" / "adapter_config.json").read_text())
    linear = {name.rpartition(".")[2] for name in adapter["target_modules"]}
    assert {"q_proj", "down_proj"} <= linear and "lm_head" not in linear
    assert max(line["step"] for line in lines_of(tmp_path / "run")) == 2
    assert cli.main([*call, "--max_steps", "2", "--learning_rate", "1e-5"]) == 2
    assert "holds another run: learning_rate was" in capsys.readouterr().err


def test_two_at_once_do_not_train_in_one_folder(causal, tmp_path, capsys):
    call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--eval_pairs", "4", "--max_steps", "1",
              "--output_dir", f"{tmp_path}/run")  # fmt: skip
    (tmp_path / "run").mkdir()
    held = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, f"{tmp_path}/run/.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert cli.main(call) == 2
        assert f"{tmp_path}/run is another process's, which trains there now" in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.yaml").exists()
        other.kill()
    assert cli.main(call) == 0


def test_a_folder_s_name_is_no_markup(causal, tmp_path, capsys, monkeypatch):
    """rich takes what stands in brackets for a style, and [/…] for the end of one."""
    monkeypatch.setattr(run.Run, "measure", lambda *_: {})
    folder = tmp_path / "[bold]a" / "b[" / "c]"
    call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "mle", "--eval_pairs", "4", "--max_target_tokens", "3",
              "--max_steps", "1", "--output_dir", f"{folder}")  # fmt: skip
    for _ in range(2):
        assert cli.main(call) == 0
    told = "".join(capsys.readouterr().err.split("\n"))  # which is wrapped
    assert f"going on with {folder}" in told


@pytest.mark.parametrize("more", [("--student_layers", "1"), ("--student", "student")], ids=lambda more: more[0])
def test_an_adapter_finds_its_base_model_from_any_folder(more, causal, tmp_path, capsys, monkeypatch):
    call = of(causal, "train", "teacher", None, "pairs.jsonl", *more, "--use_peft", "--lora_r", "2", "--method", "mle", "--eval_pairs",
              "4", "--max_steps", "1", "--output_dir", "run")  # fmt: skip
    shutil.copytree(causal / "student", tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    assert cli.main(call) == 0
    monkeypatch.chdir("/")
    adapter = json.loads((tmp_path / "run" / "student" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(
        tmp_path / ("run/predistilled" if "layers" in more[0] else "student")
    )
    assert load_model(tmp_path / "run" / "student").peft_config


def test_predistillation_alone(causal, tmp_path):
    """As the method it has the run's own steps, not those of a stage before another method."""
    call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "predistill", "--hidden_weight", "1",
              "--eval_pairs", "4", "--output_dir", f"{tmp_path}/run")  # fmt: skip
    for steps in (2, 3):
        assert cli.main([*call, "--max_steps", str(steps)]) == 0
        lines = lines_of(tmp_path / "run")
        assert max(line["step"] for line in lines) == steps and {line["stage"] for line in lines} == {"predistill"}
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)


def test_a_store_without_a_student_asks_the_hub_for_nothing(causal, tmp_path, capsys, monkeypatch):
    build = of(causal, "teacher", "teacher", None, "pairs.jsonl", "--output_dir", f"{tmp_path}/store")
    assert cli.main([build[0], "build", *build[1:]]) == 0
    monkeypatch.setattr(
        stages.GenerationConfig, "from_pretrained", lambda name, **_: pytest.fail(f"asked for {name!r}")
    )
    for command, words in (("train", "--student or --student_layers is"), ("sample-teacher", "nothing to draw")):
        call = of(tmp_path, command, "store", None, "", "--method", "kl", "--output_dir", f"{tmp_path}/run")
        assert cli.main(changed_call(call, "--data", f"{causal}/pairs.jsonl")) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padded_heads_prompts_alone_and_both_of_the_teacher_s_kinds(causal, tmp_path, capsys):
    for pair in (("teacher", "padded"), ("padded", "student")):
        call = of(causal, "train", *pair, "prompts.jsonl", "--eval_data", f"{causal}/pairs.jsonl", "--eval_pairs", "4", "--method", "rkl",
                  "--max_steps", "1", "--output_dir", f"{tmp_path}/{pair[0]}", "--json")  # fmt: skip
        assert cli.main(call) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    both = of(causal, "train", "teacher", "student", "prompts.jsonl", "--eval_data", f"{causal}/pairs.jsonl", "--divergence", "kl",
              "--shares", "teacher=0.5,beam=0.5", "--beams", "2", "--output_dir", f"{tmp_path}/both")  # fmt: skip
    rows = run.Run(ask("train", both[1:]), run.Console(quiet=True)).samples()
    assert {"sample_ids", "beam_ids"} <= set(rows.column_names) and rows["sample_ids"][:] != rows["beam_ids"][:]
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"teacher_beams", "teacher_samples"}
    alone = ("--method", "kl", "--output_dir", f"{tmp_path}/one")
    one = of(causal, "sample-teacher", "teacher", None, "pairs.jsonl", *alone)
    assert cli.main(one) == 0  # the student need not be known yet
    assert cli.main(["train", *one[1:], "--student", f"{causal}/student", "--max_steps", "1"]) == 0


def test_servers_of_both_models(causal, tmp_path):
    """The teacher's samples are drawn by one, each with a seed of its own, the student's by others."""
    call = of(causal, "train", "teacher", "student", "pairs.jsonl", "--method", "js", "--output_dir", f"{tmp_path}/run")
    with Server(Student(f"{causal}/teacher")) as theirs:
        for steps in (1, 2):  # a run may go on with another server
            with StudentServer(f"{causal}/student") as ours:
                where = ("--student_server", ours.url, "--student_server_path", f"{tmp_path}/{steps}")
                assert cli.main([*call, "--vllm_url", theirs.url, *where, "--max_steps", str(steps)]) == 0
            assert len(ours.told) == 2 and ours.bodies
    assert {body["model"] for body in theirs.bodies} == {f"{causal}/teacher"}
    assert len({body["seed"] for body in theirs.bodies}) == len(theirs.bodies) > 8
    with Server(Student(f"{causal}/teacher")) as theirs:
        drawn = [*call, "--vllm_url", theirs.url, "--served_model_name", "alias", "--samples", f"{tmp_path}/samples"]
        assert cli.main(["sample-teacher", *drawn[1:]]) == 0
    assert {body["model"] for body in theirs.bodies} == {"alias"}


@pytest.mark.parametrize(("teacher", "tokenizer", "told"), [
    ("t", None, "t of v1"), ("t", "s", "s of v2"), ("t", "x", "x of None"), ("t", "t", "t of v1"),
    ("http://127.0.0.1:9", None, "s of v2"), ("http://127.0.0.1:9", "x", "x of None"), ("s", None, "s of v1"),
    ("STORE", None, "s of v2"), ("STORE", "x", "x of None"),
])  # fmt: skip
def test_a_revision_is_of_its_model_s_own_tokenizer_alone(tmp_path, monkeypatch, teacher, tokenizer, told):
    """A commit of the student's is none of a tokenizer's from elsewhere; where both models have one name, each's is its."""

    def load(path, revision=None, **_):
        raise ValueError(f"{path} of {revision}")

    monkeypatch.setattr(asked_models, "load_tokenizer", load)
    monkeypatch.setattr(asked_models, "load_config", lambda *_, **__: llama(60).config)
    if teacher == "STORE":
        teacher = str(TeacherStore.create(tmp_path / "store", kind="top_k", vocabulary=60, k=2, key={}).folder)
    more = ["--tokenizer", tokenizer] if tokenizer else []
    asked = ask("train", ["--teacher", teacher, "--teacher_revision", "v1", "--student", "s", "--revision", "v2", *more,
                          "--data", "x.jsonl", "--output_dir", str(tmp_path)])  # fmt: skip
    with pytest.raises(ValueError, match=f"^{told}$"):
        asked_models.teacher_for(asked)
    with pytest.raises(ValueError, match=r"^s of v2$"):
        asked_models.tokenizer_of(asked, asked.model.student)


def test_json_has_no_infinity(tmp_path, capsys):
    """A perplexity may overflow; strict readers take neither Infinity nor NaN."""
    arguments = ["--teacher", "t", "--student", "s", "--data", "x.jsonl", "--output_dir", str(tmp_path), "--json"]
    assert run.main("evaluate", arguments, lambda *_: {"perplexity": math.inf, "kl": math.nan, "bleu": 1.5}) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"perplexity": None, "kl": None, "bleu": 1.5}


def test_a_hub_that_is_not_there_is_one_line(tmp_path, capsys):
    """--push_to_hub makes its repository before any work; whichever its client, a lost connection is no fault of ours."""

    def work(*_):
        raise type("ConnectError", (run.OF_HUB,), {})("[Errno -2] Name or service not known")

    asked = ["--teacher", "t", "--student", "s", "--data", "x.jsonl", "--output_dir", str(tmp_path)]
    assert run.main("train", asked, work) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("fdistill: ") and "Name or service not known" in told
