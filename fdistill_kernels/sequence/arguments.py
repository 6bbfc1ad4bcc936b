"""The options of the sequence commands: dataclasses, from which `HfArgumentParser` makes options and YAML keys."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.quantizers.auto import AutoQuantizationConfig

from ..sparse import TAILS
from ..teachers.connection import without_credentials
from ..teachers.endpoint import DEFAULT_K
from .data import Answers, Policy
from .metrics import MEASURES
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

    def source(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `load_config` for the student, or with "teacher_" for the teacher."""
        revision = getattr(self, prefix + "revision")
        return {"trust_remote_code": self.trust_remote_code, **({"revision": revision} if revision else {})}

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `load_model` for the student, or with "teacher_" for the teacher."""
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


def _attributes(kind: Any) -> dict[str, str]:
    """The first sentence that a dataclass's docstring has of each of its own fields."""
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE)
    words = {name: " ".join(said.split()) for name, said in found if name in kind.__annotations__}
    return {name: said.removesuffix(".").split(". ")[0] for name, said in words.items()}


_QUANTISED = (
    "4bit, 8bit (bitsandbytes), a quant_method of transformers, or its configuration as JSON; default: not quantised"
)
#: What --help says: of each own option, and of those of `TrainingArguments` that mean something else here.
HELP = {
    "output_dir": "folder of the run, the store, or evaluate's sentences; train and build go on with what is there",
    "max_steps": "number of training steps; a finished run goes on if it grows; not beside --num_train_epochs",
    "num_train_epochs": "number of passes over the data, in place of --max_steps",
    "teacher": "model folder or hub name of the teacher, a store's folder (`teacher build`), or a server's URL",
    "student": "model folder or hub name of the student; may be an adapter, which is trained on",
    "student_layers": "in place of --student: so many of the teacher's layers, 3,1 (encoder,decoder) or 4 (causal)",
    "tokenizer": "folder or hub name of the tokenizer; default: the teacher's, or the student's beside a server",
    "chat_template_path": "Jinja file to use instead of the tokenizer's chat template, for data of messages",
    "dtype": "dtype of the student's weights, which the optimizer updates; auto: as in its files",
    "teacher_dtype": "dtype of the teacher's weights; auto: as in its files",
    "attn_implementation": "attention of both models: sdpa, flash_attention_2, eager, ...; default: transformers' own",
    "device_map": "device map of the teacher; auto spreads it over all cards; default: the student's device",
    "revision": "branch, tag or commit of the --student on the hub; default: its main branch",
    "teacher_revision": "branch, tag or commit of the teacher on the hub; default: its main branch",
    "trust_remote_code": "run the code that comes with a model or its tokenizer",
    "quantization": f"quantise the student (to train it, add --use_peft): {_QUANTISED}",
    "teacher_quantization": f"quantise the teacher: {_QUANTISED}",
    "use_peft": "train only a new LoRA adapter on the student, as the options of this group say",
    "lora_r": "rank of the adapter's matrices, with --use_peft",
    "lora_alpha": "scale of the adapter, with --use_peft: its output is multiplied by lora_alpha/lora_r",
    "lora_dropout": "share of the adapter's inputs that are dropped in training, with --use_peft",
    "lora_target_modules": "names of modules that get an adapter, or all-linear; default: PEFT's for the architecture",
    "lora_modules_to_save": "names of modules to train whole, beside the adapter; default: none",
    "use_rslora": "with --use_peft, multiply the adapter's output by lora_alpha/sqrt(lora_r)",
    "use_dora": "with --use_peft, adapt direction and magnitude of the weights separately (DoRA)",
    "data": "training rows: a .jsonl, .json, .csv, .tsv or .parquet file, or the name of a hub dataset",
    "eval_data": "held-out rows, in such a file or dataset; default: the last tenth of --data, at most --eval_pairs",
    "eval_pairs": "largest number of held-out rows",
    "dataset_config": "configuration of the hub dataset, if it has several",
    "dataset_train_split": "split of the hub dataset that --data names",
    "dataset_test_split": "split of the hub dataset that --eval_data names",
    "limit": "number of rows of --data to use, from the first on; default: all",
    "prompt_column": "column of the prompts, which are text or messages",
    "target_column": "column of the targets, which are text or messages; a column completion is found, too",
    "long_prompts": "prompts too long for a model's context: cut them from the left, drop the row, or refuse",
    "long_targets": "targets too long for a model's context or --max_target_tokens: cut them (without an end token), "
                    "drop the row, or refuse",
    "max_target_tokens": "largest length of a gold target, in tokens; default: as the models' contexts allow",
    "answers": "answers of a conversation: together in one row, or each in its own row, for any chat template",
    "teacher_system": "system message that only the teacher sees, for data of messages",
    "predistill_steps": "steps of pre-distillation before training; 0: none",
    "online_teacher": "draw new samples of the teacher at every step, instead of once before training",
    "samples": "folder of the teacher's samples, which several runs may share; default: in the run's folder",
    "vllm_url": "URL of a vLLM server of the teacher that draws its samples; default: the teacher itself draws",
    "k": "log-probabilities per token to ask a server's --teacher for, or to keep in a store of --kind top_k",
    "tail": "what becomes of the teacher's mass outside a server's or a store's lists: "
            + ", ".join(t for t in TAILS if t != "sampled"),
    "tensor_parallel": "number of ranks that share each of the student's layers and its head; such groups share "
                       "the weights by FSDP2; a run that is killed starts from the beginning",
    "eval_measures": "compute perplexity, risks, BLEU, chrF and TER at every evaluation, which --eval_strategy sets",
    "kind": "hidden: states after the final norm, for any divergence and temperature; top_k: the --k largest "
            "log-probabilities of each token",
    "sequences": "sequences to store for later objectives, of gold, teacher and beam; held-out rows are always gold",
    "states": "dtype of stored states, for --kind hidden: float32, float16, bfloat16 or int8",
    "log_probs": "dtype of stored log-probabilities, for --kind top_k: float16 or uint8",
    "head_rank": "for --kind hidden, store states in this many singular directions of the head; default: whole states",
    **_attributes(FDistillConfig),
}  # fmt: skip
#: What some of them mean to one command.
HELP_OF = {
    "evaluate": {
        "output_dir": "folder for sentences.parquet, the outputs and measures of each row; default: they are not kept",
        "dtype": "dtype of the student's weights; auto: as in its files",
        "quantization": f"quantise the student: {_QUANTISED}",
        "data": "rows to measure: a .jsonl, .json, .csv, .tsv or .parquet file, or the name of a hub dataset",
        "eval_data": "the same, of a hub dataset its --dataset_test_split; not beside --data",
        "limit": "number of rows to use, from the first on; default: all",
    },
    "teacher build": {
        "output_dir": "folder of the store; one that was begun is gone on with",
        "teacher": "model folder or hub name of the teacher",
        "tokenizer": "folder or hub name of the tokenizer; default: the teacher's",
        "eval_data": "held-out rows, in such a file or dataset, of which gold targets alone are stored; default: the "
                     "last tenth of --data, at most --eval_pairs",
    },
}  # fmt: skip


