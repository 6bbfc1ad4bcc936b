"""All GPU tests and benchmarks in one command: what matters most first, each step a process of its own under a limit.

benchmarks/gpu_check.sh [--first] [--dry] [--minutes 9] [RESULTS]      --help says what they are
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fdistill_kernels.options import amount
from fdistill_kernels.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "benchmarks" / "results"
LIBRARY = ROOT / "fdistill_kernels" / "libfdistill_cuda.so"
ACCESSES = """
import os, torch, fdistill_kernels as fk
from fdistill_kernels.backends import BACKENDS
dry = os.environ.get("FDISTILL_DRY") == "1"
device = "cpu" if dry else "cuda"
for v in (301,) if dry else (3001, 20000):  # rows that start anywhere within 16 bytes; a cluster of two
    student, teacher = (torch.randn(3 if dry else 270, v, device=device).bfloat16() for _ in range(2))
    student[::3], student[::3, 5], teacher[::3, 5] = 0, 0.5, 9  # whose slopes 16 bits do not hold: read again
    labels = torch.randint(v, student.shape[:1], device=device)
    for backend in ("triton", "cuda"):
        if BACKENDS[backend].why_not(student.device, student.dtype, None) is None:
            for inplace in (False, True):
                more = dict(labels=labels, ce_weight=0.1, backend=backend, inplace=inplace)
                fk.f_divergence(student.clone().requires_grad_(), teacher, "js", **more).backward()
if not dry:
    torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Step:
    """A command and the most seconds it may take; `first`: also of the short form."""

    name: str
    command: list[str]
    seconds: float
    first: bool = True


def steps(out: Path, dry: bool, first: bool) -> list[Step]:
    """In the order of what would be missed most: the build, our numbers, our tests, the peers', the sanitizer."""
    python = [sys.executable, "-m"]
    flags = [*(["--dry"] if dry else []), *(["--first"] if first else [])]
    built = out / "built.so" if dry else LIBRARY

    def rows(who: str) -> list[str]:
        return [*python, "benchmarks.gpu_rows", "--who", who, "--out", str(out / f"rows_{who}.json"), *flags]

    def linear(who: str) -> list[str]:
        return [*python, "benchmarks.gpu_linear", "--who", who, "--out", str(out / f"linear_{who}.json"), *flags]

    def peers() -> list[str]:
        size = ["cuda", "--dtype", "bfloat16", "--shape", "8192,128256", "--seconds", "0.3"]
        small = ["cpu", "--shape", "5,130", "--seconds", "0.02", "--divergence", "labels"]
        device = small if dry else size
        return [*python, "benchmarks.peers", "--out", str(out / "peers_cuda.json"), "--device", *device]

    def tests(backend: str) -> list[str]:
        spread = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        chosen = f"{backend} or card" if backend == "triton" else backend
        chosen = f"({chosen}) and (js or kl or not agrees)" if first else chosen
        chosen = f"({chosen}) and cross_entropy" if dry else chosen
        options = ["-v", "-rs", "-p", "no:cacheprovider", "--maxfail", "20"]
        return [*python, "pytest", "tests/gpu", *options, *spread, "-k", chosen]

    def sanitizer(tool: str) -> list[str]:
        found = shutil.which("compute-sanitizer")
        checked = [found, "--tool", tool, "--error-exitcode", "9"] if found and not dry else []
        return [*checked, sys.executable, "-c", ACCESSES]

    return [
        Step("build", ["bash", "csrc/cuda/build.sh", str(built)], 120),
        Step("rows triton", rows("triton"), 90),
        Step("rows cuda", rows("cuda"), 90),
        Step("linear ours", linear("ours"), 90),
        Step("tests cuda", tests("cuda"), 120),
        Step("tests triton", tests("triton"), 180),
        Step("rows peers", rows("peers"), 90),
        Step("linear peers", linear("peers"), 90),
        Step("peers", peers(), 120, first=False),
        Step("rows teams", rows("teams"), 120, first=False),
        Step("memcheck", sanitizer("memcheck"), 90, first=False),
        Step("racecheck", sanitizer("racecheck"), 90, first=False),
    ]


def run(step: Step, seconds: float, log: Path) -> int | str:
    """The exit status, or what became of it. Its whole process group ends with it, whatever it waits for."""
    environment = {**os.environ, "FDISTILL_STEP": step.name, "PYTHONUNBUFFERED": "1"}
    with log.open("a") as output:
        print(f"\n== {step.name}: {' '.join(step.command)[:300]}", file=output, flush=True)
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return str(error)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(chosen: list[Step], out: Path, deadline: float, say: Callable[[str], None] = print) -> bool:
    """Every step in what time is left, the outcome of each saved when it ends; whether all passed."""
    outcomes: dict[str, dict[str, object]] = {}
    command = " ".join(["benchmarks/gpu_check.sh", *sys.argv[1:]])
    ran = provenance(command, "cuda" if torch.cuda.is_available() else "cpu")  # a card that a step breaks says no more
    for step in chosen:
        begin = time.monotonic()
        left = deadline - begin
        status = run(step, min(step.seconds, left), out / "check.log") if left > 5 else "no time left"
        outcomes[step.name] = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
        (out / "check.json").write_text(json.dumps({**ran, "steps": outcomes}, indent=1))
        say(
            f"gpu_check: {step.name:13s} {'passed' if status == 0 else f'FAILED ({status})'}"
            f" after {outcomes[step.name]['seconds']} s"
        )
    return all(o["status"] == 0 for o in outcomes.values())


def main() -> None:
    """Runs them, and fails if one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=DEFAULT,
        metavar="RESULTS",
        help="folder for result files, check.log, check.json (default: benchmarks/results)",
    )
    parser.add_argument("--first", action="store_true", help="what matters most on a GPU never seen, in eight minutes")
    parser.add_argument("--dry", action="store_true", help="toy shapes on a CPU, to know that all this works")
    parser.add_argument("--minutes", type=amount, help="for everything (default: 9, with --first 8)")
    parser.add_argument("--only", nargs="+", help="steps to run, by name", metavar="STEP")
    args = parser.parse_args()
    args.out = Path(os.environ.get("FDISTILL_FROM", "."), args.out).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_check: told to end"))  # and the step under way with it
    known = [s.name for s in steps(args.out, args.dry, args.first) if s.first or not args.first]
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"--only: no step {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    if not (args.dry or torch.cuda.is_available()):  # tests without a card are skipped, which is no failure
        parser.error("torch finds no GPU here; --dry takes toy shapes on a CPU")
    minutes = args.minutes if args.minutes is not None else 8 if args.first else 9
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(TRITON_CACHE_DIR=f"{scratch}/triton", TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor")
        if args.dry:
            os.environ.update(FDISTILL_DRY="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
            args.out = Path(scratch, "results") if args.out == DEFAULT else args.out
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "check.log").unlink(missing_ok=True)
        chosen = [s for s in steps(args.out, args.dry, args.first) if s.name in (args.only or known)]
        passed = run_all(chosen, args.out, deadline)
        print(*(args.out / "check.log").read_text().splitlines()[-60:], sep="\n")
    print("gpu_check: all passed" if passed else "gpu_check: FAILURES above")
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
