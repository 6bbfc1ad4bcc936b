"""Teachers that are lists, or hidden states in fewer bits: what they cost in time, and in the loss.

    python -m benchmarks.lists --cost       beside cross-entropy of the same shape, in one run
    python -m benchmarks.lists --errors     on the demo's GPT-2 teacher and student, beside the whole teacher

--errors trains both on Python's language reference as the demo does, and compares on held-out text: for each tail rule
and K, and each precision of a store's states, how far the loss is off, and how far the gradient by the logits is, in L1
over that of the whole teacher's, a mean over tokens. It draws docs/tails.png.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch

import fdistill_kernels as fk
from fdistill_kernels import demo
from fdistill_kernels.bench import median_seconds
from fdistill_kernels.options import count
from fdistill_kernels.provenance import provenance
from fdistill_kernels.teachers import TeacherStore

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parent.parent / "docs" / "tails.png"
DIVERGENCES = ("kl", "rkl", "js", "tvd")
KS = (1, 4, 16, 64, 256, 1024, 4096)
TAILS = ("bucket", "uniform", "renormalize", "within", "ignore", "sampled")
STATES = {"float32": {}, "bfloat16": {"states": "bfloat16"}, "int8": {"states": "int8"},
          **{f"rank {r}": {"states": "float32", "rank": r} for r in (64, 128, 192, 224)}}  # fmt: skip
TOKENS = 2000


SHAPES = [(n, v, 512, dtype) for n, v in ((1024, 32000), (256, 128256)) for dtype in (torch.float32, torch.bfloat16)]


def cost(n: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[dict]:
    """Forward and backward of js to a list, over cross-entropy's of the same logits, or hidden states and head."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((n, width), (vocabulary, width)))
    logits = (torch.randn(n, vocabulary) * 3).to(dtype).requires_grad_()
    labels, teacher = torch.randint(vocabulary, (n,)), torch.randn(n, vocabulary) * 3

    def timed(loss) -> float:
        def step() -> None:
            hidden.grad = weight.grad = logits.grad = None
            loss().backward()

        return median_seconds(step, 5.0)

    base = (timed(lambda: fk.cross_entropy(logits, labels)),
            timed(lambda: fk.linear_cross_entropy(hidden, weight, labels)))  # fmt: skip
    found = []
    for k in (1, 16, 64, 1024):
        for tail in ("bucket", "within", "uniform") if k == 64 else ("bucket",):
            listed = fk.top_k_of(teacher, k, tail=tail)
            ours = (timed(lambda t=listed: fk.f_divergence(logits, t, "js")),
                    timed(lambda t=listed: fk.linear_f_divergence(hidden, weight, t, divergence="js")))  # fmt: skip
            found.append({
                "shape": [n, vocabulary], "width": width, "dtype": str(dtype).removeprefix("torch."), "k": k,
                "tail": tail, "cross_entropy_ms": [1e3 * x for x in base], "ms": [1e3 * x for x in ours],
                "over_cross_entropy": [a / b for a, b in zip(ours, base, strict=True)],
            })  # fmt: skip
            print(json.dumps(found[-1]))
    return found


