"""What tells one model, tokenizer or data from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..teachers.packing import hash_tensor

#: What a configuration says of where a model came from and how it is run, not of what it says.
ELSEWHERE = {"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures",
             "return_dict", "_attn_implementation_autoset", "attn_implementation"}  # fmt: skip


def fingerprint(model: Any) -> str:
    """Sixteen hex digits of a model's configuration and weights (names, dtypes, shapes and all bytes), on any device.

    Meta tensors have no bytes. Sharded tensors are gathered, so all ranks must call this.
    """
    known = {k: v for k, v in model.config.to_dict().items() if k not in ELSEWHERE and not k.startswith("output_")}
    configuration = json.dumps(known, sort_keys=True, default=str).encode()
    state = model.state_dict()
    digest = xxhash.xxh3_128(configuration)
    for name in sorted(state):
        found = state[name]  # of a quantised module its weight and bias
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, Tensor):
                hash_tensor(digest, name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return str(digest.hexdigest()[:16])


def data_hash(prompts: Sequence[Sequence[int]]) -> str:
    """Sixteen hex digits of the prompts' ids."""
    return hashlib.sha256(json.dumps([list(map(int, p)) for p in prompts]).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
