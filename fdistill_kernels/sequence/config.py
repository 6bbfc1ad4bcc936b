"""The trainer's arguments. Each is used, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..checks import check_choice, check_integer, check_number, own_number
from ..own import resolve
from ..teachers.connection import without_credentials
from ..tokens import TEMPERATURES
from .objectives import METHODS, SOURCES, Half, method, mixture, with_cross_entropy
from .ranks import join
from .sampling import Sampling


@dataclass
class FDistillConfig(TrainingArguments):
    """`TrainingArguments` with the settings of distillation.

    label_smoothing_factor applies to the cross-entropies. Options of `TrainingArguments` about the logits of evaluation
    are refused, because no logits are made. ``fdistill train --help`` shows the first sentence of each attribute.

    Attributes:
        method: objective: seqkd, kl, engine, rkl, js, tvd or mle (Wen et al., ACL 2023), or predistill.
        beta: weight of the student's half in method js and tvd, from 0 to 1; js uses the mixture βq + (1 − β)p.
        divergence: instead of a method, a divergence of `fdistill list`, such as js or alpha=0.3, or JSON with one for
            each source of sequences, {"teacher": "skew_kl=0.1", "student": "skew_rkl=0.1"}. In Python also instances
            and a mapping.
        shares: with a divergence: weights of teacher, student, gold and beam sequences, as in student=0.7,gold=0.3;
            default: gold alone, or for several divergences equal weights that sum to 1. In Python also a mapping.
        ce_weight: weight of −log q of the gold targets, which is added to the objective.
        temperature: temperature of both models' distributions in the loss.
        temperature_squared: multiply the divergences by temperature² (Hinton et al., 2015).
        max_new_tokens: maximum length of a sample of either model, in tokens.
        sample_temperature: temperature at which samples of both models are drawn.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens with this total probability; 1: from all.
        cache_implementation: transformers' cache of keys and values while drawing, such as dynamic or static (compiled
            on a GPU); default: the model's own.
        beams: number of beams of the teacher's search, for beam sequences (method seqkd) of which the data has no
            beam_ids, nor sample_ids, which stand for them where the objective has no samples of the teacher.
        student_every: number of steps between new samples of the student. In between the last ones are used again;
            checkpoints keep them.
        student_server: URL of a vLLM server that draws the student's samples, with student_server_path. See
            `student_server.StudentServer`.
        student_server_path: folder for the weights, of this run alone, which student_server sees under the same path.
        normalize: what the loss is a mean over: token, or sequence (each a sum over its tokens, as in the paper). The
            mean is over all accumulated batches and all ranks, with the samples drawn for them, so that they give the
            gradient of one large batch.
        freeze_embeddings: do not train the student's input embeddings (nor an output embedding tied to them).
        pack: give causal models a batch as one row of sequences, without padding.
        memory: how the loss holds its logits: chunks, or minimal (less memory, more time, and no entropies are logged,
            because they need another pass over the rows). See `linear_f_divergence`.
        on_nan: if the loss is not finite, stop (and save the batch) or skip (the batch).
        hidden_weight: in pre-distillation, weight of the hidden states' MSE; 0: none. See `predistillation_loss`, which
            uses the next two beside, and none of the options of the loss above.
        hidden_normalize: in pre-distillation, layer-normalise the hidden states before their MSE.
        hidden_reduction: in pre-distillation, mean or sum of the MSE over the student's layers.

    Raises:
        ValueError: an option is out of range, unknown, or would not be used; the message names it.
    """

    method: str = "tvd"
    beta: float = 0.5
    divergence: dict | str | None = None  # type: ignore[type-arg]
    shares: dict | str | None = None  # type: ignore[type-arg]
    ce_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False
    max_new_tokens: int = 64
    sample_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache_implementation: str | None = None
    beams: int = 4
    student_every: int = 1
    student_server: str | None = None
    student_server_path: str | None = None
    normalize: str = "token"
    freeze_embeddings: bool = False
    pack: bool = False
    memory: str = "chunks"
    on_nan: str = "stop"
    hidden_weight: float = 3.0
    hidden_normalize: bool = True
    hidden_reduction: str = "mean"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # which are written to files
            if field.init and hasattr(self, field.name):
                setattr(self, field.name, _own(getattr(self, field.name)))
        if self.ddp_backend is not None and "WORLD_SIZE" not in os.environ:  # accelerate asks for the group's size
            raise ValueError(f"ddp_backend={self.ddp_backend!r} is not used by one process: torchrun starts several")
        if self.use_cpu:
            join(self.ddp_timeout, self.ddp_backend)
        for name in MAY_BE_JSON:  # which TrainingArguments reads without saying which one it could not
            _of_json(name, getattr(self, name, None))
        for name in ("parallelism_config", "accelerator_config"):  # likewise
            if isinstance(given := _of_json(name, getattr(self, name, None)), Mapping):
                setattr(self, name, _of_accelerate(name, given))
        self._check_numbers()
        self._check_choices()
        super().__post_init__()  # in which eval_steps=0 becomes logging_steps
        self.remove_unused_columns = False  # the collator's columns are not the model's arguments
        self.divergence, self.shares = _of_json("divergence", self.divergence), _shares(self.shares)
        for name, known in (("normalize", ("token", "sequence")), ("on_nan", ("stop", "skip")),
                            ("memory", ("chunks", "minimal")), ("hidden_reduction", ("mean", "sum"))):  # fmt: skip
            check_choice(name, getattr(self, name), known)
        self._check_server()
        self._check_used()
        self._check_checkpointing()
        self._check_accumulation()

    def _check_checkpointing(self) -> None:
        """Raises ValueError for what the first step would refuse."""
        given: Any = self.gradient_checkpointing_kwargs or {}
        of_torch = dict(given)
        if hasattr(self, "activation_checkpointing_kwargs"):  # two of which `Trainer` takes for the model
            check_integer("every_n_layers", of_torch.pop("every_n_layers", 1), 1)
            if of_torch.pop("offload", False) and self.device.type == "cpu":
                raise ValueError("gradient_checkpointing_kwargs: offload moves an accelerator's tensors to the host's "
                                 "memory, where a CPU's are: leave it out")  # fmt: skip
        if of_torch:
            try:
                checkpoint(torch.relu, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **of_torch})
            except (TypeError, ValueError) as error:
                raise ValueError(f"gradient_checkpointing_kwargs={given}: {error}") from error

    def _check_accumulation(self) -> None:
        """Raises ValueError for what accelerate would refuse, and an order of rows that no run could go on with."""
        loaders: Any = self.accelerator_config
        if not loaders.use_seedable_sampler:
            raise ValueError("accelerator_config's use_seedable_sampler=False is not used here: the seed and the epoch "
                             "decide the order of rows, so that runs can be gone on with")  # fmt: skip
        given = loaders.gradient_accumulation_kwargs or {}
        check_integer("num_steps", given.get("num_steps", 1), 1)
        try:
            GradientAccumulationPlugin(**{"num_steps": 1, **given})
        except TypeError as error:
            raise ValueError(f"accelerator_config's gradient_accumulation_kwargs={given}: {error}") from error

    def _check_choices(self) -> None:
        """Raises ValueError for words that `Trainer` would take for its default, or refuse when it begins."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (known := field.metadata.get("choices")):
                check_choice(field.name, value, tuple(known))
        if self.torch_compile_backend is not None:
            known = [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO]
            check_choice("torch_compile_backend", self.torch_compile_backend.lower(), known)

    def _check_numbers(self) -> None:
        for name, least in INTEGERS.items():
            if not self._is_left_out(name):
                check_integer(name, getattr(self, name), least)
        for name, bounds in NUMBERS.items():
            if not (self._is_left_out(name) or (name, getattr(self, name)) == ("max_grad_norm", math.inf)):
                check_number(name, getattr(self, name), *bounds)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")
        if self.max_steps == 0:  # which Trainer takes for -1
            raise ValueError("max_steps must be at least 1, or -1 beside num_train_epochs, not 0")

    def _check_server(self) -> None:
        if self.student_server and (bare := without_credentials(self.student_server)) != self.student_server:
            raise ValueError(f"student_server={bare!r} was given with a user, and configurations are written to files: "
                             "give a key as the environment variable FDISTILL_API_KEY")  # fmt: skip
        if bool(self.student_server) != bool(self.student_server_path):
            raise ValueError("student_server and student_server_path go together: who draws the student's samples, and "
                             "where it finds the weights")  # fmt: skip

    def _check_used(self) -> None:
        """Raises ValueError for what is given and changes nothing."""
        halves, _ = self.halves(), self.sampling()
        draws = any(h.source == "student" for h in halves)
        compared = any(h.divergence is not None for h in halves)
        labelled, strategy = any(h.labelled for h in halves), sampling_strategy(self)
        unused: tuple[tuple[Any, Sequence[str], str], ...] = (
            (not halves, NOT_IN_PREDISTILLATION, "by predistill"),
            (self.divergence is None, ("shares",), "without a divergence"),
            (self.divergence is not None, ("method", "beta"), "beside a divergence"),
            (not draws, ("student_every", "student_server"), "without an objective on the student's samples"),
            (self.student_server, ("cache_implementation",), "by a server"),
            (not compared, ("temperature", "temperature_squared"), "without a divergence"),
            (not labelled, ("label_smoothing_factor",), "without a cross-entropy, as mle, seqkd and ce_weight have"),
            (self.device.type == "cpu" and not self.deepspeed, ("fp16",),
             "on a CPU, for which accelerate has no float16: take bf16"),
            (not self.gradient_checkpointing, ("gradient_checkpointing_kwargs",), "without gradient_checkpointing"),
            (not self.use_liger_kernel, ("liger_kernel_config",), "without use_liger_kernel"),
            (not self.push_to_hub, ("hub_strategy", "hub_always_push"), "without push_to_hub"),
            (not self.dataloader_num_workers, OF_WORKERS, "without dataloader_num_workers"),
            (strategy == "batch_rebalance", ("auto_find_batch_size",), "by train_sampling_strategy=batch_rebalance"),
            (strategy not in BY_LENGTHS, ("length_column_name",), "without batches by length"),
            (self.eval_strategy == "no", ("metric_for_best_model",), "without an eval_strategy"),
            (self.metric_for_best_model is None, ("greater_is_better",), "without a metric_for_best_model"),
            (True, (*OF_LOGITS, "eval_do_concat_batches"), "here: no logits are made"),
            (True, ("logging_nan_inf_filter",), "here: on_nan says what becomes of these"),
            (self.include_num_input_tokens_seen not in (False, "no"), ("include_num_input_tokens_seen",),
             "here: tokens_per_second is logged"),
            (self.world_size > 1 and not self.average_tokens_across_devices, ("average_tokens_across_devices",),
             "here: a loss is a mean over all ranks' tokens"),
            *((True, (name,), f"by {said}") for name, said in idle(vars(self)).items()),
        )  # fmt: skip
        for here, names, why in unused:
            for name in names if here else ():
                if is_changed(self, name):
                    raise not_used(self, name, why)

    def _is_left_out(self, name: str) -> bool:
        """Whether an option has None for its default, or is none of this transformers'."""
        return getattr(self, name, None) is None and getattr(type(self), name, None) is None

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation while training, or before it."""
        return self.eval_strategy != "no" or self.eval_on_start

    def halves(self) -> tuple[Half, ...]:
        """The objective; empty for pre-distillation."""
        if self.divergence is not None:
            of = self.divergence if isinstance(self.divergence, Mapping) else resolve(self.divergence)
            return with_cross_entropy(mixture(of, **(self.shares or {})), self.ce_weight)  # type: ignore[arg-type]
        if self.method == "predistill":
            return ()
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}, predistill")
        return with_cross_entropy(method(self.method, self.beta), self.ce_weight)

    def sampling(self, beams: bool = False) -> Sampling:
        """How sequences are drawn during training, or with `beams` how the teacher's beam-search outputs are made."""
        if beams:
            return Sampling(self.max_new_tokens, beams=self.beams, cache=self.cache_implementation)
        return Sampling(self.max_new_tokens, self.sample_temperature, self.top_k, self.top_p,
                        cache=self.cache_implementation)  # fmt: skip

    def for_predistillation(self, **changes: Any) -> FDistillConfig:
        """This configuration with method="predistill", and defaults for the options that its loss does not use."""
        kept = {name: getattr(FDistillConfig, name) for name in NOT_IN_PREDISTILLATION}
        return dataclasses.replace(self, **{**kept, "method": "predistill", **changes})

    def to_dict(self) -> dict[str, Any]:
        """As a dict for JSON, with divergences as text."""
        return {**super().to_dict(), "divergence": _as_text(self.divergence)}

    def __getstate__(self) -> dict[str, Any]:
        """For a checkpoint: divergences become text if their functions cannot be pickled."""
        try:
            pickle.dumps(self.divergence)
        except Exception:  # pickle has many for it
            return {**vars(self), "divergence": _as_text(self.divergence)}
        return dict(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> FDistillConfig:
        made = object.__new__(type(self))
        vars(made).update({name: value if name == "divergence" else copy.deepcopy(value, memo)
                           for name, value in vars(self).items()})  # fmt: skip
        return made


#: Options that are integers, and their least values.
INTEGERS = {
    "beams": 1, "student_every": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_steps": -1, "save_total_limit": 1, "seed": 0, "data_seed": -(2**63),
    "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1, "ddp_timeout": 1, "ddp_bucket_cap_mb": 1,
}  # fmt: skip
#: Options that are numbers, and their bounds, as `check_number` takes them. `Trainer` takes some of what is beyond for
#: "never", "always", "no limit" or another option's value.
NUMBERS: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("hidden_weight", "neftune_noise_alpha", "learning_rate", "weight_decay", "adam_epsilon",
                     "max_grad_norm", "num_train_epochs", "warmup_steps", "eval_delay"), (0, math.inf, False)),
    **dict.fromkeys(("sample_temperature", "eval_steps", "save_steps", "logging_steps"), (0, math.inf, True)),
    "temperature": (*TEMPERATURES, False),
    **dict.fromkeys(("label_smoothing_factor", "warmup_ratio"), (0, 1, False)),
}  # fmt: skip
_WARMUP = ("warmup_steps", "warmup_ratio")
#: Options that a schedule of the learning rate makes nothing of.
NOT_OF_SCHEDULE: dict[str, tuple[str, ...]] = {
    "constant": (*_WARMUP, "lr_scheduler_kwargs"), "constant_with_warmup": ("lr_scheduler_kwargs",),
    "reduce_lr_on_plateau": _WARMUP, "greedy": _WARMUP,
}  # fmt: skip
#: What has a strategy, and options of it beside its steps.
OF_STRATEGY: dict[str, tuple[str, ...]] = {
    "eval": ("eval_delay",), "save": ("save_total_limit", "save_only_model"), "logging": (),
}  # fmt: skip
#: Options of the processes that load batches.
OF_WORKERS = ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order")
#: Strategies that make batches by the lengths of rows.
BY_LENGTHS = ("group_by_length", "batch_rebalance")
#: Options of `TrainingArguments` that may be JSON text.
MAY_BE_JSON = ("accelerator_config", "fsdp_config", "deepspeed", "gradient_checkpointing_kwargs",
               "activation_checkpointing_kwargs", "lr_scheduler_kwargs")  # fmt: skip
