"""Deferred logits: what a model's own forward does to its logits is recorded, and they are made only if they must be.

Inside a `Deferral`, the output embedding returns `Logits`, which know the hidden states they would come from. Slices,
scales, soft-caps and biases leave them deferred, and ``F.cross_entropy`` of them is `linear_cross_entropy`. Any other
operation makes the logits and goes on with them: at worst nothing is saved, and nothing is ever left out. Who writes to
logits writes to their views, too: what is a view of them is made as a view of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import linear_cross_entropy
from .heads import LARGEST
from .hooks import are_in_the_way, is_user_s, move_to_end, without_user_s
from .values import Head

#: A function of hidden states and the head's weight and bias, run where the head has them whole.
AtHead = Callable[[Tensor, Tensor, Tensor | None], Any]

_ACTIVE = threading.local()
#: What calls a Function's forward.
APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
#: torch's own: DeepSpeed's ZeRO-3 puts another in the place of ``F.linear``.
LINEAR = torch._C._nn.linear  # type: ignore[attr-defined]


class GivenToFunction(ValueError):
    """An autograd.Function was given deferred logits."""


def in_function() -> bool:
    """Whether this is called in the forward of a ``torch.autograd.Function``."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not APPLY:
        frame = frame.f_back
    return frame is not None


class Deferral:
    """A forward pass, of the thread that enters it, in which `head` gives deferred logits.

    Args:
        head: the output embedding, which `watch` has seen.
        keywords: of `linear_cross_entropy`, on top of what the model's own loss says.
        other_heads: defer the logits of a head that is not a plain ``nn.Linear`` as well, by one probe row.

    Attributes:
        own_loss: whether the model's cross-entropy is wanted; else it is 0. Then a forward pass that gives logits to an
            autograd.Function ends without an error.
        fused: whether a cross-entropy was made without logits.
        reason: the first operation that made the logits.
        trained: whether it records gradients. What is done under another mode is done to the logits themselves.
    """

    own_loss = True
    trained = True

    def __init__(self, head: Any, keywords: dict[str, Any] | None = None, other_heads: bool = False):
        self.head, self.keywords, self.other_heads = head, keywords or {}, other_heads
        self.fused, self.reason = False, ""
        self.seen: list[Logits] = []  # views of other logits, which are made with them
        self.beside = False  # whether the head's own forward takes no `Hidden`: losses are made in its hook
        self.given: Hidden | None = None  # to a head that has a probe row in its place

    def __enter__(self) -> Any:
        move_to_end(getattr(self.head, "_forward_pre_hooks", None), _before)
        self.before, self.trained = active(), torch.is_grad_enabled()
        _ACTIVE.deferral = self
        return self

    def __exit__(self, error: Any, *_: Any) -> bool:
        _ACTIVE.deferral = self.before
        self.seen.clear()
        return error is GivenToFunction and self.own_loss  # then whoever wants that can do without a `Deferral`


def active() -> Deferral | None:
    """The one that this thread is in."""
    return getattr(_ACTIVE, "deferral", None)


def output_embedding(model: Any) -> Any:
    """The module that makes a Hugging Face model's logits; ValueError where there is none."""
    if isinstance(model, type):
        raise ValueError(f"{model.__name__} is a class: give a model of it")
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(
            f"{type(model).__name__} is no model of Hugging Face: it has no get_output_embeddings, which names the "
            "head; of a wrapper such as DistributedDataParallel give the model inside"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: not a language model with a head")
    return head


def is_plain(head: Any) -> bool:
    """Whether a head is ``nn.Linear``'s forward on one floating matrix: no adapter's sum, not quantised."""
    if hasattr(head, "modules_to_save"):  # PEFT's trainable copies, and the original for when they are disabled
        return all(map(is_plain, (head.original_module, *head.modules_to_save.values())))
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    here = head.__dict__  # not vars(), which Dynamo of torch 2.8 does not know
    own = here.get("_old_forward", here.get("forward"))  # set on the instance; accelerate's keeps the first
    if own is not None and is_user_s(own):  # tensor parallelism's is the product
        return False
    weight: Any = head.weight  # a DTensor is FSDP's, or `is_split`; other subclasses are quantised
    return (type(weight) in (Tensor, nn.Parameter) or type(weight).__name__ == "DTensor") and weight.is_floating_point()


def is_split(head: Any) -> bool:
    """Whether tensor parallelism has a head's rows over ranks; to be asked in its forward, where FSDP's are whole."""
    weight: Any = head.weight
    return type(weight).__name__ == "DTensor" and not all(p.is_replicate() for p in weight.placements)


def watch(head: nn.Module) -> None:
    """Lets `Deferral` see what a head is given. Outside one this changes nothing; copies and pickles of it keep it."""
    if _before not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_before)
        hook(head, _after)


