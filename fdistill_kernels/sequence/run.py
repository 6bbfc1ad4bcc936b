"""The commands `fdistill train`, `sample-teacher` and `evaluate`: from two models and data to a student and a report.

A run is a folder with config.yaml (the options), data.json (hashes of the data), teacher_samples/, predistilled/ (the
student that training starts from), trainer-*/ (checkpoints), metrics.jsonl, student/, curves.png, report.html,
sentences.parquet (outputs and measures of each held-out row) and results.json. A stage whose result exists is not
repeated. So the same command continues a run that was killed, and with more steps also a finished one. Under torchrun
or accelerate launch, the ranks share the sampling and the training, and the first rank writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..provenance import as_json
from ..teachers import Endpoint, TeacherStore
from ..teachers.files import write_whole
from .arguments import LENGTHS, Asked, ask, how_long, load_yaml, without_secrets
from .batches import prompts_of_teacher
from .config import OF_PREDISTILLATION
from .data import read_pairs, tokenize
from .generation import beginning, check_search, end_tokens, token_id
from .hashes import data_hash, fingerprint, tokenizer_hash
from .loading import load_config, load_model, load_student, read_json
from .metrics import Measures, measured
from .models import vocabulary_of
from .predistill import copy_layers
from .ranks import device, join, rank
from .report import logged, name_of, plot, write_report
from .samples import TeacherSamples, generation_settings, write_table
from .teachers import InRoom, Served, Stored, Teacher
from .teachers.given import is_store, is_url
from .tokenizers import check_tokenizer, check_vocabularies, ids_of_tokenizer, load_tokenizer
from .trainer import FDistillConfig, FDistillTrainer

#: Options of checkpoints.
SAVING = ("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end")
#: What the hub's client raises; lost connections are no OSError in all of its versions.
OF_HUB = HfHubHTTPError.__bases__[0]
#: What torch.compile puts before the names of a model's weights.
COMPILED = "_orig_mod."


def tokenizer_of(asked: Asked, path: Any, revision: str | None = None) -> Any:
    """Loads the tokenizer of a folder or hub name, and gives it the template of --chat_template_path, if any."""
    options = {"revision": revision} if revision else {}
    tokenizer = load_tokenizer(path, trust_remote_code=asked.model.trust_remote_code, **options)
    if asked.model.chat_template_path:
        tokenizer.chat_template = Path(asked.model.chat_template_path).read_text(encoding="utf-8")
    return tokenizer


def teacher_for(asked: Asked) -> tuple[Teacher, Any, Any]:
    """Returns the teacher, its tokenizer, and the model configuration that text is tokenized for."""
    model, run = asked.model, asked.run
    assert model.teacher is not None
    if is_url(model.teacher):
        if not model.student:
            raise ValueError("a server's teacher needs --student")
        config = load_config(model.student, **model.source())
        tokenizer = tokenizer_of(asked, model.tokenizer or model.student, model.revision)
        kept = Path(run.samples or asked.config.output_dir or "") / "endpoint"
        endpoint = Endpoint(model.teacher, vocabulary=vocabulary_of(config), k=run.k, store=kept, padded=True)
        check_tokenizer(endpoint, tokenizer, model.tokenizer or model.student)
        halves = asked.config.halves() if asked.command == "train" else ()
        if halves and (asked.config.eval_strategy != "no" or any(half.divergence is not None for half in halves)):
            endpoint.check()
        return Served(endpoint, run.tail), tokenizer, config
    if is_store(model.teacher):
        return _stored_teacher(asked)
    teacher = InRoom(load_model(model.teacher, **model.options("teacher_")))
    tokenizer = tokenizer_of(asked, model.tokenizer or model.teacher, model.teacher_revision)
    return teacher, tokenizer, teacher.model.config


def _stored_teacher(asked: Asked) -> tuple[Stored, Any, Any]:
    """Returns a store as the teacher, with its tokenizer and configuration.

    A store that was filled by a reader has neither; then they are the student's.
    """
    model = asked.model
    assert model.teacher is not None
    teacher = Stored(TeacherStore(model.teacher), asked.run.tail)
    folder = teacher.store.folder
    own = folder / "tokenizer"
    source = model.tokenizer or (own if own.exists() else model.student)
    if source is None:
        raise ValueError(f"{folder} has no tokenizer: give --tokenizer, or a --student that has it")
    tokenizer = tokenizer_of(asked, source)
    mark = tokenizer_hash(tokenizer)
    if mark != teacher.store.key.get("tokenizer", mark):
        raise ValueError(f"{source} is not the tokenizer that {model.teacher} was made with")
    configured = folder if (folder / "config.json").exists() else model.student
    if configured is None:
        raise ValueError(f"{folder} has no config.json: give --student, whose configuration is then taken")
    return teacher, tokenizer, load_config(configured, **model.source())


def stage_of(config: FDistillConfig) -> str:
    """The objective of a configuration, in a form that can be part of a folder's name."""
    return re.sub(r"[^\w.=,]+", "-", str(config.divergence or config.method)).strip("-")


