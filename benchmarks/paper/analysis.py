"""What the sentences say: arms with intervals, and each hypothesis' verdict.

    python -m benchmarks.paper.analysis --out FOLDER [--publish]

Reads FOLDER/measures of the seeds in which every arm is measured, writes results.json, report.md and results.png there;
--publish copies the first and the last into benchmarks/results and writes the documents' numbers anew.

Students of a seed share their pre-distillation, and all are measured on the same sentences, so differences are paired
by both. Replicates draw seeds and, for all seeds and arms alike, sentences, both with replacement (the two are crossed:
Owen 2007); of the sums over sentences each measure is made, so that BLEU and TER are a corpus'. Their deviation, times
√(n/(n − 1)) as n drawn seeds vary less than n new ones, is a difference's standard error, and its interval and p-value
are of Student's t with n − 1 degrees of freedom: percentiles of so few seeds would be too narrow. The noise of one
student on one sentence is counted by both draws, so that intervals err on the wide side.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pyarrow
import pyarrow.parquet
import sacrebleu

from benchmarks.paper.stages import ARMS, GATE
from fdistill_kernels.provenance import finite
from fdistill_kernels.sequence.metrics import summary
from fdistill_kernels.teachers.files import write_whole

HERE = Path(__file__).parent
DRAWS = 10_000
ROWS = ("predistilled", *ARMS)


class Measure(NamedTuple):
    """``value`` of the sums over sentences of columns, each a number or a list of them; up: more is better."""

    shown: str
    columns: tuple[str, ...]
    value: Callable[[np.ndarray], np.ndarray]
    form: str = ".2f"


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def bleu(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's corpus BLEU, of 100, of sums of `statistics`' bleu (..., 10), its "exp" smoothing of zeros too."""
    matches, counts, words, reference = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    smooth = 0.5 ** np.cumsum(matches == 0, -1)
    logs = np.log(np.where(matches == 0, smooth, matches) / np.maximum(counts, 1)).mean(-1)
    brevity = np.minimum(0, 1 - reference / np.maximum(words, 1))
    return np.where((matches[..., 0] > 0) & (counts[..., 3] > 0), 100 * np.exp(logs + brevity), 0.0)


MEASURES = {
    "bleu": Measure("BLEU", ("beams_bleu",), bleu),
    "ter": Measure("TER", ("beams_ter",), lambda s: 100 * ratio(s)),
    "bleu_greedy": Measure("BLEU, greedy", ("greedy_bleu",), bleu),
    "bleu_to_teacher": Measure("BLEU to the teacher's", ("to_teacher_bleu",), bleu),
    "likelihood_risk": Measure("R_llh", ("likelihood_nats", "likelihood_tokens"), ratio, ".3f"),
    "coverage_risk": Measure("R_cvg", ("coverage_nats", "coverage_tokens"), ratio, ".3f"),
    "likelihood_risk_by_sentence": Measure("R_llh, sentences", ("likelihood_nats", "one"), ratio),
    "coverage_risk_by_sentence": Measure("R_cvg, sentences", ("coverage_nats", "one"), ratio),
    "kl": Measure("KL(p‖q) on y", ("kl", "coverage_tokens"), ratio, ".4f"),
    "rkl": Measure("KL(q‖p) on y′", ("rkl", "likelihood_tokens"), ratio, ".4f"),
    "tvd": Measure("TVD on y", ("tvd", "coverage_tokens"), ratio, ".4f"),
    "perplexity": Measure("perplexity", ("gold_nats", "gold_tokens"), lambda s: np.exp(ratio(s))),
    "length_ratio": Measure("words ÷ reference's", ("beams_bleu",), lambda s: s[..., 8] / s[..., 9]),
    "without_end": Measure("without end, %", ("unended", "one"), lambda s: 100 * ratio(s)),
    "looping": Measure("greedy loops, %", ("output_loops", "one"), lambda s: 100 * ratio(s)),
}  # fmt: skip

