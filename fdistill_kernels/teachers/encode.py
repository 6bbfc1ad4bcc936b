"""What a teacher said of a sequence, checked, as a shard keeps it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.rows import Targets
from ..backends.sparse import check_targets
from ..checks import DTYPES, INTEGERS, check_number, check_tensor
from ..sparse import TopK
from . import packing


def encoded_states(states: Any, length: int, settings: dict[str, Any], projection: Tensor | None) -> dict[str, Tensor]:
    """The tensors of states (L, D), which are kept by a projection (D, rank) if there is one."""
    if not isinstance(states, Tensor):
        raise TypeError(f"targets must be a tensor of hidden states, not {type(states).__name__}")
    check_tensor("targets", states)
    if states.shape != (length, settings["width"]):
        raise ValueError(f"targets must have shape {(length, settings['width'])}, not {tuple(states.shape)}")
    states = states.detach().cpu()
    if not states.isfinite().all():
        raise ValueError("targets has NaN or infinite states")
    if projection is not None:
        states = states.float() @ projection
    return packing.encode_states(states, settings["states"])


def encoded_lists(targets: Any, length: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of lists (L, K'), and the sums of the mass of each row's 1, 2, 4, … K largest ids."""
    ids, log_probs = _checked(targets, length, settings)
    k, counts = settings["k"], (ids >= 0).sum(1)
    order = np.argsort(ids < 0, axis=1, kind="stable")  # padding goes to the end
    ids, log_probs = (np.take_along_axis(x, order, 1) for x in (ids, log_probs))
    p = np.cumsum(-np.sort(-np.exp(log_probs), axis=1), 1, dtype=np.float64)
    mass = [float(p[:, min(n, p.shape[1]) - 1].sum()) if p.size else 0.0 for n in counted(k)]
    ids, log_probs = (np.pad(x, ((0, 0), (0, k - x.shape[1])), constant_values=c)
                      for x, c in ((ids, 0), (log_probs, -np.inf)))  # fmt: skip
    kept = packing.encode_log_probs(log_probs, settings["log_probs"])
    kept["ids"] = packing.pack_ids(ids.clip(0), packing.id_bits(settings["vocabulary"]))
    exact = targets.log_probs.dtype.itemsize > 2
    kept["rest"] = packing.rest_of(log_probs) if exact else np.full(length, np.nan, np.float32)
    kept["counts"] = counts.astype(np.uint8 if k < 256 else np.int32)
    return {name: torch.from_numpy(value) for name, value in kept.items()}, mass


def _checked(targets: Any, length: int, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A `TopK`'s ids int64 and log-probabilities float32, −inf where padded, (L, K') each."""
    if not isinstance(targets, TopK):
        raise TypeError(f"targets must be a TopK, not {type(targets).__name__}")
    if targets.weights is not None:
        raise ValueError("targets must have no weights, which no store keeps")
    if check_number("targets.temperature", targets.temperature) != settings["temperature"]:
        raise ValueError(f"targets must have temperature {settings['temperature']}, as the store, not "
                         f"{targets.temperature}")  # fmt: skip
    check_tensor("targets.ids", targets.ids, floating=False)
    check_tensor("targets.log_probs", targets.log_probs, floating=False)
    ids, log_probs = targets.ids.detach().cpu(), targets.log_probs.detach().cpu()
    if ids.shape != log_probs.shape or ids.ndim != 2 or len(ids) != length or ids.shape[1] > settings["k"]:
        raise ValueError(f"targets.ids and targets.log_probs must be ({length}, K) for K up to {settings['k']}, not "
                         f"{tuple(ids.shape)} and {tuple(log_probs.shape)}")  # fmt: skip
    if ids.dtype not in INTEGERS or log_probs.dtype not in DTYPES:
        raise TypeError(f"targets has ids of {ids.dtype} and log_probs of {log_probs.dtype}")
    ids = ids.long()
    log_probs = log_probs.float().masked_fill(ids < 0, -torch.inf)
    check_targets(Targets(ids, log_probs), torch.ones(length), settings["vocabulary"])  # what the loss would refuse
    return ids.numpy(), log_probs.numpy()


def counted(k: int) -> list[int]:
    """1, 2, 4, … below K, and K."""
    return [1 << n for n in range((k - 1).bit_length())] + [k]
