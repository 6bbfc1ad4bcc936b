"""Argument checks: each error names the argument, what it got and what it wanted, before any kernel starts."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Numbers of programs that are exported; what Dynamo traces are ints and floats to it.
SYMBOLS = (torch.SymInt, torch.SymFloat)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)
NO_TRANSFORM = (
    "torch.func transforms (vmap, grad, jvp) and forward-mode AD do not reach into the fused losses; batch by leading "
    "dimensions, differentiate with torch.autograd"
)
#: `torch.compiler.disable` as torch itself uses it: the compiler, which takes as long to import as torch, is imported
#: when what is outside is first run.
outside_graphs = torch._compile._disable_dynamo
REDUCTIONS = ("mean", "sum", "none", "batchmean")


def check_tensor(name: str, value: object, floating: bool = True) -> None:
    """A dense tensor with data, floating point unless it may be of any dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, not a {kind} one")
    if type(value) is not Tensor and hasattr(value, "full_tensor"):  # those that may be one have been made local
        raise TypeError(f"{name} is a DTensor: give {name}.to_local(), this rank's, or {name}.full_tensor()")
    if not torch.compiler.is_compiling():
        _check_plain(name, value)
    elif forward_ad._current_level >= 0 or _untraceable():  # the first makes a guard of it
        raise NotImplementedError(f"{name}: {NO_TRANSFORM}")
    if floating and value.dtype not in DTYPES:
        raise TypeError(f"{name} must be floating point, of 16, 32 or 64 bits, not {value.dtype}")


def _untraceable() -> bool:
    """Whether a compiler traces a dual number, or a second derivative: it would make zeros of them."""
    transforms = torch._C._functorch.get_interpreter_stack() or []
    gradients = [t for t in transforms if t.key() == torch._C._functorch.TransformType.Grad]
    return len(gradients) > 1 or forward_ad._current_level >= 0  # which is not seen as it is while one is traced


_untraceable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


@outside_graphs  # a compiler that traces this alone, once the above is raised, takes all tangents for None
def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None


def check_made(name: str, value: Any) -> None:
    """Raises TypeError for a parameter of a lazy module that has not run yet."""
    if not torch.compiler.is_compiling() and is_lazy(value):
        raise TypeError(f"{name} has no shape yet, the parameter of a lazy module: call the module once before")


def _check_plain(name: str, value: Tensor) -> None:
    """Kernels read what memory holds, and know of nothing beside it."""
    check_made(name, value)
    if torch.masked.is_masked_tensor(value):
        raise TypeError(f"{name} is a MaskedTensor: give {name}.get_data(), and leave tokens out by their labels")
    if value.is_meta:
        raise TypeError(f"{name} is on the meta device: it has a shape and no data")
    if value.is_neg():
        raise TypeError(f"{name} is a view that is negated when it is read: give {name}.resolve_neg()")
    functorch = torch._C._functorch
    dual = forward_ad._current_level >= 0 and _has_tangent(value)
    if dual or functorch.is_batchedtensor(value) or functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(f"{name}: {NO_TRANSFORM}")
    if value.requires_grad and transformed() and _is_trained_outside():
        raise NotImplementedError(f"{name} requires grad inside a torch.func transform of other tensors, through which "
                                  "the fused losses make no graph: detach it")  # fmt: skip


def transformed() -> bool:
    """Whether a transform of torch.func runs, if only of other tensors: no compiler's, which has its own."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _is_trained_outside() -> bool:
    """Whether autograd is on beneath all transforms, which switch it on inside."""
    functorch = torch._C._functorch
    of_grad = [t for t in functorch.get_interpreter_stack() or () if t.key() == functorch.TransformType.Grad]
    return torch.is_grad_enabled() and all(functorch.CGradInterpreterPtr(t).prevGradMode() for t in of_grad)


def check_transformed(name: str, like: Tensor) -> None:
    """Raises NotImplementedError where a transform of other tensors has wrapped tensors such as `like`, of which no
    operator takes the wrapping off.
    """
    if transformed() and torch._C._functorch.is_functorch_wrapped_tensor(like):
        raise NotImplementedError(
            f"{name} does not run inside torch.func's grad or jvp of other tensors: call it outside"
        )


def has_memory(value: Tensor) -> bool:
    """Whether a kernel may read it by its pointer: not a wrapper, whose class says what it holds (quantised, fake)."""
    return type(value).__torch_dispatch__ is Tensor.__torch_dispatch__


def check_memory(**tensors: object) -> None:
    """Raises TypeError for a wrapper among them, where no operator stands between it and the kernels."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not has_memory(value):
            raise TypeError(
                f"{name} is a {type(value).__name__}, whose memory no kernel can read; beside a teacher that is a "
                "function, or a divergence of your own, give plain tensors"
            )


