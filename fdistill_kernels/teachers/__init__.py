"""What a teacher said about sequences, kept on disk or asked of a server: a student learns without its weights."""

from .endpoint import Endpoint
from .store import TeacherStore

__all__ = ["Endpoint", "TeacherStore"]
