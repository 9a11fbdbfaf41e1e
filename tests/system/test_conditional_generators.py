"""Generator students with classes from the command line: training, images, evaluation, comparison, report."""

import json
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.data.pictures import to_uint8
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import evaluate as evaluation
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_student
from advkd.evaluation.report import write_report
from advkd.evaluation.taught import Lesson, learned_image, taught
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.models.student import Student
from advkd.runtime import timing

from ..conftest import TINY_STUDENT, fork_cli, tiny_recording, tiny_student
from .test_cli import refused, run

SMALL = ("--updates", 2, "--batch-sizes", 8, "--critic-channels", 4, "--critic-max-channels", 8)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The tiny student's shape as a preset's file, without classes."""
    path = tmp_path_factory.mktemp("shape") / "tiny.json"
    values = {name: value for name, value in asdict(TINY_STUDENT).items() if name not in ("classes", "class_channels")}
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def distilled(shape, labelled_paths, tmp_path_factory):
    """A student of the classes c and a, made by the command line: it learned the image."""
    out = tmp_path_factory.mktemp("distilled") / "student"
    command = ["distill", "--trajectories", labelled_paths, "--preset", shape, *SMALL, "--targets", "image", "--out", out]
    done = fork_cli(*command)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """A classifier of 4 features of 8x8 images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("extractor")
    Classifier(ClassifierConfig("tiny", 8, 1, 3, (8,), 4)).save_pretrained(folder)
    return folder


def pixels(folder, n):
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i:06d}.png"))) for i in range(n)])


def test_a_fresh_student_has_the_classes_of_its_trajectories(distilled, shape, labelled_paths, trajectories, capsys, tmp_path):
    assert Student.from_pretrained(distilled).class_names == ("c", "a")
    pairs = ["distill", "pairs", "--updates", 1, "--batch-size", 8]
    for data, classes in ((labelled_paths, ("c", "a")), (trajectories, ())):
        out = tmp_path / str(len(classes))
        assert run(capsys, *pairs, "--trajectories", data, "--preset", shape, "--out", out)[0] == 0
        assert Student.from_pretrained(out).class_names == classes
    # A preset's file that names classes has those, in its order.
    (tmp_path / "own.json").write_text(json.dumps({**json.loads(shape.read_text()), "classes": ["a", "c"]}))
    own = ["--trajectories", labelled_paths, "--preset", tmp_path / "own.json", "--out", tmp_path / "own"]
    assert run(capsys, *pairs, *own)[0] == 0
    assert Student.from_pretrained(tmp_path / "own").class_names == ("a", "c")


def test_a_conditional_student_goes_on(distilled, labelled_paths, trajectories, capsys, tmp_path):
    more = ["distill", *SMALL, "--learning-rate", 1e-12, "--ema", 0, "--init", distilled]
    assert run(capsys, *more, "--trajectories", labelled_paths, "--out", tmp_path / "more")[0] == 0
    before, after = Student.from_pretrained(distilled), Student.from_pretrained(tmp_path / "more")
    assert torch.allclose(before.embedding.weight, after.embedding.weight, atol=1e-6)
    assert after.class_names == ("c", "a") and len(after.training_record["runs"]) == 2
    said = refused(capsys, *more, "--trajectories", trajectories, "--out", tmp_path / "no")
    assert "the student has classes and the trajectories have none: record them with --classes all" in said
    tiny_student().save_pretrained(tmp_path / "plain")
    plain = ["distill", *SMALL, "--init", tmp_path / "plain", "--trajectories", labelled_paths, "--out", tmp_path / "no"]
    assert "have classes and the student knows none: begin with a fresh one by --preset" in refused(capsys, *plain)
    assert not (tmp_path / "no").exists()


