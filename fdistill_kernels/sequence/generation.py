"""What a model's generation configuration says of its sequences: how they begin, end, and are searched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .models import ids_of, virtual_tokens

#: What it decides of samples.
TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
#: What it says of how outputs come (their number, form, speed and kind of search), which is for `draw` to say.
FORM = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
        "output_hidden_states", "max_time", "low_memory", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
        "penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty")  # fmt: skip
#: What it says of outputs and needs more than a model: a tokenizer, or code from elsewhere.
NOT_HERE = ("stop_strings", "token_healing", "constraints", "force_words_ids")
#: What it says of greedy outputs and `generate` alone follows; and with which value it says nothing.
BY_GENERATE = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
                     "begin_suppress_tokens", "min_length", "min_new_tokens", "sequence_bias",
                     "exponential_decay_length_penalty", "watermarking_config"), 0),
}  # fmt: skip


def token_id(model: Any, name: str) -> Any:
    """A special token, from a model's generation configuration or its configuration (CodeGen's lacks some)."""
    configs = (getattr(model, "generation_config", None), model.config)
    return next((found for config in configs if (found := getattr(config, name, None)) is not None), None)


def beginning(model: Any) -> tuple[int, int | None]:
    """What an encoder–decoder model's generation begins with: the decoder's start token, and a first token that is
    forced upon it, such as the language of mBART-50 and NLLB, or none.

    They are its generation configuration's: set decoder_start_token_id or forced_bos_token_id there for a language.
    """
    own = getattr(model, "generation_config", None)  # as `generate`: the start, else bos, which others' configs have
    found = (getattr(own, "decoder_start_token_id", None), getattr(own, "bos_token_id", None),
             token_id(model, "decoder_start_token_id"), token_id(model, "bos_token_id"))  # fmt: skip
    start = next((token for token in found if token is not None), None)
    if not isinstance(start, int):
        raise ValueError(
            f"{type(model).__name__} needs one decoder_start_token_id in its generation config, not {start}"
        )
    return start, token_id(model, "forced_bos_token_id")


def chosen(
    model: Any, continuations: Sequence[Tensor], counted: Sequence[Tensor] | None = None
) -> Sequence[Tensor] | None:
    """`counted` without the first tokens that a model's generation forces: they are no choice of the model's, whose
    probability of them is 1, so that losses and risks leave them out. Other first tokens than the forced one count.
    continuations, counted: as in `teacher_forced`. model: of losses the student.
    """
    forced = beginning(model)[1] if model.config.is_encoder_decoder else None
    if forced is None:
        return counted
    free = [torch.cat((c[:1] != forced, torch.ones_like(c[1:], dtype=torch.bool))) for c in continuations]
    return free if counted is None else [m.to(f.device) & f for m, f in zip(counted, free, strict=True)]


def end_tokens(model: Any) -> list[int]:
    """What ends a model's sequences, by its eos_token_id: there may be none or several."""
    configured = token_id(model, "eos_token_id")
    found = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(hasattr(token, "__index__") for token in found):
        raise ValueError(f"eos_token_id in a generation config must be an id or a list of ids, not {configured!r}")
    return found


def special_tokens(model: Any) -> tuple[int, list[int]]:
    """The padding token and the end tokens, of which there must be one; it pads where no padding token has an id."""
    ends, pad = end_tokens(model), token_id(model, "pad_token_id")
    if not ends:
        raise ValueError(
            f"{type(model).__name__} has no eos_token_id in its generation config: set one before sampling"
        )
    has = pad is not None and 0 <= pad < ids_of(model)  # Llama's own files have −1
    return (pad if has else ends[0]), ends


def share_ends(student: Any, of_teachers: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Gives a student's generation config the end tokens of its teachers, as `Trainer` gives it the tokenizer's: what
    ends a sequence of one model and not of the other has no probability there. Warns of each that one of them lacks.
    """
    own = end_tokens(student)
    of_each = [ends for ends in of_teachers if ends]
    if not own or getattr(student, "generation_config", None) is None:
        return
    if new := [i for i in dict.fromkeys(i for ends in of_each for i in ends) if i not in own and i < vocabulary]:
        student.generation_config.eos_token_id = [*own, *new]
        warnings.warn(f"the teacher's sequences also end at {new}: the student's generation config has now "
                      f"eos_token_id={[*own, *new]}, and its samples end there too", stacklevel=3)  # fmt: skip
    if beyond := sorted({i for ends in of_each for i in {*own, *new} - {*ends}}):
        warnings.warn(f"a teacher's samples go on after {beyond}, which end the student's: if they should end there, "
                      "add these to eos_token_id in the teacher's generation config", stacklevel=3)  # fmt: skip


def check_search(model: Any, by_forward: bool = False) -> None:
    """Raises ValueError for a generation config that a search cannot follow here. by_forward: without `generate`."""
    own = getattr(model, "generation_config", None)
    unable = dict.fromkeys(NOT_HERE, 0) | (BY_GENERATE if by_forward or virtual_tokens(model) else {})
    if found := [name for name, none in unable.items() if (getattr(own, name, None) or none) != none]:
        whose = getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise ValueError(f"{whose} has {', '.join(found)} in its generation config, which greedy outputs and beams "
                         "cannot follow here: leave it out")  # fmt: skip


def for_search(own: GenerationConfig) -> GenerationConfig:
    """A model's own generation configuration, for one output a prompt, by the search that is asked for."""
    made, plain = copy.copy(own), GenerationConfig()
    for name in FORM:
        setattr(made, name, getattr(plain, name, None))
    return made
