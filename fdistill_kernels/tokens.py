"""What every loss shares: terms checked and made numbers of each row, reductions, and gradients handed back."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .backends.rows import Targets, TokenTerms
from .carried import graph_is_kept, replaced
from .divergences import Divergence
from .values import LossParts, LossTerms, Metrics, SparseParts

#: Temperatures whose square and inverse float32 holds.
TEMPERATURES = (1e-18, 1e18)
IN_EVERY_TOKEN = "must be in [{:g}, {:g}] in every token".format(*TEMPERATURES)  # of what a compiler may make symbols
#: What may be a tensor of tokens, and the ends that numbers have.
PER_TOKEN = (("temperature", *TEMPERATURES), ("teacher_temperature", *TEMPERATURES),
             ("divergence_weight", -math.inf, math.inf))  # fmt: skip
NUMBERS = frozenset((type(None), bool, int, float, str))
UNKNOWN = (Tensor, *checks.SYMBOLS)
#: Of the vectors' dtypes.
ENDS = {dtype: torch.finfo(dtype) for dtype in (torch.float32, torch.float64)}


def checked_terms(terms: LossTerms, student: Tensor, vocabulary: int, labels_name: str = "labels") -> LossTerms:
    """The terms, which must fit the tokens of `student`, (..., V) logits or (..., D) hidden states; their numbers as
    floats, since NumPy's own wrap around or overflow early.
    """
    plain = _plain(terms)
    again = not torch.compiler.is_compiling() and NUMBERS.issuperset(map(type, plain))
    if others := (_plain_once if again else _checked_plain)(student.dtype, *plain):
        terms = replaced(terms, **others)
    if (terms.ce_weight or terms.z_loss) and terms.labels is None:
        raise ValueError("ce_weight and z_loss need labels")
    if isinstance(terms.divergence, Divergence) and terms.divergence.needs_labels and terms.labels is None:
        raise ValueError(f"{terms.divergence} needs labels")
    if (
        terms.divergence is not None
        and not terms.ce_weight
        and (terms.label_smoothing or terms.class_weight is not None)
    ):
        name = "label_smoothing" if terms.label_smoothing else "class_weight"
        raise ValueError(f"{name} is of the labels' cross-entropy: give ce_weight")
    if not again:
        for name, *_ in PER_TOKEN:
            if isinstance(value := getattr(terms, name), Tensor):
                checks.check_per_token(name, value, student)
    checks.check_class_weight(terms.class_weight, vocabulary, student.device)
    if terms.labels is not None:
        checks.check_labels(terms.labels, student, labels_name)
        # a graph asks of a mask, which no operator is given; `not` of a number would make a graph for each
        mask = False if terms.ce_weight or terms.z_loss else torch.compiler.is_compiling()
        if (mask and student.device.type == "cpu") or checks.readable(terms.labels):  # by name; the operator asks too
            labels = terms.labels.reshape(-1).long()
            backends.check_label_range(labels, labels != terms.ignore_index, vocabulary, labels_name)
    if terms.token_weight is not None:
        checks.check_tokens("token_weight", terms.token_weight, student)
    return terms


def check_settings(terms: LossTerms) -> None:
    """Raises ValueError or TypeError for numbers and words that no loss takes, of whatever dtype."""
    _checked_plain(torch.float64, *_plain(terms))


def _plain(terms: LossTerms) -> tuple[Any, ...]:
    return (terms.temperature_squared, terms.ce_weight, terms.label_smoothing, terms.z_loss, terms.ignore_index,
            terms.reduction, terms.temperature, terms.teacher_temperature, terms.divergence_weight)  # fmt: skip


def _checked_plain(
    dtype: torch.dtype, temperature_squared: object, ce_weight: Any, label_smoothing: Any, z_loss: Any,
    ignore_index: object, reduction: object, *per_token: Any,
) -> dict[str, float]:  # fmt: skip
    """The numbers that were no floats, as floats, and an index that was no int, by name. Weights are such as the
    arithmetic holds: an infinite one would be NaN where it meets 0, in a row that is masked out.
    """
    most = ENDS[torch.float64 if dtype == torch.float64 else torch.float32].max
    checks.check_flag("temperature_squared", temperature_squared)
    index = checks.check_integer("ignore_index", ignore_index)
    checks.check_reduction(reduction)
    given = [("ce_weight", -most, most, ce_weight), ("label_smoothing", 0, 1, label_smoothing),
             ("z_loss", 0, most, z_loss)]  # fmt: skip
    for of_token, value in zip(PER_TOKEN, per_token, strict=True):
        if not (isinstance(value, Tensor) or (value is None and of_token[0] == "teacher_temperature")):
            name, low, high = of_token
            given.append((name, max(low, -most), min(high, most), value))
    found = {name: checks.check_number(name, value, low, high) for name, low, high, value in given}
    if temperature_squared and "temperature" in found and "divergence_weight" in found:
        of_square = found["divergence_weight"] * found["temperature"] ** 2
        checks.check_number("divergence_weight·temperature², of temperature_squared,", of_square, -most, most)
    made = {name: found[name] for name, *_, value in given if found[name] is not value}
    return made if index is ignore_index else {**made, "ignore_index": index}


#: Numbers that fit once fit each step.
_plain_once = functools.lru_cache(maxsize=64, typed=True)(_checked_plain)


class Known(NamedTuple):
    """What is known of terms without asking a tensor.

    Attributes:
        every_row: no row_scale is 0.
        factors: of the parts of the divergence (0: there is none), the cross-entropy and lse².
    """

    every_row: bool
    factors: tuple[float, float, float]


class _Vectors:
    """Numbers of each row of a student. Equal ones share a vector, which is only read: each is a launch on a GPU."""

    def __init__(self, student: Tensor) -> None:
        self.dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.rows, self.device = math.prod(student.shape[:-1]), student.device
        self.compiling = torch.compiler.is_compiling()
        self.made: dict[float, Tensor] = {}

    def known(self, value: Any) -> bool:
        """Whether it is a number, and no compiler runs: in its graphs a float that changes each step is an input, and a
        symbol stands for the numbers of other batches.
        """
        return not (self.compiling or isinstance(value, UNKNOWN))

    def full(self, value: float) -> Tensor:
        """One number for all."""
        made = self.made.get(value)
        if made is None:
            fill = value if self.compiling else _within(value, self.dtype)
            made = self.made[value] = torch.full((self.rows,), fill, dtype=self.dtype, device=self.device)
        return made

    def of(self, value: float | Tensor) -> Tensor:
        """A number, or one a token; dense."""
        if self.known(value):
            return self.full(value)  # type: ignore[arg-type]
        if isinstance(value, Tensor) and value.dim():
            return value.to(self.dtype).reshape(-1).contiguous()
        return self.full(1.0) * value

    def twice(self, vector: Tensor) -> Tensor:
        """The same, for another field; a view inside compilers, which take no tensor twice."""
        return vector.view(-1) if self.compiling else vector

    def inverse(self, value: float | Tensor) -> Tensor:
        """1 over a number, or over one a token."""
        return self.of(1 / value) if self.known(value) else 1 / self.of(value)  # type: ignore[operator]

    def squared(self, weight: float | Tensor, t: float | Tensor) -> Tensor:
        """weight·t²."""
        both = self.known(weight) and self.known(t)
        return self.of(weight * t * t) if both else self.of(weight) * self.of(t) * self.of(t)


def token_terms(
    terms: LossTerms, student: Tensor, metrics: bool = False
) -> tuple[TokenTerms, int | Tensor, Known | None]:
    """The terms as numbers of each row, the number of tokens that count, and what is known of them outside compilers;
    checks what needs these: the denominator, and temperatures of tokens that count.
    """
    vectors, labels, mask = _Vectors(student), None, None
    tokens: int | Tensor = (vectors.full(1.0) > 0).sum() if vectors.compiling else vectors.rows
    if terms.labels is not None:
        labels = terms.labels.reshape(-1).long().contiguous()
        mask = labels != terms.ignore_index
        count = mask.sum()
        tokens = int(count) if checks.readable(count) else count
    masked = None if isinstance(tokens, int) and tokens == vectors.rows else mask
    row_scale, every_row = _row_scale(terms, vectors, masked, _denominator(terms, tokens, student))
    t, of_teacher = terms.temperature, terms.teacher_temperature
    for name, value in (("temperature", t), ("teacher_temperature", of_teacher)):
        if isinstance(value, Tensor):
            _check_temperatures(name, value, row_scale)
    divergence, class_weight, weight = divergence_of(terms), terms.class_weight, terms.divergence_weight
    needed = divergence is not None and divergence.needs_labels
    if class_weight is not None:
        class_weight = class_weight.to(vectors.dtype).contiguous()
        if labels is not None and terms.reduction == "mean" and terms.num_items is None:
            class_weight = class_weight * (tokens / sum_of_target_weights(class_weight, labels, mask))
    labels = labels if terms.ce_weight or terms.z_loss or metrics or needed else None
    of_student = vectors.inverse(t)
    of_rows = TokenTerms(
        row_scale=row_scale,
        student_inverse_temperature=of_student,
        # one temperature is in one place, which a kernel may ask
        teacher_inverse_temperature=vectors.twice(of_student) if of_teacher is None else vectors.inverse(of_teacher),
        divergence_scale=vectors.squared(weight, t) if terms.temperature_squared else vectors.of(weight),
        cross_entropy_scale=vectors.of(1.0 if labels is None else terms.ce_weight),  # without labels it is not read
        z_loss_scale=vectors.of(1.0 if labels is None else terms.z_loss),
        labels=labels,
        class_weight=class_weight,
        divergence=divergence.key if divergence is not None and divergence.kernel else divergence,
        label_smoothing=float(terms.label_smoothing),
        metrics=metrics,
    )
    may_weigh_nothing = divergence is None or isinstance(weight, Tensor) or (vectors.known(weight) and weight == 0)
    if labels is not None and (terms.z_loss or (terms.ce_weight and class_weight is None)):
        may_weigh_nothing = False
    if may_weigh_nothing and not metrics:
        of_rows, every_row = of_rows.without_metrics(), False
    if vectors.compiling:
        return of_rows, tokens, None
    of_labels = _within(terms.ce_weight, vectors.dtype), _within(terms.z_loss, vectors.dtype)
    return of_rows, tokens, Known(every_row, (float(divergence is not None), *of_labels))


def _check_temperatures(name: str, value: Tensor, row_scale: Tensor) -> None:
    """The values of a tensor of temperatures, of tokens that count; a GPU is not asked."""
    if checks.looked_at(value):
        low, high = TEMPERATURES
        value = value.double()  # float8 does not compare
        fits = (value >= low) & (value <= high)
        checks.require((fits.reshape(-1) | (row_scale == 0)).all(), f"{name} {IN_EVERY_TOKEN}")


def has_metrics(return_parts: bool | str, targets: Targets) -> bool:
    """Whether more of each row is wanted than its losses: beside a list always, if anything is."""
    return bool(return_parts) if targets.ids is not None else return_parts == "metrics"


def _row_scale(
    terms: LossTerms, vectors: _Vectors, mask: Tensor | None, denominator: float | Tensor
) -> tuple[Tensor, bool]:
    """What each row's loss is multiplied by, 0 where the mask is False; and whether none is known to be 0."""
    if terms.token_weight is None and vectors.known(denominator):
        each = 1 / denominator if denominator else math.inf
        row_scale, live = vectors.of(each), bool(each >= ENDS[vectors.dtype].tiny)
    else:
        share = vectors.full(1.0) if terms.token_weight is None else vectors.of(terms.token_weight)
        row_scale, live = share / denominator, False
    return (row_scale, live) if mask is None else (torch.where(mask, row_scale, 0), False)


