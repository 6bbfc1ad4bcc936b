"""Readers of the teacher outputs that other tools have stored, as (prompt (P,), continuation (L,), `TopK` (L, K)).

Row i of a sequence is the distribution that predicts continuation[i]. A row that does not fit is refused with its file
and line. Nothing is repaired except what a format defines: −9999 is vLLM's −∞, Megatron-LM's sentinels are padding, and
DistillKit's fitted rows have a mass of 1 at most.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import operator
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.sparse import MOST_MASS
from ..checks import check_flag, check_integer
from ..sparse import TopK

Scored = tuple[Tensor, Tensor, TopK]
PromptLength = int | str | Callable[[dict[str, Any]], int]
#: What vLLM writes for −∞, which JSON has no number for.
MINUS_INFINITY = -9999.0
#: How far a log-probability x that a reply has twice may differ from itself, as a share of 1 + |x|; bfloat16's is 2⁻⁹.
ROUNDING = 0.01


class Misfit(ValueError):
    """A reply or row that cannot be the teacher's at the tokens it is given for."""


class Lists(NamedTuple):
    """Which ids of a position are kept, as `Endpoint` has it."""

    k: int
    vocabulary: int
    short_rows: bool = False
    padded: bool = False


def checked(ids: Any, log_probs: Any, vocabulary: int, positions: int) -> TopK:
    """(L, K) ids, −1 where padded, and log-probabilities, as a `TopK`. Those of tensors and arrays of 16 bits stay so,
    by which a loss knows how they were rounded; all others become float32.
    """
    check_integer("vocabulary", vocabulary, 1)
    try:
        ids, given = torch.as_tensor(ids), torch.as_tensor(log_probs)
    except RuntimeError as error:  # of None; of anything else it is what `form` expects
        raise Misfit(f"ids or log-probabilities that are no numbers: {error}") from error
    log_probs, kept = given.float(), given.dtype if given.is_floating_point() and given.itemsize == 2 else torch.float32
    if ids.shape != log_probs.shape or ids.ndim != 2 or len(ids) != positions or not ids.shape[1]:
        of = f"{tuple(ids.shape)} and log_probs {tuple(log_probs.shape)}"
        raise Misfit(f"ids {of} are not ({positions}, K) for {positions} tokens")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise Misfit(f"the ids are {ids.dtype}")
    ids = ids.long()
    real = ids >= 0
    log_probs = log_probs.masked_fill(~real | (log_probs <= MINUS_INFINITY), -torch.inf)
    ordered = ids.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    for bad, what in (
        (((ids >= vocabulary) | (ids < -1)).any(1), f"an id outside [0, {vocabulary})"),
        (~real.any(1), "no ids"), (repeated.any(1), "an id twice"), (log_probs.isnan().any(1), "NaN"),
        ((log_probs > 1e-4).any(1), "a positive log-probability (logits, or logprobs_mode raw_logits?)"),
        (log_probs.exp().sum(1) > MOST_MASS, "a probability mass above 1 (not log-probabilities over the vocabulary?)"),
    ):  # fmt: skip
        if bad.any():
            raise Misfit(f"position {int(bad.nonzero()[0])} of the continuation has {what}")
    return TopK(ids, log_probs.clamp_max(0).to(kept))


