"""The likelihood of teachers: exact ones against closed forms, networks against the papers' formulas, runs that go on."""

import json
import math
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from advkd.cli.main import main
from advkd.data.draws import DataOrder
from advkd.data.images import read_pictures
from advkd.data.pictures import save_image, to_pil
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.evaluation import evaluate_likelihood as run
from advkd.evaluation.evaluate_likelihood import LikelihoodConfig, evaluate_likelihood
from advkd.evaluation.likelihood import VariationalBound, gaussian_kl, log_density, log_probability, variational_bound
from advkd.exact import GaussianTeacher, MixtureTeacher

from ..conftest import other_default, tiny_teacher, tiny_unet

SIGMAS = 4
"""Standard errors that a mean over independent draws may be from its expectation."""


def gaussian_teacher(mean=(0.3, -0.5), variance=(0.2, 0.2), schedule=None, coordinates="vp"):
    return GaussianTeacher(torch.tensor(mean), torch.tensor(variance), schedule, coordinates)


def entropy(teacher):
    """Differential entropy in bits per dimension: the true negative log-likelihood of the data, in expectation."""
    return (0.5 * torch.log(2 * math.pi * math.e * teacher.variances)).mean().item() / math.log(2)


def expected(teacher, steps, kind):
    """L_T, every L_{s,t} and L_0 of Gaussian data in expectation, and the standard deviations of L_{s,t}'s quadratic part.

    The residual x0 - D is normal with variance V = v (1 - a) / (a v + 1 - a) in every direction, so that its square has mean V
    and variance 2 V^2. Formulas of Ho et al. 2020, eq. 6, 7 and 12, written with betas.
    """
    v, mean, count = teacher.variances, teacher.mean, len(teacher.schedule)
    bars = [teacher.schedule.alpha_bars[round(i * (count - 1) / (steps - 1))].item() for i in range(steps)][::-1]
    left = [v * (1 - a) / (a * v + 1 - a) for a in bars]
    terms, spreads = [0.5 * (bars[0] * (v + mean**2) - bars[0] - math.log(1 - bars[0])).mean()], []
    for a, after, residual in zip(bars[:-1], bars[1:], left[:-1], strict=True):
        beta = 1 - a / after
        small, weight = (1 - after) / (1 - a) * beta, after * beta**2 / (1 - a) ** 2
        sigma = {"fixed_small": small, "fixed_large": beta, "analytic": small + weight * residual.mean()}[kind]
        terms.append((0.5 * (math.log(sigma / small) + (small + weight * residual) / sigma - 1)).mean())
        spreads.append(weight / sigma * (residual.square().mean() / 2 / len(v)).sqrt() / math.log(2))
    sigma = left[-1].mean() if kind == "analytic" else (1 - bars[-1]) / (1 - bars[-2]) * (1 - bars[-2] / bars[-1])
    terms.append((0.5 * (math.log(2 * math.pi * sigma) + left[-1] / sigma)).mean())
    return torch.stack(terms) / math.log(2), torch.stack(spreads)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "analytic"])
@pytest.mark.parametrize("steps, schedule", [(2, None), (7, None), (30, None), (40, Schedule.cosine(40))])
def test_terms_of_gaussian_data(steps, schedule, kind):
    """Every term agrees with its expectation within the standard error of that expectation."""
    teacher = gaussian_teacher(variance=(0.05, 0.8), schedule=schedule)
    n = 4000
    found = variational_bound(teacher, teacher.data(n, seed=5), steps, variance=kind, batch_size=1000)
    terms, spreads = expected(teacher, steps, kind)
    assert (torch.tensor(found.steps) - terms[1:-1]).abs().le(SIGMAS * spreads / math.sqrt(n)).all()
    deviation = (found.interval[1] - found.bits_per_dimension) / 1.96
    assert abs(found.bits_per_dimension - terms.sum().item()) < SIGMAS * deviation
    # a x0^2 / 2 has standard deviation of order a, and the decoder's residual likewise is of order 1.
    assert abs(found.prior - terms[0].item()) < 1e-3 * teacher.schedule.alpha_bars[-1].item() ** 0.5
    assert abs(found.decoder - terms[-1].item()) < SIGMAS * deviation
    assert found.bits_per_dimension == pytest.approx(found.prior + sum(found.steps) + found.decoder, abs=1e-12)
    assert (found.images, found.evaluations, len(found.steps)) == (n, n * steps, steps - 1)