def check_logits(name: str, logits: Tensor) -> None:
    """Floating logits (..., V) with at least one entry a row."""
    check_tensor(name, logits)
    if logits.dim() == 0:
        raise ValueError(f"{name} must have shape (..., V), but is a scalar")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has no vocabulary: shape {tuple(logits.shape)}; a row needs at least one entry")


def check_parts(value: object) -> None:
    """Raises TypeError or ValueError unless it is a bool, or "metrics"."""
    if not (isinstance(value, str) and value == "metrics"):
        check_flag("return_parts, where it is not 'metrics',", value)


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")


def check_integer(name: str, value: Any, low: int = -(2**63)) -> int:
    """An integer of 64 bits of any kind (NumPy's), `low` or more, as an int."""
    if isinstance(value, SYMBOLS):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):  # the last asks long
        raise TypeError(f"{name} must be an int, not {shown(value)}")
    number = int(value)
    if number.bit_length() > 63 and number != -(2**63):
        raise ValueError(f"{name} must be an int of 64 bits, not one of {number.bit_length()}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, not {number}")
    return number


def own_number(value: Any) -> Any:
    """Python's own number of any other kind, NumPy's, which neither JSON nor compilers know; what is none as it is."""
    if isinstance(value, int) or type(value) is float or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")


def check_path(name: str, value: object) -> None:
    """Text, or what stands for a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {type(value).__name__}")


def shown(value: object) -> str:
    """A value in an error's one line; of what takes more, such as a model, its type."""
    text = type(value).__name__ if isinstance(value, Tensor) or value is None else repr(value)
    return text if len(text) < 100 and "\n" not in text else type(value).__name__


def check_overwritten(name: str, tensor: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """A tensor that a kernel writes to: dense rows, each of whose entries has a place of its own, which no other
    argument shares, through whatever storage.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) not in (0, 1):
        raise ValueError(f"inplace=True needs {name} of dense rows, not strides {tensor.stride()}")
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach and tensor.numel():
                raise ValueError(
                    f"inplace=True would overwrite {name}, whose rows share memory: strides {tensor.stride()}"
                )
            reach += stride * (size - 1)
    begin, end = _span(tensor)
    for other, value in others.items():
        if value is not None:
            check_tensor(other, value, floating=False)
        if value is not None and value.device == tensor.device and _span(value)[0] < end and begin < _span(value)[1]:
            raise ValueError(f"inplace=True would overwrite {other}, which shares memory with {name}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and beyond its last."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Two models' logits: one shape and device."""
    check_vocabularies(student.shape[-1], teacher.shape[-1])
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape, "
            f"not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device} but teacher_logits on {teacher.device}")


def check_vocabularies(student: int, teacher: int) -> None:
    """Two models' vocabularies of one size."""
    if student != teacher:
        raise ValueError(
            f"student and teacher have vocabularies of {student} and {teacher}; where one is padded, give the shared "
            "size as vocab_size="
        )


def check_hidden(name: str, hidden: Tensor) -> None:
    """Floating hidden states (..., D)."""
    check_tensor(name, hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., D), not {tuple(hidden.shape)}")


