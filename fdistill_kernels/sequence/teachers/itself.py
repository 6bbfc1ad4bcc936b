"""The student as its own teacher."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from ...checks import check_number
from ..losses import TeacherRows
from ..models import vocabulary_of
from ..sampling import Sampling, draw
from .base import Batch, Teacher
from .in_room import rows_of_model

NOT_AVERAGED = "Itself(decay=...) takes a student that is whole on each rank: not FSDP's or ZeRO-3's"


class Itself(Teacher):
    """The student as its own teacher (self-distillation): seen with the example's teacher_prompt_ids, as the moving
    average of its weights, or with its PEFT adapter off.

    Args:
        decay: of the average after each update, ``a ← decay·a + (1 − decay)·weights``, kept in the checkpoints; None:
            the student as it is. An average begins as the student: without another prompt, dropout, or another loss in
            the objective, both stay alike, with a loss of 0.
        adapter: False: the student's base model, which its adapter was put on and which stays as it is.

    Raises:
        ValueError: decay is outside (0, 1), or of a student whose adapter is off.
    """

    anything = whole = True

    def __init__(self, decay: float | None = None, adapter: bool = True):
        if decay is not None and not 0 < check_number("decay", decay) < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay!r}")
        if decay is not None and not adapter:
            raise ValueError("the base model below an adapter does not change: give decay or adapter=False, not both")
        self.decay, self.adapter = decay, adapter
        self.student: Any = None
        self.average: Any = None
        self._exact: dict[str, Tensor] = {}
        self.vocabulary, self.encoder_decoder = 0, False

    def bind(self, student: Any) -> None:
        """Sets the student."""
        if not self.adapter and not hasattr(student, "disable_adapter"):
            raise ValueError("Itself(adapter=False) needs a PEFT model, as get_peft_model makes it, and the student is "
                             f"a {type(student).__name__}")  # fmt: skip
        if self.decay is not None and any(isinstance(m, FSDPModule) for m in student.modules()):
            raise ValueError(NOT_AVERAGED)
        self.student = student
        self.vocabulary = vocabulary_of(student.config)
        self.encoder_decoder = bool(student.config.is_encoder_decoder)
        if self.decay is not None:
            self.average, self._exact = copy.deepcopy(student).eval().requires_grad_(False), {}

    def to(self, device: torch.device) -> None:
        """Moves the average where the student is."""
        if self.average is not None:
            self.average.to(device)

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[Any]:
        """The model as the teacher, with the adapter off if so asked."""
        model = self.student if self.average is None else self.average
        with contextlib.nullcontext() if self.adapter else model.disable_adapter():
            yield model

    def exact(self) -> dict[str, Tensor]:
        """By name the average's buffers and its weights that the student trains or has trained, which alone may differ
        from the student's; of tied ones one, and none narrower than float32, in which a small share is not lost.
        """
        frozen = {name for name, p in self.student.named_parameters() if not p.requires_grad}
        for name, x in _tensors(self.average).items():
            if name not in self._exact and name not in frozen:
                self._exact[name] = _wide(x)
        return self._exact

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the student: moves the average."""
        assert self.decay is not None
        theirs, mine = _tensors(self.student), _tensors(self.average)
        for name, exact in self.exact().items():
            if exact.is_floating_point():
                exact.lerp_(theirs[name].to(exact), 1 - self.decay)
            else:
                exact.copy_(theirs[name])
            mine[name].copy_(exact)

    @torch.no_grad()
    def load(self, checkpoint: str | Path) -> None:
        """Continues from a checkpoint's average."""
        from safetensors.torch import load_file

        if self.average is None:
            return
        path = Path(checkpoint) / KeepAverage.FILE
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: the checkpoint is of a run without Itself(decay=...)")
        mine = _tensors(self.average)
        for name, kept in load_file(path).items():
            self._exact[name] = _wide(mine[name]).copy_(kept)
            mine[name].copy_(kept)

    def _rows(self, batch: Batch) -> TeacherRows:
        with self._speaking() as model:
            return rows_of_model(model, batch)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        with self._speaking() as model:
            return draw(model, prompts, sampling, None, vocabulary)


class KeepAverage(TrainerCallback):
    """Moves the average of `Itself` after each update, and saves it in checkpoints."""

    FILE = "average.safetensors"

    def __init__(self, teacher: Itself):
        self.teacher = teacher

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each update."""
        self.teacher.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own files."""
        from safetensors.torch import save_file

        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_file({name: x.contiguous() for name, x in self.teacher.exact().items()}, folder / self.FILE)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _tensors(model: Any) -> dict[str, Tensor]:
    """A model's parameters and buffers by name, those that are tied once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
