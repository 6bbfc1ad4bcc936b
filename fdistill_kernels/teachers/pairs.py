"""Sequences of prompt and continuation, which are known by their token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from ..checks import check_tensor

TokenIds = Tensor | Sequence[int]
Pair = tuple[TokenIds, TokenIds]


def _token_ids(name: str, ids: TokenIds) -> np.ndarray:
    """Token ids as (L) int32; anything else is refused with its name."""
    if isinstance(ids, Tensor):
        check_tensor(name, ids, floating=False)
    try:
        found = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    except (ValueError, TypeError) as error:  # of a ragged list, or a dtype that NumPy has not
        raise ValueError(f"{name} must be one row of token ids: {error}") from error
    whole = not found.size or found.dtype.kind in "iu"
    if found.ndim != 1 or not whole or (found.size and (found.min() < 0 or found.max() >= 1 << 31)):
        raise ValueError(f"{name} must be one row of token ids in [0, 2³¹), not {found.dtype} of shape {found.shape}"
                         + (f" from {found.min()} to {found.max()}" if found.size and whole else ""))  # fmt: skip
    return found.astype("<i4")


def paired(prompts: Sequence[Any], continuations: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each prompt with its continuation."""
    asked, given = _count("prompts", prompts), _count("continuations", continuations)
    if asked != given:
        raise ValueError(f"{asked} prompts and {given} continuations: each has one")
    return zip(prompts, continuations, strict=True)


def _count(name: str, rows: Sequence[Any]) -> int:
    """How many there are."""
    try:
        return len(rows)
    except (TypeError, ValueError) as error:  # the latter of a lazy module's parameter
        raise TypeError(f"{name} must be a list, not {type(rows).__name__}") from error


def key_of(pair: Pair) -> bytes:
    """A sequence's hash."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"a pair must be a tuple of prompt and continuation, not {type(pair).__name__}")
    return pair_of(*pair)[0]


def pair_of(prompt: TokenIds, continuation: TokenIds) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A sequence's hash, its prompt and its continuation."""
    of = _token_ids("prompt", prompt), _token_ids("continuation", continuation)
    return xxhash.xxh3_128_digest(len(of[0]).to_bytes(8, "little") + of[0].tobytes() + of[1].tobytes()), *of
