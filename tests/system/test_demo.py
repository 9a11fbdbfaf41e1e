"""The main job at a size large enough to test: does the student learn to draw the teacher's images?"""

import re

import pytest
import torch

from advkd.cli.demo import TEACHER, run_demo
from advkd.diffusion.teacher import Teacher
from advkd.evaluation.recognition import recognised
from advkd.evaluation.report import FRESH_SEED
from advkd.evaluation.taught import all_in_turn, taught
from advkd.models.classifier import Classifier
from advkd.models.student import Student


def correlation(a, b):
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (a, b))
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


@pytest.mark.slow
def test_a_short_demo_learns_the_teachers_images(tmp_path):
    said = run_demo(tmp_path, num=640, updates=150, progress=False)
    teacher, student = Teacher.from_pretrained(TEACHER), Student.from_pretrained(tmp_path / "student")
    lesson = taught(student, teacher)
    assert (lesson.solver, lesson.steps, lesson.condition.guidance) == ("unipc-2", 10, 1.0)
    labels = all_in_turn(student, 40)
    with torch.no_grad():
        for seed, least in ((0, 0.75), (FRESH_SEED, 0.7)):
            images = teacher.sample(40, seed, **lesson.arguments(40))
            drawn = student(student.project(teacher.noise(40, seed)), labels=labels)
            assert correlation(drawn, images) > least
            # The same images of another class do not match; those of other noise and the same class match less.
            assert correlation(drawn.roll(1, dims=0), images) < 0.5
            assert correlation(drawn.roll(10, dims=0), images) < correlation(drawn, images) - 0.02
    sure = int(re.match(r"100 images .* A classifier of real digits is sure of (\d+) of them", said)[1])
    assert sure >= 80 and f"is sure of {sure} of them" in (tmp_path / "demo.html").read_text()


def test_the_shipped_student_follows_the_shipped_teacher():
    teacher, student = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    x_T = teacher.noise(16, FRESH_SEED)
    *_, (_, images) = teacher.path(x_T)
    with torch.no_grad():
        drawn = student(student.project(x_T))
    assert correlation(drawn, images) > 0.88
    assert correlation(drawn.roll(1, dims=0), images) < 0.7


def test_a_classifier_is_sure_of_images_and_of_classes():
    """By hand: probabilities of 1/2, of 0.9 and a little more; 8 bits are what is judged."""

    class Fixed(torch.nn.Module):
        scale = torch.ones(())

        def forward(self, x):
            # The logit of class 1 is the first pixel's value in steps of 8 bits.
            first = (x[:, 0, 0, 0] + 1) * 127.5
            assert torch.allclose(first, first.round(), atol=1e-4)
            return torch.stack((torch.zeros_like(first), first), dim=1)

    values = torch.tensor([0.0, 2.0, 3.0, 2.4, 255.0, 300.0])
    images = (values / 127.5 - 1)[:, None, None, None].expand(-1, 1, 4, 4)
    # exp(2) / (1 + exp(2)) = 0.88, exp(3) / (1 + exp(3)) = 0.95
    assert recognised(Fixed(), images).tolist() == [False, False, True, False, True, True]
    labels = torch.tensor([0, 1, 1, 1, 0, 1])
    assert recognised(Fixed(), images, labels).tolist() == [False, False, True, False, False, True]
    assert recognised(Fixed(), values[:3, None, None, None].to(torch.uint8)).tolist() == [False, False, True]


def test_the_shipped_classifier_is_sure_of_real_digits():
    from advkd.data.images import load_labelled

    images, labels, _ = load_labelled("digits")
    sure = recognised(Classifier.from_pretrained("digits"), images, labels)
    assert sure.double().mean() > 0.97
    assert recognised(Classifier.from_pretrained("digits"), images, (labels + 1) % 10).sum() < 20
