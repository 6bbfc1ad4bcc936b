"""Reads the options of the sequence commands: `HfArgumentParser` makes options and YAML keys of the dataclasses."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from ..options import OnceParser
from .config import idle
from .metrics import MEASURES
from .option_checks import check
from .option_help import HELP, HELP_OF, Help, in_order
from .options import DEFAULTS, KINDS, LENGTHS, OF_LINE, UNUSED, USED, Asked
from .trainer import FDistillConfig

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


def _hint(words: str) -> str:
    told = [f"--{old} is --{CALLED[name]}" for old in re.findall(r"[\w-]+", words)
            if (name := old.lstrip("-").replace("-", "_")) in CALLED]  # fmt: skip
    return f"{words} ({'; '.join(told)})".replace("----", "--") if told else words


class Parser(OnceParser, HfArgumentParser):
    """A parser that takes each option with a value once, and whose errors are one line."""

    def error(self, message: str) -> Any:
        """Raises ValueError."""
        raise ValueError(_hint(message) if "unrecognized" in message else message)


def ask(command: str, argv: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Asked:
    """Options: the command line goes before --config's YAML, that before settings, these before defaults."""
    parser = _parser(command)
    defaults = {a.dest: a.default for a in parser._actions}
    given, as_json = _given(parser, argv, settings or {})
    used = USED.get(command)
    if unused := sorted(given.keys() - used if used else given.keys() & UNUSED):
        raise ValueError(f"`fdistill {command}` makes nothing of --{', --'.join(unused)}")
    made: dict[str, Any] = {name: kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given})
            for name, kind in KINDS.items()}  # fmt: skip
    training = _training(given, made["run"].eval_measures)
    asked = Asked(command, given, **made, training=training, defaults=defaults, json=as_json)
    check(asked)
    return asked


def _parser(command: str) -> Parser:
    """The parser of a command's options, with its defaults and its help."""
    kinds = [kind for name, kind in KINDS.items() if name != "build" or command == "teacher build"]
    types: Any = [*kinds, FDistillConfig]
    parser = Parser(types, prog=f"fdistill {command}", usage="%(prog)s [options]",
                    allow_abbrev=False, formatter_class=Help)  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML of these options, as a run's config.yaml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(**DEFAULTS, num_train_epochs=None)
    used, said = USED.get(command), {**HELP, **HELP_OF.get(command, {})}
    for action in parser._actions:
        action.help = said.get(action.dest, action.help)
        if isinstance(action, argparse._StoreFalseAction):  # --no_NAME, to which HfArgumentParser gives NAME's help
            action.help = f"the same as --{action.dest} False"
        if action.dest == "report_to":  # its type is a text or a list, of which HfArgumentParser takes the text alone
            action.nargs = "*"
        if action.dest in OF_JSON:
            action.type = _object
        if action.dest == "fsdp":  # a flag or a text, of which HfArgumentParser takes the text alone
            action.type = _flag_or_text
        if action.dest in UNUSED or (used and action.dest not in used | OF_LINE):
            action.help = argparse.SUPPRESS
    in_order(parser)
    return parser


