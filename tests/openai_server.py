"""A local server that speaks vLLM's and SGLang's protocols for a tiny model of its own, and fails on command."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

#: What a request's reply can be made to be; those of REFUSED are answers that must not be used.
BROKEN = ("500", "429", "close", "half", "stall", "json", "empty", "list")
REFUSED = ("short", "outside", "nan", "positive", "length", "longer", "other_ids", "no_token", "twice", "no_rows")


class Model:
    """Logits from a token and the one before it; hidden states whose norm a head needs."""

    def __init__(self, vocabulary: int = 40, seed: int = 0):
        made = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        self.states = torch.randn(2, vocabulary, 8, generator=made)
        self.weight = torch.randn(vocabulary, 8, generator=made)

    def hidden(self, ids) -> torch.Tensor:
        """(T, 8) before the norm."""
        ids = torch.as_tensor(ids)
        return 3 * (self.states[0, ids] + 0.5 * self.states[1, ids.roll(1).index_fill(0, torch.tensor(0), 0)])

    @staticmethod
    def norm(states: torch.Tensor) -> torch.Tensor:
        return states / states.square().mean(-1, keepdim=True).sqrt()

    def log_probs(self, ids) -> torch.Tensor:
        """(T, V): row t predicts token t + 1."""
        return (self.norm(self.hidden(ids)) @ self.weight.T).log_softmax(-1)


class Server:
    """`with Server() as server:` at server.url; what each request's reply is decided by `faults`, names or None."""

    def __init__(self, model: Model | None = None, faults: Iterator[str | None] | None = None, *,
                 limit: int = 10**9, delay: float = 0.0, stall: float = 1.0, folder=None, echo: bool = True,
                 context: int = 10**9, **about):  # fmt: skip
        self.model = model or Model()
        faults = itertools.repeat(None) if faults is None else faults
        self.faults, self.limit, self.delay, self.stall = faults, limit, delay, stall
        self.folder, self.echo, self.context = folder, echo, context
        self.asked: Counter = Counter()  # by token ids, faults included
        self.answered: Counter = Counter()  # by token ids, without a fault
        self.given: Counter = Counter()  # by fault
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.reply_models = [{"id": "tiny", **about}]  # fingerprint, vocabulary, tokenizer
        self.tokenize = None  # a function of a text, where there is POST /tokenize
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_GET(self):
                known = outer.reply_models is not None
                _send(self, {"data": outer.reply_models} if known else {"detail": "Not Found"}, 200 if known else 404)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
                if self.path == "/tokenize":
                    known = outer.tokenize is not None
                    said = {"tokens": outer.tokenize(body["prompt"])} if known else {"detail": "Not Found"}
                    return _send(self, said, 200 if known else 404)
                with contextlib.suppress(OSError):
                    outer.reply(self, body)

        class Listening(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):  # a client that hung up
                pass

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def reply(self, handler, body):
        ids = body.get("input_ids", body.get("prompt"))
        with self.lock:
            fault = next(self.faults)
            self.asked[tuple(ids)] += 1
            self.given[fault] += fault is not None
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay)
            if fault in BROKEN:
                return self.broken(handler, fault, body, ids)
            if fault is not None and fault.startswith("4"):
                return _send(handler, {"error": {"message": "the prompt is too long for me", "code": 400}}, int(fault))
            if said := self.too_long(len(ids), "input_ids" in body):
                return _send(handler, {"error": {"message": said, "code": 400}}, 400)
            with self.lock:
                self.answered[tuple(ids)] += fault is None
            made = self.sglang(body, ids, fault) if "input_ids" in body else self.vllm(body, ids, fault)
        finally:
            with self.lock:
                self.now -= 1  # before the reply: the client may send its next at once
        _send(handler, made)

    def too_long(self, count, sglang):
        """vLLM's words, which generates a token, or SGLang's; None: it is not."""
        if count < self.context - 6 * sglang:
            return None
        if not sglang:
            return f"This model's maximum context length is {self.context} tokens. However, you requested more"
        if count < self.context:
            return f"Input length ({count} tokens) exceeds the maximum allowed length ({self.context - 6} tokens)."
        return f"The input ({count} tokens) is longer than the model's context length ({self.context} tokens)."

    def broken(self, handler, fault, body, ids):
        if fault == "500":
            _send(handler, {"error": {"message": "out of memory"}}, 500)
        elif fault == "429":
            _send(handler, {"error": "slow down"}, 429, {"Retry-After": "0.01"})
        elif fault == "stall":
            time.sleep(self.stall)
        elif fault == "half":
            whole = json.dumps(
                self.vllm(body, ids, None) if "prompt" in body else self.sglang(body, ids, None)
            ).encode()
            _head(handler, 200, len(whole))
            handler.wfile.write(whole[: len(whole) // 2])
        elif fault in ("json", "empty", "list"):
            whole = {"json": b'{"choices": [', "empty": b"", "list": b"[1, 2]"}[fault]
            _head(handler, 200, len(whole))
            handler.wfile.write(whole)
        if fault in ("close", "half", "stall"):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def rows(self, ids, begin, k, fault):
        """Of tokens `begin` on: [(id, log-prob, rank)], the k largest, and the token's own log-prob."""
        log_probs, after = self.model.log_probs(ids)[begin - 1 : -1], torch.tensor(ids[begin:]).long()
        top = log_probs.topk(min(k, self.limit, log_probs.shape[1]))
        theirs = log_probs.gather(1, after[:, None])
        ranks, found = (log_probs >= theirs).sum(1).tolist(), []
        every = zip(top.indices.tolist(), top.values.tolist(), ids[begin:], theirs[:, 0].tolist(), ranks, strict=True)
        for position, (listed, values, token, log_prob, rank) in enumerate(every, begin + 1):
            last = position == len(ids)  # which is of the continuation
            entries = [[i, p, r] for r, (i, p) in enumerate(zip(listed, values, strict=True), 1)]
            own = [token, log_prob, rank]
            if last and fault in ("outside", "nan", "positive"):
                at = 0 if entries[0][0] != token else 1
                entries[at][0 if fault == "outside" else 1] = {
                    "outside": self.model.vocabulary + 5,
                    "nan": float("nan"),
                    "positive": 2.5,
                }[fault]
            if last and fault == "short":
                entries.pop(0 if entries[0][0] != token else 1)
            found.append((entries, own))
        if fault in ("length", "longer"):
            found = found[:-1] if fault == "length" else [*found, found[-1]]
        return found

    def vllm(self, body, ids, fault):
        choice = {"index": 0, "text": "x", "finish_reason": "length"}
        if body.get("return_token_ids") and self.echo:
            choice["prompt_token_ids"] = [*ids[:-1], ids[-1] ^ 1] if fault == "other_ids" else ids
            choice["token_ids"] = self.sample(ids, body["max_tokens"], body.get("seed", 0), body)
            choice["finish_reason"] = "length" if len(choice["token_ids"]) == body["max_tokens"] else "stop"
        reply = {"object": "text_completion", "model": "tiny", "choices": [choice]}
        if self.folder is not None and fault != "no_rows":
            reply["kv_transfer_params"] = {"hidden_states_path": self.write_states(ids, fault)}
        if body.get("prompt_logprobs") is not None and fault != "no_rows":
            listed = [None]
            for entries, own in self.rows(ids, 1, body["prompt_logprobs"], fault):
                row = {str(own[0]): {"logprob": own[1], "rank": own[2], "decoded_token": "x"}}
                row.update({str(i): {"logprob": p, "rank": r, "decoded_token": "x"} for i, p, r in entries})
                if fault == "no_token":
                    del row[str(own[0])]
                    row.update({str(own[0] ^ 1): {"logprob": own[1], "rank": own[2]}})
                listed.append(row)
            if fault == "twice":
                listed[-1].pop(str(next(i for i, *_ in entries if i != own[0])))  # JSON keeps one of two
            choice["prompt_logprobs"] = listed
        return reply

    def sglang(self, body, ids, fault):
        meta = {"prompt_tokens": len(ids) - (fault == "other_ids"), "finish_reason": {"type": "length"}}
        how = body["sampling_params"]
        made = self.sample(ids, how["max_new_tokens"], how.get("sampling_seed", 0), how)
        if body.get("return_logprob") and fault != "no_rows":
            begin = body["logprob_start_len"]
            found = self.rows(ids, begin + 1, body["top_logprobs_num"], fault)
            said = [i if i < self.model.vocabulary - 1 else 0 for i in (ids[begin], *(own[0] for _, own in found))]
            meta["input_token_logprobs"] = [
                [p, i, None] for p, i in zip((None, *(own[1] for _, own in found)), said, strict=True)
            ]
            meta["input_top_logprobs"] = [None, *([[p, i, None] for i, p, _ in entries] for entries, _ in found)]
            if fault == "twice":
                meta["input_top_logprobs"][-1][0] = meta["input_top_logprobs"][-1][1]
            if fault == "no_token":
                meta["input_token_logprobs"][-1][1] ^= 1
        return {"text": "x", "output_ids": made, "meta_info": meta}

    def write_states(self, ids, fault):
        from safetensors.torch import save_file

        path = f"{self.folder}/{sum(self.asked.values())}-{threading.get_ident()}.safetensors"
        lock = open(path + ".lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = self.model.hidden(ids)[:, None].repeat(1, 2, 1)
        states[:, 0] = states[:, 0].flip(-1)  # an earlier layer
        if fault == "nan":
            states[-2] = float("nan")

        def write():
            time.sleep(0.02)
            save_file(
                {"hidden_states": states, "token_ids": torch.tensor([*ids[:-1], ids[-1] ^ (fault == "other_ids")])},
                path,
            )
            lock.close()

        threading.Thread(target=write, daemon=True).start()
        return path

    def sample(self, ids, new, seed, how=None):
        generator, made = torch.Generator().manual_seed(seed), list(ids)
        for _ in range(new):
            scores = self.model.log_probs(made)[-1]
            for i, bias in ((how or {}).get("logit_bias") or {}).items():
                scores[int(i)] += bias
            made.append(int(torch.multinomial(scores.exp(), 1, generator=generator)))
        return made[len(ids) :]


def _head(handler, status, length, headers=()):
    handler.send_response(status)
    for name, value in dict(headers).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(length))
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()


def _send(handler, reply, status=200, headers=()):
    whole = json.dumps(reply).encode()
    _head(handler, status, len(whole), headers)
    handler.wfile.write(whole)
