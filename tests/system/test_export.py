"""Students exported as programs: torch.export, ONNX and onnxruntime."""

import copy
import json

import pytest
import torch

import advkd
from advkd.errors import InputError
from advkd.export import onnx as export
from advkd.models.shape import StudentConfig
from advkd.models.student import Student

from ..conftest import CLASSES, conditional_student

BATCHES = (1, 2, 5)


@pytest.fixture(params=["blocks", "pyramid"])
def student(request):
    """A student of either form of latents, with batch-norm statistics as after training."""
    detail = request.param == "pyramid"
    torch.manual_seed(0)
    shape = StudentConfig(16, 3, channels=(8, 4, 8, 8, 16, 4), latent_size=1 if detail else 2, detail_noise=detail)
    student = Student(shape).train()
    with torch.no_grad():
        for seed in range(3):
            student(student.latents(8, seed))
    return student.eval()


# Each of them takes seconds.
EITHER = pytest.mark.parametrize("student", ["pyramid", pytest.param("blocks", marks=pytest.mark.kernels)], indirect=True)


def dynamic():
    return ({0: torch.export.Dim("batch")},)


def test_a_program_of_the_student(student):
    """In eval mode, with gradients enabled, the program has torch's own operations and takes every batch size."""
    assert torch.is_grad_enabled()
    program = torch.export.export(student, (student.latents(3),), dynamic_shapes=dynamic())
    assert "advkd" not in str(program.graph_module.code)
    for n in BATCHES:
        z = student.latents(n, seed=n)
        assert (program.module()(z) - student(z)).abs().max() <= 1e-6


def test_the_student_is_plain_whatever_the_grad_mode(student):
    z = student.latents(3)
    with torch.no_grad():
        wanted = student(z)
    assert torch.equal(student(z), wanted) and torch.equal(student.requires_grad_(False)(z), wanted)


@pytest.fixture
def run():
    """A function that runs an ONNX file in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    def run(path, z, **labels):
        session, inputs = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]), {"z": z, **labels}
        assert [i.name for i in session.get_inputs()] == list(inputs)
        assert all(i.shape[0] == "batch" for i in session.get_inputs())
        (images,) = session.run(["images"], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(images)

    return run


@EITHER
def test_torchs_own_onnx_export(student, run, tmp_path):
    path = tmp_path / "student.onnx"
    names = {"input_names": ["z"], "output_names": ["images"]}
    torch.onnx.export(student, (student.latents(2),), path, dynamic_shapes=dynamic(), verbose=False, **names)
    for n in BATCHES:
        z = student.latents(n, seed=n)
        assert (run(path, z) - student(z)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["student", "training", "reference", "auto"])
def test_an_onnx_file_draws_the_students_images(student, kind, run, tmp_path):
    model = student if kind in ("student", "training") else student.fuse(kind, tune=False)
    before = copy.deepcopy(model.state_dict())
    model.train(kind == "training")
    path = advkd.export_onnx(model, tmp_path / "new" / "student.onnx")
    assert model.training == (kind == "training") and [p.name for p in path.parent.iterdir()] == ["student.onnx"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    student.eval()
    for n in BATCHES:
        z = student.latents(n, seed=n)
        assert (run(path, z) - student(z)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["student", pytest.param("auto", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("detail_noise", [True, pytest.param(False, marks=pytest.mark.kernels)], ids=["pyramid", "blocks"])
def test_an_onnx_file_of_a_student_with_classes(detail_noise, kind, run, tmp_path):
    """It has a second input, the numbers of the classes, whose names are with it; numbers below 0 count from the end."""
    student = conditional_student(detail_noise=detail_noise)
    path = advkd.export_onnx(student if kind == "student" else student.fuse(kind, tune=False), tmp_path / "student.onnx")
    for n in BATCHES:
        z, labels = student.latents(n, seed=n), torch.tensor([2, 0, 1, 1, 2])[:n]
        assert (run(path, z, labels=labels) - student(z, labels=labels)).abs().max() <= 1e-5
        assert torch.equal(run(path, z, labels=labels - 3), run(path, z, labels=labels))
    metadata = pytest.importorskip("onnxruntime").InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(CLASSES)


@pytest.mark.kernels
def test_dtypes_of_an_onnx_file(student, run, tmp_path):
    """A student takes latents in its own dtype; a fused one takes float32 and returns images in its dtype."""
    import onnx

    kinds = onnx.TensorProto
    half, wide = student.fuse("reference", torch.float16), student.fuse("reference", torch.float64)
    for model, latents, images in (
        (copy.deepcopy(student).double(), kinds.DOUBLE, kinds.DOUBLE),
        (half, kinds.FLOAT, kinds.FLOAT16),
        (wide, kinds.FLOAT, kinds.DOUBLE),
    ):
        graph = onnx.load(advkd.export_onnx(model, tmp_path / "a.onnx")).graph
        assert [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)] == [latents, images]
        onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    z = student.latents(2, seed=1)
    assert (run(advkd.export_onnx(half, tmp_path / "b.onnx"), z) - student(z)).abs().max() <= 1e-2


@EITHER
def test_an_onnx_file_names_no_place_of_this_machine(student, run, tmp_path):
    files = [advkd.export_onnx(student, tmp_path / name).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1] and b"student.py" not in files[0]


def test_missing_packages_are_named(student, monkeypatch, tmp_path):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match=r"^export to ONNX needs onnxscript: pip install 'advkd\[onnx\]'$"):
        advkd.export_onnx(student, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="student must be a Student or a FusedStudent, got Linear"):
        advkd.export_onnx(torch.nn.Linear(1, 1), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
