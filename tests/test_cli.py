"""The command, run as a person does; and the demo, interrupted and gone on with."""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from fdistill_kernels import TABLE, backends, cli, demo, doctor, peers, provenance, verify
from fdistill_kernels.backends import cpu
from fdistill_kernels.commands import common
from fdistill_kernels.sequence import arguments, serve
from fdistill_kernels.sequence.trainer import FDistillConfig

from . import processes
from .conftest import WHOLE

COMMAND = [sys.executable, "-m", "fdistill_kernels.cli"]


def run(capsys, *args):
    status = cli.main(args)
    return status, capsys.readouterr().out


def test_list_names_every_divergence(capsys):
    status, out = run(capsys, "list", "--json")
    assert status == 0 and [row["name"] for row in json.loads(out)] == list(TABLE)
    parameters = {row["name"]: row["parameters"] for row in json.loads(out)}
    assert parameters["csd"] == {"weight": "teacher"} and parameters["ab"] == {"alpha": 0.2, "beta": 0.7}
    assert "skew_kl" in run(capsys, "list")[1]


def test_list_knows_of_every_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, backend in backends.BACKENDS.items():
        of = "cuda" if name == "triton" else "cpu"
        monkeypatch.setattr(backend, "why_not", lambda device, *_, of=of: None if device.type == of else "elsewhere")
    assert all(row["backends"] == list(backends.BACKENDS) for row in json.loads(run(capsys, "list", "--json")[1]))


def test_doctor_says_what_would_run(capsys):
    report = json.loads(run(capsys, "doctor", "--json")[1])
    assert report["auto"]["cpu"] == "cpu" and report["backends"]["torch"]["cpu"] == "ready"
    assert "auto on cpu logits: cpu" in run(capsys, "doctor")[1]


def test_doctor_without_the_native_backend(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "NOT_LOADED", "the cpu library is not built")
    monkeypatch.setattr(cpu, "LIBRARY", None)
    out = run(capsys, "doctor")[1]
    assert " -m pip install --no-cache-dir --force-reinstall --no-deps" in out, "without a log, too"
    monkeypatch.setenv("FDISTILL_CPU_LIBRARY", "/nosuch.so")
    assert "FDISTILL_CPU_LIBRARY names a cpu library that does not load" in run(capsys, "doctor")[1]
    assert "backend cpu on cpu: the cpu library is not built" in out and "auto on cpu logits: torch" in out


@pytest.mark.parametrize(("found", "given"), [
    ({"url": "HERE/a%20b/cl%C3%B6ne", "dir_info": {}}, "HERE/a b/clöne"),
    ({"url": "file:///a%20b", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}}, "git+file:///a%20b@1a2b"),
    ({"url": "https://host/a%20b.tar.gz", "archive_info": {}}, "https://host/a%20b.tar.gz"),
    ({"url": "HERE/gone.tar.gz", "archive_info": {}}, "."),
    ({"url": "HERE/a%20b/any.whl", "archive_info": {}}, "."),
    ({"url": "https://host/any.whl", "archive_info": {}}, "."),
    (None, "."),  # from an index, which has wheels at most
])  # fmt: skip
def test_doctors_command_can_be_pasted(found, given, monkeypatch, tmp_path):
    """It builds for the Python that runs, by what that has, from something that has the sources."""
    from fdistill_kernels.backends import native

    monkeypatch.setattr(native, "FOLDER", tmp_path / "site" / "fdistill_kernels")
    (tmp_path / "a b" / "clöne").mkdir(parents=True)
    (tmp_path / "a b" / "any.whl").touch()
    text = found and json.dumps(found).replace("HERE", tmp_path.as_uri())
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    flags = ["--no-cache-dir", "--force-reinstall", "--no-deps", given.replace("HERE", str(tmp_path))]
    assert shlex.split(doctor.build_command()) == [sys.executable, "-m", "pip", "install", *flags]
    monkeypatch.setattr(cpu, "LIBRARY", None)
    assert any(line.endswith("then run, in a clone,") for line in doctor.remedy("cpu")) == (given == ".")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert shlex.split(doctor.build_command()) == ["uv", "pip", "install", "--python", sys.executable, *flags]
    (tmp_path / "a b" / "setup.py").touch()
    monkeypatch.setattr(native, "FOLDER", tmp_path / "a b" / "fdistill_kernels")
    assert shlex.split(doctor.build_command())[-2:] == ["--editable", str(tmp_path / "a b")]


