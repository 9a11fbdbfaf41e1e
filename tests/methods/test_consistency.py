"""Consistency distillation and training: fixed points of affine students are the compositions of the solver's steps."""

import copy
import math

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import Schedule, karras_sigmas
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError, TrainingError
from advkd.methods.consistency import (
    STEPS,
    Consistency,
    ConsistencyConfig,
    euler_step,
    heun_step,
    lognormal_chances,
)
from advkd.methods.distances import DISTANCES
from advkd.models.denoiser import DenoiserNetwork
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher
from ..diffusion.runs import walk
from .test_progressive import Affine, normal, tiny_images, tiny_student

FLOAT64 = {"dtype": torch.float64, "progress": False}
COUNT, LOWEST, HIGHEST = 9, 0.02, 20.0
MEAN, VARIANCE = torch.tensor([0.4, -1.0]), torch.tensor([0.3, 2.0])
TEACHER = GaussianTeacher(MEAN, VARIANCE, Schedule.edm(COUNT, LOWEST, HIGHEST))


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates by a teacher, with a target average and levels that double on the way."""
    config = ConsistencyConfig(updates=6, batch_size=4, levels=4, final_levels=16, ema=0.5, checkpoint_every=2, seed=seed)
    teacher = tiny_teacher()
    teacher.unet.double()  # its rounding must not depend on the size of a process's batch
    return DenoiserDistiller("consistency", config, tiny_student(weights), out, teacher, tiny_images(), **options)


def trained(config, teacher, out, images):
    method = Consistency(config, Affine(COUNT), TEACHER.schedule)
    network = Trainer(method, Tensors(images=images), teacher, out, **FLOAT64).run()
    return method, method.function(network)


def composed(step, y, level, sigmas):
    """A step of the exact teacher from every level to the next lower one, down to the lowest."""
    for j in range(level, 0, -1):
        y = step(TEACHER, y, sigmas[j].expand(len(y)), sigmas[j - 1].expand(len(y)))
    return y


def furthest(f, step, sigmas):
    """Largest distance, over levels, of a function from the composition, at states as they are distributed there."""
    z = normal(200, 2)
    found = []
    for level in range(1, COUNT):
        y = MEAN + (VARIANCE + sigmas[level] ** 2).sqrt() * z
        with torch.no_grad():
            found.append((f(y, sigmas[level].expand(200)) - composed(step, y, level, sigmas)).abs().max().item())
    return max(found)


@pytest.mark.parametrize("solver", STEPS)
def test_the_fixed_point_of_distillation_is_the_composition_of_the_solvers_steps(solver, tmp_path):
    """An affine student represents it: the loss ends at 0, and the error has the size of Adam's last rates.

    The other solver's composition is further away by a hundred times the tolerance.
    """
    config = ConsistencyConfig(
        updates=3000,
        batch_size=32,
        learning_rate=0.03,
        clip=0.0,
        ema=0.0,
        levels=COUNT,
        distance="mse",
        target=0.9,
        solver=solver,
    )
    method, f = trained(config, TEACHER, tmp_path, TEACHER.data(2048))
    sigmas = method.sigmas(0)
    other = {"heun": euler_step, "euler": heun_step}[solver]
    assert furthest(f, STEPS[solver][0], sigmas) < 1e-3
    assert furthest(f, other, sigmas) > 0.1


def test_training_without_a_teacher_ends_where_distillation_by_euler_does(tmp_path):
    """The regression of k (x0 + s z) + b on x0 + s' z has Euler's gain, as E[y | y'] is Euler's step with the exact teacher.

    The pairs are random, so that the minimum of a finite number of draws is a sampling error away: 1,500 batches of 2,048.
    """
    config = ConsistencyConfig(
        updates=1500, batch_size=2048, learning_rate=0.03, clip=0.0, ema=0.99, levels=COUNT, distance="mse", target=0.9
    )
    method, f = trained(config, None, tmp_path, TEACHER.data(2**16))
    sigmas = method.sigmas(0)
    assert furthest(f, euler_step, sigmas) < 0.05
    assert furthest(f, heun_step, sigmas) > 0.2


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_fixed_points_error_falls_at_the_solvers_order(solver, order):
    """Its distance from the exact consistency function, mean + (y - mean) sqrt((v + lowest^2) / (v + sigma^2))."""
    teacher = GaussianTeacher(MEAN, VARIANCE, Schedule.edm(1000, LOWEST, HIGHEST))
    y = MEAN + (VARIANCE + HIGHEST**2).sqrt() * normal(50, 2)
    wanted = MEAN + (y - MEAN) * ((VARIANCE + LOWEST**2) / (VARIANCE + HIGHEST**2)).sqrt()
    errors = []
    for count in (36, 72, 144, 288):
        sigmas, state = torch.tensor(karras_sigmas(count, LOWEST, HIGHEST, 7.0), dtype=torch.float64), y
        for high, low in zip(sigmas, sigmas[1:]):
            state = STEPS[solver][0](teacher, state, high.expand(50), low.expand(50))
        errors.append((state - wanted).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.1 for slope in slopes), slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_is_the_identity_at_the_lowest_level_bit_for_bit(dtype):
    student = tiny_student()
    network = DenoiserNetwork(student.model.unet).to(dtype)
    method = Consistency(ConsistencyConfig(), network, student.model.schedule)
    y = normal(5, 1, 8, 8).to(dtype)
    f = method.function(network)
    lowest = torch.tensor(method.sigma_min, dtype=torch.float64).expand(5)
    assert torch.equal(f(y, lowest), y) and not torch.equal(f(y, 2 * lowest), y)


def test_the_saved_student_draws_with_its_function(tmp_path):
    """One evaluation from the highest level is the function of sigma_max x_T, clamped at the end; two add noise between."""
    config = ConsistencyConfig(updates=1, batch_size=4, levels=4, sigmas=(1.5,))
    student = distill_denoiser("consistency", config, tiny_student(), tmp_path, data=tiny_images(), progress=False)
    loaded = DenoiserStudent.from_pretrained(tmp_path)
    assert loaded.sampler == student.sampler and loaded.evaluations == 2
    assert loaded.training_record["runs"][-1]["cost"] == {"forward": 8, "backward": 4}
    method = Consistency(config, DenoiserNetwork(loaded.model.unet), loaded.model.schedule)
    f, noise = method.function(method.student), loaded.latents(3, seed=4)
    highest = torch.tensor(method.sigma_max, dtype=torch.float64).expand(3)
    with torch.no_grad():
        wanted = f(math.hypot(1.0, method.sigma_max) * noise, highest)
    # Both round in float32, the sampler in variance-preserving states.
    assert torch.allclose(loaded.draw(noise, steps=1), wanted.clamp(-1, 1), rtol=0, atol=1e-4)
    assert not torch.allclose(loaded.draw(noise, seed=4), wanted.clamp(-1, 1), rtol=0, atol=1e-2)


def test_noise_leaves_the_images_of_low_levels():
    """White images, noised and read by the exact function: D is beyond 1 where the noise is, and is not clamped.

    Clamped as solvers of images clamp x0, it would leave the c sigma of noise that the state brings, a tenth here.
    """
    schedule, white = Schedule.linear(), torch.ones(1, 1, 8, 8, dtype=torch.float64)
    level, sigma = schedule.at_sigma(0.4), 0.4
    solver = Solver("consistency", sigma_min=0.01, alpha_bars=(level.alpha_bar,))
    skip, noise = 0.25 / (0.39**2 + 0.25), normal(1, 1, 8, 8)
    x = level.alpha * (white + sigma * noise)
    output = (white - skip * x / level.alpha) / (1 - skip)
    for clip in (math.inf, 1.0):
        (image,) = walk(solver.program(schedule, 1, "sample", clip), x, lambda state, at: output)
        assert torch.allclose(image, white, rtol=0, atol=1e-12)
        assert all(e.step.clip == math.inf for e in solver.program(schedule, 1, "sample", clip))
    assert output.max() > 1.2


def test_the_number_of_levels_doubles():
    config = ConsistencyConfig(updates=1000, levels=10, final_levels=160)
    method = Consistency(config, Affine(1000), Schedule.linear())
    assert [method.count(update) for update in (0, 199, 200, 400, 600, 800, 999)] == [10, 10, 20, 40, 80, 160, 160]
    assert len(method.sigmas(999)) == 160 and method.sigmas(0)[0] == method.sigma_min
    fixed = Consistency(ConsistencyConfig(levels=18), Affine(1000), Schedule.linear())
    assert {fixed.count(update) for update in range(0, 2000, 100)} == {18}


def test_levels_are_drawn_as_the_lognormal_says():
    sigmas = torch.tensor(karras_sigmas(20, 0.002, 80.0, 7.0)[::-1], dtype=torch.float64)
    chances = lognormal_chances(sigmas, -1.1, 2.0)
    bounds = [0.5 * math.erf((math.log(s) + 1.1) / (2 * math.sqrt(2))) for s in sigmas.tolist()]
    parts = [b - a for a, b in zip(bounds, bounds[1:])]
    assert torch.allclose(chances, torch.tensor(parts, dtype=torch.float64) / sum(parts), rtol=1e-12)
    method = Consistency(ConsistencyConfig(level="lognormal", levels=20), Affine(1000), Schedule.linear())
    drawn = method._level(Draw(0, 0, 20_000, "cpu", torch.float64), sigmas)
    counts = torch.bincount(drawn, minlength=19) / 20_000
    assert ((counts - chances).abs() < 5 * (chances * (1 - chances) / 20_000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weight", ["constant", "inverse-step"])
def test_an_update_is_the_distance_of_the_two_functions(distance, weight, tmp_path):
    """From its own draws: the student's at the higher level, the target's where the teacher's step leads."""
    teacher, images = tiny_teacher(), tiny_images(6)
    config = ConsistencyConfig(updates=1, batch_size=6, levels=5, distance=distance, weight=weight)
    run = DenoiserDistiller("consistency", config, tiny_student(), tmp_path, teacher, images, **FLOAT64)
    network, method = copy.deepcopy(run.running["target"].part.module), run.method
    draw = Draw(0, 0, 6, "cpu", torch.float64)
    j, sigmas, x = draw.integers("level", 4), method.sigmas(0), images.double()[run.rows(0, 6)]
    high, low = sigmas[j + 1], sigmas[j]
    y = x + high.reshape(-1, 1, 1, 1) * draw.normal("z", 1, 8, 8)
    with torch.no_grad():
        target = method.function(network)(heun_step(teacher, y, high, low), low)
        image = method.function(network)(y, high)
    squares = (image - target).square().flatten(1)
    width = 0.00054 * 8
    each = squares.mean(1) if distance == "mse" else (squares.sum(1) + width**2).sqrt() - width
    wanted = (each * (1 / (high - low) if weight == "inverse-step" else 1)).mean().item()
    assert run.step()["loss"] == pytest.approx(wanted, rel=1e-6)


def test_targets_are_an_average_whose_rate_follows_the_levels(tmp_path):
    """mu(k) = mu^(s_0 / N(k)); without one, targets are the student's own."""
    config = ConsistencyConfig(updates=4, batch_size=4, levels=2, final_levels=4, target=0.8, ema=0.0)
    schedule = Schedule.edm(4, LOWEST, HIGHEST)
    method = Consistency(config, Affine(4), schedule)
    run = Trainer(method, Tensors(images=TEACHER.data(16)), None, tmp_path / "one", **FLOAT64)
    target, student = (run.running[name].part.module for name in ("target", "student"))
    for decay in (0.8, 0.8, math.sqrt(0.8), math.sqrt(0.8)):
        before = target.gain.clone()
        run.step()
        assert torch.allclose(target.gain, decay * before + (1 - decay) * student.gain, rtol=1e-12)
    own = Consistency(ConsistencyConfig(target=0.0, levels=4), Affine(4), schedule)
    run = Trainer(own, Tensors(images=TEACHER.data(16)), None, tmp_path / "two", **FLOAT64)
    assert set(run.running) == {"student"} and run.step()["loss"] > 0


def test_a_student_told_classes_learns_them_and_none(tmp_path):
    seen = []

    class Told(Affine):
        def forward(self, x, t, condition):
            seen.append(condition)
            return super().forward(x, t, condition)

    method = Consistency(
        ConsistencyConfig(updates=1, levels=9, batch_size=500, drop=0.2, target=0.0), Told(9), TEACHER.schedule
    )
    method.num_classes, method.null_class = 3, 3
    assert method.needs().labels
    data = Tensors(images=TEACHER.data(500), labels=torch.arange(500) % 3)
    Trainer(method, data, None, tmp_path, **FLOAT64).run()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and set(seen[0].tolist()) == {0, 1, 2, 3}


def test_bad_numbers_are_refused():
    wrong = {"levels": 1, "final_levels": 4, "rho": 0.0, "sigma_min": -1.0, "sigma_data": 0.0, "level": "normal", "drop": 1.0}
    wrong |= {
        "level_deviation": 0.0,
        "level_mean": math.inf,
        "weight": "snr",
        "distance": "l1",
        "solver": "dpm-2",
        "target": 1.0,
    }
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"^{name} must be"):
            Consistency(ConsistencyConfig(**{name: value}), Affine(1000), Schedule.linear())
    with pytest.raises(InputError, match="level_mean does nothing without level lognormal"):
        Consistency(ConsistencyConfig(level_mean=-2.0), Affine(1000), Schedule.linear())
    with pytest.raises(InputError, match="level_mean must be near the logarithms of the levels, got 100"):
        Consistency(ConsistencyConfig(level="lognormal", level_mean=100.0), Affine(1000), Schedule.linear())
    for options in ({"sigma_min": 0.001}, {"sigma_max": 200.0}, {"sigma_min": 3.0, "sigma_max": 2.0}):
        with pytest.raises(InputError, match="within the schedule's levels, 0.01 to 157"):
            Consistency(ConsistencyConfig(**options), Affine(1000), Schedule.linear())
    for sigmas in ((200.0,), (0.5, 0.5), (0.5, 1.0), (0.001,)):
        with pytest.raises(InputError, match="sigmas must fall between 157 and 0.01"):
            Consistency(ConsistencyConfig(sigmas=sigmas), Affine(1000), Schedule.linear())
    for options, name in (({"levels": 10}, "levels"), ({"levels": 4, "final_levels": 16}, "final_levels")):
        with pytest.raises(InputError, match=f"^{name} must be at most the schedule's 9 timesteps, got 1"):
            Consistency(ConsistencyConfig(**options), Affine(9), TEACHER.schedule)


