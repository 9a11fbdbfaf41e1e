"""One file per op: public function, plain-PyTorch reference, registration, backend choice."""

from .conv_block import conv_block
from .gradient_penalty import gradient_penalty
from .philox import philox_normal, philox_uniform, philox_words
from .sampler_step import StepCoefficients, coefficient_table, sampler_step
from .student_forward import student_forward

__all__ = [
    "StepCoefficients",
    "coefficient_table",
    "conv_block",
    "gradient_penalty",
    "philox_normal",
    "philox_uniform",
    "philox_words",
    "sampler_step",
    "student_forward",
]