#: Each hypothesis' measure and the differences that are positive where it holds.
HYPOTHESES: dict[str, tuple[str, list[dict[str, float]]]] = {
    "H1": ("bleu", [{"kl": 1, "seqkd": -1}, {"rkl": 1, "engine": -1}]),
    "H2": ("bleu", [{"js": 0.5, "tvd": 0.5, "kl": -0.5, "rkl": -0.5}]),
    "H3": ("coverage_risk", [{"rkl": 1, "kl": -1}]),
    "H4": ("likelihood_risk", [{"kl": 1, "rkl": -1}]),
}
#: Differences in BLEU that no hypothesis is about.
OTHERS: list[dict[str, float]] = [
    {"kl-beams": 1, "seqkd": -1}, {"kl": 1, "kl-beams": -1}, {"js": 1, "kl": -1}, {"tvd": 1, "kl": -1},
    {"kl": 1, "mle": -1}, {"kl": 1, "predistilled": -1},
]  # fmt: skip


def sums_of(table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """A table's columns as (sentences, k) float64."""

    def column(name: str) -> np.ndarray:
        if name == "one":
            return np.ones((len(table), 1))
        if name == "unended":
            return 1.0 - column("output_ended")
        return np.asarray(table[name].to_pylist(), dtype=np.float64).reshape(len(table), -1)

    return np.concatenate([column(name) for name in columns], 1)


def replicates(
    values: np.ndarray, value: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds of each arm's value, as measured and of drawn seeds and sentences.

    Args:
        values: (arms, seeds, sentences, k), of which `value` takes sums over sentences.

    Returns:
        (arms,) and (draws, arms).
    """
    arms, seeds, sentences, k = values.shape
    flat, generator = values.transpose(2, 0, 1, 3).reshape(sentences, -1), np.random.default_rng(0)
    found = []
    for begin in range(0, draws, 500):
        count = min(500, draws - begin)
        weights = generator.multinomial(sentences, np.full(sentences, 1 / sentences), count).astype(np.float64)
        of_seeds = value((weights @ flat).reshape(count, arms, seeds, k))
        drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds
        found.append(np.einsum("nas,ns->na", of_seeds, drawn))
    return value(values.sum(2)).mean(1), np.concatenate(found)


def beyond(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def quantile(df: int, p: float = 0.05) -> float:
    """The t that |T| is beyond with probability p."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle, df) > p else (low, middle)
    return low


class Estimate(NamedTuple):
    """A value, its 95% interval, and the one-sided p-values of its being above and below 0; of one seed NaN."""

    value: float
    low: float
    high: float
    above: float
    below: float


def estimate(value: float, drawn: np.ndarray, seeds: int) -> Estimate:
    if seeds < 2:
        return Estimate(value, *[math.nan] * 4)
    error = float(drawn.std(ddof=1)) * math.sqrt(seeds / (seeds - 1))
    half = quantile(seeds - 1) * error
    tail = beyond(value / error, seeds - 1) / 2 if error else 0.0 if value else 0.5
    above, below = (tail, 1 - tail) if value >= 0 else (1 - tail, tail)
    return Estimate(value, value - half, value + half, above, below)


def judged(differences: Mapping[str, Sequence[Estimate]], level: float = 0.05) -> dict[str, dict[str, Any]]:
    """Each hypothesis' p-value, two-sided, the same by Holm over all of them, and its verdict.

    One of several differences holds where the least of them does, and fails where any is the other way round.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, several in differences.items():
        holds = min(1.0, 2 * max(d.above for d in several))
        fails = min(1.0, 2 * len(several) * min(d.below for d in several))
        one_seed = math.isnan(several[0].above)
        found[name] = {"p": 1.0 if one_seed else min(holds, fails), "verdict": "holds" if holds <= fails else "fails"}
    least = 0.0
    for i, name in enumerate(sorted(found, key=lambda n: found[n]["p"])):
        least = max(least, min(1.0, (len(found) - i) * found[name]["p"]))
        found[name]["holm"] = least
        if least > level:
            found[name]["verdict"] = "cannot be told"
    return found


def said(difference: Mapping[str, float]) -> str:
    """A difference for people: js/2 + tvd/2 − kl/2 − rkl/2."""
    parts = [f"{'−' if w < 0 else '+'} {arm}{'' if abs(w) == 1 else '/2'}" for arm, w in difference.items()]
    return " ".join(parts).removeprefix("+ ")


def hypotheses() -> dict[str, str]:
    """hypotheses.md, as it was before the run."""
    parts = re.split(r"^## (H\d)\n", (HERE / "hypotheses.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def complete(out: Path) -> list[Path]:
    """The seeds in which every student is measured, in order."""
    seeds = sorted((out / "measures").glob("seed-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    return [p for p in seeds if all((p / f"{row}.parquet").exists() for row in ROWS)]


def results(out: Path, draws: int = DRAWS) -> dict[str, Any]:
    """results.json.

    Raises:
        ValueError: no seed is complete.
    """
    folders = complete(out)
    if not folders:
        raise ValueError(f"{out} has no seed yet in which every arm is measured")
    tables = [[pyarrow.parquet.read_table(folder / f"{row}.parquet") for folder in folders] for row in ROWS]
    teacher, judged_teacher = (pyarrow.parquet.read_table(out / "measures" / f"{name}.parquet")
                               for name in ("teacher", "teacher-dev"))  # fmt: skip
    of_dev, seeds = summary(judged_teacher), len(folders)
    found: dict[str, Any] = {
        "run": json.loads((out / "run.json").read_text()), "seeds": seeds, "sentences": len(teacher), "draws": draws,
        "gate": {**{f"{name}_at_most": limit for name, limit in GATE.items()}, **{name: of_dev[name] for name in GATE},
                 "sentences": len(judged_teacher), "passed": all(of_dev[name] <= GATE[name] for name in GATE)},
        "arms": {row: {} for row in ("teacher", *ROWS)}, "hypotheses": {}, "others": [],
    }  # fmt: skip
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, measure in MEASURES.items():
        values = np.stack([np.stack([sums_of(t, measure.columns) for t in of_arm]) for of_arm in tables])
        drawn[name] = replicates(values, measure.value, draws)
        for i, row in enumerate(ROWS):
            one = estimate(float(drawn[name][0][i]), drawn[name][1][:, i], seeds)
            found["arms"][row][name] = {"value": one.value, "low": one.low, "high": one.high}
        if all(c in (*teacher.column_names, "one", "unended") for c in measure.columns):
            alone = measure.value(sums_of(teacher, measure.columns).sum(0))
            found["arms"]["teacher"][name] = {"value": float(alone)}
    for row, of_arm in zip(("teacher", *ROWS), [[teacher], *tables], strict=True):
        scores = [sacrebleu.corpus_chrf(t["beams_output"].to_pylist(), [t["reference"].to_pylist()]).score
                  for t in of_arm]  # fmt: skip
        found["arms"][row]["chrf"] = {"value": sum(scores) / len(scores)}

    def difference(name: str, weights: Mapping[str, float]) -> Estimate:
        vector = np.array([weights.get(row, 0.0) for row in ROWS])
        value, replicated = drawn[name]
        return estimate(float(value @ vector), replicated @ vector, seeds)

    several = {name: [difference(measure, w) for w in weights] for name, (measure, weights) in HYPOTHESES.items()}
    verdicts, texts = judged(several), hypotheses()
    for name, (measure, weights) in HYPOTHESES.items():
        shown = [{"difference": said(w), **e._asdict()} for w, e in zip(weights, several[name], strict=True)]
        found["hypotheses"][name] = {"said": texts[name], "measure": measure, "differences": shown, **verdicts[name]}
    found["others"] = [{"difference": said(w), **difference("bleu", w)._asdict()} for w in OTHERS]
    if (out / "timing.json").exists():
        found["timing"] = json.loads((out / "timing.json").read_text())
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def interval(found: Mapping[str, float], form: str) -> str:
    half = found.get("high", math.nan) - found["value"]
    return format(found["value"], form) + ("" if math.isnan(half) else f" ± {format(half, form)}")


def report(found: dict[str, Any]) -> str:
    """report.md: the verdicts beside what was said before, the arms, the gate."""
    gate, columns = found["gate"], {n: m for n, m in MEASURES.items()}
    verdicts = [
        (name, "; ".join(f"{d['difference']} = {interval(d, '.3f')}" for d in h["differences"]),
         MEASURES[h["measure"]].shown, f"{h['holm']:.3f}", h["verdict"])
        for name, h in found["hypotheses"].items()
    ]  # fmt: skip
    arms = [(row, format(of["chrf"]["value"], ".2f"),
             *(interval(of[n], m.form) if n in of else "" for n, m in columns.items()))
            for row, of in found["arms"].items()]  # fmt: skip
    return (
        f"# English–Romanian, {found['run']['size']}: {found['seeds']} seeds, {found['sentences']} sentences\n"
        + ("" if gate["passed"] else "**The teacher is outside the gate: the machine-translation claims are not tested "
           "by this table.**\n")
        + f"Its samples' TeacherDist is {gate['teacher_dist']:.3f} (at most {gate['teacher_dist_at_most']}), and "
        f"{gate['looping']:.1%} of its greedy outputs loop (at most {gate['looping_at_most']:.0%}), of "
        f"{gate['sentences']} development sentences.\n"
        + ("" if found["seeds"] > 1 else "One seed has no intervals, and no hypothesis can be told by it.\n")
        + "\n" + table(("", "difference, 95% interval", "in", "p, Holm", "verdict"), verdicts)
        + "".join(f"\n{name}, said before the run: {h['said']}\n" for name, h in found["hypotheses"].items())
        + "\n" + table(("", "chrF", *(m.shown for m in columns.values())), arms)
        + "\n" + table(("other differences in BLEU", ""),
                       [(d["difference"], interval(d, ".2f")) for d in found["others"]])
    )  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """results.png: BLEU by arm, the two risks, and the hypotheses' differences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, risks, differences) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")

    def half(of: Mapping[str, float]) -> float:
        width = of.get("high", math.nan) - of["value"]
        return 0.0 if math.isnan(width) else width

    names = list(found["arms"])[::-1]
    values = [found["arms"][n]["bleu"] for n in names]
    bars.barh(names, [v["value"] for v in values], xerr=[half(v) for v in values], color="C0", ecolor="0.3")
    bars.set_xlabel("BLEU of beam outputs, 95% intervals")
    for i, (name, of) in enumerate(found["arms"].items()):
        x, y = of["coverage_risk"], of["likelihood_risk"]
        risks.errorbar(x["value"], y["value"], half(y), half(x), fmt="o", color=f"C{i}", label=name)
    risks.set(xlabel="coverage risk, nats a token", ylabel="likelihood risk, nats a token")
    risks.legend(fontsize=7)
    rows = [(f"{name}, {MEASURES[h['measure']].shown}:\n{d['difference']}", d)
            for name, h in found["hypotheses"].items() for d in h["differences"]][::-1]  # fmt: skip
    scales = [max(abs(d["value"]) + half(d), 1e-9) for _, d in rows]
    differences.errorbar([d["value"] / s for (_, d), s in zip(rows, scales, strict=True)], [n for n, _ in rows],
                         xerr=[half(d) / s for (_, d), s in zip(rows, scales, strict=True)], fmt="o")  # fmt: skip
    differences.axvline(0, color="0.5", linewidth=1)
    differences.set(xlabel="difference over the farther end of its 95% interval", xlim=(-1.05, 1.05))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def analyse(out: Path, draws: int = DRAWS) -> str:
    """Writes everything; the report."""
    found = results(out, draws)
    text = report(found)
    clean = finite(found)  # of one seed there are no intervals
    write_whole(out / "results.json", (json.dumps(clean, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(out / "report.md", text.encode())
    draw(found, out / "results.png")
    return text


def main() -> int:
    """0, or 2 where nothing can be said yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--publish", action="store_true", help="into benchmarks/results and the documents, too")
    args = parser.parse_args()
    try:
        print(analyse(args.out))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.publish:
        name = "paper_" + json.loads((args.out / "results.json").read_text())["run"]["size"]
        for kind in ("json", "png"):
            shutil.copy(args.out / f"results.{kind}", HERE.parent / "results" / f"{name}.{kind}")
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.numbers", "--write"], cwd=HERE.parent.parent
        ).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
