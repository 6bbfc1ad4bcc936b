"""The f-DISTILL trainer, on `transformers.Trainer`."""

from __future__ import annotations

import collections
import copy
import datetime
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..own import resolve
from .models import IGNORE, Rows, forward_to_head, padded, step_loss, unpadded, virtual_tokens
from .objectives import Half, method, mixture
from .predistill import predistillation_loss
from .sampling import Sampling, draw, from_first, row_group, special_tokens
from .teachers import InRoom, Itself, KeepAverage, OfRows, Served, Stored, teacher_of

#: Which column has a source's sequences.
COLUMNS = {"gold": "labels", "teacher": "sample_ids", "beam": "sample_ids"}


def join(seconds: float) -> None:
    """Begins the process group that torchrun or accelerate launch has made this process one of, unless it has begun;
    `transformers` leaves a CPU's without its ``ddp_timeout``.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(seconds=seconds))


@dataclass
class FDistillConfig(TrainingArguments):
    """`TrainingArguments`, and how to distil.

    Attributes:
        method: seqkd, kl, engine, rkl, js, tvd, mle, or "predistill".
        beta: weight of the student's half in js and tvd.
        divergence, shares: instead of the method, a divergence and its sequences: {"student": 0.7, "gold": 0.3}.
        temperature: of both models' distributions in the loss.
        max_new_tokens, sample_temperature, top_k, top_p: of samples drawn during training.
        student_every: draw student samples every so many steps; in between the last ones are used again.
        normalize: "token", a mean over steps; or "sequence", the paper's sum over steps, a mean over sequences. The
            mean is over all batches that are accumulated and all ranks, so that they give the gradient of one large
            batch; of sequences drawn during training, whose lengths are not known before, over each batch of all ranks.
        freeze_embeddings: leave the student's input embeddings (and a tied output embedding) as they are.
        pack: give causal models a batch as one row of sequences, without padding.
        memory: of the loss, "chunks" or "minimal"; see `linear_f_divergence`.
        on_nan: "stop" with the batch saved, or "skip" the batch.
    """

    method: str = "tvd"
    beta: float = 0.5
    divergence: str | None = None
    shares: dict[str, float] | None = field(default=None)
    temperature: float = 1.0
    max_new_tokens: int = 64
    sample_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    student_every: int = 1
    normalize: str = "token"
    freeze_embeddings: bool = False
    pack: bool = False
    memory: str = "chunks"
    on_nan: str = "stop"

    def __post_init__(self) -> None:
        if self.use_cpu:
            join(self.ddp_timeout)
        super().__post_init__()
        self.remove_unused_columns = False  # the collator's columns are not the model's arguments
        for name, value, known in (("normalize", self.normalize, ("token", "sequence")),
                                   ("on_nan", self.on_nan, ("stop", "skip"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.student_every < 1:
            raise ValueError(f"student_every must be at least 1, not {self.student_every}")

    def halves(self) -> tuple[Half, ...]:
        """The objective; none for pre-distillation."""
        if self.divergence is not None:
            return mixture(resolve(self.divergence), **(self.shares or {"gold": 1.0}))
        return () if self.method == "predistill" else method(self.method, self.beta)

    def sampling(self) -> Sampling:
        """How sequences are drawn during training."""
        return Sampling(self.max_new_tokens, self.sample_temperature, self.top_k, self.top_p)


def collate(examples: Sequence[dict[str, Any]], vocabulary: int | None = None) -> dict[str, Any]:
    """Token ids as (B, L) padded with −100: prompt_ids, labels, and sample_ids, teacher_prompt_ids if there; and the
    teachers' names.

    Raises:
        ValueError: no prompt_ids, an empty prompt, or an id beyond the vocabulary that student and teacher share.
    """
    names = [n for n in ("prompt_ids", "labels", "sample_ids", "teacher_prompt_ids") if n in examples[0]]
    if "prompt_ids" not in names:
        raise ValueError(f"an example needs the column prompt_ids; it has {', '.join(examples[0])}")
    if not all(len(e["prompt_ids"]) for e in examples):
        raise ValueError("a prompt is empty: prompt_ids needs a token at least")
    batch: dict[str, Any] = {}
    for name in names:
        batch[name] = ids = padded([torch.as_tensor(e[name], dtype=torch.long) for e in examples], IGNORE)
        if vocabulary is not None and name != "teacher_prompt_ids" and ids.numel() and int(ids.max()) >= vocabulary:
            raise ValueError(f"{name} has the id {int(ids.max())}, but student and teacher share {vocabulary} ids")
    if "teacher" in examples[0]:
        batch["teacher"] = [str(e["teacher"]) for e in examples]
    return batch


def _columns(data: Any) -> Sequence[str]:
    """A dataset's columns; none of one that cannot be asked without being read."""
    if getattr(data, "column_names", None):
        return list(data.column_names)
    return list(data[0]) if isinstance(data, (list, tuple)) and data else ()


