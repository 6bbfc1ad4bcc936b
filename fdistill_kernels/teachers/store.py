"""A folder with what a teacher said about sequences, which are found by their own token ids.

    manifest.json             settings, and the key of everything that decides the contents; the first writer's counts
    head.safetensors          for hidden states: the teacher's head, once
    shards/NAME.safetensors   rows of some sequences, one after another, and the sequences' token ids
    shards/NAME.json          its sidecar: bytes, checksum, counts, each sequence's hash and rows; written last
    damaged/                  shards that `set_aside` has moved away

Every file is complete or absent: it is written under another name, synced, and renamed. JSON files and the head contain
their own checksum. No file is ever changed, and no two writers use the same name, so no locks are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..backends.rows import Targets
from ..backends.sparse import check_targets
from ..checks import check_integer, check_number
from ..heads import checked_head, head_of
from ..sparse import TopK, checked_tail
from ..values import Head, Hidden
from . import packing

FORMAT = 1
KINDS, HEAD = ("top_k", "hidden"), "head.safetensors"
#: Partial files that are older, in seconds, are of a writer that died.
OLD = 86400.0
#: Shards that are kept memory-mapped; the system allows a process some 65,000 maps.
MAPPED = 1024
TokenIds = Tensor | Sequence[int]
Pair = tuple[TokenIds, TokenIds]


class Damaged(ValueError):
    """A file does not have the content that was written."""


#: What reading a damaged file may raise.
UNREADABLE = (Damaged, OSError, SafetensorError)


class MissingTargets(ValueError):
    """Sequences that are not in the store; `indices`: which of those that were asked for."""

    def __init__(self, indices: list[int], asked: int, damaged: dict[str, str]):
        beside = f"; damaged there: {'; '.join(f'{k} ({v})' for k, v in damaged.items())}" if damaged else ""
        named = ", ".join(map(str, indices[:10])) + (", …" if len(indices) > 10 else "")
        super().__init__(f"{len(indices)} of {asked} sequences are not in the store, at {named}{beside}")
        self.indices = indices


def _hash(content: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _sealed(content: dict[str, Any], indent: int | None = None) -> bytes:
    """JSON with a checksum of its own."""
    return json.dumps({**content, "check": _hash(content)}, indent=indent, sort_keys=True).encode()


def _unsealed(path: Path) -> dict[str, Any]:
    """The content that `_sealed` was given.

    Raises:
        Damaged: the file is missing, or something else is in it.
    """
    try:
        content = json.loads(path.read_bytes())
        whole = content.pop("check") == _hash(content)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{path.name} is not what was written")
    return content


def write_whole(path: Path, content: bytes, first: bool = False) -> None:
    """Writes a file whole or not at all; it is on the disk when this returns.

    Raises:
        FileExistsError: with `first`, the file exists already.
        OSError: the message names the file.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if first:
            os.link(partial, path)  # which, unlike a rename, does not replace
            os.unlink(partial)
        else:
            os.replace(partial, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        told = f"{path} could not be written ({error.strerror}); what was flushed before is whole"
        raise OSError(error.errno, told) from error


def _token_ids(name: str, ids: TokenIds) -> np.ndarray:
    """Token ids as (L) int32; anything else is refused with its name."""
    try:
        found = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    except ValueError as error:  # of a ragged list
        raise ValueError(f"{name} must be one row of token ids: {error}") from error
    whole = not found.size or found.dtype.kind in "iu"
    if found.ndim != 1 or not whole or (found.size and (found.min() < 0 or found.max() >= 1 << 31)):
        raise ValueError(f"{name} must be one row of token ids in [0, 2³¹), not {found.dtype} of shape {found.shape}"
                         + (f" from {found.min()} to {found.max()}" if found.size and whole else ""))  # fmt: skip
    return found.astype("<i4")


def paired(prompts: Sequence[Any], continuations: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each prompt with its continuation."""
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: each has one")
    return zip(prompts, continuations, strict=True)


def _pair(prompt: TokenIds, continuation: TokenIds) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A sequence's hash, its prompt and its continuation."""
    of = _token_ids("prompt", prompt), _token_ids("continuation", continuation)
    return xxhash.xxh3_128_digest(len(of[0]).to_bytes(8, "little") + of[0].tobytes() + of[1].tobytes()), *of


def check_same(
    what: str, known: dict[str, Any], asked: dict[str, Any], *more: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Raises ValueError where a field differs; every one is named with both values. more: what else is compared so."""
    told = [f"{name} was {one.get(name)!r} and is {other.get(name)!r}"
            for one, other in ((known, asked), *more) for name in {**one, **other}
            if one.get(name) != other.get(name)]  # fmt: skip
    if told:
        raise ValueError(f"{what}: {'; '.join(told)}")


def _mapped(path: Path) -> dict[str, Tensor]:
    """A file's tensors, memory-mapped."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class _Shard:
    """What the sidecar says of a shard. Of the shard's own file only the size is looked at, until it is mapped."""

    def __init__(self, path: Path, settings: str):
        side = _unsealed(path.with_suffix(".json"))
        if side["settings"] != settings:
            raise Damaged(f"{path.name} is of a store with other settings")
        self.path, self.bytes, self.checksum, self.mass = path, side["bytes"], side["checksum"], side["mass"]
        self.keys, self.verified = bytes.fromhex(side["keys"]), False
        self.ends = np.cumsum([0, *side["rows"]])
        if not path.exists() or path.stat().st_size != self.bytes:
            raise Damaged(f"{path.name} is missing, or has another size than written")

    def enter(self, index: dict[bytes, tuple[_Shard, int]]) -> None:
        """Enters the sequences that an index does not have."""
        for number in range(len(self.ends) - 1):
            index.setdefault(self.keys[16 * number : 16 * number + 16], (self, number))

    def mapped(self) -> dict[str, Tensor]:
        """The tensors, memory-mapped; the whole file's checksum is verified before the first time."""
        if not self.verified:
            digest = xxhash.xxh3_128()
            with open(self.path, "rb", buffering=0) as file:
                while piece := file.read(packing.PIECE):
                    digest.update(piece)
            if digest.hexdigest() != self.checksum:
                raise Damaged(f"{self.path.name} has another checksum than written")
            self.verified = True
        return _mapped(self.path)


def _as_json(name: str, value: Any) -> dict[str, Any]:
    """A dict as JSON has it."""
    try:
        found = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be what JSON can keep: {error}") from error
    if not isinstance(found, dict):
        raise TypeError(f"{name} must be a dict, not {type(value).__name__}")
    return found


def _settings(
    kind: str, vocabulary: int, k: int | None = None, log_probs: str = "float16", states: str = "bfloat16",
    rank: int | None = None, head: Head | None = None, temperature: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """The checked settings of a store, as its manifest has them beside the key."""
    for name, value in (("vocabulary", vocabulary), ("k", k), ("rank", rank)):
        if value is not None or name == "vocabulary":
            check_integer(name, value)
    check_number("temperature", temperature)
    common = {"format": FORMAT, "kind": kind, "vocabulary": int(vocabulary)}
    if kind not in KINDS or vocabulary < 1:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} and vocabulary positive, not {kind!r}, {vocabulary}")
    if kind == "top_k":
        of_states = head is not None or rank is not None or states != "bfloat16"
        if k is None or k < 1 or log_probs not in packing.LOG_PROBS or not temperature > 0 or of_states:
            raise ValueError(
                f"a store of top_k has k ≥ 1, log_probs of {', '.join(packing.LOG_PROBS)}, a temperature above 0 and "
                f"no head, rank or states; not k={k}, log_probs={log_probs!r}, temperature={temperature}, rank={rank}, "
                f"states={states!r}"
            )
        return {**common, "k": int(k), "log_probs": log_probs, "temperature": float(temperature)}
    if head is None or states not in packing.STATES or k is not None or log_probs != "float16" or temperature != 1:
        raise ValueError(
            f"a store of hidden has a head, states of {', '.join(packing.STATES)}, and no k, log_probs or temperature; "
            f"not states={states!r}, k={k}, log_probs={log_probs!r}, temperature={temperature}"
        )
    if not isinstance(head, Head):
        raise TypeError(f"head must be a Head, not {type(head).__name__}")
    head_of("head", head, bias=None, scale=None, softcap=None)  # as a loss would ask of it
    checked_head(head.weight, head, ("head.weight", "head.weight", "head.bias"), None)
    rows, width = head.weight.shape
    if rows != vocabulary or (rank is not None and not 1 <= rank <= width):
        raise ValueError(f"the head {(rows, width)} must have vocabulary={vocabulary} rows, and rank={rank} be in "
                         f"[1, {width}]")  # fmt: skip
    given = packing.hash_tensors((n, t) for n, t in zip(("weight", "bias"), head[:2], strict=True) if t is not None)
    return {**common, "states": states, "width": width, "rank": rank, "head": given, "scale": float(head.scale),
            "softcap": None if head.softcap is None else float(head.softcap)}  # fmt: skip


def _kept_head(head: Head, rank: int | None) -> dict[str, Tensor]:
    """The head's tensors as they are stored: with a rank r, W V_r in the place of W, and V_r."""
    given = {"weight": head.weight, "bias": head.bias}
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items() if tensor is not None}
    if rank is not None:
        kept["projection"] = packing.top_directions(kept["weight"], rank)
        kept["weight"] = (kept["weight"].float() @ kept["projection"]).to(kept["weight"].dtype)
    return {name: tensor.clone() for name, tensor in kept.items()}  # safetensors refuses what shares memory


class TeacherStore:
    """What a teacher said about sequences of prompt and continuation: row i predicts continuation[i].

    Sequences are found by their token ids alone, so shuffled data, several runs and several writers can share a store.
    The sequences of a damaged shard, which `damaged` names, count as missing and can be written again. A shard's
    checksum is verified before its first rows are read. Files must not change while a store is open.

    Attributes:
        kind: "top_k" or "hidden".
        vocabulary: V.
        key: what decides the targets, as given to `create`.
        extra: the `extra` given to `create`.
        settings: the other arguments of `create`, and the hash of the head.
    """

    def __init__(self, folder: str | Path, *, key: dict[str, Any] | None = None, validate: str = "lazy"):
        """Opens a folder for reading and writing.

        Args:
            folder: made by `create`.
            key: what the store must have been made with; None: anything.
            validate: "full" verifies all checksums now, "lazy" each one before its first use.

        Raises:
            ValueError: the manifest is missing or damaged, or `create` had another key; the message gives every field
                that differs with both values.
        """
        if validate not in ("lazy", "full"):
            raise ValueError(f"validate must be lazy or full, not {validate!r}")
        self.folder = Path(folder)
        try:
            content = _unsealed(self.folder / "manifest.json")
        except Damaged as error:
            raise Damaged(f"{self.folder} is no store that can be read: {error}; `create` with the same settings makes "
                          "a manifest anew where there is none") from error  # fmt: skip
        if content["format"] != FORMAT:
            raise ValueError(f"{self.folder} is of format {content['format']}, this package reads {FORMAT}")
        self.key, self.extra, self._head_hash = content.pop("key"), content.pop("extra"), content.pop("head_file")
        self.settings, self.kind, self.vocabulary = content, str(content["kind"]), int(content["vocabulary"])
        if key is not None:
            check_same(f"{self.folder} holds other targets", self.key, json.loads(json.dumps(key)))
        self._made_of = _hash({"settings": content, "key": self.key, "head": self._head_hash})
        self._shards: dict[str, _Shard] = {}
        self._unread: dict[str, str] = {}  # the sidecar is missing or damaged: refresh looks at it again
        self._broken: dict[str, str] = {}  # the checksum was wrong
        self._index: dict[bytes, tuple[_Shard, int]] = {}
        self._mapped: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._head: dict[str, Tensor] | None = None
        self._changing = threading.Lock()  # of the index and the shards in it
        self.refresh()
        if validate == "full":
            self.verify()

    @classmethod
    def create(
        cls, folder: str | Path, *, kind: str, vocabulary: int, key: dict[str, Any], k: int | None = None,
        log_probs: str = "float16", states: str = "bfloat16", rank: int | None = None, head: Head | None = None,
        temperature: float = 1.0, extra: dict[str, Any] | None = None,
    ) -> TeacherStore:  # fmt: skip
        """Makes a folder, or opens one with the same settings. Partial files of writers that died are removed.

        Args:
            folder: path of the store.
            kind: "top_k": ids and log-probabilities; "hidden": states after the final norm, with their head.
            vocabulary: V. Each id takes ⌈log₂ V⌉ bits.
            key: everything that decides the targets, as JSON: the teacher's fingerprint, the tokenizer's hash, …
            k: maximum number of ids in a row.
            log_probs: "float16" or "uint8"; `packing.log_prob_error` gives the error.
            states: "float32", "float16", "bfloat16", or "int8" with a scale per token; `packing.state_error` gives the
                error.
            rank: r: keep the projections of the states on the head's first r right singular directions.
            head: of hidden states, with a weight (V, D) in their dtype.
            temperature: at which the log-probabilities were taken.
            extra: anything else to keep in the manifest, as JSON; not compared.

        Raises:
            ValueError, TypeError: a setting does not fit, or the folder has other settings; the message gives both
                values.
            OSError: a file could not be written; the message names it.
        """
        settings = _settings(kind, vocabulary, k, log_probs, states, rank, head, temperature)
        folder, key, extra = Path(folder), _as_json("key", key), _as_json("extra", extra or {})
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        kept: dict[str, Tensor] | None = None
        if not (folder / "manifest.json").exists():
            kept = {} if head is None else _kept_head(head, rank)
            made = {**settings, "key": key, "extra": extra, "head_file": packing.hash_tensors(kept.items())}
            with contextlib.suppress(FileExistsError):  # then another was first, and is compared with
                write_whole(folder / "manifest.json", _sealed(made, indent=1), first=True)
        store = cls(folder)
        check_same(f"{folder} holds other targets", store.key, key, (store.settings, settings))
        if head is not None:
            store._keep_head(head, kept)
        return store

    def _keep_head(self, head: Head, kept: dict[str, Tensor] | None) -> None:
        """Writes the head where it is not there, or damaged."""
        try:
            self._head_tensors()
        except Damaged as error:
            kept = _kept_head(head, self.settings["rank"]) if kept is None else kept
            if packing.hash_tensors(kept.items()) != self._head_hash:  # states of one projection are not the other's
                raise Damaged(f"{error}, and its directions come out otherwise on this machine: remove "
                              f"{self.folder} to make it anew") from error  # fmt: skip
            write_whole(self.folder / HEAD, save(kept))

    def _head_tensors(self) -> dict[str, Tensor]:
        """The head's tensors, memory-mapped, verified once."""
        if self._head is None:
            path, found = self.folder / HEAD, {}
            with contextlib.suppress(*UNREADABLE):
                found = _mapped(path)
            if packing.hash_tensors(found.items()) != self._head_hash:
                raise Damaged(f"{path} is missing or not what was written; `create` with the same head writes it anew")
            self._head = found
        return self._head

    @property
    def head(self) -> Head | None:
        """The `Head` of hidden states, (V, D), or (V, r) with a rank; None for lists."""
        if self.kind != "hidden":
            return None
        kept = self._head_tensors()
        return Head(kept["weight"], kept.get("bias"), self.settings["scale"], self.settings["softcap"])

    @property
    def damaged(self) -> dict[str, str]:
        """Names of damaged shards, as far as known, and what is wrong with each."""
        return {**self._unread, **self._broken}

    def set_aside(self) -> dict[str, str]:
        """Moves the files of damaged shards into the folder `damaged`. Their sequences are missing, as before.

        No writer may be at work: a shard that is being written looks like one without its sidecar.

        Returns:
            The names of the shards, and what was wrong with each.
        """
        found = {name: why for name, why in self.damaged.items() if name != HEAD}
        (self.folder / "damaged").mkdir(exist_ok=True)
        for file in [f"{name}.{suffix}" for name in found for suffix in ("safetensors", "json")]:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.folder / "shards" / file, self.folder / "damaged" / file)
        self._unread, self._broken = {}, {name: why for name, why in self._broken.items() if name == HEAD}
        return found

    def refresh(self) -> None:
        """Looks for sequences that other writers have added."""
        names = {entry.name.rpartition(".")[0] for entry in os.scandir(self.folder / "shards")
                 if entry.name.endswith((".safetensors", ".json"))}  # fmt: skip
        self._unread = {}
        for name in sorted(names - self._shards.keys() - self._broken.keys()):
            try:
                self._take(name)
            except UNREADABLE as error:
                self._unread[name] = str(error)

    def _take(self, name: str) -> None:
        shard = _Shard(self.folder / "shards" / f"{name}.safetensors", self._made_of)
        with self._changing:
            self._shards[name] = shard
            shard.enter(self._index)

    def _leave_out(self, name: str) -> None:
        """Without a shard. Who reads meanwhile has the index as it was."""
        with self._changing:
            self._shards.pop(name, None)
            index: dict[bytes, tuple[_Shard, int]] = {}
            for shard in self._shards.values():
                shard.enter(index)
            self._index = index

    def _tensors(self, shard: _Shard) -> dict[str, Tensor] | None:
        """A shard's tensors; None if it is damaged. It is then left out, and its sequences may be in another shard."""
        name = shard.path.stem
        if (kept := self._mapped.get(name)) is not None:
            with contextlib.suppress(KeyError):  # another thread may have let it go
                self._mapped.move_to_end(name)
            return kept
        try:
            found = self._mapped[name] = shard.mapped()
        except UNREADABLE as error:
            self._broken[name] = str(error)
            self._leave_out(name)
            return None
        if len(self._mapped) > MAPPED:
            self._mapped.popitem(last=False)
        return found

    def verify(self) -> None:
        """Verifies the checksums that have not been verified yet. Damaged shards are missing from then on."""
        for shard in list(self._shards.values()):
            self._tensors(shard)
        if self.kind == "hidden":
            try:
                self._head_tensors()
            except Damaged as error:
                self._broken[HEAD] = str(error)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps and the lock, which belong to a process."""
        kept = {name: value for name, value in vars(self).items() if name != "_changing"}
        return {**kept, "_mapped": OrderedDict(), "_head": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _changing=threading.Lock())

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, pair: Pair) -> bool:
        return _pair(*pair)[0] in self._index

    def missing(self, pairs: Sequence[Pair]) -> list[int]:
        """Indices of pairs (prompt, continuation) that are not in the store. Damage not found yet is not noticed."""
        return [i for i, pair in enumerate(pairs) if _pair(*pair)[0] not in self._index]

    def sequences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sequence once, as (prompt, continuation) int64, shard by shard; each shard is verified first."""
        for shard in list(self._shards.values()):
            self._tensors(shard)  # so that no damage moves a sequence meanwhile
        for shard, number in sorted(list(self._index.values()), key=lambda place: (place[0].path.name, place[1])):
            if (kept := self._tensors(shard)) is not None:
                begin, middle, end = (int(n) for n in kept["places"][2 * number : 2 * number + 3])
                yield kept["tokens"][begin:middle].long(), kept["tokens"][middle:end].long()

    def targets(
        self, prompts: Sequence[TokenIds], continuations: Sequence[TokenIds], tail: str = "bucket"
    ) -> TopK | Hidden:
        """The rows of all continuations, M = Σ L in total, one sequence after another.

        Returns:
            A `TopK` with ids (M, K) int64, padded with −1 at the end, log_probs (M, K) float32 (float16 if a sequence
                was given in 16 bits, or to version 0.1: then all are rounded), the store's temperature and `tail`; or
                `Hidden` states (M, D) in the dtype of the head, and the head.

        Raises:
            MissingTargets: (a ValueError) sequences are not in the store; with what is damaged.
            ValueError: the numbers of prompts and continuations differ, or are 0; a tail that lists without weights do
                not have.
        """
        checked_tail(tail)
        keys = [_pair(*pair)[0] for pair in paired(prompts, continuations)]
        if not keys:
            raise ValueError("targets of no sequence were asked for")
        parts = self._gather(keys)
        if self.kind == "hidden":
            head, lengths = self.head, [len(part["states"]) for part in parts]
            assert head is not None
            states = torch.empty(sum(lengths), head.weight.shape[1], dtype=head.weight.dtype)
            for part, into in zip(parts, states.split(lengths), strict=True):
                packing.decode_states(part, into)
            return Hidden(states, head)
        names = set.intersection(*map(set, parts))  # of version 0.1 no shard has `rest`
        kept = {name: np.concatenate([part[name].numpy() for part in parts]) for name in names}
        k = int(self.settings["k"])
        ids = np.ascontiguousarray(packing.unpack_ids(kept["ids"], k, packing.id_bits(self.vocabulary)))
        log_probs, counts = packing.decode_log_probs(kept), kept["counts"]
        if (rest := kept.get("rest")) is not None and not np.isnan(rest).any():
            log_probs = packing.with_rest(log_probs, rest)
        if counts.size and counts.min() < k:
            padding = np.arange(k) >= counts[:, None]
            ids[padding], log_probs[padding] = -1, -np.inf
        return TopK(torch.from_numpy(ids), torch.from_numpy(log_probs), tail, None, self.settings["temperature"])

    def _gather(self, keys: list[bytes]) -> list[dict[str, Tensor]]:
        """The stored rows of each sequence, as views into the memory-mapped shards."""
        while True:
            index = self._index  # one, even where another thread finds damage
            if missing := [i for i, key in enumerate(keys) if key not in index]:
                raise MissingTargets(missing, len(keys), self.damaged)
            places = [index[key] for key in keys]
            maps = {shard: tensors for shard in dict(places) if (tensors := self._tensors(shard)) is not None}
            if len(maps) == len(dict(places)):
                return [{name: tensor[shard.ends[number] : shard.ends[number + 1]]
                         for name, tensor in maps[shard].items() if name not in ("tokens", "places")}
                        for shard, number in places]  # fmt: skip
            # else a shard was damaged, and another one may have the same sequences

    def writer(self, shard_bytes: int = 64 << 20) -> Writer:
        """A context manager that adds sequences, in shards of about this size. Several may write at the same time."""
        return Writer(self, shard_bytes)

    def summary(self) -> dict[str, Any]:
        """Counts: kind, sequences, tokens, bytes of the shards, bytes per token, damaged shards.

        For "top_k" also `mass`: the mean mass of a row's 1, 2, 4, … K largest ids, before they were rounded.
        """
        shards = list(self._shards.values())
        size, rows = sum(s.bytes for s in shards), sum(int(s.ends[-1]) for s in shards)
        tokens = sum(int(s.ends[n + 1] - s.ends[n]) for s, n in list(self._index.values()))
        found = {"kind": self.kind, "sequences": len(self), "tokens": tokens, "bytes": size,
                 "bytes_per_token": size / rows if rows else 0.0, "damaged": self.damaged}  # fmt: skip
        if self.kind == "top_k":
            sums = zip(*(s.mass for s in shards), strict=True) if rows else iter(())
            found["mass"] = dict(zip(_counts(self.settings["k"]), (sum(m) / rows for m in sums), strict=False))
        return found


def _counts(k: int) -> list[int]:
    """1, 2, 4, … below K, and K."""
    return [1 << n for n in range((k - 1).bit_length())] + [k]


def _remove_old(folder: Path) -> None:
    """Removes the partial files of writers that died long ago."""
    for partial in [*folder.glob("*.partial"), *folder.glob("shards/*.partial")]:
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > OLD:
                partial.unlink()


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Adds sequences to a store; see `TeacherStore.writer`. What `flush` returned from is never lost."""

    def __init__(self, store: TeacherStore, shard_bytes: int):
        check_integer("shard_bytes", shard_bytes, 1)
        self.store, self.shard_bytes, self._bytes = store, shard_bytes, 0
        self._adding = threading.RLock()  # threads may share a writer
        self._pending: dict[bytes, tuple[np.ndarray, np.ndarray, dict[str, Tensor], list[float]]] = {}

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with contextlib.suppress(*([OSError] if kind else [])):  # what was added before an error is good
            self.flush()

    def add(self, prompt: TokenIds, continuation: TokenIds, targets: TopK | Tensor) -> bool:
        """Adds a sequence, unless it is in the store; returns whether it was added.

        Args:
            prompt: (P) token ids.
            continuation: (L) token ids.
            targets: for "top_k", a `TopK` with rows (L, K'), K' ≤ K, −1 anywhere as padding; its tail is not kept. For
                "hidden", states (L, D).

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
            OSError: a full shard could not be written. Its sequences are kept in memory, and `flush` tries again.
        """
        key, *tokens = _pair(prompt, continuation)
        if key in self.store._index or key in self._pending:
            return False
        rows, mass = (self._top_k if self.store.kind == "top_k" else self._states)(targets, len(tokens[1]))
        with self._adding:
            if key in self.store._index or key in self._pending:  # meanwhile
                return False
            self._pending[key] = tokens[0], tokens[1], rows, mass
            self._bytes += sum(t.nbytes for t in tokens) + sum(t.nbytes for t in rows.values())
            if self._bytes >= self.shard_bytes:
                self.flush()
        return True

    def _states(self, states: Any, length: int) -> tuple[dict[str, Tensor], list[float]]:
        if not isinstance(states, Tensor) or not states.is_floating_point():
            raise TypeError(f"targets must be a tensor of hidden states, not {type(states).__name__}")
        store = self.store
        if states.shape != (length, store.settings["width"]):
            raise ValueError(f"targets must have shape {(length, store.settings['width'])}, not {tuple(states.shape)}")
        states = states.detach().cpu()
        if not states.isfinite().all():
            raise ValueError("targets has NaN or infinite states")
        if store.settings["rank"] is not None:
            states = states.float() @ store._head_tensors()["projection"]
        return packing.encode_states(states, store.settings["states"]), []

    def _top_k(self, targets: Any, length: int) -> tuple[dict[str, Tensor], list[float]]:
        settings = self.store.settings
        ids, log_probs = _checked(targets, length, settings)
        k, counts = settings["k"], (ids >= 0).sum(1)
        order = np.argsort(ids < 0, axis=1, kind="stable")  # padding goes to the end
        ids, log_probs = (np.take_along_axis(x, order, 1) for x in (ids, log_probs))
        p = np.cumsum(-np.sort(-np.exp(log_probs), axis=1), 1, dtype=np.float64)
        mass = [float(p[:, min(n, p.shape[1]) - 1].sum()) if p.size else 0.0 for n in _counts(k)]
        ids, log_probs = (np.pad(x, ((0, 0), (0, k - x.shape[1])), constant_values=c)
                          for x, c in ((ids, 0), (log_probs, -np.inf)))  # fmt: skip
        kept = packing.encode_log_probs(log_probs, settings["log_probs"])
        kept["ids"] = packing.pack_ids(ids.clip(0), packing.id_bits(self.store.vocabulary))
        exact = targets.log_probs.dtype.itemsize > 2
        kept["rest"] = packing.rest_of(log_probs) if exact else np.full(length, np.nan, np.float32)
        kept["counts"] = counts.astype(np.uint8 if k < 256 else np.int32)
        return {name: torch.from_numpy(value) for name, value in kept.items()}, mass

    def flush(self) -> None:
        """Writes what was added. When this returns it is on the disk.

        Raises:
            OSError: the message names the file. What was added is kept in memory, and everything before stays readable.
        """
        with self._adding:
            if self._pending:
                self._write()

    def _write(self) -> None:
        prompts, continuations, rows, masses = zip(*self._pending.values(), strict=True)
        tokens = [part for pair in zip(prompts, continuations, strict=True) for part in pair]
        tensors = {name: torch.cat([r[name] for r in rows]).contiguous() for name in rows[0]}
        tensors["tokens"] = torch.from_numpy(np.concatenate(tokens))
        tensors["places"] = torch.from_numpy(np.cumsum([0, *map(len, tokens)]))
        content, lengths = save(tensors), [len(c) for c in continuations]
        side = {
            "settings": self.store._made_of, "bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content),
            "sequences": len(rows), "tokens": sum(lengths), "keys": b"".join(self._pending).hex(), "rows": lengths,
            "mass": [sum(m) for m in zip(*masses, strict=True)],
        }  # fmt: skip
        name = uuid.uuid4().hex
        paths = [self.store.folder / "shards" / f"{name}.{suffix}" for suffix in ("safetensors", "json")]
        try:
            for path, written in zip(paths, (content, _sealed(side)), strict=True):
                write_whole(path, written)
        except OSError:
            for path in paths[::-1]:  # it will be tried again, under another name
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        self._pending, self._bytes = {}, 0
        self.store._take(name)


def _checked(targets: Any, length: int, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A `TopK`'s ids int64 and log-probabilities float32, −inf where padded, (L, K') each."""
    if not isinstance(targets, TopK):
        raise TypeError(f"targets must be a TopK, not {type(targets).__name__}")
    if targets.weights is not None:
        raise ValueError("targets must have no weights, which no store keeps")
    if targets.temperature != settings["temperature"]:
        raise ValueError(f"targets must have temperature {settings['temperature']}, as the store, not "
                         f"{targets.temperature}")  # fmt: skip
    ids, log_probs = targets.ids.detach().cpu(), targets.log_probs.detach().cpu()
    if ids.shape != log_probs.shape or ids.ndim != 2 or len(ids) != length or ids.shape[1] > settings["k"]:
        raise ValueError(f"targets.ids and targets.log_probs must be ({length}, K) for K up to {settings['k']}, not "
                         f"{tuple(ids.shape)} and {tuple(log_probs.shape)}")  # fmt: skip
    if ids.is_floating_point() or ids.dtype == torch.bool or not log_probs.is_floating_point():
        raise TypeError(f"targets has ids of {ids.dtype} and log_probs of {log_probs.dtype}")
    log_probs = log_probs.float().masked_fill(ids < 0, -torch.inf)
    if (bad := log_probs.isnan().any(1)).any():
        raise ValueError(f"targets.log_probs has NaN, in row {int(bad.nonzero()[0])}")
    check_targets(Targets(ids, log_probs), torch.ones(length), settings["vocabulary"])  # what the loss would refuse
    return ids.long().numpy(), log_probs.numpy()
