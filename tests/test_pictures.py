"""What docs/which_divergence.md shows is what the losses do, and its result file says the same."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import beside, pictures

FOUND = json.loads(pictures.RESULT.read_text())
U = pictures.RATIOS
#: −g(t) + g(1), by hand.
SLOPES = {
    "kl": U.exp() - 1,
    "rkl": U,
    "jeffreys": U.exp() - 1 + U,
    "js": ((1 + U.exp()) / 2).log() / 2,
    "tvd": U.sign() / 2,
    "hellinger": (U / 2).exp() / 2 - 0.5,
    "pearson": (2 * U).exp() - 1,
    "neyman": 2 - 2 * (-U).exp(),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes(name):
    seen = U.abs() > 1e-9  # a tie at 0
    torch.testing.assert_close(pictures.pull(name)[seen], SLOPES[name][seen], atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("name", pictures.NAMED)
def test_students(name):
    (case,) = (c for c in FOUND["cases"] if c["divergence"] == name)
    assert {"divergence": name, **pictures.fitted(name)} == pytest.approx(case, abs=1e-9)


def test_what_the_page_says_of_them():
    mass = {c["divergence"]: c["lesser"] for c in FOUND["cases"]}
    assert (
        min(mass["kl"], mass["js"]) > 0.3 > 0.05 > max(mass["rkl"], mass["tvd"], mass["gjs(0.7)"], mass["skew_kl(0.5)"])
    )
    assert abs(mass["skew_kl(0.1)"] - mass["kl"]) < 0.01 and mass["alpha(-1)"] < 0.01 < 0.3 < mass["alpha(2)"]


def test_the_first_page_shows_the_result_files():
    shown = beside.bars()
    assert json.loads(Image.open(beside.PICTURE).text["Description"]) == shown
    for title, values in shown.items():
        ours = [value for name, value in values.items() if name.startswith("fdistill")]
        others = [value for name, value in values.items() if not name.startswith("fdistill")]
        assert ours and len(others) >= 3 and max(ours) < min(others), title
