"""The folding of a student: what an engine can stand for, and the weights and biases that it computes with.

A class whose forward folding stands for says so by ``folded_forward = True`` in its own body.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.conv_layer import ConvLayer
from .batch_norm import CannotFoldError, fold, geometry, has_own_code, read_by_fold, require_foldable, tensors_of, unwrapped

GEOMETRIES = tuple(((3, 3), (1, 1), padding, (1, 1), 1, "zeros") for padding in ((1, 1), "same"))
"""The form of every convolution of an engine, as :func:`advkd.models.batch_norm.geometry` gives it."""
NO_NORM = nn.Identity()


def require_fusable(student: Any) -> list[tuple[nn.Module, nn.Module]]:
    """A student's convolutions, each with the norm behind it (:func:`_stages`).

    Raises:
        CannotFoldError: naming the part that computes something else than its tensors say, or than an engine can.
    """
    parts = (student, *(unwrapped(block) for block in student.submodules))
    if any(_has_own_code(part) for part in parts):
        raise CannotFoldError("a student with hooks or with a forward of its own cannot be fused: take them off")
    slopes = {block.slope for block in student.submodules}
    if len(slopes) > 1 or not 0 <= max(slopes) < 1:
        found = ", ".join(map(str, sorted(slopes)))
        raise CannotFoldError(f"the submodules' slopes must be equal in an engine, and in [0, 1), got {found}")
    stages = _stages(student)
    for i, (convolution, norm) in enumerate(stages):
        require_foldable(convolution, norm)
        if geometry(vars(convolution)) not in GEOMETRIES:
            raise CannotFoldError(f"convolution {i} must have 3x3 pixels and a border of one zero, got {convolution}")
    return stages


def read_by_fusing(student: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The inputs of :meth:`advkd.FusedStudent.from_student`: a tuple of everything but tensors, and a list of the tensors.

    Raises:
        CannotFoldError: there is no such engine.
    """
    stages = require_fusable(student)
    described, tensors = [*vars(student.config).values(), student.submodules[0].slope], []
    if student.config.classes:
        tensors.append(folded_embedding(student))
    described += [block.upsample for block in student.submodules]
    for stage in stages:
        own, parts = read_by_fold(*stage)
        described.append(own)
        tensors += parts
    return tuple(described), tensors


def folded(student: Any, layers: Sequence[ConvLayer]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of each of a student's convolutions, its norm inside.

    Raises:
        CannotFoldError: the student's layers are not ``layers``, those of its configuration.
    """
    if [block.upsample for block in student.submodules] != [layer.upsample for layer in layers[:-1:2]]:
        raise CannotFoldError("the student's submodules do not up-sample where its configuration says, and cannot be fused")
    pairs = [fold(*stage) for stage in _stages(student)]
    for i, (layer, (weight, _)) in enumerate(zip(layers, pairs, strict=True)):
        expected = (layer.c_out, layer.c_in, 3, 3)
        if weight.shape != expected:
            raise CannotFoldError(f"convolution {i} must have weights {expected}, got {tuple(weight.shape)}")
    return pairs


def folded_embedding(student: Any) -> torch.Tensor:
    """The features of a conditional student's classes, ``(classes, class_channels * 16)``: its embedding's weight.

    Raises:
        CannotFoldError: an embedding with code of its own, one that scales its rows when it is called, or one of another shape.
    """
    config, module = student.config, unwrapped(student.embedding)
    if has_own_code(module, nn.Embedding) or module.max_norm is not None:
        raise CannotFoldError(f"an embedding with hooks, code or a max_norm of its own cannot be fused, got {module}")
    (weight,) = tensors_of(module, "weight")
    if weight.shape != (len(config.classes), 16 * config.class_channels):
        expected = f"({len(config.classes)}, {16 * config.class_channels})"
        raise CannotFoldError(f"the embedding of the classes must have weights {expected}, got {tuple(weight.shape)}")
    return weight


def _has_own_code(part):
    """True unless a call of the module runs the forward of a class that folding stands for."""
    kind = next((kind for kind in type(part).__mro__ if vars(kind).get("folded_forward")), None)
    return kind is None or has_own_code(part, kind)


def _stages(student):
    """A student's convolutions, each with the norm behind it; that behind the head changes nothing."""
    blocks = [unwrapped(block) for block in student.submodules]
    stages = [stage for b in blocks for stage in ((b.convolution1, b.norm1), (b.convolution2, b.norm2))]
    return [(unwrapped(convolution), unwrapped(norm)) for convolution, norm in (*stages, (student.head, NO_NORM))]
