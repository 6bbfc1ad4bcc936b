"""The student's samples, drawn by a vLLM server that first gets the student's weights.

    all weights   POST /collective_rpc reload_weights and /reset_prefix_cache; started with VLLM_SERVER_DEV_MODE=1
    LoRA adapter  POST /v1/load_lora_adapter; started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True

The weights go through a folder that both can see, everything else over HTTP. That a server has loaded them is checked:
its log-probabilities must be the student's, and must have changed where the student's have.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..teachers.connection import EndpointError, message_of
from ..teachers.endpoint import LISTED, Endpoint, nats_apart
from .forward import rows_of
from .generation import special_tokens
from .models import adapters_kept, evaluating, vocabulary_of
from .ranks import is_split
from .sampling import Sampling

#: Tokens of the sequence that the server is asked about.
PROBE = 8
#: Nats that its log-probabilities may be off on average: half precision is by some hundredths.
AGREES = 0.1
#: Nats by which the student has moved when the server must have; those by which one that stood still is off.
MOVED, STILL = 1e-3, 1e-6
#: What folders of weights are called, before their step.
WEIGHTS = "student-weights-"
LORA = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
#: Requests at a time, and seconds for one that takes weights.
CONCURRENCY, TIMEOUT = 128, 600.0


def _by_first(work: Callable[[], Any], failed: str) -> Any:
    """What the first rank makes, on all ranks at once, which wait for it, or an EndpointError if it failed there."""
    made: list[Any] = [None, None]
    cause: Exception | None = None
    if PartialState().is_main_process:
        try:
            made[0] = work()
        except Exception as error:
            cause, made[1] = error, f"{failed}{error}"
    broadcast_object_list(made)
    if made[1] is not None:
        raise EndpointError(made[1]) from cause
    return made[0]


class StudentServer:
    """A vLLM server that draws from a student in training.

    Args:
        url: of the server, with or without /v1. It serves the student, or the base model of its LoRA adapter. Nothing
            else may change its weights.
        folder: for this run alone, with the same path for trainer and server. It holds the weights of one step.
        student: a causal model, whole on each rank.
        vocabulary: ids from here on are not drawn, as in `draw`.
    """

    def __init__(self, url: str, folder: str | Path, student: Any, vocabulary: int):
        self.folder, self.adapter = Path(folder).absolute(), _adapter_of(student)
        size, (self.pad, ends) = vocabulary_of(student.config), special_tokens(student)
        self.endpoint = Endpoint(url, model="", vocabulary=size, concurrency=CONCURRENCY)  # "": no adapter
        self.vocabulary = vocabulary
        self.name = f"the student's server at {self.endpoint.url}"
        self.how = {"ignore_eos": True, "stop_token_ids": ends}
        self.probe = torch.linspace(0, vocabulary - 1, PROBE).long()
        self.mark = ""  # of these weights alone: the adapter's name, and the salt of what the server caches
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None  # ids, their log-probabilities here and there

    def check(self) -> None:
        """Raises EndpointError, on all ranks, where no server is there to answer the first one."""
        _by_first(lambda: self._tell("/v1/models", method="GET").status_code, "")

    def draw(
        self, student: Any, prompts: Sequence[Tensor], sampling: Sampling, step: int, fresh: bool = True
    ) -> list[Tensor]:
        """As `sampling.draw`, on all ranks at once. The first asks for everybody, with seeds of torch's generator; what
        fails there is a ConnectionError everywhere. fresh: the weights may be other ones than at the last call.
        """
        of_ranks = gather_object([[p.tolist() for p in prompts]])

        def drawn() -> list[list[list[int]]]:
            if fresh:
                self.take(student, step)
            every = [torch.tensor(p) for of_rank in of_ranks for p in of_rank]
            seed = int(torch.randint(2**31, ()))
            more: dict[str, Any] = {"cache_salt": self.mark, **self.how}
            rows = iter(self.endpoint.draw(every, sampling, seed, self.vocabulary, **more))
            return [[next(rows).tolist() for _ in of_rank] for of_rank in of_ranks]

        made = _by_first(drawn, f"no samples of the student at step {step}: ")
        return [torch.tensor(row) for row in made[PartialState().process_index]]

    def take(self, student: Any, step: int) -> None:
        """Gives the student's weights to the server, which must then answer with them."""
        path, before, self.mark = self._written(student, step), self.mark, uuid.uuid4().hex
        if self.adapter is None:
            self._tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
            self._tell("/reset_prefix_cache")
        else:  # under a new name, so that no old one is meant
            self._tell("/v1/load_lora_adapter", {"lora_name": self.mark, "lora_path": str(path)})
            self.endpoint.model = self.mark
            if before:
                self._tell("/v1/unload_lora_adapter", {"lora_name": before})
        self._check(student, step)

    def _written(self, student: Any, step: int) -> Path:
        """Writes the weights, and removes older ones; the server reads them only when it is told to. Returns where."""
        for old in self.folder.glob(WEIGHTS + "*"):
            shutil.rmtree(old)
        path = self.folder / f"{WEIGHTS}{step}"
        adapter: dict[str, Any] = {"selected_adapters": [self.adapter], "save_embedding_layers": False}
        student.save_pretrained(path, **(adapter if self.adapter else {}))
        return path if self.adapter is None else path / adapters_kept(student)[self.adapter]

    def _tell(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """The server's reply to a request that only the way it was started can make it refuse."""
        import httpx

        server = self.endpoint.connection
        try:
            reply = httpx.request(method, server.url + path, json=body, timeout=TIMEOUT, auth=server.auth,
                                  headers=server.headers)  # fmt: skip
        except httpx.RequestError as error:
            raise EndpointError(f"{self.name} does not answer to {path}: {error!r}") from error
        if reply.status_code != 200:
            started = "VLLM_SERVER_DEV_MODE=1" if self.adapter is None else LORA
            raise EndpointError(f"{self.name} refuses {path} with status {reply.status_code}: {message_of(reply)} "
                                f"(it must be started with {started}, and see {self.folder})",
                                reply.status_code)  # fmt: skip
        return reply

    def _check(self, student: Any, step: int) -> None:
        """Raises EndpointError where the server's log-probabilities are not the student's, or stood still."""
        own, (ids, said) = self._own(student), self._said()
        here = own.gather(1, ids)
        apart = nats_apart(said, here)
        if not apart <= AGREES:
            raise EndpointError(f"{self.name} does not speak with the weights of step {step}: its log-probabilities "
                                f"are off by {apart:.3g} nats on average, more than {AGREES}")  # fmt: skip
        if self._seen is not None:
            known, before, then = self._seen
            moved = float((own.gather(1, known) - before).abs().max())
            if moved <= MOVED:
                return
            if torch.equal(ids, known) and float((said - then).abs().max()) <= STILL:
                raise EndpointError(f"{self.name} does not speak with the weights of step {step}: they have moved a "
                                    f"log-probability by {moved:.3g} nats, and none of the server's")  # fmt: skip
        self._seen = ids, here, said

    def _said(self) -> tuple[Tensor, Tensor]:
        """(T, K) ids and log-probabilities, the server's largest after each prefix of the probe."""
        body = {"prompt": [self.probe[: i + 1].tolist() for i in range(PROBE)], "max_tokens": 1, "temperature": 1.0,
                "logprobs": LISTED, "return_tokens_as_token_ids": True, "cache_salt": self.mark,
                "model": self.endpoint.model}  # fmt: skip
        reply = self._tell("/v1/completions", body)
        try:
            choices = {choice["index"]: choice for choice in reply.json()["choices"]}
            listed = [choices[i]["logprobs"]["top_logprobs"][0].items() for i in range(PROBE)]
            rows = [sorted(items, key=lambda item: -item[1])[:LISTED] for items in listed]  # without a drawn one's more
            ids = torch.tensor([[int(name.removeprefix("token_id:")) for name, _ in row] for row in rows])
            return ids, torch.tensor([[value for _, value in row] for row in rows])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"{self.name} gives no log-probabilities by token ids ({error!r}): vLLM's completions "
                                "are needed") from error  # fmt: skip

    @torch.no_grad()
    def _own(self, student: Any) -> Tensor:
        """(T, V), what the student itself says of the probe."""
        probe = self.probe.to(next(student.parameters()).device)
        with evaluating(student):
            rows, _ = rows_of(student, [probe[:1]], [torch.cat((probe[1:], probe[:1]))], self.pad)
            return rows.logits(rows.hidden).float().log_softmax(-1).cpu()


def _adapter_of(student: Any) -> str | None:
    """The name of a student's LoRA adapter; None: all weights are its own. ValueError for what vLLM does not take."""
    if student.config.is_encoder_decoder:
        raise ValueError("student_server: vLLM draws from causal students alone, not from an encoder–decoder")
    if is_split(student):
        raise ValueError("student_server takes a student that is whole on each rank, and this one is split over ranks")
    if not hasattr(student, "peft_config"):
        return None
    active = student.active_adapters
    active = active if isinstance(active, list) else active()
    kinds = [getattr(student.peft_config[name].peft_type, "value", "") for name in active]
    if kinds != ["LORA"]:
        raise ValueError(f"student_server: vLLM takes one LoRA adapter, and the student's are {kinds}")
    return str(active[0])
