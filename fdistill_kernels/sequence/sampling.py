"""Sequences drawn from a model; and the teacher's, which are drawn once and kept.

`TeacherSamples` is a folder: manifest.json, with the key of everything that decides the samples, and Parquet shards of
SHARD prompts each, which are complete or absent. A killed run continues with the first missing shard. A different key
is an error that shows both values.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..checks import check_integer, check_number
from ..teachers.files import write_whole
from ..teachers.packing import hash_tensor
from ..teachers.settings import check_same
from .models import (
    IGNORE,
    accepted,
    asked,
    beginning,
    check_context,
    close,
    evaluating,
    ids_of,
    padded,
    rows_of,
    teacher_forced,
    token_id,
    virtual_tokens,
    vocabulary_of,
)  # fmt: skip
from .ranks import from_first

SHARD = 256
#: What a model's own generation configuration decides of its samples.
TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
#: What a configuration says of where a model came from and how it is run, not of what it says.
ELSEWHERE = {"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures",
             "return_dict", "_attn_implementation_autoset", "attn_implementation"}  # fmt: skip
#: What it says that `draw` says otherwise, or that decides nothing.
SAID = {"pad_token_id", "use_cache", "max_length", "transformers_version"}
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


@dataclass(frozen=True)
class Sampling:
    """How sequences are drawn: ancestral sampling with temperature, top-k and top-p (off at 0 and 1), or a search.

    Attributes:
        beams: 0: draw; 1: greedy search; more: beam search. With a search the other settings have no effect.
        cache: transformers' `cache_implementation` for keys and values; "static" is compiled on a GPU. Tokens do not
            depend on it.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 0
    cache: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
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


def end_tokens(configured: int | list[int] | None) -> list[int]:
    """A configuration's eos_token_id, of which there may be none or several.

    Raises:
        ValueError: it is no id and no list of ids.
    """
    found = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(hasattr(token, "__index__") for token in found):
        raise ValueError(f"eos_token_id in a generation config must be an id or a list of ids, not {configured!r}")
    return found


def share_ends(student: Any, teachers: Sequence[Any], vocabulary: int) -> None:
    """Gives a student's generation config the end tokens of its teachers, as `Trainer` gives it the tokenizer's: what
    ends a sequence of one model and not of the other has no probability there. Warns of each that one of them lacks.
    """
    own = end_tokens(token_id(student, "eos_token_id"))
    of_each = [ends for teacher in teachers if (ends := end_tokens(token_id(teacher, "eos_token_id")))]
    if not own or getattr(student, "generation_config", None) is None:
        return
    if new := [i for i in dict.fromkeys(i for ends in of_each for i in ends) if i not in own and i < vocabulary]:
        student.generation_config.eos_token_id = [*own, *new]
        warnings.warn(f"the teacher's sequences also end at {new}: the student's generation config has now "
                      f"eos_token_id={[*own, *new]}, and its samples end there too", stacklevel=3)  # fmt: skip
    if beyond := sorted({i for ends in of_each for i in {*own, *new} - {*ends}}):
        warnings.warn(f"a teacher's samples go on after {beyond}, which end the student's: if they should end there, "
                      "add these to eos_token_id in the teacher's generation config", stacklevel=3)  # fmt: skip


def special_tokens(model: Any) -> tuple[int, list[int]]:
    """The padding token and the end tokens of a model that can generate; an end token pads where none of its ids does.

    Raises:
        ValueError: no end token is configured.
    """
    ends, pad = end_tokens(token_id(model, "eos_token_id")), token_id(model, "pad_token_id")
    if not ends:
        raise ValueError(
            f"{type(model).__name__} has no eos_token_id in its generation config: set one before sampling"
        )
    has = pad is not None and 0 <= pad < ids_of(model)  # Llama's own files have −1
    return (pad if has else ends[0]), ends


def check_search(model: Any, by_forward: bool = False) -> None:
    """Raises ValueError where a model's generation configuration has what greedy and beam search cannot follow here.

    by_forward: if its `generate` is not used, as PEFT's virtual tokens' never is.
    """
    own = getattr(model, "generation_config", None)
    unable = dict.fromkeys(NOT_HERE, 0) | (BY_GENERATE if by_forward or virtual_tokens(model) else {})
    if found := [name for name, none in unable.items() if (getattr(own, name, None) or none) != none]:
        whose = getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise ValueError(f"{whose} has {', '.join(found)} in its generation config, which greedy outputs and beams "
                         "cannot follow here: leave it out")  # fmt: skip


