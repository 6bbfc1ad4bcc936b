"""A teacher's rows as few bytes, and hashes of tensors: little-endian, the same on every machine.

Ids take exactly the bits that the vocabulary needs, log-probabilities 16 or 8, states 32, 16 or 8 an entry. Each has
its largest error as a function beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

#: Log-probabilities as they are kept.
LOG_PROBS = ("float16", "uint8")
#: Hidden states as they are kept; int8 with a scale a token.
STATES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
#: Smaller log-probabilities become −inf: no float has a p > 0 there.
LEAST = -32768.0
#: Steps of the 8-bit code, whose last number is −inf.
STEPS = 254
#: What a step is worth, in parts of the row's span.
WORTH = np.append((np.arange(STEPS + 1) / STEPS) ** 2, np.inf).astype(np.float32)
#: Bytes that are hashed at a time, so that a tensor elsewhere than in memory is never there as a whole.
PIECE = 1 << 24


def id_bits(vocabulary: int) -> int:
    """How many bits an id in [0, vocabulary) takes: 17 for 128256."""
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """(M, K) ids ≥ 0 as (M, ⌈K·bits/8⌉) uint8: each row one string of bits, the lowest first."""
    words = ids.astype("<u8")[..., None].view(np.uint8)
    one_by_one = np.unpackbits(words, axis=2, count=bits, bitorder="little")
    return np.packbits(one_by_one.reshape(len(ids), ids.shape[1] * bits), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    """`pack_ids`' ids, (M, K) int64.

    Eight ids take `bits` whole bytes. So the ids of one place among the eight are words at one distance, which need not
    be aligned, and all shifted alike.
    """
    rows, width = packed.shape
    word = np.dtype("<u4") if bits <= 25 else np.dtype("<u8")  # a word may begin 7 bits before its id
    groups = -(-k // 8)
    end = rows * width + (groups + 1) * bits + word.itemsize  # the last row's last group may end behind it
    whole = np.zeros(end, np.uint8)
    whole[: rows * width] = packed.reshape(-1)
    ids = np.empty((rows, groups, 8), np.int64)
    for place in range(8):
        begin, shift = divmod(place * bits, 8)
        words = np.ndarray((rows, groups), word, whole.data, begin, (width, bits))
        ids[:, :, place] = (words >> word.type(shift)) & word.type((1 << bits) - 1)
    return ids.reshape(rows, groups * 8)[:, :k]


def _half_above(values: np.ndarray) -> np.ndarray:
    """The smallest float16 that is no less."""
    half = values.astype(np.float16)
    return np.where(half.astype(np.float32) < values, np.nextafter(half, np.float16(np.inf)), half)


def encode_log_probs(log_probs: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """(M, K) float32 log-probabilities, no NaN, as "log_probs" and, of "uint8", "spans" (M, 2) float16.

    A row's code of 8 bits is c = 254·√(d/R) of the distance d from the row's largest, R the largest d: steps are finest
    at the top, where the mass is.
    """
    values = np.where(log_probs < LEAST, -np.inf, log_probs).astype(np.float32)
    if precision == "float16":
        return {"log_probs": values.astype(np.float16)}
    finite = np.isfinite(values)
    some = finite.any(1)
    top = _half_above(np.where(some, np.max(values, 1, initial=-np.inf), 0).astype(np.float32))
    distance = np.where(finite, top.astype(np.float32)[:, None] - values, 0)
    span = _half_above(distance.max(1, initial=0))
    span[span == 0] = 1  # a row of one value
    codes = np.rint(STEPS * np.sqrt(distance / span.astype(np.float32)[:, None]))
    return {"log_probs": np.where(finite, codes, STEPS + 1).astype(np.uint8), "spans": np.stack((top, span), 1)}


def decode_log_probs(kept: dict[str, np.ndarray]) -> np.ndarray:
    """`encode_log_probs`' values, (M, K) float16."""
    codes = kept["log_probs"]
    if codes.dtype == np.float16:
        return codes
    top, span = kept["spans"].astype(np.float32).T
    values = WORTH[codes]
    values *= -span[:, None]
    values += top[:, None]
    return values.astype(np.float16)


