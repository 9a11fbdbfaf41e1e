"""The main job at a size large enough to test: does the student learn to draw the teacher's images?"""

import pytest
import torch

from advkd.cli.demo import run_demo
from advkd.diffusion.teacher import Teacher
from advkd.evaluation.report import FRESH_SEED
from advkd.models.student import Student


def correlation(a, b):
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (a, b))
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


@pytest.mark.slow
def test_a_short_demo_learns_the_teachers_images(tmp_path):
    run_demo(tmp_path, num=512, updates=120, progress=False)
    teacher, student = Teacher.from_pretrained("digits"), Student.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        for seed, least in ((0, 0.75), (FRESH_SEED, 0.6)):
            x_T = teacher.noise(32, seed)
            *_, (_, images) = teacher.path(x_T)
            drawn = student(student.project(x_T))
            assert correlation(drawn, images) > least
            # The same images in another order do not match: the student follows the noise.
            assert correlation(drawn.roll(1, dims=0), images) < correlation(drawn, images) - 0.1


def test_the_shipped_student_follows_the_shipped_teacher():
    teacher, student = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    x_T = teacher.noise(16, FRESH_SEED)
    *_, (_, images) = teacher.path(x_T)
    with torch.no_grad():
        drawn = student(student.project(x_T))
    assert correlation(drawn, images) > 0.88
    assert correlation(drawn.roll(1, dims=0), images) < 0.7
