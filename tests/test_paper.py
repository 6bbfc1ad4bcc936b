"""The paper's experiment made small: every stage and arm, killed and gone on with; and its statistics, where the answer
is known."""

import gzip
import json
import math
import time

import numpy as np
import pyarrow.parquet
import pytest
import sacrebleu

from benchmarks import numbers
from benchmarks.paper import analysis
from benchmarks.paper.analysis import Estimate, beyond, estimate, judged, quantile, ratio, replicates
from benchmarks.paper.stages import ARMS, Experiment, statistics
from fdistill_kernels.provenance import provenance

from . import processes
from .test_run import PAIRS


def begun(data, out, *more):
    """The command in a process, whose words are in a file beside the run's folder."""
    command = ("--data", str(data), "--out", str(out), "--size", "smoke", "--processes", "1", *more)
    return processes.begin(processes.main, "benchmarks.paper.run", *command, output=out.with_name("words.txt"))


def test_killed_and_gone_on_with(tmp_path, monkeypatch):
    for part in ("train", "dev", "test"):
        with gzip.open(tmp_path / f"gettext_en_ro.{part}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, words, until = tmp_path / "out", tmp_path / "words.txt", time.monotonic() + 300
    first = begun(tmp_path, out)
    while not (out / "seed-0" / "mle").exists() and first.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    assert first.is_alive(), words.read_text()[-3000:]
    first.kill()
    first.join()
    kept = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and "work" not in p.parts and p.parent != out
    }
    assert out / "teacher" / "model.safetensors" in kept and not (out / "results.json").exists()
    again = begun(tmp_path, out)
    again.join()
    assert again.exitcode == 0, words.read_text()[-3000:]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing was made twice
    assert all(Experiment(tmp_path, out, "smoke").done(s.name) for s in Experiment(tmp_path, out, "smoke").stages())
    made = [line.split()[2].rstrip(":") for line in (out / "log.txt").read_text().splitlines()]
    assert len(made) == len(set(made)) and made.index("seed-0/tvd") < made.index("seed-1/predistilled")

    results = json.loads((out / "results.json").read_text())
    assert results["run"]["commit"] == provenance("")["commit"]  # which an sdist has not
    assert results["seeds"] == 2 and not results["gate"]["passed"]
    assert results["arms"].keys() == {"teacher", "predistilled", *ARMS}
    assert results["timing"]["js online ÷ stored"] > 0 and (out / "results.png").stat().st_size > 10_000
    assert "**The teacher is outside the gate" in words.read_text() and "Soft beats hard" in words.read_text()
    tables = [pyarrow.parquet.read_table(out / "measures" / f"seed-{i}" / "js.parquet") for i in range(2)]
    scores = [sacrebleu.corpus_chrf(t["beams_output"].to_pylist(), [t["reference"].to_pylist()]).score for t in tables]
    assert results["arms"]["js"]["chrf"]["value"] == pytest.approx(sum(scores) / 2)
    risks = [sum(t["coverage_nats"].to_pylist()) / sum(t["coverage_tokens"].to_pylist()) for t in tables]
    assert results["arms"]["js"]["coverage_risk"]["value"] == pytest.approx(sum(risks) / 2)
    assert tables[0]["coverage_tokens"] == tables[1]["coverage_tokens"]  # all are asked about the same y

    kept = tmp_path / numbers.RESULTS / numbers.PAPER
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({**results, "run": {**results["run"], "dirty": False}}))
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    number = numbers.Numbers()
    verdicts, arms = numbers.paper_verdicts(number), numbers.paper_arms(number)
    assert "js/2 + tvd/2 − kl/2 − rkl/2 = " in verdicts and "cannot be told, outside the gate" in verdicts
    assert arms.count("\n| ") == 11 and format(sum(risks) / 2, ".3f") in arms and len(number.read) > 100

    other = begun(tmp_path, out, "--seeds", "0")
    other.join()
    assert other.exitcode and "--seeds must be at least 1" in words.read_text()
    (out / "measures" / "seed-1" / "tvd.parquet").unlink()
    assert analysis.results(out, 50)["hypotheses"]["H3"]["verdict"] == "cannot be told"  # one seed is complete
    (tmp_path / "gettext_en_ro.dev.tsv.gz").write_bytes(b"")
    run = json.loads((out / "run.json").read_text())
    assert Experiment(tmp_path, out, "smoke").key()["data"] != run["data"]