def _within(value: Any, dtype: torch.dtype) -> float:
    """A number as a dtype holds it, infinite where it is beyond the dtype's range."""
    value = float(value)
    return value if abs(value) <= ENDS[dtype].max else math.copysign(math.inf, value)


def divergence_of(terms: LossTerms) -> Divergence | None:
    """The divergence of checked terms."""
    assert terms.divergence is None or isinstance(terms.divergence, Divergence)
    return terms.divergence


def _denominator(terms: LossTerms, tokens: int | Tensor, student: Tensor) -> float | Tensor:
    """What each token's loss is divided by."""
    if terms.num_items is not None:
        return checks.checked_items(terms.num_items, terms.reduction, tokens, student.device)
    if terms.reduction in ("sum", "none"):
        return 1.0
    if terms.reduction == "batchmean":
        return max(1, student.shape[0]) if student.dim() > 1 else 1
    return tokens if isinstance(tokens, Tensor) else max(1, tokens)  # of no tokens the mask leaves no row


def sum_of_target_weights(class_weight: Tensor, labels: Tensor, mask: Any) -> Tensor:
    """The denominator of a mean over the targets' class weights; 1 for targets that all weigh 0: they give 0."""
    known = labels.clamp(0, class_weight.shape[0] - 1)
    of_targets = torch.where(mask, class_weight[known], 0)
    return torch.where((of_targets == 0).all(), 1, of_targets.sum())