#: Options of `TrainingArguments` about the logits of evaluation and their metrics.
OF_LOGITS = ("label_names", "include_for_metrics", "batch_eval_metrics", "include_inputs_for_metrics",
             "eval_accumulation_steps", "eval_use_gather_object")  # fmt: skip
#: Options of the loss of pre-distillation alone; a configuration of another method keeps them for it.
OF_PREDISTILLATION = ("hidden_weight", "hidden_normalize", "hidden_reduction")
#: Options of the loss that pre-distillation does not use.
NOT_IN_PREDISTILLATION = ("beta", "divergence", "shares", "ce_weight", "temperature", "temperature_squared",
                          "beams", "student_every", "student_server", "student_server_path", "normalize", "pack",
                          "memory", "label_smoothing_factor")  # fmt: skip


def is_changed(args: Any, name: str) -> bool:
    """Whether an option has another value than its default; what is empty, or not this transformers', is None."""
    value, default = (None if not found and found is not False else found
                      for found in (getattr(of, name, None) for of in (args, FDistillConfig)))  # fmt: skip
    return bool(value != default)


def not_used(args: Any, name: str, why: str) -> ValueError:
    """The error of an option that changes nothing."""
    value = getattr(args, name)
    return ValueError(f"{name}={getattr(value, 'value', value)!r} is not used {why}")


