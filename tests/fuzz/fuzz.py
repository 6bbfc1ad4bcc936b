"""Random calls of every public function and operator, with tensors of any layout, value and size.

    python -m tests.fuzz.fuzz --seconds 600 --seed 0      many calls, each from its own seed
    python -m tests.fuzz.fuzz --seed 0 --only 1234        the one call that a failure names

A call agrees with `exact`, or raises a ValueError or TypeError that names an argument; one whose arguments fit may only
be refused for the reasons in `checks.REFUSALS`.
"""

import inspect
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

import fdistill_kernels as fk
from fdistill_kernels import backends

from . import arguments as drawn
from .checks import Failure, called, close, compare, compare_measures, unchanged
from .exact import HUGE, TRAINED, exact
from .layouts import Draw
from .operators import operator_call

MODULES = {"f_divergence": fk.FDivergenceLoss, "linear_f_divergence": fk.LinearFDivergenceLoss,
           "cross_entropy": fk.CrossEntropyLoss, "linear_cross_entropy": fk.LinearCrossEntropyLoss}  # fmt: skip
MOST_FAILURES = 20


@dataclass
class Arguments:
    """What to run."""

    seconds: float = field(default=60.0, metadata={"help": "how long to go on"})
    seed: int = field(default=0, metadata={"help": "of the whole run"})
    backend: str | None = field(default=None, metadata={"help": "of all calls, such as triton in its interpreter, which "
                                "takes a hundred times as long; default: cpu, torch or none, at random"})  # fmt: skip
    only: int = field(default=-1, metadata={"help": "run this one call, and say what it was given"})


def dense(x: Tensor) -> bool:
    """What may require grad here."""
    return x.is_floating_point() and x.layout == torch.strided and not x.is_meta


def public_call(draw: Draw) -> str:
    """A public function or its module, against `exact`; what was called."""
    name = draw.choice(tuple(TRAINED))
    a = getattr(drawn, name)(draw)
    if draw.maybe(0.12):
        drawn.spoil(draw, a)
    a |= {"backend": draw.one_of("cpu", "torch")} if draw.maybe(0.5) or Draw.backend else {}
    function = getattr(fk, name)
    leaves = [k for k in TRAINED[name] if isinstance(a.get(k), Tensor) and dense(a[k])
              and (k == TRAINED[name][0] or draw.maybe(0.5))]  # fmt: skip
    inputs = [a[k].detach().requires_grad_() for k in leaves]
    a |= {k: x.view_as(x) if draw.maybe(0.5) else x for k, x in zip(leaves, inputs, strict=True)}  # as models make them
    if a.get("teacher_weight") is not None and a["teacher_weight"].requires_grad:
        a["teacher_weight"] = a["teacher_weight"].detach()
    draw.say(name, a)
    run = a
    if name in MODULES and draw.maybe(0.2):
        function, run = module(name, a)
    before = [b.clone() for b in draw.buffers]
    old = a[leaves[0]].detach().clone() if a.get("inplace") is True and leaves else None
    want, problem = None, None
    try:
        want = exact(name, a)
    except Exception as error:  # whatever does not fit there either
        problem = error
    loss = called(draw, function, run, [*inspect.signature(getattr(fk, name)).parameters, *fk.TopK._fields])
    if loss is None:
        unchanged(draw, before)
        return f"{name} refused"
    if want is None and not a[TRAINED[name][0]].numel():
        return f"{name} of nothing"  # a teacher's function is not asked for no rows
    if want is None:
        raise Failure(f"taken, though the reference cannot: {problem!r}")
    if a.get("return_parts") is True:
        loss, parts = loss
        of_labels = a.get("ce_weight", 1.0 if "target" in a else 0.0)
        whole = parts.divergence + parts.z_loss + (of_labels * parts.cross_entropy if of_labels else 0)
        slack = want.slack.reshape(loss.shape) if loss.dim() else want.slack.sum()
        close("sum of the parts", whole.nan_to_num(0, HUGE, -HUGE), loss.detach().nan_to_num(0, HUGE, -HUGE), slack)
        close("tokens", parts.tokens, torch.tensor(want.tokens), 0)
        compare_measures(name, a, parts, want)
    compare(name, a, loss, want, dict(zip(leaves, inputs, strict=True)), draw)
    if old is not None:  # the entries that were compared: padding may share their memory
        a[leaves[0]].detach()[..., : a.get("vocab_size")].copy_(old[..., : a.get("vocab_size")])
    unchanged(draw, before)
    beside = a.get("teacher_logits", a.get("teacher_hidden"))
    return f"{name} of a list, {beside.tail}" if isinstance(beside, fk.TopK) else name


def module(name: str, a: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The module of a function with its settings fixed, and what is left to give it."""
    own = ("weight",) if name.endswith("cross_entropy") else ()
    batch = {k: v for k, v in a.items() if k not in own and isinstance(v, (Tensor, drawn.Given, fk.TopK))}
    return lambda **rest: MODULES[name](**{k: v for k, v in a.items() if k not in batch})(**rest), batch


def one_call(seed: int, index: int, tell: bool) -> tuple[str, bool]:
    """One call; what it was, or what was wrong with it."""
    warnings.simplefilter("ignore")  # torch's, of the casts that misfit arguments are put through
    draw = Draw(seed, index)
    try:
        what = operator_call(draw) if draw.maybe(0.2) else public_call(draw)
        return f"{what}\n{draw.said}" if tell else what, True
    except Exception as error:  # of any kind: that is what is looked for
        return f"--seed {seed} --only {index}: {type(error).__name__}: {error}\n{draw.said}", False


def work(arguments: Arguments, at: Any, failures: Any) -> None:
    """Calls until the time is over."""
    Draw.backend = arguments.backend
    end, seen = time.monotonic() + arguments.seconds, Counter()
    while time.monotonic() < end and failures.value < MOST_FAILURES:
        what, right = one_call(arguments.seed, at.value, False)
        seen[what] += right
        failures.value += not right
        if not right:
            print(what, flush=True)
        at.value += 1
    print(f"seed {arguments.seed}, {backends.cpu.capability()}: {at.value} calls, {failures.value} failures;",
          ", ".join(f"{n} {what}" for what, n in sorted(seen.items()) if n), flush=True)  # fmt: skip


def main() -> int:
    """0 where every call was right or refused with a reason."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if backends.cpu.NOT_LOADED:
        raise SystemExit(f"the native backend is what is to be tried: {backends.cpu.NOT_LOADED}")
    if arguments.only >= 0:
        Draw.backend = arguments.backend
        what, right = one_call(arguments.seed, arguments.only, True)
        print(what)
        return int(not right)
    process = multiprocessing.get_context("spawn")
    at, failures = process.Value("q", 0), process.Value("q", 0)
    worker = process.Process(target=work, args=(arguments, at, failures))
    worker.start()
    worker.join()
    if worker.exitcode:  # a crash, or a sanitizer's report
        print(f"the process ended with {worker.exitcode} in --seed {arguments.seed} --only {at.value}")
    return int(worker.exitcode != 0 or failures.value > 0)


if __name__ == "__main__":
    sys.exit(main())
