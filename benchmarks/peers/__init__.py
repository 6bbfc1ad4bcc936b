"""The losses of other libraries, one adapter file for each library, and our call that computes the same loss.

    for peer in found("rows", "kl"):
        print(peer.name, peer.call, peer.why_not("cpu") or peer.loss(student_logits, teacher_logits))

An adapter makes up for the differences of its library (scale, reduction, clamps), so that each loss here is a mean over
rows. Its docstring lists them. `measure` checks that the losses are the same before anything is timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill_kernels import Divergence, Logits, cross_entropy, linear_cross_entropy, linear_f_divergence
from fdistill_kernels.backends import triton
from fdistill_kernels.bench import our_loss
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.own import resolve
from fdistill_kernels.reference import example_labels, f_divergence_rows

Loss = Callable[..., Tensor]
#: The arguments of the losses of each form. The cross-entropy, "labels", takes labels (N,) in the teacher's place.
FORMS = {
    "rows": ("student_logits", "teacher_logits"),
    "linear": ("hidden", "weight", "teacher_hidden", "teacher_weight"),
    "beside": ("hidden", "weight", "teacher_logits"),
}
#: The packages whose versions decide what is measured.
PACKAGES = ("triton", "liger-kernel", "orda-kernel", "trl", "cut-cross-entropy", "quack-kernels", "nvidia-modelopt",
            "distillkit", "speculators")  # fmt: skip
ADAPTERS = ("pytorch", "liger", "orda", "trl", "cce", "quack", "modelopt", "distillkit", "speculators")


@dataclass(frozen=True)
class Peer:
    """One loss of another library.

    Attributes:
        name: the library. More is added if the library has several such losses, or if its formula is written here.
        form: a key of `FORMS`: from logits (N, V), or from hidden states (N, D) and a weight (V, D).
        divergence: our name for what it computes; "labels" is the cross-entropy to labels.
        make: imports the library and returns its loss as a mean over rows.
        where: "any" device; "triton", a GPU or Triton's interpreter; or "card", a GPU only.
        timed: in the same words, where its own implementation runs. Elsewhere a fallback in plain torch takes the call,
            which is compared with ours, but not timed.
    """

    name: str
    form: str
    divergence: str
    make: Callable[[], Loss]
    where: str = "any"
    timed: str = "any"

    @property
    def call(self) -> str:
        """Our call that computes the same loss, as text."""
        given, name = list(FORMS[self.form]), "linear_" if self.form != "rows" else ""
        if self.divergence == "labels":
            return f"{name}cross_entropy({', '.join(given[: 1 + bool(name)])}, labels)"
        if self.form == "beside":
            given[2] = "Logits(teacher_logits)"
        return f"{name}f_divergence({', '.join(given)}, divergence={self.divergence!r})"

    @functools.cached_property
    def loss(self) -> Loss:
        """The loss: a function of the form's tensors that returns the mean over rows, ()."""
        return self.make()

    def why_not(self, device: str) -> str | None:
        """The reason why the loss cannot run on a device, or None if it can."""
        if not _serves(self.where, device):
            return "its kernels need a GPU"
        try:
            _ = self.loss
        except Exception as error:  # other libraries raise all kinds of errors when they, or parts of them, are missing
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
        return None

    def why_not_timed(self, device: str) -> str | None:
        """The reason why the loss cannot be timed on a device, or None if it can."""
        fallback = "compared, but not timed: its kernels need a GPU, and a fallback in plain torch took the call"
        return self.why_not(device) or (None if _serves(self.timed, device) else fallback)


def _serves(where: str, device: str) -> bool:
    return where == "any" or (where == "triton" and triton.interpreting()) or device.startswith("cuda")


@functools.cache
def every() -> tuple[Peer, ...]:
    """The losses of all adapters; torch.compile's come last."""
    modules = [importlib.import_module(f".{adapter}", __name__) for adapter in ADAPTERS]
    peers = [peer for module in modules for peer in module.PEERS]
    return tuple(sorted(peers, key=lambda peer: peer.name == "torch.compile"))


def found(form: str | None, divergence: str | Divergence) -> list[Peer]:
    """The peers that compute a divergence from inputs of a form (None: of any form), even if they cannot run here."""
    name = next((name for name, its in TABLE.items() if its == divergence), str(divergence))
    return [peer for peer in every() if peer.divergence == name and form in (None, peer.form)]


def running(form: str, divergence: str, device: str) -> dict[str, Loss]:
    """The losses of `found` that can be timed on a device, by name."""
    return {peer.name: peer.loss for peer in found(form, divergence) if peer.why_not_timed(device) is None}


def ours(form: str, divergence: str | Divergence, backend: str = "auto") -> Loss:
    """Our loss for the tensors of a form. Divergences that need labels are from logits, and get example labels."""
    if divergence == "labels":
        return functools.partial(cross_entropy if form == "rows" else linear_cross_entropy, backend=backend)
    if form == "rows":
        return our_loss(resolve(divergence), backend)
    linear = functools.partial(linear_f_divergence, divergence=divergence, backend=backend)
    return linear if form == "linear" else lambda hidden, weight, teacher: linear(hidden, weight, Logits(teacher))


def truth(form: str, divergence: str | Divergence, rows: Loss | None = None) -> Loss:
    """A divergence of float64 tensors of a form, through whole logits; `rows` is the loss of logits.

    By default it is the definition in plain torch, which shares nothing with our formulas.
    """

    def definition(student: Tensor, teacher: Tensor) -> Tensor:
        if divergence == "labels":
            return torch.nn.functional.cross_entropy(student, teacher)
        labels = example_labels(resolve(divergence), student)
        return f_divergence_rows(student, teacher, divergence, labels=labels).mean()

    def loss(*inputs: Tensor) -> Tensor:
        student, *teacher = inputs if form == "rows" else (inputs[0] @ inputs[1].T, *inputs[2:])
        logits = teacher[0] if len(teacher) == 1 else teacher[0] @ teacher[1].T
        return (rows or definition)(student, logits)

    return loss
