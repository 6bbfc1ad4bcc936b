"""A module's hooks: its user's, which have their turn when the model calls it, and those that its weights need."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

#: Whose hooks gather, move or compute weights, for whoever calls the module: FSDP's, parametrizations', ZeRO's.
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "fdistill_kernels")
#: Where a module has them, of its forward pass, and of gradients.
PLACES = ("_forward_pre_hooks", "_forward_hooks")
OF_GRADIENTS = ("_backward_pre_hooks", "_backward_hooks")


def is_user_s(hook: Callable[..., Any]) -> bool:
    """Whether it is of no library that looks after weights."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] not in LIBRARIES


def are_in_the_way(module: nn.Module, of_all: bool = True) -> bool:
    """Whether the user has hooks that `without_user_s` does not pass by: of the gradients of what the module gives, who
    wait for it; or (of_all) of all modules, which other threads call meanwhile.
    """
    found = [getattr(module, place, {}) for place in OF_GRADIENTS]
    if of_all:
        found += [getattr(nn.modules.module, f"_global{place}", {}) for place in (*PLACES, *OF_GRADIENTS)]
    return any(is_user_s(hook) for hooks in found for hook in hooks.values())


def move_to_end(hooks: OrderedDict[int, Callable[..., Any]] | None, hook: Callable[..., Any]) -> None:
    """After all that were registered later, if it is there: it then sees what they make of their arguments."""
    found = list(hooks.values()) if hooks else []  # compilers of torch 2.8 look into no dict's values
    if hooks and hook in found and found[-1] is not hook:
        hooks.move_to_end(next(key for key, each in hooks.items() if each is hook))


@contextlib.contextmanager
def without_user_s(module: nn.Module) -> Iterator[None]:
    """Calls inside pass by the user's hooks: they are of what the model does with the module, and not of ours."""
    before = {place: getattr(module, place) for place in PLACES}
    if any(is_user_s(hook) for hooks in before.values() for hook in hooks.values()):
        for place, hooks in before.items():
            setattr(module, place, OrderedDict((k, hook) for k, hook in hooks.items() if not is_user_s(hook)))
    try:
        yield
    finally:
        for place, hooks in before.items():
            setattr(module, place, hooks)
