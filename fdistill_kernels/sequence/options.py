"""The options of the sequence commands, as dataclasses, and what a command was asked for."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.quantizers.auto import AutoQuantizationConfig

from ..teachers.connection import without_credentials
from ..teachers.endpoint import DEFAULT_K
from .data import Answers, Policy
from .loading import DTYPE
from .teachers.given import is_url
from .trainer import FDistillConfig

#: Batches of similar lengths need little padding; transformers 5 has another name for it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"} if hasattr(FDistillConfig, "train_sampling_strategy")
    else {"group_by_length": True}
)  # fmt: skip
_4 = transformers.__version__.startswith("4.")
#: Defaults that differ from those of `TrainingArguments`. Numbers of steps below 1 are shares of all steps.
DEFAULTS: dict[str, Any] = {
    "output_dir": "fdistill-run", "max_steps": 1000, "learning_rate": 1e-4, "top_k": 30, "report_to": "none",
    "warmup_ratio" if _4 else "warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.25,
    "save_total_limit": 1, "logging_steps": 0.02, "per_device_eval_batch_size": 32, **BY_LENGTH,
}  # fmt: skip


@dataclass
class ModelArguments:
    """The two models, and how they are loaded."""

    _argument_group_name = "models"

    teacher: str | None = None
    student: str | None = None
    student_layers: str | None = None
    tokenizer: str | None = None
    chat_template_path: str | None = None
    dtype: str = "float32"
    teacher_dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    revision: str | None = None
    teacher_revision: str | None = None
    trust_remote_code: bool = False
    quantization: str | None = None
    teacher_quantization: str | None = None
    served_model_name: str | None = None
    server_kind: Literal["vllm", "sglang"] = "vllm"

    def source(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `load_config` for the student, or with "teacher_" for the teacher."""
        revision = getattr(self, prefix + "revision")
        return {"trust_remote_code": self.trust_remote_code, **({"revision": revision} if revision else {})}

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `load_model` for the student, or with "teacher_" for the teacher."""
        dtype, quantization = getattr(self, prefix + "dtype"), getattr(self, prefix + "quantization")
        if dtype != "auto" and getattr(getattr(torch, dtype, None), "is_floating_point", False) is not True:
            raise ValueError(f"--{prefix}dtype must be auto or a floating dtype of torch, not {dtype!r}")
        found = {
            **self.source(prefix),
            DTYPE: dtype if dtype == "auto" else getattr(torch, dtype),
            "attn_implementation": self.attn_implementation, "device_map": self.device_map if prefix else None,
        }  # fmt: skip
        if quantization:
            found["quantization_config"] = _quantised(f"--{prefix}quantization {quantization}", quantization)
        return {name: value for name, value in found.items() if value is not None}

    def chat_template(self) -> str:
        """The text of --chat_template_path."""
        try:
            return Path(self.chat_template_path or "").read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ValueError(f"--chat_template_path {self.chat_template_path} cannot be read: {error}") from error


def _quantised(option: str, value: str) -> Any:
    """transformers' configuration of a way to quantise; ValueError for what is none, or for fields that it ignores."""
    short = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
    try:
        asked = json.loads(value) if value.startswith("{") else short.get(value, {"quant_method": value})
        made = AutoQuantizationConfig.from_dict(dict(asked))
    except Exception as error:  # each configuration has its own for it
        raise ValueError(f"{option}: {type(error).__name__} {error}") from error
    if getattr(made, "load_in_8bit", None) is False and not made.load_in_4bit:  # which loads in 4 bits
        raise ValueError(
            f"{option} says neither 4 nor 8 bits: give 4bit, 8bit, or load_in_4bit or load_in_8bit as JSON"
        )
    if unknown := sorted(name for name in asked if not (hasattr(made, name) or name in made.to_dict())):
        raise ValueError(f"{option}: {type(made).__name__} makes nothing of {', '.join(unknown)}")
    return made


@dataclass
class LoraArguments:
    """A new adapter on the student, by the names of PEFT's `LoraConfig` and TRL."""

    _argument_group_name = "an adapter on the student"

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class DataArguments:
    """The data, and what happens to rows that are too long."""

    _argument_group_name = "data"

    data: str | None = None
    eval_data: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    limit: int | None = None
    eval_pairs: int = 200
    prompt_column: str = "prompt"
    target_column: str = "target"
    long_prompts: Policy = "refuse"
    long_targets: Policy = "cut"
    max_target_tokens: int | None = None
    answers: Answers = "together"
    teacher_system: str | None = None


