"""Whether what a trainer makes as it begins can be made: its optimizer and schedule, which use the options that are
given, and what the model is made of.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from .config import FDistillConfig, is_changed, not_used
from .ranks import is_split

#: Options of `TrainingArguments` that only some optimizers are made with.
OF_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")
#: Those that one's own is made without, and those that one's own schedule is.
NOT_OF_OWN = ("optim", "optim_args", "learning_rate", *OF_OPTIMIZERS)
NOT_OF_OWN_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")


def check_beginning(trainer: Trainer) -> None:
    """Raises ValueError or ImportError, before any work, where the optimizer, a schedule, or the compiled model cannot
    be made, or would not use the options that are given.
    """
    if trainer.train_dataset is None:
        return
    _check_model(trainer)
    trained = {p for p in trainer.model.parameters() if p.requires_grad}  # type: ignore[union-attr]
    if not trained:
        loaded = "; PeftModel.from_pretrained takes is_trainable=True" * hasattr(trainer.model, "peft_config")
        raise ValueError(f"no weight of the student has requires_grad: there is nothing to train{loaded}")
    if trainer.args.optim == "adafactor" and is_split(trainer.model):
        raise ValueError("optim=adafactor keeps whole rows and columns of a weight, and this student's are split: take "
                         "another")  # fmt: skip
    own = _own_optimizer(trainer)
    if trainer.optimizer is not None:
        groups = getattr(trainer.optimizer, "param_groups", None)  # which a placeholder for DeepSpeed's has not
        if groups is not None and not trained & {p for group in groups for p in group["params"]}:
            raise ValueError("optimizers: the optimizer has no weight of the student that has requires_grad, and would "
                             "train nothing: make it of this model's parameters")  # fmt: skip
        _check_beside(trainer.args, "optimizers", (*NOT_OF_OWN, "weight_decay"), own)
    elif trainer.optimizer_cls_and_kwargs is not None:
        _check_beside(trainer.args, "optimizer_cls_and_kwargs", NOT_OF_OWN, own)
    elif not trainer.args.optim.endswith("layerwise"):  # whose making puts hooks on the weights, once too often then
        _check_options(trainer)
    if trainer.lr_scheduler is not None:
        _check_beside(trainer.args, "a schedule in optimizers", NOT_OF_OWN_SCHEDULE)
    else:
        _check_schedule(trainer.args, float(own.get("learning_rate") or trainer.args.learning_rate))


def _own_optimizer(trainer: Trainer) -> dict[str, Any]:
    """What one's own optimizer is made with, by the names of options; empty if there is none."""
    made: Any = getattr(trainer.optimizer, "defaults", {})
    if trainer.optimizer_cls_and_kwargs is not None:
        made = trainer.optimizer_cls_and_kwargs[1]
    beta1, beta2 = made.get("betas", (None, None))
    return {"learning_rate": made.get("lr"), "weight_decay": made.get("weight_decay"), "adam_beta1": beta1,
            "adam_beta2": beta2, "adam_epsilon": made.get("eps")}  # fmt: skip


def _check_beside(args: Any, given: str, names: Sequence[str], own: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raises ValueError for options that are not used beside what is given in their place, and have not its values."""
    for name in names:
        if is_changed(args, name) and getattr(args, name) != own.get(name):
            raise not_used(args, name, f"beside {given}")


def _check_schedule(args: Any, rate: float) -> None:
    """Raises ValueError for keywords of the schedule that cannot be, by the schedule of a plain optimizer."""
    plain, keywords = torch.optim.SGD([torch.zeros(1)], rate), dict(args.lr_scheduler_kwargs or {})
    try:
        for at in getattr(get_scheduler(args.lr_scheduler_type, plain, 1, sys.maxsize, keywords), "lr_lambdas", ()):
            at(2)  # behind the warm-up
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs={keywords}: {error}") from error


def _check_model(trainer: Trainer) -> None:
    """What `Trainer` would find when its teacher has drawn all its samples."""
    args: Any = trainer.args
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs the package liger-kernel")
    if args.gradient_checkpointing and not getattr(trainer.model, "supports_gradient_checkpointing", True):
        raise ValueError(f"{type(trainer.model).__name__} checkpoints no layers: leave out gradient_checkpointing")
    if any(getattr(module, "merged_adapters", None) for module in trainer.model.modules()):  # type: ignore[union-attr]
        raise ValueError("the student's adapter is merged into the weights below it, and is not trained so: "
                         "unmerge_adapter() first")  # fmt: skip
    if args.torch_compile:
        try:
            torch.compile(torch.nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(f"torch_compile_backend={args.torch_compile_backend!r}, torch_compile_mode="
                             f"{args.torch_compile_mode!r}: {error}") from error  # fmt: skip


def _check_options(trainer: Trainer) -> None:
    """Raises ValueError for an option that is given and that the optimizer is made without, whatever its value."""
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)

    def made(**changes: Any) -> str:
        args = copy.copy(trainer.args)
        vars(args).update(changes)
        return str(trainer.get_optimizer_cls_and_kwargs(args, trainer.model))  # type: ignore[arg-type]

    def unused(name: str, values: Sequence[Any]) -> bool:
        try:
            return all(made(**{name: value}) == known for value in values)
        except (LookupError, ValueError, AttributeError, TypeError):  # of a value that it reads
            return False

    try:
        known = made()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"optim={optim}, optim_args={trainer.args.optim_args!r}: {error}") from error
    parts = [part.strip() for part in (trainer.args.optim_args or "").split(",") if part.strip()]
    ignored = []
    for i, part in enumerate(parts):
        others = f"{part}1", f"{part.partition('=')[0]}=True"
        if unused("optim_args", [",".join([*parts[:i], other, *parts[i + 1 :]]) for other in others]):
            ignored.append(f"optim_args {part}")
    ignored += [name for name in OF_OPTIMIZERS if is_changed(trainer.args, name)
                and unused(name, [getattr(FDistillConfig, name)])]  # fmt: skip
    if ignored:
        raise ValueError(f"optim={optim} makes nothing of {', '.join(ignored)}")
