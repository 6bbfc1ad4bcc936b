"""An nn.Module for each loss function."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .backends import BACKENDS
from .checks import check_choice, check_number, check_reduction
from .divergences import Divergence
from .functional import cross_entropy, f_divergence, linear_cross_entropy, linear_f_divergence
from .own import resolve
from .sparse import TopK
from .tokens import TEMPERATURES
from .values import Head, Hidden, Logits, RowFunction

#: Settings that no batch decides are checked at once.
CHECKED: dict[str, Callable[[Any], Any]] = {
    "reduction": check_reduction,
    "backend": functools.partial(check_choice, "backend", choices=("auto", *BACKENDS)),
    "temperature": functools.partial(check_number, "temperature", low=TEMPERATURES[0], high=TEMPERATURES[1]),
}


class _Loss(nn.Module):
    """A loss function with fixed settings, arguments of its; `printed` stands before them where it is shown."""

    printed = ""

    def __init__(self, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        super().__init__()
        known, of_batch = inspect.signature(function).parameters, inspect.signature(self.forward).parameters
        for name in settings:
            if name in of_batch:
                raise TypeError(f"{name} is given with each batch, not to {type(self).__name__}")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{function.__name__} has no argument {name!r}{hint}")
            if name in CHECKED and not isinstance(settings[name], Tensor):
                CHECKED[name](settings[name])
        self.settings = settings

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return ", ".join([*filter(None, [self.printed]), *(f"{k}={v}" for k, v in self.settings.items())])


class FDivergenceLoss(_Loss):
    """`f_divergence` as a module with fixed settings.

    Args:
        divergence: as in `f_divergence`, without `LossTerms`; checked here.
        **settings: keyword arguments of `f_divergence` that are the same for every batch.
    """

    def __init__(self, divergence: str | Divergence | Callable[[Tensor], Tensor] = "js", **settings: Any) -> None:
        super().__init__(f_divergence, settings)
        self.divergence = resolve(divergence)
        self.printed = str(self.divergence)

    def forward(
        self, student_logits: Tensor | Logits, teacher_logits: Tensor | Logits | TopK, labels: Tensor | None = None,
        **batch: Any,
    ) -> Any:  # fmt: skip
        """The loss of both models' logits (..., V); `batch`: more keyword arguments of `f_divergence`."""
        return f_divergence(
            student_logits, teacher_logits, self.divergence, labels=labels, **{**self.settings, **batch}
        )


class CrossEntropyLoss(_Loss):
    """`cross_entropy` as a module with fixed settings: a fused `torch.nn.CrossEntropyLoss`.

    Args:
        weight: (C) factor on each class, kept as a buffer.
        **settings: other keyword arguments of `cross_entropy` that are the same for every batch.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **settings: Any) -> None:
        super().__init__(cross_entropy, settings)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor | Logits, target: Tensor, **batch: Any) -> Any:
        """The loss of logits (N, C, ...) and a target; `batch`: more keyword arguments of `cross_entropy`."""
        return cross_entropy(input, target, **{"weight": self.weight, **self.settings, **batch})


class LinearFDivergenceLoss(_Loss):
    """`linear_f_divergence` as a module with fixed settings.

    Args:
        divergence: as in `linear_f_divergence`, without `LossTerms`; checked here.
        **settings: keyword arguments of `linear_f_divergence` that are the same for every batch.
    """

    def __init__(self, divergence: str | Divergence | Callable[[Tensor], Tensor] = "js", **settings: Any) -> None:
        super().__init__(linear_f_divergence, settings)
        self.divergence = resolve(divergence)
        self.printed = str(self.divergence)

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


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` as a module with fixed settings.

    Args:
        weight: (V) factor on each class, kept as a buffer.
        **settings: other keyword arguments of `linear_cross_entropy` that are the same for every batch.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **settings: Any) -> None:
        super().__init__(linear_cross_entropy, settings)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, linear_weight: Tensor | Head, target: Tensor, **batch: Any) -> Any:
        """The loss of hidden states (..., D), a head (V, D) and a target; `batch`: more keyword arguments."""
        return linear_cross_entropy(input, linear_weight, target, **{"weight": self.weight, **self.settings, **batch})