def unwatch(head: nn.Module) -> None:
    """Takes `watch` back."""
    for hooks in (head._forward_pre_hooks, head._forward_hooks):
        for key in [key for key, found in hooks.items() if found in (_before, _after)]:
            del hooks[key]


def hook(module: nn.Module, function: Callable[[Any, Any, Any], Any]) -> None:
    """Registers a forward hook once, before those that are there: FSDP's own shard the weights again."""
    if function not in module._forward_hooks.values():
        module.register_forward_hook(function, prepend=True)
        if "torch._dynamo" in sys.modules:  # what is compiled already does not look for new hooks
            torch.compiler.reset()


def _before(head: nn.Module, args: tuple[Any, ...]) -> Any:
    given = args[0] if args else None
    if isinstance(given, Hidden):
        if is_plain(head) and not given.deferral.beside:
            return None
        if given.then in (None, nn.functional.linear):
            return (given.tensor, *args[1:])
        return _probed(given, args)
    deferral = active()
    if deferral is None or head is not deferral.head or not isinstance(given, Tensor):
        return None
    if are_in_the_way(head, of_all=deferral.own_loss):  # another loss has none for them
        deferral.reason = deferral.reason or "a backward hook of its output embedding, or a hook of all modules"
        return None
    if given.device.type == "meta":
        deferral.reason = deferral.reason or "hidden states on the meta device, which have a shape and no data"
        return None
    if torch.is_grad_enabled() != deferral.trained:
        deferral.reason = deferral.reason or "its output embedding, where gradients are switched off or on"
        return None
    plain = is_plain(head)
    deferral.beside = plain and (is_split(head) or nn.functional.linear is not LINEAR)
    if plain and not deferral.beside:
        return (Hidden(given, deferral), *args[1:])
    if not deferral.other_heads or not given.is_floating_point():  # an embedding that is both is given ids as well
        return None
    return _probed(Hidden(given, deferral), args)