def largest(rows: Sequence[dict[int, float]], lists: Lists) -> TopK:
    """The k largest of each position's log-probabilities by id.
    A row must have min(k, vocabulary) ids, unless `short_rows` allows fewer: −1 pads it then. It pads a row, too, that
    has ids outside the vocabulary where `padded` leaves those out.
    """
    vocabulary, k = lists.vocabulary, min(lists.k, lists.vocabulary)
    for position, row in enumerate(rows):
        if len(row) < k and not lists.short_rows:
            raise Misfit(f"position {position} of the continuation has {len(row)} ids of the {k} asked for: "
                         f"start the server with --max-logprobs {k} or more, or allow short_rows")  # fmt: skip
        if any(i < 0 or (i >= vocabulary and not lists.padded) for i in row):
            raise Misfit(f"position {position} of the continuation has an id outside [0, {vocabulary}): where the "
                         "teacher has more rows than tokens, padded=True leaves those out")  # fmt: skip
    rows = [{i: p for i, p in row.items() if i < vocabulary} for row in rows]
    ids, log_probs = (_rectangle([list(part) for part in parts], fill, k)
                      for parts, fill in ((rows, -1), ([row.values() for row in rows], -torch.inf)))  # fmt: skip
    whole = checked(ids, log_probs, vocabulary, len(rows))  # before any is left out: NaN has no order
    order = whole.log_probs.topk(k).indices
    return TopK(whole.ids.gather(1, order), whole.log_probs.gather(1, order))


def vllm_rows(choice: dict[str, Any], ids: list[int], begin: int, lists: Lists) -> TopK:
    """A vLLM choice's `prompt_logprobs` from token `begin` ≥ 1 on: null, then {id: {"logprob": …, "rank": …}} of each.
    vLLM lists the token itself, too, if it is not one of the k largest: its rank is then above k.
    """
    with form("prompt_logprobs of another form than vLLM's"):
        read, found, rows = choice.get("prompt_token_ids"), choice["prompt_logprobs"], []
        if read is not None and read != ids:
            raise Misfit(f"the server read {len(read)} token ids that are not the {len(ids)} sent")
        if len(found) != len(ids):
            raise Misfit(f"{len(found)} positions for {len(ids)} tokens")
        for row, token in zip(found[begin:], ids[begin:], strict=True):
            if str(token) not in row:
                raise Misfit(f"a position does not have its next token {token}")
            listed = {i: e if isinstance(e, dict) else {"logprob": e} for i, e in row.items()}
            if not lists.short_rows and (listed[str(token)].get("rank") or 0) > min(lists.k, lists.vocabulary):
                del listed[str(token)]  # it would hide that one of the k is missing
            rows.append({int(i): e["logprob"] for i, e in listed.items()})
        return largest(rows, lists)


def sglang_rows(meta: dict[str, Any], ids: list[int], begin: int, lists: Lists) -> TopK:
    """SGLang's `input_top_logprobs` and `input_token_logprobs` of a reply's meta_info: [log-prob, id, text] each.
    They begin with the token before `begin`, or with the first token, and end with the last. The first entry has no
    log-probability. The two must not contradict each other at a token.
    """
    count, last = len(ids) - begin, lists.vocabulary - 1
    with form("a reply of another form than SGLang's"):
        if meta.get("prompt_tokens", len(ids)) != len(ids):
            raise Misfit(f"the server read {meta['prompt_tokens']} tokens of the {len(ids)} sent")
        own, top = meta["input_token_logprobs"], meta["input_top_logprobs"]
        if len(own) != len(top) or len(own) not in (count + 1, len(ids)):
            raise Misfit(f"{len(own)} and {len(top)} positions for {count} tokens and the one before")
        rows = [{i: p for p, i, *_ in row} for row in top[-count:]]
        if any(len(row) != len(listed) for row, listed in zip(rows, top[-count:], strict=True)):
            raise Misfit("a position has an id twice")
        # in place of the last id SGLang says 0
        if any(i != token and (i or token < last) for (_, i, *_), token in zip(own, ids[-len(own) :], strict=True)):
            raise Misfit("the server read other token ids than were sent")
        for position, (row, (p, *_), token) in enumerate(zip(rows, own[-count:], ids[begin:], strict=True)):
            _check_beside(row, p, token, position)
            if lists.short_rows or len(row) >= min(lists.k, lists.vocabulary):  # else it would hide that one is missing
                row.setdefault(token, p)
        return largest(rows, lists)


