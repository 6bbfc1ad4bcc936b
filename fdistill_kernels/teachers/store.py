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
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from .. import products
from ..checks import check_choice, check_integer, check_path
from ..sparse import TopK, checked_tail
from ..values import Head, Hidden
from . import packing
from .encode import counted, encoded_lists, encoded_states
from .files import Damaged, hash_of, mapped, remove_old, sealed, unsealed, write_whole
from .pairs import Pair, TokenIds, key_of, pair_of, paired
from .settings import FORMAT, as_json, check_same, checked_settings, kept_head
from .shard import Kept, Shard, write_shard

HEAD = "head.safetensors"
#: Shards that are kept memory-mapped; the system allows a process some 65,000 maps.
MAPPED = 1024


class MissingTargets(ValueError):
    """Sequences that are not in the store; `indices`: which of those that were asked for."""

    def __init__(self, indices: list[int], asked: int, damaged: dict[str, str]):
        beside = f"; damaged there: {'; '.join(f'{k} ({v})' for k, v in damaged.items())}" if damaged else ""
        named = ", ".join(map(str, indices[:10])) + (", …" if len(indices) > 10 else "")
        super().__init__(f"{len(indices)} of {asked} sequences are not in the store, at {named}{beside}")
        self.indices = indices


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
        check_choice("validate", validate, ("lazy", "full"))
        check_path("folder", folder)
        self.folder = Path(folder).absolute()  # the process may change its folder
        try:
            content = unsealed(self.folder / "manifest.json")
        except Damaged as error:
            raise Damaged(f"{self.folder} is no store that can be read: {error}; `create` with the same settings makes "
                          "a manifest anew where there is none") from error  # fmt: skip
        if content["format"] != FORMAT:
            raise ValueError(f"{self.folder} is of format {content['format']}, this package reads {FORMAT}")
        self.key, self.extra, self._head_hash = content.pop("key"), content.pop("extra"), content.pop("head_file")
        self.settings, self.kind, self.vocabulary = content, str(content["kind"]), int(content["vocabulary"])
        if key is not None:
            check_same(f"{self.folder} holds other targets", self.key, as_json("key", key))
        self._made_of = hash_of({"settings": content, "key": self.key, "head": self._head_hash})
        self._shards: dict[str, Shard] = {}
        self._unread: dict[str, str] = {}  # the sidecar is missing or damaged: refresh looks at it again
        self._broken: dict[str, str] = {}  # the checksum was wrong
        self._index: dict[bytes, tuple[Shard, int]] = {}
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
            extra: anything else to keep in the manifest, as JSON; not compared. The trainer reads encoder_decoder (true
                of a teacher that is one; else it is taken for causal) and end_tokens (the ids that end its sequences).

        Raises:
            ValueError, TypeError: a setting does not fit, or the folder has other settings; the message gives both
                values.
            OSError: a file could not be written; the message names it.
        """
        settings = checked_settings(kind, vocabulary, k, log_probs, states, rank, head, temperature)
        check_path("folder", folder)
        folder, key, extra = Path(folder), as_json("key", key), as_json("extra", {} if extra is None else extra)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        remove_old(folder)
        kept: dict[str, Tensor] | None = None
        if not (folder / "manifest.json").exists():
            kept = {} if head is None else kept_head(head, rank)
            made = {**settings, "key": key, "extra": extra, "head_file": packing.hash_tensors(kept.items())}
            with contextlib.suppress(FileExistsError):  # then another was first, and is compared with
                write_whole(folder / "manifest.json", sealed(made, indent=1), first=True)
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
            kept = kept_head(head, self.settings["rank"]) if kept is None else kept
            if packing.hash_tensors(kept.items()) != self._head_hash:  # states of one projection are not the other's
                raise Damaged(f"{error}, and its directions come out otherwise on this machine: remove "
                              f"{self.folder} to make it anew") from error  # fmt: skip
            write_whole(self.folder / HEAD, save(kept))

    def _head_tensors(self) -> dict[str, Tensor]:
        """The head's tensors, memory-mapped, verified once."""
        if self._head is None:
            path, found = self.folder / HEAD, {}
            with contextlib.suppress(Damaged):
                found = mapped(path)
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
            except Damaged as error:
                self._unread[name] = str(error)

    def _take(self, name: str) -> None:
        shard = Shard(self.folder / "shards" / f"{name}.safetensors", self._made_of)
        with self._changing:
            self._shards[name] = shard
            shard.enter(self._index)

    def _leave_out(self, name: str) -> None:
        """Without a shard. Who reads meanwhile has the index as it was."""
        with self._changing:
            self._shards.pop(name, None)
            index: dict[bytes, tuple[Shard, int]] = {}
            for shard in self._shards.values():
                shard.enter(index)
            self._index = index

    def _tensors(self, shard: Shard) -> dict[str, Tensor] | None:
        """A shard's tensors; None if it is damaged. It is then left out, and its sequences may be in another shard."""
        name = shard.path.stem
        if (kept := self._mapped.get(name)) is not None:
            with contextlib.suppress(KeyError):  # another thread may have let it go
                self._mapped.move_to_end(name)
            return kept
        try:
            found = self._mapped[name] = shard.mapped()
        except Damaged as error:
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
        return key_of(pair) in self._index

    def missing(self, pairs: Sequence[Pair]) -> list[int]:
        """Indices of pairs (prompt, continuation) that are not in the store. Damage not found yet is not noticed."""
        if not isinstance(pairs, Iterable):
            raise TypeError(f"pairs must be a list of pairs, not {type(pairs).__name__}")
        return [i for i, pair in enumerate(pairs) if key_of(pair) not in self._index]

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
        keys = [key_of(pair) for pair in paired(prompts, continuations)]
        if not keys:
            raise ValueError("targets of no sequence were asked for")
        parts = self._gather(keys)
        if self.kind == "hidden":
            head, lengths = self.head, [len(part["states"]) for part in parts]
            assert head is not None
            states = products.empty(head.weight, sum(lengths), head.weight.shape[1])
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

    def _encoded(self, targets: Any, length: int) -> tuple[dict[str, Tensor], list[float]]:
        """A sequence's tensors, and the sums of its rows' mass."""
        if self.kind == "top_k":
            return encoded_lists(targets, length, self.settings)
        projection = None if self.settings["rank"] is None else self._head_tensors()["projection"]
        return encoded_states(targets, length, self.settings, projection), []

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
            found["mass"] = dict(zip(counted(self.settings["k"]), (sum(m) / rows for m in sums), strict=False))
        return found


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Adds sequences to a store; see `TeacherStore.writer`. What `flush` returned from is never lost."""

    def __init__(self, store: TeacherStore, shard_bytes: int):
        check_integer("shard_bytes", shard_bytes, 1)
        self.store, self.shard_bytes, self._bytes = store, shard_bytes, 0
        self._adding = threading.RLock()  # threads may share a writer
        self._pending: dict[bytes, Kept] = {}

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
        key, *tokens = pair_of(prompt, continuation)
        if key in self.store._index or key in self._pending:
            return False
        rows, mass = self.store._encoded(targets, len(tokens[1]))
        with self._adding:
            if key in self.store._index or key in self._pending:  # meanwhile
                return False
            self._pending[key] = tokens[0], tokens[1], rows, mass
            self._bytes += sum(t.nbytes for t in tokens) + sum(t.nbytes for t in rows.values())
            if self._bytes >= self.shard_bytes:
                self.flush()
        return True

    def flush(self) -> None:
        """Writes what was added. When this returns it is on the disk.

        Raises:
            OSError: the message names the file. What was added is kept in memory, and everything before stays readable.
        """
        with self._adding:
            if self._pending:
                name = write_shard(self.store.folder / "shards", self.store._made_of, self._pending)
                self._pending, self._bytes = {}, 0
                self.store._take(name)