def log_prob_error(log_probs: Tensor, precision: str) -> Tensor:
    """The largest error of each log-probability of rows (..., K) ≥ −32768 as `precision` keeps it; of −inf it is 0.

    "float16": |x|/2¹¹ + 2⁻²⁵. "uint8", with the row's top and span R = top − least, d = top − x: √(R·d)/254 +
    R/(4·254²), and the float16 of the result. So at most R/253 and that.
    """
    x = log_probs.double()
    finite = x.isfinite()

    def half(values: Tensor) -> Tensor:
        return values.abs() / 2048 + 2.0**-25

    if precision == "float16" or not x.shape[-1]:
        return torch.where(finite, half(x), 0.0)
    top = torch.where(finite, x, -torch.inf).amax(-1, keepdim=True)
    top = top + 2 * half(top)  # rounded up, as the span
    span = top - torch.where(finite, x, torch.inf).amin(-1, keepdim=True)
    span = span + 2 * half(span)
    code = (span * (top - x)).sqrt() / STEPS + span / (4 * STEPS**2) + 1e-6 * span
    return torch.where(finite, code + half(x.abs() + code), 0.0)


def encode_states(states: Tensor, precision: str) -> dict[str, Tensor]:
    """(M, D) finite states as "states" and, of "int8", "scales" (M) bfloat16: a row's largest magnitude is some 127.

    A scale of bfloat16, rounded up, times an int8 is rounded but once in bfloat16: no float32 is needed to read them.

    Raises:
        ValueError: a state is too large for the precision.
    """
    if precision == "int8":
        exact = states.float().abs().amax(1) / 127
        scales = exact.bfloat16()
        scales = torch.where(scales.float() < exact, scales.nextafter(torch.tensor(torch.inf).bfloat16()), scales)
        kept = (states.float() / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        return {"states": kept.to(torch.int8), "scales": scales}
    kept = states.to(STATES[precision])
    if not kept.isfinite().all():
        raise ValueError(f"targets has states beyond {precision}")
    return {"states": kept}


def decode_states(kept: dict[str, Tensor], into: Tensor) -> Tensor:
    """Writes `encode_states`' values into contiguous (M, D) of any floating dtype, and returns it."""
    if kept["states"].dtype == into.dtype:  # as bytes: out of a map, torch's own copy takes twice as long
        np.copyto(into.view(torch.uint8).numpy(), kept["states"].view(torch.uint8).numpy())
        return into
    if "scales" not in kept or into.dtype != torch.float16:  # whose range a scale may be below
        into.copy_(kept["states"])
        return into.mul_(kept["scales"].to(into.dtype)[:, None]) if "scales" in kept else into
    return into.copy_(kept["states"].float().mul_(kept["scales"].float()[:, None]))


def state_error(states: Tensor, precision: str) -> Tensor:
    """The largest error of each entry of float32 states (M, D) as `precision` keeps them, before any other dtype.

    Half a step: |h|/2²⁵, |h|/2¹² and |h|/2⁹ of the floats (in float16 2⁻²⁵ at least), max|h|/252 of int8.
    """
    size = states.double().abs()
    if precision == "int8":
        return (size.amax(1, keepdim=True) / 252).expand_as(size)
    floats = torch.finfo(STATES[precision])
    return size * (floats.eps / 2) + floats.smallest_normal * floats.eps / 2


def top_directions(weight: Tensor, rank: int) -> Tensor:
    """V_r (D, rank) float32: the right singular directions of weight (V, D) with the largest singular values.

    Of all hidden states in a ball they are where the logits differ most: no other r directions leave less of W.
    """
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in weight.detach().cpu().split(8192):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to a digest, a piece at a time, wherever it is; a meta tensor has no
    bytes, a quantised one its values', another kind of tensor those of the tensors that it is made of."""
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
    """32 hex digits of named tensors' contents, in any order, on any device."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        hash_tensor(digest, name, tensor)
    return str(digest.hexdigest())