def test_images_take_the_named_classes_in_turn(distilled, capsys, tmp_path):
    """By their index, whatever the batch; without a name every class."""
    fused = Student.from_pretrained(distilled).fuse(tune=False)
    command = ["sample", "--student", distilled, "-n", 7, "--seed", 3]
    for name, options, labels, names in (
        ("all", [], [0, 1], ["c", "a"]),
        ("named", ["--classes", "all"], [0, 1], ["c", "a"]),
        ("a", ["--classes", "a"], [1], ["a"]),
        ("aac", ["--classes", "a, a,c", "--batch-size", 2], [1, 1, 0], ["a", "a", "c"]),
    ):
        assert run(capsys, *command, *options, "--out", tmp_path / name)[0] == 0
        told = torch.tensor([labels[i % len(labels)] for i in range(7)])
        expected = to_uint8(fused(fused.latents(7, 3), told))[..., 0]
        assert (pixels(tmp_path / name, 7).int() - expected.int()).abs().max() <= 1
        assert json.loads((tmp_path / name / "samples.json").read_text())["classes"] == names
    assert not torch.equal(pixels(tmp_path / "all", 7), pixels(tmp_path / "a", 7))
    said = refused(capsys, *command, "--classes", "c", "--out", tmp_path / "a")
    assert "pictures of another classes: name another folder" in said
    assert run(capsys, *command, "--classes", "a", "--out", tmp_path / "grid.png")[0] == 0


def test_a_folder_of_an_unconditional_student_is_recorded_as_before(capsys, tmp_path):
    assert run(capsys, "sample", "-n", 1, "--out", tmp_path / "a")[0] == 0
    assert set(json.loads((tmp_path / "a" / "samples.json").read_text())) == {"student", "seed", "walk"}


def test_a_walk_stays_within_a_class(distilled, capsys, tmp_path):
    command = ["sample", "--student", distilled, "-n", 5, "--seed", 2, "--interpolate"]
    assert run(capsys, *command, "--classes", "a", "--batch-size", 2, "--out", tmp_path / "walk")[0] == 0
    fused = Student.from_pretrained(distilled).fuse(tune=False)
    ends = to_uint8(fused(fused.latents(2, 2), torch.tensor([1, 1])))[..., 0]
    assert (pixels(tmp_path / "walk", 5)[[0, 4]].int() - ends.int()).abs().max() <= 1
    for classes in ([], ["--classes", "a,c"]):
        said = refused(capsys, *command, *classes, "--out", tmp_path / "no")
        assert "--interpolate: a walk is within one class: name it by --classes" in said


def test_classes_that_cannot_be(distilled, capsys, tmp_path):
    sample = ["sample", "--out", tmp_path / "no", "--student"]
    said = refused(capsys, *sample, distilled, "--classes", "a,b")
    assert said == "advkd: --classes: 'b' is not one of c, a"
    assert "--classes must name a class" in refused(capsys, *sample, distilled, "--classes", ",")
    assert "--classes 7: student digits is unconditional; leave it out" in refused(capsys, *sample, "digits", "--classes", "7")
    said = refused(capsys, *sample, distilled, "--guidance", 1)
    assert "--guidance is an option of a teacher or a denoiser student: leave it out" in said
    assert not os.listdir(tmp_path / "no")


@pytest.fixture
def quickly(monkeypatch):
    """Models are timed once in an evaluation."""
    monkeypatch.setattr(evaluation, "measure", lambda calls, repeats, device: timing.measure(calls, 1, 0, device))


@pytest.fixture(scope="module")
def evaluated(distilled, conditional, extractor, tmp_path_factory):
    """An evaluation by the command line, and its folder."""
    out = tmp_path_factory.mktemp("evaluated")
    options = ["--num", 12, "--resamples", 20, "--real", "none", "--extractor", extractor]
    done = fork_cli("evaluate", "--student", distilled, "--teacher", conditional, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "evaluation.json").read_text()), out


