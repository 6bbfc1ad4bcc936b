"""An nn.Module for each loss function."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .backends import check_backend
from .backends.rows import Teacher
from .checks import (
    check_constant,
    check_denominator,
    check_deprecated,
    check_flag,
    check_integer,
    check_parts,
    check_tensor,
    own_number,
)
from .divergences import Divergence
from .functional import cross_entropy, f_divergence, linear_cross_entropy, linear_f_divergence
from .heads import checked_cap, checked_scale, path_of
from .own import resolve
from .parallel import check_shard
from .sparse import TopK
from .tokens import check_settings
from .values import Head, Hidden, Logits, LossTerms, RowFunction

#: How the losses check what no batch decides, by the argument's name.
CHECKED: dict[str, Callable[[str, Any], object]] = {
    "size_average": lambda _, x: check_deprecated(x), "reduce": lambda _, x: check_deprecated(x),
    "num_items": lambda _, x: isinstance(x, Tensor) or check_denominator(x),
    "backend": lambda _, x: check_backend(x), "return_parts": lambda _, x: check_parts(x), "inplace": check_flag,
    "vocab_size": lambda name, x: check_integer(name, x, 1),
    "token_weight": lambda name, x: check_tensor(name, x, floating=False),
    **dict.fromkeys(("student_bias", "teacher_bias", "linear_bias"), check_tensor),
    **dict.fromkeys(("shard", "teacher_shard"), check_shard),
    **dict.fromkeys(("logit_scale", "teacher_logit_scale"), checked_scale),
    **dict.fromkeys(("logit_softcap", "teacher_logit_softcap"), checked_cap),
    **dict.fromkeys(("memory", "skip_tiles", "chunk_bytes"), lambda name, x: path_of(**{**PATH, name: x})),
}  # fmt: skip
PATH: dict[str, Any] = {"memory": "chunks", "skip_tiles": True, "chunk_bytes": None, "teacher": Teacher()}


def checked_setting(argument: inspect.Parameter, value: Any) -> Any:
    """The value, a number as Python's own: compilers take NumPy's for arrays.

    Raises what the function would raise for its argument's value; the shape of a tensor is the batch's.
    """
    if value is None and "None" in argument.annotation:
        return None
    if argument.name in CHECKED:
        CHECKED[argument.name](argument.name, value)
    else:
        check_settings(LossTerms(None, **{argument.name: value}))
    return own_number(value)


def _setting(argument: inspect.Parameter) -> property:
    """An argument of the function as an attribute, which can be changed."""

    def change(loss: _Loss, value: Any) -> None:
        # a new dictionary: a shallow copy keeps its own
        loss.settings = {**loss.settings, argument.name: checked_setting(argument, value)}

    return property(lambda loss: loss.settings.get(argument.name, argument.default), change)


def _checked_weight(weight: Tensor | None) -> Tensor | None:
    """Class weights, if they are such as no loss would refuse; on the meta device they have no values yet."""
    if weight is not None and not (isinstance(weight, Tensor) and weight.is_meta):
        check_tensor("weight", weight)
        check_constant("weight", weight)
    return weight


class _Loss(nn.Module):
    """A loss function with fixed settings, arguments of its, which are attributes, too."""

    arguments: Mapping[str, inspect.Parameter]

    def __init_subclass__(cls, function: Callable[..., Any] | None = None, **of_others: Any) -> None:
        super().__init_subclass__(**of_others)
        if function is not None:
            cls.arguments = inspect.signature(function).parameters
            for name, argument in cls.arguments.items():
                if name not in (*inspect.signature(cls.forward).parameters, "divergence", "weight"):
                    setattr(cls, name, _setting(argument))

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        of_batch = inspect.signature(self.forward).parameters
        self.settings: dict[str, Any] = {}
        for name, value in settings.items():
            if name in of_batch:
                raise TypeError(f"{name} is given with each batch, not to {type(self).__name__}")
            if name not in self.arguments:
                near = difflib.get_close_matches(name, self.arguments, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{type(self).__name__} has no argument {name!r}{hint}")
            self.settings[name] = checked_setting(self.arguments[name], value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `to` and `half` do: tensors among the settings move as buffers do, but for others' parameters."""
        moved = {n: fn(x) for n, x in self.settings.items() if isinstance(x, Tensor) and not x.requires_grad}
        self.settings = {**self.settings, **moved}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The divergence and the settings, for printing."""
        divergence = [str(self.divergence)] if "divergence" in self.arguments else []
        return ", ".join([*divergence, *(f"{k}={v}" for k, v in self.settings.items())])


class FDivergenceLoss(_Loss, function=f_divergence):
    """`f_divergence` as a module with fixed settings.

    Args:
        divergence: as in `f_divergence`, without `LossTerms`; checked here.
        **settings: keyword arguments of `f_divergence`, the same for every batch; attributes, which may change.
    """

    def __init__(self, divergence: str | Divergence | Callable[[Tensor], Tensor] = "js", **settings: Any) -> None:
        super().__init__(settings)
        self.divergence = resolve(divergence)

    def forward(
        self, student_logits: Tensor | Logits, teacher_logits: Tensor | Logits | TopK, labels: Tensor | None = None,
        **batch: Any,
    ) -> Any:  # fmt: skip
        """The loss of both models' logits (..., V); `batch`: more keyword arguments of `f_divergence`."""
        return f_divergence(
            student_logits, teacher_logits, self.divergence, labels=labels, **{**self.settings, **batch}
        )