def test_an_editable_install_is_seen_whatever_its_path(monkeypatch, tmp_path):
    from fdistill_kernels.backends import native

    (tmp_path / "a b").mkdir()
    found = {"url": f"{tmp_path.as_uri()}/a%20b", "dir_info": {"editable": True}}
    distribution = SimpleNamespace(read_text=lambda _: json.dumps(found))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: distribution)
    monkeypatch.setattr(native, "FOLDER", tmp_path / "a b" / "fdistill_kernels")
    assert doctor._installed() == (str(tmp_path / "a b"), True)


def test_doctor_report_is_one_screen(capsys, monkeypatch, tmp_path):
    """All that a bug report needs, whatever the length of logs and variables; and no more of the environment."""
    from fdistill_kernels.backends import native

    monkeypatch.setattr(native, "log_of", lambda name: tmp_path / f"{name}.log")
    (tmp_path / "cpu.log").write_text("".join(f"line {i}\n\n" for i in range(500)) + "rows.cpp:7: " + "error " * 99)
    (tmp_path / "cuda.log").write_bytes(b"nvcc fatal: \xff\n")
    card = tmp_path / "nvidia-smi"
    card.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771 MiB, 580.159.04'\n")
    card.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"FDISTILL_CACHE": "x" * 500, "TORCH_TOKEN": "hidden", "MY_OWN": "hidden"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    status, out = run(capsys, "doctor", "--report")
    screen = out.splitlines()
    assert status == 0 and len(screen) <= 48 and max(map(len, screen)) <= 200
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    for needed in (*versions, "system: ", "commit: ", "device: NVIDIA H200, 9.0",
                   "backend cpu on cpu: ", "auto on cpu logits: ", "last lines of the cpu library's failed build:", "    line 499",
                   "rows.cpp:7: error", "nvcc fatal: \ufffd", "FDISTILL_CACHE=xxx", "TRITON_INTERPRET=1"):  # fmt: skip
        assert needed in out, needed
    assert "hidden" not in out and "line 494" not in out and "x" * 120 not in out
    report = json.loads(run(capsys, "doctor", "--report", "--json")[1])
    assert report["environment"]["FDISTILL_CACHE"] == "x" * 500 and len(report["build_logs"]["cpu"]) == 6
    assert "build_logs" not in json.loads(run(capsys, "doctor", "--json")[1])
    for name in ("package", "C++ compiler", "nvcc", "cpu library: interface", "cuda library"):
        assert any(line.startswith(name) for line in screen), name
    assert "cores usable, " in out and "GiB of RAM" in out and "torch built for " in out


def test_doctor_keeps_secrets_and_the_home_folder(capsys, monkeypatch, tmp_path):
    from fdistill_kernels.backends import native

    home = tmp_path / "home" / "ada"
    home.mkdir(parents=True)
    (home / "cpu.log").write_text(f"there was no compiler\n{home}/x.cpp: fetched https://ada:hunter2@host/x\n")
    monkeypatch.setattr(native, "log_of", lambda name: home / f"{name}.log")
    monkeypatch.setenv("HOME", str(home))
    words = ("API_KEY", "AUTH", "PASSWD", "PASS", "DB_PWD", "COOKIE", "TOKEN", "SECRET_X", "CREDENTIALS", "CREDS",
             "BEARER", "GH_PAT", "auth_x")  # fmt: skip
    for word in words:
        monkeypatch.setenv(f"FDISTILL_{word}", "hidden")
    monkeypatch.setenv("FDISTILL_MIRROR", "https://ada:hunter2@host/x")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib")
    monkeypatch.setenv("TRITON_CACHE_URL", "https://host/y?sig=hidden")
    monkeypatch.setenv("FDISTILL_CACHE", f"{home}/cache")
    for more in ([], ["--json"]):
        out = run(capsys, "doctor", "--report", *more)[1]
        assert "hidden" not in out and "hunter2" not in out and "https://***@host/x" in out
        assert "https://host/y?***" in out and "LD_LIBRARY_PATH" in out
        assert "~/cache" in out and "~/x.cpp" in out and "~/cpu.log" in out and str(home) not in out
    others = f"/mnt{home}/x:{home}2:{home}.old"
    assert doctor.shareable({"a": [f"{others}:{home}", 3, None]}) == {"a": [f"{others}:~", 3, None]}


