"""Hugging Face models as the losses see them: hidden states before the output embedding, and that embedding.

The output embedding is not run: `at_head` puts the loss in its place, so that N×V logits never exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..divergences import Divergence
from ..linear import linear_cross_entropy, linear_f_divergence

IGNORE = -100


class Head(NamedTuple):
    """An output embedding: logits = softcap·tanh((scale·hidden weightᵀ + bias)/softcap).

    A quantised one has no such weight; then bias is what the model adds to the module's own result.
    """

    module: nn.Module
    weight: Any
    bias: Tensor | None
    scale: float
    softcap: float | None

    @property
    def plain(self) -> bool:
        """Whether it is one floating matrix, and not LoRA's sum or quantised."""
        return isinstance(self.weight, Tensor)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of a few rows, by the module itself if it is not plain."""
        if self.plain:
            z = torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype)) * self.scale
        else:
            z = self.module(hidden) * self.scale
        z = z if self.bias is None else z + self.bias.to(z)
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()


def output_head(model: Any) -> Head:
    """The model's output embedding, with what its architecture does to logits after it.

    Raises:
        ValueError: there is none.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: not a language model with a head")
    if hasattr(module, "modules_to_save"):  # PEFT's trainable copy of it
        module = module.modules_to_save[module.active_adapters[0]]
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    found = getattr(module, "weight", None)  # of dynamic quantisation, a method; of bitsandbytes, integers
    plain = isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2
    weight = found if plain and not hasattr(module, "lora_A") else None
    bias = None if weight is None else getattr(module, "bias", None)
    extra = getattr(model, "final_logits_bias", None)  # BART's
    if extra is not None and bool(extra.any()):
        bias = extra.flatten() if bias is None else bias + extra.flatten()
    return Head(module, weight, bias, scale, getattr(config, "final_logit_softcapping", None))


@contextlib.contextmanager
def at_head(model: Any, call: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Inside, a call of the model runs `call` on what its output embedding is given, in its place, and makes no logits.

    What it returns goes into the list. It runs there because FSDP and ZeRO-3 have the embedding's weight whole there;
    and the logits' place is taken by an empty tensor made from it, so that what wraps the model finds in its output
    every parameter that a loss depends on.
    """
    module = model.get_output_embeddings()
    own = vars(module).get("forward")  # of accelerate's hooks
    made: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        made.append(call(hidden))
        return made[-1].flatten()[:0].reshape(*hidden.shape[:-2], 0, 1).clone()  # FSDP warns of views

    module.forward = forward
    try:
        yield made
    finally:
        restore_forward(module, own)


def restore_forward(module: Any, own: Any) -> None:
    """A module's `forward` as it was: its own attribute, or its class's (None)."""
    if own is None:
        del module.forward
    else:
        module.forward = own


class Rows(NamedTuple):
    """The steps of a batch of continuations, those that count, one after the other."""

    hidden: Tensor  # (M, D), what predicts the token
    tokens: Tensor  # (M,)


def unpadded(ids: Tensor) -> list[Tensor]:
    """(B, L) padded with −100 on any side, as a list of rows."""
    return [row[row != IGNORE] for row in ids]


def padded(rows: Sequence[Tensor], value: int, side: str = "right") -> Tensor:
    """A list of rows as (B, longest), padded with a value on one side."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def teacher_forced(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, pack: bool = False,
    side: str = "right",
) -> Any:  # fmt: skip
    """A model's inputs for prompts and continuations, and the labels (B, L) that its hidden states predict.

    An encoder–decoder model reads the prompt and writes the continuation; a causal one goes on from the prompt, and its
    state at a token predicts the next. Positions of prompts and padding are −100. With `pack`, a causal model gets all
    sequences one after the other in one row, told apart by their positions; else they are padded on `side`.
    """
    if model.config.is_encoder_decoder:
        labels = padded(continuations, IGNORE)
        inputs = padded(prompts, IGNORE)
        return {
            "input_ids": inputs.masked_fill(inputs == IGNORE, pad), "attention_mask": (inputs != IGNORE).long(),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        }, labels  # fmt: skip
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(p) + len(c) for p, c in zip(prompts, continuations, strict=True))
    if limit and longest > limit:
        raise ValueError(f"a prompt with its continuation has {longest} tokens, the model's context {limit}")
    pairs = [torch.cat(pair) for pair in zip(prompts, continuations, strict=True)]
    targets = [torch.cat((pair[: len(p)].new_full((len(p) - 1,), IGNORE), pair[len(p) :], pair.new_full((1,), IGNORE)))
              for p, pair in zip(prompts, pairs, strict=True)]  # fmt: skip
    if pack:
        positions = torch.cat([torch.arange(len(pair)) for pair in pairs])
        return {"input_ids": torch.cat(pairs)[None], "position_ids": positions[None]}, torch.cat(targets)[None]
    inputs = padded(pairs, IGNORE, side)
    mask = (inputs != IGNORE).long()
    return {
        "input_ids": inputs.masked_fill(inputs == IGNORE, pad), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }, padded(targets, IGNORE, side)  # fmt: skip