def _of_outputs(own: GenerationConfig) -> GenerationConfig:
    """A model's own generation configuration, for one output a prompt, by the search that is asked for."""
    made, plain = copy.copy(own), GenerationConfig()
    for name in FORM:
        setattr(made, name, getattr(plain, name, None))
    return made


@torch.no_grad()
def draw(
    model: Any, prompts: Sequence[Tensor], sampling: Sampling, seed: int | None = None, vocabulary: int | None = None
) -> list[Tensor]:
    """One continuation of each prompt, with its end token, by batched `generate` with a KV cache.

    If a model's `generate` fails or disagrees with its forward, which is tried once, `drawn_by_forward` is used: some
    models lose PEFT's virtual tokens in the cache, count positions from 0 although the model does not (RoBERTa), or
    look at padding (RWKV). The seed alone decides a batch's samples; without one they continue from torch's generator.
    Ids from `vocabulary` on, with which one model is padded more than the other, are not drawn.

    Raises:
        ValueError: prompt and new tokens exceed the model's context; a search that is not possible (`check_search`); or
            a named cache that cannot be used.
        FloatingPointError: the model's logits are not finite.
    """
    pad, ends = special_tokens(model)
    if sampling.beams:
        check_search(model)
    device, new = next(model.parameters()).device, sampling.max_new_tokens
    encoder_decoder, longest = model.config.is_encoder_decoder, max(map(len, prompts))
    check_context(model, max(longest, new) if encoder_decoder else longest + new)
    config = model.config.get_text_config()
    size, routers = vocabulary_of(config), getattr(config, "output_router_logits", None)
    beyond = {*range(size if vocabulary is None else vocabulary, size)}
    if sampling.beams:
        beyond |= {*(getattr(getattr(model, "generation_config", None), "suppress_tokens", None) or ())}
    owners = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}  # PEFT's is inside
    settings = dict(pad_token_id=pad, eos_token_id=ends, use_cache=True, suppress_tokens=sorted(beyond) or None,
                    cache_implementation=sampling.cache,
                    synced_gpus=isinstance(model, FSDPModule) or None)  # fmt: skip  # ranks wait for the last
    if encoder_decoder:
        settings |= dict(zip(("decoder_start_token_id", "forced_bos_token_id"), beginning(model), strict=True))
    try:
        for module, own in owners.items():  # samples are of p itself: no repetition penalty the model came with
            kept = {name: getattr(own, name, None) for name in TOKENS} if encoder_decoder else {}
            module.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=ends, **kept)
        if routers:  # the auxiliary loss of experts is of whole sequences, and fails of single steps
            config.output_router_logits = False
        with evaluating(model), _seeded(model, seed):
            itself = not virtual_tokens(model) and asked(
                _generates_itself, model, pad, settings, of=(sampling.cache, settings.get("decoder_start_token_id"))
            )
            for module, own in owners.items() if sampling.beams else ():
                if own is not None:  # before transformers 4.5x all of a model's parts have one, most of them None
                    module.generation_config = _of_outputs(own)
            if not itself:
                if sampling.cache:
                    raise ValueError(f"cache_implementation={sampling.cache!r} is not used: {type(model).__name__} is "
                                     "drawn from by its forward, without a cache")  # fmt: skip
                return drawn_by_forward(model, prompts, sampling, vocabulary)
            made = model.generate(**_left_padded(model, prompts, pad, device), **settings, **sampling.keywords())
    except RuntimeError as error:  # of torch.multinomial
        if "probability tensor" not in str(error):
            raise
        raise FloatingPointError(f"{type(model).__name__} has logits that are not finite: it draws nothing") from error
    finally:
        for module, own in owners.items():
            module.generation_config = own
        if routers:
            config.output_router_logits = routers
    return [_until_end(row, ends) for row in made[:, 1 if encoder_decoder else longest :]]


def _left_padded(model: Any, prompts: Sequence[Tensor], pad: int, device: torch.device) -> dict[str, Tensor]:
    """What `generate` is given: causal models go on from the right."""
    inputs = padded(prompts, IGNORE, "right" if model.config.is_encoder_decoder else "left").to(device)
    return dict(input_ids=inputs.masked_fill(inputs == IGNORE, pad), attention_mask=(inputs != IGNORE).long())


