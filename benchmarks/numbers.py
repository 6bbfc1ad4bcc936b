"""Writes every measured number of README, CHANGELOG and docs, from the result file that holds it.

Measured numbers stand between `<!-- measured: NAME -->` and `<!-- end -->`. The text between them is written by the
function of that name below. Anywhere else, a number with a unit must be a bound that a test holds, and its paragraph
names the test.

    python -m benchmarks.numbers            prints each number with its file and key
    python -m benchmarks.numbers --write    writes the texts again, after a benchmark
    python -m benchmarks.numbers --check    fails if a text differs from its file, or a number has no file and no test
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results/"
DOCUMENTS = ("README.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")))
ENTRIES = "results", "cases", "rows", "lists", "states", "split", "heads", "shares"  # lists of a result file
BLOCK = re.compile(r"<!-- measured: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
WITH_UNIT = re.compile(r"\d[\d.,]*\s?(?:%|×|ms\b|µs\b|ns\b|s\b|MB\b|MiB\b|GB\b|GiB\b|times\b|tokens/s|seconds\b)")


class Numbers:
    """Reads result files, and remembers which number came from which file."""

    def __init__(self) -> None:
        self.read: list[tuple[str, str, str]] = []
        self.files: dict[str, Any] = {}

    def file(self, name: str) -> Any:
        """The content of a result file, which must name its device and commit, and come from a clean tree."""
        if name not in self.files:
            self.files[name] = self._checked(name)
        return self.files[name]

    def _checked(self, name: str) -> Any:
        content = json.loads((ROOT / RESULTS / name).read_text())
        run = content.get("run") or content
        origin = {**run, **content.get("machine_info", {}), **content.get("commit_info", {})}  # of pytest-benchmark
        said = origin.get("device") and (origin.get("id") or origin.get("commit"))
        if not said or origin.get("dirty", True):
            raise SystemExit(f"{name} does not say that it is of a clean tree, and of which device and commit")
        return content

    def __call__(self, name: str, *keys: str | int, form: str = ".1f") -> str:
        """The formatted number at these keys. In a pytest-benchmark file, the first key is the benchmark's name."""
        value = self.file(name)
        if "benchmarks" in value:
            found = next(b for b in value["benchmarks"] if b["name"] == keys[0])
            value = {keys[0]: {**found["extra_info"], "ms": 1e3 * found["stats"]["median"]}}
        for key in keys:
            value = value[key]
        text = format(value, form)
        self.read.append((text, RESULTS + name, " / ".join(map(str, keys))))
        return text

    def of(self, name: str, key: str, form: str = ".2f", unit: float = 1, **what: Any) -> str:
        """The formatted number `key` of the entry that matches `what`, divided by `unit`; "failed" if it lacks it."""
        entry = self._entry(name, key, what)
        return "failed" if key not in entry else self._read(name, key, what, format(entry[key] / unit, form))

    def each(self, name: str, key: str, form: str, **what: Any) -> list[str]:
        """The formatted numbers of an entry that holds a list of them."""
        return [self._read(name, key, what, format(x, form)) for x in self._entry(name, key, what)[key]]

    def _entry(self, name: str, key: str, what: dict[str, Any]) -> Any:
        content = self.file(name)
        lists = (content.get(n, []) for n in ENTRIES)
        (entry,) = (r for entries in lists for r in entries if all(r.get(k) == v for k, v in what.items()))
        return entry

    def _read(self, name: str, key: str, what: dict[str, Any], text: str) -> str:
        self.read.append((text, RESULTS + name, " / ".join([*map(str, what.values()), key])))
        return text


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ("---",) * len(header), *rows))