def forward_to_head(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, call: Callable[[Rows], Tensor],
    *, wrapped: Any = None, pack: bool = False, side: str = "right", **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """What `call` makes of a batch's rows in the output embedding's place, and the model's own outputs.

    wrapped: what is called in the model's place, such as its DistributedDataParallel.
    """
    inputs, labels = teacher_forced(model, prompts, continuations, pad, pack, side)
    device = next(model.parameters()).device
    counts, tokens = labels != IGNORE, labels[labels != IGNORE]

    def with_rows(hidden: Tensor) -> Tensor:  # a large model's head may be on another device than its beginning
        return call(Rows(hidden[counts.to(hidden.device)], tokens.to(hidden.device)))

    with at_head(model, with_rows) as made:
        outputs = (wrapped or model)(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False, **more)
    return made[0] + outputs.logits.sum(), outputs  # the sum of nothing: FSDP waits for a gradient of the output


def rows_of(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, **options: Any
) -> tuple[Rows, Any]:
    """The `Rows` of a batch, and the model's own outputs, as in `forward_to_head`; gradients flow where enabled."""
    rows: list[Rows] = []

    def keep(found: Rows) -> Tensor:
        rows.append(found)
        return found.hidden.flatten()[:0]

    _, outputs = forward_to_head(model, prompts, continuations, pad, keep, **options)
    return rows[0], outputs


def step_loss(
    student: Rows, student_model: Any, teacher: Rows | None, teacher_model: Any, divergence: Divergence | None,
    temperature: float = 1.0, ce_weight: float = 0.0, reduction: str = "sum", **keywords: Any,
) -> Tensor:  # fmt: skip
    """The step-wise losses of a batch's rows: a divergence to the teacher, or without one the tokens' −log q."""
    head = output_head(student_model)
    if not head.plain:
        raise TypeError("the student's output embedding is LoRA or quantised: leave it out, or train it as a whole")
    if not len(student.tokens):
        return student.hidden.sum() * 0.0 + head.weight.sum() * 0.0
    if divergence is None:
        return linear_cross_entropy(student.hidden, head.weight, student.tokens, linear_bias=head.bias,
                                    logit_scale=head.scale, logit_softcap=head.softcap, reduction=reduction,
                                    **keywords)  # fmt: skip
    assert teacher is not None
    theirs, hidden = output_head(teacher_model), teacher.hidden
    shared = min(head.weight.shape[0], theirs.weight.shape[0] if theirs.plain else int(theirs.module.out_features))  # type: ignore[arg-type]
    common: dict[str, Any] = dict(
        student_bias=head.bias, logit_scale=head.scale, logit_softcap=head.softcap, vocab_size=shared,
        labels=student.tokens, ce_weight=ce_weight, temperature=temperature, reduction=reduction, **keywords,
    )  # fmt: skip
    if theirs.plain and theirs.weight.device == student.hidden.device:
        return linear_f_divergence(
            student.hidden, head.weight, hidden, theirs.weight, divergence, teacher_bias=theirs.bias,
            teacher_logit_scale=theirs.scale, teacher_logit_softcap=theirs.softcap, **common,
        )  # fmt: skip

    @torch.no_grad()
    def logits(begin: int, end: int) -> Tensor:
        return theirs.logits(hidden[begin:end])[:, :shared].to(student.hidden.device)

    return linear_f_divergence(student.hidden, head.weight, logits, None, divergence, **common)