def _given(parser: Parser, argv: Sequence[str], settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options that are given, by the command line or else by YAML or else by settings; and whether --json is."""
    names, absent = {a.dest for a in parser._actions}, object()
    texts = {a.dest for a in parser._actions if a.type in (str, _flag_or_text)}

    def parsed(read: Callable[..., Any], arguments: Sequence[str]) -> Any:
        return read(arguments, argparse.Namespace(**dict.fromkeys(names, absent)))  # what is not said stays absent

    first = vars(parsed(parser.parse_known_args, argv)[0])
    said = {**settings, **_yaml(None if first["config"] is absent else first["config"], names - OF_LINE, texts)}
    for name in [a.dest for a in parser._actions if a.nargs in (None, "?") and isinstance(said.get(a.dest), list)]:
        raise ValueError(f"--{name} takes one value, not {said[name]}")
    may_be_none = {name for of in parser.dataclass_types for name, kind in get_type_hints(of).items()
                   if type(None) in get_args(kind)}  # fmt: skip
    if empty := [name for name, value in said.items() if value is None and name not in may_be_none]:
        raise ValueError(f"--{', --'.join(empty)} needs a value: leave it out for the default")
    if any(first[name] is not absent for name in LENGTHS):  # one goes before the other, too
        said = {name: value for name, value in said.items() if name not in LENGTHS}
    no = {a.dest for a in parser._actions if "no" in (a.choices or ())}
    said = {name: "no" if value is False and name in no else value for name, value in said.items()}  # YAML's no
    said = {name: value for name, value in said.items() if first[name] is absent}
    found = vars(parsed(parser.parse_args, [*_arguments(said), *argv]))
    given = {name: None for name, value in said.items() if value is None}
    given |= {name: value for name, value in found.items() if value is not absent}
    given = {name: _plain(value) for name, value in given.items() if name in names - OF_LINE}
    return given, found["json"] is True


def _training(given: Mapping[str, Any], measures: bool) -> dict[str, Any]:
    """The trainer's options, given and default; measures: whether every evaluation has those of --eval_measures."""
    replaced = {"max_steps": "num_train_epochs", "warmup_ratio": "warmup_steps"}  # defaults, by what is given instead
    defaults = {name: value for name, value in DEFAULTS.items() if replaced.get(name) not in given}
    of_trainer = {f.name for f in dataclasses.fields(FDistillConfig)}
    training = {"use_cpu": not torch.accelerator.is_available()} | defaults  # else ranks without a card train apart
    training |= {name: value for name, value in given.items() if name in of_trainer}
    for name in idle(training).keys() - given.keys():  # defaults
        training.pop(name, None)
    best = str(given.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if best != "loss" and not (measures and best in MEASURES):
        raise ValueError("--metric_for_best_model must be loss, or beside --eval_measures one of "
                         f"{', '.join(MEASURES)}, not {best}")  # fmt: skip
    if best in MEASURES:
        training.setdefault("greater_is_better", MEASURES[best])
    return training


#: Options of mappings alone, which HfArgumentParser makes of a text by calling their type.
OF_JSON = ("liger_kernel_config", "parallelism_config")


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"not {text}")
    return found


_object.__name__ = "JSON object"  # in argparse's message


def _flag_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _plain(value: Any) -> Any:
    """A value as YAML has it, where a path is whole that a shell would have made whole."""
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    return value.value if isinstance(value, enum.Enum) else value


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number, and takes no key twice, as YAML 1.2 does.

    texts: the options whose value is text also where YAML reads 0123 or 7e10 as a number.
    """

    def __init__(self, stream: str, texts: Collection[str]):
        super().__init__(stream)
        self.texts = texts
        self.whole: Any = None

    def construct_document(self, node: Any) -> Any:
        """As of the base class."""
        self.whole = node
        return super().construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As of the base class."""
        names = [_name(key) for key, _ in node.value]
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is given twice", node.start_mark)
        self.flatten_mapping(node)
        if node is self.whole:
            node.value = [(key, _text(value) if _name(key) in self.texts else value) for key, value in node.value]
        return super().construct_mapping(node, deep)


def _name(key: Any) -> str:
    return str(key.value).replace("-", "_")


def _text(node: Any) -> Any:
    """A value of YAML as the text that it is written as, but for null and what is no scalar."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
        return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+$", re.IGNORECASE),
                              list("-+.0123456789"))  # fmt: skip


def load_yaml(path: str | Path, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The options in a YAML file; ValueError, with the file, where it has none."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be options and their values, not {type(settings).__name__}")
    return settings


def _yaml(path: str | None, known: set[str], texts: set[str]) -> dict[str, Any]:
    settings = load_yaml(path, functools.partial(_Loader, texts=texts)) if path is not None else {}
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
