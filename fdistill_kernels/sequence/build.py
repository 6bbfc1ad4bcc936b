"""`fdistill teacher build`, `inspect` and `verify`: what a teacher says, stored for later students.

A store's folder contains the `TeacherStore`, the teacher's tokenizer and configuration, and its samples, so that
`fdistill train --teacher FOLDER` needs nothing else of the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..lists import top_k_of
from ..sparse import TopK
from ..teachers import TeacherStore
from ..teachers.store import HEAD
from ..values import Hidden
from .hashes import fingerprint, tokenizer_hash
from .loading import DTYPE, load_config, load_model
from .losses import TeacherRows
from .options import Asked
from .ranks import device, rank, wait
from .stages import Run
from .teachers import InRoom
from .teachers.base import logits_function, logits_in_pieces
from .teachers.given import is_store, is_url

Pair = tuple[list[int], list[int]]
#: Seconds after which what was asked is on disk.
KEEP_EVERY = 30.0


def build(asked: Asked, console: Console) -> dict[str, Any]:
    """Asks the teacher about every sequence that the store lacks, also after a kill. Returns the store's summary."""
    sources = _checked(asked)
    run = Run(asked, console)
    teacher = run.teacher
    assert isinstance(teacher, InRoom)
    store = _created(run, teacher)
    store.verify()  # what is damaged counts as missing, and is asked for again
    pairs = _pairs(run, sources)
    with Progress(console=console) as bar:
        task = bar.add_task("the teacher's word", total=len(pairs))
        for done in fill(store, teacher, pairs, run.config.per_device_eval_batch_size, *rank()):
            bar.update(task, advance=done)

    def lacking() -> list[int]:
        store.refresh()
        return store.missing(pairs)

    wait(lacking)  # other ranks ask
    return {"folder": str(store.folder), **_shown(TeacherStore(store.folder))}


def fill(
    store: TeacherStore, teacher: InRoom, pairs: Sequence[Pair], batch: int = 8, rank: int = 0, ranks: int = 1
) -> Iterator[int]:
    """Asks a model about the (prompt ids, continuation ids) that a store lacks.

    Yields how many are there already, then how many are added, batch by batch. With several ranks, each asks about its
    share. If the process is killed, at most a minute of work is lost.
    """
    missing = store.missing(pairs)
    lacking = [i for i in missing if i % ranks == rank]  # by its place: what is missing, each rank sees at another time
    yield len(pairs) - len(missing)
    with store.writer() as writer:
        kept = time.monotonic()
        for begin in range(0, len(lacking), batch):
            some = [pairs[i] for i in lacking[begin : begin + batch]]
            for pair, targets in zip(some, _targets(teacher, some, store), strict=True):
                writer.add(*pair, targets)
            if time.monotonic() - kept > KEEP_EVERY:
                writer.flush()
                kept = time.monotonic()
            yield len(some)


def _checked(asked: Asked) -> list[str]:
    """The sources of its sequences; ValueError for settings that do not go together, or a folder of something else."""
    kind, teacher, out = asked.build.kind, str(asked.model.teacher), Path(str(asked.training["output_dir"]))
    sources = [s.strip() for s in asked.build.sequences.split(",")]
    if not set(sources) <= {"gold", "teacher", "beam"}:
        raise ValueError(f"--sequences must be of gold, teacher and beam, not {asked.build.sequences!r}")
    beside = {"hidden": {"k", "log_probs"}, "top_k": {"states", "head_rank"}}[kind] & asked.given.keys()
    if beside:
        raise ValueError(f"--{', --'.join(sorted(beside))}: not of --kind {kind}")
    if is_url(teacher) or is_store(teacher):
        raise ValueError("a store is built from a model, by its folder or hub name; what a server says is kept by "
                         "`fdistill train --teacher URL --samples FOLDER`")  # fmt: skip
    begun = [path for path in out.glob("*") if path.name != "shards" and path.suffix != ".partial"]
    if begun and not (out / "manifest.json").exists():  # beside what one killed, or another rank, has before a manifest
        raise ValueError(f"{out} is not empty and no store: give another --output_dir")
    return sources


def _created(run: Run, teacher: InRoom) -> TeacherStore:
    """The store, with the tokenizer and the configurations beside it."""
    asked, job = run.asked, run.asked.build
    key = {"teacher": run.teacher_fingerprint, "tokenizer": tokenizer_hash(run.tokenizer)}
    told = {**vars(asked.data), **vars(job), "max_new_tokens": run.config.max_new_tokens}
    extra = {"encoder_decoder": teacher.encoder_decoder, "end_tokens": teacher.ends(), "job": told}
    made: dict[str, Any] = {"kind": job.kind, "vocabulary": teacher.vocabulary, "key": key, "extra": extra}
    if job.kind == "hidden":
        made |= {"states": job.states, "rank": job.head_rank, "head": _head(teacher, run)}
    else:
        made |= {"k": min(asked.run.k, teacher.vocabulary), "log_probs": job.log_probs}
    store = TeacherStore.create(run.folder, **made)
    run.tokenizer.save_pretrained(store.folder / "tokenizer")
    teacher.model.config.save_pretrained(store.folder)
    return store


def _head(teacher: InRoom, run: Run) -> Any:
    """The teacher's head, as its forward uses it."""
    prompt, target = run.held_out[0][run.teacher_prompts()], run.held_out[0]["labels"]
    rows = teacher.rows([torch.tensor(prompt)], [torch.tensor(target)], teacher.device)
    if not isinstance(rows.value, Hidden):
        raise ValueError("the teacher's head is no floating matrix (LoRA's sum, quantised): store its top_k")
    return rows.value.head


