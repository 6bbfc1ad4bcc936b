"""The trainer on several ranks: every way to share a model or a batch gives one process's curve and weights."""

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from transformers import AutoModelForCausalLM

from .test_distributed import rows
from .test_sequence import llama
from .test_trainer import trainer

METHODS = {"kl": dict(gradient_accumulation_steps=2), "tvd": {}, "js": dict(beta=0.3)}


def processes(folder, world, work, *arguments):
    """work(rank, world, *arguments) in each of so many processes, forked of one that has imported all."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    mp.start_processes(_process, (world, port, work, arguments), nprocs=world, start_method="forkserver")


def _process(rank, world, port, work, arguments):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                       MASTER_PORT=port, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    gc.freeze()  # what is shared with the other processes is not copied to be looked through
    work(rank, world, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()

def trained(folder, method, student, ranks, **settings):
    """(losses of the steps, weights) of a student trained so."""
    accumulated = METHODS[method].get("gradient_accumulation_steps", 1)
    run = trainer(folder, student, llama(seed=2).double(), rows(), method=method, optim="sgd", max_steps=2, learning_rate=0.1, top_k=1, logging_steps=1,
                  per_device_train_batch_size=4 // ranks // accumulated, **METHODS[method], **settings)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    weights = [getattr(p, "full_tensor", lambda: p)().detach() for p in student.parameters()]
    return losses, weights

def of(folder, **sizes):
    more = {}
    if sizes:
        from transformers.distributed import DistributedConfig
        more = dict(distributed_config=DistributedConfig(**sizes))
    return AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64, **more)

import time
def two(rank, world, folder):
    found = {}
    dist.init_process_group("gloo")
    for method in METHODS:
        t = time.process_time()
        found["ddp", method] = trained(folder / "ddp", method, of(folder), 2)
        print("ddp", method, time.process_time()-t); t = time.process_time()
        found["tp", method] = trained(folder / "tp", method, of(folder, tp_size=2), 1, )
        print("tp", method, time.process_time()-t); t = time.process_time()
        found["fsdp", method] = trained(folder / "fsdp", method, of(folder, fsdp_size=2), 2)
        print("fsdp", method, time.process_time()-t); t = time.process_time()
    torch.save(found, folder / f"{rank}.pt")

def one(rank, world, folder):
    t = time.process_time()
    torch.save({m: trained(folder / "one", m, of(folder), 1) for m in METHODS}, folder / "one.pt")
    print("one", time.process_time() - t)

def test_two(tmp_path):
    llama(seed=1).save_pretrained(tmp_path / "student")
    processes(tmp_path, 1, one, tmp_path)
    processes(tmp_path, 2, two, tmp_path)
    want = torch.load(tmp_path / "one.pt")
    for r in range(2):
        for (way, method), (losses, weights) in torch.load(tmp_path / f"{r}.pt").items():
            print(way, method, max(abs(a-b) for a, b in zip(losses, want[method][0])), max(float((a-b).abs().max()) for a, b in zip(weights, want[method][1])))
