"""A served teacher against the model behind the server, through every fault that a server and a network have."""

import asyncio
import contextlib
import itertools
import os
import random
import re
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fdistill_kernels.sparse import TopK
from fdistill_kernels.teachers import shard as shard_module
from fdistill_kernels.teachers.connection import LONGEST_MESSAGE, EndpointError, _pause, _seconds, message_of
from fdistill_kernels.teachers.endpoint import READS, Endpoint, _agree
from fdistill_kernels.teachers.store import TeacherStore
from fdistill_kernels.values import Head, Hidden

from . import processes
from .conftest import WHOLE
from .openai_server import BROKEN, REFUSED, Model, Server, _head

V, K, PROBES = 40, 8, 3
PROBE = [(0, 7, 15, 23, 31), (31, 23, 15, 7, 0)]

#: Of each protocol; a sample of them unless all is asked for.
FAULTS = 500 if WHOLE else 170


def sequences(count, seed=0, longest=6):
    draw = random.Random(seed)
    made = [[[draw.randrange(V) for _ in range(draw.randint(1, longest))] for _ in range(2)] for _ in range(count)]
    return [p for p, _ in made], [c for _, c in made]


def endpoint(server, **more):
    lists = {} if more.get("kind") == "vllm_hidden" else {"k": K}
    return Endpoint(server.url, **{"vocabulary": V, "first_wait": 0.005, **lists, **more})


def expected(model, prompts, continuations):
    return torch.cat([model.log_probs([*p, *c])[len(p) - 1 : -1] for p, c in zip(prompts, continuations, strict=True)])


def check(found, model, prompts, continuations, atol=1e-5):
    whole = expected(model, prompts, continuations)
    assert isinstance(found, TopK) and found.ids.shape == (len(whole), K)
    torch.testing.assert_close(found.log_probs.float(), whole.topk(K).values, atol=atol, rtol=0)
    torch.testing.assert_close(found.log_probs.float(), whole.gather(1, found.ids), atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_models_own_log_probs(kind):
    prompts, continuations = sequences(20)
    with Server() as server, endpoint(server, kind=kind, vocabulary=np.int64(V), k=np.int64(K)) as teacher:
        check(teacher.targets(prompts[:2], continuations[:2]), server.model, prompts[:2], continuations[:2])
    with Server() as server, endpoint(server, kind=kind, model="tiny", api_key="secret") as teacher:
        found = teacher.targets(prompts, continuations, tail="uniform")
        check(found, server.model, prompts, continuations)
        assert found.tail == "uniform" and found.ids.dtype == torch.int64
        assert all(h["Authorization"] == "Bearer secret" for h in server.headers)
        if kind == "vllm":
            assert all(
                b["max_tokens"] == 1 and b["prompt_logprobs"] == K and b["model"] == "tiny" for b in server.bodies
            )
        else:
            assert server.bodies[-1]["logprob_start_len"] == len(prompts[-1]) - 1 or len(server.bodies) == 23
            assert all(b["top_logprobs_num"] == K and b["return_logprob"] for b in server.bodies)
        assert (
            sum(server.asked.values()) == len({(*p, *c) for p, c in zip(prompts, continuations, strict=True)}) + PROBES
        )


def test_tensors_empty_continuations_and_a_whole_vocabulary():
    with Server() as server, endpoint(server, k=10**6) as teacher:
        found = teacher.targets([torch.tensor([1, 2]), [3]], [torch.tensor([4, 5]), []])
        assert found.ids.shape == (2, V)
        torch.testing.assert_close(found.log_probs.exp().sum(1), torch.ones(2))
        assert teacher.targets([[3]], [[]]).ids.shape == (0, V)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_samples(kind):
    from fdistill_kernels.sequence.sampling import Sampling  # not above: processes that share a folder do without

    prompts = [[1, 2, 3], [4]]
    with Server() as server, endpoint(server, kind=kind) as teacher:
        made = teacher.draw(prompts, Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, top_k=3), seed=7)
        assert [m.tolist() for m in made] == [server.sample(p, 5, 7 + i) for i, p in enumerate(prompts)]
        how = server.bodies[0].get("sampling_params", server.bodies[0])
        assert (how["temperature"], how["top_p"], how["top_k"]) == (0.7, 0.9, 3)
        with pytest.raises(ValueError, match="beams"):
            teacher.draw(prompts, Sampling(beams=2), 0)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_thousand_faults(kind, tmp_path):
    """Nothing is lost, doubled, or wrong."""
    draw, left = random.Random(kind), [FAULTS]
    names = [n for n in (*BROKEN, *REFUSED) if n != "no_rows"]

    def faults():
        while True:
            left[0] -= (bad := left[0] > 0 and draw.random() < 0.5)
            yield draw.choice(names) if bad else None

    prompts, continuations = sequences(600, seed=1)
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=V, key={"teacher": "tiny"}, k=K)
    with Server(faults=faults(), stall=1.2) as server:
        with endpoint(
            server, kind=kind, store=store, timeout=1.0, retries=60, concurrency=12, first_wait=0.001
        ) as teacher:
            for begin in range(0, 600, 150):
                some = prompts[begin : begin + 150], continuations[begin : begin + 150]
                check(teacher.targets(*some), server.model, *some, atol=0.01)
        assert sum(server.given.values()) == FAULTS and {n for n, c in server.given.items() if c} == set(names)
        unique = {(tuple(p), tuple(c)) for p, c in zip(prompts, continuations, strict=True)}
        opened = TeacherStore(tmp_path, validate="full")
        assert len(opened) == len(unique) and not opened.damaged
        rows = sum(len(c) for _, c in unique)
        assert opened.summary()["tokens"] == rows and sum(s.ends[-1] for s in opened._shards.values()) == rows
        # a good answer is asked for again only where a busy machine took longer than the timeout to give it
        late = sum(server.answered.values()) - len(unique) - PROBES
        assert 0 <= late <= 40, late
        before = sum(server.asked.values())
        with endpoint(server, kind=kind, model="tiny", store=tmp_path) as again:
            check(again.targets(prompts, continuations), server.model, prompts, continuations, atol=0.01)
        assert (
            sum(server.asked.values()) == before + 1
        )  # a stored one, to see that the server is of the store's teacher


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(("fault", "says"), [
    ("500", "out of memory"), ("429", "slow down"), ("close", "connection broke"), ("half", "connection broke"),
    ("stall", "no whole reply"), ("json", "no JSON"), ("empty", "no JSON"), ("list", "no JSON object"),
    ("short", "--max-logprobs 8"), ("outside", r"outside \[0, 40\)"), ("nan", "NaN"), ("positive", "positive"),
    ("length", "positions"), ("longer", "positions|other token ids"), ("other_ids", "sent"),
])  # fmt: skip
def test_what_never_fits_is_given_up_by_name(kind, fault, says):
    """The probe has its rows first; then every try of one sequence fails."""
    faults = itertools.chain([None] * PROBES, itertools.repeat(fault))
    with (
        Server(faults=faults, stall=0.2) as server,
        endpoint(server, kind=kind, retries=2, timeout=0.1 if fault == "stall" else 10, first_wait=0.001) as t,
    ):
        with pytest.raises(EndpointError, match=says) as error:
            t.targets([[5, 6, 7]], [[8, 9]])
        assert "prompt of 3 tokens 5 6 7, continuation of 2" in str(error.value) and "3 tries" in str(error.value)
        assert server.asked[5, 6, 7, 8, 9] == 3


