"""A parser for commands whose options count once."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """The type of an option that is a seed of torch's generators."""
    with contextlib.suppress(ValueError):
        if -(2**63) <= int(text) < 2**63:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer of 64 bits, not {text!r}")


def amount(text: str) -> float:
    """The type of an option that is a length of time."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")


def written(text: str) -> Path:
    """The type of an option that is a file to be written, whose folder must be there."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there, not {text!r}")
    return path


class _Once(argparse._StoreAction):
    """Stores an option's value, and refuses a second one, of which only the last would count."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Raises argparse.ArgumentError if the option was given before."""
        given = vars(namespace).setdefault("_given", set())
        if option_string and self.dest in given:
            raise argparse.ArgumentError(self, "given twice, and only the last would count")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class OnceParser(argparse.ArgumentParser):
    """A parser that takes each option with a value once; its namespace keeps their names in `_given`."""

    def register(self, registry_name: str, value: Any, object: Any) -> None:
        """As argparse's, with another action for options with a value."""
        super().register(registry_name, value, _Once if object is argparse._StoreAction else object)
