"""Fused f-divergence losses for language-model distillation."""

from .divergences import GJS, TABLE, Alpha, Divergence, FDivergence, SkewKL, SkewRKL
from .functional import cross_entropy, f_divergence, linear_cross_entropy, linear_f_divergence, log_sum_exp
from .modules import CrossEntropyLoss, FDivergenceLoss, LinearCrossEntropyLoss, LinearFDivergenceLoss
from .values import Head, Hidden, Logits, LossParts, LossTerms

__version__ = "0.2.0"

__all__ = [
    "GJS",
    "TABLE",
    "Alpha",
    "CrossEntropyLoss",
    "Divergence",
    "FDivergence",
    "FDivergenceLoss",
    "Head",
    "Hidden",
    "LinearCrossEntropyLoss",
    "LinearFDivergenceLoss",
    "Logits",
    "LossParts",
    "LossTerms",
    "SkewKL",
    "SkewRKL",
    "cross_entropy",
    "f_divergence",
    "linear_cross_entropy",
    "linear_f_divergence",
    "log_sum_exp",
]