def test_the_optimal_variance_is_tight_at_any_number_of_steps():
    """Data of one variance: the true reverse transitions are Gaussian, and only the prior's mismatch is left."""
    teacher = gaussian_teacher()
    a, (v, _), m = teacher.schedule.alpha_bars[-1].item(), teacher.variances.tolist(), teacher.mean
    mismatch = gaussian_kl(a * m.square(), a * v + 1 - a, 1.0).mean().item() / math.log(2)
    for steps in (2, 5, 50):
        assert expected(teacher, steps, "analytic")[0].sum().item() == pytest.approx(entropy(teacher) + mismatch, abs=1e-9)
        found = variational_bound(teacher, teacher.data(4000, seed=1), steps, variance="analytic", batch_size=1000)
        low, high = found.interval
        assert low - (high - low) / 2 < entropy(teacher) + mismatch < high + (high - low) / 2


def test_more_steps_come_nearer_to_the_truth_from_above():
    teacher, counts = gaussian_teacher(), (3, 10, 30, 100, 300)
    images = teacher.data(2000, seed=2)
    found = [variational_bound(teacher, images, steps, batch_size=1000) for steps in counts]
    bounds = [bound.bits_per_dimension for bound in found]
    assert bounds == sorted(bounds, reverse=True)
    assert all(bound.interval[1] > entropy(teacher) for bound in found)
    exact = [expected(teacher, steps, "fixed_small")[0].sum().item() - entropy(teacher) for steps in (*counts, 1000)]
    assert exact == sorted(exact, reverse=True) and 0 < exact[-1] < exact[0] / 10


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "analytic"])
def test_an_expected_bound_is_never_below_the_truth(kind):
    """The closed form that the terms are compared with, at data narrow and wide, and chains short and long."""
    for variance in ((0.01, 0.01), (0.2, 0.2), (0.05, 0.8), (3.0, 1.0)):
        for schedule in (Schedule.linear(), Schedule.cosine(), Schedule.edm()):
            teacher = gaussian_teacher(variance=variance, schedule=schedule)
            for steps in (2, 10, 100):
                assert expected(teacher, steps, kind)[0].sum().item() > entropy(teacher)


def test_a_mixture_is_never_below_its_likelihood():
    """Two Gaussians in one dimension: p(x0) is known for every sample, and the reverse transitions are not Gaussian."""
    teacher = MixtureTeacher.from_preset("two-gaussians")
    images = teacher.data(3000, seed=3)
    parts = [log_density(images, mean, teacher.variance) for mean in teacher.means[:, 0]]
    truth = torch.stack(parts).logsumexp(0)[:, 0] / math.log(2) - 1
    gaps = []
    for steps in (3, 30, 200):
        bound = VariationalBound(teacher, steps, 0, "analytic")
        gap = bound.terms(images).sum(1) + truth
        assert gap.shape == (3000,)
        assert gap.mean() > -SIGMAS * gap.std() / math.sqrt(len(gap))
        gaps.append(gap.mean().item())
    assert gaps[0] > 3 * gaps[1] > 0 and gaps[2] < gaps[1]


