"""GPU tests: skipped without a card, saying so. FDISTILL_DRY=1 runs them on the CPU at toy size, in the interpreter."""

import os

import pytest
import torch

from fdistill_kernels import backends

from ..conftest import emulate_cuda

DRY = os.environ.get("FDISTILL_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"


def size(*shape):
    """The shape, or with FDISTILL_DRY a toy one."""
    return (3, 700) if DRY else shape


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        if not DRY and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU (FDISTILL_DRY=1 runs it as a toy on the CPU)"))
        elif DRY and item.get_closest_marker("card"):
            item.add_marker(pytest.mark.skip(reason="asks something only a card can answer"))


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch):
    """Each backend of a GPU; with FDISTILL_DRY the CUDA kernels are emulated, as Triton's are interpreted."""
    if request.param == "cuda" and DRY:
        emulate_cuda(monkeypatch)
    reason = backends.BACKENDS[request.param].why_not(torch.device(DEVICE), torch.bfloat16, None)
    if reason is not None:
        # on a card a kernel that is not there is a fault, but for a card of another architecture
        (pytest.skip if DRY or "is not sm_90" in reason else pytest.fail)(reason)
    return request.param
