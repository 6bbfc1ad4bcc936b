"""Stored targets: what comes back is what was given, within each precision's stated error, by token ids alone."""

import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

import fdistill_kernels as fk
from fdistill_kernels import linear_f_divergence
from fdistill_kernels.sequence.hashes import fingerprint
from fdistill_kernels.sequence.samples import TeacherSamples, generation_settings
from fdistill_kernels.sequence.sampling import Sampling
from fdistill_kernels.sparse import TopK
from fdistill_kernels.teachers import TeacherStore, packing
from fdistill_kernels.values import Head, Hidden

VOCABULARIES = {2: 1, 3: 2, 50257: 16, 128256: 17, 151936: 18, 262144: 18}
KEY = {"teacher": "abc", "tokenizer": "def", "sampling": {"temperature": 1.0}}


def top_k(length, k, vocabulary, listed=None):
    """Rows of `listed` ≤ k distinct ids, log-probabilities of a softmax, some −∞ and some padding anywhere."""
    listed = min(k if listed is None else listed, vocabulary)
    ids = (
        torch.stack([torch.randperm(vocabulary)[:listed] for _ in range(length)]) if length else torch.zeros(0, listed)
    )
    log_probs = (torch.randn(length, listed + 1) * 4).log_softmax(1)[:, :listed]
    log_probs[torch.rand(length, listed) < 0.1] = -torch.inf
    return TopK(ids.long().masked_fill(torch.rand(length, listed) < 0.1, -1), log_probs)


def sequence(length, vocabulary=100, prompt=5):
    return torch.randint(vocabulary, (prompt,)), torch.randint(vocabulary, (length,))


def head(vocabulary=40, width=16, dtype=torch.float32, **more):
    return Head(torch.randn(vocabulary, width).to(dtype), torch.randn(vocabulary).to(dtype), **more)


def filled(folder, count=6, shard_bytes=2000, **more):
    """A store of top-k and what is in it."""
    store = TeacherStore.create(folder, kind="top_k", vocabulary=100, key=KEY, **{"k": 8, **more})
    kept = [(*sequence(int(n)), top_k(int(n), 8, 100)) for n in torch.randint(1, 30, (count,))]
    with store.writer(shard_bytes) as writer:
        assert all(writer.add(*one) for one in kept)
    return store, kept


def compact(targets):
    """Padding moved to the end, as the store gives it back."""
    order = (targets.ids < 0).int().sort(dim=1, stable=True).indices
    ids = targets.ids.gather(1, order)
    return ids, targets.log_probs.gather(1, order).masked_fill(ids < 0, -torch.inf)


def assert_is(found, given, precision="float16"):
    """Ids as given, log-probabilities within the precision's stated error."""
    ids, log_probs = compact(given)
    k = ids.shape[1]
    assert torch.equal(found.ids[:, :k], ids) and (found.ids[:, k:] == -1).all()
    assert torch.equal(found.log_probs[:, :k].isfinite(), log_probs.isfinite())
    error = (found.log_probs[:, :k].double() - log_probs.double()).nan_to_num(nan=0)
    most, p = packing.log_prob_error(log_probs, precision), log_probs.double().exp()
    shift = (p * most).sum(1, keepdim=True) / p.sum(1, keepdim=True).clamp_min(1e-300)
    assert (error.abs() <= most + 1.01 * shift + 1e-6).all()


@pytest.mark.parametrize("precision", packing.LOG_PROBS)
def test_what_a_sure_teacher_leaves_to_the_rest_keeps_its_digits(tmp_path, precision):
    """A rest that the list's own rounding would hide: the loss of equal models is nothing, and so is its gradient."""
    vocabulary, rows = 20_000, 8
    steep = -4 * torch.arange(1, vocabulary + 1).float().log()
    logits = torch.stack([steep[torch.randperm(vocabulary)] for _ in range(rows)])
    exact = fk.top_k_of(logits.double(), 64)
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=vocabulary, key=KEY, k=64, log_probs=precision)
    with store.writer() as writer:
        writer.add([1], range(rows), exact._replace(log_probs=exact.log_probs.float()))
    found = store.targets([[1]], [range(rows)])
    assert_is(found, exact, precision)
    rest = 1 - exact.log_probs.exp().sum(1)
    torch.testing.assert_close(1 - found.log_probs.double().exp().sum(1), rest, rtol=0.05, atol=1e-8)
    assert rest.max() < 2e-6 and found.log_probs.dtype == torch.float32
    logits.requires_grad_()
    loss = fk.f_divergence(logits, found, "kl")
    loss.backward()
    assert loss < (3e-4 if precision == "uint8" else 1e-6)
    assert (logits.grad * rows).abs().sum(1).max() < (2e-2 if precision == "uint8" else 1e-3)


