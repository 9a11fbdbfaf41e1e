"""Numbers in the README agree with the code; its Python examples run."""

import re

import pytest

from advkd import Student, Teacher

from ..conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("preset", ["paper-256", "pyramid-256", "digits"])
def test_sizes_of_the_students(preset):
    student = Student.from_preset(preset)
    row = next(line for line in README.splitlines() if line.startswith(f"| `{preset}`"))
    small, full = (student.num_parameters(terminals) for terminals in (False, True))
    expected = [f"{small:,}", f"{full:,}", f"{4 * small / 1e6:.1f} MB", f"{4 * full / 1e6:.1f} MB", "1"]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == expected


def test_size_of_the_embedded_teacher():
    assert f"| {Teacher.from_pretrained('digits').num_parameters():,} |" in README


def test_python_examples_run():
    example, steps, critic = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example.replace("fused.sample(1000", "fused.sample(3"), names)
    assert names["images"].shape == (3, 1, 32, 32) and names["image"].shape == (1, 1, 32, 32)
    assert len(names["pictures"]) == 4 and names["pairs"][0].shape == names["pairs"][1].shape == (4, 1, 32, 32)
    exec(steps, names)
    assert names["x"].shape == (4, 1, 32, 32) and names["level"].shape == (4, 1, 8, 8) and len(names["pictures"]) == 4
    names = {}
    exec(critic, names)
    assert names["y"].shape == (8, 64, 32, 32) and all(p.grad is not None for p in names["critic"].parameters())
    assert len(names["update"].gradients) == len(list(names["critic"].parameters()))


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / path).stat().st_size > 1000 for path in pictures)


def test_it_speaks_of_itself_alone():
    assert not re.search(r"(?i)pypi\.org|debian\.org|session|issue #?\d", README)
