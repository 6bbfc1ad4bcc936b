"""`fdistill bench --report` in headless Chromium: every chart is drawn, and a number is read off each where it is drawn.

Run where there is a Chromium (`make look`; Debian: apt-get install chromium).
"""

import json
import math
import re
import shutil
import subprocess

import pytest
from PIL import Image

from fdistill_kernels import cli, report

from ..conftest import BROWSERS

SHAPE = (16, 1600)
#: Where the browser has each line's points, and the marks of the axes with their labels, in pixels of the page.
LOOK = """
<script>
function middle(element) { const box = element.getBoundingClientRect();
  return [box.left + box.width / 2 + scrollX, box.top + box.height / 2 + scrollY]; }
const found = {};
for (const line of document.querySelectorAll("svg g[id]")) {
  const axes = line.parentElement.closest("g[id*='/']");
  if (!line.id.includes("/") || !axes) continue;
  const marks = {};
  for (const axis of ["x", "y"]) marks[axis] = [...axes.querySelectorAll(`g[id^=${axis}tick]`)].map(
    tick => [tick.querySelector("text").textContent, ...middle(tick.querySelector("use"))]);
  const use = [...line.querySelectorAll("use")];
  if (!use.length) continue;  // the dotted roof
  found[line.id] = {points: use.map(middle), marks, colour: getComputedStyle(use[0]).fill};
}
const read = document.createElement("pre");
read.id = "read"; read.textContent = JSON.stringify(found);
document.body.append(read);
</script>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The page's own numbers, what the browser says is where, and its picture."""
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SECONDS", 0.005)
        path = folder / "page.html"
        assert cli.main(["bench", "--report", str(path), "--shape", "16,1600", "--divergence", "kl", "js"]) == 0
    text = path.read_text(encoding="utf-8")
    numbers = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    path.write_text(text.replace("</html>", LOOK + "</html>"), encoding="utf-8")
    chromium = next(filter(None, map(shutil.which, BROWSERS)))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,2400",
               f"--user-data-dir={folder}", "--virtual-time-budget=2000"]  # fmt: skip
    picture = folder / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", path.as_uri()], check=True, capture_output=True, timeout=120)
    dom = subprocess.run([*command, "--dump-dom", path.as_uri()], check=True, capture_output=True, timeout=120).stdout
    drawn = json.loads(re.search(r'<pre id="read">(.*?)</pre>', dom.decode(), re.DOTALL).group(1).replace("&gt;", ">"))
    return numbers, drawn, Image.open(picture).convert("RGB")


def value(marks, axis, at):
    """What an axis says at a place, by its first and last mark."""
    index = "xy".index(axis)
    (low, *a), (high, *b) = marks[axis][0], marks[axis][-1]
    a, b = a[index], b[index]
    low, high = (math.log(float(text.replace("−", "-"))) for text in (low, high))
    return math.exp(low + (at - a) / (b - a) * (high - low))


def losses(numbers):
    return list(dict.fromkeys((row["divergence"], row["what"]) for row in numbers["sizes"]))


@pytest.mark.parametrize("chart", report.CHARTS)
def test_every_line_is_on_its_chart(seen, chart):
    numbers, drawn, picture = seen
    for divergence, what in losses(numbers):
        line = drawn[f"{divergence}/{chart}/{what}"]
        assert len(line["points"]) >= 3
        wanted = tuple(map(int, re.findall(r"\d+", line["colour"])[:3]))
        for x, y in line["points"]:
            assert 0 < x < picture.width and 0 < y < picture.height
        near = {picture.getpixel((round(x) + i, round(y) + j)) for x, y in line["points"]
                for i in (-1, 0, 1) for j in (-1, 0, 1)}  # fmt: skip
        others = {tuple(map(int, re.findall(r"\d+", drawn[f"{divergence}/{chart}/{w}"]["colour"])[:3]))
                  for d, w in losses(numbers) if d == divergence}  # fmt: skip
        assert wanted in near or near & others, "another line may lie on it, but no empty paper"


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_a_number_is_read_off_each_chart(seen, divergence):
    numbers, drawn, _ = seen
    row = next(r for r in numbers["sizes"]
               if (r["divergence"], r["what"], r["shape"]) == (divergence, "fdistill", list(SHAPE)))  # fmt: skip
    error = [r for r in numbers["errors"] if (r["divergence"], r["what"]) == (divergence, "fdistill")][-1]
    matrix = 4e-6 * SHAPE[0] * SHAPE[1]
    expected = {
        "time-N": (SHAPE[0], 1e3 * row["seconds"]), "time-V": (SHAPE[1], 1e3 * row["seconds"]),
        "memory-N": (SHAPE[0], row["peak_bytes"] / 1e6), "memory-V": (SHAPE[1], row["peak_bytes"] / 1e6),
        "roofline": (matrix, 3e-3 * matrix / row["seconds"]), "error": (error["scale"], error["gradient_error"]),
    }  # fmt: skip
    assert set(expected) == set(report.CHARTS)
    for chart, point in expected.items():
        line = drawn[f"{divergence}/{chart}/fdistill"]
        read = tuple(value(line["marks"], axis, line["points"][-1]["xy".index(axis)]) for axis in "xy")
        assert read == pytest.approx(point, rel=0.02), chart
