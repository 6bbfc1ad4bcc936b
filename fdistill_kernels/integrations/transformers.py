"""`linear_cross_entropy` inside Hugging Face models and `Trainer`, for any model with an output embedding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..linear import linear_cross_entropy
from ..sequence.models import IGNORE, at_head, output_head, restore_forward


def patch_model(model: Any, *, keep_logits: bool = False, **keywords: Any) -> Any:
    """Makes a language model's own ``loss`` come from `linear_cross_entropy`, without its N×V logits.

    While training with `labels`, the output has the loss and no logits (None); in evaluation both. Without labels
    nothing changes. `undo_patch` takes it back.

    Args:
        model: a causal or encoder–decoder Hugging Face model with an output embedding that is one plain weight.
        keep_logits: make the logits while training too, without gradients, for a trainer that reads them.
        **keywords: of `linear_cross_entropy`: label_smoothing, z_loss, memory, ...

    Returns:
        The model itself.

    Raises:
        TypeError: the output embedding is LoRA or quantised. ValueError: there is none.
    """
    if not output_head(model).plain:
        raise TypeError("the output embedding is LoRA or quantised, not one plain weight")
    if "_own_forward" in vars(model):
        undo_patch(model)
    model._own_forward, forward = vars(model).get("forward"), model.forward

    @functools.wraps(forward)
    def patched(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        if labels is None:
            return forward(*args, **inputs)
        inputs.pop("return_dict", None)
        if model.config.is_encoder_decoder and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if not model.config.is_encoder_decoder:
            labels = next_tokens(labels, inputs.get("position_ids"))
        logits: list[Tensor | None] = [None]

        def loss(hidden: Tensor) -> Tensor:
            head = output_head(model)
            if keep_logits or not model.training:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not model.training):
                    logits[0] = head.logits(hidden)
            return linear_cross_entropy(
                hidden, head.weight, labels.to(hidden.device), linear_bias=head.bias, logit_scale=head.scale,
                logit_softcap=head.softcap, num_items=num_items_in_batch, **keywords,
            )  # fmt: skip

        with at_head(model, loss) as made:
            outputs = forward(*args, return_dict=True, **inputs)
        outputs.loss, outputs.logits = made[0] + outputs.logits.sum(), logits[0]
        return outputs

    model.forward = patched
    return model


def undo_patch(model: Any) -> Any:
    """Takes `patch_model` back, and what has wrapped the model's `forward` since."""
    restore_forward(model, vars(model).pop("_own_forward"))
    return model


def next_tokens(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Labels of each position's next token; none across the start of a packed sequence (position 0) or at the end."""
    if position_ids is not None:
        labels = labels.masked_fill((position_ids == 0).expand_as(labels), IGNORE)
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)


def causal_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, **keywords: Any) -> Tensor:
    """For ``Trainer(compute_loss_func=causal_loss)``: `cross_entropy` of a causal model's logits, fused.

    outputs: with logits (B, L, V). labels: (B, L), not shifted.
    """
    return cross_entropy(outputs.logits.flatten(0, 1), next_tokens(labels).flatten(), num_items=num_items_in_batch,
                         **keywords)  # fmt: skip


def seq2seq_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, **keywords: Any) -> Tensor:
    """As `causal_loss`, for encoder–decoder models, whose labels are aligned with their logits."""
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), num_items=num_items_in_batch, **keywords)
