"""Glyphs to measure against have the classes of what is measured, and are drawn only where all else is in order."""

from dataclasses import replace

import pytest
import torch

from advkd.data import glyph_sets
from advkd.data.glyph_sets import GlyphSet, held_out_glyphs
from advkd.data.glyphs import FONTS, HELD_OUT, draw_glyphs
from advkd.errors import InputError
from advkd.evaluation.compare import CompareConfig, compare_models
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_student
from advkd.evaluation.evaluate_likelihood import LikelihoodConfig, evaluate_likelihood
from advkd.evaluation.image_sets import real_images, reference_images
from advkd.evaluation.solver_quality import SolverEvaluationConfig, evaluate_solvers
from advkd.methods.classification import ClassifierTrainingConfig
from advkd.methods.denoising import TeacherTrainingConfig
from advkd.models.student import Student
from advkd.runtime.files import digest
from advkd.training.classifier import train_classifier
from advkd.training.teacher import train_teacher

from ..conftest import TINY_STUDENT
from .test_cli import refused, run

DIGITS = tuple("0123456789")


def in_turn(names, num):
    """Held-out glyphs of the named classes in turn."""
    every = GlyphSet().class_names
    labels = [every.index(names[i % len(names)]) for i in range(num)]
    return draw_glyphs(range(HELD_OUT, HELD_OUT + num), 8, "all", 0, FONTS, labels)[0]


def in_order(num):
    """Held-out glyphs of random classes."""
    return draw_glyphs(range(HELD_OUT, HELD_OUT + num), 8)[0]


@pytest.fixture(scope="module")
def digit_teacher(tmp_path_factory):
    """A teacher of the digits among the glyphs."""
    out = tmp_path_factory.mktemp("digits") / "teacher"
    config = TeacherTrainingConfig("glyphs-digits", 8, images=8, steps=1, channels=(8, 8), batch_size=4, conditional=True)
    train_teacher(config, out, progress=False)
    return out


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "features"
    train_classifier(ClassifierTrainingConfig("glyphs-digits", 8, images=60, num_features=4, steps=1, batch_size=8), out)
    return str(out)


@pytest.fixture
def undrawn(monkeypatch):
    """No glyph is drawn."""
    monkeypatch.setattr(glyph_sets, "draw_glyphs", lambda *_: pytest.fail("glyphs are drawn"))


def test_a_set_of_some_classes():
    some = held_out_glyphs("glyphs", 7).of(("A", "7", "q"), "--real")
    assert torch.equal(some.images(8), in_turn("A7q", 7))
    assert [some.class_names[label] for label in some.labels()] == list("A7qA7qA")
    assert torch.equal(some.images(8)[:4], replace(some, num=4).images(8))
    assert some.description()["chosen"] == ["A", "7", "q"]
    digits = GlyphSet("digits")
    assert digits.of(DIGITS[::-1], "--real") == digits == digits.of((), "--real") != digits.of(DIGITS[1:], "--real")


def test_sets_of_some_classes_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path))
    monkeypatch.setattr(glyph_sets, "FEW", 4)
    for _ in range(2):
        for names in ((), "A7", "7A"):
            GlyphSet(num=4).of(names, "--real").images(8)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("source", "names", "message"),
    [
        ("glyphs-letters", DIGITS, "--real glyphs-letters has no class '0' as the model has: name glyphs-digits"),
        ("glyphs-digits", ("A", "1"), "--real glyphs-digits has no class 'A' as the model has: name glyphs"),
        ("glyphs", ("cat", "1"), "--real glyphs has no class 'cat' as the model has: glyphs are no measure of it"),
    ],
)
def test_classes_that_a_set_has_not(source, names, message, undrawn):
    with pytest.raises(InputError, match=f"{message}$"):
        real_images(source, (3, 8, 8), classes=names)


