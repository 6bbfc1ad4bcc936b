"""English–Romanian translation: a teacher trained from scratch, 3+1-layer students distilled from it by every method.

    python -m benchmarks.paper.run --data FOLDER --out FOLDER [--gpu] [--stage NAME ...] [--smoke]

FOLDER of the data has gettext_en_ro.{train,test}.tsv.gz. Stages: teacher, predistilled, samples, one a method, timing,
table. Each is skipped where its result is there already, so that a stopped run goes on; --stage runs some alone. Writes
results.json, table.md and table.png.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from fdistill_kernels.provenance import provenance
from fdistill_kernels.sequence import run as sequence_run
from fdistill_kernels.sequence.data import read_pairs, tokenize
from fdistill_kernels.sequence.metrics import draw_all, teacher_dist
from fdistill_kernels.sequence.run import Job, Run, load_model
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

METHODS = ("seqkd", "engine", "kl", "rkl", "js", "tvd")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(pairs=64, distil_pairs=16, vocabulary=400, width=16, layers=4, teacher_steps=4, predistill_steps=2,
                  steps=2, batch=4, test=4, tokens=8, timed=1),
    "cpu": dict(pairs=None, distil_pairs=4800, vocabulary=4000, width=192, layers=4, teacher_steps=5000,
                predistill_steps=800, steps=300, batch=16, test=200, tokens=48, timed=20),
    "gpu": dict(pairs=None, distil_pairs=None, vocabulary=16000, width=512, layers=6, teacher_steps=6000,
                predistill_steps=3000, steps=1500, batch=64, test=1000, tokens=64, timed=50),
}  # fmt: skip


class Experiment:
    """The folder, the sizes and the stages."""

    def __init__(self, data: Path, out: Path, size: str):
        self.data, self.out, self.size, self.name = data, out, SIZES[size], size
        self.console = Console(stderr=True)
        out.mkdir(parents=True, exist_ok=True)

    def file(self, part: str) -> Path:
        return self.data / f"gettext_en_ro.{part}.tsv.gz"

    def tokenizer(self) -> Any:
        """A byte-level BPE of both languages together."""
        folder = self.out / "tokenizer"
        if not folder.exists():
            with gzip.open(self.file("train"), "rt", encoding="utf-8") as lines:
                text = [cell for line in lines for cell in line.rstrip("\n").split("\t")]
            bpe = ByteLevelBPETokenizer()
            bpe.train_from_iterator(text, vocab_size=self.size["vocabulary"], special_tokens=["<pad>", "<s>", "</s>"],
                                    show_progress=False)  # fmt: skip
            made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>",
                                           eos_token="</s>")  # fmt: skip
            made.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def teacher(self) -> None:
        """Cross-entropy from random weights."""
        folder = self.out / "teacher"
        if folder.exists():
            return
        set_seed(0)
        tokenizer, size = self.tokenizer(), self.size
        width, layers = size["width"], size["layers"]
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=width, encoder_layers=layers, decoder_layers=layers,
            encoder_attention_heads=max(1, width // 64), decoder_attention_heads=max(1, width // 64),
            encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, max_position_embeddings=1024, dropout=0.1,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.bos_token_id,
            forced_eos_token_id=None,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
        pairs = tokenize(read_pairs(self.file("train"), size["pairs"]), tokenizer, model.config, size["tokens"])
        arguments = FDistillConfig(
            str(self.out / "trainer-teacher"), method="mle", max_steps=size["teacher_steps"], report_to=[],
            per_device_train_batch_size=size["batch"], learning_rate=3e-4, warmup_steps=size["teacher_steps"] // 16,
            save_steps=max(1, size["teacher_steps"] // 5), save_total_limit=1, logging_steps=50,
            bf16=self.name == "gpu", **sequence_run.BY_LENGTH,
        )  # fmt: skip
        trainer = FDistillTrainer(model, copy.deepcopy(model), arguments, train_dataset=pairs)
        trainer.train(resume_from_checkpoint=sequence_run.last_checkpoint(Path(arguments.output_dir)))
        sequence_run._save(model, folder, tokenizer)

    def job(self, method: str, **more: Any) -> Job:
        size = self.size
        return Job(
            teacher=str(self.out / "teacher"), student=str(self.out / "predistilled"), data=str(self.file("train")),
            eval_data=str(self.file("test")), out=str(self.out / method), method=method, steps=size["steps"],
            batch=size["batch"], learning_rate=3e-4, warmup_steps=20, eval_pairs=size["test"],
            limit=size["distil_pairs"], max_new_tokens=size["tokens"], samples=str(self.out), freeze_embeddings=True,
            bf16=self.name == "gpu", **more,
        )  # fmt: skip

    def predistilled(self) -> None:
        """The student that every method starts from."""
        folder = self.out / "predistilled"
        if folder.exists():
            return
        job = self.job("kl", predistill_steps=self.size["predistill_steps"], student_layers="3,1")
        job.student, job.out, job.freeze_embeddings, job.learning_rate = None, str(self.out / "predistill"), False, 3e-4
        prepared = Run(job, self.console)
        prepared.start()
        student = prepared.student()
        sequence_run._save(student, folder, prepared.tokenizer)
        self.keep("predistill", prepared.measure(student))
        teacher = prepared.measure(prepared.model)
        rows, *_ = prepared.held_out_rows()
        drawn = [draw_all(prepared.model, rows, job.sampling(), seed) for seed in range(100, 105)]
        groups = [[d[i].tolist() for d in drawn] for i in range(len(rows))]
        self.keep("teacher", {**teacher, "teacher_dist": teacher_dist(groups)})

    def keep(self, name: str, result: dict[str, Any]) -> None:
        path = self.out / "results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: result}, indent=1) + "\n")

    def samples(self) -> None:
        """The teacher's samples and beams, drawn once for all methods."""
        for method in ("kl", "seqkd"):
            Run(self.job(method), self.console).samples()

    def distil(self, method: str) -> None:
        results = sequence_run.train(self.job(method), self.console)
        self.keep(method, results)

    def timing(self) -> None:
        """Seconds a step with the teacher's samples stored and drawn online, and how much of it is not the models'."""
        known = json.loads((self.out / "results.json").read_text()) if (self.out / "results.json").exists() else {}
        if "timing" in known:
            return
        found: dict[str, Any] = {}
        for method in ("js", "tvd"):
            for online in (False, True):
                job = self.job(method, online_teacher=online)
                prepared = Run(job, self.console)
                pairs = prepared.samples()
                config = FDistillConfig(
                    str(self.out / "timing"), method=method, max_steps=1 + self.size["timed"], report_to=[],
                    top_k=job.top_k, per_device_train_batch_size=job.batch, max_new_tokens=job.max_new_tokens,
                    save_strategy="no", bf16=job.bf16, disable_tqdm=True, **sequence_run.BY_LENGTH,
                )  # fmt: skip
                trainer = FDistillTrainer(load_model(job.student), prepared.teacher, config, train_dataset=pairs)
                clock = _Clock(_models_time(trainer))
                trainer.add_callback(clock)
                trainer.train()
                name = f"{method} {'online' if online else 'offline'}"
                found[name] = {"seconds_a_step": clock.seconds / self.size["timed"],
                               "outside_models": 1 - sum(clock.spent.values()) / clock.seconds,
                               **{k: v / clock.seconds for k, v in clock.spent.items()}}  # fmt: skip
            found[f"{method} online ÷ offline"] = (
                found[f"{method} online"]["seconds_a_step"] / found[f"{method} offline"]["seconds_a_step"]
            )
        self.keep("timing", found)

    def table(self) -> None:
        """table.md and table.png of what is there."""
        results = json.loads((self.out / "results.json").read_text())
        columns = ("bleu", "chrf", "ter", "likelihood_risk", "coverage_risk", "perplexity")
        names = [n for n in ("teacher", "predistill", *METHODS) if n in results]
        lines = ["| | BLEU | chrF | TER | R_llh | R_cvg | perplexity |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {n} | " + " | ".join(f"{results[n][c]:.2f}" for c in columns) + " |" for n in names]
        (self.out / "table.md").write_text("\n".join(lines) + "\n")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        results["run"] = {**provenance("python -m benchmarks.paper.run", device), "size": self.name, "sizes": self.size}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        _plot(results, names, columns[:5], self.out / "table.png")


