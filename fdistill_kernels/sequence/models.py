"""Hugging Face models as the losses see them: the hidden states before the output embedding, and that embedding.

A model's forward runs on deferred logits, and the loss is computed in the output embedding, so N×V logits never exist.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..deferred import Deferral, Logits, active, hook, is_plain, output_embedding, watch
from ..divergences import Divergence
from ..functional import linear_cross_entropy, linear_f_divergence
from ..sparse import TopK
from ..values import Head, Hidden, RowFunction
from .ranks import rank

IGNORE = -100


class Rows(NamedTuple):
    """The steps of a batch's continuations that count, one after the other."""

    hidden: Tensor  # (M, D), what predicts the token
    tokens: Tensor  # (M,)
    head: Head | None  # None: it is not one floating matrix (LoRA's sum, quantised), and has only `logits`
    vocabulary: int
    logits: Callable[[Tensor], Tensor]  # of a few rows of hidden states


class TeacherRows(NamedTuple):
    """What a student's `Rows` are compared with, row by row: hidden states with their head, a list, or a function."""

    value: Hidden | TopK | RowFunction
    vocabulary: int


#: What to do about a model's damaged file.
ANEW = "get it anew, or, if a run made its folder, remove that, and the run's command makes it anew"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it has none; the message names the file, and what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): {remedy}")
    return found


