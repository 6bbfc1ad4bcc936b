"""Sequences drawn from a model, by sampling or by a search."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..checks import check_integer, check_number, own_number
from .forward import rows_of
from .generation import TOKENS, beginning, check_search, for_search, special_tokens
from .models import accepted, at_model, check_context, evaluating, ids_of, virtual_tokens, vocabulary_of
from .probes import asked, close
from .ranks import from_first, is_partitioned, seeded
from .teacher_forcing import IGNORE, padded_inputs, teacher_forced


@dataclass(frozen=True)
class Sampling:
    """How sequences are drawn: ancestral sampling with temperature, top-k and top-p (off at 0 and 1), or a search."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 0  # 0: draw; 1: greedy search; more: beam search. With a search the others but the length do nothing
    cache: str | None = field(default=None, compare=False)  # `cache_implementation`, on which no token depends

    def __post_init__(self) -> None:
        for name in self.decided():
            object.__setattr__(self, name, own_number(getattr(self, name)))
        for name, least in (("max_new_tokens", 1), ("beams", 0), ("top_k", 0)):
            check_integer(name, getattr(self, name), least)
        for name, most in (("temperature", math.inf), ("top_p", 1)):
            check_number(name, getattr(self, name), 0, most, open_low=True)
        GenerationConfig(cache_implementation=self.cache)  # which knows them

    def decided(self) -> dict[str, Any]:
        """The settings that samples depend on."""
        return {f.name: getattr(self, f.name) for f in dataclass_fields(self) if f.compare}

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        if self.beams:
            return dict(do_sample=False, num_beams=self.beams, max_new_tokens=self.max_new_tokens)
        return dict(do_sample=True, num_beams=1, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                    max_new_tokens=self.max_new_tokens)  # fmt: skip


@torch.no_grad()
def draw(
    model: Any, prompts: Sequence[Tensor], sampling: Sampling, seed: int | None = None, vocabulary: int | None = None
) -> list[Tensor]:
    """One continuation of each prompt, with its end token, by batched `generate` with a KV cache.

    If a model's `generate` fails or disagrees with its forward, which is tried once, `drawn_by_forward` is used: some
    models lose PEFT's virtual tokens in the cache, count positions from 0 although the model does not (RoBERTa), or
    look at padding (RWKV). The seed alone decides a batch's samples; without one they continue from torch's generator.
    Ids from `vocabulary` on, with which one model is padded more than the other, are not drawn.
    Raises ValueError for a length, a search or a cache that the model has not, FloatingPointError for NaN and ∞.
    """
    pad, ends = special_tokens(model)
    if sampling.beams:
        check_search(model)
    new, encoder_decoder, longest = sampling.max_new_tokens, model.config.is_encoder_decoder, max(map(len, prompts))
    check_context(model, longest, new)
    settings = _settings(model, sampling, vocabulary)
    try:
        with evaluating(model), _seeded(model, seed), _of_p_itself(model) as owners:
            itself = not virtual_tokens(model) and asked(
                _generates_itself, model, pad, settings, of=(sampling.cache, settings.get("decoder_start_token_id"))
            )
            for module, own in owners.items() if sampling.beams else ():
                if own is not None:  # before transformers 4.5x all of a model's parts have one, most of them None
                    module.generation_config = for_search(own)
            if not itself:
                if sampling.cache:
                    raise ValueError(f"cache_implementation={sampling.cache!r} is not used: {type(model).__name__} is "
                                     "drawn from by its forward, without a cache")  # fmt: skip
                return drawn_by_forward(model, prompts, sampling, vocabulary)
            made = model.generate(**_left_padded(model, prompts, pad), **settings, **sampling.keywords())
    except RuntimeError as error:  # of torch.multinomial
        if "probability tensor" not in str(error):
            raise
        raise FloatingPointError(f"{type(model).__name__} has logits that are not finite: it draws nothing") from error
    return [_until_end(row, ends) for row in made[:, 1 if encoder_decoder else longest :]]


def _settings(model: Any, sampling: Sampling, vocabulary: int | None) -> dict[str, Any]:
    """What `generate` is told beside `Sampling.keywords`."""
    pad, ends = special_tokens(model)
    size = vocabulary_of(model.config)
    beyond = {*range(size if vocabulary is None else vocabulary, size)}
    if sampling.beams:
        beyond |= {*(getattr(getattr(model, "generation_config", None), "suppress_tokens", None) or ())}
    settings = dict(pad_token_id=pad, eos_token_id=ends, use_cache=True, suppress_tokens=sorted(beyond) or None,
                    cache_implementation=sampling.cache,
                    synced_gpus=is_partitioned(model))  # fmt: skip  # ranks wait for the last
    if model.config.is_encoder_decoder:
        settings |= dict(zip(("decoder_start_token_id", "forced_bos_token_id"), beginning(model), strict=True))
    return settings