def check_head(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, hidden: Tensor, vocab_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """A plain head, (V, D) and (V), cut to `vocab_size`."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a tensor (V, D), not {type(weight).__name__}; of a plain nn.Linear give .weight, and "
            "merge a LoRA or quantised head into one weight first"
        )
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"{name} is sharded (DTensor): give {name}.full_tensor(), call from the unsharded "
            "module, or, where the rows are the same on all ranks, give the hidden states as a whole DTensor"
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(f"{name} is partitioned by ZeRO-3: call inside deepspeed.zero.GatheredParameters")
    check_tensor(name, weight, floating=False)
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name} must be floating point, not {weight.dtype}: dequantise it first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name} must have shape (V, {hidden.shape[-1]}), as hidden states do, not {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name} is on {weight.device} but the hidden states on {hidden.device}")
    if bias is not None:
        check_tensor(bias_name, bias)
        if bias.shape != weight.shape[:1] or bias.device != weight.device:
            raise ValueError(f"{bias_name} must have shape ({weight.shape[0]},) on {weight.device}, "
                             f"not {tuple(bias.shape)} on {bias.device}")  # fmt: skip
    if vocab_size is not None:
        check_vocab_size(vocab_size, weight.shape[0], f"the rows of {name}")
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return weight, bias


def check_vocab_size(vocab_size: int, most: int, of: str) -> None:
    """At least one entry, and no more than there are."""
    check_integer("vocab_size", vocab_size)
    if not 0 < vocab_size <= most:
        raise ValueError(f"vocab_size must be in [1, {most}], {of}, not {vocab_size}")


def check_takes(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Raises TypeError unless it can be called with these arguments, as far as its signature is known."""
    if torch.compiler.is_compiling():
        return
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (ValueError, TypeError):  # of some that are written in C
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must take ({', '.join(arguments)}): {error}") from None


def check_chunk(logits: object, like: Tensor) -> Tensor:
    """What a teacher's function returned for a range of rows."""
    if isinstance(logits, Tensor):
        check_tensor("what teacher_hidden, a function, returns", logits)
    if not isinstance(logits, Tensor) or logits.shape != like.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"teacher_hidden, a function, must return logits {tuple(like.shape)} for these rows, not {got}"
        )
    return logits.detach()


def check_class_weight(weight: Tensor | None, vocabulary: int, device: torch.device) -> None:
    """A constant factor on each class."""
    if weight is None:
        return
    check_tensor("weight", weight)
    if weight.shape != (vocabulary,):
        raise ValueError(f"weight must have shape ({vocabulary},), not {tuple(weight.shape)}")
    check_constant("weight", weight, device)


def traced() -> bool:
    """Whether a graph is recorded instead of a step taken: by a compiler, `make_fx` or `torch.jit.trace`."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _proxied()


def _proxied() -> bool:
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # slow to import, but then it is there

    return get_proxy_mode() is not None


def check_unrecorded(name: str) -> None:
    """Raises ValueError where a graph is recorded, which would lack what no operator runs; compilers break theirs."""
    if traced() and not torch.compiler.is_dynamo_compiling():
        raise ValueError(f"{name} is in no graph that export, make_fx or torch.jit.trace records: call it outside")


def imagined(x: Tensor) -> bool:
    """Whether it has no values yet, or none ever: what is traced, or a fake tensor."""
    return traced() or hasattr(x, "fake_mode")


def readable(x: Tensor) -> bool:
    """Whether its values may be asked for: a GPU would have to be waited for."""
    return x.device.type == "cpu" and not imagined(x)


def looked_at(x: Tensor) -> bool:
    """Whether its values are for `require` to look at: now, or where a graph that is compiled for a CPU runs."""
    return readable(x) or (x.device.type == "cpu" and torch.compiler.is_compiling())


def require(fits: Tensor, message: str) -> None:
    """Raises ValueError unless it holds; a graph raises RuntimeError when it comes there."""
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(message)


def in_graph(x: Tensor) -> Tensor:
    """An argument of an autograd.Function; inside compilers a view. Where a transform (`torch.func.grad`) makes it
    require a gradient, they know that only of what comes of it, and pass by a function none of whose arguments does.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


def needs_gradient(value: Tensor) -> bool:
    """Whether a gradient is expected of it; inside transforms of other tensors of nothing (`_check_plain`)."""
    return in_graph(value).requires_grad and torch.is_grad_enabled() and not transformed()


def check_denominator(value: object) -> float:
    """A number in the place of tokens that count."""
    return check_number("num_items", value, 0)


def check_constant(name: str, value: Tensor, device: torch.device | None = None) -> None:
    """A tensor that no gradient is expected of; on the logits' device, if that is given."""
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device} but the logits on {device}")
    if needs_gradient(value):
        raise ValueError(f"{name} requires grad, but the loss is not differentiable in it; detach it")