@pytest.mark.parametrize("wrong, what", [
    (dict(key=[1]), "key must be a dict"), (dict(key={"a": float("nan")}), "key must be what JSON can keep"),
    (dict(extra={"a": Path("x")}), "extra must be what JSON can keep"),
    (dict(head=torch.randn(40, 16)), "head must be a Head, not Tensor"),
    (dict(head=Head(torch.randn(40, 16), torch.randn(39))), r"head.bias must have shape \(40,\)"),
    (dict(head=Head(torch.randn(40, 16), torch.randn(40).bfloat16())), "head.bias torch.bfloat16"),
    (dict(head=Head(torch.ones(40, 16, dtype=torch.int8))), "head.weight must be floating point"),
    (dict(head=Head(torch.randn(40))), "head.weight must have shape"),
    (dict(head=Head(torch.randn(40, 16), softcap=-3.0)), "head.softcap must be in"),
    (dict(head=Head(torch.randn(40, 16), scale=float("nan"))), "head.scale must be"),
], ids=lambda x: x if isinstance(x, str) else None)  # fmt: skip
def test_what_no_store_can_keep_leaves_no_folder(tmp_path, wrong, what):
    given = dict(kind="hidden", vocabulary=40, key=KEY, head=head())
    with pytest.raises((ValueError, TypeError), match=what):
        TeacherStore.create(tmp_path / "store", **{**given, **wrong})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lists_that_are_rounded_already_have_no_more_digits(tmp_path, dtype):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=90, key=KEY, k=8)
    targets = fk.top_k_of(torch.randn(3, 90), 8)
    with store.writer() as writer:
        writer.add([1], [1, 2, 3], targets._replace(log_probs=targets.log_probs.to(dtype)))
        writer.add([2], [1, 2, 3], targets)
    assert store.targets([[1]], [[1, 2, 3]]).log_probs.dtype == torch.float16
    assert store.targets([[2]], [[1, 2, 3]]).log_probs.dtype == torch.float32
    assert store.targets([[1], [2]], [[1, 2, 3]] * 2).log_probs.dtype == torch.float16


def test_threads_may_share_a_writer(tmp_path):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=90, key=KEY, k=8)
    targets, writer = fk.top_k_of(torch.randn(3, 90), 8), store.writer(shard_bytes=2000)
    added = []

    def add(of):
        added.extend(writer.add([of, i], [1, 2, 3], targets) for i in range(80))

    threads = [threading.Thread(target=add, args=(of % 4,)) for of in range(8)]  # two add the same
    [t.start() for t in threads]
    [t.join() for t in threads]
    writer.flush()
    assert sum(added) == 320 and len(TeacherStore(tmp_path)) == 320


@pytest.mark.parametrize("states", [s for s in packing.STATES if s != "int8"])
def test_a_buffer_that_is_filled_anew(tmp_path, states):
    dtype = packing.STATES[states]
    store = TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, head=head(dtype=dtype), states=states)
    given = torch.randn(3, 2, 16).to(dtype)
    buffer = torch.empty_like(given[0])
    with store.writer() as writer:
        for i, x in enumerate(given):
            writer.add([i], [1, 2], buffer.copy_(x))
    assert all(torch.equal(store.targets([[i]], [[1, 2]]).states, x) for i, x in enumerate(given))