class _Clock(TrainerCallback):
    """Seconds from the end of the first step, which sets up what the others find, to the end of the last."""

    def __init__(self, spent: dict[str, float]):
        self.spent, self.seconds, self.started = spent, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.started = time.perf_counter()
            self.spent.update(dict.fromkeys(self.spent, 0.0))
        self.seconds = time.perf_counter() - self.started


def _models_time(trainer: FDistillTrainer) -> dict[str, float]:
    """Seconds, adding up, in both models' forward and generation, the student's backward and optimizer, and the loss.

    The loss has in it what models do in their own forward and backward otherwise: the products with the heads.
    """
    spent = {"forward": 0.0, "generation": 0.0, "backward": 0.0, "optimizer": 0.0, "loss": 0.0}
    inside = [0]

    def timed(call: Any, name: str) -> Any:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            inside[0] += 1
            started = time.perf_counter()
            try:
                return call(*args, **keywords)
            finally:
                inside[0] -= 1
                took = time.perf_counter() - started
                if not inside[0]:  # generation calls forward
                    spent[name] += took
                elif name == "loss":  # inside the student's forward
                    spent["loss"] += took
                    spent["forward"] -= took

        return wrapped

    for model in (trainer.model, trainer.teacher.model):
        model.forward = timed(model.forward, "forward")
        model.generate = timed(model.generate, "generation")
    trainer.step_loss = timed(trainer.step_loss, "loss")
    trainer.accelerator.backward = timed(trainer.accelerator.backward, "backward")
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **keywords: Any) -> Any:
        optimizer = create(*args, **keywords)
        trainer.optimizer.step = timed(trainer.optimizer.step, "optimizer")
        return optimizer

    trainer.create_optimizer = create_optimizer
    return spent


def _plot(results: dict[str, Any], names: list[str], columns: tuple[str, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(columns), figsize=(3 * len(columns), 3.2))
    for axis, column in zip(axes, columns, strict=True):
        axis.barh(names[::-1], [results[n][column] for n in names[::-1]])
        axis.set_title(column)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Runs the stages that were asked for and are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="the size for a card")
    parser.add_argument("--smoke", action="store_true", help="a size that shows that every stage runs")
    stages = ("teacher", "predistilled", "samples", *METHODS, "timing", "table")
    parser.add_argument("--stage", nargs="+", choices=stages, default=stages)
    args = parser.parse_args()
    experiment = Experiment(args.data, args.out, "smoke" if args.smoke else "gpu" if args.gpu else "cpu")
    for stage in args.stage:
        started = time.perf_counter()
        experiment.distil(stage) if stage in METHODS else getattr(experiment, stage)()
        print(f"{stage}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print((args.out / "table.md").read_text() if (args.out / "table.md").exists() else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
