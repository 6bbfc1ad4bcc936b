"""How the linear losses' chunks are cut, and the products around them that only some versions of torch have."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels import backends, chunks, products

from .conftest import emulate_cuda, relative

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("count, most, tile", [(8192, 2176, 128), (8192, 896, 128), (5000, 2048, 128), (7, 16, 16),
                                               (130, 128, 128), (1000, 3, 16), (0, 128, 128), (1, 1, 1)])  # fmt: skip
def test_chunks_are_even_and_no_more_than_the_budget_needs(count, most, tile):
    step = chunks.even_step(count, most, tile)
    sizes = [min(step, count - begin) for begin in range(0, count, step)]
    assert step <= most and sum(sizes) == count and len(sizes) == -(-count // most)
    assert not sizes or sizes[0] - sizes[-1] < max(tile * len(sizes), 2), "no thin tail"


def test_budget_of_a_gpu_counts_what_torch_holds_unused(monkeypatch):
    row_bytes = 2 * 2 * 128256
    rows = {gib: chunks.gpu_chunk_bytes(row_bytes, gib << 30) // row_bytes for gib in (80, 4, 2, 1)}
    assert rows[80] > 2048 and rows[4] > 2048 and rows[2] == 1046 and 1024 <= rows[1] <= 1046
    assert chunks.gpu_chunk_bytes(row_bytes, 100 << 20) == 50 << 20, "half of what there is, not more"
    held = {kind: {"all": {"current": size}} for kind, size in (("reserved_bytes", 50), ("allocated_bytes", 20))}
    asked = dict(is_current_stream_capturing=False, mem_get_info=(3, 100), memory_stats_as_nested_dict=held)
    for name, answer in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert chunks._available(torch.device("cuda")) == 33


@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_rows_of_a_buffer_start_on_whole_lines(backend, monkeypatch):
    starts, run = [], backends.BACKENDS[backend].divergence_rows

    def seen(call):
        starts.append((call.student.stride(1), call.teacher.stride(1)))
        return run(call)

    monkeypatch.setattr(backends.BACKENDS[backend], "divergence_rows", seen)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(331, 8, requires_grad=True)
    teacher = torch.randn(20, 12), torch.randn(331, 12)
    losses = [fk.linear_f_divergence(hidden, weight, *teacher, "js", backend=b) for b in (backend, "torch")]
    assert set(starts) == {(384, 384)} and relative(*losses) < 1e-5
    got, want = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    assert all(relative(g, w) < 2e-5 for g, w in zip(got, want, strict=True))


MINIMAL = {
    "another backend": dict(divergence="js"),
    "labels": dict(divergence="js", labels=torch.zeros(2000, dtype=torch.long), ce_weight=1.0),
    "metrics": dict(divergence="js", return_parts="metrics"),
    "statistics of rows": dict(divergence="akl"),
    "a list": dict(divergence="js"),
}


@pytest.mark.parametrize("given", [None, 1_000_000])
@pytest.mark.parametrize("name", MINIMAL)
def test_small_chunks_where_no_logits_stay_on_chip(name, given, monkeypatch):
    """8 MB, as the docstring says, or what the caller says."""
    sizes, run = [], backends.rows_by

    def seen(backend, call):
        models = 2 if call.teacher is not None else 1
        sizes.append(models * call.student.numel() * call.student.element_size())
        return run(backend, call)

    monkeypatch.setattr(backends, "rows_by", seen)
    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(3000, 4)
    teacher = (fk.top_k_of(torch.randn(2000, 3000), 4),) if name == "a list" else (hidden.detach(), weight.flip(0))
    fk.linear_f_divergence(hidden, weight, *teacher, memory="minimal", chunk_bytes=given, **MINIMAL[name])
    most = given or chunks.MINIMAL_CHUNK_BYTES
    assert len(sizes) > 1 and most / 2 < max(sizes) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_vocabularies_shorter_than_a_line(backend, dtype, monkeypatch):
    """With blocks as small as the launch's own table makes them."""
    if backend == "cuda":
        emulate_cuda(monkeypatch)
    for vocabulary in (*range(1, 10), 17):
        hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (4, vocabulary))
        teacher = torch.randn(4, 12).to(dtype), torch.randn(vocabulary, 12).to(dtype)
        got, want = (
            torch.autograd.grad(fk.linear_f_divergence(hidden, weight, *teacher, "js", backend=b), (hidden, weight))
            for b in (backend, "torch")
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(
                g, w, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=2e-2, msg=str(vocabulary)
            )


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_weight_gradient_where_torch_adds_to_no_wide_result(keep, monkeypatch):
    """torch 2.8 and 2.9: by products of slices, as wide as asked for."""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    monkeypatch.setattr(products, "SLICE", 7)
    gradient, hidden, total = torch.randn(12, 30).bfloat16(), torch.randn(12, 5).bfloat16(), torch.randn(30, 5)
    expected = keep * total.double() + 0.5 * gradient.double().T @ hidden.double()
    total = total if keep else torch.full_like(total, torch.nan)
    products._add_in_slices_(gradient, hidden, 0.5, keep, total)
    assert relative(total, expected) < 1e-6


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size, vocabulary", [(17, 70), (34, 65), (50, 1025), (64, 97)])
def test_nothing_behind_a_row_is_in_its_product(size, vocabulary, native, monkeypatch):
    """Where AMX makes bfloat16 products, torch multiplies up to 31 entries behind a row by 0."""
    if not native:
        monkeypatch.setattr(products, "FOUND", None)
    generator = torch.Generator().manual_seed(size)

    def within_nan(*shape):
        whole = torch.full((shape[0], shape[1] + 45), torch.nan, dtype=torch.bfloat16)
        whole[:, : shape[1]] = torch.randn(shape, generator=generator)
        return whole[:, : shape[1]]

    monkeypatch.setattr(products, "empty", lambda like, *sizes: torch.full(sizes, torch.nan, dtype=like.dtype))
    hidden, weight = within_nan(40, size).requires_grad_(), within_nan(vocabulary, size).requires_grad_()
    loss = fk.linear_f_divergence(hidden, weight, within_nan(40, size), within_nan(vocabulary, size), "js")
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))
    lost = torch.arange(40) % 7 == 3
    rows = hidden.detach().masked_fill(lost.unsqueeze(1), torch.nan)
    assert (products.logits(rows, fk.Head(weight.detach())).isnan().any(1) == lost).all()
    copied = products.in_blocks(rows)
    behind = copied.as_strided((40, -(-size // 32) * 32), copied.stride(), copied.storage_offset())[:, size:]
    assert copied[~lost].equal(rows[~lost]) and (behind == 0).all()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="the CUDA library needs nvcc")
def test_import_does_not_start_cuda(tmp_path):
    """A child forked after cuInit cannot use CUDA; loading the library must not call it."""
    stub = """
    #include <stdio.h>
    #include <stdlib.h>
    int cuDriverGetVersion(int* version) { *version = 99000; return 0; }
    int cuInit(unsigned flags) { fprintf(stderr, "cuInit"); return 0; }
    """
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"], input=stub, text=True, check=True
    )
    code = "from fdistill_kernels.backends import cuda; print(cuda.NOT_LOADED, cuda.LIBRARY.trouble)"
    for place, expected in ((tmp_path, "None"), (tmp_path / "none", "there is no CUDA driver")):
        process = subprocess.run([sys.executable, "-c", code], env={"LD_LIBRARY_PATH": str(place)}, cwd=ROOT,
                                 capture_output=True, text=True)  # fmt: skip
        assert process.stdout.strip() == expected and "cuInit" not in process.stderr, process
