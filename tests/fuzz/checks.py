"""What a call must be: equal to the float64 loss within tolerances, or refused with an argument's name."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .exact import FAR, HUGE, TRAINED, Exact, of_rounding
from .layouts import Draw

#: What a call of fitting arguments may still be refused for.
REFUSALS = ("inplace=True", "cannot take this call", "shares memory", "requires grad")


class Failure(Exception):
    """A call that is neither right nor refused with a reason."""


def called(draw: Draw, function: Callable[..., Any], a: dict[str, Any], names: Iterable[str]) -> Any:
    """What the function returns, or None where it refuses with a reason."""
    try:
        return function(**a)
    except (ValueError, TypeError) as error:
        text = str(error)
        if not any(re.search(rf"\b{name}\b", text) for name in names):
            raise Failure(f"no argument is named by {error!r}") from error
        if not draw.strange and not any(reason in text for reason in REFUSALS):
            raise Failure(f"refused: {error!r}") from error
        return None


def close(what: str, got: Tensor, want: Tensor, slack: Any) -> None:
    """Equal within slack; what is beyond float32 may be infinite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise Failure(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    same = ((got - want).abs() <= slack) | (got == want)
    same |= want.isnan() & ~got.isfinite()  # the softmax of nothing, squared
    same |= (want.abs() > HUGE) & (got.abs() > HUGE / 100) & ((got > 0) == (want > 0))
    same |= (want.abs() > FAR) & got.isinf() & ((got > 0) == (want > 0))
    if not same.all():
        at = [int(i[0]) for i in (~same).nonzero(as_tuple=True)] if same.dim() else ()
        off = (got - want).abs() / torch.as_tensor(slack).double().clamp_min(1e-300)
        raise Failure(f"{what}{list(at)} is {got[tuple(at)]:.8g}, not {want[tuple(at)]:.8g}: "
                      f"{int((~same).sum())} wrong, at most {off.nan_to_num(torch.inf).max():.3g} times the tolerance")  # fmt: skip


def unchanged(draw: Draw, before: list[Tensor]) -> None:
    """No buffer's bytes have changed."""
    for old, now in zip(before, draw.buffers, strict=True):
        if not torch.equal(old.reshape(-1).view(torch.int8), now.reshape(-1).view(torch.int8)):
            raise Failure(f"memory of a tensor {tuple(now.shape)} of {now.dtype} was written to")


def compare(name: str, a: dict[str, Any], loss: Tensor, want: Exact, leaves: dict[str, Tensor], draw: Draw) -> None:
    """Loss and gradients, for an upstream gradient that is not 1."""
    if not loss.dim() and (want.rows > HUGE).any() and (want.rows < -HUGE).any() and not loss.isfinite():
        return  # float32 has inf less inf there
    close("loss", loss, want.loss, want.slack.reshape(loss.shape) if loss.dim() else want.slack.sum())
    given = [a.get(k) for k in (TRAINED[name][0], *(() if "linear" in name else ("teacher_logits", "target")))]
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in given)
    if loss.dtype != (torch.float64 if wide else torch.float32):
        raise Failure(f"the loss is {loss.dtype}")
    upstream = torch.rand(loss.shape).to(loss.dtype) * draw.choice([1, 2, 3])
    factor = upstream.double().reshape(-1).expand(want.rows.shape)
    inputs = list(leaves.values())
    gradients = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    if draw.maybe(0.2) and not a.get("inplace"):
        for one, two in zip(gradients, torch.autograd.grad(loss, inputs, upstream), strict=True):
            close("second gradient", two, one, 0)
    *exacts, of_logits = torch.autograd.grad(
        (want.loss * upstream.double()).sum(), [*(want.leaves[k] for k in leaves), want.logits], allow_unused=True
    )
    first, floor = a[TRAINED[name][0]], want.floor * factor
    known = (want.rows.abs() < FAR) & (want.floor < HUGE) & want.slack.isfinite()
    if first.dtype == torch.float16 and ("linear" in name or a.get("inplace")):  # which its logits' gradients must fit
        known &= want.rows.abs() < 1e3 * want.weight.clamp_max(1)
    if "linear" in name:
        floor = floor + of_rounding(of_logits, want.error, first.dtype)
    for k, got, exact_gradient in zip(leaves, gradients, exacts, strict=True):
        x = a[k]
        if got.dtype != x.dtype or got.shape != x.shape:
            raise Failure(f"{k}'s gradient is {got.dtype} {tuple(got.shape)}")
        e = torch.zeros(x.shape).double() if exact_gradient is None else exact_gradient
        check_gradient(k, name, a, got.double(), e, want.error, floor, known)


def compare_measures(name: str, a: dict[str, Any], parts: Any, want: Exact) -> None:
    """What `SparseParts` says of a list; the overlap where no rounding of the logits changes their order."""
    if want.measures is None:
        return
    slack = want.error * want.weight.nan_to_num(0, 0)
    rounded = "linear" in name or "logit_softcap" in a
    for measure, exact_rows in zip(("teacher_mass", "student_mass", "overlap"), want.measures, strict=True):
        got, rows = getattr(parts, measure), exact_rows.sum() if not want.loss.dim() else exact_rows
        if measure == "overlap" and (rounded or not want.logits.isfinite().all()):
            continue
        close(measure, got, rows.reshape(got.shape), slack.reshape(got.shape) if got.dim() else slack.sum())


def check_gradient(
    k: str, name: str, a: dict[str, Any], got: Tensor, want: Tensor, error: Tensor, floor: Tensor, known: Tensor
) -> None:
    """Against the largest entry: of its row for what has rows, of the whole for a head."""
    info = torch.finfo(a[k].dtype)
    narrow = torch.finfo(torch.bfloat16) if info.bits < 32 else info
    if "linear" in name and (k in TRAINED[name][1:] or want.shape[:-1].numel() != len(known)):
        if not known.all() or not want.isfinite().all() or want.abs().max() > info.max / 2:
            return
        other = a[TRAINED[name]["weight" not in k]].detach()
        size = float(other.abs().nan_to_num(0).max()) if known.numel() and "bias" not in k else 1.0
        worst = error.max() if len(error) else 0
        close(
            f"{k}'s gradient", got, want, (worst + narrow.eps) * want.abs().max() + 20 * floor.sum() * size + info.tiny
        )
        return
    if name == "cross_entropy" and want.dim() > 2:
        got, want = got.movedim(1, -1), want.movedim(1, -1)
    got, want = (x.reshape(len(known), x.shape[-1]) for x in (got, want))
    fits = known & want.isfinite().all(1) & (want.abs().amax(-1) < info.max / 2)
    if "linear" in name:
        floor = 80 * floor * float(a[TRAINED[name][1]].detach().abs().max())
    slack = (error * want.abs().amax(-1) + floor + info.tiny).unsqueeze(1) + info.eps * want.abs()
    close(f"{k}'s gradient", got[fits], want[fits], slack[fits])