# --- packing


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_take_exactly_the_bits_of_the_vocabulary(vocabulary):
    bits = packing.id_bits(vocabulary)
    assert bits == VOCABULARIES[vocabulary]
    for k in range(1, 301):
        ids = np.random.default_rng(k).integers(0, vocabulary, (3, k))
        ids[0], ids[1] = vocabulary - 1, 0
        packed = packing.pack_ids(ids, bits)
        assert packed.nbytes == 3 * -(-k * bits // 8)
        assert (packing.unpack_ids(packed, k, bits) == ids).all()


def test_ids_of_more_than_25_bits():
    for bits in (26, 31, 32, 33, 57):
        ids = np.array([[2**bits - 1, 0, 2 ** (bits - 1) + 5] * 7])
        assert (packing.unpack_ids(packing.pack_ids(ids, bits), 21, bits) == ids).all()


LOG_PROB = st.one_of(st.floats(-32768, 0.03125, width=32), st.just(-np.inf), st.floats(-40, 0, width=32))


@given(st.lists(st.lists(LOG_PROB, min_size=7, max_size=7), min_size=1, max_size=4), st.sampled_from(packing.LOG_PROBS))
@settings(max_examples=300, deadline=None)
def test_log_probs_are_within_the_stated_error(rows, precision):
    given = torch.tensor(rows)
    kept = packing.encode_log_probs(given.numpy(), precision)
    found = torch.from_numpy(packing.decode_log_probs(kept)).double()
    assert torch.equal(found.isfinite(), given.isfinite())
    error = (found - given.double()).nan_to_num(nan=0).abs()
    assert (error <= packing.log_prob_error(given, precision)).all()


@pytest.mark.parametrize("precision", packing.LOG_PROBS)
def test_the_stated_error_of_log_probs_is_no_more_than_there_is(precision):
    rows = (torch.randn(500, 200) * 3).log_softmax(1).topk(64).values
    kept = packing.encode_log_probs(rows.numpy(), precision)
    error = (torch.from_numpy(packing.decode_log_probs(kept)).double() - rows.double()).abs()
    bound = packing.log_prob_error(rows, precision)
    assert 0.9 < (error / bound).max() <= 1
    span = rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
    half = rows.abs() / 2048 + 1e-6
    assert (bound <= (span / 250 + 4 * half if precision == "uint8" else half)).all()
    assert kept["log_probs"].itemsize == (1 if precision == "uint8" else 2)


@pytest.mark.parametrize("mask", [-1e4, -32768.0, -200.0])
def test_a_masked_entry_does_not_stretch_a_rows_code(mask):
    row = torch.tensor([[0.0, -0.34, mask]]).log_softmax(1)
    kept = packing.encode_log_probs(row.numpy(), "uint8")
    found = torch.from_numpy(packing.decode_log_probs(kept)).float()
    assert (found.exp() - row.exp()).abs().max() < 0.02 and found[0, 2] <= packing.LEAST_CODED
    fk.f_divergence(torch.randn(1, 50), fk.TopK(torch.tensor([[1, 2, 3]]), found), "kl")


def test_codes_of_wider_spans_are_read_as_before():
    """Stores that were written before the code ended at −104."""
    kept = {"log_probs": np.array([[0, 127, 254, 255]], np.uint8), "spans": np.array([[-0.5, 10000]], np.float16)}
    assert packing.decode_log_probs(kept).tolist() == [[-0.5, -2500.0, -10000.0, -np.inf]]


@pytest.mark.parametrize("precision", packing.STATES)
def test_states_are_within_the_stated_error(precision):
    states = torch.randn(50, 64) * 10 ** torch.linspace(-6, 4, 50)[:, None]
    states[3] = 0
    kept = packing.encode_states(states, precision)
    error = (packing.decode_states(kept, torch.empty(50, 64)).double() - states.double()).abs()
    bound = packing.state_error(states, precision)
    assert (error <= bound).all()
    if precision == "float32":
        assert not error.any()
    else:
        assert (error / bound.clamp_min(1e-30)).max() > 0.9
    own = states.to(packing.STATES[precision]) if precision != "int8" else None
    if own is not None:
        assert torch.equal(packing.decode_states(packing.encode_states(own, precision), torch.empty_like(own)), own)


# --- round trips


@pytest.mark.parametrize("precision", packing.LOG_PROBS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_top_k_comes_back(tmp_path, vocabulary, precision):
    for k in (1, *torch.randint(2, 301, (3,)).tolist()):
        store = TeacherStore.create(
            tmp_path / str(k), kind="top_k", vocabulary=vocabulary, key=KEY, k=k, log_probs=precision, temperature=2.0
        )
        kept = []
        with store.writer(3000) as writer:
            for listed in (k, 1, k // 2, k):
                length = int(torch.randint(0, 12, ()))
                given = top_k(length, k, vocabulary, listed)._replace(temperature=2.0, tail="uniform")
                kept.append((*sequence(length, vocabulary), given))
                writer.add(*kept[-1])
        for opened in (store, TeacherStore(tmp_path / str(k), key=KEY, validate="full")):
            assert len(opened) == len({(tuple(p.tolist()), tuple(c.tolist())) for p, c, _ in kept})
            order = [*torch.randperm(len(kept)).tolist(), 0]
            found = opened.targets(
                [kept[i][0] for i in order], [kept[i][1].tolist() for i in order], tail="renormalize"
            )
            assert found.tail == "renormalize" and found.temperature == 2 and found.weights is None
            begin = 0
            for i in order:
                end = begin + len(kept[i][1])
                assert_is(TopK(found.ids[begin:end], found.log_probs[begin:end]), kept[i][2], precision)
                begin = end
            assert begin == len(found.ids) and found.ids.shape[1] == k


@pytest.mark.parametrize("precision", packing.STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_come_back(tmp_path, precision, dtype):
    of = head(dtype=dtype, scale=0.5, softcap=30.0)
    store = TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, states=precision, head=of)
    kept = [(*sequence(n), torch.randn(n, 16).to(dtype)) for n in (3, 1, 9)]
    with store.writer() as writer:
        for one in kept:
            writer.add(*one)
    opened = TeacherStore(tmp_path, validate="full")
    found = opened.targets([kept[i][0] for i in (2, 0, 1)], [kept[i][1] for i in (2, 0, 1)])
    assert isinstance(found, Hidden) and found.states.dtype == dtype
    assert torch.equal(found.head.weight, of.weight) and torch.equal(found.head.bias, of.bias)
    assert (found.head.scale, found.head.softcap) == (0.5, 30.0)
    given = torch.cat([kept[i][2] for i in (2, 0, 1)])
    error = (found.states.double() - given.double()).abs()
    rounded = packing.state_error(given, precision) + found.states.double().abs() * torch.finfo(dtype).eps / 2
    assert (error <= rounded).all()
    if precision == "float32" or packing.STATES[precision] == dtype:
        assert torch.equal(found.states, given)


def test_a_rank_keeps_the_heads_first_directions(tmp_path):
    weight = torch.randn(40, 16) * torch.logspace(0, -2, 16)
    states = torch.randn(7, 16)
    logits = states @ weight.T
    directions = torch.linalg.svd(weight)
    for rank in (4, 9, 16):
        folder = tmp_path / str(rank)
        store = TeacherStore.create(
            folder, kind="hidden", vocabulary=40, key=KEY, head=Head(weight, softcap=9.0), rank=rank, states="float32"
        )
        prompt, continuation = sequence(7)
        with store.writer() as writer:
            writer.add(prompt, continuation, states)
        found = TeacherStore(folder).targets([prompt], [continuation])
        assert found.states.shape == (7, rank) and found.head.weight.shape == (40, rank) and found.head.softcap == 9
        kept = found.states @ found.head.weight.T
        best = states @ directions.Vh[:rank].T @ directions.Vh[:rank] @ weight.T
        torch.testing.assert_close(kept, best, rtol=1e-4, atol=1e-4)
        rest = directions.S[rank] if rank < 16 else 0.0
        assert ((kept - logits).norm(dim=1) <= rest * states.norm(dim=1) + 1e-4).all()
    again = TeacherStore.create(
        folder, kind="hidden", vocabulary=40, key=KEY, head=Head(weight, softcap=9.0), rank=16, states="float32"
    )
    assert len(again) == 1


def test_a_loss_with_stored_states_is_the_teachers(tmp_path):
    of, student = head(), head()
    store = TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, states="float32", head=of)
    prompt, continuation = sequence(6)
    states, hidden = torch.randn(6, 16), torch.randn(6, 16)
    with store.writer() as writer:
        writer.add(prompt, continuation, states)
    found = store.targets([prompt], [continuation])
    stored, direct = (linear_f_divergence(hidden, student, t, divergence="js") for t in (found, Hidden(states, of)))
    assert torch.equal(stored, direct)


# --- sequences and writers


def test_sequences_are_found_by_their_token_ids(tmp_path):
    store, kept = filled(tmp_path)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and len(store) == len(kept)
    for i in torch.randperm(len(kept)).tolist():
        prompt, continuation, given = kept[i]
        assert (prompt, continuation) in store and (prompt.tolist(), continuation.int()) in store
        assert_is(store.targets([prompt], [continuation]), given)
    prompt, continuation, given = kept[0]
    moved = torch.cat((prompt, continuation[:1])), continuation[1:]  # the same tokens, cut elsewhere
    assert moved not in store and store.missing([moved, (prompt, continuation)]) == [0]
    with pytest.raises(ValueError, match=r"2 of 3 sequences are not in the store, at 0, 2$") as raised:
        store.targets([moved[0], prompt, prompt], [moved[1], continuation, continuation + 1])
    assert raised.value.indices == [0, 2]
    found = {(tuple(p.tolist()), tuple(c.tolist())) for p, c in store.sequences()}
    assert found == {(tuple(p.tolist()), tuple(c.tolist())) for p, c, _ in kept}
    with pytest.raises(ValueError, match="no sequence"):
        store.targets([], [])


def test_a_sequence_that_is_there_is_not_added_again(tmp_path):
    store, kept = filled(tmp_path)
    other = TeacherStore(tmp_path)
    with store.writer() as writer:
        assert not writer.add(*kept[0])
        new = (*sequence(3), top_k(3, 8, 100))
        assert writer.add(*new) and not writer.add(*new)
        writer.flush()
        assert new[:2] in store and new[:2] not in other
        writer.flush()  # nothing: no empty shard
    other.refresh()
    assert new[:2] in other and len(other) == len(store) == len(kept) + 1
    assert len(list(store.sequences())) == len(store)


def test_what_was_added_before_an_error_is_kept(tmp_path):
    store, _ = filled(tmp_path)
    new = (*sequence(3), top_k(3, 8, 100))
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        writer.add(*new)
        _ = 1 / 0
    assert new[:2] in TeacherStore(tmp_path)


def write_some(folder, kept, seed):
    torch.set_num_threads(1)
    store = TeacherStore.create(folder, kind="top_k", vocabulary=100, key=KEY, k=8)
    with store.writer(1500) as writer:
        for i in np.random.default_rng(seed).permutation(len(kept))[: len(kept) * 2 // 3]:
            writer.add(*kept[i])


def test_several_writers_share_a_store(tmp_path):
    kept = [(*sequence(7), top_k(7, 8, 100)) for _ in range(30)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(tmp_path, kept, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = TeacherStore(tmp_path, key=KEY, validate="full")
    expected = {i for seed in range(4) for i in np.random.default_rng(seed).permutation(30)[:20].tolist()}
    assert set(range(30)) - set(store.missing([one[:2] for one in kept])) == expected and not store.damaged
    assert len(list(store.sequences())) == len(store) == len(expected)
    for i in expected:
        assert_is(store.targets([kept[i][0]], [kept[i][1]]), kept[i][2])


class Rows(torch.utils.data.Dataset):
    def __init__(self, store, kept):
        self.store, self.kept = store, kept

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        found = self.store.targets([self.kept[i][0]], [self.kept[i][1]])
        return i, found.ids, found.log_probs


def test_stores_are_pickled_and_used_in_workers(tmp_path):
    store, kept = filled(tmp_path)
    store.targets([kept[0][0]], [kept[0][1]])  # mapped already
    data = pickle.dumps(store)
    assert len(data) < 20_000
    for i, ids, log_probs in torch.utils.data.DataLoader(
        Rows(pickle.loads(data), kept), batch_size=None, num_workers=2, multiprocessing_context="fork"
    ):
        assert_is(TopK(ids, log_probs), kept[i][2])


def maps_of(folder):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_opening_a_store_reads_none_of_its_data(tmp_path):
    _, kept = filled(tmp_path)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    good = {shard: shard.read_bytes() for shard in shards}
    for shard in shards:
        shard.write_bytes(b"\0" * len(good[shard]))
    store = TeacherStore(tmp_path, key=KEY)
    assert not store.missing([one[:2] for one in kept]) and not store.damaged and not maps_of(tmp_path)
    assert store.summary()["sequences"] == len(kept)
    for shard in shards:
        shard.write_bytes(good[shard])
    found = store.targets([kept[0][0]], [kept[0][1]])
    assert_is(found, kept[0][2])
    assert len({line.split()[-1] for line in maps_of(tmp_path)}) == 1  # the one shard, mapped


def test_a_shard_of_another_size_is_seen_when_a_store_is_opened(tmp_path):
    _, kept = filled(tmp_path)
    shard = next((tmp_path / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    store = TeacherStore(tmp_path)
    assert list(store.damaged) == [shard.stem] and 0 < len(store) < len(kept)
    with store.writer() as writer:
        assert sum(writer.add(*one) for one in kept) == len(kept) - len(TeacherStore(tmp_path))
    assert len(store) == len(kept) and list(store.summary()["damaged"]) == [shard.stem]


@pytest.mark.parametrize("spoil", [lambda shard: shard.with_suffix(".json").unlink(), lambda shard: shard.unlink(),
                                   lambda shard: shard.write_bytes(b"\0" * shard.stat().st_size)],
                         ids=["no sidecar", "no shard", "other bytes"])  # fmt: skip
def test_damaged_shards_are_set_aside(tmp_path, spoil):
    _, kept = filled(tmp_path)
    shard = next((tmp_path / "shards").glob("*.safetensors"))
    spoil(shard)
    store = TeacherStore(tmp_path, validate="full")
    assert list(store.damaged) == [shard.stem] and list(store.set_aside()) == [shard.stem] and not store.set_aside()
    again = TeacherStore(tmp_path, validate="full")
    assert not store.damaged and not again.damaged and 0 < len(store) == len(again) < len(kept)
    with store.writer() as writer:
        assert sum(writer.add(*one) for one in kept) == len(kept) - len(again)
    assert {path.stem for path in (tmp_path / "damaged").iterdir()} == {shard.stem}


def test_threads_read_intact_shards_while_damage_is_found(tmp_path):
    kept = filled(tmp_path, count=60, shard_bytes=1)[1]
    for file in sorted((tmp_path / "shards").glob("*.safetensors"))[::10]:
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    whole = TeacherStore(tmp_path, validate="full")
    intact = [pair[:2] for pair in kept if pair[:2] in whole]
    assert len(whole.damaged) == 6 and len(intact) == 54
    switch, failed = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)

    def read(store):
        try:
            for prompt, continuation in intact:
                store.targets([prompt], [continuation])
        except Exception as error:
            failed.append(error)

    try:
        for _ in range(10):
            store = TeacherStore(tmp_path)
            threads = [threading.Thread(target=read, args=(store,)) for _ in range(4)]
            threads.append(threading.Thread(target=store.verify))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(store.damaged) == 6 and len(store) == 54
    finally:
        sys.setswitchinterval(switch)
    assert not failed


def test_summary_counts_and_tells_the_mass(tmp_path):
    store, kept = filled(tmp_path, k=11)
    found, tokens = store.summary(), sum(len(c) for _, c, _ in kept)
    p = torch.cat([compact(t)[1].exp().sort(1, descending=True).values.cumsum(1) for _, _, t in kept])
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors"))
    assert (found["kind"], found["sequences"], found["tokens"], found["bytes"]) == ("top_k", len(kept), tokens, size)
    assert found["bytes_per_token"] == size / tokens and found["damaged"] == {}
    assert list(found["mass"]) == [1, 2, 4, 8, 11]
    for k, mass in found["mass"].items():
        assert mass == pytest.approx(float(p[:, min(k, 8) - 1].mean()), abs=1e-6)
    empty = TeacherStore.create(tmp_path / "empty", kind="top_k", vocabulary=100, key=KEY, k=8).summary()
    assert empty["tokens"] == 0 and empty["mass"] == {}


# --- what is refused


def test_every_field_that_differs_is_named(tmp_path):
    filled(tmp_path)
    with pytest.raises(ValueError, match=r"teacher was 'abc' and is 'xyz'; tokenizer was 'def' and is None; more was"):
        TeacherStore(tmp_path, key={"teacher": "xyz", "sampling": {"temperature": 1.0}, "more": 1})
    with pytest.raises(ValueError, match="key must be what JSON can keep"):
        TeacherStore(tmp_path, key={"teacher": {"abc"}})
    with pytest.raises(ValueError, match=r"sampling was {'temperature': 1.0} and is None"):
        TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, k=8, key={"teacher": "abc", "tokenizer": "def"})
    with pytest.raises(
        ValueError, match=r"k was 8 and is 9; log_probs was 'float16' and is 'uint8'; vocabulary was 100 and is 101$"
    ):
        TeacherStore.create(tmp_path, kind="top_k", vocabulary=101, key=KEY, k=9, log_probs="uint8")
    with pytest.raises(ValueError, match=r"kind was 'top_k' and is 'hidden'"):
        TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, head=head())
    TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, k=8, key={**KEY}, extra={"not": "compared"})


@pytest.mark.parametrize("name", ["k", "temperature", "vocabulary", "kind", "log_probs", "format"])
def test_a_field_of_the_key_may_be_named_like_a_setting(tmp_path, name):
    made = dict(kind="top_k", vocabulary=50, k=2)
    TeacherStore.create(tmp_path, key={"teacher": "A", name: "first"}, **made)
    TeacherStore.create(tmp_path, key={"teacher": "A", name: "first"}, **made)
    with pytest.raises(ValueError, match=f"{name} was 'first' and is 'second'; k was 2 and is 3$"):
        TeacherStore.create(tmp_path, key={"teacher": "A", name: "second"}, **{**made, "k": 3})


def test_another_head_is_refused(tmp_path):
    of = head(scale=2.0)
    made = TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, head=of, extra={"of": [1, 2]})
    assert made.extra == {"of": [1, 2]} and made.key == KEY
    with pytest.raises(ValueError, match=r"head was '\w{32}' and is '\w{32}'; scale was 2.0 and is 1.0"):
        TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, head=Head(of.weight.flip(0), of.bias))


def test_a_missing_or_damaged_manifest_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no store that can be read: manifest.json is missing"):
        TeacherStore(tmp_path)
    store, _ = filled(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"abc"', '"abd"'))
    with pytest.raises(ValueError, match=r"manifest.json is not what was written; .* makes a manifest anew"):
        TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=8)
    manifest.unlink()
    assert len(TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=8)) == len(store)
    content = json.loads(manifest.read_text())
    assert content["key"] == KEY and content["kind"] == "top_k" and content["format"] == 1 and content["k"] == 8