@pytest.mark.parametrize(("kind", "fault", "says"), [
    ("vllm", "no_token", "next token"), ("sglang", "no_token", "other token ids"), ("sglang", "twice", "twice"),
    ("vllm", "twice", "7 ids of the 8"),
])  # fmt: skip
def test_missing_tokens_and_ids_given_twice(kind, fault, says):
    faults = itertools.chain([None] * PROBES, itertools.repeat(fault))
    with Server(faults=faults) as server, endpoint(server, kind=kind, retries=1, first_wait=0.001) as t:
        token = int(server.model.log_probs([5])[0].argmax())  # of the k: it does not make up for a missing one
        with pytest.raises(EndpointError, match=says):
            t.targets([[5]], [[token]])


def test_logits_are_not_taken_for_log_probs():
    model = Model()
    model.log_probs = lambda ids: model.norm(model.hidden(ids)) @ model.weight.T - 5
    refused = pytest.raises(EndpointError, match=r"positive|mass above 1")
    with Server(model) as server, endpoint(server, retries=0) as teacher, refused:
        teacher.targets([[1]], [[2]])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_servers_own_limit(kind):
    with Server(limit=5) as server:
        with (
            endpoint(server, kind=kind, retries=0) as teacher,
            pytest.raises(EndpointError, match=r"[56] ids of the 8"),
        ):
            teacher.targets([[1]], [[2]])
        with endpoint(server, kind=kind, short_rows=True) as teacher:
            found = teacher.targets([[1, 2]], [[3, 4, 5]])
            whole = expected(server.model, [[1, 2]], [[3, 4, 5]])
            assert (
                found.ids.shape == (3, K) and ((found.ids >= 0).sum(1) >= 5).all() and (found.ids[:, -2:] == -1).all()
            )
            real = found.ids >= 0
            torch.testing.assert_close(found.log_probs[real], whole.gather(1, found.ids.clamp_min(0))[real])
            assert (found.log_probs[~real] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_ignores_it_is_refused_at_once(kind):
    with Server(faults=itertools.repeat("no_rows")) as server, endpoint(server, kind=kind) as teacher:
        with pytest.raises(EndpointError, match=r"ignores (prompt_logprobs|top_logprobs_num)"):
            teacher.targets([[1]], [[2]])
        assert sum(server.asked.values()) <= PROBES


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_gives_no_ids_is_refused_at_once(kind, monkeypatch):
    from fdistill_kernels.sequence.sampling import Sampling

    monkeypatch.setattr(Server, "sample", lambda *_: None)
    with Server(echo=False) as server, endpoint(server, kind=kind) as teacher:
        with pytest.raises(EndpointError, match=r"gives no (token_ids|output_ids): a newer one is needed"):
            teacher.draw([[1]], Sampling(max_new_tokens=4), 0)
        assert sum(server.asked.values()) == 1


def test_a_server_that_answers_at_random_or_always_the_same():
    model = Model()
    fine, calls = model.log_probs, itertools.count()
    model.log_probs = lambda ids: fine(ids).roll(next(calls), 1)
    with (
        Server(model) as server,
        endpoint(server) as teacher,
        pytest.raises(EndpointError, match="other rows each time"),
    ):
        teacher.targets([[1]], [[2]])
    model.log_probs = lambda ids: fine([3] * len(ids))
    with Server(model) as server, endpoint(server) as teacher, pytest.raises(EndpointError, match="with the same rows"):
        teacher.targets([[1]], [[2]])


def test_refusals_fail_at_once_with_the_servers_words():
    with Server(faults=itertools.chain([None] * PROBES, ["400"])) as server, endpoint(server) as teacher:
        with pytest.raises(EndpointError, match=r"status 400: the prompt is too long for me.*"):
            teacher.targets([[1]], [[2]])
        assert server.asked[1, 2] == 1


def test_a_log_probability_of_null_is_asked_for_again():
    """As JSON writers have NaN."""

    class Nulls(Server):
        def vllm(self, body, ids, fault):
            reply = super().vllm(body, ids, None)
            if fault == "null":
                for entry in reply["choices"][0]["prompt_logprobs"][-1].values():
                    entry["logprob"] = None
            return reply

    faults = itertools.chain([None] * PROBES, ["null"], itertools.repeat(None))
    with Nulls(faults=faults) as server, endpoint(server) as teacher:
        assert teacher.targets([[1]], [[2]]).log_probs.isfinite().all()
        assert server.asked[1, 2] == 2


def test_an_error_does_not_show_a_whole_reply():
    reply = Mock(json=lambda: {"choices": ["x" * 10**6]})
    assert len(message_of(reply)) == LONGEST_MESSAGE


def test_what_a_failed_batch_paid_for_is_kept(tmp_path):
    prompts, continuations = [[1], [2], [3], [4]], [[5], [6], [7], [8]]
    faults = itertools.chain([None] * (PROBES + 2), ["400"], itertools.repeat(None))
    with Server(faults=faults) as server, endpoint(server, store=tmp_path, concurrency=1) as teacher:
        with pytest.raises(EndpointError, match="sequence 2"):
            teacher.targets(prompts, continuations)
        assert len(TeacherStore(tmp_path)) == 3
        check(teacher.targets(prompts, continuations), server.model, prompts, continuations, atol=0.01)
        assert server.asked[3, 7] == 2 and all(n == 1 for ids, n in server.asked.items() if ids not in (*PROBE, (3, 7)))


def test_retry_after_holds_for_all():
    with Server(faults=itertools.chain([None] * PROBES, ["429"], itertools.repeat(None))) as server:
        inner = server.broken
        server.broken = lambda handler, *more: inner(_After(handler, "0.5"), *more)
        with endpoint(server, concurrency=1) as teacher:
            teacher.targets([[1], [2], [3]], [[4], [5], [6]])
        pause = [b - a for a, b in itertools.pairwise(server.times)]
        assert pause[PROBES] >= 0.49 and max(pause[:PROBES] + pause[PROBES + 1 :]) < 0.4
        server.faults, server.broken = iter([*[None] * PROBES, "429"]), lambda h, *m: inner(_After(h, "3600"), *m)
        with endpoint(server, timeout=5) as teacher, pytest.raises(EndpointError, match="asks to wait 3600 s"):
            teacher.targets([[1]], [[2]])
    assert _seconds("Thu, 01 Jan 1970 00:00:00 GMT") == 0 and _seconds("soon") == 0 and _seconds(None) == 0
    assert 3590 < _seconds(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))) <= 3600


