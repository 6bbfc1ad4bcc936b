"""Sequences on their way into a store, a shard at a time."""

from __future__ import annotations

import contextlib
import threading
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from ..backends.rows import Targets
from ..backends.sparse import check_targets
from ..checks import check_integer
from ..sparse import TopK
from . import packing
from .files import sealed, write_whole
from .pairs import TokenIds, pair_of

if TYPE_CHECKING:
    from .store import TeacherStore


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
        key, *tokens = pair_of(prompt, continuation)
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
        mass = [float(p[:, min(n, p.shape[1]) - 1].sum()) if p.size else 0.0 for n in counted(k)]
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
            for path, written in zip(paths, (content, sealed(side)), strict=True):
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


def counted(k: int) -> list[int]:
    """1, 2, 4, … below K, and K."""
    return [1 << n for n in range((k - 1).bit_length())] + [k]
