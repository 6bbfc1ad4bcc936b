"""The objectives of Wen et al., ACL 2023, eq. (4)-(11), and mixtures: what is compared, and on whose sequences.

A method consists of a few halves. Each gives the sequences (the teacher's samples y, the student's samples y′, the gold
targets, or the teacher's beam-search output ŷ), the step-wise loss on them, and its weight. The sum over steps, in
expectation over the sequences, is the sequence-level divergence (kl, rkl, and js with a step-wise mixture: Theorem 1a;
engine plus the student's negative entropy is rkl) or an upper bound of it (tvd: Theorem 1b). No gradient flows through
sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..checks import check_number
from ..divergences import Divergence, SkewKL, SkewRKL
from ..own import resolve

SOURCES = ("teacher", "student", "gold", "beam")


class Half(NamedTuple):
    """``weight · Σ_t loss_t`` on the sequences of `source`. Without a divergence the loss is −log q of their tokens."""

    source: str
    divergence: Divergence | None
    weight: float = 1.0
    ce_weight: float = 0.0  # of −log q of the tokens, which is added to a divergence

    @property
    def labelled(self) -> bool:
        """Whether it has a cross-entropy to tokens."""
        return self.divergence is None or self.ce_weight > 0


def _on(source: str, divergence: str | Divergence | None, weight: float = 1.0) -> Half:
    return Half(source, None if divergence is None else resolve(divergence), weight)


#: Each method's halves for a β, the weight of the student's half in js and tvd (½ in the paper). js uses the mixture
#: m = βq + (1 − β)p, as the authors' code does: (1 − β) KL(p‖m) + β KL(q‖m).
METHODS: dict[str, Callable[[float], tuple[Half, ...]]] = {
    "seqkd": lambda beta: (_on("beam", None),),
    "kl": lambda beta: (_on("teacher", "kl"),),
    "engine": lambda beta: (_on("student", "engine"),),
    "rkl": lambda beta: (_on("student", "rkl"),),
    # on y only the p-half of the token-level js, on y′ only the q-half
    "js": lambda beta: (_on("teacher", SkewKL(1 - beta), 1 - beta), _on("student", SkewRKL(beta), beta)),
    "tvd": lambda beta: (_on("teacher", "tvd", 1 - beta), _on("student", "tvd", beta)),
    "mle": lambda beta: (_on("gold", None),),
}


def method(name: str, beta: float = 0.5) -> tuple[Half, ...]:
    """The halves of a method of `METHODS`; beta is in [0, 1] for tvd, in (0, 1) for js, and of no other method."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    check_number("beta", beta, 0, 1)
    if beta != 0.5 and name not in ("js", "tvd"):
        raise ValueError(f"beta is the weight of the student's half in js and tvd, and {name} has none")
    if name == "js" and beta in (0, 1):
        raise ValueError(
            f"js is 0 at beta={beta:g}, where one model is the mixture: take method {'kl' if beta else 'rkl'}"
        )
    return tuple(half for half in METHODS[name](beta) if half.weight)


def mixture(divergence: str | Divergence | Mapping[str, str | Divergence], **shares: float) -> tuple[Half, ...]:
    """A divergence on a mixture of sequences, as in GKD: ``mixture("js", student=0.7, gold=0.3)``.

    Or one for each source, as in DistiLLM-2: ``mixture({"teacher": "skew_kl=0.1", "student": "skew_rkl=0.1"})``.

    Args:
        divergence: a name of the table or an instance, for all sources; or a mapping with one for each.
        shares: weights of `SOURCES`, each ≥ 0, at least one positive. Default: gold alone, or, for divergences by
            source, equal weights that sum to 1.

    Raises:
        ValueError: an unknown source; shares that are negative, not finite, all 0, or of other sources than the
            divergences.
    """
    of = dict(divergence) if isinstance(divergence, Mapping) else dict.fromkeys(shares or ("gold",), divergence)
    shares = shares or {source: 1 / len(of) for source in of}
    unknown = {*of, *shares} - set(SOURCES)
    if unknown:
        raise ValueError(f"unknown sources {sorted(unknown)}; known: {', '.join(SOURCES)}")
    if not shares or not any(shares.values()) or not all(0 <= share < math.inf for share in shares.values()):
        raise ValueError(f"the shares must be finite and at least 0 and one of them positive, not {shares}")
    if set(of) != set(shares):
        raise ValueError(f"divergences of {', '.join(of)}, and shares of {', '.join(shares)}")
    return tuple(_on(source, of[source], share) for source, share in shares.items() if share)


def with_cross_entropy(halves: tuple[Half, ...], weight: float) -> tuple[Half, ...]:
    """The halves, with −log q of the gold targets, which they must not have yet, added with a weight."""
    check_number("ce_weight", weight, 0)
    if not weight:
        return halves
    gold = [half for half in halves if half.source == "gold"]
    if any(half.divergence is None for half in gold):
        raise ValueError("ce_weight is of the cross-entropy on gold targets, which the objective has already")
    beside = [half._replace(ce_weight=weight) if half in gold else half for half in halves]
    return (*beside, *([] if gold else [Half("gold", None, weight)]))


def sources_of(halves: tuple[Half, ...]) -> list[str]:
    """The sources of an objective's sequences; of pre-distillation, which has no halves, gold targets."""
    return list(dict.fromkeys(half.source for half in halves)) or ["gold"]


def compared_sources(halves: tuple[Half, ...]) -> list[str]:
    """The sources whose sequences the teacher is asked about, of those that data have."""
    return [h.source for h in halves if h.divergence is not None and h.source != "student"]