def _check_beside(row: dict[int, float], own: float, token: int, position: int) -> None:
    """Raises Misfit where a position's list is not the one that a token's own log-probability is from."""
    slack = ROUNDING * (1 + abs(own))
    if abs(row.get(token, own) - own) > slack or (token not in row and own > min(row.values(), default=own) + slack):
        of_list = f"is {row[token]:.6g} in" if token in row else "is missing in"
        raise Misfit(f"position {position} of the continuation contradicts itself: its token {token}, of "
                     f"log-probability {own:.6g}, {of_list} a list down to {min(row.values()):.6g}")  # fmt: skip


def pour(reader: Iterable[Scored], store: Any) -> int:
    """Writes what a `TeacherStore` does not have yet, each sequence once; returns how many were written."""
    with store.writer() as writer:
        return sum(writer.add(prompt, continuation, rows) for prompt, continuation, rows in reader)


def vllm_replies(path: str | Path, *, prompt_length: PromptLength = 1, **how: Any) -> Iterator[Scored]:
    """JSON lines of vLLM's, each a completion of one or more prompts, a chat's, a choice, an output with
    prompt_token_ids, or one of these in a line of `vllm run-batch`.

    Args:
        path: the file. k: how many ids to keep; vocabulary: of the teacher; short_rows, padded: as `Endpoint` has them.
        prompt_length: how many tokens are the prompt, the name of the line's field that says so, or a function of the
            line (a dict), as of its "custom_id"; where a line is a list of replies, of each.

    Raises:
        Misfit: with the file and the line that does not fit.
    """
    return _lines(Path(path), _of_vllm, vllm_rows, prompt_length, Lists(**how))


def sglang_replies(path: str | Path, *, prompt_length: PromptLength = 1, **how: Any) -> Iterator[Scored]:
    """JSON lines of SGLang's /generate, a reply or those to several prompts each, made with logprob_start_len 0 unless
    a reply has input_ids, or prompt_token_ids (by return_prompt_token_ids), too. Without these the vocabulary's last
    id, for which SGLang says 0, is read so.

    Args, Raises: as in `vllm_replies`.
    """
    return _lines(Path(path), _of_sglang, sglang_rows, prompt_length, Lists(**how))


def _lines(path: Path, parts: Any, rows: Any, prompt_length: PromptLength, lists: Lists) -> Iterator[Scored]:
    if isinstance(prompt_length, str):
        prompt_length = operator.itemgetter(prompt_length)
    for name in ("k", "vocabulary"):
        check_integer(name, getattr(lists, name), 1)
    for name in ("short_rows", "padded"):
        check_flag(name, getattr(lists, name))
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with _at(f"{path}:{number}"):
                    found = json.loads(line)
                    for reply in found if isinstance(found, list) else [found]:  # to a request of several prompts
                        begin = prompt_length(reply) if callable(prompt_length) else prompt_length
                        for ids, part in parts(reply):
                            yield *_split(ids, begin), rows(part, ids, begin, lists)


