"""A shard of a store: rows of some sequences, and the sidecar that says of which."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from . import packing
from .files import Damaged, mapped, noticing, sealed, unsealed, write_whole

#: Of a sequence: prompt, continuation, tensors of its rows, and sums of their mass.
Kept = tuple[np.ndarray, np.ndarray, dict[str, Tensor], list[float]]


class Shard:
    """What the sidecar says of a shard. Of the shard's own file only the size is looked at, until it is mapped."""

    @noticing()
    def __init__(self, path: Path, settings: str):
        side = unsealed(path.with_suffix(".json"))
        if side["settings"] != settings:
            raise Damaged(f"{path.name} is of a store with other settings")
        self.path, self.bytes, self.checksum, self.mass = path, side["bytes"], side["checksum"], side["mass"]
        self.keys, self.verified = bytes.fromhex(side["keys"]), False
        self.ends = np.cumsum([0, *side["rows"]])
        if not path.exists() or path.stat().st_size != self.bytes:
            raise Damaged(f"{path.name} is missing, or has another size than written")

    def enter(self, index: dict[bytes, tuple[Shard, int]]) -> None:
        """Enters the sequences that an index does not have."""
        for number in range(len(self.ends) - 1):
            index.setdefault(self.keys[16 * number : 16 * number + 16], (self, number))

    @noticing()
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
        return mapped(self.path)


def write_shard(folder: Path, settings: str, sequences: dict[bytes, Kept]) -> str:
    """Writes a shard and its sidecar; returns their name."""
    prompts, continuations, rows, masses = zip(*sequences.values(), strict=True)
    tokens = [part for pair in zip(prompts, continuations, strict=True) for part in pair]
    tensors = {name: torch.cat([r[name] for r in rows]).contiguous() for name in rows[0]}
    tensors["tokens"] = torch.from_numpy(np.concatenate(tokens))
    tensors["places"] = torch.from_numpy(np.cumsum([0, *map(len, tokens)]))
    content, lengths = save(tensors), [len(c) for c in continuations]
    side = {
        "settings": settings, "bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content),
        "sequences": len(rows), "tokens": sum(lengths), "keys": b"".join(sequences).hex(), "rows": lengths,
        "mass": [sum(m) for m in zip(*masses, strict=True)],
    }  # fmt: skip
    name = uuid.uuid4().hex
    paths = [folder / f"{name}.{suffix}" for suffix in ("safetensors", "json")]
    try:
        for path, written in zip(paths, (content, sealed(side)), strict=True):
            write_whole(path, written)
    except OSError:
        for path in paths[::-1]:  # it will be tried again, under another name
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return name