def beside(number: Numbers) -> str:
    """Other libraries' time and memory, divided by ours at the same shapes."""
    logits, hidden = {"shape": [8192, 128256], "alike": False}, {"shape": [8192, 128256, 2048, 4096]}
    rows, linear = ("rows_peers.json", "rows_cuda.json", "cuda"), ("linear_peers.json", "linear_ours.json", "triton")
    card: dict[str, tuple[tuple[str, str, str], str, dict[str, Any]]] = {
        "kl from logits, GPU": (rows, "milliseconds", {"divergence": "kl", **logits}),
        "tvd from logits, GPU": (rows, "milliseconds", {"divergence": "tvd", **logits}),
        "js from hidden states, GPU": (linear, "milliseconds", {"divergence": "js", **hidden}),
        "its memory, GPU": (linear, "peak_bytes", {"divergence": "js", **hidden}),
    }
    cpu = {"js from hidden states, CPU": "over_floor", "its memory, CPU": "growth_mb"}

    def ratio(files: str, key: str, what: dict[str, Any], theirs: list[float], ours: float) -> str:
        """Theirs divided by ours; empty if they have no such loss."""
        return number._read(files, key, what, format(theirs[0] / ours, ".2g")) if theirs else ""

    def on_card(who: str, of: tuple[str, str, str], key: str, what: dict[str, Any]) -> str:
        (theirs, own, backend), what = of, {"what": who, **what}
        found = [r[key] for r in number.file(theirs)["results"] if all(r.get(k) == v for k, v in what.items())]
        ours = number._entry(own, key, {**what, "what": f"fdistill {backend}"})[key]
        return ratio(f"{theirs} / {own}", key, what, found, ours)

    def on_cpu(who: str, key: str) -> str:
        found = {b["name"]: b["extra_info"] for b in number.file("cpu_linear.json")["benchmarks"]}
        theirs = [found[name][key] for name in found if name == f"test_linear_js[{who}]"]
        return ratio("cpu_linear.json", key, {"what": who}, theirs, found["test_linear_js[fdistill]"][key])

    def step(key: str) -> str:
        ours, theirs = (number._entry("trainers_cpu.json", key, {"who": w, "sequences": "gold"})[key]
                        for w in ("ours", "trl"))  # fmt: skip
        return ratio("trainers_cpu.json", key, {"what": "trl / ours"}, [theirs], ours)

    whose = {"Liger-Kernel": "liger-kernel", "TRL": "trl", "orda-kernel": "orda-kernel",
             "torch.compile": "torch.compile", "eager PyTorch": "eager"}  # fmt: skip
    lines = [(shown, *(on_card(who, *of) for of in card.values()), *(on_cpu(who, key) for key in cpu.values()))
             for shown, who in whose.items()]  # fmt: skip
    machines = number.file("linear_ours.json")["device"], number.file("cpu_linear.json")["machine_info"]["device"]
    return (
        table(("theirs ÷ ours", *card, *cpu), lines)
        + f"\nForward and backward. GPU: {machines[0]}, bfloat16, N = 8192, V = 128256, hidden states of 2048 and 4096 "
        f"features. CPU: 2 cores of an\n{machines[1]}, float32, N = 2048, V = 32000, hidden states of 512 features.\n"
        f"A step of TRL's `GKDTrainer` on gold sequences takes {step('step_seconds')} times as long as a step of "
        f"`FDistillTrainer`, and\n{step('peak_bytes_above_start')} times the memory (one CPU thread).\n"
    )


def rows(number: Numbers) -> str:
    """Losses from logits on CPUs with and without AVX-512."""
    files, dtypes = ("cpu_rows.json", "cpu_rows_avx2.json"), ("float32", "bfloat16")
    machines = [number.file(name)["machine_info"] for name in files]
    lines = [
        (name, machine["instruction_set"],
         *(number(file, f"test_ours[{name}-torch.{dtype}]", "ms") + " ms" for dtype in dtypes),
         number(file, f"test_ours[{name}-torch.float32]", "over_floor"),
         *(number(file, f"test_peers[{name}-{peer}]", "over_ours") for peer in ("compile", "eager")))
        for name in ("kl", "js", "tvd") for file, machine in zip(files, machines, strict=True)
    ]  # fmt: skip
    of = " and ".join(f"{m['threads']} cores of an {m['device']} with {m['instruction_set']}" for m in machines)
    return (
        f"Forward and backward, N = 1024, V = 32000, {of}, medians;\nratios are of float32:\n\n"
        + table(("", "instructions", "float32", "bfloat16", "÷ floor", "torch.compile ÷ ours", "eager ÷ ours"), lines)
    )  # fmt: skip


def linear(number: Numbers) -> str:
    """Losses from hidden states on the CPU."""
    peers = {"ours": "fdistill", "liger-kernel's chunked JSD": "liger-kernel", "torch.compile": "torch.compile",
             "trl's chunked JSD": "trl", "eager": "eager"}  # fmt: skip
    lines = [
        (shown, number("cpu_linear.json", f"test_linear_js[{name}]", "over_floor", form=".2f"),
         number("cpu_linear.json", f"test_linear_js[{name}]", "growth_mb", form=".0f") + " MB")
        for shown, name in peers.items()
    ]  # fmt: skip
    return table(("", "÷ floor", "growth"), lines)


PEERS = "peers_cpu.json"


