"""csrc/cpu/vector.h by itself, as each instruction set compiles it, beside float64 and torch's own conversions."""

import ctypes
import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from .conftest import instruction_sets

CSRC = Path(__file__).parent.parent / "csrc" / "cpu"
FLAGS = {"DEFAULT": [], "AVX2": ["-mavx2", "-mfma", "-mf16c"],
         "AVX512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]}  # fmt: skip
SOURCE = """
#define FDISTILL_ISA test
#include "vector.h"
using namespace fdistill;
using namespace fdistill::test;
#define FLOATS(name, expression) \\
  extern "C" void name(const float* from, float* to, int64_t count) { \\
    for (int64_t v = 0; v < count; v += kLanes) { \\
      const Vec x = load(from + v, count - v); \\
      store(to + v, expression, count - v); \\
    } \\
  }
#define NARROW(name, type) \\
  extern "C" void to_##name(const float* from, type* to, int64_t count) { \\
    for (int64_t v = 0; v < count; v += kLanes) store(to + v, load(from + v, count - v), count - v); \\
  } \\
  extern "C" void of_##name(const type* from, float* to, int64_t count) { \\
    for (int64_t v = 0; v < count; v += kLanes) store(to + v, load(from + v, count - v), count - v); \\
  }
FLOATS(exponential_of, exponential(x))
FLOATS(exponential_below_zero_of, exponential<true>(x))
FLOATS(logarithm_of, logarithm(x))
FLOATS(hyperbolic_tangent_of, hyperbolic_tangent(x))
NARROW(bfloat16, BFloat16)
NARROW(float16, Half)
"""


@pytest.fixture(scope="module", params=instruction_sets())
def vector(request):
    state = hashlib.sha256((CSRC / "vector.h").read_bytes() + SOURCE.encode()).hexdigest()[:16]
    path = CSRC.parent.parent / "build" / f"vector-{request.param}-{state}.so"
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=fast", "-w", *FLAGS[request.param], f"-I{CSRC}",
                    "-x", "c++", "-", "-o", path], input=SOURCE, text=True, check=True)  # fmt: skip
    return ctypes.CDLL(str(path))


def run(function, x, dtype=torch.float32):
    out = torch.empty(x.shape, dtype=dtype)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()))
    return out


def units(got, exact):
    """The error in units of the last place of the exact value, subnormal ones too."""
    exponent = exact.abs().clamp_min(2.0**-126).log2().floor()
    return ((got.double() - exact).abs() / 2.0 ** (exponent - 23)).max().item()


def every(first, last, step):
    """Every step-th float between two of one sign."""
    a, b = (torch.tensor(x, dtype=torch.float32).view(torch.int32).item() for x in (first, last))
    return torch.arange(min(a, b), max(a, b), step, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_functions_are_within_their_units(vector):
    for x in (every(-1e-30, -103.9, 997), every(1e-30, 88.72, 997)):
        assert units(run(vector.exponential_of, x), x.double().exp()) < 1.5
    below = every(-1e-30, -87.33, 997)  # of a normal number
    assert units(run(vector.exponential_below_zero_of, below), below.double().exp()) < 1.5
    x = every(2.0**-126, 3e38, 1499)
    assert units(run(vector.logarithm_of, x), x.double().log()) < 1.5
    for x in (every(1e-30, 20.0, 997), every(-1e-30, -20.0, 997)):
        assert units(run(vector.hyperbolic_tangent_of, x), x.double().tanh()) < 1.5


def test_borders(vector):
    infinite = float("inf")
    borders = torch.tensor([-infinite, -3.4e38, -104.0, -0.0, 0.0, 89.0, 3.4e38, infinite, float("nan")])
    exponentials = torch.tensor([0.0, 0, 0, 1, 1, infinite, infinite, infinite, float("nan")])
    assert torch.equal(run(vector.exponential_of, borders).nan_to_num(7), exponentials.nan_to_num(7))
    below, of_below = (x[[0, 1, 2, 3, 4, 8]] for x in (borders, exponentials))
    assert torch.equal(run(vector.exponential_below_zero_of, below).nan_to_num(7), of_below.nan_to_num(7))
    smallest = run(vector.exponential_below_zero_of, every(-87.34, -104.0, 997))  # kernels take them for 0
    assert smallest.ge(0).all() and smallest.max() < 2.0**-126
    assert str(run(vector.logarithm_of, borders[-2:]).tolist()) == "[inf, nan]"
    assert run(vector.logarithm_of, torch.ones(1)).item() == 0
    signs = torch.tensor([-1.0, -1, -1, 0, 0, 1, 1, 1, float("nan")])
    assert torch.equal(run(vector.hyperbolic_tangent_of, borders).nan_to_num(7), signs.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(vector, dtype):
    name = str(dtype)[6:]
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = run(getattr(vector, f"of_{name}"), narrow)
    numbers = ~narrow.isnan()
    assert (
        torch.equal(wide[numbers].view(torch.int32), narrow[numbers].float().view(torch.int32))
        and wide[~numbers].isnan().all()
    )
    ties = torch.cat(
        [every(0.0, 3.4e38, 4093), every(2.0**-30, 65536.0, 511), every(0.0, 1.0, 1 << 12), every(0.0, 1e6, 1 << 15)]
    )
    for x in (ties, -ties, torch.tensor([float("inf"), -float("inf"), float("nan")])):
        got = run(getattr(vector, f"to_{name}"), x, dtype)
        assert torch.equal(got[~x.isnan()].view(torch.int16), x[~x.isnan()].to(dtype).view(torch.int16))
        assert got[x.isnan()].isnan().all()


def test_a_rows_end_is_not_overrun(vector):
    for count in range(1, 40):
        x, out = torch.rand(count), torch.full((count + 64,), 7.0)
        vector.exponential_of(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(count))
        assert (out[count:] == 7).all() and torch.allclose(out[:count], x.exp())
