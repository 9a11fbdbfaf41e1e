"""Rectified flow: affine students of Gaussians end in known velocities, reflow needs one step, paths straighten."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from advkd import Teacher, Trajectories
from advkd.data.draws import Draw
from advkd.data.sources import Batch, Tensors
from advkd.diffusion.denoiser import Denoiser
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError
from advkd.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig, straightness, two_steps, velocity
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_recording, tiny_teacher, tiny_unet
from ..diffusion.runs import double, end, exact_network

MEAN, VARIANCE = double([0.4, -0.7]), double([0.3, 1.6])
SCHEDULE = Schedule.linear()
TEACHER = GaussianTeacher(MEAN, VARIANCE, SCHEDULE)


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of a UNet on recorded pairs, annealed, with targets of a flow beside them."""
    config = RectifiedFlowConfig(updates=6, batch_size=8, checkpoint_every=2, steps=1, anneal=0.5, two_step=0.5, seed=seed)
    student, teacher = tiny_denoiser(seed + weights), tiny_denoiser(7).model
    return DenoiserDistiller("rectified-flow", config, student, out, teacher, None, Trajectories(data), **options)


def tiny_denoiser(seed=0):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    return DenoiserStudent(Teacher(tiny_unet(seed=seed), scheduler, "tiny"), Sampler())


