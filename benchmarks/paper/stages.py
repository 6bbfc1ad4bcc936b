"""The reproduction's stages: what each makes of which others, and at what size.

A stage is a file or folder under the run's folder. It is made under work/ and moved in its place when it is whole, so
that what is there is done; a training's checkpoints and a sampling's shards stay under work/ until then.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import sacrebleu
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from fdistill_kernels.sequence import Sampling, TeacherSamples, copy_layers
from fdistill_kernels.sequence.hashes import fingerprint
from fdistill_kernels.sequence.metrics import measured, searched
from fdistill_kernels.sequence.options import BY_LENGTH
from fdistill_kernels.sequence.run_folder import last_checkpoint
from fdistill_kernels.sequence.samples import generation_settings, write_table
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer
from fdistill_kernels.teachers.files import write_whole

#: What every student is trained by after its pre-distillation, and what the trainer is asked for.
ARMS: dict[str, dict[str, Any]] = {
    "mle": dict(method="mle"), "seqkd": dict(method="seqkd"), "kl": dict(method="kl"),
    "engine": dict(method="engine"), "rkl": dict(method="rkl"), "js": dict(method="js"), "tvd": dict(method="tvd"),
    "kl-beams": dict(divergence="kl", shares={"beam": 1.0}),
}  # fmt: skip
#: Which stored sequences of the teacher an arm reads.
STORED = {"seqkd": "beams", "kl-beams": "beams", "kl": "samples", "js": "samples", "tvd": "samples"}
#: Estimated minutes of a worker for a stage at the size "cpu", for the time left alone.
COSTS = {"mle": 2.0, "seqkd": 2.0, "kl": 2.1, "engine": 4.4, "rkl": 4.4, "js": 6.4, "tvd": 6.6, "kl-beams": 2.1,
         "predistilled": 6.5, "measures": 0.6, "teacher": 32, "samples": 2, "beams": 2, "timing": 0.5}  # fmt: skip
#: The teacher must be inside of these for a table to test the machine-translation claims: of its samples on the
#: development sentences, and of its greedy outputs there.
GATE = {"teacher_dist": 0.5, "looping": 0.02}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        seeds: students pre-distilled and distilled by every arm.
        pairs, tested, judged: at most so many training, test and development pairs; None: all.
        distilled: pairs that the arms train on, so that the teacher's stored sequences are used several times.
        tokens: pairs with a longer side, its end token included, are left out; new: at most so many are generated.
        width, layers: of the teacher, layers on either side; students have `student` (encoder, decoder) of them.
        rates: of the teacher, the pre-distillation, and the arms.
        beams: of the outputs that BLEU is of.
    """

    seeds: int
    pairs: int | None
    distilled: int | None
    tested: int | None
    judged: int | None
    vocabulary: int
    tokens: int
    new: int
    width: int
    layers: int
    student: tuple[int, int]
    batch: int
    teacher_epochs: int
    predistill_steps: int
    steps: int
    warmup: tuple[int, int, int]
    rates: tuple[float, float, float]
    beams: int = 5
    timed: int = 20
    bf16: bool = False


SIZES = {
    "smoke": Size(2, 16, 8, 6, 6, 300, 24, 6, 16, 2, (2, 1), 4, 1, 2, 2, (1, 1, 1), (1e-2, 1e-2, 1e-2), 2, 1),
    "cpu": Size(5, None, 9600, None, None, 2000, 24, 32, 128, 3, (3, 1), 32, 25, 3700, 1200, (400, 100, 100),
                (1e-3, 1e-3, 5e-4)),
    "card": Size(5, None, None, None, None, 8000, 64, 80, 512, 6, (3, 1), 64, 40, 12000, 8000, (1000, 500, 200),
                 (5e-4, 3e-4, 2e-4), bf16=True),
}  # fmt: skip


class Stage(NamedTuple):
    """``make(work)`` makes the stage's file or folder at `work`, going on with what an earlier try left there.

    Where `alone`, all others wait for it, and it has their threads.
    """

    name: str
    make: Callable[[Path], None]
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    alone: bool = False