def test_a_teacher_is_measured_against_its_classes(digit_teacher, features, tmp_path):
    common = {"solvers": "ddim", "evaluations": (2, 3), "num": 24, "fine_steps": 3, "extractor": features, "resamples": 20}
    common |= {"real": "glyphs", "real_num": 30}
    for measure, kind, names in (
        (evaluate_solvers, SolverEvaluationConfig(**common), DIGITS),
        (compare_models, CompareConfig(**common), DIGITS),
        (compare_models, CompareConfig(**common, classes="3,7"), "37"),
    ):
        result = measure(digit_teacher, kind, tmp_path / "out", cache=tmp_path / "cache", progress=False)
        assert result["real_sha256"] == digest({"images": in_turn(names, 30)})
    found = evaluate_likelihood(digit_teacher, "glyphs", LikelihoodConfig(4, 4), tmp_path / "bound", progress=False)
    assert found["images"]["sha256"] == digest({"images": in_turn(DIGITS, 4)})


def test_a_student_is_measured_against_its_classes(digit_teacher, features, tmp_path):
    Student(replace(TINY_STUDENT, image_channels=3, classes=("7", "3"))).save_pretrained(tmp_path / "student")
    config = EvaluationConfig(num=24, extractor=features, real="glyphs-digits", real_num=48, resamples=20)
    for few in (config, replace(config, real_num=0)):  # by default as many as are used
        result = evaluate_student(tmp_path / "student", digit_teacher, few, tmp_path / "out", progress=False)
        assert result["real_sha256"] == digest({"images": in_turn("73", 48)})


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 12, 12), (1, 8, 8), (3, 4, 4)])
def test_pictures_that_glyphs_cannot_be_compared_with(shape, undrawn):
    with pytest.raises(InputError, match=r"^--images are (colour|gray) .* --reference glyphs can be compared with colour ones"):
        reference_images("glyphs", shape)


def test_a_reference_is_drawn_with_a_bar(capsys):
    assert torch.equal(reference_images("glyphs", (3, 8, 8), 3, progress=True), in_order(3))
    assert "glyphs: 100%" in capsys.readouterr().err


def test_noise_power_is_of_the_teachers_classes(digit_teacher, capsys, undrawn):
    power = ("teacher", "noise-power", "--teacher", digit_teacher, "--data")
    said = refused(capsys, *power, "glyphs-letters", "--num", 2)
    assert "--data glyphs-letters has no class '0' as the model has: name glyphs-digits" in said
    assert "num must be at least 1, got 0" in refused(capsys, *power, "glyphs", "--num", 0)


def test_noise_power_of_some_classes(digit_teacher, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(glyph_sets, "draw_glyphs", lambda *a: seen.append(a) or draw_glyphs(*a))
    assert run(capsys, "teacher", "noise-power", "--teacher", digit_teacher, "--data", "glyphs", "--num", 2)[0] == 0
    assert [[GlyphSet().class_names[label] for label in given[-1]] for given in seen] == [["0", "1"]]


def test_refusals_come_before_glyphs_are_drawn(digit_teacher, features, tmp_path, undrawn):
    common = {"num": 24, "extractor": features, "real": "glyphs", "resamples": 20}
    solvers = {**common, "solvers": "ddim", "evaluations": (2,), "fine_steps": 3}
    Student(replace(TINY_STUDENT, image_channels=3, classes=("7", "3"))).save_pretrained(tmp_path / "student")
    for message, call in (
        ("missing", lambda: compare_models(digit_teacher, CompareConfig(**solvers, students="missing"), tmp_path / "out")),
        ("1000", lambda: evaluate_solvers(digit_teacher, SolverEvaluationConfig(**solvers | {"fine_steps": 1001}), tmp_path)),
        (
            "takes gray",
            lambda: evaluate_solvers(digit_teacher, SolverEvaluationConfig(**solvers | {"extractor": "digits"}), ""),
        ),
        ("'9'", lambda: evaluate_student(tmp_path / "student", digit_teacher, EvaluationConfig(**common, classes="9"), "out")),
    ):
        with pytest.raises(InputError, match=message):
            call()
