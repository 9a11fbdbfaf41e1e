"""Image data sets: the digits and folders."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.data.images import SYSTEM_NAMES, load_images, load_labelled, normalize, read_pictures
from advkd.errors import InputError
from advkd.methods.classification import ClassifierTrainingConfig
from advkd.models.classifier import Classifier
from advkd.training import classifier as classifier_training
from advkd.training.classifier import train_classifier

from ..conftest import other_default


def save(path, size=(20, 12), mode="RGB", color=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_digits():
    images = load_images("digits")
    assert images.shape == (1797, 1, 32, 32) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert load_images("digits", 8, 3).shape == (1797, 3, 8, 8)


def test_folder_of_any_size_and_channels(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "deep" / "b.jpg", (40, 33))
    images = load_images(tmp_path)
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert torch.equal(normalize(images)[0, :, 4, 4], torch.tensor([1.0, -1.0, -1.0]))
    assert load_images(tmp_path, size=16, channels=1).shape == (2, 1, 16, 16)
    save(tmp_path / "gray" / "c.png", (64, 64), "L", 128)
    assert load_images(tmp_path / "gray").shape == (1, 1, 64, 64)


def test_sixteen_bit_gray_is_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    images = load_images(tmp_path)
    assert images.shape == (1, 1, 8, 8) and (images == 100).all()


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="neither 'digits' nor 'glyphs' nor a folder"):
        load_images(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no image"):
        load_images(tmp_path)
    save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    with pytest.raises(InputError, match="torn.png cannot be read"):
        load_images(tmp_path)
    with pytest.raises(InputError, match="channels"):
        load_images("digits", channels=2)
    for size in (0, -4):
        with pytest.raises(InputError, match=f"size must be at least 1, got {size}"):
            load_images("digits", size=size)


def values(images):
    """The values of pictures of one value each."""
    return images[:, 0, 0, 0].tolist()


def save_values(folder, *numbers):
    for number in numbers:
        save(folder / f"{number:03}.png", (8, 8), "L", number)


READERS = (load_images, lambda folder: read_pictures(folder, "--images"))


@pytest.mark.parametrize("mode", ("L", "RGB"))
@pytest.mark.parametrize("size", ((20, 12), (33, 40), (16, 16), (57, 131)))
def test_ordinary_pictures_are_cropped_and_resized_by_pillow(mode, size, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, size[1], size[0]) + (3,) * (mode == "RGB"), dtype=np.uint8)
    for i, suffix in enumerate(("bmp", "png", "tif")):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.{suffix}")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    for channels in (None, 1, 3):
        images = load_images(tmp_path, None, channels)
        wanted = channels or (1 if mode == "L" else 3)
        small = 1 << (side.bit_length() - 1)
        for found, image in zip(images, pixels, strict=True):
            square = Image.fromarray(image).convert("L" if wanted == 1 else "RGB").crop((left, top, left + side, top + side))
            expected = np.asarray(square.resize((small, small), Image.Resampling.BICUBIC)).reshape(small, small, -1)
            assert (found.permute(1, 2, 0).numpy() == expected).all()
    assert (read_pictures(tmp_path, "--images").permute(0, 2, 3, 1).squeeze(3).numpy() == pixels).all()


def test_links_to_folders_and_files_are_followed_and_cycles_end(tmp_path):
    save_values(tmp_path / "elsewhere" / "deep", 1, 2)
    save_values(tmp_path / "single", 3)
    data = tmp_path / "data"
    save_values(data / "own", 4)
    os.symlink(tmp_path / "elsewhere", data / "linked")
    os.symlink(tmp_path / "elsewhere", data / "linked-again")
    os.symlink(tmp_path / "single" / "003.png", data / "single.png")
    os.symlink(data, data / "own" / "cycle")
    os.symlink(data, tmp_path / "elsewhere" / "deep" / "back")
    os.symlink("itself", data / "itself")
    os.symlink("own", data / "first")  # sorts before its target, which keeps its name
    for reader in READERS:
        assert values(reader(data)) == [1, 2, 4, 3]
    os.symlink(data, tmp_path / "entry")
    assert values(load_images(tmp_path / "entry")) == [1, 2, 4, 3]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    save_values(tmp_path / "data", 1)
    os.symlink(tmp_path / "not mounted", tmp_path / "data" / "more")
    for reader in READERS:
        with pytest.raises(InputError, match="data/more leads nowhere"):
            reader(tmp_path / "data")
    os.rename(tmp_path / "data" / "more", tmp_path / "data" / ".more")
    assert len(load_images(tmp_path / "data")) == 1
    os.symlink(tmp_path / "gone.png", tmp_path / "data" / "itself.png")
    with pytest.raises(InputError, match="data/itself.png leads nowhere"):
        load_images(tmp_path / "data")


def test_hidden_and_systems_entries_are_left_out(tmp_path):
    data = tmp_path / ".hidden" / "data"
    save_values(data / "a" / "b", 1)
    save_values(data, 2)
    for name in (".ipynb_checkpoints", ".git", *SYSTEM_NAMES):
        save_values(data / name, 9)
        save_values(data / "a" / name, 9)
    save(data / "._002.png", (8, 8), "L", 9)
    for reader in READERS:
        assert values(reader(data)) == [2, 1]
    assert values(load_images(tmp_path / ".hidden")) == [2, 1]


def test_folders_with_a_pictures_suffix_are_folders(tmp_path):
    save_values(tmp_path / "set.png" / "deep.JPG", 5)
    for reader in READERS:
        assert values(reader(tmp_path)) == [5]


@pytest.mark.parametrize("blocked", ("data", "a"))
def test_a_folder_that_cannot_be_read_is_named(blocked, tmp_path, monkeypatch):
    """Root may read everything, so the system's answer is simulated."""
    save_values(tmp_path / "data" / "a", 1)
    save_values(tmp_path / "data" / "b", 2)
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == blocked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for reader in (*READERS, load_labelled):
        with pytest.raises(InputError, match=f"the folder .*{blocked} cannot be read .Permission denied"):
            reader(tmp_path / "data")


