"""Digits kept in hard rows, every divergence on the CPU kernels beside eager PyTorch: a result file and a plot of it.

python -m benchmarks.precision
"""

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from fdistill_kernels.divergences import TABLE
from fdistill_kernels.precision import TOLERANCES, Precision, precision
from fdistill_kernels.provenance import provenance

VOCABULARY = 32000
OTHERS = (1000, 50257, 128256)
RESULT = Path(__file__).parent / "results" / "precision_cpu.json"
PLOT = Path(__file__).parent.parent / "docs" / "precision.png"
LEAST = 1e-9  # an error of 0 has no place on a logarithm's axis


def main() -> None:
    """Measures, and draws what it has measured."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {v: [row for d in TABLE.values() for row in precision(d, "cpu", "cpu", v)] for v in (VOCABULARY, *OTHERS)}
    rows = [dataclasses.asdict(row) for row in found[VOCABULARY]]
    worst = {
        name: {
            what: {k: max(row[what][i] for row in rows if row["divergence"] == name)
                   for i, k in enumerate(("loss", "student_gradient", "teacher_gradient"))}
            for what in ("ours", "eager")
        }
        for name in dict.fromkeys(row["divergence"] for row in rows)
    }  # fmt: skip
    content = {
        "run": provenance("python -m benchmarks.precision", dtype="float32"),
        "vocabulary": VOCABULARY,
        "worst": worst,
        "vocabularies": {v: summary(cases) for v, cases in found.items()},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    draw(rows)


def summary(cases: list[Precision]) -> dict:
    """How many cases are within the tolerances, and which divergences have others."""
    missed = [case for case in cases if not case.ok]
    return {
        "cases": len(cases),
        "within": len(cases) - len(missed),
        "others of": list(dict.fromkeys(case.divergence for case in missed)),
        "their worst gradient": max((max(case.ours[1:]) for case in missed), default=0.0),
    }


def draw(rows: list[dict]) -> None:
    """A line a case, a mark a divergence: the student's gradient, ours and eager PyTorch's."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for what, colour, shift in (("eager", "tab:orange", 0.15), ("ours", "tab:blue", -0.15)):
        x = [max(LEAST, min(row[what][1], 1e3)) for row in rows]
        axes.scatter(x, [cases.index(row["case"]) + shift for row in rows], s=14, color=colour, alpha=0.7, linewidths=0)
    axes.axvline(TOLERANCES[1], color="grey", linestyle=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("worst error of the student's gradient, of its row's largest entry (1000 and more at the right)")
    marks = [Line2D([], [], marker="o", linestyle="", color=c) for c in ("tab:blue", "tab:orange")]
    axes.legend(marks, ["these kernels", "eager PyTorch"], loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=2)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
