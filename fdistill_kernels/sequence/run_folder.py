"""A run's folder: what it was begun with, and what is written into it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import TrainerCallback

from ..provenance import as_json
from ..teachers.files import write_whole
from ..teachers.locks import owned
from .arguments import load_yaml
from .checkpoints import PLACE, check_place, place_in_data
from .hashes import data_hash
from .loading import read_json
from .options import LENGTHS, Asked, how_long, without_secrets
from .ranks import rank
from .report import logged
from .teachers.given import is_store
from .trainer import FDistillConfig


@contextlib.contextmanager
def kept_to_oneself(folder: Path) -> Iterator[None]:
    """Locks a run's folder, for the first rank, or raises ValueError; the system unlocks it when the process dies. Two
    that train in one write each other's checkpoints and log.
    """
    if is_store(folder):
        raise ValueError(f"{folder} is a store: give a run another --output_dir")
    if rank()[0]:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if not owned(file.fileno()):
            raise ValueError(f"{folder} is another process's, which trains there now: wait for it, or give another "
                             "--output_dir")  # fmt: skip
        yield


def begin(asked: Asked, data: dict[str, Any], console: Console) -> None:
    """Makes a run's folder, or raises ValueError where it is of another run or other data; called when everything else
    has been checked. data: the run's rows, by the option that names their file.
    """
    folder, given = asked.folder, without_secrets(asked.given)
    path, of_data = folder / "config.yaml", folder / "data.json"
    known = ("prompt_ids", "labels", "labels_mask", "teacher_prompt_ids")
    read = {name: data_hash([ids for column in known if column in rows.column_names for ids in rows[column]])
            for name, rows in data.items()}  # fmt: skip
    made = [*folder.glob("trainer-*/checkpoint-*"), folder / "predistilled", folder / "student"]
    binds = any(map(Path.exists, made))  # a start that came to nothing does not
    if not binds and rank()[0] == 0:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if binds and path.exists():
        grows = _grows(asked, without_secrets(load_yaml(path)), given)
        kept = read_json(of_data, "remove it, and trust that the data is the same") if of_data.exists() else {}
        if changed := [name for name, mark in kept.items() if mark != read[name]]:
            files = ", ".join(str(getattr(asked.data, name) or asked.data.data) for name in changed)
            raise ValueError(f"{files} is not the data that {folder} was begun with")
        if grows:
            (folder / "results.json").unlink(missing_ok=True)
            shutil.rmtree(folder / "student")
        console.print(f"going on with {folder}")
    if rank()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(of_data, json.dumps(read).encode())
        write_whole(path, yaml.safe_dump(given, sort_keys=False).encode())


def _grows(asked: Asked, known: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a finished student is to be trained on, for more steps or epochs; ValueError where the run cannot go on,
    or has other settings, but for what makes up the rows of an update, which other ranks may share otherwise.
    """
    folder, before, now = asked.folder, *({**asked.defaults, **s} for s in (known, given))
    (of, was), (unit, wanted) = map(how_long, (known, given))
    last, finished = last_checkpoint(folder / f"trainer-{stage_of(asked.config)}"), (folder / "student").exists()
    if unit != of:  # it must go beyond where the run is
        state = json.loads(Path(last, "trainer_state.json").read_text()) if last else {}
        was = state.get(LENGTHS[unit], 0)
    goes_on = wanted > was or not finished
    elsewhere = {"output_dir", "student_server", "student_server_path", *LENGTHS}
    if last and goes_on and Path(last, PLACE).exists():
        elsewhere |= {"per_device_train_batch_size", "gradient_accumulation_steps", "ignore_data_skip"}
    differ = [(n, before.get(n), now.get(n)) for n in sorted({*known, *given} - elsewhere)
              if before.get(n) != now.get(n)]  # fmt: skip
    if wanted < was:
        differ.append((unit, was, wanted))
    if differ:
        told = "; ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in differ)
        raise ValueError(f"{folder} holds another run: {told}")
    if last and asked.config.save_only_model and goes_on:
        raise ValueError(f"{last} has no optimizer, as --save_only_model says: the run cannot go on from it")
    if last and goes_on:
        check_place(last, asked.config, place_in_data(asked.config, rank()[1]))
    if finished and goes_on and last is None:
        raise ValueError(f"{unit} cannot grow: {folder} has no checkpoint")
    return finished and goes_on


def stage_of(config: FDistillConfig) -> str:
    """The objective of a configuration, in a form that can be part of a folder's name."""
    return re.sub(r"[^\w.=,]+", "-", str(config.divergence or config.method)).strip("-")


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a folder, or None. Checkpoints that were only partly written are removed."""
    numbered = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    found = sorted((p for p, number in numbered.items() if number.isdecimal()), key=lambda path: int(numbered[path]))
    for path in found[::-1]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            json.loads((path / "trainer_state.json").read_text())  # what the trainer writes last
            return str(path)
        if rank()[0] == 0:
            shutil.rmtree(path, ignore_errors=True)
    return None


class Log(TrainerCallback):
    """Writes every log line to a file, as JSON, which has null for what is not finite.

    When a stage continues from a checkpoint, the lines that were logged after it are removed first.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            kept = [line for line in logged(self.path) if line["stage"] != self.stage]
            kept += [{"stage": self.stage, **line} for line in state.log_history]
            write_whole(self.path, "".join(as_json(line) + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(as_json({"stage": self.stage, **(logs or {}), "step": state.global_step}) + "\n")


def save_whole(model: Any, folder: Path, tokenizer: Any, weights: Any = None) -> None:
    """Saves a model and its tokenizer. The folder appears only when it is complete."""
    partial, first = folder.with_name(folder.name + ".partial"), rank()[0] == 0
    try:
        model.save_pretrained(partial, state_dict=weights, is_main_process=first)
        if first:
            tokenizer.save_pretrained(partial)
            partial.replace(folder)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
