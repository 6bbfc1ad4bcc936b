"""What the sequence commands can be asked for: dataclasses, made into options and YAML by `HfArgumentParser`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.quantizers.auto import AutoQuantizationConfig

from ..sparse import TAILS
from .metrics import MEASURES
from .objectives import METHODS
from .sampling import Sampling
from .trainer import FDistillConfig

#: Batches of like lengths, which are little padded; transformers 5 has another name for it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"} if hasattr(FDistillConfig, "train_sampling_strategy")
    else {"group_by_length": True}
)  # fmt: skip
_4 = transformers.__version__.startswith("4.")
#: Where the commands begin, if not where `TrainingArguments` do. Below 1: shares of all steps.
DEFAULTS: dict[str, Any] = {
    "output_dir": "fdistill-run", "max_steps": 1000, "learning_rate": 1e-4, "top_k": 30, "report_to": "none",
    "warmup_ratio" if _4 else "warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.25,
    "save_total_limit": 1, "logging_steps": 0.02, "per_device_eval_batch_size": 32, **BY_LENGTH,
}  # fmt: skip

Policy = Literal["cut", "drop", "refuse"]


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

    def source(self, prefix: str = "") -> dict[str, Any]:
        """What `load_config` takes for the student, or with "teacher_" for the teacher."""
        revision = getattr(self, prefix + "revision")
        return {"trust_remote_code": self.trust_remote_code, **({"revision": revision} if revision else {})}

    def options(self, prefix: str = "") -> dict[str, Any]:
        """What `load_model` takes for the student, or with "teacher_" for the teacher."""
        dtype, quantization = getattr(self, prefix + "dtype"), getattr(self, prefix + "quantization")
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"--{prefix}dtype must be auto or a dtype of torch, not {dtype!r}")
        found = {
            **self.source(prefix),
            "torch_dtype" if _4 else "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
            "attn_implementation": self.attn_implementation, "device_map": self.device_map if prefix else None,
        }  # fmt: skip
        if quantization:
            short = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
            asked = json.loads(quantization) if quantization.startswith("{") else short.get(quantization)
            found["quantization_config"] = AutoQuantizationConfig.from_dict(asked or {"quant_method": quantization})
        return {name: value for name, value in found.items() if value is not None}


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
    """The data, and what becomes of rows that are too long."""

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
    answers: Literal["together", "each"] = "together"
    teacher_system: str | None = None


@dataclass
class RunArguments:
    """What a run does beside training."""

    _argument_group_name = "the run"

    predistill_steps: int = 0
    online_teacher: bool = False
    samples: str | None = None
    beams: int = 4
    vllm_url: str | None = None
    k: int = 64
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


HELP = {
    "teacher": "folder or hub name; a store's folder (`fdistill teacher build`); a server's URL",
    "student": "folder or hub name, of an adapter too",
    "student_layers": "make the student of the teacher's layers: 3,1 (encoder,decoder) or 4 (causal)",
    "tokenizer": "folder or hub name; by default the teacher's, of a server the student's",
    "chat_template_path": "a Jinja file in the place of the tokenizer's template",
    "dtype": "of the student's weights, which the optimizer adds to; auto: as its files have",
    "teacher_dtype": "of the teacher's weights; auto: as its files have",
    "attn_implementation": "of both models: sdpa, flash_attention_2, eager, ...",
    "device_map": "of the teacher: auto spreads it over cards",
    "revision": "of the student on the hub", "teacher_revision": "of the teacher on the hub",
    "trust_remote_code": "run code that comes with a model",
    "quantization": "of the student, beside --use_peft: 4bit, 8bit (bitsandbytes), a quant_method of transformers, or "
                    "JSON of its configuration",
    "teacher_quantization": "of the teacher, as --quantization",
    "use_peft": "train an adapter alone", "lora_target_modules": "by default PEFT's of the architecture",
    "lora_modules_to_save": "trained whole beside the adapter",
    "data": ".jsonl, .json, .csv, .tsv or .parquet; or a hub dataset",
    "eval_data": "held-out rows; by default the last tenth of the data at most", "eval_pairs": "held-out rows at most",
    "dataset_config": "of a hub dataset", "dataset_train_split": "of a hub dataset, for --data",
    "dataset_test_split": "of a hub dataset, for --eval_data", "limit": "use the first rows of the data alone",
    "prompt_column": "of text or messages", "target_column": "of text or messages; completion is its other name",
    "long_prompts": "that a context has no room for: cut from the left, drop the row, or refuse",
    "long_targets": "that a context has no room for, or --max_target_tokens: cut without an end token, drop, refuse",
    "max_target_tokens": "of a gold target",
    "answers": "of a conversation: together in a row, or each in one of its own, which any chat template can render",
    "teacher_system": "system message that the teacher alone sees",
    "predistill_steps": "steps of pre-distillation first", "beams": "of the teacher's outputs for seqkd",
    "online_teacher": "draw the teacher's samples anew at every step",
    "samples": "folder of the teacher's samples, for several runs to share; by default in the run's folder",
    "vllm_url": "a vLLM server of the teacher, to draw its samples from",
    "k": "log-probabilities of each token that a server is asked for, or a store of lists keeps",
    "tail": "of lists: " + ", ".join(t for t in TAILS if t != "sampled"),
    "tensor_parallel": "ranks that share each of the student's layers and its head; such groups share the weights by "
                       "FSDP2; a run that is killed begins anew",
    "eval_measures": "perplexity, risks, BLEU, chrF and TER at every evaluation",
    "kind": "states after the final norm, for any divergence and temperature; or the largest log-probabilities",
    "sequences": "of gold, teacher and beam, those that objectives to come are on; held-out rows are always gold",
    "states": "float32, float16, bfloat16 or int8", "log_probs": "float16 or uint8",
    "head_rank": "keep states in so many of the head's singular directions",
    "method": ", ".join(METHODS), "beta": "weight of the student's half in js and tvd",
    "divergence": "instead of the method: any of `fdistill list`, on the sequences that --shares says",
    "shares": "of teacher, student, gold and beam sequences, as in student=0.7,gold=0.3",
    "ce_weight": "of cross-entropy on gold targets beside", "temperature": "of both models in the loss",
    "temperature_squared": "times its square", "student_every": "steps between new samples of the student",
    "student_server": "a vLLM server of the student, to draw its samples from",
    "student_server_path": "a folder that it sees too, for the weights",
    "normalize": "token or sequence: what the loss is a mean over", "pack": "a batch in one row, of causal models",
    "freeze_embeddings": "leave the student's input embeddings as they are", "memory": "of the loss: chunks or minimal",
    "on_nan": "stop or skip the batch", "max_new_tokens": "of a sample", "sample_temperature": "of samples",
    "top_k": "of samples; 0: every token", "top_p": "of samples; 1: every token",
    "cache_implementation": "of keys and values while drawing: dynamic, static (on a GPU compiled), ...",
}  # fmt: skip


#: What commands make something of, if not of all but `BuildArguments`.
_OF_TEACHER = {"teacher", "tokenizer", "chat_template_path", "attn_implementation", "device_map", "trust_remote_code",
               "teacher_dtype", "teacher_revision", "teacher_quantization"}  # fmt: skip
_OF_SAMPLES = {"max_new_tokens", "sample_temperature", "top_k", "top_p", "cache_implementation", "seed", "use_cpu"}
_OF_DATA = {f.name for f in dataclasses.fields(DataArguments)}
_OF_BUILD = {f.name for f in dataclasses.fields(BuildArguments)}
USED: dict[str, set[str]] = {
    "evaluate": _OF_TEACHER | _OF_SAMPLES | _OF_DATA - {"eval_pairs"}
    | {"student", "dtype", "revision", "quantization"},
    "teacher build": _OF_TEACHER | _OF_SAMPLES | _OF_DATA | _OF_BUILD
    | {"output_dir", "per_device_eval_batch_size", "k", "beams"},
}  # fmt: skip

#: The least value of numbers that nobody else checks.
LEAST = {
    "limit": 1, "eval_pairs": 1, "max_target_tokens": 1, "predistill_steps": 0, "beams": 1, "k": 1, "lora_r": 1,
    "tensor_parallel": 1,
    "max_steps": 1,
}  # fmt: skip

#: Options of `TrainingArguments` for scripts, which nothing here would make anything of.
UNUSED = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "overwrite_output_dir"}

#: What people may call an option: this command's names before 0.3, and TRL's.
CALLED = {
    "steps": "max_steps", "batch": "per_device_train_batch_size (of `teacher build` per_device_eval_batch_size)",
    "out": "output_dir", "evaluate_every": "eval_steps, with --eval_measures", "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher", "dataset_name": "data", "load_in_4bit": "quantization 4bit",
    "load_in_8bit": "quantization 8bit", "torch_dtype": "dtype", "model_revision": "revision",
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps, of which a number below 1 is a share of all steps",
    "group_by_length": "train_sampling_strategy group_by_length",
}  # fmt: skip


def _hint(words: str) -> str:
    told = [f"--{old} is --{CALLED[name]}" for old in re.findall(r"[\w-]+", words)
            if (name := old.lstrip("-").replace("-", "_")) in CALLED]  # fmt: skip
    return f"{words} ({'; '.join(told)})".replace("----", "--") if told else words


class Parser(HfArgumentParser):
    """One whose errors are a line."""

    def error(self, message: str) -> Any:
        """Raises ValueError."""
        raise ValueError(_hint(message) if "unrecognized" in message else message)


@dataclass
class Asked:
    """What a command was asked for; `given` is what was said, as config.yaml has it."""

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
        """The trainer's configuration; another one made later would take accelerate's state from a trainer."""
        return FDistillConfig(**self.training)

    def settings(self) -> dict[str, Any]:
        """All that decides a run, for people."""
        kinds = (self.model, self.data, self.run, *([self.lora] if self.lora.use_peft else []))
        return {n: v for kind in kinds for n, v in vars(kind).items() if v is not None} | self.training

    def sampling(self, beams: bool = False) -> Sampling:
        """Of the teacher's stored samples, or its beam-search outputs."""
        if beams:
            return Sampling(self.config.max_new_tokens, beams=self.run.beams, cache=self.config.cache_implementation)
        return self.config.sampling()