def test_shards_of_another_store_are_not_taken(tmp_path):
    filled(tmp_path / "a", count=1)
    other = TeacherStore.create(tmp_path / "b", kind="top_k", vocabulary=100, key={"teacher": "other"}, k=8)
    for path in (tmp_path / "a/shards").iterdir():
        (tmp_path / "b/shards" / path.name).write_bytes(path.read_bytes())
    other.refresh()
    assert len(other) == 0 and "other settings" in next(iter(other.damaged.values()))


GOOD = TopK(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize(("targets", "what"), [
    (GOOD._replace(ids=torch.tensor([[1, 2], [3, 100]])), r"ids must be in \[0, 100\), or -1 .*: row 1 .* 3, 100"),
    (GOOD._replace(ids=torch.tensor([[1, -2], [3, 4]])), r"ids must be in \[0, 100\), or -1 .*: row 0 .* 1, -2"),
    (GOOD._replace(ids=GOOD.ids.float()), "ids of torch.float32"),
    (GOOD._replace(log_probs=torch.tensor([[-1.0, -2.0], [torch.nan, -2.0]])), "log_probs must not be NaN: row 1"),
    (GOOD._replace(log_probs=torch.tensor([[0.06, -2.0], [-1, -2.0]])), "log_probs of a row must be of a mass of 1.05"),
    (GOOD._replace(ids=torch.tensor([[1, 2], [4, 4]])), "ids must differ within a row: row 1"),
    (GOOD._replace(log_probs=torch.tensor([[-1.0, -2.0], [-0.1, -0.5]])), "log_probs of a row must be of a mass of 1.05"),
    (GOOD._replace(log_probs=GOOD.log_probs[:, :1]), r"must be \(2, K\) for K up to 8, not \(2, 2\) and \(2, 1\)"),
    (TopK(GOOD.ids[:1], GOOD.log_probs[:1]), r"must be \(2, K\)"),
    (TopK(torch.arange(18).view(2, 9), -torch.ones(2, 9)), "K up to 8"),
    (GOOD._replace(temperature=2.0), "temperature 1.0, as the store, not 2.0"),
    (GOOD._replace(weights=torch.ones(2, 2)), "no weights"),
    (torch.zeros(2, 8), "must be a TopK, not Tensor"),
])  # fmt: skip
def test_targets_that_do_not_fit_are_refused(tmp_path, targets, what):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=8)
    with store.writer() as writer, pytest.raises((ValueError, TypeError), match=what):
        writer.add([1], [2, 3], targets)
    assert len(store) == 0 and not list((tmp_path / "shards").iterdir())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32], ids=str)
