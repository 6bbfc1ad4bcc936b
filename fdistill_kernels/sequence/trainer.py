"""The trainer: `transformers.Trainer` with the objectives of sequence-level distillation."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..own import resolve
from ..sparse import WHOLE
from .batches import (
    ByLength,
    Sequences,
    check_contexts,
    collate,
    column_of,
    columns_of,
    datasets_of,
    given_sequences,
    of_example,
    prompts_of,
    prompts_of_teacher,
)
from .config import OF_PREDISTILLATION, FDistillConfig
from .forward import forward_to_head
from .generation import beginning, check_search, chosen, share_ends, special_tokens
from .loading import load_student, names_damage
from .losses import Rows, check_head, step_loss
from .models import ids_read, virtual_tokens, vocabulary_of
from .objectives import Half
from .predistill import predistillation_loss
from .probes import check_forward
from .ranks import copies_of_rows, from_first, is_of_ranks, own_noise, row_group
from .sampling import draw
from .student_server import StudentServer
from .teachers import InRoom, Itself, Mixture, OfRows, Served, Stored, teacher_of
from .teachers.itself import KeepAverage
from .teachers.several import parts_of
from .tokenizers import check_vocabularies, ids_of_tokenizer
from .watch import Watch, wide

__all__ = ["FDistillConfig", "FDistillTrainer", "Update", "check_vocabularies", "collate"]


#: What `Trainer` takes and has no place here, and what to do instead.
REFUSED = {
    "compute_metrics": "no logits are made: measure in a callback, as sequence.metrics.Measures does",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_loss_func": "the loss is the objective's: give a divergence of your own, or override step_loss",
    "model_init": "give the model itself",
}

NOT_AVERAGED = "Itself(decay=...) takes a student that is whole on each rank: not FSDP's or ZeRO-3's"

#: Options of `TrainingArguments` that only some optimizers are made with.
OF_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")


@dataclass
class Update:
    """What a batch needs to know about its update.

    Attributes:
        sequences: by source, the sequences of the batch: given, drawn, or kept from an earlier one.
        items: by source, the mean number of tokens or sequences in the update's batches, by which losses are divided.
        weight: a factor of the loss, with which `Trainer`'s division is by the number of the update's batches.
    """

    sequences: dict[str, Sequences]
    items: dict[str, Tensor]
    weight: float = 1.0


class FDistillTrainer(Trainer):
    """Distils `teacher` into `model` with the objective of `args`.

    Datasets have the columns prompt_ids and labels (the ids of the gold target, with its end token). They may have
    labels_mask (bool: which labels count), sample_ids or beam_ids (stored samples or beams of the teacher; without them
    they are drawn at every step), teacher_prompt_ids (another prompt for the teacher) and teacher. Or they have
    input_ids and labels, as in `collate`. Evaluation is the KL of the student from the teacher on gold targets, a mean
    over all tokens, at temperature 1 (of lists that allow one alone, at theirs).

    Each log has means since the last one, over all ranks. For each source of the objective: loss_on_SOURCE;
    student_entropy_on_SOURCE and teacher_entropy_on_SOURCE (nats, at the temperature of the loss); agreement_on_SOURCE
    (share of steps where both models have the same likeliest token); overlap_on_SOURCE (Σ min(p, q)); or, if the
    teacher gives lists, the masses and overlap of `SparseParts`. Also tokens_per_second (tokens with a loss),
    skipped_batches (how many, by on_nan, if any), and sampling_share and teacher_share (shares of the time; the latter
    without the teacher's head).

    Args:
        model: the student: a Hugging Face causal or encoder–decoder language model, possibly with PEFT adapters; or its
            path, which is loaded in float32.
        teacher: a model of the same kind, of any dtype or device, quantised or not, or its path; it is never trained.
            Or a `TeacherStore` or its path, which knows only the sequences in it; an `Endpoint`; or, from
            `sequence.teachers`, a `Mixture` of several, `OfRows` (one for each example, named by the column teacher),
            or `Itself`.
        processing_class, teacher_processing_class: tokenizers; if both are given they are compared.
        The rest: as in `transformers.Trainer`, except compute_metrics, preprocess_logits_for_metrics, compute_loss_func
            and model_init.

    Raises:
        ValueError, TypeError: before any work: an argument does not fit, or would not be used; the message names it.
    """

    args: FDistillConfig
    step_loss = staticmethod(step_loss)

    def __init__(self, model: Any, teacher: Any, args: FDistillConfig, *, processing_class: Any = None,
                 teacher_processing_class: Any = None, **trainer: Any):  # fmt: skip
        for name, instead in REFUSED.items():
            if trainer.get(name) is not None:
                raise ValueError(f"{name} is not used by FDistillTrainer: {instead}")
        if not isinstance(args, FDistillConfig):
            raise TypeError(f"args must be a FDistillConfig, not {type(args).__name__}")
        model = _student_of(model)
        ours, theirs = (p if hasattr(p, "get_vocab") else getattr(p, "tokenizer", p)  # a processor's
                        for p in (processing_class, teacher_processing_class))  # fmt: skip
        if ours is not None and theirs is not None:
            check_vocabularies(ours, theirs)
        _check_apart(model, teacher)
        self.teacher = teacher_of(teacher)
        for found in _models_of(self.teacher):
            _check_apart(model, found)
        if isinstance(self.teacher, Itself):
            if self.teacher.decay is not None and any(isinstance(m, FSDPModule) for m in model.modules()):
                raise ValueError(NOT_AVERAGED)
            self.teacher.bind(model)
        if self.teacher.encoder_decoder != bool(model.config.is_encoder_decoder):
            raise ValueError("teacher and student must both be causal, or both encoder–decoder")
        of_each = [beginning(m)[1] for m in (model, *_models_of(self.teacher)) if m.config.is_encoder_decoder]
        if len(set(of_each) - {None}) > 1:
            raise ValueError(f"generation is forced to begin with other tokens by student and teacher, {of_each}: set "
                             "the same forced_bos_token_id in their generation configs")  # fmt: skip
        if args.pack and model.config.is_encoder_decoder:
            raise ValueError("pack puts a causal model's batch in one row; the student is an encoder–decoder")
        args._n_gpu = min(args.n_gpu, 1)  # one process a GPU: the loss is not in the copies that nn.DataParallel makes
        self.halves, self.sampling = args.halves(), args.sampling()
        for name in OF_PREDISTILLATION if self.halves else ():
            if getattr(args, name) != getattr(FDistillConfig, name):
                raise ValueError(f"{name}={getattr(args, name)!r} is not used but by predistill")
        self.sources = list(dict.fromkeys(half.source for half in self.halves))
        if args.beams != FDistillConfig.beams and self.halves and "beam" not in self.sources:
            raise ValueError(f"beams={args.beams} is not used but by an objective on beam sequences")
        self._check_comparison(args)
        own = {"student": vocabulary_of(model.config), "teacher": self.teacher.vocabulary}
        self.vocabulary, read = min(own.values()), (ids_read(model), *map(ids_read, _models_of(self.teacher)))
        for (whose, most), tokenizer in zip(own.items(), (ours, theirs), strict=True):
            size = ids_of_tokenizer(tokenizer) if hasattr(tokenizer, "get_vocab") else 0
            if size > (max(most, *read) if self.teacher.encoder_decoder else most):
                raise ValueError(f"the {whose}'s tokenizer has {size} ids, the {whose} {most}: it is another model's, "
                                 "or has tokens for which the model's embedding was not resized")  # fmt: skip
        share_ends(model, _models_of(self.teacher), self.vocabulary)
        self._check_data(model, args, trainer)
        self._waiting: list[dict[str, Any]] = []  # batches of an update that has not begun
        self._kept: list[Sequences] = []  # the student's samples that are used again
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        of_teacher = self.teacher.model if isinstance(self.teacher, InRoom) else None
        if of_teacher is not None and row_group(of_teacher) is not None and row_group(model) is None:
            raise ValueError("the teacher is split over ranks with the same rows, and the student is not, whose ranks "
                             "have each their own")  # fmt: skip
        if not self.halves and (virtual_tokens(model) or virtual_tokens(of_teacher)):
            raise ValueError("predistill matches hidden states token by token, and PEFT's virtual tokens have none on "
                             "the other side: pre-distil the model before it gets them")  # fmt: skip
        embeddings = _embeddings(model) if args.freeze_embeddings or args.neftune_noise_alpha else []
        for embedding in embeddings if args.freeze_embeddings else ():
            embedding.requires_grad_(False)
        if args.neftune_noise_alpha and len(set(embeddings[:2])) > 1:
            raise ValueError(f"neftune_noise_alpha={args.neftune_noise_alpha} is not used: {type(model).__name__} "
                             "reads by its encoder's embedding, and the noise is on another: leave it out")  # fmt: skip
        known = functools.partial(collate, vocabulary=self.vocabulary, teacher_vocabulary=self.teacher.vocabulary,
                                  encoder_decoder=self.teacher.encoder_decoder,
                                  ids_read=min(read) if self.teacher.encoder_decoder else None)  # fmt: skip
        ahead = isinstance(self.teacher, Served) and not args.dataloader_num_workers
        trainer.setdefault("data_collator", functools.partial(self._collate_and_ask, known) if ahead else known)
        loaders: Any = args.accelerator_config
        if loaders.dispatch_batches is None:  # which is True for streams, and batches of ranks differ in size
            loaders.dispatch_batches = False
        super().__init__(model=model, args=args, processing_class=processing_class, **trainer)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError("accelerate's FSDP is for cards, and would leave a CPU's models whole: take DDP, or load "
                             "the model with a DistributedConfig")  # fmt: skip
        for name in ("cp_size", "sp_size"):
            if (size := getattr(getattr(self.accelerator, "parallelism_config", None), name, 1)) > 1:
                raise ValueError(f"{name}={size} cuts a batch's sequences over ranks, and this trainer's ranks have "
                                 "whole ones: leave it out")  # fmt: skip
        self._check_optimizer()
        self.model_accepts_loss_kwargs = False  # losses are averaged over accumulated batches
        self.pad = special_tokens(self._unwrapped(self.model))[0]
        for part in parts_of(self.teacher):
            if isinstance(part, (InRoom, Itself)):
                part.to(self.args.device)
        self._check_models()
        if isinstance(self.teacher, Itself) and self.teacher.decay is not None:
            if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                raise ValueError(NOT_AVERAGED)
            self.add_callback(KeepAverage(self.teacher))
        self.watch = Watch(self.sources, not self.teacher.whole, self.args.device)
        self.add_callback(self.watch)
        self.server: StudentServer | None = None
        if args.student_server and args.student_server_path:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("student_server takes a student that is whole on each rank: not FSDP's or DeepSpeed's")
            self.server = StudentServer(args.student_server, args.student_server_path, self._unwrapped(self.model),
                                        self.vocabulary)  # fmt: skip

    def _check_comparison(self, args: FDistillConfig) -> None:
        """Raises ValueError for options of the loss that it has not with such a teacher."""
        if all(half.divergence is None for half in self.halves):
            return
        if args.memory == "minimal" and isinstance(self.teacher, (Mixture, OfRows)):
            raise ValueError(f"memory='minimal' needs the teacher's hidden states, and {type(self.teacher).__name__} "
                             "gives logits: take memory='chunks'")  # fmt: skip
        taken = _temperature_of_lists(self.teacher)
        if taken not in (None, args.temperature):
            raise ValueError(f"temperature={args.temperature:g}, but the teacher's lists were taken at {taken:g}: give "
                             f"temperature={taken:g}, or the lists one of the tails {', '.join(WHOLE)}")  # fmt: skip

    def _build_accelerator_args(self, **known: Any) -> dict[str, Any]:
        """As `Trainer`'s; on a CPU too a model may be split over ranks, which accelerate's check takes for cards'."""
        found: dict[str, Any] = super()._build_accelerator_args(**known)
        if found.get("parallelism_config") is not None and self.args.device.type == "cpu":
            found["parallelism_config"] = copy.copy(found["parallelism_config"])
            found["parallelism_config"]._validate_accelerator = lambda _: None
        return found

    def _check_optimizer(self) -> None:
        """Before any work, that the optimizer can be made and uses its options, and that a schedule of a plain one can.

        Raises:
            ValueError: no weights to train, or options that they have not. ImportError: a package that is not there.
        """
        if self.train_dataset is None:
            return
        if not any(p.requires_grad for p in self.model.parameters()):  # type: ignore[union-attr]
            raise ValueError("no weight of the student has requires_grad: there is nothing to train")
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return
        if not self.args.optim.endswith("layerwise"):  # whose making puts hooks on the weights, once too often then
            self._check_optim_args()
        plain, name = torch.optim.SGD([torch.zeros(1)], self.args.learning_rate), self.args.lr_scheduler_type
        keywords: dict[str, Any] = dict(self.args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        try:
            get_scheduler(name, plain, 1, sys.maxsize, keywords)
        except TypeError as error:
            raise ValueError(f"lr_scheduler_kwargs={keywords}: {error}") from error

    def _check_optim_args(self) -> None:
        """Raises ValueError for an option that is given and that the optimizer is made without, whatever its value."""

        optim = getattr(self.args.optim, "value", self.args.optim)

        def made(**changes: Any) -> str:
            args = copy.copy(self.args)
            vars(args).update(changes)
            return str(self.get_optimizer_cls_and_kwargs(args, self.model))  # type: ignore[arg-type]

        def unused(name: str, values: Sequence[Any]) -> bool:
            try:
                return all(made(**{name: value}) == known for value in values)
            except (LookupError, ValueError, AttributeError, TypeError):  # of a value that it reads
                return False

        try:
            known = made()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"optim={optim}, optim_args={self.args.optim_args!r}: {error}") from error
        parts = [part.strip() for part in (self.args.optim_args or "").split(",") if part.strip()]
        ignored = []
        for i, part in enumerate(parts):
            others = f"{part}1", f"{part.partition('=')[0]}=True"
            if unused("optim_args", [",".join([*parts[:i], other, *parts[i + 1 :]]) for other in others]):
                ignored.append(f"optim_args {part}")
        ignored += [name for name in OF_OPTIMIZERS if getattr(self.args, name) != getattr(FDistillConfig, name)
                    and unused(name, [getattr(FDistillConfig, name)])]  # fmt: skip
        if ignored:
            raise ValueError(f"optim={optim} makes nothing of {', '.join(ignored)}")

    def _check_models(self) -> None:
        """Before any work, what the first step would refuse; models that are sharded later are asked in that step.

        Raises:
            ValueError: see `check_head` and `check_forward`.
        """
        student, pack = self._unwrapped(self.model), self.args.pack
        check_head(student)
        if self.args.world_size > 1 or self.is_deepspeed_enabled or any(p.is_meta for p in student.parameters()):
            return
        check_forward(student, student, self.pad, pack)
        evaluates = self.args.eval_strategy != "no"
        if not self.halves or evaluates or any(half.divergence is not None for half in self.halves):
            for part in parts_of(self.teacher):
                if isinstance(part, InRoom):
                    part.check(pack)

    def _compared(self) -> list[str]:
        """The sources whose sequences the teacher is asked about, of those that data have."""
        return [h.source for h in self.halves if h.divergence is not None and h.source != "student"]

    def _collate_and_ask(self, known: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch, whose rows the server is asked for at once: loaders are ahead of the loss."""
        batch = known(examples)
        for source in self._compared():
            if (found := given_sequences(source, batch)) is not None:
                prompts, continuations = ([x.tolist() for x in y] for y in (found.teacher_prompts, found.continuations))
                self.teacher.expect(prompts, continuations)  # type: ignore[attr-defined]
        return batch

    def _check_data(self, model: Any, args: FDistillConfig, trainer: dict[str, Any]) -> None:
        """Before any work: what objective and teacher ask of the data sets, where their columns are known.

        Raises:
            ValueError: a data set is empty, lacks a column, or has sequences too long for a model; pre-distillation
                without a model's hidden states; sequences that a store has never seen, or that it would have to draw; a
                column for teachers' names that is not there, or that nobody reads.
        """
        if not self.halves and not isinstance(self.teacher, InRoom):
            raise ValueError("predistill matches hidden states with those of a model that is at hand: give that model")
        if not self.teacher.anything and any(h.source == "student" and h.divergence is not None for h in self.halves):
            raise ValueError("the objective compares on the student's samples, which a store has never seen: take "
                             "method kl, or a divergence on shares of teacher and gold, or a teacher that is at hand, "
                             "or an Endpoint")  # fmt: skip
        evaluates = args.eval_strategy != "no"
        for name, data in datasets_of("train_dataset", trainer.get("train_dataset")):
            self._check_dataset(name, data, self.sources or ["gold"], self._compared(), model)
            if args.dataloader_drop_last and hasattr(data, "__len__") and len(data) < args.train_batch_size:
                raise ValueError(f"dataloader_drop_last drops the only batch of {name}, which has {len(data)} rows, "
                                 f"fewer than the {args.train_batch_size} of a batch: nothing would train")  # fmt: skip
            length, columns = args.length_column_name, columns_of(data)
            known = length in columns and hasattr(data, "column_names")  # Trainer reads the column of such data alone
            known = hasattr(data, "__len__") and (known or not columns or "input_ids" in columns)
            if _groups_by_length(args) and not known:
                raise ValueError(f"batches by length need a datasets.Dataset as {name} with the column {length}, each "
                                 "example's tokens")  # fmt: skip
        for name, data in datasets_of("eval_dataset", trainer.get("eval_dataset")):
            self._check_dataset(name, data, ["gold"] * evaluates, ["gold"] * evaluates, model)

    def _check_dataset(self, name: str, data: Any, sources: list[str], compared: list[str], model: Any) -> None:
        """One of them: sources whose sequences are used, and compared with the teacher's word."""
        first = data[0] if isinstance(data, (list, tuple)) and data else {}
        if isinstance(data, str) or not isinstance(first, Mapping):
            found = type(data).__name__ if isinstance(data, str) else f"{type(data).__name__} of {type(first).__name__}"
            raise TypeError(f"{name} must be a dataset, or a list of examples by column, not a {found}")
        if hasattr(data, "__len__") and len(data) == 0:
            raise ValueError(f"{name} is empty")
        columns = columns_of(data)
        if not columns or not sources:
            return
        if not {"prompt_ids", "input_ids"} & set(columns):
            raise ValueError(f"{name} needs the column prompt_ids; it has {', '.join(columns)}")
        if "gold" in sources and "labels" not in columns:
            raise ValueError(f"{name} needs the column labels: the objective, or the evaluation, is on gold targets")
        if not self.teacher.anything and any(not column_of(s, columns) for s in sources):
            raise ValueError("the objective is on the teacher's samples, and a store draws none: give the data the "
                             "column sample_ids")  # fmt: skip
        if {"teacher", "beam"} <= set(sources) and "sample_ids" in columns and "beam_ids" not in columns:
            raise ValueError(f"{name}: the objective is on the teacher's samples and its beams, sample_ids are one of "
                             "them: give both sample_ids and beam_ids, or none")  # fmt: skip
        if ("teacher" in columns) != isinstance(self.teacher, OfRows):
            raise ValueError(f"{name}: the column teacher names each example's, of OfRows: give both, or neither")
        if isinstance(self.teacher, OfRows) and hasattr(data, "__len__"):
            named = [e["teacher"] for e in data] if isinstance(data, (list, tuple)) else data["teacher"]
            self.teacher.choose(list(map(str, named)))
        for part in [] if isinstance(self.teacher, OfRows) else parts_of(self.teacher):
            if isinstance(part, Stored):
                wanted = {column for source in compared if (column := column_of(source, columns))}
                part.check(name, _as_dataset(data, part.encoder_decoder), sorted(wanted))
        same = isinstance(self.teacher, Itself) and self.teacher.decay is None and self.teacher.adapter
        if same and "teacher_prompt_ids" not in columns:
            raise ValueError("Itself() is the student with another prompt: give the data the column "
                             "teacher_prompt_ids, or Itself(decay=...), or Itself(adapter=False)")  # fmt: skip
        theirs = prompts_of_teacher(columns)
        for source in sources:
            column = column_of(source, columns)
            new = 0 if column else self.sampling.max_new_tokens
            for searching in _models_of(self.teacher) if source == "beam" and not column else ():
                check_search(searching)
            for other in _models_of(self.teacher) if source in compared or source == "student" else ():
                check_contexts(name, data, theirs, column, new, "the teacher's", other)
            check_contexts(name, data, "prompt_ids", column, new, "the student's", model)

    # --- an update: its batches, what is drawn for them, what losses are divided by

    def _get_train_sampler(self, *args: Any, **keywords: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **keywords)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return ByLength(sampler, seed, lambda: self.state.epoch)

    def get_batch_samples(self, *args: Any, **keywords: Any) -> Any:
        """The batches of one update, which begins in its first step: then a resumed run has its generators."""
        batches, number = super().get_batch_samples(*args, **keywords)
        self._waiting = batches
        return batches, number

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **keywords: Any) -> Tensor:
        """As `Trainer.training_step`. Before an update's first step the samples of all its batches are drawn."""
        if self._waiting:
            batches, self._waiting = self._waiting, []
            with self.compute_loss_context_manager():
                self._begin_update(self._unwrapped(model), batches)
        return super().training_step(model, inputs, *args, **keywords)

    def _begin_update(self, student: Any, batches: list[dict[str, Any]]) -> None:
        """Gives each batch its `Update`."""
        if self.state.global_step % self.args.student_every == 0:
            self._kept = []
        found = [self._sequences(student, self._prepare_inputs(batch), i) for i, batch in enumerate(batches)]
        if self.args.student_every > 1:
            self._kept = self._kept or [of["student"] for of in found]
        counts = [{source: s.number(self._by_token) for source, s in of.items()} for of in found]
        if not self.halves:
            counts = [{**n, "prompts": sum(map(len, of["gold"].prompts))} for n, of in zip(counts, found, strict=True)]
        numbers = torch.tensor([list(n.values()) for n in counts], dtype=wide(self.args.device))
        mean = self.accelerator.reduce(numbers.mean(0).to(self.args.device), "mean")
        items = dict(zip(counts[0], mean, strict=True))
        # Trainer of transformers before 4.55 divides by what was asked for, also where an epoch's last update has less
        divisor = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        for batch, sequences in zip(batches, found, strict=True):
            batch["update"] = Update(sequences, items, divisor / len(batches))

    @property
    def _by_token(self) -> bool:
        return self.args.normalize == "token"

    def _sequences(self, student: Any, batch: dict[str, Any], number: int = 0) -> dict[str, Sequences]:
        """By source those that a batch has, or else new ones; of the student, where some are kept, those."""
        found: dict[str, Sequences] = {}
        for source in self.sources or ["gold"]:
            given = given_sequences(source, batch)
            if source == "student" and self._kept:
                found[source] = self._kept[number % len(self._kept)]
            elif given is not None:
                found[source] = given
            else:
                copies = copies_of_rows(student)
                ranks = self.args.process_index // copies, self.args.world_size // copies
                with self.watch.timed("sampling"), own_noise(*ranks, self.args.device):
                    found[source] = self._draw(source, student, batch, number)
            found[source].counted = chosen(student, found[source].continuations, found[source].counted)
        return found

    def _draw(self, source: str, student: Any, batch: dict[str, Any], number: int) -> Sequences:
        """New sequences for the prompts of an update's batch, by its number."""
        (prompts, teacher_prompts), teachers = prompts_of(batch), batch.get("teacher", [])
        if source == "student" and self.server is not None:
            made = self.server.draw(student, prompts, self.sampling, self.state.global_step, fresh=number == 0)
        elif source == "student":
            made = draw(student, prompts, self.sampling, None, self.vocabulary)
        else:
            if isinstance(self.teacher, OfRows):
                self.teacher.choose(teachers)
            made = self.teacher.draw(teacher_prompts, self.args.sampling(source == "beam"), self.vocabulary)
        return Sequences(
            prompts, teacher_prompts, [row.to(prompts[0].device) for row in from_first(student, made)], None, teachers
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """With the generators' states, which decide the next samples, those samples that are used again."""
        super()._save_rng_state(output_dir)
        if self._kept:
            torch.save([vars(found) for found in self._kept], self._kept_in(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **keywords: Any) -> None:
        with _of_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **keywords)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _of_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _of_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)
            if checkpoint is not None:
                self._load_more(checkpoint)

    def _load_more(self, checkpoint: str) -> None:
        """What a checkpoint has beside `Trainer`'s own files."""
        if isinstance(self.teacher, Itself):
            self.teacher.load(checkpoint)
        if self._kept_in(checkpoint).exists():
            kind = self.args.device.type  # torch loads to no "cpu:0", as it is called where ranks are several
            known = torch.load(self._kept_in(checkpoint), map_location=kind, weights_only=True)
            self._kept = [Sequences(**found) for found in known]

    def _kept_in(self, folder: str) -> Path:
        return Path(folder) / f"student_samples_{self.args.process_index}.pt"

    # --- the loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """The objective's loss of one batch; in evaluation, the KL on gold targets.

        If called without `training_step`, it draws the samples it needs, and its means are over this batch.
        """
        student = self._unwrapped(model)
        if not model.training:
            loss = self._gold_kl(model, inputs).sum(0)
            loss = (loss[0] / loss[1].clamp_min(1)).float()
            return (loss, {}) if return_outputs else loss
        update = inputs.get("update") or Update(self._sequences(student, inputs), {})
        before = self.watch.sums.clone(), self.watch.tokens
        if self.halves:
            loss = torch.stack([self._half(half, model, update) for half in self.halves]).sum()
        else:
            loss = self._predistillation(model, update)
        if not torch.isfinite(loss):
            loss = self._skipped(loss, inputs, update, student)
            self.watch.sums, self.watch.tokens = before
            self.watch.skipped += 1
        loss = update.weight * loss
        return (loss, {}) if return_outputs else loss

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.train`.

        Raises:
            ConnectionError: another rank has died, or did not come within ``ddp_timeout``.
        """
        try:
            return super().train(*args, **keywords)
        except RuntimeError as error:
            if self.args.world_size == 1 or not is_of_ranks(error):
                raise
            raise ConnectionError(
                f"rank {self.args.process_index} of {self.args.world_size} lost another after step "
                f"{self.state.global_step}: it died, or did not come within ddp_timeout={self.args.ddp_timeout} s "
                f"({error})"
            ) from error

    def _unwrapped(self, model: Any) -> Any:
        """The model inside what DDP, FSDP and torch.compile make of it; asked at once, accelerate loses the DDP."""
        model = self.accelerator.unwrap_model(getattr(model, "_orig_mod", model))
        return getattr(model, "_orig_mod", model)

    def _predistillation(self, model: Any, update: Update) -> Tensor:
        assert isinstance(self.teacher, InRoom)
        gold = update.sequences["gold"]
        self.watch.tokens += gold.number(True)
        counts = (update.items["prompts"], update.items["gold"]) if update.items else None
        return predistillation_loss(
            self._unwrapped(model), self.teacher.model, gold.prompts, gold.continuations, self.pad,
            wrapped=model, counts=counts, counted=gold.counted,
            **{name: getattr(self.args, name) for name in OF_PREDISTILLATION},
        )  # fmt: skip

    def _half(self, half: Half, model: Any, update: Update) -> Tensor:
        """A half's loss by its weight."""
        found = update.sequences[half.source]
        number = found.number(self._by_token)
        items = update.items.get(half.source, number)

        def loss(rows: Rows, teacher: Any) -> Tensor:
            options: dict[str, Any] = {"return_parts": "metrics"} if self.args.memory != "minimal" and teacher else {}
            if half.divergence is not None:
                options["temperature_squared"] = self.args.temperature_squared
            if half.labelled:
                options["label_smoothing"] = self.args.label_smoothing_factor
            made = self.step_loss(rows, teacher, half.divergence, self.args.temperature, half.ce_weight / half.weight,
                                  "mean", num_items=items, memory=self.args.memory, **options)  # fmt: skip
            made, parts = made if isinstance(made, tuple) else (made, None)
            self.watch.add(half.source, half.weight * made, parts, items, number, found.number(True))
            return half.weight * made

        return self._at_head(half, model, found, loss)

    def _at_head(self, half: Half, model: Any, found: Sequences, loss: Any) -> Tensor:
        """What a function makes of student's and teacher's rows, in the student's output embedding."""
        student = self._unwrapped(model)
        options: dict[str, Any] = dict(pack=self.args.pack and not student.config.is_encoder_decoder,
                                       counted=found.counted)  # fmt: skip
        teacher = None
        if half.divergence is not None:
            if isinstance(self.teacher, OfRows):
                self.teacher.choose(found.teachers)
            with self.watch.timed("teacher"):
                device = next(student.parameters()).device
                teacher = self.teacher.rows(found.teacher_prompts, found.continuations, device, **options)

        def at_head(rows: Rows) -> Tensor:
            with self.compute_loss_context_manager():
                return loss(rows, teacher)

        made, outputs = forward_to_head(student, found.prompts, found.continuations, self.pad, at_head, wrapped=model,
                                        **options)  # fmt: skip
        of_experts = getattr(outputs, "loss", None)  # a mixture of experts' own, with its coefficient
        return made if of_experts is None else made + of_experts / len(self.halves)

    def _skipped(self, loss: Tensor, inputs: dict[str, Any], update: Update, student: nn.Module) -> Tensor:
        """0 in place of a loss that is not finite, if `on_nan` says so."""
        if self.args.on_nan == "skip":
            return _of_nothing(loss, student)
        step, rank = self.state.global_step, self.args.process_index
        of_rank = f"_rank_{rank}" if self.args.world_size > 1 else ""  # several may stop, each with its own batch
        path = Path(str(self.args.output_dir)) / f"nan_batch_step_{step}{of_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items() if name != "update"}
        torch.save(batch | {"sequences": {source: vars(found) for source, found in update.sequences.items()}}, path)
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step}; its batch is in {path} (on_nan='skip' goes on)"
        )

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """As `Trainer.log`; adds what `Watch` has measured to a training loss."""
        if "loss" in logs:
            logs |= self.watch.line(self.accelerator, copies_of_rows(self._unwrapped(self.model)))
        super().log(logs, *args, **keywords)

    # --- evaluation

    def _gold_kl(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Of each sequence of gold targets its KL to the teacher, a sum over steps, and how many they are: (B, 2)."""
        found = given_sequences("gold", inputs)
        assert found is not None
        found.counted = chosen(self._unwrapped(model), found.continuations, found.counted)

        def losses(rows: Rows, teacher: Any) -> Tensor:
            temperature = _temperature_of_lists(self.teacher) or 1.0
            return self.step_loss(rows, teacher, resolve("kl"), temperature, reduction="none").reshape(-1)

        of_rows = self._at_head(Half("gold", resolve("kl")), model, found, losses).detach()
        counts = found.tokens()
        of_rows = of_rows[: sum(counts)].to(wide(of_rows.device))
        return torch.stack([torch.stack([x.sum() for x in of_rows.split(counts)]), of_rows.new_tensor(counts)], 1)

    def evaluate(self, *args: Any, **keywords: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; neither it nor what callbacks do in it is time of training."""
        with self.watch.apart():
            return super().evaluate(*args, **keywords)

    def predict(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.predict`, which is no time of training either."""
        with self.watch.apart():
            return super().predict(*args, **keywords)

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool,
                        ignore_keys: Any = None) -> Any:  # fmt: skip
        """The evaluation loss of a batch. No logits are made."""
        with torch.no_grad():
            found = self._gold_kl(model, self._prepare_inputs(inputs))
        self._evaluated += self._of_all_rows(found).sum(0).cpu()
        return (found[:, 0].sum() / found[:, 1].sum().clamp_min(1)).float(), None, None

    def _of_all_rows(self, found: Tensor) -> Tensor:
        """What all ranks have found of an evaluation's rows, each once: some ranks have the same, and some have their
        last batch filled up.
        """
        copies, loader = copies_of_rows(self._unwrapped(self.model)), self.accelerator.gradient_state
        every = self.accelerator.gather(found).unflatten(0, (-1, copies, len(found)))[:, 0].flatten(0, 1)
        return every[: loader.remainder] if loader.end_of_dataloader and loader.remainder > 0 else every

    def evaluation_loop(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.evaluation_loop`, but the loss is a mean over all tokens, not over batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, **keywords)
        loss, tokens = self._evaluated.tolist()
        metrics = output.metrics or {}
        metrics.update({name: loss / max(tokens, 1) for name in metrics if name.endswith("_loss")})
        return output


def _of_nothing(loss: Tensor, student: nn.Module) -> Tensor:
    """0, whose backward is the loss's, with all that ranks send each other in it, but gives every weight 0."""
    nothing = loss.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)

    def begin(_: Tensor) -> None:
        weights = {p for p in student.parameters() if p.requires_grad} | _leaves(loss)  # FSDP's have others inside
        hooks = contextlib.ExitStack()
        for p in weights:
            hooks.callback(p.register_hook(torch.zeros_like).remove)
        torch.autograd.Variable._execution_engine.queue_callback(hooks.close)

    if nothing.requires_grad:
        nothing.register_hook(begin)
    return nothing