def sampling_strategy(args: Any) -> str:
    """How rows are ordered, by the name that transformers 5 gives it."""
    by_length = "group_by_length" if getattr(args, "group_by_length", False) else "random"
    return str(getattr(args, "train_sampling_strategy", by_length))


def idle(options: Mapping[str, Any]) -> dict[str, str]:
    """Options that the strategies and the schedule among them make nothing of, each with the one it is."""

    def word(name: str) -> Any:
        value = options.get(name, getattr(FDistillConfig, name))
        return getattr(value, "value", value)

    found: dict[str, str] = {}
    for what, more in OF_STRATEGY.items():
        strategy = word(f"{what}_strategy")
        names = () if strategy == "steps" else (f"{what}_steps", *(more if strategy == "no" else ()))
        found |= dict.fromkeys(names, f"{what}_strategy={strategy}")
    schedule = word("lr_scheduler_type")
    return found | dict.fromkeys(NOT_OF_SCHEDULE.get(schedule, ()), f"lr_scheduler_type={schedule}")


def _of_accelerate(name: str, given: Mapping[str, Any]) -> Any:
    """A configuration of accelerate's by its fields."""
    kind: Any = AcceleratorConfig
    if name == "parallelism_config":  # of which older ones have no class
        kind = importlib.import_module("accelerate.parallelism_config").ParallelismConfig
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={dict(given)}: {error}") from error


