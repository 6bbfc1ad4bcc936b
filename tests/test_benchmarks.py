"""The commands of benchmarks and tests: what they take is known before they begin."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for path in sorted((ROOT / "benchmarks").rglob("*.py")) if '== "__main__":' in path.read_text()]
FILES += [ROOT / "tests" / "aot.py", ROOT / "tests" / "matrix.py"]
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for p in FILES]


def ended(module, arguments, monkeypatch, capsys):
    """A command's exit status and what it prints; the work that it begins with is an AssertionError."""

    def begins(*_):
        raise AssertionError(f"{module} has begun")

    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as found:
        for name in ("benchmarks.numbers.Numbers", "subprocess.Popen", "torch.randn", "torch.manual_seed"):
            patch.setattr(name, begins)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return found.value.code, "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
@pytest.mark.parametrize("module", MODULES)
def test_commands_help_and_refuse_what_they_do_not_know(module, monkeypatch, capsys):
    status, said = ended(module, ["--help"], monkeypatch, capsys)
    assert status == 0 and said.startswith("usage: ") and "--help" in said
    without = re.findall(r"^  (?:-\S+|[a-z]+)(?: \S+| \{.*\})*\n(?! {6})", f"{said}\n", re.MULTILINE)
    assert not without and "default: None" not in said, without
    told = ast.get_docstring(ast.parse(FILES[MODULES.index(module)].read_text()), clean=False)
    assert set(told.splitlines()) <= set(said.splitlines()), "as it is written, its commands on lines of their own"
    given = ["--out", "nowhere", "--data", "nowhere", "--who", "peers"] if "--out" in said else []
    given = [x for option in zip(given[::2], given[1::2], strict=True) if option[0] in said for x in option]
    for unknown in (["--no-such-option"], ["folder", "no-such-argument"]):
        status, said = ended(module, [*given, *unknown], monkeypatch, capsys)
        assert status == 2 and "not used" in said.replace("unrecognized", "not used") and unknown[-1] in said


@pytest.mark.parametrize("module, arguments", [
    ("benchmarks.lists", ["--errors", "--steps", "0"]), ("benchmarks.stores", ["--sequences", "0"]),
    ("benchmarks.trainers", ["--steps", "-1"]), ("benchmarks.cluster_demo", ["--steps", "0"]),
    ("benchmarks.cluster_demo", ["--teacher-steps", "0"]), ("benchmarks.peers", ["--out", "x", "--depth", "0"]),
    ("benchmarks.paper.run", ["--data", "x", "--out", "x", "--processes", "0"]),
    *(("benchmarks.peers", ["--out", "x", "--seconds", text]) for text in ("0", "nan", "inf", "soon")),
    ("benchmarks.stores", ["--sequences", "12"]), ("benchmarks.trainers", ["--steps", "2"]),  # too few to be measured
])  # fmt: skip
def test_numbers_of_nothing_are_refused(module, arguments, monkeypatch, capsys):
    status, said = ended(module, arguments, monkeypatch, capsys)
    assert status == 2 and arguments[-2] in said and "must be" in said and "Traceback" not in said


@pytest.mark.parametrize("module, arguments", [
    ("benchmarks.peers", ["--out", "x", "--device", "tpu"]), ("benchmarks.trainers", ["--one", "nobody", "gold"]),
    ("benchmarks.trainers", ["--one", "trl", "silver"]),
])  # fmt: skip
def test_names_of_nothing_are_refused(module, arguments, monkeypatch, capsys):
    status, said = ended(module, arguments, monkeypatch, capsys)
    assert status == 2 and arguments[-1] in said and "Traceback" not in said


def test_a_missing_peer_is_missed_before_ours_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    status, said = ended("benchmarks.trainers", [], monkeypatch, capsys)
    assert status == 2 and "trl, whose trainer is measured beside ours, is not installed" in said


@pytest.mark.parametrize("of", ["cluster_demo", "counts", "host", "stores", "peers"])
def test_a_result_file_s_folder_is_there_before_anything_is_measured(of, tmp_path, monkeypatch, capsys):
    for path in (tmp_path / "nowhere" / "x.json", tmp_path):
        status, said = ended(f"benchmarks.{of}", ["--out", str(path)], monkeypatch, capsys)
        assert status == 2 and "--out: must be a file in a folder that is there" in said


@pytest.mark.parametrize("module, arguments", [("benchmarks.lists", []), ("tests.aot", ["--part"])])
def test_commands_that_would_do_nothing_or_half_say_so(module, arguments, monkeypatch, capsys):
    status, said = ended(module, arguments, monkeypatch, capsys)
    assert status == 2 and (said.rstrip().endswith("or both") or "--part is of --json" in said)


def test_no_run_is_no_run_to_look_on_at(tmp_path, monkeypatch, capsys):
    """Where it would wait for ever, and make the folder."""
    nowhere = tmp_path / "nowhere"
    arguments = ["--watch", "--data", str(tmp_path), "--out", str(nowhere)]
    status, said = ended("benchmarks.paper.run", arguments, monkeypatch, capsys)
    assert status == 2 and f"{nowhere} holds no run" in said and not nowhere.exists()
