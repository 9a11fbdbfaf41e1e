"""Teachers whose denoiser is known in closed form, to prove samplers and distillation methods with.

Examples:
    >>> from advkd.exact import GaussianTeacher
    >>> teacher = GaussianTeacher(torch.zeros(2), torch.ones(2))
    >>> error = teacher.sample(4, solver="unipc", steps=10) - teacher.flow(teacher.noise(4), 157.4, 0.0)
"""

from .diffusion.exact import FiniteSetTeacher, GaussianTeacher, MixtureTeacher
from .diffusion.exact_cascade import GaussianSuperResolution
from .diffusion.exact_teacher import ExactTeacher

__all__ = ["ExactTeacher", "FiniteSetTeacher", "GaussianSuperResolution", "GaussianTeacher", "MixtureTeacher"]
