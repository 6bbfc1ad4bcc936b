"""The documents' measured numbers are those of the result files, and no other number with a unit stands in them."""

import json
import re

import pytest

from benchmarks import numbers


def test_every_number_is_of_a_file(capsys):
    assert numbers.main(["--check"]) == 0, capsys.readouterr().err
    assert "benchmarks/results/cpu_rows.json: test_ours[js-torch.float32] / over_floor" in capsys.readouterr().out


def test_what_is_found(monkeypatch, tmp_path, capsys):
    for name in ("benchmarks", "docs"):
        (tmp_path / name).symlink_to(numbers.ROOT / name)
    (tmp_path / "tests").symlink_to(numbers.ROOT / "tests")
    text = (numbers.ROOT / "README.md").read_text()
    changed = (
        text.replace("| Liger-Kernel | ", "| Liger-Kernel | 1", 1)
        + "\n\nIt is 3.5× faster and takes 40 MB.\n\nAt most 16 MB (`tests/test_cut.py`).\n"
    )
    (tmp_path / "README.md").write_text(changed)
    (tmp_path / "CHANGELOG.md").write_text("- 12% less\n")
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    assert numbers.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert all(x in said for x in ("'3.5×'", "'40 MB'", "'12%'", "README.md is not what")) and "16 MB" not in said


@pytest.mark.parametrize("missing", [None, "device", "commit", "dirty"])
@pytest.mark.parametrize("kind", ["flat", "run", "pytest-benchmark"])
def test_a_file_says_where_it_is_from(kind, missing, monkeypatch, tmp_path):
    said = {"device": "a card", "commit": "c0ffee", "dirty": False}
    said.pop(missing, None)
    commit = {name: said[of] for name, of in (("id", "commit"), ("dirty", "dirty")) if of in said}
    machine = {"device": said["device"]} if "device" in said else {}
    content = {"flat": said, "run": {"run": said},
               "pytest-benchmark": {"machine_info": machine, "commit_info": commit}}[kind]  # fmt: skip
    (tmp_path / numbers.RESULTS).mkdir(parents=True)
    (tmp_path / numbers.RESULTS / "a.json").write_text(json.dumps(content))
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    if missing is None:
        assert numbers.Numbers().file("a.json") == content
    else:
        with pytest.raises(SystemExit, match=r"a\.json does not say"):
            numbers.Numbers().file("a.json")


def test_the_table_of_versions_has_what_failed():
    failed = re.findall(r"(\d+ passed, \d+ failed)", (numbers.ROOT / "tests/MATRIX.md").read_text())
    assert failed and [row[-1] for row in numbers._matrix()[1:]] == failed


RESULTS = sorted((numbers.ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_file_says_what_it_is_of(path):
    """A log of a check's steps has no dtype: the files that these have written do."""
    text = path.read_text()
    said = set(re.findall(r'"(\w+)": ', text))
    assert {"device", "torch", "python", "command", "dirty"} <= said and '"dirty": true' not in text
    assert re.search(r'"(commit|id)": "[0-9a-f]{40}"', text) and ("dtype" in said or path.stem == "gpu_check")
