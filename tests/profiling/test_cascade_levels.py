"""Distances of cascades by level: what the table measures."""

from functools import partial

import torch

from advkd.data.images import load_images, normalize
from advkd.data.levels import downsample
from advkd.diffusion.low_images import LowImages
from advkd.evaluation.features import build_extractor, extract
from profiling.cases import cascade
from profiling.evidence import NOTHING


class Known:
    """A stage that gives the images it was made of, spoilt by the level's share of noise."""

    evaluations, solver = 3, None

    def __init__(self, images, most):
        self.images, self.low, self.model, self.asked = images, LowImages(16, most), self, set()

    def sample(self, low, level, seed, start):
        assert torch.equal(low, downsample(self.images, 16)[start : start + len(low)])
        self.asked.add((level, seed))
        noise = torch.randn(len(low), 1, 32, 32, generator=torch.Generator().manual_seed(start))
        return self.images[start : start + len(low)] + level / 1000 * noise

    def identity(self, solver):
        return {"name": "known", "weights_sha256": "0"}


def test_distances_are_to_the_wanted_images_at_the_levels_that_a_stage_takes():
    real, features = normalize(load_images("digits", 32, 1))[:320], build_extractor("digits")
    most, truncated = Known(real, 1000), Known(real, 0)
    stages = {"most": most, "truncated": truncated}
    distance_of = partial(cascade.distance, features, extract(features, real), resamples=20)
    rows = cascade.measure(stages, {"low": downsample(real, 16)}, distance_of)  # type: ignore[arg-type]
    assert [(row["stage"], row["evaluations"], row["low"]) for row in rows] == [("most", 3, "low"), ("truncated", 3, "low")]
    assert {level for level, _ in most.asked} == set(cascade.LEVELS) and truncated.asked == {(0, cascade.SEED)}
    found = [rows[0]["frechet"][str(level)] for level in cascade.LEVELS]
    assert abs(found[0]["value"]) < 1e-6 and list(rows[1]["frechet"]) == ["0"] and rows[0]["identity"]["name"] is None
    assert all(a["value"] < b["value"] for a, b in zip(found, found[1:]))
    assert all(one["interval"][0] < one["value"] < one["interval"][1] for one in found[1:])


def test_halves_have_no_image_in_common():
    real = torch.arange(7.0)[:, None]
    first, second = cascade.halves(real)
    assert len(first) == len(second) == 3 and len({*first.flatten().tolist(), *second.flatten().tolist()}) == 6


def test_the_table_has_a_column_for_every_level_and_leaves_out_what_no_stage_takes(monkeypatch):
    place = {"commit": "0123456789", "device": "a processor", "versions": {"torch": "2"}, "threads": 2, "dirty": False}
    one = {"value": 0.5, "interval": [0.25, 0.75]}
    rows = [
        {"stage": "sr", "evaluations": 10, "low": "the base's", "frechet": {"0": one, "100": {**one, "value": 0.375}}},
        {"stage": "plain", "evaluations": 1, "low": "the base's", "frechet": {"0": one}},
    ]
    config = {"num": 1000, "levels": [0, 100], "solver": "unipc-2", "evaluations": 10, "base": "base", "single": "v"}
    result = {"rows": rows, "single": one, "floor": {**one, "value": 0.375}, "config": config, "provenance": place}
    result |= {"path": "profiling/results/a/cascade.json", "changed": []}
    monkeypatch.setattr(cascade, "stored", lambda name: [result] if name == "cascade" else [])
    above, _, titles, _, first, second, _, single = cascade.lines()
    assert "1,000 images, 95 % intervals" in above
    assert titles == "| stage | evaluations of it | low images | level 0 | level 100 |"
    assert first == "| `sr` | 10 | the base's | 0.500 (0.250 to 0.750) | 0.375 (0.250 to 0.750) |"
    assert second == "| `plain` | 1 | the base's | 0.500 (0.250 to 0.750) |  |"
    assert single == (
        "The base `base` takes 10 evaluations of unipc-2. `v` alone, which draws the large images at once by as many: "
        "0.500 (0.250 to 0.750). Real images against real ones: 0.375 (0.250 to 0.750)."
    )
    monkeypatch.setattr(cascade, "stored", lambda name: [])
    assert cascade.lines() == NOTHING
