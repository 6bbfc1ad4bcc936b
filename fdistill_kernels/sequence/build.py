"""`fdistill teacher build`, `inspect`, `verify` and `serve`: what a teacher says, stored for students to come.

A store's folder holds the `TeacherStore` itself, the teacher's tokenizer and configuration, and its samples, so that
`fdistill train --teacher FOLDER` needs nothing else of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer

from ..lists import top_k_of
from ..sparse import TopK
from ..teachers import TeacherStore
from ..values import Hidden
from . import run as runs
from .models import TeacherRows, load_model
from .run import Job, Run, tokenizer_hash
from .sampling import Sampling, draw, fingerprint
from .teachers import InRoom, logits_function

Pair = tuple[list[int], list[int]]


@dataclass
class BuildJob(Job):
    """What a store is made of; `Job`'s fields say which sequences, and how the teacher's are drawn."""

    out: str = "fdistill-teacher"
    kind: str = "hidden"
    sequences: str = "gold,teacher"
    states: str = "bfloat16"
    head_rank: int | None = None
    log_probs: str = "float16"


HELP = {
    **runs.HELP,
    "kind": "hidden: states after the final norm, any divergence and temperature; top_k: the largest log-probabilities",
    "sequences": "gold, teacher and beam, those that the objectives to come are on; held-out pairs are always gold",
    "states": "float32, float16, bfloat16 or int8", "log_probs": "float16 or uint8",
    "head_rank": "keep states in so many of the head's singular directions", "out": "the store's folder",
    "teacher": "folder or hub name of the teacher",
}  # fmt: skip

#: What it uses of `Job`.
USED = ("teacher", "data", "eval_data", "eval_pairs", "limit", "out", "k", "batch", "max_new_tokens",
        "sample_temperature", "top_k", "top_p", "beams", "prompt_column", "target_column", "seed", "kind", "sequences",
        "states", "head_rank", "log_probs")  # fmt: skip


def build(job: BuildJob, console: Console) -> dict[str, Any]:
    """Asks the teacher about every sequence that the store lacks; a killed run goes on. The store's summary."""
    sources = [s.strip() for s in job.sequences.split(",")]
    if not set(sources) <= {"gold", "teacher", "beam"}:
        raise ValueError(f"sequences must be of gold, teacher and beam, not {job.sequences!r}")
    run = Run(job, console)
    teacher = run.teacher
    if not isinstance(teacher, InRoom):
        raise ValueError("a store is built from a model, by its folder or hub name")
    store = _created(job, run, teacher)
    pairs = _pairs(run, sources)
    lacking = store.missing(pairs)
    with Progress(console=console) as bar, store.writer() as writer:
        task = bar.add_task("the teacher's word", total=len(pairs), completed=len(pairs) - len(lacking))
        for begin in range(0, len(lacking), job.batch):
            some = [pairs[i] for i in lacking[begin : begin + job.batch]]
            for pair, targets in zip(some, _targets(teacher, some, job), strict=True):
                writer.add(*pair, targets)
            bar.update(task, advance=len(some))
    return {"folder": str(store.folder), **_shown(TeacherStore(store.folder))}


def _created(job: BuildJob, run: Run, teacher: InRoom) -> TeacherStore:
    """The store, with the tokenizer and the configurations beside it."""
    key = {"teacher": fingerprint(teacher.model), "tokenizer": tokenizer_hash(run.tokenizer)}
    made: dict[str, Any] = dict(kind=job.kind, vocabulary=teacher.vocabulary, key=key,
                                extra={"encoder_decoder": teacher.encoder_decoder, "job": asdict(job)})  # fmt: skip
    if job.kind == "hidden":
        made |= {"states": job.states, "rank": job.head_rank, "head": _head(teacher, run)}
    else:
        made |= {"k": min(job.k, teacher.vocabulary), "log_probs": job.log_probs}
    store = TeacherStore.create(job.out, **made)
    run.tokenizer.save_pretrained(store.folder / "tokenizer")
    teacher.model.config.save_pretrained(store.folder)
    return store