def trained(steps: int) -> tuple:
    """The demo's teacher and a student of a fourth as many steps, and held-out windows."""
    text = demo.tokenize(demo.read_text(None))
    stages = [demo.Stage("teacher", demo.gpt2(demo.TEACHER, 0), steps, demo.label_loss),
              demo.Stage("student", demo.gpt2(demo.STUDENT, 1), steps // 4, demo.label_loss)]  # fmt: skip
    for stage in stages:
        for _ in range(stage.steps):
            stage.train_step(text, 0)
    return (*(s.model.eval() for s in stages), text.windows())


def gradient_of(student: torch.Tensor, teacher, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    loss = fk.f_divergence(leaf, teacher, name, reduction="none")
    loss.sum().backward()
    return loss.detach(), leaf.grad


def apart(student: torch.Tensor, teacher, name: str, whole: tuple) -> dict:
    """Off in loss, of the mean; off in gradient, the mean of rows' L1 distance over their L1 norm."""
    loss, gradient = gradient_of(student, teacher, name)
    distance = (gradient - whole[1]).abs().sum(1) / whole[1].abs().sum(1)
    mean = whole[0].mean()
    return {"loss": float((loss.mean() - mean).abs() / mean), "gradient": float(distance.mean())}


def errors(steps: int) -> dict:
    """Both tables."""
    teacher, student, windows = trained(steps)
    tokens = windows[: -(-TOKENS // (windows.shape[1] - 1)), :-1]
    with torch.no_grad():
        states = teacher.transformer(tokens).last_hidden_state.flatten(0, 1)[:TOKENS]
        of_student = student(tokens).logits.flatten(0, 1)[:TOKENS]
    head = fk.Head(teacher.lm_head.weight.detach())
    logits, wholes = states @ head.weight.T, {}
    for name in DIVERGENCES:
        wholes[name] = gradient_of(of_student, logits, name)
    lists, kept = [], []
    generator = torch.Generator().manual_seed(0)
    for k in KS:
        listed = fk.top_k_of(logits, k)
        mass = float(listed.log_probs.exp().sum(1).mean())
        for tail in TAILS:
            one = fk.sample_of(logits, k, generator=generator) if tail == "sampled" else listed._replace(tail=tail)
            for name in DIVERGENCES:
                if tail == "renormalize" and name == "rkl":  # infinite
                    continue
                lists.append({"k": k, "mass": mass, "tail": tail, "divergence": name,
                              **apart(of_student, one, name, wholes[name])})  # fmt: skip
    for what, settings in STATES.items():
        with tempfile.TemporaryDirectory() as folder:
            asked = {"kind": "hidden", "vocabulary": logits.shape[1], "key": {}, "head": head, "states": "float32"}
            with TeacherStore.create(folder, **{**asked, **settings}).writer() as writer:
                writer.add([0], [1] * TOKENS, states)
            store = TeacherStore(folder)
            found, bytes_per_token = store.targets([[0]], [[1] * TOKENS]), store.summary()["bytes_per_token"]
        stored = found.states.float() @ found.head.weight.float().T
        for name in DIVERGENCES:
            kept.append({"states": what, "width": head.weight.shape[1], "bytes_per_token": bytes_per_token,
                         "divergence": name, **apart(of_student, stored, name, wholes[name])})  # fmt: skip
    whole = {name: float(loss.mean()) for name, (loss, _) in wholes.items()}
    return {
        "tokens": TOKENS,
        "vocabulary": logits.shape[1],
        "steps": steps,
        "whole_loss": whole,
        "lists": lists,
        "states": kept,
    }


def draw(lists: list[dict]) -> None:
    """The gradient's error over K, a picture a divergence, a line a tail rule."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DIVERGENCES), figsize=(13, 3.4), sharey=True, layout="constrained")
    for ax, name in zip(axes, DIVERGENCES, strict=True):
        for i, tail in enumerate(TAILS):
            rows = [r for r in lists if r["divergence"] == name and r["tail"] == tail]
            if rows:
                ax.plot(
                    [r["k"] for r in rows],
                    [max(r["gradient"], 1e-5) for r in rows],
                    marker=".",
                    label=tail,
                    color=f"C{i}",
                )
        ax.set(xscale="log", yscale="log", title=name, xlabel="K")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("gradient's distance from the whole\nteacher's, over its norm (L1)")
    axes[0].legend(fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="time, beside cross-entropy")
    parser.add_argument("--errors", action="store_true", help="of loss and gradient, beside the whole teacher")
    parser.add_argument("--steps", type=count, default=320, help="of the teacher's training; default: 320")
    args = parser.parse_args()
    if not (args.cost or args.errors):
        parser.error("nothing to measure: give --cost, --errors, or both")
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", "tail='ignore'")
    if args.cost:
        content = {
            "run": provenance("python -m benchmarks.lists --cost"),
            "cases": [x for shape in SHAPES for x in cost(*shape)],
        }
        (RESULTS / "lists_cost_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
    if args.errors:
        content = {
            "run": provenance(f"python -m benchmarks.lists --errors --steps {args.steps}", dtype="float32"),
            **errors(args.steps),
        }
        (RESULTS / "lists_errors_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
        draw(content["lists"])


if __name__ == "__main__":
    main()
