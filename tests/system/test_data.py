"""Image data sets: the digits and folders."""

import pytest
import torch

from advkd.data import load_images, normalize
from advkd.errors import InputError


def save(path, size=(20, 12), mode="RGB", color=(255, 0, 0)):
    from PIL import Image

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
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    images = load_images(tmp_path)
    assert images.shape == (1, 1, 8, 8) and (images == 100).all()


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="neither 'digits' nor a folder"):
        load_images(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no image"):
        load_images(tmp_path)
    save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    with pytest.raises(InputError, match="torn.png cannot be read"):
        load_images(tmp_path)
    with pytest.raises(InputError, match="channels"):
        load_images("digits", channels=2)
