"""`linear_cross_entropy` inside Hugging Face models and `Trainer`, for any model with an output embedding.

A patched model runs its own forward and loss function on deferred logits. So the shift of labels, changes of the logits
and auxiliary terms stay the model's.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_classes, check_flag, check_integer
from ..deferred import Deferral, Logits, active, is_plain, output_embedding, unwatch, watch
from ..functional import cross_entropy, linear_cross_entropy
from ..modules import checked_setting

IGNORE = -100
#: Of `linear_cross_entropy`, what the model's own forward and loss function say.
THEIRS = {"input", "linear_weight", "target", "linear_bias", "logit_scale", "logit_softcap", "weight", "reduction",
          "num_items", "vocab_size", "return_parts"}  # fmt: skip

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The arguments of `patch_model`; whole: the logits are made as without it, since this model's loss needs them."""

    keep_logits: bool
    keywords: dict[str, Any]
    whole: bool = False


def patch_model(model: Any, *, keep_logits: bool = False, **keywords: Any) -> Any:
    """Lets `linear_cross_entropy` compute the ``loss`` of a language model, so that the N×V logits are not made.

    In training with `labels`, the output has the loss, and None as logits; in evaluation it has both. Without labels
    nothing changes. If the model does something to its logits that the fused loss does not support, it makes them as
    before: the loss is the same, and a warning gives the reason; label_smoothing, z_loss and ignore_index are refused
    then. Copies and pickles are patched too. `undo_patch` undoes this; patching again replaces the keywords.

    Args:
        model: a Hugging Face model with labels whose output embedding is one plain weight; or a PEFT model of one.
        keep_logits: also make the logits in training, without gradients, for a trainer that reads them.
        **keywords: of `linear_cross_entropy`: label_smoothing, z_loss, memory, chunk_bytes, ... They override what the
            model's loss function says; targets of `ignore_index` are masked in addition to its own.

    Returns:
        The same model.

    Raises:
        TypeError: the output embedding is not a plain linear layer (LoRA, quantised); the forward takes no labels; a
            keyword is unknown, or of another type.
        ValueError: there is no output embedding, or a keyword's value is one that the loss does not take.
    """
    arguments = inspect.signature(linear_cross_entropy).parameters
    known = arguments.keys() - THEIRS
    for name in keywords.keys() - known:
        raise TypeError(f"{name} is not among what patch_model takes: {', '.join(sorted(known))}")
    check_flag("keep_logits", keep_logits)
    keywords = {name: checked_setting(arguments[name], value) for name, value in keywords.items()}
    base = _base_model(model)
    head = output_embedding(base)
    if not is_plain(head):
        raise TypeError(_not_plain(head))
    watch(head)
    if not issubclass(type(base), _Patched):
        base.__class__ = _patched_class(type(base))  # type: ignore[arg-type]
        own = {name: vars(base).pop(name) for name in ("forward", "_original_forward") if name in vars(base)}
        if own:  # set on the instance, such as by accelerate: it stays inside
            base._set_aside = own
    base._fused_loss = FusedLoss(keep_logits, keywords)
    return model


def undo_patch(model: Any) -> Any:
    """Undoes `patch_model`, and removes what has wrapped the model's `forward` since then. Returns the model."""
    base = _base_model(model)
    if vars(base).pop("_fused_loss", None) is not None:
        unwatch(output_embedding(base))
        base.__class__ = _PATCHED.get(type(base), type(base))
        vars(base).pop("forward", None)
        vars(base).update(vars(base).pop("_set_aside", {}))
    return model


