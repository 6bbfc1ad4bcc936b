"""From hidden states on the CPU: js, N=2048, D_s=D_t=512, V=32000, float32, 2 threads, beside peers, in one run.

The floor is the four matrix products (both models' logits, ∂hidden, ∂weight) on whole matrices, into fresh outputs, as
torch does them. Every result carries `over_floor`, and the growth of peak memory beyond inputs and gradients in MB,
measured once in a process of its own. What bounds ours: the row kernel, the first touch of the weight's
gradient, and chunks thinner than a BLAS would like. Run: make bench
"""

import subprocess
import sys

import pytest
import torch

from fdistill_kernels import linear_cross_entropy, linear_f_divergence
from fdistill_kernels.bench import median_seconds

from .peers import running

N, D, V = 2048, 512, 32000

GROWTH = """
import sys, torch
from benchmarks.test_linear import problem, steps
torch.set_num_threads(2)
def status(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) * 1.024e-3
steps(*problem(9, 8, 99))[sys.argv[1]]()
inputs = problem()
step = steps(*inputs)[sys.argv[1]]
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step()
print(status("VmHWM") - before - sum(x.nbytes for x in inputs[:2]) / 1e6)
"""


def problem(n=N, d=D, v=V):
    torch.manual_seed(0)
    student, teacher = ((torch.randn(n, d), torch.randn(v, d) / d**0.5) for _ in range(2))
    return *(x.requires_grad_() for x in student), *teacher


def steps(hidden, weight, teacher, teacher_weight):
    """Forward and backward by each way to do it, as calls without arguments."""

    def step(loss):
        def call():
            hidden.grad = weight.grad = None
            loss(hidden, weight, teacher, teacher_weight).backward()

        return call

    losses = {"fdistill": lambda *x: linear_f_divergence(*x, "js"), **running("linear", "js", "cpu")}
    return {name: step(loss) for name, loss in losses.items()}


@pytest.fixture
def floor():
    """Seconds of the four products, just before what is measured against it."""
    torch.set_num_threads(2)
    hidden, weight, *_ = (x.detach() for x in problem())
    logits = hidden @ weight.T
    products = (lambda: hidden @ weight.T, lambda: logits @ weight, lambda: logits.T @ hidden)
    one, two, three = (median_seconds(call, 1.5) for call in products)
    return 2 * one + two + three


@pytest.mark.parametrize("what", ["fdistill", *running("linear", "js", "cpu")])
def test_linear_js(benchmark, what, floor):
    torch.set_num_threads(2)
    benchmark.pedantic(steps(*problem())[what], rounds=5, warmup_rounds=1)
    growth = subprocess.run([sys.executable, "-c", GROWTH, what], capture_output=True, text=True, check=True).stdout
    benchmark.extra_info.update(
        shape=[N, D, V], dtype="torch.float32", threads=2, floor_ms=1e3 * floor,
        over_floor=benchmark.stats.stats.median / floor, growth_mb=float(growth.split()[-1]),
    )  # fmt: skip


def test_linear_cross_entropy(benchmark, floor):
    hidden, weight, *_ = problem()
    labels = torch.randint(V, (N,))

    def step():
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels).backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    over = benchmark.stats.stats.median / (0.75 * floor)
    benchmark.extra_info.update(shape=[N, D, V], dtype="torch.float32", over_three_products=over)
