"""An update: its batches, the sequences that are drawn for them, and what their losses are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from .batches import OfEpoch, Sequences, balanced, given_sequences, prompts_of
from .checkpoints import ResumableTrainer, rows_of_update
from .config import sampling_strategy
from .generation import chosen
from .objectives import Half
from .ranks import copies_of_rows, from_first, own_noise
from .sampling import Sampling, draw
from .student_server import StudentServer
from .teachers import OfRows
from .watch import Watch, wide


@dataclass
class Update:
    """What a batch needs to know about its update; by source are the first two."""

    sequences: dict[str, Sequences]  # of the batch: given, drawn, or kept from an earlier one
    items: dict[str, Tensor]  # mean number of tokens or sequences in the update's batches, by which losses are divided
    weight: float = 1.0  # of the loss, with which `Trainer`'s division is by the number of the update's batches
    count: int = 1  # that number


class UpdatingTrainer(ResumableTrainer):
    """A `transformers.Trainer` whose batches have an `Update`, for a loss of it."""

    halves: tuple[Half, ...]  # the objective
    sources: list[str]  # of its sequences
    sampling: Sampling
    vocabulary: int  # ids that both models know
    drawn: int  # ids from here on are not drawn
    watch: Watch
    server: StudentServer | None  # what draws from the student; None: the student itself

    def __init__(self, **trainer: Any):
        self._waiting: list[dict[str, Any]] = []  # batches of an update that has not begun
        self._begun: list[dict[str, Any]] = []  # batches of an update that a stream's end has cut
        super().__init__(**trainer)

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **keywords: Any) -> Any:
        """As `Trainer`'s, with the batch size that is given: older ones take a checkpoint's in its place."""
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size, *args, **keywords)

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
        rows = [row.to(prompts[0].device) for row in from_first(student, made)]
        return Sequences(prompts, teacher_prompts, rows, None, teachers)
