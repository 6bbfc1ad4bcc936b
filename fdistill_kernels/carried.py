"""How operators and graphs carry values: nested named tuples as flat arguments, and back.

A field is named in its value alone. An operator's schema, a graph's arguments and the places of its gradients follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from .checks import outside_graphs
from .divergences import Divergence

Value = TypeVar("Value", bound=tuple)

#: An operator's type for a field's annotation; a divergence goes by its key, and of a teacher's function there is none.
TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", bool: "bool", int: "int",
    str: "str",
    str | Divergence | None: "str?", Tensor | Callable[[int, int], Tensor] | None: "Tensor?",
}  # fmt: skip

#: Of a kind, for each field: its own kind (None: it is a leaf), and where its leaves begin and end.
_PARTS: dict[type, tuple[tuple[Any, int, int], ...]] = {}
#: Of a kind, its leaves' names and operators' types; and their places.
_LEAVES: dict[type, dict[str, str]] = {}
_PLACES: dict[type, dict[str, int]] = {}


def carried(kind: type[Value]) -> type[Value]:
    """Marks a named tuple of tensors, plain values and other such tuples as one that operators take."""
    parts: list[tuple[Any, int, int]] = []
    leaves: dict[str, str] = {}
    for name, of in get_type_hints(kind).items():
        inner = {f"{name}_{leaf}": t for leaf, t in _LEAVES[of].items()} if of in _PARTS else {name: TYPES[of]}
        parts.append((of if of in _PARTS else None, len(leaves), len(leaves) + len(inner)))
        leaves |= inner
    _PARTS[kind], _LEAVES[kind] = tuple(parts), leaves
    _PLACES[kind] = {name: place for place, name in enumerate(leaves)}
    return kind


def schema(kind: type, mutated: str = "") -> str:
    """The leaves as an operator's arguments; `mutated` is the one written to."""
    return ", ".join(f"{'Tensor(a!)' if name == mutated else of} {name}" for name, of in _LEAVES[kind].items())


#: The operators, as `torch.library.custom_op` makes them, but for layers of Python that took longer than the call.
_LIBRARY = torch.library.Library("fdistill_kernels", "FRAGMENT")


def operator(
    name: str, kind: type[Value], run: Callable[[Value, str], Any], like: Callable[[Value], Any], results: int,
    mutated: str = "",
) -> Any:  # fmt: skip
    """An operator of a kind's leaves and a backend's name, which compilers see as one.

    run: what it does; like: results of the right shapes. Both give so many tensors.
    """
    returns = ", ".join(["Tensor"] * results)
    _LIBRARY.define(f"{name}({schema(kind, mutated)}, str backend) -> ({returns})", tags=[torch.Tag.pt2_compliant_tag])
    run = outside_graphs(run)  # not a frame of a broken graph
    _LIBRARY.impl(name, lambda *leaves: run(built(kind, leaves[:-1]), leaves[-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"fdistill_kernels::{name}", lambda *leaves: like(built(kind, leaves[:-1])), lib=_LIBRARY
    )
    if not mutated:
        torch.library.register_autograd(f"fdistill_kernels::{name}", _no_derivative, lib=_LIBRARY)
    return getattr(torch.ops.fdistill_kernels, name).default


#: The keys that every thread dispatches with, as bits; modes, tracers and transforms add theirs.
_ALWAYS = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()
#: The types of leaves that call for nobody; a subclass of tensors has operations of its own.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str, float, int, bool))


def watched(*leaves: Any) -> bool:
    """Whether someone is to see an operator of these leaves: a compiler, a mode, a tracer, a transform, or a leaf."""
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS != 0
        or torch._C._len_torch_function_stack() > 0
        or not _PLAIN.issuperset(map(type, leaves))
    )


def _no_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the operators of fdistill_kernels have no derivative; its losses have")


def names_of(kind: type) -> tuple[str, ...]:
    """The leaves' names."""
    return tuple(_LEAVES[kind])


def tensors(kind: type) -> tuple[str, ...]:
    """The names of the leaves that are tensors."""
    return tuple(name for name, of in _LEAVES[kind].items() if of.startswith("Tensor"))


def flat(value: tuple[Any, ...]) -> list[Any]:
    """The leaves of a value."""
    leaves: list[Any] = []
    for x in value:
        if isinstance(x, tuple):
            leaves += flat(x)
        else:
            leaves.append(x)
    return leaves


def built(kind: type[Value], leaves: Sequence[Any]) -> Value:
    """The value of such leaves."""
    return kind(
        *[leaves[begin] if part is None else built(part, leaves[begin:end]) for part, begin, end in _PARTS[kind]]
    )


def leaf(kind: type, name: str, leaves: Sequence[Any]) -> Any:
    """One of the leaves."""
    return leaves[_PLACES[kind][name]]


def in_place_of(kind: type, **values: Any) -> tuple[Any, ...]:
    """Leaves of which all but those named are None: a graph's gradients."""
    leaves: list[Any] = [None] * len(_PLACES[kind])
    for name, value in values.items():
        leaves[_PLACES[kind][name]] = value
    return tuple(leaves)


def replaced(value: Value, **changes: Any) -> Value:
    """With other values in some fields; compilers of torch 2.8 do not trace ``_replace``."""
    fields: Any = type(value)._fields  # type: ignore[attr-defined]
    return type(value)(**{**dict(zip(fields, value, strict=True)), **changes})


def keep(ctx: Any, leaves: Sequence[Any], *more: Tensor) -> None:
    """Leaves for a backward pass; tensors as autograd wants them kept, which notices when they are changed. Those of
    inference mode, such as a teacher's, it does not take. more: saved behind them.
    """
    compiling = torch.compiler.is_compiling()
    saved = [x if isinstance(x, Tensor) and (compiling or not x.is_inference()) else None for x in leaves]
    ctx.save_for_backward(*saved, *more)
    ctx.plain = [x if tensor is None else None for x, tensor in zip(leaves, saved, strict=True)]


def kept(ctx: Any) -> list[Any]:
    """What `keep` was given; let go of, as autograd does with its own, unless the graph is kept."""
    saved = ctx.saved_tensors[: len(ctx.plain)]
    leaves = [plain if tensor is None else tensor for tensor, plain in zip(saved, ctx.plain, strict=True)]
    if not (torch.compiler.is_compiling() or graph_is_kept()):
        ctx.plain = [None if isinstance(x, Tensor) else x for x in ctx.plain]
    return leaves


def graph_is_kept() -> bool:
    """Whether the running backward pass leaves the graph for another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
