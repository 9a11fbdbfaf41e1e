"""Guided distillation: the weight of guidance is learnt, then the guided sampler's map is kept, round by round."""

import copy
import math

import pytest
import torch

from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import vp_weights
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.loading import Classes
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.guided import Guided, GuidedConfig
from advkd.methods.progressive import ddim_step
from advkd.models.denoiser import pack
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_unet
from ..diffusion.runs import Hierarchy, double

FLOAT64 = {"dtype": torch.float64, "progress": False}
TEACHER = Hierarchy(0.3, 0.8, Schedule.cosine(8))
MOST = 2.0
WEIGHTS = double([0.0, 0.5, 1.3, 2.0, 0.0, 2.0])
CLASSES = torch.tensor([0, 0, 0, 0, 1, 1])
"""Every class, the null class 1 among them, with small and large weights."""


class Told(torch.nn.Module):
    """v by a gain for every timestep and class that is a polynomial of the weight, in the basis of Legendre."""

    def __init__(self, degree):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(8, 2, degree + 1, dtype=torch.float64))

    def forward(self, x, t, condition):
        assert torch.equal(t, t.round())
        label, weight = condition[:, 0].long(), condition[:, 1]
        basis = [torch.ones_like(weight), 2 * weight / MOST - 1]
        while len(basis) < self.gain.shape[-1]:
            k = len(basis) - 1
            basis.append(((2 * k + 1) * basis[1] * basis[-1] - k * basis[-2]) / (k + 1))
        gain = self.gain[t.long(), label, :]
        return (gain * torch.stack(basis[: gain.shape[1]], dim=1)).sum(dim=1, keepdim=True) * x

    def begin_exactly(self):
        """The network that the first stage ends in, by the teacher's own formula."""
        with torch.no_grad():
            for t in range(8):
                level = TEACHER.schedule.level(float(t))
                conditional, unconditional = (
                    level.alpha * v / (level.alpha**2 * v + level.noise**2) for v in (TEACHER.v, TEACHER.v + TEACHER.s2)
                )
                # x0 = k x is v = (alpha - k) / noise x; (1 + w) k_c - w k_null = k_c + w (k_c - k_null).
                slope = -(conditional - unconditional) / level.noise * MOST / 2
                self.gain[t, 0, 0] = (level.alpha - conditional) / level.noise + slope
                self.gain[t, 0, 1] = slope
                self.gain[t, 1, 0] = (level.alpha - unconditional) / level.noise
        return self


def tiny_teacher(null=True, prediction="v_prediction", **options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    classes = Classes(("a", "b", "c"), 3 if null else None)
    return Teacher(tiny_unet(num_class_embeds=3 + null, **options), scheduler, "tiny", classes)


def tiny_data(n=20):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(n, 1, 8, 8, generator=generator) - 1, torch.arange(n) % 3


def tiny_run(data, out, seed=0, weights=0, **options):
    """Two updates of the first stage and four of a round, within which the killed run goes on."""
    config = GuidedConfig(
        first_updates=2, updates=4, rounds=(1,), batch_size=4, ema=0.5, checkpoint_every=2, seed=seed, sampler="stochastic"
    )
    start = DenoiserStudent.from_teacher(tiny_teacher(seed=weights))
    return DenoiserDistiller("guided", config, start, out, tiny_teacher(), tiny_data(), **options)


def trained(student, out, **changes):
    """Networks of all stages of a run on the exact teacher."""
    config = GuidedConfig(**{"guidance": MOST, "batch_size": 64, "learning_rate": 0.05, "clip": 0.0, "drop": 0.5, **changes})
    data = Tensors(images=normal(256, 1), labels=torch.zeros(256, dtype=torch.int64))
    method, found = Guided(config, student, TEACHER.schedule), []
    method.num_classes, method.null_class = TEACHER.num_classes, TEACHER.null_class
    save = lambda network, out, stage: found.append(copy.deepcopy(network))  # noqa: E731
    Trainer(method, data, TEACHER, out, save_stage=save, **FLOAT64).run()
    return method, found


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def guided(x, sigma, condition):
    return TEACHER.predict(x, sigma, condition[:, 0].long(), condition[:, 1])


def walked(predict, x, sigmas, condition):
    for sigma, following in zip(sigmas, sigmas[1:]):
        x = ddim_step(predict, x, sigma, following, condition)
    return x


def test_the_weight_is_learnt_exactly(tmp_path):
    """A student that is affine in w has the target among its functions: x0 = (1 + w) D(x, c) - w D(x)."""
    method, (first, _) = trained(Told(1), tmp_path, first_updates=400, updates=1, rounds=(1,))
    x, condition = normal(len(WEIGHTS), 1, seed=1), pack(CLASSES, guidance=WEIGHTS)
    for t in range(8):
        sigma = TEACHER.schedule.sigma(t).item()
        found, _ = method.denoiser(first).predict(x, sigma, condition)
        conditional, plain = (TEACHER.predict(x, sigma, labels)[0] for labels in (CLASSES, torch.ones_like(CLASSES)))
        wanted = conditional + WEIGHTS[:, None] * (conditional - plain)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), (t, (found - wanted).abs().max())
        assert (wanted - conditional)[CLASSES == 0].abs().max() > 1e-3


