"""`fdistill train` end to end on a tiny encoder–decoder teacher: a student, a report, resumption, bad input."""

import json

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from fdistill_kernels import cli
from fdistill_kernels.sequence import run
from fdistill_kernels.sequence.data import read_pairs

from .test_sequence import bart

PAIRS = [(f"the number {i} and {i + 1}", f"numărul {i} și {i + 1}") for i in range(60)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([x for pair in PAIRS for x in pair], vocab_size=300, special_tokens=["</s>", "<s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="</s>", pad_token="</s>", bos_token="<s>"
    )
    teacher = bart(len(tokenizer))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path


def arguments(files, *more):
    return ["train", "--teacher", f"{files}/teacher", "--student-layers", "2,1", "--data", f"{files}/pairs.tsv", "--out",
            f"{files}/run", "--steps", "4", "--predistill-steps", "4", "--max-new-tokens", "8", "--warmup-steps", "1",
            "--eval-pairs", "5", "--learning-rate", "0.01", "--json", *more]  # fmt: skip


def test_train_then_again_then_evaluate(files, capsys, monkeypatch):
    assert cli.main(arguments(files, "--method", "tvd", "--evaluate-every", "2")) == 0
    results = json.loads(capsys.readouterr().out)
    assert {"perplexity", "likelihood_risk", "coverage_risk", "bleu", "chrf", "ter"} <= results.keys()
    folder = files / "run"
    for name in ("config.yaml", "metrics.jsonl", "results.json", "curves.png", "report.html", "teacher_samples"):
        assert (folder / name).exists(), name
    assert "http" not in (folder / "report.html").read_text().split("Configuration")[0]
    student = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    assert (
        len(student.model.decoder.layers) == 1 and AutoTokenizer.from_pretrained(folder / "student").eos_token == "</s>"
    )
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_bleu" in line for line in logged) and {line["stage"] for line in logged} == {"predistill", "tvd"}
    monkeypatch.setattr(run.Run, "train", lambda *_: pytest.fail("nothing is left to train"))
    assert cli.main(["train", "--config", f"{folder}/config.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert cli.main(["train", "--config", f"{folder}/config.yaml", "--steps", "5"]) == 2
    assert "steps was 4 and is 5" in capsys.readouterr().err
    assert cli.main(["evaluate", "--teacher", f"{files}/teacher", "--student", f"{folder}/student", "--data",
                     f"{files}/pairs.tsv", "--max-new-tokens", "8", "--eval-pairs", "5"]) == 0  # fmt: skip
    assert "coverage_risk" in capsys.readouterr().out


def test_killed_in_training_goes_on_to_the_same_student(files, capsys, monkeypatch):
    assert cli.main(arguments(files, "--method", "kl")) == 0
    whole = AutoModelForSeq2SeqLM.from_pretrained(files / "run" / "student")
    (files / "run").rename(files / "whole")
    original = run.FDistillTrainer.compute_loss

    def killed(self, *args, **keywords):
        if self.args.method == "kl" and self.state.global_step == 2 and self.model.training:
            raise KeyboardInterrupt
        return original(self, *args, **keywords)

    monkeypatch.setattr(run.FDistillTrainer, "compute_loss", killed)
    assert cli.main(arguments(files, "--method", "kl")) == 130
    monkeypatch.setattr(run.FDistillTrainer, "compute_loss", original)
    assert not (files / "run" / "student").exists()
    assert cli.main(arguments(files, "--method", "kl")) == 0
    again = AutoModelForSeq2SeqLM.from_pretrained(files / "run" / "student")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sample_teacher_and_seqkd(files, capsys):
    common = arguments(files, "--method", "seqkd", "--predistill-steps", "0")[1:]
    assert cli.main(["sample-teacher", *common]) == 0 and (files / "run" / "teacher_beams" / "manifest.json").exists()
    assert cli.main(["train", *common]) == 0


def test_mixture_and_half_written_checkpoints(files, capsys):
    mixed = arguments(files, "--divergence", "gjs", "--shares", "student=0.7,gold=0.3", "--predistill-steps", "0")
    (files / "run" / "trainer-gjs" / "checkpoint-1").mkdir(parents=True)  # as a kill would leave it
    assert cli.main(mixed) == 0
    assert not (files / "run" / "trainer-gjs" / "checkpoint-1" / "config.json").exists()
    assert cli.main([*mixed, "--shares", "student"]) == 2 and "--shares must be" in capsys.readouterr().err


def test_bad_input(files, capsys):
    def says(text, *more):
        assert cli.main(arguments(files, *more)) == 2
        assert text in capsys.readouterr().err

    (files / "empty.tsv").write_text("")
    (files / "odd.tsv").write_text("a\tb\tc\n")
    (files / "columns.jsonl").write_text('{"source": "a", "target": "b"}\n')
    (files / "long.jsonl").write_text(json.dumps({"prompt": "numărul " * 100, "target": "b"}) + "\n")
    says("has no pairs", "--data", f"{files}/empty.tsv")
    says("line 1: two columns were expected", "--data", f"{files}/odd.tsv")
    says("lacks the column 'prompt'; it has source, target", "--data", f"{files}/columns.jsonl")
    says("tokens, the model has room for 64", "--data", f"{files}/long.jsonl")
    says("there is no file", "--data", f"{files}/nothing.tsv")
    says("unknown method 'tv'", "--method", "tv")
    (files / "bad.yaml").write_text("stepz: 3\n")
    says("unknown keys: stepz", "--config", f"{files}/bad.yaml")
    assert read_pairs(files / "columns.jsonl", columns=("source", "target"))[0] == {"prompt": "a", "target": "b"}
