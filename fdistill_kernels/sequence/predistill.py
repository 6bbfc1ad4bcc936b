"""Students made of some of a teacher's layers, and the loss that warms them up (Shleifer & Rush 2020)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..own import resolve
from .forward import forward_to_head, rows_of
from .losses import Rows, step_loss
from .probes import changed_by_place
from .teacher_forcing import padded

#: A configuration's names for its numbers of layers.
ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers")
DECODER = ("decoder_layers", "num_decoder_layers")
CAUSAL = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Published choices of layers that are not the even spread, by the teacher's and the student's number of layers: for 6,
#: 12 and 16 layers from Shleifer & Rush 2020 (arXiv 2010.13002), for 24 from f-DISTILL's dialogue models.
PUBLISHED = {
    (6, 4): [0, 1, 3, 5], (12, 2): [0, 6], (12, 4): [0, 4, 8, 11], (12, 9): [0, 1, 2, 4, 5, 7, 9, 10, 11],
    (16, 8): [0, 2, 4, 6, 8, 10, 12, 15], (16, 9): [0, 1, 3, 5, 7, 9, 11, 13, 15],
    (16, 12): [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15], (24, 3): [0, 11, 23], (24, 4): [0, 8, 16, 23],
    (24, 5): [0, 5, 11, 17, 23], (24, 6): [0, 5, 10, 15, 20, 23], (24, 7): [0, 4, 8, 12, 16, 20, 23],
    (24, 9): [0, 3, 6, 9, 12, 15, 18, 21, 23], (24, 12): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23],
}  # fmt: skip


def chosen_layers(of: int, count: int) -> list[int]:
    """Which of the teacher's layers a smaller student copies: as in `PUBLISHED`, else evenly spread, first to last."""
    if not 1 <= count <= of:
        raise ValueError(f"a student can have 1 to {of} of the teacher's layers, not {count}")
    return PUBLISHED.get((of, count)) or [round(i) for i in torch.linspace(0, of - 1, count).tolist()]


def _set_layers(config: Any, names: tuple[str, ...], count: int) -> None:
    """Sets a smaller number of layers in a configuration, and keeps its values of the layers that are copied."""
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: copy its layers yourself")
    of = getattr(config, name)
    for key, values in list(vars(config).items()) if names is not DECODER else ():  # attention_window, layer_types, ...
        if isinstance(values, (list, tuple)) and len(values) == of > 1 and "token" not in key:
            setattr(config, key, [values[i] for i in chosen_layers(of, count)])
    if names is ENCODER and "num_hidden_layers" in vars(config):  # as BART's before transformers 5.4
        config.num_hidden_layers = count
    try:
        setattr(config, name, count)
    except NotImplementedError as error:  # ProphetNet's, of which this is a sum
        raise ValueError(f"{type(config).__name__}: {error} Copy its layers yourself") from error


def _check_readable(config: Any) -> None:
    """Raises ValueError for a configuration whose numbers belong together, so that no saved student could be loaded."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each configuration has its own checks
        why = " ".join(str(error).split())
        raise ValueError(f"{type(config).__name__} does not go with fewer layers ({why}): copy its layers yourself"
                         ) from error  # fmt: skip


def copy_layers(teacher: Any, *layers: int) -> Any:
    """A student with fewer of a Hugging Face teacher's layers and the same other weights.

    layers: how many, of encoder and decoder or of a causal model. Raises ValueError for more than the teacher has, for
    those that would not be the same at another place, and for a teacher with an adapter.
    """
    if getattr(teacher, "peft_config", None):
        raise ValueError(f"{type(teacher).__name__} has an adapter, whose layers are not copied: merge it first")
    config = copy.deepcopy(teacher.config)
    wanted = (ENCODER, DECODER) if config.is_encoder_decoder else (CAUSAL,)
    if len(layers) != len(wanted):
        raise ValueError(f"{type(teacher).__name__} takes {len(wanted)} counts of layers, not {len(layers)}")
    for names, count in zip(wanted, layers, strict=True):
        _set_layers(config, names, count)
    _check_readable(config)
    student = type(teacher)(config)
    sources, lists, copied = dict(teacher.state_dict()), dict(teacher.named_modules()), {}
    for name, module in student.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) != len(lists[name]):
            picked = copied[name] = chosen_layers(len(lists[name]), len(module))
            inside = {k: v for k, v in sources.items() if k.startswith(f"{name}.")}
            for key in inside:
                del sources[key]
            for i, j in enumerate(picked):
                old, new = f"{name}.{j}.", f"{name}.{i}."
                sources |= {new + k.removeprefix(old): v for k, v in inside.items() if k.startswith(old)}
    try:
        student.load_state_dict(sources)
    except RuntimeError as error:  # GPT-NeoX-Japanese's last layer has a bias that the others have not
        raise ValueError(
            f"{type(teacher).__name__}'s layers differ, so that one cannot take another's place"
        ) from error
    if (layer := changed_by_place(teacher, student, copied)) is not None:
        raise ValueError(f"{type(teacher).__name__}'s layers depend on their place or their number: {layer} of the "
                         "student, a copy, gives something else than in the teacher")  # fmt: skip
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _mask(states: Any, masks: Sequence[Tensor], model: Any) -> Tensor:
    """Which of a model's hidden states (B, L, D) are of tokens that count, (B, L): some models lengthen what they read,
    and some (Gemma 3n, Pegasus-X), which are refused, have not one vector for each token.
    """
    mask = padded(masks, False)
    if not all(isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] >= mask.shape[1] for x in states):
        raise ValueError(f"{type(model).__name__}'s hidden states are not one vector for each token and cannot be "
                         "matched: hidden_weight=0 leaves them out")  # fmt: skip
    return nn.functional.pad(mask, (0, states[0].shape[1] - mask.shape[1])).to(states[0].device)


def _matched(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], masks: Sequence[Tensor], normalize: bool, reduction: str
) -> Tensor:
    """MSE, summed over tokens, of the states after each student layer and its teacher's; masks: of both, (B, L)."""
    depth, of = len(student) - 1, len(teacher) - 1
    errors = []
    for i in range(1, depth + 1):
        ours, theirs = student[i][masks[0]], teacher[round(i * of / depth)][masks[1]].to(student[i])
        if normalize:
            ours, theirs = (nn.functional.layer_norm(x, x.shape[-1:]) for x in (ours, theirs))
        errors.append((ours - theirs).square().mean(-1).sum())
    return getattr(torch.stack(errors), reduction)()