def _of_vllm(found: dict[str, Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    if "response" in found:  # of a batch's file
        if not (body := (found["response"] or {}).get("body")):
            raise Misfit(f"the request {found.get('custom_id')!r} failed: {found.get('error')}")
        found = body
    whole = "prompt_logprobs" in found  # a chat, whose choices have one prompt, or an output
    if not (parts := [found] if whole else found.get("choices", [found])):
        raise Misfit("it has no choices")
    for part in parts:
        if part.get("prompt_token_ids") is None:
            raise Misfit(_failure(found) or "it has no prompt_token_ids, for which a request says return_token_ids")
        yield part["prompt_token_ids"], part


def _of_sglang(found: dict[str, Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    if (meta := found.get("meta_info")) is None:
        raise Misfit(_failure(found) or "it has no meta_info")
    sent = found.get("input_ids") or found.get("prompt_token_ids")
    yield sent or [entry[1] for entry in meta["input_token_logprobs"]], meta


def _failure(found: dict[str, Any]) -> str | None:
    """What a server says in the place of a reply."""
    told = found.get("error") or (found.get("message") if found.get("object") == "error" else None)
    return f"the request failed: {told}" if told else None


def columns(
    rows: Iterable[dict[str, Any]], *, vocabulary: int, prompt: str = "prompt", continuation: str = "continuation",
    ids: str = "ids", log_probs: str = "log_probs", name: str = "row",
) -> Iterator[Scored]:  # fmt: skip
    """Rows of a dataset, or any dicts: columns of token ids, and of lists of ids and log-probabilities by position. A
    Misfit has `name` and the number of the row that does not fit.
    """
    for number, row in enumerate(rows):
        with _at(f"{name} {number}"):
            for place, (a, b) in enumerate(zip(row[ids], row[log_probs], strict=False)):  # `checked` compares the rest
                if len(a) != len(b):
                    raise Misfit(f"position {place} has {len(a)} ids and {len(b)} log-probabilities")
            listed, values = (_rectangle(row[column], fill) for column, fill in ((ids, -1), (log_probs, -torch.inf)))
            sequence = [operator.index(i) for name in (prompt, continuation) for i in row[name]]
            split = _split(sequence, len(row[prompt]))
            yield *split, checked(listed, values, vocabulary, len(split[1]))


def distillkit(folder: str | Path, *, prompt_length: int = 1, vocabulary: int | None = None) -> Iterator[Scored]:
    """DistillKit's compressed log-probabilities: data_*.parquet beside compression_config.yaml.

    A position's bytes are exact_k log-probabilities, the coefficients of a polynomial in the rank, and bins of
    residuals, a scale and bit-packed integers each; all may be differences to the rank before. Row i predicts token
    i + 1. Where the polynomial overshoots, so that a row's mass is above 1, the row is divided by it, as by DistillKit.

    Args:
        folder: what sample_logits_vllm wrote. prompt_length: how many tokens of each are the prompt.
        vocabulary: where it is less than the configuration's d.

    Raises:
        Misfit: with the file and the row that does not fit, also one of the older format, which kept logits.
    """
    import yaml

    folder = Path(folder)
    written = folder / "compression_config.yaml"
    text = written.read_text()
    with _at(str(written)):
        config = yaml.safe_load(text)
        bits = int(torch.tensor(config["d"], dtype=torch.float32).log2().ceil())  # as it is written, rounding included
    paths = sorted(folder.glob("data_*.parquet"), key=lambda p: (len(p.name), p.name))
    if not paths:
        raise FileNotFoundError(f"{folder} has no data_*.parquet")
    for path in paths:
        for number, row in enumerate(_parquet_rows(path)):
            with _at(f"{path} row {number}"):
                if "packed_indices" in row:
                    raise Misfit("the older format keeps logits, not log-probabilities")
                packed, coded = (torch.tensor(row[n], dtype=torch.uint8)[prompt_length - 1 :]
                                 for n in ("bytepacked_indices", "compressed_logprobs"))  # fmt: skip
                ids, values = _unpacked(packed, bits, config["k"]), _decompressed(coded, config)
                split = _split(row["input_ids"], prompt_length)
                yield *split, checked(ids, values, vocabulary or config["d"], len(split[1]))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with _at(str(path)):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """(L, count) integers of `bits` bits each, the most significant first, of bytes (L, ⌈count·bits/8⌉)."""
    if packed.ndim != 2 or packed.shape[1] != -(-count * bits // 8):
        raise Misfit(f"bytes {tuple(packed.shape)} for {count} numbers of {bits} bits at each position")
    stream = (packed[..., None] >> torch.arange(7, -1, -1)) & 1
    numbers = stream.flatten(1)[:, : count * bits].unflatten(1, (count, bits)).long()
    return (numbers << torch.arange(bits - 1, -1, -1)).sum(2)


def _decompressed(packed: Tensor, config: dict[str, Any]) -> Tensor:
    """(L, k) log-probabilities of a configuration's bytes (L, B): float32 where it keeps them all so, else float16, by
    which a loss knows that they are rounded. Rows that a fit has brought above a mass of 1 are brought back to it.
    """
    at = 0

    def take(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nonlocal at
        at += count * dtype.itemsize
        if packed.ndim != 2 or packed.shape[1] < at:
            raise Misfit(f"bytes {tuple(packed.shape)}: the configuration has more at each position")
        taken = packed[:, at - count * dtype.itemsize : at]
        return taken.clone().reshape(-1).view(dtype).view(len(packed), count)  # cloned: bytes need not be aligned

    exact, term = (getattr(torch, config.get(name, "float32")) for name in ("exact_dtype", "term_dtype"))
    first = take(config["exact_k"], exact).float()
    terms, rest = config.get("polynomial_terms") or [], config["k"] - config["exact_k"]
    fit = torch.zeros(len(packed), rest)
    if terms:
        ranks = torch.linspace(0, 1, rest, dtype=term) if config.get("normalize_t") else torch.arange(rest, dtype=term)
        powers = torch.stack([ranks**t if isinstance(t, int) else getattr(torch, t)(ranks) for t in terms], 1)
        fit = (powers * take(len(terms), term)[:, None]).sum(2).float()
    begin = 0
    for part in config["residual_bins"]:
        scale, wide, count = getattr(torch, part["scale_dtype"]), part["element_bits"], part["num_elements"]
        factor = take(1, scale).float()
        numbers = _unpacked(take(-(-count * wide // 8)), wide, count)
        numbers = 2 * numbers - 1 if wide == 1 else numbers - 2 ** (wide - 1)
        fit[:, begin : begin + count] += numbers * factor
        begin += count
    if at != packed.shape[1]:
        raise Misfit(f"{packed.shape[1]} bytes at each position, the configuration has {at}")
    made = torch.cat((first, fit), 1)
    made = made.cumsum(1) if config.get("delta_encoding", True) else made
    if rest:  # a fit may have a mass above 1, which DistillKit's loss divides by; what has far more is no probability
        made = made - made.logsumexp(1, keepdim=True).clamp(0, 1)
    return made.half() if rest or exact.itemsize == 2 else made


def megatron(
    folder: str | Path, tokens: Sequence[Sequence[int]], *, vocabulary: int, prompt_length: int = 1
) -> Iterator[Scored]:
    """Megatron-LM's cached logits: dp{D}__{I}.tar of {iteration}.pt.zst, which have no token ids.

    Args:
        folder: with the shards of all data-parallel ranks. tokens: the training samples in the order of the data, each
            one longer than the sequences: sample n of them is iteration n // global batch size's.

    Raises:
        Misfit: with the shard and the iteration, where ranks or samples are missing or do not fit.
        ValueError: shards of context-parallel parts.
    """
    folder = Path(folder)
    ranks: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.tar"):
        named = re.fullmatch(r"(?:cp(\d+)_)?dp(\d+)__(\d+)\.tar", path.name)
        if named and int(named[1] or 0):
            raise ValueError(f"{path} is a part of a sequence: shards of context-parallel ranks are not read")
        if named:
            ranks.setdefault(int(named[2]), []).append((int(named[3]), path))
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{folder} has shards of the data-parallel ranks {sorted(ranks)} alone")
    streams = [_iterations([path for _, path in sorted(ranks[rank])]) for rank in range(len(ranks))]
    for parts in itertools.zip_longest(*streams):
        with _at(f"{folder} {next(p[0] for p in parts if p)}"):
            if any(p is None or p[1] != parts[0][1] for p in parts) or len({(len(p[2]), p[3]) for p in parts}) != 1:
                raise Misfit("the ranks do not have the same iterations and batches")
            _, iteration, samples, micro = parts[0]
            count = len(samples) * len(parts)
            for n in range(count):  # of each micro-step the ranks have their `micro` samples one after the other
                block, within = divmod(n, micro)
                values, ids = parts[block % len(parts)][2][block // len(parts) * micro + within]
                sequence = tokens[iteration * count + n]
                if len(sequence) != len(values) + 1:
                    raise Misfit(f"sample {iteration * count + n} has {len(sequence)} tokens for {len(values)} rows")
                kept = slice(prompt_length - 1, None)
                split = _split(sequence, prompt_length)
                yield *split, checked(ids[kept], values[kept], vocabulary, len(split[1]))


def _iterations(paths: list[Path]) -> Iterator[tuple[str, int, list[tuple[Tensor, Tensor]], int]]:
    """Of a rank's shards, in order: name, iteration, (log-probs, ids) (L, K) of each sample, and micro-batch size."""
    import pyarrow

    for path in paths:
        micro = None
        for name, content in _members(path):
            with _at(f"{path} {name}"):
                if name == "_meta.json":
                    micro = json.loads(content)["saver"].get("mbs_save")
                if not name.endswith(".pt.zst"):
                    continue
                whole = pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd").read()
                kept = torch.load(io.BytesIO(whole), weights_only=True)
                parts = [kept[name] for name in ("values", "indices_low", "bit_17")]  # one tensor each, or one
                if isinstance(parts[0], list):  # for each micro-batch, in the first version
                    micro = parts[0][0].shape[1]
                else:
                    parts = [[part] for part in parts]
                samples: list[tuple[Tensor, Tensor]] = []
                for values, low, high in zip(*parts, strict=True):  # ids by their 16 bits and a 17th, or a sentinel
                    ids = (high.long() << 16 | low.long()).masked_fill(values <= -999, -1)
                    samples += zip(values.unbind(1), ids.unbind(1), strict=True)
                if not micro or len(samples) % micro:
                    raise Misfit(f"{len(samples)} samples in micro-batches of {micro}")
            yield f"{path.name} {name}", int(name.split(".")[0]), samples, micro


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar. One that has lost its end, tarfile may take for a shorter one."""
    with _at(str(path)), tarfile.open(path) as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                yield member.name, file.read()
        tar.fileobj.seek(tar.offset)
        if len(tar.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise Misfit("it has lost its end")


def _rectangle(lists: Any, fill: float, least: int = 0) -> Any:
    """Lists padded to the longest, or to `least`; tensors and arrays keep their dtype, and one of rows is as it is."""
    if hasattr(lists, "dtype") and str(lists.dtype) != "object":  # an array of rows is none of numbers
        return lists
    longest = max(least, 0, *map(len, lists))
    if any(hasattr(row, "dtype") for row in lists):
        rows = [torch.as_tensor(row) for row in lists]
        rows = [row if row.is_floating_point() or row.dtype == torch.bool else row.long() for row in rows]
        return torch.stack([pad(row, (0, longest - len(row)), value=fill) for row in rows])
    return [[*row, *[fill] * (longest - len(row))] for row in lists]


def _split(sequence: Sequence[int], begin: int) -> tuple[Tensor, Tensor]:
    """The prompt and the continuation, both of which must have tokens."""
    check_integer("prompt_length", begin)
    whole = torch.as_tensor(sequence)
    if not 0 < begin < len(whole) or whole.is_floating_point():
        raise Misfit(f"a prompt of {begin} tokens in a sequence of {len(whole)}, of {whole.dtype}")
    if (least := int((whole := whole.long()).min())) < 0:
        raise Misfit(f"the sequence has {least} in the place of a token")
    return whole[:begin], whole[begin:]


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Names the row in every error that its reading raises."""
    try:
        yield
    except Exception as error:
        named = "" if isinstance(error, Misfit) else f"{type(error).__name__}: "  # repr of one of Unicode has all bytes
        raise Misfit(f"{where}: {named}{error}") from error


@contextlib.contextmanager
def form(what: str) -> Iterator[None]:
    """Turns the errors of a reply in another form into a Misfit that names the form."""
    try:
        yield
    except Misfit:
        raise
    except (TypeError, LookupError, AttributeError, ValueError, OverflowError) as error:
        raise Misfit(f"{what}: {error!r}") from error
