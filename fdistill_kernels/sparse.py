"""A teacher that is known at only a few ids per token: the value, and the checks of it before a kernel starts."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends.rows import LISTS, Targets
from .divergences import Divergence
from .tokens import TEMPERATURES
from .values import LossTerms

#: What becomes of the teacher's mass outside the ids.
TAILS = ("bucket", "uniform", "renormalize", "within", "ignore", "sampled")
#: Tails whose teacher is a whole distribution, which any temperature makes another of.
WHOLE = ("uniform", "renormalize", "within")


def checked_tail(tail: str) -> str:
    """A tail of lists that are no samples."""
    checks.check_choice("tail", tail, [t for t in TAILS if t != "sampled"])
    return tail


class TopK(NamedTuple):
    """A teacher given by its log-probabilities at K ids of each token, instead of logits: a top-k list, or a sample.

    With the row's ids S, teacher p and student q, the loss of a divergence ``Σ_v φ(p_v, q_v)`` depends on `tail`:

        "bucket"       ``Σ_S φ(p, q) + φ(1 − Σ_S p, 1 − Σ_S q)``: the rest is one more category. A divergence of two
                       distributions: never negative, and for f-divergences not larger than that of the logits.
        "uniform"      ``Σ_v φ(p̃, q)``, with p̃ = p on S and (1 − Σ_S p)/(V − |S|) elsewhere.
        "renormalize"  ``Σ_v φ(p̃, q)``, with p̃ = p/Σ_S p on S and 0 elsewhere; infinite if f(0) = ∞, as for rkl.
        "within"       ``Σ_S φ(p/Σ_S p, q/Σ_S q)``: both models' conditional distributions, given S; 0 with no gradient
                       where one of them is 0 on all of S, of which there is none.
        "ignore"       ``Σ_S φ(p, q)``, the sum of `reference.py`'s formula over S alone. Not a divergence: it can be
                       negative, and a warning says so.
        "sampled"      ``Σ_S w φ(p, q)`` with importance weights. For ids drawn n times from π, w = count/(n π) makes
                       value and gradient unbiased (random sampling KD, arXiv 2503.16870, for kl with π = p).

    If the rest of the teacher is so small that the rounding of its log-probabilities hides it, it counts as what the
    rounding can hide, not as 0: the loss of rkl is then large instead of infinite. If the student is 0 outside the list
    as well, it counts as 0.

    If S is the whole vocabulary, every tail except "sampled" gives the loss of the teacher's logits.

    Attributes:
        ids: (..., K) integers in [0, V), in any order, different within a row; −1 pads shorter lists. K may exceed V.
        log_probs: (..., K) ``log p`` at the ids, 16, 32 or 64 bits: normalised over the vocabulary, not over the list;
            −inf where p is 0; ignored at padding. A row whose mass is above 1, up to 1.05, is scaled to 1.
        tail: as above.
        weights: (..., K) w ≥ 0, only for "sampled".
        temperature: T at which log_probs were taken. "bucket", "ignore" and "sampled" need teacher_temperature = T; the
            others allow any.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    weights: Tensor | None = None
    temperature: float = 1.0


torch.serialization.add_safe_globals([TopK])  # for torch.load(weights_only=True)

#: What pads a list.
NOTHING = {"ids": -1, "log_probs": -math.inf, "weights": 0.0}


def targets_of(teacher: TopK, student: Tensor, terms: LossTerms, name: str) -> Targets:
    """A teacher's list as rows, its shapes and settings checked; student: logits (..., V) or hidden states (..., D)."""
    given = {n: getattr(teacher, n) for n in LISTS if n != "weights" or teacher.weights is not None}
    for field, value in given.items():
        checks.check_tensor(f"{name}.{field}", value, floating=field != "ids")
        checks.check_constant(f"{name}.{field}", value)
        if value.dim() < 1 or value.shape[:-1] != student.shape[:-1] or value.device != student.device:
            raise ValueError(f"{name}.{field} must have shape {(*student.shape[:-1], 'K')} on {student.device}, not "
                             f"{tuple(value.shape)} on {value.device}")  # fmt: skip
        if value.shape != teacher.ids.shape:
            raise ValueError(f"{name}.{field} must have the shape of ids, {tuple(teacher.ids.shape)}, not "
                             f"{tuple(value.shape)}")  # fmt: skip
    if teacher.ids.dtype not in checks.INTEGERS:
        raise TypeError(f"{name}.ids must be integers, not {teacher.ids.dtype}")
    _check_settings(teacher, terms, name)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = math.prod(student.shape[:-1]), teacher.ids.shape[-1]
    rows = {n: x.detach().reshape(shape).to(torch.int64 if n == "ids" else wide).contiguous() for n, x in given.items()}
    if not shape[1]:  # a list of nothing, in a column of padding
        rows = {n: torch.nn.functional.pad(x, (0, 1), value=NOTHING[n]) for n, x in rows.items()}
    rounding = max(torch.finfo(x).eps for x in (teacher.log_probs.dtype, wide)) / 2
    return Targets(**rows, tail=teacher.tail, temperature=float(teacher.temperature), rounding=rounding)


def _check_settings(teacher: TopK, terms: LossTerms, name: str) -> None:
    tail, divergence = teacher.tail, terms.divergence
    checks.check_choice(f"{name}.tail", tail, TAILS)
    if (tail == "sampled") != (teacher.weights is not None):
        raise ValueError(f"{name}.weights are importance weights, of tail='sampled', which needs them; not of {tail!r}")
    assert isinstance(divergence, Divergence)
    if terms.class_weight is not None:
        raise ValueError(f"class_weight goes with logits of both models, and not with {name}, a list")
    if tail == "sampled" and divergence.statistics is not None:
        raise ValueError(f"{divergence} is no sum of entries' own terms, which importance weights would be of")
    temperature = checks.check_number(f"{name}.temperature", teacher.temperature, *TEMPERATURES)
    asked = terms.temperature if terms.teacher_temperature is None else terms.teacher_temperature
    if tail not in WHOLE and (isinstance(asked, Tensor) or asked != temperature):
        what = "a tensor" if isinstance(asked, Tensor) else f"{float(asked):g}"
        raise ValueError(
            f"teacher_temperature is {what}, but {name}.log_probs were taken at {temperature:g}, and without "
            f"the rest of its logits no other can be had of them with tail={tail!r}: give teacher_temperature="
            f"{temperature:g}, or one of the tails {', '.join(WHOLE)}"
        )
    if tail == "ignore" and not torch.compiler.is_compiling():
        warnings.warn(
            "tail='ignore' sums over the ids alone: no divergence, it may be negative; 'bucket' is one", stacklevel=4
        )
