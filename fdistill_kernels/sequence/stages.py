"""One run of a command: its teacher, its data, and what its stages do with them."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, set_seed

from ..teachers import Endpoint
from .asked_models import made_folder, teacher_for, tokenizer_of
from .batches import prompts_of_teacher
from .config import OF_PREDISTILLATION, idle
from .data import tokenize
from .generation import beginning, end_tokens
from .hashes import data_hash, fingerprint
from .loading import base_of, load_config, load_model
from .metrics import Measures, measured
from .models import ids_of_config
from .option_checks import check_used
from .options import Asked
from .ranks import device, rank, wait
from .reading import read_pairs
from .run_folder import Log, last_checkpoint, save_whole
from .samples import TeacherSamples, generation_settings, write_table
from .sampling import Sampling
from .teachers import InRoom, Served, Stored
from .teachers.given import is_store
from .tokenizers import check_ids, check_tokenizer, check_vocabularies, ids_of_tokenizer
from .trainer import FDistillConfig, FDistillTrainer

#: What torch.compile puts before the names of a model's weights.
COMPILED = "_orig_mod."


class Run:
    """One run of a command: its teacher, tokenizer, tokenized data and folder."""

    def __init__(self, asked: Asked, console: Console):
        self.asked, self.console, self.config = asked, console, asked.config
        self.folder, self.device = asked.folder, device(self.config.use_cpu)
        set_seed(self.config.seed)
        check_used(asked)
        pairs, held_out = self._read()
        of_student = load_config(asked.model.student, **asked.model.source()) if asked.model.student else None
        self.teacher, self.tokenizer, of_teacher = teacher_for(asked)
        self.model = self.teacher.model if isinstance(self.teacher, InRoom) else None
        if of_student is None:
            of_student = of_teacher
        else:
            self._check_pair(of_student)
        for whose, config in (("teacher", of_teacher), ("student", of_student)):
            check_ids(self.tokenizer, whose, ids_of_config(config))
        if isinstance(self.teacher, InRoom):
            self.teacher.to(self.device)
        self.pairs, self.held_out = self._tokenized(pairs, held_out, of_student, of_teacher)
        self._check_columns()

    def _read(self) -> tuple[Any, Any]:
        """The rows of --data and of --eval_data; None where one is not given."""
        data, pairs, held_out = self.asked.data, None, None
        columns = data.prompt_column, data.target_column
        if data.data:
            pairs = read_pairs(data.data, data.limit, columns, data.dataset_config, data.dataset_train_split)
        if data.eval_data:
            limit = data.limit if self.asked.command == "evaluate" else data.eval_pairs
            held_out = read_pairs(data.eval_data, limit, columns, data.dataset_config, data.dataset_test_split)
        return pairs, held_out

    def _tokenized(self, pairs: Any, held_out: Any, of_student: Any, of_teacher: Any) -> tuple[Any, Any]:
        """The training rows and the held-out rows as token ids, for the models of two configurations."""
        data, speaker = self.asked.data, self._speaker(of_student)

        def ids(rows: Any, name: Any, numbered: bool = False) -> Any:
            return tokenize(
                rows, self.tokenizer, of_student, data.max_target_tokens, teacher=of_teacher, name=str(name),
                new_tokens=self.config.max_new_tokens, long_prompts=data.long_prompts, long_targets=data.long_targets,
                answers=data.answers, teacher_system=data.teacher_system, tell=self.console.print, numbered=numbered,
                ends=self.teacher.ends() or end_tokens(speaker),
                begins=beginning(speaker) if of_teacher.is_encoder_decoder else (),
            )  # fmt: skip

        if held_out is not None:
            return None if pairs is None else ids(pairs, data.data), ids(held_out, data.eval_data)
        rows = ids(pairs, data.data, numbered=True)
        if len(rows) == 1 and self.asked.command == "train":
            raise ValueError(f"{data.data} gives one row, which cannot be held out and trained on: give more, or "
                             "--eval_data")  # fmt: skip
        count = min(data.eval_pairs, max(1, len(rows) // 10)) if self.asked.command != "evaluate" else len(rows)
        begin = _border(rows["row"][:], len(rows) - count)
        rows = rows.remove_columns("row")
        return rows.select(range(max(1, begin))), rows.select(range(begin, len(rows)))

    def _speaker(self, of_student: Any) -> Any:
        """Who has the configurations of generation: the teacher's model, or what the student's files say of it."""
        if self.model is not None:
            return self.model
        own, student, revision = None, self.asked.model.student, self.asked.model.revision
        with contextlib.suppress(OSError):  # there is no such file
            if student:  # an adapter has its base model's
                more: dict[str, Any] = {"revision": revision} if revision else {}
                own = GenerationConfig.from_pretrained(base_of(student) or student, **more)
        return SimpleNamespace(config=of_student, generation_config=own)

    def _check_pair(self, config: Any) -> None:
        """The student must be of the teacher's kind, and its tokenizer the same."""
        model = self.asked.model
        if bool(config.is_encoder_decoder) != self.teacher.encoder_decoder:
            raise ValueError(f"{model.student} and {model.teacher} must both be causal, or both encoder–decoder")
        if model.tokenizer is None or model.student != model.tokenizer:
            try:
                own = tokenizer_of(self.asked, model.student)
            except ValueError:
                if model.tokenizer is None:
                    raise
            else:
                check_vocabularies(own, self.tokenizer)

    def _check_columns(self) -> None:
        data, command = self.asked.data, self.asked.command
        if command != "sample-teacher" and "labels" not in self.held_out.column_names:
            raise ValueError(f"{data.eval_data or data.data} has prompts alone, and held-out rows need targets: give "
                             "--eval_data that has them, or --target_column that names theirs")  # fmt: skip
        if command == "evaluate":
            return
        one, other = ("teacher_prompt_ids" in rows.column_names for rows in (self.pairs, self.held_out))
        if one != other:
            raise ValueError(f"{data.data if other else data.eval_data} lacks the column teacher_prompt, which "
                             f"{data.eval_data if other else data.data} has")  # fmt: skip
        on_gold = any(half.source == "gold" for half in self.config.halves()) or self.asked.run.predistill_steps
        if command == "train" and on_gold and "labels" not in self.pairs.column_names:
            raise ValueError(f"the objective is on gold targets, and {data.data} has prompts alone: give "
                             "--target_column that names its targets, if it has any")  # fmt: skip
        builds_gold = command == "teacher build" and "gold" in self.asked.build.sequences
        if builds_gold and "labels" not in self.pairs.column_names:
            raise ValueError(f"--sequences {self.asked.build.sequences}: {data.data} has prompts alone, and no gold")

    def samples(self) -> Any:
        """The training rows with the teacher's stored samples; samples that are missing are drawn first."""
        rows, wanted = self.pairs, self.asked.drawn()
        for source in wanted if not self.asked.run.online_teacher else ():
            column = "beam_ids" if source == "beam" and len(wanted) > 1 else "sample_ids"
            rows = rows.add_column(column, self.drawn(source == "beam").load())
        return rows

    def drawn(self, beams: bool) -> TeacherSamples:
        """The teacher's samples (or beams) for all training rows; those that are missing are drawn and stored."""
        name, sampling = "teacher_beams" if beams else "teacher_samples", self.config.sampling(beams)
        prompts, folder = self.pairs[self.teacher_prompts()][:], Path(self.asked.run.samples or self.folder)
        in_store = f"{name}-{data_hash(prompts)}"  # which may grow: other prompts have other samples
        if isinstance(self.teacher, Stored):
            store = self.teacher.store
            return TeacherSamples.kept(store.folder / in_store, prompts, store.extra.get("job", {}))
        source, mark, settings = self._source(sampling)
        folder /= in_store if is_store(folder) else name
        samples = TeacherSamples(folder, prompts, sampling, mark, self.config.seed, settings)
        if samples.missing():  # else a server need not be there any more
            self._fill(samples, source, mark)
        return samples

    def _source(self, sampling: Sampling) -> tuple[Any, str, dict[str, Any]]:
        """The model or server that draws, its fingerprint or name, and its `generation_settings`."""
        source: Any = self.model
        if url := self.asked.run.vllm_url:
            own = None if self.model is None else str(self.asked.model.teacher)  # else that is another server's URL
            source = Endpoint(url, model=self.asked.model.served_model_name or own, vocabulary=self.teacher.vocabulary,
                              concurrency=32)  # fmt: skip
        if self.model is not None:
            return source, self.teacher_fingerprint, generation_settings(self.model, sampling)
        assert isinstance(self.teacher, Served)
        source = source or self.teacher.endpoint
        return source, source.fingerprint or source.model, {}

    def _fill(self, samples: TeacherSamples, source: Any, mark: str) -> None:
        """Draws the samples that are missing, each rank its share."""
        if self.asked.run.vllm_url:
            teacher = str(self.asked.model.teacher)
            check_tokenizer(source, self.tokenizer, teacher)
            if self.model is not None and source.fingerprint not in (None, mark):
                raise ValueError(f"--vllm_url: {source.url} serves another model than {teacher}, or it in another "
                                 "dtype or configuration, by its fingerprint")  # fmt: skip
        with Progress(console=self.console) as bar:
            task = bar.add_task("teacher samples", total=len(self.pairs))
            for done in samples.fill(source, *rank(), vocabulary=ids_of_tokenizer(self.tokenizer)):
                bar.update(task, completed=done)
        wait(samples.missing, 1.0)  # other ranks draw; no collective waits for hours

    @functools.cached_property
    def teacher_fingerprint(self) -> str:
        """The fingerprint of the teacher's weights, which reads every byte of them, once."""
        return fingerprint(self.model)

    def trainer(self, student: Any, rows: Any, stage: str) -> FDistillTrainer:
        """The trainer of a stage, with its own folder for checkpoints."""
        settings: dict[str, Any] = {"hub_model_id": self.folder.name, **self.asked.training,
                                    "output_dir": str(self.folder / f"trainer-{stage}")}  # fmt: skip
        if self.asked.run.tensor_parallel > 1:
            settings["save_strategy"] = "no"  # transformers saves no optimizer of a model that is split as it is loaded
            settings = {name: value for name, value in settings.items() if name not in idle(settings)}
        first = self.asked.run.predistill_steps if stage == "predistill" else 0  # else it is the method itself
        if not first and self.asked.run.predistill_steps:
            settings = {name: value for name, value in settings.items() if name not in OF_PREDISTILLATION}
        config = FDistillConfig(**settings)
        if first:
            best = {"metric_for_best_model": "loss", "greater_is_better": False} if config.metric_for_best_model else {}
            unpushed = dict(push_to_hub=False, hub_strategy=FDistillConfig.hub_strategy, hub_always_push=False)
            config = config.for_predistillation(max_steps=first, **unpushed, **best)
        try:
            trainer = FDistillTrainer(student, self.teacher, config, train_dataset=rows, eval_dataset=self.held_out,
                                      processing_class=self.tokenizer)  # fmt: skip
        except (ImportError, RuntimeError) as error:  # a package that --report_to or --optim names
            raise ValueError(str(error)) from error
        trainer.add_callback(Log(self.folder / "metrics.jsonl", stage))
        if not first and self.asked.run.eval_measures:
            trainer.add_callback(Measures(trainer.log, self.model, *self.held_out_rows(), self.tokenizer,
                                          self.config.sampling()))  # fmt: skip
        return trainer

    def fit(self, trainer: FDistillTrainer, into: Path) -> None:
        """Trains, from the last checkpoint if there is one, and saves the student, unless a signal has ended it."""
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(trainer.args.output_dir))))
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        # of a sharded model, whole; of ZeRO-3's on the first rank alone
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        weights = {name.replace(COMPILED, ""): value for name, value in gathered.items()}
        model = trainer.accelerator.unwrap_model(trainer.model)
        if rank()[0] == 0 or getattr(model, "is_distributed_loading_by_transformers", False):  # which all ranks gather
            save_whole(model, into, self.tokenizer, weights)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()

    def make(self, student: Any) -> None:
        """Makes `predistilled/`: the student after pre-distillation, or unchanged as the base model of an adapter."""
        made = made_folder(self.asked)
        if self.asked.run.predistill_steps:
            self.fit(self.trainer(student, self.pairs, "predistill"), made)
        elif rank()[0] == 0:
            save_whole(student, made, self.tokenizer)
        wait(lambda: not made.exists())  # the first rank writes

    def loaded(self, path: Any) -> Any:
        """Loads a student that is to be measured, onto this process's device."""
        student = load_model(path, **self.asked.model.options())
        return student if getattr(student, "is_quantized", False) else student.to(self.device)

    def held_out_rows(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[str]]:
        """The held-out rows as prompts, the teacher's prompts, first answers, and the text of these answers."""
        rows = self.held_out
        answers = rows["labels"][:]
        if "labels_mask" in rows.column_names:
            answers = [ids[: _end_of_first(mask)] for ids, mask in zip(answers, rows["labels_mask"], strict=True)]
        prompts, teacher_prompts, targets = ([torch.tensor(x) for x in ids] for ids in (
            rows["prompt_ids"][:], rows[self.teacher_prompts()][:], answers))  # fmt: skip
        return prompts, teacher_prompts, targets, rows["reference"][:]

    def teacher_prompts(self) -> str:
        """The name of the column that holds the teacher's prompts."""
        return prompts_of_teacher(self.held_out.column_names)

    def measure(self, model: Any, draws: int = 1, keep: bool = True) -> dict[str, float]:
        """The summary of `metrics.measured` on the held-out rows; keep: its table too, as sentences.parquet."""
        table, found = measured(model, self.model, *self.held_out_rows(), self.tokenizer, self.config.sampling(),
                                self.config.seed, draws)  # fmt: skip
        if keep:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_table(table, self.folder / "sentences.parquet")
        return found


def _border(numbers: list[int], begin: int) -> int:
    """Where to cut answers, at `begin` or before it, between two conversations if there are two, by their numbers."""
    starts = [i for i, number in enumerate(numbers) if i and number != numbers[i - 1]]
    before = [i for i in starts if i <= begin]
    return (before[-1:] or starts[:1] or [begin])[0] if begin else 0


def _end_of_first(mask: list[bool]) -> int:
    """Where the first stretch that counts ends; what comes before it, as empty thoughts, is written too."""
    begin = mask.index(True) if True in mask else 0
    return next((i for i in range(begin, len(mask)) if not mask[i]), len(mask))