@dataclass
class RunArguments:
    """What a run does besides training."""

    _argument_group_name = "the run"

    predistill_steps: int = 0
    online_teacher: bool = False
    samples: str | None = None
    vllm_url: str | None = None
    k: int = DEFAULT_K
    tail: str = "bucket"
    tensor_parallel: int = 1
    eval_measures: bool = False


@dataclass
class BuildArguments:
    """What a store is made of."""

    _argument_group_name = "the store"

    kind: Literal["hidden", "top_k"] = "hidden"
    sequences: str = "gold,teacher"
    states: str = "bfloat16"
    head_rank: int | None = None
    log_probs: str = "float16"


KINDS = {"model": ModelArguments, "lora": LoraArguments, "data": DataArguments, "run": RunArguments,
         "build": BuildArguments}  # fmt: skip
#: Options that a command uses; a command without an entry uses all except `BuildArguments`.
_OF_TEACHER = {"teacher", "tokenizer", "chat_template_path", "attn_implementation", "device_map", "trust_remote_code",
               "teacher_dtype", "teacher_revision", "teacher_quantization"}  # fmt: skip
_OF_SAMPLES = {"max_new_tokens", "sample_temperature", "top_k", "top_p", "cache_implementation", "seed", "use_cpu"}
_OF_DATA = {f.name for f in dataclasses.fields(DataArguments)}
_OF_BUILD = {f.name for f in dataclasses.fields(BuildArguments)}
USED: dict[str, set[str]] = {
    "evaluate": _OF_TEACHER | _OF_SAMPLES | _OF_DATA - {"eval_pairs"}
    | {"student", "dtype", "revision", "quantization", "output_dir", "served_model_name", "server_kind"},
    "teacher build": _OF_TEACHER | _OF_SAMPLES | _OF_DATA | _OF_BUILD
    | {"output_dir", "per_device_eval_batch_size", "k", "beams"},
}  # fmt: skip
#: Options of `TrainingArguments` that are meant for scripts; nothing here uses them.
UNUSED = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "overwrite_output_dir"}
#: Options of the command line alone.
OF_LINE = {"help", "config", "json"}
#: What says how long a run is, and where a trainer's state has how far it is.
LENGTHS = {"max_steps": "global_step", "num_train_epochs": "epoch"}


def how_long(given: Mapping[str, Any]) -> tuple[str, float]:
    """Which of `LENGTHS` the given options name, and its number."""
    steps, epochs = (given.get(name) or 0 for name in LENGTHS)
    return ("num_train_epochs", epochs) if epochs and steps <= 0 else ("max_steps", steps or DEFAULTS["max_steps"])


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may be written to files: those but --hub_token and its kin, and no URL's user and password."""
    return {name: without_credentials(value) if is_url(value) else value
            for name, value in options.items() if not name.endswith("_token")}  # fmt: skip


@dataclass
class Asked:
    """What a command was asked for. `given` holds only the options that were given, as in config.yaml."""

    command: str
    given: dict[str, Any]
    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    run: RunArguments
    build: BuildArguments
    training: dict[str, Any]
    defaults: dict[str, Any]
    json: bool

    @functools.cached_property
    def config(self) -> FDistillConfig:
        """The trainer's configuration. It is made once: another one would take accelerate's state from a trainer."""
        return FDistillConfig(**self.training)

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(str(self.config.output_dir))

    def drawn(self) -> list[str]:
        """The kinds of sequences in the objective, or a store, that the teacher draws: "teacher", "beam", or both."""
        named = {half.source for half in self.config.halves()}
        if self.command == "teacher build":
            named = {source.strip() for source in self.build.sequences.split(",")}
        return sorted(named & {"teacher", "beam"})

    def settings(self) -> dict[str, Any]:
        """Everything that decides a run, for people to read."""
        kinds = (self.model, self.data, self.run, *([self.lora] if self.lora.use_peft else []))
        named = {n: v for kind in kinds for n, v in vars(kind).items() if v is not None}
        return without_secrets(named | self.training)
