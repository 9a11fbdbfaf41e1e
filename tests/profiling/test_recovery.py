"""Noise and one denoising: what the recovery table measures."""

import torch

from advkd.data.images import load_images, normalize
from profiling.cases import recovery
from profiling.evidence import NOTHING


class Known:
    """A model that finds the images it was made of, or their mean."""

    def __init__(self, images, mean):
        self.images = images.mean(dim=0, keepdim=True).expand_as(images) if mean else images
        self.seen, self.done = [], 0

    def predict(self, x, sigma):
        self.seen.append((x, sigma))
        start = self.done
        self.done = (start + len(x)) % len(self.images)
        return 2 * self.images[start : start + len(x)], x

    def identity(self):
        return {"name": "known"}


def test_the_distance_is_to_the_images_themselves():
    """0 for a model that loses nothing, a clamp of images to [-1, 1] included; the mean of all images is far from them."""
    images = normalize(load_images("digits", 32, 1))[:320].clamp(-0.5, 0.5)
    whole, mean = Known(images.sign(), False), Known(images, True)
    rows = recovery.measure({"whole": whole, "mean": mean}, images.sign(), (0.1, 2.0), "digits")
    assert [row["model"] for row in rows] == ["whole", "mean"]
    assert all(abs(value) < 1e-6 for value in rows[0]["frechet"]) and min(rows[1]["frechet"]) > 1
    # All models see the same states, of the level in variance-preserving coordinates.
    assert all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(whole.seen, mean.seen, strict=True))
    state = torch.cat([x for x, sigma in whole.seen if sigma == 2.0])
    noise = (state * 5**0.5 - images.sign()) / 2
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_the_table_has_a_column_for_every_level(monkeypatch):
    place = {"commit": "0123456789", "device": "a processor", "versions": {"torch": "2"}, "threads": 2, "dirty": False}
    rows = [{"model": "v", "frechet": [0.25, 1.5]}, {"model": "dpdm", "frechet": [0.125, 0.75]}]
    result = {"rows": rows, "config": {"num": 1797, "sigmas": [0.1, 2.0]}, "provenance": place}
    result |= {"path": "profiling/results/a/recovery.json", "changed": []}
    monkeypatch.setattr(recovery, "stored", lambda name: [result])
    above, _, titles, _, teacher, student = recovery.lines()
    assert "1,797 images" in above and titles == "| model | sigma 0.1 | sigma 2 |"
    assert teacher == "| `v` | 0.250 | 1.500 |" and student == "| `dpdm` | 0.125 | 0.750 |"
    monkeypatch.setattr(recovery, "stored", lambda name: [])
    assert recovery.lines() == NOTHING
