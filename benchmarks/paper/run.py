"""The paper's experiment on English–Romanian, made again: several seeds, every arm, every sentence kept.

    python -m benchmarks.paper.run --data FOLDER --out FOLDER [--size cpu|card|smoke] [--seeds N] [--processes N]
    python -m benchmarks.paper.run --data FOLDER --out FOLDER --watch       looks on at one that is running

FOLDER of the data has gettext_en_ro.{train,dev,test}.tsv.gz, English and Romanian sentences a line. Workers of one
thread each take one stage after the other (`stages.py`), all of the first seed's first; the teacher, which all others
wait for, has a thread of every worker. Whatever is killed goes on with the same command. At the end, and at any time by
`python -m benchmarks.paper.analysis --out FOLDER`, results.json, report.md and results.png are made of the seeds that
are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import HfArgumentParser

from benchmarks.paper import analysis
from benchmarks.paper.stages import SIZES, Experiment, progress
from fdistill_kernels.provenance import provenance
from fdistill_kernels.teachers.files import write_whole


@dataclass
class Arguments:
    """What the command takes."""

    data: str = field(metadata={"help": "folder of gettext_en_ro.{train,dev,test}.tsv.gz"})
    out: str = field(metadata={"help": "the run's folder"})
    size: str = field(default="cpu", metadata={"help": "of models and data; default: cpu", "choices": list(SIZES)})
    seeds: int | None = field(default=None, metadata={"help": "students of every arm; default: the size's"})
    processes: int = field(default=2, metadata={"help": "workers of one thread each; default: 2"})
    watch: bool = field(default=False, metadata={"help": "only look on at a run that is under way"})

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")

    def experiment(self) -> Experiment:
        return Experiment(Path(self.data), Path(self.out), self.size, self.seeds)


@contextlib.contextmanager
def claimed(experiment: Experiment, name: str) -> Iterator[bool]:
    """Whether a stage is this process' until it is through with it; the system takes a dead process' claims back."""
    path = progress(experiment.out, name).with_suffix(".lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not experiment.done(name)


def work(arguments: Arguments, parent: int | None = None) -> None:
    """Makes stages until none is missing: each time the first that nobody is at and whose needs are there."""
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.freeze()  # trainers collect garbage, which would go through all that was imported
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    experiment = arguments.experiment()
    stages = experiment.stages()
    while missing := [stage for stage in stages if not experiment.done(stage.name)]:
        for stage in (s for s in missing if all(map(experiment.done, s.needs))):
            with claimed(experiment, stage.name) as ours:
                if ours:
                    started = time.perf_counter()
                    # two threads wait for each other wherever others are at work
                    torch.set_num_threads(arguments.processes if stage.alone else 1)
                    experiment.make(stage)
                    with (experiment.out / "log.txt").open("a") as log:
                        log.write(f"{time.strftime('%F %T')} {stage.name}: {time.perf_counter() - started:.0f} s\n")
                    break
        else:
            time.sleep(1)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed ends too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def start(arguments: Arguments) -> None:
    """Makes the folder, or checks that it is a run of the same data, sizes and commit.

    Raises:
        ValueError: it is another's.
    """
    path = Path(arguments.out) / "run.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = f"python -m benchmarks.paper.run --data FOLDER --out FOLDER --size {arguments.size}"
    key = arguments.experiment().key()
    dtype = "bfloat16 autocast of float32" if key["sizes"]["bf16"] else "float32"
    asked = {**key, **provenance(command, device, dtype), "processes": arguments.processes}
    if path.exists():
        known = json.loads(path.read_text())
        differ = [f"{name} was {known.get(name)!r} and is {asked[name]!r}"
                  for name in ("size", "sizes", "data", "commit") if known.get(name) != asked[name]]  # fmt: skip
        if differ:
            raise ValueError(f"{path.parent} holds another run: {'; '.join(differ)}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(asked, indent=1) + "\n").encode())


def watch(arguments: Arguments, workers: list[Any]) -> None:
    """Shows how far the stages are, in estimated minutes of a core, until all are made or a worker has failed."""
    experiment, console = arguments.experiment(), Console(stderr=True)
    stages = experiment.stages()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=3600, refresh_per_second=1) as bars:
        known = {stage.name for stage in stages if experiment.done(stage.name)}
        total = bars.add_task("all stages", total=sum(s.cost for s in stages),
                              completed=sum(s.cost for s in stages if s.name in known))  # fmt: skip
        shown: dict[str, Any] = {}
        while True:
            shares = {s.name: 1.0 if experiment.done(s.name) else _share(experiment, s.name) for s in stages}
            for name, share in shares.items():
                if 0 < share < 1:
                    shown.setdefault(name, bars.add_task(name, total=1.0) if name not in shown else None)
                    bars.update(shown[name], completed=share)
                elif share == 1 and name not in known:
                    known.add(name)
                    if name in shown:
                        bars.remove_task(shown.pop(name))
                    if not console.is_terminal:
                        console.print(f"{time.strftime('%F %T')} {name}; {len(known)} of {len(stages)} stages")
            bars.update(total, completed=sum(s.cost * shares[s.name] for s in stages))
            if len(known) == len(stages) or any(w.exitcode for w in workers):
                return
            time.sleep(1)


def _share(experiment: Experiment, name: str) -> float:
    with contextlib.suppress(OSError, ValueError):
        return float(progress(experiment.out, name).read_text())
    return 0.0


def main() -> int:
    """0; 1 where a stage failed, 2 for a folder of another run."""
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    if arguments.watch:
        if not Path(arguments.out, "run.json").is_file():
            parser.error(f"--watch: {arguments.out} holds no run")
        watch(arguments, [])
        return 0
    try:
        start(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.processes == 1:
        work(arguments)
    else:
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=work, args=(arguments, os.getpid()), daemon=True)
                   for _ in range(arguments.processes)]  # fmt: skip
        for worker in workers:
            worker.start()
        watch(arguments, workers)
        if any(worker.exitcode for worker in workers):
            print("a stage failed; the same command goes on from there", file=sys.stderr)
            return 1
    print(analysis.analyse(Path(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
