"""One file per op: public function, plain-PyTorch reference, registration, backend choice."""

from .conv_bias_act_mask import conv_bias_act_mask
from .conv_block import conv_block
from .critic.penalty import gradient_penalty
from .image_gradient import image_gradient
from .interpolate import interpolate
from .mask_mul import mask_mul
from .norm_act import norm_act
from .penalty_reduce import penalty_reduce
from .philox import philox_normal, philox_uniform, philox_words
from .sampler_step import sampler_step
from .step_coefficients import StepCoefficients, coefficient_table
from .student_forward import student_forward

__all__ = [
    "StepCoefficients",
    "coefficient_table",
    "conv_bias_act_mask",
    "conv_block",
    "gradient_penalty",
    "image_gradient",
    "interpolate",
    "mask_mul",
    "norm_act",
    "penalty_reduce",
    "philox_normal",
    "philox_uniform",
    "philox_words",
    "sampler_step",
    "student_forward",
]
