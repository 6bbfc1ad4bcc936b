"""The commands `fdistill train`, `sample-teacher` and `evaluate`: from two models and data to a student and a report.

A run is a folder with config.yaml (the options), data.json (hashes of the data), teacher_samples/, predistilled/ (the
student that training starts from), trainer-*/ (checkpoints), metrics.jsonl, student/, curves.png, report.html,
sentences.parquet (outputs and measures of each held-out row) and results.json. A stage whose result exists is not
repeated. So the same command continues a run that was killed, and with more steps also a finished one. Under torchrun
or accelerate launch, the ranks share the sampling and the training, and the first rank writes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..provenance import as_json
from ..teachers.files import write_whole
from .arguments import ask
from .asked_models import student_for, to_make
from .generation import check_search
from .loading import read_json
from .options import Asked
from .ranks import is_of_ranks, rank, telling
from .report import name_of, plot, write_report
from .run_folder import begin, kept_to_oneself, stage_of
from .stages import Run
from .teachers import Stored

#: What the hub's client raises; lost connections are no OSError in all of its versions.
OF_HUB = HfHubHTTPError.__bases__[0]


def train(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill train`. Returns the content of results.json; on other ranks than the first, an empty dict."""
    run = Run(asked, console)
    student = student_for(asked, run.model)
    check_search(student)  # whose outputs are measured
    stored, making = isinstance(run.teacher, Stored), to_make(asked)  # asked before the first rank makes it
    rows = run.samples() if stored else run.pairs
    trainer = run.trainer(student, rows, stage_of(run.config))  # refuses, before any work
    with kept_to_oneself(run.folder):
        with trainer.args.main_process_first(local=False):
            begin(asked, {"data": run.pairs, "eval_data": run.held_out}, console)
        return _trained(run, trainer, student, making)


def _trained(run: Run, trainer: Any, student: Any, making: bool) -> dict[str, Any]:
    """What is left of a run: to make the student, train it, measure it, and report."""
    asked, stored = run.asked, isinstance(run.teacher, Stored)
    results_file, folder, stage = run.folder / "results.json", run.folder / "student", stage_of(run.config)
    if results_file.exists():
        return read_json(results_file, "remove it, and the same command measures anew")
    started = time.perf_counter()
    if not folder.exists():
        if trainer.server is not None:
            trainer.server.check()  # before the teacher draws
        if making:
            run.make(student)
            trainer = run.trainer(student_for(asked, run.model), trainer.train_dataset, stage)
        trainer.train_dataset = trainer.train_dataset if stored else run.samples()
        run.fit(trainer, folder)
    if rank()[0]:
        return {}
    unset_hf_deepspeed_config()  # the first rank alone reads the student, whole
    student = run.loaded(folder)
    results = {"method": name_of(run.config), "parameters": student.num_parameters()}
    if run.model is not None:
        results["teacher_parameters"] = run.model.num_parameters()
    results |= run.measure(student)
    results["seconds"] = time.perf_counter() - started
    plot(run.folder, run.config)
    write_report(run.folder, asked, results)
    write_whole(results_file, (as_json(results, 1) + "\n").encode())
    return results


def sample_teacher(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill sample-teacher`: draws and stores the samples that `train` would draw first."""
    run = Run(asked, console)
    return {"prompts": len(run.samples()), "folder": str(run.asked.run.samples or run.folder)}


def evaluate_student(asked: Asked, console: Console) -> dict[str, Any]:
    """Runs `fdistill evaluate` on all rows; with --output_dir the table of sentences is kept there."""
    if not asked.model.student:
        raise ValueError("--student is needed")
    run = Run(asked, console)
    return run.measure(run.loaded(asked.model.student), 5, "output_dir" in asked.given)


def _disk_is_full(error: BaseException | None, folder: Any) -> bool:
    """Whether an error was caused by a full disk, which torch.save and safetensors do not report as an OSError."""
    if folder and Path(folder).exists() and shutil.disk_usage(folder).free < 1 << 16:
        return True
    while error is not None and "No space left" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is a Ctrl-C inside: what is kept at one is kept at the other."""
    alone = threading.current_thread() is not threading.main_thread()  # where signals cannot be asked for
    before = None if alone else signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if not alone:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


WORK = {"train": train, "sample-teacher": sample_teacher, "evaluate": evaluate_student}


def main(command: str, argv: Sequence[str], work: Callable[[Asked, Console], dict[str, Any]] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 after one line on bad input, or 130 after Ctrl-C."""
    console, asked = Console(stderr=True, quiet=rank()[0] > 0, markup=False), None
    try:
        asked = ask(command, argv)
        with contextlib.redirect_stdout(sys.stderr), _interruptible(), telling():  # the trainer prints its logs
            results = (work or WORK[command])(asked, console)
    except KeyboardInterrupt:
        kept = "" if command == "evaluate" else "; the same command goes on from here"
        print(f"\nstopped{kept}", file=sys.stderr)
        return 130
    except Exception as error:
        if _disk_is_full(error, asked and asked.training["output_dir"]):
            told = f"no space left on the disk ({str(error).splitlines()[0]}); with more the same command goes on"
        elif isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, yaml.YAMLError)):
            told = " ".join(str(error).split())
        elif rank()[1] > 1 and is_of_ranks(error):
            told = f"rank {rank()[0]} of {rank()[1]} lost another: it died, or did not come in --ddp_timeout ({error})"
        elif isinstance(error, OF_HUB):
            told = f"the hub cannot be reached ({error})"
        else:
            raise
        print(f"fdistill: {told}", file=sys.stderr)
        return 2
    if rank()[0]:
        return 0
    print(as_json(results, 1) if asked.json else "\n".join(
        f"{k:20s} {v:.4f}" if isinstance(v, float) else f"{k:20s} {v}" for k, v in results.items()))  # fmt: skip
    return 0
