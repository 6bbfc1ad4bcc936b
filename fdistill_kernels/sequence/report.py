"""What a run leaves to look at: curves.png of its metrics.jsonl, and report.html."""

from __future__ import annotations

import base64
import contextlib
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sampling import write_whole

if TYPE_CHECKING:
    from .run import Job

#: What results.json holds, for people.
SHOWN = {
    "method": ("method", ""),
    "perplexity": ("perplexity of the gold targets", ",.2f"),
    "likelihood_risk": ("likelihood risk: −log p of the student's samples, nats a token", ".3f"),
    "coverage_risk": ("coverage risk: −log q of the teacher's samples, nats a token", ".3f"),
    "likelihood_risk_by_sentence": ("likelihood risk of whole sentences, nats", ".2f"),
    "coverage_risk_by_sentence": ("coverage risk of whole sentences, nats", ".2f"),
    "kl": ("KL(teacher‖student) on the teacher's samples, nats a token", ".4f"),
    "tvd": ("TVD on the teacher's samples, mean of tokens", ".4f"),
    "rkl": ("KL(student‖teacher) on the student's samples, nats a token", ".4f"),
    "teacher_dist": ("TeacherDist: distinct bigrams among the teacher's samples", ".3f"),
    "length_ratio": ("words of greedy outputs ÷ the references'", ".3f"),
    "without_end": ("greedy outputs without an end token", ".1%"),
    "looping": ("greedy outputs that loop: under 70% of bigrams distinct", ".1%"),
    "bleu": ("BLEU of greedy outputs, of 100", ".2f"),
    "chrf": ("chrF of greedy outputs, of 100", ".2f"),
    "ter": ("TER of greedy outputs, %, less is better", ".2f"),
    "parameters": ("the student's parameters", ",d"),
    "teacher_parameters": ("the teacher's parameters", ",d"),
    "seconds": ("time since the last start, s", ",.0f"),
}
#: Divergences that are measured in nats; the others are pure numbers.
IN_NATS = {"kl", "rkl", "js", "jeffreys", "gjs", "skew_kl", "skew_rkl", "engine", "cross_entropy"}


def plot(folder: Path, job: Job) -> None:
    """curves.png of metrics.jsonl: each stage's training loss, and the held-out KL, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = logged(folder / "metrics.jsonl")
    stages = list(dict.fromkeys(line["stage"] for line in lines))

    def draw(axis: Any, stage: str, key: str, **style: Any) -> None:
        points = sorted((x["step"], float(x[key])) for x in lines if x["stage"] == stage and key in x)
        if points:
            axis.plot(*zip(*points, strict=True), **style)

    nats = all(half.divergence is None or half.divergence.name in IN_NATS for half in job.halves())
    figure, axes = plt.subplots(1, len(stages) + 1, figsize=(4.5 * (len(stages) + 1), 3.6), layout="constrained")
    for axis, stage in zip(axes, stages, strict=False):
        draw(axis, stage, "loss", color=f"C{stages.index(stage)}")
        unit = "0.8 KL + 0.2 CE + 3 MSE" if stage == "predistill" else "nats a token" if nats else "mean of tokens"
        axis.set(title=f"training: {'pre-distillation' if stage == 'predistill' else job.name()}", xlabel="step",
                 ylabel=f"loss, {unit}")  # fmt: skip
        draw(axes[-1], stage, "eval_loss", marker="o", label=stage)
    axes[-1].set(title="held-out pairs", xlabel="step", ylabel="KL(teacher‖student), nats a token")
    axes[-1].legend()
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def write_report(folder: Path, job: Job, results: dict[str, Any]) -> None:
    """report.html, one file that opens without a network."""

    def table(values: dict[str, Any]) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in values.items())
        return f"<table>{rows}</table>"

    measured = {name: format(results[key], form) for key, (name, form) in SHOWN.items() if key in results}
    asked = {key.replace("_", " "): "–" if value is None else value for key, value in vars(job).items()}
    image = base64.b64encode((folder / "curves.png").read_bytes()).decode()
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fdistill: {html.escape(job.name())}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}th,td{border-bottom:1px solid #ddd;padding:.25em 2em .25em 0;text-align:left;"
        "vertical-align:top}th{font-weight:normal}td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}"
        "img{max-width:100%;margin:1em 0}</style>"
        f"<h1>Distillation by {html.escape(job.name())}</h1><p>Measures on {job.eval_pairs} held-out pairs at most.</p>"
        f"{table(measured)}<img alt='training losses and held-out KL by step' src='data:image/png;base64,{image}'>"
        f"<h2>Configuration</h2>{table(asked)}</html>\n"
    )
    write_whole(folder / "report.html", page.encode())


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that a kill or a full disk left half written."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
