"""Sampling into pictures and folders: names, links, and memory that does not grow with the number of images."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.cli import output
from advkd.cli import sample as sampling
from advkd.cli.sample import sample
from advkd.data.pictures import save_grid
from advkd.errors import InputError
from advkd.models.shape import batches


@pytest.mark.parametrize("name", ["run-0.5/", "run-0.5", "v1.2", "2026.11.28", "plain", "a.png/", "model.final/", ".hidden"])
def test_names_of_folders(name, tmp_path):
    sample("digits", 2, 0, f"{tmp_path}/{name}", progress=False)
    assert sorted(os.listdir(tmp_path / name)) == ["000000.png", "000001.png", "samples.json"]


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "b.v1.2.webp", "c.bmp", "d.jpeg"])
def test_names_of_pictures(name, tmp_path):
    sample("digits", 2, 0, tmp_path / name, progress=False)
    with Image.open(tmp_path / name) as picture:
        assert picture.width > 2 * 96


@pytest.mark.parametrize("name", ["a.pgn", "a.tif", "a.gif", "a.final", "a.model"])
def test_names_that_could_be_either(name, tmp_path):
    with pytest.raises(
        InputError, match=rf"{name}: unknown picture suffix .* use one of .png, .* end a folder's name with a slash"
    ):
        sample("digits", 2, 0, tmp_path / name, progress=False)
    (tmp_path / name).mkdir()
    sample("digits", 2, 0, tmp_path / name, progress=False)
    assert (tmp_path / name / "000001.png").exists()


def test_links_of_the_user_stay(tmp_path):
    """A picture, a folder and a picture in a folder that are symbolic links are written to their targets."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.png").symlink_to("disk/target.png")
    (tmp_path / "folder").symlink_to("disk")
    sample("digits", 2, 0, tmp_path / "link.png", progress=False)
    sample("digits", 1, 0, tmp_path / "folder", progress=False)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "folder").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["000000.png", "samples.json", "target.png"]


def test_a_picture_of_nothing_or_of_no_known_kind(tmp_path):
    with pytest.raises(InputError, match="there is no image to save"):
        save_grid(torch.zeros(0, 1, 8, 8), tmp_path / "a.png")
    with pytest.raises(InputError, match="a.txt: unknown picture suffix '.txt'; use .png"):
        save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_would_be_too_large(tmp_path):
    with pytest.raises(InputError, match="100000 images of 32x32 are too many for one picture; name a folder"):
        sample("digits", 100_000, 0, tmp_path / "a.png", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_memory_does_not_grow_with_the_number_of_images(rank, world, tmp_path, monkeypatch):
    """The first pictures of 10^12 take no more memory than those of 10^3."""

    class Enough(Exception):
        pass

    def first_batches(n):
        saved = []

        def save(picture, path):
            saved.append(path.name)
            if len(saved) > 8:
                raise Enough

        monkeypatch.setattr(output, "save_image", save)
        tracemalloc.start()
        with pytest.raises(Enough):
            sample("digits", n, 0, tmp_path / str(n), batch_size=4, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, sorted(saved)[:8]

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    first_batches(100)  # imports happen in the first call
    few, many = first_batches(1000), first_batches(10**12)
    numbers = itertools.chain(range(4 * rank, 4 * rank + 4), range(4 * (rank + world), 4 * (rank + world) + 4))
    assert many[1] == few[1] == [f"{i:06d}.png" for i in numbers]
    assert many[0] < few[0] + 2**20


def test_a_walk_of_very_many_pictures_begins_at_once(tmp_path):
    from advkd import Student

    fused = Student.from_pretrained("digits").fuse(tune=False)
    a, b = ends = fused.latents(2, 3)
    images = next(sampling._walk(lambda z, first: fused(z), ends, 10**12, batches(10**12, 2)))
    assert torch.equal(images, fused(torch.stack([sampling.slerp(a, b, i / (10**12 - 1)) for i in range(2)])))


@pytest.mark.parametrize("n", [0, 2**62 + 1, 10**24])
def test_numbers_of_images_that_cannot_be(n, tmp_path):
    with pytest.raises(InputError, match="-n must be in"):
        sample("digits", n, 0, tmp_path / "a", progress=False)


def test_pictures_that_are_there_are_passed_over(tmp_path, monkeypatch):
    drawn = []

    def save(picture, path):
        drawn.append(path.name)
        picture.save(path)

    monkeypatch.setattr(output, "save_image", save)
    sample("digits", 10, 0, tmp_path, batch_size=3, progress=False)
    before = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    assert sorted(drawn) == sorted(before) == [f"{i:06d}.png" for i in range(10)]
    for missing in ("000004.png", "000009.png"):
        (tmp_path / missing).unlink()
    drawn.clear()
    sample("digits", 10, 0, tmp_path, batch_size=3, progress=False)
    assert sorted(drawn) == ["000003.png", "000004.png", "000005.png", "000009.png"]
    assert all(np.array_equal(np.asarray(Image.open(tmp_path / name)), pixels) for name, pixels in before.items())
