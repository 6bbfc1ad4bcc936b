"""A thousand faults in a store: what was flushed stays, what was damaged is named, and nothing is ever silently wrong."""

import builtins
import errno
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from fdistill_kernels.sparse import TopK
from fdistill_kernels.teachers import TeacherStore, files, store
from fdistill_kernels.teachers.pairs import pair_of
from fdistill_kernels.values import Head

from .conftest import WHOLE

KINDS = ("top_k", "hidden")
SETTINGS = {
    "top_k": {"vocabulary": 300, "k": 5},
    "hidden": {"vocabulary": 20, "head": Head(torch.linspace(-1, 1, 160).view(20, 8).bfloat16(), softcap=5.0)},
}
COUNT, A_SHARD = 9, 3
FORK = multiprocessing.get_context("fork")


def create(folder, kind):
    return TeacherStore.create(folder, kind=kind, key={"teacher": "abc"}, **SETTINGS[kind])


def sequences(kind, seed=0):
    """(prompt, continuation, targets), whose targets the store keeps exactly."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(1, 7, COUNT).tolist():
        prompt, continuation = rng.integers(0, 20, 4).tolist(), rng.integers(0, 20, length).tolist()
        if kind == "top_k":
            ids = np.stack([rng.permutation(300)[:5] for _ in range(length)])
            log_probs = torch.from_numpy(rng.normal(-5, 1, (length, 5))).half().clamp_max(0)
            targets = TopK(torch.from_numpy(ids), log_probs)
        else:
            targets = torch.from_numpy(rng.normal(size=(length, 8))).bfloat16()
        made.append((prompt, continuation, targets))
    return made


def read(opened, one):
    """The targets if they are there; they must be what was written."""
    try:
        found = opened.targets([one[0]], [one[1]])
    except store.MissingTargets:
        assert one[:2] not in opened  # and it is told so from now on
        return False
    if opened.kind == "top_k":
        assert torch.equal(found.ids, one[2].ids) and torch.equal(found.log_probs, one[2].log_probs)
    else:
        assert torch.equal(found.states, one[2])
        assert torch.equal(found.head.weight, SETTINGS["hidden"]["head"].weight) and found.head.softcap == 5
    return True


def there(folder, kind, made, validate="lazy"):
    """The numbers of the sequences that a store has, each read and compared; nothing is doubled or made up."""
    opened = TeacherStore(folder, key={"teacher": "abc"}, validate=validate)
    found = {i for i, one in enumerate(made) if read(opened, one)}
    assert found == set(range(len(made))) - set(opened.missing([one[:2] for one in made]))
    listed = [(p.tolist(), c.tolist()) for p, c in opened.sequences()]
    assert len(listed) == len(opened) == len(found) and all(one[:2] in listed for one in (made[i] for i in found))
    return opened, found


def completes(folder, kind, made):
    """The next writer, which verifies what there is, adds what is missing, and then all is there."""
    create(folder, kind)  # a manifest and a head where there are none
    opened = TeacherStore(folder, validate="full")
    with opened.writer() as writer:
        for i in opened.missing([one[:2] for one in made]):
            assert writer.add(*made[i])
    assert there(folder, kind, made, "full")[1] == set(range(len(made)))


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    """A whole store of three shards; what is in it, and in which shard."""
    folder, made = tmp_path_factory.mktemp(request.param), sequences(request.param)
    opened = create(folder, request.param)
    with opened.writer() as writer:
        for i, one in enumerate(made):
            writer.add(*one)
            if i % A_SHARD == A_SHARD - 1:
                writer.flush()
    shards = {i: opened._index[pair_of(*one[:2])[0]][0].path.stem for i, one in enumerate(made)}
    return folder, request.param, made, shards


# --- files damaged: 700


def damage(path, rng):
    """One of: a bit flipped (most often), the end cut off, zeros in the middle, bytes too many, removed, emptied."""
    content, how = bytearray(path.read_bytes()), rng.integers(12)
    if how < 7:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif how == 7:
        content = content[: rng.integers(len(content))]
    elif how == 8:
        begin = rng.integers(len(content))
        content[begin : begin + 64] = bytes(len(content[begin : begin + 64]))
    elif how == 9:
        content += b"\0"
    elif how == 10:
        path.unlink()
        return
    else:
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_bytes_are_named_and_never_read(base, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: None)  # which takes time, and is not asked about here
    whole, kind, made, shards = base
    rng = np.random.default_rng(seed)
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    for number in range(70):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        hit = folder / names[number % len(names)]
        before = hit.read_bytes()
        damage(hit, rng)
        same = hit.exists() and hit.read_bytes() == before  # zeros where there were zeros
        if hit.name == "manifest.json":
            manifest_is_told(folder, made, same)
            hit.unlink(missing_ok=True)
        elif hit.name == "head.safetensors":
            head_is_told(folder, made, hit)
        else:
            shard_is_told(folder, kind, made, {i for i, name in shards.items() if name == hit.stem}, hit, rng)
        completes(folder, kind, made)
        shutil.rmtree(folder)


def manifest_is_told(folder, made, same):
    try:
        opened = TeacherStore(folder)
    except ValueError as error:
        assert not same and "manifest.json" in str(error)
    else:  # another blank, another way to write a number
        assert all(read(opened, one) for one in made)


def head_is_told(folder, made, hit):
    opened = TeacherStore(folder, validate="full")
    if "head.safetensors" in opened.damaged:
        with pytest.raises(ValueError, match=r"head\.safetensors is missing or not what was written"):
            opened.targets([made[0][0]], [made[0][1]])
    else:  # in the file's header, where nothing depends on it
        assert all(read(opened, one) for one in made)


def shard_is_told(folder, kind, made, own, hit, rng):
    opened, found = there(folder, kind, made, rng.choice(["lazy", "full"]))
    assert found == set(range(len(made))) or found == set(range(len(made))) - own
    assert set(opened.damaged) == (set() if len(found) == len(made) else {hit.stem})
    if hit.suffix == ".safetensors":
        assert len(found) < len(made) or not opened.damaged
    if opened.damaged:
        with pytest.raises(ValueError, match=hit.stem):
            opened.targets(*zip(*[one[:2] for one in made], strict=True))


# --- some 270 calls that fail, or are the last


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class Faults:
    """Makes the n-th call to the disk fail; of a write, half was done.

    how: "dead", no call after it is made; "full", it alone fails; "stays full", later writes and syncs fail too.
    """

    def __init__(self, monkeypatch, nth, how):
        self.nth, self.how, self.calls, self.log = nth, how, 0, []
        for name in ("replace", "link", "fsync", "unlink", "open"):
            monkeypatch.setattr(files.os, name, self._faulty(name, getattr(os, name)))
        monkeypatch.setattr(files, "open", self._opened, raising=False)

    def _faulty(self, name, real):
        def call(*args, **kwargs):
            if self.hits(name):
                if self.how == "dead" and self.calls == self.nth and name in ("replace", "link") and self.nth % 2:
                    real(*args, **kwargs)  # it was done, and killed before it returned
                self.fail()
            made = real(*args, **kwargs)
            self.log.append((name, made if name == "open" else args[0], *args[:2]))
            return made

        return call

    def hits(self, name):
        self.calls += 1
        later = self.how == "dead" or (self.how == "stays full" and name in ("write", "fsync"))
        return self.calls == self.nth or (self.calls > self.nth > 0 and later)

    def fail(self):
        raise Killed if self.how == "dead" else OSError(errno.ENOSPC, "No space left on device")

    def _opened(self, path, mode="rb", **more):
        if "w" in mode:
            if self.hits("create"):
                self.fail()
            return _File(builtins.open(path, mode, **more), self)
        return builtins.open(path, mode, **more)


class _File:
    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.faults.hits("write"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.faults.fail()
        self.faults.log.append(("write", self.file.fileno(), self.file.name))
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def write_all(folder, kind, made, flushed):
    """A writer's whole work, noting what it was promised."""
    with create(folder, kind).writer() as writer:
        for i, one in enumerate(made):
            writer.add(*one)
            if i % A_SHARD == A_SHARD - 1:
                writer.flush()
                flushed |= set(range(i + 1))


