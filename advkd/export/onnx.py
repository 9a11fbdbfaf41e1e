"""A student as an ONNX file: plain operations, for any batch size."""

import importlib.util
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..models.autoencoder import require_pixels
from ..models.batch_norm import evaluating
from ..models.classes import flat_join
from ..models.fused_student import FusedStudent
from ..models.student import Student
from ..ops.student_forward import student_forward_reference
from ..runtime.files import write_bytes

PACKAGES = ("onnx", "onnxscript")
"""Packages that torch's exporter needs."""

CLASS_NAMES = "class_names"
"""Key of a file's metadata."""


def export_onnx(student: Student | FusedStudent, path: str | Path, opset_version: int | None = None) -> Path:
    """Write a student to an ONNX file with the input ``z``, that of a student with classes also ``labels``, and ``images``.

    Args:
        student: a student, whose own modules are exported in eval mode and keep their mode, or a fused student, whose folded
            convolutions are exported.
        path: the file, which is whole or absent.
        opset_version: of ONNX; by default that of torch's exporter.

    Returns:
        ``path``. For every batch size the file's network gives ``images`` ``(batch, C, S, S)`` in [-1, 1] of ``z``
        ``(batch, latent_numel)``, in the student's dtype; a fused student's ``z`` is float32, its images are in its dtype.
        ``labels`` are ``(batch,)`` int64 class numbers, which the network does not check: -1 is the last class, as in ONNX's
        Gather. The names of the classes by number are a JSON list in the file's ``metadata_props`` under ``class_names``.

    Raises:
        InputError: an object that is no student, or packages that are missing.

    Examples:
        >>> export_onnx(Student.from_pretrained("digits"), "digits.onnx")  # doctest: +SKIP
        PosixPath('digits.onnx')
    """
    if not isinstance(student, (Student, FusedStudent)):
        raise InputError(f"student must be a Student or a FusedStudent, got {type(student).__name__}")
    require_pixels(student, "export to ONNX")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"export to ONNX needs {' and '.join(missing)}: pip install 'advkd[onnx]'")
    # The exporter takes a batch of one for a constant.
    z = student.latents(2)
    if isinstance(student, Student):
        z = z.to(next(student.parameters()).dtype)
    inputs = {"z": z}
    if student.num_classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.int64, device=z.device)
    with torch.no_grad(), evaluating(student):
        model = _model(student if isinstance(student, Student) else _Folded(student).eval(), inputs, opset_version)
    if student.num_classes:
        model.metadata_props.add(key=CLASS_NAMES, value=json.dumps(student.class_names, ensure_ascii=False))
    write_bytes(path, model.SerializeToString())
    return Path(path)


class _Folded(nn.Module):
    """The convolutions of a fused student as plain operations."""

    def __init__(self, fused):
        super().__init__()
        self.layers, self.slope, self.dtype = fused.layers, fused.config.slope, fused.dtype
        self.latent_parts = fused.latent_parts
        for name, tensor in fused.named_buffers():
            self.register_buffer(name, tensor.to(fused.dtype))

    def forward(self, z, labels=None):
        if labels is not None:
            z = flat_join(z, self.latent_parts, F.embedding(labels, self.embedding))
        weights, biases = ([getattr(self, f"{kind}{i}") for i in range(len(self.layers))] for kind in ("weight", "bias"))
        return student_forward_reference(z.to(self.dtype), weights, biases, self.layers, self.slope)


def _model(network, inputs, opset_version):
    """ONNX's protocol buffer of a network, whose ``inputs`` by name have a batch of two."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # Inputs whose batch is the same are named twice.
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
        program = torch.onnx.export(
            network,
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["images"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            opset_version=opset_version,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:
        # Lines of the source, with their place on this machine.
        del node.metadata_props[:]
    return model
