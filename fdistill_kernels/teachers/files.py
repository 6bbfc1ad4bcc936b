"""Files that are complete or absent, with checksums by which damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Partial files that are older, in seconds, are of a writer that died.
OLD = 86400.0


class Damaged(ValueError):
    """A file does not have the content that was written."""


#: Of a process that has too many files or too little memory, which is no damage.
NO_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextlib.contextmanager
def noticing() -> Iterator[None]:
    """What reading a damaged file raises becomes `Damaged`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in NO_MEANS:
            raise
        raise Damaged(str(error)) from error


def hash_of(content: dict[str, Any]) -> str:
    """Of what JSON holds, whatever the order of its keys."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def sealed(content: dict[str, Any], indent: int | None = None) -> bytes:
    """JSON with a checksum of its own."""
    return json.dumps({**content, "check": hash_of(content)}, indent=indent, sort_keys=True).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """The content that `sealed` was given; Damaged where the file is missing, or something else is in it."""
    try:
        content = json.loads(path.read_bytes())
        whole = content.pop("check") == hash_of(content)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{path.name} is not what was written")
    return content


def write_whole(path: Path, content: bytes, first: bool = False) -> None:
    """Writes a file whole or not at all, to the disk. first: FileExistsError if it exists already."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if first:
            os.link(partial, path)  # which, unlike a rename, does not replace
            os.unlink(partial)
        else:
            os.replace(partial, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        told = f"{path} could not be written ({error.strerror}); what was flushed before is whole"
        raise OSError(error.errno, told) from error


@noticing()
def mapped(path: Path) -> dict[str, Tensor]:
    """A file's tensors, memory-mapped."""
    open(path, "rb").close()  # safetensors says of any error that there is no file
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def remove_old(folder: Path) -> None:
    """Removes the partial files of writers that died long ago."""
    for partial in [*folder.glob("*.partial"), *folder.glob("shards/*.partial")]:
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > OLD:
                partial.unlink()
