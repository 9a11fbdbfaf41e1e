"""Teachers: loading and refusing, sampling, training."""

import copy
import functools
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from advkd.data.levels import supervising_timesteps
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.loading import CLASSES, Classes
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.diffusion.training_schedules import noise_scheduler
from advkd.errors import InputError
from advkd.methods.denoising import TeacherTrainingConfig
from advkd.training.teacher import build_unet, train_teacher
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher, tiny_unet


def copy_with(folder, target, file, **changes):
    """A copy of a teacher's folder with some keys of a JSON file changed."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_the_shipped_teacher():
    teacher = Teacher.from_pretrained("digits")
    assert (teacher.image_size, teacher.image_channels, teacher.train_timesteps) == (32, 1, 1000)
    assert teacher.num_parameters() == 1_085_937
    from advkd.diffusion.loading import EMBEDDED

    weights = EMBEDDED["digits"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 4 * 2**20
    image = teacher.sample(4, seed=1)
    assert 0.25 < (image < -0.8).float().mean() < 0.8 and 0.05 < (image > 0.5).float().mean() < 0.5


def test_folder_layouts(teacher_folder, tmp_path):
    pipeline = Teacher.from_pretrained(teacher_folder)
    # The hub's first repositories (google/ddpm-celebahq-256) keep everything beside model_index.json.
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (*(teacher_folder / "unet").iterdir(), *(teacher_folder / "scheduler").iterdir()):
        shutil.copy(path, flat)
    shutil.copy(teacher_folder / "model_index.json", flat)
    again = Teacher.from_pretrained(flat)
    assert {**pipeline.identity(), "name": ""} == {**again.identity(), "name": ""}
    assert torch.equal(pipeline.sample(2, steps=3), again.sample(2, steps=3))


def test_a_ddim_scheduler_is_taken(teacher_folder, tmp_path):
    folder = copy_with(teacher_folder, tmp_path / "t", "scheduler/scheduler_config.json", _class_name="DDIMScheduler")
    assert torch.equal(
        Teacher.from_pretrained(folder).sample(2, steps=3), Teacher.from_pretrained(teacher_folder).sample(2, steps=3)
    )


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae/config.json does not exist"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "conditional"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 0}, "num_class_embeds must be in"),
        ("unet/config.json", {"num_class_embeds": 10}, "do not fit the configuration"),
        ("unet/config.json", {"out_channels": 2}, "learned variance"),
        ("unet/config.json", {"sample_size": 48}, "sample_size 48"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "not a timestep"),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "flow"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ],
)
def test_unfit_teachers_are_refused(teacher_folder, tmp_path, file, changes, reason):
    with pytest.raises(InputError, match=reason):
        Teacher.from_pretrained(copy_with(teacher_folder, tmp_path / "t", file, **changes))


def conditional_folder(folder, classes=3):
    """A tiny foreign teacher that takes classes."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    diffusers.DDPMPipeline(tiny_unet(num_class_embeds=classes), scheduler).save_pretrained(folder)
    return folder


def test_foreign_conditional_teachers_have_numbered_classes(tmp_path):
    teacher = Teacher.from_pretrained(conditional_folder(tmp_path))
    assert teacher.classes == Classes(("0", "1", "2"), null=None)
    assert teacher.unet.config.num_class_embeds == 3
    (tmp_path / CLASSES).write_text(json.dumps({"names": ["ant", "bee"], "null": 2}))
    assert Teacher.from_pretrained(tmp_path).classes == Classes(("ant", "bee"), null=2)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ({"names": ["ant", "bee"], "null": None}, "3 names"),
        ({"names": ["ant", "bee", "cow"], "null": 3}, "2 names"),
        ({"names": ["ant", 1], "null": 2}, "2 names"),
        ({"names": "ab", "null": 2}, "2 names"),
        ({"names": ["ant", "bee"], "null": 0}, "null must be the number 2"),
        ({"names": ["ant", "bee"], "null": 2.0}, "null must be the number 2"),
        ({"names": ["ant", "bee"]}, "expected an object with names, null"),
    ],
)
def test_classes_that_do_not_fit_the_network_are_refused(tmp_path, classes, reason):
    (conditional_folder(tmp_path) / CLASSES).write_text(json.dumps(classes))
    with pytest.raises(InputError, match=reason):
        Teacher.from_pretrained(tmp_path)


