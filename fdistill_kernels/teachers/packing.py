"""Stored rows in few bytes, and hashes of tensors. Everything is little-endian, so it is the same on every machine.

An id takes as many bits as the vocabulary needs, a log-probability 16 or 8, an entry of a hidden state 32, 16 or 8. For
the last two there is a function that gives the largest error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

#: How log-probabilities may be stored.
LOG_PROBS = ("float16", "uint8")
#: How hidden states may be stored; int8 has a scale for each token.
STATES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
#: Smaller log-probabilities are stored as −inf; in float32 they have p = 0 anyway.
LEAST = -32768.0
#: The 8-bit code takes smaller ones for this, whose p is 0 in float32: a mask's −1e4 would stretch all of its row.
LEAST_CODED = -104.0
#: The 8-bit code has 254 steps; its last number, 255, is −inf.
STEPS = 254
#: The distance from a row's top that each number of the 8-bit code stands for, as a share of the row's span.
WORTH = np.append((np.arange(STEPS + 1) / STEPS) ** 2, np.inf).astype(np.float32)
#: Bytes that are hashed at a time, so that a tensor on a GPU or in a file is never copied as a whole.
PIECE = 1 << 24


def id_bits(vocabulary: int) -> int:
    """The number of bits of an id in [0, vocabulary), for example 17 for 128256."""
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Packs ids (M, K) ≥ 0 into uint8 (M, ⌈K·bits/8⌉): each row is one string of bits, the lowest bit first."""
    words = ids.astype("<u8")[..., None].view(np.uint8)
    one_by_one = np.unpackbits(words, axis=2, count=bits, bitorder="little")
    return np.packbits(one_by_one.reshape(len(ids), ids.shape[1] * bits), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    """The ids (M, k) int64 that `pack_ids` was given.

    Eight ids take exactly `bits` bytes. So every eighth id begins at the same bit of a byte, `bits` bytes after the one
    before it, and numpy can read all of these as one strided array of unaligned words, which are then shifted alike.
    """
    rows, width = packed.shape
    word = np.dtype("<u4") if bits <= 25 else np.dtype("<u8")  # an id may begin at the 8th bit of its word
    groups = -(-k // 8)
    padding = (groups + 1) * bits + word.itemsize  # the last group of the last row may be read beyond its end
    whole = np.append(packed.reshape(-1), np.zeros(padding, np.uint8))
    ids = np.empty((rows, groups, 8), np.int64)
    for place in range(8):
        begin, shift = divmod(place * bits, 8)
        words = np.ndarray((rows, groups), word, whole.data, begin, (width, bits))
        ids[:, :, place] = (words >> word.type(shift)) & word.type((1 << bits) - 1)
    return ids.reshape(rows, groups * 8)[:, :k]


def _half_above(values: np.ndarray) -> np.ndarray:
    """The smallest float16 numbers that are not below the values."""
    half = values.astype(np.float16)
    return np.where(half.astype(np.float32) < values, np.nextafter(half, np.float16(np.inf)), half)


def encode_log_probs(log_probs: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """Encodes log-probabilities (M, K) float32 without NaN as "log_probs" and, for "uint8", "spans" (M, 2) float16.

    The 8-bit code of a log-probability is round(254·√(d/R)): d is its distance from the row's top, R (the row's span)
    the largest d. The steps are finest near the top, where the probability mass is. What is below −104 counts as −104.
    """
    values = np.where(log_probs < LEAST, -np.inf, log_probs).astype(np.float32)
    if precision == "float16":
        return {"log_probs": values.astype(np.float16)}
    finite = np.isfinite(values)
    values = np.where(finite, np.maximum(values, np.float32(LEAST_CODED)), values)
    top = _half_above(np.where(finite.any(1), np.max(values, 1, initial=-np.inf), 0).astype(np.float32))
    distance = np.where(finite, top.astype(np.float32)[:, None] - values, 0)
    span = _half_above(distance.max(1, initial=0))
    span[span == 0] = 1  # all values of the row are equal
    codes = np.rint(STEPS * np.sqrt(distance / span.astype(np.float32)[:, None]))
    return {"log_probs": np.where(finite, codes, STEPS + 1).astype(np.uint8), "spans": np.stack((top, span), 1)}


def decode_log_probs(kept: dict[str, np.ndarray]) -> np.ndarray:
    """The log-probabilities (M, K) float16 that `encode_log_probs` has encoded."""
    codes = kept["log_probs"]
    if codes.dtype == np.float16:
        return codes
    top, span = kept["spans"].astype(np.float32).T
    values = WORTH[codes]
    values *= -span[:, None]
    values += top[:, None]
    return values.astype(np.float16)


def rest_of(log_probs: np.ndarray) -> np.ndarray:
    """(M) float32, what the float32 log-probabilities (M, K) leave to other ids: 1 − Σp, at least 0, whose digits no
    rounded list keeps.
    """
    return np.maximum(1 - np.exp(log_probs, dtype=np.float64).sum(1), 0).astype(np.float32)


def with_rest(log_probs: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(M, K) float32: log-probabilities, shifted row by row so that they leave `rest` (M) to other ids; rows whose mass
    is above 1, of which that is nothing, as they are.
    """
    values = log_probs.astype(np.float32)
    mass, wanted = np.exp(values, dtype=np.float64).sum(1), 1 - rest.astype(np.float64)
    shifted = (mass > 0) & (wanted > 0) & ((rest > 0) | (mass < 1))
    values += np.log(np.divide(wanted, mass, out=np.ones_like(mass), where=shifted))[:, None].astype(np.float32)
    return values


def log_prob_error(log_probs: Tensor, precision: str) -> Tensor:
    """The largest possible error of each log-probability x ≥ −32768 in rows (..., K), stored with `precision`. In a
    store the row's mean Σ p·error / Σ p comes on top, by which `with_rest` shifts it at most.

    For "float16" it is |x|/2¹¹ + 2⁻²⁵. For "uint8" it is √(R·d)/254 + R/(4·254²), at most R/253, plus the float16 error
    of the result; R is the distance of the row's least value from its top, d that of x. There what is below −104 counts
    as −104, so that −104 − x comes on top. It is 0 for −inf.
    """
    x = log_probs.double()
    finite = x.isfinite()

    def half(values: Tensor) -> Tensor:
        return values.abs() / 2048 + 2.0**-25

    if precision == "float16" or not x.shape[-1]:
        return torch.where(finite, half(x), 0.0)
    below, x = (LEAST_CODED - x).clamp_min(0), torch.where(finite, x.clamp_min(LEAST_CODED), x)
    top = torch.where(finite, x, -torch.inf).amax(-1, keepdim=True)
    top = top + 2 * half(top)  # it is rounded up, and so is the span
    span = top - torch.where(finite, x, torch.inf).amin(-1, keepdim=True)
    span = span + 2 * half(span)
    code = (span * (top - x)).sqrt() / STEPS + span / (4 * STEPS**2) + 1e-6 * span
    return torch.where(finite, below + code + half(x.abs() + code), 0.0)


def encode_states(states: Tensor, precision: str) -> dict[str, Tensor]:
    """Encodes finite hidden states (M, D) as "states" and, for "int8", "scales" (M) bfloat16: row maximum / 127.

    The scale is rounded up to a bfloat16, so that decoding into bfloat16 rounds once and needs no float32.

    Raises:
        ValueError: a state is too large for the precision.
    """
    if precision == "int8":
        exact = states.float().abs().amax(1) / 127
        scales = exact.bfloat16()
        scales = torch.where(scales.float() < exact, scales.nextafter(torch.tensor(torch.inf).bfloat16()), scales)
        whole = (states.float() / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        kept = {"states": whole.to(torch.int8), "scales": scales}
    else:
        kept = {"states": states.to(STATES[precision], copy=True)}  # the caller may fill its tensor anew
    if not all(x.isfinite().all() for x in kept.values()):
        raise ValueError(f"targets has states beyond {precision}")
    return kept


def decode_states(kept: dict[str, Tensor], into: Tensor) -> Tensor:
    """Writes the states that `encode_states` has encoded into a contiguous (M, D) tensor, and returns it.

    Raises:
        ValueError: a state is too large for float16.
    """
    states, scales = kept["states"], kept.get("scales")
    if states.dtype == into.dtype:  # as bytes: from a memory map, torch's own copy takes twice as long
        np.copyto(into.view(torch.uint8).numpy(), states.view(torch.uint8).numpy())
        return into
    if into.dtype == torch.float16:  # a scale may be too small for float16
        into.copy_(states if scales is None else states.float().mul_(scales.float()[:, None]))
        if not into.isfinite().all():
            raise ValueError("the stored states are beyond float16, the head's dtype: take another for the head")
        return into
    into.copy_(states)
    return into if scales is None else into.mul_(scales.to(into.dtype)[:, None])


def state_error(states: Tensor, precision: str) -> Tensor:
    """The largest possible error of each entry h of float32 states (M, D), stored with `precision`.

    It is |h|/2²⁵ for float32, |h|/2¹² for float16 (at least 2⁻²⁵), |h|/2⁹ for bfloat16, and for int8 the row's largest
    |h|/252. The rounding to another dtype when the states are read comes on top of this.
    """
    size = states.double().abs()
    if precision == "int8":
        return (size.amax(1, keepdim=True) / 252).expand_as(size)
    floats = torch.finfo(STATES[precision])
    return size * (floats.eps / 2) + floats.smallest_normal * floats.eps / 2


def top_directions(weight: Tensor, rank: int) -> Tensor:
    """V_r (D, rank) float32: the right singular vectors of weight (V, D) that belong to its largest singular values.

    Projecting the hidden states onto these r directions changes the logits less than onto any other r directions.
    """
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in weight.detach().cpu().split(8192):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to a digest, a piece at a time, on any device.

    A meta tensor has no bytes. A quantised tensor is hashed by its values, a tensor subclass by the tensors inside it.
    """
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.is_meta or not tensor.numel():
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            hash_tensor(digest, f"{name}.{inner}", getattr(tensor, inner))
        return
    flat = (tensor.dequantize() if tensor.is_quantized else tensor).detach().resolve_conj().resolve_neg().reshape(-1)
    for piece in flat.split(max(1, PIECE // flat.element_size())):
        digest.update(piece.contiguous().cpu().view(torch.uint8).numpy())


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors, 32 hex digits; it depends neither on their order nor on their device."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        hash_tensor(digest, name, tensor)
    return str(digest.hexdigest())
