import os

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated: Triton's interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

from fdistill_kernels import backends
from fdistill_kernels.reference import f_divergence_rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def native_backend_is_built() -> bool:
    return backends.cpu.NOT_LOADED is None


@pytest.fixture(params=["torch", "cpu", "triton", "triton-spans"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        assert native_backend_is_built(), backends.cpu.NOT_LOADED  # a failure, not a skip: `make` builds it
    if request.param.startswith("triton"):  # blocks so small that rows cross several; and rows cut into spans
        from fdistill_kernels.backends.triton import launch

        small = launch.Launch(block=1024, warps=4, programs=2, splits=3 if request.param == "triton-spans" else 1)
        monkeypatch.setattr(launch, "choose", lambda *_, **__: small)
    return request.param.partition("-")[0]


def reference(student, teacher, divergence, weights=None, **kw):
    """Weighted sum of the reference's rows in float64 and its gradients to both models."""
    s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
    rows = f_divergence_rows(s, t, divergence, **kw)
    total = (rows * (torch.ones_like(rows) if weights is None else weights)).sum()
    return total.detach(), *torch.autograd.grad(total, (s, t))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()
