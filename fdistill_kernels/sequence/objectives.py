"""What each method compares on whose sequences: the objectives of Wen et al., ACL 2023, eq. (4)-(11), and mixtures.

A method is a few halves; each says on which sequences (the teacher's samples y, the student's samples y′, the gold
targets, or the teacher's beam-search output ŷ) the step-wise loss is taken, which loss, and with what weight. Their sum
over steps, in expectation over the sequences, is the sequence-level divergence (kl, rkl, and js of the mixture made
step by step: Theorem 1a; engine plus the student's negative entropy is rkl) or an upper bound of it (tvd: 1b). No
gradient flows through sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..divergences import Divergence, SkewKL, SkewRKL
from ..own import resolve

SOURCES = ("teacher", "student", "gold", "beam")


class Half(NamedTuple):
    """``weight · Σ_t loss_t`` on the sequences of `source`; without a divergence the loss is −log q of their tokens."""

    source: str
    divergence: Divergence | None
    weight: float = 1.0


def _on(source: str, divergence: str | Divergence | None, weight: float = 1.0) -> Half:
    return Half(source, None if divergence is None else resolve(divergence), weight)


#: Each method's halves for a β, the weight of the student's half in the symmetric ones (the paper: ½).
METHODS: dict[str, Callable[[float], tuple[Half, ...]]] = {
    "seqkd": lambda beta: (_on("beam", None),),
    "kl": lambda beta: (_on("teacher", "kl"),),
    "engine": lambda beta: (_on("student", "engine"),),
    "rkl": lambda beta: (_on("student", "rkl"),),
    # on y only the p-half of the token-level js, on y′ only the q-half
    "js": lambda beta: (_on("teacher", SkewKL(0.5), 1 - beta), _on("student", SkewRKL(0.5), beta)),
    "tvd": lambda beta: (_on("teacher", "tvd", 1 - beta), _on("student", "tvd", beta)),
    "mle": lambda beta: (_on("gold", None),),
}


def method(name: str, beta: float = 0.5) -> tuple[Half, ...]:
    """The halves of a method by name; β in [0, 1]."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta!r}")
    return tuple(half for half in METHODS[name](beta) if half.weight)


def mixture(divergence: str | Divergence, **shares: float) -> tuple[Half, ...]:
    """A divergence on a mixture of sequences, as GKD does: ``mixture("js", student=0.7, gold=0.3)``.

    Args:
        divergence: any of the table, or an instance; the same on every source.
        shares: of `SOURCES`, each ≥ 0, at least one positive.
    """
    unknown = set(shares) - set(SOURCES)
    if unknown:
        raise ValueError(f"unknown sources {sorted(unknown)}; known: {', '.join(SOURCES)}")
    if not shares or min(shares.values()) < 0 or not any(shares.values()):
        raise ValueError(f"the shares must be at least 0 and one of them positive, not {shares}")
    return tuple(_on(source, divergence, share) for source, share in shares.items() if share)
