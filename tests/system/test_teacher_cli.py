"""Commands of a teacher: sampling by any solver, classes and guidance, recordings, noise power."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.cli.sample import sample_teacher
from advkd.data.pictures import save_image, to_pil, to_uint8
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.training.noise_power import estimate_noise_power

from ..conftest import tiny_recording, tiny_teacher
from .test_cli import refused, run


def differences(folder, images):
    """Largest differences of a folder's pictures from float images, in grey values."""
    pictures = to_uint8(images)[..., 0].int().numpy()
    return [abs(np.asarray(Image.open(folder / f"{i:06d}.png"), int) - pictures[i]).max() for i in range(len(pictures))]


def test_pictures_of_a_teacher(teacher_folder, tmp_path):
    """Sample i is the same in every batch, and a killed command goes on."""
    arguments = (str(teacher_folder), 5, 3, tmp_path / "t", Solver("unipc"), 4)
    said = sample_teacher(*arguments, batch_size=2, progress=False)
    assert said == "unipc-2, 4 steps, 4 network evaluations an image"
    assert max(differences(tmp_path / "t", Teacher.from_pretrained(teacher_folder).sample(5, 3, "unipc", 4))) <= 1
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.png")}
    (tmp_path / "t" / "000004.png").unlink()
    sample_teacher(*arguments, batch_size=2, progress=False)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.png")}
    assert [name for name in times if times[name] != again[name]] == ["000004.png"]
    with pytest.raises(InputError, match="pictures of another solver"):
        sample_teacher(*arguments[:4], Solver("ddim"), 4, progress=False)


