"""Fused f-divergence losses for language-model distillation."""

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
from .modules import CrossEntropyLoss, FDivergenceLoss, LinearCrossEntropyLoss, LinearFDivergenceLoss
from .own import FDivergence
from .values import Head, Hidden, Logits, LossParts, LossTerms, Metrics

__version__ = "0.2.0"

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
    "TailAware",
    "ToDi",
    "cross_entropy",
    "f_divergence",
    "linear_cross_entropy",
    "linear_f_divergence",
    "log_probs",
    "log_sum_exp",
]