def _own(value: Any) -> Any:
    """With Python's own numbers, also inside dictionaries."""
    return {name: _own(inside) for name, inside in value.items()} if type(value) is dict else own_number(value)


def _of_json(name: str, value: Any) -> Any:
    """A mapping that may be given as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if name == "divergence" and not all(isinstance(of, str) for of in found.values()):
        raise ValueError(f"divergence must name each source's, not {value}")
    return found


def _shares(value: Any) -> dict[str, float] | None:
    """Shares by source, from a mapping or from text as in student=0.7,gold=0.3."""
    value = _of_json("shares", value)
    try:
        pairs = [part.split("=") for part in value.split(",")] if isinstance(value, str) else dict(value or {}).items()
        found = {source.strip(): float(share) for source, share in pairs}
        if len(found) < len(pairs):
            raise ValueError("a source twice")
    except (TypeError, ValueError):
        raise ValueError(f"shares must be as in student=0.7,gold=0.3, or a mapping, not {value!r}") from None
    if unknown := found.keys() - set(SOURCES):
        raise ValueError(f"shares have unknown sources {sorted(unknown)}; known: {', '.join(SOURCES)}")
    return found or None


def _as_text(divergence: Any) -> Any:
    if isinstance(divergence, Mapping):
        return {source: _as_text(of) for source, of in divergence.items()}
    return divergence if divergence is None or isinstance(divergence, str) else str(resolve(divergence))
