"""Processes beside pytest's own, forked of one that has imported what they need: most of what each would take alone."""

import gc
import os

import torch
import torch.multiprocessing as mp

#: Whose functions run in them.
MODULES = [f"{__package__}.{name}" for name in ("test_cluster", "test_distributed", "test_parallel", "test_sharded")]


def start(work, *arguments, processes, join=True):
    """work(rank, *arguments) in each of so many processes, which have this one's environment."""
    mp.get_context("forkserver").set_forkserver_preload(MODULES)
    given = dict(os.environ), work, arguments
    return mp.start_processes(_begin, given, nprocs=processes, join=join, start_method="forkserver")


def _begin(rank, environment, work, arguments):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what is shared with the other processes is not copied to be looked through
    work(rank, *arguments)
