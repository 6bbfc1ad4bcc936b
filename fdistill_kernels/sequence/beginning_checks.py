"""Whether what a trainer makes as it begins can be made: its optimizer and schedule, which use the options that are
given, what the model is made of, and ways to share work between ranks, of which it does not go all of accelerate's.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from .config import FDistillConfig, is_changed, not_used
from .ranks import copies_of_rows, is_split

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
        _check_beside(trainer.args, "a schedule in optimizers", NOT_OF_OWN_SCHEDULE, {})
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


def _check_beside(args: Any, given: str, names: Sequence[str], own: Mapping[str, Any]) -> None:
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


def check_accelerator(trainer: Trainer, student: Any) -> None:
    """Raises ValueError for options of accelerate's and DDP's whose ranks would not train one student (unwrapped)."""
    args: Any = trainer.args
    loaders: Any = args.accelerator_config
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise ValueError("accelerate's FSDP is for GPUs, and would leave a CPU's models whole: take DDP, or load the "
                         "model with a DistributedConfig")  # fmt: skip
    for name in ("cp_size", "sp_size"):
        if (size := getattr(getattr(trainer.accelerator, "parallelism_config", None), name, 1)) > 1:
            raise ValueError(f"{name}={size} cuts a batch's sequences over ranks, and this trainer's ranks have whole "
                             "ones: leave it out")  # fmt: skip
    ranks = args.world_size // copies_of_rows(student)  # that have rows of their own
    for name in ("per_device_train_batch_size", *(["per_device_eval_batch_size"] if args.evaluates else [])):
        if loaders.split_batches and (size := getattr(args, name)) % ranks:
            raise ValueError(f"{name}={size}: split_batches cuts a batch into one for each of the {ranks} ranks: take "
                             "a multiple of them")  # fmt: skip
    static = getattr(args, "ddp_static_graph", False)  # which older transformers do not know
    if args.world_size > 1:
        _check_ranks(args, loaders, static)
        _check_reentrant(trainer, static)


def by_ddp(trainer: Trainer) -> bool:
    """Whether ranks have whole students, whose gradients DDP shares."""
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(trainer.model))
    return trainer.args.world_size > 1 and whole


def _check_ranks(args: Any, loaders: Any, static: bool) -> None:
    synced = (loaders.gradient_accumulation_kwargs or {}).get("sync_each_batch")
    accumulates = args.gradient_accumulation_steps > 1 and not synced
    if static and accumulates:  # an assertion of torch's
        raise ValueError("ddp_static_graph takes no gradients that are accumulated before ranks share them: leave it "
                         "out, or give accelerator_config's gradient_accumulation_kwargs sync_each_batch")  # fmt: skip
    if loaders.dispatch_batches:
        raise ValueError("dispatch_batches makes all batches on the first rank, and theirs differ in length here: "
                         "leave it out")  # fmt: skip
    if not (loaders.even_batches or args.dataloader_drop_last):
        raise ValueError("even_batches=False leaves some ranks without a last batch, and others waiting for it: leave "
                         "it out, or give dataloader_drop_last")  # fmt: skip


def _check_reentrant(trainer: Trainer, static: bool) -> None:
    """Raises ValueError for checkpointed layers each of whose backward passes DDP takes for a whole one: of several
    forward passes it shares some gradients and not others, and ranks would train students of their own.
    """
    args: Any = trainer.args
    default = transformers.__version__.startswith("4.")
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", default)
    looks = args.ddp_find_unused_parameters  # after each backward pass, for weights that it has not reached
    looks = not isinstance(trainer.model, PreTrainedModel) if looks is None else looks
    several = (looks or len(args.halves()) > 1) and not static
    if by_ddp(trainer) and args.gradient_checkpointing and reentrant and several:
        raise ValueError("gradient_checkpointing_kwargs: DDP takes use_reentrant with one half of an objective alone, "
                         "and of adapters with ddp_find_unused_parameters=False: give use_reentrant False")  # fmt: skip
