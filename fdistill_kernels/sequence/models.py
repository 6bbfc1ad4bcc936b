"""What a Hugging Face model can read and write: its vocabulary, context, virtual tokens, and its forward's inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from .loading import whole_on_each_rank

#: What models keep of an evaluation or of a short batch: NLLB-MoE's routers its number of tokens, beyond which they
#: leave out what a training batch has; RWKV weights that are scaled, also in its files; BigBird full attention.
TRACES = ("expert_capacity", "layers_are_rescaled", "attention_type")


@contextlib.contextmanager
def as_found(*models: Any) -> Iterator[None]:
    """Takes back afterwards what is in `TRACES`."""
    found = [(module, name, vars(module)[name]) for model in models for module in model.modules() for name in TRACES
             if name in vars(module)]  # fmt: skip
    try:
        yield
    finally:
        for module, name, value in found:
            if name == "expert_capacity":
                module.expert_capacity = value
            elif name == "layers_are_rescaled":
                module.training, was = not value, module.training  # which says what they are to be
                module._rescale_layers()
                module.training = was
            elif hasattr(module, "set_attention_type"):
                module.set_attention_type(value)


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Puts models into evaluation mode, and afterwards back."""
    training = [model.training for model in models]
    try:
        with as_found(*models):
            for model in models:
                model.eval()
            yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def at_model(model: Any, rows: Iterable[Tensor]) -> list[Tensor]:
    """Rows on the device of a model's first weights."""
    device = next(model.parameters()).device
    return [row.to(device) for row in rows]


def vocabulary_of(config: Any) -> int:
    """How many ids a model writes; that of Marian is not always the one it reads."""
    text = config.get_text_config()
    return int(getattr(text, "decoder_vocab_size", None) or text.vocab_size)


def ids_of_config(config: Any) -> int:
    """How many ids a model of a configuration writes, or, of an encoder–decoder, reads."""
    return max(vocabulary_of(config), int(config.get_text_config().vocab_size) if config.is_encoder_decoder else 0)


def ids_of(model: Any) -> int:
    """How many ids a model both reads and writes."""
    return min(ids_read(model), vocabulary_of(model.config))


def ids_read(model: Any) -> int:
    """How many ids a model reads, an encoder–decoder one in its prompt."""
    return int(getattr(model.get_input_embeddings(), "num_embeddings", vocabulary_of(model.config)))


def context(of: Any, target: bool = False) -> float:
    """How many tokens a model, or one of a configuration, reads in its prompt or target, beside virtual ones; or ∞."""
    config = getattr(of, "config", of)
    # LED's two, and MPT's
    names = ("max_position_embeddings", f"max_{'decoder' if target else 'encoder'}_position_embeddings", "max_seq_len")
    text = config.get_text_config()
    found = next((n for n in (getattr(text, name, None) for name in names) if n), None)
    if not found or found < 0:  # XLNet's is −1
        return float("inf")
    if getattr(config, "is_decoder", False) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # BERT and its kin
        if of is config:
            with whole_on_each_rank(), torch.device("meta"):
                of = AutoModelForCausalLM.from_config(config)
        tables = [m for m in of.modules() if isinstance(m, nn.Embedding) and m is not of.get_input_embeddings()]
        # RoBERTa's positions begin behind its padding id
        found -= max((t.padding_idx + 1 for t in tables if t.num_embeddings == found and t.padding_idx), default=0)
    return found - virtual_tokens(of)


def check_context(model: Any, prompt: int, more: int) -> None:
    """Raises ValueError where a model lacks positions for so many tokens; an encoder's prompt is its own sequence."""
    apart = model.config.is_encoder_decoder
    for tokens, target in ((prompt, False), (more, True)) if apart else ((prompt + more, False),):
        if (limit := context(model, target)) < tokens:
            raise ValueError(f"a prompt with its continuation has {tokens} tokens, the model's context {limit}")


def virtual_tokens(model: Any) -> int:
    """The number of virtual tokens that PEFT's prompt learning puts before a model's input."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def adapters_kept(model: Any) -> dict[str, str]:
    """The adapters that a model's files have, each with its folder among them; none: the files have whole weights."""
    if getattr(model, "_hf_peft_config_loaded", False):  # by add_adapter: no PeftModel
        active = model.active_adapters()
        if len(active) > 1:
            raise ValueError(f"{type(model).__name__} has the active adapters {', '.join(active)} by add_adapter, and "
                             "transformers keeps one: give get_peft_model's model, or set_adapter one")  # fmt: skip
        return {active[0]: ""}
    known = {} if isinstance(model, PreTrainedModel) else getattr(model, "peft_config", None) or {}
    return {name: "" if name == "default" else name for name in known}


def inputs_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's forward, of a PEFT model that of its base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(base).forward).parameters


def check_reads(model: Any) -> None:
    """Raises ValueError for a model that reads sound or pictures, alone or beside its text."""
    known, main = inputs_of(model), getattr(model, "main_input_name", "input_ids")
    needed = [name for name, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [main] if "input_ids" not in known and main != "input_ids" else []
    given = {"self", "input_ids", "attention_mask", "decoder_input_ids"}
    if more := more + [name for name in needed if name not in given]:
        raise ValueError(f"{type(model).__name__} reads {' and '.join(more)}, and rows here are of token ids alone")


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, without those that this model's forward does not take; packed rows need positions."""
    known = inputs_of(model)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    left_out = {
        name for name in ("position_ids", "use_cache", "output_router_logits") if not takes_any and name not in known
    }
    beside = ""
    if virtual_tokens(model):  # PEFT counts positions itself, and warns of others
        left_out.add("position_ids")
        beside = " beside PEFT's virtual tokens"
    if left_out & inputs.keys() >= {"position_ids"}:
        raise ValueError(f"{type(model).__name__} takes no position_ids{beside}: its sequences cannot be packed")
    return {name: value for name, value in inputs.items() if name not in left_out}
