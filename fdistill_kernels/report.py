"""`fdistill bench --report`: time, memory and errors at the user's own sizes, beside installed peers, as one HTML file.

The page is self-contained: its charts are SVG drawn by matplotlib, and its numbers are included as JSON.
"""

from __future__ import annotations

import html
import importlib.util
import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .bench import eager_loss, floor_seconds
from .divergences import Divergence
from .provenance import as_json, install, provenance, versions

#: For how long each loss is timed at each size.
SECONDS = 0.2
LEAST = 1e-9  # smaller errors are drawn here, because a logarithmic axis has no 0
#: A library keeps its mark and colour in all charts; a later one's mark is smaller, so that those below are seen.
MARKS = "osDv^<>pP*XhdH"
CHARTS = ("time-N", "memory-N", "roofline", "time-V", "memory-V", "error")
STYLE = """
:root {color-scheme: light dark}
body {font: 15px sans-serif; max-width: 78em; margin: 2em auto; padding: 0 1em}
td {padding: .2em .8em; text-align: right}
.wide {overflow-x: auto}
svg {width: 100%; min-width: 60em; height: auto; background: white}
"""


def sizes(shape: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
    """The shapes (N, V) of both axes: a sixteenth, a quarter and all of N, or of V, while the other stays as given."""
    n, v = shape
    parts = (16, 4, 1)
    return {
        "N": sorted({(max(1, n // part), v) for part in parts}),
        "V": sorted({(n, max(2, v // part)) for part in parts}),
    }


def measure(divergences: Iterable[Divergence], shape: tuple[int, int], dtype: torch.dtype, device: str, backend: str,
            compiled: bool, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Measures everything that the page shows; `say` is told what comes next.

    Returns:
        The provenance of the run; `sizes`, with the seconds, peak bytes and floor of each loss at each size;
        `errors`, with the errors of each loss at each scale of the logits, against float64 (infinite ones are null in
        the page); and `left_out`, the libraries that are not measured, with the reason.
    """
    from .peers import PACKAGES
    from .peers.measure import errors_by_scale, losses, measured

    divergences, name_of_dtype = list(divergences), str(dtype).removeprefix("torch.")
    command = f"fdistill bench --report FILE --shape {shape[0]},{shape[1]} --dtype {name_of_dtype} --device {device} " \
        f"--backend {backend}{' --compile' * compiled} --divergence {' '.join(map(str, divergences))}"  # fmt: skip
    data: dict[str, Any] = {
        **provenance(command, device), "versions": versions(PACKAGES), "backend": backend, "shape": shape,
        "dtype": name_of_dtype, "sizes": [], "errors": [], "left_out": [],
    }  # fmt: skip
    every = sorted({size for axis in sizes(shape).values() for size in axis})
    floors = {size: floor_seconds(torch.zeros(size, dtype=dtype, device=device), SECONDS) for size in every}
    for divergence in divergences:
        name = {"divergence": str(divergence)}
        calls, left_out = losses("rows", divergence, device, dtype, backend, compiled)
        calls.setdefault("eager", eager_loss(divergence))  # the peers have default parameters only
        data["left_out"] += left_out
        say(f"{divergence}: {', '.join(calls)}, each at {len(every)} sizes")
        data["errors"] += [{**name, **e} for e in errors_by_scale("rows", divergence, calls, shape, dtype, device)]
        for (what, loss), size in itertools.product(calls.items(), every):
            entry = measured("rows", divergence, loss, size, dtype, device, SECONDS)
            data["sizes"].append({**name, "what": what, "shape": size, "floor": floors[size], **entry})
    return data


def chart(axes: Any, name: str, data: dict[str, Any], divergence: str) -> None:
    """Draws one of `CHARTS`, with a line for each loss. The `gid` of a line is divergence/chart/loss."""
    kind, _, axis = name.partition("-")
    rows = [r for r in data["errors" if kind == "error" else "sizes"] if r["divergence"] == divergence]
    shape = data["shape"]
    if axis:
        kept = sizes((shape[0], shape[1]))[axis]
        rows = [r for r in rows if tuple(r["shape"]) in kept]
    itemsize = getattr(torch, data["dtype"]).itemsize

    def matrix(row: dict[str, Any]) -> float:
        return row["shape"][0] * row["shape"][1] * itemsize / 1e6

    values: dict[str, tuple[str, str, Callable[..., float], Callable[..., float]]] = {
        "time": (axis, "ms", lambda r: r["shape"]["NV".index(axis)], lambda r: 1e3 * r["seconds"]),
        "memory": (axis, "MB above inputs", lambda r: r["shape"]["NV".index(axis)], lambda r: r["peak_bytes"] / 1e6),
        "roofline": ("MB of a logit matrix", "GB/s of 3·N·V", matrix, lambda r: 3e-3 * matrix(r) / r["seconds"]),
        "error": ("standard deviation of logits", "gradient's error, of its largest entry", lambda r: r["scale"],
                  lambda r: max(LEAST, r["gradient_error"]) if math.isfinite(r["gradient_error"]) else math.nan),
    }  # fmt: skip
    x_label, y_label, x, y = values[kind]
    lines = {what: sorted((x(r), y(r)) for r in rows if r["what"] == what) for what in {r["what"]: 0 for r in rows}}
    if kind == "roofline":
        rates = {matrix(r): 0.0 for r in sorted(rows, key=matrix)}
        for r in rows:
            rates[matrix(r)] = max(rates[matrix(r)], 3e-3 * matrix(r) / r["floor"])
        roof = list(rates.items())
        axes.plot(
            *zip(*roof, strict=True), color="grey", linestyle=":", label="a copy", gid=f"{divergence}/{name}/a copy"
        )
    known = list(dict.fromkeys(("fdistill", *(r["what"] for r in data["sizes"]))))
    for what, line in lines.items():
        joined = "" if kind == "roofline" else "-"  # there, two shapes may have the same size
        k = known.index(what)
        axes.plot(*zip(*line, strict=True), marker=MARKS[k % len(MARKS)], linestyle=joined, color=f"C{k % 10}",
                  markersize=max(3, 9 - k), zorder=2 + k / 100, label=what,
                  gid=f"{divergence}/{name}/{what}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=name.replace("-", " against "))
    axes.set_gid(f"{divergence}/{name}")
    low, high = axes.get_ylim()
    if not low > 0:  # nothing is drawn
        low, high = LEAST, 1
    axes.set_ylim(low / 2, high * 2)  # so that the axis has at least two labelled ticks
    _marks(axes, sorted({point[0] for line in lines.values() for point in line}))


def _marks(axes: Any, places: list[float]) -> None:
    """Labels the axes with plain numbers: x at the measured sizes, y at 1, 2 and 5 of each decade, or at decades."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.xaxis.set_major_locator(FixedLocator(places))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if 1e4 <= x < 1e6 else f"{x:.4g}"))


def charts(data: dict[str, Any]) -> str:
    """All charts of all divergences, as one SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["divergence"] for row in data["sizes"]))
    figure = Figure(figsize=(15, 8 * len(names)), layout="constrained")
    for name, part in zip(names, figure.subfigures(len(names), squeeze=False)[:, 0], strict=True):
        part.suptitle(name, fontsize="x-large")
        for axes, kind in zip(part.subplots(2, 3).flat, CHARTS, strict=True):
            chart(axes, kind, data, name)
        part.legend(*part.axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fdistill"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def of_whole_shape(data: dict[str, Any], shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The rows of the table: divergence, loss, ms, over the floor, over ours, and MB above the inputs."""
    whole = [r for r in data["sizes"] if tuple(r["shape"]) == tuple(shape)]
    ours = {r["divergence"]: r["seconds"] for r in whole if r["what"] == "fdistill"}
    return [
        (r["divergence"], r["what"], f"{1e3 * r['seconds']:.2f}", f"{r['seconds'] / r['floor']:.2f}",
         f"{r['seconds'] / ours[r['divergence']]:.2f}", f"{r['peak_bytes'] / 1e6:.1f}")
        for r in whole
    ]  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The HTML of the page."""
    cells = of_whole_shape(data, data["shape"])
    head = ("divergence", "loss", "ms", "÷ floor", "÷ ours", "MB above inputs")
    table = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in (head, *cells))
    origin = ", ".join(f"{k}: {v}" for k, v in data.items() if not isinstance(v, list | dict))
    installed = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    texts = [f"{r['what']}, {r['divergence']}: {r['why']}" for r in data["left_out"]]
    left_out = "".join(f"<li>{html.escape(text)}</li>" for text in dict.fromkeys(texts))
    numbers = as_json(data).replace("</", "<\\/")
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>fdistill bench</title><style>{STYLE}</style>\n'
        f"<h1>Forward and backward, N, V = {data['shape'][0]}, {data['shape'][1]}, {data['dtype']}</h1>\n"
        f"<p>{html.escape(origin)}; {html.escape(installed)}</p>\n<div class=wide><table>{table}</table></div>\n"
        "<p>Memory is the peak of torch's allocator above the inputs, including the gradient. The floor is the time of "
        "three passes over N·V at the rate of a copy. The error is the largest error of the student's gradient against "
        f"float64, divided by the gradient's largest entry; infinite ones are not drawn.</p>\n"
        f"<div class=wide>{charts(data)}</div>\n<p>Not measured:</p><ul>{left_out or '<li>none</li>'}</ul>\n"
        f'<script type="application/json" id="data">{numbers}</script>\n</html>\n'
    )


def write(path: str, divergences: Iterable[Divergence], shape: tuple[int, int], dtype: torch.dtype, device: str,
          backend: str, compiled: bool, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Measures the losses, writes the page to `path`, and returns its numbers; `say` is told what comes next.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file cannot be written; this is checked before anything is measured.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--report needs matplotlib: {install('demo')}")
    new = not Path(path).exists()
    Path(path).open("a").close()
    try:
        data = measure(divergences, shape, dtype, device, backend, compiled, say)
    except BaseException:
        if new:
            Path(path).unlink()
        raise
    Path(path).write_text(page(data), encoding="utf-8")
    return data