#: Options that a command uses; a command without an entry uses all except `BuildArguments`.
_OF_TEACHER = {"teacher", "tokenizer", "chat_template_path", "attn_implementation", "device_map", "trust_remote_code",
               "teacher_dtype", "teacher_revision", "teacher_quantization"}  # fmt: skip
_OF_SAMPLES = {"max_new_tokens", "sample_temperature", "top_k", "top_p", "cache_implementation", "seed", "use_cpu"}
_OF_DATA = {f.name for f in dataclasses.fields(DataArguments)}
_OF_BUILD = {f.name for f in dataclasses.fields(BuildArguments)}
USED: dict[str, set[str]] = {
    "evaluate": _OF_TEACHER | _OF_SAMPLES | _OF_DATA - {"eval_pairs"}
    | {"student", "dtype", "revision", "quantization", "output_dir"},
    "teacher build": _OF_TEACHER | _OF_SAMPLES | _OF_DATA | _OF_BUILD
    | {"output_dir", "per_device_eval_batch_size", "k", "beams"},
}  # fmt: skip

#: Smallest values of numbers that nothing else checks.
LEAST = {
    "limit": 1, "eval_pairs": 1, "max_target_tokens": 1, "predistill_steps": 0, "k": 1, "lora_r": 1,
    "tensor_parallel": 1, "max_steps": 1,
}  # fmt: skip

