"""Every example runs whole, and what it is about has happened."""

import runpy
import sys

import pytest

from .pages import PAGES, ROOT

FOLDER = ROOT / "examples"


@pytest.fixture
def run(monkeypatch):
    """An example's names after its last cell."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))
    sys.modules.pop("small", None)


def patched_fine_tune(found):
    assert found["patched"].logits is None and abs(found["own"].loss / found["patched"].loss - 1) < 1e-5
    assert found["losses"][-1] < 0.5 * found["losses"][0]


def distil_chat(found):
    assert len(found["rows"]) == 2 * len(found["chats"]) and found["after"] < 0.6 * found["before"]


def teacher_server(found):
    assert found["after"] < 0.3 * found["before"]


def coverage_and_risk(found):
    kl, rkl = (found["found"][name] for name in ("kl", "rkl"))
    assert kl["coverage_risk"] < rkl["coverage_risk"] and kl["kl"] < rkl["kl"]
    assert all(0 < risks["likelihood_risk"] < 3 for risks in (kl, rkl)) and len(found["table"]) == 80


CHECKS = [patched_fine_tune, distil_chat, teacher_server, coverage_and_risk]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_examples(check, run):
    check(run(check.__name__))


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {check.__name__ for check in CHECKS} | {"small"}
    for check in CHECKS:
        name = check.__name__
        assert f"](../examples/{name}.py)" in PAGES["examples"] and f"<!-- example: {name} -->" in PAGES["examples"]