class _After:
    """A handler whose replies say another Retry-After."""

    def __init__(self, handler, after):
        self._handler, self._after = handler, after

    def __getattr__(self, name):
        return getattr(self._handler, name)

    def send_header(self, name, value):
        self._handler.send_header(name, self._after if name == "Retry-After" else value)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_concurrency_is_bounded_and_used(concurrency):
    prompts, continuations = sequences(3 * concurrency, seed=2)
    with Server(delay=0.1) as server, endpoint(server, concurrency=concurrency) as teacher:
        teacher.targets(prompts, continuations)
        assert server.most == concurrency


def test_prefetch_overlaps_and_is_bounded():
    prompts, continuations = sequences(60, seed=3)
    taken = []

    def batches():
        for begin in range(0, 60, 10):
            taken.append(begin)
            yield prompts[begin : begin + 10], continuations[begin : begin + 10], f"of {begin}"

    with Server(delay=0.02) as server, endpoint(server, concurrency=10) as teacher:
        for number, (batch, found) in enumerate(teacher.prefetch(batches(), ahead=2)):
            check(found, server.model, *batch[:2])
            ahead = [(*p, *c) for p, c in zip(prompts, continuations, strict=True)][: 10 * (number + 3)]
            begin = time.monotonic()
            while not server.answered.keys() >= set(ahead) and time.monotonic() < begin + 10:
                time.sleep(0.01)  # the loss, meanwhile
            assert server.answered.keys() == {*ahead, *PROBE}
            assert batch[2] == f"of {10 * number}" and len(taken) == min(number + 3, 6)
        assert number == 5


def test_a_sequence_on_its_way_is_not_asked_again(tmp_path):
    prompts, continuations = sequences(5, seed=4)
    with Server(delay=0.02) as server, endpoint(server, store=tmp_path) as teacher:
        same = [(prompts * 2, continuations * 2)] * 3
        for (ps, cs), found in teacher.prefetch(same, ahead=2):
            check(found, server.model, ps, cs, atol=0.01)
        for p, c in zip(prompts, continuations, strict=True):
            assert server.asked[(*p, *c)] == 1


def test_a_prefetch_left_early_leaves_its_sequences_to_others(tmp_path):
    prompts, continuations = sequences(20, seed=5)
    with Server(delay=0.05) as server, endpoint(server, store=tmp_path, concurrency=2) as teacher:
        ahead = teacher.prefetch([(prompts[:2], continuations[:2]), (prompts, continuations)])
        next(ahead)
        ahead.close()
        check(teacher.targets(prompts, continuations), server.model, prompts, continuations, atol=0.01)
        assert len(TeacherStore(tmp_path)) == len({(*p, -1, *c) for p, c in zip(prompts, continuations, strict=True)})


def test_a_restart_with_a_store_asks_for_one_sequence_alone(tmp_path):
    prompts, continuations = sequences(10, seed=6)
    with Server() as server:
        with endpoint(server, store=tmp_path) as teacher:
            first = teacher.targets(prompts, continuations)
        asked = sum(server.asked.values())
        with endpoint(server, store=tmp_path) as teacher:
            again = teacher.targets(prompts, continuations)
        assert torch.equal(first.ids, again.ids) and torch.equal(first.log_probs, again.log_probs)
        assert sum(server.asked.values()) == asked + 1
        with endpoint(server, store=tmp_path, model="other") as teacher, pytest.raises(ValueError, match="other"):
            teacher.targets(prompts, continuations)
        server.reply_models = None  # a server without the list
        with endpoint(server, store=tmp_path, model="tiny") as teacher:
            assert torch.equal(teacher.targets(prompts, continuations).ids, first.ids) and teacher.tokenizer is None
        with endpoint(server) as teacher, pytest.raises(EndpointError, match="status 404"):
            teacher.targets(prompts, continuations)
    with endpoint(server, store=tmp_path, model="tiny", retries=0) as teacher, pytest.raises(EndpointError):
        teacher.targets(prompts, continuations)  # no server at all: nothing says whose the store is


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_a_store_of_another_teacher_under_the_same_name_is_refused(tmp_path, kind):
    prompts, continuations = sequences(10, seed=6)
    (tmp_path / "states").mkdir()
    model, other = Model(), Model(seed=1)
    how = {"store": tmp_path / "kept", "retries": 0}
    if kind == "hidden":
        how |= {"kind": "vllm_hidden", "head": head(model), "norm": model.norm, "states_folder": tmp_path / "states"}
    with Server(model, folder=tmp_path / "states") as server:
        with endpoint(server, **how) as teacher:
            teacher.targets(prompts, continuations)
        for change in ({}, {"store": TeacherStore(tmp_path / "kept")}):
            server.model = other
            with endpoint(server, **{**how, **change}) as teacher:
                for _ in range(2):  # nothing is missing, and the second call finds no way around it
                    with pytest.raises(
                        ValueError, match=r"kept.*tiny.*disagree on a stored sequence, prompt of"
                    ) as error:
                        teacher.targets(prompts, continuations)
                assert server.url in str(error.value)
            server.model = model
            with endpoint(server, **{**how, **change}) as teacher:
                teacher.targets(prompts, continuations)


def test_a_projected_store_is_compared_by_its_directions(tmp_path):
    model = Model()
    kept = TeacherStore.create(tmp_path / "kept", kind="hidden", vocabulary=V, key={}, head=head(model), rank=5, states="float32")  # fmt: skip
    how = {"kind": "vllm_hidden", "head": head(model), "norm": model.norm, "states_folder": tmp_path, "store": kept}
    with Server(model, folder=tmp_path) as server:
        for m in (model, model, Model(seed=1)):
            server.model = m
            refused = contextlib.nullcontext() if m is model else pytest.raises(ValueError, match="disagree")
            with endpoint(server, **how) as teacher, refused:
                assert teacher.targets([[1, 2]], [[3, 4, 5]]).states.shape == (3, 5)


