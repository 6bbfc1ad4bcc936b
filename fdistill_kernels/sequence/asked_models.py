"""The models that a command asks for: its teacher, with a tokenizer, and its student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import set_seed

from ..teachers import Endpoint, TeacherStore
from .hashes import tokenizer_hash
from .loading import load_config, load_model, load_student
from .models import vocabulary_of
from .options import Asked
from .predistill import copy_layers
from .ranks import join
from .teachers import InRoom, Served, Stored, Teacher
from .teachers.given import is_store, is_url
from .tokenizers import check_tokenizer, load_tokenizer


def tokenizer_of(asked: Asked, path: Any, prefix: str = "") -> Any:
    """The tokenizer of a folder or hub name, with the template of --chat_template_path, if any. A model's own has its
    revision; prefix: whose, as in `ModelArguments.source`, where both models have one name.
    """
    named = {"": asked.model.student, "teacher_": asked.model.teacher}
    whose = next((model for model in (prefix, *named) if named[model] == path), None)
    options = {"trust_remote_code": asked.model.trust_remote_code} if whose is None else asked.model.source(whose)
    tokenizer = load_tokenizer(path, **options)
    if asked.model.chat_template_path:
        tokenizer.chat_template = asked.model.chat_template()
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        except TemplateSyntaxError as error:
            where = f"{asked.model.chat_template_path}, line {error.lineno}"
            raise ValueError(f"--chat_template_path {where}: {error.message}") from error
        except Exception:  # of a conversation that is none of the data's
            pass
    return tokenizer


def teacher_for(asked: Asked) -> tuple[Teacher, Any, Any]:
    """Returns the teacher, its tokenizer, and the model configuration that text is tokenized for."""
    model, run = asked.model, asked.run
    assert model.teacher is not None
    if is_url(model.teacher):
        if not model.student:
            raise ValueError("a server's teacher needs --student")
        config = load_config(model.student, **model.source())
        tokenizer = tokenizer_of(asked, model.tokenizer or model.student)
        kept = Path(run.samples or asked.config.output_dir or "") / "endpoint"
        endpoint = Endpoint(model.teacher, model=model.served_model_name, kind=model.server_kind, k=run.k, store=kept,
                            vocabulary=vocabulary_of(config), padded=True)  # fmt: skip
        check_tokenizer(endpoint, tokenizer, model.tokenizer or model.student)
        halves = asked.config.halves() if asked.command == "train" else ()
        if halves and (asked.config.evaluates or any(half.divergence is not None for half in halves)):
            endpoint.check()
        return Served(endpoint, run.tail), tokenizer, config
    if is_store(model.teacher):
        return _stored_teacher(asked)
    load_config(model.teacher, **model.source("teacher_"))  # what is wrong beside the weights is told before they load
    tokenizer = tokenizer_of(asked, model.tokenizer or model.teacher, "teacher_")
    teacher = InRoom(load_model(model.teacher, **model.options("teacher_")))
    return teacher, tokenizer, teacher.model.config


def _stored_teacher(asked: Asked) -> tuple[Stored, Any, Any]:
    """A store as the teacher, its tokenizer and configuration: the student's where a reader has filled it."""
    model = asked.model
    assert model.teacher is not None
    teacher = Stored(TeacherStore(model.teacher), asked.run.tail)
    folder = teacher.store.folder
    own = folder / "tokenizer"
    source = model.tokenizer or (own if own.exists() else model.student)
    if source is None:
        raise ValueError(f"{folder} has no tokenizer: give --tokenizer, or a --student that has it")
    tokenizer = tokenizer_of(asked, source)
    mark = tokenizer_hash(tokenizer)
    if mark != teacher.store.key.get("tokenizer", mark):
        raise ValueError(f"{source} is not the tokenizer that {model.teacher} was made with")
    configured = folder if (folder / "config.json").exists() else model.student
    if configured is None:
        raise ValueError(f"{folder} has no config.json: give --student, whose configuration is then taken")
    return teacher, tokenizer, load_config(configured, **model.source())