def test_a_corpus_of_sentences_is_sacrebleus():
    outputs = ["the cat sat on the mat", "a dog", "", "one two three four five six", "the the the the"]
    references = ["the cat sat on a mat", "a dog", "something else", "one two three five four six seven", "the cat"]
    for n in (5, 2, 3):  # of two there is no 4-gram but one, of the last three smoothing is needed
        some, others = (x[:n] if n != 3 else x[2:] for x in (outputs, references))
        found = {name: np.array(x).sum(0) for name, x in statistics(some, others).items()}
        assert analysis.bleu(found["bleu"]) == pytest.approx(sacrebleu.corpus_bleu(some, [others]).score, rel=1e-9)
        assert 100 * ratio(found["ter"]) == pytest.approx(sacrebleu.corpus_ter(some, [others]).score, rel=1e-9)


def test_students_t():
    for df, t in ((1, 12.7062), (4, 2.7764), (9, 2.2622), (100, 1.9840)):  # of any table
        assert quantile(df) == pytest.approx(t, abs=1e-4) and beyond(t, df) == pytest.approx(0.05, abs=1e-5)


def made(generator, effect, of_students, of_sentences, seeds=5, sentences=60):
    """Two arms of which the second is `effect` higher: what they share, and what students and sentences have alone."""
    shared = generator.normal(0, 3, (1, seeds, 1)) + generator.normal(0, 5, (1, 1, sentences))
    own = generator.normal(0, of_students, (2, seeds, 1)) + generator.normal(0, of_sentences, (2, 1, sentences))
    values = shared + own + generator.normal(0, 1, (2, seeds, sentences))
    values[1] += effect
    return np.stack((values, np.ones_like(values)), -1)


@pytest.mark.parametrize(("of_students", "of_sentences", "most"), [(2, 0.1, 0.98), (0.5, 0.5, 1), (0, 2, 1)])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(of_students, of_sentences, most):
    generator, effect, held, wide = np.random.default_rng(1), 0.3, 0, []
    for _ in range(200):
        value, drawn = replicates(made(generator, effect, of_students, of_sentences), ratio, 200)
        found = estimate(float(value[1] - value[0]), drawn[:, 1] - drawn[:, 0], 5)
        held += found.low <= effect <= found.high
        wide.append(found.high - found.low)
    assert 0.92 <= held / 200 <= most
    deviation = math.sqrt(2 * (of_students**2 / 5 + of_sentences**2 / 60 + 1 / 300))
    assert 0.8 < np.mean(wide) / (2 * quantile(4) * deviation) < 1.3  # what the arms share is not in it


def test_verdicts():
    above, below, unclear = (Estimate(x, 0, 0, p, 1 - p) for x, p in ((1, 0.001), (-1, 0.999), (0.1, 0.3)))
    found = judged({"a": [above], "b": [below, above], "c": [unclear], "d": [above, unclear]})
    assert {n: f["verdict"] for n, f in found.items()} == {
        "a": "holds", "b": "fails", "c": "cannot be told", "d": "cannot be told"}  # fmt: skip
    assert found["a"]["holm"] == pytest.approx(4 * 0.002) and found["b"]["holm"] == pytest.approx(3 * 0.004)
    assert found["c"]["holm"] == found["d"]["holm"] == 1
    weak = Estimate(1, 0, 0, 0.01, 0.99)  # 2% each, which of four is not enough
    assert {f["verdict"] for f in judged({n: [weak] for n in "abcd"}).values()} == {"cannot be told"}
    assert judged({"a": [estimate(1.0, np.ones(5), 1)]})["a"]["verdict"] == "cannot be told"


def test_the_hypotheses_are_those_that_are_tested():
    assert analysis.hypotheses().keys() == analysis.HYPOTHESES.keys()
    assert analysis.said(analysis.HYPOTHESES["H2"][1][0]) == "js/2 + tvd/2 − kl/2 − rkl/2"