def test_pixels_of_gaussian_data():
    """The bound on 8-bit pixels is above the truth, and the logarithm of a bin's width above that on densities."""
    teacher = gaussian_teacher((0.1, -0.2), (0.04, 0.04))
    values = teacher.data(3000, seed=4).clamp(-1, 1)
    pixels = ((values + 1) * 127.5).round().to(torch.uint8)
    truth = -log_probability(pixels.double(), teacher.mean.expand(3000, 2), 0.04).mean(1) / math.log(2)
    for kind, steps in (("analytic", 100), ("fixed_small", 1000)):
        gap = VariationalBound(teacher, steps, 0, kind).terms(pixels).sum(1) - truth
        error = SIGMAS * gap.std().item() / math.sqrt(len(gap))
        # Densities' gap, and a hundredth of a bit for the bins, of a twentieth of the data's deviation.
        most = expected(teacher, steps, kind)[0].sum().item() - entropy(teacher) + 0.01
        assert -error < gap.mean().item() < most + error
    density = VariationalBound(teacher, 100, 0, "analytic").terms(pixels.double() / 127.5 - 1)
    wide = VariationalBound(teacher, 100, 0, "analytic").terms(pixels)
    assert torch.equal(density[:, 1:-1], wide[:, 1:-1])
    # The decoder's deviation is 2.5 half bins here: a bin's mass is its density times its width to a few per cent.
    assert abs((wide - density).sum(1).mean().item() + math.log2(2 / 255)) < 0.1


def test_kl_divergence_against_quadrature():
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    for difference, variance, other in ((0.0, 1.0, 1.0), (0.7, 0.3, 1.2), (-2.0, 1.5, 0.8)):
        p, q = log_density(x, torch.zeros(()), variance), log_density(x, torch.tensor(difference), other)
        integral = torch.trapezoid(p.exp() * (p - q), x).item()
        assert gaussian_kl(torch.tensor(difference).double() ** 2, variance, other).item() == pytest.approx(integral, abs=1e-8)


@pytest.mark.parametrize("deviation", [1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.37, 0.0, 1 / 255, 0.999, 1.0, 2.0])
def test_bins_sum_to_one(mean, deviation):
    pixels = torch.arange(256).double()
    masses = log_probability(pixels, torch.full((256,), mean).double(), deviation**2)
    assert torch.isfinite(masses).all() and (masses <= 0).all()
    assert masses.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_bins_and_their_open_ends():
    normal = torch.distributions.Normal(torch.tensor(0.2).double(), torch.tensor(0.5).double())
    edges = (torch.arange(1, 256).double() - 0.5) / 127.5 - 1
    cumulative = torch.cat((torch.zeros(1), normal.cdf(edges), torch.ones(1))).double()
    masses = log_probability(torch.arange(256).double(), torch.full((256,), 0.2).double(), 0.25)
    assert torch.allclose(masses.exp(), cumulative.diff(), atol=1e-15, rtol=1e-10)
    # Far in both tails, by Mills' ratio: phi(z) (1 / z - 1 / z^3) < Q(z) < phi(z) / z.
    for pixel, mean in ((0, 1.0), (255, -1.0)):
        z = (2 - 1 / 255) / 0.01
        mass = log_probability(torch.tensor([pixel]).double(), torch.tensor([mean]).double(), 1e-4).item()
        most = -(z**2) / 2 - math.log(z) - 0.5 * math.log(2 * math.pi)
        assert most + math.log1p(-1 / z**2) - 1e-8 < mass < most + 1e-8


def test_a_network_against_the_equation_of_ddpm():
    """Ho et al. 2020, eq. 12: beta^2 / (2 sigma^2 alpha (1 - a)) |eps - eps_theta|^2, by the UNet itself."""
    teacher, seen = tiny_teacher(8, clip_sample=False), []
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hook = teacher.unet.register_forward_pre_hook(lambda module, given: seen.append([tensor.clone() for tensor in given]))
    terms = VariationalBound(teacher, seed=7).terms(images)
    hook.remove()
    betas, bars = teacher.scheduler.betas.double(), teacher.scheduler.alphas_cumprod.double()
    for i, t in enumerate(range(7, 0, -1)):
        state, timesteps = seen[i]
        assert torch.equal(timesteps, torch.full((3,), float(t)))
        eps = (state.double() - bars[t].sqrt() * images.double()) / (1 - bars[t]).sqrt()
        predicted = teacher.unet(state, t).sample.double()
        variance = betas[t] * (1 - bars[t - 1]) / (1 - bars[t])
        weight = betas[t] ** 2 / (2 * variance * (1 - betas[t]) * (1 - bars[t]))
        wanted = weight * (eps - predicted).square().flatten(1).mean(1) / math.log(2)
        # x0 is computed in float32 as (x - sqrt(1 - a) eps) / sqrt(a).
        assert torch.allclose(terms[:, i + 1], wanted, rtol=1e-4)


