"""Stored targets beside a plain copy of memory: tokens a second written and read back, in random order.

python -m benchmarks.stores --out benchmarks/results/stores.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fdistill_kernels.options import count, written
from fdistill_kernels.provenance import provenance
from fdistill_kernels.sparse import TopK
from fdistill_kernels.teachers import TeacherStore
from fdistill_kernels.values import Head

BATCH, LENGTH, K, WIDTH, VOCABULARY, ROUNDS = 8, 512, 64, 4096, 128256, 9
CASES: dict[str, dict[str, Any]] = {
    "top_k float16": {"kind": "top_k", "k": K, "log_probs": "float16"},
    "top_k uint8": {"kind": "top_k", "k": K, "log_probs": "uint8"},
    "hidden bfloat16": {"kind": "hidden", "states": "bfloat16"},
    "hidden int8": {"kind": "hidden", "states": "int8"},
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rows(kind: str) -> TopK | torch.Tensor:
    """A sequence's targets."""
    if kind == "hidden":
        return torch.randn(LENGTH, WIDTH).bfloat16()
    log_probs = (torch.randn(LENGTH, 4096) * 3).log_softmax(1).topk(K).values
    return TopK(torch.rand(LENGTH, VOCABULARY).topk(K).indices, log_probs)


def measure(name: str, folder: Path, sequences: int) -> dict[str, Any]:
    """A store of some sequences: written, verified, read in batches; and as many bytes as are handed out, copied."""
    case, vocabulary = CASES[name], VOCABULARY if name.startswith("top_k") else 1024  # the head is not read again
    head = Head(torch.randn(vocabulary, WIDTH).bfloat16()) if case["kind"] == "hidden" else None
    store = TeacherStore.create(folder, vocabulary=vocabulary, key={}, head=head, **case)
    pairs = [(torch.randint(vocabulary, (128,)), torch.randint(vocabulary, (LENGTH,))) for _ in range(sequences)]
    made, tokens = [rows(case["kind"]) for _ in range(BATCH)], sequences * LENGTH

    def write() -> None:
        with store.writer() as writer:
            for i, pair in enumerate(pairs):
                writer.add(*pair, made[i % BATCH])

    def read() -> None:
        order = torch.randperm(sequences).tolist()
        for begin in range(0, sequences, BATCH):
            some = [pairs[i] for i in order[begin : begin + BATCH]]
            store.targets([p for p, _ in some], [c for _, c in some])

    written = seconds(write)
    found = store.targets([p for p, _ in pairs[:BATCH]], [c for _, c in pairs[:BATCH]])
    given = [t.clone() for t in (found[:2] if isinstance(found, TopK) else found[:1]) for _ in range(4)]

    def copy() -> None:
        for i in range(sequences // BATCH):
            for tensor in given[i % 4 :: 4]:
                tensor.clone()

    store = TeacherStore(folder)
    verifying = seconds(lambda: store.verify())
    times = [(seconds(read), seconds(copy)) for _ in range(ROUNDS)]
    reading, copying = ([run[i] for run in times] for i in (0, 1))
    return {
        "case": name, "shape": [BATCH * LENGTH, K if case["kind"] == "top_k" else WIDTH], "vocabulary": vocabulary,
        "dtypes": [str(t.dtype).removeprefix("torch.") for t in given[::4]], "tokens": tokens,
        "bytes_per_token": store.summary()["bytes_per_token"], "rounds": ROUNDS,
        "read_tokens_per_second": tokens / min(reading),
        "copy_tokens_per_second": tokens / min(copying),
        "read_over_copy": min(reading) / min(copying),
        "read_seconds": reading, "copy_seconds": copying,
        "written_tokens_per_second": tokens / written, "verified_tokens_per_second": tokens / verifying,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=written, default=Path(__file__).parent / "results" / "stores.json",
                        help="the result file; default: benchmarks/results/stores.json")  # fmt: skip
    parser.add_argument(
        "--sequences", type=count, default=128, help=f"how many of {LENGTH} tokens, in batches of {BATCH}; default: 128"
    )
    args = parser.parse_args()
    if args.sequences % BATCH:  # a copy of other batches than are read
        parser.error(f"--sequences must be a multiple of {BATCH}, which a batch has, not {args.sequences}")
    torch.manual_seed(0)
    found = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(name, Path(folder), args.sequences))
        print(json.dumps({k: v for k, v in found[-1].items() if not k.endswith("seconds")}))
    content = {
        "run": provenance(f"python -m benchmarks.stores --sequences {args.sequences}", dtype="of each case's name"),
        "what": f"batches of {BATCH} sequences of {LENGTH} tokens in random order, from the page cache, "
        "through `targets`; copy: torch clones as many bytes as a batch hands out; the best of each",
        "cases": found,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
