"""Prompts and continuations as a model's inputs, and the labels that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .generation import beginning
from .models import check_context

IGNORE = -100


def unpadded(ids: Tensor) -> list[Tensor]:
    """(B, L) padded with −100 on either side, as a list of rows; ValueError for a −100 inside, an unknown text."""
    here = nn.functional.pad(ids != IGNORE, (1, 0))
    if ((here[:, 1:] & ~here[:, :-1]).sum(1) > 1).any():
        raise ValueError("a row has −100 between its tokens: give the token ids, and beside them which of them count")
    return [row[row != IGNORE] for row in ids]


def padded(rows: Sequence[Tensor], value: int, side: str = "right") -> Tensor:
    """A list of rows as (B, longest), padded with a value on one side."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def padded_inputs(rows: Sequence[Tensor], pad: int, side: str = "right") -> dict[str, Tensor]:
    """A list of rows as a model's input_ids and attention_mask, padded on one side."""
    inputs = padded(rows, IGNORE, side)
    return {"input_ids": inputs.masked_fill(inputs == IGNORE, pad), "attention_mask": (inputs != IGNORE).long()}


def masked(continuations: Sequence[Tensor], counted: Sequence[Tensor] | None) -> list[Tensor]:
    """Continuations with −100 in place of the tokens that do not count."""
    if counted is None:
        return list(continuations)
    if [(len(m), m.dtype) for m in counted] != [(len(c), torch.bool) for c in continuations]:
        raise ValueError("counted must have a bool for each token of each continuation")
    return [c.masked_fill(~m.to(c.device), IGNORE) for c, m in zip(continuations, counted, strict=True)]


def tokens_counted(continuations: Sequence[Tensor], counted: Sequence[Tensor] | None) -> list[int]:
    """The number of tokens of each continuation that count; counted: as in `teacher_forced`."""
    return [len(c) for c in continuations] if counted is None else [int(m.sum()) for m in counted]


def teacher_forced(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, pack: bool = False,
    counted: Sequence[Tensor] | None = None,
) -> Any:  # fmt: skip
    """A model's inputs for prompts and continuations, and the labels (B, L) that its hidden states predict.

    An encoder–decoder model reads the prompt and writes the continuation, which starts as its generation does. A causal
    model continues the prompt, and its state at a token predicts the next token. Positions of prompts and padding are
    −100. With `pack`, a causal model gets all sequences in one row, separated by their positions; otherwise they are
    padded on the right, where every model's own positions are correct.
    counted: a bool for each token of each continuation. Tokens with False are read, but their label is −100. None: all
    count.
    """
    targets = masked(continuations, counted)
    if model.config.is_encoder_decoder:
        check_context(model, max(map(len, prompts)), max(map(len, continuations)))
        start = beginning(model)[0]
        written = padded([torch.cat((c.new_full((1,), start), c[:-1])) for c in continuations], pad)
        labels = padded(targets, IGNORE)
        labels = nn.functional.pad(labels, (0, written.shape[1] - labels.shape[1]), value=IGNORE)
        return {**padded_inputs(prompts, pad), "decoder_input_ids": written}, labels
    pairs = [torch.cat(pair) for pair in zip(prompts, continuations, strict=True)]
    check_context(model, max(map(len, pairs)), 0)
    targets = [torch.cat((p.new_full((len(p) - 1,), IGNORE), t, p.new_full((1,), IGNORE)))
               for p, t in zip(prompts, targets, strict=True)]  # fmt: skip
    if pack:
        positions = torch.cat([torch.arange(len(pair)) for pair in pairs])
        return {"input_ids": torch.cat(pairs)[None], "position_ids": positions[None]}, torch.cat(targets)[None]
    return padded_inputs(pairs, pad), padded(targets, IGNORE)
