"""Progressive distillation: affine students of Gaussian data keep the sampler's map; saved rounds run in diffusers."""

import copy
import math

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import Denoiser, noised, vp_weights
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.progressive import WEIGHTS, Progressive, ProgressiveConfig, ddim_step, matching_x0, nested_levels
from advkd.models.denoiser import DenoiserNetwork
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher, tiny_unet

FLOAT64 = {"dtype": torch.float64, "progress": False}
TEACHER = GaussianTeacher(torch.tensor([1.0, -1.0]), torch.tensor([0.25, 4.0]), Schedule.cosine(8))


class Affine(torch.nn.Module):
    """v by a gain and an offset of every timestep and dimension."""

    def __init__(self, timesteps, gain=0.0):
        super().__init__()
        self.gain, self.offset = (torch.nn.Parameter(torch.full((timesteps, 2), g).double()) for g in (gain, 0.0))

    def forward(self, x, t, condition):
        assert torch.equal(t, t.round())
        return self.gain[t.long()] * x + self.offset[t.long()]


def tiny_student(seed=0, timesteps=1000, **options):
    """A tiny network of v prediction, as it begins."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=timesteps, prediction_type="v_prediction")
    return DenoiserStudent.from_teacher(Teacher(tiny_unet(seed=seed, **options), scheduler))


def tiny_images(n=20):
    return 2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


def tiny_run(data, out, seed=0, weights=0, **options):
    """Two rounds of three updates; the killed run goes on within the second one."""
    config = ProgressiveConfig(updates=3, rounds=(2, 1), batch_size=4, ema=0.5, checkpoint_every=2, seed=seed)
    return DenoiserDistiller("progressive", config, tiny_student(weights), out, None, tiny_images(), **options)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walked(predict, x, sigmas):
    """DDIM along levels, from the noise on."""
    for sigma, following in zip(sigmas, sigmas[1:]):
        x = ddim_step(predict, x, sigma, following)
    return x


def test_every_round_keeps_the_samplers_map(tmp_path):
    """Targets of affine students are affine: nothing is lost, and Adam's error has the size of its last learning rates.

    Its rate falls to 0, and the error of 400 updates is below 1e-5; DDIM in fewer steps is 0.1 away.
    """
    config = ProgressiveConfig(updates=400, rounds=(4, 2, 1), batch_size=16, learning_rate=0.05, clip=0.0)
    method = Progressive(config, Affine(8), TEACHER.schedule)
    rounds, x = [], normal(50, 2)
    run = Trainer(
        method,
        Tensors(images=TEACHER.data(256)),
        TEACHER,
        tmp_path,
        save_stage=lambda network, out, stage: rounds.append(copy.deepcopy(network)),
        **FLOAT64,
    )
    run.run()
    wanted = walked(TEACHER.predict, x, method.sigmas)
    for steps, network in zip(config.rounds, rounds, strict=True):
        found = walked(method.denoiser(network).predict, x, method.sigmas[:: 8 // steps])
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5), (steps, (found - wanted).abs().max())
        fewer = walked(TEACHER.predict, x, method.sigmas[:: 8 // steps])
        assert (fewer - wanted).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_one_step_with_the_target_is_the_teachers_two(seed):
    """For any network and any levels, the image's among them; the division costs at most 1 / (alpha' - r alpha) roundings."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    sigmas = (3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).exp().sort(dim=0, descending=True).values
    sigmas[2, 0] = 0.0
    start, middle, end = sigmas
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def predict(x, sigma, condition):
        hidden = torch.tanh(x @ weights[0] + sigma.log1p()[:, None])
        return hidden @ weights[1], hidden - x

    halfway = ddim_step(predict, x, start, middle)
    wanted = ddim_step(predict, halfway, middle, end)
    target = matching_x0(x, wanted, start, end)

    def student(x, sigma, condition):
        alpha, noise = (weight[:, None] for weight in vp_weights(sigma))
        return target, (x - alpha * target) / noise

    found = ddim_step(student, x, start, end)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)
    # At the image the target is the teacher's x0.
    assert torch.equal(target[0], wanted[0])


def saturated_student():
    """A tiny student whose x0 leaves [-1, 1]."""
    student = tiny_student()
    with torch.no_grad():
        for parameter in student.model.unet.parameters():
            parameter.mul_(1.5)
    return student


def test_a_student_teaches_the_steps_that_it_draws():
    """Clamped x0, own eps: two steps as the next round computes them are the sampler's, within float32 roundings."""
    student = saturated_student()
    model, network = student.model, DenoiserNetwork(student.model.unet)
    method = Progressive(ProgressiveConfig(rounds=(1,)), network, model.schedule)
    noise = student.latents(3, seed=1)
    with torch.no_grad():
        assert (method.denoiser(network).predict(noise, method.sigmas[0])[0].abs() > model.clip).any()
        found = walked(method.denoiser(network, model.clip).predict, noise, method.sigmas)
    wanted = model.sample(3, 1, Solver("ddim", spacing="trailing"), 2)
    assert torch.allclose(found.clamp(-1, 1), wanted, rtol=0, atol=2e-5)


