"""Distillation methods: one paper a module. A method is a row of :data:`METHODS`."""

import importlib
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from .base import Method

METHODS = {
    "adv-kd": "adv_kd.AdvKD",
    "pairs": "pairs.Pairs",
    "reparametrize": "reparametrize.Reparametrize",
    "progressive": "progressive.Progressive",
    "guided": "guided.Guided",
    "features": "features.Features",
    "rectified-flow": "rectified_flow.RectifiedFlow",
    "consistency": "consistency.Consistency",
    "diff-instruct": "diff_instruct.DiffInstruct",
    "dpdm": "dpdm.DPDM",
    "ddgan": "ddgan.DDGAN",
    "score-distillation": "score_distillation.ScoreDistillation",
    "denoising": "denoising.Denoising",
    "classification": "classification.Classification",
    "autoencoding": "autoencoding.Autoencoding",
}
"""Name -> module and class of every method."""


def method_class(name: str) -> "type[Method]":
    """Class of the method ``name``, imported when it is asked for.

    Raises:
        InputError: no method has that name.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    module, _, kind = METHODS[name].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
