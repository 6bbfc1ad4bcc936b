"""Checkpoints: what they have beside `Trainer`'s own files, and what a run needs of one to go on."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length

from ..teachers.files import write_whole
from ..teachers.settings import check_same
from .batches import Sequences
from .config import FDistillConfig
from .loading import load_alike, names_damage, read_json
from .models import adapters_kept
from .ranks import copies_of_rows, is_partitioned, is_split
from .teachers import Itself, Teacher

#: A checkpoint's file with what its place in the data is counted by.
PLACE = "place_in_data.json"


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints have all that a run goes on with."""

    args: FDistillConfig
    teacher: Teacher

    def __init__(self, **trainer: Any):
        self._goes_on = False  # whether a run goes on with a checkpoint, before its first batch
        self._kept: list[Sequences] = []  # the student's samples that are used again
        self._renamed = False  # whether a checkpoint has weights that `Trainer` has not found by their names
        super().__init__(**trainer)
        if self.args.save_strategy != "no":
            adapters_kept(self._unwrapped(self.model))  # which refuses what no checkpoint can have
        if self.args.load_best_model_at_end:
            if is_split(self.model):
                raise ValueError("load_best_model_at_end loads no weights into a model that was split as it was loaded")
            check_kept(self._unwrapped(self.model))

    def _unwrapped(self, model: Any) -> Any:
        """The model inside what DDP, FSDP and torch.compile make of it; asked at once, accelerate loses the DDP."""
        model = self.accelerator.unwrap_model(getattr(model, "_orig_mod", model))
        return getattr(model, "_orig_mod", model)

    @property
    def _ranks(self) -> int:
        """How many have rows of their own."""
        return int(self.args.world_size) // copies_of_rows(self._unwrapped(self.model))

    def _save_rng_state(self, output_dir: str) -> None:
        """With the generators' states, which decide the next samples, those samples that are used again; and what the
        run's place in the data is counted by.
        """
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            write_whole(Path(output_dir, PLACE), json.dumps(self._place()).encode())
        if self._kept:
            torch.save([vars(found) for found in self._kept], self._kept_in(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **keywords: Any) -> None:
        check_kept(self._unwrapped(self.model))
        with _of_checkpoint(resume_from_checkpoint):
            if not self._load_adapters(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, *args, **keywords)
                self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if not self._load_adapters(best):
            super()._load_best_model()
            self._load_renamed(best)

    def _load_adapters(self, folder: str) -> bool:
        """Loads each of a model's adapters from where its files have it; but the one of a PEFT model that is called
        default is left to `Trainer`, which loads one of several, or goes on with one, and none that add_adapter gave.
        """
        model = self._unwrapped(self.model)
        kept, own = adapters_kept(model), isinstance(model, PreTrainedModel)
        left = not kept or (list(kept) == ["default"] and not own)
        if left or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        for name, inside in kept.items():
            where = str(Path(folder, inside))
            if own:
                _load_own(model, where, name)
            else:
                model.load_adapter(where, name, is_trainable=True)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Called with what of a checkpoint's weights `Trainer` has not found by their names: tied ones have several."""
        of = dict(self.model.named_parameters(remove_duplicate=False))  # type: ignore[union-attr]
        there = {id(p) for name, p in of.items() if name not in load_result.missing_keys}
        lacking = [name for name in load_result.missing_keys if name in of and id(of[name]) not in there]
        self._renamed = bool(lacking or load_result.unexpected_keys)

    def _load_renamed(self, folder: str) -> None:
        """Weights that a checkpoint has in the form of a model's files, which is not always its own: those may have
        each expert apart. `Trainer` warns of these, and leaves the model's as they are.
        """
        if self._renamed:
            self._renamed, model = False, self._unwrapped(self.model)
            model.load_state_dict(load_alike(model, folder).state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (self.is_deepspeed_enabled or Path(checkpoint, "scheduler.pt").exists()):
            raise ValueError(f"{checkpoint} has no optimizer and no schedule, as save_only_model leaves them out, and "
                             "a run cannot go on from it: give it as the model")  # fmt: skip
        if checkpoint is not None:
            check_place(checkpoint, self.args, self._place())
        self._goes_on = checkpoint is not None
        with _of_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _of_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)
            if checkpoint is None:
                return
            if isinstance(self.teacher, Itself):
                self.teacher.load(checkpoint)
            if self._kept_in(checkpoint).exists():
                kind = self.args.device.type  # torch loads to no "cpu:0", as it is called where ranks are several
                known = torch.load(self._kept_in(checkpoint), map_location=kind, weights_only=True)
                self._kept = [Sequences(**found) for found in known]

    def _kept_in(self, folder: str) -> Path:
        """The samples of this rank's rows, which are others of another number of ranks."""
        return Path(folder) / f"student_samples_{self.args.process_index}_of_{self.args.world_size}.pt"

    def _place(self) -> dict[str, int]:
        rows: Any = self.train_dataset
        return place_in_data(self.args, self._ranks) | ({"rows": len(rows)} if has_length(rows) else {})


def rows_of_update(args: Any, ranks: int) -> int:
    """How many rows an update has, of so many ranks together."""
    loaders = 1 if args.accelerator_config.split_batches else ranks
    return int(args.train_batch_size * args.gradient_accumulation_steps * loaders)


def place_in_data(args: Any, ranks: int) -> dict[str, int]:
    """What the place of a step in the data is counted by, of so many ranks."""
    return {"rows of an update": rows_of_update(args, ranks)}


def check_place(checkpoint: str, args: Any, place: dict[str, int]) -> None:
    """Raises ValueError if a checkpoint counted otherwise: some rows would come twice, and others never."""
    path = Path(checkpoint, PLACE)
    if args.ignore_data_skip or args.auto_find_batch_size or not path.exists():  # of an earlier version
        return
    known = read_json(path, "remove the checkpoint, and the run goes on from an earlier one")
    check_same(f"{checkpoint} has lost its place in the data, which ignore_data_skip does without",
               {name: known.get(name) for name in place}, place)  # fmt: skip


def _load_own(model: Any, folder: str, name: str) -> None:
    """Loads an adapter's weights into one that transformers' add_adapter gave, whose load_adapter makes new ones."""
    from peft import load_peft_weights, set_peft_model_state_dict

    prefix = "base_model.model."  # transformers writes them as PEFT does
    weights = {key.removeprefix(prefix): value for key, value in load_peft_weights(folder, device="cpu").items()}
    found: Any = set_peft_model_state_dict(model, weights, name)
    if unknown := found.unexpected_keys:
        raise ValueError(f"{folder} has {unknown[0]}, which the student's adapter {name} has not: it is another's")


def check_kept(model: Any) -> None:
    """Raises ValueError for a PEFT model that trains weights which its checkpoints have not: of a network that makes
    virtual tokens those tokens alone are kept, and of the base model's weights only what modules_to_save names.
    """
    names = adapters_kept(model)
    if not names or is_partitioned(model):
        return
    from peft import get_peft_model_state_dict

    kept = [x for name in names for x in get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False).values()]  # fmt: skip
    same = {x.data_ptr() for x in kept}  # all but virtual tokens, which are made anew
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in same
            and not any(x.shape == p.shape and torch.equal(x.to(p), p) for x in kept)]  # fmt: skip
    if lost:
        raise ValueError(f"{', '.join(lost[:2])}{' and others' * (len(lost) > 2)} of the student are trained, and PEFT "
                         "keeps no such weights in a checkpoint, from which neither a run nor its best model can go on"
                         )  # fmt: skip


def _of_checkpoint(folder: str | None) -> contextlib.AbstractContextManager[None]:
    """Names a checkpoint's file that is damaged."""
    if folder is None:
        return contextlib.nullcontext()
    return names_damage(folder, f"remove {folder} to go on from an earlier checkpoint, or from the start")
