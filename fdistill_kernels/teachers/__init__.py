"""What a teacher said of sequences, kept on disk: a student learns from it with the teacher's weights absent."""

from .endpoint import Endpoint
from .store import TeacherStore

__all__ = ["Endpoint", "TeacherStore"]
