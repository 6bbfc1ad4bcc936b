"""A user's own divergence, made of a generator f; and what a name, an instance or a generator stands for."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .divergences import PARAMETERS, TABLE, Divergence, Terms
from .formulas import times

#: What is said of a generator whose graph has a leaf beside t.
PARAMETER = "has a parameter that requires grad, but the loss is not differentiable in it"


class FDivergence(Divergence):
    """A divergence made of a user's own generator f: run by the torch backend in chunks, or by Triton with `triton`.

    It can be copied, and pickled if its functions can be (functions of a module, not lambdas). ``torch.export`` traces
    f into the program, which then needs nothing else.

    Args:
        f: elementwise function of t = p/q on tensors; convex, with f(1) = 0.
        from_log_ratio: instead of f, the same function of u = log t, for generators that overflow in t.
        name: for error messages and tables.
        triton: for the Triton backend: a ``@triton.jit`` function ``(p, q, log_p, log_q, parameter) -> (q·(f − t f′),
            p·f′)``, elementwise in float32, which gives 0 at entries with q = p = 0. `fdistill_kernels.verify.verify`
            compares it with f.

    On the torch backend f′ comes from autograd. log t is clamped to what the dtype can represent, so f(0) and f(∞) are
    limits from inside.

    Raises:
        ValueError: f is not elementwise, not finite, not convex, not differentiable, or f(1) ≠ 0, tested on t from 1e-3
            to 1e3; or both or neither of f and from_log_ratio are given.
        TypeError: f is not a function, or triton not one of ``@triton.jit`` with these five arguments.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor] | None = None,
        *,
        from_log_ratio: Callable[[Tensor], Tensor] | None = None,
        name: str = "custom",
        triton: Any = None,
    ) -> None:
        if (f is None) == (from_log_ratio is None):
            raise ValueError("FDivergence takes either f, a function of t = p/q, or from_log_ratio, one of log t")
        if not callable(f or from_log_ratio):
            raise TypeError(f"f must be a function of tensors, not {type(f or from_log_ratio).__name__}")
        object.__setattr__(self, "given", {"f": f, "from_log_ratio": from_log_ratio, "name": name, "triton": triton})
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            with _disable_current_modes(), temporarily_clear_interpreter_stack():  # fake tensors have no values
                _validate_generator(self.generator, name)
        # not a method of its own, with which it would wait for the garbage collector
        super().__init__(name, functools.partial(_terms, f, from_log_ratio), triton=triton)

    def generator(self, u: Tensor) -> Tensor:
        """f at t = exp(u)."""
        return _generator(self.given["f"], self.given["from_log_ratio"], u)  # type: ignore[attr-defined]

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``q f(p/q)``, elementwise and differentiable by autograd; compilers trace this."""
        u = _log_ratio(log_p, log_q)
        larger, inverse = _larger(p, q, u)
        return times(larger, self.generator(u).to(u.dtype) * inverse)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_divergence, (self.given,)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(tuple(self.given.values()))  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FDivergence) and self.given == other.given  # type: ignore[attr-defined]


def _generator(f: Any, from_log_ratio: Any, u: Tensor) -> Tensor:
    return from_log_ratio(u) if f is None else f(u.exp())  # type: ignore[no-any-return]


def _terms(f: Any, from_log_ratio: Any, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, _: float) -> Terms:
    with torch.inference_mode(False), torch.enable_grad(), autograd_inside_an_operator():
        u = _log_ratio(log_p, log_q).detach().requires_grad_()
        value = _generator(f, from_log_ratio, u)
        _check_still(value, u)
        (slope,) = torch.autograd.grad(value.sum(), u)  # df/du = t f′(t)
    larger, inverse = _larger(p, q, u)
    value, slope = (times(larger, (x * inverse).detach()) for x in (value, slope))
    beyond = value.isinf() | slope.isinf()  # what overflows first may have either sign, and their sum is the loss
    return torch.where(beyond, torch.inf, value - slope), torch.where(slope == -torch.inf, 0, slope)


def _check_still(value: Tensor, of: Tensor) -> None:
    """Raises ValueError for a graph with another leaf, such as a parameter that was unfrozen after its generator was
    given.
    """
    nodes, leaves = [value.grad_fn], set()
    for node in nodes:
        for before, _ in () if node is None else node.next_functions:
            if before is not None and before not in nodes:
                nodes.append(before)
                leaves.add(getattr(before, "variable", of))
    if leaves - {of}:
        raise ValueError(f"the generator {PARAMETER}")


def _own_divergence(given: dict[str, Any]) -> FDivergence:
    return FDivergence(given["f"], **{k: v for k, v in given.items() if k != "f"})


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p/q), clamped so that its exponential is finite; 0 if neither model has the entry; NaN for a NaN."""
    bound = 0.9 * math.log(torch.finfo(log_p.dtype).max)
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    return torch.where(neither, 0, log_p - log_q).clamp(-bound, bound)