def test_students_and_teachers_that_do_not_fit_are_refused(tmp_path):
    images, config, out = tiny_images(), ConsistencyConfig(updates=1, levels=4, batch_size=2), tmp_path / "out"
    with pytest.raises(InputError, match="weights are of epsilon: run 'advkd distill reparametrize'"):
        distill_denoiser("consistency", config, DenoiserStudent.from_teacher(tiny_teacher()), out, data=images)
    with pytest.raises(InputError, match="needs images: name them by --data"):
        distill_denoiser("consistency", config, tiny_student(), out)
    with pytest.raises(InputError, match="draws images"):
        distill_denoiser("consistency", config, tiny_student(), out, teacher=tiny_teacher(channels=3), data=images)
    assert not out.exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    config = ConsistencyConfig(updates=4, levels=4, batch_size=4, checkpoint_every=2)
    teacher = tiny_teacher()
    run = DenoiserDistiller("consistency", config, tiny_student(), tmp_path, teacher, tiny_images(), progress=False)
    original = teacher.predict

    def broken(*arguments):
        x0, eps = original(*arguments)
        return (x0 * math.nan, eps) if run.done == 3 else (x0, eps)

    teacher.predict = broken
    with pytest.raises(
        TrainingError, match="the student's loss or gradient is not finite at stage 1, update 3; the last check"
    ):
        run.run()
    again = DenoiserDistiller(
        "consistency", config, tiny_student(), tmp_path, tiny_teacher(), tiny_images(), resume=True, progress=False
    )
    assert again.update == 2
    again.run()
