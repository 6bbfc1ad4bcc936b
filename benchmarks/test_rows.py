"""Row losses on the CPU at N=1024, V=32000: ours, torch.compile and eager beside the floor, in one run.

Every result carries `over_floor`, and `over_ours` for peers, in its extra_info; the floor is three passes over one
matrix at the copy rate measured just before. What bounds ours: arithmetic, two exponentials an entry of the pair and a
logarithm for js, gjs and the skewed ones, and the first touch of the gradient's pages. Run: make bench
"""

import pytest
import torch

from fdistill_kernels import TABLE, cross_entropy, f_divergence
from fdistill_kernels.bench import eager_loss, floor_seconds, make_logits, our_loss, training_step

N, V, THREADS = 1024, 32000, 2
ours_seconds = {}


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(THREADS)


def timed(benchmark, call, rounds, floor, **info):
    benchmark.pedantic(call, rounds=2 * rounds, warmup_rounds=6)  # a virtual machine finds its pages slowly
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        info, floor_ms=1e3 * floor, over_floor=seconds / floor, torch=torch.__version__, threads=torch.get_num_threads()
    )
    benchmark.extra_info["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    return seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(TABLE))
def test_ours(benchmark, name, dtype):
    student, teacher = make_logits((N, V), dtype)
    step = training_step(our_loss(TABLE[name]), student, teacher)
    floor = floor_seconds(teacher)
    ours_seconds[name, dtype] = timed(benchmark, step, 9, floor, divergence=name, dtype=str(dtype), shape=[N, V])


@pytest.mark.parametrize("peer", ["compile", "eager"])
@pytest.mark.parametrize("name", ["kl", "js", "tvd"])
def test_peers(benchmark, name, peer):
    student, teacher = make_logits((N, V), torch.float32)
    eager = eager_loss(TABLE[name])
    step = training_step(torch.compile(eager) if peer == "compile" else eager, student, teacher)
    seconds = timed(benchmark, step, 5, floor_seconds(teacher), divergence=name, dtype="torch.float32", shape=[N, V])
    benchmark.extra_info["over_ours"] = seconds / ours_seconds[name, torch.float32]


@pytest.mark.parametrize("vocabulary", [1000, 4000, 16000, 64000, 256000])
@pytest.mark.parametrize("name", ["kl", "js"])
def test_time_is_linear_in_vocabulary(benchmark, name, vocabulary):
    rows = 2**25 // vocabulary
    student, teacher = make_logits((rows, vocabulary), torch.float32)
    step = training_step(lambda s, t: f_divergence(s, t, name), student, teacher)
    seconds = timed(benchmark, step, 7, floor_seconds(teacher), divergence=name, shape=[rows, vocabulary])
    benchmark.extra_info["ns_per_entry"] = 1e9 * seconds / (rows * vocabulary)


@pytest.mark.parametrize("which", ["ours", "torch"])
def test_cross_entropy(benchmark, which):
    student, _ = make_logits((N, V), torch.float32)
    labels = torch.randint(0, V, (N,))
    loss = cross_entropy if which == "ours" else torch.nn.functional.cross_entropy
    step = training_step(lambda s, _: loss(s, labels), student, labels)
    timed(benchmark, step, 7, floor_seconds(student.detach()), shape=[N, V], dtype="torch.float32")
