"""Locks on files, which processes share and the system frees when one dies."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where what needs no locks runs
    fcntl = None  # type: ignore[assignment]


def _ask_for_locks() -> None:
    if fcntl is None:
        raise NotImplementedError(
            "stores are filled, and a server's files read, under fcntl's locks, which Windows lacks"
        )


def _had(lock: Callable[..., Any], *arguments: Any) -> bool:
    """Calls a function that takes a lock without waiting; whether the lock was free."""
    try:
        lock(*arguments)
    except (BlockingIOError, PermissionError):
        return False
    return True


def owned(file: int) -> bool:
    """Locks a file for this process, not for those that it forks; whether it has, or there are no locks here."""
    try:
        return fcntl is None or _had(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # of a file system without locks
        return True


def lock(file: int, begin: int, length: int) -> bool:
    """Locks bytes of a file for this descriptor, if nobody else has; whether it did. Systems without such locks (macOS)
    have `lockf`, whose locks are the process's: batches of one process then do not wait for each other.
    """
    return _lock(file, "F_WRLCK", begin, length)


def unlock(file: int) -> None:
    """Frees all bytes of a file."""
    _lock(file, "F_UNLCK", 0, 0)


def _lock(file: int, kind: str, begin: int, length: int) -> bool:
    _ask_for_locks()
    if not hasattr(fcntl, "F_OFD_SETLK"):
        how = fcntl.LOCK_UN if kind == "F_UNLCK" else fcntl.LOCK_EX | fcntl.LOCK_NB
        return _had(fcntl.lockf, file, how, length, begin)
    what = struct.pack("hhqqi4x", getattr(fcntl, kind), os.SEEK_SET, begin, length, 0)
    return _had(fcntl.fcntl, file, fcntl.F_OFD_SETLK, what)


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on the file; it need not be there."""
    _ask_for_locks()
    try:
        with open(path) as file:
            return not _had(fcntl.flock, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