def test_learned_embeddings_of_timesteps_are_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet(time_embedding_type="learned", num_train_timesteps=1000)
    assert isinstance(unet.time_proj, torch.nn.Embedding)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=1000)).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    for solver in ("ddim", "unipc", "heun"):
        assert teacher.sample(1, solver=solver, steps=4).isfinite().all()
    # A table has no timestep between two: some solvers and spacings need one.
    for solver in ("dpm-2", Solver("unipc", "karras")):
        with pytest.raises(InputError, match="whole timesteps only"):
            teacher.sample(1, solver=solver, steps=4)
    x, level = teacher.noise(2), teacher.schedule.level(500.0)
    assert teacher.predict(x, level.sigma)[0].isfinite().all()
    with pytest.raises(InputError, match="whole timesteps only"):
        teacher.predict(x, teacher.schedule.at_sigma(1.2345).sigma)


def test_older_weight_files_are_read(teacher_folder, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "t"
    shutil.copytree(teacher_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert (
        Teacher.from_pretrained(folder).identity()["weights_sha256"]
        == Teacher.from_pretrained(teacher_folder).identity()["weights_sha256"]
    )
    weights.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match="there is no unet/diffusion_pytorch_model.safetensors"):
        Teacher.from_pretrained(folder)


def test_incomplete_weights_are_refused(teacher_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "t"
    shutil.copytree(teacher_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "conv_in" not in k}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="conv_in"):
        Teacher.from_pretrained(folder)
    weights.with_name("config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json is not what advkd writes"):
        Teacher.from_pretrained(folder)


SAVED = {
    "safetensors": save_file,
    "bin": torch.save,
    "older bin": functools.partial(torch.save, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", SAVED)
def test_parts_hold_the_tensors_of_their_index(kind, teacher_folder, tmp_path):
    """A tensor that no part holds would keep its random initial values."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    unet, save, suffix = tmp_path / "teacher" / "unet", SAVED[kind], kind.split()[-1]
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    parts = {f"diffusion_pytorch_model-0000{i}-of-00002.{suffix}": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in parts.items():
        save({name: state[name].contiguous() for name in held}, unet / file)
    index = unet / f"diffusion_pytorch_model.{suffix}.index.json"
    weight_map = {name: file for file, held in parts.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = Teacher.from_pretrained(tmp_path / "teacher").unet.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in names)
    (file, held), *_ = parts.items()
    save({name + "x" * (name == held[0]): state[name].contiguous() for name in held}, unet / file)
    with pytest.raises(InputError, match=f"{file} lack {held[0]}, which {index.name} says"):
        Teacher.from_pretrained(tmp_path / "teacher")
    index.write_text(json.dumps({"weight_map": {**weight_map, held[0]: {}}}))
    with pytest.raises(InputError, match="may name .* files of its own folder only"):
        Teacher.from_pretrained(tmp_path / "teacher")


def test_a_schedule_without_an_end_is_named(teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True, "num_train_timesteps": 4}))
    with pytest.raises(InputError, match=f"{tmp_path / 'teacher'}: an epsilon prediction has no x0"):
        Teacher.from_pretrained(tmp_path / "teacher").sample(1, steps=4)


def test_missing_and_damaged_teachers_are_named(teacher_folder, tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        Teacher.from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be fetched from the hub"):
        Teacher.from_pretrained("someone/no-such-teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        Teacher.from_pretrained(tmp_path / "empty")
    folder = tmp_path / "t"
    shutil.copytree(teacher_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="weights cannot be read"):
        Teacher.from_pretrained(folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_path_is_diffusers_pipeline(prediction):
    """Compare every step of a run with diffusers' own, each from our state: a random network amplifies differences."""
    from diffusers import DDIMScheduler

    teacher = tiny_teacher(prediction_type=prediction)
    x = teacher.noise(3, seed=4)
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    ours = dict(teacher.path(x))
    assert list(ours) == scheduler.timesteps.tolist() == list(range(980, -1, -20))
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(teacher.unet(x, t).sample, t, x).prev_sample
            assert (ours[int(t)] - expected).abs().max() <= 2e-6 * max(1.0, float(x.abs().max()), float(expected.abs().max()))
            x = ours[int(t)]


def test_ancestral_path_ends_in_an_image_and_is_keyed_by_the_sample():
    teacher = tiny_teacher(20)
    assert teacher.timesteps("ddpm") == list(range(19, -1, -1))
    whole = teacher.sample(4, seed=2, solver="ddpm")
    assert torch.allclose(whole[2:], teacher.sample(2, seed=2, solver="ddpm", start=2), atol=1e-5)
    assert not torch.allclose(whole, teacher.sample(4, seed=3, solver="ddpm"), atol=1e-2)


class Configuration(dict):
    """A dict whose keys are attributes, too, like diffusers'."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DDPMScheduler:
    """What a teacher reads of diffusers' scheduler of that name."""

    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 20), 0)
    config = Configuration(
        {"prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
        | {"variance_type": "fixed_small", "num_train_timesteps": 20}
    )


class Network(torch.nn.Module):
    """Stand-in for a teacher's network, without diffusers: a configuration, and an output from state and timestep."""

    config = Configuration({"in_channels": 3, "out_channels": 3, "sample_size": 8})

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
        self.time = torch.nn.Embedding(20, 8)

    def forward(self, x, t, return_dict=True):
        return (self.last(torch.nn.functional.silu(self.first(x) + self.time(t)[..., None, None])),)


def networks_teacher():
    """A teacher of 20 timesteps with that network and DDPM's linear betas."""
    return Teacher(Network(), DDPMScheduler(), "network")


def unets_teacher():
    pytest.importorskip("diffusers")
    return tiny_teacher(20, channels=3)


WHOLE = ("ddim", "ddpm", "heun", "unipc-3", "deis-3")
RUNS = [(networks_teacher, solver) for solver in WHOLE]
RUNS += [(unets_teacher, solver) for solver in (*WHOLE, "dpm-3", Solver("heun", churn=5.0))]
"""Teachers and solvers; a network with a table of timesteps takes those of whole ones."""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("make", "sampler"), RUNS)
def test_a_recording_keeps_averages_of_the_path(make, sampler, device, monkeypatch):
    """The states of the path, averaged within the steps; on a GPU by compiled code and captured graphs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    teacher = make()
    teacher.unet.to(device)
    keep = {18: 1, 10: 4, 9: 4, 4: 2, 0: 8}
    for start in (0, 7):
        x_T = teacher.noise(3, seed=4, start=start)
        states = dict(teacher.path(x_T, sampler, 20, seed=4, start=start))
        x_0, kept = teacher.record(x_T, keep, sampler, 20, seed=4, start=start)
        # The second batch runs on the first one's buffers; what was kept is not overwritten.
        if start == 0:
            first, copy = kept, {t: state.clone() for t, state in kept.items()}
        tolerance = 2e-5 if device == "cpu" else 1e-3
        assert (x_0 - states[0]).abs().max() <= tolerance * max(1, x_0.abs().max()) and x_0.is_contiguous()
        assert sorted(kept) == sorted(keep)
        for t, r in keep.items():
            assert (kept[t] - torch.nn.functional.avg_pool2d(states[t], r)).abs().max() <= tolerance * max(
                1, states[t].abs().max()
            )
    assert all(torch.equal(first[t], copy[t]) for t in keep)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_kept_loop_draws_the_classes_of_every_call(guidance, device):
    """A second batch of other classes runs on the first one's buffers; the caller's labels stay as they are."""
    diffusers = pytest.importorskip("diffusers")
    unet, scheduler = tiny_unet(num_class_embeds=4), diffusers.DDPMScheduler(num_train_timesteps=20)
    teacher = Teacher(unet.to(device), scheduler, "tiny", Classes(("a", "b", "c"), 3))
    first, second = torch.tensor([0, 1, 2], device=device), torch.tensor([2, 2, 0], device=device)
    kept = first.clone()
    images = [teacher.sample(3, 1, "unipc", 4, labels=labels, guidance=guidance) for labels in (first, second, first)]
    assert torch.equal(first, kept) and torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    for labels, drawn in ((first, images[0]), (second, images[1])):
        *_, (_, x_0) = teacher.path(teacher.noise(3, 1), "unipc", 4, 1, labels=labels, guidance=guidance)
        assert torch.allclose(drawn, x_0.clamp(-1, 1), atol=1e-5 if device == "cpu" else 1e-3)
    many = [torch.zeros(1200, dtype=torch.int64), torch.zeros(1200, dtype=torch.int64)]
    many[1][600] = 2
    a, b = (teacher.sample(1200, 1, "ddim", 2, labels=labels.numpy()) for labels in many)
    assert not torch.equal(a[600], b[600]) and torch.equal(a[:600], b[:600])


def test_paths_may_be_walked_at_the_same_time():
    teacher = tiny_teacher(20)
    noises = [teacher.noise(2, seed) for seed in (1, 2)]
    alone = [list(teacher.path(x_T, steps=5)) for x_T in noises]
    together = zip(*(teacher.path(x_T, steps=5) for x_T in noises))
    for i, pair in enumerate(together):
        for (t, x), path in zip(pair, alone):
            assert t == path[i][0] and torch.equal(x, path[i][1])


def test_mixed_precision_is_another_teacher():
    teacher = tiny_teacher(20)
    exact, identity = teacher.sample(2, seed=1, steps=5), teacher.identity()
    mixed = teacher.optimize(autocast=torch.bfloat16).sample(2, seed=1, steps=5)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, exact) and (mixed - exact).abs().max() < 0.1
    assert teacher.identity() != identity and teacher.optimize().identity() == identity
    with pytest.raises(InputError, match="autocast"):
        teacher.optimize(autocast=torch.float16)


def test_the_loop_follows_its_teacher():
    """The buffers of an earlier run do not affect another network, a copy, a pickle or other modes of autograd."""
    teacher = tiny_teacher(20)
    first = teacher.sample(2, seed=1, steps=5)
    teacher.unet = tiny_unet(seed=9).eval()
    (*_, (_, other)) = teacher.path(teacher.noise(2, seed=1), steps=5)
    assert torch.allclose(teacher.sample(2, seed=1, steps=5), other.clamp(-1, 1), atol=1e-5) and not torch.equal(first, other)
    twin = copy.deepcopy(teacher)
    for parameter in twin.unet.parameters():
        parameter.data.zero_()
    assert not torch.equal(twin.sample(2, seed=1, steps=5), teacher.sample(2, seed=1, steps=5))
    pickle.dumps(teacher)
    with torch.inference_mode():
        inside = tiny_teacher(20)
        images = inside.sample(2, seed=1, steps=5)
    assert torch.equal(inside.sample(2, seed=1, steps=5), images)


def test_a_recording_has_no_gradient():
    teacher = tiny_teacher(20)
    x_0, _ = teacher.record(teacher.noise(2).requires_grad_(), {}, steps=5)
    again, _ = teacher.record(teacher.noise(2), {}, steps=5)
    assert not x_0.requires_grad and not again.requires_grad and torch.equal(x_0, again)


def test_bad_recordings_are_refused_before_work():
    teacher = tiny_teacher(20)
    x_T = teacher.noise(2)
    for keep in ({7: 2}, {8: 3}, {8: 0}):
        with pytest.raises(InputError, match="keep"):
            teacher.record(x_T, keep, steps=5)
    with pytest.raises(InputError, match="x_T must have shape"):
        teacher.record(x_T[..., :1, :1], {}, steps=5)


def test_a_compiled_network_that_is_wrong_is_not_used(monkeypatch):
    from advkd.diffusion import loop

    monkeypatch.setattr(loop.torch, "compile", lambda function, **options: lambda *inputs: function(*inputs) + 3)
    teacher = tiny_teacher(20)
    exact = teacher.sample(2, seed=1, steps=5)
    with pytest.warns(UserWarning, match="compiled network is off"):
        assert torch.equal(teacher.optimize(compiled=True).sample(2, seed=1, steps=5), exact)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    from advkd.diffusion import loop

    def compiler(function, **options):
        def fails(*inputs):
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(loop.torch, "compile", compiler)
    teacher = tiny_teacher(20)
    exact = teacher.sample(2, seed=1, steps=5)
    with pytest.warns(UserWarning, match="cannot be compiled here and runs as it is: no C"):
        assert torch.equal(teacher.optimize(compiled=True).sample(2, seed=1, steps=5), exact)


@pytest.mark.slow
def test_a_compiled_network_draws_the_same():
    teacher = tiny_teacher(20)
    exact = teacher.sample(2, seed=1, steps=5)
    assert (teacher.optimize(compiled=True).sample(2, seed=1, steps=5) - exact).abs().max() <= 2e-5


def test_timesteps_of_the_paper():
    ddim = supervising_timesteps("ddim", 12, list(range(980, -1, -20)), 1000)
    assert ddim == [980, 980, 960, 920, 860, 780, 680, 560, 420, 260, 80]
    assert ddim == [190 * n - 10 * n * n + 80 for n in range(10, -1, -1)]
    ddpm = supervising_timesteps("ddpm", 12, list(range(999, -1, -1)), 1000)
    assert ddpm == [999, 999, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    # Another depth spreads n evenly; another T scales t(n) and snaps to the run's timesteps.
    assert len(supervising_timesteps("ddim", 14, list(range(980, -1, -20)), 1000)) == 13
    short = supervising_timesteps("ddim", 12, list(range(98, -1, -2)), 100)
    assert short[0] == 98 and short[-1] == 8 and all(t % 2 == 0 for t in short)


@pytest.mark.parametrize(
    ("unet", "scheduler", "message"),
    [
        ({"out_channels": 2}, {}, "1 channels in, 2 out: a learned variance is not supported"),
        ({}, {"thresholding": True}, "dynamic thresholding is not supported"),
        ({}, {"variance_type": "learned_range"}, "variance_type 'learned_range' is not supported"),
        ({}, None, "has a EulerDiscreteScheduler; a DDPMScheduler or DDIMScheduler"),
    ],
)
def test_a_teacher_of_parts_is_refused_like_a_loaded_one(unet, scheduler, message):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.EulerDiscreteScheduler() if scheduler is None else diffusers.DDPMScheduler(**scheduler)
    with pytest.raises(InputError, match=message):
        Teacher(tiny_unet(**unet), made)


@pytest.mark.parametrize(("solver", "steps", "name"), [("rk4", None, "solver"), ("ddim", 1001, "steps")])
def test_bad_runs_are_refused(solver, steps, name):
    with pytest.raises(InputError, match=name):
        tiny_teacher().timesteps(solver, steps)


ALPHA_BARS = {
    "linear": lambda t: torch.cumprod(1 - (1e-4 + (0.02 - 1e-4) * t / 999), 0),
    "cosine": lambda t: torch.cumprod((cosine(t + 1) / cosine(t)).clamp(min=1 - 0.999), 0),
    "edm": lambda t: 1 / (1 + (0.002 ** (1 / 7) + t / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 14),
}
"""Formulas of Ho et al. 2020, Nichol and Dhariwal 2021 (eq. 17, beta at most 0.999), Karras et al. 2022 (eq. 5)."""


def cosine(t):
    return torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2


@pytest.mark.parametrize("schedule", ALPHA_BARS)
def test_schedules_are_their_formulas(schedule, tmp_path):
    """A step of float32 rounds beta (by 2^-25 at most), 1 - beta and the product (by 2^-24 of them)."""
    scheduler = noise_scheduler(schedule, "v_prediction")
    expected = ALPHA_BARS[schedule](torch.arange(1000, dtype=torch.float64))
    factors = expected / torch.cat([torch.ones(1), expected[:-1]])
    tolerance = (2**-25 / factors + 2 * 2**-24).cumsum(0)
    assert ((scheduler.alphas_cumprod.double() / expected - 1).abs() <= tolerance).all()
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod) and again.config.prediction_type == "v_prediction"
    assert again.config.clip_sample


def test_linear_schedules_are_ddpms_own():
    """What unconditional teachers were trained with before there was a choice."""
    diffusers = pytest.importorskip("diffusers")
    before = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=True)
    assert noise_scheduler("linear").to_json_string() == before.to_json_string()


TRAININGS = {
    "unconditional": {},
    "conditional": {"conditional": True, "drop": 0.5, "prediction": "v_prediction", "schedule": "edm"},
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_training_learns_saves_and_resumes(kind, tmp_path, monkeypatch):
    config = TeacherTrainingConfig(size=8, channels=(8, 16), steps=6, batch_size=8, checkpoint_every=2, **TRAININGS[kind])
    train_teacher(config, tmp_path / "whole", progress=False)

    class Killed(Exception):
        pass

    real, calls = Trainer.step, []

    def dies(trainer):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(trainer)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", dies)
        train_teacher(config, tmp_path / "killed", progress=False)
    with pytest.raises(InputError, match="--resume"):
        train_teacher(config, tmp_path / "killed", progress=False)
    train_teacher(config, tmp_path / "killed", resume=True, progress=False)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not (tmp_path / "killed" / "checkpoint.safetensors").exists()
    teacher = Teacher.from_pretrained(tmp_path / "whole")
    if config.conditional:
        assert teacher.classes == Classes(tuple("0123456789"), null=10) and teacher.unet.config.num_class_embeds == 11
        assert torch.equal(teacher.alpha_bars.float(), noise_scheduler("edm").alphas_cumprod)
        (tmp_path / "killed" / CLASSES).rename(tmp_path / CLASSES)
        assert Teacher.from_pretrained(tmp_path / "killed").classes.null is None
    else:
        assert teacher.sample(2, steps=2).shape == (2, 1, 8, 8) and teacher.classes is None
        assert not (tmp_path / "whole" / CLASSES).exists()
    with pytest.raises(InputError, match="holds a teacher already"):
        train_teacher(config, tmp_path / "whole", progress=False)
    with pytest.raises(InputError, match="holds a teacher already"):
        train_teacher(config, tmp_path / "whole", resume=True, progress=False)
    with pytest.raises(InputError, match="no checkpoint"):
        train_teacher(config, tmp_path / "empty", resume=True, progress=False)


def test_other_files_and_links_survive_training(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = TeacherTrainingConfig(size=8, channels=(8,), steps=1, batch_size=2)
    train_teacher(config, tmp_path / "link", progress=False)
    assert (tmp_path / "real" / "notes.txt").read_text() == "mine"
    assert Teacher.from_pretrained(tmp_path / "link").image_size == 8


def test_a_linked_part_is_refused_before_training(tmp_path):
    """A folder cannot take a link's place, and the link's target is not emptied."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "notes.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match="out/unet is a link"):
        train_teacher(TeacherTrainingConfig(size=8, channels=(8,), steps=1, batch_size=2), tmp_path / "out", progress=False)
    assert (tmp_path / "disk" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_stays_until_the_teacher_is_there(tmp_path, monkeypatch):
    """A part that cannot be replaced (here: removed) ends the run, and nothing is lost."""
    config = TeacherTrainingConfig(size=8, channels=(8,), steps=2, batch_size=2, checkpoint_every=1)

    def blocked(place, ignore_errors=False):
        if place == tmp_path / "unet":
            (place / "busy").mkdir(parents=True)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shutil, "rmtree", blocked)
        train_teacher(config, tmp_path, progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists()
    shutil.rmtree(tmp_path / "unet")
    train_teacher(config, tmp_path, resume=True, progress=False)
    assert Teacher.from_pretrained(tmp_path).image_size == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A conditional teacher of digits after one step."""
    config = TeacherTrainingConfig(size=8, channels=(8, 16), steps=1, batch_size=2, **TRAININGS["conditional"])
    return train_teacher(config, tmp_path_factory.mktemp("trained") / "teacher", progress=False)


def test_training_begins_with_another_teacher(trained, tmp_path):
    """At a rate of next to nothing the run ends with the weights that it began with, at an ordinary one with others."""
    options = {"size": 8, "init": str(trained), "seed": 1, "steps": 1, "batch_size": 2, "warmup": 0, "ema": 0.0}
    options |= TRAININGS["conditional"]
    for name, rate in (("still", 1e-12), ("moved", 1e-2)):
        train_teacher(TeacherTrainingConfig(learning_rate=rate, **options), tmp_path / name, progress=False)
    first, still, moved = map(Teacher.from_pretrained, (trained, tmp_path / "still", tmp_path / "moved"))
    assert still.classes == first.classes and torch.equal(still.alpha_bars, first.alpha_bars)
    assert all(map(torch.equal, still.unet.parameters(), first.unet.parameters()))
    assert not any(map(torch.equal, moved.unet.parameters(), first.unet.parameters()))
    configurations = [(folder / "unet" / "config.json").read_text() for folder in (trained, tmp_path / "still")]
    assert configurations[0] == configurations[1]  # without the place of the first
    record = json.loads((tmp_path / "still" / "data.json").read_text())
    assert record == {"init": {"data": None, "weights_sha256": first.identity()["weights_sha256"]}}


def test_a_run_that_began_with_a_teacher_resumes(trained, tmp_path, monkeypatch):
    """Wherever the start is now; one of other weights is refused. Dropout is on, as in training from scratch."""
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    path = start / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dropout": 0.5}))
    options = {"size": 8, "steps": 3, "batch_size": 2, "checkpoint_every": 1, **TRAININGS["conditional"]}
    whole = train_teacher(TeacherTrainingConfig(init=str(start), **options), tmp_path / "whole", progress=False)
    real = Trainer.step

    def dies(trainer):
        assert trainer.running["student"].part.module.training
        if trainer.update == 2:
            raise KeyboardInterrupt
        return real(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", dies)
        train_teacher(TeacherTrainingConfig(init=str(start), **options), tmp_path / "out", progress=False)
    start.rename(tmp_path / "moved")
    for other in ("", str(whole)):
        config = TeacherTrainingConfig(init=other, **options)
        with pytest.raises(InputError, match="another init"):
            train_teacher(config, tmp_path / "out", resume=True, progress=False)
    config = TeacherTrainingConfig(init=str(tmp_path / "moved"), **options)
    train_teacher(config, tmp_path / "out", resume=True, progress=False)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (whole / weights).read_bytes()


UNFIT = {
    "size": ({"size": 16}, "draws gray 8x8 images, the data have gray 16x16: give --size 8 and --image-channels 1"),
    "colour": ({"image_channels": 3}, "draws gray 8x8 images, the data have colour 8x8"),
    "channels": ({"channels": (8, 8)}, "has the channels 8,16, got 8,8: leave --channels out"),
    "prediction": ({"prediction": "sample"}, "predicts v_prediction: give --prediction v_prediction"),
    "schedule": ({"schedule": "cosine"}, "has other noise levels, those of --schedule edm"),
    "classes": ({"conditional": False, "drop": 0.15}, "has other classes than the data: give data of exactly its classes"),
    "null": ({"drop": 0.0}, "has other classes than the data"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_training_from_an_unfit_teacher_is_refused(what, trained, tmp_path):
    changes, message = UNFIT[what]
    config = TeacherTrainingConfig(**{"size": 8, "init": str(trained), **TRAININGS["conditional"], **changes})
    with pytest.raises(InputError, match=f"init: the teacher .*teacher {message}"):
        train_teacher(config, tmp_path / "t", progress=False)


def test_training_from_a_teacher_of_other_timesteps_is_refused_before_the_data_are_read(teacher_folder, tmp_path):
    config = TeacherTrainingConfig(data="nowhere", init=str(teacher_folder))
    train_teacher(TeacherTrainingConfig(size=8, channels=(8,), steps=1, batch_size=2), tmp_path / "t", progress=False)
    path = tmp_path / "t" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 100}))
    config.init = str(tmp_path / "t")
    with pytest.raises(InputError, match="has other noise levels, which no --schedule makes: it cannot be trained here"):
        train_teacher(config, tmp_path / "u", progress=False)


def test_training_from_a_denoiser_student_is_refused(conditional, tmp_path):
    """Its network is told a weight, too, which training on images would not give."""
    student = DenoiserStudent.from_teacher(Teacher.from_pretrained(conditional)).told_more(0, guidance=4.0)
    student.trained_as = "v_prediction"
    student.save_pretrained(tmp_path / "student")
    config = TeacherTrainingConfig(size=8, conditional=True, init=str(tmp_path / "student"))
    with pytest.raises(InputError, match="takes more than classes: advkd distill trains denoiser students"):
        train_teacher(config, tmp_path / "t", progress=False)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"ema": 1.0}, "ema"),
        ({"prediction": "noise"}, "prediction"),
        ({"channels": (12,)}, "channels"),
        ({"size": 20}, "size"),
        ({"data": "nowhere"}, "--data nowhere"),
        ({"data": "nowhere", "conditional": True}, "one folder of images per class"),
        ({"drop": 1.0}, "drop"),
        ({"drop": -0.1}, "drop"),
        ({"drop": float("nan")}, "drop"),
        ({"schedule": "sigmoid"}, "schedule must be one of linear, cosine, edm"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"size": -8}, "size"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_training_is_refused(changes, name, tmp_path):
    with pytest.raises(InputError, match=name):
        train_teacher(TeacherTrainingConfig(**changes), tmp_path / "t", progress=False)


def test_default_unet_fits_every_size():
    for size, parameters in ((32, 1_085_937), (8, None), (64, None)):
        unet = build_unet(size, 1)
        assert parameters in (None, sum(p.numel() for p in unet.parameters()))
        assert unet(torch.zeros(1, 1, size, size), 3).sample.shape == (1, 1, size, size)
    assert tiny_unet().config.sample_size == 8
