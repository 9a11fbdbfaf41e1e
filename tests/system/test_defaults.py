"""torch's defaults are the user's: another default dtype or device, or inference mode, changes no documented result.

Each piece of work runs once as it is and once under each of the modes, from loading to the result, and gives the same bits.
"""

import copy
import hashlib
import inspect
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from advkd import (
    AdvKDPipeline,
    FusedDDIMScheduler,
    FusedDDPMScheduler,
    FusedDEISMultistepScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerDiscreteScheduler,
    FusedHeunDiscreteScheduler,
    FusedUniPCMultistepScheduler,
    Student,
    critic_gradients,
)
from advkd.cli.sample import sample
from advkd.cli.warmup import warmup
from advkd.data.draws import DataOrder, shift, training_latents
from advkd.data.images import load_images, load_labelled, normalize, read_pictures
from advkd.data.trajectories import Trajectories
from advkd.diffusion.coefficients import ddim_coefficients
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.evaluation import evaluate, metrics
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_folders, evaluate_student
from advkd.evaluation.features import build_extractor, extract
from advkd.methods.adv_kd import recipe
from advkd.methods.classification import ClassifierTrainingConfig
from advkd.methods.denoising import TeacherTrainingConfig
from advkd.models.critic import Critic, CriticConfig
from advkd.ops import coefficient_table, image_gradient, interpolate, philox_normal, philox_uniform, philox_words
from advkd.ops.latents import dct_basis, project
from advkd.runtime import timing
from advkd.training.classifier import train_classifier
from advkd.training.distillation import distill
from advkd.training.teacher import train_teacher

from ..conftest import DEFAULTS, other_default, tiny_recording, tiny_student

MODES = {
    **{str(default).removeprefix("torch."): partial(other_default, default) for default in DEFAULTS},
    "inference": torch.inference_mode,
}
TRAINING = ("train a teacher", "train a classifier", "distil", "critic")
"""Pieces of work that need gradients, which inference mode cannot give."""


def numbers(n=200, d=6, seed=0):
    """Features, made by numpy."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder, trajectories):
    """A folder with a teacher, trajectories, pictures of two classes, a student and a classifier."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(teacher_folder, folder / "teacher")
    shutil.copytree(trajectories, folder / "data")
    generator = np.random.default_rng(0)
    for i in range(40):
        path = folder / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    tiny_student().save_pretrained(folder / "student")
    train_classifier(tiny_classifier(folder), folder / "classifier", progress=False)
    return folder


def tiny_classifier(folder):
    return ClassifierTrainingConfig(data=str(folder / "pictures"), num_features=4, steps=3, batch_size=4)


def students(folder, out):
    model = Student.from_pretrained("digits")
    fused = model.fuse(tune=False)
    z = model.latents(2, seed=3)
    with torch.no_grad():
        levels = model.levels(z)
    return [z, model.sample(3, 1), fused.latents(2, 3), fused.sample(3, 1), *fused.stream(3, 1, 2), *levels, fused(z)]


def reference_engine(folder, out):
    fused = Student.from_pretrained(folder / "student").fuse(backend="reference", dtype=torch.bfloat16)
    return [fused.sample(2), fused.sample(0)]


def teachers(folder, out):
    teacher = Teacher.from_pretrained(folder / "teacher")
    x_T = teacher.noise(2, 5)
    kept = teacher.record(x_T, {0: 2}, steps=4)[1][0]
    path = [x for _, x in teacher.path(x_T, "ddpm", 4, seed=1)][-1:]
    return [x_T, kept, *path, teacher.sample(2, 1, steps=3), teacher.sample(2, 1, solver="ddpm", steps=3)]


def recordings(folder, out):
    record_trajectories(Teacher.from_pretrained(folder / "teacher"), tiny_recording(num=8), out, progress=False)
    data = Trajectories(out)
    z, levels = data.batch([0, 5], [1, 4])
    return [z, levels[1], levels[4], data.noise([3]), (out / "manifest.json").read_bytes()]


def pictures(folder, out):
    images, labels, _ = load_labelled(folder / "pictures")
    digits, classes, _ = load_labelled("digits")
    read = read_pictures(folder / "pictures", "--images")
    return [
        images,
        labels,
        digits,
        classes,
        load_images("digits", 16, 3),
        load_images(folder / "pictures"),
        read,
        normalize(read),
    ]


def draws(folder, out):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32))
    return [
        philox_words(1, range(3), 5, stream="z"),
        philox_normal(1, range(3), (2, 2), stream="x_T"),
        philox_uniform(1, range(3), stream="interpolation"),
        training_latents(1, 2, 3, 4),
        shift(x, 1, 0, 1, 1),
        project(x, 2),
        project(x, 1, True),
        dct_basis(8, 3),
        coefficient_table([ddim_coefficients(0.5, 0.7, "epsilon")]),
        interpolate(x, -x, (1, range(2), 0)),
        torch.tensor(DataOrder(5, 1).rows(0, 12), dtype=torch.int64, device="cpu"),
    ]


def features(folder, out):
    images = load_images(folder / "pictures")
    shipped = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 1, 32, 32), dtype=np.uint8))
    return [
        extract(build_extractor(str(folder / "classifier")), images, cache=out),
        extract(build_extractor("digits"), shipped),
    ]


def measures(folder, out):
    return [metrics.compare(numbers(seed=1), numbers(seed=2), resamples=20), metrics.frechet_floor(numbers(), 4)]