def _larger(p: Tensor, q: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of p and q, and the factor on f that goes with it: ``q f = p·(f/t)``, where q is smaller."""
    return torch.where(u > 0, p, q), (-u.clamp_min(0)).exp()


@contextlib.contextmanager
def autograd_inside_an_operator() -> Iterator[None]:
    """Lets autograd run inside an operator, for a generator's f′: operators run below its dispatch keys, and inside the
    transforms (`torch.func`) of who calls them with tensors that are not theirs.
    """
    include = torch._C._dispatch_tls_local_include_set()
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(include, nothing), temporarily_clear_interpreter_stack():
        yield


def _validate_generator(generator: Callable[[Tensor], Tensor], name: str) -> None:
    t = torch.logspace(-3, 0, 301, dtype=torch.float64, device="cpu")  # whatever device models are being made on
    t = torch.cat([t, 1 / t.flip(0)[1:]])
    with torch.inference_mode(False), torch.enable_grad():
        u = t.log().clone().requires_grad_()
        try:
            value = generator(u * 1)  # which it may change in place
        except Exception as error:  # of a function of more than t, of one of numbers (math.log), of a mistake in it
            raise ValueError(f"{name}: f must be an elementwise function of a tensor: {error}") from error
    if not isinstance(value, Tensor) or value.shape != t.shape:
        raise ValueError(f"{name}: f must be elementwise: it takes a tensor and returns one of the same shape")
    if value.dtype != t.dtype:
        raise ValueError(f"{name}: f must keep the dtype of its argument, but made {value.dtype} of {t.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: f is not finite at t = {t[~value.isfinite()][0]:g}")
    at_one = value[300].item()
    if abs(at_one) > 1e-6:
        raise ValueError(f"{name}: f(1) must be 0, but f(1) = {at_one:g}")
    if not value.requires_grad:
        raise ValueError(f"{name}: f must be differentiable by autograd")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            (slope,) = torch.autograd.grad(value.sum(), u)
    except RuntimeError as error:
        raise ValueError(f"{name}: f must be differentiable by autograd: {error}") from error
    if not slope.isfinite().all():
        raise ValueError(f"{name}: f has no finite slope at t = {t[~slope.isfinite()][0]:g}")
    with torch.inference_mode(False), torch.enable_grad():
        try:
            of_some = generator(u.detach()[1::2] * 1)
        except Exception as error:  # of a tensor that fits one size
            raise ValueError(f"{name}: f must be an elementwise function of a tensor: {error}") from error
        if of_some.requires_grad:
            raise ValueError(f"{name}: f {PARAMETER}")
    if of_some.shape != t[1::2].shape or not torch.allclose(of_some, value.detach()[1::2], 1e-6, 1e-9):
        raise ValueError(f"{name}: f must be elementwise: its values at some t depend on the others beside them")
    slopes = value.detach().diff() / t.diff()
    falls = slopes.diff() < -1e-6 * (1 + slopes[1:].abs())
    if falls.any():
        raise ValueError(f"{name}: f must be convex, but its slope falls near t = {t[1:-1][falls][0]:g}")


#: As in alpha=0.3, or in ab(0.2, 0.7); made here, where no compiler traces how.
WITH_PARAMETERS = re.compile(r"(\w+)(?:=([^()]+)|\(([^()]+)\))")


def resolve(divergence: str | Divergence | Callable[[Tensor], Tensor]) -> Divergence:
    """The `Divergence` of a name (parameters as in "alpha=0.3" or "ab(0.2, 0.7)"), an instance or a generator f(t).

    Raises:
        ValueError: an unknown name (the message suggests the nearest ones), or parameters that it does not take.
        TypeError: anything else.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str):
        if divergence in TABLE:
            return resolve(TABLE[divergence])  # users may add a generator
        if (given := WITH_PARAMETERS.fullmatch(divergence)) and given[1] in TABLE:
            return _with_parameters(given[1], given[2] or given[3])
        near = _meant(divergence)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(TABLE)}"
        raise ValueError(f"unknown divergence {divergence!r}; {hint}")
    if isinstance(divergence, type) or any(divergence is make for make, _ in PARAMETERS.values()):
        name = divergence.__name__  # type: ignore[union-attr]
        raise TypeError(f"divergence is {name} itself: call it, as in {name}(...)")
    if callable(divergence):
        return FDivergence(divergence)
    raise TypeError(f"divergence must be a name, a Divergence or a function f(t), not {type(divergence).__name__}")


