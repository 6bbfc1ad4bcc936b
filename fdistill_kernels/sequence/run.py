"""`fdistill train`, `sample-teacher` and `evaluate`: one command from two models and a file to a student and a report.

A run is a folder: config.yaml (what was asked), teacher_samples/, predistilled/ (the student every method starts from),
trainer-*/ (checkpoints), metrics.jsonl, student/, curves.png, report.html, results.json. Each stage that is there is
not done again, so that a killed run goes on with the same command. Under torchrun or accelerate launch the ranks share
the teacher's sampling and the training; the first one writes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from transformers import AutoConfig, AutoTokenizer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..sparse import TAILS
from ..teachers import Endpoint, TeacherStore
from .data import read_pairs, tokenize
from .metrics import Measures, evaluate
from .models import load_model
from .objectives import METHODS, Half, method, mixture
from .predistill import copy_layers
from .report import logged, plot, write_report
from .sampling import Sampling, Server, TeacherSamples, data_hash, fingerprint, generation_settings, write_whole
from .teachers import InRoom, Served, Stored, Teacher, is_store, teacher_of
from .trainer import FDistillConfig, FDistillTrainer, check_vocabularies, join

#: Batches of like lengths, which are little padded; transformers 5 has another name for it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"} if hasattr(FDistillConfig, "train_sampling_strategy")
    else {"group_by_length": True}
)  # fmt: skip


@dataclass
class Job:
    """What a run was asked for; config.yaml holds these fields."""

    teacher: str = ""
    student: str | None = None
    student_layers: str | None = None
    data: str = ""
    eval_data: str | None = None
    out: str = "fdistill-run"
    method: str = "tvd"
    beta: float = 0.5
    divergence: str | None = None
    shares: str | None = None
    steps: int = 1000
    predistill_steps: int = 0
    batch: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    evaluate_every: int = 0
    eval_pairs: int = 200
    limit: int | None = None
    max_new_tokens: int = 64
    sample_temperature: float = 1.0
    top_k: int = 30
    top_p: float = 1.0
    beams: int = 4
    online_teacher: bool = False
    samples: str | None = None
    vllm_url: str | None = None
    tokenizer: str | None = None
    k: int = 64
    tail: str = "bucket"
    freeze_embeddings: bool = False
    bf16: bool = False
    tensor_parallel: int = 1
    ddp_timeout: int = 1800
    prompt_column: str = "prompt"
    target_column: str = "target"
    seed: int = 0

    def halves(self) -> tuple[Half, ...]:
        """The objective."""
        return (
            mixture(self.divergence, **self.shares_by_source()) if self.divergence else method(self.method, self.beta)
        )

    def name(self) -> str:
        """Of the objective, for people."""
        return f"{self.divergence} on {self.shares or 'gold'}" if self.divergence else self.method

    def shares_by_source(self) -> dict[str, float]:
        """`shares` as numbers."""
        try:
            return {k: float(v) for k, v in (part.split("=") for part in (self.shares or "gold=1").split(","))}
        except ValueError:
            raise ValueError(f"--shares must be as in student=0.7,gold=0.3, not {self.shares!r}") from None

    def sampling(self, beams: bool = False) -> Sampling:
        """Of the teacher's stored samples, or its beam-search outputs."""
        if beams:
            return Sampling(self.max_new_tokens, beams=self.beams)
        return Sampling(self.max_new_tokens, self.sample_temperature, self.top_k, self.top_p)


JobKind = TypeVar("JobKind", bound=Job)

HELP = {
    "teacher": "folder or hub name of the teacher; or a store's folder (`fdistill teacher build`), or a server's URL",
    "tokenizer": "folder or hub name; default: the teacher's, of a server the student's",
    "k": "log-probabilities of each token that a server is asked for",
    "tail": "of lists: " + ", ".join(t for t in TAILS if t != "sampled"),
    "student": "folder or hub name of the student",
    "student_layers": "make the student of the teacher's layers: 3,1 (encoder,decoder) or 4 (causal)",
    "data": ".jsonl, .tsv or .parquet with prompt and target",
    "eval_data": "held-out pairs; default: the last of the data",
    "out": "the run's folder", "method": ", ".join(METHODS), "beta": "weight of the student's half in js and tvd",
    "divergence": "instead of the method: any of `fdistill list`, on the sequences that --shares says",
    "shares": "of teacher, student, gold and beam sequences, as in student=0.7,gold=0.3",
    "predistill_steps": "steps of pre-distillation first", "evaluate_every": "steps; 0: at the end",
    "limit": "use the first pairs of the data alone", "online_teacher": "draw teacher samples anew at every step",
    "batch": "pairs a step, in each process",
    "tensor_parallel": "ranks that share each of the student's layers and its head; such groups share the weights by "
    "FSDP2; a run that is killed begins anew",
    "ddp_timeout": "seconds that a rank waits for the others before it gives up",
    "samples": "folder of the teacher's samples, for several runs to share; default: inside the run's folder",
    "vllm_url": "a vLLM server of the teacher, to draw its samples from", "beams": "of the teacher's outputs for seqkd",
}  # fmt: skip


