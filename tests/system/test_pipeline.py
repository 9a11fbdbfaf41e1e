"""The diffusers pipeline around the student."""

import numpy as np
import pytest
import torch

from advkd import AdvKDPipeline, Student
from advkd.errors import InputError

from ..conftest import tiny_student


@pytest.fixture(scope="module")
def pipe():
    return AdvKDPipeline(tiny_student().eval())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_output_types(pipe):
    pictures = pipe(batch_size=4, generator=seeded(0), output_type="pil").images
    arrays = pipe(batch_size=4, generator=seeded(0), output_type="np").images
    tensors = pipe(batch_size=4, generator=seeded(0), output_type="pt", return_dict=False)[0]
    assert len(pictures) == 4 and pictures[0].size == (8, 8) and pictures[0].mode == "L"
    assert arrays.shape == (4, 8, 8, 1) and tensors.shape == (4, 1, 8, 8)
    assert arrays.min() >= 0 and arrays.max() <= 1
    assert np.array_equal(arrays[..., 0], tensors[:, 0].numpy())
    assert np.abs(np.asarray(pictures[2]) - arrays[2, ..., 0] * 255).max() <= 0.51


def test_generators(pipe):
    a = pipe(batch_size=3, generator=seeded(1), output_type="pt").images
    assert torch.equal(a, pipe(batch_size=3, generator=seeded(1), output_type="pt").images)
    assert not torch.equal(a, pipe(batch_size=3, generator=seeded(2), output_type="pt").images)
    # A smaller batch of the same generator has the same first images; a generator per image fixes each image.
    assert torch.allclose(a[:2], pipe(batch_size=2, generator=seeded(1), output_type="pt").images, atol=1e-6)
    b = pipe(batch_size=2, generator=[seeded(7), seeded(8)], output_type="pt").images
    c = pipe(batch_size=1, generator=[seeded(8)], output_type="pt").images
    assert torch.allclose(b[1], c[0], atol=1e-6)
    again = seeded(1)
    first, second = (pipe(generator=again, output_type="pt").images for _ in range(2))
    assert not torch.equal(first, second)


def test_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Intended use" in card and "8x8" in card
    again = AdvKDPipeline.from_pretrained(tmp_path)
    images = [p(batch_size=2, generator=seeded(0), output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*images)
    # The student's folder is a student's folder, and so is the pipeline's.
    assert Student.from_pretrained(tmp_path).config == Student.from_pretrained(tmp_path / "student").config
    student = Student.from_pretrained(tmp_path / "student")
    assert torch.equal(student(student.latents(1)), pipe.student(student.latents(1)))


def test_changed_weights_change_the_images(pipe):
    before = pipe(generator=seeded(0), output_type="pt").images
    with torch.no_grad():
        pipe.student.student.head.bias += 0.5
    assert (pipe(generator=seeded(0), output_type="pt").images - before).min() > 0


def test_bad_calls_are_named(pipe):
    with pytest.raises(InputError, match="batch_size"):
        pipe(batch_size=0)
    with pytest.raises(InputError, match="output_type"):
        pipe(output_type="jpeg")
    with pytest.raises(InputError, match="generator"):
        pipe(batch_size=2, generator=[seeded(0)])