#: What papers and other libraries call the divergences, and our names. Only an error's suggestion reads it.
ALIASES = {
    ("forward_kl", "fkl", "kl_div", "kld", "kullback_leibler"): ("kl",),
    ("reverse_kl", "reversed_kl", "backward_kl", "rev_kl"): ("rkl",),
    ("jensen_shannon", "jsd"): ("js", "gjs"),
    ("generalized_jsd", "generalized_js", "generalized_jensen_shannon", "gjsd"): ("gjs",),
    ("total_variation", "tv", "total_variation_distance", "l1"): ("tvd",),
    ("symmetric_kl", "j"): ("jeffreys",),
    ("skl", "skew_forward_kl", "sfkl", "skewed_kl"): ("skew_kl",),
    ("srkl", "skew_reverse_kl", "skewed_rkl"): ("skew_rkl",),
    ("bhattacharyya",): ("renyi=0.5",),
    ("chi2", "chi_2", "chi_squared", "chi_square", "chisquare"): ("pearson",),
    ("reverse_chi2", "reverse_chi_squared"): ("neyman",),
    ("squared_hellinger", "hellinger_squared", "hellinger2"): ("hellinger",),
    ("le_cam", "vincze_le_cam"): ("triangular",),
    ("ce", "crossentropy", "xent", "soft_cross_entropy"): ("cross_entropy",),
    ("alpha_beta", "abkd"): ("ab",),
    ("adaptive_kl",): ("akl",),
    ("decoupled", "decoupled_kd"): ("dkd",),
}


def _meant(text: str) -> list[str]:
    """The names of the table that someone may have meant."""
    word = re.sub(r"[^a-z0-9]+", "_", re.split(r"[=(]", text.lower())[0]).strip("_")
    word = re.sub(r"(?<=.)_(divergence|loss)$", "", word)
    for others, names in ALIASES.items():
        if word in others:
            return list(names)
    return [word] if word in TABLE else difflib.get_close_matches(word, TABLE, n=3, cutoff=0.6)


def _without_names(name: str, names: tuple[str, ...], values: list[str]) -> str:
    """Parameters that were given by name, in the form that is read: with the others' defaults, in order."""
    named = {key.strip(): value.strip() for key, _, value in (x.rpartition("=") for x in values)}
    if unknown := [key for key in named if key not in names]:
        raise ValueError(f"{name} takes {', '.join(names)}, not {unknown[0] or named[unknown[0]]}")
    defaults = {key: f"{x:g}" if isinstance(x, float) else x for key, x in TABLE[name].named.items()}
    return f"{name}={','.join((defaults | named).values())}"


def _with_parameters(name: str, given: str) -> Divergence:
    """A family's divergence, with its parameters given as text."""
    if name not in PARAMETERS:
        raise ValueError(f"{name} takes no parameter")
    make, names = PARAMETERS[name]
    values = [x.strip() for x in given.split(",")]
    if "=" in given:
        shown = _without_names(name, names, values)
        raise ValueError(f"{name}'s parameters are given without their names: {shown}")
    if len(values) > len(names):
        raise ValueError(f"{name} takes {', '.join(names)}, not {given}")
    try:
        parameters = [x if x.isalpha() else float(x) for x in values]
    except ValueError:
        raise ValueError(f"{name} takes {', '.join(names)} as numbers, not {given}") from None
    return make(*parameters)