def test_rounds_keep_the_guided_samplers_map(tmp_path):
    """Four steps of the guided teacher are a polynomial of degree 4 in w, which students of that degree can be."""
    method, (first, *rounds) = trained(Told(4).begin_exactly(), tmp_path, first_updates=1, updates=500, rounds=(2, 1))
    x, condition = normal(len(WEIGHTS), 1, seed=1), pack(CLASSES, guidance=WEIGHTS)
    wanted = walked(guided, x, method.sigmas, condition)
    assert torch.allclose(walked(method.denoiser(first).predict, x, method.sigmas, condition), wanted, rtol=0, atol=1e-9)
    for steps, network in zip((2, 1), rounds, strict=True):
        found = walked(method.denoiser(network).predict, x, method.sigmas[:: 4 // steps], condition)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), (steps, (found - wanted).abs().max())
        assert (walked(guided, x, method.sigmas[:: 4 // steps], condition) - wanted).abs().max() > 0.03


def test_steps_of_the_stochastic_sampler_are_two_of_the_teachers_own(tmp_path):
    """A step passes two levels: from each of them the student goes where the teacher's double steps lead."""
    method, (_, four, two) = trained(
        Told(4).begin_exactly(), tmp_path, first_updates=1, updates=500, rounds=(4, 2), sampler="stochastic"
    )
    x, condition, sigmas = normal(len(WEIGHTS), 1, seed=1), pack(CLASSES, guidance=WEIGHTS), method.sigmas
    # By levels of the first teacher's eight: where a step begins, and the double steps that it stands for.
    for network, start, path in (
        (four, 0, (0, 2, 4)),
        (four, 2, (2, 4, 6)),
        (four, 4, (4, 6, 8)),
        (four, 6, (6, 8)),
        (two, 0, (0, 2, 4, 6, 8)),
        (two, 4, (4, 6, 8)),
    ):
        found = ddim_step(method.denoiser(network).predict, x, sigmas[start], sigmas[path[-1]], condition)
        wanted = walked(guided, x, sigmas[list(path)], condition)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), (path, (found - wanted).abs().max())


def test_ddim_of_the_guided_teacher_tends_to_its_flow():
    """y(sigma) goes with (v + sigma^2)^((1 + w) / 2) (v + s2 + sigma^2)^(-w / 2): the error halves with the steps."""
    v, s2, w = TEACHER.v, TEACHER.s2, WEIGHTS[1:4, None]
    sigma, errors = double([5.0, 0.1]), []

    def growth(sigma):
        return (v + sigma**2) ** ((1 + w) / 2) * (v + s2 + sigma**2) ** (-w / 2)

    x, condition = normal(3, 1), pack(CLASSES[1:4], guidance=WEIGHTS[1:4])
    for steps in (100, 200):
        path = torch.logspace(*sigma.log10().tolist(), steps + 1, dtype=torch.float64)
        scale = ((1 + sigma[0] ** 2) / (1 + sigma[1] ** 2)).sqrt()
        wanted = scale * x * growth(sigma[1]) / growth(sigma[0])
        errors.append((walked(guided, x, path, condition) - wanted).abs())
    assert ((errors[0] / errors[1]).log2() - 1).abs().max() < 0.1


def test_a_teacher_is_clamped_after_guidance():
    """(1 + w) D(x, c) - w D(x) of a network, of which neither term is clamped."""
    teacher, labels, weights = tiny_teacher(), torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 3.0, 2.0])
    x, sigma = normal(4, 1, 8, 8).float(), double([0.1, 1.0, 10.0, 100.0])
    free = teacher.denoiser
    free.clip = math.inf
    with torch.no_grad():
        conditional, plain = (free.predict(x, sigma, told)[0] for told in (labels, torch.full_like(labels, 3)))
    combined = torch.lerp(plain, conditional, (1 + weights).reshape(-1, 1, 1, 1))
    assert (combined.abs() > 1).any() and (conditional[2].abs() > 1).any()
    found, eps = teacher.predict(x, sigma, labels, weights)
    # The two evaluations are one batch here, which rounds otherwise; w multiplies their roundings.
    assert torch.allclose(found, combined.clamp(-1, 1), rtol=0, atol=2e-5)
    assert (
        found - torch.lerp(plain.clamp(-1, 1), conditional.clamp(-1, 1), (1 + weights).reshape(-1, 1, 1, 1))
    ).abs().max() > 0.1
    alpha, noise = (weight.reshape(-1, 1, 1, 1).float() for weight in vp_weights(sigma))
    assert torch.allclose(alpha * found + noise * eps, x, rtol=0, atol=1e-5)


def test_folders_of_all_stages(tmp_path):
    """``w`` is drawn by DDIM, rounds by their sampler; all take classes and weights, and can be begun with again."""
    teacher = tiny_teacher()
    config = GuidedConfig(guidance=3.0, first_updates=2, updates=2, rounds=(2, 1), batch_size=4, sampler="stochastic")
    start = DenoiserStudent.from_teacher(teacher)
    result = distill_denoiser("guided", config, start, tmp_path, teacher=teacher, data=tiny_data(), progress=False)
    samplers = {
        "w": Sampler(Solver("ddim", "trailing"), 4, 1.0),
        "2": Sampler(Solver("ddim-renoised", "trailing"), 2, 1.0),
        "1": Sampler(Solver("ddim-renoised", "trailing"), 1, 1.0),
    }
    for name, sampler in samplers.items():
        student = DenoiserStudent.from_pretrained(tmp_path / name)
        assert student.sampler == sampler and student.model.most_guidance == 3 and student.evaluations == sampler.steps
        images = student.sample(3, seed=1, labels=[0, 1, 2], guidance=2.0)
        assert images.isfinite().all() and not torch.equal(images, student.sample(3, seed=1, labels=[0, 1, 2]))
        with pytest.raises(InputError, match="guidance must be at most 3"):
            student.sample(3, labels=1, guidance=3.5)
    assert torch.equal(images, result.sample(3, seed=1, labels=[0, 1, 2], guidance=2.0))
    again = DenoiserStudent.from_pretrained(tmp_path / "w")
    assert Guided.begin(config, again) is again
    with pytest.raises(InputError, match="guidance must be at most 3, that of the student's own training, got 4"):
        Guided.begin(GuidedConfig(), again)
    with pytest.raises(InputError, match="takes a guidance weight itself"):
        distill_denoiser("guided", config, start, tmp_path / "x", teacher=again.model, data=tiny_data())


def test_training_begins_with_what_the_network_gave():
    """A condition that is added changes nothing at first, whatever the weight, and is the same in every process."""
    start = DenoiserStudent.from_teacher(tiny_teacher())
    start.training_record = {"runs": [], "samples": []}
    begun, other = (Guided.begin(GuidedConfig(guidance=3.0, seed=seed), start) for seed in (5, 6))
    wanted = start.sample(3, seed=1, labels=[0, 1, 2])
    for weight in (0.0, 3.0):
        assert torch.equal(begun.sample(3, seed=1, labels=[0, 1, 2], guidance=weight), wanted)
    state = torch.get_rng_state()
    again = Guided.begin(GuidedConfig(guidance=3.0, seed=5), start)
    assert torch.equal(torch.get_rng_state(), state) and begun.training_record is start.training_record
    assert begun.model.identity() == again.model.identity() != other.model.identity()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: tiny_teacher(null=False), "guidance: teacher tiny has no null class: train one"),
        (lambda: GaussianTeacher(torch.zeros(1), torch.ones(1), TEACHER.schedule), "guidance: teacher model is unconditional"),
    ],
)
def test_teachers_that_cannot_be_guided_are_refused(teacher, message, tmp_path):
    config, out = GuidedConfig(rounds=(1,), updates=1, first_updates=1, batch_size=4), tmp_path / "out"
    with pytest.raises(InputError, match=message):
        distill_denoiser(
            "guided", config, DenoiserStudent.from_teacher(tiny_teacher()), out, teacher=teacher(), data=tiny_data()
        )
    assert not out.exists()


