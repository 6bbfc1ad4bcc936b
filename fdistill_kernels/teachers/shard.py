"""A shard of a store: rows of some sequences, and the sidecar that says of which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash
from torch import Tensor

from . import packing
from .files import Damaged, mapped, unsealed


class Shard:
    """What the sidecar says of a shard. Of the shard's own file only the size is looked at, until it is mapped."""

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