def test_what_counts_as_the_same_rows():
    rows = Model().log_probs(range(30))
    lists = [TopK(t.indices, t.values) for t in (r.topk(K) for r in (rows, rows + 0.05 * torch.randn_like(rows)))]
    assert _agree(*lists) and not _agree(lists[0], lists[1], 1e-6)
    flat = [(0.3 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(i))).log_softmax(1) for i in range(2)]
    assert not _agree(*(TopK(t.indices, t.values) for t in (f.topk(K) for f in flat)))  # no probability is over 0.001
    moved = [
        TopK(torch.arange(4)[None], torch.tensor([p]).log()) for p in ([0.6, 0.2, 0.1, 0.1], [0.45, 0.35, 0.1, 0.1])
    ]
    assert not _agree(*moved)
    short = TopK(torch.tensor([[0, 1, -1, -1]]), torch.tensor([[0.6, 0.2, 0.0, 0.0]]).log())
    assert _agree(moved[0], short) and not _agree(moved[1], short)


def test_what_the_list_of_models_says(tmp_path):
    about = {"fingerprint": "0123456789abcdef", "vocabulary": V, "tokenizer": "f" * 16}
    with Server(**about) as server:
        with endpoint(server, store=tmp_path / "kept") as teacher:
            assert teacher.tokenizer == "f" * 16 and not server.asked
            teacher.targets([[1]], [[2]])
        assert TeacherStore(tmp_path / "kept").key == {
            "teacher": "tiny",
            **{n: about[n] for n in ("fingerprint", "tokenizer")},
        }
        asked = sum(server.asked.values())
        built = TeacherStore.create(
            tmp_path / "built", kind="top_k", vocabulary=V, k=K, key={"teacher": about["fingerprint"]}
        )
        with endpoint(server, store=built) as teacher:  # of a teacher that was at hand then, and is served now
            teacher.targets([[1]], [[2]])
        server.reply_models[0]["fingerprint"] = "another"
        for store in (tmp_path / "kept", TeacherStore(tmp_path / "kept"), built):
            with (
                endpoint(server, store=store) as teacher,
                pytest.raises(ValueError, match=r"0123456789abcdef.* is '(another|tiny)'"),
            ):
                teacher.targets([[1]], [[2]])
        server.reply_models[0]["vocabulary"] = V - 1
        with endpoint(server) as teacher, pytest.raises(ValueError, match="vocabulary of 39, less than vocabulary=40"):
            teacher.targets([[1]], [[2]])
        assert sum(server.asked.values()) == asked + PROBES + 1
    with Server() as server, endpoint(server) as teacher:
        assert teacher.tokenizer is None


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_ids_of_a_padded_head_are_left_out_where_that_is_said(kind):
    prompts, continuations = sequences(20)
    whole = expected(Model(60), prompts, continuations)
    listed = whole.topk(K).indices < V
    assert 0 < (~listed).sum() < listed.numel() / 2 and listed.any(1).all()
    with Server(Model(60)) as server:
        with (
            endpoint(server, kind=kind, retries=0) as teacher,
            pytest.raises(EndpointError, match=r"outside \[0, 40\).*padded=True"),
        ):
            teacher.targets(prompts, continuations)
        for more in ({"padded": True}, {}):
            server.reply_models[0] |= {} if more else {"vocabulary": 60}
            with endpoint(server, kind=kind, **more) as teacher:
                found = teacher.targets(prompts, continuations)
            real = found.ids >= 0
            # vLLM and SGLang give the token itself, too, which may take the place of one that is left out
            assert (real.sum(1) >= listed.sum(1)).all() and (found.ids < V).all() and found.ids.shape == listed.shape
            torch.testing.assert_close(found.log_probs[real], whole.gather(1, found.ids.clamp_min(0))[real])
            assert (found.log_probs[~real] == -torch.inf).all()


@pytest.mark.parametrize(
    ("kind", "context", "length", "says"),
    [
        ("vllm", 6, 6, r"maximum context length is 6 .*one token longer.*7 for this one"),
        ("sglang", 14, 8, r"maximum allowed length \(8 .*7 tokens longer.*15 for this one"),
        ("sglang", 14, 14, r"longer than the model's context length \(14 .*7 tokens longer.*21 for this one"),
    ],
)
def test_a_sequence_that_fills_the_servers_context(kind, context, length, says):
    with Server(context=context) as server, endpoint(server, kind=kind) as teacher:
        fits = list(range(5 if kind == "vllm" else 7))
        assert teacher.targets([fits[:3]], [fits[3:]]).ids.shape == (len(fits) - 3, K)
        long = list(range(length))
        with pytest.raises(EndpointError, match=says) as error:
            teacher.targets([long[:3]], [long[3:]])
        assert error.value.status == 400 and server.asked[tuple(long)] == 1


def test_sglang_is_asked_for_an_adapter_by_its_path():
    """Its /generate takes no model's name; without an adapter's, it answers as the base model."""
    from fdistill_kernels.sequence.sampling import Sampling

    with Server() as server:
        server.reply_models = [{"id": "base", "parent": None}, {"id": "tuned", "parent": "base"}]
        for model in ("base", "tuned"):
            server.bodies.clear()
            with endpoint(server, kind="sglang", model=model) as teacher:
                teacher.targets([[1]], [[2]])
                teacher.draw([[1]], Sampling(max_new_tokens=4), 0)
            assert {body.get("lora_path") for body in server.bodies} == {"tuned" if model == "tuned" else None}
        server.bodies.clear()
        with (
            endpoint(server, kind="sglang", model="nobody") as teacher,
            pytest.raises(EndpointError, match=r"no model 'nobody', but \['base', 'tuned'\]"),
        ):
            teacher.targets([[1]], [[2]])
        assert not server.bodies


def test_retries_are_logged_but_not_each(caplog):
    faults = itertools.chain([None] * PROBES, ["500"] * 5, itertools.repeat(None))
    with Server(faults=faults) as server, endpoint(server, concurrency=1, retries=9) as teacher:
        teacher.targets([[1, 2]], [[3]])
        (line,) = caplog.records
        assert line.name == "fdistill_kernels.endpoint" and line.levelname == "WARNING"
        assert (
            "sequence 0 (prompt of 2 tokens 1 2" in line.getMessage()
            and "out of memory; try 2 of 10 in 0.0" in line.getMessage()
        )
        teacher.connection._next_line, server.faults = 0.0, itertools.chain(["429"], itertools.repeat(None))
        teacher.targets([[1, 2]], [[4]])
        assert "slow down" in caplog.messages[1] and "4 other retries" in caplog.messages[1]


