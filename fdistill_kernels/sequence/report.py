"""What a run leaves to look at: curves.png of its metrics.jsonl, and report.html."""

from __future__ import annotations

import base64
import contextlib
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..teachers.files import write_whole

if TYPE_CHECKING:
    from .options import Asked
    from .trainer import FDistillConfig

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


#: Panels of what the trainer logs beside: the names of a panel's curves, and its unit.
PANELS = {
    "loss by sequences": (("loss_on_",), "as the loss"),
    "entropy": (("student_entropy_on_", "teacher_entropy_on_"), "nats a token"),
    "agreement": (("agreement_on_", "overlap_on_", "student_mass_on_", "teacher_mass_on_"), "share"),
    "speed": (("tokens_per_second",), "tokens a second"),
    "time": (("sampling_share", "teacher_share"), "share"),
}


def name_of(config: FDistillConfig) -> str:
    """An objective, for people."""
    if config.divergence is None:
        return config.method
    sources = ", ".join(half.source for half in config.halves() if half.divergence is not None)
    return f"{config.divergence} on {json.dumps(config.shares) if config.shares else sources}"


def plot(folder: Path, config: FDistillConfig) -> None:
    """curves.png of metrics.jsonl against the step: each stage's training loss, the held-out KL, and `PANELS`."""
    from matplotlib.figure import Figure

    lines = logged(folder / "metrics.jsonl")
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    nats = all(half.divergence is None or half.divergence.name in IN_NATS for half in config.halves())
    panels: list[tuple[str, str, list[tuple[str, str, dict[str, Any]]]]] = []  # title, unit, and curves
    for i, stage in enumerate(stages):
        warms_up = stage == "predistill"
        unit = "KL, CE and MSE" if warms_up else "nats a token" if nats else "mean of tokens"
        panels.append((f"training: {'pre-distillation' if warms_up else name_of(config)}", f"loss, {unit}",
                       [(stage, "loss", {"color": f"C{i}"})]))  # fmt: skip
    panels.append(("held-out pairs", "KL(teacher‖student), nats a token",
                   [(stage, "eval_loss", {"marker": "o", "label": stage}) for stage in stages]))  # fmt: skip
    of_last = dict.fromkeys(key for line in lines if line["stage"] == stages[-1] for key in line)
    for title, (names, unit) in PANELS.items():
        if keys := [key for key in of_last if key.startswith(names)]:
            panels.append((title, unit, [(stages[-1], key, {"label": key.replace("_", " ")}) for key in keys]))

    width = min(len(panels), 4)
    height = -(-len(panels) // width)
    figure = Figure(figsize=(4.5 * width, 3.6 * height), layout="constrained")
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, unit, curves) in zip(axes, panels, strict=False):
        for stage, key, style in curves:
            points = sorted((x["step"], float(x[key])) for x in lines if x["stage"] == stage and x.get(key) is not None)
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:  # none without evaluation
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=120)


def write_report(folder: Path, asked: Asked, results: dict[str, Any]) -> None:
    """report.html, one file that opens without a network."""

    def table(values: dict[str, Any]) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in values.items())
        return f"<table>{rows}</table>"

    measured = {name: format(results[key], form) for key, (name, form) in SHOWN.items() if key in results}
    name = html.escape(name_of(asked.config))
    image = base64.b64encode((folder / "curves.png").read_bytes()).decode()
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fdistill: {name}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}th,td{border-bottom:1px solid #ddd;padding:.25em 2em .25em 0;text-align:left;"
        "vertical-align:top}th{font-weight:normal}td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}"
        "img{max-width:100%;margin:1em 0}</style>"
        f"<h1>Distillation by {name}</h1>"
        f"{table(measured)}<img alt='training losses and held-out KL by step' src='data:image/png;base64,{image}'>"
        f"<h2>Configuration</h2>{table(asked.settings())}</html>\n"
    )
    write_whole(folder / "report.html", page.encode())


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that a kill or a full disk left half written."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