def test_clamped_images_and_the_scheduler_s_variance():
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    free, clamped, large = (
        variational_bound(tiny_teacher(20, **options), images).bits_per_dimension
        for options in ({"clip_sample": False}, {}, {"variance_type": "fixed_large"})
    )
    assert clamped < free and large != clamped
    named = variational_bound(tiny_teacher(20), images, variance="fixed_large").bits_per_dimension
    assert named == large


@pytest.mark.parametrize("coordinates", ["vp", "ve"])
def test_noise_depends_on_seed_index_and_timestep_alone(coordinates):
    teacher = gaussian_teacher(coordinates=coordinates)
    images = teacher.data(10)
    whole = VariationalBound(teacher, 12, seed=3).terms(images)
    parts = torch.cat([VariationalBound(teacher, 12, seed=3).terms(images[i : i + 3], i) for i in range(0, 10, 3)])
    assert torch.allclose(whole, parts, rtol=1e-12, atol=0)
    assert torch.allclose(whole, VariationalBound(gaussian_teacher(), 12, seed=3).terms(images), rtol=1e-9, atol=0)
    other = VariationalBound(teacher, 12, seed=4).terms(images)
    assert torch.equal(whole[:, 0], other[:, 0]) and not torch.isclose(whole[:, 1:], other[:, 1:], rtol=1e-9, atol=0).any()
    alike = VariationalBound(teacher, 12, seed=3).terms(images[:1].expand(10, 2))
    assert len(alike[:, 1].unique()) == 10


def noise_seen(steps):
    """``{timestep: noise of the state that the teacher was shown}``."""
    teacher, seen = gaussian_teacher(), {}
    images, predict = teacher.data(5), teacher.predict

    def spy(x, sigma, condition):
        alpha = 1 / math.hypot(1, sigma)
        seen[round(teacher.schedule.t(sigma).item())] = (x - alpha * images) / (sigma * alpha)
        return predict(x, sigma, condition)

    teacher.predict = spy
    VariationalBound(teacher, steps, seed=3).terms(images)
    return seen


def test_every_timestep_has_noise_of_its_own():
    """It is that of the same timestep in a chain of another length, and differs from that which samplers start from."""
    short, long = noise_seen(4), noise_seen(10)
    assert list(short) == [999, 666, 333, 0] and set(short) < set(long) and len(long) == 10
    assert all(torch.allclose(noise, long[t], atol=1e-10) for t, noise in short.items())
    start = gaussian_teacher().noise(5, seed=3)
    drawn = torch.stack([start, *long.values()])
    assert len(drawn[:, 0, 0].round(decimals=6).unique()) == 11


def test_classes():
    teacher = MixtureTeacher.from_preset("two-gaussians")
    images = teacher.means.repeat(50, 1)
    labels = torch.arange(100) % 2
    right, wrong, none = (
        variational_bound(teacher, images, 20, labels=chosen, batch_size=30).bits_per_dimension
        for chosen in (labels, 1 - labels, None)
    )
    assert right < none < wrong
    assert variational_bound(teacher, images[::2], 20, labels=0) == variational_bound(
        teacher, images[::2], 20, labels=labels[::2]
    )
    with pytest.raises(InputError, match=r"labels must be in \[0, 2\)"):
        variational_bound(teacher, images, 20, labels=2)
    teacher.null_class = None
    with pytest.raises(InputError, match="no null class"):
        variational_bound(teacher, images, 20)