class CrossEntropyLoss(_Loss, function=cross_entropy):
    """`cross_entropy` as a module with fixed settings: a fused `torch.nn.CrossEntropyLoss`.

    Args:
        weight: (C) factor on each class, kept as a buffer.
        **settings: others of `cross_entropy`, the same for every batch; attributes, which may change.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **settings: Any) -> None:
        super().__init__(settings)
        self.register_buffer("weight", _checked_weight(weight))

    def forward(self, input: Tensor | Logits, target: Tensor, **batch: Any) -> Any:
        """The loss of logits (N, C, ...) and a target; `batch`: more keyword arguments of `cross_entropy`."""
        return cross_entropy(input, target, **{"weight": self.weight, **self.settings, **batch})


class LinearFDivergenceLoss(_Loss, function=linear_f_divergence):
    """`linear_f_divergence` as a module with fixed settings.

    Args:
        divergence: as in `linear_f_divergence`, without `LossTerms`; checked here.
        **settings: keyword arguments of `linear_f_divergence`, the same for every batch; attributes, which may change.
    """

    def __init__(self, divergence: str | Divergence | Callable[[Tensor], Tensor] = "js", **settings: Any) -> None:
        super().__init__(settings)
        self.divergence = resolve(divergence)

    def forward(
        self, student_hidden: Tensor, student_weight: Tensor | Head,
        teacher_hidden: Tensor | Hidden | Logits | TopK | RowFunction, teacher_weight: Tensor | Head | None = None,
        labels: Tensor | None = None, **batch: Any,
    ) -> Any:  # fmt: skip
        """The loss of both models' hidden states (..., D) and heads (V, D); `batch`: more keyword arguments."""
        return linear_f_divergence(
            student_hidden, student_weight, teacher_hidden, teacher_weight, self.divergence, labels=labels,
            **{**self.settings, **batch},
        )  # fmt: skip


class LinearCrossEntropyLoss(_Loss, function=linear_cross_entropy):
    """`linear_cross_entropy` as a module with fixed settings.

    Args:
        weight: (V) factor on each class, kept as a buffer.
        **settings: others of `linear_cross_entropy`, the same for every batch; attributes, which may change.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **settings: Any) -> None:
        super().__init__(settings)
        self.register_buffer("weight", _checked_weight(weight))

    def forward(self, input: Tensor, linear_weight: Tensor | Head, target: Tensor, **batch: Any) -> Any:
        """The loss of hidden states (..., D), a head (V, D) and a target; `batch`: more keyword arguments."""
        return linear_cross_entropy(input, linear_weight, target, **{"weight": self.weight, **self.settings, **batch})
