"""What each divergence makes of a student that is too small for its teacher: the pictures of docs/which_divergence.md.

python -m benchmarks.pictures
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fdistill_kernels as fk
from fdistill_kernels.provenance import provenance

RESULT = Path(__file__).parent / "results" / "pictures_cpu.json"
DOCS = Path(__file__).parent.parent / "docs"
X = torch.linspace(-6, 6, 241, dtype=torch.float64)  # the vocabulary: places on a line
LESSER = 0.35  # the mass of the teacher's mode at the right
#: Students: every mean and deviation of a grid, one a row.
MEANS, DEVIATIONS = torch.linspace(-4, 4, 81, dtype=torch.float64), torch.linspace(0.2, 4, 39, dtype=torch.float64)
NAMED = ("kl", "rkl", "js", "tvd")
FAMILIES = {
    "gjs": (fk.GJS, "β", [x / 20 for x in range(21)]),
    "skew_kl": (fk.SkewKL, "λ", [x / 20 for x in range(20)]),
    "skew_rkl": (fk.SkewRKL, "λ", [x / 20 for x in range(20)]),
    "alpha": (fk.Alpha, "α", [x / 10 for x in range(-10, 21)]),
}
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
RATIOS = torch.linspace(-4, 4, 161, dtype=torch.float64)  # log(p/q)


def bell(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of a normal distribution over the places."""
    return -((X - mean[..., None]) ** 2) / (2 * deviation[..., None] ** 2)


def teacher() -> torch.Tensor:
    """Log-probabilities (V) of two modes, at −2 and 2."""
    means, deviations = torch.tensor([-2.0, 2.0]).double(), torch.tensor([0.6, 0.8]).double()
    shares = torch.tensor([1 - LESSER, LESSER]).double()
    return (bell(means, deviations).log_softmax(-1) + shares.log()[:, None]).logsumexp(0)


def fitted(divergence: str | fk.Divergence) -> dict[str, float]:
    """The one bell of the grid whose divergence from the teacher is least."""
    mean, deviation = (x.flatten() for x in torch.meshgrid(MEANS, DEVIATIONS, indexing="ij"))
    students = bell(mean, deviation)
    losses = fk.f_divergence(students, teacher().expand_as(students), divergence, reduction="none")
    least = losses.argmin()
    q = students[least].softmax(-1)
    return {"loss": losses[least].item(), "mean": mean[least].item(), "deviation": deviation[least].item(),
            "lesser": q[X > 0].sum().item()}  # fmt: skip


def pull(divergence: str | fk.Divergence) -> torch.Tensor:
    """What lifts an entry's logit, −∂D/∂z over q, at each log(p/q), from that about p = q.

    The entries are so small that none moves the sum over the row, and one more is all the rest.
    """
    q = torch.full_like(RATIOS, 1e-7)
    p = q * RATIOS.exp()
    log_q, log_p = (torch.cat((x, 1 - x.sum(-1, keepdim=True))).log() for x in (q, p))
    student = log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(fk.f_divergence(student[None], log_p[None], divergence), student)
    slope = -gradient[:-1] / q
    middle = len(RATIOS) // 2
    return slope - (slope[middle - 1] + slope[middle + 1]) / 2  # at p = q tvd has a tie, which rounding breaks


def gradient_by_rank() -> dict[float, torch.Tensor]:
    """At each temperature, the part of kl's gradient in the teacher's largest 1, 2, ... of 32000 entries."""
    generator = torch.Generator().manual_seed(0)
    teachers = -1.2 * torch.arange(1, 32001).log().expand(64, -1)  # Zipf's law
    students = (teachers + 0.5 * torch.randn(teachers.shape, generator=generator)).requires_grad_()
    found = {}
    for temperature in TEMPERATURES:
        loss = fk.f_divergence(students, teachers, "kl", temperature=temperature, temperature_squared=True)
        (gradient,) = torch.autograd.grad(loss, students)
        sizes = gradient.abs().sum(0).double()
        found[temperature] = sizes.cumsum(0) / sizes.sum()
    return found


def save(figure, name: str) -> None:
    """The same bytes of the same numbers."""
    figure.savefig(DOCS / f"{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Fits, and draws what it has fitted."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    fits = {name: fitted(name) for name in NAMED}
    families = {of: {x: fitted(make(x)) for x in values} for of, (make, _, values) in FAMILIES.items()}
    shares = gradient_by_rank()

    figure, panels = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    for axes, (name, fit) in zip(panels, fits.items(), strict=True):
        axes.fill_between(X, teacher().exp(), color="0.85", label="teacher")
        q = bell(torch.tensor(fit["mean"]), torch.tensor(fit["deviation"])).softmax(-1)
        axes.plot(X, q, label="student", color="tab:blue")
        axes.set(title=name, yticks=[], xticks=[-4, -2, 0, 2, 4])
        axes.legend(fontsize=8, frameon=False)
    save(figure, "modes")

    figure, panels = plt.subplots(1, 3, figsize=(11, 2.9), layout="constrained", sharey=True)
    symbols = ("β", "λ", "α")
    for of, found in families.items():
        axes = panels[symbols.index(FAMILIES[of][1])]
        axes.plot(list(found), [fit["lesser"] for fit in found.values()], ".-", label=of)
    for axes, symbol in zip(panels, symbols, strict=True):
        axes.axhline(LESSER, color="grey", linestyle=":", label="the teacher's")
        axes.set(xlabel=symbol, ylim=(-0.02, 0.5))
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("mass at the lesser mode")
    save(figure, "parameters")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    shown = ("kl", "rkl", "jeffreys", "js", "tvd", "hellinger", "pearson", "neyman", "triangular")
    for name, colour in zip(shown, plt.colormaps["tab10"].colors[:9], strict=True):
        left.plot(RATIOS, pull(name), label=name, color=colour)
    left.set(title="what lifts an entry", ylabel="−∂D/∂z ÷ q, from that about p = q", ylim=(-5, 8))
    for make, values in ((fk.SkewKL, (0.0, 0.1, 0.5)), (fk.SkewRKL, (0.0, 0.1, 0.5))):
        for value, style in zip(values, ("-", "--", ":"), strict=True):
            colour = "tab:blue" if make is fk.SkewKL else "tab:orange"
            right.plot(RATIOS, pull(make(value)), style, color=colour, label=f"{make(0.1).name}, λ = {value:g}")
    right.set(title="skewed", ylim=(-5, 8))
    for axes in (left, right):
        axes.set_xlabel("log(p/q)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    save(figure, "slopes")

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for temperature, share in shares.items():
        axes.semilogx(range(1, len(share) + 1), share, label=f"T = {temperature:g}")
    axes.set(xlabel="the teacher's largest entries", ylabel="part of kl's gradient")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save(figure, "temperature")

    cases = [{"divergence": name, **fit} for name, fit in fits.items()]
    cases += [{"divergence": f"{of}({x:g})", **fit} for of, found in families.items() for x, fit in found.items()]
    content = {"run": provenance("python -m benchmarks.pictures", dtype="float64"), "lesser": LESSER, "cases": cases,
               "tail_shares": {f"{t:g}": 1 - share[9].item() for t, share in shares.items()}}  # fmt: skip
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