def test_classes_take_turns(conditional, tmp_path):
    said = sample_teacher(str(conditional), 4, 0, tmp_path / "t", Solver("heun"), 3, "c, a", 1.0, batch_size=3, progress=False)
    assert said == "heun, 3 steps, 10 network evaluations an image"
    wanted = Teacher.from_pretrained(conditional).sample(4, 0, "heun", 3, labels=[2, 0, 2, 0], guidance=1.0)
    assert max(differences(tmp_path / "t", wanted)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher", "digits", "--student", "digits"), "--student and --teacher: name one of them"),
        (("--steps", "5"), "--steps is an option of a teacher"),
        (("--student", "digits", "--steps", "0"), "--steps is an option of a teacher"),
        (("--student", "digits", "--guidance", "0"), "--guidance is an option of a teacher"),
        (("--teacher", "digits", "--steps", "0"), "steps must be at least 1, got 0"),
        (("--teacher", "digits", "--solver", "unipc", "--steps", "-1"), "steps must be at least 1, got -1"),
        (("--solver", "unipc"), "--solver is an option of a teacher"),
        (("--teacher", "digits", "--interpolate"), "--interpolate is an option of a student"),
        (("--teacher", "digits", "--solver", "rk4"), "solver must be one of"),
        (("--teacher", "digits", "--solver", "unipc-3", "--steps", "2"), "steps must be at least 4"),
        (("--teacher", "digits", "--churn", "1"), "churn is a number of heun"),
        (("--teacher", "digits", "--classes", "3"), "unconditional"),
        (("--teacher", "digits", "--guidance", "1"), "guidance needs --classes"),
        (("--teacher", "CONDITIONAL", "--classes", " ,"), "--classes must name a class, got ' ,'"),
        (("--teacher", "CONDITIONAL", "--classes", ""), "--classes must name a class, got ''"),
        (("--teacher", "CONDITIONAL", "--classes", "d"), "'d' is not one of a, b, c"),
        (("--teacher", "CONDITIONAL", "--classes", "a", "--guidance", "-1"), "guidance must be at least 0"),
    ],
)
def test_bad_commands_are_one_line(options, message, conditional, capsys, tmp_path):
    options = [str(conditional) if option == "CONDITIONAL" else option for option in options]
    assert message in refused(capsys, "sample", *options, "-n", 2, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_classes_that_nobody_named_are_numbers(conditional, capsys, tmp_path):
    shutil.copytree(conditional, tmp_path / "t")
    (tmp_path / "t" / "classes.json").unlink()
    command = ("sample", "--teacher", tmp_path / "t", "--steps", 2, "-n", 2, "--out", tmp_path / "x")
    assert "no null class: name its classes by --classes" in refused(capsys, *command)
    assert run(capsys, *command, "--classes", "2,0", "--guidance", 0)[0] == 0
    assert max(differences(tmp_path / "x", Teacher.from_pretrained(tmp_path / "t").sample(2, steps=2, labels=[2, 0]))) <= 1


@pytest.mark.parametrize(
    ("solver", "spacing", "paired"),
    [("unipc-2", "", True), ("heun", "linspace", True), ("dpmpp-3m", "leading", True), ("euler-maruyama", "", False)],
)
def test_recordings_by_any_solver(solver, spacing, paired, tmp_path):
    """The recorded image is the sample, and the file says by which solver."""
    teacher = tiny_teacher()
    config = tiny_recording(solver=solver, spacing=spacing, steps=6)
    record_trajectories(teacher, config, tmp_path / "t", progress=False)
    data = Trajectories(tmp_path / "t")
    assert (data.paired, data.info.solver, data.info.spacing, data.info.steps) == (paired, solver, spacing, 6)
    assert data.info.config() == config or data.info.config(latent_size=config.latent_size) == config
    images = data.batch(range(4), [4])[1][4]
    wanted = teacher.sample(4, config.seed, Solver(solver, spacing), 6)
    assert torch.allclose(images, wanted, atol=2e-3)  # float16
    recipe = json.loads((tmp_path / "t" / "manifest.json").read_text())["recipe"]
    assert recipe["sampler"] == solver and recipe.get("spacing", "") == spacing and recipe["paired"] is paired
    with pytest.raises(InputError, match="another .*sampler"):
        record_trajectories(teacher, tiny_recording(solver="ddim", spacing=spacing, steps=6), tmp_path / "t", progress=False)


def test_spacings_between_whole_timesteps_are_not_recorded(tmp_path):
    with pytest.raises(InputError, match="spacing must be one of leading, trailing, linspace"):
        record_trajectories(tiny_teacher(), tiny_recording(spacing="karras"), tmp_path / "t", progress=False)


def test_noise_power_of_a_folder_of_pictures(teacher_folder, capsys, tmp_path):
    """The command reads bytes and estimates on images in [-1, 1]."""
    shutil.copytree(teacher_folder, tmp_path / "t")
    pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(to_pil(pixels)):
        save_image(picture, tmp_path / "pictures" / f"{i}.png")
    options = ("--data", tmp_path / "pictures", "--num", 8)
    assert run(capsys, "teacher", "noise-power", "--teacher", tmp_path / "t", *options)[0] == 0
    found = Teacher.from_pretrained(tmp_path / "t").noise_powers
    images = to_uint8(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = estimate_noise_power(Teacher.from_pretrained(teacher_folder), images, num=8, progress=False)
    assert found.timesteps == wanted.timesteps and found.values == pytest.approx(wanted.values, rel=1e-5)
    assert "a folder is needed" in refused(capsys, "teacher", "noise-power", "--teacher", "digits")


def test_a_damaged_noise_power_is_made_anew(teacher_folder, capsys, tmp_path):
    """Solvers that do not need it draw, those that do say how it is made, and that command works."""
    shutil.copytree(teacher_folder, tmp_path / "t")
    (tmp_path / "t" / "noise_power.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    save_image(to_pil(torch.zeros(1, 1, 8, 8))[0], tmp_path / "pictures" / "0.png")
    sample = ("sample", "--teacher", tmp_path / "t", "-n", 2, "--steps", 2, "--out", tmp_path / "grid.png", "--solver")
    assert run(capsys, *sample, "ddim")[0] == 0
    assert "noise_power.json" in refused(capsys, *sample, "analytic-ddpm")
    power = ("teacher", "noise-power", "--teacher", tmp_path / "t", "--data", tmp_path / "pictures", "--num", 8)
    assert run(capsys, *power)[0] == 0
    assert run(capsys, *sample, "analytic-ddpm")[0] == 0


def small_classifier(noisy=True, size=8, names=("cat", "dog")):
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig("animals", size, 1, len(names), (8,) * (size.bit_length() - 3), 8, noisy=noisy))
    model.training_record = {"config": {}, "classes": list(names), "images": 2, "accuracy": {}}
    return model.eval()


def test_a_classifier_names_the_classes_of_an_unconditional_teacher(teacher_folder, capsys, tmp_path):
    guide = small_classifier()
    guide.save_pretrained(tmp_path / "guide")
    command = (
        "sample",
        "--teacher",
        teacher_folder,
        "--solver",
        "ddim",
        "--steps",
        2,
        "-n",
        2,
        "--classifier",
        tmp_path / "guide",
    )
    assert run(capsys, *command, "--classes", "dog,cat", "--guidance", 2, "--out", tmp_path / "t")[0] == 0
    wanted = Teacher.from_pretrained(teacher_folder).sample(2, 0, "ddim", 2, labels=[1, 0], guidance=2.0, classifier=guide)
    assert max(differences(tmp_path / "t", wanted)) <= 1
    picture = ("--out", tmp_path / "x.png")
    assert "--guidance above 0" in refused(capsys, *command, "--classes", "dog", *picture)
    assert "guidance needs --classes" in refused(capsys, *command, *picture)
    assert "'1' is not one of cat, dog" in refused(capsys, *command, "--classes", "1", "--guidance", 2, *picture)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (small_classifier(noisy=False), "clean images only"),
        (small_classifier(size=16), r"takes \(1, 16, 16\) images, teacher tiny draws \(1, 8, 8\)"),
        (small_classifier().double(), "computes in torch.float64, states are torch.float32"),
    ],
)
def test_classifiers_that_do_not_fit_are_refused_before_drawing(classifier, message):
    with pytest.raises(InputError, match=message):
        tiny_teacher().check_run(2, labels=[0, 1], guidance=1.0, classifier=classifier)
