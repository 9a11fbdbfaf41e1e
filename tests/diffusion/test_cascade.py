"""Cascades of exact models: told the noise's level, they keep the joint distribution exactly; without it they cannot."""

import pytest
import torch

from advkd.diffusion.cascade import LEVEL, Cascade, SuperResolution, stage_key
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.exact_cascade import GaussianSuperResolution
from advkd.diffusion.low_images import LowImages
from advkd.diffusion.schedule import Schedule
from advkd.errors import InputError
from advkd.models.denoiser import LowImage
from advkd.ops import philox_normal

SOLVER, STEPS = "unipc-2", 100
BIAS = 1e-3
"""Bound of the solver's error in moments of order 1: UniPC-2 in 100 steps is up to 3e-4 from the exact flow here."""


def gaussian(d, seed=0):
    """Mean and covariance of d pixels whose variances are between 0.1 and about 1."""
    mean, a = torch.randn(d + 1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).split((1, d))
    return mean[0], 0.5 * a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


MEAN, COVARIANCE = gaussian(16)
SCHEDULE = Schedule.cosine()  # its last level keeps 5e-5 of the mean, the linear one 6e-3
MODEL = GaussianSuperResolution(MEAN.reshape(1, 4, 4), COVARIANCE, 2, SCHEDULE)


class Untold(GaussianSuperResolution):
    """The model of clean low images, whatever the level is."""

    def x0(self, x, alpha, noise, labels=None):
        told = labels and LowImage(labels.image, torch.zeros_like(labels.level))
        return super().x0(x, alpha, noise, told)


def moments(model, level):
    """Mean and covariance of the large images that a stage draws for low images of the data.

    The run of a deterministic solver is affine in start noise, low image and its noise: 64 samples give the map, and the map
    gives the moments without an error of sampling.
    """
    low, seed = 2 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 5
    drawn = SuperResolution(model, SOLVER, STEPS).sample(low, level, seed).flatten(1)
    key = stage_key(seed, 4)
    noise = philox_normal(key, range(64), (1, 2, 2), stream="z").double()
    inputs = [model.noise(64, key), noise, low, torch.ones(64, 1)]
    inputs = torch.cat([part.flatten(1).double() for part in inputs], dim=1)
    by_input = torch.linalg.lstsq(inputs, drawn).solution
    assert torch.allclose(inputs @ by_input, drawn, atol=1e-9)
    start, added, given, constant = by_input.T.split((16, 4, 4, 1), dim=1)
    mean = given @ (model.average @ model.mean) + constant[:, 0]
    low_covariance = model.average @ model.covariance @ model.average.T
    return mean, start @ start.T + added @ added.T + given @ low_covariance @ given.T


@pytest.mark.parametrize("level", [0, 1, 100, 600, 1000])
def test_told_the_level_the_joint_is_kept(level):
    """hi | noisy low, with the low's own noise, has the data's mean and covariance at every level."""
    mean, covariance = moments(MODEL, level)
    assert torch.allclose(mean, MODEL.mean, atol=BIAS) and torch.allclose(covariance, COVARIANCE, atol=BIAS)


def test_without_the_level_the_joint_is_another():
    """K (a PCP' + (1 - a) I) K' + S of the clean model's K and S is what comes out, 100 tolerances from the data's."""
    untold, level = Untold(MEAN.reshape(1, 4, 4), COVARIANCE, 2, SCHEDULE), 300
    average, kept = MODEL.average, MODEL.schedule.alpha_bars[level - 1]
    low = average @ COVARIANCE @ average.T
    gain = COVARIANCE @ average.T @ torch.linalg.inv(low)
    wanted = gain @ (kept * low + (1 - kept) * torch.eye(4)) @ gain.T + COVARIANCE - gain @ average @ COVARIANCE
    mean, covariance = moments(untold, level)
    assert torch.allclose(covariance, wanted, atol=BIAS)
    assert torch.allclose(mean, MODEL.mean + gain @ average @ MODEL.mean * (kept.sqrt() - 1), atol=BIAS)
    assert (covariance - COVARIANCE).abs().max() > 100 * BIAS and (mean - MODEL.mean).abs().max() > 100 * BIAS


def test_the_posterior_mean_is_that_of_the_joint_gaussian():
    """By the conditional mean of a Gaussian vector (x, x_t, low), at levels of noise that differ from sample to sample."""
    x, low = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    level, sigma = torch.tensor([0, 400, 1000]), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    found, _ = MODEL.predict(x, sigma, LowImage(low, level))
    for i in range(3):
        alpha = (1 + sigma[i] ** 2) ** -0.5
        kept = 1.0 if not level[i] else MODEL.schedule.alpha_bars[level[i] - 1]
        seen = torch.cat((alpha * torch.eye(16), kept**0.5 * MODEL.average)).double()
        spread = torch.cat(((1 - alpha**2).expand(16), torch.full((4,), 1 - kept, dtype=torch.float64)))
        joint = seen @ COVARIANCE @ seen.T + spread.diag()
        apart = torch.cat((x[i].flatten(), low[i].flatten())) - seen @ MEAN
        wanted = MEAN + COVARIANCE @ seen.T @ torch.linalg.inv(joint) @ apart
        assert torch.allclose(found[i].flatten(), wanted, atol=1e-9), i