class Experiment:
    """The run's folder, its size, and its stages."""

    def __init__(self, data: Path, out: Path, size: str, seeds: int | None = None):
        self.data, self.out, self.name, self.size = data, out, size, SIZES[size]
        self.seeds = seeds or self.size.seeds

    def key(self) -> dict[str, Any]:
        """What a run's results depend on, beside the code."""
        digest = hashlib.sha256(b"".join(self.file(p).read_bytes() for p in ("train", "dev", "test")))
        return {"size": self.name, "sizes": json.loads(json.dumps(asdict(self.size))), "data": digest.hexdigest()[:16]}

    def file(self, part: str) -> Path:
        return self.data / f"gettext_en_ro.{part}.tsv.gz"

    def stages(self) -> list[Stage]:
        """In the order they are to be made: all of the first seed, then the second."""
        found = [
            Stage("data", self.make_data, cost=0.5),
            Stage("teacher", self.make_teacher, ("data",), COSTS["teacher"], alone=True),
            Stage("measures/teacher-dev.parquet", functools.partial(self.measure, "teacher", "dev"), ("teacher",)),
            Stage("samples", functools.partial(self.draw, 1), ("teacher",), COSTS["samples"]),
            Stage("beams", functools.partial(self.draw, 4), ("teacher",), COSTS["beams"]),
            Stage("measures/teacher.parquet", functools.partial(self.measure, "teacher", "test"), ("teacher",)),
        ]
        for seed in range(self.seeds):
            start = f"seed-{seed}/predistilled"
            for arm in ("predistilled", *ARMS):
                name, needs = f"seed-{seed}/{arm}", ("teacher",) if arm == "predistilled" else (start,)
                needs += (STORED[arm],) if arm in STORED else ()
                make = functools.partial(self.predistil if arm == "predistilled" else self.distil, seed, arm)
                measure = functools.partial(self.measure, name, "test")
                found += [Stage(name, make, needs, COSTS[arm]),
                          Stage(f"measures/{name}.parquet", measure, (name, "measures/teacher.parquet"),
                                COSTS["measures"])]  # fmt: skip
        needs = ("seed-0/predistilled", "samples")
        return [*found, Stage("timing.json", self.time_steps, needs, COSTS["timing"])]

    def done(self, name: str) -> bool:
        return (self.out / name).exists()

    def make(self, stage: Stage) -> None:
        """Makes a stage and puts it in its place."""
        work, made = self.out / "work" / stage.name, self.out / stage.name
        for path in (work, made):
            path.parent.mkdir(parents=True, exist_ok=True)
        stage.make(work)
        work.replace(made)
        progress(self.out, stage.name).unlink(missing_ok=True)

    def make_data(self, work: Path) -> None:
        """A byte-level BPE of both languages, and the pairs of each part that are short enough, as ids."""
        texts = {part: list(self._read(part)) for part in ("train", "dev", "test")}
        random.Random(0).shuffle(texts["train"])  # of which the arms have the first
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator((cell for pair in texts["train"] for cell in pair), self.size.vocabulary,
                                special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)  # fmt: skip
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>",
                                eos_token="</s>").save_pretrained(work / "tokenizer")  # fmt: skip
        end = bpe.token_to_id("</s>")
        limits = {"train": self.size.pairs, "dev": self.size.judged, "test": self.size.tested}
        for part, pairs in texts.items():
            rows = []
            for source, target in pairs:
                ids = [[*bpe.encode(text).ids, end] for text in (source, target)]
                if max(map(len, ids)) <= self.size.tokens:
                    rows.append({"prompt_ids": ids[0], "labels": ids[1], "length": sum(map(len, ids)),
                                 "target": target})  # fmt: skip
            write_table(pyarrow.Table.from_pylist(rows[: limits[part]]), work / f"{part}.parquet")

    def _read(self, part: str) -> Iterator[tuple[str, str]]:
        with gzip.open(self.file(part), "rt", encoding="utf-8") as lines:
            for line in lines:
                source, target = line.rstrip("\n").split("\t")
                yield source, target

    def rows(self, part: str) -> Dataset:
        return Dataset(pyarrow.parquet.read_table(self.out / "data" / f"{part}.parquet"))

    def tokenizer(self) -> Any:
        return PreTrainedTokenizerFast.from_pretrained(self.out / "data" / "tokenizer")

    def model(self, name: str) -> Any:
        model = BartForConditionalGeneration.from_pretrained(self.out / name)
        return model.cuda() if torch.cuda.is_available() else model

    def common(self, work: Path, seed: int, steps: int, part: int) -> dict[str, Any]:
        """Arguments of every training; part: which of the rates and warm-ups."""
        return dict(
            output_dir=str(work / "trainer"), per_device_train_batch_size=self.size.batch, seed=seed, report_to=[],
            learning_rate=self.size.rates[part], warmup_steps=self.size.warmup[part], weight_decay=0.0,
            bf16=self.size.bf16, save_strategy="steps", save_steps=max(1, steps // 10), save_total_limit=2,
            logging_steps=max(1, steps // 50), disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **BY_LENGTH,
        )  # fmt: skip

    def fit(self, trainer: Any, work: Path) -> None:
        """Trains from the last checkpoint to the end, and keeps the model and its log."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(progress(self.out, str(work.relative_to(self.out / "work")))))
        trainer.train(resume_from_checkpoint=last_checkpoint(work / "trainer"))
        trainer.model.save_pretrained(work)
        write_whole(work / "log.json", json.dumps(trainer.state.log_history, indent=1).encode())
        shutil.rmtree(work / "trainer")

    def make_teacher(self, work: Path) -> None:
        """By cross-entropy from random weights; of its epochs the one with the least loss on development pairs."""
        set_seed(0)
        tokenizer, size = self.tokenizer(), self.size
        heads = max(1, size.width // 64)
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=size.width, encoder_layers=size.layers, decoder_layers=size.layers,
            encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * size.width,
            decoder_ffn_dim=4 * size.width, max_position_embeddings=128, dropout=0.1, forced_eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
        parts = {part: self.rows(part).rename_column("prompt_ids", "input_ids").select_columns(
            ["input_ids", "labels", "length"]) for part in ("train", "dev")}  # fmt: skip
        steps = -(-len(parts["train"]) // size.batch) * size.teacher_epochs
        common = {**self.common(work, 0, steps, 0), "save_strategy": "epoch", "eval_strategy": "epoch"}
        arguments = Seq2SeqTrainingArguments(
            **common, num_train_epochs=size.teacher_epochs, per_device_eval_batch_size=64, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", remove_unused_columns=True,
        )  # fmt: skip
        self.fit(Seq2SeqTrainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=1),
                                train_dataset=parts["train"], eval_dataset=parts["dev"]), work)  # fmt: skip

    def sampling(self) -> Sampling:
        return Sampling(self.size.new, top_p=0.9)

    def distilled(self) -> Dataset:
        rows = self.rows("train").remove_columns("target")
        return rows.select(range(min(self.size.distilled or len(rows), len(rows))))

    def draw(self, beams: int, work: Path) -> None:
        """The teacher's sequences of the arms' prompts, once for all: samples, or of several beams the best."""
        teacher, sampling = (
            self.model("teacher"),
            self.sampling() if beams == 1 else Sampling(self.size.new, beams=beams),
        )
        prompts = self.distilled()["prompt_ids"][:]
        store = TeacherSamples(work, prompts, sampling, fingerprint(teacher), 0, generation_settings(teacher, sampling))
        told = progress(self.out, work.name)
        for done in store.fill(teacher, batch=64):
            write_whole(told, str(done / len(prompts)).encode())

    def predistil(self, seed: int, _: str, work: Path) -> None:
        """A student of some of the teacher's layers, made to follow it on gold targets: where a seed's arms start."""
        set_seed(seed)
        teacher, steps = self.model("teacher"), self.size.predistill_steps
        config = FDistillConfig(method="predistill", max_steps=steps, freeze_embeddings=True,
                                **self.common(work, seed, steps, 1))  # fmt: skip
        student = copy_layers(teacher, *self.size.student)
        self.fit(
            FDistillTrainer(student, teacher, config, train_dataset=self.rows("train").remove_columns("target")), work
        )

    def trainer(self, seed: int, arm: str, work: Path, steps: int, stored: bool = True) -> FDistillTrainer:
        """An arm's, on the teacher's stored sequences, or on such that it draws at every step."""
        set_seed(seed)
        rows, config = self.distilled(), FDistillConfig(
            max_steps=steps, freeze_embeddings=True, max_new_tokens=self.size.new, top_p=0.9,
            **ARMS[arm], **self.common(work, seed, steps, 2),
        )  # fmt: skip
        if stored and arm in STORED:
            shards = sorted((self.out / STORED[arm]).glob("shard-*.parquet"))
            drawn = pyarrow.concat_tables([pyarrow.parquet.read_table(shard) for shard in shards])
            rows = rows.add_column("sample_ids", drawn["sample_ids"].to_pylist())
        student, teacher = self.model(f"seed-{seed}/predistilled"), self.model("teacher")
        return FDistillTrainer(student, teacher, config, train_dataset=rows)

    def distil(self, seed: int, arm: str, work: Path) -> None:
        """A seed's pre-distilled student, trained further by an arm."""
        self.fit(self.trainer(seed, arm, work, self.size.steps), work)

    def measure(self, name: str, part: str, work: Path) -> None:
        """Every measure of a model, sentence by sentence, and its beam outputs against references and the teacher's."""
        rows, tokenizer, size = self.rows(part), self.tokenizer(), self.size
        prompts, gold = ([torch.tensor(ids) for ids in rows[column][:]] for column in ("prompt_ids", "labels"))
        model, teacher, references = self.model(name), self.model("teacher"), rows["target"][:]
        draws = 5 if name == "teacher" else 1  # of a student TeacherDist would be the same again
        table, _ = measured(
            model, teacher, prompts, prompts, gold, references, tokenizer, self.sampling(), 12345, draws
        )
        by_beams = searched(model, prompts, tokenizer, size.new, size.beams)
        for column, values in by_beams.items():
            table = table.append_column(f"beams_{column}", [values])
        compared = {"greedy": (table["output"].to_pylist(), references), "beams": (by_beams["output"], references)}
        if name != "teacher":
            of_teacher = pyarrow.parquet.read_table(self.out / "measures" / "teacher.parquet")
            compared["to_teacher"] = (by_beams["output"], of_teacher["beams_output"].to_pylist())
        for what, (outputs, against) in compared.items():
            for column, values in statistics(outputs, against).items():
                table = table.append_column(f"{what}_{column}", [values])
        write_table(table, work)

    def time_steps(self, work: Path) -> None:
        """Seconds of an update with the teacher's samples stored, and drawn online; on a CPU this process' own."""
        found = {}
        for arm in ("js", "tvd"):
            for how in ("stored", "online"):
                trainer = self.trainer(0, arm, work.with_name("timing"), 1 + self.size.timed, how == "stored")
                trainer.args.save_strategy = "no"
                clock = _Clock()
                trainer.remove_callback(PrinterCallback)
                trainer.add_callback(clock)
                trainer.train()
                found[f"{arm} {how}"] = (clock.last - clock.first) / self.size.timed
            found[f"{arm} online ÷ stored"] = found[f"{arm} online"] / found[f"{arm} stored"]
        shutil.rmtree(work.with_name("timing"), ignore_errors=True)
        write_whole(work, json.dumps(found, indent=1).encode())


def statistics(outputs: list[str], references: list[str]) -> dict[str, list[list[float]]]:
    """Of each sentence what a corpus' BLEU and TER are made of, by sacrebleu: bleu (10), matches and counts of n-grams
    of 1 to 4 words, words put out, words of the reference; ter (2), edits and words of the reference.
    """
    bleu, ter = sacrebleu.BLEU(effective_order=True), sacrebleu.TER()
    found: dict[str, list[list[float]]] = {"bleu": [], "ter": []}
    for output, reference in zip(outputs, references, strict=True):
        one, other = bleu.sentence_score(output, [reference]), ter.sentence_score(output, [reference])
        found["bleu"].append([float(x) for x in (*one.counts, *one.totals, one.sys_len, one.ref_len)])
        found["ter"].append([float(other.num_edits), float(other.ref_length)])
    return found


def progress(out: Path, name: str) -> Path:
    """Where a stage says how far it is, as a share."""
    folder = out / "work" / "progress"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name.replace("/", "+")


class _Progress(TrainerCallback):
    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 20 == 0:
            write_whole(self.path, str(state.global_step / state.max_steps).encode())


class _Clock(TrainerCallback):
    """Seconds at the end of the first step, which sets up what the others find, and of the last."""

    first = last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.last = time.perf_counter() if torch.cuda.is_available() else time.process_time()
        if state.global_step == 1:
            self.first = self.last
