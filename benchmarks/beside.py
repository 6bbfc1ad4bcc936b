"""Draws docs/beside.png, the picture of the first page: other libraries beside ours, read from the result files.

python -m benchmarks.beside
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .numbers import Numbers

PICTURE = Path(__file__).parent.parent / "docs" / "beside.png"
LOGITS, HIDDEN = [8192, 128256], [8192, 128256, 2048, 4096]
SCALE = 4.0  # of the logits whose gradients' errors are shown


def bars() -> dict[str, dict[str, float]]:
    """What is drawn: the title of each panel, and each library's number."""
    number = Numbers()

    def found(name: str, key: str, **which) -> dict[str, Any]:
        results = number.file(name)["results"]
        return {r["what"]: r[key] for r in results if all(r.get(k) == v for k, v in which.items())}

    kl, js = {"divergence": "kl", "shape": LOGITS, "alike": False}, {"divergence": "js", "shape": HIDDEN}
    logits = [found(f"rows_{of}.json", "milliseconds", **kl) for of in ("cuda", "triton", "peers")]
    hidden = [found(f"linear_{of}.json", "milliseconds", **js) for of in ("ours", "peers")]
    hidden[0] = {"fdistill triton": hidden[0]["fdistill triton"]}  # js by CUDA has changed since it was timed
    errors = found("peers_cpu.json", "errors", form="rows", divergence="js")
    peaks, gradients = (found("peers_cpu.json", key, form="linear", divergence="js")
                        for key in ("peak_bytes", "gradient_bytes"))  # fmt: skip
    return {
        "kl from logits, H200: ms": {who: ms for file in logits for who, ms in file.items()},
        "js from hidden states, H200: ms": {who: ms for file in hidden for who, ms in file.items()},
        "js from hidden states, CPU: MB": {who: 1e-6 * (peaks[who] - gradients[who]) for who in peaks},
        "js: gradient's error, logarithmic": {
            who: next(e["gradient_error"] for e in of_scales if e["scale"] == SCALE)
            for who, of_scales in errors.items()
        },
    }


def main() -> None:
    """Draws a panel for each title. The picture keeps its numbers, which a test compares with the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shown = bars()
    figure, panels = plt.subplots(2, 2, figsize=(10, 4.4), layout="constrained")
    for axes, (title, values) in zip(panels.flat, shown.items(), strict=True):
        names = sorted(values, key=values.__getitem__, reverse=True)
        colours = ["tab:blue" if name.startswith("fdistill") else "0.75" for name in names]
        drawn = axes.barh(names, [values[name] for name in names], color=colours, log="error" in title)
        texts = [f"{values[name]:.0e}" if "error" in title else f"{float(f'{values[name]:.3g}'):,g}" for name in names]
        axes.bar_label(drawn, texts, fontsize=8, padding=2)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8, left=False)
        axes.set_xticks([], minor=False)
        axes.set_xticks([], minor=True)
        axes.margins(x=0.3)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None, "Description": json.dumps(shown)})
    plt.close(figure)


if __name__ == "__main__":
    main()
