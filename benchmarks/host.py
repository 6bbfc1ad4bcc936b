"""What a step costs its host: forward and backward of so few and short rows that the kernel takes next to nothing.

    python -m benchmarks.host --out benchmarks/results/host_cpu.json

On a CPU, in one thread, beside PyTorch's own losses of the same logits in the same run. On a GPU the launches come on
top, of which tests/test_host_cost.py holds the number.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fdistill_kernels as fk
from fdistill_kernels.bench import eager_loss, make_logits, training_step
from fdistill_kernels.divergences import JS, KL
from fdistill_kernels.options import written
from fdistill_kernels.provenance import provenance

SHAPE = 8, 64
STEPS, RUNS = 300, 60
KEYS = "microseconds", "eager_microseconds"
LABELS = torch.arange(SHAPE[0])
#: A loss as ours and as PyTorch's own operations make it.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": (lambda s, t: fk.f_divergence(s, t, "kl"), eager_loss(KL)),
    "js": (lambda s, t: fk.f_divergence(s, t, "js"), eager_loss(JS)),
    "js and labels": (
        lambda s, t: fk.f_divergence(s, t, "js", labels=LABELS, ce_weight=0.5),
        lambda s, t: eager_loss(JS)(s, t) + 0.5 * nn.functional.cross_entropy(s, LABELS),
    ),
    "labels": (lambda s, _: fk.cross_entropy(s, LABELS), lambda s, _: nn.functional.cross_entropy(s, LABELS)),
}


def main() -> None:
    """Measures, and writes a result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=written, required=True, help="the result file")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    student, teacher = make_logits(SHAPE, torch.float32)
    losses = {(name, key): loss for name, pair in LOSSES.items() for key, loss in zip(KEYS, pair, strict=True)}
    timers = {of: Timer("step()", globals={"step": training_step(x, student, teacher)}) for of, x in losses.items()}
    fastest = dict.fromkeys(timers, float("inf"))  # whatever else the machine does makes a run longer
    for _ in range(RUNS):  # by turns, so that it is not one loss's alone
        for of, timer in timers.items():
            fastest[of] = min(fastest[of], 1e6 * timer.timeit(STEPS).mean)
    rows = [{"what": name, **{key: fastest[name, key] for key in KEYS}} for name in LOSSES]
    print("\n".join(map(json.dumps, rows)))
    run = provenance(f"python -m benchmarks.host --out {out}")
    content = {"run": run, "shape": SHAPE, "dtype": "float32", "steps": STEPS, "runs": RUNS, "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