def test_ids_of_any_integers_are_kept(tmp_path, dtype):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=2)
    with store.writer() as writer:
        writer.add([1], [2, 3], GOOD._replace(ids=GOOD.ids.to(dtype)))
    assert torch.equal(store.targets([[1]], [[2, 3]]).ids, GOOD.ids)


def test_a_process_without_files_to_open_is_no_damage(tmp_path):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=2)
    for first in (1, 2):
        with store.writer() as writer:
            writer.add([first], [2, 3], GOOD)
    opened, limit = TeacherStore(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    opened.targets([[1]], [[2, 3]])
    opened._mapped.clear()  # as of many shards the oldest
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        for first in (1, 2):
            with pytest.raises(OSError, match="Too many open files"):
                opened.targets([[first]], [[2, 3]])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert not opened.damaged and len(opened.targets([[1], [2]], [[2, 3]] * 2).ids) == 4


def test_a_process_that_changes_its_folder_keeps_its_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = TeacherStore.create("store", kind="top_k", vocabulary=100, key=KEY, k=2)
    with store.writer() as writer:
        writer.add([1], [2, 3], GOOD)
    opened = TeacherStore("store")
    monkeypatch.chdir("/")
    assert torch.equal(opened.targets([[1]], [[2, 3]]).ids, GOOD.ids) and not opened.damaged


def test_padding_may_have_any_log_probability(tmp_path):
    store = TeacherStore.create(tmp_path, kind="top_k", vocabulary=100, key=KEY, k=3)
    given = TopK(torch.tensor([[-1, 2], [-1, -1]]), torch.tensor([[torch.nan, -2.0], [9.0, torch.nan]]))
    with store.writer() as writer:
        writer.add([1], [2, 3], given)
    found = store.targets([[1]], [[2, 3]])
    assert found.ids.tolist() == [[2, -1, -1], [-1, -1, -1]] and found.log_probs[0, 0] == pytest.approx(-2)
    assert (found.log_probs[found.ids < 0] == -torch.inf).all()


@pytest.mark.parametrize(("states", "what"), [
    (torch.full((2, 16), torch.nan), "targets has NaN"), (torch.zeros(3, 16), r"shape \(2, 16\), not \(3, 16\)"),
    (torch.zeros(2, 15), r"shape \(2, 16\)"), (GOOD, "must be a tensor of hidden states, not TopK"),
    (torch.zeros(2, 16, dtype=torch.int8), "targets must be floating point, .* not torch.int8"), (torch.full((2, 16), 1e6), "beyond float16"),
])  # fmt: skip
def test_states_that_do_not_fit_are_refused(tmp_path, states, what):
    store = TeacherStore.create(tmp_path, kind="hidden", vocabulary=40, key=KEY, states="float16", head=head())
    with store.writer() as writer, pytest.raises((ValueError, TypeError), match=what):
        writer.add([1], [2, 3], states)


@pytest.mark.parametrize("precision", packing.STATES)
def test_states_beyond_a_precision_are_refused(precision):
    with pytest.raises(ValueError, match=f"states beyond {precision}"):
        packing.encode_states(torch.full((2, 16), 1e41, dtype=torch.float64), precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_states_beyond_a_float16_heads_dtype_are_told(tmp_path, precision):
    store = TeacherStore.create(
        tmp_path, kind="hidden", vocabulary=40, key=KEY, head=head(dtype=torch.float16), states=precision
    )
    with store.writer() as writer:
        writer.add([1], [2], torch.full((1, 16), 1e5))
    with pytest.raises(ValueError, match="beyond float16, the head's dtype"):
        store.targets([[1]], [[2]])


@pytest.mark.parametrize(("given", "error", "what"), [
    ({"k": 2.7}, TypeError, "k must be an int, not 2.7"), ({"k": "8"}, TypeError, "k must be an int, not '8'"),
    ({"k": True}, TypeError, "k must be an int"), ({"vocabulary": 50.9}, TypeError, "vocabulary must be an int"),
    ({"rank": 1.5}, TypeError, "rank must be an int"), ({"temperature": "1"}, TypeError, "temperature must be a number"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
])  # fmt: skip
def test_settings_that_are_no_such_numbers_are_refused(tmp_path, given, error, what):
    with pytest.raises(error, match=what):
        TeacherStore.create(tmp_path, **{"kind": "top_k", "vocabulary": 40, "k": 8, "key": KEY, **given})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "what"), [
    ({"kind": "logits"}, "kind must be one of"), ({"k": None}, "k=None"), ({"k": 0}, "k=0"), ({"vocabulary": 0}, "posi"),
    ({"log_probs": "int4"}, "log_probs='int4'"), ({"temperature": 0.0}, "temperature=0"), ({"rank": 3}, "rank=3"),
    ({"kind": "hidden", "k": None}, "has a head"), ({"kind": "hidden", "head": head()}, "k=8"),
    ({"kind": "hidden", "k": None, "head": head(30)}, "must have vocabulary=40 rows"),
    ({"kind": "hidden", "k": None, "head": head(), "rank": 17}, r"in \[1, 16\]"),
    ({"kind": "hidden", "k": None, "head": head(), "states": "int4"}, "states='int4'"),
    ({"kind": "hidden", "k": None, "head": head(), "temperature": 2.0}, "no k, log_probs or temperature"),
    ({"kind": "hidden", "k": None, "head": head(), "log_probs": "uint8"}, "no k, log_probs or temperature"),
    ({"states": "int8"}, "no head, rank or states"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, given, what):
    with pytest.raises(ValueError, match=what):
        TeacherStore.create(tmp_path, **{"kind": "top_k", "vocabulary": 40, "key": KEY, "k": 8, **given})
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("ids", [[1.5], [[1]], [-100], torch.tensor([2**31])])
def test_what_is_no_row_of_token_ids_is_refused(tmp_path, ids):
    store, _ = filled(tmp_path)
    with pytest.raises(ValueError, match="prompt must be one row of token ids"):
        store.missing([(ids, [1])])
    with pytest.raises(ValueError, match="continuation must be one row of token ids"):
        store.targets([[1]], [ids])
    with pytest.raises(ValueError, match="validate must be"):
        TeacherStore(tmp_path, validate="some")
    with pytest.raises(ValueError, match="tail must be one of"):
        store.targets([[1]], [[2]], tail="sampled")


WRONG = [None, 3, np.ones(3), object(), torch.ones(2, dtype=torch.long, device="meta"), torch.eye(2).to_sparse()]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: type(x).__name__)
def test_every_argument_of_a_store_is_refused_by_name(tmp_path, wrong):
    store, _ = filled(tmp_path / "store")
    calls = {
        "validate": lambda: TeacherStore(store.folder, validate=wrong), "prompts": lambda: store.targets(wrong, [[1]]),
        "continuations": lambda: store.targets([[1]], wrong), "pair": lambda: wrong in store, "tail": lambda: store.targets([[1]], [[2]], wrong),
        "prompt": lambda: store.writer().add(wrong, [2, 3], GOOD), "continuation": lambda: store.writer().add([1], wrong, GOOD),
        "targets": lambda: store.writer().add([9], [2, 3], wrong),
        **{f"targets.{n}": lambda n=n: store.writer().add([9], [2, 3], GOOD._replace(**{n: wrong})) for n in ("ids", "log_probs", "temperature")},
        **{n: lambda n=n: TeacherStore.create(**{"folder": tmp_path / "new", "kind": "top_k", "vocabulary": 40, "key": KEY, "k": 8, n: wrong})
           for n in ("folder", "kind", "vocabulary", "key", "log_probs", "states", "temperature", "extra")},
    }  # fmt: skip
    taken = {"extra": None, "temperature": 3, "vocabulary": 3}
    for name, call in calls.items():
        if name not in taken or wrong is not taken[name]:
            with pytest.raises((ValueError, TypeError), match=name.rpartition(".")[2]):
                call()


def test_only_old_partial_files_are_removed(tmp_path):
    filled(tmp_path)
    old, new = (tmp_path / "shards" / f"{name}.safetensors.0.partial" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 1e5,) * 2)
    store, _ = filled(tmp_path)
    assert not old.exists() and new.exists() and not store.damaged


def test_reading_needs_no_transformers():
    code = "import sys, fdistill_kernels.teachers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what names a teacher


def model(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1))