def of_parts(parts: Tensor, terms: TokenTerms, per_row: bool, known: Known | None = None) -> Tensor:
    """The loss of parts (3 or more, N), summed or of each row (N,)."""
    losses = parts[0] if known is None else _weighted(parts, known.factors)
    if known is None and terms.labels is not None:
        scales = terms.cross_entropy_scale, terms.z_loss_scale
        of_labels = (torch.where(s == 0, 0, s * part) for s, part in zip(scales, parts[1:3], strict=True))  # not 0·inf
        losses = losses + sum(of_labels)
    return losses.clone() if per_row else losses.sum()  # a view of the parts could not be changed in place


def _weighted(parts: Tensor, factors: tuple[float, ...]) -> Tensor:
    """The sum of the parts whose factor is not 0; of one part alone, whose factor is 1, a view."""
    first, *others = [i for i, factor in enumerate(factors) if factor] or [0]
    total = parts.select(0, first)
    if factors[first] != 1:
        total = total * factors[first]
    for i in others:
        total = total.add(parts.select(0, i), alpha=factors[i])
    return total


def reduced(
    loss: Tensor, parts: Tensor, terms: LossTerms, tokens: int | Tensor, student: Tensor, return_parts: bool | str
) -> Any:
    """The loss in its tokens' shape where each has its own; with its parts (3 or more, N), reduced like it, if asked
    for.
    """
    per_token = terms.reduction == "none"
    if per_token:
        loss = loss.reshape(student.shape[:-1])
    if not return_parts:
        return loss
    parts = parts.reshape(len(parts), *student.shape[:-1]) if per_token else parts.sum(1)
    if not isinstance(tokens, Tensor):
        tokens = torch.full((), tokens, dtype=torch.long, device=parts.device)
    z_loss = terms.z_loss * parts[2] if terms.z_loss else torch.zeros_like(parts[2])  # not 0·inf
    made_of = LossParts(parts[0], parts[1], z_loss, tokens)
    if len(parts) == len(SparseParts._fields) - 1:
        return loss, SparseParts(*made_of, *parts[3:])
    return loss, Metrics(*made_of, *parts[3:]) if return_parts == "metrics" else made_of


