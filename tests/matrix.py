"""Other versions of Python, torch, Triton, transformers and their kin, each in an environment of its own.

One wheel is built from the working tree; each row of the table installs it and runs a part of the tests on it, from a
copy of the tree without the package. What came of it is a line of tests/MATRIX.md; the lines of rows not asked for stay
as they are. Environments lie under build/matrix, several GB each, and go after their row.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import namedtuple
from datetime import date
from pathlib import Path

CORE = "functional linear divergences contract sparse triton aot"  # tests/test_*.py
# in the order of the whole suite: the tests of the trainer leave settings of accelerate behind
MODELS = "deferred integrations run sequence trainer"
# of pytest's -k, left out everywhere: what is slow, and what knows nothing of versions
SLOW = "spills or instructions or cuda or gpu_check or opcheck or deterministic or (triton and (float16 or strides))"
# of pytest's -k, left out in a row, and why
READ = {"test_optim_args_that_are_read": "before 5.3 torch's optimizers are made without them: refused by name"}
PACKED = "test_padding_sides_and_packing or test_accumulation_packing or test_packing_changes_nothing or count[packed]"
OLD_MODELS = {PACKED: "before 4.54 models mix packed sequences: refused by name", **READ}
MIDDLE = {**READ, "losses_of_experts[Switch": "5.0's own forward of Switch Transformers with router logits fails"}

# None: the newest that pip takes; Triton's is for a torch that brings none. Triton before 3.7 needs numpy < 2.4
PINNED = "torch", "triton", "numpy", "transformers", "accelerate", "peft"
Row = namedtuple("Row", ("name", "python", *PINNED, "tests", "left_out"), defaults=[{}])
ROWS = [
    Row("oldest", "3.10", "2.8.0", "3.4.0", "1.26.4", "4.50.0", "1.3.0", "0.14.0", f"{CORE} {MODELS}", OLD_MODELS),
    Row("floors", "3.11", "2.13.0", "3.9.0", "2.3.5", "4.50.0", "1.3.0", "0.14.0", f"functional {MODELS}", OLD_MODELS),
    Row("middle", "3.12", "2.11.0", "3.6.0", "2.3.5", "5.0.0", "1.3.0", "0.18.1", f"{CORE} {MODELS}", MIDDLE),
    Row("newest", "3.11", "2.15.0", None, None, None, None, None, f"{CORE} {MODELS}"),
    Row("python-3.13", "3.13", "2.12.1", None, None, None, None, None, f"{CORE} {MODELS}"),
    Row("newest-python", "3.14", "2.15.0", None, None, None, None, None, f"{CORE} {MODELS}"),
]

TOOLS = "datasets httpx matplotlib pyyaml rich sacrebleu tokenizers hypothesis pytest pytest-benchmark pytest-xdist"
ROOT = Path(__file__).resolve().parent.parent
PLACE, REPORT = ROOT / "build" / "matrix", ROOT / "tests" / "MATRIX.md"
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1"}


def output(*command: object, **more) -> str:
    """What a command prints, which must do well."""
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, **more).stdout.strip()


def interpreter(version: str) -> str:
    """A Python of that minor version: pyenv's, or one on the path that runs."""
    for place in (*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), shutil.which(f"python{version}")):
        if place and subprocess.run([place, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(place)
    raise LookupError(f"no Python {version} on this machine")


def copied(place: Path) -> Path:
    """The wheel of the working tree; and the tree in `place`, but no package that would be imported for the wheel's."""
    for name in output("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():  # a link, as the package's to the peers, stays one
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    command = sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place / "dist", place
    output(*command, env={**os.environ, "FDISTILL_CUDA": "0"})
    shutil.rmtree(place / "fdistill_kernels")
    return next(place.glob("dist/*.whl"))


def installed(row: Row, wheel: Path, reuse: bool) -> tuple[Path, list[str]]:
    """The row's Python and the versions of PINNED in it; torch first and alone, and nothing may move it after."""
    base, python = interpreter(row.python), PLACE / row.name / "bin" / "python"
    if not (reuse and python.exists()):
        output(base, "-m", "venv", "--clear", PLACE / row.name)
    pip = python, "-m", "pip", "install", "-qq"
    versions = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    output(*pip, f"torch=={row.torch}")
    torch = output(python, "-c", versions, "torch")
    if not list(python.parent.parent.glob("lib/*/site-packages/triton")):
        output(*pip, "--no-deps", f"triton=={row.triton}" if row.triton else "triton")
    pins = [f"{name}=={pin}" if (pin := getattr(row, name)) else name for name in PINNED[2:]]
    output(*pip, f"torch=={torch}", *pins, *TOOLS.split())
    output(*pip, "--no-deps", "--force-reinstall", wheel)
    found = output(python, "-c", versions, *PINNED).split()
    assert found[0] == torch and torch.split("+")[0] == row.torch, f"torch {row.torch} has become {found[0]}"
    return python, found


def tested(row: Row, python: Path, tree: Path) -> tuple[str, bool]:
    """What pytest says of the installed package, in a few words, and whether all is well."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
    where = output(python, "-c", "import fdistill_kernels; print(fdistill_kernels.__file__)", cwd=tree, env=settings)
    assert Path(where).is_relative_to(PLACE / row.name), f"not the installed package: {where}"
    report = tree / f"{row.name}.xml"
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", f"--junitxml={report}"]
    chosen = " and ".join(f"not ({part})" for part in (SLOW, *row.left_out))
    command += ["-k", chosen, *(f"tests/test_{name}.py" for name in row.tests.split())]
    code = subprocess.run(command, cwd=tree, env=settings).returncode
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    bad = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    counts = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"
    names = "".join(f" `{name}`" for name in bad).replace("|", "\\|")
    ended = "" if code in (0, 1) else f"**pytest ended with {code}**: "  # −11: a crash
    return f"{ended}{counts}, {sum(float(c.get('time')) for c in cases):.0f} s{names and ':' + names}", code == 0


def write(row: Row, *cells: str) -> None:
    """The row's line in the report; the other lines stay as they are there."""
    old = REPORT.read_text().splitlines() if REPORT.exists() else []
    lines = {r.name: f"| {r.name} | {r.python} |{' – |' * len(PINNED)} not run: never asked for | – |" for r in ROWS}
    lines |= {r.name: line for r in ROWS for line in old if line.startswith(f"| {r.name} |")}
    lines[row.name] = f"| {' | '.join((row.name, row.python, *cells))} |"
    print(lines[row.name], flush=True)
    head = f"| row | python | {' | '.join(PINNED)} | result | when, of what |\n|{'---|' * (len(PINNED) + 4)}"
    tests = [f"- {r.name}: {r.tests}" + "".join(f"; not `{x}`: {why}" for x, why in r.left_out.items()) for r in ROWS]
    about = "Written by `make test-matrix`: versions as installed, and what became of the tests of the installed wheel."
    of = f"## Tests of each row\n`tests/test_*.py`, all without `{SLOW}`, slow or of no version; of an older commit some fewer:"
    REPORT.write_text("\n".join(("# Versions", about, "", head, *lines.values(), "", of, *tests, "")))


def main() -> int:
    """All rows, or those asked for; 1 if one failed or could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[r.name for r in ROWS], help="a row; may be given again")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--reuse", action="store_true", help="go on with an environment that is there")
    asked, well = parser.parse_args(), True
    changed = output("git", "status", "--porcelain", "--", ".", f":!{REPORT.relative_to(ROOT)}", cwd=ROOT)
    of = output("git", "rev-parse", "--short", "HEAD", cwd=ROOT) + (", tree changed" if changed else ", tree clean")
    with tempfile.TemporaryDirectory() as folder:
        wheel = copied(Path(folder))
        for row in ROWS if not asked.only else [r for r in ROWS if r.name in asked.only]:
            versions = ["–"] * len(PINNED)
            try:
                python, versions = installed(row, wheel, asked.reuse)
                result, passed = tested(row, python, Path(folder))
            except (AssertionError, LookupError, OSError, subprocess.CalledProcessError) as error:
                result, passed = f"not run: {error}".replace("|", "\\|"), False
            write(row, *versions, result, f"{date.today()}, {of}")
            well &= passed
            if not asked.keep:
                shutil.rmtree(PLACE / row.name, ignore_errors=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