def peers(number: Numbers) -> str:
    """Every peer that was timed on the CPU: its time over ours, its memory, and the error of its gradient."""
    found, ours, scale = number.file(PEERS), "fdistill", 4.0
    results = {(r["form"], r["divergence"], r["what"]): r for r in found["results"]}

    def cell(form: str, divergence: str, what: str) -> str:
        if (form, divergence, what) not in results:
            return ""
        own, its = results[form, divergence, ours], results[form, divergence, what]
        error = next(e["gradient_error"] for e in its["errors"] if e["scale"] == scale)
        time = f"{1e3 * its['seconds']:.1f} ms" if what == ours else f"{its['seconds'] / own['seconds']:.2g}"
        texts = time, f"{(its['peak_bytes'] - its['gradient_bytes']) / 1e6:.0f} MB", f"{error:.0e}"
        keys = "seconds", "peak_bytes − gradient_bytes", f"gradient_error at scale {scale:g}"
        return " / ".join(number._read(PEERS, key, {"": f"{form} / {divergence} / {what}"}, text)
                          for key, text in zip(keys, texts, strict=True))  # fmt: skip

    def of_form(form: str, shown: str) -> str:
        names = list(dict.fromkeys(d for f, d, _ in results if f == form))
        whats = dict.fromkeys(w for f, _, w in results if f == form)
        lines = [("ours" if w == ours else w, *(cell(form, d, w) for d in names)) for w in whats]
        return table((shown, *names), lines)

    (n, v), forms = found["shape"], {f for f, *_ in results}
    kinds = {
        "rows": "from logits",
        "linear": "from hidden states",
        "beside": "from hidden states to a teacher's logits",
    }
    return (
        f"N = {n}, V = {v}, hidden states of {found['depth']} features, {found['dtype']}, {found['device']}, "
        f"{found['threads']} threads, torch {found['torch']}:\n\n"
        + "\n".join(of_form(form, shown) for form, shown in kinds.items() if form in forms)
    )


def demo(number: Numbers) -> str:
    """The demo's models."""
    names = number.file("demo_cpu.json")["models"]

    def line(name: str) -> tuple[str, ...]:
        kl = "" if name == "teacher" else number("demo_cpu.json", "models", name, "kl_to_teacher", form=".3f")
        return name, kl, number("demo_cpu.json", "models", name, "perplexity")

    return table(("", "held-out KL to the teacher", "perplexity"), [line(name) for name in names])


PAPER = "paper_cpu.json"
NOT_YET = "No run of this design has been finished and committed yet.\n"


def _estimate(number: Numbers, form: str, *keys: str) -> str:
    """A value with its interval; with one seed, the value alone."""
    found = number.file(PAPER)
    for key in keys:
        found = found[int(key) if isinstance(found, list) else key]
    shown = [format(found[name], form) for name in ("value", "low", "high") if found.get(name) is not None]
    number.read += [(text, RESULTS + PAPER, " / ".join(keys)) for text in shown]
    return shown[0] + (f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else "")


def paper_verdicts(number: Numbers) -> str:
    """The hypotheses of the paper's experiment with their verdicts, and whether its teacher passed the gate."""
    if not (ROOT / RESULTS / PAPER).exists():
        return NOT_YET
    found = number.file(PAPER)
    gate, outside = found["gate"], "" if found["gate"]["passed"] else ", outside the gate"
    of_gate = (number(PAPER, "gate", name, form=form) for name, form in (("teacher_dist", ".3f"), ("looping", ".1%")))
    lines = [
        (name, "; ".join(f"{d['difference']} = {_estimate(number, '.3f', 'hypotheses', name, 'differences', str(i))}"
                         for i, d in enumerate(h["differences"])),
         h["measure"], number(PAPER, "hypotheses", name, "holm", form=".3f"), h["verdict"] + outside)
        for name, h in found["hypotheses"].items()
    ]  # fmt: skip
    return (
        f"{found['seeds']} seeds, {found['sentences']} test sentences, {found['run']['device']}, commit "
        f"`{found['run']['commit'][:7]}`. The teacher's TeacherDist is\n{next(of_gate)}, and {next(of_gate)} of its "
        f"greedy outputs loop: it is {'inside' if gate['passed'] else '**outside**'} the gate"
        + ("" if gate["passed"] else ", and the claims about translation are not tested by this table")
        + ".\n\n"
        + table(("", "difference (95% interval)", "of", "p, Holm", "verdict"), lines)
    )