def _base_model(model: Any) -> Any:
    """The model inside PEFT's, whose tuners call its forward without calling the module."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _not_plain(head: Any) -> str:
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    return f"the output embedding, {name}, is LoRA or quantised or has a forward of its own: it is not one plain weight"


class _Patched:
    """Base of the classes that `_patched_class` makes."""


#: Classes made by `_patched_class`, and what they were made from.
_PATCHED: dict[type, type] = {}


@functools.cache
def _patched_class(base: Any) -> Any:
    """A subclass whose forward has the fused loss, with the same names, signature and pickles otherwise."""
    own = base.forward
    signature = inspect.signature(own)
    if "labels" not in signature.parameters:
        raise TypeError(f"{base.__name__}'s forward takes no labels, so it has no loss")
    at = list(signature.parameters).index("labels") - 1

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        fused, aside = getattr(self, "_fused_loss", None), getattr(self, "_set_aside", {})
        call = aside["forward"] if "forward" in aside else functools.partial(own, self)
        labels = args[at] if len(args) > at else inputs.get("labels")
        if fused is None or fused.whole or labels is None:
            return call(*args, **inputs)
        return _with_fused_loss(self, fused, call, args, inputs)

    def reduce(self: Any, protocol: Any) -> Any:
        if type(self) is not patched:
            return super(patched, self).__reduce_ex__(protocol)
        return _new, (base,), super(patched, self).__reduce_ex__(protocol)[2]

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    names = dict(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    methods = dict(forward=forward, __reduce_ex__=reduce)
    patched: Any = type(base)(base.__name__, (base, _Patched), {**names, **methods})
    _PATCHED[patched] = base
    return patched


def _new(base: type) -> Any:
    """An empty patched instance, for pickles and copies."""
    made = _patched_class(base)
    return made.__new__(made)


def _with_fused_loss(
    model: Any, fused: FusedLoss, call: Callable[..., Any], args: tuple[Any, ...], inputs: dict[str, Any]
) -> Any:
    head, outer = model.get_output_embeddings(), active()
    if outer is not None and outer.head is head:  # whoever defers these logits says what becomes of them
        return call(*args, **inputs)
    if not torch.compiler.is_compiling():
        watch(head)  # one that was put in its place after patching

    def finished(logits: Logits) -> Tensor | None:
        if not model.training:
            return logits.tensor()
        deferral.trained = False  # these are only read
        return logits.tensor().detach() if fused.keep_logits else None

    outputs, reason = None, "an autograd.Function"
    with Deferral(head, fused.keywords) as deferral:
        outputs = call(*args, **inputs)
        reason = deferral.reason
        deferral.seen.clear()  # with the forward's own variables
        outputs = _finish(outputs, finished)
    if deferral.fused and not deferral.reason:
        return outputs
    elsewhere = "its forward makes its loss without its output embedding's own"
    reason = reason or (elsewhere if is_plain(head) else _not_plain(head))
    if not deferral.fused:
        _check_keywords(model, fused.keywords, reason)
    if model.training and not torch.compiler.is_compiling():
        _warn(type(model).__name__, reason)
    if outputs is None:  # a Function ends it
        model._fused_loss = dataclasses.replace(fused, whole=True)
        return call(*args, **inputs)
    return outputs


def _check_keywords(model: Any, keywords: dict[str, Any], reason: str) -> None:
    """Raises ValueError for keywords that change a loss, where the model makes its own."""
    for name, none in (("label_smoothing", 0), ("z_loss", 0), ("ignore_index", IGNORE)):
        if keywords.get(name, none) not in (none, None):
            raise ValueError(f"patch_model's {name}={keywords[name]} is not used: {type(model).__name__} makes its "
                             f"logits whole, and its own loss of them ({reason})")  # fmt: skip


def _finish(outputs: Any, finished: Callable[[Logits], Any]) -> Any:
    """A model's outputs, with a value in place of deferred logits, wherever they are."""
    if isinstance(outputs, Logits):
        return finished(outputs)
    if isinstance(outputs, dict):
        values = {key: _finish(value, finished) for key, value in outputs.items()}
        same = all(values[key] is outputs[key] for key in values)
        return outputs if same else type(outputs)(**values)
    if type(outputs) is tuple:
        return tuple([_finish(value, finished) for value in outputs])
    return outputs


def _warn(name: str, reason: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} makes its logits whole while training: its loss is right, but takes their memory "
                      f"({reason})", stacklevel=4)  # fmt: skip


def causal_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE, **keywords: Any,
) -> Tensor:  # fmt: skip
    """For ``Trainer(compute_loss_func=causal_loss)``: the fused `cross_entropy` of a causal model's logits, without
    what the model adds to its own loss, such as a router's auxiliary loss.

    Args:
        outputs: a model's output with logits (..., L, V).
        labels: (..., L), not shifted.
        num_items_in_batch: denominator of the mean; None: the number of labels that count.
        shift_labels: (..., L), already shifted; used instead of labels.
        ignore_index: label of positions that do not count.
        **keywords: of `cross_entropy`.

    Returns:
        The loss, a 0-dim tensor unless `reduction` says otherwise.

    Raises:
        ValueError: the outputs have no logits, as those of a patched model that trains with labels.
    """
    check_integer("ignore_index", ignore_index)
    if shift_labels is None:  # the label of each position is its next token; the last position has none
        check_classes("labels", labels)
        shift_labels = torch.nn.functional.pad(labels.long(), (0, 1), value=ignore_index)[..., 1:]
    return seq2seq_loss(outputs, shift_labels, num_items_in_batch, ignore_index=ignore_index, **keywords)


def seq2seq_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, ignore_index: int = IGNORE, **keywords: Any
) -> Tensor:
    """As `causal_loss`, for models whose labels are aligned with their logits: encoder–decoder and masked models. As
    `Trainer` gives the model no labels then, an encoder–decoder's batches need decoder_input_ids.
    """
    check_classes("labels", labels)
    if getattr(outputs, "logits", None) is None:
        raise ValueError(
            "outputs has no logits: a patched model that trains with labels gives its loss alone; use that, or call it "
            "without labels or without patch_model"
        )
    logits = outputs.logits
    if labels.dim() > 1 and labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have the logits' leading shape {tuple(logits.shape[:-1])}, not "
                         f"{tuple(labels.shape)}")  # fmt: skip
    return cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten(), num_items=num_items_in_batch,
                         ignore_index=ignore_index, **keywords)  # fmt: skip
