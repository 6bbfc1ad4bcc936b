"""`fdistill demo`: trains a teacher on real text, distils students from it, and trains the same student without it.

All students start from the same short training by cross-entropy: far from the teacher the gradients of js and tvd are
small, which is why the paper pre-distils (Wen et al., ACL 2023, §4).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from .bench import eager_loss, median_seconds, our_loss, training_step
from .divergences import Divergence
from .functional import cross_entropy, f_divergence
from .provenance import as_json, provenance

VOCABULARY = 8000
CONTEXT = 128
BATCH = 8
TEACHER: dict[str, Any] = dict(n_embd=256, n_layer=4, n_head=4)
STUDENT: dict[str, Any] = dict(n_embd=96, n_layer=2, n_head=4)
EVALUATE_EVERY = 50

Loss = Callable[[Tensor, Tensor], Tensor]  # of a batch's logits and tokens


@dataclass
class Text:
    """The token ids of the training part and of the held-out part."""

    train: Tensor
    held_out: Tensor

    def batch(self, seed: int) -> Tensor:
        """Windows of the training part, (BATCH, CONTEXT + 1). They depend on the seed alone, so runs can be resumed."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train) - CONTEXT - 1, (BATCH,), generator=generator)
        return self.train.unfold(0, CONTEXT + 1, 1)[starts]

    def windows(self) -> Tensor:
        """At most 64 windows of the held-out part, (windows, CONTEXT + 1)."""
        return self.held_out.unfold(0, CONTEXT + 1, CONTEXT)[:64]


@contextlib.contextmanager
def _reading(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Names a file whose content is not what it should be; torch has several errors for it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({why}){remedy}") from error


def read_text(path: str | None) -> str:
    """The text of a file, or Python's language reference: the package's copy, since each Python comes with another."""
    if path is not None:
        with _reading(path):
            return Path(path).read_text(encoding="utf-8-sig")
    return gzip.decompress(Path(__file__).with_name("python_reference.txt.gz").read_bytes()).decode()


def tokenize(text: str) -> Text:
    """The token ids of both parts, by a byte-level BPE that is trained on the training part."""
    from tokenizers import ByteLevelBPETokenizer

    # every tenth stretch of 4000 characters is held out, so that both parts cover all topics
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    held_out = "".join(pieces[9::10])
    train = "".join(piece for i, piece in enumerate(pieces) if i % 10 != 9)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([train], vocab_size=VOCABULARY, show_progress=False)
    ids = Text(*(torch.tensor(tokenizer.encode(part).ids) for part in (train, held_out)))
    if len(ids.train) < 2 * CONTEXT or len(ids.held_out) < CONTEXT + 1:
        raise ValueError(f"the text is too short: {len(ids.train)} tokens to train on, {len(ids.held_out)} held out")
    return ids


def gpt2(shape: dict[str, Any], seed: int) -> Any:
    """A GPT-2 of that shape with random weights; nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0, **shape)
    return GPT2LMHeadModel(config).eval()  # no dropout


@dataclass
class Stage:
    """One model in training, with everything that a checkpoint needs to continue it."""

    name: str
    model: Any
    steps: int
    loss: Loss
    begins_from: Stage | None = None  # the stage whose weights this one starts with
    learning_rate: float = 1.5e-3
    done: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out cross-entropy)

    def __post_init__(self) -> None:
        # with a second moment that forgets the large gradients of the first steps within these few steps
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95),
                                           weight_decay=0.01)  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done,
                "curve": self.curve}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a result of `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.curve = state["done"], [tuple(point) for point in state["curve"]]

    def train_step(self, text: Text, seed: int) -> None:
        """Takes one step of AdamW; the learning rate rises over 20 steps and then falls by a cosine."""
        if self.begins_from is not None and not self.done:
            self.model.load_state_dict(self.begins_from.model.state_dict())
        warm_up = min(1.0, (self.done + 1) / 20)
        decay = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm_up * max(decay, 0.05)
        tokens = text.batch(seed * 1_000_003 + self.done)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model(tokens[:, :-1]).logits, tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1


def label_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy to the next token."""
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, windows: Tensor, teacher: Any = None) -> tuple[float, float]:
    """The held-out cross-entropy and KL(teacher ‖ model), in nats per token."""
    nats = kl = 0.0
    for tokens in windows.split(16):
        logits = model(tokens[:, :-1]).logits
        nats += float(label_loss(logits, tokens)) * len(tokens)
        if teacher is not None:
            kl += float(f_divergence(logits, teacher(tokens[:, :-1]).logits, "kl")) * len(tokens)
    return nats / len(windows), kl / len(windows)


