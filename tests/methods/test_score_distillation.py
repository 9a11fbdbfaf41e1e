"""Score distillation: gradients and ends in closed form, the contrast to Diff-Instruct, generators, guidance, refusals."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from advkd.cli.main import main
from advkd.data.draws import Draw
from advkd.data.pictures import to_uint8
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import noised, vp_weights
from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.loading import Classes
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError, TrainingError
from advkd.methods.diff_instruct import DiffInstructConfig
from advkd.methods.score_distillation import (
    WEIGHTS,
    ScoreDistillation,
    ScoreDistillationConfig,
    score_distillation_gradient,
)
from advkd.models.optimised_images import GENERATORS, optimised_images
from advkd.runtime.files import read_tensors
from advkd.training.optimised_images import ImageOptimiser, drawn, optimise_images
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher, tiny_unet
from . import test_diff_instruct as broad

FLOAT64 = {"dtype": torch.float64, "progress": False}
MEAN, VARIANCE = torch.tensor([0.3, -0.6], dtype=torch.float64), torch.tensor([0.01, 0.04], dtype=torch.float64)
TEACHER = GaussianTeacher(MEAN, VARIANCE)
SIGMAS = TEACHER.schedule.sigma(torch.arange(20, 980))
"""Levels of timesteps 2 % to 98 % of the schedule."""


def conditional_teacher():
    """Classes a, b, c and none of them."""
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet(num_class_embeds=4)
    return Teacher(unet, diffusers.DDPMScheduler(), "tiny", Classes(("a", "b", "c"), 3))


def tiny_data(n=12):
    """Images of three classes in turn."""
    return 2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1, torch.arange(n) % 3


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six guided updates of four images; their start is of the seed, so that no process has weights of its own."""
    config = ScoreDistillationConfig(num=4, updates=6, checkpoint_every=2, seed=seed, classes="all", guidance=1.0)
    teacher = conditional_teacher()
    teacher.unet.double()  # what it finds must not depend on the size of a process's batch
    return ImageOptimiser(config, teacher, out, **options)