def _probed(given: Hidden, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """One row in the place of hidden states, which `_after` goes on with."""
    given.deferral.given = given
    return (given.tensor.reshape(-1, given.tensor.shape[-1])[:1], *args[1:])


def _after(head: Any, args: tuple[Any, ...], output: Any) -> Any:
    deferral = active()
    if deferral is None or head is not deferral.head or deferral.given is None:
        return None
    given, deferral.given = deferral.given, None
    split = deferral.beside and is_split(head)
    if given.then is not None:
        hidden = _on_all(given.tensor, head.weight.device_mesh) if split else given.tensor
        return given.then(hidden, head.weight, head.bias)
    size = head.weight.shape[0] if split else output.shape[-1]
    return Logits(deferral, given.tensor, size, output.dtype, given.tensor.device, _autocast_dtype(given.tensor))


def _on_all(hidden: Tensor, mesh: Any) -> Tensor:
    """Hidden states that are the same on all ranks of a mesh, as a DTensor that says so."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to, where that is counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Hidden:
    """What a head is given in its hidden states' place: ``F.linear`` of it is `Logits`, or what `then` makes."""

    def __init__(self, tensor: Tensor, deferral: Deferral, then: AtHead | None = None):
        self.tensor, self.deferral, self.then = tensor, deferral, then

    def to(self, *args: Any, **keywords: Any) -> Hidden:
        """Moved to where the head is, as accelerate's hooks do."""
        return Hidden(self.tensor.to(*args, **keywords), self.deferral, self.then)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear or not isinstance(args[0], Hidden):
            return func(*_made(args, ""), **_made(kwargs or {}, ""))
        hidden, (weight, bias) = args[0], args[1:]
        if hidden.then is not None:
            return hidden.then(hidden.tensor, weight, bias)
        x, autocast = hidden.tensor, _autocast_dtype(hidden.tensor)
        return Logits(hidden.deferral, x, weight.shape[0], autocast or x.dtype, x.device, autocast)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Tensor:  # rows of several adapters in one batch
        return self.tensor[index]

    def __len__(self) -> int:
        return len(self.tensor)


class Form(NamedTuple):
    """Logits as scale·hidden weightᵀ + Σ factor·vector, or with a cap as cap·tanh of that."""

    scale: float = 1.0
    bias: tuple[tuple[float, Tensor], ...] = ()
    cap: float | None = None


@dataclasses.dataclass(eq=False)
class Logits:
    """Logits that a head would give, after what the model has done to them.

    Operations on rows are done to `hidden` at once. Those on logits are in `form`, which the linear losses know, and in
    `done`, functions with their further arguments, which make them one by one as the model would.
    """

    deferral: Deferral
    hidden: Tensor
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    form: Form = Form()  # noqa: RUF009
    done: tuple[tuple[Any, ...], ...] = ()
    source: tuple[Logits, Callable[[Tensor], Tensor]] | None = None  # of a view: of which logits, and how
    version: int | None = None  # of the hidden states, when they were given
    real: Tensor | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        self.version = _version(self.hidden) if self.version is None else self.version

    @property
    def shape(self) -> torch.Size:
        """The logits'."""
        return torch.Size((*self.hidden.shape[:-1], self.vocabulary))

    def after(self, *operation: Any, **changes: Any) -> Logits:
        """After one more operation."""
        return dataclasses.replace(self, done=(*self.done, operation), source=None, **changes)

    def of(self, hidden: Tensor) -> Logits:
        """Of other rows."""
        self.check_unchanged()
        return dataclasses.replace(self, hidden=hidden, source=None, version=None)

    def view_of(self, source: Logits, how: Callable[[Tensor], Tensor]) -> Logits:
        """As what `how` makes of other logits, which may be a view of them."""
        view = dataclasses.replace(self, source=(source, how))
        if active() is self.deferral:
            self.deferral.seen.append(view)
        return view

    @property
    def views(self) -> list[Logits]:
        """Of them, in the forward pass."""
        return [x for x in self.deferral.seen if x.source is not None and x.source[0] is self]

    @property
    def made(self) -> bool:
        """Whether the logits are there, or those that they are a view of."""
        return self.real is not None or (self.source is not None and self.source[0].made)

    @property
    def open(self) -> bool:
        """Whether what is done to them now can be left for later."""
        return not self.made and torch.is_grad_enabled() == self.deferral.trained

    def check_unchanged(self) -> None:
        """RuntimeError where the hidden states are no more what the head was given."""
        if self.version is not None and _version(self.hidden) not in (None, self.version):
            raise RuntimeError(
                "the model writes to its hidden states in place after its head has had them, and the logits are not "
                "made yet: they would be those of other hidden states; write to a copy of them"
            )

    def at_head(self, then: AtHead) -> Any:
        """What a function makes of the hidden states and the head's weight, run in the head's own forward."""
        self.check_unchanged()
        given = Hidden(self.hidden, self.deferral, then)
        with without_user_s(self.deferral.head):
            if _autocast_dtype(self.hidden) == self.autocast:
                return self.deferral.head(given)
            with torch.autocast(self.hidden.device.type, self.autocast, enabled=self.autocast is not None):  # type: ignore[arg-type]
                return self.deferral.head(given)

    def tensor(self, why: str = "") -> Tensor:
        """The logits themselves, made once, with a graph if the forward pass has one. why: what needs them.

        Raises:
            GivenToFunction: the forward pass has a graph, and an autograd.Function is given what is no part of it.
        """
        if self.deferral.trained and active() is self.deferral and not torch.is_grad_enabled() and in_function():
            raise GivenToFunction("an autograd.Function is given logits that are not made yet, which it takes for no "
                                  "tensor: they would have no gradient")  # fmt: skip
        if self.real is None and active() is self.deferral and torch.is_grad_enabled() != self.deferral.trained:
            with torch.inference_mode(False), torch.set_grad_enabled(self.deferral.trained):
                return self.tensor(why)
        if self.real is None:
            self.deferral.reason = self.deferral.reason or why
            if self.source is not None:
                source, how = self.source
                made = source.tensor(why)  # and this view with it, in the forward pass
                self.real = how(made) if self.real is None else self.real
            else:
                made = self.at_head(nn.functional.linear)
                for function, *rest in self.done:
                    made = function(made, *rest)
                self.real = made
            for view in self.views:  # before anything is written to either
                view.tensor(why)
        return self.real

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The linear losses' arguments, of the head's own weight and bias."""
        scale, added, cap = self.form
        outer, total = (1.0 if cap is None else cap), None
        for factor, vector in (*added, *([] if bias is None else [(scale, bias)])):
            term = vector.flatten()[: self.vocabulary].to(weight.device, weight.dtype)
            term = term if factor * outer == 1.0 else term * (factor * outer)
            total = term if total is None else total + term
        weight = weight if len(weight) == self.vocabulary else weight[: self.vocabulary]
        return Head(weight, total, scale * outer, cap)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(getattr(func, "__name__", str(func)), func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(_method, name, self) if name in RULES else getattr(self.tensor(name), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor("assignment to entries")[index] = value

    def __iter__(self) -> Any:
        yield from self.tensor("iteration")

    def __len__(self) -> int:
        return self.shape[0]


def _made(value: Any, why: str) -> Any:
    """With every deferred logit in it made."""
    if isinstance(value, Logits):
        return value.tensor(why)
    if isinstance(value, Hidden):
        return value.tensor
    if type(value) in (tuple, list):
        return type(value)([_made(x, why) for x in value])
    return {k: _made(x, why) for k, x in value.items()} if type(value) is dict else value


def _method(name: str, logits: Logits, *args: Any, **keywords: Any) -> Any:
    return _apply(name, getattr(Tensor, name), (logits, *args), keywords)


def _apply(name: str, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """An operation by its rule, or on the logits themselves."""
    if name in ("add", "mul") and len(args) == 2 and isinstance(args[1], Logits):  # also how a compiler swaps them
        args = args[::-1]
    ruled = name in RULES and args and isinstance(args[0], Logits) and (not keywords or name in WITH_KEYWORDS)
    if ruled and (args[0].open or name in OF_SIZES):
        result = RULES[name](*args, **keywords)
        if result is not NotImplemented:
            return result
    return function(*_made(args, name), **_made(keywords, name))


# --- the rules; NotImplemented where an operation is not one of the form's


def _mul(z: Logits, factor: Any, function: Any = torch.mul) -> Any:
    if not isinstance(factor, (int, float)) or factor == 0:
        return NotImplemented
    scale, bias, cap = z.form
    by = 1.0 / factor if function is torch.div else factor
    if not 0 < abs((scale if cap is None else cap) * by) <= LARGEST:  # which the linear losses do not take
        return NotImplemented
    if cap is None:
        return z.after(function, factor, form=Form(scale * by, tuple((f * by, b) for f, b in bias)))
    return z.after(function, factor, form=Form(scale, bias, cap * by)) if by > 0 else NotImplemented


def _add(z: Logits, other: Any) -> Any:
    vector = isinstance(other, Tensor) and other.numel() == z.vocabulary == other.shape[-1]
    if not vector or other.dim() > z.hidden.dim() or z.form.cap is not None:
        return NotImplemented
    other = other.reshape(-1)  # rows of any shape take it
    form = Form(z.form.scale, (*z.form.bias, (1.0, other)))
    return z.after(torch.add, other, form=form, dtype=torch.promote_types(z.dtype, other.dtype))


def _tanh(z: Logits) -> Any:
    return z.after(torch.tanh, form=Form(z.form.scale, z.form.bias, 1.0)) if z.form.cap is None else NotImplemented


def _to(z: Logits, *args: Any, **keywords: Any) -> Any:
    if keywords.get("copy") or any(type(x) is bool for x in args):
        return NotImplemented
    like = torch.empty(0, dtype=z.dtype, device=z.device).to(*args, **keywords)
    if like.dtype not in (z.dtype, torch.float32):
        return NotImplemented
    if like.dtype == z.dtype and like.device == z.device:
        return z
    return z.after(Tensor.to, like.device, like.dtype, dtype=like.dtype, device=like.device)


def _reshape(z: Logits, *shape: Any) -> Any:
    if isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = list(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(z.shape) // -math.prod(sizes)
    if sizes[-1] != z.vocabulary:
        return NotImplemented
    return z.of(z.hidden.reshape(*sizes[:-1], z.hidden.shape[-1])).view_of(z, lambda logits: logits.reshape(sizes))


def _flatten(z: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    end, dims = end_dim % z.hidden.dim(), z.hidden.dim()
    if end == dims - 1:
        return NotImplemented
    return z.of(z.hidden.flatten(start_dim, end)).view_of(z, lambda logits: logits.flatten(start_dim, end))


def _first(logits: Tensor, count: int) -> Tensor:
    return logits[..., :count]


def _getitem(z: Logits, index: Any) -> Any:
    """Rows by any index of theirs; of the vocabulary, its first entries. By ints and slices they are a view."""
    whole, index, dims = index, index if isinstance(index, tuple) else (index,), z.hidden.dim()
    if not all(i is None or i is ... or type(i) in (int, slice) or isinstance(i, Tensor) for i in index):
        return NotImplemented
    copied = any(isinstance(i, Tensor) and i.dim() for i in index)

    def seen(found: Logits) -> Logits:
        return found if copied else found.view_of(z, lambda logits: logits[whole])

    masks = [isinstance(i, Tensor) and i.dtype == torch.bool for i in index]
    used = sum(i.dim() if m else i is not None and i is not ... for i, m in zip(index, masks, strict=True))
    for at, i in enumerate(index):
        if i is ...:
            index, used = (*index[:at], *[slice(None)] * (dims - used), *index[at + 1 :]), dims
            break
    if used < dims:
        return seen(z.of(z.hidden[index]))
    last, leading = index[-1], index[:-1]
    if used > dims or type(last) is not slice or last.start not in (None, 0) or last.step not in (None, 1):
        return NotImplemented
    rows, count = z.of(z.hidden[leading] if leading else z.hidden), len(range(z.vocabulary)[last])
    if count == z.vocabulary:
        return seen(rows)
    return seen(rows.after(_first, count, vocabulary=count)) if count else NotImplemented


def _cross_entropy(
    z: Logits, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    if z.hidden.dim() != 2 or target.is_floating_point() or size_average is not None or reduce is not None:
        return NotImplemented
    if not z.deferral.own_loss:
        return torch.zeros(target.shape if reduction == "none" else (), device=z.device)
    more = dict(z.deferral.keywords)
    masked, smoothing = more.pop("ignore_index", None), more.pop("label_smoothing", label_smoothing)
    if masked is not None:
        target = target.long()  # a byte does not hold every index
        target = target.masked_fill(target == masked, ignore_index)

    def loss(hidden: Tensor, own_weight: Tensor, own_bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(
            hidden, z.head(own_weight, own_bias), target.to(hidden.device), weight=weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=smoothing, **more,
        )  # fmt: skip

    z.deferral.fused = True
    return z.at_head(loss).to(z.device)


#: How operations on logits leave them deferred, by name.
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul), "tanh": _tanh, "to": _to,
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), lambda z, by: _mul(z, by, torch.div)),
    "float": lambda z: _to(z, torch.float32),
    **dict.fromkeys(("add", "__add__", "__radd__"), _add), "view": _reshape, "reshape": _reshape, "flatten": _flatten,
    "contiguous": lambda z, **_: z.view_of(z, Tensor.contiguous), "clone": lambda z, **_: z.of(z.hidden),
    "is_contiguous": lambda z, **_: True,
    "size": lambda z, dim=None: z.shape if dim is None else z.shape[dim], "dim": lambda z: z.hidden.dim(),
    "__getitem__": _getitem, "cross_entropy": _cross_entropy,
}  # fmt: skip
OF_SIZES = ("size", "dim", "is_contiguous")
#: Those whose rules know all keywords; others' (alpha, rounding_mode, out) would be lost.
WITH_KEYWORDS = ("to", "flatten", "size", "contiguous", "clone", "is_contiguous", "cross_entropy")


def _operator(name: str) -> Callable[..., Any]:
    return lambda logits, *args: _method(name, logits, *args)


def _in_place(name: str) -> Callable[..., Any]:
    """``z *= x`` and its like, which others that hold z see: deferred where no view of it would have to."""

    def operate(z: Logits, x: Any) -> Any:
        rule = RULES.get(f"__{name}__")
        result = rule(z, x) if rule and z.open and not (z.source or z.views or isinstance(x, Logits)) else None
        if isinstance(result, Logits) and result.dtype == z.dtype:
            z.form, z.done = result.form, result.done
            return z
        return getattr(operator, f"i{name}")(z.tensor(f"__i{name}__"), _made(x, ""))

    return operate


for _name in (
    "mul", "rmul", "truediv", "rtruediv", "add", "radd", "sub", "rsub", "pow", "rpow", "matmul", "rmatmul", "floordiv",
    "mod", "neg", "abs", "invert", "and", "or", "eq", "ne", "lt", "le", "gt", "ge", "getitem",
):  # fmt: skip
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(Logits, f"__i{_name}__", _in_place(_name))