def test_a_cascade_of_three_models_draws_the_data():
    """Base, noises and stages are independent of each other: five standard deviations of 20,000 samples' moments."""
    to_two = MODEL.average
    small_mean, small = to_two @ MEAN, to_two @ COVARIANCE @ to_two.T
    middle = GaussianSuperResolution(small_mean.reshape(1, 2, 2), small, 1, SCHEDULE)
    tiny = middle.average
    base = GaussianTeacher((tiny @ small_mean).reshape(1, 1, 1), tiny @ small @ tiny.T, SCHEDULE)
    cascade = Cascade(base, SuperResolution(middle, SOLVER, 50), SuperResolution(MODEL, SOLVER, 50))
    assert (cascade.image_size, cascade.image_channels) == (4, 1)
    drawn = cascade.sample(20_000, seed=3, solver=SOLVER, steps=50).flatten(1)
    variances = COVARIANCE.diag()
    deviation = ((variances[:, None] * variances + COVARIANCE**2) / len(drawn)).sqrt()
    assert ((torch.cov(drawn.T) - COVARIANCE).abs() <= 5 * deviation + BIAS).all()
    assert ((drawn.mean(dim=0) - MEAN).abs() <= 5 * (variances / len(drawn)).sqrt() + BIAS).all()


def test_images_depend_on_their_index_alone():
    stage, low = SuperResolution(MODEL, "ddpm", 20), torch.randn(5, 1, 2, 2)
    whole = stage.sample(low, 50, seed=9)
    parts = [stage.sample(low[:2], 50, 9), stage.sample(low[2:], 50, 9, start=2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-9)
    assert not torch.allclose(whole, stage.sample(low, 50, seed=10), atol=1e-2)
    base = GaussianTeacher(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
    steps = Cascade(base, stage).sample(5, 9, level=50)
    assert torch.allclose(steps, stage.sample(base.sample(5, 9), 50, 9), atol=1e-12)


def test_the_level_is_that_of_the_schedule_and_by_default_a_hundred_or_the_largest():
    low = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    level = torch.tensor([0, 7])
    told = MODEL.low.noised(low, level, 2 * low, MODEL.schedule)
    kept = MODEL.schedule.alpha_bars[6]
    assert torch.equal(told.image[0], low[0]) and torch.equal(told.level, level)
    assert torch.allclose(told.image[1], kept.sqrt() * low[1] + 2 * (1 - kept).sqrt() * low[1])
    assert SuperResolution(MODEL).level() == LEVEL == 100
    short = GaussianSuperResolution(MEAN.reshape(1, 4, 4), COVARIANCE, 2, Schedule.linear(50))
    assert SuperResolution(short).level() == 50
    assert short.low == LowImages(2, 50)


def stage(size, low, **options):
    mean, covariance = gaussian(size * size)
    return SuperResolution(GaussianSuperResolution(mean.reshape(1, size, size), covariance, low, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage(4, 3), "low_size: a low image's side must divide the large one's and be less, got 3 and 4"),
        (lambda: stage(4, 4), "must divide the large one's and be less, got 4 and 4"),
        (lambda: SuperResolution(GaussianTeacher(torch.zeros(2), torch.ones(2))), "model takes no low image: train one"),
        (lambda: Cascade(GaussianTeacher(torch.zeros(2), torch.ones(2))), "needs a super-resolution model"),
        (lambda: Cascade(stage(2, 1).model, stage(8, 4)), "enlarges images of 1 x 4 x 4, the model before it draws 1 x 2 x 2"),
        (lambda: stage(4, 2).sample(torch.zeros(3, 1, 4, 4)), r"low must be \(N, 1, 2, 2\)"),
        (lambda: stage(4, 2).sample(torch.zeros(3, 1, 2, 2), 1001), "level must be at most 1000, the largest that"),
        (lambda: stage(4, 2).sample(torch.zeros(3, 1, 2, 2), -1), "level must be at least 0"),
        (lambda: MODEL.sample(2), "enlarges low images: name it by 'advkd sample --cascade'"),
        (lambda: MODEL.predict(torch.zeros(1, 1, 4, 4), 1.0), "takes low images with the level of their noise"),
        (
            lambda: GaussianTeacher(torch.zeros(2), torch.ones(2)).predict(
                torch.zeros(1, 2), 1.0, LowImage(torch.zeros(1), torch.zeros(1))
            ),
            "takes no low images",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("side", "level", "count", "message"),
    [
        (2, 2000, 3, "level must be at most .*, the largest that .* was trained with, got 2000"),
        (3, 1, 3, r"takes low images \(3, 1, 2, 2\) with a level each, got \(3, 1, 3, 3\)"),
        (2, 1, 1, r"takes low images \(3, 1, 2, 2\) with a level each, got \(1, 1, 2, 2\)"),
    ],
)
def test_states_with_low_images_that_the_model_does_not_take_are_refused(side, level, count, message):
    told = LowImage(torch.zeros(count, 1, side, side), torch.full((count,), level))
    with pytest.raises(InputError, match=message):
        MODEL.predict(torch.zeros(3, 1, 4, 4), 1.0, told)


def test_what_is_no_stage_is_refused():
    with pytest.raises(InputError, match="Linear takes no low image"):
        SuperResolution(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="solver analytic-ddim: a stage's noise power is not known: take another solver"):
        SuperResolution(MODEL, "analytic-ddim")
