"""Ways to share work between ranks that the trainer does not go, though `Trainer` and accelerate do."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import PreTrainedModel, Trainer

from .ranks import copies_of_rows, is_split


def check_accelerator(trainer: Trainer, student: Any) -> None:
    """Raises ValueError for options of accelerate's and of DDP's whose ranks would not train one student, the trainer's
    model without its wrappers.
    """
    args, loaders = trainer.args, trainer.args.accelerator_config
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise ValueError("accelerate's FSDP is for GPUs, and would leave a CPU's models whole: take DDP, or load the "
                         "model with a DistributedConfig")  # fmt: skip
    for name in ("cp_size", "sp_size"):
        if (size := getattr(getattr(trainer.accelerator, "parallelism_config", None), name, 1)) > 1:
            raise ValueError(f"{name}={size} cuts a batch's sequences over ranks, and this trainer's ranks have whole "
                             "ones: leave it out")  # fmt: skip
    static = getattr(args, "ddp_static_graph", False)  # which older transformers do not know
    _check_batches(args, loaders, args.world_size // copies_of_rows(student))
    if args.world_size > 1:
        _check_ranks(args, loaders, static)
        _check_reentrant(trainer, static)


def by_ddp(trainer: Trainer) -> bool:
    """Whether ranks have whole students, whose gradients DDP shares."""
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(trainer.model))
    return trainer.args.world_size > 1 and whole


def _check_batches(args: Any, loaders: Any, ranks: int) -> None:
    """ranks: that have rows of their own."""
    for stage in ("train", "eval") if args.evaluates else ("train",):
        name = f"per_device_{stage}_batch_size"
        if loaders.split_batches and (size := getattr(args, name)) % ranks:
            raise ValueError(f"{name}={size}: split_batches cuts a batch into one for each of the {ranks} ranks: take "
                             "a multiple of them")  # fmt: skip


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