def test_a_fingerprint_is_of_every_byte():
    one = model()
    known = fingerprint(one)
    assert fingerprint(model()) == known and fingerprint(model(1)) != known
    a, b = one.transformer.h[0].mlp.c_fc.weight, one.transformer.h[1].mlp.c_fc.weight
    a0, b0 = a.detach().clone(), b.detach().clone()
    for swap in (
        lambda: a.copy_(a.flip(0)),  # rows reversed
        lambda: (a.copy_(b.clone()), b.copy_(a0)),  # two tensors of one shape change places
        lambda: a.copy_(a.roll(1, 1)),
        lambda: a.view(-1)[:1].copy_(torch.nextafter(a.view(-1)[:1], torch.tensor(9.0))),  # one bit
    ):
        with torch.no_grad():
            swap()
            assert fingerprint(one) != known
            a.copy_(a0), b.copy_(b0)
    assert fingerprint(one) == known
    assert fingerprint(one.to(torch.bfloat16)) != known


def test_a_fingerprint_knows_no_order_device_or_layout():
    one = model()
    known, state = fingerprint(one), one.state_dict()

    class Backwards:
        config = one.config

        @staticmethod
        def state_dict():
            return {name: state[name].T.contiguous().T if state[name].ndim == 2 else state[name]
                    for name in reversed(state)}  # fmt: skip

    assert fingerprint(Backwards) == known
    if torch.cuda.is_available():
        assert fingerprint(one.cuda()) == known
    with torch.device("meta"):
        empty = fingerprint(GPT2LMHeadModel(one.config))
    assert empty != known
    large = {"w": torch.arange(packing.PIECE, dtype=torch.int16)}  # more than a piece
    assert packing.hash_tensors(large.items()) != packing.hash_tensors([("w", large["w"].flip(0))])