def number(factor: Tensor) -> float | None:
    """The one number that a tensor holds, where it may be asked for."""
    return factor.item() if checks.readable(factor) and factor.numel() == 1 else None


def is_power_of_two(factor: Tensor) -> bool:
    """Whether to multiply by it rounds nothing."""
    one = number(factor)
    if one is not None:
        return one == 0 or abs(math.frexp(one)[0]) == 0.5
    return bool(((torch.frexp(factor).mantissa.abs() == 0.5) | (factor == 0)).all())


def once(upstream: Tensor) -> Tensor:
    """The upstream gradient, without a graph.

    Raises:
        RuntimeError: create_graph=True; a graph that lacked this loss would be differentiated without a word.
        NotImplementedError: many gradients at once.
    """
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            raise RuntimeError("the fused losses have no second derivative (double backward, create_graph=True)")
        functorch = torch._C._functorch
        if functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream):
            raise NotImplementedError("the fused losses take one upstream gradient at a time: no is_grads_batched, "
                                      "vectorize or vmap of their backward pass")  # fmt: skip
    return upstream.detach()


def scaled(gradient: Tensor, factor: Tensor, row_scale: Tensor | None) -> Tensor:
    """gradient·factor, in place unless the graph is kept, to make no second N×V; nothing is done for a factor of 1.

    gradient: (outer, inner, V); factor: a number or (outer·inner,); row_scale: (outer·inner,), where it is 0 the row's
    zeros stay, whatever comes for them (None: it is nowhere).
    """
    kept, value = torch.compiler.is_compiling() or graph_is_kept(), number(factor)
    if value == 1 and not kept:
        return gradient
    card = gradient.is_cuda and not checks.imagined(gradient)  # a recorded graph would lack the kernel
    if not kept and card and backends.triton.why_not(gradient.device, gradient.dtype, None) is None:
        backends.triton.scale_(gradient, factor, row_scale)
        torch.autograd.graph.increment_version(gradient)  # as mul_ does: a second backward must not see it
        return gradient
    if row_scale is not None and value != 1:
        factor = torch.where(row_scale == 0, 1, factor)
    factor = factor.view(1, 1, 1) if factor.dim() == 0 else factor.view(*gradient.shape[:2], 1)
    if kept:
        return (gradient * factor).to(gradient.dtype)
    if value is None and checks.readable(factor) and bool((factor == 1).all()):
        return gradient
    return gradient.mul_(factor)