class Run:
    """One run of a command: its teacher, tokenizer, tokenized data and folder."""

    def __init__(self, asked: Asked, console: Console):
        self.asked, self.console, self.config = asked, console, asked.config
        self.folder, self.device = Path(str(self.config.output_dir)), device(self.config.use_cpu)
        set_seed(self.config.seed)
        model, data = asked.model, asked.data
        columns, limit, alone = (data.prompt_column, data.target_column), data.limit, asked.command == "evaluate"
        if alone and data.data and data.eval_data:
            raise ValueError("evaluate measures one file: give --data or --eval_data")
        self._check_used()
        pairs: Any = None
        held_out: Any = None
        if data.data:
            pairs = read_pairs(data.data, limit, columns, data.dataset_config, data.dataset_train_split)
        if data.eval_data:
            limit = limit if alone else data.eval_pairs
            held_out = read_pairs(data.eval_data, limit, columns, data.dataset_config, data.dataset_test_split)
        self.teacher, self.tokenizer, config = teacher_for(asked)
        self.model = self.teacher.model if isinstance(self.teacher, InRoom) else None
        of_student = config
        if model.student:
            of_student = load_config(model.student, **model.source())
            self._check_pair(of_student)
        if isinstance(self.teacher, InRoom):
            self.teacher.to(self.device)

        speaker = self._speaker(of_student)

        def ids(rows: Any, name: Any) -> Any:
            return tokenize(
                rows, self.tokenizer, of_student, data.max_target_tokens, teacher=config, name=str(name),
                new_tokens=self.config.max_new_tokens, long_prompts=data.long_prompts, long_targets=data.long_targets,
                answers=data.answers, teacher_system=data.teacher_system, tell=console.print,
                ends=end_tokens(token_id(speaker, "eos_token_id")),
                begins=beginning(speaker) if config.is_encoder_decoder else (),
            )  # fmt: skip

        rows: Any = pairs if pairs is None else ids(pairs, data.data)
        if held_out is not None:
            self.pairs, self.held_out = rows, ids(held_out, data.eval_data)
        else:
            count = len(rows) if alone else min(data.eval_pairs, max(1, len(rows) // 10))
            self.held_out = rows.select(range(len(rows) - count, len(rows)))
            self.pairs = rows.select(range(max(1, len(rows) - count)))
        self._check_columns()

    def _speaker(self, of_student: Any) -> Any:
        """Who has the configurations of generation: the teacher's model, or what the student's files say of it."""
        if self.model is not None:
            return self.model
        own, student = None, self.asked.model.student
        with contextlib.suppress(OSError):  # there is no such file
            own = GenerationConfig.from_pretrained(student) if student else None
        return SimpleNamespace(config=of_student, generation_config=own)

    def _check_pair(self, config: Any) -> None:
        """The student must be of the teacher's kind, and its tokenizer the same."""
        model = self.asked.model
        if bool(config.is_encoder_decoder) != self.teacher.encoder_decoder:
            raise ValueError(f"{model.student} and {model.teacher} must both be causal, or both encoder–decoder")
        if model.tokenizer is None or model.student != model.tokenizer:
            try:
                own = tokenizer_of(self.asked, model.student, model.revision)
            except ValueError:
                if model.tokenizer is None:
                    raise
            else:
                check_vocabularies(own, self.tokenizer)

    def _check_columns(self) -> None:
        data, command = self.asked.data, self.asked.command
        if command != "sample-teacher" and "labels" not in self.held_out.column_names:
            raise ValueError(f"{data.eval_data or data.data} has prompts alone, and held-out rows need targets: give "
                             "--eval_data that has them")  # fmt: skip
        if command == "evaluate":
            return
        one, other = ("teacher_prompt_ids" in rows.column_names for rows in (self.pairs, self.held_out))
        if one != other:
            raise ValueError(f"{data.data if other else data.eval_data} lacks the column teacher_prompt, which "
                             f"{data.eval_data if other else data.data} has")  # fmt: skip
        on_gold = any(half.source == "gold" for half in self.config.halves()) or self.asked.run.predistill_steps
        if command == "train" and on_gold and "labels" not in self.pairs.column_names:
            raise ValueError(f"the objective is on gold targets, and {data.data} has prompts alone")

    def _check_used(self) -> None:
        """Raises ValueError for options that are given and that such a run makes nothing of."""
        asked, sources, builds = self.asked, self.sources(), self.asked.command == "teacher build"
        served, stored = is_url(asked.model.teacher), is_store(str(asked.model.teacher))
        if asked.command == "sample-teacher" and (stored or not sources):
            asks = f"{name_of(self.config)} asks for no sequences of the teacher"
            raise ValueError(f"{'a store has its own samples' if stored else asks}: there is nothing to draw")
        drawing = {"samples", "vllm_url", "online_teacher"}
        saving = {*SAVING} - ({"save_strategy"} if asked.given.get("save_strategy") == "no" else set())
        unused = (
            (stored, {*drawing, "k"}, "a store draws nothing and has its own samples and k"),
            (not (served or stored or builds), {"k", "tail"}, "the teacher's own weights need no lists"),
            (served or stored, {"teacher_dtype", "teacher_revision", "teacher_quantization", "device_map"},
             "the teacher's weights are not loaded"),
            (not asked.model.student, {"revision", "quantization"}, "no --student is loaded"),
            (asked.run.online_teacher, {"samples", "vllm_url"}, "--online_teacher draws anew at every step"),
            (not sources and not builds, drawing - ({"samples"} if served else set()),
             "the objective is on no sequences that the teacher draws"),
            ("beam" not in sources and not builds, {"beams"}, "the objective is on no beams"),
            (asked.run.tensor_parallel > 1, saving, "a student that is split over ranks is saved at the end alone"),
            (asked.command == "sample-teacher", {"online_teacher"}, "samples that are kept are drawn once"),
            (self.config.method == "predistill", {"predistill_steps"}, "the method is pre-distillation itself"),
        )  # fmt: skip
        for here, names, why in unused:
            if here and (found := sorted(n for n in names if asked.given.get(n))):
                raise ValueError(f"--{', --'.join(found)}: not used, as {why}")

    def begin(self) -> None:
        """Makes the folder, or checks that it holds this run; called when everything else has been checked.

        Raises:
            ValueError: the folder belongs to another run, or was started with other data.
        """
        if is_store(self.folder):
            raise ValueError(f"{self.folder} is a store: give a run another --output_dir")
        path, of_data = self.folder / "config.yaml", self.folder / "data.json"
        asked = without_secrets(self.asked.given)
        known = ("prompt_ids", "labels", "labels_mask", "teacher_prompt_ids")
        read = {name: data_hash([ids for column in known if column in rows.column_names for ids in rows[column]])
                for name, rows in (("data", self.pairs), ("eval_data", self.held_out))}  # fmt: skip
        made = [*self.folder.glob("trainer-*/checkpoint-*"), self.folder / "predistilled", self.folder / "student"]
        binds = any(map(Path.exists, made))  # a start that came to nothing does not
        if not binds and rank()[0] == 0:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        if binds and path.exists():
            self._check_same(without_secrets(load_yaml(path)), asked)
            kept = read_json(of_data, "remove it, and trust that the data is the same") if of_data.exists() else {}
            if changed := [name for name, mark in kept.items() if mark != read[name]]:
                files = ", ".join(str(getattr(self.asked.data, name) or self.asked.data.data) for name in changed)
                raise ValueError(f"{files} is not the data that {self.folder} was begun with")
            self.console.print(f"going on with {self.folder}")
        if rank()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(of_data, json.dumps(read).encode())
            write_whole(path, yaml.safe_dump(asked, sort_keys=False).encode())

    def _check_same(self, known: dict[str, Any], asked: dict[str, Any]) -> None:
        """Settings must be the same, but for more steps or epochs, for which a finished student is trained on."""
        before, now = ({**self.asked.defaults, **s} for s in (known, asked))
        elsewhere = {"output_dir", "student_server", "student_server_path", *LENGTHS}
        differ = [(n, before.get(n), now.get(n)) for n in sorted({*known, *asked} - elsewhere)
                  if before.get(n) != now.get(n)]  # fmt: skip
        (of, was), (unit, wanted) = map(how_long, (known, asked))
        last = last_checkpoint(self.folder / f"trainer-{stage_of(self.config)}")
        if unit != of:  # it must go beyond where the run is
            state = json.loads(Path(last, "trainer_state.json").read_text()) if last else {}
            was = state.get(LENGTHS[unit], 0)
        if wanted < was:
            differ.append((unit, was, wanted))
        if differ:
            told = "; ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in differ)
            raise ValueError(f"{self.folder} holds another run: {told}")
        done = self.folder / "student"
        if last and self.config.save_only_model and (wanted > was or not done.exists()):
            raise ValueError(f"{last} has no optimizer, as --save_only_model says: the run cannot go on from it")
        if wanted > was and done.exists():
            if last is None:
                raise ValueError(f"{unit} cannot grow: {self.folder} has no checkpoint")
            (self.folder / "results.json").unlink(missing_ok=True)
            shutil.rmtree(done)

    def samples(self) -> Any:
        """The training rows with the teacher's stored samples; samples that are missing are drawn first."""
        rows, wanted = self.pairs, self.sources()
        for source in wanted if not self.asked.run.online_teacher else ():
            column = "beam_ids" if source == "beam" and len(wanted) > 1 else "sample_ids"
            rows = rows.add_column(column, self.drawn(source == "beam").load())
        return rows

    def sources(self) -> list[str]:
        """The kinds of sequences in the objective that the teacher draws: "teacher", "beam", or both."""
        return sorted({half.source for half in self.config.halves()} & {"teacher", "beam"})

    def drawn(self, beams: bool) -> TeacherSamples:
        """The teacher's samples (or beams) for all training rows; those that are missing are drawn and stored."""
        run, teacher = self.asked.run, str(self.asked.model.teacher)
        name, sampling = "teacher_beams" if beams else "teacher_samples", self.config.sampling(beams)
        folder, prompts = Path(run.samples or self.folder) / name, self.pairs[self.teacher_prompts()][:]
        if is_store(folder.parent):  # which may grow: other prompts have other samples
            folder = folder.with_name(f"{name}-{data_hash(prompts)}")
        if isinstance(self.teacher, Stored):
            kept, made = self.teacher.store.folder / f"{name}-{data_hash(prompts)}", self.teacher.store.extra
            return TeacherSamples.kept(kept, prompts, made.get("job", {}))
        source: Any = self.model
        if run.vllm_url:
            source = Endpoint(run.vllm_url, model=teacher, vocabulary=self.teacher.vocabulary, concurrency=32)
        mark, settings = teacher, {}
        if self.model is not None:
            mark, settings = self.teacher_fingerprint, generation_settings(self.model, sampling)
        else:
            assert isinstance(self.teacher, Served)
            source = source or self.teacher.endpoint
            mark = source.fingerprint or source.model
        store = TeacherSamples(folder, prompts, sampling, mark, self.config.seed, settings)
        if store.missing():  # else a server need not be there any more
            if run.vllm_url:
                check_tokenizer(source, self.tokenizer, teacher)
                if self.model is not None and source.fingerprint not in (None, mark):
                    raise ValueError(f"--vllm_url: {source.url} serves another model than {teacher}, or it in another "
                                     "dtype or configuration, by its fingerprint")  # fmt: skip
            with Progress(console=self.console) as bar:
                task = bar.add_task("teacher samples", total=len(self.pairs))
                for done in store.fill(source, *rank(), vocabulary=ids_of_tokenizer(self.tokenizer)):
                    bar.update(task, completed=done)
            while store.missing():  # other ranks draw; no collective waits for hours
                time.sleep(1)
        return store

    @functools.cached_property
    def teacher_fingerprint(self) -> str:
        """The fingerprint of the teacher's weights, which reads every byte of them, once."""
        return fingerprint(self.model)

    def to_make(self) -> bool:
        """Whether `predistilled/` must still be made: by pre-distillation, or as the base model of an adapter."""
        run, model = self.asked.run, self.asked.model
        wanted = run.predistill_steps or (model.student_layers and self.asked.lora.use_peft)
        return bool(wanted) and not (self.folder / "predistilled").exists()

    def student(self) -> Any:
        """Loads or makes the student: the pre-distilled one if there is one, with a new adapter if asked for."""
        model, made, split = self.asked.model, self.folder / "predistilled", self.asked.run.tensor_parallel
        if split > 1:
            join(self.asked.config.ddp_timeout)
            if model.student_layers:
                raise ValueError("--tensor_parallel splits a student as it is loaded: give its folder as --student")
        if self.model is None and (model.student_layers or self.asked.run.predistill_steps):
            raise ValueError("--student_layers and --predistill_steps need the teacher's own weights: give its folder")
        if made.exists():
            student = self._loaded(made)
        elif model.student_layers:
            student = copy_layers(self.model, *(int(n) for n in model.student_layers.split(",")))
            student = student if model.dtype == "auto" else student.to(getattr(torch, model.dtype))
        elif model.student:
            student = self._loaded(model.student)
        else:
            raise ValueError("--student or --student_layers is needed")
        return self._adapted(student) if self.asked.lora.use_peft and not self.to_make() else student

    def _loaded(self, path: str | Path) -> Any:
        return load_student(path, self.asked.run.tensor_parallel, **self.asked.model.options())

    def _adapted(self, student: Any) -> Any:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        set_seed(self.config.seed)  # the same adapter, whatever this process has drawn before
        if self.asked.model.quantization:
            student = prepare_model_for_kbit_training(student)
        asked = vars(self.asked.lora)
        named = {n.removeprefix("lora_") if n in ("lora_r", "lora_target_modules", "lora_modules_to_save") else n: v
                 for n, v in asked.items() if n != "use_peft"}  # fmt: skip
        if named["target_modules"] == ["all-linear"]:  # PEFT's word for what it is not in a list
            named["target_modules"] = "all-linear"
        kind = "SEQ_2_SEQ_LM" if student.config.is_encoder_decoder else "CAUSAL_LM"
        return get_peft_model(student, LoraConfig(task_type=kind, **named))

    def trainer(self, student: Any, rows: Any, stage: str) -> FDistillTrainer:
        """The trainer of a stage, with its own folder for checkpoints."""
        settings: dict[str, Any] = {"hub_model_id": self.folder.name, **self.asked.training,
                                    "output_dir": str(self.folder / f"trainer-{stage}")}  # fmt: skip
        if self.asked.run.tensor_parallel > 1:
            settings["save_strategy"] = "no"  # transformers saves no optimizer of a model that is split as it is loaded
        first = self.asked.run.predistill_steps if stage == "predistill" else 0  # else it is the method itself
        if not first and self.asked.run.predistill_steps:
            settings = {name: value for name, value in settings.items() if name not in OF_PREDISTILLATION}
        config = FDistillConfig(**settings)
        if first:
            best = {"metric_for_best_model": "loss", "greater_is_better": False} if config.metric_for_best_model else {}
            config = config.for_predistillation(max_steps=first, push_to_hub=False, **best)
        try:
            trainer = FDistillTrainer(student, self.teacher, config, train_dataset=rows, eval_dataset=self.held_out,
                                      processing_class=self.tokenizer)  # fmt: skip
        except (ImportError, RuntimeError) as error:  # a package that --report_to or --optim names
            raise ValueError(str(error)) from error
        trainer.add_callback(_Log(self.folder / "metrics.jsonl", stage))
        if not first and self.asked.run.eval_measures:
            trainer.add_callback(Measures(trainer.log, self.model, *self.held_out_rows(), self.tokenizer,
                                          self.config.sampling()))  # fmt: skip
        return trainer

    def fit(self, trainer: FDistillTrainer, into: Path) -> None:
        """Trains, from the last checkpoint if there is one, and saves the student into a folder."""
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(trainer.args.output_dir))))
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of a sharded model, whole
        weights = {name.replace(COMPILED, ""): value for name, value in gathered.items()}
        model = trainer.accelerator.unwrap_model(trainer.model)
        if rank()[0] == 0 or getattr(model, "is_distributed_loading_by_transformers", False):  # which all ranks gather
            save_whole(model, into, self.tokenizer, weights)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()

    def make(self, student: Any) -> None:
        """Makes `predistilled/`: the student after pre-distillation, or unchanged as the base model of an adapter."""
        made = self.folder / "predistilled"
        if self.asked.run.predistill_steps:
            self.fit(self.trainer(student, self.pairs, "predistill"), made)
        elif rank()[0] == 0:
            save_whole(student, made, self.tokenizer)
        while not made.exists():  # the first rank writes
            time.sleep(0.1)

    def loaded(self, path: Any) -> Any:
        """Loads a student that is to be measured, onto this process's device."""
        student = load_model(path, **self.asked.model.options())
        return student if getattr(student, "is_quantized", False) else student.to(self.device)

    def held_out_rows(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[str]]:
        """The held-out rows as prompts, the teacher's prompts, first answers, and the text of these answers."""
        rows = self.held_out
        answers = rows["labels"][:]
        if "labels_mask" in rows.column_names:
            answers = [ids[: mask.index(False) if False in mask else None]
                       for ids, mask in zip(answers, rows["labels_mask"], strict=True)]  # fmt: skip
        prompts, teacher_prompts, targets = ([torch.tensor(x) for x in ids] for ids in (
            rows["prompt_ids"][:], rows[self.teacher_prompts()][:], answers))  # fmt: skip
        return prompts, teacher_prompts, targets, rows["reference"][:]

    def teacher_prompts(self) -> str:
        """The name of the column that holds the teacher's prompts."""
        return prompts_of_teacher(self.held_out.column_names)

    def measure(self, model: Any, draws: int = 1, keep: bool = True) -> dict[str, float]:
        """Measures a model on the held-out rows by `metrics.measured`, with `draws` samples of the teacher.

        Returns the summary. If `keep`, sentences.parquet in the run's folder has a row for each sentence.
        """
        table, found = measured(model, self.model, *self.held_out_rows(), self.tokenizer, self.config.sampling(),
                                self.config.seed, draws)  # fmt: skip
        if keep:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_table(table, self.folder / "sentences.parquet")
        return found


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a folder, or None. Checkpoints that were only partly written are removed."""
    numbered = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    found = sorted((p for p, number in numbered.items() if number.isdecimal()), key=lambda path: int(numbered[path]))
    for path in found[::-1]:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())  # what the trainer writes last
            return str(path)
        if rank()[0] == 0:
            shutil.rmtree(path, ignore_errors=True)
    return None


class _Log(TrainerCallback):
    """Writes every log line to a file, as JSON, which has null for what is not finite.

    When a stage continues from a checkpoint, the lines that were logged after it are removed first.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [line for line in logged(self.path) if line["stage"] != self.stage]
            kept += [{"stage": self.stage, **line} for line in state.log_history]
            write_whole(self.path, "".join(as_json(line) + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(as_json({"stage": self.stage, **(logs or {}), "step": state.global_step}) + "\n")


def save_whole(model: Any, folder: Path, tokenizer: Any, weights: Any = None) -> None:
    """Saves a model and its tokenizer. The folder appears only when it is complete."""
    partial, first = folder.with_name(folder.name + ".partial"), rank()[0] == 0
    try:
        model.save_pretrained(partial, state_dict=weights, is_main_process=first)
        if first:
            tokenizer.save_pretrained(partial)
            partial.replace(folder)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def train(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill train`. Returns the content of results.json; on other ranks than the first, an empty dict."""
    run = Run(asked, console)
    results_file, folder, stage = run.folder / "results.json", run.folder / "student", stage_of(run.config)
    student = run.student()
    check_search(student)  # whose outputs are measured
    stored, making = isinstance(run.teacher, Stored), run.to_make()  # asked before the first rank makes it
    trainer = run.trainer(student, run.samples() if stored else run.pairs, stage)  # refuses, before any work
    with trainer.args.main_process_first(local=False):
        run.begin()
    if results_file.exists():
        return read_json(results_file, "remove it, and the same command measures anew")
    started = time.perf_counter()
    if not folder.exists():
        if making:
            run.make(student)
            trainer = run.trainer(run.student(), trainer.train_dataset, stage)
        trainer.train_dataset = trainer.train_dataset if stored else run.samples()
        run.fit(trainer, folder)
    if rank()[0]:
        return {}
    unset_hf_deepspeed_config()  # the first rank alone reads the student, whole
    student = run.loaded(folder)
    results = {"method": name_of(run.config), "parameters": student.num_parameters()}
    if run.model is not None:
        results["teacher_parameters"] = run.model.num_parameters()
    results |= run.measure(student)
    results["seconds"] = time.perf_counter() - started
    plot(run.folder, run.config)
    write_report(run.folder, asked, results)
    write_whole(results_file, (as_json(results, 1) + "\n").encode())
    return results


def sample_teacher(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill sample-teacher`: draws and stores the samples that `train` would draw first."""
    run = Run(asked, console)
    return {"prompts": len(run.samples()), "folder": str(run.asked.run.samples or run.folder)}


def evaluate_student(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill evaluate`: all measures of --student, TeacherDist too, on all rows of --data or --eval_data.

    With --output_dir the table of sentences is kept there.
    """
    if not asked.model.student:
        raise ValueError("--student is needed")
    run = Run(asked, console)
    return run.measure(run.loaded(asked.model.student), 5, "output_dir" in asked.given)


def _disk_is_full(error: BaseException | None, folder: Any) -> bool:
    """Whether an error was caused by a full disk, which torch.save and safetensors do not report as an OSError."""
    if folder and Path(folder).exists() and shutil.disk_usage(folder).free < 1 << 16:
        return True
    while error is not None and "No space left" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is a Ctrl-C inside: what is kept at one is kept at the other."""
    alone = threading.current_thread() is not threading.main_thread()  # where signals cannot be asked for
    before = None if alone else signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if not alone:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


WORK = {"train": train, "sample-teacher": sample_teacher, "evaluate": evaluate_student}


def main(command: str, argv: Sequence[str], work: Callable[[Asked, Console], dict[str, Any]] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 after one line on bad input, or 130 after Ctrl-C."""
    console, asked = Console(stderr=True, quiet=rank()[0] > 0), None
    try:
        asked = ask(command, argv)
        with contextlib.redirect_stdout(sys.stderr), _interruptible():  # the trainer prints its logs
            results = (work or WORK[command])(asked, console)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if _disk_is_full(error, asked and asked.training["output_dir"]):
            told = f"no space left on the disk ({str(error).splitlines()[0]}); with more the same command goes on"
        elif isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, yaml.YAMLError)):
            told = " ".join(str(error).split())
        elif isinstance(error, OF_HUB):
            told = f"the hub cannot be reached ({error})"
        else:
            raise
        print(f"fdistill: {told}", file=sys.stderr)
        return 2
    if rank()[0]:
        return 0
    print(as_json(results, 1) if asked.json else "\n".join(
        f"{k:20s} {v:.4f}" if isinstance(v, float) else f"{k:20s} {v}" for k, v in results.items()))  # fmt: skip
    return 0