@pytest.mark.parametrize("default", [torch.bfloat16, "meta"], ids=str)
def test_other_defaults_of_torch(default):
    teacher, pixels = gaussian_teacher(), torch.tensor([[0, 90], [255, 128]], dtype=torch.uint8)
    wanted = variational_bound(teacher, pixels, 5)
    with other_default(default):
        assert variational_bound(teacher, pixels, 5) == wanted


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": torch.zeros(3, 3)}, r"images must be \(N, 2\) with N >= 2, got \(3, 3\)"),
        ({"images": torch.zeros(1, 2)}, "with N >= 2"),
        ({"images": torch.zeros(3, 2, dtype=torch.int64)}, "uint8 pixels or float32 or float64 values, got torch.int64"),
        ({"images": torch.full((3, 2), math.nan)}, "images must be finite"),
        ({"images": [[0, 0], [0, 0]]}, "images must be a tensor"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"steps": 1001}, "steps must be at least 2 and below 1001"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"variance": "learned"}, "variance must be one of fixed_small, fixed_small_log, fixed_large, analytic"),
        ({"labels": 0}, "is unconditional"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"teacher": gaussian_teacher(schedule=Schedule([1.0, 0.5, 0.1]))}, "none 0 or 1"),
        ({"teacher": gaussian_teacher(schedule=Schedule([0.9, 0.5, 0.0]))}, "none 0 or 1"),
        ({"teacher": gaussian_teacher(schedule=Schedule([0.9, 0.5, 0.5]))}, "whose alpha_bars differ"),
        ({"teacher": gaussian_teacher(schedule=Schedule([0.9]))}, "two timesteps or more|at least 2"),
    ],
)
def test_refusals(changes, message):
    arguments = {"teacher": gaussian_teacher(), "images": torch.zeros(3, 2), **changes}
    with pytest.raises(InputError, match=message):
        variational_bound(**arguments)


def test_a_teacher_without_noise_power_has_no_optimal_variance():
    with pytest.raises(InputError, match="variance analytic: teacher tiny: its noise power is not known"):
        variational_bound(tiny_teacher(20), torch.zeros(2, 1, 8, 8), variance="analytic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny teacher of 10 timesteps and 20 pictures of its size."""
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("likelihood")
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=10)).save_pretrained(root / "teacher")
    pixels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (root / "pictures").mkdir()
    for i, picture in enumerate(to_pil(pixels)):
        save_image(picture, root / "pictures" / f"{i:02d}.png")
    return root


def kept(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("terms-*")}


def without_provenance(result):
    return {key: value for key, value in json.loads(json.dumps(result)).items() if key != "provenance"}