def _opens(path: Path) -> bool:
    """Whether a file of weights or of a trainer's state can be opened; others can."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except Exception:  # safetensors has its own
            return False
    of_torch = path.suffix in (".pt", ".pth") or path.match("pytorch_model*.bin") or path.match("adapter_model.bin")
    if not of_torch or zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO  # as torch.save wrote before 1.6


@contextlib.contextmanager
def names_damage(folder: str | Path, remedy: str) -> Iterator[None]:
    """Whatever fails inside because a file of a folder is damaged is a ValueError with that file and what to do."""
    try:
        yield
    except ValueError:  # of what was asked for
        raise
    except Exception as error:  # each library has its own for it
        here = Path(folder)
        found = next((path for path in sorted(here.glob("*")) if path.is_file() and not _opens(path)), None)
        if found is None and (here.exists() or not isinstance(error, SafetensorError)):
            raise
        why = str(error).partition(". ")[0]  # torch's goes on about what to report
        raise ValueError(f"{found or folder} is damaged ({why}): {remedy}") from error


def base_of(path: str | Path) -> str | None:
    """The base model that an adapter's folder names; None: it is no folder of an adapter.

    Raises:
        ValueError: the adapter's configuration is damaged or names none.
    """
    adapter = Path(path) / "adapter_config.json"
    if not adapter.exists():
        return None
    base = read_json(adapter, ANEW).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} names no base_model_name_or_path")
    return str(base)


def load_config(path: str | Path, **options: Any) -> Any:
    """A model's configuration, or that of a PEFT adapter's base model. options: as in `load_model`."""
    base = base_of(path)
    try:
        return AutoConfig.from_pretrained(base or path, **options)
    except (OSError, ValueError) as error:
        if Path(base or path).exists():
            raise
        sought = f"{base} (the base model of {path})" if base else path
        words = str(error).splitlines()[0]
        raise ValueError(f"there is no folder {sought}, and the hub gives no such model: {words}") from error


def load_model(path: str | Path, split: int = 1, **options: Any) -> Any:
    """A causal or encoder–decoder model, depending on its configuration.

    Args:
        split: number of ranks that share each layer and the head (tensor parallelism, by the model's own plan); such
            groups share the rest by FSDP2.
        options: of `from_pretrained`.

    Raises:
        ValueError: there is no such model, a file of it is damaged, or weights are not in its files; or it has no plan,
            or the number of ranks is not a multiple of `split`.
    """
    with names_damage(base_of(path) or path, ANEW), names_damage(path, ANEW):
        return _load_model(path, split, **options)


def _load_model(path: str | Path, split: int, **options: Any) -> Any:
    config = load_config(path, **{k: options[k] for k in ("revision", "trust_remote_code") if k in options})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if base := base_of(path):
        from peft import PeftConfig, PeftModel

        if PeftConfig.from_pretrained(str(path)).is_prompt_learning:  # transformers puts no virtual tokens into a model
            return PeftModel.from_pretrained(_whole(kind, base, **options), str(path))
    if split == 1:
        return _whole(kind, path, **options)
    ranks = rank()[1]
    if ranks % split:
        raise ValueError(f"{ranks} ranks are no multiple of the {split} that share a layer")
    try:
        from transformers.distributed import DistributedConfig

        sizes = DistributedConfig(tp_size=split, fsdp_size=ranks // split)
    except (ImportError, TypeError) as error:
        raise ValueError("this version of transformers does not split models as it loads them") from error
    return kind.from_pretrained(path, distributed_config=sizes, **options)


def _whole(kind: Any, path: str | Path, **options: Any) -> Any:
    """A model all of whose trainable weights are in its files: transformers makes up others, such as a missing head."""
    model, told = kind.from_pretrained(path, output_loading_info=True, **options)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(trained & set(told["missing_keys"])):
        raise ValueError(f"{path} has no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} of "
                         f"{type(model).__name__}, which would be random")  # fmt: skip
    return model


def load_student(path: str | Path, split: int = 1, **options: Any) -> Any:
    """A model to be trained, as `load_model`; of an adapter's folder its base model, with the adapter to be trained on.

    Raises:
        ValueError: as `load_model`; or an adapter, whose weights are not split.
    """
    base = base_of(path)
    if base is None:
        return load_model(path, split, **options)
    if split > 1:
        raise ValueError(f"--tensor_parallel splits whole weights as they are loaded, and {path} is an adapter: merge "
                         "it into its base model first")  # fmt: skip
    from peft import PeftModel

    with names_damage(path, ANEW):
        return PeftModel.from_pretrained(load_model(base, **options), path, is_trainable=True)


def unpadded(ids: Tensor) -> list[Tensor]:
    """(B, L) padded with −100 on either side, as a list of rows.

    Raises:
        ValueError: a −100 inside a row, whose text is then unknown: give all ids, and `counted`.
    """
    here = nn.functional.pad(ids != IGNORE, (1, 0))
    if ((here[:, 1:] & ~here[:, :-1]).sum(1) > 1).any():
        raise ValueError("a row has −100 between its tokens: give the token ids, and beside them which of them count")
    return [row[row != IGNORE] for row in ids]


def padded(rows: Sequence[Tensor], value: int, side: str = "right") -> Tensor:
    """A list of rows as (B, longest), padded with a value on one side."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def masked(continuations: Sequence[Tensor], counted: Sequence[Tensor] | None) -> list[Tensor]:
    """Continuations with −100 in place of the tokens that do not count.

    Raises:
        ValueError: counted is not one bool for each token.
    """
    if counted is None:
        return list(continuations)
    if [(len(m), m.dtype) for m in counted] != [(len(c), torch.bool) for c in continuations]:
        raise ValueError("counted must have a bool for each token of each continuation")
    return [c.masked_fill(~m.to(c.device), IGNORE) for c, m in zip(continuations, counted, strict=True)]


def tokens_counted(continuations: Sequence[Tensor], counted: Sequence[Tensor] | None) -> list[int]:
    """The number of tokens of each continuation that count; counted: as in `teacher_forced`."""
    return [len(c) for c in continuations] if counted is None else [int(m.sum()) for m in counted]


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Puts models into evaluation mode, and afterwards back."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def token_id(model: Any, name: str) -> Any:
    """A special token, from a model's generation configuration or its configuration (CodeGen's lacks some)."""
    configs = (getattr(model, "generation_config", None), model.config)
    return next((found for config in configs if (found := getattr(config, name, None)) is not None), None)


def beginning(model: Any) -> tuple[int, int | None]:
    """What an encoder–decoder model's generation begins with: the decoder's start token, and a first token that is
    forced upon it, such as the language of mBART-50 and NLLB, or none.

    They are its generation configuration's: set decoder_start_token_id or forced_bos_token_id there for a language.

    Raises:
        ValueError: there is no start token, or several.
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

    Args:
        model: whose generation; of losses the student.
        continuations, counted: as in `teacher_forced`.
    """
    forced = beginning(model)[1] if model.config.is_encoder_decoder else None
    if forced is None:
        return counted
    free = [torch.cat((c[:1] != forced, torch.ones_like(c[1:], dtype=torch.bool))) for c in continuations]
    return free if counted is None else [m.to(f.device) & f for m, f in zip(counted, free, strict=True)]


def vocabulary_of(config: Any) -> int:
    """How many ids a model writes; that of Marian is not always the one it reads."""
    text = config.get_text_config()
    return int(getattr(text, "decoder_vocab_size", None) or text.vocab_size)


def ids_of(model: Any) -> int:
    """How many ids a model both reads and writes."""
    return min(ids_read(model), vocabulary_of(model.config))


def ids_read(model: Any) -> int:
    """How many ids a model reads, an encoder–decoder one in its prompt."""
    return int(getattr(model.get_input_embeddings(), "num_embeddings", vocabulary_of(model.config)))


def ids_of_tokenizer(tokenizer: Any) -> int:
    """One more than a tokenizer's largest id, which is more than its length where it leaves ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def context(of: Any) -> float:
    """The number of tokens that a model, or one of a configuration, can read beside its virtual tokens; or infinity."""
    config = getattr(of, "config", of)
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not found or found < 0:  # XLNet's is −1
        return float("inf")
    if getattr(config, "is_decoder", False) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # BERT and its kin
        if of is config:
            with torch.device("meta"):
                of = AutoModelForCausalLM.from_config(config)
        tables = [m for m in of.modules() if isinstance(m, nn.Embedding) and m is not of.get_input_embeddings()]
        # RoBERTa's positions begin behind its padding id
        found -= max((t.padding_idx + 1 for t in tables if t.num_embeddings == found and t.padding_idx), default=0)
    return found - virtual_tokens(of)


def check_context(model: Any, tokens: int) -> None:
    """Checks that a model has positions for so many tokens of a sequence; an encoder's prompt is its own sequence.

    Raises:
        ValueError: it has too few.
    """
    limit = context(model)
    if limit < tokens:
        raise ValueError(f"a prompt with its continuation has {tokens} tokens, the model's context {limit}")


def teacher_forced(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, pack: bool = False,
    counted: Sequence[Tensor] | None = None,
) -> Any:  # fmt: skip
    """A model's inputs for prompts and continuations, and the labels (B, L) that its hidden states predict.

    An encoder–decoder model reads the prompt and writes the continuation, which starts as its generation does. A causal
    model continues the prompt, and its state at a token predicts the next token. Positions of prompts and padding are
    −100. With `pack`, a causal model gets all sequences in one row, separated by their positions; otherwise they are
    padded on the right, where every model's own positions are correct.

    Args:
        counted: a bool for each token of each continuation. Tokens with False are read, but their label is −100. None:
            all count.

    Raises:
        ValueError: a sequence is longer than the model's context, or counted does not fit.
    """
    targets = masked(continuations, counted)
    if model.config.is_encoder_decoder:
        check_context(model, max(map(len, (*prompts, *continuations))))
        start, inputs = beginning(model)[0], padded(prompts, IGNORE)
        written = padded([torch.cat((c.new_full((1,), start), c[:-1])) for c in continuations], pad)
        labels = padded(targets, IGNORE)
        return {
            "input_ids": inputs.masked_fill(inputs == IGNORE, pad), "attention_mask": (inputs != IGNORE).long(),
            "decoder_input_ids": written,
        }, nn.functional.pad(labels, (0, written.shape[1] - labels.shape[1]), value=IGNORE)  # fmt: skip
    pairs = [torch.cat(pair) for pair in zip(prompts, continuations, strict=True)]
    check_context(model, max(map(len, pairs)))
    targets = [torch.cat((p.new_full((len(p) - 1,), IGNORE), t, p.new_full((1,), IGNORE)))
               for p, t in zip(prompts, targets, strict=True)]  # fmt: skip
    if pack:
        positions = torch.cat([torch.arange(len(pair)) for pair in pairs])
        return {"input_ids": torch.cat(pairs)[None], "position_ids": positions[None]}, torch.cat(targets)[None]
    inputs = padded(pairs, IGNORE)
    mask = (inputs != IGNORE).long()
    return {"input_ids": inputs.masked_fill(mask == 0, pad), "attention_mask": mask}, padded(targets, IGNORE)


def forward_to_head(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, call: Callable[[Rows], Tensor],
    *, wrapped: Any = None, pack: bool = False, counted: Sequence[Tensor] | None = None, **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """What `call` makes of a batch's rows in the output embedding's forward, and the model's own outputs.

    Of a mixture of experts whose configuration has output_router_logits, the outputs' loss is the model's auxiliary
    losses alone, times their coefficients, where gradients are enabled; else the outputs have no loss.

    The model's forward runs with deferred logits, so that what it does to them is in the rows' head, and `call` runs
    before the model's call ends: FSDP and ZeRO-3 have the embedding's weight whole there. The logits' place is taken by
    an empty tensor made from the result, so that what wraps the model finds in its output every parameter that a loss
    depends on.

    Args:
        model: a causal or encoder–decoder model.
        prompts, continuations, pad, pack, counted: as `teacher_forced`; `Rows` has what counts alone.
        call: a loss of `Rows`.
        wrapped: what is called in the model's place, such as its DistributedDataParallel.
        **more: of the model's forward.

    Raises:
        ValueError: no output embedding; the model does to its logits what is no scale, bias or soft-cap; its logits
            depend on later tokens or on padding; or it mixes packed sequences.
    """
    wrapped, model = model if wrapped is None else wrapped, getattr(model, "_orig_mod", model)  # torch.compile's
    inputs, labels = teacher_forced(model, prompts, continuations, pad, pack, counted)
    if torch.is_grad_enabled() and getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs |= dict(labels=labels, output_router_logits=True)  # its own loss is 0, and what it adds to it
    inputs = accepted(model, {**inputs, "use_cache": False})
    uncompiled = getattr(wrapped, "_orig_mod", wrapped)  # questions have shapes that no batch will have
    check_forward(model, uncompiled, pad, pack, labels.numel())
    device = next(model.parameters()).device
    head = output_embedding(model)
    watch(head)
    hook(model, _finish)
    with _ToRows(model, head, labels, call) as deferral:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        outputs = wrapped(**moved, **more)
    if isinstance(getattr(outputs, "loss", None), dict):
        outputs.loss = None  # it is all fields, where accelerate has made float32 of the outputs of transformers 4.50
    return deferral.made + outputs.logits.sum(), outputs  # the sum of nothing: FSDP waits for a gradient of the output


def virtual_tokens(model: Any) -> int:
    """The number of virtual tokens that PEFT's prompt learning puts before a model's input."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, without those that this model's forward does not take.

    Raises:
        ValueError: packed rows, but no positions.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(base).forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    left_out = {
        name for name in ("position_ids", "use_cache", "output_router_logits") if not takes_any and name not in known
    }
    beside = ""
    if virtual_tokens(model):  # PEFT counts positions itself, and warns of others
        left_out.add("position_ids")
        beside = " beside PEFT's virtual tokens"
    if left_out & inputs.keys() >= {"position_ids"}:
        raise ValueError(f"{type(base).__name__} takes no position_ids{beside}: its sequences cannot be packed")
    return {name: value for name, value in inputs.items() if name not in left_out}


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
    """Tests once whether a model's padded batches, or packed rows, give the same as their sequences alone.

    Raises:
        ValueError: they do not: the model looks at later tokens (as BERT does if it is not a decoder), so that its
            predictions know the answer; or at padding; or see `check_packing`.
    """
    if not asked(_steps_alone, model, wrapped, pad):
        raise ValueError(f"{type(model).__name__} looks at later tokens or at padding, so that its logits are no steps "
                         "of a generation (of BERT and its kin a decoder has is_decoder=True)")  # fmt: skip
    if pack:
        check_packing(model, wrapped, tokens)


NOT_PLAIN = "the student's output embedding is LoRA or quantised: leave it out, or train it as a whole"


def check_head(model: Any) -> None:
    """Raises ValueError for a student whose output embedding is not one plain weight."""
    if not is_plain(output_embedding(getattr(model, "_orig_mod", model))):
        raise ValueError(NOT_PLAIN)


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


def check_packing(model: Any, wrapped: Any, tokens: int) -> None:
    """Tests once whether a model separates packed sequences: many do not look where positions start again.

    Raises:
        ValueError: it does not, so that packed losses would be wrong; or it attends within chunks of the whole row.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if not asked(_keeps_apart, model, wrapped):
        raise ValueError(f"{name} mixes sequences that are packed in one row: leave out pack")
    chunk = getattr(config, "attention_chunk_size", None)  # Llama 4's chunks are of rows, not of sequences
    if chunk and tokens > chunk:
        raise ValueError(f"{name} attends within chunks of {chunk} tokens, which {tokens} packed ones would be cut by: "
                         "leave out pack")  # fmt: skip


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


class _ToRows(Deferral):
    """A forward pass of `model` that ends in what `call` makes of the rows with labels."""

    own_loss = False

    def __init__(self, model: Any, head: Any, labels: Tensor, call: Callable[[Rows], Tensor]):
        super().__init__(head, other_heads=True)
        self.model, self.labels, self.call = model, labels, call
        self.made: Any = None

    def finish(self, logits: Any) -> Tensor:
        """The result, as an empty tensor in the logits' place."""
        name = type(self.model).__name__
        if not isinstance(logits, Logits) or logits.made:
            reason = self.reason or "a forward that makes them elsewhere than in its output embedding"
            raise ValueError(f"{name}'s logits are not its output embedding's with a scale, a bias and a soft-cap, but "
                             f"go through {reason}: no loss is fused with that")  # fmt: skip
        labels, more = self.labels, logits.shape[-2] - self.labels.shape[-1]
        if more and more == virtual_tokens(self.model):  # they come first, and predict nothing that counts
            labels = nn.functional.pad(labels, (more, 0), value=IGNORE)
        if logits.shape[:-1] != labels.shape:
            of, to = tuple(logits.shape[:-1]), tuple(labels.shape)
            raise ValueError(f"{name} gives logits of {of} tokens for labels of {to}")
        counts = labels != IGNORE
        hidden, tokens = logits.hidden[counts.to(logits.hidden.device)], labels[counts].to(logits.hidden.device)

        def made(rows: Tensor) -> Tensor:
            return logits.of(rows).tensor()

        def with_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.call(Rows(hidden, tokens, logits.head(weight, bias), logits.vocabulary, made))

        if self.beside or is_plain(self.head):
            self.made = logits.of(hidden).at_head(with_head)
        else:
            self.made = self.call(Rows(hidden, tokens, None, logits.vocabulary, made))
        return self.made.flatten()[:0].reshape(*logits.shape[:-2], 0, 1).clone()  # FSDP warns of views


@torch.compiler.disable
def _finish(model: Any, args: Any, outputs: Any) -> Any:
    """A forward hook of models: ends `_ToRows`."""
    deferral = active()
    if not isinstance(deferral, _ToRows) or deferral.model is not model or deferral.made is not None:
        return None
    outputs.logits = deferral.finish(outputs.logits)
    return outputs


def rows_of(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], pad: int, **options: Any
) -> tuple[Rows, Any]:
    """The `Rows` of a batch, and the model's own outputs, as in `forward_to_head`. Gradients flow if enabled."""
    rows: list[Rows] = []

    def keep(found: Rows) -> Tensor:
        rows.append(found)
        return found.hidden[:0, 0]  # flatten of a DTensor without rows never ends

    _, outputs = forward_to_head(model, prompts, continuations, pad, keep, **options)
    return rows[0], outputs


