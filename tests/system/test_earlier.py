"""Training gives the numbers that it gave before its loops became one, and files of that time are read or refused."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

from advkd import FusedStudent, Student, Trajectories
from advkd.cli.main import main
from advkd.data.images import load_images, load_labelled
from advkd.data.sources import Tensors
from advkd.errors import InputError
from advkd.methods.adv_kd import recipe
from advkd.methods.classification import Classification, ClassifierTrainingConfig
from advkd.methods.denoising import Denoising, TeacherTrainingConfig
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.runtime.files import read_tensors, with_digest, write_tensors
from advkd.training.distillation import Distiller, distill
from advkd.training.teacher import build_unet, train_teacher
from advkd.training.trainer import Trainer

from ..conftest import ROOT, tiny_student, tiny_teacher

EARLIER = ROOT / "tests" / "data" / "earlier"
NORMALS = "443a9fa4ffb0e2221dbc5b56bec0b8ccb4510a8a94a903e8321dfa3b2d99d55b"
"""Digest of the numbers by :func:`normals` where ``updates.json`` was made: with AVX2 or AVX-512."""

UPDATES = json.loads((EARLIER / "updates.json").read_text())
SMALL = {"batch_sizes": (8,), "critic_channels": 4, "critic_max_channels": 8}
OPTIONS = {"kl": 0.1, "conditional": True, "final_learning_rate": 0.1, "augment": True, "critic_updates": 2}
RECIPES = {
    "joint": recipe("joint", updates=(20,), **SMALL),
    "every option": recipe("joint", updates=(20,), **OPTIONS, **SMALL),
    "fresh latents": recipe("joint", updates=(20,), fresh=True, augment=True, pairs=16, **SMALL),
    "paper": recipe("paper", updates=(5,), **SMALL),
}


def distillation(name, data, out, dtype):
    return Distiller(Trajectories(data), tiny_student(), RECIPES[name], out, dtype=dtype, progress=False)


def teacher(name, data, out, dtype):
    diffusers = pytest.importorskip("diffusers")
    prediction = name.partition("/")[2]
    config = TeacherTrainingConfig(size=8, channels=(8, 8), steps=20, batch_size=4, prediction=prediction, warmup=5)
    torch.manual_seed(config.seed)
    unet = build_unet(8, 1, config.channels)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    source = Tensors(images=load_images("digits", 8, None))
    return Trainer(Denoising(config, unet, scheduler), source, None, out, dtype=dtype, progress=False)


def classifier(name, data, out, dtype):
    config = ClassifierTrainingConfig(size=8, steps=20, batch_size=16)
    images, labels, names = load_labelled("digits", 8)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    train = torch.randperm(len(images), generator=generator)[round(config.held_out * len(images)) :]
    torch.manual_seed(config.seed)
    network = Classifier(ClassifierConfig(image_size=8, classes=len(names), channels=(32,)))
    source = Tensors(images=images[train], labels=labels[train])
    return Trainer(Classification(config, network, generator), source, None, out, dtype=dtype, progress=False)


def normals():
    """Digest of torch's normal numbers, whose last bits depend on the processor's vector instructions."""
    numbers = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_those_of_before(name, tmp_path):
    """Weights moved by two units in the last place before every update move these numbers by at most 3e-14."""
    if normals() != NORMALS:
        pytest.skip("torch draws other normal numbers on this processor, so that weights and noise are others from the start")
    make = {"teacher": teacher, "classifier": classifier}.get(name.partition("/")[0], distillation)
    run = make(name, EARLIER / "paths", tmp_path, torch.float64)
    expected = UPDATES[name]
    assert len(expected) == 20
    for i, before in enumerate(expected):
        now = run.step()
        assert now.keys() == before.keys()
        assert all(abs(now[key] - before[key]) <= 1e-10 * max(1.0, abs(before[key])) for key in now), (i, now, before)


def test_students_and_engines_draw_what_they_drew():
    images = json.loads((EARLIER / "images.json").read_text())
    student = Student.from_pretrained(EARLIER / "student")
    engine = FusedStudent.from_pretrained(EARLIER / "engine", backend="reference")
    for model, name in ((student.double(), "student"), (engine, "engine")):
        expected = torch.tensor(images[name], dtype=torch.float32)
        assert torch.allclose(model.sample(1, seed=1).flatten()[:16], expected, atol=1e-5)
    assert student.training_record["samples"] == [{"seed": 0, "start": 0, "num": 16}]


def test_recordings_and_configurations_are_read(tmp_path):
    data = Trajectories(EARLIER / "recording")
    data.verify()
    assert data.info.depth == 4 and data.info.resolutions == [4, 8, 8, 8] and len(data) == 16
    assert torch.equal(data.noise([3]), tiny_teacher().noise(4)[3:])
    # A student's configuration as a preset, a recipe's as a file.
    (tmp_path / "student.json").write_text((EARLIER / "student" / "config.json").read_text())
    run = json.loads((EARLIER / "student" / "training.json").read_text())["runs"][0]
    (tmp_path / "recipe.json").write_text(json.dumps({**run["config"], "updates": [1]}))
    arguments = ["distill", "--trajectories", EARLIER / "recording", "--preset", tmp_path / "student.json"]
    arguments += ["--config", tmp_path / "recipe.json", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)), prog_name="advkd")
    assert ended.value.code == 0 and (tmp_path / "out" / "config.json").exists()


def test_runs_of_before_there_were_classes_and_targets_go_on(tmp_path, monkeypatch):
    """Their checkpoints name neither; one of other targets remains refused."""
    config, out = recipe("joint", updates=(6,), checkpoint_every=4, **SMALL), tmp_path / "cut"
    run = Distiller(Trajectories(EARLIER / "recording"), tiny_student(), config, out, progress=False)
    draw = run.next_batch
    monkeypatch.setattr(run, "next_batch", lambda: pytest.fail("killed") if run.update == 5 else draw())
    with pytest.raises(pytest.fail.Exception, match="killed"):
        run.run()
    path = out / "checkpoint.safetensors"
    tensors, record = read_tensors(path, "checkpoint", ("digest",))
    told = record["run"]
    assert told.pop("targets") == "states" and told["student"].pop("classes") == [] and told["student"].pop("class_channels")
    del record["digest"]
    write_tensors(path, tensors, with_digest(tensors, record))
    with pytest.raises(InputError, match="holds a run with another targets:"):
        distill(EARLIER / "recording", tiny_student(), replace(config, targets="image"), out, resume=True)
    resumed = distill(EARLIER / "recording", tiny_student(), config, out, resume=True, progress=False)
    whole = distill(EARLIER / "recording", tiny_student(), config, tmp_path / "whole", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


def test_unfinished_teachers_of_before_starts_go_on(tmp_path, monkeypatch):
    """The identity of their run has no start, and none of the fields of glyphs."""
    config = TeacherTrainingConfig(size=8, channels=(8,), steps=3, batch_size=4, checkpoint_every=1)
    whole, out, real = train_teacher(config, tmp_path / "whole", progress=False), tmp_path / "out", Trainer.step
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match="killed"):
        patch.setattr(Trainer, "step", lambda run: pytest.fail("killed") if run.update == 2 else real(run))
        train_teacher(config, out, progress=False)
    path = out / "checkpoint.safetensors"
    tensors, record = read_tensors(path, "checkpoint", ("digest",))
    assert [record["run"].pop(name) for name in ("init", "classes", "images")] == [None, "", 0]
    del record["digest"]
    write_tensors(path, tensors, with_digest(tensors, record))
    train_teacher(config, out, resume=True, progress=False)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_unfinished_runs_of_before_are_refused_with_the_remedy(tmp_path):
    remedy = "of another version of advkd.*finish the run with that version, or start again in another folder"
    shutil.copytree(EARLIER / "distillation", tmp_path / "distillation")
    with pytest.raises(InputError, match=remedy):
        distill(EARLIER / "recording", tiny_student(), RECIPES["joint"], tmp_path / "distillation", resume=True)
    shutil.copytree(EARLIER / "teacher", tmp_path / "teacher")
    config = TeacherTrainingConfig(size=8, channels=(8,), steps=4, batch_size=4, checkpoint_every=2)
    with pytest.raises(InputError, match=remedy):
        train_teacher(config, tmp_path / "teacher", resume=True, progress=False)
    for name in ("distillation", "teacher"):
        before = (EARLIER / name / "checkpoint.safetensors").read_bytes()
        assert (tmp_path / name / "checkpoint.safetensors").read_bytes() == before
