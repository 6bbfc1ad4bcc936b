"""Builds the native CPU backend against the installed torch, and the CUDA kernels where nvcc is (they need no torch and
no GPU to be built). Without compilers the package installs without them. FDISTILL_CUDA: 0 never, 1 or fail, auto.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ISA_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def native_extension():
    """The extension and the command that builds it, each source with its own instruction set."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = list(ISA_FLAGS) if on_x86 else ["default"]

    class BuildEachIsa(BuildExtension):
        """Compiles row_kernel_<isa>.cpp with that ISA's flags; a failed build leaves the pure-torch package."""

        def build_extension(self, ext):
            objects = []
            for isa in isas:
                macro = isa.upper()
                defines = [f"-DCPU_CAPABILITY={macro}", f"-DCPU_CAPABILITY_{macro}"]
                objects += self.compile_one(ext, f"csrc/cpu/row_kernel_{isa}.cpp", defines + ISA_FLAGS[isa])
            ext.extra_objects = objects
            super().build_extension(ext)

        def compile_one(self, ext, source, flags):
            import torch.utils.cpp_extension as cpp

            include = [f"-I{path}" for path in cpp.include_paths()]
            return self.compiler.compile(
                [source],
                self.build_temp,
                extra_preargs=[*include, *ext.extra_compile_args, *flags],
                depends=ext.depends,
            )

        def run(self):
            try:
                super().run()
            except Exception as error:  # any compiler, header or linker trouble: the torch backend serves instead
                print(
                    f"fdistill_kernels: native CPU backend not built ({error}); the torch backend serves",
                    file=sys.stderr,
                )

        def copy_extensions_to_source(self):
            with contextlib.suppress(Exception):  # not built: said above
                super().copy_extensions_to_source()

    extension = CppExtension(
        "fdistill_kernels._native",
        ["csrc/cpu/bindings.cpp", "csrc/cpu/products.cpp"],
        depends=["csrc/divergences.h", "csrc/cpu/row_kernel.h", "csrc/cpu/row_kernel.inc"],
        extra_compile_args=["-O3", "-std=c++20", "-fopenmp", "-Wno-psabi"] + (["-DFDISTILL_X86"] if on_x86 else []),
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildEachIsa.with_options(no_python_abi_suffix=True, use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def build_cuda(folder):
    """libfdistill_cuda.so into the package's folder, as FDISTILL_CUDA says."""
    wanted = os.environ.get("FDISTILL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FDISTILL_CUDA must be 0, 1 or auto, not {wanted!r}")
    found = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if wanted == "0" or (wanted == "auto" and not found):
        return
    library = Path(folder, "libfdistill_cuda.so")
    library.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not found:
            raise OSError("there is no nvcc on the path or under CUDA_HOME")
        subprocess.run(
            ["bash", "csrc/cuda/build.sh", str(library.resolve())], check=True, env={**os.environ, "NVCC": found}
        )
    except (OSError, subprocess.CalledProcessError) as error:
        if wanted == "1":
            raise SystemExit(f"fdistill_kernels: the CUDA kernels were not built ({error})") from error
        print(f"fdistill_kernels: CUDA kernels not built ({error}); Triton serves on GPUs", file=sys.stderr)


class BuildWithCuda(build_py):
    """The package's files, and the CUDA library beside them."""

    def run(self):  # noqa: D102
        super().run()
        build_cuda("fdistill_kernels" if self.editable_mode else Path(self.build_lib, "fdistill_kernels"))


class NativeDistribution(Distribution):
    """Never a wheel for any platform."""

    def has_ext_modules(self):  # noqa: D102
        return True


try:
    native = native_extension()
except ImportError as error:  # no torch to build against
    print(f"fdistill_kernels: native CPU backend not built ({error})", file=sys.stderr)
    native = {}

native.setdefault("cmdclass", {})["build_py"] = BuildWithCuda
setup(distclass=NativeDistribution, **native)
