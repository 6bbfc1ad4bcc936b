"""The trainer: `transformers.Trainer` with the objectives of sequence-level distillation."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from ..own import resolve
from .batches import Counted, Sequences, collate, given_sequences
from .beginning_checks import by_ddp, check_accelerator, check_beginning
from .config import OF_PREDISTILLATION, OF_WORKERS, FDistillConfig
from .dataset_checks import check_collator, check_datasets
from .forward import forward_to_head
from .generation import chosen, share_ends, special_tokens
from .losses import Rows, check_head, of_nothing, step_loss
from .models import as_found, ids_read, vocabulary_of
from .objectives import Half, compared_sources, sources_of
from .pairing import check_objective, check_pair, check_tokenizers, models_of, prepare_embeddings, student_of
from .predistill import predistillation_loss
from .probes import check_forward
from .ranks import copies_of_rows, generators_kept, is_of_ranks, of_all_rows
from .student_server import StudentServer
from .teachers import InRoom, Itself, OfRows, Served, teacher_of
from .teachers.itself import NOT_AVERAGED, KeepAverage
from .teachers.several import parts_of
from .tokenizers import check_vocabularies, ids_of_tokenizer
from .updates import Update, UpdatingTrainer
from .watch import Watch, wide

__all__ = ["FDistillConfig", "FDistillTrainer", "Update", "check_vocabularies", "collate"]


#: What `Trainer` takes and has no place here, and what to do instead.
REFUSED = {
    "compute_metrics": "no logits are made: measure in a callback, as sequence.metrics.Measures does",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_loss_func": "the loss is the objective's: give a divergence of your own, or override step_loss",
    "model_init": "give the model itself",
}


#: What every evaluation has, and where others can be added to it.
METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
OF_METRICS = ("on_evaluate", "evaluate", "evaluation_loop")


class FDistillTrainer(UpdatingTrainer):
    """Distils `teacher` into `model` with the objective of `args`.

    Datasets have the columns prompt_ids and labels (the ids of the gold target, with its end token). They may have
    labels_mask (bool: which labels count), sample_ids or beam_ids (stored samples or beams of the teacher; without them
    they are drawn at every step), teacher_prompt_ids (another prompt for the teacher) and teacher. Or they have
    input_ids and labels, as in `collate`. Evaluation is the KL of the student from the teacher on gold targets, a mean
    over all tokens, at temperature 1 (of lists that allow one alone, at theirs).

    Each log has means since the last one, over all ranks. For each source of the objective: loss_on_SOURCE (over
    updates, as loss is); over tokens student_entropy_on_SOURCE and teacher_entropy_on_SOURCE (nats, at the temperature
    of the loss); agreement_on_SOURCE (share of steps where both models have the same likeliest token);
    overlap_on_SOURCE (Σ min(p, q)); or, if the teacher gives lists, the masses and overlap of `SparseParts`. Also
    tokens_per_second (tokens with a loss), skipped_batches (how many, by on_nan, if any), and sampling_share and
    teacher_share (shares of the time; the latter without the teacher's head).

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
        model = student_of(model, teacher)
        ours, theirs = (p if hasattr(p, "get_vocab") else getattr(p, "tokenizer", p)  # a processor's
                        for p in (processing_class, teacher_processing_class))  # fmt: skip
        if ours is not None and theirs is not None:
            check_vocabularies(ours, theirs)
        self.teacher = teacher_of(teacher)
        if isinstance(self.teacher, Itself):
            self.teacher.bind(model)
        check_pair(model, self.teacher)
        check_objective(args, model, self.teacher)
        check_tokenizers(model, self.teacher, (ours, theirs))
        self.halves, self.sampling = args.halves(), args.sampling()
        self.sources = sources_of(self.halves)
        self.vocabulary = min(vocabulary_of(model.config), self.teacher.vocabulary)
        share_ends(model, [part.ends() for part in parts_of(self.teacher)], self.vocabulary)
        check_datasets(trainer.get("train_dataset"), trainer.get("eval_dataset"), model, self.teacher, args)
        prepare_embeddings(model, args)
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        self._streamed: Counted | None = None
        self._evaluating = False
        args._n_gpu = min(args.n_gpu, 1)  # one process a GPU: the loss is not in the copies that nn.DataParallel makes
        loaders: Any = args.accelerator_config
        if loaders.dispatch_batches is None:  # which is True for streams, and batches of ranks differ in size
            loaders.dispatch_batches = False
        if (collator := trainer.get("data_collator")) is None:
            trainer["data_collator"] = self._collator(model, ahead=not args.dataloader_num_workers)
        else:
            check_collator(collator, trainer.get("train_dataset"), trainer.get("eval_dataset"))
        try:
            super().__init__(model=model, args=args, processing_class=processing_class, **trainer)
            check_accelerator(self, self._unwrapped(self.model))
        except Exception:
            if args.fsdp:  # which has set it, so that the next trainer would be refused, too
                os.environ.pop("ACCELERATE_USE_FSDP", None)
            raise
        check_beginning(self)
        self.model_accepts_loss_kwargs = False  # losses are averaged over accumulated batches
        self.pad, ends = special_tokens(self._unwrapped(self.model))
        self.drawn = self.vocabulary
        if hasattr(ours, "get_vocab"):  # what pads a head beyond them is no text, and servers refuse it
            self.drawn = min(self.vocabulary, max(ids_of_tokenizer(ours), *(i + 1 for i in ends)))
        for part in parts_of(self.teacher):
            if isinstance(part, (InRoom, Itself)):
                part.to(self.args.device)
        self._check_models()
        self.watch = Watch(self.sources, not self.teacher.whole, self.args.device)
        if isinstance(self.teacher, Itself) and self.teacher.decay is not None:
            if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                raise ValueError(NOT_AVERAGED)
            self.add_callback(KeepAverage(self.teacher))
        self.add_callback(self.watch)
        self.server = self._server()

    def _server(self) -> StudentServer | None:
        """What draws the student's samples; None: the student itself."""
        url, folder = self.args.student_server, self.args.student_server_path
        if not (url and folder):
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("student_server takes a student that is whole on each rank: not FSDP's or DeepSpeed's")
        return StudentServer(url, folder, self._unwrapped(self.model), self.drawn)

    def _collator(self, student: Any, ahead: bool) -> Any:
        """`collate` for the two models; ahead: a server is asked for a batch's rows as soon as it is made."""
        read = None
        if self.teacher.encoder_decoder:
            read = min(map(ids_read, (student, *models_of(self.teacher))))
        known = functools.partial(collate, vocabulary=self.vocabulary, teacher_vocabulary=self.teacher.vocabulary,
                                  encoder_decoder=self.teacher.encoder_decoder, ids_read=read)  # fmt: skip
        return functools.partial(self._collate_and_ask, known) if ahead and isinstance(self.teacher, Served) else known

    def _collate_and_ask(self, known: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch, whose rows the server is asked for at once: loaders are ahead of the loss."""
        assert isinstance(self.teacher, Served)
        batch: dict[str, Any] = known(examples)
        sources = ["gold"] if self._evaluating else compared_sources(self.halves)
        most = (self.args.gradient_accumulation_steps + 1) * len(sources)  # an update's, and loaders are one ahead
        for source in sources:
            if (found := given_sequences(source, batch)) is not None:
                prompts, continuations = ([x.tolist() for x in y] for y in (found.teacher_prompts, found.continuations))
                self.teacher.expect(prompts, continuations, most)
        return batch

    def _build_accelerator_args(self, **known: Any) -> dict[str, Any]:
        """As `Trainer`'s; on a CPU too a model may be split over ranks, which accelerate's check takes for cards'."""
        found: dict[str, Any] = super()._build_accelerator_args(**known)
        if found.get("parallelism_config") is not None and self.args.device.type == "cpu":
            found["parallelism_config"] = copy.copy(found["parallelism_config"])
            found["parallelism_config"]._validate_accelerator = lambda _: None
        return found

    def _check_models(self) -> None:
        """Before any work, what the first step would refuse; models that are sharded later are asked in that step."""
        student, pack = self._unwrapped(self.model), self.args.pack
        check_head(student)
        if self.args.world_size > 1 or self.is_deepspeed_enabled or any(p.is_meta for p in student.parameters()):
            return
        check_forward(student, student, self.pad, pack)
        if not self.halves or self.args.evaluates or any(half.divergence is not None for half in self.halves):
            for part in parts_of(self.teacher):
                if isinstance(part, InRoom):
                    part.check(pack)

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
        finite = bool(torch.isfinite(loss))
        self.watch.passed(torch.stack([self._share(update, source) for source in update.sequences]).mean(), finite)
        if not finite:
            loss = self._skipped(loss, inputs, update, student)
            self.watch.sums, self.watch.tokens = before
            self.watch.skipped += 1
        loss = update.weight * loss
        return (loss, {}) if return_outputs else loss

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.train`.

        Raises:
            ValueError: no evaluation has metric_for_best_model, which `Trainer` says after the first.
            ConnectionError: another rank has died, or did not come within ``ddp_timeout``; or student_server does not
                answer.
        """
        self._check_best()
        self._begun = []
        if self.server is not None:
            self.server.check()
        self._forget_evaluation()
        try:
            found = super().train(*args, **keywords)
            return found._replace(training_loss=found.metrics["train_loss"])  # as `log` has it
        except RuntimeError as error:
            if self.args.world_size == 1 or not is_of_ranks(error):
                raise
            raise ConnectionError(
                f"rank {self.args.process_index} of {self.args.world_size} lost another after step "
                f"{self.state.global_step}: it died, or did not come within ddp_timeout={self.args.ddp_timeout} s "
                f"({error})"
            ) from error

    def _forget_evaluation(self) -> None:
        """Over ranks, that an evaluation before training has prepared the model: accelerate would take it for prepared
        to be trained, without its DDP, and each rank would train a student of its own.
        """
        model: Any = self.model
        wrapped: Any = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if by_ddp(self) and not isinstance(wrapped, DistributedDataParallel):
            for module in model.modules():
                vars(module).pop("_is_accelerate_prepared", None)
            self.model_wrapped = model

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError: it would need model_init."""
        raise NotImplementedError("FDistillTrainer has one student, which hyperparameter_search would make anew by "
                                  "model_init: make a trainer for each trial")  # fmt: skip

    def _check_best(self) -> None:
        """Raises ValueError for a metric that no evaluation has; a callback or a subclass of yours may add to them."""
        best, several = self.args.metric_for_best_model, self.eval_dataset
        makers = (type(self), *(type(callback) for callback in self.callback_handler.callbacks))
        added = any(name in vars(kind) for made in makers for kind in made.__mro__ for name in OF_METRICS
                    if not kind.__module__.startswith(("transformers.", __name__)))  # fmt: skip
        if best is None or added:
            return
        sets = [f"{name}_" for name in several] if isinstance(several, dict) else [""]
        if best.removeprefix("eval_") not in (known := [f"{name}{metric}" for name in sets for metric in METRICS]):
            raise ValueError(f"metric_for_best_model={best!r}: an evaluation has {', '.join(known)}; others are a "
                             "callback's, as sequence.metrics.Measures")  # fmt: skip

    def _share(self, update: Update, source: str) -> Tensor:
        """What share of its update on a rank a batch is, by what a source's loss is a mean over."""
        number: Any = update.sequences[source].number(self._by_token)
        number = torch.tensor(number, dtype=wide(self.args.device), device=self.args.device)
        share: Tensor = number / update.items.get(source, number)
        return share.nan_to_num(1.0) / update.count

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
            self.watch.add(half.source, half.weight * made, parts, items, self._share(update, half.source),
                           update.count, found.number(True))  # fmt: skip
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
            return of_nothing(loss, student)
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
        """As `Trainer.log`; a training loss is of what is not skipped, beside what `Watch` measures."""
        for name, steps in (("loss", self.watch.steps), ("train_loss", self.watch.ever)):
            if name in logs:
                logs[name] = self.watch.of_counted(logs[name], steps, self.accelerator)
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
            temperature = self.teacher.temperature or 1.0
            return self.step_loss(rows, teacher, resolve("kl"), temperature, reduction="none").reshape(-1)

        of_rows = self._at_head(Half("gold", resolve("kl")), model, found, losses).detach()
        counts = found.tokens()
        of_rows = of_rows[: sum(counts)].to(wide(of_rows.device))
        return torch.stack([torch.stack([x.sum() for x in of_rows.split(counts)]), of_rows.new_tensor(counts)], 1)

    def evaluate(self, *args: Any, **keywords: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; neither it nor what callbacks do in it is time of training, or changes its draws."""
        with self._apart():
            return super().evaluate(*args, **keywords)

    def predict(self, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.predict`, which is no part of training either."""
        with self._apart():
            return super().predict(*args, **keywords)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What is done inside takes no time of training and none of its random numbers, as loaders take for a seed."""
        with self.watch.apart(), generators_kept(self.args.device):
            yield

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool,
                        ignore_keys: Any = None) -> Any:  # fmt: skip
        """The evaluation loss of a batch. No logits are made."""
        with torch.no_grad():
            found = self._gold_kl(model, self._prepare_inputs(inputs))
        copies = copies_of_rows(self._unwrapped(self.model))
        every = of_all_rows(found, self.accelerator, copies, None if self._streamed is None else self._streamed.number)
        self._evaluated += every.sum(0).cpu()
        return (found[:, 0].sum() / found[:, 1].sum().clamp_min(1)).float(), None, None

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`, but over ranks a stream in several files is read as a whole by each.

        Its workers' seeds are no random numbers of training, of which a loader takes one in each epoch, or, where its
        workers are persistent, in its first: that of a run which goes on may be another.
        """
        kept: Any = self.train_dataset
        if self.args.world_size > 1 and getattr(kept, "n_shards", 1) > 1:
            self.train_dataset = Counted(kept)
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.train_dataset = kept
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer.get_eval_dataloader`, but over ranks a stream is read as a whole by each, and without workers."""
        of: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[of] if isinstance(of, str) else of  # type: ignore[index]
        with self._without_workers(data) as stream:
            return super().get_eval_dataloader(eval_dataset if stream is None else stream)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._without_workers(test_dataset) as stream:
            return super().get_test_dataloader(test_dataset if stream is None else stream)

    @contextlib.contextmanager
    def _without_workers(self, data: Any) -> Iterator[Any]:
        """Over ranks, a stream: rows fill up its last batch, which workers would count in their own processes."""
        kept = self.args
        stream = Counted(data) if kept.world_size > 1 and data is not None and not has_length(data) else None
        if stream is not None:
            self.args = copy.copy(kept)
            for name in ("dataloader_num_workers", "dataloader_prefetch_factor", *OF_WORKERS):
                setattr(self.args, name, getattr(FDistillConfig, name, None))
        try:
            yield stream
        finally:
            self.args = kept

    def evaluation_loop(self, dataloader: Any, *args: Any, **keywords: Any) -> Any:
        """As `Trainer.evaluation_loop`, but the loss is a mean over all tokens, not over batches."""
        self._evaluated.zero_()
        shard: Any = getattr(dataloader, "dataset", None)
        self._streamed = None
        filled = isinstance(shard, IterableDatasetShard) and not shard.drop_last
        if filled and not dataloader.num_workers:  # which would count in their own processes
            shard.dataset = self._streamed = Counted(shard.dataset)
        self._evaluating = True
        try:
            with as_found(self._unwrapped(self.model)):
                output = super().evaluation_loop(dataloader, *args, **keywords)
        finally:
            self._evaluating = False
        loss, tokens = self._evaluated.tolist()
        metrics = output.metrics or {}
        metrics.update({name: loss / max(tokens, 1) for name in metrics if name.endswith("_loss")})
        return output