def test_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    """A run that dies in its second batch keeps the first; a larger one computes the further images alone."""
    monkeypatch.setattr(run, "BATCH_SIZE", 4)
    arguments = (folder / "teacher", folder / "pictures")
    wanted = evaluate_likelihood(*arguments, LikelihoodConfig(num=10), tmp_path / "at-once", progress=False)
    write, written = run.write_tensors, []

    def dying(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(run, "write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_likelihood(*arguments, LikelihoodConfig(num=10), tmp_path / "out", progress=False)
    first = kept(tmp_path / "out")
    assert list(first) == ["terms-000000-04.safetensors"] and not (tmp_path / "out" / "likelihood.json").exists()
    monkeypatch.setattr(run, "write_tensors", write)
    found = evaluate_likelihood(*arguments, LikelihoodConfig(num=10), tmp_path / "out", progress=False)
    assert without_provenance(found) == without_provenance(wanted)
    assert found == json.loads((tmp_path / "out" / "likelihood.json").read_text()) | {"likelihood": found["likelihood"]}
    before = kept(tmp_path / "out")
    assert first.items() <= before.items() and len(before) == 3
    more = evaluate_likelihood(*arguments, LikelihoodConfig(num=20), tmp_path / "out", progress=False)
    assert before.items() <= kept(tmp_path / "out").items() and len(kept(tmp_path / "out")) == 6
    fresh = evaluate_likelihood(*arguments, LikelihoodConfig(num=20), tmp_path / "fresh", progress=False)
    assert without_provenance(more) == without_provenance(fresh)
    with pytest.raises(InputError, match="holds batches of an evaluation whose images, seed differ: name another folder"):
        evaluate_likelihood(*arguments, LikelihoodConfig(num=10, seed=1, steps=10), tmp_path / "out", progress=False)


def test_altered_batches_are_refused(folder, tmp_path):
    arguments = (folder / "teacher", folder / "pictures", LikelihoodConfig(num=3, steps=2), tmp_path)
    evaluate_likelihood(*arguments, progress=False)
    (path,) = tmp_path.glob("terms-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name} is altered: delete it and run the same command again"):
        evaluate_likelihood(*arguments, progress=False)


def test_it_is_the_bound_of_the_chosen_pictures(folder, tmp_path):
    config = LikelihoodConfig(num=6, steps=4, seed=2, variance="fixed_large")
    found = evaluate_likelihood(folder / "teacher", folder / "pictures", config, tmp_path, progress=False)["likelihood"]
    rows = DataOrder(20, 2).rows(0, 6)
    assert len(set(rows)) == 6
    images = read_pictures(folder / "pictures", "--images")[rows]
    wanted = variational_bound(Teacher.from_pretrained(folder / "teacher"), images, 4, 2, variance="fixed_large")
    assert found["bits_per_dimension"] == pytest.approx(wanted.bits_per_dimension, rel=1e-5)
    assert found["timesteps"] == (9, 6, 3, 0) == wanted.timesteps


def test_command_line(folder, tmp_path):
    options = ("--teacher", folder / "teacher", "--num", 5, "--steps", 3, "--seed", 4, "--out", tmp_path / "out")
    done = CliRunner().invoke(main, ["evaluate", "--likelihood", *map(str, options)])
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    found = result["likelihood"]
    low, high = found["interval"]
    assert (
        f"at most {found['bits_per_dimension']:.4f} bits per dimension (95 % interval {low:.4f} to {high:.4f})" in done.stdout
    )
    assert f"on 5 images, 3 steps, variance fixed_small: prior {found['prior']:.4f}, steps" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert result["config"] == {"num": 5, "steps": 3, "seed": 4, "variance": ""} and result["images"]["source"] == "digits"
    assert np.isfinite(found["steps"]).all() and found["evaluations"] == 15


@pytest.mark.parametrize(
    "options, message",
    [
        (["--likelihood"], "--out is missing: name a folder for likelihood.json"),
        (["--likelihood", "--student", "digits"], "--student does not go with --likelihood"),
        (["--likelihood", "--teacher-samples", "x"], "--teacher-samples does not go with --likelihood"),
        (["--likelihood", "--images", "x", "--reference", "y"], "--reference does not go with --likelihood"),
        (["--likelihood", "--extractor", "digits"], "--extractor does not go with --likelihood"),
        (["--likelihood", "--num", "1"], "num must be at least 2"),
        (["--likelihood", "--num", "many"], "num must be a whole number"),
        (["--likelihood", "--num", "21"], "holds 20 images, --num 21 are needed: lower --num"),
        (["--likelihood", "--steps", "1"], r"steps must be 0 .* or at least 2"),
        (["--likelihood", "--steps", "11"], "steps must be at least 2 and below 11"),
        (["--likelihood", "--variance", "x"], "variance must be one of"),
        (["--likelihood", "--seed", "-1"], "seed must be in"),
        (["--steps", "5"], "--steps goes with --likelihood only"),
        (["--variance", "analytic"], "--variance goes with --likelihood only"),
    ],
)
def test_options_that_do_not_go_together(options, message, folder, tmp_path):
    if "--images" not in options and "--student" not in options and options[0] == "--likelihood":
        options = [*options, "--images", str(folder / "pictures"), "--teacher", str(folder / "teacher")]
    if len(options) > 5:
        options = [*options, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["evaluate", *options])
    assert done.exit_code == 2
    assert done.stderr.startswith("advkd: ") and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_data_and_noise_of_one_seed_are_independent():
    """With the analytic variance the bound of narrow Gaussian data is their entropy, whatever the seeds."""
    variance = 1e-4
    teacher = GaussianTeacher(torch.zeros(2), torch.full((2,), variance))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * variance)
    for seed in (0, 1):
        found = variational_bound(teacher, teacher.data(4000, seed), 10, seed=0, variance="analytic")
        low, high = found.interval
        assert low - 0.02 < entropy < high + 0.02, (seed, found.bits_per_dimension, entropy)
