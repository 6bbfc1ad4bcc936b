"""What a store's manifest says: its settings, checked, and what others are compared with."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from ..checks import check_integer, check_number
from ..heads import checked_head, head_of
from ..values import Head
from . import packing

FORMAT = 1
KINDS = ("top_k", "hidden")


def check_same(
    what: str, known: dict[str, Any], asked: dict[str, Any], *more: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Raises ValueError where a field differs; every one is named with both values. more: what else is compared so."""
    told = [f"{name} was {one.get(name)!r} and is {other.get(name)!r}"
            for one, other in ((known, asked), *more) for name in {**one, **other}
            if one.get(name) != other.get(name)]  # fmt: skip
    if told:
        raise ValueError(f"{what}: {'; '.join(told)}")


def as_json(name: str, value: Any) -> dict[str, Any]:
    """A dict as JSON has it."""
    try:
        found = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be what JSON can keep: {error}") from error
    if not isinstance(found, dict):
        raise TypeError(f"{name} must be a dict, not {type(value).__name__}")
    return found


def checked_settings(
    kind: str, vocabulary: int, k: int | None = None, log_probs: str = "float16", states: str = "bfloat16",
    rank: int | None = None, head: Head | None = None, temperature: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """The checked settings of a store, as its manifest has them beside the key."""
    for name, value in (("vocabulary", vocabulary), ("k", k), ("rank", rank)):
        if value is not None or name == "vocabulary":
            check_integer(name, value)
    check_number("temperature", temperature)
    for name, text in (("kind", kind), ("log_probs", log_probs), ("states", states)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, not {type(text).__name__}")
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


def kept_head(head: Head, rank: int | None) -> dict[str, Tensor]:
    """The head's tensors as they are stored: with a rank r, W V_r in the place of W, and V_r."""
    given = {"weight": head.weight, "bias": head.bias}
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items() if tensor is not None}
    if rank is not None:
        kept["projection"] = packing.top_directions(kept["weight"], rank)
        kept["weight"] = (kept["weight"].float() @ kept["projection"]).to(kept["weight"].dtype)
    return {name: tensor.clone() for name, tensor in kept.items()}  # safetensors refuses what shares memory
