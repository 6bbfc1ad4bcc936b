"""What may be given as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...teachers import Endpoint, TeacherStore
from ...teachers.connection import without_credentials
from ..loading import load_model
from .base import Teacher
from .elsewhere import Served, Stored
from .in_room import InRoom


def is_url(path: Any) -> bool:
    """Whether a teacher's path is a server's URL."""
    return str(path).lower().startswith(("http://", "https://"))


def is_store(path: str | Path) -> bool:
    """Whether a folder is that of a `TeacherStore`."""
    return (Path(path) / "manifest.json").exists() and (Path(path) / "shards").exists()


def teacher_of(given: Any) -> Teacher:
    """The teacher for a model, a model's path or hub name, a store or its folder, or an endpoint (no mere URL)."""
    if isinstance(given, (str, Path)):
        if is_url(given):
            raise ValueError(f"give fk.Endpoint({without_credentials(str(given))!r}, vocabulary=...) for a server")
        return teacher_of(TeacherStore(given) if is_store(given) else load_model(given))
    if isinstance(given, TeacherStore):
        return Stored(given)
    if isinstance(given, Endpoint):
        return Served(given)
    if isinstance(given, Teacher):
        return given
    if isinstance(given, torch.nn.Module) and hasattr(given, "config"):
        return InRoom(given)
    raise TypeError(
        "a teacher is a Hugging Face model, a path, a TeacherStore, an Endpoint, OfRows, Itself, or of several "
        f"Mixture([...]), not {type(given).__name__}"
    )