#: What `evaluate` uses of train's arguments.
USED = ("teacher", "student", "data", "limit", "prompt_column", "target_column", "eval_data", "eval_pairs",
        "max_new_tokens", "sample_temperature", "top_k", "top_p", "seed")  # fmt: skip


def add_arguments(
    parser: argparse.ArgumentParser, used: Sequence[str] | None = None, kind: type[Job] = Job,
    words: dict[str, str] = HELP,
) -> None:  # fmt: skip
    """The fields of a kind of `Job` that a command uses, and --config FILE with any of them; the command line wins."""
    parser.add_argument("--config", metavar="FILE", help="YAML of these arguments, as a run's config.yaml")
    parser.set_defaults(**{field.name: None for field in fields(kind)})
    for field in (f for f in fields(kind) if used is None or f.name in used):
        name, default = "--" + field.name.replace("_", "-"), field.default
        help = words.get(field.name, field.name.replace("_", " "))
        if default not in (None, "") and "default:" not in help:
            help += f" (default: {default})"
        if isinstance(default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            of: Any = {"int | None": int, "int": int, "float": float}.get(str(field.type), str)
            parser.add_argument(name, type=of, default=None, help=help, metavar=str(of.__name__).upper())


def job_of(args: argparse.Namespace, kind: type[JobKind] = Job) -> JobKind:  # type: ignore[assignment]
    """The arguments over the YAML file over the defaults.

    Raises:
        ValueError: an unknown key, or a teacher, student or data missing.
    """
    settings: dict[str, Any] = {}
    if args.config:
        settings = yaml.safe_load(Path(args.config).read_text()) or {}
        unknown = set(settings) - {f.name for f in fields(kind)}
        if unknown:
            raise ValueError(f"{args.config} has unknown keys: {', '.join(sorted(unknown))}")
    settings |= {f.name: getattr(args, f.name) for f in fields(kind) if getattr(args, f.name) is not None}
    job = kind(**settings)
    if not job.teacher or not job.data:
        raise ValueError("--teacher and --data are needed")
    job.halves()
    _check_numbers(job)
    return job


#: The least value of each of a job's numbers.
LEAST = {
    "steps": 1, "predistill_steps": 0, "batch": 1, "warmup_steps": 0, "evaluate_every": 0, "eval_pairs": 1, "limit": 1,
    "max_new_tokens": 1, "top_k": 0, "beams": 1, "k": 1, "tensor_parallel": 1, "ddp_timeout": 1,
}  # fmt: skip


def _check_numbers(job: Job) -> None:
    """Raises ValueError for a field of another kind than it is, as YAML may have, or a number that is too small."""
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in fields(job):
        value, name = getattr(job, field.name), "--" + field.name.replace("_", "-")
        if value is None:
            continue
        kind = kinds[str(field.type).removesuffix(" | None")]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {field.type}, not {value!r}")
        if field.name in LEAST and value < LEAST[field.name]:
            raise ValueError(f"{name} must be at least {LEAST[field.name]}, not {value}")


def device() -> torch.device:
    """Where this process's models go: its card, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def teacher_for(job: Job) -> tuple[Teacher, Any, Any]:
    """A job's teacher, its tokenizer, and the configuration that text is tokenized for."""
    if job.teacher.startswith(("http://", "https://")):
        if not job.student:
            raise ValueError("a server's teacher needs --student")
        config = AutoConfig.from_pretrained(job.student)
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer or job.student)
        vocabulary = config.get_text_config().vocab_size
        kept = Path(job.samples or job.out) / "endpoint"
        endpoint = Endpoint(job.teacher, vocabulary=vocabulary, k=job.k, store=kept)
        if endpoint.tokenizer not in (None, tokenizer_hash(tokenizer)):
            raise ValueError(f"{job.teacher} has another tokenizer than {job.tokenizer or job.student}")
        return Served(endpoint, job.tail), tokenizer, config
    if is_store(job.teacher):
        return _stored_teacher(job)
    if type(job) is Job and (job.tail != Job.tail or job.k != Job.k):
        raise ValueError("--tail and --k are of lists, which the teacher's own weights need none of")
    teacher = teacher_of(job.teacher)
    assert isinstance(teacher, InRoom)
    return teacher, AutoTokenizer.from_pretrained(job.tokenizer or job.teacher), teacher.model.config


