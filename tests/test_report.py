"""`fdistill bench --report`, its charts read as SVG: a line's points, beside two of its axis's labelled marks."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from fdistill_kernels import cli, report

SHAPE = (16, 1600)
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


class Page:
    """The HTML file as a browser would have it: a picture, and the numbers beside it."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        self.svg = ElementTree.fromstring(self.text[self.text.index("<svg") : self.text.index("</svg>") + 6])
        self.data = json.loads(re.search(r'id="data">(.*?)</script>', self.text, re.DOTALL).group(1))

    def group(self, name, within=None):
        return next(g for g in (self.svg if within is None else within).iter(f"{SVG}g") if g.get("id") == name)

    def read(self, divergence, chart, what):
        """The values of a line's last point, x and y, by the marks of the axes."""
        axes = self.group(f"{divergence}/{chart}")
        line = self.group(f"{divergence}/{chart}/{what}", axes)
        path = line.find(f"{SVG}path")
        if path is None:  # marks alone
            place = list(line.iter(f"{SVG}use"))[-1]
            point = float(place.get("x")), float(place.get("y"))
        else:
            *_, x, y = re.findall(r"[-\d.]+", path.get("d"))
            point = float(x), float(y)
        return tuple(self.value(axes, "xy"[k], point[k]) for k in range(2))

    def value(self, axes, axis, at):
        ticks = []
        for group in axes.iter(f"{SVG}g"):
            if group.get("id", "").startswith(f"{axis}tick"):
                mark, label = next(group.iter(f"{SVG}use")), next(group.iter(f"{SVG}text"))
                ticks.append((float(mark.get(axis)), math.log(float(label.text.replace("−", "-")))))
        (a, log_a), (b, log_b) = ticks[0], ticks[-1]
        return math.exp(log_a + (at - a) / (b - a) * (log_b - log_a))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SECONDS", 0.005)
        arguments = ["bench", "--report", str(path), "--shape", "16,1600", "--divergence", "kl", "alpha=0.3"]
        assert cli.main(arguments) == 0
    return Page(path)


def whole(page, divergence, what):
    return next(r for r in page.data["sizes"]
                if (r["divergence"], r["what"], r["shape"]) == (divergence, what, list(SHAPE)))  # fmt: skip


def test_every_chart_is_drawn(page):
    names = list(dict.fromkeys((r["divergence"], r["what"]) for r in page.data["sizes"]))
    assert [n for n in names if n[0] == "kl"][:2] == [("kl", "fdistill"), ("kl", "eager")] and len(names) >= 6
    assert ("alpha(0.3)", "eager") in names and any(what.startswith("DistillKit") for _, what in names)
    for divergence, what in names:
        for chart in report.CHARTS:
            page.read(divergence, chart, what)
    for outside in ("<link", "src=", "@import", "url(http", "<script src"):
        assert outside not in page.text, "it needs nothing else"


@pytest.mark.parametrize("axis", "NV")
def test_memory(page, axis):
    """Ours is the gradient, known before anything is measured; eager has at least three matrices."""
    size, megabytes = page.read("kl", f"memory-{axis}", "fdistill")
    matrix = SHAPE[0] * SHAPE[1] * 4e-6
    assert size == pytest.approx(SHAPE["NV".index(axis)], rel=1e-3)
    assert megabytes == pytest.approx(matrix, rel=0.05)
    assert page.read("kl", f"memory-{axis}", "eager")[1] > 3 * matrix


@pytest.mark.parametrize("axis", "NV")
def test_time(page, axis):
    size, milliseconds = page.read("kl", f"time-{axis}", "eager")
    assert size == pytest.approx(SHAPE["NV".index(axis)], rel=1e-3)
    assert milliseconds == pytest.approx(1e3 * whole(page, "kl", "eager")["seconds"], rel=1e-3)