def test_doctor_shows_amd_cards(capsys, monkeypatch, tmp_path):
    smi = tmp_path / "rocm-smi"
    smi.write_text("#!/bin/sh\necho 'device,Card Series,GFX Version'\necho 'card0,AMD Instinct MI300X,gfx942'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "device: card0,AMD Instinct MI300X,gfx942" in run(capsys, "doctor", "--report")[1]


def test_a_commit_is_this_checkouts_or_none(capsys, monkeypatch, tmp_path):
    """Installed inside of somebody's repository, and where git is missing or refuses the folder."""
    monkeypatch.delenv("FDISTILL_COMMIT", raising=False)
    theirs = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*theirs, "init", "-q"], check=True)
    subprocess.run([*theirs, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "ROOT", tmp_path / "site-packages")
        found = provenance.provenance("installed")
        assert found["commit"] is None and found["dirty"] is None
    (tmp_path / "git").write_text("#!/bin/sh\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out = run(capsys, "doctor", "--report")
    assert status == 0 and "commit: None" in out


def test_verify_passes_and_prints_json(capsys):
    some = [] if WHOLE else ["--dtype", "float64", "bfloat16"]
    status, out = run(capsys, "verify", "--shape", "2,601", "--json", *some)
    outcomes = json.loads(out)
    assert status == 0 and all(o["ok"] for o in outcomes)
    assert {o["divergence"].partition("(")[0] for o in outcomes} == set(TABLE)
    assert {(o["backend"], o["dtype"]) for o in outcomes} >= {("cpu", "bfloat16"), ("torch", "float64")}


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5, 3, 7)])
def test_verify_of_nothing(shape):
    with pytest.raises(ValueError, match="at least one row and one entry"):
        list(verify.verify("cpu", [torch.float32], shape, [TABLE["kl"]]))


def test_nothing_compared_is_no_success(capsys, monkeypatch):
    for backend in backends.BACKENDS.values():
        monkeypatch.setattr(backend, "why_not", lambda *_: "it is away")
    assert cli.main(["verify", "--divergence", "kl"]) == 2 and "nothing was compared" in capsys.readouterr().err
    assert cli.main(["verify", "--precision", "--backend", "torch"]) == 2
    assert "backend 'torch' cannot take this call: it is away" in capsys.readouterr().err
    monkeypatch.setattr(peers.Peer, "why_not", lambda *_: "it is not installed")
    assert cli.main(["verify", "--peers", "--divergence", "kl"]) == 2
    assert "eager: it is not installed" in capsys.readouterr().err


def test_an_empty_store_is_not_verified(capsys, tmp_path):
    from fdistill_kernels.teachers import TeacherStore

    TeacherStore.create(tmp_path / "store", kind="top_k", vocabulary=100, key={}, k=8)
    assert cli.main(["teacher", "verify", str(tmp_path / "store")]) == 2
    assert "holds no sequences: nothing was verified" in capsys.readouterr().err


