"""Processes beside pytest's own, forked of one that has imported what they need: most of what each would take alone."""

import gc
import importlib
import os
import sys

import torch
import torch.multiprocessing as mp

#: Whose functions run in them.
MODULES = [f"{__package__}.{name}" for name in ("test_cluster", "test_distributed", "test_parallel", "test_sharded")]


def start(work, *arguments, processes, join=True):
    """work(rank, *arguments) in each of so many processes, of one thread each."""
    context()
    given = dict(os.environ), work, arguments
    return mp.start_processes(_ranked, given, nprocs=processes, join=join, start_method="forkserver")


def begin(work, *arguments, output):
    """work(*arguments) in a process of as many threads as this one, whose output and errors go into a file."""
    given = dict(os.environ), torch.get_num_threads(), output, work, arguments
    process = context().Process(target=_written, args=given)
    process.start()
    return process


def main(module, *arguments):
    """A module's main with a command line."""
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())


def context():
    """Whose barriers and queues such processes share."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(MODULES)
    return found


def _ranked(rank, environment, work, arguments):
    _become(environment, threads=1)
    work(rank, *arguments)


def _written(environment, threads, output, work, arguments):
    _become(environment, threads)
    with open(output, "wb", 0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(*arguments)


def _become(environment, threads):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    gc.freeze()  # what is shared with the other processes is not copied to be looked through
