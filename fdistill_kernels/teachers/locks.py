"""Locks on files, which processes share and the system frees when one dies."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _had(lock: Callable[..., Any], *arguments: Any) -> bool:
    """Calls a function that takes a lock without waiting; whether the lock was free."""
    try:
        lock(*arguments)
    except (BlockingIOError, PermissionError):
        return False
    return True


def locked(file: int, kind: int, begin: int = 0, length: int = 0) -> bool:
    """Locks or unlocks bytes of a file (length 0: all) for this descriptor.

    Systems without such locks (macOS) have `lockf`, whose locks are the process's: batches of one process then do not
    wait for each other.
    """
    if not hasattr(fcntl, "F_OFD_SETLK"):
        how = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
        return _had(fcntl.lockf, file, how, length, begin)
    return _had(fcntl.fcntl, file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, begin, length, 0))


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on the file; it need not be there."""
    try:
        with open(path) as file:
            return not _had(fcntl.flock, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