def _head(teacher: InRoom, run: Run) -> Any:
    """The teacher's head, as its forward uses it."""
    prompt, target = run.held_out[0][run.teacher_prompts()], run.held_out[0]["labels"]
    rows = teacher.rows([torch.tensor(prompt)], [torch.tensor(target)], next(teacher.model.parameters()).device)
    if not isinstance(rows.value, Hidden):
        raise ValueError("the teacher's head is no floating matrix (LoRA's sum, quantised): store its top_k")
    return rows.value.head


def _pairs(run: Run, sources: list[str]) -> list[Pair]:
    """Every sequence that is wanted, once: the teacher's prompt and the continuation."""
    column, found = run.teacher_prompts(), []
    for rows, name in ((run.held_out, "labels"), *([(run.pairs, "labels")] if "gold" in sources else [])):
        found += list(zip(rows[column][:], rows[name][:], strict=True))
    for source in ("teacher", "beam"):
        if source in sources:
            found += list(zip(run.pairs[column][:], run.drawn(source == "beam").load(), strict=True))
    once = {(tuple(p), tuple(c)): (p, c) for p, c in found if len(c)}
    return list(once.values())


def _targets(teacher: InRoom, pairs: list[Pair], job: BuildJob) -> Iterator[TopK | Tensor]:
    """What the store keeps of each of a few sequences."""
    prompts, continuations = ([torch.tensor(x) for x in side] for side in zip(*pairs, strict=True))
    device = next(teacher.model.parameters()).device
    rows = teacher.rows(prompts, continuations, device)
    begin = 0
    for length in map(len, continuations):
        end = begin + length
        if job.kind == "hidden":
            assert isinstance(rows.value, Hidden)
            yield rows.value.states[begin:end].cpu()
        else:
            found = top_k_of(logits_function(rows, device)(begin, end)[:, : teacher.vocabulary], job.k)
            yield found._replace(ids=found.ids.cpu(), log_probs=found.log_probs.cpu())
        begin = end


def _shown(store: TeacherStore) -> dict[str, Any]:
    """A store's summary, its settings and its key, for people."""
    settings = {n: v for n, v in store.settings.items() if v is not None and n not in ("kind", "format")}
    return {**store.summary(), **settings, "key": store.key}


def inspect(folder: str, plot: str | None = None) -> dict[str, Any]:
    """Sizes, bytes a token, settings, and of lists the mass that their first ids hold, with a plot if asked for."""
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


def verify(folder: str, teacher: str | None = None, sequences: int = 16, seed: int = 0) -> dict[str, Any]:
    """Every checksum; and with the model, by its folder or hub name, a sample of sequences anew.

    Returns:
        damaged: what the checksums say; with the model sequences and tokens compared, and how far the store's
        distributions are from it: kl and tvd, in nats a token, their mean and largest.

    Raises:
        ValueError: the model is not the one that the store is of, by its fingerprint.
    """
    store = TeacherStore(folder, validate="full")
    found: dict[str, Any] = {"damaged": store.damaged, "sequences": len(store)}
    if teacher is None:
        return found
    model = InRoom(load_model(teacher))
    if (mark := fingerprint(model.model)) != store.key.get("teacher"):
        raise ValueError(f"{teacher} has the fingerprint {mark}, and {folder} is of {store.key.get('teacher')}")
    everything = list(store.sequences())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))[:sequences].tolist()
    apart = torch.cat([_apart(store, model, *everything[i]) for i in order])
    names = ("kl_mean", "kl_largest", "tvd_mean", "tvd_largest")
    numbers = (apart[:, 0].mean(), apart[:, 0].max(), apart[:, 1].mean(), apart[:, 1].max())
    return {**found, "compared": len(order), "tokens": len(apart), **dict(zip(names, map(float, numbers), strict=True))}


def _apart(store: TeacherStore, model: InRoom, prompt: Tensor, continuation: Tensor) -> Tensor:
    """(L, 2): KL(model ‖ store) and total variation at each token; of lists, of their categories."""
    from ..functional import f_divergence

    device = torch.device("cpu")
    kept = store.targets([prompt.tolist()], [continuation.tolist()])
    now = logits_function(model.rows([prompt], [continuation], device), device)(0, len(continuation)).float()
    if isinstance(kept, TopK):  # the list is the teacher, and the model the student: symmetric where both are near
        return torch.stack([f_divergence(now, kept, n, reduction="none") for n in ("kl", "tvd")], 1)
    stored = logits_function(TeacherRows(kept, store.vocabulary), device)(0, len(continuation)).float()
    return torch.stack([f_divergence(stored, now, n, reduction="none") for n in ("kl", "tvd")], 1)


