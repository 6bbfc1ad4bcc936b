"""An update: its batches, the sequences that are drawn for them, and what their losses are divided by."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from ..teachers.files import write_whole
from ..teachers.settings import check_same
from .batches import OfEpoch, Sequences, balanced, given_sequences, prompts_of
from .config import FDistillConfig, sampling_strategy
from .generation import chosen
from .loading import load_alike, names_damage, read_json
from .models import adapters_kept
from .objectives import Half
from .ranks import copies_of_rows, from_first, is_partitioned, is_split, own_noise
from .sampling import Sampling, draw
from .student_server import StudentServer
from .teachers import Itself, OfRows, Teacher
from .watch import Watch, wide

#: A checkpoint's file with what its place in the data is counted by.
PLACE = "place_in_data.json"


@dataclass
class Update:
    """What a batch needs to know about its update.

    Attributes:
        sequences: by source, the sequences of the batch: given, drawn, or kept from an earlier one.
        items: by source, the mean number of tokens or sequences in the update's batches, by which losses are divided.
        weight: a factor of the loss, with which `Trainer`'s division is by the number of the update's batches.
        count: that number.
    """

    sequences: dict[str, Sequences]
    items: dict[str, Tensor]
    weight: float = 1.0
    count: int = 1


class UpdatingTrainer(Trainer):
    """A `transformers.Trainer` whose batches have an `Update`, for a loss of it; its checkpoints have what is kept.

    Attributes:
        halves: the objective. sources: those of its sequences.
        vocabulary: ids that both models know. drawn: ids from here on are not drawn.
        server: what draws from the student; None: the student itself.
    """

    args: FDistillConfig
    teacher: Teacher
    halves: tuple[Half, ...]
    sources: list[str]
    sampling: Sampling
    vocabulary: int
    drawn: int
    watch: Watch
    server: StudentServer | None

    def __init__(self, **trainer: Any):
        self._waiting: list[dict[str, Any]] = []  # batches of an update that has not begun
        self._begun: list[dict[str, Any]] = []  # batches of an update that a stream's end has cut
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

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **keywords: Any) -> Any:
        """As `Trainer`'s, with the batch size that is given: older ones take a checkpoint's in its place."""
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size, *args, **keywords)

    def _unwrapped(self, model: Any) -> Any:
        """The model inside what DDP, FSDP and torch.compile make of it; asked at once, accelerate loses the DDP."""
        model = self.accelerator.unwrap_model(getattr(model, "_orig_mod", model))
        return getattr(model, "_orig_mod", model)

    def _get_train_sampler(self, *args: Any, **keywords: Any) -> Any:
        sampler: Any = super()._get_train_sampler(*args, **keywords)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if sampling_strategy(self.args) == "batch_rebalance" and sampler is not None:
            return balanced(sampler, seed, lambda: self.state.epoch, self.args.world_size // self._ranks)
        if isinstance(sampler, LengthGroupedSampler):  # which has a rank's batch
            sampler.batch_size = rows_of_update(self.args, self._ranks)
        if not isinstance(sampler, (RandomSampler, LengthGroupedSampler)):
            return sampler
        return OfEpoch(sampler, seed, lambda: self.state.epoch)

    @property
    def _ranks(self) -> int:
        """How many have rows of their own."""
        return int(self.args.world_size) // copies_of_rows(self._unwrapped(self.model))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **keywords: Any) -> Any:
        """The batches of one update, which begins in its first step: then a resumed run has its generators. An epoch's
        last update has what is left of it: transformers before 4.52 ask for another number.

        Where a stream ends within an update, that goes on when the stream begins again: `Trainer` makes no step of its
        batches, and would add their gradients to the next update's, at the weight of a whole update.

        Raises:
            ValueError: a stream has not one update's batches, or less than a run that goes on had taken: `Trainer`
                would begin it again. Or the run goes on at a place that this transformers loses.
        """
        num_batches = self.args.gradient_accumulation_steps
        found, number = super().get_batch_samples(epoch_iterator, num_batches - len(self._begun), *args, **keywords)
        goes_on, self._goes_on = self._goes_on, False
        if goes_on:
            self._check_shorter_update()
        if goes_on and not (found or has_length(self.train_dataset) or self.args.ignore_data_skip):
            raise ValueError(f"train_dataset ends within the batches of the {self.state.global_step} steps that the "
                             "run has made, and a stream's place is not known when it has begun again: give a dataset "
                             "with a length, or ignore_data_skip to go on from its first row")  # fmt: skip
        found, self._begun = self._begun + found, []
        if len(found) < num_batches and not has_length(self.train_dataset):
            if not self.state.global_step:
                raise ValueError(f"train_dataset ends after {len(found)} batches of the first update's {num_batches}: "
                                 "lower gradient_accumulation_steps or the batch size")  # fmt: skip
            found, self._begun = [], found
        self._waiting = found
        return found, number

    def _check_shorter_update(self) -> None:
        """Raises ValueError where an older `Trainer` makes no step of an epoch's last, shorter update, since it counts
        batches from where the run goes on; before 4.52 it leaves these updates out of its count of epochs, too.
        """
        size, version = self.args.gradient_accumulation_steps, tuple(map(int, transformers.__version__.split(".")[:2]))
        loses = version < (4, 52) or (version < (4, 57) and (self.state.epoch or 0) % 1 > 0)
        if not loses or self.args.ignore_data_skip or not has_length(self.train_dataset):
            return
        batches = len(self.callback_handler.train_dataloader)  # type: ignore[arg-type]
        if batches > size and batches % size:
            raise ValueError(f"transformers {transformers.__version__} loses a run's place in epochs of {batches} "
                             f"batches, which updates of {size} do not divide: take 4.57 or newer, or ignore_data_skip,"
                             " with which its epoch begins again")  # fmt: skip

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **keywords: Any) -> Tensor:
        """As `Trainer.training_step`. Before an update's first step the samples of all its batches are drawn."""
        if self._waiting:
            batches, self._waiting = self._waiting, []
            with self.compute_loss_context_manager():
                self._begin_update(self._unwrapped(model), batches)
            inputs = {**inputs, "update": batches[0]["update"]}  # a subclass may give a copy of the batch
        return super().training_step(model, inputs, *args, **keywords)

    def _begin_update(self, student: Any, batches: list[dict[str, Any]]) -> None:
        """Gives each batch its `Update`."""
        if self.state.global_step % self.args.student_every == 0:
            self._kept = []
        found = [self._sequences(student, self._prepare_inputs(batch), i) for i, batch in enumerate(batches)]
        if self.args.student_every > 1:
            self._kept = self._kept or [of["student"] for of in found]
        counts = [{source: s.number(self._by_token) for source, s in of.items()} for of in found]
        if not self.halves:
            counts = [{**n, "prompts": sum(map(len, of["gold"].prompts))} for n, of in zip(counts, found, strict=True)]
        numbers = torch.tensor([list(n.values()) for n in counts], dtype=wide(self.args.device))
        mean = self.accelerator.reduce(numbers.mean(0).to(self.args.device), "mean")
        items = dict(zip(counts[0], mean, strict=True))
        # Trainer of transformers before 4.55 divides by what was asked for, also where an epoch's last update has less
        divisor = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        for batch, sequences in zip(batches, found, strict=True):
            batch["update"] = Update(sequences, items, divisor / len(batches), len(batches))

    @property
    def _by_token(self) -> bool:
        return self.args.normalize == "token"

    def _sequences(self, student: Any, batch: dict[str, Any], number: int = 0) -> dict[str, Sequences]:
        """By source those that a batch has, or else new ones; of the student, where some are kept, those."""
        found: dict[str, Sequences] = {}
        for source in self.sources:
            given = given_sequences(source, batch)
            if source == "student" and self._kept:
                found[source] = self._kept[number % len(self._kept)]
            elif given is not None:
                found[source] = given
            else:
                copies = copies_of_rows(student)
                ranks = self.args.process_index // copies, self.args.world_size // copies
                with self.watch.timed("sampling"), own_noise(*ranks, self.args.device):
                    found[source] = self._draw(source, student, batch, number)
            found[source].counted = chosen(student, found[source].continuations, found[source].counted)
        return found

    def _draw(self, source: str, student: Any, batch: dict[str, Any], number: int) -> Sequences:
        """New sequences for the prompts of an update's batch, by its number."""
        (prompts, teacher_prompts), teachers = prompts_of(batch), batch.get("teacher", [])
        if source == "student" and self.server is not None:
            made = self.server.draw(student, prompts, self.sampling, self.state.global_step, fresh=number == 0)
        elif source == "student":
            made = draw(student, prompts, self.sampling, None, self.drawn)
        else:
            if isinstance(self.teacher, OfRows):
                self.teacher.choose(teachers)
            made = self.teacher.draw(teacher_prompts, self.args.sampling(source == "beam"), self.drawn)
        return Sequences(
            prompts, teacher_prompts, [row.to(prompts[0].device) for row in from_first(student, made)], None, teachers
        )

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

        Raises:
            ValueError: a weight is not there by any name.
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
            if checkpoint is not None:
                self._load_more(checkpoint)

    def _load_more(self, checkpoint: str) -> None:
        """What a checkpoint has beside `Trainer`'s own files."""
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
    """Loads the weights of an adapter that transformers' add_adapter gave a model, whose load_adapter makes new ones.

    Raises:
        ValueError: the folder has others than the adapter's.
    """
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