def _leaves(made: Tensor) -> set[Tensor]:
    """The tensors that a tensor's backward ends at."""
    nodes, seen = [made.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


def _groups_by_length(args: Any) -> bool:
    """Whether batches are made by lengths; transformers 5 has another name for it."""
    by_length = getattr(args, "train_sampling_strategy", "") in ("group_by_length", "batch_rebalance")
    return bool(getattr(args, "group_by_length", by_length))


def _of_checkpoint(folder: str | None) -> contextlib.AbstractContextManager[None]:
    """Names a checkpoint's file that is damaged."""
    if folder is None:
        return contextlib.nullcontext()
    return names_damage(folder, f"remove {folder} to go on from an earlier checkpoint, or from the start")


def _student_of(given: Any) -> Any:
    """A student of a model or a path."""
    model = load_student(given).float() if isinstance(given, (str, Path)) else given
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a Hugging Face model or a path of one, not {type(model).__name__}")
    return model


def _embeddings(model: Any) -> list[nn.Module]:
    """A model's input embedding; of an encoder–decoder then those that its encoder and its decoder read by."""
    halves = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else ()
    return [part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else part.embed_tokens  # FSMT's
            for part in (model, *halves)]  # fmt: skip


def _temperature_of_lists(teacher: Any) -> float | None:
    """The one temperature at which a teacher's lists can be compared; None: any will do."""
    if not isinstance(teacher, (Stored, Served)) or teacher.whole or teacher.tail in WHOLE:
        return None
    return float(teacher.store.settings["temperature"]) if isinstance(teacher, Stored) else 1.0


def _models_of(teacher: Any) -> list[Any]:
    """The models at hand of a teacher, but the student itself."""
    return [part.model for part in parts_of(teacher) if isinstance(part, InRoom)]


def _check_apart(student: nn.Module, teacher: Any) -> None:
    """Raises ValueError where a teacher has weights of the student, which would not be trained then."""
    theirs = set(map(id, teacher.parameters())) if isinstance(teacher, nn.Module) else set()
    if any(id(p) in theirs for p in student.parameters()):
        raise ValueError("student and teacher share weights, and a teacher's are not trained: for a student that is "
                         "its own teacher, or its base model below an adapter, give Itself, else a copy")  # fmt: skip


def _as_dataset(data: Any, encoder_decoder: bool = False) -> Any:
    """With columns; of texts as input_ids with those of prompts and labels."""
    from datasets import Dataset

    if "prompt_ids" not in columns_of(data):
        data = [{name: ids.tolist() for name, ids in of_example(e, encoder_decoder).items()} for e in data]
    return Dataset.from_list(list(data)) if isinstance(data, (list, tuple)) else data
