"""Denoising: the trainer on any tensors and any network, and the loss by its formula."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from advkd.data.draws import HostDraws
from advkd.data.sources import Tensors
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.denoising import Denoising, TeacherTrainingConfig
from advkd.training.teacher import train_teacher
from advkd.training.trainer import Trainer


class Affine(torch.nn.Module):
    """eps = scale_t * x + shift_t on two-dimensional data, one pair per timestep."""

    def __init__(self, timesteps):
        super().__init__()
        self.scale, self.shift = (torch.nn.Parameter(torch.zeros(timesteps, 2)) for _ in range(2))

    def forward(self, x, t):
        return self.scale[t] * x + self.shift[t]


def points(count=16, seed=0):
    """Points of N((1, -1), diag(0.25, 4))."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.tensor([0.5, 2.0]) + torch.tensor([1.0, -1.0])


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of an affine network on points of a plane."""
    config = TeacherTrainingConfig(steps=6, batch_size=8, checkpoint_every=2, warmup=2, seed=seed)
    scheduler, network = DDPMScheduler(num_train_timesteps=10), Affine(10)
    network.scale.data += weights
    return Trainer(Denoising(config, network, scheduler), Tensors(images=points()), None, out, **options)


def test_an_affine_network_becomes_the_best_denoiser(tmp_path):
    """E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) mu) / (a v + 1 - a) on Gaussian data (methods: exact denoisers)."""
    config = TeacherTrainingConfig(steps=3000, batch_size=1024, learning_rate=0.05, warmup=0, ema=0.99)
    scheduler = DDPMScheduler(num_train_timesteps=2, beta_start=0.2, beta_end=0.6)
    data = points(200_000)
    network = Affine(2)
    run = Trainer(
        Denoising(config, network, scheduler), Tensors(images=data), None, tmp_path, dtype=torch.float64, progress=False
    )
    found = run.run()
    mu, v = data.mean(dim=0), data.var(dim=0, unbiased=False)
    for t, a in enumerate(scheduler.alphas_cumprod.tolist()):
        scale = math.sqrt(1 - a) / (a * v + 1 - a)
        assert torch.allclose(found.scale[t], scale, atol=0.01), t
        assert torch.allclose(found.shift[t], -scale * math.sqrt(a) * mu, atol=0.01), t


class Labelled(Affine):
    """An affine network that keeps the labels that it was given."""

    def __init__(self, timesteps):
        super().__init__(timesteps)
        self.given = []

    def forward(self, x, t, labels):
        self.given.append(labels)
        return super().forward(x, t)


def test_labels_are_dropped_at_the_rate_that_is_asked_for(tmp_path):
    """Within 5 standard deviations of a binomial count; the others stay with their images, and no other draw moves."""
    count, drop = 20_000, 0.3
    data = points(count)
    labels = (data[:, 0] > 1).long()
    given, losses = {}, {}
    for null in (None, 2):
        told = {"drop": drop, "conditional": True} if null else {}
        config = TeacherTrainingConfig(steps=1, batch_size=count, **told)
        network, scheduler = (Affine if null is None else Labelled)(10), DDPMScheduler(num_train_timesteps=10)
        data_and_labels = Tensors(images=data, labels=labels)
        run = Trainer(Denoising(config, network, scheduler, null), data_and_labels, None, tmp_path / str(null), progress=False)
        rows = run.method.generator(0)
        losses[null] = run.step()["loss"]
        given[null] = getattr(network, "given", [])
    (found,) = given[2]
    expected = labels[torch.randint(count, (count,), generator=rows)]
    dropped = found == 2
    assert abs(dropped.sum().item() - drop * count) <= 5 * math.sqrt(count * drop * (1 - drop))
    assert torch.equal(found[~dropped], expected[~dropped]) and set(found.tolist()) == {0, 1, 2}
    assert losses[None] == losses[2] and given[None] == []


def test_processes_drop_the_labels_that_one_drops():
    def drawn(first, count):
        return HostDraws(torch.Generator().manual_seed(1), 8, first, count).uniform()

    assert torch.equal(torch.cat([drawn(0, 3), drawn(3, 5)]), drawn(0, 8)) and drawn(0, 8).unique().numel() == 8


def test_a_teacher_whose_labels_are_never_dropped_has_no_null_class(tmp_path):
    """Its network is told the classes alone, so that nothing is guided by a class that was never trained."""
    config = TeacherTrainingConfig(size=8, channels=(8, 8), steps=1, batch_size=4, conditional=True, drop=0.0)
    teacher = Teacher.from_pretrained(train_teacher(config, tmp_path / "t", progress=False))
    assert (teacher.num_classes, teacher.null_class, teacher.unet.config.num_class_embeds) == (10, None, 10)
    assert teacher.sample(2, steps=2, labels=3).isfinite().all()
    with pytest.raises(InputError, match="no null class"):
        teacher.sample(2, steps=2, labels=3, guidance=1.0)


@pytest.mark.parametrize(("values", "message"), [({"drop": 0.3}, "drop is the share.*--conditional")])
def test_options_without_their_switch_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TeacherTrainingConfig(**values).validate()