def test_classes_are_the_folders_that_are_seen(tmp_path):
    save_values(tmp_path / "elsewhere", 3, 4)
    data = tmp_path / "data"
    save_values(data / "a", 1)
    save_values(data / "c" / "deep", 5)
    save_values(data / ".ipynb_checkpoints", 9)
    (data / "__MACOSX").mkdir()
    (data / "lost+found").mkdir()
    os.symlink(tmp_path / "elsewhere", data / "b")
    os.symlink(data, data / "a" / "up")
    os.symlink(data / "c", data / "a" / "other")
    images, labels, names = load_labelled(data)
    assert names == ["a", "b", "c"] and values(images) == [1, 3, 4, 5]
    assert labels.tolist() == [0, 1, 1, 2] and labels.dtype == torch.int64 and images.dtype == torch.uint8
    (data / "d").mkdir()
    with pytest.raises(InputError, match="data/d holds no image"):
        load_labelled(data)


def test_a_picture_that_shows_only_grays_by_a_palette_is_what_its_neighbours_are(tmp_path):
    gray, colour = Image.new("L", (8, 8), 7).convert("P"), Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4)
    for name, pictures in {"grays": (gray, gray), "mixed": (gray, gray, colour, gray)}.items():
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / name / f"{i}.png")
    for reader in READERS:
        assert reader(tmp_path / "grays").shape == (2, 1, 8, 8)
        images = reader(tmp_path / "mixed")
        assert images.shape == (4, 3, 8, 8)
        assert images[:, :, 0, 0].tolist() == [[7, 7, 7], [7, 7, 7], [1, 2, 3], [7, 7, 7]]
    save(tmp_path / "mixed" / "4.png", (8, 8), "L", 7)
    assert load_images(tmp_path / "mixed").shape == (5, 3, 8, 8)
    with pytest.raises(InputError, match="mixes images: 0.png is colour 8x8, 4.png is gray 8x8"):
        read_pictures(tmp_path / "mixed", "--images")


def test_pictures_of_other_sizes_are_named(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", (12, 20))
    with pytest.raises(InputError, match="mixes images: a.png is colour 20x12, b.png is colour 12x20"):
        read_pictures(tmp_path, "--images")


def test_images_beyond_memory_are_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    save(tmp_path / "a.png")
    monkeypatch.setattr(np, "empty", full)
    for reader in READERS:
        with pytest.raises(InputError, match="1 colour .* images need 0.0 GiB of memory"):
            reader(tmp_path)


PEAK = """
import re, sys
from pathlib import Path
from advkd.data.images import load_images, load_labelled, read_pictures
from PIL import Image

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

kind, folder = sys.argv[1:]
read = {"load_images": load_images, "load_labelled": load_labelled, "read_pictures": lambda place: read_pictures(place, "-x")}
load_images(folder + "/few")
before = peak()
images = read[kind](folder + "/many")
images = images[0] if kind == "load_labelled" else images
print((peak() - before) / images.numel())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("kind", ("load_images", "load_labelled", "read_pictures"))
def test_reading_takes_the_memory_of_the_result(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    (tmp_path / "few").mkdir()
    Image.fromarray(pixels).save(tmp_path / "few" / "a.bmp")
    for name in "ab":
        (tmp_path / "many" / name).mkdir(parents=True)
        for i in range(250):
            os.link(tmp_path / "few" / "a.bmp", tmp_path / "many" / name / f"{i}.bmp")
    command = [sys.executable, "-c", PEAK, kind, str(tmp_path)]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < ratio < 1.4


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir()
        for i in range(20):
            image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def trained(classes, out):
    train_classifier(ClassifierTrainingConfig(data=str(classes), steps=10), out, progress=False)
    return Classifier.from_pretrained(out).state_dict(), json.loads((out / "training.json").read_text())


def test_a_classifier_of_bytes_is_that_of_floats(classes, tmp_path, monkeypatch):
    found, record = trained(classes, tmp_path / "bytes")
    whole = load_labelled(classes)
    monkeypatch.setattr(classifier_training, "load_labelled", lambda *_: (normalize(whole[0]), *whole[1:]))
    expected, other = trained(classes, tmp_path / "floats")
    assert all(torch.equal(found[name], expected[name]) for name in expected) and record == other


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_data_and_classifiers_under_other_defaults(dtype, classes, tmp_path):
    expected, record = trained(classes, tmp_path / "plain")
    before = load_images("digits", 8), load_labelled(classes), read_pictures(classes, "--images")
    with other_default(dtype), torch.device("meta"):
        found, other = trained(classes, tmp_path / "other")
        after = load_images("digits", 8), load_labelled(classes), read_pictures(classes, "--images")
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)
    assert record == other
    pairs = zip((before[0], *before[1][:2], before[2]), (after[0], *after[1][:2], after[2]), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