def made_folder(asked: Asked) -> Path:
    """Where the student is that training starts from, if that is made first."""
    return asked.folder / "predistilled"


def to_make(asked: Asked) -> bool:
    """Whether `made_folder` must still be made: by pre-distillation, or as the base model of an adapter."""
    run, model = asked.run, asked.model
    wanted = run.predistill_steps or (model.student_layers and asked.lora.use_peft)
    return bool(wanted) and not made_folder(asked).exists()


def student_for(asked: Asked, teacher: Any) -> Any:
    """The student, pre-distilled if it has been, with a new adapter if asked for. teacher: its model, if at hand."""
    model, made, split = asked.model, made_folder(asked), asked.run.tensor_parallel
    if split > 1:
        join(asked.config.ddp_timeout, asked.config.ddp_backend)
        if model.student_layers:
            raise ValueError("--tensor_parallel splits a student as it is loaded: give its folder as --student")
    if teacher is None and (model.student_layers or asked.run.predistill_steps):
        raise ValueError("--student_layers and --predistill_steps need the teacher's own weights: give its folder")
    if made.exists():
        student = load_asked(asked, made)
    elif model.student_layers:
        student = copy_layers(teacher, *(int(n) for n in model.student_layers.split(",")))
        student = student if model.dtype == "auto" else student.to(getattr(torch, model.dtype))
    elif model.student:
        student = load_asked(asked, model.student)
    else:
        raise ValueError("--student or --student_layers is needed")
    return _adapted(asked, student) if asked.lora.use_peft and not to_make(asked) else student


def load_asked(asked: Asked, path: str | Path) -> Any:
    """Loads a student that is to be trained, as the options say. Of a folder by its whole path, which an adapter keeps
    as its base model's: from another folder "run/predistilled" is the hub's name of somebody's model.
    """
    whole = Path(path).absolute()
    return load_student(whole if whole.exists() else path, asked.run.tensor_parallel, **asked.model.options())


def _adapted(asked: Asked, student: Any) -> Any:
    """The student with a new adapter."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    set_seed(asked.config.seed)  # the same adapter, whatever this process has drawn before
    if asked.model.quantization:
        student = prepare_model_for_kbit_training(student, asked.config.gradient_checkpointing)
    named = {n.removeprefix("lora_") if n in ("lora_r", "lora_target_modules", "lora_modules_to_save") else n: v
             for n, v in vars(asked.lora).items() if n != "use_peft"}  # fmt: skip
    if named["target_modules"] == ["all-linear"]:  # PEFT's word for what it is not in a list
        named["target_modules"] = "all-linear"
    _check_names(student, asked)
    kind = "SEQ_2_SEQ_LM" if student.config.is_encoder_decoder else "CAUSAL_LM"
    adapted = get_peft_model(student, LoraConfig(task_type=kind, **named))
    if split := [name for name, layer in adapted.named_modules() if hasattr(layer, "lora_A") and _by_input(layer)]:
        raise ValueError(f"--tensor_parallel splits the inputs of {split[0].rpartition('.')[2]}, of which there is no "
                         "adapter: give others as --lora_target_modules")  # fmt: skip
    return adapted


def _check_names(student: Any, asked: Asked) -> None:
    """Raises ValueError for a name of --lora_target_modules or --lora_modules_to_save that no module has: PEFT leaves
    it out where it finds others, or none of the latter.
    """
    known = [f".{name}" for name, _ in student.named_modules()]
    for option in ("lora_target_modules", "lora_modules_to_save"):
        for name in getattr(asked.lora, option) or ():
            if name != "all-linear" and not any(full.endswith(f".{name}") for full in known):
                raise ValueError(f"--{option} {name}: {type(student).__name__} has no module of that name")


def _by_input(layer: Any) -> bool:
    """Whether ranks share a layer by its input's features."""
    weight = getattr(layer.get_base_layer(), "weight", None)  # PEFT's layers of several weights have none
    return any(place.is_shard(1) for place in getattr(weight, "placements", ()))