def step_loss(
    student: Rows, teacher: Rows | TeacherRows | None, divergence: Divergence | None, temperature: float = 1.0,
    ce_weight: float = 0.0, reduction: str = "sum", **keywords: Any,
) -> Tensor:  # fmt: skip
    """The step-wise losses of a batch's rows: a divergence from the teacher, or, without one, the tokens' −log q."""
    head = student.head
    if head is None:
        raise ValueError(NOT_PLAIN)
    if divergence is None:
        return linear_cross_entropy(student.hidden, head, student.tokens, reduction=reduction, **keywords)
    assert teacher is not None
    if isinstance(teacher, Rows):
        teacher = of_model(teacher, student.hidden.device)
    shared, value = min(student.vocabulary, teacher.vocabulary), teacher.value
    if not isinstance(value, (Hidden, TopK)):
        value = _first(value, shared)
    elif isinstance(value, TopK):  # ids beyond are of a padded head, and their mass is the tail's
        value = value._replace(ids=torch.where(value.ids < shared, value.ids, -1))
    return linear_f_divergence(
        student.hidden, head, value, divergence=divergence, vocab_size=shared, labels=student.tokens,
        ce_weight=ce_weight, temperature=temperature, reduction=reduction, **keywords,
    )  # fmt: skip


def _first(logits: RowFunction, vocabulary: int) -> RowFunction:
    """The first entries of rows."""
    return lambda begin, end: logits(begin, end)[:, :vocabulary]


def of_model(rows: Rows, device: torch.device) -> TeacherRows:
    """A model's rows for a student on a device; as logits if the head is on another device or is not one matrix."""
    if rows.head is not None and rows.head.weight.device == device:
        return TeacherRows(Hidden(rows.hidden, rows.head.with_each(Tensor.detach)), rows.vocabulary)

    @torch.no_grad()
    def logits(begin: int, end: int) -> Tensor:
        return rows.logits(rows.hidden[begin:end]).to(device)

    return TeacherRows(logits, rows.vocabulary)