def _pairs(run: Run, sources: list[str]) -> list[Pair]:
    """Every sequence that is wanted, once: the teacher's prompt and the continuation."""
    column, found = run.teacher_prompts(), []
    for rows in (run.held_out, run.pairs) if "gold" in sources else (run.held_out,):
        found += list(zip(rows[column][:], rows["labels"][:], strict=True))
    for source in ("teacher", "beam"):
        if source in sources:
            found += list(zip(run.pairs[column][:], run.drawn(source == "beam").load(), strict=True))
    once = {(tuple(p), tuple(c)): (p, c) for p, c in found if len(c)}
    return list(once.values())


def _targets(teacher: InRoom, pairs: list[Pair], store: TeacherStore) -> Iterator[TopK | Tensor]:
    """What the store keeps of each of a few sequences."""
    prompts, continuations = ([torch.tensor(x) for x in side] for side in zip(*pairs, strict=True))
    rows = teacher.rows(prompts, continuations, teacher.device)
    begin = 0
    for length in map(len, continuations):
        end = begin + length
        if store.kind == "hidden":
            assert isinstance(rows.value, Hidden)
            yield rows.value.states[begin:end].cpu()
        else:
            found = [top_k_of(z, store.settings["k"]) for *_, z in logits_in_pieces(rows, teacher.device, begin, end)]
            yield TopK(torch.cat([f.ids.cpu() for f in found]), torch.cat([f.log_probs.cpu() for f in found]))
        begin = end


def _shown(store: TeacherStore) -> dict[str, Any]:
    """A store's summary, its settings and its key, for people."""
    settings = {n: v for n, v in store.settings.items() if v is not None and n not in ("kind", "format")}
    return {**store.summary(), **settings, "key": store.key}


def inspect(folder: str, plot: str | None = None) -> dict[str, Any]:
    """Sizes, bytes per token, settings, and for lists the mass of their first ids; with a plot if asked for."""
    store = TeacherStore(folder)
    found = _shown(store)
    if plot is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        if store.kind == "top_k":
            axes.plot(list(found["mass"]), [1 - m for m in found["mass"].values()], marker="o")
            axes.set(xscale="log", yscale="log", xlabel="ids of each token", ylabel="teacher's mass that is not there")
        else:
            lengths = [len(c) for _, c in store.sequences()]
            axes.hist(lengths, bins=min(40, max(lengths, default=1)))
            axes.set(xlabel="tokens of a sequence", ylabel="sequences")
        figure.savefig(plot)
    return found


def verify(
    folder: str, teacher: str | None = None, sequences: int = 16, seed: int = 0, repair: bool = False
) -> dict[str, Any]:
    """Verifies all checksums; given the model's folder or hub name, also computes a sample of sequences again.

    repair: move the damaged shards aside; `build` then asks for their sequences again.

    Returns:
        damaged: what the checksums say; set_aside: the shards that `repair` has moved. With the model, and where there
            are sequences and the head is whole, also the numbers of sequences and tokens compared, and the distance of
            the store's distributions from the model's: kl and tvd per token (kl in nats), mean and largest.

    Raises:
        ValueError: the store was built from another model, by its fingerprint.
    """
    store = TeacherStore(folder)
    store.verify()
    found: dict[str, Any] = {"set_aside": store.set_aside()} if repair else {}
    found |= {"damaged": store.damaged, "sequences": len(store)}
    if teacher is None or not len(store) or HEAD in store.damaged:
        return found
    options: dict[str, Any] = {}
    if (store.folder / "config.json").exists():
        options = {DTYPE: getattr(load_config(folder), DTYPE) or "auto"}  # which build may have been told
    model = InRoom(load_model(teacher, **options))
    model.to(device())
    known = store.key.get("fingerprint", store.key.get("teacher"))  # of a server's the teacher is its name
    if (mark := fingerprint(model.model)) != known:
        raise ValueError(f"{teacher} has the fingerprint {mark}, and {folder} is of {known}: of another model, or "
                         "of this one quantised or configured otherwise")  # fmt: skip
    chosen = set(torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))[:sequences].tolist())
    apart = torch.cat([_apart(store, model, *pair) for i, pair in enumerate(store.sequences()) if i in chosen])
    kl, tvd = apart.T
    return found | {"compared": len(chosen), "tokens": len(apart), "kl_mean": float(kl.mean()),
                    "kl_largest": float(kl.max()), "tvd_mean": float(tvd.mean()),
                    "tvd_largest": float(tvd.max())}  # fmt: skip


def _apart(store: TeacherStore, model: InRoom, prompt: Tensor, continuation: Tensor) -> Tensor:
    """(L, 2): KL(model ‖ store) and total variation at each token; of lists, of their categories."""
    from ..functional import f_divergence

    cpu = torch.device("cpu")
    kept = store.targets([prompt.tolist()], [continuation.tolist()])
    apart = []
    rows = model.rows([prompt], [continuation], model.device)
    for begin, end, now in logits_in_pieces(rows, cpu, 0, len(continuation)):
        if isinstance(kept, TopK):  # the list is the teacher, and the model the student: symmetric where both are near
            both: tuple[Any, Any] = now, kept._replace(ids=kept.ids[begin:end], log_probs=kept.log_probs[begin:end])
        else:
            both = logits_function(TeacherRows(kept, store.vocabulary), cpu)(begin, end).float(), now
        apart.append(torch.stack([f_divergence(*both, n, reduction="none") for n in ("kl", "tvd")], 1))
    return torch.cat(apart)
