"""The table of divergences: names, parameters, and the name of each one's kernel in the native backends.

The formulas at each vocabulary entry are in formulas.py and row_formulas.py.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import checks
from .formulas import Formula, RowStatistics
from .row_formulas import KERNELS

#: Parameters this close to a family's limit count as the limit: float32 cannot tell them apart.
NEAR = 1e-7

Terms = tuple[Tensor, Tensor]
TermsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float], Terms]


@dataclass(frozen=True)
class Divergence:
    """A divergence with fixed parameters.

    Attributes:
        name: the name that users write.
        terms: elementwise function ``(p, q, log_p, log_q, parameter) -> (q·g, p·f′)`` with g = f − t f′ at t = p/q, in
            any float dtype. For the divergences of the table it is a `Formula`.
        symbol: the kernel's name in native backends; None if only the torch backend has it.
        parameter: the first parameter (α, β, λ, ...); 0 if there is none.
        other: the second parameter; None means 1 − parameter, which many formulas use.
        scale: factor on the loss (hellinger is ¼ of alpha(½)).
        centred: whether Σ q g = 0 in every row, so that the gradient needs no sum over the row.
        triton: for a user's own divergence, both terms as a `@triton.jit` function; the table's are found by symbol.
        kernel: the symbol if native kernels compute exactly these terms; None for a user's own.
        key: text that stands for a divergence with a `kernel` in the arguments of an operator; `by_key` reads it.

    Raises:
        ValueError: a number is not finite as a float, or the parameter of the Alpha kernel is 0 or 1.
        TypeError: name is not text, terms is no function of five arguments, triton no such one, or a number is none.
    """

    name: str
    terms: TermsFunction = field(repr=False, compare=False)
    symbol: str | None = None
    parameter: float = 0.0
    scale: float = 1.0
    centred: bool = False
    triton: Any = field(default=None, repr=False, compare=False)
    other: float | None = None
    kernel: str | None = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.terms):
            raise TypeError("a Divergence needs a name and a function of its terms")
        if self.symbol is None:  # the table's do
            checks.check_takes(f"{self.name}: terms", self.terms, "p", "q", "log_p", "log_q", "parameter")
        if self.triton is not None and len(getattr(self.triton, "arg_names", ())) != 5:
            raise TypeError(f"{self.name}: triton must be a @triton.jit function of p, q, log_p, log_q and parameter")
        for what in ("parameter", "scale", "other"):
            value = getattr(self, what)
            if value is not None:
                object.__setattr__(self, what, checks.check_number(f"{self.name}: {what}", value))
        if self.symbol == "Alpha" and min(abs(self.parameter), abs(1 - self.parameter)) <= NEAR:
            raise ValueError(f"{self.name}: the parameter must not be 0 or 1, which are rkl and kl")
        formula = KERNELS.get(self.symbol or "")
        same = formula is not None and (formula, formula.centred) == (self.terms, self.centred) and self.triton is None
        object.__setattr__(self, "kernel", self.symbol if same else None)
        object.__setattr__(self, "key", f"{self.symbol} {self.parameter!r} {self.scale!r} {self.numbers[1]!r}")

    def __str__(self) -> str:
        shown = (f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in self.parameters)  # `resolve` reads it again
        return f"{self.name}({', '.join(shown)})" if self.parameters else self.name

    @property
    def parameters(self) -> tuple[float, ...]:
        """The parameters that the name takes, in order."""
        return self.numbers[: len(PARAMETERS[self.name][1])] if self.name in PARAMETERS else ()

    @property
    def named(self) -> dict[str, float | str]:
        """The parameters by their names, as its family's function takes them: of csd the model whose weights it has."""
        if self.name == "csd":
            return {"weight": _WEIGHTS[self.parameter]}
        return dict(zip(PARAMETERS[self.name][1], self.parameters, strict=True)) if self.parameters else {}

    @property
    def numbers(self) -> tuple[float, float]:
        """The two numbers in its formulas: `parameter`, and `other` or 1 − parameter."""
        return self.parameter, 1 - self.parameter if self.other is None else self.other

    @property
    def statistics(self) -> RowStatistics | None:
        """The sums over a row that its terms need first; None if they need none."""
        return self.terms.statistics if isinstance(self.terms, Formula) else None

    @property
    def needs_labels(self) -> bool:
        """Whether it needs `labels`: it compares the label with the rest of the vocabulary."""
        return self.statistics is not None and self.statistics.members == "label"

    @functools.cached_property
    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Constants that native kernels take, for both orders of the models: `Formula.constants`."""
        formula = KERNELS[self.kernel or ""]
        return (
            formula.constants(*self.numbers),
            KERNELS[formula.exchanged].constants(*formula.of_exchanged(*self.numbers)),
        )


def _of_kernel(
    name: str, symbol: str, parameter: float = 0.0, scale: float | None = None, other: float | None = None
) -> Divergence:
    formula = KERNELS[symbol]
    # not a default: of those dynamic compilers make symbols, which no key can have
    scale = 1.0 if scale is None else scale
    return Divergence(name, formula, symbol, parameter, scale, formula.centred, other=other)


KL = _of_kernel("kl", "Kl")
RKL = _of_kernel("rkl", "Rkl")
JS = _of_kernel("js", "Gjs", 0.5)
TVD = _of_kernel("tvd", "Tvd")
JEFFREYS = _of_kernel("jeffreys", "Jeffreys")
HELLINGER = _of_kernel("hellinger", "Alpha", 0.5, scale=0.25)
PEARSON = _of_kernel("pearson", "Alpha", 2.0, scale=2.0)
NEYMAN = _of_kernel("neyman", "Alpha", -1.0, scale=2.0)
TRIANGULAR = _of_kernel("triangular", "Triangular")
ENGINE = _of_kernel("engine", "Engine")
CROSS_ENTROPY = _of_kernel("cross_entropy", "CrossEntropy")
LK = _of_kernel("lk", "Lk")
"""−log Σ min(p, q) = −log(1 − TVD): minus the log rate of acceptance in speculative decoding (arXiv 2602.23881).