def paper_arms(number: Numbers) -> str:
    """The measures of each arm of the paper's experiment, and the cost of drawing the teacher's samples online."""
    if not (ROOT / RESULTS / PAPER).exists():
        return NOT_YET
    columns = {"bleu": ("BLEU", ".2f"), "chrf": ("chrF", ".2f"), "ter": ("TER", ".1f"),
               "likelihood_risk": ("R_llh", ".3f"), "coverage_risk": ("R_cvg", ".3f"), "kl": ("KL", ".3f"),
               "length_ratio": ("words ÷ reference's", ".2f"), "looping": ("greedy loops, %", ".1f")}  # fmt: skip
    forms = {name: form for name, (_, form) in columns.items()}
    lines = [
        (arm, *(_estimate(number, form, "arms", arm, name) for name, form in forms.items()))
        for arm in number.file(PAPER)["arms"]
    ]
    ratios = " and ".join(number(PAPER, "timing", f"{arm} online ÷ stored", form=".2f") for arm in ("js", "tvd"))
    return (
        table(("", *(shown for shown, _ in columns.values())), lines)
        + f"\nAn update with the teacher's samples drawn online takes {ratios} times as long as with those\n"
        f"stored, for js and tvd.\n\n![arms, risks and differences](../{RESULTS}{PAPER.replace('json', 'png')})\n"
    )


def trainers(number: Numbers) -> str:
    """The time of a step and the peak memory of both trainers."""
    file = "trainers_cpu.json"
    names = {"ours": "FDistillTrainer", "trl": f"TRL {number.file(file)['run']['trl']}"}
    lines = [
        (f"{names[who]}, {sequences} sequences",
         number.of(file, "step_seconds", who=who, sequences=sequences),
         number.of(file, "peak_bytes_above_start", ".0f", 1e6, who=who, sequences=sequences))
        for sequences in ("gold", "student") for who in names
    ]  # fmt: skip
    return table(("", "s a step", "MB at the peak, above the start"), lines)


def cluster_demo(number: Numbers) -> str:
    """How much a run on four processes differs from a run on one."""

    first, last = (number("cluster_demo.json", "losses", i, form=".3f") for i in (0, -1))
    loss, weight = (number("cluster_demo.json", "largest_difference", of, form=".1e") for of in ("loss", "weight"))
    steps = number("cluster_demo.json", "steps", form="d")
    return (
        f"js falls from {first} to {last} nats in {steps} steps. The largest difference from one process's is {loss}\n"
        f"of a loss, and {weight} in a weight.\n"
    )