def test_peers_json_has_no_infinity(capsys, monkeypatch):
    def fails():
        def loss(*_):
            raise RuntimeError("its own fault")

        return loss

    monkeypatch.setattr(peers, "found", lambda form, name: [peers.Peer("theirs", "rows", name, fails)])
    call = ["verify", "--peers", "--divergence", "labels", "--shape", "2,100", "--json"]
    status, out = run(capsys, *call)
    (found,) = json.loads(out, parse_constant=pytest.fail)
    assert status == 1 and found["error"] == [None, None] and found["divergence"] == "labels"


def test_a_library_of_another_version_is_named(capsys, monkeypatch):
    class Stale:
        def __getattr__(self, name):
            return lambda *_: b"there is no such kernel" if name.endswith("rows") else None

    monkeypatch.setattr(cpu, "LIBRARY", Stale())
    assert cli.main(["verify", "--divergence", "kl", "--shape", "2,100", "--dtype", "float32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no such kernel; the library is older than the divergence: build it again" in line


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.list, "run", lambda args: [][1])
    with pytest.raises(IndexError):
        cli.main(["list"])


def test_an_interrupt_has_no_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.list, "run", interrupted)
    assert cli.main(["list"]) == 130 and capsys.readouterr().err == "\nstopped\n"


def test_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "list"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_nothing_more_can_be_written():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})  # fmt: skip
    assert done.returncode == 2 and re.fullmatch("fdistill: .*No space left on device\n", done.stderr)


