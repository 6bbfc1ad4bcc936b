"""What models are asked once, before they are relied on: whether padding, later tokens or neighbours change a step,
and whether a copied layer is what it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Cache

from .models import accepted, evaluating, ids_of
from .teacher_forcing import IGNORE, teacher_forced

#: What models have been asked, each by the question, by what the answer depends on, and by the attention.
_ASKED: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


def asked(question: Callable[..., bool], model: Any, *arguments: Any, of: Any = None) -> bool:
    """The answer to a question about a model in evaluation mode, asked once, or once for every `of`."""
    known = _ASKED.setdefault(model, {})
    key = question, of, getattr(model.config.get_text_config(), "_attn_implementation", None)
    if key not in known:
        device = next(model.parameters()).device
        with torch.no_grad(), evaluating(model), torch.autocast(device.type, enabled=False):
            known[key] = question(model, *arguments)
    return known[key]


def close(one: Tensor, other: Tensor, tolerance: float, roundings: int = 8) -> bool:
    """Whether logits differ by no more than `tolerance`, or rounding in their dtype; NaN is another check's matter."""
    tolerance = max(tolerance, roundings * torch.finfo(one.dtype).eps)
    return not bool((one - other).double().norm() > tolerance * one.double().norm())


def check_forward(model: Any, wrapped: Any, pad: int, pack: bool, tokens: int = 0) -> None:
    """Raises ValueError for a model whose padded batches, or packed rows of so many tokens, do not give the same as
    their sequences alone, which is tested once: many look at later tokens (as BERT does if it is no decoder), at
    padding, or over the borders of packed sequences.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if not asked(_steps_alone, model, wrapped, pad):
        raise ValueError(f"{name} looks at later tokens or at padding, so that its logits are no steps "
                         "of a generation (of BERT and its kin a decoder has is_decoder=True)")  # fmt: skip
    if not pack:
        return
    if not asked(_keeps_apart, model, wrapped):
        raise ValueError(f"{name} mixes sequences that are packed in one row: leave out pack")
    chunk = getattr(config, "attention_chunk_size", None)  # Llama 4's chunks are of rows, not of sequences
    if chunk and tokens > chunk:
        raise ValueError(f"{name} attends within chunks of {chunk} tokens, which {tokens} packed ones would be cut by: "
                         "leave out pack")  # fmt: skip


@torch.no_grad()
def changed_by_place(teacher: Any, student: Any, copied: dict[str, list[int]]) -> str | None:
    """The name of a layer that gives something else in a student than it gave in the teacher, of the same input, as one
    that is scaled by its number; None: there is none.

    copied: of each list of layers, by its name, which of the teacher's the student's are.
    """
    if teacher.main_input_name != "input_ids":  # as sound's, which no text stands for
        return None
    seen: dict[str, Any] = {}  # by the layer's name in the student: the teacher's, what it was given, and what it gave
    with contextlib.ExitStack() as hooks, evaluating(teacher, student):
        for name, layers in copied.items():
            for i, j in enumerate(layers):
                keep = functools.partial(lambda name, *given: seen.update({name: given}), f"{name}.{i}")
                layer = teacher.get_submodule(f"{name}.{j}")
                hooks.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        texts = ("input_ids", "decoder_input_ids") if teacher.config.is_encoder_decoder else ("input_ids",)
        for model in (teacher, student):  # the student, as what is read decides BigBird's attention
            ids = torch.linspace(0, ids_of(model) - 1, 9, device=next(model.parameters()).device).long()[None, 1:-1]
            model(**accepted(model, {**dict.fromkeys(texts, ids), "use_cache": False}))
        return next((name for name, given in seen.items() if not _gives(student.get_submodule(name), *given)), None)


def _gives(layer: nn.Module, teachers: nn.Module, args: Any, keywords: Any, output: Any) -> bool:
    """Whether a layer makes of arguments what the teacher's has made of them."""
    layer = copy.deepcopy(layer)
    for own, like in zip(itertools.chain(layer.parameters(), layer.buffers()),
                         itertools.chain(teachers.parameters(), teachers.buffers()), strict=False):  # fmt: skip
        own.data = own.data.to(like)  # each, as some models keep some of theirs in float32
    keywords = {name: None if isinstance(x, Cache) else x for name, x in keywords.items()}  # XLM has one in any case
    before, made, given = (next(x for x in tree_leaves(of) if isinstance(x, Tensor)) for of in (
        (args, keywords), layer(*args, **keywords), output))  # fmt: skip
    if before.shape == made.shape:  # without what residual layers only hand on, which may be large
        made, given = made - before, given - before
    return close(made, given, 1e-2, 1)


def _steps_alone(model: Any, wrapped: Any, pad: int) -> bool:
    """Whether a sequence's first steps stay the same when its end is another, and without the padding behind it."""
    device, size = next(model.parameters()).device, ids_of(model)
    ids = torch.linspace(size // 4, 3 * size // 4, 9, device=device).long()
    prompt, longer, begin, end, other, more = ids[:1], ids[:2], ids[2:4], ids[4:5], ids[6:7], ids[5:9]

    def logits(prompts: list[Tensor], continuations: list[Tensor]) -> Tensor:
        inputs, labels = teacher_forced(model, prompts, continuations, pad)
        made = wrapped(**accepted(model, {**inputs, "use_cache": False})).logits[:, -labels.shape[1] :]
        first = [row[steps][:2] for row, steps in zip(made, labels.to(made.device) != IGNORE, strict=True)]
        return torch.stack(first).to(model.dtype)

    whole = torch.cat((begin, end))
    ends = torch.cat((begin, other)), torch.cat((whole, more))
    padded, ended, _ = logits([prompt, prompt, longer], [whole, *ends])
    alone, beside = logits([prompt], [whole])[0], logits([prompt, other], [whole, more[:3]])[0]
    moved = float((beside - alone).norm() / alone.norm())  # by activations that are quantised a batch at a time
    return close(padded, ended, 1e-2) and close(padded, alone, max(5e-3, 3 * moved), 16)


def _keeps_apart(model: Any, wrapped: Any) -> bool:
    """Whether a sequence's logits are the same whatever is packed before it, and those that it has alone.

    All rows are of one shape: what is compared differs by rounding at most, and by none behind other sequences.
    """
    device = next(model.parameters()).device
    ids = torch.linspace(0, ids_of(model) - 1, 9, device=device).long()
    positions = torch.arange(3, device=device).repeat(2)[None]

    def logits(first: Tensor, second: Tensor, **positions: Tensor) -> Tensor:
        row = {"input_ids": torch.cat((first, second))[None], **positions, "use_cache": False}
        return wrapped(**accepted(model, row)).logits[0].to(model.dtype)

    a, b, c = ids.split(3)
    one, other = (logits(before, c, position_ids=positions)[3:] for before in (a, b))
    packed, alone = logits(c, a, position_ids=positions)[:3], logits(c, a)[:3]
    return close(one, other, 1e-4, 2) and close(one, packed, 1e-2) and close(one, alone, 1e-2)