def predistillation_loss(
    student_model: Any, teacher_model: Any, prompts: list[Tensor], targets: list[Tensor], pad: int,
    weights: tuple[float, float] = (0.8, 0.2), hidden_weight: float = 3.0, hidden_normalize: bool = True,
    hidden_reduction: str = "mean", wrapped: Any = None, counts: Any = None, counted: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """0.8·KL to the teacher + 0.2·cross-entropy on gold targets + 3·MSE of matched hidden states.

    Args:
        prompts, targets: rows of ids; pad: the id that pads them.
        weights: of the KL, which must be positive, and of the cross-entropy.
        hidden_weight: weight of the MSE, at least 0; with 0 it is not computed, and the models' sizes may differ.
        hidden_normalize: layer-normalise both models' hidden states before the MSE, as f-DISTILL does for T5 and GPT-2.
            Models that normalise inside their layers have residual streams of any size: without this their MSE is
            nearly all of the loss (98 % for a small T5). For others, such as BART, it changes little.
        hidden_reduction: "mean" over the student's layers, so that the weight means the same at any depth, or "sum", as
            in f-DISTILL's own program.
        wrapped: as in `forward_to_head`.
        counts: denominators of the means: tokens of prompts, and tokens of targets that count; default: of this batch.
        counted: which tokens of the targets are in the loss, as in `teacher_forced`.
    """
    if hidden_reduction not in ("mean", "sum"):
        raise ValueError(f"hidden_reduction must be mean or sum, not {hidden_reduction!r}")
    if not (weights[0] > 0 and hidden_weight >= 0):
        raise ValueError(f"the weight of the KL must be positive, not {weights[0]}, and that of the hidden states at "
                         f"least 0, not {hidden_weight}")  # fmt: skip
    here = [torch.ones_like(t, dtype=torch.bool) for t in targets] if counted is None else list(counted)
    of_prompts, of_targets = counts or (sum(map(len, prompts)), int(torch.cat(here).sum()))
    options: dict[str, Any] = dict(output_hidden_states=hidden_weight > 0, counted=counted)
    with torch.no_grad():
        teacher, theirs = rows_of(teacher_model, prompts, targets, pad, **options)

    def soft_and_hard(student: Rows) -> Tensor:
        return weights[0] * step_loss(student, teacher, resolve("kl"), reduction="mean", num_items=of_targets,
                                      ce_weight=weights[1] / weights[0])  # fmt: skip

    loss, ours = forward_to_head(student_model, prompts, targets, pad, soft_and_hard, wrapped=wrapped, **options)
    if getattr(ours, "loss", None) is not None:  # a mixture of experts' own
        loss = loss + ours.loss
    if not hidden_weight:
        return loss
    of_prompt = [torch.ones_like(p, dtype=torch.bool) for p in prompts]
    matched = {"decoder_hidden_states": (here, of_targets), "encoder_hidden_states": (of_prompt, of_prompts)}
    if not student_model.config.is_encoder_decoder:
        both = [torch.cat((p, t.to(p.device))) for p, t in zip(of_prompt, here, strict=True)]
        matched = {"hidden_states": (both, of_prompts + of_targets)}
    for name, (masks, count) in matched.items():
        states, their_states = getattr(ours, name), getattr(theirs, name)
        of_each = [_mask(states, masks, student_model), _mask(their_states, masks, teacher_model)]
        if states[0].shape[-1] != their_states[0].shape[-1]:
            raise ValueError(
                f"hidden states of {states[0].shape[-1]} and {their_states[0].shape[-1]} cannot be matched"
            )
        error = _matched(states, their_states, of_each, hidden_normalize, hidden_reduction)
        loss = loss + hidden_weight * error / count
    return loss
