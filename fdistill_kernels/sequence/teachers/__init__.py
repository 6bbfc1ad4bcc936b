"""What can be a teacher: a model, a store of what one said, a server, several of them, or the student itself.

Each gives the rows that a batch's steps are compared with; some also draw sequences:

    rows(prompts, continuations, device, pack, counted) -> TeacherRows
    draw(prompts, sampling, vocabulary) -> continuations
"""

from .base import Teacher
from .elsewhere import Served, Stored
from .given import teacher_of
from .in_room import InRoom
from .itself import Itself
from .several import Mixture, OfRows

__all__ = ["InRoom", "Itself", "Mixture", "OfRows", "Served", "Stored", "Teacher", "teacher_of"]
