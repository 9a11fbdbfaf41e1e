"""Regression on pairs: an affine student of Gaussian data becomes the sampler's map; the pyramid student learns pictures."""

import math

import pytest
import torch
from PIL import Image

from advkd import Student, Trajectories
from advkd.data.sources import Tensors
from advkd.diffusion.schedule import Schedule
from advkd.errors import InputError
from advkd.methods.pairs import Pairs, PairsConfig
from advkd.training.distillation import Distiller, distill
from advkd.training.trainer import Trainer

from ..conftest import tiny_student

MEAN, VARIANCE = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.25, 4.0], dtype=torch.float64)
LEVELS = torch.cos(torch.linspace(1.4, 0.1, 11, dtype=torch.float64)).square().tolist()
"""alpha_bar of ten steps of DDIM, and of their end."""


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of the tiny student."""
    config, data = PairsConfig(updates=6, batch_size=8, checkpoint_every=2, seed=seed), Trajectories(data)
    student = tiny_student(seed + weights, classes=data.info.student_classes)
    return Distiller(data, student, config, out, method="pairs", **options)


def sampled(x):
    """DDIM with the exact noise prediction of N(mean, diag(variance)), step by step."""
    for a, b in zip(LEVELS, LEVELS[1:]):
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * VARIANCE + 1 - a)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(b) * x0 + math.sqrt(1 - b) * eps
    return x


def ddim_map():
    """Gain and shift: each step multiplies x - sqrt(a) mean by (sqrt(a b) v + sqrt((1 - a)(1 - b))) / (a v + 1 - a)."""
    gain = torch.ones(2, dtype=torch.float64)
    for a, b in zip(LEVELS, LEVELS[1:]):
        gain *= (math.sqrt(a * b) * VARIANCE + math.sqrt((1 - a) * (1 - b))) / (a * VARIANCE + 1 - a)
    return gain, math.sqrt(LEVELS[-1]) * MEAN - gain * math.sqrt(LEVELS[0]) * MEAN


def test_an_affine_student_becomes_the_samplers_map(tmp_path):
    gain, shift = ddim_map()
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = sampled(z)
    assert torch.allclose(images, gain * z + shift, atol=1e-12)
    config = PairsConfig(updates=3000, batch_size=64, learning_rate=0.03, final_learning_rate=0.0, ema=0.0)
    student = torch.nn.Linear(2, 2, dtype=torch.float64)
    run = Trainer(Pairs(config, student), Tensors(z=z, images=images), None, tmp_path, dtype=torch.float64, progress=False)
    found = run.run()
    assert torch.allclose(found.weight, torch.diag(gain), atol=1e-9), (found.weight, gain)
    assert torch.allclose(found.bias, shift, atol=1e-9)


class Entered(torch.nn.Module):
    """An affine v network that notes its timesteps."""

    def __init__(self):
        super().__init__()
        self.affine, self.timesteps = torch.nn.Linear(2, 2, dtype=torch.float64), set()

    def forward(self, x, t, condition=None):
        self.timesteps |= set(t.tolist())
        return self.affine(x)


def test_a_network_that_is_entered_once_becomes_the_samplers_map(tmp_path):
    """At sigma = 1 its image is (z - v) / sqrt(2): v = z - sqrt(2) (gain z + shift)."""
    gain, shift = ddim_map()
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = PairsConfig(updates=3000, batch_size=64, learning_rate=0.03, final_learning_rate=0.0, ema=0.0, level=1.0)
    schedule = Schedule.linear()
    method = Pairs(config, Entered(), schedule)
    source = Tensors(z=z, images=sampled(z))
    found = Trainer(method, source, None, tmp_path, dtype=torch.float64, progress=False).run()
    assert torch.allclose(found.affine.weight, torch.diag(1 - math.sqrt(2) * gain), atol=1e-9)
    assert torch.allclose(found.affine.bias, -math.sqrt(2) * shift, atol=1e-9)
    (t,) = found.timesteps
    assert abs(schedule.level(t).sigma - 1) < 1e-4  # float32 timesteps
    # The saved sampler enters the network there, too, once.
    (evaluation,) = method.sampler(method.stages()[0]).solver.program(schedule, 1, "v_prediction")
    assert evaluation.level.alpha_bar == pytest.approx(0.5, abs=1e-12) and float(torch.tensor(evaluation.level.t).float()) == t


def test_the_pyramid_student_learns_the_recorded_images(trajectories, tmp_path):
    config = PairsConfig(updates=60, batch_size=8, learning_rate=5e-3)
    student = tiny_student()
    data = Trajectories(trajectories)
    z, levels = data.batch(list(range(24)), [4])
    before = (student.eval()(z) - levels[4]).square().mean()
    trained = distill(trajectories, student, config, tmp_path, progress=False, method="pairs")
    after = (trained(z) - levels[4]).square().mean()
    assert after < 0.7 * before
    loaded = Student.from_pretrained(tmp_path)
    assert torch.equal(loaded(z), trained(z))
    assert loaded.training_record["runs"][0]["method"] == "pairs"
    assert (tmp_path / "samples-stage-01.png").exists() and (tmp_path / "metrics.csv").read_text().count("\n") == 61


def test_a_student_learns_its_classes(tmp_path):
    """Images are of one grey each, that of their class: from any noise, every number ends nearer to it than to another."""
    greys = torch.tensor([-0.6, 0.0, 0.6], dtype=torch.float64)
    labels = torch.arange(60) % 3
    student = tiny_student(classes=("dark", "grey", "light"))
    z = student.latents(60).double()
    images = greys[labels].reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    config = PairsConfig(updates=120, batch_size=30, learning_rate=0.02, ema=0.0)
    assert Pairs(config, student).needs().labels and not Pairs(config, tiny_student()).needs().labels
    run = Trainer(Pairs(config, student), Tensors(z, images, labels), None, tmp_path, dtype=torch.float64, progress=False)
    found = run.run()
    fresh = found.latents(30, seed=1).double()
    for label, grey in enumerate(greys):
        drawn = found(fresh, labels=torch.full((30,), label))
        assert (drawn - grey).abs().max() < 0.3, label
    with Image.open(tmp_path / "samples-stage-01.png") as grid:
        middles = [(2 + 98 * i + 48, 50) for i in range(6)]  # tiles of 96 pixels and gaps of 2
        shown = torch.tensor([grid.convert("L").getpixel(middle) for middle in middles], dtype=torch.float64)
    assert torch.allclose(shown / 127.5 - 1, greys.repeat(2), atol=0.3)


def test_unpaired_data_and_bad_numbers_are_refused(trajectories, unpaired, tmp_path):
    with pytest.raises(InputError, match="unpaired"):
        distill(unpaired, tiny_student(), PairsConfig(batch_size=8), tmp_path / "out", method="pairs")
    bad = {"updates": 0, "batch_size": 25, "pairs": 25, "grow": -1, "mixed_precision": "fp16", "seed": -1}
    for name, value in {**bad, "learning_rate": 0.0, "final_learning_rate": 1.5, "ema": 1.0}.items():
        config = PairsConfig(**{"batch_size": 8, name: value})
        with pytest.raises(InputError, match=name):
            distill(trajectories, tiny_student(), config, tmp_path / "out", method="pairs")
    with pytest.raises(InputError, match="must be a PairsConfig"):
        distill(trajectories, tiny_student(), object(), tmp_path / "out", method="pairs")
    assert not (tmp_path / "out").exists()