class Affine(nn.Module):
    """v = gain x + shift, with numbers of its own at every tau = i / k, for every class."""

    def __init__(self, k, classes=1):
        super().__init__()
        self.register_buffer("timesteps", SCHEDULE.t((k - torch.arange(k)) / torch.arange(k)))
        self.gain = nn.Parameter(torch.full((classes, k, 2), 0.1, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(classes, k, 2, dtype=torch.float64))

    def forward(self, x, t, condition=None):
        i = (t[:, None] - self.timesteps).abs().argmin(1)
        label = torch.zeros_like(i) if condition is None else condition
        return self.gain[label, i] * x + self.shift[label, i]


def trained(student, data, out, given="pairs", teacher=None, updates=1000, batch_size=64, learning_rate=0.03, **options):
    """A run of the real trainer: the student's network."""
    numbers = {"updates": updates, "batch_size": batch_size, "learning_rate": learning_rate, "ema": 0.0, "clip": 0.0}
    numbers |= {"log_every": 100}
    method = RectifiedFlow(RectifiedFlowConfig(**numbers, **options), student, SCHEDULE)
    method.given = given
    return Trainer(method, data, teacher, out, dtype=torch.float64, progress=False).run()


def flow(student):
    return Denoiser(student, SCHEDULE, "v_prediction")


def coefficients(model, tau, label=None):
    """Gain and shift of the velocity at a time."""
    times, labels = double([tau]), None if label is None else torch.tensor([label])
    shift = velocity(model, torch.zeros(1, 2, dtype=torch.float64), times, labels)[0]
    return velocity(model, torch.ones(1, 2, dtype=torch.float64), times, labels)[0] - shift, shift


def normal(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(student, z, steps):
    """Images by Euler's method in tau, as a saved student draws them."""
    program = Solver("ddim", "flow").program(SCHEDULE, steps, "v_prediction")
    return end(program, z, lambda x, level: student(x, torch.full((len(x),), level.t), None))


def first_flow(tau):
    """Gain and shift of the velocity between N(0, 1) and the independent data (Liu et al. 2023)."""
    gain = (tau * VARIANCE - (1 - tau)) / (tau**2 * VARIANCE + (1 - tau) ** 2)
    return gain, MEAN - gain * tau * MEAN


def straight(z, mean=MEAN, variance=VARIANCE):
    return mean + variance.sqrt() * z


def test_velocity_of_the_first_flow(tmp_path):
    """Least squares of x - z at y: at 4 standard errors of a tenth of the samples, as Adam's last steps average theirs."""
    k, updates, batch_size = 4, 2000, 256
    z = normal(4096, seed=1)
    images = straight((z - z.mean(0)) / z.std(0, unbiased=False))
    options = {"steps": k, "updates": updates, "batch_size": batch_size}
    student = trained(Affine(k), Tensors(images=images), tmp_path, "images", **options)
    samples = 0.1 * updates * batch_size / k
    for tau in (i / k for i in range(k)):
        variance = tau**2 * VARIANCE + (1 - tau) ** 2
        error = (VARIANCE / variance / samples).sqrt()  # of x - z, whose variance given y is that of x times that of z over y's
        (gain, shift), (gain_wanted, at_zero) = coefficients(flow(student), tau), first_flow(tau)
        assert ((gain - gain_wanted).abs() <= 4 * error / variance.sqrt()).all()
        at_mean = shift + gain * tau * MEAN
        assert ((at_mean - (at_zero + gain_wanted * tau * MEAN)).abs() <= 4 * error).all()


@pytest.mark.parametrize("k", [1, 4])
def test_one_step_of_a_reflow_is_the_whole_map(k, tmp_path):
    """Also at the k times of a student of k steps, whose steps go straight on: every divisor of k gives the same images."""
    z, probe = normal(256), normal(8, seed=3)
    student = trained(Affine(k), Tensors(z=z, images=straight(z)), tmp_path, steps=k)
    for steps in {1, k // 2 or 1, k}:
        assert torch.allclose(drawn(student, probe, steps), straight(probe), rtol=0, atol=1e-9)


def test_a_reflow_of_a_flows_own_pairs(tmp_path):
    """Four steps of the first flow's velocity, put in closed form into a network, become one."""
    first, z = Affine(4), normal(256)
    with torch.no_grad():
        for i in range(4):
            tau = i / 4
            scale, (gain, shift) = math.hypot(tau, 1 - tau), first_flow(tau)
            # u = (alpha - noise) x - (alpha + noise) v for the state x = y / scale.
            first.gain[0, i] = (2 * tau - 1) - scale**2 * gain
            first.shift[0, i] = -scale * shift
        images = drawn(first, z, 4)
        assert torch.allclose(coefficients(flow(first), 0.25)[0], first_flow(0.25)[0], rtol=0, atol=1e-12)
    student = trained(Affine(1), Tensors(z=z, images=images), tmp_path, steps=1)
    probe = normal(8, seed=3)
    wanted = drawn(first, probe, 4)
    assert torch.allclose(drawn(student, probe, 1), wanted, rtol=0, atol=1e-9)
    assert (wanted - straight(probe)).abs().max() > 0.05, "four Euler steps are not the flow itself"


def test_annealing_ends_at_the_recorded_pairs(tmp_path):
    z, probe = normal(256), normal(8, seed=3)
    student = trained(Affine(1), Tensors(z=z, images=straight(z)), tmp_path, steps=1, anneal=0.5)
    assert torch.allclose(drawn(student, probe, 1), straight(probe), rtol=0, atol=1e-9)


def test_noise_while_annealing():
    """b falls linearly from 1 to 0 and the share of the recorded noise rises; the variance stays that of normal numbers."""
    config, n = RectifiedFlowConfig(anneal=0.5, updates=10, batch_size=4096), 4096
    method = RectifiedFlow(config, Affine(1), SCHEDULE)
    method.given = "pairs"
    assert [method.annealing(update) for update in range(10)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    batch = Batch(z=normal(n), images=straight(normal(n)))
    for update, b in enumerate((1, 0.8, 0.6, 0.4, 0.2)):
        noise = method.noise(batch, draws(n, update * n))
        # Means of products of normal numbers have a variance of 2 at most.
        assert abs((noise * batch.z).mean().item() - math.sqrt(1 - b * b)) <= 5 * math.sqrt(2 / (2 * n))
        assert abs(noise.square().mean().item() - 1) <= 5 * math.sqrt(2 / (2 * n))
    assert torch.equal(method.noise(batch, draws(n, 5 * n)), batch.z)
    half = method.noise(Batch(z=batch.z[2048:], images=batch.images[2048:]), draws(2048, 2 * n + 2048))
    assert torch.equal(half, method.noise(batch, draws(n, 2 * n))[2048:]), "another process has the second half"


def test_loss_while_annealing(tmp_path):
    """The target of an update is x - z' for the noise z' of its state, by hand from the student's numbers before it."""
    z = normal(24)
    student, data, n = Affine(1), Tensors(z=z, images=straight(z)), 8
    method = RectifiedFlow(RectifiedFlowConfig(anneal=0.5, updates=6, batch_size=n, steps=1), student, SCHEDULE)
    method.given = "pairs"
    run = Trainer(method, data, None, tmp_path, dtype=torch.float64, progress=False)
    for update in range(6):
        batch = data.batch(run.rows(update * n, n), (), torch.device("cpu"), torch.float64)
        noise = method.noise(batch, draws(n, update * n))
        assert torch.equal(noise, batch.z) == (update >= 3)
        v = student.gain[0, 0] * noise + student.shift[0, 0]
        wanted = (-noise - v - (batch.images - noise)).square().mean().item()
        assert run.step()["loss"] == pytest.approx(wanted, rel=1e-12)


def draws(n, start=0):
    return Draw(0, start, n, "cpu", torch.float64)


@pytest.mark.parametrize("tau", ["uniform", "u-shaped"])
def test_times(tau):
    """Kolmogorov's distance to the distribution function, exceeded once in 10^6."""
    n = 100_000
    found = RectifiedFlow(RectifiedFlowConfig(tau=tau), Affine(1), SCHEDULE).times(draws(n)).sort().values
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() <= 1
    density = 2 * torch.cosh(4 * (torch.linspace(0, 1, 2001, dtype=torch.float64) - 0.5)) / math.sinh(2)
    below = torch.cumulative_trapezoid(density, dx=1 / 2000) if tau == "u-shaped" else torch.linspace(1 / 2000, 1, 2000)
    wanted = torch.from_numpy(np.interp(found, np.linspace(0, 1, 2001), [0, *below.tolist()]))
    assert (wanted - (torch.arange(n) + 0.5) / n).abs().max() <= math.sqrt(math.log(2e6) / 2 / n)


def test_times_of_a_student_of_k_steps():
    found = RectifiedFlow(RectifiedFlowConfig(steps=5), Affine(5), SCHEDULE).times(draws(1000))
    assert set(found.tolist()) == {0.0, 1 / 5, 2 / 5, 3 / 5, 4 / 5}


def two_step_gain(middle):
    """x - z = mean + gain z for two Euler steps of the Gaussian's flow, whose velocity at noise alone is mean - z."""
    gain, _ = first_flow(middle)
    return (1 - middle) ** 2 * gain - middle


def test_two_steps_of_a_teacher():
    z = normal(5)
    for middle in (0.2, 0.5, 0.8):
        found = two_steps(TEACHER, z, torch.full((5,), middle, dtype=torch.float64))
        assert torch.allclose(found, MEAN + two_step_gain(middle) * z, rtol=0, atol=1e-12)
        assert torch.allclose(found, drawn_by(TEACHER, z, middle) - z, rtol=0, atol=1e-12)


def drawn_by(teacher, z, middle):
    """The same steps by the flow written out: y' = y + (tau' - tau) (D - y) / (1 - tau)."""
    y, times = z, (0.0, middle, 1.0)
    for tau, following in zip(times, times[1:]):
        y = y + (following - tau) * (teacher.x0(y, double(tau), double(1 - tau)) - y) / (1 - tau)
    return y


def test_targets_of_two_steps_alone(tmp_path):
    """The optimum is the mean over the middle time, at 4 standard errors of a tenth of the samples."""
    updates, batch_size = 1000, 256
    options = {"steps": 1, "two_step": 2.0, "updates": updates, "batch_size": batch_size}
    student = trained(Affine(1), Tensors(), tmp_path, "none", TEACHER, **options)
    gains = torch.stack([two_step_gain(m) for m in torch.linspace(0.2, 0.8, 6001, dtype=torch.float64)])
    gain, shift = coefficients(flow(student), 0.0)
    # E z^4 = 3 multiplies the variance of the target's gain in that of a fitted gain.
    error = gains.std(0) * math.sqrt(3 / (0.1 * updates * batch_size))
    assert ((gain - gains.mean(0)).abs() <= 4 * error).all() and ((shift - MEAN).abs() <= 4 * error).all()
    assert (gains.std(0) > 0.01).all()


class Straight:
    """A straight flow to another Gaussian, as a teacher."""

    shape, prediction, num_classes = (2,), "v_prediction", 0
    mean, variance = double([-0.2, 0.3]), double([0.5, 0.2])

    def predict(self, x, sigma, condition=None):
        tau = 1 / (1 + sigma[:, None])
        y = x * torch.hypot(tau, 1 - tau)
        z = (y - tau * self.mean) / (tau * self.variance.sqrt() + 1 - tau)
        return straight(z, self.mean, self.variance), z


def test_pairs_and_targets_of_two_steps(tmp_path):
    """Where both are maps of the noise, the optimum is their mean by weight."""
    updates, batch_size, weight = 1000, 256, 0.5
    z = normal(4096, seed=1)
    z = (z - z.mean(0)) / z.std(0, unbiased=False)
    options = {"steps": 1, "two_step": weight, "updates": updates, "batch_size": batch_size}
    student = trained(Affine(1), Tensors(z=z, images=straight(z)), tmp_path, teacher=Straight(), **options)
    ours, theirs = VARIANCE.sqrt() - 1, Straight.variance.sqrt() - 1
    gain, shift = coefficients(flow(student), 0.0)
    # Both residuals are the distance of the maps, some fixed share of it, times normal numbers.
    spread = (ours - theirs).abs() + (MEAN - Straight.mean).abs()
    error = spread * math.sqrt(3 / (0.1 * updates * batch_size))
    assert ((gain - (ours + weight * theirs) / (1 + weight)).abs() <= 4 * error).all()
    assert ((shift - (MEAN + weight * Straight.mean) / (1 + weight)).abs() <= 4 * error).all()


def test_labels_reach_the_student(tmp_path):
    """Pairs of two classes, each with a map of its own."""
    z, labels, probe = normal(256), torch.arange(256) % 2, normal(4, seed=3)
    images = torch.where(labels[:, None] == 0, straight(z), straight(z, Straight.mean, Straight.variance))
    student = trained(Affine(1, classes=2), Tensors(z=z, images=images, labels=labels), tmp_path, steps=1)
    for label, wanted in enumerate((straight(probe), straight(probe, Straight.mean, Straight.variance))):
        gain, shift = coefficients(flow(student), 0.0, label)
        assert torch.allclose(probe + gain * probe + shift, wanted, rtol=0, atol=1e-9)


class Network(nn.Module):
    """v of points in the plane, by two hidden layers."""

    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        hidden = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        self.layers = hidden.double()

    def forward(self, x, t, condition=None):
        tau = (1 / (1 + SCHEDULE.sigma(t)))[:, None].to(x.dtype)
        return self.layers(torch.cat((x, tau, tau**2), 1))


def test_paths_straighten_with_every_reflow(tmp_path):
    """The mixture's own flow is the first one; the second learns its pairs, the third the second's."""
    ring, z, probe = MixtureTeacher.from_preset("8-gaussians", SCHEDULE), normal(2048, seed=5), normal(512, seed=6)
    found, program = [straightness(ring, probe)], Solver("ddim", "flow").program(SCHEDULE, 50, "sample")
    images = end(program, z, exact_network(ring))
    for i in (2, 3):
        data = Tensors(z=z, images=images)
        student = trained(Network(), data, tmp_path / str(i), updates=600, batch_size=256, learning_rate=5e-3)
        found.append(straightness(flow(student), probe))
        with torch.no_grad():
            images = drawn(student, z, 20)
    assert found[0] > 10 * found[1] and found[1] > 1.1 * found[2], found


def test_straightness():
    """Zero for a straight flow, of the Gaussian's the integral by other steps."""
    z = normal(1000)
    assert straightness(Straight(), z) <= 1e-28
    y, steps, found = z, 1000, []
    for i in range(steps):
        gain, shift = first_flow(i / steps)
        found.append(gain * y + shift)
        y = y + found[-1] / steps
    wanted = (torch.stack(found) - (y - z)).square().mean().item()
    assert straightness(TEACHER, z, steps=steps) == pytest.approx(wanted, rel=1e-10)
    assert straightness(TEACHER, z) == pytest.approx(wanted, rel=0.1)


def tiny_images(n=16):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_flow_from_images_and_its_reflow(tmp_path):
    """A student of eight steps, its straightness on record, records the pairs of the next one."""
    config = RectifiedFlowConfig(updates=2, batch_size=8, tau="u-shaped", distance="huber")
    first = distill_denoiser("rectified-flow", config, tiny_denoiser(), tmp_path / "1", data=tiny_images(), progress=False)
    loaded = DenoiserStudent.from_pretrained(tmp_path / "1")
    assert loaded.sampler == first.sampler == Sampler(Solver("ddim", "flow"), 8) and loaded.evaluations == 8
    for steps in (None, 1, 3):
        images = loaded.sample(2, seed=1, steps=steps)
        assert images.isfinite().all() and torch.equal(images, first.sample(2, seed=1, steps=steps))
    run = loaded.training_record["runs"][-1]
    assert run["method"] == "rectified-flow" and run["cost"] == {"forward": 16, "backward": 16}
    assert run["straightness"] == pytest.approx(straightness(first.model, first.model.noise(64)), rel=1e-5)
    recording = tiny_recording(solver="unipc", steps=4)
    pairs = record_trajectories(Teacher.from_pretrained(tmp_path / "1"), recording, tmp_path / "pairs", progress=False)
    config = RectifiedFlowConfig(updates=2, batch_size=8, steps=2, pairs=20)
    found = distill_denoiser("rectified-flow", config, loaded, tmp_path / "2", trajectories=pairs, progress=False)
    assert found.sampler.steps == found.evaluations == 2
    runs = found.training_record["runs"]
    assert [run["method"] for run in runs] == ["rectified-flow"] * 2 and "straightness" not in runs[1]
    assert runs[1]["cost"] == {"forward": 24 * 4 + 16, "backward": 16}


def test_a_student_of_a_flow_alone(tmp_path):
    config = RectifiedFlowConfig(updates=2, batch_size=8, steps=1, two_step=1.0)
    teacher = tiny_denoiser(1).model
    student = distill_denoiser("rectified-flow", config, tiny_denoiser(), tmp_path, teacher=teacher, progress=False)
    assert student.evaluations == 1 and student.sample(2).isfinite().all()
    assert student.training_record["runs"][0]["cost"] == {"forward": 48, "backward": 16}


BAD = {"steps": -1, "tau": "normal", "anneal": 1.0, "two_step": -0.5, "distance": "kl", "pairs": -1, "updates": 0, "ema": 1.0}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be"):
        RectifiedFlowConfig(**{name: BAD[name]}).validate()


def test_numbers_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="tau is of a flow: a student of 4 steps is trained at their times"):
        RectifiedFlowConfig(steps=4, tau="u-shaped").validate()
    with pytest.raises(InputError, match="two_step is for students of one step: add --steps 1"):
        RectifiedFlowConfig(two_step=1.0).validate()


def test_data_that_cannot_be_trained_on_is_refused(trajectories, unpaired, tmp_path):
    """One line before work starts."""

    def refused(message, teacher=None, data=None, trajectories=None, **options):
        config = RectifiedFlowConfig(**{"batch_size": 8, **options})
        with pytest.raises(InputError, match=message):
            given = {"teacher": teacher, "data": data, "trajectories": trajectories}
            distill_denoiser("rectified-flow", config, tiny_denoiser(), tmp_path / "out", **given)

    refused("needs images .--data., pairs .--trajectories., or --two-step with a flow as --teacher")
    refused("anneal leads to recorded pairs: name them by --trajectories", data=tiny_images(), anneal=0.5)
    refused("the trajectories are unpaired", trajectories=unpaired)
    refused("pairs must be at most the 24 trajectories, got 25", trajectories=trajectories, pairs=25)
    refused("rectified-flow needs a teacher", steps=1, two_step=1.0)
    refused("two_step needs a flow as its teacher", tiny_teacher(), steps=1, two_step=1.0)
    refused("leave --data out, or leave out --trajectories", data=tiny_images(), trajectories=trajectories)
    assert not (tmp_path / "out").exists()