def test_students_data_and_numbers_that_do_not_fit_are_refused(tmp_path):
    out, start, teacher = tmp_path / "out", DenoiserStudent.from_teacher(tiny_teacher()), tiny_teacher()
    small = GuidedConfig(rounds=(1,), updates=1, first_updates=1, batch_size=4)
    with pytest.raises(InputError, match="guided needs a teacher: name it by --teacher"):
        distill_denoiser("guided", small, start, out, data=tiny_data())
    with pytest.raises(InputError, match="data has no labels"):
        distill_denoiser("guided", small, start, out, teacher=teacher, data=tiny_data()[0])
    with pytest.raises(InputError, match=r"labels must be in \[0, 3\), got 0 to 4"):
        distill_denoiser("guided", small, start, out, teacher=teacher, data=(tiny_data()[0], torch.arange(20) % 5))
    with pytest.raises(InputError, match="weights are of epsilon: run 'advkd distill reparametrize'"):
        other = DenoiserStudent.from_teacher(tiny_teacher(prediction="epsilon"))
        distill_denoiser("guided", small, other, out, teacher=teacher, data=tiny_data())
    bad = {"guidance": 0.0, "first_updates": 0, "first_steps": -1, "sampler": "ddpm", "rounds": (3, 2)}
    for name, value in bad.items():
        with pytest.raises(InputError, match=name):
            distill_denoiser("guided", GuidedConfig(**{name: value}), start, out, teacher=teacher, data=tiny_data())
    with pytest.raises(InputError, match="steps must be between 1 and the schedule's 1000 timesteps, got 2000"):
        config = GuidedConfig(rounds=(1,), first_steps=2000)
        distill_denoiser("guided", config, start, out, teacher=teacher, data=tiny_data())
    assert not out.exists()
