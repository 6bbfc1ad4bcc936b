"""Builds the kernels' libraries into the package: plain C++ and CUDA, which link to no torch and to no Python.

Without a compiler, or where it fails, the package installs without that library, and a log in its place says why.
FDISTILL_CUDA: 0 never builds the CUDA library, 1 fails without it, auto (the default) builds it where nvcc is.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def compiler_of(library):
    """The compiler's command, which may lead nowhere."""
    if library == "cpu":
        return os.environ.get("CXX") or "c++"
    beside = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path=beside) or "nvcc"


def build(library, folder):
    """libfdistill_<library>.so into a folder; or a log that says why there is none."""
    target = Path(folder, f"libfdistill_{library}.so").resolve()
    log = target.with_suffix(".log")
    log.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = compiler_of(library)
    partial = target.with_suffix(".partial")
    command = ["bash", f"csrc/{library}/build.sh", str(partial)]
    name = {"cpu": "CXX", "cuda": "NVCC"}[library]
    if not shutil.which(compiler.split()[0]):
        reason, output = f"there was no compiler {compiler.split()[0]!r} at install time", ""
    else:
        try:
            done = subprocess.run(command, env={**os.environ, name: compiler}, capture_output=True, text=True)
            reason, output = f"the compiler {compiler!r} failed at install time", done.stdout + done.stderr
            if done.returncode == 0:
                partial.replace(target)
                return None
        except OSError as error:
            reason, output = f"the build did not start at install time ({error})", ""
    partial.unlink(missing_ok=True)
    log.write_text(f"{reason}\n{' '.join(command)}\n{output}", encoding="utf-8")
    print(f"fdistill_kernels: the {library} library is not built: {reason}\n{output[-2000:]}", file=sys.stderr)
    return reason


def build_libraries(folder):
    """Both libraries, the CUDA one as FDISTILL_CUDA says."""
    wanted = os.environ.get("FDISTILL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FDISTILL_CUDA must be 0, 1 or auto, not {wanted!r}")
    for old in Path(folder).glob("*.so"):  # also those of earlier versions, under other names
        old.unlink()
    libraries = ("cpu",) if wanted == "0" else ("cpu", "cuda")
    with ThreadPoolExecutor() as together:  # each alone leaves processors idle
        reasons = dict(zip(libraries, together.map(lambda library: build(library, folder), libraries), strict=True))
    if wanted == "0":
        Path(folder, "libfdistill_cuda.log").write_text("FDISTILL_CUDA was 0 at install time\n", encoding="utf-8")
    elif wanted == "1" and reasons["cuda"]:
        raise SystemExit(f"fdistill_kernels: the CUDA kernels were not built: {reasons['cuda']}")


class BuildWithLibraries(build_py):
    """The package's files, and the libraries beside them."""

    def run(self):  # noqa: D102
        super().run()
        build_libraries("fdistill_kernels" if self.editable_mode else Path(self.build_lib, "fdistill_kernels"))


class AnyPython(bdist_wheel):
    """One wheel for a platform: its libraries know no Python, so every Python takes it."""

    def get_tag(self):  # noqa: D102
        return "py3", "none", super().get_tag()[2]


class WithLibraries(Distribution):
    """Never a wheel for any platform."""

    def has_ext_modules(self):  # noqa: D102
        return True


if __name__ == "__main__":
    setup(distclass=WithLibraries, cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": AnyPython})