Models without a common entry: inf, with a zero gradient."""


def _symbol(family: str, parameter: float, limits: dict[float, str]) -> str:
    """The kernel at a parameter: the family's, but for its limits'."""
    for at, limit in limits.items():  # a loop: compilers of torch 2.8 know no default of `next`
        if abs(parameter - at) <= NEAR:
            return limit
    return family


def _parameter(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) and low <= value <= high):
        raise ValueError(f"{name} must be a number in [{low}, {high}], not {value!r}")
    return float(value)


def GJS(beta: float = 0.5) -> Divergence:
    """β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q, 0 ≤ β ≤ 1. As in TRL's GKD, β = 0 is kl and β = 1 is rkl.

    Raises:
        ValueError: β is outside [0, 1], or less than 1e-6 from 0 or 1 but not equal to it: there the value goes to 0
            and loses its digits, although it is a whole KL at 0 and 1.
    """
    beta = _parameter("beta", beta, 0, 1)
    if 0 < min(beta, 1 - beta) < 1e-6:
        raise ValueError(f"beta must be 0, 1, or at least 1e-6 from both, not {beta!r}: 0 is kl and 1 is rkl")
    return _of_kernel("gjs", _symbol("Gjs", beta, {0.0: "Kl", 1.0: "Rkl"}), beta)


def SkewKL(lam: float = 0.1) -> Divergence:
    """KL(p ‖ λp + (1−λ)q), 0 ≤ λ < 1 (DistiLLM, Ko et al. 2024). λ ≤ 1e-7, which float32 cannot tell from 0, is kl.

    Raises:
        ValueError: λ is outside [0, 1 − 1e-6].
    """
    lam = _parameter("lam", lam, 0, 1 - 1e-6)
    return _of_kernel("skew_kl", _symbol("SkewKl", lam, {0.0: "Kl"}), lam)


def SkewRKL(lam: float = 0.1) -> Divergence:
    """KL(q ‖ λq + (1−λ)p), 0 ≤ λ < 1 (DistiLLM, Ko et al. 2024). λ ≤ 1e-7, which float32 cannot tell from 0, is rkl.

    Raises:
        ValueError: λ is outside [0, 1 − 1e-6].
    """
    lam = _parameter("lam", lam, 0, 1 - 1e-6)
    return _of_kernel("skew_rkl", _symbol("SkewRkl", lam, {0.0: "Rkl"}), lam)


def Alpha(alpha: float = 0.5) -> Divergence:
    """(Σ p^α q^(1−α) − 1) / (α(α−1)), α in [−8, 8]; α = 1 is kl, α = 0 is rkl, α = ½ is 4·hellinger.

    An α within 1e-7 of 0 or 1 counts as 0 or 1: float32 cannot tell them apart.

    Raises:
        ValueError: α is outside [−8, 8].
    """
    alpha = _parameter("alpha", alpha, -8, 8)
    return _of_kernel("alpha", _symbol("Alpha", alpha, {0.0: "Rkl", 1.0: "Kl"}), alpha)


def Renyi(alpha: float = 0.5) -> Divergence:
    """log(Σ p^α q^(1−α)) / (α − 1), α in [1e-3, 8] (Rényi 1961); α = 1 is kl. Models without a common entry: inf.

    Raises:
        ValueError: α is outside [1e-3, 8].
    """
    alpha = _parameter("alpha", alpha, 1e-3, 8)
    return _of_kernel("renyi", _symbol("Renyi", alpha, {1.0: "Kl"}), alpha)


def AB(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """−Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] / (αβ), α and β in [−8, 8]; its limits where α, β or α + β is 0.

    ABKD (Wang et al. 2025, arXiv 2505.04560). With β = 1 − α it is `Alpha(alpha)`: kl at (1, 0), rkl at (0, 1).

    Raises:
        ValueError: α or β is outside [−8, 8]; or α, β or α + β is less than 1e-3 from 0 but not 0, where the value
            loses its digits.
    """
    alpha, beta = _parameter("alpha", alpha, -8, 8), _parameter("beta", beta, -8, 8)
    for name, value in (("alpha", alpha), ("beta", beta), ("alpha + beta", alpha + beta)):
        if NEAR < abs(value) < 1e-3:
            raise ValueError(f"{name} must be 0 or at least 1e-3 from it, not {value!r}")
    alpha, beta = (0.0 if abs(x) <= NEAR else x for x in (alpha, beta))
    if abs(alpha + beta - 1) <= NEAR:
        return _of_kernel("ab", _symbol("Alpha", alpha, {0.0: "Rkl", 1.0: "Kl"}), alpha, 1.0, beta)
    return _of_kernel("ab", "Ab", alpha, 1.0, 0.0 - alpha if abs(alpha + beta) <= NEAR else beta)


def ToDi(beta: float = 1.0) -> Divergence:
    """Σ a p log(p/q) + (1 − a) q log(q/p), a = σ(β log(p/q)) at each entry, 0 ≤ β ≤ 8; no gradient through a.

    ToDi (Jung et al. 2025, arXiv 2505.16297).

    Raises:
        ValueError: β is outside [0, 8].
    """
    return _of_kernel("todi", "Todi", _parameter("beta", beta, 0, 8))


def AKL(mu: float = 0.5) -> Divergence:
    """w KL(p‖q) + (1 − w) KL(q‖p), where w is the head's share of Σ|p − q|; no gradient flows through w.

    The head is the smallest set of the teacher's largest entries with a mass of at least μ, 0 < μ < 1; ties are in it
    together. AKL (Wu et al. 2024, arXiv 2404.02657); the authors' code has the entry that reaches μ in the tail, unless
    it is the first.

    Raises:
        ValueError: μ is outside [1e-6, 1 − 1e-6].
    """
    return _of_kernel("akl", "Akl", _parameter("mu", mu, 1e-6, 1 - 1e-6))


def EntropyGated(tau: float = 0.8) -> Divergence:
    """KL(q‖p), plus KL(p‖q) in rows where the teacher's entropy is above τ nats (arXiv 2603.07079).

    Raises:
        ValueError: τ is outside [0, 1e6].
    """
    return _of_kernel("entropy_gated", "EntropyGated", _parameter("tau", tau, 0, 1e6))


def TailAware(k: int = 16, beta: float = 1.0) -> Divergence:
    """KL over the teacher's K largest entries and the rest as one entry, plus β times the KL inside the rest.

    Entries that tie with the K-th are among the largest. It is kl if K holds the vocabulary, or if β is the teacher's
    mass α of the rest. Where a model has nothing in the rest, the KL inside it counts as 0. Tail-aware distillation
    (Dasgupta et al. 2026, arXiv 2602.20816, eq. 3) has β α over the sequence's mean of α in the place of β:
    docs/papers.md has its call.

    Raises:
        ValueError: K is not an integer in [1, 2^20], or β is outside [0, 1e6].
    """
    count, beta = _parameter("k", k, 1, 2**20), _parameter("beta", beta, 0, 1e6)
    if not count.is_integer():
        raise ValueError(f"k must be an integer, not {k!r}")
    return _of_kernel("tail_aware", "TailAware", count, 1.0, beta)


def DKD(alpha: float = 1.0, beta: float = 8.0) -> Divergence:
    """α times the KL of label against all other entries, plus β times the KL among the other entries; needs `labels`.

    Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679). Where a model has nothing but
    the label, the KL among the others counts as 0.

    Raises:
        ValueError: α or β is outside [0, 1e6].
    """
    alpha, beta = (_parameter(n, x, 0, 1e6) for n, x in (("alpha", alpha), ("beta", beta)))
    return _of_kernel("dkd", "Dkd", alpha, 1.0, beta)


def CSD(weight: str = "teacher") -> Divergence:
    """Σ w (u − Σ w u)², where u = z_s/T − z_t/T_t and w is p ("teacher") or q ("student"); no gradient flows through w.

    Concrete score distillation (Kim et al. 2025, arXiv 2509.25837), whose main loss is half of that of "student".

    Raises:
        ValueError: weight is neither "teacher" nor "student".
    """
    weights = {word: number for number, word in _WEIGHTS.items()}
    if not isinstance(weight, (str, int, float)) or weight not in (*weights, *weights.values()):
        raise ValueError(f"weight must be 'teacher' or 'student', not {weight!r}")
    return _of_kernel("csd", "Csd", weights.get(weight, weight))  # type: ignore[arg-type]


_WEIGHTS = {0.0: "student", 1.0: "teacher"}  # of csd


_FAMILIES: dict[str, Callable[..., Divergence]] = {
    "gjs": GJS, "skew_kl": SkewKL, "skew_rkl": SkewRKL, "alpha": Alpha, "renyi": Renyi, "ab": AB, "todi": ToDi,
    "akl": AKL, "entropy_gated": EntropyGated, "tail_aware": TailAware, "dkd": DKD, "csd": CSD,
}  # fmt: skip
#: Each family and the names of its parameters, which `resolve` reads.
PARAMETERS = {name: (make, tuple(inspect.signature(make).parameters)) for name, make in _FAMILIES.items()}

TABLE: dict[str, Divergence] = {
    d.name: d
    for d in (KL, RKL, JS, TVD, JEFFREYS, GJS(), SkewKL(), SkewRKL(), Alpha(), HELLINGER, PEARSON, NEYMAN, TRIANGULAR,
              ENGINE, CROSS_ENTROPY, LK, Renyi(), AB(), ToDi(), AKL(), EntropyGated(), TailAware(), DKD(), CSD())
}  # fmt: skip
"""Every divergence by its name, with default parameters, in the order of the docs."""


@functools.lru_cache(maxsize=256)
def by_key(key: str) -> Divergence:
    """The divergence that a `Divergence.key` stands for.

    Raises:
        ValueError: there is no such kernel.
    """
    symbol, _, rest = key.partition(" ")
    if symbol not in KERNELS:
        raise ValueError(f"no kernel is named {symbol!r}; known: {', '.join(KERNELS)}")
    parameter, scale, other = map(float, rest.split())
    return _of_kernel(symbol, symbol, parameter, scale, other)
