"""f-DISTILL on sequences: objectives, sampling, teacher cache, pre-distillation, trainer (Wen et al., ACL 2023)."""

from .objectives import METHODS, Half, mixture
from .objectives import method as method_by_name
from .predistill import copy_layers
from .samples import TeacherSamples
from .sampling import Sampling

__all__ = ["METHODS", "Half", "Sampling", "TeacherSamples", "copy_layers", "method_by_name", "mixture"]
