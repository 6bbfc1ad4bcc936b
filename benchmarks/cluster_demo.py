"""Two tensor-parallel by two data-parallel processes beside one: the same curve, to rounding.

    python -m benchmarks.cluster_demo --out benchmarks/results/cluster_demo.json

A teacher learns Python's language reference (`fdistill_kernels.demo`); a Llama student, its head's vocabulary split
over "tp" and its rows over "fsdp", is distilled by js on gold text, in float64. Exit status 1 where a loss or a weight
differs from one process's by more than `HELD`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

from fdistill_kernels import demo
from fdistill_kernels.options import count, written
from fdistill_kernels.provenance import provenance

SPLIT, BATCH, LENGTH, PROMPT = dict(tp_size=2, fsdp_size=2), 8, 64, 4
SIZES: dict[str, dict[str, int]] = {
    "teacher": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4),
    "student": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
}
#: Of a step's loss, relative, which the trainer logs in float32; and of a weight.
HELD = {"loss": 1e-6, "weight": 1e-9}


def llama(vocabulary: int, seed: int, sizes: dict[str, int]) -> Any:
    """A model from its configuration, nothing downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=demo.CONTEXT, bos_token_id=0,
                                        eos_token_id=0, pad_token_id=0, **sizes))  # fmt: skip


def train(rank: int, world: int, folder: Path, steps: int) -> None:
    """One process's part; the first writes the losses and the whole weights."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from fdistill_kernels.sequence.ranks import join
    from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

    torch.set_num_threads(1)  # the ranks' own cores
    join(600)
    more = dict(distributed_config=DistributedConfig(**SPLIT)) if world > 1 else {}
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, **given)
                        for name, given in (("student", more), ("teacher", {})))  # fmt: skip
    config = FDistillConfig(
        str(folder / f"run-{world}"), divergence="js", shares={"gold": 1.0}, max_steps=steps, learning_rate=1.5e-3,
        per_device_train_batch_size=BATCH // (SPLIT["fsdp_size"] if world > 1 else 1), logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FDistillTrainer(student, teacher, config, train_dataset=json.loads((folder / "rows.json").read_text()))
    trainer.train()
    weights = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in student.named_parameters()}
    if rank == 0:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        torch.save((losses, weights), folder / f"{world}.pt")


def prepare(folder: Path, tokens: torch.Tensor, vocabulary: int, steps: int, teacher: Any) -> None:
    """Both models' folders, and as many rows as the steps take."""
    teacher.save_pretrained(folder / "teacher")
    llama(vocabulary, 1, SIZES["student"]).save_pretrained(folder / "student")
    starts = torch.randint(len(tokens) - LENGTH, (steps * BATCH,), generator=torch.Generator().manual_seed(0))
    windows = [tokens[i : i + LENGTH].tolist() for i in starts]
    rows = [{"prompt_ids": w[:PROMPT], "labels": w[PROMPT:]} for w in windows]
    (folder / "rows.json").write_text(json.dumps(rows))


def compared(folder: Path, world: int) -> dict[str, Any]:
    """Both curves, and the largest differences."""
    (one, weights), (many, of_many) = (torch.load(folder / f"{n}.pt") for n in (1, world))
    assert len(one) == len(many) and weights.keys() == of_many.keys()
    return {
        "losses": many, "one_process": one,
        "largest_difference": {
            "loss": max(abs(a / b - 1) for a, b in zip(many, one, strict=True)),
            "weight": max(float((of_many[n] - w).abs().max()) for n, w in weights.items()),
        },
    }  # fmt: skip


def _process(rank: int, world: int, port: int, folder: Path, steps: int) -> None:
    of_ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in of_ranks.items()} | {"OMP_NUM_THREADS": "1"}
    train(rank, world, folder, steps)


def main() -> int:
    """Both runs; 0 where they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=written, help="the result file")
    parser.add_argument("--steps", type=count, default=40, help="of the student's training; default: 40")
    parser.add_argument("--teacher-steps", type=count, default=60, help="of the teacher's training; default: 60")
    args, started = parser.parse_args(), time.perf_counter()
    text = demo.tokenize(demo.read_text(None))
    teacher = demo.Stage("teacher", llama(demo.VOCABULARY, 0, SIZES["teacher"]), args.teacher_steps, demo.label_loss)
    while teacher.done < args.teacher_steps:
        teacher.train_step(text, 0)
    world, seconds = SPLIT["tp_size"] * SPLIT["fsdp_size"], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, text.train, demo.VOCABULARY, args.steps, teacher.model)
        for ranks in (1, world):
            begun = time.perf_counter()
            mp.spawn(_process, (ranks, get_free_port(), folder, args.steps), nprocs=ranks)
            seconds[ranks] = time.perf_counter() - begun
        found = compared(folder, world)
    results = {
        "ranks": SPLIT, "steps": args.steps, "vocabulary": demo.VOCABULARY, "divergence": "js", "dtype": "float64",
        **found, "held": HELD, "seconds": {"all": time.perf_counter() - started, **seconds},
        **provenance(" ".join(["python -m benchmarks.cluster_demo", *sys.argv[1:]])),
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    differ = found["largest_difference"]
    print(f"js from {found['losses'][0]:.4f} to {found['losses'][-1]:.4f} nats in {args.steps} steps; the largest")
    print(f"differences from one process: {differ['loss']:.1e} of a loss, {differ['weight']:.1e} of a weight")
    return int(any(differ[name] > most for name, most in HELD.items()))


if __name__ == "__main__":
    sys.exit(main())