#: Options of `TrainingArguments` that are meant for scripts; nothing here uses them.
UNUSED = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "overwrite_output_dir"}

#: Options of the command line alone.
OF_LINE = {"help", "config", "json"}

#: Other names of options: this command's before 0.3, and TRL's.
CALLED = {
    "steps": "max_steps", "batch": "per_device_train_batch_size (of `teacher build` per_device_eval_batch_size)",
    "out": "output_dir", "evaluate_every": "eval_steps, with --eval_measures", "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher", "dataset_name": "data", "load_in_4bit": "quantization 4bit",
    "load_in_8bit": "quantization 8bit", "torch_dtype": "dtype", "model_revision": "revision",
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps, of which a number below 1 is a share of all steps",
    "group_by_length": "train_sampling_strategy group_by_length",
}  # fmt: skip


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


def _hint(words: str) -> str:
    told = [f"--{old} is --{CALLED[name]}" for old in re.findall(r"[\w-]+", words)
            if (name := old.lstrip("-").replace("-", "_")) in CALLED]  # fmt: skip
    return f"{words} ({'; '.join(told)})".replace("----", "--") if told else words


_METAVARS: dict[Any, str] = {int: "N", float: "X", string_to_bool: "BOOL"}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but no None and none of what turns an option off, and none beside one that the help says."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = isinstance(action, argparse._StoreFalseAction)
        own = action.default is None or off or "; default: " in (action.help or "")
        return action.help if own else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        short = len(action.option_strings[0]) == 2
        shown = action.option_strings if short else action.option_strings[:1]  # not max-steps beside max_steps
        arguments = "" if action.nargs == 0 else " " + self._format_args(action, _METAVARS.get(action.type, "TEXT"))
        return ", ".join(shown) + arguments


def _in_order(parser: argparse.ArgumentParser) -> None:
    """Puts this package's options before those of TrainingArguments."""
    options, *groups = (group for group in parser._action_groups if group._group_actions)
    theirs = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    ours = {f.name for f in dataclasses.fields(FDistillConfig)} - theirs
    objective, last = (
        parser.add_argument_group(title) for title in ("the objective", "transformers.TrainingArguments")
    )
    objective._group_actions = [a for a in options._group_actions if a.dest in ours]
    last._group_actions = [a for a in options._group_actions if a.dest in theirs]
    options._group_actions = [a for a in options._group_actions if a.dest not in ours | theirs]
    parser._action_groups = [options, *groups, objective, last]