KINDS = {"model": ModelArguments, "lora": LoraArguments, "data": DataArguments, "run": RunArguments,
         "build": BuildArguments}  # fmt: skip


def ask(command: str, argv: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Asked:
    """The command line over --config's YAML over settings over the defaults.

    Raises:
        ValueError: an option that is unknown, of another kind, not of the command, or at odds with another.
    """
    kinds = {name: kind for name, kind in KINDS.items() if name != "build" or command == "teacher build"}
    types: Any = [*kinds.values(), FDistillConfig]
    parser = Parser(types, prog=f"fdistill {command}", usage="%(prog)s [options]", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML of these options, as a run's config.yaml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(**DEFAULTS)
    names, used = {a.dest: a.default for a in parser._actions}, USED.get(command)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        if action.dest == "report_to":  # its type is a text or a list, of which HfArgumentParser takes the text alone
            action.nargs = "*"
        if action.dest in UNUSED or (used and action.dest not in used | {"help", "config", "json"}):
            action.help = argparse.SUPPRESS
    absent = object()
    blank = argparse.Namespace(**dict.fromkeys(names, absent))  # so that what is not said stays absent
    path = parser.parse_known_args(argv, argparse.Namespace())[0].config
    said = {**(settings or {}), **_yaml(path, set(names))}
    no = {a.dest for a in parser._actions if "no" in (a.choices or ())}
    said = {name: "no" if value is False and name in no else value for name, value in said.items()}  # YAML's no
    found = vars(parser.parse_args([*_arguments(said), *argv], blank))
    given = {name: None for name, value in said.items() if value is None}
    given |= {name: value for name, value in found.items() if value is not absent}
    given = {name: value for name, value in given.items() if name not in ("config", "json")}
    if unused := sorted(given.keys() - used if used else given.keys() & UNUSED):
        raise ValueError(f"`fdistill {command}` makes nothing of --{', --'.join(unused)}")
    made: dict[str, Any] = {name: kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given})
            for name, kind in KINDS.items()}  # fmt: skip
    defaults = {k: v for k, v in DEFAULTS.items() if (k != "max_steps" or "num_train_epochs" not in given)
                and (k != "warmup_ratio" or "warmup_steps" not in given)}  # fmt: skip
    of_trainer = {f.name for f in dataclasses.fields(FDistillConfig)}
    training = {"use_cpu": not torch.accelerator.is_available()} | defaults  # else ranks without a card train apart
    training |= {k: v for k, v in given.items() if k in of_trainer}
    best = str(given.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if best != "loss" and not (made["run"].eval_measures and best in MEASURES):
        raise ValueError("--metric_for_best_model must be loss, or beside --eval_measures one of "
                         f"{', '.join(MEASURES)}, not {best}")  # fmt: skip
    if best in MEASURES:
        training.setdefault("greater_is_better", MEASURES[best])
    asked = Asked(command, given, **made, training=training, defaults=names, json=found["json"] is True)
    _check(asked)
    return asked


class _Loader(yaml.SafeLoader):
    """One that takes 1e-4 for a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+$", re.IGNORECASE),
                              list("-+.0123456789"))  # fmt: skip


def _yaml(path: str | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    settings = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be options and their values, not {type(settings).__name__}")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if unknown := sorted(set(settings) - known):
        raise ValueError(_hint(f"{path} has unknown keys: {', '.join(unknown)}"))
    return settings


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line, which makes numbers of what YAML takes for text."""
    made: list[str] = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            made += [f"--{name}", *map(str, value)]
        elif value is not None:
            made.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return made


def _check(asked: Asked) -> None:
    """Raises ValueError for options that are missing, too small, or at odds."""
    model, given = asked.model, asked.given
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and value < least and not (name == "max_steps" and "num_train_epochs" in given):
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if (epochs := given.get("num_train_epochs")) is not None and epochs <= 0:
        raise ValueError(f"--num_train_epochs must be positive, not {epochs:g}")
    if not model.teacher:
        raise ValueError("--teacher is needed")
    if not (asked.data.data or (asked.command == "evaluate" and asked.data.eval_data)):
        raise ValueError("--data is needed")
    train, test = (
        bool(path) and not Path(path).is_file() for path in (asked.data.data or "", asked.data.eval_data or "")
    )
    hub = {"dataset_config": train or test, "dataset_train_split": train, "dataset_test_split": test}
    for name, used in hub.items():
        if given.get(name) and not used:
            raise ValueError(f"--{name} is of a hub dataset, and none is there to take it")
    if model.student and model.student_layers:
        raise ValueError("--student_layers makes a student, and --student names another: give one of them")
    if not re.fullmatch(r"\d+(,\d+)?", model.student_layers or "1"):
        raise ValueError(f"--student_layers must be as in 3,1 or 4, not {model.student_layers!r}")
    if lora := [f"--{n}" for n in given if n != "use_peft" and n in vars(asked.lora)]:
        if not asked.lora.use_peft:
            raise ValueError(f"{', '.join(lora)}: of an adapter, which --use_peft asks for")
    elif model.quantization and asked.command != "evaluate" and not asked.lora.use_peft:
        raise ValueError("--quantization leaves the student's weights as they are: train an adapter, --use_peft")
    warmup = given.get("warmup_steps") or 0
    for name in ("max_steps", "predistill_steps"):
        if 0 < (steps := given.get(name) or 0) < warmup:
            raise ValueError(f"--warmup_steps {warmup:g} are more than --{name} {steps}")
    for prefix in ("", "teacher_"):
        model.options(prefix)
    _ = asked.config  # which checks its own