def _generates_itself(model: Any, pad: int, settings: dict[str, Any]) -> bool:
    """Whether two steps of `generate`, of a padded prompt, have the logits of a teacher-forced forward without padding.

    In half precision the two may differ by its rounding; whatever begins otherwise differs by far more.
    """
    device, size = next(model.parameters()).device, ids_of(model)
    short, long = torch.linspace(size // 4, 3 * size // 4, 6, device=device).long().split((2, 4))
    try:
        made = model.generate(
            **_left_padded(model, [short, long], pad, device), **settings, do_sample=False, num_beams=1,
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


@contextlib.contextmanager
def _seeded(model: Any, seed: int | None) -> Iterator[None]:
    """The seed alone decides, and torch's generators stay where they were; no seed: they go on, on the ranks of a
    `row_group` from where the first one's is.
    """
    device = next(model.parameters()).device
    generators: Any = torch.cuda if device.type == "cuda" else torch
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        else:
            generators.set_rng_state(from_first(model, generators.get_rng_state()))
        yield


@torch.no_grad()
def drawn_by_forward(model: Any, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int | None) -> list[Tensor]:
    """As `draw`, with a whole forward pass for each token.

    Raises:
        ValueError: more than one beam, or a search that is not possible (`check_search`).
    """
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
    stops, sharded = made.new_tensor(ends), isinstance(model, FSDPModule)
    with evaluating(model):
        while made.shape[1] < sampling.max_new_tokens:
            rows, _ = rows_of(model, prompts, [*nn.functional.pad(made, (0, 1), value=pad)], pad)
            scores = rows.logits(rows.hidden.unflatten(0, (len(prompts), -1))[:, -1])[:, :vocabulary].float()
            for warper in warpers:
                scores = warper(made, scores)
            step = torch.multinomial(scores.softmax(1), 1) if drawn else scores.argmax(1, True)
            made = torch.cat((made, step.to(made.device)), 1)
            if not sharded and torch.isin(made, stops).any(1).all():  # else all ranks go on until the last has ended
                break
    return [_until_end(row, ends) for row in made]


def _until_end(row: Tensor, ends: list[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, device=row.device)).nonzero()
    return row[: int(stops[0]) + 1] if len(stops) else row


def fingerprint(model: Any) -> str:
    """Sixteen hex digits of a model's configuration and weights (names, dtypes, shapes and all bytes), on any device.

    Meta tensors have no bytes. Sharded tensors are gathered, so all ranks must call this.
    """
    known = {k: v for k, v in model.config.to_dict().items() if k not in ELSEWHERE and not k.startswith("output_")}
    configuration = json.dumps(known, sort_keys=True, default=str).encode()
    state = model.state_dict()
    digest = xxhash.xxh3_128(configuration)
    for name in sorted(state):
        parts = (
            state[name] if isinstance(state[name], tuple) else (state[name],)
        )  # a quantised module's weight and bias
        for tensor in (part for part in parts if isinstance(part, Tensor)):
            hash_tensor(digest, name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return str(digest.hexdigest()[:16])


def data_hash(prompts: Sequence[Sequence[int]]) -> str:
    """Sixteen hex digits of the prompts' ids."""
    return hashlib.sha256(json.dumps([list(map(int, p)) for p in prompts]).encode()).hexdigest()[:16]


def generation_settings(model: Any, sampling: Sampling) -> dict[str, Any]:
    """What a model's own generation configuration decides of `draw`'s sequences, where it is not the default, in JSON.

    Of beams that is all that neither `Sampling` nor `draw` says; of samples `TOKENS` and the end tokens alone.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    said = {*Sampling().keywords(), *Sampling(beams=2).keywords(), *FORM} | SAID
    found = {k: v for k, v in own.to_diff_dict().items()
             if k not in said and not k.startswith(("_", "output_")) and v is not None}  # fmt: skip
    if not sampling.beams:
        found = {k: v for k, v in found.items() if k in (*TOKENS, "eos_token_id")}
    return dict(json.loads(json.dumps(found, sort_keys=True, default=str)))


class TeacherSamples:
    """Continuations of prompts, kept in a folder."""

    def __init__(
        self, folder: str | Path, prompts: Sequence[Sequence[int]], sampling: Sampling, teacher: str, seed: int,
        settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        """Opens the folder or makes it; settings: the teacher's `generation_settings`."""
        if not len(prompts):
            raise ValueError("there are no prompts to sample for")
        self.folder, self.prompts, self.sampling, self.seed = Path(folder), prompts, sampling, seed
        self.key = {"teacher": teacher, "data": data_hash(prompts), "prompts": len(prompts), "seed": seed,
                    **sampling.decided(), **(settings or {})}  # fmt: skip
        self._check_key()

    @classmethod
    def kept(cls, folder: Path, prompts: Sequence[Sequence[int]], job: dict[str, Any]) -> TeacherSamples:
        """Those that a teacher drew who is not there any more, whatever the sampling was.

        Args:
            job: of the store's, for a hint.

        Raises:
            ValueError: there are none for these prompts.
        """
        try:
            known = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            shown = ", ".join(f"{n} {job.get(n)}" for n in ("data", "limit", "eval_data", "eval_pairs") if n in job)
            raise ValueError(
                f"{folder.parent} holds no samples of the teacher for these prompts ({error}); it was built of {shown}"
            ) from error
        sampling = Sampling(**{name: known[name] for name in Sampling().decided()})
        decided = {"data", "prompts", "seed", "teacher", *sampling.decided()}
        return cls(folder, prompts, sampling, known["teacher"], known["seed"],
                   {k: v for k, v in known.items() if k not in decided})  # fmt: skip

    def _check_key(self) -> None:
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(manifest, json.dumps(self.key, indent=1).encode())
            return
        try:
            known = json.loads(manifest.read_text())
        except ValueError as error:
            raise ValueError(f"{manifest} is damaged ({error}); remove {self.folder} to sample anew") from error
        check_same(f"the samples in {self.folder} were drawn otherwise", known, self.key)

    def shards(self) -> list[Path]:
        """The paths of all shards, whether they exist or not."""
        return [self.folder / f"shard-{i:05d}.parquet" for i in range(-(-len(self.prompts) // SHARD))]

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        return [i for i, shard in enumerate(self.shards()) if not shard.exists()]

    def fill(
        self, source: Any, rank: int = 0, ranks: int = 1, *, batch: int = 32, vocabulary: int | None = None
    ) -> Iterator[int]:
        """Draws what is missing from a model or an `Endpoint`; yields the number of finished prompts after each batch.

        With several ranks, each draws its share of the shards. vocabulary: as in `draw`.
        """
        import pyarrow

        ask = source.draw if hasattr(source, "draw") else functools.partial(draw, source)
        for number in [n for n in self.missing() if n % ranks == rank]:
            made: list[list[int]] = []
            done = sum(len(self._range(i)) for i, shard in enumerate(self.shards()) if shard.exists())
            indices = self._range(number)
            for begin in range(0, len(indices), batch):
                some = indices[begin : begin + batch]
                prompts = [torch.as_tensor(self.prompts[i]) for i in some]
                seed = self.seed * 1_000_003 + some[0]
                made += [row.tolist() for row in ask(prompts, self.sampling, seed, vocabulary)]
                done += len(some)
                yield done
            write_table(pyarrow.table({"index": list(indices), "sample_ids": made}), self.shards()[number])

    def _range(self, number: int) -> range:
        return range(number * SHARD, min((number + 1) * SHARD, len(self.prompts)))

    def load(self) -> list[list[int]]:
        """All continuations, in the order of the prompts.

        Raises:
            ValueError: some are still missing.
        """
        import pyarrow
        import pyarrow.parquet

        if self.missing():
            raise ValueError(
                f"{len(self.missing())} of {len(self.shards())} shards in {self.folder} are missing: sample them first"
            )
        rows = pyarrow.concat_tables([pyarrow.parquet.read_table(s) for s in self.shards()])
        if rows["index"].to_pylist() != list(range(len(self.prompts))):
            raise ValueError(f"the shards in {self.folder} do not hold each prompt once; remove it to sample anew")
        return rows["sample_ids"].to_pylist()


def write_table(table: Any, path: str | Path) -> None:
    """Writes a `pyarrow.Table` as a Parquet file, completely or not at all."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    write_whole(Path(path), sink.getvalue().to_pybytes())
