"""Random calls on ranks that hold each a part of the vocabulary, against `exact`.

    python -m tests.fuzz.ranks --ranks 3 --seconds 60 --seed 0
    python -m tests.fuzz.ranks --ranks 3 --seed 0 --only 1234        the one call that a failure names

All ranks draw the same call and cut it at the same places. Gradients of what is cut are put together again, so that
each rank compares the whole.
"""

import datetime
import inspect
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from transformers import HfArgumentParser

import fdistill_kernels as fk

from . import arguments as drawn
from .checks import called, compare
from .exact import TRAINED, exact
from .fuzz import dense
from .layouts import Draw

#: What lies along the vocabulary, and in which dimension.
CUT = {
    "student_logits": -1, "teacher_logits": -1, "logits": -1, "student_weight": 0, "student_bias": 0,
    "teacher_weight": 0, "teacher_bias": 0, "linear_weight": 0, "linear_bias": 0,
}  # fmt: skip


@dataclass
class Arguments:
    """What to run."""

    ranks: int = field(default=2, metadata={"help": "over how many the vocabulary is split"})
    seconds: float = field(default=60.0, metadata={"help": "how long to go on"})
    seed: int = field(default=0, metadata={"help": "of the whole run"})
    only: int = field(default=-1, metadata={"help": "run this one call, and say what it was given"})


class Part(torch.autograd.Function):
    """A rank's part of a tensor along one dimension; its gradient is the whole tensor's, on all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, begin: int, size: int) -> Tensor:
        ctx.given = whole.shape, dim, begin, size
        return whole.narrow(dim, begin, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shape, dim, begin, size = ctx.given
        whole = gradient.new_zeros(shape)
        whole.narrow(dim, begin, size).copy_(gradient)
        dist.all_reduce(whole)
        return whole, None, None, None


def drawn_call(draw: Draw) -> tuple[str, dict[str, Any], list[int]] | None:
    """A function, the whole call, and where the ranks' parts begin and end; None: no ranks can make it."""
    name = draw.choice(tuple(TRAINED))
    a = getattr(drawn, name)(draw)
    first, target = a[TRAINED[name][0]], a.get("target")
    v = (
        a[TRAINED[name][1]].shape[0]
        if "linear" in name
        else first.shape[min(1, first.dim() - 1) if "input" in a else -1]
    )
    alone = "vocab_size" in a or isinstance(a.get("teacher_hidden"), drawn.Given)
    alone |= target is not None and target.is_floating_point()
    alone |= "linear_weight" in a and a["linear_weight"].dim() > 2  # several heads
    if draw.strange or alone or v < dist.get_world_size():
        return None
    kept = {k: x for k, x in a.items() if k not in ("inplace", "memory")}
    return name, kept, [0, *sorted(draw.sample(range(1, v), dist.get_world_size() - 1)), v]


def cut(name: str, a: dict[str, Any], begin: int, size: int, vocabulary: int) -> dict[str, Any]:
    """A rank's own call."""
    dims = dict(CUT)
    if name == "cross_entropy":
        dims["input"] = min(1, a["input"].dim() - 1)
    if name == "linear_f_divergence" and "teacher_weight" not in a:
        dims["teacher_hidden"] = -1  # which are logits
    mine = {k: Part.apply(x, dims[k], begin, size) if k in dims and isinstance(x, Tensor) else x for k, x in a.items()}
    return mine | {"shard": fk.vocab_shard(None, size, vocabulary)}


def one_call(draw: Draw) -> str:
    """One call; what it was."""
    if (made := drawn_call(draw)) is None:
        return "left out"
    name, a, ends = made
    leaves = {k: a[k].detach().requires_grad_() for k in TRAINED[name] if isinstance(a.get(k), Tensor) and dense(a[k])}
    a |= leaves
    if a.get("teacher_weight") is not None and a["teacher_weight"].requires_grad:
        a["teacher_weight"] = a["teacher_weight"].detach()
    draw.say(name, a | {"ends": ends})
    want, rank = exact(name, a), dist.get_rank()
    function = getattr(fk, name)
    loss = called(draw, function, cut(name, a, ends[rank], ends[rank + 1] - ends[rank], ends[-1]),
                  [*inspect.signature(function).parameters, *fk.TopK._fields])  # fmt: skip
    if loss is None:
        return f"{name} refused"
    compare(name, a, loss[0] if a.get("return_parts") is True else loss, want, leaves, draw)
    return name


def work(rank: int, arguments: Arguments, folder: str) -> None:
    """Calls until the time is over; ends with 1 after failures."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", f"file://{Path(folder) / 'ranks'}", datetime.timedelta(seconds=60), arguments.ranks, rank
    )
    end, seen, failures, at = time.monotonic() + arguments.seconds, Counter(), 0, max(arguments.only, 0)
    while True:
        draw = Draw(arguments.seed, at)
        torch.set_num_threads(1)
        try:
            seen[one_call(draw)] += 1
        except Exception as error:  # of any kind: that is what is looked for
            failures += 1
            print(
                f"--seed {arguments.seed} --only {at}, rank {rank}: {type(error).__name__}: {error}\n{draw.said}",
                flush=True,
            )
        at += 1
        going = torch.tensor(int(time.monotonic() < end and failures < 20 and arguments.only < 0))
        dist.all_reduce(going, dist.ReduceOp.MIN)
        if not going:
            break
    if rank == 0:
        print(
            draw.said if arguments.only >= 0 else ", ".join(f"{n} {what}" for what, n in sorted(seen.items())),
            flush=True,
        )
    sys.exit(failures > 0)


def run(arguments: Arguments) -> None:
    """Starts the ranks; an error where one of them has failed."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (arguments, folder), arguments.ranks)


if __name__ == "__main__":
    run(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