def fails(folder, kind, made, nth, how):
    """What was flushed before the n-th call failed; None: there are not so many calls."""
    flushed = set()
    with pytest.MonkeyPatch.context() as monkeypatch:
        faults = Faults(monkeypatch, nth, how)
        try:
            write_all(folder, kind, made, flushed)
        except Killed:
            assert how == "dead"
        except OSError as error:
            assert how != "dead" and str(folder) in str(error) and error.errno == errno.ENOSPC
        else:
            assert faults.calls < nth
    return flushed if faults.calls >= nth else None


@pytest.mark.parametrize("how", ["dead", "full", "stays full"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_call_to_the_disk_may_fail_or_be_the_last(tmp_path, kind, how):
    made, nth = sequences(kind), 0
    while True:
        folder = tmp_path / str(nth := nth + 1)
        flushed = fails(folder, kind, made, nth, how)
        if flushed is None:
            break
        assert how == "dead" or not list(folder.rglob("*.partial"))
        if not (folder / "manifest.json").exists():
            assert not flushed
            with pytest.raises(ValueError, match=r"manifest\.json is missing"):
                TeacherStore(folder)
        elif kind == "top_k" or (folder / "head.safetensors").exists():
            assert there(folder, kind, made)[1] >= flushed
        else:
            assert not flushed
        completes(folder, kind, made)
        shutil.rmtree(folder)
    assert nth > 40


@pytest.mark.parametrize("nth", range(1, 13))
def test_a_writer_tries_again_when_there_is_space(tmp_path, nth):
    made = sequences("top_k")
    writer = create(tmp_path, "top_k").writer()
    for one in made:
        writer.add(*one)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Faults(monkeypatch, nth, "full")
        with pytest.raises(OSError, match=f"{tmp_path}/shards/.* could not be written .No space left"):
            writer.flush()
    assert not list((tmp_path / "shards").iterdir()) and not writer.add(*made[0])
    writer.flush()
    assert there(tmp_path, "top_k", made)[1] == set(range(COUNT))


def test_files_are_synced_before_and_after_they_are_renamed(tmp_path, monkeypatch):
    faults = Faults(monkeypatch, 0, "full")
    made = sequences("hidden")
    write_all(tmp_path, "hidden", made, set())
    renamed = [i for i, call in enumerate(faults.log) if call[0] in ("replace", "link")]
    assert len(renamed) == 2 + 2 * COUNT // A_SHARD
    for i in renamed:
        partial, path = faults.log[i][2:4]
        (write, number, name), (sync, synced, *_) = faults.log[i - 2 : i]
        assert (write, name, sync, synced) == ("write", str(partial), "fsync", number)
        after = [call for call in faults.log[i + 1 :] if call[0] != "unlink"][:2]
        assert after[0][0] == "open" and after[0][2] == path.parent and after[1][:2] == ("fsync", after[0][1])
    order = [faults.log[i][3].suffix for i in renamed]
    assert order == [".json", ".safetensors"] + [".safetensors", ".json"] * (COUNT // A_SHARD)


# --- processes that are killed, and two at once


def write_and_tell(folder, kind, numbers, pipe):
    """Writes sequences one by one, and tells each after it was flushed."""
    torch.set_num_threads(1)
    made = sequences(kind)
    with create(folder, kind).writer() as writer:
        for i in numbers:
            writer.add(*made[i])
            writer.flush()
            os.write(pipe, bytes([i]))
    os._exit(0)  # without pytest's own ends


def started(folder, kind, numbers):
    """A process that writes, and the end of the pipe where it tells."""
    read_end, write_end = os.pipe()
    process = FORK.Process(target=write_and_tell, args=(folder, kind, numbers, write_end))
    process.start()
    os.close(write_end)
    return process, read_end


def kill_after(process, pipe, count, seconds):
    """Kills it some time after it has told `count` sequences; returns those."""
    found = set()
    while len(found) < count and (byte := os.read(pipe, 1)):
        found |= set(byte)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    return found


def told(process, pipe):
    """What it was promised until it ended."""
    with os.fdopen(pipe, "rb") as file:
        found = set(file.read())
    process.join(30)
    return found


@pytest.mark.parametrize("seed", range(40 if WHOLE else 12))
def test_sigkill_loses_nothing_that_was_flushed(tmp_path, seed):
    kind = KINDS[seed % 2]
    process, pipe = started(tmp_path, kind, range(COUNT))
    seconds = np.random.default_rng(seed).uniform(0, 0.006)
    flushed = kill_after(process, pipe, seed % COUNT, seconds) | told(process, pipe)
    made = sequences(kind)
    create(tmp_path, kind)
    assert there(tmp_path, kind, made)[1] >= flushed
    completes(tmp_path, kind, made)


@pytest.mark.parametrize("seed", range(30 if WHOLE else 10))
def test_two_writers_at_once_and_one_is_killed(tmp_path, seed):
    kind, rng = KINDS[seed % 2], np.random.default_rng(seed)
    made, lists = sequences(kind), [rng.permutation(COUNT)[:6].tolist() for _ in range(2)]
    writers = [started(tmp_path, kind, numbers) for numbers in lists]
    first = kill_after(*writers[0], seed % 6, rng.uniform(0, 0.006)) if seed % 3 else set()
    flushed = [told(*writer) for writer in writers]
    flushed[0] |= first
    assert flushed[1] == set(lists[1]) and (seed % 3 or flushed[0] == set(lists[0]))
    found = there(tmp_path, kind, made)[1]
    assert flushed[0] | flushed[1] <= found <= set(lists[0]) | set(lists[1])
    completes(tmp_path, kind, made)


def create_other(folder, k, pipe):
    try:
        TeacherStore.create(folder, kind="top_k", vocabulary=300, key={}, k=k)
        os.write(pipe, b"made")
    except ValueError as error:
        os.write(pipe, str(error).encode())
    os._exit(0)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_of_two_manifests_wins(tmp_path, seed):
    answers = []
    pipes = [os.pipe() for _ in range(4)]
    processes = [FORK.Process(target=create_other, args=(tmp_path, k + 1, p[1])) for k, p in enumerate(pipes)]
    for process in processes:
        process.start()
    for process, (read_end, write_end) in zip(processes, pipes, strict=True):
        os.close(write_end)
        with os.fdopen(read_end, "rb") as file:
            answers.append(file.read().decode())
        process.join(30)
    won = answers.index("made")
    assert TeacherStore(tmp_path).settings["k"] == won + 1
    for k, answer in enumerate(answers):
        assert k == won or f"k was {won + 1} and is {k + 1}" in answer
    assert not list(tmp_path.glob("*.partial"))