@contextlib.contextmanager
def _of_p_itself(model: Any) -> Iterator[dict[Any, Any]]:
    """Inside, what is drawn is of p itself: no part of the model has a repetition penalty, say, that it came with.
    Yields the parts with what they have outside.
    """
    (pad, ends), config = special_tokens(model), model.config.get_text_config()
    owners = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}  # PEFT's is inside
    routers = getattr(config, "output_router_logits", None)
    try:
        for module, own in owners.items():
            kept = {name: getattr(own, name, None) for name in TOKENS} if model.config.is_encoder_decoder else {}
            module.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=ends, **kept)
        if routers:  # the auxiliary loss of experts is of whole sequences, and fails of single steps
            config.output_router_logits = False
        yield owners
    finally:
        for module, own in owners.items():
            module.generation_config = own
        if routers:
            config.output_router_logits = routers


def _left_padded(model: Any, prompts: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """What `generate` is given: causal models go on from the right."""
    return padded_inputs(at_model(model, prompts), pad, "right" if model.config.is_encoder_decoder else "left")


def _generates_itself(model: Any, pad: int, settings: dict[str, Any]) -> bool:
    """Whether two steps of `generate`, of a padded prompt, have the logits of a teacher-forced forward without padding.

    In half precision the two may differ by its rounding; whatever begins otherwise differs by far more.
    """
    device, size = next(model.parameters()).device, ids_of(model)
    short, long = torch.linspace(size // 4, 3 * size // 4, 6, device=device).long().split((2, 4))
    try:
        made = model.generate(
            **_left_padded(model, [short, long], pad), **settings, do_sample=False, num_beams=1,
            max_new_tokens=2, min_new_tokens=2, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # ProphetNet's positions, caches of others
        name, cache = type(model).__name__, settings["cache_implementation"]
        if cache:
            raise ValueError(f"{name} does not generate with cache_implementation={cache!r}: {error}") from error
        warnings.warn(f"{name}.generate fails ({error}): its forward draws, without a cache", stacklevel=4)
        return False
    said = torch.stack([logits[0] for logits in made.logits])
    inputs, labels = teacher_forced(model, [short], [made.sequences[0, -2:]], pad)
    own = model(**accepted(model, {**inputs, "use_cache": False})).logits[labels != IGNORE]
    return close(own.to(model.dtype), said.to(model.dtype), 1e-2, 16)


def _seeded(model: Any, seed: int | None) -> contextlib.AbstractContextManager[None]:
    """As `seeded`; without a seed the ranks of a `row_group` go on from where the first one is."""
    device = next(model.parameters()).device
    if seed is None:
        generators: Any = torch.cuda if device.type == "cuda" else torch
        generators.set_rng_state(from_first(model, generators.get_rng_state()))
    return seeded(seed, device)


@torch.no_grad()
def drawn_by_forward(model: Any, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int | None) -> list[Tensor]:
    """As `draw`, with a whole forward pass for each token."""
    if sampling.beams > 1:
        raise ValueError(f"beams need a cache, and {type(model).__name__} fails with one or says otherwise than "
                         "without, by PEFT's virtual tokens, its positions or its padding: draw samples")  # fmt: skip
    if sampling.beams:
        check_search(model, by_forward=True)
    pad, ends = special_tokens(model)
    warpers = [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(float(sampling.top_p))]
    if sampling.top_k:
        warpers.insert(1, TopKLogitsWarper(sampling.top_k))
    drawn = sampling.keywords()["do_sample"]
    forced = beginning(model)[1] if model.config.is_encoder_decoder else None
    made = prompts[0].new_full((len(prompts), int(forced is not None)), forced or 0)
    stops, together = made.new_tensor(ends), is_partitioned(model)
    with evaluating(model):
        while made.shape[1] < sampling.max_new_tokens:
            rows, _ = rows_of(model, prompts, [*nn.functional.pad(made, (0, 1), value=pad)], pad)
            scores = rows.logits(rows.hidden.unflatten(0, (len(prompts), -1))[:, -1])[:, :vocabulary].float()
            for warper in warpers:
                scores = warper(made, scores)
            step = torch.multinomial(scores.softmax(1), 1) if drawn else scores.argmax(1, True)
            made = torch.cat((made, step.to(made.device)), 1)
            if not together and torch.isin(made, stops).any(1).all():  # else all ranks go on until the last has ended
                break
    return [_until_end(row, ends) for row in made]


def _until_end(row: Tensor, ends: list[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, device=row.device)).nonzero()
    return row[: int(stops[0]) + 1] if len(stops) else row