def test_the_key_of_samples_has_what_decides_beams(tmp_path):
    teacher, beams, drawn = model(), Sampling(beams=3), Sampling()
    plain = generation_settings(teacher, beams)
    assert plain == generation_settings(teacher, drawn) == {"bos_token_id": 1, "eos_token_id": 1}
    changed = dict(length_penalty=0.5, no_repeat_ngram_size=3, repetition_penalty=1.2, early_stopping=True, min_length=4,
                   forced_eos_token_id=1, suppress_tokens=[7], bad_words_ids=[[3]])  # fmt: skip
    for name, value in (changed | {"pad_token_id": 9, "num_beams": 7, "max_length": 33, "use_cache": False}).items():
        setattr(teacher.generation_config, name, value)
    assert generation_settings(teacher, beams) == plain | changed
    assert generation_settings(teacher, drawn) == plain  # `draw` leaves the others out
    bart = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=8, encoder_layers=1, decoder_layers=1,
                                                   encoder_attention_heads=1, decoder_attention_heads=1))  # fmt: skip
    assert generation_settings(bart, drawn)["decoder_start_token_id"] == 2
    TeacherSamples(tmp_path, [[1]], beams, "t", 0, plain)
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size was None and is 3"):
        TeacherSamples(tmp_path, [[1]], beams, "t", 0, generation_settings(teacher, beams))
    teacher.generation_config.length_penalty = 0.7
    TeacherSamples(tmp_path / "b", [[1]], beams, "t", 0, plain | changed)
    with pytest.raises(ValueError, match=r"drawn otherwise: length_penalty was 0.5 and is 0.7$"):
        TeacherSamples(tmp_path / "b", [[1]], beams, "t", 0, generation_settings(teacher, beams))