def test_no_memory_for_a_command_of_sequence(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr("fdistill_kernels.sequence.run.main", full)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fdistill train: there is not enough memory (tried to allocate 2.00 gib)\n"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_an_output_that_is_closed(closed):
    words = " ".join(map(shlex.quote, COMMAND))
    done = subprocess.run(f"{words} list {closed}", shell=True, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("named", ["", " ", None])
def test_doctor_without_a_named_compiler(named, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    assert doctor._compilers()[0][:2] == ("C++ compiler", "c++")


@pytest.mark.parametrize("shape", ["1,1", "3,1", "1,2"] if WHOLE else ["1,1"])
def test_verify_of_losses_that_are_0(capsys, shape):
    some = [] if WHOLE else ["--dtype", "float64", "float32"]
    status, out = run(capsys, "verify", "--shape", shape, "--json", *some)
    assert status == 0 and all(o["ok"] for o in json.loads(out))


@pytest.mark.parametrize(("json_too", "host", "shown"), [(False, "127.0.0.1", "127.0.0.1"), (True, "::1", "[::1]")])
def test_teacher_serve_says_where(capsys, monkeypatch, json_too, host, shown):
    def stopped():
        raise KeyboardInterrupt

    there = SimpleNamespace(server_address=("", 81), serve_forever=stopped, server_close=lambda: None)
    monkeypatch.setattr(serve, "server", lambda *_: there)
    asked = ("--teacher", "M", "--host", host, "--port", "0", *["--json"] * json_too)
    status, out = run(capsys, "teacher", "serve", *asked)
    said = {"teacher": "M", "url": f"http://{shown}:81"}
    assert status == 0 and (json.loads(out) == said if json_too else out == f"serving M at {said['url']}\n")


def test_a_device_that_torch_was_not_built_for_is_a_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--device", "mps"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "'mps' cannot be used" in line and len(line) < 320


def test_every_device_is_verified(capsys, monkeypatch):
    """A card's backends with the processor's, and by every form; timed is the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "as_device", str)
    args = [cli.parser().parse_args([name]) for name in ("verify", "bench")]
    assert [a.device for a in args] == [["cpu", "cuda"], "cuda"]
    monkeypatch.undo()
    for form in ([], ["--precision"], ["--peers"]):
        call = ["verify", *form, "--divergence", "js", "--shape", "4,1000", "--device", "cpu", "cpu:0", "--json"]
        found = [{k: r[k] for k in ("device", "divergence", "ok")} for r in json.loads(run(capsys, *call)[1])]
        half = len(found) // 2
        assert {r["device"] for r in found[:half]} == {"cpu"} and {r["device"] for r in found[half:]} == {"cpu:0"}


def test_verify_fails_on_a_miss(capsys, monkeypatch):
    monkeypatch.setattr(verify, "TOLERANCES", dict.fromkeys(verify.TOLERANCES, (0.0, 0.0)))
    status, out = run(capsys, "verify", "--shape", "3,1001", "--divergence", "js", "alpha=0.3", "--dtype", "float32")
    assert status == 1 and "MISS" in out and "alpha(0.3)" in out


def test_bench(capsys):
    status, out = run(capsys, "bench", "--shape", "4,500", "--divergence", "kl", "--json")
    assert status == 0 and {r["what"] for r in json.loads(out)["results"]} == {"fdistill", "eager"}


@pytest.mark.parametrize(
    "args, message",
    [(["verify", "--divergence", "jss"], "did you mean 'js'"), (["bench", "--shape", "12"], "shape must be N,V"),
     (["bench", "--shape", "0,5"], "shape must be N,V"),
     (["verify", "--divergence", "kl=2"], "takes no parameter"), (["bench", "--divergence", "gjs=2"], "beta must be")],
)  # fmt: skip
def test_misuse(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err


BAD = {
    "backend": (["bench", "--backend", "nosuch"], "invalid choice: 'nosuch'"),
    "device": (["bench", "--device", "cuda:77"], "'cuda:77' cannot be used"),
    "no such device": (["verify", "--device", "nosuch"], "'nosuch' cannot be used"),
    "threads": (["bench", "--threads", "0"], "must be a positive number"),
    "more threads than cores": (["bench", "--threads", "100000"], "must be at most"),
    "a device without data": (["verify", "--device", "meta"], "'meta' cannot be used: its tensors have a shape and no data"),
    "and none to time": (["bench", "--device", "meta"], "'meta' cannot be used"),
    "refused": (["bench", "--backend", "cuda", "--device", "cpu", "--shape", "4,100"], "backend 'cuda' cannot take this call"),
    "of another report": (["verify", "--backend", "torch"], "--backend is used only with --precision: without it every"),
    "unused": (["verify", "--precision", "--dtype", "float32"], "--dtype is not used with --precision"),
    "labels alone": (["verify", "--divergence", "labels"], "labels, is compared only with --peers"),
    "twice": (["bench", "--shape", "4,100", "--shape", "5,100"], "argument --shape: given twice"),
    "no tensor": (["bench", "--shape", "9999999999,9999999999"], "no tensor has 9999999999·9999999999 entries"),
    "no memory": (["bench", "--divergence", "kl", "--shape", "100000000,100000000"], "there is not enough memory (tried to"),
    "no memory to verify in": (["verify", "--shape", "100000000,100000000"], "there is not enough memory (tried to"),
    "parameters by name": (["bench", "--divergence", "gjs=beta=0.1"], "given without their names: gjs=0.1"),
    "divergence is no source": (["train", "--teacher", "x", "--data", "x.tsv", "--divergence", "js", "--shares",
                                 "divergence=1"], "shares have unknown sources ['divergence']"),
    "expects nothing": (["demo", "--expect", "EMPTY", "--out", "OUT"], "has results of no model"),
    "not tuned": (["bench", "--tune", "--compile"], "--tune times the Triton backend alone"),
    "nor this": (["bench", "--tune", "--backend", "cpu"], "--tune times the Triton backend alone"),
    "no teacher to compare with": (["teacher", "verify", "OUT", "--seed", "3"], "--sequences and --seed choose what"),
    "no expectations": (["demo", "--expect", "nosuch.json", "--out", "OUT"], "nosuch.json"),
    "json first": (["teacher", "--json", "build"], "--teacher is needed"),
    "no file": (["demo", "--text", "nosuch.txt", "--out", "OUT"], "nosuch.txt"),
    "not text": (["demo", "--text", "BYTES", "--out", "OUT"], "BYTES cannot be read ('utf-8' codec can't decode"),
    "expects no JSON": (["demo", "--expect", "SHORT", "--out", "OUT"], "SHORT cannot be read (Expecting value"),
    "a seed of more bits": (["demo", "--seed", "9223372036854775808"], "argument --seed: must be an integer of 64 bits, not"),
    "and of a store's": (["teacher", "verify", "OUT", "--teacher", "x", "--seed", "1.5"], "argument --seed: must be an integer"),
    "no checkpoint": (["demo", "--out", "DAMAGED"], "checkpoint.pt cannot be read ("),
    "nowhere to listen": (["teacher", "serve", "--teacher", "MODEL", "--host", "nosuch.invalid"], "host nosuch.invalid, port 8000: "),
    "listening already": (["teacher", "serve", "--teacher", "MODEL", "--port", "TAKEN"], "in use"),
    "too little": (["demo", "--text", "SHORT", "--out", "OUT"], "fdistill demo: the text is too short"),
    "no folder": (["demo", "--out", "/proc/nosuch"], "/proc/nosuch"),
    "no data": (["train", "--teacher", "nosuch", "--data", "nosuch.tsv", "--output_dir", "OUT"], "nosuch.tsv"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_and_no_traceback(name, tmp_path, capsys):
    call, message = BAD[name]
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe")
    (tmp_path / "SHORT").write_text("a few words")
    (tmp_path / "EMPTY").write_text("{}")
    for folder, file, content in (
        ("DAMAGED", "checkpoint.pt", "PK"),
        ("MODEL", "config.json", '{"model_type": "gpt2"}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
    taken = socket.create_server(("127.0.0.1", 0))
    places = {name: str(tmp_path / name) for name in ("OUT", "BYTES", "SHORT", "EMPTY", "DAMAGED", "MODEL")}
    places["TAKEN"] = str(taken.getsockname()[1])
    try:
        status = cli.main([places.get(a, a) for a in call])
    except SystemExit as stop:
        status = stop.code
    finally:
        taken.close()
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and message in last and last.startswith("fdistill"), last


def test_a_terminal_of_ascii_alone():
    command = [*COMMAND, "bench", "--shape", "4,100", "--divergence", "kl", "--threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and "? floor" in done.stdout


def test_every_option_has_a_help():
    def options(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    assert sub.description, name
                    yield from options(sub)
            elif action.option_strings:
                yield action

    assert [o.dest for o in options(cli.parser()) if not o.help] == []
    own = {f.name for kind in (*arguments.KINDS.values(), FDistillConfig) for f in dataclasses.fields(kind)}
    own -= {f.name for f in dataclasses.fields(TrainingArguments)}
    assert [name for name in own if len(arguments.HELP.get(name, "").split()) < 4] == []
    assert arguments.HELP.keys() - own == {"output_dir", "max_steps", "num_train_epochs"}


def test_help(capsys, monkeypatch):
    def shown(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([*args, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    own = shown("evaluate")
    assert "--eval_data" in own and "--learning_rate" not in own
    train = shown("train")
    titles = "options", "models", "data", "the run", "the objective", "transformers.TrainingArguments"
    order = [train.index(f"\n{title}:") for title in titles]
    assert order == sorted(order), "this package's options come first"
    told = " ".join((own + train).split())
    assert "(default: )" not in told and "(default: None)" not in told
    assert "number of passes over the data, in place of --max_steps --max_steps" in told  # which has a default
    off = re.findall(r"--no_(\w+) (?=the same as --\1 False --)?", told)
    assert "hidden_normalize" in off and all(f"--no_{name} the same as --{name} False --" in told for name in off)
    for command, used in arguments.USED.items():  # nothing of what it refuses
        said = shown(*command.split())
        assert set(re.findall(r"--(\w+)", said)) <= used | arguments.OF_LINE, command
    assert "fdistill-run" not in own and "training rows" not in own
    monkeypatch.setattr(cli, "NEEDED", ("nosuch_package",))
    assert '(needs pip install ".[sequence]" in a clone)' in " ".join(shown("train").split())
    assert cli.main(["train", "--data", "x"]) == 2
    assert 'nosuch_package missing: pip install ".[sequence]" in a clone' in capsys.readouterr().err


def test_no_message_names_the_package_on_an_index():
    """It is on none: `pip install 'fdistill_kernels[demo]'` finds nothing."""
    folder = Path(cli.__file__).parent
    assert [p for p in folder.rglob("*.py") if "fdistill_kernels[" in p.read_text(encoding="utf-8")] == []


def test_the_demo_reads_the_text_of_its_committed_results():
    """The package's copy, whatever the Python: its own has another text in each release."""
    results = json.loads((Path(__file__).parent.parent / "benchmarks/results/demo_cpu.json").read_text())
    assert hashlib.sha256(demo.read_text(None).encode()).hexdigest() == results["text_sha256"]


#: Sizes at which all that the demo does takes seconds; its own are `make demo`'s.
TEACHER, STUDENT = dict(n_embd=96, n_layer=3, n_head=4), dict(n_embd=32, n_layer=2, n_head=4)
SMALL = dict(VOCABULARY=600, CONTEXT=32, TEACHER=TEACHER, STUDENT=STUDENT)


def interrupted(arguments):
    """The demo of small models, which is told to end as by a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    vars(demo).update(SMALL)
    sys.exit(cli.main(arguments))


def test_demo_survives_an_interrupt_and_distils(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(demo.read_text(None)[:120_000])
    call = ["demo", "--out", str(tmp_path), "--json", "--text", str(text), "--teacher-steps", "150",
                 "--start-steps", "20", "--student-steps", "40", "--divergence", "dkd", "kl"]  # fmt: skip
    words, deadline = tmp_path / "words.txt", time.monotonic() + 240
    process = processes.begin(interrupted, call, output=words)
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(280)
    assert process.exitcode == 130 and "continues from" in words.read_text()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 50 <= saved["teacher"]["done"] < 150
    for name, value in SMALL.items():
        monkeypatch.setattr(demo, name, value)
    assert cli.main(call) == 0
    finished = capsys.readouterr()
    assert "continuing from" in finished.err
    results = json.loads(finished.out)
    models = results["models"]
    assert models["kl"]["steps"] == models["baseline"]["steps"] == models["dkd(1, 8)"]["steps"] == 40
    assert models["kl"]["kl_to_teacher"] < models["baseline"]["kl_to_teacher"] < models["start"]["kl_to_teacher"]
    assert models["teacher"]["parameters"] > 4 * models["kl"]["parameters"]
    assert {"device", "torch", "commit", "dirty", "command", "text_sha256"} <= set(results)
    console = Console(file=io.StringIO(), width=200)
    assert demo._compare(models, models, console) == 0
    other = json.loads(json.dumps(results))
    other["models"]["kl"]["perplexity"] *= 1.1
    assert demo._compare(models, other["models"], console) == 1 and "kl's perplexity is" in console.file.getvalue()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    other["models"]["js"] = {}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert cli.main([*call, "--expect", str(tmp_path / "other.json")]) == 2
    assert "other.json has results of js, which are not asked for" in capsys.readouterr().err
    del other["models"]["js"]
    other["models"]["kl"]["steps"] = 41
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert cli.main([*call, "--expect", str(tmp_path / "other.json")]) == 2
    assert "other.json has results of 41 steps of kl, not of 40" in capsys.readouterr().err
    (tmp_path / "other.json").write_text(json.dumps(results | {"text_sha256": "0"}))
    assert cli.main([*call, "--expect", str(tmp_path / "other.json")]) == 2
    assert "other.json has results of another text" in capsys.readouterr().err
    assert cli.main([*call, "--seed", "1"]) == 2
    assert "was made with other seed: give --restart" in capsys.readouterr().err
    assert cli.main(["41" if word == "40" else word for word in call]) == 2
    assert "was made with other steps: give --restart" in capsys.readouterr().err
