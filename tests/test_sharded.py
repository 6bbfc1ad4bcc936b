"""Sharded heads: FSDP2 gathers them by its own hooks around a module that calls the loss; elsewhere the loss does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fdistill_kernels as fk

from . import processes

N, V, D = 12, 64, 16


class Student(nn.Module):
    """A body and a head whose loss is made inside forward, where FSDP has gathered the parameters."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, x, teacher_hidden, teacher_weight):
        return fk.linear_f_divergence(self.body(x), self.head.weight, teacher_hidden, teacher_weight, "js")


def batch():
    torch.manual_seed(0)
    return Student(), torch.randn(2, N, D), torch.randn(2, N, D), torch.randn(V, D)


def worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    student, x, teacher, teacher_weight = batch()
    fully_shard(student, mesh=mesh)
    student(x[rank], teacher[rank], teacher_weight).backward()
    outside = fk.linear_f_divergence(x[rank], student.head.weight, teacher[rank], teacher_weight)  # a DTensor there
    whole = fk.linear_f_divergence(x[rank], student.head.weight.full_tensor(), teacher[rank], teacher_weight)
    torch.testing.assert_close(outside, whole)
    gradients = [p.grad.full_tensor() for p in student.parameters()]
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients")
    dist.destroy_process_group()


def test_fsdp2_gathers_the_head(tmp_path):
    processes.start(worker, str(tmp_path), processes=2)
    student, x, teacher, teacher_weight = batch()
    (sum(student(x[r], teacher[r], teacher_weight) for r in range(2)) / 2).backward()
    for got, want in zip(torch.load(tmp_path / "gradients"), student.parameters(), strict=True):
        torch.testing.assert_close(got, want.grad)


def test_zero_3_asks_to_be_gathered():
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id = 3  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ValueError, match="GatheredParameters"):
        fk.linear_f_divergence(torch.randn(N, D), weight, torch.randn(N, D), torch.randn(V, D))