def test_a_store_of_other_settings_is_refused_before_anything_is_asked(tmp_path):
    def store(name, **more):
        return TeacherStore.create(tmp_path / name, **{"kind": "top_k", "vocabulary": V, "key": {}, "k": K, **more})

    model = Model()
    with Server(model, folder=tmp_path) as server:
        states = {"kind": "hidden", "k": None, "states": "float32", "head": head(model)}
        hidden = {"kind": "vllm_hidden", "head": head(model), "norm": model.norm, "states_folder": tmp_path}
        for number, (made, more, says) in enumerate((
            ({"k": 9}, {}, "k was 9 and is 8"), ({"vocabulary": 50}, {}, "vocabulary was 50 and is 40"),
            ({"temperature": 2.0}, {}, "temperature was 2.0"), (states, {}, "kind was 'hidden' and is 'top_k'"),
            ({**states, "rank": 3}, {}, "kind was 'hidden' and is 'top_k'"), ({}, hidden, "kind was 'top_k' and is 'hidden'"),
            ({**states, "head": Head(model.weight + 1)}, hidden, "head was"),
        )):  # fmt: skip
            with pytest.raises(ValueError, match=says):
                endpoint(server, store=store(f"{number}", **made), **more)
        for key, says in (({"teacher": "x"}, "teacher was 'x' and is 'tiny'"), ({"layer": 3}, "layer was 3 and is -1")):
            kept, how = (
                store(says[:5], **({"key": key} if "teacher" in key else {"key": key, **states})),
                {} if "teacher" in key else hidden,
            )
            with endpoint(server, store=kept, **how) as teacher, pytest.raises(ValueError, match=says):
                teacher.targets([[1]], [[2]])
        assert not server.asked


def test_what_is_damaged_is_asked_again(tmp_path):
    prompts, continuations = sequences(10, seed=7)
    with Server() as server, endpoint(server, store=tmp_path) as teacher:
        teacher.targets(prompts, continuations)
        (shard,) = (tmp_path / "shards").glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[-5] ^= 255
        shard.write_bytes(content)
        with endpoint(server, store=tmp_path) as other:
            check(other.targets(prompts, continuations), server.model, prompts, continuations, atol=0.01)
        assert all(n == 2 for ids, n in server.asked.items() if ids not in PROBE)  # none to compare with


def test_a_disk_that_damages_every_write_is_told(tmp_path, monkeypatch):
    write = shard_module.write_whole

    def damaging(path, content, **more):
        write(path, content[:-1] + bytes([content[-1] ^ 1]) if path.suffix == ".safetensors" else content, **more)

    monkeypatch.setattr(shard_module, "write_whole", damaging)
    with Server() as server, endpoint(server, store=tmp_path) as teacher:
        with pytest.raises(OSError, match=f"{tmp_path} damages what is written.*another checksum"):
            teacher.targets([[1]], [[2]])
        assert server.asked[1, 2] == READS


def test_endpoints_of_one_process_pay_once(tmp_path):
    prompts, continuations = sequences(30, seed=8)
    with Server(delay=0.02) as server, contextlib.ExitStack() as stack:
        asked = [stack.enter_context(endpoint(server, store=tmp_path)).ask(prompts, continuations) for _ in range(3)]
        for answer in asked:
            check(answer(), server.model, prompts, continuations, atol=0.01)
        again = [n - 1 for ids, n in server.asked.items() if ids not in PROBE]
        assert sum(again) <= 2  # one by each that begins when others have stored something


def _fill(url, folder, prompts, continuations, barrier):
    with Endpoint(url, vocabulary=V, k=K, store=folder, concurrency=4, model="tiny") as teacher:
        barrier.wait(60)
        for begin in range(0, len(prompts), 10):
            teacher.targets(prompts[begin : begin + 10], continuations[begin : begin + 10])


def test_processes_that_share_a_folder_pay_once(tmp_path):
    """Three, this one included, that ask for the same in other orders, and so wait for each other's."""
    prompts, continuations = sequences(60, seed=8)
    with Server(delay=0.01) as server:
        barrier = processes.context().Barrier(3)
        orders = [list(range(60))[::-1], random.Random(0).sample(range(60), 60)]
        workers = [processes.begin(_fill, server.url, str(tmp_path), [prompts[i] for i in order],
                                   [continuations[i] for i in order], barrier, output=os.devnull) for order in orders]  # fmt: skip
        _fill(server.url, str(tmp_path), prompts, continuations, barrier)
        for worker in workers:
            worker.join(60)
        assert [w.exitcode for w in workers] == [0, 0]
        again = [n - 1 for ids, n in server.asked.items() if ids not in PROBE]
        assert sum(again) <= 2  # one by each process that begins when others have stored something
        check(TeacherStore(tmp_path).targets(prompts, continuations), server.model, prompts, continuations, atol=0.01)


def test_closing_never_hangs():
    with Server(faults=itertools.repeat("stall"), stall=3.0) as server:
        teacher = endpoint(server, timeout=100.0)
        failed = []

        def ask():
            try:
                teacher.targets([[1]], [[2]])
            except EndpointError as error:
                failed.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.2)
        begin = time.monotonic()
        teacher.close()
        asking.join(5)
        teacher.close()
        assert time.monotonic() - begin < 1 and "closed" in failed[0] and not teacher._background._thread.is_alive()
        with pytest.raises(EndpointError, match="closed"):
            teacher.targets([[1]], [[2]])


def test_a_call_that_begins_while_another_thread_closes_is_told(monkeypatch):
    with Server() as server:
        teacher, real, failed = endpoint(server), asyncio.run_coroutine_threadsafe, []
        closing = threading.Thread(target=teacher.close)

        def slowly(work, loop):
            if not closing.ident:
                closing.start()
                time.sleep(0.2)  # in which nothing is closed
            return real(work, loop)

        def ask():
            try:
                teacher.targets([[1]], [[2]])
            except EndpointError as error:
                failed.append(str(error))

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", slowly)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(10)
        closing.join(10)
        assert not asking.is_alive() and not closing.is_alive() and "closed before it answered" in failed[0]


def test_a_body_that_cannot_be_decoded_is_asked_for_again():
    with Server(faults=itertools.chain([None] * PROBES, ["500"], itertools.repeat(None))) as server:

        def garbled(handler, *_):
            handler.send_response(200)
            handler.send_header("Content-Encoding", "gzip")
            handler.send_header("Content-Length", "4")
            handler.end_headers()
            handler.wfile.write(b"what")

        server.broken = garbled
        with endpoint(server, retries=1) as teacher:
            check(teacher.targets([[1]], [[2]]), server.model, [[1]], [[2]])
        assert server.asked[1, 2] == 2


