"""`linear_cross_entropy` inside Hugging Face models and `Trainer`, for any model with an output embedding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..linear import linear_cross_entropy
from ..sequence.models import IGNORE, hidden_only, is_plain, output_head


def patch_model(model: Any, **keywords: Any) -> Any:
    """Makes a language model's own ``loss`` come from `linear_cross_entropy`, without its N×V logits.

    While training with `labels`, the output has the loss and no logits (None); in evaluation both. Without labels
    nothing changes. `undo_patch` takes it back.

    Args:
        model: a causal or encoder–decoder Hugging Face model with an output embedding that is one plain weight.
        **keywords: of `linear_cross_entropy`: label_smoothing, z_loss, memory, ...

    Returns:
        The model itself.

    Raises:
        TypeError: the output embedding is LoRA or quantised. ValueError: there is none.
    """
    if not is_plain(output_head(model)):
        raise TypeError("the output embedding is LoRA or quantised, not one plain weight")
    forward = model.forward

    @functools.wraps(forward)
    def patched(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        if labels is None:
            return forward(*args, **inputs)
        inputs.pop("return_dict", None)
        if model.config.is_encoder_decoder and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        with hidden_only(model) as captured:
            outputs = forward(*args, return_dict=True, **inputs)
        hidden, head = captured[0], output_head(model)
        if not model.config.is_encoder_decoder:
            labels = next_tokens(labels, inputs.get("position_ids"))
        outputs.loss = linear_cross_entropy(
            hidden, head.weight, labels.to(hidden.device), linear_bias=head.bias, logit_scale=head.scale,
            logit_softcap=head.softcap, num_items=num_items_in_batch, **keywords,
        )  # fmt: skip
        outputs.logits = None if model.training else _logits(hidden, head)
        return outputs

    model.forward = patched
    return model


def undo_patch(model: Any) -> Any:
    """Takes `patch_model` back."""
    del model.forward
    return model


def _logits(hidden: Tensor, head: Any) -> Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight.to(hidden.dtype)) * head.scale
    logits = logits if head.bias is None else logits + head.bias.to(hidden.dtype)
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


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
