"""`fdistill doctor`: how to build what is missing; and with --report, on one screen, what a bug report needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import torch

from .backends import cpu, cuda, native
from .provenance import provenance, versions

WIDTH, LOG_LINES = 118, 6
PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "tokenizers", "datasets", "peft", "trl",
            "liger-kernel", "deepspeed", "vllm")  # fmt: skip
#: The environment variables that decide which kernels are built, found and run. No other variable is shown.
PREFIXES = ("FDISTILL_", "TRITON_", "OMP_", "MKL_", "KMP_", "CUDA_", "HIP_", "ROCR_", "PYTORCH_", "TORCH_",
            "TORCHDYNAMO_", "TORCHINDUCTOR_", "ACCELERATE_", "NCCL_")  # fmt: skip
NAMES = ("ATEN_CPU_CAPABILITY", "CXX", "NVCC", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "RANK", "WORLD_SIZE")
SECRET = ("TOKEN", "SECRET", "PASS", "PWD", "CRED", "KEY", "AUTH", "COOKIE", "BEARER")


def shareable(found: Any) -> Any:
    """The same, made of dicts, lists and text, with ~ for the home folder; URLs have no credentials and queries."""
    if isinstance(found, dict):
        return {name: shareable(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [shareable(value) for value in found]
    if not isinstance(found, str):
        return found
    if len(home := os.path.expanduser("~").rstrip("/")) > 1:
        found = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", found)
    found = re.sub(r"://\S*@", "://***@", found)
    return re.sub(r"(://[^\s?]*\?)\S+", r"\1***", found)  # a query may have a key


def details() -> dict[str, Any]:
    """Collects the system, package, commit, versions, compilers, libraries, devices, failed builds and environment."""
    origin = provenance("fdistill doctor --report")
    return {
        "system": f"{platform.platform()}, {platform.python_implementation()} {platform.python_version()}",
        "package": f"{native.FOLDER}{', editable' * _installed()[1]}",
        "commit": origin["commit"] and origin["commit"] + ", changed" * bool(origin["dirty"]),
        "versions": versions(PACKAGES),
        "torch_built_for": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "compilers": {name: _answer([command, "--version"], wanted) for name, command, wanted in _compilers()},
        "libraries": {"cpu": f"interface {cpu.INTERFACE}, {cpu.capability()}" if cpu.LIBRARY else cpu.NOT_LOADED,
                      "cuda": cuda.LIBRARY.version if cuda.LIBRARY else cuda.NOT_LOADED},
        "devices": [f"{origin['device']}, {_cores()}, {_memory()}", *_cards()],
        "build_logs": {name: _last_lines(name) for name in ("cpu", "cuda") if native.log_of(name).exists()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """The text of `details`, in lines of at most WIDTH characters."""
    installed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    built = ", ".join(f"{name} {version}" for name, version in found["torch_built_for"].items() if version)
    shown = [f"{name}: {found[name]}" for name in ("system", "package", "commit")]
    shown += textwrap.wrap(f"versions: {installed}; torch built for {built or 'the CPU'}", WIDTH,
                           subsequent_indent="    ")  # fmt: skip
    shown += [f"{name}: {answer}" for name, answer in found["compilers"].items()]
    shown += [f"{name} library: {state}" for name, state in found["libraries"].items()]
    shown += [f"device: {device}" for device in found["devices"]]
    for name, log in found["build_logs"].items():
        shown += [f"last lines of the {name} library's failed build:", *(f"    {line}" for line in log)]
    shown += [f"{name}={value}" for name, value in found["environment"].items()]
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in shown]


def build_command() -> str:
    """The command that builds the libraries again: of the clone that is used, or from what was installed.

    Where that can be built no more, from the folder that the command runs in.
    """
    root, (source, _) = native.FOLDER.parent, _installed()
    what = ["--editable", str(root)] if (root / "setup.py").exists() else [source or "."]
    python = shlex.quote(sys.executable)  # another pip may come first in PATH, and uv makes environments without one
    pip = f"{python} -m pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {python}"
    return f"{pip} --no-cache-dir --force-reinstall --no-deps {shlex.join(what)}"


def remedy(library: str) -> list[str]:
    """How to build a library that this machine could use; no lines if it loads, or if another was named and does not.

    Of a build that failed its log is named, too.
    """
    log, loaded = native.log_of(library), {"cpu": cpu.LIBRARY, "cuda": cuda.LIBRARY}[library] is not None
    named = os.environ.get(variable := f"FDISTILL_{library.upper()}_LIBRARY")
    if (loaded and not log.exists()) or (library == "cuda" and not torch.cuda.is_available()):
        return []
    if named and not loaded:
        return [f"{variable} names a {library} library that does not load: without it, the package's own is used"]
    compiler = {"cpu": "a C++ compiler (g++ or clang++, or its name in CXX)", "cuda": "nvcc (or CUDA_HOME)"}[library]
    failed = [f"log of the {library} library's failed build: {log}"] if log.exists() else []
    command = build_command()
    where = ", in a clone," * command.endswith(" .")
    return [*failed, f"to build the {library} library, install {compiler}, then run{where}", f"    {command}"]


def _installed() -> tuple[str | None, bool]:
    """What the package was installed from, and whether the files that are used are those of an editable install.

    None for what builds nothing: a wheel, and a path that is gone. An index has no sources of this package.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        found = json.loads(importlib.metadata.distribution("fdistill_kernels").read_text("direct_url.json") or "{}")
        url = found["url"]
        if "vcs_info" in found:
            return f"{found['vcs_info']['vcs']}+{url}@{found['vcs_info']['commit_id']}", False
        local = url.startswith("file://")
        source = url2pathname(url.removeprefix("file://")) if local else url
        builds = not source.endswith(".whl") and (Path(source).exists() or not local)
        editable = found.get("dir_info", {}).get("editable", False) and Path(source) == native.FOLDER.parent
        return source if builds else None, editable
    return None, False


def _answer(command: list[str], wanted: str = "") -> str | None:
    """The first line that a program prints, or the first that holds `wanted`; None if it cannot be run."""
    found = _printed(command)
    return next((line.strip() for line in found if wanted in line), None)


def _printed(command: list[str]) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _compilers() -> list[tuple[str, str, str]]:
    """Name, command and a word of the line that has the version, of the compilers that setup.py takes."""
    cxx = [*os.environ.get("CXX", "").split(), "c++"][0]
    beside = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return [("C++ compiler", cxx, ""), ("nvcc", shutil.which("nvcc") or os.path.join(beside, "nvcc"), "release")]


def _cores() -> str:
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return f"{usable} of {every} cores usable"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of RAM"
    except (OSError, ValueError, AttributeError):
        return "RAM unknown"


def _cards() -> list[str]:
    """The GPUs that the drivers list, including those that torch cannot use."""
    query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    amd = [line for line in _printed(["rocm-smi", "--showproductname", "--csv"]) if line.startswith("card")]
    if torch.version.hip and torch.cuda.is_available() and not amd:
        amd = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return _printed(["nvidia-smi", *query]) + amd


def _last_lines(library: str) -> list[str]:
    text = Path(native.log_of(library)).read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_LINES:]


def _matters(name: str) -> bool:
    secret = any(word in name.upper() for word in SECRET) or name.upper().endswith("_PAT")
    return (name in NAMES or name.startswith(PREFIXES)) and not secret
