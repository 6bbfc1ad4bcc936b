"""A teacher on a server: its log-probabilities or hidden states at the tokens of whole sequences.

    vllm         POST /v1/completions with token ids and prompt_logprobs; started with --max-logprobs k or more
    sglang       POST /generate with input_ids, return_logprob and top_logprobs_num
    vllm_hidden  as vllm, with extract_hidden_states and the ExampleHiddenStatesConnector, whose files both can reach

Requests run on an event loop in a thread of their own, so that they are on their way while a loss is computed, and can
be cancelled at once.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import itertools
import math
import operator
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import products
from ..backends.rows import capped
from ..checks import check_choice, check_flag, check_integer, check_number, check_path
from ..sparse import TopK, checked_tail
from ..values import Head, Hidden
from .background import Background, all_of
from .connection import FIRST_WAIT, Connection, EndpointError
from .locks import is_locked, lock, unlock
from .pairs import key_of, paired
from .readers import Lists, Misfit, form, sglang_rows, vllm_rows
from .settings import check_same, checked_settings
from .store import MissingTargets, TeacherStore

if TYPE_CHECKING:
    from ..sequence.sampling import Sampling  # which needs transformers

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Ids = Sequence[int] | Tensor
KINDS = ("vllm", "sglang", "vllm_hidden")
#: How much longer than a sequence the context must be: vLLM generates a token, and SGLang leaves room for some.
SPARE = {"vllm": 1, "sglang": 7, "vllm_hidden": 1}
#: Ids of a position, where none are asked for.
DEFAULT_K = 64
#: How far a probability, or states relative to their norm, may move when a sequence is asked for again.
AGREES = 0.1
#: How many nats a log-probability may be off on average: logits in half precision are by up to a tenth.
NATS = 0.25
#: Ids a position that are asked for to compare states; 20 are vLLM's default at most.
LISTED = 8
#: Rows that the stored sequence which is asked for again should have.
ENOUGH = 8
#: Times that a batch reads damaged rows from the store before it is given up.
READS = 3


class Endpoint(contextlib.AbstractContextManager["Endpoint"]):
    """A teacher on a server. It gives `TopK` targets, or `Hidden` ones with kind "vllm_hidden".

    With a store, each sequence is asked for once. It is looked up there first and written there afterwards, even if the
    rest of the batch fails; if another batch, endpoint or process is asking for it, this one waits for the answer. A
    reply that does not fit its sequence is never used. At first two short sequences are tried, one of them twice; their
    states must give, through norm and head, the log-probabilities that the server itself says. If the store has
    sequences already, the server is asked for a short one of them again, and must give the same answer.
    If /v1/models gives a `fingerprint` of the model, it is part of the store's key.

    Args:
        url: of the server, with or without /v1. Of a user and a password in it neither `url` nor any error has a trace.
        model: name of the model on the server; None: the only one there.
        vocabulary, k: V of the teacher's output embedding; number of ids per position of lists, at most V (None: 64).
        api_key: sent as a bearer token; None: the environment variable FDISTILL_API_KEY, if it is set.
        padded: leave out ids ≥ V instead of refusing them, for a teacher whose output embedding has more than V rows;
            their mass then belongs to the tail. Implied if /v1/models gives a larger `vocabulary`, which must not be
            smaller.
        store: a `TeacherStore` with the same settings, or its folder, which is made if there is none.
        concurrency, timeout: requests at a time; seconds for each, reading included. A longer Retry-After is an error.
        retries: further tries after a 408, 429 or 5xx, a timeout, a broken connection, or a reply that does not fit;
            the log "fdistill_kernels.endpoint" warns of them every few seconds.
        first_wait: seconds before the second try, doubled for each further try.
        kind: "vllm", "sglang" or "vllm_hidden".
        short_rows: pad positions that have fewer than k ids with −1 instead of refusing them.
        head, norm, states_folder, layer: for "vllm_hidden": the teacher's head; its output norm, a function of states
            (L, D) in the dtype of the head, because the connector gives the states before it; the server's
            shared_storage_path; and which of the connector's layers to use. Of these the last must be the model's last.

    Raises:
        ValueError, TypeError: arguments that do not fit, or not together; ValueError in any call: the store is of
            another teacher than the server.
        EndpointError: (a ConnectionError) in any call: the server's own message, or what happened in the last try, with
            the sequence.
        OSError: in any call: a store's file could not be written, or was damaged whenever it was read back.
        ImportError: a package of the extra served is missing.
    """

    def __init__(
        self, url: str, *, model: str | None = None, vocabulary: int, k: int | None = None, api_key: str | None = None,
        store: TeacherStore | str | Path | None = None, concurrency: int = 8, timeout: float = 600.0, retries: int = 6,
        first_wait: float = FIRST_WAIT, kind: str = "vllm", short_rows: bool = False, padded: bool = False,
        head: Head | None = None, norm: Callable[[Tensor], Tensor] | None = None,
        states_folder: str | Path | None = None, layer: int = -1,
    ):  # fmt: skip
        vocabulary = check_integer("vocabulary", vocabulary, 1)
        concurrency, retries = check_integer("concurrency", concurrency, 1), check_integer("retries", retries, 0)
        layer = check_integer("layer", layer)
        k = None if k is None else check_integer("k", k, 1)
        check_number("first_wait", first_wait, 0)
        if not (isinstance(timeout, float) and timeout == math.inf):
            check_number("timeout", timeout, 0, open_low=True)
        if not isinstance(model, str | None):
            raise TypeError(f"model must be the name of a model, not {model!r}")
        check_choice("kind", kind, KINDS)
        check_flag("short_rows", short_rows)
        check_flag("padded", padded)
        if states_folder is not None:
            check_path("states_folder", states_folder)
        if store is not None and not isinstance(store, TeacherStore):
            check_path("store", store)
        if norm is not None and not callable(norm):
            raise TypeError(f"norm must be a function of states, not {type(norm).__name__}")
        _check_kind(kind, vocabulary, {"norm": norm, "head": head, "states_folder": states_folder}, layer,
                    {"k": k is not None, "short_rows": short_rows, "padded": padded})  # fmt: skip
        k = min(DEFAULT_K if k is None else k, vocabulary)
        self.connection = Connection(url, api_key, concurrency, timeout, retries, first_wait)
        self.model, self.vocabulary, self.k, self.kind = model, vocabulary, k, kind
        self.head, self.norm, self.layer = head, norm, layer
        self.states_folder = None if states_folder is None else Path(states_folder).absolute()
        self._lists = Lists(k, vocabulary, short_rows, padded)
        self._kept: dict[str, Any] = {"vocabulary": vocabulary, "kind": "top_k", "k": k}  # settings of its store
        if head is not None:
            states = str(head.weight.dtype).removeprefix("torch.")
            self._kept = {"vocabulary": vocabulary, "kind": "hidden", "head": head, "states": states}
        self.store: TeacherStore | None = None
        self._folder: Path | None = None  # of a store to be made
        if isinstance(store, TeacherStore):
            self.store, free = store, ("states", "rank") if head else ("log_probs",)
            asked = checked_settings(**self._kept | {n: x for n, x in store.settings.items() if n in free})
            check_same(f"{store.folder} holds other targets", store.settings, asked)
        elif store is not None:
            self._folder = Path(store).absolute()
        self._about: dict[str, Any] | None = None  # what the list of models says
        self._opening, self._opened, self._tried = asyncio.Lock(), False, False
        self._background = Background(f"the endpoint at {self.url}", self.connection.client.aclose)

    # What is asked for

    @property
    def url(self) -> str:
        """The server's, without /v1, user and password."""
        return self.connection.url

    @property
    def tokenizer(self) -> str | None:
        """Hash of the server's tokenizer, if /v1/models gives one. The first reading asks the server."""
        return self._background.run(self._known).get("tokenizer")

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the server's model, if /v1/models gives one. The first reading asks the server."""
        return self._background.run(self._known).get("fingerprint")

    def targets(self, prompts: Sequence[Ids], continuations: Sequence[Ids], tail: str = "bucket") -> TopK | Hidden:
        """The teacher at all M tokens of the continuations, sequence by sequence: lists (M, K), or states (M, D).

        Raises:
            ValueError: an empty prompt (which predicts nothing), ids that are not integers or are outside the
                vocabulary, or a tail that lists without weights do not have.
        """
        return self.ask(prompts, continuations, tail)()

    def ask(self, prompts: Sequence[Ids], continuations: Sequence[Ids], tail: str = "bucket") -> Callable[..., Any]:
        """Begins to ask. Returns a function that waits for the `targets`; it takes another tail if one is given."""
        checked_tail(tail)
        future = self._background.submit(self._batch, self._pairs(prompts, continuations))
        return lambda tail=tail: self._wait(future, checked_tail(tail))

    def prefetch(
        self, batches: Iterable[Any], ahead: int = 2, tail: str = "bucket"
    ) -> Generator[tuple[Any, TopK | Hidden], None, None]:
        """Yields each batch (prompts, continuations, …) with its targets, while `ahead` further ones are asked for."""
        check_integer("ahead", ahead, 0)
        return self._prefetched(iter(batches), ahead, checked_tail(tail))

    def _prefetched(self, source: Any, ahead: int, tail: str) -> Generator[tuple[Any, Any], None, None]:
        on_the_way = collections.deque[tuple[Any, Future[Any]]]()
        try:
            while True:
                for batch in itertools.islice(source, ahead + 1 - len(on_the_way)):
                    on_the_way.append((batch, self._background.submit(self._batch, self._pairs(batch[0], batch[1]))))
                if not on_the_way:
                    return
                batch, future = on_the_way.popleft()
                yield batch, self._wait(future, tail)
        finally:
            for _, future in on_the_way:
                future.cancel()

    def draw(
        self, prompts: Sequence[Ids], sampling: Sampling, seed: int, vocabulary: int | None = None, **more: Any
    ) -> list[Tensor]:
        """One continuation of each prompt, with its end token, as in `sampling.draw`; prompt i has the seed seed + i.

        SGLang heeds seeds only with its --enable-deterministic-inference. Beside a top_k, its top_p is a share of the
        whole distribution, not of the k.

        vocabulary: ids from here on are not drawn; None: all may be. more: further sampling parameters of the server.

        Raises:
            ValueError: beams, or ids outside the vocabulary.
        """
        if sampling.beams:
            raise ValueError("a server is asked for samples, not for beams")
        pairs = self._pairs(prompts, [()] * len(prompts))
        drawn = self.vocabulary if vocabulary is None else min(vocabulary, self.vocabulary)

        async def all_of_them() -> list[Tensor]:
            await self._open()
            rows = (await self._known()).get("vocabulary", self.vocabulary)
            how = {"logit_bias": {i: -100 for i in range(drawn, rows)}, **more} if drawn < rows else more
            return await all_of(
                (self._drawn, prompt, sampling, seed + i, i, drawn, how) for i, (prompt, _) in enumerate(pairs)
            )

        return self._background.run(all_of_them)

    def check(self) -> None:
        """Asks what the model is, and two short sequences, as the first `targets` would: before anything is begun."""

        async def first() -> None:
            await self._open()
            await self._try()

        self._background.run(first)

    def tokenized(self, text: str) -> list[int] | None:
        """A text's token ids by the server's own tokenizer (POST /tokenize); None: it has no such answer."""

        async def once() -> Any:
            try:
                asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
                return (await self.connection.post("/tokenize", asked)).get("tokens")
            except (EndpointError, Misfit):  # with whatever status it says so
                return None

        async def asked() -> Any:
            await self._known()
            return await self.connection.until_it_fits("a text's tokens", once)

        return self._background.run(asked)

    def close(self) -> None:
        """Cancels all requests; whoever waits for them gets an error. Answers that have come are in the store."""
        self._background.close()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _wait(self, future: Future[Any], tail: str) -> Any:
        found = self._background.result(future)
        return found._replace(tail=tail) if isinstance(found, TopK) else found

    def _pairs(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Pair]:
        pairs = []
        for number, pair in enumerate(paired(prompts, continuations)):
            try:
                prompt, continuation = (
                    tuple(map(operator.index, p.tolist() if isinstance(p, Tensor) else p)) for p in pair
                )
            except TypeError as error:
                raise ValueError(f"sequence {number} has ids that are no integers: {error}") from error
            if not prompt:
                raise ValueError(f"sequence {number} has an empty prompt: nothing predicts its first token")
            if not all(0 <= i < self.vocabulary for i in (*prompt, *continuation)):
                raise ValueError(f"sequence {number} has ids outside [0, {self.vocabulary})")
            pairs.append((prompt, continuation))
        return pairs

    # Batches, on the loop

    async def _batch(self, pairs: list[Pair]) -> TopK | Hidden:
        """The rows of all pairs. With a store, what it lacks is asked for and written, and all are read from it."""
        await self._open()
        pairs = [pair for pair in pairs if pair[1]]
        if self.store is None or not pairs:
            rows = await self._paid(list(dict.fromkeys(pairs)))
            return self._together([rows[pair] for pair in pairs])
        for _ in range(READS):
            if self.store.missing(pairs):  # else nothing is written: it may be on a disk that one can only read
                async with self._claimed(self.store, pairs) as missing:
                    await self._paid(missing)
            try:
                return self.store.targets([p for p, _ in pairs], [c for _, c in pairs])
            except MissingTargets as error:  # a shard was found damaged when it was read: its sequences are asked again
                damage = error
        raise OSError(errno.EIO, f"the disk of {self.store.folder} damages what is written: {READS} times in a row "
                      f"sequences could not be read back ({damage})") from damage  # fmt: skip

    def _together(self, rows: list[Any]) -> TopK | Hidden:
        if self.head is not None:
            return Hidden(torch.cat([self.head.weight.detach()[:0], *rows]), self.head)
        rows = [TopK(torch.zeros(0, self.k, dtype=torch.long), torch.zeros(0, self.k)), *rows]
        return TopK(torch.cat([row.ids for row in rows]), torch.cat([row.log_probs for row in rows]))

    async def _paid(self, pairs: list[Pair]) -> dict[Pair, Any]:
        """Asks the server. Answers that have come are stored even if others fail, or the batch is cancelled."""
        made: dict[Pair, Any] = {}

        async def one(number: int, pair: Pair) -> EndpointError | None:
            try:
                made[pair] = await self._asked(pair, f"sequence {number}")
            except EndpointError as error:
                return error
            return None

        if pairs:
            await self._try()
        try:
            failed = await all_of((one, number, pair) for number, pair in enumerate(pairs))
        finally:
            if self.store is not None and made:
                with self.store.writer() as writer:
                    for pair, rows in made.items():
                        writer.add(*pair, rows)
        for error in filter(None, failed):
            raise error
        return made

    @contextlib.asynccontextmanager
    async def _claimed(self, store: TeacherStore, pairs: list[Pair]) -> AsyncIterator[list[Pair]]:
        """The pairs that the store lacks, for which meanwhile no other batch asks, of this or another process.

        A byte of the store's lock file is locked for each pair. A batch locks its bytes in order, and while it has some
        it waits only for higher ones, so no two batches wait for each other. The locks belong to the open file, so the
        system frees those of a process that dies.
        """
        claims = os.open(store.folder / "asking.lock", os.O_RDWR | os.O_CREAT)
        try:
            for byte in sorted({int.from_bytes(key_of(pair)[:7], "big") for pair in pairs}):
                while not lock(claims, byte, 1):
                    await asyncio.sleep(0.05)
            store.refresh()
            yield list(dict.fromkeys(pairs[i] for i in store.missing(pairs)))
        finally:
            unlock(claims)  # closing is not enough where a forked process has the file, too
            os.close(claims)

    # One teacher

    async def _known(self) -> dict[str, Any]:
        """What the server says of its model: the name and, where it does, what `_served` takes of the list."""
        if self._about is None:
            self._about = await self.connection.until_it_fits("the list of models", self._served)
            self.model = self._about["id"]
        return self._about

    async def _open(self) -> None:
        """Asks what the model is, makes the store where that is left to it, and compares the two."""
        async with self._opening:
            if self._opened:
                return
            about = await self._known()
            rows = about.get("vocabulary", self.vocabulary)
            if rows < self.vocabulary:
                raise ValueError(f"{self.model} at {self.url} has, it says, a vocabulary of {rows}, less than "
                                 f"vocabulary={self.vocabulary}")  # fmt: skip
            self._lists = self._lists._replace(padded=self._lists.padded or rows > self.vocabulary)
            key: dict[str, Any] = {n: about[n] for n in ("fingerprint", "tokenizer") if n in about}
            key["teacher"] = self.model
            if self.head is not None:
                key["layer"] = self.layer
            if self.store is not None:  # a local teacher's has the fingerprint itself as its teacher
                known = {n: v for n, v in self.store.key.items()
                         if n in key and (n, v) != ("teacher", about.get("fingerprint"))}  # fmt: skip
                check_same(f"{self.store.folder} holds other targets", known, {name: key[name] for name in known})
            elif self._folder is not None:
                self.store = TeacherStore.create(self._folder, key=key, **self._kept)
            if self.store is not None and (pair := _short(self.store)):
                await self._compare(self.store, pair)
            self._opened = True

    async def _compare(self, store: TeacherStore, pair: Pair) -> None:
        """Asks for a stored sequence again; the server must give what is stored."""
        asked, kept = await self._asked(pair, "a stored sequence"), store.targets([pair[0]], [pair[1]])
        if isinstance(kept, Hidden):
            projection = store._head_tensors().get("projection")
            asked = asked if projection is None else asked.to(projection) @ projection
        if not _agree(kept if isinstance(kept, TopK) else kept.states, asked):
            raise ValueError(f"the store {store.folder} (of {store.key}) and the model {self.model} now served at "
                             f"{self.url} disagree on a stored sequence, {_shown(pair)}: they are not of one "
                             "teacher; take another folder for this one")  # fmt: skip

    async def _try(self) -> None:
        """Tries two short sequences, one of them twice: the same must have the same rows, and another others."""
        async with self._opening:
            if self._tried:
                return
            first = tuple(i * (min(self.vocabulary, 200) - 1) // 5 for i in range(5))  # a student's last may be padding
            short = [((a,), tuple(more)) for a, *more in (first, first[::-1], first)]
            one, other, again = await all_of((self._asked, pair, "a short sequence") for pair in short)
            if not _agree(one, again):
                raise EndpointError(f"the server at {self.url} answers the same sequence with other rows each time")
            if first != first[::-1] and _agree(one, other, 1e-6):
                raise EndpointError(f"the server at {self.url} answers other sequences with the same rows")
            if self.head is not None:
                await self._check_states(*short[0], one, self.head)
            self._tried = True

    async def _check_states(self, prompt: tuple[int, ...], more: tuple[int, ...], states: Tensor, head: Head) -> None:
        """Raises EndpointError where states through the head are not what the server itself says of a sequence."""
        ids, lists = [*prompt, *more], self._lists._replace(k=LISTED, short_rows=True, padded=True)
        said = await self.connection.until_it_fits(
            "a short sequence's log-probabilities", lambda: self._listed(ids, len(prompt), lists)
        )
        with torch.no_grad():
            rows = capped(products.logits(states, head).float(), head.softcap).log_softmax(-1)
        apart = nats_apart(said.log_probs, rows.cpu().gather(1, said.ids.clamp_min(0)))
        if not apart <= NATS:
            raise EndpointError(f"the server's states through norm and head are off by {apart:.3g} nats on average "
                                f"from its own log-probabilities, more than {NATS}: layer={self.layer} must be the "
                                "model's last, norm and head its own")  # fmt: skip

    # One request

    def _asked(self, pair: Pair, what: str) -> Awaitable[Any]:
        """A pair's rows: `TopK` (L, K), or states (L, D)."""
        ids, begin = [*pair[0], *pair[1]], len(pair[0])
        once = self._of_sglang if self.kind == "sglang" else self._of_vllm
        return self.connection.until_it_fits(
            f"{what} ({_shown(pair)})", lambda: once(ids, begin), len(ids), SPARE[self.kind]
        )

    async def _generate(self, ids: list[int], new: int, how: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Sends token ids, to be continued by up to `new` more. Returns SGLang's reply, or vLLM's only choice."""
        if self.kind == "sglang":
            body = {"input_ids": ids, "sampling_params": {**how, "max_new_tokens": new}, **more}
            if "parent" in (self._about or {}):
                body["lora_path"] = self.model  # without it an adapter's base would answer
            found = await self.connection.post("/generate", body)
        else:
            body = {"model": self.model, "prompt": ids, "max_tokens": new, "return_token_ids": True, **how, **more}
            reply = await self.connection.post("/v1/completions", body)
            with form("it is no completion"):
                (choice,) = reply["choices"]
                found = {**choice, "kv_transfer_params": reply.get("kv_transfer_params")}
        if (reason := _end_of(found)) in ("abort", "error"):
            raise Misfit(f"the server has not finished it, but ended by {reason!r}")
        return found

    async def _of_sglang(self, ids: list[int], begin: int) -> TopK:
        reply = await self._generate(
            ids, 0, {"temperature": 1.0}, return_logprob=True, logprob_start_len=begin - 1, top_logprobs_num=self.k,
            return_text_in_logprobs=False,
        )  # fmt: skip
        with form("it is no reply of SGLang's"):
            if not reply["meta_info"].get("input_top_logprobs"):
                raise EndpointError("the server ignores top_logprobs_num: SGLang's own /generate is needed")
            return sglang_rows(reply["meta_info"], ids, begin, self._lists)

    async def _of_vllm(self, ids: list[int], begin: int) -> TopK | Tensor:
        if self.head is None:
            return await self._listed(ids, begin, self._lists)
        choice = await self._generate(ids, 1, {"temperature": 1.0})
        if (files := self._files(choice)) is None:
            raise EndpointError("the server gives no hidden_states_path: is it started with extract_hidden_states?")
        return await self._states(*files, ids, begin)

    async def _listed(self, ids: list[int], begin: int, lists: Lists) -> TopK:
        choice = await self._generate(ids, 1, {"temperature": 1.0}, prompt_logprobs=lists.k)
        await self._discard_states(choice)
        if choice.get("prompt_logprobs") is None:
            raise EndpointError("the server ignores prompt_logprobs: vLLM's completions are needed")
        return vllm_rows(choice, ids, begin, lists)

    def _files(self, choice: dict[str, Any]) -> tuple[Path, Path] | None:
        """Where the server writes a reply's hidden states, and the file that it holds a lock on until it has, unless
        use_synchronization_lock is false; None: it writes none.
        """
        if self.states_folder is None or not isinstance(made := choice["kv_transfer_params"], dict):
            return None
        path = Path(str(made.get("hidden_states_path")))
        if not path.resolve().is_relative_to(self.states_folder.resolve()):
            raise EndpointError(f"the server's hidden_states_path {path} is outside of {self.states_folder}")
        return path, Path(f"{path}.lock")

    async def _discard_states(self, choice: dict[str, Any]) -> None:
        """Removes the states of a reply, if it has any, which nobody reads."""
        if (files := self._files(choice)) is not None:
            while is_locked(files[1]):
                await asyncio.sleep(0.005)
            _remove(*files)

    async def _states(self, path: Path, held: Path, ids: list[int], begin: int) -> Tensor:
        """The normed states that predict the tokens from `begin` on. The file is removed when it has been read."""
        from safetensors.torch import load_file

        assert self.head is not None and self.norm is not None
        weight = self.head.weight
        while not path.exists() or is_locked(held):
            await asyncio.sleep(0.005)
        try:
            found = load_file(path)
        except Exception as error:  # safetensors' own has no public base
            raise Misfit(f"{path} cannot be read: {error}") from error
        finally:
            _remove(path, held)
        states, read = found.get("hidden_states"), found.get("token_ids")
        if states is None or read is None or read.tolist() != ids or states.ndim != 3 or len(states) != len(ids):
            raise Misfit(f"{path} does not have the states of the {len(ids)} tokens sent")
        layers, features = states.shape[1:]
        if features != weight.shape[1] or not -layers <= self.layer < layers:
            raise EndpointError(f"the server's states have {features} features, the head {weight.shape[1]}, and "
                                f"{layers} layers, of which layer={self.layer} was asked for")  # fmt: skip
        with torch.no_grad():
            normed = self.norm(states[begin - 1 : -1, self.layer].to(weight))
        if not normed.isfinite().all():
            raise Misfit(f"{path} has states that are not finite")
        return normed

    async def _drawn(
        self, prompt: tuple[int, ...], sampling: Sampling, seed: int, number: int, vocabulary: int, more: dict[str, Any]
    ) -> Tensor:
        ids, new = list(prompt), sampling.max_new_tokens
        how: dict[str, Any] = {  # whatever the generation configuration at the server says
            "temperature": sampling.temperature, "top_k": sampling.top_k or -1, "top_p": sampling.top_p, "min_p": 0.0,
            "repetition_penalty": 1.0, **more,
        }  # fmt: skip
        of_seed, of_ids = ("sampling_seed", "output_ids") if self.kind == "sglang" else ("seed", "token_ids")

        async def once() -> Tensor:
            reply = await self._generate(ids, new, {**how, of_seed: seed})
            await self._discard_states(reply)
            if (made := reply.get(of_ids)) is None:
                raise EndpointError(f"the server gives no {of_ids}: a newer one is needed, vLLM or SGLang")
            if not isinstance(made, list) or not 0 < len(made) <= new:
                raise Misfit(f"it has no list of 1 to {new} token ids")
            if not all(isinstance(i, int) and 0 <= i < vocabulary for i in made):
                raise Misfit(f"it has ids outside [0, {vocabulary})")
            if len(made) < new and _end_of(reply) == "length":  # as it would be again
                raise EndpointError(f"it was cut after {len(made)} of {new} tokens: the server's context is too short")
            if reply.get("prompt_token_ids") not in (None, ids):
                raise Misfit(f"it continues another prompt than that of {len(ids)} tokens")
            if (read := (reply.get("meta_info") or {}).get("prompt_tokens")) not in (None, len(ids)):
                raise Misfit(f"it continues a prompt of {read} tokens, not of {len(ids)}")
            return torch.tensor(made)

        return await self.connection.until_it_fits(f"prompt {number} of {len(ids)} tokens", once)

    async def _served(self) -> dict[str, Any]:
        try:
            listed = (await self.connection.post("/v1/models")).get("data")
        except EndpointError as error:
            if self.model is None or error.status not in (404, 405):
                raise
            listed = []  # not every server that speaks a protocol has the list
        models = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        found = [m for m in models if self.model in (None, m.get("id"))]
        if self.model is None and (len(found) != 1 or not isinstance(found[0].get("id"), str)):
            raise EndpointError("model must be given, to a command as --served_model_name: the server has "
                                f"{[m.get('id') for m in models]}")  # fmt: skip
        if self.kind == "sglang" and models and not found:  # whose /generate takes no name, so refuses none
            raise EndpointError(f"the server has no model {self.model!r}, but {[m.get('id') for m in models]}")
        kinds = {"id": str, "fingerprint": str, "vocabulary": int, "tokenizer": str, "parent": str}
        about = found[0] if found else {"id": self.model}
        return {name: about[name] for name, kind in kinds.items() if type(about.get(name)) is kind}  # true is no 1


def _check_kind(kind: str, vocabulary: int, of_states: dict[str, Any], layer: int, of_lists: dict[str, bool]) -> None:
    """Raises ValueError or TypeError for arguments that a kind lacks or makes nothing of; of_lists: which are given."""
    head = of_states["head"]
    if wrong := [name for name, value in of_states.items() if (value is None) == (kind == "vllm_hidden")]:
        raise ValueError(f"{kind} {'needs' if kind == 'vllm_hidden' else 'takes no'} {' and '.join(wrong)}: these "
                         "are for a connector's states, files without the teacher's output norm")  # fmt: skip
    other = {"layer": layer != -1} if head is None else of_lists
    if ignored := [name for name, given in other.items() if given]:
        raise ValueError(f"{kind} makes nothing of {' and '.join(ignored)}")
    if head is not None and not isinstance(head, Head):
        raise TypeError(f"head must be a Head, not {type(head).__name__}")
    if head is not None and head.weight.shape[0] != vocabulary:
        raise ValueError(f"the head {tuple(head.weight.shape)} must have vocabulary={vocabulary} rows")


def nats_apart(said: Tensor, here: Tensor) -> float:
    """By how much log-probabilities differ from others' on average, weighted by what the others say."""
    weight = said.exp()
    return float((weight * (here - said).abs().masked_fill(weight == 0, 0)).sum() / weight.sum())


def _end_of(reply: dict[str, Any]) -> Any:
    """Why a reply ended: vLLM's word, or SGLang's."""
    reason = reply.get("finish_reason", (reply.get("meta_info") or {}).get("finish_reason"))
    return reason.get("type") if isinstance(reason, dict) else reason


def _shown(pair: Pair) -> str:
    prompt, continuation = pair
    begin = " ".join(map(str, prompt[:8])) + (" …" if len(prompt) > 8 else "")
    return f"prompt of {len(prompt)} tokens {begin}, continuation of {len(continuation)}"


def _short(store: TeacherStore) -> Pair | None:
    """A sequence of the smallest intact shard: the shortest one that has enough rows, else the one with most rows."""
    for shard in sorted(store._shards.values(), key=lambda s: s.bytes):
        if (kept := store._tensors(shard)) is not None:
            at = kept["places"].tolist()
            parts = [part for part in zip(at[:-1:2], at[1::2], at[2::2], strict=True) if part[0] < part[1] < part[2]]
            if parts:
                b, m, e = min(parts, key=lambda p: (max(0, ENOUGH - (p[2] - p[1])), p[2] - p[0]))
                return tuple(kept["tokens"][b:m].tolist()), tuple(kept["tokens"][m:e].tolist())
    return None


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _agree(one: Any, other: Any, within: float = AGREES) -> bool:
    """Whether states, relative to their norm, or lists are the same up to rounding.

    Two lists agree if no probability differs by more than `within` (an id that a list lacks is at most as probable in
    it as its last one), if those of the shared ids differ by no more than 2·`within` of themselves on average, and if
    most of the mass is on shared ids.
    """
    if isinstance(one, Tensor):
        return bool((one - other).float().norm() <= within * one.float().norm())
    for a, b in ((one, other), (other, one)):
        p, q = (x.log_probs.float().exp().masked_fill(x.ids < 0, 0) for x in (a, b))
        same = (a.ids[:, :, None] == b.ids[:, None, :]) & (a.ids >= 0)[:, :, None]
        least = q.masked_fill(b.ids < 0, torch.inf).amin(1, keepdim=True)
        shared, there = same.any(2), (same * q[:, None, :]).sum(2)
        apart = torch.where(shared, (p - there).abs(), p - least)
        if (apart > within).any() or (p * shared).sum() < 0.5 * p.sum():
            return False
        if (apart * shared).sum() > 2 * within * p.sum():
            return False
    return True