def test_roofline(page):
    entry, bytes_moved = whole(page, "kl", "fdistill"), 3 * SHAPE[0] * SHAPE[1] * 4
    size, rate = page.read("kl", "roofline", "fdistill")
    assert size == pytest.approx(bytes_moved / 3e6, rel=1e-3) and rate == pytest.approx(
        1e-9 * bytes_moved / entry["seconds"], rel=1e-3
    )
    assert page.read("kl", "roofline", "a copy")[1] == pytest.approx(1e-9 * bytes_moved / entry["floor"], rel=1e-3)


def test_error(page):
    rows = [r for r in page.data["errors"] if (r["divergence"], r["what"]) == ("kl", "fdistill")]
    scale, error = page.read("kl", "error", "fdistill")
    assert scale == pytest.approx(30, rel=1e-3) and error == pytest.approx(rows[-1]["gradient_error"], rel=1e-3)
    assert error < 1e-5


def test_numbers_are_json_where_a_peer_overflows(page):
    """JSON has no infinity, and a browser would read nothing."""
    overflown = {**page.data, "errors": [{**page.data["errors"][0], "gradient_error": math.inf}]}
    text = report.page(overflown)
    kept = re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(kept, parse_constant=pytest.fail)["errors"][0]["gradient_error"] is None


def test_what_is_left_out_and_how_it_was_measured_is_said(page):
    assert page.data["command"] == "fdistill bench --report FILE --shape 16,1600 --dtype float32 --device cpu " \
        "--backend auto --divergence kl alpha(0.3)" and page.data["versions"]  # fmt: skip
    assert "<li>speculators, kl: " in page.text
    colours = [
        ElementTree.tostring(page.group(f"{d}/time-N/eager")).decode().count("#ff7f0e") for d in ("kl", "alpha(0.3)")
    ]
    assert all(colours), "a library has one colour"


def test_no_empty_page_stays(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(str(tmp_path / "page.html"), [], (4, 9), None, "cpu", "auto", False)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_comes_and_prints_the_table(tmp_path, capsys, monkeypatch):
    def measured(*how, say):
        say("kl: fdistill, eager, each at 5 sizes")
        return {"sizes": [{"divergence": "kl", "what": what, "shape": shape, "seconds": seconds, "floor": 1e-3,
                           "peak_bytes": 5e6} for shape in ((4, 1600), SHAPE)
                          for what, seconds in (("fdistill", 2e-3), ("eager", 9e-3))]}  # fmt: skip

    monkeypatch.setattr(report, "measure", lambda *how: measured(*how[:-1], say=how[-1]))
    monkeypatch.setattr(report, "page", lambda data: "")
    call = ["bench", "--report", str(tmp_path / "x.html"), "--shape", "16,1600", "--divergence", "kl"]
    assert cli.main(call) == 0
    told = capsys.readouterr()
    assert told.err == "kl: fdistill, eager, each at 5 sizes\n"
    assert [line.split() for line in told.out.splitlines()] == [
        ["divergence", "loss", "ms", "÷", "floor", "÷", "ours", "MB"], ["kl", "fdistill", "2.00", "2.00", "1.00", "5.0"],
        ["kl", "eager", "9.00", "9.00", "4.50", "5.0"], ["wrote", str(tmp_path / "x.html")]]  # fmt: skip
    assert cli.main([*call, "--json"]) == 0 and len(json.loads(capsys.readouterr().out)["sizes"]) == 4


def test_sizes_that_are_one():
    assert report.sizes((1, 2)) == {"N": [(1, 2)], "V": [(1, 2)]}


@pytest.mark.parametrize(
    "more, message",
    [(["--report", "/nosuch/page.html"], "/nosuch/page.html"), (["--report", "x", "--tune"], "--tune and --report")],
)
def test_refused_before_anything_is_measured(more, message, capsys, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda *_: pytest.fail("it has begun"))
    assert cli.main(["bench", *more]) == 2 and message in capsys.readouterr().err
