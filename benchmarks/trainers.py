"""`FDistillTrainer` beside TRL's `GKDTrainer`: time of a step, peak of memory and the loss's curve, on one CPU thread.

    python -m benchmarks.trainers --write

Both get the same models (two layers, 32,000 tokens), the same batches of random ids, optimizer and steps, each in a
process of its own, one after the other. "gold" compares by js on given sequences, where both must show one curve;
"student" on sequences that the student draws, whose samples, and so whose curves, are each trainer's own.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from fdistill_kernels.options import count
from fdistill_kernels.provenance import provenance, versions

RESULTS = Path(__file__).parent / "results" / "trainers_cpu.json"
VOCABULARY, PROMPT, NEW, BATCH, END = 32000, 32, 64, 8, 0
#: Of both trainers.
SETTINGS = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
                per_device_train_batch_size=BATCH, learning_rate=1e-3, lr_scheduler_type="constant", bf16=False,
                max_new_tokens=NEW, remove_unused_columns=False)  # fmt: skip


def model(seed: int, width: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=width, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, initializer_range=0.1, bos_token_id=END, eos_token_id=END, pad_token_id=END))  # fmt: skip


class Timer(TrainerCallback):
    """Seconds of the wall and of the processor that each step takes."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *_, **__) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__) -> None:
        self.steps.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))


def ours(source: str, rows: list[dict], folder: str, steps: int, timer: Timer):
    from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

    config = FDistillConfig(folder, divergence="js", shares={source: 1.0}, max_steps=steps, **SETTINGS)
    return FDistillTrainer(model(1, 128), model(2, 256), config, train_dataset=rows, callbacks=[timer])


def trl(source: str, rows: list[dict], folder: str, steps: int, timer: Timer):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(examples):
        prompts = torch.tensor([e["prompt_ids"] for e in examples])
        ids = torch.tensor([e["prompt_ids"] + e["labels"] for e in examples])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts), "input_ids": ids,
                "attention_mask": torch.ones_like(ids), "labels": labels}  # fmt: skip

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), pad_token="t0",
                                        eos_token="t0")  # fmt: skip
    config = GKDConfig(folder, lmbda=float(source == "student"), beta=0.5, temperature=1.0, max_steps=steps, **SETTINGS)
    return GKDTrainer(model(1, 128), model(2, 256), args=config, data_collator=collate, processing_class=tokenizer,
                      train_dataset=Dataset.from_list(rows), callbacks=[timer])  # fmt: skip


WHO = {"ours": ours, "trl": trl}
SEQUENCES = ("gold", "student")
UNTIMED = 2  # steps in which memory is made


def measured(who: str, source: str, steps: int) -> dict:
    """One trainer in this process."""
    torch.set_num_threads(1)
    made, timer = torch.Generator().manual_seed(0), Timer()
    ids = torch.randint(1, VOCABULARY, (BATCH * steps, PROMPT + NEW), generator=made).tolist()
    rows = [{"prompt_ids": row[:PROMPT], "labels": row[PROMPT:]} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        run = WHO[who](source, rows, folder, steps, timer)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run.train()
    wall, processor = zip(*timer.steps[UNTIMED:], strict=True)
    return {
        "who": who, "sequences": source, "step_seconds": statistics.median(wall),
        "step_processor_seconds": statistics.median(processor),
        "peak_bytes_above_start": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "losses": [line["loss"] for line in run.state.log_history if "loss" in line],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=8, help="of each; default: 8")
    parser.add_argument("--one", nargs=2, metavar=("WHO", "SEQUENCES"), help="in this process, to the standard output")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RESULTS.name}")
    args = parser.parse_args()
    if args.steps <= UNTIMED:
        parser.error(f"--steps must be more than {UNTIMED}, the first, which are not timed; not {args.steps}")
    if args.one and not (args.one[0] in WHO and args.one[1] in SEQUENCES):
        parser.error(f"--one must be of {', '.join(WHO)} and of {', '.join(SEQUENCES)}, not {' '.join(args.one)}")
    if (args.one or ["trl"])[0] == "trl" and not importlib.util.find_spec("trl"):
        parser.error("trl, whose trainer is measured beside ours, is not installed")
    if args.one:
        sys.stdout, out = sys.stderr, sys.stdout  # the trainers print their logs
        print(json.dumps(measured(*args.one, args.steps)), file=out)
        return
    found = []
    for source in SEQUENCES:
        for who in WHO:
            command = [sys.executable, "-m", "benchmarks.trainers", "--one", who, source, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found.append(json.loads(done.stdout))
            print({k: v for k, v in found[-1].items() if k != "losses"})
    apart = max(abs(a - b) / b for a, b in zip(found[0]["losses"], found[1]["losses"], strict=True))
    print(f"the curves on gold are apart by {apart:.1e} of the loss at most")
    if args.write:
        torch.set_num_threads(1)
        about = {**provenance(f"python -m benchmarks.trainers --steps {args.steps} --write", dtype="float32"),
                 **versions(("trl", "transformers"))}  # fmt: skip
        rows = {"run": about, "shape": {"vocabulary": VOCABULARY, "batch": BATCH, "prompt": PROMPT, "new": NEW},
                "gold_curves_apart": apart, "rows": found}  # fmt: skip
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