def test_an_update_regresses_on_these_steps(tmp_path):
    """The loss of a first update from its own draws: a target that is clamped, a student that is not."""
    student, images = saturated_student(), tiny_images(6)
    config = ProgressiveConfig(updates=1, rounds=(2,), batch_size=6, weight="truncated")
    run = DenoiserDistiller("progressive", config, student, tmp_path, None, images, **FLOAT64)
    network, method = copy.deepcopy(run.running["round"].part.module), run.method
    draw = Draw(0, 0, 6, "cpu", torch.float64)
    level = 2 * draw.integers("level", 2)
    start, middle, end = (method.sigmas[level + i] for i in range(3))
    x = noised(images.double()[run.rows(0, 6)], draw.normal("x_t", 1, 8, 8), start)
    clamped, free = method.denoiser(network, 1.0).predict, method.denoiser(network).predict
    with torch.no_grad():
        wanted = ddim_step(clamped, ddim_step(clamped, x, start, middle), middle, end)
        errors = (free(x, start)[0] - matching_x0(x, wanted, start, end)).square().mean(dim=(1, 2, 3))
    loss = (errors * (start**-2).clamp_min(1)).mean().item()
    assert run.step()["loss"] == pytest.approx(loss, rel=1e-12)


def test_weights_choose_among_the_errors_of_a_network():
    """The error of v at one state is that of x0 and of eps at their rates: SNR + 1, and the larger one is max(1, SNR)."""
    sigma = torch.tensor([0.01, 0.5, 1.0, 3.0, 150.0], dtype=torch.float64)
    x = normal(5, 1)
    first, second = (Denoiser(lambda x, t, c, v=v: v, Schedule.linear(), "v_prediction") for v in (normal(5, 1, seed=1), x))
    x0, eps = ((a - b).square().flatten() for a, b in zip(first.predict(x, sigma), second.predict(x, sigma)))
    v = (normal(5, 1, seed=1) - x).square().flatten()
    snr = sigma**-2
    assert torch.allclose(WEIGHTS["snr_plus_one"](snr) * x0, v, rtol=1e-11)
    assert torch.allclose(WEIGHTS["truncated"](snr) * x0, torch.maximum(x0, eps), rtol=1e-11)
    assert torch.equal(WEIGHTS["x0"](snr) * x0, x0)


def test_levels_are_nested_and_the_samplers():
    schedule = Schedule.linear()
    sigmas = nested_levels(schedule, (8, 4, 2, 1))
    assert len(sigmas) == 17 and sigmas[-1] == 0
    for steps in (16, 8, 4, 2, 1):
        assert [level.sigma for level in schedule.levels("trailing", steps)] == sigmas[:-1][:: 16 // steps].tolist()


def test_rounds_are_taught_by_the_average_of_the_round_before(tmp_path):
    config = ProgressiveConfig(updates=3, last_updates=2, rounds=(4, 2, 1), batch_size=4, ema=0.5)
    method = Progressive(config, Affine(8, 0.1), TEACHER.schedule)
    assert [stage.updates for stage in method.stages()] == [3, 2, 2]
    assert [method.folder(stage) for stage in method.stages()] == ["4", "2", "1"]
    run = Trainer(method, Tensors(images=TEACHER.data(16)), None, tmp_path, **FLOAT64)
    assert set(run.running) == {"student", "round"}
    assert torch.equal(run.running["round"].part.module.gain, run.running["student"].part.module.gain)
    for updates in (3, 2):
        before, average = run.running["student"], run.running["student"].average
        for _ in range(updates):
            run.step()
        now = run.running
        assert now["round"].part.module is average and not average.gain.requires_grad
        assert not torch.equal(average.gain, before.part.module.gain)
        # The next student begins at the average, with an optimiser and an average of its own.
        assert torch.equal(now["student"].part.module.gain, average.gain)
        assert now["student"].average is not average and not now["student"].optimizer.state


def test_a_teacher_teaches_the_first_round_alone(tmp_path):
    config = ProgressiveConfig(updates=1, rounds=(2, 1), batch_size=4)
    run = Trainer(
        Progressive(config, Affine(8, 0.1), TEACHER.schedule), Tensors(images=TEACHER.data(16)), TEACHER, tmp_path, **FLOAT64
    )
    assert set(run.running) == {"student"}
    run.step()
    assert set(run.running) == {"student", "round"}


def test_folders_of_rounds_run_in_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    config = ProgressiveConfig(updates=2, rounds=(4, 2), batch_size=4, ema=0.9)
    start = tiny_student()
    result = distill_denoiser("progressive", config, start, tmp_path, data=tiny_images(), progress=False)
    assert result.sampler == Sampler(Solver("ddim", spacing="trailing"), 2) and result.evaluations == 2
    for steps in config.rounds:
        student = DenoiserStudent.from_pretrained(tmp_path / str(steps))
        assert student.sampler.steps == steps
        noise = student.latents(3, seed=5)
        monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise.clone())
        pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / str(steps))
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(3, num_inference_steps=steps, output_type="np").images
        # diffusers rounds in float32 at every step, and maps [-1, 1] to [0, 1].
        wanted = student.sample(3, seed=5).permute(0, 2, 3, 1) / 2 + 0.5
        assert torch.allclose(torch.from_numpy(drawn), wanted, rtol=0, atol=1e-5)
    last = DenoiserStudent.from_pretrained(tmp_path / "2")
    assert torch.equal(last.sample(3, seed=5), result.sample(3, seed=5))
    # Three evaluations forward and one backward of 4 samples in 2 updates a round.
    runs = [DenoiserStudent.from_pretrained(tmp_path / str(n)).training_record["runs"] for n in config.rounds]
    assert [run[-1]["cost"] for run in runs] == [{"forward": 24, "backward": 8}, {"forward": 48, "backward": 16}]