def test_a_reply_that_trickles_is_timed_as_a_whole():
    with Server(faults=itertools.chain([None] * PROBES, itertools.repeat("500"))) as server:

        def trickle(handler, *_):
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            for _ in range(100):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.01)

        server.broken = trickle
        with endpoint(server, timeout=0.15, retries=1) as teacher, pytest.raises(EndpointError, match="no whole reply"):
            teacher.targets([[1]], [[2]])


def test_connections_are_not_used_up_by_replies_that_came_too_late():
    with Server() as server, endpoint(server, model="tiny", concurrency=2, retries=0) as teacher:
        for n in range(80):  # of one server and network, wherever in a request the time is over
            teacher.connection.timeout = 0.001 + 0.0002 * n
            with contextlib.suppress(EndpointError):
                teacher.targets([[1]], [[2, n % V]])
        teacher.connection.timeout = 5
        check(teacher.targets([[3]], [[4]]), server.model, [[3]], [[4]])
        assert not teacher.connection.client._transport._pool._requests


def test_a_batch_that_is_called_off_gives_its_connections_back():
    draw = random.Random(0)
    with Server() as server, endpoint(server, model="tiny", concurrency=4) as teacher:
        for n in range(250):  # wherever in a request it is
            pairs = teacher._pairs([[1]] * 4, [[2, n % V, n // V, i] for i in range(4)])
            future = teacher._background.submit(teacher._batch, pairs)
            time.sleep(draw.uniform(0, 0.02))
            future.cancel()
        check(teacher.targets([[3]], [[4]]), server.model, [[3]], [[4]])
        pool = teacher.connection.client._transport._pool
        assert not pool._requests and all(connection.is_idle() for connection in pool.connections)


def head(model):
    return Head(model.weight)


def test_a_proxy_is_named(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    with Endpoint("http://localhost:1", vocabulary=40, retries=0) as endpoint, pytest.raises(ConnectionError) as error:
        endpoint.check()
    assert "by the environment's proxy http://127.0.0.1:9 (" in str(error.value) and "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "localhost")
    with Endpoint("http://localhost:1", vocabulary=40, retries=0) as endpoint, pytest.raises(ConnectionError) as error:
        endpoint.check()
    assert "proxy" not in str(error.value)


def test_hidden_states(tmp_path):
    prompts, continuations = sequences(12, seed=9)
    (tmp_path / "states").mkdir()
    draw = random.Random(0)
    faults = (draw.choice(["500", "other_ids", "nan", None, None]) for _ in itertools.count())
    with Server(folder=tmp_path / "states", faults=faults) as server:
        model, folders = server.model, {"states_folder": tmp_path / "states", "store": tmp_path / "kept"}
        with endpoint(server, kind="vllm_hidden", head=head(model), norm=model.norm, retries=30, **folders) as teacher:
            found = teacher.targets(prompts, continuations)
        assert isinstance(found, Hidden)
        logits = found.states @ found.head.weight.T
        torch.testing.assert_close(logits.log_softmax(-1), expected(model, prompts, continuations), atol=1e-4, rtol=0)
        assert not list((tmp_path / "states").glob("*.lock"))  # each read once and removed, those that did not fit too
        answered = sum(server.answered.values())
        with endpoint(server, kind="vllm_hidden", head=head(model), norm=model.norm, retries=30, **folders) as teacher:
            assert torch.equal(teacher.targets(prompts, continuations).states, found.states)
        assert sum(server.answered.values()) == answered + 1


def test_hidden_states_that_nobody_reads_are_removed(tmp_path, monkeypatch):
    """Those of samples, and what cannot be read."""
    from fdistill_kernels.sequence.sampling import Sampling

    with Server(folder=tmp_path) as server:
        how = {"kind": "vllm_hidden", "head": head(server.model), "norm": server.model.norm, "states_folder": tmp_path}
        with endpoint(server, retries=0, **how) as teacher:
            made = teacher.draw([[1, 2], [3]], Sampling(max_new_tokens=4), seed=7)
            assert [m.tolist() for m in made] == [server.sample(p, 4, 7 + i) for i, p in enumerate([[1, 2], [3]])]
            teacher.targets([[1, 2]], [[3]])
            assert not list(tmp_path.iterdir())
            monkeypatch.setattr("safetensors.torch.save_file", lambda _, path: open(path, "w").close())
            with pytest.raises(EndpointError, match="cannot be read"):
                teacher.targets([[1, 2]], [[4]])
    assert not list(tmp_path.iterdir())


def test_hidden_states_beside_a_head_that_trains(tmp_path):
    with Server(folder=tmp_path) as server:
        trained = head(server.model)._replace(weight=server.model.weight.clone().requires_grad_())
        how = {"kind": "vllm_hidden", "norm": server.model.norm, "states_folder": tmp_path}
        with endpoint(server, head=trained, **how) as teacher:
            assert not teacher.targets([[1, 2]], [[3]]).states.requires_grad


def test_states_must_give_what_the_server_says(tmp_path):
    model = Model()
    right = {"head": head(model), "norm": model.norm, "layer": -1}
    with Server(model, folder=tmp_path) as server:
        for wrong in (
            {"layer": 0}, {"norm": lambda states: states}, {"norm": lambda states: model.norm(states).roll(1, 1)},
            {"head": Head(Model(seed=1).weight)}, {"head": Head(model.weight, scale=2.0)},
            {"head": Head(model.weight, softcap=1.0)}, {"head": Head(model.weight, torch.arange(V) / 10)},
        ):  # fmt: skip
            refused = pytest.raises(EndpointError, match=r"norm and head are off by .* layer=")
            with endpoint(server, kind="vllm_hidden", states_folder=tmp_path, retries=0, **right | wrong) as teacher:
                with refused:
                    teacher.targets([[1, 2]], [[3]])
                with refused:  # and never taken for tried
                    teacher.targets([[1, 2]], [[3]])
        half = {"head": right["head"].with_each(torch.Tensor.bfloat16)}
        for fits in ({}, half):
            with endpoint(server, kind="vllm_hidden", states_folder=tmp_path, **right | fits) as teacher:
                assert teacher.targets([[1, 2]], [[3]]).states.shape == (1, 8)
        assert not list(tmp_path.iterdir())


def test_hidden_states_that_cannot_be_had(tmp_path):
    model = Model()
    with pytest.raises(ValueError, match="needs norm and states_folder"):
        Endpoint("http://localhost:1", vocabulary=V, kind="vllm_hidden", head=head(model))
    how = {"kind": "vllm_hidden", "norm": model.norm, "retries": 0, "head": head(model)}
    for more, says in (
        ({"short_rows": True, "padded": True}, "makes nothing of short_rows and padded"),
        ({"k": 64}, "vllm_hidden makes nothing of k"),
        ({"head": Head(model.weight[1:])}, rf"the head \({V - 1}, 8\) must have vocabulary={V} rows"),
    ):
        with pytest.raises(ValueError, match=says):
            Endpoint("http://localhost:1", vocabulary=V, states_folder=tmp_path, **how | more)
    refused = pytest.raises(EndpointError, match="extract_hidden_states")
    with Server() as server, endpoint(server, states_folder=tmp_path, **how) as teacher, refused:
        teacher.targets([[1]], [[2]])
    (tmp_path / "one").mkdir()
    with Server(folder=tmp_path / "one") as server:
        with (
            endpoint(server, states_folder=tmp_path / "two", **how) as teacher,
            pytest.raises(EndpointError, match="outside of"),
        ):
            teacher.targets([[1]], [[2]])
        refused = pytest.raises(EndpointError, match="2 layers, of which layer=2")
        with endpoint(server, states_folder=tmp_path, layer=2, **how) as teacher, refused:
            teacher.targets([[1]], [[2]])
        how["head"] = Head(model.weight[:, :4])
        with (
            endpoint(server, states_folder=tmp_path, **how) as teacher,
            pytest.raises(EndpointError, match="8 features"),
        ):
            teacher.targets([[1]], [[2]])


def test_arguments():
    for wrong, says in (
        ({"kind": "other"}, "kind must be"),
        ({"k": 0}, "k must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"first_wait": -1.0}, "first_wait must be in"),
        ({"timeout": 0}, "timeout must be in"),
        ({"timeout": float("nan")}, "timeout must be in"),
        ({"layer": 0}, "vllm makes nothing of layer"),
    ):
        with pytest.raises(ValueError, match=says):
            Endpoint("http://localhost:1", **{"vocabulary": V, **wrong})
    for url in (
        "localhost:1",
        "http://",
        "http:///v1",
        "http://localhost:80a",
        "ftp://localhost",
        "http://localhost\n",
    ):
        with pytest.raises(ValueError, match=f"must begin with http:// .*{url.strip()}"):
            Endpoint(url, vocabulary=V)
    for url in ("http://localhost:1/?a=b", "http://localhost:1/v1?", "http://localhost:1#a"):
        with pytest.raises(ValueError, match=rf"without \?query and #fragment: '{re.escape(url)}'"):
            Endpoint(url, vocabulary=V)
    with Server() as server, endpoint(server) as teacher:
        with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
            teacher.targets([[1], []], [[2], [3]])
        with pytest.raises(ValueError, match="sequence 0 has ids outside"):
            teacher.targets([[1, V]], [[2]])
        for ids in ([5.7], torch.tensor([5.0]), torch.tensor([[5]]), "5", [None]):
            with pytest.raises(ValueError, match="sequence 1 has ids that are no integers"):
                teacher.targets([[1], ids], [[2], [3]])
            with pytest.raises(ValueError, match="sequence 0 has ids that are no integers"):
                teacher.targets([[1]], [ids])
        for call in (teacher.targets, teacher.ask, lambda p, c, tail: teacher.prefetch([(p, c)], tail=tail)):
            for tail in ("other", "sampled"):
                with pytest.raises(ValueError, match="tail must be one of bucket, uniform"):
                    call([[1]], [[2]], tail=tail)
        for ahead, error in ((-1, ValueError), (1.0, TypeError)):
            with pytest.raises(error, match="ahead must be"):
                teacher.prefetch([([[1]], [[2]])], ahead=ahead)
        assert not server.asked
        assert teacher.ask([[1]], [[2]], "uniform")().tail == "uniform"
        assert teacher.ask([np.array([1])], [[np.int32(2)]])("ignore").tail == "ignore"
    with pytest.raises(ValueError, match="vllm takes no head"):
        Endpoint("http://localhost:1", vocabulary=V, head=head(Model()))
    with Server() as server:
        server.reply_models = [{"id": "a"}, {"id": "b"}]
        with endpoint(server) as teacher, pytest.raises(EndpointError, match=r"model must be given.*'a', 'b'"):
            teacher.targets([[1]], [[2]])
        server.reply_models = [{"id": "a", "vocabulary": True, "fingerprint": 3}]  # which say nothing of either
        with endpoint(server) as teacher:
            assert teacher.targets([[1]], [[2]]).ids.shape[-1] and teacher.fingerprint is None
    nobody = Endpoint("http://127.0.0.1:9", vocabulary=V, retries=1, first_wait=0.001)
    for kind in (EndpointError, ConnectionError, OSError, RuntimeError):
        with pytest.raises(kind, match=r"list of models: given up after 2 tries.*broke"):
            nobody.targets([[1]], [[2]])
    nobody.close()


@pytest.mark.parametrize("wrong", [
    {"k": 8.0}, {"k": True}, {"k": "8"}, {"vocabulary": 40.0}, {"vocabulary": True}, {"concurrency": 2.0},
    {"retries": 1.5}, {"layer": 0.0}, {"model": 3}, {"timeout": "5"}, {"first_wait": None}, {"api_key": b"key"},
    {"short_rows": "false"}, {"padded": 1}, {"store": 3}, {"states_folder": 3}, {"norm": 3}, {"timeout": np.ones(2)},
    {"states_folder": object.__new__(TeacherStore)},
])  # fmt: skip
def test_arguments_of_another_type_are_named(wrong):
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))} must be"):
        Endpoint("http://127.0.0.1:9", **{"vocabulary": V, **wrong})


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r\nX: y", "sk secret", "sk-s\u00e4cret", "sk-secret\0"])
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(key, caplog):
    with pytest.raises(ValueError, match="api_key has spaces, line breaks") as error:
        Endpoint("http://127.0.0.1:9", vocabulary=V, api_key=key)
    assert "cret" not in str(error.value) + caplog.text


CUT = {
    "abort": lambda ids, new: {"finish_reason": "abort", "token_ids": [3]},
    "a dict's": lambda ids, new: {"finish_reason": {"type": "abort"}, "token_ids": [3]},
    "another prompt": lambda ids, new: {"finish_reason": "stop", "token_ids": [3], "prompt_token_ids": ids[1:]},
    "beyond": lambda ids, new: {"finish_reason": "stop", "token_ids": [V - 1]},
}


@pytest.mark.parametrize("name", CUT)
def test_samples_that_are_not_whole_are_asked_for_again(name):
    from fdistill_kernels.sequence.sampling import Sampling

    with Server() as server, endpoint(server) as teacher:
        given = []

        def once_cut(body, ids, fault):
            given.append(body)
            cut = CUT[name](ids, body["max_tokens"]) if len(given) == 1 else {"finish_reason": "stop", "token_ids": [4]}
            return {"choices": [{"index": 0, "text": "x", **cut}]}

        server.vllm = once_cut
        made = teacher.draw([[1, 2]], Sampling(max_new_tokens=8), 0, vocabulary=V - 1)
        assert made[0].tolist() == [4] and len(given) == 2
        assert given[0]["logit_bias"] == {str(V - 1): -100}
        server.vllm = lambda *_: {"choices": [{"index": 0, "text": "x", "finish_reason": "length", "token_ids": [3]}]}
        with pytest.raises(EndpointError, match="cut after 1 of 8 tokens: the server's context"):
            teacher.draw([[1, 2]], Sampling(max_new_tokens=8), 0)
        assert len(server.times) == 3


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_scoring_that_was_called_off_is_asked_for_again(kind):
    with Server() as server, endpoint(server, kind=kind) as teacher:
        teacher.targets([[1]], [[2]])
        answer, left = getattr(server, kind), [1]

        def aborted(body, ids, fault):
            whole = answer(body, ids, fault)
            if not left:
                return whole
            left.pop()
            if kind == "vllm":
                return {"choices": [{"index": 0, "text": "", "finish_reason": "abort", "prompt_logprobs": None}]}
            return {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}

        setattr(server, kind, aborted)
        assert len(teacher.targets([[3]], [[4]]).ids) == 1 and not left


def test_check_finds_what_targets_would():
    with (
        Server(limit=3) as server,
        endpoint(server, retries=0) as teacher,
        pytest.raises(EndpointError, match="--max-logprobs"),
    ):
        teacher.check()


def test_tokenized():
    with Server() as server, endpoint(server) as teacher:
        assert teacher.tokenized("a text") is None and len(server.times) == 0
        server.tokenize = lambda text: [len(text)]
        assert teacher.tokenized("a text") == [6]


def test_a_key_from_the_environment(monkeypatch):
    monkeypatch.setenv("FDISTILL_API_KEY", "sk-kept")
    with Server() as server, Endpoint(server.url, vocabulary=V, k=K) as teacher:
        teacher.targets([[1]], [[2]])
        assert {h["Authorization"] for h in server.headers} == {"Bearer sk-kept"}


def test_a_key_and_a_password_are_sent_and_never_shown(caplog):
    caplog.set_level("INFO")  # httpx names each request's url
    with Server() as server:
        with endpoint(server, api_key="sk-hidden") as teacher:
            teacher.targets([[1]], [[2]])
        assert {h["Authorization"] for h in server.headers} == {"Bearer sk-hidden"}
        server.headers.clear()
        there = server.url.replace("://", "://me:hidden@")
        with Endpoint(there, vocabulary=V, k=K) as teacher:
            teacher.targets([[1]], [[2]])
        assert {h["Authorization"] for h in server.headers} == {"Basic bWU6aGlkZGVu"}
        assert teacher.url == server.url
        with pytest.raises(ValueError, match="either api_key or the url's user and password"):
            Endpoint(there, vocabulary=V, api_key="sk-hidden")
    assert "hidden" not in caplog.text
    told = []
    with Endpoint(there, vocabulary=V, k=K, retries=1, first_wait=0.001) as teacher:
        with pytest.raises(EndpointError, match=r"given up after 2 tries at http://127") as error:
            teacher.targets([[1]], [[2]])
        told.append(error.value)
    with pytest.raises(EndpointError, match=r"at http://127.* is closed") as error:
        teacher.targets([[1]], [[2]])
    told.append(error.value)
    for url in ("http://me:hidden@", "ftp://me:hidden@there", "me:hidden@there", "http://me:hidden@there:80a",
                "http://me:hid/hidden@there", "http://me:hidden@there/?a"):  # fmt: skip
        with pytest.raises(ValueError, match="the url must") as wrong:
            Endpoint(url, vocabulary=V)
        told.append(wrong.value)
    assert "hidden" not in caplog.text + " ".join(map(str, told))


def test_waits_end_at_the_longest_after_any_number_of_tries():
    assert [_pause(0.5, tries) for tries in (1, 2, 3, 7, 1026, 10**9)] == [0.5, 1, 2, 30, 30, 30]
    assert _pause(0.0, 5000) == 0


@pytest.mark.parametrize(("status", "headers", "body", "says"), [
    (200, {}, b'{"error": {"message": "the weights are gone"}}', "given up after 2 tries.* the weights are gone"),
    (200, {}, b'{"object": "error", "message": "the weights are gone"}', "given up.* the weights are gone"),
    (400, {}, b'{"error": null, "message": "the weights are gone"}', "status 400: the weights are gone"),
    (307, {"Location": "http://me:hidden@there/v1"}, b"", r"status 307: .*redirects to http://there/v1"),
    (200, {}, b'{"a":' * 100_000, "given up after 2 tries.* no JSON"),
    (400, {}, b"[" * 100_000, r"status 400: \[\["),
])  # fmt: skip
def test_what_a_server_says_otherwise_is_told(status, headers, body, says):
    with Server(faults=itertools.chain([None] * PROBES, itertools.repeat("500"))) as server:

        def otherwise(handler, *_):
            _head(handler, status, len(body), headers)
            handler.wfile.write(body)

        server.broken = otherwise
        with endpoint(server, retries=1) as teacher, pytest.raises(EndpointError, match=says) as error:
            teacher.targets([[1]], [[2]])
        assert "hidden" not in str(error.value) and len(str(error.value)) < 1000


def test_a_store_that_has_all_is_only_read(tmp_path):
    with Server() as server, endpoint(server, store=tmp_path) as teacher:
        teacher.targets([[1], [2]], [[3], [4]])
        (tmp_path / "asking.lock").unlink()
        check(teacher.targets([[1], [2]], [[3], [4]]), server.model, [[1], [2]], [[3], [4]], atol=0.01)
        assert not (tmp_path / "asking.lock").exists() and server.asked[1, 3] == 1


@pytest.mark.parametrize("package", ["httpx", "anyio"])
def test_without_its_packages_the_extra_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"Endpoint needs the package {package}: pip install .*\[served\]"):
        Endpoint("http://127.0.0.1:9", vocabulary=V)