class Affine(torch.nn.Module):
    """x = mean + scale z with z of mean 0 and variance 1 over the images, exactly."""

    def __init__(self, num, mean, scale):
        super().__init__()
        self.mean, self.scale = (torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in (mean, scale))
        z = torch.randn(num, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("z", (z - z.mean(dim=0)) / z.std(dim=0, correction=0))

    def forward(self, numbers):
        return self.mean + self.scale * self.z[numbers]


def rates(weight, variance, sigmas=SIGMAS):
    """Mean slope and root mean square noise of the gradient at the mode, over the levels.

    x - D(x_t) is sigma^2 / (v + sigma^2) (x - mean) - sigma v / (v + sigma^2) eps.
    """
    sigma = sigmas.reshape(-1, *[1] * variance.ndim)
    factor = WEIGHTS[weight](*vp_weights(sigma))
    slope = factor * sigma**2 / (variance + sigma**2)
    noise = factor * sigma * variance / (variance + sigma**2)
    return slope.mean(dim=0), noise.square().mean(dim=0).sqrt()


def spread_of_adam(rate, slope, noise):
    """Standard deviation at which steps of size rate by gradients slope x + noise settle: sqrt(rate noise / (2 slope)).

    Adam divides by the gradients' size, which is at least that of their noise: x' = x - rate (slope / noise x + xi).
    """
    return (rate * noise / (2 * slope)).sqrt()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_expected_gradient_of_a_gaussian_is_the_closed_form(weight, tmp_path):
    """Of x = m + c z by the mean of w(t) sigma / (v + sigma^2): times m - mean in m, times c in c; within 4 standard errors.

    The parameters are kept where they are, so that 200 updates are 200 independent estimates.
    """
    num, updates = 64, 200
    config = ScoreDistillationConfig(num=num, updates=updates, weight=weight, learning_rate=1.0)
    images = Affine(num, [0.5, 0.1], [0.4, -0.2])
    run = Trainer(ScoreDistillation(config, images, TEACHER.schedule), Tensors(), TEACHER, tmp_path, **FLOAT64)
    found = []
    run.move = lambda name, gradients: found.append(torch.stack(gradients) / num)
    for _ in range(updates):
        run.step()
    found = torch.stack(found)
    slope, _ = rates(weight, VARIANCE)
    wanted = torch.stack((slope * (images.mean.detach() - MEAN), slope * images.scale.detach()))
    error = found.std(dim=0) / math.sqrt(updates)
    assert ((found.mean(dim=0) - wanted).abs() < 4 * error).all(), (found.mean(dim=0), wanted, error)
    # A wrong sign, weight or factor would show: every number is 10 standard errors from 0 or more.
    assert (wanted.abs() > 10 * error).all(), wanted / error


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_gradient_is_the_weighted_difference_of_noises(weight):
    """w(t) (e_p - eps) as the paper writes it, in float64: dividing by the noise of the lowest level costs 100 roundings."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 50, 2, generator=generator, dtype=torch.float64)
    sigma = TEACHER.schedule.sigma(torch.linspace(0, 999, 50))
    x_t = noised(x, eps, sigma).requires_grad_()
    alpha, noise = (part[:, None] for part in vp_weights(sigma))
    w = {"variance": noise**2, "uniform": torch.ones_like(noise), "x0": noise / alpha}[weight]
    found = score_distillation_gradient(TEACHER.predict, x, x_t, sigma, weight=weight)
    assert not found.requires_grad
    assert torch.allclose(found, (w * (TEACHER.predict(x_t, sigma)[1] - eps)).detach(), rtol=1e-10, atol=1e-10)


def collapsed(images, tmp_path, updates=1500, teacher=TEACHER):
    """The optimised module, and the last of its learning rates."""
    config = ScoreDistillationConfig(
        num=64, updates=updates, learning_rate=0.02, final_learning_rate=0.02, checkpoint_every=updates
    )
    Trainer(ScoreDistillation(config, images, teacher.schedule), Tensors(), teacher, tmp_path, **FLOAT64).run()
    return images, config.learning_rate * config.final_learning_rate


@pytest.mark.parametrize("bounded", [True, False])
def test_pixels_collapse_onto_the_mode(bounded, tmp_path):
    """From random starts all 64 images end at the mean; 5 standard deviations of Adam's last rate are far below sqrt(v).

    Latents do so at a mean that no image can have.
    """
    mean = MEAN if bounded else 5 * MEAN
    teacher = GaussianTeacher(mean, VARIANCE)
    images, rate = collapsed(optimised_images("pixels", (2,), 64, seed=3, bounded=bounded), tmp_path, teacher=teacher)
    tolerance = 5 * spread_of_adam(rate, *rates("variance", VARIANCE))
    assert (tolerance < 0.25 * VARIANCE.sqrt()).all(), tolerance
    found = images(torch.arange(64)).detach()
    assert ((found - mean).abs() < tolerance).all(), ((found - mean).abs().amax(dim=0), tolerance)


def test_score_distillation_has_no_spread_where_diff_instruct_keeps_the_datas(tmp_path):
    """x = m + c z on one teacher, by the two methods: c ends at 0, or at sqrt(v) where a network learns the score of x.

    The noise of score distillation is averaged over 64 images, and 5 standard deviations are far below sqrt(v).
    """
    gain, offset = (1.2, 0.7), (-0.5, 0.3)
    images, rate = collapsed(Affine(64, offset, gain), tmp_path / "sds", teacher=broad.TEACHER)
    slope, noise = rates("variance", broad.VARIANCE, broad.SCHEDULE.sigma(torch.arange(1, 39)))
    tolerance, deviation = 5 * spread_of_adam(rate, slope, noise / math.sqrt(64)), broad.VARIANCE.sqrt()
    assert (tolerance < 0.1 * deviation).all(), tolerance
    assert (images.scale.abs() < tolerance).all() and ((images.mean - broad.MEAN).abs() < tolerance).all(), (
        images.scale,
        tolerance,
    )
    config = DiffInstructConfig(
        updates=800, batch_size=256, learning_rate=0.02, score_learning_rate=0.03, final_learning_rate=0.01, clip=0.0
    )
    start, score = broad.AffineGenerator(gain, offset), broad.GaussianScore(broad.SCHEDULE)
    kept = broad.run_of(config, broad.TEACHER, start, score, tmp_path / "di").run()
    assert ((kept.gain.abs() - deviation).abs() < 0.1 * deviation).all(), kept.gain
    assert ((kept.offset - broad.MEAN).abs() < 0.1 * deviation).all(), kept.offset


def mixture(distance=0.5):
    """Two classes of 16 pixels, "low" and "high", 2 sqrt(16) distance apart."""
    means = torch.full((2, 1, 4, 4), distance) * torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    teacher = MixtureTeacher(means, [0.7, 0.3], 0.01)
    teacher.class_names = ("low", "high")
    return teacher


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_images_end_at_the_mean_of_their_class(guidance, tmp_path):
    """Up to sigma = 0.5 the classes, 4 apart, do not meet: near a class's mean guided and conditional x0 agree."""
    teacher = mixture()
    t_max = teacher.schedule.t(0.5).item() / 999
    config = ScoreDistillationConfig(
        num=3, classes="high,low", guidance=guidance, t_max=t_max, updates=800, learning_rate=0.02, checkpoint_every=800
    )
    images = optimised_images("pixels", (1, 4, 4), 3)
    method = ScoreDistillation(config, images, teacher.schedule)
    Trainer(method, Tensors(), teacher, tmp_path, **FLOAT64).run()
    sigmas = teacher.schedule.sigma(torch.arange(method.timesteps[0], method.timesteps[1] + 1))
    tolerance = 5 * spread_of_adam(0.1 * 0.02, *rates("variance", torch.tensor(0.01).double(), sigmas)).item()
    assert tolerance < 0.2
    wanted = teacher.means[[1, 0, 1]].reshape(3, 1, 4, 4)
    found = images(torch.arange(3)).detach()
    assert (found - wanted).abs().max() < tolerance, ((found - wanted).abs().max(), tolerance)
    assert method.evaluations(method.stages()[0]) == ((2, 0) if guidance else (1, 0))


def test_an_update_uses_the_guided_x0(tmp_path):
    """The loss of a first update from its own draws, where the classes overlap: (1 + w) D(x, class) - w D(x)."""
    teacher, w = mixture(0.1), 2.5
    config = ScoreDistillationConfig(num=6, classes="all", guidance=w, updates=1, weight="x0")
    images = optimised_images("pixels", (1, 4, 4), 6)
    run = Trainer(ScoreDistillation(config, images, teacher.schedule), Tensors(), teacher, tmp_path, **FLOAT64)
    draw, x, labels = Draw(0, 0, 6, "cpu", torch.float64), images(torch.arange(6)).detach(), torch.arange(6) % 2
    sigma = teacher.schedule.sigma(20 + draw.integers("t", 960))
    x_t = noised(x, draw.normal("x_t", 1, 4, 4), sigma)
    conditional, plain = teacher.predict(x_t, sigma, labels)[0], teacher.predict(x_t, sigma)[0]
    assert (conditional - plain).abs().max() > 0.01
    wanted = (x - (1 + w) * conditional + w * plain).square().mean().item()
    assert run.step()["loss"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators(generator):
    """Shapes, range, and gradients that reach an image's own parameters alone; a start is of seed and number."""
    prototypes = tiny_data()[0][:5] if generator == "warp" else None
    module = optimised_images(generator, (1, 8, 8), 5, seed=1, grid=4, prototypes=prototypes)
    images = module(torch.tensor([3, 1]))
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32
    assert drawn(module).shape == (5, 1, 8, 8) and torch.equal(drawn(module)[[3, 1]], images)
    images.square().sum().backward()
    reached = module.values.grad.flatten(1).abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, False, True, False]
    fewer = optimised_images(generator, (1, 8, 8), 2, seed=1, grid=4, prototypes=None if prototypes is None else prototypes[:2])
    assert torch.equal(fewer.values, module.values[:2])
    with torch.no_grad():
        module.values.mul_(100)
    assert drawn(module).abs().max() <= 1


def test_a_warp_without_parameters_is_the_prototype():
    """Coordinates of 8 pixels are exact in float64 but for a few roundings."""
    prototypes = tiny_data()[0][:3]
    module = optimised_images("warp", (1, 8, 8), 3, prototypes=prototypes).double()
    torch.nn.init.zeros_(module.values)
    assert torch.allclose(module(torch.arange(3)), prototypes.double(), rtol=0, atol=1e-14)
    one = optimised_images("warp", (1, 8, 8), 3, prototypes=prototypes[0])
    assert torch.equal(one.prototypes, prototypes[:1].expand(3, 1, 8, 8))
    with torch.no_grad():
        module.values[:, 0, 2] = 0.25  # a pixel of 8 to the right in the prototype
    assert torch.allclose(module(torch.arange(3))[..., :7], prototypes.double()[..., 1:], rtol=0, atol=1e-14)


def test_coefficients_are_enlarged_bilinearly():
    """Centres of 8 pixels lie at (i + 1/2) / 4 - 1/2 among two coefficients, whose outer ones go on."""
    module = optimised_images("coefficients", (1, 8, 8), 2, grid=2).double()
    share = ((torch.arange(8).double() + 0.5) / 4 - 0.5).clamp(0, 1)
    weights = torch.stack((1 - share, share), dim=1)
    wanted = (weights @ module.values.detach() @ weights.T).tanh()
    assert torch.allclose(module(torch.arange(2)), wanted, rtol=0, atol=1e-15)


def test_prototypes_are_of_the_images_own_classes(tmp_path):
    images, labels = tiny_data()
    for prototype, wanted in {
        "mean": [images[labels == k].mean(dim=0) for k in (2, 0, 2)],
        "1": [images[labels == k][1] for k in (2, 0, 2)],
    }.items():
        config = ScoreDistillationConfig("warp", 3, classes="c,a", prototype=prototype, updates=1)
        run = ImageOptimiser(config, conditional_teacher(), tmp_path / prototype, (images, labels), progress=False)
        assert torch.equal(run.method.images.prototypes, torch.stack(wanted))
    plain = ScoreDistillationConfig("warp", 3, prototype="4", updates=1)
    run = ImageOptimiser(plain, tiny_teacher(), tmp_path / "plain", images, progress=False)
    assert torch.equal(run.method.images.prototypes, images[4:5].expand(3, 1, 8, 8))
    run.step()
    run._write_checkpoint(None)
    with pytest.raises(InputError, match="another prototypes"):
        ImageOptimiser(plain, tiny_teacher(), tmp_path / "plain", images.flip(0), resume=True, progress=False)


def test_a_run_writes_its_images_and_its_record(tmp_path):
    config = ScoreDistillationConfig("coefficients", 4, grid=4, classes="b,c", guidance=1.5, updates=3)
    teacher = conditional_teacher()
    images = optimise_images(config, teacher, tmp_path, progress=False)
    tensors, metadata = read_tensors(tmp_path / "images.safetensors", keys=("digest",))
    assert torch.equal(tensors["images"], images) and images.shape == (4, 1, 8, 8) and images.dtype == torch.float32
    assert tensors["labels"].tolist() == [1, 2, 1, 2] and metadata["classes"] == ["b", "c"]
    (run,) = json.loads((tmp_path / "training.json").read_text())["runs"]
    assert run["method"] == "score-distillation" and run["config"]["grid"] == 4 and run["classes"] == ["b", "c"]
    assert run["teacher"] == teacher.identity() and run["cost"] == {"forward": 24, "backward": 0}
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    image = pytest.importorskip("PIL.Image").open(tmp_path / "images.png")
    scale = 96 // 8
    assert image.size == (2 * 8 * scale + 6, 2 * 8 * scale + 6)
    assert image.getpixel((2, 2)) == to_uint8(images)[0, 0, 0, 0].item()
    with pytest.raises(InputError, match="holds a run already"):
        optimise_images(config, teacher, tmp_path, progress=False)
    (tmp_path / "images.png").unlink()
    assert torch.equal(optimise_images(config, teacher, tmp_path, resume=True, progress=False), images)
    assert (tmp_path / "images.png").exists()


def test_the_command_line(tmp_path):
    out = tmp_path / "sds"
    command = ["distill", "score-distillation", "--teacher", "digits", "--generator", "warp", "--data", "digits", "--out", out]
    done = CliRunner().invoke(main, [*map(str, command), "--num", "2", "--updates", "2"])
    assert done.exit_code == 0 and f"images saved in {out}" in done.output, done.output
    assert read_tensors(out / "images.safetensors")[0]["images"].shape == (2, 1, 32, 32)
    without = CliRunner().invoke(main, ["distill", "score-distillation", "--out", str(tmp_path / "none")])
    assert without.exit_code == 2 and "by --teacher" in without.output
    page = CliRunner().invoke(main, ["distill", "score-distillation", "--help"]).output
    assert "not a student" in page and "--init" not in page and "--trajectories" not in page


def test_numbers_that_cannot_be_are_refused():
    for name, value in {
        "generator": "nerf",
        "num": 0,
        "grid": 0,
        "updates": 0,
        "checkpoint_every": 0,
        "log_every": 0,
        "prototype": "-1",
        "guidance": -1.0,
        "weight": "snr",
        "t_min": -0.1,
        "t_max": 0.01,
        "learning_rate": math.nan,
        "final_learning_rate": 2.0,
        "seed": -1,
    }.items():
        with pytest.raises(InputError, match=f"^{name} must be .*got"):
            ScoreDistillationConfig(**{name: value}).validate()
    with pytest.raises(InputError, match="^t_max must be in .*from t_min on, got 1.5"):
        ScoreDistillationConfig(t_max=1.5).validate()
    with pytest.raises(InputError, match="^guidance 2 leads towards a class: name the images' by --classes"):
        ScoreDistillationConfig(guidance=2.0).validate()
    for option, owner in (({"grid": 8}, "generator coefficients"), ({"prototype": "3"}, "generator warp")):
        with pytest.raises(InputError, match=f"does nothing without {owner}: choose that, or leave {next(iter(option))} out"):
            ScoreDistillationConfig(**option).validate()
    images = optimised_images("pixels", (2,), 1)
    for ends in ([1.0, 0.5], [0.5, 0.0]):
        with pytest.raises(InputError, match="t_min and t_max must keep to levels with noise and image.*raise t_min"):
            ScoreDistillation(ScoreDistillationConfig(t_min=0, t_max=1), images, Schedule(ends))


def test_generators_that_cannot_be_are_refused():
    prototype = torch.zeros(1, 8, 8)
    for arguments, message in (
        ({"generator": "nerf"}, "generator must be one of pixels, coefficients, warp, got 'nerf'"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"generator": "coefficients", "grid": 9}, "grid must be from 1 to the image's side, 8, got 9"),
        ({"generator": "warp"}, "generator warp needs prototypes: name images by --data"),
        ({"prototypes": prototype}, "generator pixels has no prototype"),
        ({"generator": "warp", "prototypes": prototype[:, :4]}, "prototypes must be"),
        (
            {"generator": "warp", "prototypes": prototype + math.nan},
            "prototypes must be finite images in .* choose other --data",
        ),
        ({"generator": "warp", "prototypes": prototype + 1.5}, "prototypes must be finite images in .*magnitude is 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            optimised_images(**{"generator": "pixels", "shape": (1, 8, 8), "num": 3, **arguments})


def test_teachers_and_data_that_do_not_fit_are_refused(tmp_path):
    images, labels = tiny_data()
    warp, out = {"generator": "warp"}, tmp_path / "out"
    told = {**warp, "classes": "a"}
    plain, conditional = tiny_teacher(), conditional_teacher()
    for teacher, changes, data, message in (
        (
            plain,
            {"classes": "a", "guidance": 1.0},
            None,
            "guidance: teacher tiny is unconditional: train one with --conditional",
        ),
        (plain, {"classes": "a"}, None, "--classes a: teacher tiny is unconditional; leave it out"),
        (conditional, {"classes": "a,d"}, None, "--classes: 'd' is not one of a, b, c"),
        (conditional, {"guidance": 1.0}, None, "guidance 1 leads towards a class"),
        (plain, {"generator": "coefficients"}, None, "grid must be from 1 to the image's side, 8, got 16"),
        (plain, {}, images, "--data is for --generator warp"),
        (plain, warp, None, "generator warp needs images to make prototypes of: name them by --data"),
        (plain, warp, images * math.inf, "prototypes must be finite images"),
        (plain, warp, images[..., :4], "data holds images"),
        (
            plain,
            {**warp, "prototype": "12"},
            images,
            "prototype must be mean or in .0, 12.*number of one of the images, got 12",
        ),
        (conditional, told, images, "data has no labels"),
        (conditional, told, (images[labels > 0], labels[labels > 0]), "data holds no images of a: name other data"),
        (conditional, {**told, "prototype": "4"}, (images, labels), "in .0, 4.*one of the images of a, got 4"),
        (conditional, told, "digits", "--data digits has classes 0, 1, .* the teacher knows a, b, c"),
    ):
        with pytest.raises(InputError, match=message):
            optimise_images(ScoreDistillationConfig(**changes), teacher, out, data=data, progress=False)
    assert not out.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tmp_path):
    run = tiny_run(None, tmp_path, progress=False)
    predict = run.method.teacher.predict

    def broken(x, *arguments):
        x0, eps = predict(x, *arguments)
        return (x0 * math.nan if run.done == 3 else x0), eps

    run.method.teacher.predict = broken
    with pytest.raises(
        TrainingError, match="picture set's loss or gradient is not finite at stage 1, update 3; the last checkpoint"
    ):
        run.run()
    resumed = tiny_run(None, tmp_path, resume=True, progress=False)
    assert resumed.done == 2
    found = resumed.run()
    whole = tiny_run(None, tmp_path / "whole", progress=False).run()
    assert torch.equal(found.values, whole.values)
