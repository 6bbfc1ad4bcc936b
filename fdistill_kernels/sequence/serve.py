"""`fdistill teacher serve`: serves a model to an `Endpoint`, with the part of vLLM's protocol that it needs."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from ..checks import check_integer, check_number
from ..teachers.readers import MINUS_INFINITY
from .hashes import fingerprint, tokenizer_hash
from .loading import load_config, load_model
from .ranks import device
from .sampling import Sampling, draw
from .teachers import InRoom
from .teachers.base import logits_in_pieces
from .tokenizers import load_tokenizer


class Handler(BaseHTTPRequestHandler):
    """Replies by what a `Listening` knows."""

    server: Listening
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the caller has its own log."""

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):  # the client has left
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _refuse(self, status: int, message: str) -> None:
        self._reply(status, {"error": {"message": message, "code": status}})

    def do_GET(self) -> None:
        """The one model that is served."""
        if self.path.rstrip("/") != "/v1/models":
            return self._refuse(404, f"there is no {self.path}")
        self._reply(200, {"object": "list", "data": [self.server.known]})

    def do_POST(self) -> None:
        """Completions of token ids."""
        size, name = self.headers.get("Content-Length", ""), self.server.known["id"]
        if not size.isdecimal():  # of a body in chunks, too, which nobody reads
            self.close_connection = True
            return self._refuse(411, f"Content-Length is {size!r}, and must be the number of bytes")
        body = self.rfile.read(int(size))
        if self.path.rstrip("/") != "/v1/completions":
            return self._refuse(404, f"there is no {self.path}")
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                return self._refuse(400, "the request is no JSON object")
            if asked.get("model") not in (None, name):
                return self._refuse(404, f"the model {asked['model']!r} is not served, but {name!r}")
            reply = self.server.answer(asked)
        except Exception as error:  # 500: of memory, say, which may be there at another try
            bad = isinstance(error, (ValueError, LookupError, TypeError, AttributeError))
            return self._refuse(400 if bad else 500, str(error))
        self._reply(200, {"object": "text_completion", "model": name, **reply})