def test_without_its_libraries_the_extra_is_named():
    code = "import sys; sys.modules['xxhash'] = None\nimport fdistill_kernels as fk\nfk.TeacherStore"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'TeacherStore needs the package xxhash: pip install ".[sequence]"' in done.stderr


def test_without_fcntl_a_store_is_written_and_read(tmp_path):
    """As on Windows: trainers and stores are there, and what needs locks says so."""
    code = f"""import sys; sys.modules['fcntl'] = None
import torch, fdistill_kernels as fk, fdistill_kernels.sequence
from fdistill_kernels.teachers import locks
store = fk.TeacherStore.create({str(tmp_path)!r}, kind='top_k', vocabulary=9, key={KEY!r}, k=2)
with store.writer() as writer:
    writer.add([1], [2, 3], fk.TopK(torch.tensor([[2, 3], [3, 4]]), torch.log(torch.tensor([[.5, .3], [.6, .2]]))))
assert fk.TeacherStore({str(tmp_path)!r}).targets([[1]], [[2, 3]]).ids.tolist() == [[2, 3], [3, 4]]
for locked in (lambda: locks.lock(0, 0, 1), lambda: locks.unlock(0), lambda: locks.is_locked('any')):
    try: locked()
    except NotImplementedError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("which Windows lacks\n") == 3, done.stdout + done.stderr
