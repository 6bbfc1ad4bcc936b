"""What becomes of a loss that is not finite."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


def of_nothing(loss: Tensor, student: nn.Module) -> Tensor:
    """0, whose backward is the loss's, with all that ranks send each other in it, but gives every weight 0."""
    nothing = loss.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)

    def begin(_: Tensor) -> None:
        weights = {p for p in student.parameters() if p.requires_grad} | _leaves(loss)  # FSDP's have others inside
        hooks = contextlib.ExitStack()
        for p in weights:
            hooks.callback(p.register_hook(torch.zeros_like).remove)
        torch.autograd.Variable._execution_engine.queue_callback(hooks.close)

    if nothing.requires_grad:
        nothing.register_hook(begin)
    return nothing


def _leaves(made: Tensor) -> set[Tensor]:
    """The tensors that a tensor's backward ends at."""
    nodes, seen = [made.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}