def _as_dataset(data: Any) -> Any:
    """With columns."""
    from datasets import Dataset

    return Dataset.from_list(list(data)) if isinstance(data, (list, tuple)) else data


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Two tokenizers' shared part must be the same.

    Raises:
        ValueError: a token has two ids, or an id two tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    tokens = {i: t for t, i in theirs.items()}
    differ = [t for t, i in ours.items() if theirs.get(t, i) != i or (t not in theirs and i in tokens)]
    if differ or not set(ours) & set(theirs):
        token = next(iter(differ or ours))
        i, j = ours[token], theirs.get(token)
        raise ValueError(
            f"student and teacher have different tokenizers: {token!r} is {i} in one and "
            f"{f'{tokens.get(i)!r} has that id' if j is None else j} in the other; step-wise losses need one vocabulary"
        )


def _is_of_ranks(error: BaseException) -> bool:
    """Whether an error is of what ranks send each other; gloo's have no class of their own."""
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo" in words or "Connection closed by peer" in words


class FDistillTrainer(Trainer):
    """Distils `teacher` into `model` by `args.method`.

    Datasets have the columns prompt_ids and labels (the gold target's ids, end token included), and may have sample_ids
    (the teacher's stored samples; without them they are drawn at every step) and teacher_prompt_ids (a longer prompt,
    for the teacher alone). Evaluation is the KL of the student to the teacher on gold targets, a mean over each batch's
    tokens.

    Args:
        model: the student, a Hugging Face causal or encoder–decoder language model, possibly with PEFT adapters.
        teacher: the same kind; any dtype or device, quantised or not. It is never trained. Or a path of one; a
            `TeacherStore`, or its path, which knows the sequences it holds alone; an `Endpoint`; or of
            `sequence.teachers` a `Mixture` of several, `OfRows`, whose teacher the column teacher names, or `Itself`.
        The rest: as `transformers.Trainer`.
    """

    args: FDistillConfig
    step_loss = staticmethod(step_loss)

    def __init__(self, model: Any, teacher: Any, args: FDistillConfig, *, processing_class: Any = None,
                 teacher_processing_class: Any = None, **trainer: Any):  # fmt: skip
        if processing_class is not None and teacher_processing_class is not None:
            check_vocabularies(processing_class, teacher_processing_class)
        self.teacher = teacher_of(teacher)
        if isinstance(self.teacher, Itself):
            self.teacher.bind(model)
        if self.teacher.encoder_decoder != bool(model.config.is_encoder_decoder):
            raise ValueError("teacher and student must both be causal, or both encoder–decoder")
        of_teacher = self.teacher.model if isinstance(self.teacher, InRoom) else None
        if of_teacher is not None and row_group(of_teacher) is not None and row_group(model) is None:
            raise ValueError("the teacher is split over ranks with the same rows, and the student is not, whose ranks "
                             "have each their own")  # fmt: skip
        for name in ("train_dataset", "eval_dataset"):
            data = trainer.get(name)
            if data is not None and hasattr(data, "__len__") and len(data) == 0:
                raise ValueError(f"{name} is empty")
        args._n_gpu = min(args.n_gpu, 1)  # one process a GPU: the loss is not in the copies that nn.DataParallel makes
        self.halves, self.sampling = args.halves(), args.sampling()
        self._check_teacher(args, trainer)
        self._kept: collections.deque[tuple[list[Tensor], list[Tensor], list[Tensor]]] = collections.deque()
        self._draws = True
        self._by_token = args.normalize == "token" or not self.halves
        self._items: dict[str, Tensor] = {}  # of a column, what an update's batches have on average
        if not self.halves and (virtual_tokens(model) or virtual_tokens(of_teacher)):
            raise ValueError("predistill matches hidden states token by token, and PEFT's virtual tokens have none on "
                             "the other side: pre-distil the model before it gets them")  # fmt: skip
        if args.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        self.vocabulary = min(model.config.get_text_config().vocab_size, self.teacher.vocabulary)
        known = functools.partial(collate, vocabulary=self.vocabulary)
        ahead = isinstance(self.teacher, Served) and not args.dataloader_num_workers
        trainer.setdefault("data_collator", functools.partial(self._collate_and_ask, known) if ahead else known)
        super().__init__(model=model, args=args, processing_class=processing_class, **trainer)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError("accelerate's FSDP is for cards, and would leave a CPU's models whole: take DDP, or load "
                             "the model with a DistributedConfig")  # fmt: skip
        self.model_accepts_loss_kwargs = False  # losses are averaged over accumulated batches
        self.pad = special_tokens(self._unwrapped(self.model))[0]
        if isinstance(self.teacher, InRoom):
            self.teacher.to(self.args.device)
        if isinstance(self.teacher, Itself) and self.teacher.decay is not None:
            self.add_callback(KeepAverage(self.teacher))

    def _build_accelerator_args(self, **known: Any) -> dict[str, Any]:
        """As `Trainer`'s; on a CPU too a model may be split over ranks, which accelerate's check takes for cards'."""
        found: dict[str, Any] = super()._build_accelerator_args(**known)
        if found.get("parallelism_config") is not None and self.args.device.type == "cpu":
            found["parallelism_config"] = copy.copy(found["parallelism_config"])
            found["parallelism_config"]._validate_accelerator = lambda _: None
        return found

    def _compared(self) -> set[str]:
        """The columns whose sequences the teacher is asked about."""
        return {COLUMNS[h.source] for h in self.halves if h.divergence is not None and h.source in COLUMNS}

    def _collate_and_ask(self, known: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch, whose rows the server is asked for at once: loaders are ahead of the loss."""
        batch = known(examples)
        prompts = [list(e.get("teacher_prompt_ids", e["prompt_ids"])) for e in examples]
        for name in self._compared() & batch.keys():
            self.teacher.expect(prompts, [list(e[name]) for e in examples])  # type: ignore[attr-defined]
        return batch

    def _check_teacher(self, args: FDistillConfig, trainer: dict[str, Any]) -> None:
        """Before any work: what the objective asks of the teacher, and what it cannot do.

        Raises:
            ValueError: pre-distillation without a model's hidden states; sequences that a store has never seen, or that
                it would have to draw; a column for teachers' names that is not there, or that nobody reads.
        """
        if not self.halves and not isinstance(self.teacher, InRoom):
            raise ValueError("predistill matches hidden states with those of a model that is at hand: give that model")
        data = trainer.get("train_dataset")
        columns = _columns(data)
        compared = {half.source for half in self.halves if half.divergence is not None}
        drawn = {half.source for half in self.halves} & {"teacher", "beam"}
        if not self.teacher.anything and "student" in compared:
            raise ValueError("the objective compares on the student's samples, which a store has never seen: take "
                             "method kl, or a divergence on shares of teacher and gold, or a teacher that is at hand, "
                             "or an Endpoint")  # fmt: skip
        if not self.teacher.anything and drawn and columns and "sample_ids" not in columns:
            raise ValueError("the objective is on the teacher's samples, and a store draws none: give the data the "
                             "column sample_ids")  # fmt: skip
        for name in ("train_dataset", *(["eval_dataset"] if args.eval_strategy != "no" else [])):
            known = _columns(trainer.get(name))
            if known and ("teacher" in known) != isinstance(self.teacher, OfRows):
                raise ValueError(f"{name}: the column teacher names each example's, of OfRows: give both, or neither")
            if known and isinstance(self.teacher, Stored):
                wanted = self._compared() if name == "train_dataset" else {"labels"}
                self.teacher.check(name, _as_dataset(trainer[name]), sorted(wanted & set(known)))
        same = isinstance(self.teacher, Itself) and self.teacher.decay is None
        if same and columns and "teacher_prompt_ids" not in columns:
            raise ValueError("Itself() is the student with another prompt: give the data the column "
                             "teacher_prompt_ids, or Itself(decay=...)")  # fmt: skip

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """The method's loss of one batch; in evaluation the KL on gold targets."""
        student = self._unwrapped(model)
        if isinstance(self.teacher, OfRows):
            self.teacher.choose(inputs.get("teacher", ()))
        prompts, gold = unpadded(inputs["prompt_ids"]), unpadded(inputs["labels"]) if "labels" in inputs else []
        teacher_prompts = unpadded(inputs["teacher_prompt_ids"]) if "teacher_prompt_ids" in inputs else prompts
        if not model.training:
            batch = self._sequences("gold", student, inputs, prompts, teacher_prompts, gold)
            loss = self._half(Half("gold", resolve("kl")), model, *batch)
        elif self.args.method == "predistill" and self.args.divergence is None:
            self._sequences("gold", student, inputs, prompts, teacher_prompts, gold)
            assert isinstance(self.teacher, InRoom)
            loss = predistillation_loss(student, self.teacher.model, prompts, gold, self.pad, wrapped=model,
                                        counts=(self._items["prompt_ids"], self._items["labels"]))  # fmt: skip
        else:
            loss = torch.zeros((), device=self.args.device)
            for half in self.halves:
                batch = self._sequences(half.source, student, inputs, prompts, teacher_prompts, gold)
                loss = loss + half.weight * self._half(half, model, *batch)
        loss = self._checked(loss, inputs, student) if model.training else loss
        return (loss, {}) if return_outputs else loss

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer`'s.

        Raises:
            ConnectionError: another rank has died, or not come within ``ddp_timeout``.
        """
        try:
            return super().train(*args, **keywords)
        except RuntimeError as error:
            if self.args.world_size == 1 or not _is_of_ranks(error):
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

    def get_batch_samples(self, *args: Any, **keywords: Any) -> Any:
        """The batches of one update; counts what their losses are divided by."""
        batches, number = super().get_batch_samples(*args, **keywords)
        if self.state.global_step % self.args.student_every == 0:
            self._kept.clear()
        self._draws = not self._kept
        for name in ("prompt_ids", "labels", "sample_ids"):
            if batches and name in batches[0]:
                counts = [(b[name] != IGNORE).sum() if self._by_token else torch.tensor(len(b[name])) for b in batches]
                self._items[name] = self._on_ranks(torch.stack(counts).float().mean())
        return batches, number

    def _on_ranks(self, count: Tensor) -> Tensor:
        """Its mean over the ranks, whose losses' gradients are averaged in turn."""
        mean: Tensor = self.accelerator.reduce(count.to(self.args.device), "mean")
        return mean

    def _sequences(
        self, source: str, student: Any, inputs: dict[str, Tensor], prompts: list[Tensor],
        teacher_prompts: list[Tensor], gold: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """The student's and the teacher's prompts, and the continuations of a source."""
        if source == "gold":
            if not gold:
                raise ValueError("the objective or the evaluation is on gold targets: the data needs the column labels")
            return prompts, teacher_prompts, gold
        if source == "student":
            if self._draws:
                made = draw(student, prompts, self.sampling, None, self.vocabulary)
                self._kept.append((prompts, teacher_prompts, made))
            else:
                self._kept.rotate(-1)
            return self._kept[-1]
        if "sample_ids" in inputs:
            return prompts, teacher_prompts, unpadded(inputs["sample_ids"])
        beams = Sampling(self.sampling.max_new_tokens, beams=4)
        made = self.teacher.draw(teacher_prompts, beams if source == "beam" else self.sampling, self.vocabulary)
        return prompts, teacher_prompts, [row.to(prompts[0].device) for row in from_first(student, made)]

    def _half(
        self, half: Half, model: Any, prompts: list[Tensor], teacher_prompts: list[Tensor], continuations: list[Tensor]
    ) -> Tensor:
        student = self._unwrapped(model)
        options: dict[str, Any] = dict(pack=self.args.pack and not student.config.is_encoder_decoder)
        teacher = None
        if half.divergence is not None:
            device = next(student.parameters()).device
            teacher = self.teacher.rows(teacher_prompts, continuations, device, **options)
        items: Tensor | None = None  # in evaluation, of this batch
        if model.training:
            items = self._items.get(COLUMNS.get(half.source, "") if self._by_token else "prompt_ids")
            if items is None:  # drawn just now: of this batch on all ranks
                items = self._on_ranks(torch.tensor(float(sum(map(len, continuations)))))

        def loss(rows: Rows) -> Tensor:
            with self.compute_loss_context_manager():
                return self.step_loss(rows, teacher, half.divergence, self.args.temperature, reduction="mean",
                                      num_items=items, memory=self.args.memory)  # fmt: skip

        return forward_to_head(student, prompts, continuations, self.pad, loss, wrapped=model, **options)[0]

    def _checked(self, loss: Tensor, inputs: dict[str, Tensor], student: nn.Module) -> Tensor:
        if torch.isfinite(loss):
            return loss
        step = self.state.global_step
        if self.args.on_nan == "skip":
            self.log({"skipped_batches": step})
            return sum((p.sum() for p in student.parameters() if p.requires_grad), loss.new_zeros(())) * 0.0
        path = Path(str(self.args.output_dir)) / f"nan_batch_step_{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}, path)
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step}; its batch is in {path} (on_nan='skip' goes on)"
        )

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool,
                        ignore_keys: Any = None) -> Any:  # fmt: skip
        """The evaluation loss; no logits are made."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None