def test_a_student_told_classes_learns_them_and_none(tmp_path):
    """Labels reach student and teacher alike, the null class at its share."""
    config = ProgressiveConfig(updates=1, rounds=(1,), batch_size=2000, drop=0.2)
    seen = []

    class Told(Affine):
        def forward(self, x, t, condition):
            seen.append(condition)
            return super().forward(x, t, condition)

    method = Progressive(config, Told(8), TEACHER.schedule)
    method.num_classes, method.null_class = 3, 3
    assert method.needs().labels
    labels = torch.arange(2000) % 3
    data = Tensors(images=TEACHER.data(2000), labels=labels)
    Trainer(method, data, None, tmp_path, **FLOAT64).run()
    assert len(seen) == 3 and all(torch.equal(told, seen[0]) for told in seen)
    share = (seen[0] == 3).double().mean().item()
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)
    assert set(seen[0].tolist()) == {0, 1, 2, 3}


def test_bad_rounds_and_numbers_are_refused(tmp_path):
    for rounds in ((), (4, 3), (4, 2, 0), (1, 2), (0,)):
        with pytest.raises(InputError, match="rounds must be numbers of steps, each half"):
            Progressive(ProgressiveConfig(rounds=rounds), Affine(8), TEACHER.schedule)
    with pytest.raises(InputError, match="rounds: .* 16 steps on a schedule of 8 timesteps: begin with at most 4"):
        Progressive(ProgressiveConfig(), Affine(8), TEACHER.schedule)
    with pytest.raises(InputError, match="rounds: the schedule's levels repeat"):
        Progressive(ProgressiveConfig(rounds=(1,)), Affine(2), Schedule([0.5, 0.5]))
    for name, value in {"last_updates": -1, "weight": "snr", "drop": 1.0, "updates": 0}.items():
        with pytest.raises(InputError, match=name):
            Progressive(ProgressiveConfig(**{name: value}), Affine(8), TEACHER.schedule)


def test_students_and_teachers_that_do_not_fit_are_refused(tmp_path):
    images, config, out = tiny_images(), ProgressiveConfig(updates=1, rounds=(1,), batch_size=2), tmp_path / "out"
    with pytest.raises(InputError, match="weights are of epsilon: run 'advkd distill reparametrize'"):
        distill_denoiser("progressive", config, DenoiserStudent.from_teacher(tiny_teacher()), out, data=images)
    with pytest.raises(InputError, match="needs images: name them by --data"):
        distill_denoiser("progressive", config, tiny_student(), out)
    with pytest.raises(InputError, match="draws images"):
        distill_denoiser("progressive", config, tiny_student(), out, teacher=tiny_teacher(channels=3), data=images)
    with pytest.raises(InputError, match="different noise schedules"):
        distill_denoiser("progressive", config, tiny_student(timesteps=100), out, teacher=tiny_teacher(), data=images)
    assert not out.exists()


def test_a_run_does_not_go_on_with_other_rounds(tmp_path):
    run = tiny_run(None, tmp_path, progress=False)
    run.step()
    run._write_checkpoint(None)
    other = ProgressiveConfig(updates=3, rounds=(4, 2), batch_size=4, ema=0.5, checkpoint_every=2)
    with pytest.raises(InputError, match="rounds"):
        DenoiserDistiller("progressive", other, tiny_student(), tmp_path, None, tiny_images(), resume=True, progress=False)
