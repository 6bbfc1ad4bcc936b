"""Other versions of Python, torch, Triton, transformers and their kin, each in an environment of its own.

One wheel is built from the working tree, and each row of the table installs it and runs a part of the tests on it, from
a copy of the tree without the package. What came of it is a line of tests/MATRIX.md; lines of rows that were not asked
for stay as they are. Environments lie under build/matrix, several GB each, and are gone after their row.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

CORE = "functional linear divergences contract"
MODELS = "deferred sequence trainer integrations run"
QUICK = "not spans and not compile"  # rows cut into spans, and compilation, which torch itself makes slow
PACKING = {
    "test_padding_sides_and_packing or test_accumulation_packing": "these models mix packed sequences: refused by name",
}


class Row(NamedTuple):
    """An environment: versions to pin, where None is the newest that pip takes, and the tests to run in it."""

    name: str
    python: str
    torch: str
    triton: str | None  # where torch brings none
    numpy: str | None
    transformers: str | None
    accelerate: str | None
    peft: str | None
    tests: str  # tests/test_*.py
    chosen: str = QUICK  # pytest's -k
    left_out: dict[str, str] = {}  # noqa: RUF012  more of -k that is not run, and why


ROWS = [
    Row("oldest", "3.10", "2.8.0", "3.4.0", "1.26.4", "4.50.0", "1.0.1", "0.14.0", f"{CORE} triton {MODELS}", left_out=PACKING),
    Row("floors", "3.11", "2.13.0", "3.9.0", "2.3.5", "4.50.0", "1.0.1", "0.14.0", f"functional {MODELS}", left_out=PACKING),
    Row("middle", "3.12", "2.11.0", "3.6.0", "2.3.5", "5.0.0", "1.10.1", "0.18.0", f"{CORE} triton {MODELS}"),
    Row("newest", "3.11", "2.14.1", None, None, None, None, None, f"{CORE} triton {MODELS}"),
    Row("newest-python", "3.13", "2.12.1", None, None, None, None, None, f"{CORE} {MODELS}"),
]  # fmt: skip

PINNED = ("numpy", "transformers", "accelerate", "peft")
SHOWN = ("torch", "triton", *PINNED)
TOOLS = "datasets matplotlib pyyaml rich sacrebleu tokenizers hypothesis pytest pytest-benchmark pytest-xdist".split()
ROOT = Path(__file__).resolve().parent.parent
PLACE, REPORT = ROOT / "build" / "matrix", ROOT / "tests" / "MATRIX.md"
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1"}


class NotRunError(Exception):
    """A row that this machine cannot run, and why."""


def output(*command: object, **more) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, **more
    ).stdout.strip()


def interpreter(version: str) -> str:
    """A Python of that minor version: pyenv's, or one on the path."""
    places = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), shutil.which(f"python{version}")]
    for place in filter(None, places):
        if subprocess.run([place, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(place)
    raise NotRunError(f"no Python {version} on this machine")


def copied(place: Path) -> Path:
    """The working tree and its wheel, with no package in it that could be imported in the wheel's place."""
    for name in output("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    environment = {**os.environ, "FDISTILL_CUDA": "0"}
    output(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place / "dist", place, env=environment)
    shutil.rmtree(place / "fdistill_kernels")
    shutil.rmtree(place / "build", ignore_errors=True)
    return next(place.glob("dist/*.whl"))


def installed(row: Row, wheel: Path, reuse: bool) -> tuple[Path, dict[str, str]]:
    """The row's Python and the versions in it, torch first and alone, so that nothing else moves it."""
    place, base = PLACE / row.name, interpreter(row.python)
    if not reuse:
        shutil.rmtree(place, ignore_errors=True)
    if not (place / "bin/python").exists():
        output(base, "-m", "venv", place)
    python = place / "bin/python"
    script = "import sys; from importlib.metadata import version; print(*[version(n) for n in sys.argv[1:]])"
    pip = python, "-m", "pip", "install", "--quiet"
    try:
        output(*pip, f"torch=={row.torch}")
        before = output(python, "-c", script, "torch")
        if not list(place.glob("lib/*/site-packages/triton")):
            output(*pip, "--no-deps", f"triton=={row.triton}" if row.triton else "triton")
        output(*pip, *(f"{n}=={v}" if (v := getattr(row, n)) else n for n in PINNED), *TOOLS, f"torch=={before}")
        output(*pip, "--no-deps", "--force-reinstall", wheel)
    except subprocess.CalledProcessError as error:
        raise NotRunError(f"pip failed: {' '.join(error.cmd[5:])}") from error
    versions = dict(zip(SHOWN, output(python, "-c", script, *SHOWN).split(), strict=True))
    assert versions["torch"] == before and before.split("+")[0] == row.torch, versions
    return python, versions


def tested(row: Row, python: Path, tree: Path) -> tuple[str, bool]:
    """What pytest says of the installed package, in a few words, and whether all is well."""
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **SETTINGS}
    where = output(python, "-c", "import fdistill_kernels as f; print(f.__file__)", cwd=tree, env=environment)
    assert Path(where).is_relative_to(PLACE / row.name), f"not the installed package: {where}"
    chosen = " and ".join(f"({x})" for x in (row.chosen, *(f"not ({x})" for x in row.left_out)))
    files = [f"tests/test_{name}.py" for name in row.tests.split()]
    report, start = tree / f"{row.name}.xml", time.monotonic()
    command = [
        str(python),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--junitxml={report}",
        "-k",
        chosen,
    ]
    code = subprocess.run([*command, *files], cwd=tree, env=environment).returncode
    suite = next(ET.parse(report).iter("testsuite"))
    skipped, bad = int(suite.get("skipped", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    said = f"{int(suite.get('tests', 0)) - bad - skipped} passed, {bad} failed, {skipped} skipped"
    cases = (c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None)
    names = ", ".join(f"`{c.get('name')}`".replace("|", "\\|") for c in cases)
    return f"{said} in {time.monotonic() - start:.0f} s{': ' + names if names else ''}", code == 0


def write(lines: dict[str, str]) -> None:
    """The report: one line a row, and what the rows' tests are."""
    head = f"| row | python | {' | '.join(SHOWN)} | result | when, of what |\n|{'---|' * (len(SHOWN) + 4)}\n"
    never = " | ".join("–" * len(SHOWN))
    table = "".join(
        lines.get(r.name, f"| {r.name} | {r.python} | {never} | not run: not asked for yet | – |\n") for r in ROWS
    )
    tests = "".join(f"- {r.name}: {r.tests}; `-k \"{r.chosen}\"`" + "".join(
        f"; without `{x}`: {why}" for x, why in r.left_out.items()) + "\n" for r in ROWS)  # fmt: skip
    REPORT.write_text(f"# Versions\nWritten by `make test-matrix`: versions as installed, one wheel for all that ran "
                      f"together.\n\n{head}{table}\n## Tests of each row\n`tests/test_*.py`:\n\n{tests}")  # fmt: skip


def main() -> int:
    """All rows, or those asked for; 1 if one failed or could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=[r.name for r in ROWS], help="this row alone; may be repeated"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--reuse", action="store_true", help="go on with an environment that is there")
    asked = parser.parse_args()
    old = REPORT.read_text().splitlines(keepends=True) if REPORT.exists() else []
    lines = {r.name: line for r in ROWS for line in old if line.startswith(f"| {r.name} |")}
    clean = not output("git", "status", "--porcelain", "--", ".", f":!{REPORT.relative_to(ROOT)}", cwd=ROOT)
    commit = output("git", "rev-parse", "--short", "HEAD", cwd=ROOT) + ("" if clean else " and changes")
    well = True
    with tempfile.TemporaryDirectory() as folder:
        wheel = copied(Path(folder))
        for row in [r for r in ROWS if not asked.only or r.name in asked.only]:
            versions = dict.fromkeys(SHOWN, "–")
            try:
                python, versions = installed(row, wheel, asked.reuse)
                result, passed = tested(row, python, Path(folder))
            except NotRunError as error:
                result, passed = f"not run: {error}", False
            well &= passed
            shown = " | ".join(versions.values())
            lines[row.name] = (
                f"| {row.name} | {row.python} | {shown} | {result} | {datetime.date.today()}, {commit} |\n"
            )
            print(lines[row.name], flush=True)
            write(lines)
            if not asked.keep:
                shutil.rmtree(PLACE / row.name, ignore_errors=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
