"""What --help says of the sequence commands' options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import Any

import transformers
from transformers.hf_argparser import string_to_bool

from ..sparse import TAILS
from .trainer import FDistillConfig


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
    "device_map": "device map of the teacher; auto spreads it over all GPUs; default: the run's one device",
    "revision": "branch, tag or commit of the --student on the hub; default: its main branch",
    "teacher_revision": "branch, tag or commit of the teacher on the hub; default: its main branch",
    "trust_remote_code": "run the code that comes with a model or its tokenizer",
    "quantization": f"quantise the student (to train it, add --use_peft): {_QUANTISED}",
    "teacher_quantization": f"quantise the teacher: {_QUANTISED}",
    "served_model_name": "name of the teacher on its server, where that has several models or its own name for it",
    "server_kind": "protocol of the server that --teacher names: vllm, or sglang",
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
_METAVARS: dict[Any, str] = {int: "N", float: "X", string_to_bool: "BOOL"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
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


def in_order(parser: argparse.ArgumentParser) -> None:
    """Puts this package's options before those of TrainingArguments."""
    options, *groups = (group for group in parser._action_groups if group._group_actions)
    theirs = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    ours = {f.name for f in dataclasses.fields(FDistillConfig)} - theirs
    objective, last = map(parser.add_argument_group, ("the objective", "transformers.TrainingArguments"))
    objective._group_actions = [a for a in options._group_actions if a.dest in ours]
    last._group_actions = [a for a in options._group_actions if a.dest in theirs]
    options._group_actions = [a for a in options._group_actions if a.dest not in ours | theirs]
    parser._action_groups = [options, *groups, objective, last]