def shared_vocabulary(name: str, logits: Tensor, vocab_size: int | None) -> Tensor:
    """The first `vocab_size` entries of padded logits."""
    check_logits(name, logits)
    if vocab_size is None:
        return logits
    check_vocab_size(vocab_size, logits.shape[-1], f"the vocabulary of {name}")
    return logits[..., :vocab_size]


def check_classes(name: str, labels: Tensor) -> None:
    """Integers."""
    check_tensor(name, labels, floating=False)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integer class indices, not {labels.dtype}")


def check_labels(labels: Tensor, logits: Tensor, name: str = "labels") -> None:
    """Class indices of the logits' leading shape."""
    check_classes(name, labels)
    check_tokens(name, labels, logits)


def check_tokens(name: str, value: Tensor, logits: Tensor) -> None:
    """One value a token: the logits' leading shape, on their device."""
    check_tensor(name, value, floating=False)
    if value.is_complex() or value.is_quantized:
        raise TypeError(f"{name} must be real numbers, not {value.dtype}")
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have the logits' leading shape {tuple(logits.shape[:-1])}, not {tuple(value.shape)}"
        )
    check_constant(name, value, logits.device)


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite number in [low, high], or (low, high] with `open_low`, of any kind, as a float.

    Inside compilers it stays what it is: to make it a float, or to ask `isfinite`, would be a graph for each value.
    """
    compiling = torch.compiler.is_compiling()
    if isinstance(value, SYMBOLS):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (float, int, numbers.Real)):  # the last asks long
        raise TypeError(f"{name} must be a number, not {shown(value)}")
    try:
        number: Any = value if compiling and isinstance(value, (int, float)) else float(value)
    except OverflowError:
        number = value = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    inside = low < number <= high if open_low else low <= number <= high
    if not (inside and -math.inf < number < math.inf):
        if low == -math.inf and high == math.inf:
            raise ValueError(f"{name} must be finite, not {value!r}")
        ends = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
        raise ValueError(f"{name} must be in {ends}, not {value!r}")
    return number


def check_per_token(name: str, value: Tensor, logits: Tensor) -> None:
    """A 0-dim tensor, or one value a token."""
    check_tensor(name, value, floating=False)
    check_tokens(name, value if value.dim() else value.expand(logits.shape[:-1]), logits)


def checked_items(num_items: object, reduction: str, tokens: int | Tensor, device: torch.device) -> float | Tensor:
    """The denominator that a user gives: a positive number, or a tensor of one; 0 where no token counts."""
    if reduction in ("sum", "none"):
        raise ValueError(f"num_items overrides the denominator of a mean; reduction={reduction!r} has none")
    if isinstance(num_items, Tensor):
        check_tensor("num_items", num_items, floating=False)
        not_one = num_items.is_complex() or num_items.is_quantized or num_items.dtype == torch.bool
        if num_items.numel() != 1 or not_one:
            raise ValueError(f"num_items must be one number, not {num_items.dtype} of shape {tuple(num_items.shape)}")
        check_constant("num_items", num_items)
        num_items = num_items.reshape(()).to(device)
        if readable(num_items):
            check_denominator(num_items.item())
    else:
        num_items = check_denominator(num_items)
    if _known(num_items) and _known(tokens) and num_items == 0 and tokens > 0:
        raise ValueError(f"num_items must be positive, not {num_items!r}, for {int(tokens)} tokens that count")
    asked = torch.compiler.is_compiling() and device.type == "cpu"  # by the graph
    if asked and (isinstance(num_items, Tensor) or num_items == 0):
        items = torch.as_tensor(num_items, device=device).float()
        fits = ((items > 0) & items.isfinite()) | ((items == 0) & (tokens == 0))
        require(fits, "num_items must be positive, or 0 where no token counts")
    return num_items  # type: ignore[return-value]


def _known(value: float | Tensor) -> bool:
    return readable(value) if isinstance(value, Tensor) else not traced()


def check_deprecated(value: object) -> None:
    """Raises ValueError for a value of size_average or reduce."""
    if value is not None:
        raise ValueError("size_average and reduce are deprecated; use reduction='mean', 'sum' or 'none'")


def check_reduction(reduction: object) -> None:
    """A known reduction."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, not {shown(reduction)}")
    if reduction not in REDUCTIONS:
        near = difflib.get_close_matches(reduction, REDUCTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REDUCTIONS)}"
        raise ValueError(f"unknown reduction {reduction!r}; {hint}")