def test_an_evaluation_takes_all_classes_in_turn(evaluated, distilled, conditional):
    """The teacher's images of the same classes and noise, guided: two evaluations a step."""
    result, _ = evaluated
    assert result["classes"] == {"student": ["c", "a"], "teacher": ["c", "a"]}
    student, teacher = Student.from_pretrained(distilled), Teacher.from_pretrained(conditional)
    seed = result["config"]["seed"]
    assert result["config"]["guidance"] == 1.5
    expected = teacher.sample(24, seed, labels=[2, 0] * 12, guidance=1.5)
    drawn = student(student.project(teacher.noise(24, seed)), labels=torch.tensor([0, 1] * 12))
    assert result["pairs"]["mse"] == pytest.approx((drawn - expected).square().mean().item(), rel=1e-2)
    assert result["models"]["teacher"]["evaluations"] == 2 * len(teacher.timesteps("ddim"))


@pytest.mark.parametrize(("classes", "labels"), [("", [0, 1]), ("a", [1]), ("a,a,c", [1, 1, 0])])
def test_an_evaluation_of_some_classes(classes, labels, distilled, conditional, extractor, tmp_path, monkeypatch, quickly):
    seen, extract = [], evaluation.extract
    monkeypatch.setattr(evaluation, "extract", lambda net, images, **rest: seen.append(images) or extract(net, images, **rest))
    config = EvaluationConfig(num=12, resamples=20, real="none", extractor=str(extractor), classes=classes)
    arguments = (distilled, conditional, config, tmp_path / "out")
    evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    fused, seed = Student.from_pretrained(distilled).fuse(tune=False), config.seed
    assert torch.equal(seen[0], to_uint8(fused.sample(12, seed, labels=labels)).permute(0, 3, 1, 2))
    (folder,) = (tmp_path / "cache").glob("teacher-*")
    data = Trajectories(folder)
    assert data.labels(range(6), ("c", "a")).tolist() == (labels * 6)[:6] and data.info.guidance == 1.5
    evaluate_student(*arguments, cache=tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache").glob("teacher-*"))) == 1
    unguided = (distilled, conditional, replace(config, guidance=0.0), tmp_path / "out")
    result = evaluate_student(*unguided, cache=tmp_path / "cache", progress=False)
    assert result["config"]["guidance"] == 0 and len(list((tmp_path / "cache").glob("teacher-*"))) == 2


def test_an_evaluation_against_labelled_samples(distilled, conditional, teacher_folder, extractor, tmp_path, quickly):
    """Classes are told by name and must be the student's; of an unconditional teacher there are no pairs."""
    config = EvaluationConfig(num=12, resamples=20, real="none", extractor=str(extractor))
    teacher = Teacher.from_pretrained(conditional)
    options = {"cache": tmp_path / "cache", "progress": False}
    for name, classes in (("two", "a,c"), ("more", "all"), ("none", "")):
        record_trajectories(teacher, tiny_recording(seed=9, classes=classes), tmp_path / name, progress=False)
        arguments = (distilled, conditional, config, tmp_path / "out", tmp_path / name)
        if name == "two":
            assert evaluate_student(*arguments, **options)["pairs"] is not None
            continue
        with pytest.raises(InputError, match=f"{name} are of the classes a, b, c, the student's images of c, a: name the same"):
            evaluate_student(*arguments, **options)
    plain = evaluate_student(distilled, teacher_folder, config, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    assert plain["pairs"] is None and plain["classes"] == {"student": ["c", "a"], "teacher": []}


def test_evaluations_that_cannot_be(distilled, conditional, teacher_folder, labelled_paths, extractor, tmp_path):
    tiny_student().save_pretrained(tmp_path / "plain")
    config = {"num": 12, "resamples": 20, "real": "none", "extractor": str(extractor)}
    for student, teacher, samples, changes, message in (
        (distilled, conditional, None, {"classes": "b"}, "--classes: 'b' is not one of c, a"),
        (
            tmp_path / "plain",
            conditional,
            None,
            {"classes": "a"},
            "--classes a: student .*plain is unconditional; leave it out",
        ),
        (distilled, conditional, None, {"guidance": -1.0}, "guidance must be at least 0"),
        (distilled, teacher_folder, None, {"guidance": 1.0}, "--guidance is towards classes, which student and teacher"),
        (tmp_path / "plain", conditional, None, {"guidance": 1.0}, "--guidance is towards classes, which student and teacher"),
        (distilled, conditional, labelled_paths, {"guidance": 1.0}, "--guidance is of samples that are drawn: leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_student(
                student, teacher, EvaluationConfig(**config, **changes), tmp_path / "out", samples, cache=tmp_path / "cache"
            )
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_report_of_a_conditional_student(evaluated, distilled, conditional, tmp_path, monkeypatch):
    """The teacher is told the classes and the guidance that the student was taught; levels stand beneath its image."""
    student, teacher = Student.from_pretrained(distilled), Teacher.from_pretrained(conditional)
    told, run = taught(student, teacher), student.training_record["runs"][-1]
    assert (told.condition.classes, told.condition.guidance) == ((2, 0), 1.5) and learned_image(student)
    assert (told.solver, told.steps) == (run["sampler"], run["steps"])
    shown = {}
    for name in ("save_pairs", "save_levels"):
        monkeypatch.setattr(f"advkd.evaluation.report.{name}", lambda *arguments, name=name: shown.setdefault(name, arguments))
    monkeypatch.setattr("advkd.evaluation.report.figure", lambda path, caption: caption)
    page = write_report(student, teacher, evaluated[1] / "evaluation.json", tmp_path / "out").read_text()
    x_0, drawn, _ = shown["save_pairs"]
    z, seed = student.project(teacher.noise(12, 12345)), 12345
    assert torch.equal(x_0, teacher.sample(12, seed, told.solver, told.steps, labels=[2, 0] * 6, guidance=1.5))
    assert torch.equal(drawn, student(z, labels=torch.tensor([0, 1] * 6)))
    states, levels, timesteps, _ = shown["save_levels"]
    assert timesteps == [None] * 4 and [tuple(state.shape) for state in states] == [(1, side, side) for side in (4, 8, 8, 8)]
    assert torch.equal(states[1], states[3]) and torch.allclose(states[0].mean(), states[3].mean(), atol=1e-6)
    assert torch.allclose(levels[3], drawn[0], atol=1e-5)
    assert "Area averages of the teacher's image that supervise the submodules" in page
    assert "64 images of the student, not chosen, its classes in turn." in page
    assert f"the teacher after {2 * told.steps} evaluations" in page
    assert (tmp_path / "out" / "student_samples.png").exists() and not os.path.exists(tmp_path / "out" / "loss_curves.png")


@pytest.mark.parametrize("damage", [["unipc"], {"a": 1}, -1, "4", math.nan, True, 10**400])
def test_a_damaged_record_counts_as_none(damage, distilled, conditional):
    student, teacher = Student.from_pretrained(distilled), Teacher.from_pretrained(conditional)
    run = student.training_record["runs"][-1]
    run |= {"sampler": damage, "steps": damage, "guidance": damage}
    told = taught(student, teacher)
    assert told.solver == "ddim" and told.steps is None and told.condition.guidance in (0, 1)
    run |= {"sampler": "unipc", "guidance": 2}
    assert taught(student, teacher).steps in (None, 10**400) and taught(student, teacher).condition.guidance == 2
    student.training_record["runs"] = damage
    assert taught(student, teacher).solver == "ddim" and not learned_image(student)


def test_a_teacher_of_other_classes_is_told_none(teacher, conditional):
    student = tiny_student(classes=("a", "z"))
    known = Teacher.from_pretrained(conditional)
    assert taught(student, known) == taught(student, teacher) == taught(tiny_student(), known) == Lesson("ddim", None)
    assert taught(tiny_student(classes=("b",)), known).condition.classes == (1,)
    assert not learned_image(student)


def test_the_command_that_warms_up(distilled, capsys):
    assert run(capsys, "warmup", "--student", distilled, "--batch-sizes", "2", "--no-tune")[0] == 0