class Listening(ThreadingHTTPServer):
    """Listens at an address, of IPv6, too. Requests wait until it serves, with what it knows by then."""

    known: dict[str, Any]  # what is told of the model
    answer: Callable[[dict[str, Any]], dict[str, Any]]  # makes a request's completions

    def __init__(self, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(error.errno, f"host {host}, port {port}: {error.strerror}") from error

    def handle_error(self, *_: Any) -> None:
        """Of a client that has left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)


def server(teacher: str, host: str = "127.0.0.1", port: int = 8000, most: int = 4096) -> ThreadingHTTPServer:
    """A server of /v1/completions, with `most` prompt_logprobs, and /v1/models; port 0: any that is free."""
    if load_config(teacher).is_encoder_decoder:
        raise ValueError(f"{teacher} is an encoder–decoder model, and completions go on from their prompt: store it")
    listening = Listening(host, port)  # refuses, before the weights are read
    room, name = InRoom(load_model(teacher)), Path(teacher).absolute().name  # of "." the folder's
    room.to(device())
    tokenizer, lock = load_tokenizer(teacher), Lock()

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        with lock:  # a model is asked by one thread at a time
            return completions(room, tokenizer, asked, most)

    listening.known = {"id": name, "object": "model", "fingerprint": fingerprint(room.model),
                       "vocabulary": room.vocabulary, "tokenizer": tokenizer_hash(tokenizer)}  # fmt: skip
    listening.answer = answer
    return listening


#: What it may say so alone, which changes nothing.
OFF = {"min_p": 0, "repetition_penalty": 1, "n": 1, "stream": False, "echo": False}
#: Integers that it may say, and their least values.
INTEGERS = {"max_tokens": 0, "top_k": -1, "seed": -(2**63), "prompt_logprobs": 0}
#: What a request may say.
FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_k", "top_p", "seed", "prompt_logprobs",
          "return_token_ids", "add_special_tokens", "skip_special_tokens", "logit_bias"}  # fmt: skip


def completions(room: InRoom, tokenizer: Any, body: dict[str, Any], most: int) -> dict[str, Any]:
    """The choices for a request's prompts, or ValueError or TypeError for what is asked otherwise: a continuation of
    each, and the prompt's log-probabilities if asked for. With these and max_tokens ≤ 1 nothing is drawn.
    """
    body = {name: value for name, value in body.items() if value is not None}
    prompts, drawn = _checked(body, room.vocabulary, most)
    tokens, k = body.get("max_tokens", 16), body.get("prompt_logprobs")
    temperature, top_p = (check_number(name, body.get(name, 1.0)) for name in ("temperature", "top_p"))
    sampling = Sampling(max(1, tokens), temperature or 1e-4, max(0, body.get("top_k", 0)), top_p)
    choices, seed, ends = [], body.get("seed"), room.ends()
    for i, prompt in enumerate(prompts):
        made: list[int] = []
        if tokens > 1 or (tokens == 1 and k is None):
            made = draw(room.model, [torch.tensor(prompt, device=room.device)], sampling, seed, drawn)[0].tolist()
        text = tokenizer.decode(made, skip_special_tokens=bool(body.get("skip_special_tokens", False)))
        choice: dict[str, Any] = {"index": i, "text": text, "token_ids": made}
        choice["finish_reason"] = "stop" if made and made[-1] in ends else "length"
        if k is not None:
            choice["prompt_logprobs"] = prompt_log_probs(room, tokenizer, prompt, k)
            choice["prompt_token_ids"] = prompt
        choices.append(choice)
    return {"choices": choices}


def _checked(body: dict[str, Any], vocabulary: int, most: int) -> tuple[list[list[int]], int]:
    """A request's prompts, and from which id on none is drawn; raises as `completions`."""
    if "prompt" not in body:
        raise ValueError("the request has no prompt")
    prompts, k = body["prompt"], body.get("prompt_logprobs")
    biases = body.get("logit_bias", {})
    drawn = vocabulary - (len(biases) if isinstance(biases, dict) else 0)
    if biases != {str(i): -100 for i in range(drawn, vocabulary)}:
        raise ValueError("logit_bias may have −100 for each of the last ids, and no other")
    if not (isinstance(prompts, list) and prompts and isinstance(prompts[0], list)):
        prompts = [prompts]
    if not all(isinstance(p, list) and p and all(type(i) is int and 0 <= i < vocabulary for i in p)
               for p in prompts):  # fmt: skip
        raise ValueError(f"prompt must be token ids in [0, {vocabulary}), one list or several")
    for field, least in INTEGERS.items():
        check_integer(field, body.get(field, least), least)
    if k is not None and k > most:
        raise ValueError(f"prompt_logprobs must be in [0, {most}], not {k}")
    if beyond := [name for name in sorted(body.keys() - FIELDS) if name not in OFF or body[name] != OFF[name]]:
        raise ValueError(f"only n = 1 without stream is served, and no {', '.join(beyond)}")
    return prompts, drawn


@torch.no_grad()
def prompt_log_probs(room: InRoom, tokenizer: Any, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
    """In vLLM's form: null for the first token, then for each token the k largest, and the token itself."""
    found: list[dict[str, Any] | None] = [None]
    if len(prompt) < 2:
        return found
    first, tokens = torch.tensor(prompt).tensor_split([1])
    for begin, end, logits in logits_in_pieces(room.rows([first], [tokens], room.device), room.device, 0, len(tokens)):
        piece = tokens[begin:end].to(room.device)
        log_p = logits.log_softmax(-1).clamp_min_(MINUS_INFINITY)  # as vLLM: JSON has no −∞
        own = log_p.gather(1, piece.unsqueeze(1))
        ranks = (log_p > own).sum(1) + 1
        largest = log_p.topk(min(k, room.vocabulary), -1)
        columns = largest.indices, largest.values, piece, own[:, 0], ranks
        for ids, values, token, of_token, rank in zip(*(column.tolist() for column in columns), strict=True):
            each = {i: (x, r) for r, (i, x) in enumerate(zip(ids, values, strict=True), 1)}
            each.setdefault(token, (of_token, rank))
            found.append({str(i): {"logprob": x, "rank": r, "decoded_token": tokenizer.decode([i])}
                          for i, (x, r) in each.items()})  # fmt: skip
    return found