def run(stages: list[Stage], text: Text, of: dict[str, Any], checkpoint: Path, console: Console) -> None:
    """Trains each stage to its end; at every evaluation and at Ctrl-C a checkpoint is saved, with what it is `of`."""
    windows = text.windows()

    def save() -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save({"of": of, **{stage.name: stage.state() for stage in stages}}, partial)
        partial.replace(checkpoint)

    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("held-out perplexity {task.fields[perplexity]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(s.name, total=s.steps, completed=s.done, perplexity="-") for s in stages]
        try:
            for stage, bar in zip(stages, bars, strict=True):
                while stage.done < stage.steps:
                    stage.train_step(text, of["seed"])
                    if stage.done % EVALUATE_EVERY == 0 or stage.done == stage.steps:
                        stage.curve.append((stage.done, evaluate(stage.model, windows)[0]))
                        progress.update(bar, perplexity=f"{math.exp(stage.curve[-1][1]):.1f}")
                        save()
                    progress.update(bar, completed=stage.done)
        except KeyboardInterrupt:
            save()
            raise


def loss_speed(student: Any, teacher: Any, divergence: Divergence, tokens: Tensor) -> tuple[float, float]:
    """Tokens per second of the fused and of the eager loss, forward and backward, on the models' logits."""
    with torch.no_grad():
        of_teacher = teacher(tokens[:, :-1]).logits.flatten(0, 1)
        logits = student(tokens[:, :-1]).logits.flatten(0, 1)
    logits = logits.clone().requires_grad_()
    calls = our_loss(divergence), eager_loss(divergence)
    ours, eager = (len(logits) / median_seconds(training_step(call, logits, of_teacher)) for call in calls)
    return ours, eager


def plot(stages: list[Stage], path: Path) -> None:
    """Draws the held-out perplexity of each model over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for stage in stages:
        steps, nats = zip(*stage.curve, strict=True)
        axes.plot(steps, [math.exp(x) for x in nats], marker="o", markersize=3, label=stage.name)
    axes.set(xlabel="step", ylabel="held-out perplexity", yscale="log", title="fdistill demo")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _stages(args: argparse.Namespace) -> list[Stage]:
    """The teacher, the start that all students share, and each student."""
    teacher = gpt2(TEACHER, args.seed)

    def distillation(divergence: Divergence) -> Loss:
        def loss(logits: Tensor, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                of_teacher = teacher(tokens[:, :-1]).logits
            labels = tokens[:, 1:] if divergence.needs_labels else None
            return f_divergence(logits, of_teacher, divergence, labels=labels)

        return loss

    start = Stage("start", gpt2(STUDENT, args.seed + 1), args.start_steps, label_loss)
    losses = {"baseline": label_loss} | {str(d): distillation(d) for d in args.divergence}
    students = [Stage(name, gpt2(STUDENT, args.seed + 1), args.student_steps, loss, start)
                for name, loss in losses.items()]  # fmt: skip
    return [Stage("teacher", teacher, args.teacher_steps, label_loss), start, *students]


def _restore(stages: list[Stage], of: dict[str, Any], checkpoint: Path) -> None:
    """Goes on from a checkpoint, which must be `of` the same run."""
    with _reading(checkpoint, ": give --restart to start again"):
        saved = torch.load(checkpoint, weights_only=True)
    made = saved.get("of", {})
    if other := [name for name, value in of.items() if made.get(name) != value]:
        raise ValueError(f"{checkpoint} was made with other {', '.join(other)}: give --restart to start again")
    for stage in stages:
        stage.restore(saved[stage.name])


def _measured(stages: list[Stage], windows: Tensor) -> dict[str, dict[str, float]]:
    """Each model's size and its measures on held-out text, by name."""
    rows = {}
    for stage in stages:
        nats, kl = evaluate(stage.model, windows, stages[0].model)
        rows[stage.name] = dict(parameters=stage.model.num_parameters(), steps=stage.done, perplexity=math.exp(nats),
                                kl_to_teacher=kl)  # fmt: skip
    return rows


def main(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit status: 0, 1 if `--expect` was missed, or 130 after Ctrl-C."""
    started = time.perf_counter()
    console = Console(stderr=args.json, markup=False)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    source = read_text(args.text)
    text, stages = tokenize(source), _stages(args)
    _, _, *students = stages
    of = {"seed": args.seed, "text_sha256": hashlib.sha256(source.encode()).hexdigest(),
          "losses": [s.name for s in students], "steps": {stage.name: stage.steps for stage in stages}}  # fmt: skip
    expected = _expected(args.expect, stages, of["text_sha256"]) if args.expect else {}
    if checkpoint.exists() and not args.restart:
        _restore(stages, of, checkpoint)
        console.print(f"continuing from {checkpoint}")
    try:
        run(stages, text, of, checkpoint, console)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues from {checkpoint}", file=sys.stderr)
        return 130

    windows, last = text.windows(), args.divergence[-1]
    fused, eager = loss_speed(students[-1].model, stages[0].model, last, windows[:8])
    rows = _measured(stages, windows)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    results = {
        "models": rows, "loss": str(last), "loss_tokens_per_second": fused,
        "eager_loss_tokens_per_second": eager, "seconds": time.perf_counter() - started,
        "peak_memory_mib": kilobytes / 1024, "text_sha256": of["text_sha256"],
        **provenance(" ".join(["fdistill", *sys.argv[1:]]), dtype="float32"),
    }  # fmt: skip
    (out / "results.json").write_text(as_json(results, 1) + "\n")
    plot(stages, out / "curves.png")
    if args.json:
        print(as_json(results, 1))
    else:
        _print(results, out, console)
    return _compare(rows, expected, console) if args.expect else 0


def _expected(path: Path, stages: list[Stage], text_sha256: str) -> dict[str, Any]:
    """A file's results of each model, which must be of these stages on that text."""
    with _reading(path):
        expected = json.loads(path.read_text())
    models = expected.get("models") if isinstance(expected, dict) else None
    if not models:
        raise ValueError(f"{path} has results of no model: there is nothing to compare with")
    steps = {stage.name: stage.steps for stage in stages}
    if other := models.keys() - steps.keys():
        raise ValueError(f"{path} has results of {', '.join(sorted(other))}, which are not asked for")
    if expected.get("text_sha256") != text_sha256:
        raise ValueError(f"{path} has results of another text: leave out --text or --expect")
    for name, model in models.items():
        if model.get("steps") != steps[name]:
            raise ValueError(f"{path} has results of {model.get('steps')} steps of {name}, not of {steps[name]}")
    return dict(models)


#: How far a model's perplexity and KL may be from the committed ones: rounding differs between processors, and a few
#: hundred steps multiply it.
BAND = {"perplexity": 0.05, "kl_to_teacher": 0.1}


def _compare(rows: dict[str, Any], expected: dict[str, Any], console: Console) -> int:
    """Returns 0 if every model is within the band of the expected results, and else prints which are not: 1."""
    outside = [
        f"{name}'s {key} is {rows[name][key]:.4f}, not within {band:.0%} of {model[key]:.4f}"
        for name, model in expected.items()
        for key, band in BAND.items()
        if abs(rows[name][key] - model[key]) > band * model[key]
    ]
    console.print("\n".join(outside) or "as expected: every model is within the band of the committed result")
    return 1 if outside else 0


def _print(results: dict[str, Any], out: Path, console: Console) -> None:
    table = Table("model", "parameters", "steps", "held-out perplexity", "KL to teacher")
    for name, row in results["models"].items():
        kl = "" if name == "teacher" else f"{row['kl_to_teacher']:.4f}"
        table.add_row(name, f"{row['parameters']:,}", str(row["steps"]), f"{row['perplexity']:.1f}", kl)
    console.print(table)
    fused, eager = results["loss_tokens_per_second"], results["eager_loss_tokens_per_second"]
    console.print(f"{results['loss']} loss, forward and backward: {fused:,.0f} tokens/s; eager {eager:,.0f} "
                  f"({fused / eager:.1f}x). Peak memory {results['peak_memory_mib']:,.0f} MiB, "
                  f"{results['seconds']:.0f} s. Curves: {out / 'curves.png'}")  # fmt: skip
