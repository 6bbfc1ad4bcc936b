"""Installed without a compiler, the package works; with one, each instruction set it was built for does."""

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.backends import cpu, native

from .conftest import WHOLE, instruction_sets

ROOT = Path(__file__).parent.parent
LICENSES = ("LICENSE", "LICENSE.python_reference")


def run(*args, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )


def test_without_a_compiler(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "fdistill_kernels", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in", *LICENSES):
        (source / name).symlink_to(ROOT / name)
    stale = tmp_path / "lib" / "fdistill_kernels"
    stale.mkdir(parents=True)
    for name in ("_native", "libfdistill_cpu", "libfdistill_cuda"):  # of an older build
        (stale / f"{name}.so").write_bytes(b"")
    built = run("setup.py", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib"),
                "egg_info", "--egg-base", str(tmp_path), cwd=source, CC="/bin/false", CXX="/bin/false", FDISTILL_CUDA="0")  # fmt: skip
    assert built.returncode == 0 and "the cpu library is not built: the compiler '/bin/false' failed" in built.stderr
    doctor = run("-m", "fdistill_kernels.cli", "doctor", cwd=tmp_path / "lib").stdout
    assert (
        "backend cpu on cpu: the cpu library is not built: the compiler '/bin/false' failed at install time" in doctor
    )
    assert "auto on cpu logits: torch" in doctor and "FDISTILL_CUDA was 0 at install time" in doctor
    assert "pip install --no-cache-dir --force-reinstall --no-deps" in doctor and "libfdistill_cpu.log" in doctor
    assert not list(tmp_path.glob("lib/**/*.so")) and not list(tmp_path.glob("lib/**/*.partial"))
    use = "import torch, fdistill_kernels as fk; x = torch.zeros(2, 9, requires_grad=True); fk.f_divergence(x, x).backward()"
    assert run("-c", use, cwd=tmp_path / "lib").returncode == 0


def test_a_library_that_is_named_is_the_one_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.log_of("cpu").write_text("there was no compiler\nand so on")
    with pytest.raises(OSError, match=r"not built: there was no compiler$"):
        native.open_library("cpu", 1)
    monkeypatch.setenv("FDISTILL_CPU_LIBRARY", "/nosuch/library.so")
    with pytest.raises(OSError, match=r"not built: there is no /nosuch/library\.so"):
        native.open_library("cpu", 1)


@pytest.fixture
def compiler(tmp_path):
    """One whose output is the library that is here: `make` has compiled these sources once, which takes a minute."""
    path, here = tmp_path / "c++", Path(cpu.__file__).parents[1] / "libfdistill_cpu.so"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-dumpmachine*) exec c++ "$@" ;; esac\n'
        f'while [ "$1" != -o ]; do shift; done\ncp "{here}" "$2"\n'
    )
    path.chmod(0o755)
    return "c++" if WHOLE else str(path)


def tracked():
    """What git has, which is what the tests may read; of a link to a folder, the folder's files."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {name for name in names if name and not (ROOT / name).is_dir()}


def files_in(sdist):
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_an_sdist_makes_a_wheel_that_works(tmp_path, compiler):
    """Of all that git has; without torch at build time; into a folder that Python then finds before this one."""
    made = run("setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    if (ROOT / ".git").exists():  # an sdist's own tests have none
        assert not (missing := tracked() - files_in(sdist)), f"MANIFEST.in leaves out {sorted(missing)}"
    made = run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist),
               FDISTILL_CUDA="0", CXX=compiler)  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(wheel) as archive:
        sizes = {x.filename: x.file_size for x in archive.infolist() if x.filename.endswith((".so", ".log"))}
        names = {Path(x).name for x in archive.namelist()}
    assert {*LICENSES, "python_reference.txt.gz", "py.typed"} <= names
    assert list(sizes) == ["fdistill_kernels/libfdistill_cpu.so", "fdistill_kernels/libfdistill_cuda.log"]
    assert sizes["fdistill_kernels/libfdistill_cpu.so"] < 4.5e6
    place = tmp_path / "place"
    assert run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)).returncode == 0
    verify = run("-m", "fdistill_kernels.cli", "verify", "--shape", "3,999", "--divergence", "js", "--json", cwd=place)
    assert verify.returncode == 0 and {"cpu", "torch"} <= {o["backend"] for o in json.loads(verify.stdout)}


#: In one process: most of what either takes is its beginning.
DOCTOR_THEN_VERIFY = """
from fdistill_kernels.cli import main
main(["doctor", "--json"])
print("---")
raise SystemExit(main(["verify", "--shape", "3,4999"]))
"""


@pytest.mark.parametrize("capability", instruction_sets())
def test_every_instruction_set(capability):
    # without Triton, whose kernels know no instruction set
    done = run("-c", DOCTOR_THEN_VERIFY, ATEN_CPU_CAPABILITY=capability.lower(), TRITON_INTERPRET="0")
    report, _, table = done.stdout.partition("---")
    assert done.returncode == 0 and "js" in table, done.stdout + done.stderr
    assert json.loads(report)["instruction_set"] in (capability, "NO AVX")


def test_a_library_older_than_a_divergence_says_so(monkeypatch):
    own = cpu.row_task
    monkeypatch.setattr(cpu, "row_task", lambda *given: ("Newer", *own(*given)[1:]))
    with pytest.raises(
        RuntimeError, match=r"'Newer' did not run: there is no such kernel; .*build it again.*cpu/build.sh \S+_cpu.so"
    ):
        fk.f_divergence(torch.zeros(2, 3), torch.zeros(2, 3), backend="cpu")


@pytest.mark.parametrize("library, compiler", [("cpu", "CXX"), ("cuda", "NVCC")])
def test_a_library_is_built_where_its_caller_says(library, compiler, tmp_path):
    """Whose folder is not the script's; by a compiler that finds its source and writes its last argument's file."""
    fake = tmp_path / "compiler"
    fake.write_text('#!/bin/sh\nfor a; do case $a in *.cu|*.cpp) test -f "$a" || exit 1;; esac; last=$o; o=$a; '
                    'test "$last" = -o && echo built > "$a"; done; exit 0\n')  # fmt: skip
    fake.chmod(0o755)
    command = ["bash", ROOT / "csrc" / library / "build.sh", "made.so"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, compiler: str(fake)}, check=True)
    assert (tmp_path / "made.so").read_text() == "built\n"


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "arm64-apple-darwin23.6.0", "x86_64-apple-darwin23.6.0", ""])
def test_instruction_sets_are_of_the_compilers_target(target, tmp_path):
    """Which need not be this machine; of one that does not say its target they are this machine's."""
    fake, calls = tmp_path / "compiler", tmp_path / "calls"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *-dumpmachine) echo {target}; exit {int(not target)};; esac\n'
                    f'echo "$@" >> {calls}; for a; do test "$o" = -o && : > "$a"; o=$a; done; exit 0\n')  # fmt: skip
    fake.chmod(0o755)
    command = ["bash", ROOT / "csrc" / "cpu" / "build.sh", tmp_path / "made.so"]
    subprocess.run(command, env={**os.environ, "CXX": str(fake)}, check=True)
    built = set(re.findall(r"FDISTILL_ISA=isa_(\w+)", calls.read_text()))
    on_x86 = (target or platform.machine()).startswith("x86_64")
    assert built == ({"default", "avx2", "avx512"} if on_x86 else {"default"})
    assert ("FDISTILL_X86" in calls.read_text()) == on_x86