def _matrix() -> list[tuple[str, ...]]:
    """The versions that were tested together, under their header, with the result of each row."""
    lines = [line for line in (ROOT / "tests/MATRIX.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    return [(*row[1:-2], ", ".join(row[-2].split(", ")[:2])) for row in cells]


def versions(number: Numbers) -> str:
    """The versions that were tested together."""
    header, *rows = _matrix()
    return table(header, rows)


def tested(number: Numbers) -> str:
    """The oldest and the newest version of each package that was tested."""
    header, *rows = _matrix()

    def span(package: str) -> str:
        found = {tuple(map(int, re.findall(r"\d+", row[header.index(package)])[:2])) for row in rows}
        return f"{package} {' to '.join('.'.join(map(str, of)) for of in (min(found), max(found)))}"

    shown = ", ".join(map(span, ("python", "torch", "triton", "transformers")))
    return f"Tested: {shown}\n([tests/MATRIX.md](tests/MATRIX.md) has the combinations; `make test-matrix`).\n"


def precision(number: Numbers) -> str:
    """Worst errors over all cases of each divergence."""
    whats = ("loss", "student_gradient", "teacher_gradient")
    lines = [
        (name, *(number("precision_cpu.json", "worst", name, of, what, form=".0e")
                 for what in whats for of in ("ours", "eager")))
        for name in number.file("precision_cpu.json")["worst"]
    ]  # fmt: skip
    return table(("worst errors", "loss", "eager", "student's gradient", "eager", "teacher's", "eager"), lines)


def vocabularies(number: Numbers) -> str:
    """How many cases are within the tolerances at each vocabulary."""
    lines = []
    for v, found in number.file("precision_cpu.json")["vocabularies"].items():
        at = ("precision_cpu.json", "vocabularies", v)
        counts = f"{number(*at, 'within', form='d')} of {number(*at, 'cases', form='d')}"
        worst = number(*at, "their worst gradient", form=".0e") if found["others of"] else ""
        lines.append((v, counts, ", ".join(found["others of"]), worst))
    return table(("vocabulary", "cases within 1e-4 and 2e-5", "others are of", "their worst gradient"), lines)


def _card(number: Numbers, name: str) -> str:
    file = number.file(name)
    versions = file["versions"]
    return (f"{file['device']}, driver {file['driver_version']}, torch {file['torch']}, Triton {versions['triton']}, "
            f"liger-kernel {versions['liger-kernel']}, orda-kernel {versions['orda-kernel']}, "
            f"trl {versions['trl']}")  # fmt: skip


def gpu_rows(number: Numbers) -> str:
    """Losses from logits on a GPU."""

    def line(name: str, v: int, alike: bool = False) -> tuple[str, ...]:
        what = {"divergence": name, "shape": [8192, v], "alike": alike}

        def ours(backend: str, key: str) -> str:
            return number.of(f"rows_{backend}.json", key, **what, what=f"fdistill {backend}")

        peers = [
            "" if alike else number.of("rows_peers.json", "milliseconds", **what, what=peer)
            for peer in ("torch.compile", "liger-kernel", "eager")
        ]
        return (f"{name}, alike" if alike else name, str(v), ours("cuda", "milliseconds"), ours("cuda", "over_floor"),
                ours("cuda", "device_milliseconds"), ours("triton", "milliseconds"), *peers)  # fmt: skip

    shapes = [(name, v) for v in (128256, 32000) for name in ("kl", "js", "tvd")] + [("js", 50257), ("labels", 128256)]
    lines = [line(*shape) for shape in shapes] + [line(name, 128256, True) for name in ("kl", "js", "tvd")]
    header = ("", "V", "`cuda`, ms", "÷ floor", "its kernels, ms", "`triton`, ms", "torch.compile, ms",
              "liger-kernel, ms", "eager, ms")  # fmt: skip
    rate = format(number.file("rows_cuda.json")["copy_bytes_per_second"] / 1e12, ".2f")
    counted = json.loads((ROOT / "tests/counts.json").read_text())
    counts = [", ".join(f"{name} {counted[of][name]['instructions']:.0f}" for name in ("kl", "js", "tvd", "labels"))
              for of in ("cuda", "table")]  # fmt: skip
    return (
        f"One {_card(number, 'rows_cuda.json')};\nforward and backward, bfloat16, N = 8192, medians; a floor is three "
        f"passes (two for labels) at the copy rate measured\nbeside it, {rate} TB/s:\n\n"
        + table(header, lines)
        + f"\nInstructions an entry of the present kernels on sm_90 (`tests/counts.json`), `cuda`: {counts[0]}; "
        f"`triton`: {counts[1]}.\n"
    )


def host(number: Numbers) -> str:
    """Steps in which the kernel takes next to nothing."""
    content = number.file("host_cpu.json")
    keys, names = ("microseconds", "eager_microseconds"), [row["what"] for row in content["rows"]]
    lines = [(what, *(number.of("host_cpu.json", key, ".0f", what=what) for key in keys)) for what in names]
    n, v = content["shape"]
    return (
        f"One thread of an {content['run']['device']}, {content['dtype']}, N = {n}, V = {v}, forward and backward,\n"
        f"the fastest of {content['runs']} runs of {content['steps']} steps:\n\n"
        + table(("", "ours, µs", "PyTorch's operations, µs"), lines)
    )


def gpu_linear(number: Numbers) -> str:
    """Losses from hidden states on a GPU."""
    shapes = [[8192, 128256, 2048, 4096], [8192, 128256, 4096, 4096]]
    whose = {
        "ours, `cuda` rows": ("ours", "fdistill cuda"), "ours, `triton` rows": ("ours", "fdistill triton"),
        'ours, `memory="minimal"`': ("ours", "fdistill minimal"),
        'ours, `memory="minimal"`, `chunk_bytes` of 4·N·D + 64 MB': ("ours", "fdistill minimal, eight products"),
        "torch.compile": ("peers", "torch.compile"),
        "orda-kernel": ("peers", "orda-kernel"), "liger-kernel, chunked": ("peers", "liger-kernel"),
        "liger-kernel, fused": ("peers", "liger-kernel fused"), "trl, chunked": ("peers", "trl"),
        "eager": ("peers", "eager"), "the four products alone": ("ours", "products"),
    }  # fmt: skip

    def line(shown: str, who: str, what: str) -> tuple[str, ...]:
        found = {"what": what} if what == "products" else {"what": what, "divergence": "js"}
        times = [number.of(f"linear_{who}.json", "milliseconds", ".1f", **found, shape=s) for s in shapes]
        at = {**found, "shape": shapes[0]}
        memory = "" if what == "products" else number.of(f"linear_{who}.json", "peak_bytes", unit=1e9, **at)
        return shown, times[0], memory, times[1]

    header = (
        "js, bfloat16, N = 8192, V = 128256",
        "D 2048 and 4096, ms",
        "beyond gradients, GB",
        "D 4096 and 4096, ms",
    )
    return table(header, [line(shown, *found) for shown, found in whose.items()])


def cut_sweeps(number: Numbers) -> str:
    """The rates of the cut path's kernels on a GPU."""
    file, shape = "linear_ours.json", [8192, 128256, 2048, 4096]
    n, v, student, teacher = shape
    whole, lines = number.file(file)["matrix_flop_per_second"] / 1e12, []
    for shown, kernel, widths in (
        ("logits of both models, for their sums", "statistics_kernel", (student + teacher,) * 2),
        ("the same with the loss and the gradient on chip, three times, or two", "tile_kernel",
         (3 * (student + teacher), 2 * (student + teacher))),
        ("the gradient's two products", "product_kernel", (2 * student,) * 2),
    ):  # fmt: skip
        cells = []
        for what, width in zip(("fdistill minimal", "fdistill minimal, eight products"), widths, strict=True):
            ours = {"what": what, "divergence": "js", "shape": shape}
            found = number._entry(file, "kernels", ours)["kernels"][kernel]
            rate = 2 * n * v * width / (1e-3 * found) / 1e12
            cells += [
                number._read(file, f"kernels.{kernel}", ours, x) for x in (format(found, ".1f"), format(rate, ".0f"))
            ]
        lines.append((shown, *cells))
    one = number._read(file, "matrix_flop_per_second", {}, format(whole, ".0f"))
    lines.append(("one large product", "", one, "", one))
    header = ("the first of the shapes", "ms", "TFLOP/s", "with more memory, ms", "TFLOP/s")
    return table(header, lines)


def lists_cost(number: Numbers) -> str:
    """The time of losses to lists, divided by that of a cross-entropy, on the CPU."""
    cases = number.file("lists_cost_cpu.json")["cases"]
    shapes = list(dict.fromkeys((tuple(c["shape"]), c["dtype"]) for c in cases))
    asked = [(1, "bucket"), (16, "bucket"), (64, "bucket"), (64, "within"), (64, "uniform"), (1024, "bucket")]

    def cell(k: int, tail: str, shape: tuple[int, int], dtype: str) -> str:
        what = {"k": k, "tail": tail, "shape": list(shape), "dtype": dtype}
        return " / ".join(number.each("lists_cost_cpu.json", "over_cross_entropy", ".2f", **what))

    header = ("K, tail; from logits / from hidden states (D = 512)", *(f"{n}×{v} {dtype}" for (n, v), dtype in shapes))
    return table(header, [(f"{k}, {tail}", *(cell(k, tail, *shape) for shape in shapes)) for k, tail in asked])


def tails(number: Numbers) -> str:
    """The gradient's error of each tail rule, in percent."""
    found = number.file("lists_errors_cpu.json")["lists"]
    ks = (4, 64, 1024)

    def cell(tail: str, k: int, name: str) -> str:
        what = {"tail": tail, "k": k, "divergence": name}
        if not any(all(r[n] == v for n, v in what.items()) for r in found):
            return "infinite"
        return number.of("lists_errors_cpu.json", "gradient", ".1%", **what)

    masses = [number.of("lists_errors_cpu.json", "mass", ".1%", k=k, tail="bucket", divergence="kl") for k in ks]
    header = ("", *(f"{name}, K = {k}" for name in ("kl", "rkl", "js") for k in ks))
    of_tails = ("bucket", "uniform", "renormalize", "within", "ignore", "sampled")
    lines = [(tail, *(cell(tail, k, name) for name in ("kl", "rkl", "js") for k in ks)) for tail in of_tails]
    mass = ", ".join(f"{m} at K = {k}" for m, k in zip(masses, ks, strict=True))
    return table(header, lines) + f"\nOf the teacher's mass the lists hold {mass}.\n"


def modes(number: Numbers) -> str:
    """The single bell that each divergence fits to two modes."""

    def line(name: str) -> tuple[str, ...]:
        def of(key: str, form: str) -> str:
            return number.of("pictures_cpu.json", key, form, divergence=name)

        return name, of("mean", ".1f"), of("deviation", ".1f"), of("lesser", ".0%")

    lesser = number("pictures_cpu.json", "lesser", form=".0%")
    header = ("", "mean", "deviation", f"mass at the lesser mode, of which the teacher has {lesser}")
    return table(header, [line(name) for name in ("kl", "rkl", "js", "tvd", "gjs(0.9)", "skew_kl(0.5)", "alpha(0.5)")])


def tail_shares(number: Numbers) -> str:
    """The share of kl's gradient outside the teacher's largest entries, at each temperature."""
    shares = number.file("pictures_cpu.json")["tail_shares"]
    cells = [number("pictures_cpu.json", "tail_shares", t, form=".1%") for t in shares]
    return table(("T", *shares), [("of kl's gradient outside the teacher's ten largest", *cells)])


def stored_states(number: Numbers) -> str:
    """The errors of losses and gradients that come from the precision of stored hidden states."""
    content = number.file("lists_errors_cpu.json")

    def line(what: str) -> tuple[str, ...]:
        at = {"states": what}
        size = number.of("lists_errors_cpu.json", "bytes_per_token", ".0f", **at, divergence="kl")
        errors = [
            number.of("lists_errors_cpu.json", key, ".2%", **at, divergence=name)
            for name in ("kl", "js", "tvd") for key in ("loss", "gradient")
        ]  # fmt: skip
        return what, size, *errors

    header = ("states", "bytes a token", *(f"{n}: {key}" for n in ("kl", "js", "tvd") for key in ("loss", "gradient")))
    return table(header, [line(w) for w in dict.fromkeys(r["states"] for r in content["states"])])


def stores(number: Numbers) -> str:
    """The rates of reading and writing a store."""

    def line(case: str) -> tuple[str, ...]:
        def of(key: str, form: str, unit: float = 1) -> str:
            return number.of("stores.json", key, form, unit, case=case)

        return (case, of("bytes_per_token", ".0f"), of("read_tokens_per_second", ",.0f"),
                of("read_over_copy", ".2f"), of("written_tokens_per_second", ",.0f"))  # fmt: skip

    header = (
        "",
        "bytes a token",
        "read, tokens a second",
        "reading ÷ copying as many bytes",
        "written, tokens a second",
    )
    return table(header, [line(c["case"]) for c in number.file("stores.json")["cases"]])


def scaling_counts(number: Numbers) -> str:
    """The counts of real runs, which the cost model must equal."""
    found = number.file("scaling.json")
    cases = list(dict.fromkeys(r["case"] for r in found["cases"]))
    shown = ("kl", "js", "lk", "renyi", "entropy_gated", "csd", "tail_aware", "dkd", "akl")

    def line(case: str) -> tuple[str, ...]:
        ranks = [r["ranks"] for r in found["cases"] if r["case"] == case]
        peaks = [number.of("scaling.json", "peak_over_model", case=case, ranks=n) for n in ranks]
        counts = [
            number.of("scaling.json", k, ",.0f", case=case, ranks=4) for k in ("collectives", "sent_bytes", "flops")
        ]
        return case, *counts, ", ".join(["–"] * (3 - len(ranks)) + peaks)

    checked = found["checked"]
    return (
        f"From hidden states but where it says logits, N = {checked['tokens']} in three chunks, "
        f"V = {checked['vocabulary']}, D = {checked['width']}, D_t = {checked['teacher_width']}, float32:\n\n"
        + table(("4 processes", "collectives", "bytes", "FLOP", "peak, on 1, 2, 4"),
                [line(c) for c in cases if c in shown or " " in c])
        + f"\n{len(found['cases'])} runs, every divergence on 1, 2 and 4 processes, are in "
        "[scaling.json](../benchmarks/results/scaling.json).\n"
    )  # fmt: skip


def scaling_rows(number: Numbers) -> str:
    """The operators and bytes of split rows."""
    names = list(number.file("scaling.json")["arithmetic"])

    def line(name: str) -> tuple[str, ...]:
        at = ("scaling.json", "arithmetic", name)
        return name, number(*at, "operators", form=".0f"), number(*at, "touched", form=",.0f")

    header = ("", "operators a piece", "bytes of arguments and results an entry")
    return table(header, [line(n) for n in names])


def scaling_split(number: Numbers) -> str:
    """The modelled cost of one loss over several ranks."""
    columns = {"flops": ("TFLOP a rank", ".1f", 1e12), "peak_bytes": ("peak, GB", ".1f", 1e9),
               "products": ("products, ms", ".1f", 1), "rows": ("rows by the kernel, ms", ".1f", 1),
               "torch": ("rows by torch, ms", ".1f", 1), "statistics": ("statistics, ms", ".1f", 1),
               "hidden": ("∂hidden, ms", ".1f", 1)}  # fmt: skip

    def line(entry: dict[str, Any]) -> tuple[str, ...]:
        what = {"ranks": entry["ranks"], "chunks": entry["chunks"]}
        return str(entry["ranks"]), *(number.of("scaling.json", k, f, u, **what) for k, (_, f, u) in columns.items())

    said = "kl, 8B from 70B (D = 4096 and 8192), V = 128256, N = 8192, bfloat16, H100 SXM; **modelled**:\n\n"
    header = ("R", *(shown for shown, *_ in columns.values()))
    return said + table(header, [line(r) for r in number.file("scaling.json")["split"]])


def scaling_device(number: Numbers) -> str:
    """The constants of the cost model."""

    def of(key: str, form: str = ".2f", unit: float = 1) -> str:
        value = number.file("scaling.json")["device"][key] / unit
        return number._read("scaling.json", key, {"": "device"}, format(value, form))

    lines = [
        ("matrix products", of("matrix", ".1f", 1e12) + " TFLOP/s", of("matrix_share"), ""),
        ("memory", of("memory", unit=1e12) + " TB/s", of("memory_share"), ""),
        ("kl's kernel ÷ three passes", "", of("row_over_floor"), ""),
        (f"wire among {of('node', '.0f')} GPUs of a node", of("near", ".0f", 1e9) + " GB/s", "", of("wire_share")),
        ("wire beyond", of("far", ".0f", 1e9) + " GB/s", "", of("wire_share")),
        (
            "a collective's latency",
            "",
            "",
            f"{of('near_latency', '.0f', 1e-6)} and {of('far_latency', '.0f', 1e-6)} µs",
        ),
        ("an operator's launch", "", "", of("launch", ".0f", 1e-6) + " µs"),
    ]
    return table(("", "the maker's", "reached of it", "assumed"), lines)


def scaling_shares(number: Numbers) -> str:
    """The modelled share of the loss in a training step."""
    found = number.file("scaling.json")["shares"]
    lines = list(dict.fromkeys((r["tensor"], r["rows"]) for r in found))
    pairs = list(dict.fromkeys((r["student"], r["teacher"]) for r in found))

    def cell(tensor: int, rows: str, pair: tuple[str, str], gpus: int) -> str:
        what = {"student": pair[0], "teacher": pair[1], "tensor": tensor, "rows": rows, "gpus": gpus}
        return (
            number.of("scaling.json", "share", ".1%", **what) if any(what.items() <= r.items() for r in found) else ""
        )

    header = ("share of a step, **modelled**", *(f"{s} from {t}, {g} GPUs" for s, t in pairs for g in (8, 64, 1024)))
    where = [(pair, gpus) for pair in pairs for gpus in (8, 64, 1024)]

    def line(tensor: int, rows: str) -> tuple[str, ...]:
        return f"TP {tensor}" + f", rows by {rows}" * (tensor > 1), *(cell(tensor, rows, *at) for at in where)

    return table(header, [line(*of) for of in lines])


def scaling_heads(number: Numbers) -> str:
    """The modelled cost of both ways to use a head that FSDP has sharded."""

    def line(entry: dict[str, Any]) -> tuple[str, ...]:
        what = {"tokens": entry["tokens"], "ranks": entry["ranks"]}
        sent = [number.of("scaling.json", way, ".2f", 1e9, **what) for way in ("gathered", "in turns")]
        times = [number.of("scaling.json", f"{way}, wire", ".1f", **what) for way in ("gathered", "in turns")]
        products = number.of("scaling.json", "products", ".1f", **what)
        return str(what["ranks"]), str(what["tokens"]), *sent, *times, products, entry["taken"]

    header = ("R", "N of each rank", "gathered, GB sent", "in turns, GB", "gathered, ms on the wire", "in turns, ms",
              "products, ms", "`takes_turns`")  # fmt: skip
    said = "8B from 70B, both heads sharded, V = 128256, bfloat16; **modelled**:\n\n"
    return said + table(header, [line(r) for r in number.file("scaling.json")["heads"]])


def examined(number: Numbers, document: str) -> tuple[str, list[str]]:
    """The document with its measured texts written again, and a list of complaints about the rest."""
    text = (ROOT / document).read_text(encoding="utf-8")
    new = BLOCK.sub(lambda m: f"<!-- measured: {m[1]} -->\n{globals()[m[1]](number)}<!-- end -->", text)
    rest = re.sub(r"```.*?```", "", BLOCK.sub("", text), flags=re.DOTALL)
    loose = [
        f"{document}: {found.group()!r} is of no file and no test: {paragraph.strip()[:60]!r}"
        for paragraph in re.split(r"\n\n|\n(?=[-|])", rest)
        if "tests/" not in paragraph
        for found in WITH_UNIT.finditer(re.sub(r"`[^`]*`", "", paragraph))
    ]
    return new, loose + [f"{document} is not what its result files say"] * (new != text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after printing what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the documents' texts again")
    parser.add_argument("--check", action="store_true", help="fail where a number differs, or has no source")
    args = parser.parse_args(arguments)
    number, wrong = Numbers(), []
    for document in DOCUMENTS:
        text, complaints = examined(number, document)
        if args.write:
            (ROOT / document).write_text(text, encoding="utf-8")
            complaints = [c for c in complaints if "is not what" not in c]
        wrong += complaints
    for text, file, key in number.read:
        print(f"{text:>10s}  {file}: {key}")
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return int(bool(wrong) and (args.write or args.check))


if __name__ == "__main__":
    sys.exit(main())