def _stored_teacher(job: Job) -> tuple[Stored, Any, Any]:
    """A store, with its tokenizer and configuration, or the student's where it has none: one that readers filled."""
    ignored = [f"--{n.replace('_', '-')}" for n in ("samples", "vllm_url", "online_teacher", "k")
               if getattr(job, n) != getattr(Job, n)]  # fmt: skip
    if ignored:
        raise ValueError(f"{', '.join(ignored)}: not beside a store, which draws nothing and has its own samples and k")
    teacher = Stored(TeacherStore(job.teacher), job.tail)
    folder, tokenizer_of = teacher.store.folder, job.tokenizer
    if tokenizer_of is None and not (folder / "tokenizer").exists() and not job.student:
        raise ValueError(f"{folder} has no tokenizer: give --tokenizer, or a --student that has it")
    own = folder / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of or (own if own.exists() else job.student))
    if tokenizer_hash(tokenizer) != teacher.store.key.get("tokenizer", tokenizer_hash(tokenizer)):
        raise ValueError(f"{tokenizer_of} is not the tokenizer that {job.teacher} was made with")
    configured = folder if (folder / "config.json").exists() else job.student
    if configured is None:
        raise ValueError(f"{folder} has no config.json: give --student, whose configuration is then taken")
    return teacher, tokenizer, AutoConfig.from_pretrained(configured)


def rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Run:
    """A job's models, data and folder."""

    def __init__(self, job: Job, console: Console):
        self.job, self.console, self.folder = job, console, Path(job.out)
        set_seed(job.seed)
        columns = (job.prompt_column, job.target_column)
        pairs = read_pairs(job.data, job.limit, columns)
        if job.eval_data:
            held_out = read_pairs(job.eval_data, job.eval_pairs, columns)
        else:
            count = min(job.eval_pairs, max(1, len(pairs) // 10))
            held_out = pairs.select(range(len(pairs) - count, len(pairs)))
            pairs = pairs.select(range(max(1, len(pairs) - count)))
        self.references = held_out["target"][:]
        self.teacher, self.tokenizer, config = teacher_for(job)
        self.model = self.teacher.model if isinstance(self.teacher, InRoom) else None
        self.device = device()
        if isinstance(self.teacher, InRoom):
            self.teacher.to(self.device)
        self.pairs, self.held_out = (
            tokenize(rows, self.tokenizer, config, job.max_new_tokens) for rows in (pairs, held_out)
        )

    def start(self) -> None:
        """Makes the folder, or checks that it is of the same job."""
        path = self.folder / "config.yaml"
        if is_store(self.folder):
            raise ValueError(f"{self.folder} is a store: give a run another --out")
        asked = vars(self.job)
        if path.exists():
            known = vars(Job()) | yaml.safe_load(path.read_text())
            differ = [f"{k} was {known[k]!r} and is {v!r}" for k, v in asked.items() if known[k] != v]
            if differ:
                raise ValueError(f"{self.folder} holds another run: {'; '.join(differ)}")
            self.console.print(f"going on with {self.folder}")
        elif rank()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, yaml.safe_dump(asked, sort_keys=False).encode())

    def samples(self) -> Any:
        """The training pairs with the teacher's stored samples, drawn where they are missing."""
        sources = {half.source for half in self.job.halves()}
        beams = "beam" in sources
        if not sources & {"teacher", "beam"} or self.job.online_teacher:
            return self.pairs
        return self.pairs.add_column("sample_ids", self.drawn(beams).load())

    def drawn(self, beams: bool) -> TeacherSamples:
        """The teacher's stored samples or beams of the training pairs, all of them."""
        name, sampling = "teacher_beams" if beams else "teacher_samples", self.job.sampling(beams)
        folder, prompts = Path(self.job.samples or self.folder) / name, self.pairs[self.teacher_prompts()][:]
        if is_store(folder.parent):  # which may grow: other prompts have other samples
            folder = folder.with_name(f"{name}-{data_hash(prompts)}")
        if isinstance(self.teacher, Stored):
            kept, made = self.teacher.store.folder / f"{name}-{data_hash(prompts)}", self.teacher.store.extra
            return TeacherSamples.kept(kept, prompts, made.get("job", {}))
        source: Any = Server(self.job.vllm_url, self.job.teacher) if self.job.vllm_url else self.model
        mark, settings = self.job.teacher, {}
        if self.model is not None:
            mark, settings = fingerprint(self.model), generation_settings(self.model, sampling)
        elif source is None:
            assert isinstance(self.teacher, Served)
            source, mark = self.teacher.endpoint, self.teacher.endpoint.fingerprint or mark
        store = TeacherSamples(folder, prompts, sampling, mark, self.job.seed, settings)
        if store.missing():
            with Progress(console=self.console) as bar:
                task = bar.add_task("teacher samples", total=len(self.pairs))
                for done in store.fill(source, *rank(), vocabulary=len(self.tokenizer)):
                    bar.update(task, completed=done)
            while store.missing():  # other ranks draw; no collective waits for hours
                time.sleep(1)
        return store

    def student(self) -> Any:
        """The student to start from, pre-distilled if asked."""
        job, made, split = self.job, self.folder / "predistilled", self.job.tensor_parallel
        if split > 1:
            join(job.ddp_timeout)
        if (made / "config.json").exists():
            return load_model(made, split)
        if self.model is None and (job.student_layers or job.predistill_steps):
            raise ValueError("--student-layers and --predistill-steps need the teacher's own weights: give its folder")
        if job.student_layers and split > 1:
            raise ValueError("--tensor-parallel splits a student as it is loaded: give its folder as --student")
        if job.student_layers:
            student = copy_layers(self.model, *(int(n) for n in job.student_layers.split(",")))
        elif job.student:
            student = load_model(job.student, split).float()  # what the optimizer adds to is float32, also with --bf16
            check_vocabularies(AutoTokenizer.from_pretrained(job.student), self.tokenizer)
        else:
            raise ValueError("--student or --student-layers is needed")
        if job.predistill_steps:
            self.train(student, self.pairs, "predistill", job.predistill_steps, made)
            student = load_model(made, split)
        return student

    def train(self, student: Any, pairs: Any, stage: str, steps: int, into: Path) -> None:
        """One stage of training, from its last checkpoint if there is one, until its student is in a folder."""
        job, folder = self.job, self.folder / f"trainer-{stage}"
        every = job.evaluate_every or steps
        config = FDistillConfig(
            str(folder), method="predistill" if stage == "predistill" else job.method, beta=job.beta,
            divergence=None if stage == "predistill" else job.divergence,
            shares=job.shares_by_source() if job.divergence else None, max_steps=steps,
            per_device_train_batch_size=job.batch, per_device_eval_batch_size=32, learning_rate=job.learning_rate,
            warmup_steps=min(job.warmup_steps, steps // 4),
            eval_strategy="steps", eval_steps=every,
            save_strategy="steps" if job.tensor_parallel == 1 else "no",  # else no optimizer is saved
            save_steps=min(every, max(1, steps // 4)),
            save_total_limit=1, logging_steps=max(1, steps // 50), report_to=[], seed=job.seed, bf16=job.bf16,
            max_new_tokens=job.max_new_tokens, sample_temperature=job.sample_temperature, top_k=job.top_k,
            top_p=job.top_p, freeze_embeddings=job.freeze_embeddings, weight_decay=0.0,
            use_cpu=not torch.accelerator.is_available(),  # else ranks without a card would train apart
            ddp_timeout=job.ddp_timeout,
            **BY_LENGTH,
        )  # fmt: skip
        trainer = FDistillTrainer(student, self.teacher, config, train_dataset=pairs, eval_dataset=self.held_out,
                                  processing_class=self.tokenizer)  # fmt: skip
        trainer.add_callback(_Log(self.folder / "metrics.jsonl", stage))
        if stage != "predistill" and job.evaluate_every:
            trainer.add_callback(Measures(self.model, *self.held_out_rows(), self.tokenizer, job.sampling(),
                                          trainer.log))  # fmt: skip
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of a sharded model, gathered
        model = trainer.accelerator.unwrap_model(trainer.model)
        if rank()[0] == 0 or getattr(model, "is_distributed_loading_by_transformers", False):  # which all ranks gather
            _save(model, into, self.tokenizer, weights)
        trainer.accelerator.wait_for_everyone()

    def held_out_rows(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[str]]:
        """Of the held-out pairs: prompts, the teacher's prompts, targets, and the targets' text."""
        names = ("prompt_ids", self.teacher_prompts(), "labels")
        prompts, teacher_prompts, targets = ([torch.tensor(x) for x in self.held_out[n][:]] for n in names)
        return prompts, teacher_prompts, targets, self.references

    def teacher_prompts(self) -> str:
        """The column of the prompts that the teacher sees."""
        return "teacher_prompt_ids" if "teacher_prompt_ids" in self.pairs.column_names else "prompt_ids"

    def measure(self, model: Any) -> dict[str, float]:
        """`metrics.evaluate` on the held-out pairs."""
        return evaluate(model, self.model, *self.held_out_rows(), self.tokenizer, self.job.sampling(), self.job.seed)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a kill left half written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found[::-1]:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())  # what the trainer writes last
            return str(path)
        if rank()[0] == 0:
            shutil.rmtree(path, ignore_errors=True)
    return None


class _Log(TrainerCallback):
    """Every log line as JSON, in one file; those after the checkpoint that a stage goes on from are taken out."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [line for line in logged(self.path) if line["stage"] != self.stage]
            kept += [{"stage": self.stage, **line} for line in state.log_history]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"stage": self.stage, **(logs or {}), "step": state.global_step}) + "\n")


def _save(model: Any, folder: Path, tokenizer: Any, weights: Any) -> None:
    """A model's folder, whole or not there."""
    partial, first = folder.with_name(folder.name + ".partial"), rank()[0] == 0
    try:
        model.save_pretrained(partial, state_dict=weights, is_main_process=first)
        if first:
            tokenizer.save_pretrained(partial)
            partial.replace(folder)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def train(job: Job, console: Console) -> dict[str, Any]:
    """The whole run; what results.json holds. Of other ranks than the first, nothing."""
    run = Run(job, console)
    run.start()
    results_file, folder = run.folder / "results.json", run.folder / "student"
    if results_file.exists():
        return json.loads(results_file.read_text())
    started = time.perf_counter()
    if not folder.exists():
        student = run.student()
        run.train(student, run.samples(), job.divergence or job.method, job.steps, folder)
    if rank()[0]:
        return {}
    unset_hf_deepspeed_config()  # the first rank alone reads the student, whole
    student = load_model(folder).to(run.device)
    results = {"method": job.name(), "parameters": student.num_parameters()}
    if run.model is not None:
        results["teacher_parameters"] = run.model.num_parameters()
    results |= run.measure(student)
    results["seconds"] = time.perf_counter() - started
    plot(run.folder, job)
    write_report(run.folder, job, results)
    write_whole(results_file, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _disk_is_full(error: BaseException | None, job: Job) -> bool:
    """Whether that is behind an error; torch.save and safetensors do not tell it by an OSError."""
    if Path(job.out).exists() and shutil.disk_usage(job.out).free < 1 << 16:
        return True
    while error is not None and "No space left" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def command(work: Callable[[Any, Console], Any], kind: type[Job] = Job) -> Callable[[argparse.Namespace], int]:
    """A command's exit status: 0; 2 with one line for bad input; 130 after Ctrl-C, to be gone on with."""

    def main(args: argparse.Namespace) -> int:
        console = Console(stderr=True, quiet=rank()[0] > 0)
        job = kind()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is kept at Ctrl-C is kept then, too
        try:
            job = job_of(args, kind)
            with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its logs
                results = work(job, console)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            return 130
        except Exception as error:
            if _disk_is_full(error, job):
                told = f"no space left on the disk ({str(error).splitlines()[0]}); with more the same command goes on"
            elif isinstance(error, (ValueError, OSError, FloatingPointError, yaml.YAMLError)):
                told = str(error)
            else:
                raise
            print(f"fdistill: {told}", file=sys.stderr)
            return 2
        if rank()[0]:
            return 0
        print(json.dumps(results, indent=1) if args.json else "\n".join(
            f"{k:20s} {v:.4f}" if isinstance(v, float) else f"{k:20s} {v}" for k, v in results.items()))  # fmt: skip
        return 0

    return main


def sample_teacher(job: Job, console: Console) -> dict[str, Any]:
    """Draws and stores what `train` would draw first."""
    run = Run(job, console)
    run.start()
    return {"prompts": len(run.samples()), "folder": str(run.folder)}


def evaluate_student(job: Job, console: Console) -> dict[str, Any]:
    """Every measure of --student on --eval-data or --data."""
    if not job.student:
        raise ValueError("--student is needed")
    run = Run(job, console)
    model = load_model(job.student)
    return run.measure(model.to(run.device))


WORK = {"train": train, "sample-teacher": sample_teacher, "evaluate": evaluate_student}
