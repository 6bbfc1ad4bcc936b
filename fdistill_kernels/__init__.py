"""Fused f-divergence losses for language-model distillation."""

from typing import TYPE_CHECKING, Any

from .divergences import (
    AB,
    AKL,
    CSD,
    DKD,
    GJS,
    LK,
    TABLE,
    Alpha,
    Divergence,
    EntropyGated,
    Renyi,
    SkewKL,
    SkewRKL,
    TailAware,
    ToDi,
)
from .functional import cross_entropy, f_divergence, linear_cross_entropy, linear_f_divergence, log_probs, log_sum_exp
from .lists import sample_of, top_k_of
from .modules import CrossEntropyLoss, FDivergenceLoss, LinearCrossEntropyLoss, LinearFDivergenceLoss
from .own import FDivergence
from .parallel import VocabShard, vocab_shard
from .sparse import TopK
from .values import Head, Hidden, Logits, LossParts, LossTerms, Metrics, SparseParts

if TYPE_CHECKING:
    from .teachers import Endpoint as Endpoint
    from .teachers import TeacherStore as TeacherStore

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """The teachers elsewhere, whose libraries the core does not need."""
    if name in ("TeacherStore", "Endpoint"):
        try:
            from . import teachers
        except ImportError as error:
            from .provenance import install

            extra = "sequence" if name == "TeacherStore" else "served"
            raise ImportError(f"{name} needs the package {error.name}: {install(extra)}") from error
        return getattr(teachers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


#: Without what needs an extra, so that a star import does not.
__all__ = [
    "AB",
    "AKL",
    "CSD",
    "DKD",
    "GJS",
    "LK",
    "TABLE",
    "Alpha",
    "CrossEntropyLoss",
    "Divergence",
    "EntropyGated",
    "FDivergence",
    "FDivergenceLoss",
    "Head",
    "Hidden",
    "LinearCrossEntropyLoss",
    "LinearFDivergenceLoss",
    "Logits",
    "LossParts",
    "LossTerms",
    "Metrics",
    "Renyi",
    "SkewKL",
    "SkewRKL",
    "SparseParts",
    "TailAware",
    "ToDi",
    "TopK",
    "VocabShard",
    "cross_entropy",
    "f_divergence",
    "linear_cross_entropy",
    "linear_f_divergence",
    "log_probs",
    "log_sum_exp",
    "sample_of",
    "top_k_of",
    "vocab_shard",
]