def server(teacher: str, host: str = "127.0.0.1", port: int = 8000, most: int = 4096) -> ThreadingHTTPServer:
    """A model as an `Endpoint` asks one: /v1/completions with token ids and prompt_logprobs, as vLLM has them.

    most: the largest prompt_logprobs. The server is not started: `serve_forever` does, `server_address` says where.
    """
    room, name = InRoom(load_model(teacher)), Path(teacher).name
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lock = Lock()  # a model is asked by one thread at a time

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the caller has its own log."""

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            """The one model that is served."""
            known = self.path.rstrip("/") == "/v1/models"
            self._reply(200 if known else 404, {"data": [{"id": name, "object": "model"}]} if known else {"error": {}})

        def do_POST(self) -> None:
            """Completions of token ids."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                if self.path.rstrip("/") != "/v1/completions":
                    raise ValueError(f"there is no {self.path}")
                with lock:
                    reply = completions(room, tokenizer, json.loads(body), most)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self._reply(400, {"error": {"message": str(error), "code": 400}})
            else:
                self._reply(200, {"object": "text_completion", "model": name, **reply})

    return ThreadingHTTPServer((host, port), Handler)


def completions(room: InRoom, tokenizer: Any, body: dict[str, Any], most: int) -> dict[str, Any]:
    """The choices for a request's prompts: a continuation each, and the prompt's log-probabilities if asked for.

    Raises:
        ValueError: prompts that are no token ids, or more log-probabilities than the server gives.
    """
    prompts, k = body["prompt"], body.get("prompt_logprobs")
    prompts = prompts if prompts and isinstance(prompts[0], list) else [prompts]
    known = all(isinstance(i, int) and 0 <= i < room.vocabulary for p in prompts for i in p)
    if not known or not all(map(len, prompts)):
        raise ValueError(f"prompt must be token ids in [0, {room.vocabulary}), one list or several")
    if k is not None and not 0 <= int(k) <= most:
        raise ValueError(f"prompt_logprobs must be in [0, {most}], not {k}")
    sampling = Sampling(int(body.get("max_tokens", 16)), float(body.get("temperature", 1.0)) or 1e-4,
                        max(0, int(body.get("top_k", 0) or 0)), float(body.get("top_p", 1.0)))  # fmt: skip
    seed = body.get("seed")
    choices = []
    for i, prompt in enumerate(prompts):
        made = draw(room.model, [torch.tensor(prompt)], sampling, seed, room.vocabulary)[0].tolist()
        choice: dict[str, Any] = {"index": i, "text": tokenizer.decode(made), "token_ids": made}
        choice["finish_reason"] = "length" if len(made) == sampling.max_new_tokens else "stop"
        if k is not None:
            choice["prompt_logprobs"] = prompt_log_probs(room, tokenizer, prompt, int(k))
            choice["prompt_token_ids"] = prompt
        choices.append(choice)
    return {"choices": choices}


def prompt_log_probs(room: InRoom, tokenizer: Any, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then each token's k largest, and itself where it is not among them."""
    if len(prompt) < 2:
        return [None]
    device = torch.device("cpu")
    rows = room.rows([torch.tensor(prompt[:1])], [torch.tensor(prompt[1:])], device)
    log_p = logits_function(rows, device)(0, len(prompt) - 1)[:, : room.vocabulary].float().log_softmax(-1)
    largest = log_p.topk(min(k, room.vocabulary), -1).indices.tolist()

    def entry(n: int, i: int) -> dict[str, Any]:
        rank = int((log_p[n] > log_p[n, i]).sum()) + 1
        return {"logprob": float(log_p[n, i]), "rank": rank, "decoded_token": tokenizer.decode([i])}

    rows_of_ids = [dict.fromkeys([*ids, token]) for ids, token in zip(largest, prompt[1:], strict=True)]
    return [None, *({str(i): entry(n, i) for i in ids} for n, ids in enumerate(rows_of_ids))]