def evaluations(folder, out):
    config = EvaluationConfig(num=20, extractor=str(folder / "classifier"), resamples=20, real=str(folder / "pictures"))
    options = {"teacher_samples": folder / "twice", "cache": out / "cache", "progress": False}
    if not (folder / "twice").exists():
        recording = tiny_recording(num=40, seed=9)
        record_trajectories(Teacher.from_pretrained(folder / "teacher"), recording, folder / "twice", progress=False)
    found = evaluate_student(folder / "student", folder / "teacher", config, out / "e", **options)
    other = evaluate_folders(folder / "pictures", folder / "pictures", config, cache=out / "cache")
    return [found["rows"], found["pairs"], other["rows"]]


def pipelines(folder, out):
    AdvKDPipeline(Student.from_pretrained(folder / "student")).save_pretrained(out)
    results = []
    for pipe in (AdvKDPipeline.from_pretrained(out), AdvKDPipeline(Student.from_pretrained("digits"))):
        for kind in ("pt", "np"):
            results.append(pipe(2, generator=torch.Generator("cpu").manual_seed(3), output_type=kind).images)
    return results


def samples(folder, out):
    sample("digits", 3, 1, out / "grid.png", progress=False)
    sample("digits", 3, 1, out / "images", interpolate=True, progress=False)
    return [path.read_bytes() for path in (out / "grid.png", *sorted((out / "images").glob("*.png")))]


def caches(folder, out):
    return [[size for _, size, _ in warmup("digits", batch_sizes=(1, 2), tune=False)]]


def train_a_teacher(folder, out):
    config = TeacherTrainingConfig(data=str(folder / "pictures"), channels=(8,), steps=3, batch_size=4, checkpoint_every=1)
    train_teacher(config, out, progress=False)
    return [(out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()]


def train_a_classifier(folder, out):
    train_classifier(tiny_classifier(folder), out, progress=False)
    return [(out / "diffusion_pytorch_model.safetensors").read_bytes(), (out / "training.json").read_bytes()]


def distil(folder, out):
    changes = {"updates": (2,), "batch_sizes": (4,), "critic_channels": 8, "conditional": True, "kl": 0.1, "augment": True}
    student = Student.from_pretrained(folder / "student")
    distill(folder / "data", student, recipe("joint", **changes), out, progress=False)
    return [(out / "diffusion_pytorch_model.safetensors").read_bytes(), (out / "metrics.csv").read_bytes()]


def critic(folder, out):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32))
    results = []
    for backend in ("auto", "reference", "autograd"):
        found = critic_gradients(CRITIC, x, -x, a=(1, range(4), 0), backend=backend)
        results += [found.loss, found.penalty, *found.gradients]
    weight = next(p.detach() for p in CRITIC.parameters() if p.ndim == 4 and p.shape[1] == 1)
    d = torch.ops.aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return [*results, *(image_gradient(d, weight, x.shape, padding=1, backend=kind) for kind in ("auto", "reference"))]


torch.manual_seed(0)
CRITIC = Critic(CriticConfig(8, 1, 8, 8))

SCHEDULERS = [
    kind(num_train_timesteps=100)
    for kind in (
        FusedDDIMScheduler,
        FusedDDPMScheduler,
        FusedEulerDiscreteScheduler,
        FusedDPMSolverMultistepScheduler,
        FusedHeunDiscreteScheduler,
        FusedUniPCMultistepScheduler,
        FusedDEISMultistepScheduler,
    )
]
for scheduler in SCHEDULERS:
    scheduler.set_timesteps(4)


def schedulers(folder, out):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32))
    results = []
    for scheduler in copy.deepcopy(SCHEDULERS):
        state = x
        draws = "generator" in inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            options = {"generator": torch.Generator("cpu").manual_seed(1)} if draws else {}
            state = scheduler.step(0.1 * state, t, scheduler.scale_model_input(state, t), **options).prev_sample
        results.append(state)
    return results


WORK = {
    function.__name__.replace("_", " "): function
    for function in (
        students,
        reference_engine,
        teachers,
        recordings,
        pictures,
        draws,
        features,
        measures,
        evaluations,
        pipelines,
        samples,
        caches,
        train_a_teacher,
        train_a_classifier,
        distil,
        critic,
        schedulers,
    )
}
RESULTS = {}


def comparable(value):
    """A result as text: its bits' hash, and a tensor's dtype, device and shape."""
    if isinstance(value, torch.Tensor):
        bits = (
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if value.device.type == "cpu"
            else b""
        )
        return f"{value.dtype} {value.device} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORK)
def test_defaults_of_the_user_change_nothing(name, mode, place, tmp_path, monkeypatch):
    if mode == "inference" and name in TRAINING:
        pytest.skip("gradients are wanted")
    # The models' times are not tested.
    monkeypatch.setattr(evaluate, "measure", lambda calls, repeats, device: timing.measure(calls, 1, 0, device))
    if name not in RESULTS:
        RESULTS[name] = [comparable(value) for value in WORK[name](place, tmp_path / "plain")]
    with MODES[mode]():
        found = WORK[name](place, tmp_path / mode)
    found = [comparable(value) for value in found]
    assert len(found) == len(RESULTS[name])
    for i, (ours, wanted) in enumerate(zip(found, RESULTS[name], strict=True)):
        assert ours == wanted, f"result {i} of {name}"
    assert torch.get_default_dtype() == torch.float32 and torch.get_default_device() == torch.device("cpu")


def test_what_is_loaded_in_inference_mode_can_be_trained(place, tmp_path):
    with torch.inference_mode():
        student = Student.from_pretrained(place / "student")
        wanted = student.sample(2)
    assert torch.equal(student.sample(2), wanted)
    distill(
        place / "data", student, recipe("joint", updates=(1,), batch_sizes=(4,), critic_channels=8), tmp_path, progress=False
    )
    assert not torch.equal(student.eval().sample(2), wanted)