class Parser(HfArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Raises ValueError."""
        raise ValueError(_hint(message) if "unrecognized" in message else message)


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

    def settings(self) -> dict[str, Any]:
        """Everything that decides a run, for people to read."""
        kinds = (self.model, self.data, self.run, *([self.lora] if self.lora.use_peft else []))
        named = {n: v for kind in kinds for n, v in vars(kind).items() if v is not None}
        return without_secrets(named | self.training)


KINDS = {"model": ModelArguments, "lora": LoraArguments, "data": DataArguments, "run": RunArguments,
         "build": BuildArguments}  # fmt: skip


def ask(command: str, argv: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Asked:
    """A command's options: the command line goes before --config's YAML, this before settings, these before defaults.

    Raises:
        ValueError: an option that is unknown, of the wrong kind, not of this command, or in conflict with another.
    """
    kinds = {name: kind for name, kind in KINDS.items() if name != "build" or command == "teacher build"}
    types: Any = [*kinds.values(), FDistillConfig]
    parser = Parser(types, prog=f"fdistill {command}", usage="%(prog)s [options]", allow_abbrev=False,
                    formatter_class=_Help)  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML of these options, as a run's config.yaml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(**DEFAULTS, num_train_epochs=None)
    names, used = {a.dest: a.default for a in parser._actions}, USED.get(command)
    for action in parser._actions:
        action.help = {**HELP, **HELP_OF.get(command, {})}.get(action.dest, action.help)
        if isinstance(action, argparse._StoreFalseAction):  # --no_NAME, to which HfArgumentParser gives NAME's help
            action.help = f"the same as --{action.dest} False"
        if action.dest == "report_to":  # its type is a text or a list, of which HfArgumentParser takes the text alone
            action.nargs = "*"
        if action.dest in OF_JSON:
            action.type = _object
        if action.dest in UNUSED or (used and action.dest not in used | OF_LINE):
            action.help = argparse.SUPPRESS
    _in_order(parser)
    absent = object()

    def blank() -> argparse.Namespace:
        return argparse.Namespace(**dict.fromkeys(names, absent))  # so that what is not said stays absent

    first = vars(parser.parse_known_args(argv, blank())[0])
    said = {**(settings or {}), **_yaml(None if first["config"] is absent else first["config"], set(names) - OF_LINE)}
    may_be_none = {name for of in types for name, kind in get_type_hints(of).items() if type(None) in get_args(kind)}
    if empty := [name for name, value in said.items() if value is None and name not in may_be_none]:
        raise ValueError(f"--{', --'.join(empty)} needs a value: leave it out for the default")
    if any(first[name] is not absent for name in LENGTHS):  # one goes before the other, too
        said = {name: value for name, value in said.items() if name not in LENGTHS}
    no = {a.dest for a in parser._actions if "no" in (a.choices or ())}
    said = {name: "no" if value is False and name in no else value for name, value in said.items()}  # YAML's no
    said = {name: value for name, value in said.items() if first[name] is absent}
    found = vars(parser.parse_args([*_arguments(said), *argv], blank()))
    given = {name: None for name, value in said.items() if value is None}
    given |= {name: value for name, value in found.items() if value is not absent}
    given = {name: _without_enums(value) for name, value in given.items() if name in names.keys() - OF_LINE}
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


#: Options of mappings alone, which HfArgumentParser makes of a text by calling their type.
OF_JSON = ("liger_kernel_config", "parallelism_config")


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"not {text}")
    return found


_object.__name__ = "JSON object"  # in argparse's message


def _without_enums(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, list):
        return [_without_enums(x) for x in value]
    return value.value if isinstance(value, enum.Enum) else value


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+$", re.IGNORECASE),
                              list("-+.0123456789"))  # fmt: skip


def load_yaml(path: str | Path, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: it has none; the message names the file.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be options and their values, not {type(settings).__name__}")
    return settings


def _yaml(path: str | None, known: set[str]) -> dict[str, Any]:
    settings = load_yaml(path, _Loader) if path is not None else {}
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if unknown := sorted(set(settings) - known):
        raise ValueError(_hint(f"{path} has unknown keys: {', '.join(unknown)}"))
    return settings


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line, which reads numbers where YAML reads text."""
    made: list[str] = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            made += [f"--{name}", *map(str, value)]
        elif value is not None:
            made.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return made


def _check(asked: Asked) -> None:
    """Raises ValueError for options that are missing, too small, or in conflict."""
    model, given = asked.model, asked.given
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and value < least and not (name == "max_steps" and "num_train_epochs" in given):
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if (epochs := given.get("num_train_epochs")) is not None and epochs <= 0:
        raise ValueError(f"--num_train_epochs must be positive, not {epochs:g}")
    if epochs and (given.get("max_steps") or 0) > 0:
        raise ValueError("--max_steps and --num_train_epochs both say how long the run is: give one of them")
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
    if asked.lora.use_peft and model.student and (Path(model.student) / "adapter_config.json").exists():
        raise ValueError(f"--use_peft makes a new adapter, and {model.student} is one, which is trained on without it; "
                         "merge it into its base model for a new one")  # fmt: skip
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
    if asked.config.eval_strategy == "no" and asked.run.eval_measures:  # a configuration checks its own
        raise ValueError("--eval_measures measures at every evaluation, and --eval_strategy no leaves none")
