"""A model's forward pass that ends in a loss: its logits are deferred, so N×V of them never exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..deferred import Deferral, Logits, active, hook, is_plain, output_embedding, watch
from .losses import Rows
from .models import accepted, virtual_tokens
from .probes import check_forward
from .teacher_forcing import IGNORE, teacher_forced


def forward_to_head(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, call: Callable[[Rows], Tensor],
    *, wrapped: Any = None, pack: bool = False, counted: Sequence[Tensor] | None = None, **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """What `call` makes of a batch's rows in the output embedding's forward, and the model's own outputs.

    Of a mixture of experts whose configuration has output_router_logits, and of AdaLoRA, the outputs' loss is what the
    model adds to its own, times its coefficients, where gradients are enabled; else the outputs have no loss.

    The model's forward runs with deferred logits, so that what it does to them is in the rows' head, and `call` runs
    before the model's call ends: FSDP and ZeRO-3 have the embedding's weight whole there. The logits' place is taken by
    an empty tensor made from the result, so that what wraps the model finds in its output every parameter that a loss
    depends on.

    prompts, continuations, pad, pack, counted: as in `teacher_forced`; `Rows` has what counts alone. wrapped: what is
    called in the model's place, such as its DistributedDataParallel. more: of the model's forward. Raises ValueError
    where the model does to its logits what is no scale, bias or soft-cap, and as `check_forward`.
    """
    wrapped, model = model if wrapped is None else wrapped, getattr(model, "_orig_mod", model)  # torch.compile's
    inputs, labels = teacher_forced(model, prompts, continuations, pad, pack, counted)
    if torch.is_grad_enabled():
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            inputs |= dict(labels=labels, output_router_logits=True)  # its own loss is 0, and what it adds to it
        if getattr(model, "peft_type", None) == "ADALORA":  # which adds to a loss that its matrices be orthogonal
            inputs |= dict(labels=labels)
    inputs = accepted(model, {**inputs, "use_cache": False})
    uncompiled = getattr(wrapped, "_orig_mod", wrapped)  # questions have shapes that no batch will have
    check_forward(model, uncompiled, pad, pack, labels.numel())
    device = next(model.parameters()).device
    head = output_embedding(model)
    watch(head)
    hook(model, _finish)
    with _ToRows(model, head, labels, call) as deferral:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        outputs = wrapped(**moved, **more)
    if isinstance(getattr(outputs, "loss", None), dict):
        outputs.loss = None  # it is all fields, where accelerate has made float32 of the outputs of transformers 4.50
    return deferral.made + outputs.logits.sum(), outputs  # the sum of nothing: FSDP waits for a gradient of the output


class _ToRows(Deferral):
    """A forward pass of `model` that ends in what `call` makes of the rows with labels."""

    own_loss = False

    def __init__(self, model: Any, head: Any, labels: Tensor, call: Callable[[Rows], Tensor]):
        super().__init__(head, other_heads=True)
        self.model, self.labels, self.call = model, labels, call
        self.made: Any = None

    def finish(self, logits: Any) -> Tensor:
        """The result, as an empty tensor in the logits' place."""
        name = type(self.model).__name__
        if not isinstance(logits, Logits) or logits.made:
            reason = self.reason or "a forward that makes them elsewhere than in its output embedding"
            raise ValueError(f"{name}'s logits are not its output embedding's with a scale, a bias and a soft-cap, but "
                             f"go through {reason}: no loss is fused with that")  # fmt: skip
        labels, more = self.labels, logits.shape[-2] - self.labels.shape[-1]
        if more and more == virtual_tokens(self.model):  # they come first, and predict nothing that counts
            labels = nn.functional.pad(labels, (more, 0), value=IGNORE)
        if logits.shape[:-1] != labels.shape:
            of, to = tuple(logits.shape[:-1]), tuple(labels.shape)
            raise ValueError(f"{name} gives logits of {of} tokens for labels of {to}")
        counts = labels != IGNORE
        hidden, tokens = logits.hidden[counts.to(logits.hidden.device)], labels[counts].to(logits.hidden.device)

        def made(rows: Tensor) -> Tensor:
            return logits.of(rows).tensor()

        def with_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.call(Rows(hidden, tokens, logits.head(weight, bias), logits.vocabulary, made))

        if self.beside or is_plain(self.head):
            self.made = logits.of(hidden).at_head(with_head)
        else:
            self.made = self.call(Rows(hidden, tokens, None, logits.vocabulary, made))
        return self.made.flatten()[:0].reshape(*logits.shape[:-2], 0, 1).clone()  # FSDP warns of views


def _finish(model: Any, args: Any, outputs: Any) -> Any:
    """A forward hook of models: ends `_ToRows`. It stays there, and outside of one compilers go through it."""
    return None if active() is None else _finished(model, outputs)


@torch.compiler.disable
def _finished(model: Any, outputs: Any) -> Any:
    deferral = active()
    if not isinstance(deferral, _ToRows) or deferral.model is not model or deferral.made is not None:
        return None
    outputs.logits = deferral.finish(outputs.logits)
    return outputs


def rows_of(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, **options: Any
) -> tuple[Rows, Any]:
    """The `Rows` of a batch, and the model's own outputs, as in `forward_to_head`. Gradients flow if enabled."""
    rows: list[Rows] = []

    def keep(found: Rows) -> Tensor:
        rows.append(found)
        return found.hidden[:0, 0]  # flatten of a DTensor without rows never ends

    _, outputs = forward_to_head(model, prompts, continuations, pad, keep, **options)
    return rows[0], outputs
