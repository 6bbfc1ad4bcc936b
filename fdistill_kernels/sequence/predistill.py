"""Students made of a teacher's alternating layers, and the loss that warms them up (Shleifer & Rush 2020)."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..own import resolve
from .models import Rows, forward_to_head, rows_of, step_loss

#: A configuration's names for its counts of layers.
ENCODER = ("encoder_layers", "num_layers")
DECODER = ("decoder_layers", "num_decoder_layers")
CAUSAL = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def chosen_layers(of: int, count: int) -> list[int]:
    """Which of the teacher's layers a student of fewer copies: evenly spread, first and last among them."""
    if not 1 <= count <= of:
        raise ValueError(f"a student can have 1 to {of} of the teacher's layers, not {count}")
    return [round(i) for i in torch.linspace(0, of - 1, count).tolist()]


def _set_layers(config: Any, names: tuple[str, ...], count: int) -> None:
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: copy its layers yourself")
    setattr(config, name, count)


def copy_layers(teacher: Any, *layers: int) -> Any:
    """A student with that many of the teacher's layers, every other weight the same.

    Args:
        teacher: a Hugging Face language model.
        layers: (encoder, decoder) of an encoder–decoder model, (decoder,) of a causal one.
    """
    config = copy.deepcopy(teacher.config)
    wanted = (ENCODER, DECODER) if config.is_encoder_decoder else (CAUSAL,)
    if len(layers) != len(wanted):
        raise ValueError(f"{type(teacher).__name__} takes {len(wanted)} counts of layers, not {len(layers)}")
    for names, count in zip(wanted, layers, strict=True):
        _set_layers(config, names, count)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen_layers(len(config.layer_types), layers[-1])]
    student = type(teacher)(config)
    sources, lists = dict(teacher.state_dict()), dict(teacher.named_modules())
    for name, module in student.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) != len(lists[name]):
            picked = chosen_layers(len(lists[name]), len(module))
            inside = {k: v for k, v in sources.items() if k.startswith(f"{name}.")}
            for key in inside:
                del sources[key]
            for i, j in enumerate(picked):
                prefix = re.compile(rf"^{re.escape(name)}\.{j}\.")
                sources.update({prefix.sub(f"{name}.{i}.", k): v for k, v in inside.items() if prefix.match(k)})
    student.load_state_dict(sources)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _matched(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor, count: float | Tensor) -> Tensor:
    """MSE of the states after each of the student's layers and after the teacher's layer as far along."""
    depth, of = len(student) - 1, len(teacher) - 1
    pairs = [(student[i], teacher[round(i * of / depth)]) for i in range(1, depth + 1)]
    return torch.stack([(s[mask] - t[mask].to(s)).square().mean(-1).sum() for s, t in pairs]).mean() / count


def predistillation_loss(
    student_model: Any, teacher_model: Any, prompts: list[Tensor], targets: list[Tensor], pad: int,
    weights: tuple[float, float, float] = (0.8, 0.2, 3.0), wrapped: Any = None, counts: Any = None,
) -> Tensor:  # fmt: skip
    """0.8·KL to the teacher + 0.2·cross-entropy on gold targets + 3·MSE of matched hidden states.

    counts: what means are over, tokens of prompts and of targets; default: those of this batch.

    Raises:
        ValueError: the models' hidden states differ in size, so that they cannot be matched.
    """
    of_kl, of_ce, of_mse = weights
    of_prompts, of_targets = counts or (sum(map(len, prompts)), sum(map(len, targets)))
    with torch.no_grad():
        teacher, theirs = rows_of(teacher_model, prompts, targets, pad, output_hidden_states=True)

    def soft_and_hard(student: Rows) -> Tensor:
        return of_kl * step_loss(student, teacher, resolve("kl"), reduction="mean", ce_weight=of_ce / of_kl,
                                 num_items=of_targets)  # fmt: skip

    loss, ours = forward_to_head(student_model, prompts, targets, pad, soft_and_hard, wrapped=wrapped,
                                 output_hidden_states=True)  # fmt: skip
    names = {"decoder_hidden_states": of_targets, "encoder_hidden_states": of_prompts}
    if not student_model.config.is_encoder_decoder:
        names = {"hidden_states": of_prompts + of_targets}
    for name, count in names.items():
        states, their_states = getattr(ours, name), getattr(theirs, name)
        if states[0].shape[-1] != their_states[0].shape[-1]:
            raise ValueError(
                f"hidden states of {states[0].shape[-1]} and {their_states[0].shape[-1]} cannot be matched"
            )
        lengths = [len(p) for p in prompts] if name.startswith("encoder") else [
            len(t) if name.startswith("decoder") else len(p) + len(t) for p, t in zip(prompts, targets, strict=True)
        ]  # fmt: skip
        mask = torch.arange(states[0].shape[1]) < torch.tensor(lengths)[:, None]
        loss = loss + of_mse * _matched(states, their_states, mask.to(states[0].device), count)
    return loss
