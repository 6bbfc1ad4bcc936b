"""A model at hand as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..forward import rows_of
from ..generation import end_tokens, special_tokens
from ..losses import TeacherRows, of_model
from ..models import at_model, evaluating, vocabulary_of
from ..probes import check_forward
from ..ranks import is_partitioned_by_zero
from ..sampling import Sampling, draw
from .base import Batch, Teacher


class InRoom(Teacher):
    """A model at hand, of any dtype or device, quantised or not. It is never trained."""

    anything = whole = True

    def __init__(self, model: Any):
        if is_partitioned_by_zero(model):
            raise ValueError("the teacher is partitioned by ZeRO-3, whose engine gathers the student's weights alone: "
                             "load it before the FDistillConfig is made, or give its path")  # fmt: skip
        if next(model.parameters()).is_meta:
            raise ValueError("the teacher's first weights are on the meta device: they were never loaded, or are "
                             "offloaded, as those behind them may be: keep its embeddings on a device")  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary_of(model.config)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)

    def to(self, device: torch.device) -> None:
        """Moves the model to the student's device, unless it was placed explicitly."""
        placed = getattr(self.model, "hf_device_map", None) is not None or getattr(self.model, "is_quantized", False)
        if not placed and self.device.type == "cpu" and device.type != "cpu":
            self.model.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return next(self.model.parameters()).device

    def check(self, pack: bool) -> None:
        """Raises ValueError as `probes.check_forward`."""
        check_forward(self.model, self.model, _pad(self.model), pack)

    def _rows(self, batch: Batch) -> TeacherRows:
        return rows_of_model(self.model, batch)

    def ends(self) -> list[int]:
        """As `Teacher.ends`."""
        return end_tokens(self.model)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        return draw(self.model, prompts, sampling, None, vocabulary)


def _pad(model: Any) -> int:
    """An id for what attention masks out; of a model that cannot generate, any."""
    try:
        return special_tokens(model)[0]
    except ValueError:
        return 0


@torch.no_grad()
def rows_of_model(model: Any, batch: Batch) -> TeacherRows:
    """A model's rows, without a graph and dropout, and without traces: of a short batch BigBird keeps its attention."""
    prompts, continuations = at_model(model, batch.prompts), at_model(model, batch.continuations)
    with evaluating(model):
        rows, _ = rows_of(model, prompts, continuations, _pad(model), pack=batch.pack, counted=batch.counted)
    return of_model(rows, batch.device)
