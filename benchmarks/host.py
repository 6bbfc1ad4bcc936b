"""What a step costs its host: forward and backward of so few and short rows that the kernel takes next to nothing.

    python -m benchmarks.host --out benchmarks/results/host_cpu.json

On a CPU, in one thread, beside PyTorch's own losses of the same logits in the same run. On a GPU the launches come on
top, of which tests/test_host_cost.py holds the number.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fdistill_kernels as fk
from fdistill_kernels.bench import eager_loss, make_logits, median_seconds, training_step
from fdistill_kernels.divergences import JS, KL
from fdistill_kernels.provenance import provenance

SHAPE = 8, 64
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
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    student, teacher = make_logits(SHAPE, torch.float32)
    rows = []
    for name, pair in LOSSES.items():
        ours, eager = (1e6 * median_seconds(training_step(loss, student, teacher), 3.0) for loss in pair)
        rows.append({"what": name, "microseconds": ours, "eager_microseconds": eager})
        print(json.dumps(rows[-1]))
    run = provenance(f"python -m benchmarks.host --out {out}")
    out.write_text(json.dumps({"run": run, "shape": SHAPE, "dtype": "float32", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
