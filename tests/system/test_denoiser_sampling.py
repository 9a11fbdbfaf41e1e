"""Denoiser students drawn from by the command line and by diffusers' pipelines."""

import json

import numpy as np
import pytest
import torch

import advkd
from advkd.cli.sample import slerp
from advkd.data.pictures import to_pil
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.export.images import draw_seed

from ..conftest import fork_cli, fork_ranks
from ..methods.test_progressive import tiny_student
from .test_cli import refused, run
from .test_teacher_cli import differences

TRAILING = Solver("ddim", spacing="trailing")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def saved(model, sampler, folder):
    DenoiserStudent(model, sampler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An unconditional student of four steps."""
    return saved(tiny_student(timesteps=100).model, Sampler(TRAILING, 4), tmp_path_factory.mktemp("student") / "s")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A student whose sampler adds noise."""
    sampler = Sampler(Solver("ddim", spacing="trailing", eta=1.0), 4)
    return saved(tiny_student(timesteps=100).model, sampler, tmp_path_factory.mktemp("noisy") / "s")


@pytest.fixture(scope="module")
def told(conditional, tmp_path_factory):
    """A conditional student that is guided by two evaluations."""
    student = DenoiserStudent.from_teacher(Teacher.from_pretrained(conditional))
    return saved(student.model, Sampler(TRAILING, 2), tmp_path_factory.mktemp("told") / "s")


def test_pictures_of_a_student(folder, capsys, tmp_path):
    """A killed command goes on, with more pictures too, and those of other steps are not mixed in."""
    command = ("sample", "--student", folder, "--seed", 3, "--batch-size", 2, "--out", tmp_path / "t")
    code, said, _ = run(capsys, *command, "-n", 3)
    assert code == 0 and "(ddim, 4 steps, 4 network evaluations an image)" in said
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.png")}
    (tmp_path / "t" / "000002.png").unlink()
    assert run(capsys, *command, "-n", 5, "--steps", 4)[0] == 0
    assert max(differences(tmp_path / "t", advkd.load_student(folder).sample(5, 3))) <= 1
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.png")}
    assert len(again) == 5 and [name for name in times if times[name] != again[name]] == ["000002.png"]
    assert "pictures of another steps" in refused(capsys, *command, "--steps", 2)
    assert "pictures of another walk" in refused(capsys, *command, "--interpolate")
    assert run(capsys, *command[:-1], tmp_path / "two", "-n", 2, "--steps", 2)[0] == 0
    assert max(differences(tmp_path / "two", advkd.load_student(folder).sample(2, 3, steps=2))) <= 1


def test_pictures_of_given_levels_go_on(capsys, tmp_path):
    """The record's levels come back from JSON as they were."""
    sampler = Sampler(Solver("ddim", alpha_bars=(0.01, 0.5)), 2)
    place = saved(tiny_student(timesteps=100).model, sampler, tmp_path / "s")
    for n in (1, 3):
        assert run(capsys, "sample", "--student", place, "-n", n, "--out", tmp_path / "t")[0] == 0
    assert max(differences(tmp_path / "t", advkd.load_student(place).sample(3))) <= 1


def test_several_processes_draw_what_one_does(folder, tmp_path):
    command = ("sample", "--student", folder, "-n", 6, "--batch-size", 2, "--out")
    done = [fork_cli(*command, tmp_path / "one"), *fork_ranks("-m", "advkd.cli", *command, tmp_path / "two")]
    assert [process.returncode for process in done] == [0, 0, 0], done[0].stderr
    for path in (tmp_path / "one").glob("*.png"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_walk_between_two_noises(folder, capsys, tmp_path):
    command = ("sample", "--student", folder, "--seed", 1, "--interpolate", "-n", 5, "--batch-size", 2, "--out", tmp_path / "w")
    assert run(capsys, *command)[0] == 0
    student = advkd.load_student(folder)
    a, b = student.latents(2, 1)
    middle = slerp(a.flatten(), b.flatten(), 0.5).reshape(a.shape)
    # Half-way on the sphere: sin(angle / 2) / sin(angle) of both.
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), 0)
    assert torch.allclose(middle, (a + b) / (2 * ((1 + cosine) / 2).sqrt()), atol=1e-5)
    wanted = student.draw(torch.stack((a, middle, b)))
    every_second = tmp_path / "half"
    every_second.mkdir()
    for i in range(3):
        (tmp_path / "w" / f"{2 * i:06d}.png").rename(every_second / f"{i:06d}.png")
    assert max(differences(every_second, wanted)) <= 1
    assert json.loads((tmp_path / "w" / "samples.json").read_text())["walk"] == 5


@pytest.mark.parametrize(("options", "evaluations"), [((), 2), (("--guidance", 1.5), 4), (("--guidance", 0), 2)])
def test_classes_take_turns(options, evaluations, told, capsys, tmp_path):
    command = ("sample", "--student", told, "-n", 3, "--batch-size", 2, "--out", tmp_path / "t", "--classes", "c, a", *options)
    code, said, _ = run(capsys, *command)
    assert code == 0 and f"2 steps, {evaluations} network evaluations" in said
    guidance = options[1] if options else 0.0
    wanted = advkd.load_student(told).sample(3, labels=[2, 0, 2], guidance=guidance)
    assert max(differences(tmp_path / "t", wanted)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "cpu"), "--backend is an option of a generator student"),
        (("--dtype", "bfloat16"), "--dtype is an option of a generator student"),
        (("--solver", "heun"), "--solver is an option of a teacher"),
        (("--eta", "0"), "--eta is an option of a teacher"),
        (("--classifier", "x"), "--classifier is an option of a teacher"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--steps", "101"), "steps must be between 1 and the schedule's 100"),
        (("--classes", "a"), "unconditional; leave it out"),
        (("--guidance", "1"), "guidance needs --classes"),
        (("--teacher", "digits"), "--student and --teacher: name one of them"),
    ],
)
def test_options_of_others_are_one_line(options, message, folder, capsys, tmp_path):
    assert message in refused(capsys, "sample", "--student", folder, *options, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_options_of_denoisers_are_not_a_generators(told, capsys, tmp_path):
    for option in ("--steps", "--guidance"):
        said = refused(capsys, "sample", option, 1, "--out", tmp_path / "x.png")
        assert f"{option} is an option of a teacher or a denoiser student" in said
    said = refused(capsys, "sample", "--classes", 1, "--out", tmp_path / "x.png")
    assert "--classes 1: student digits is unconditional; leave it out" in said
    command = ("sample", "--student", told, "--out", tmp_path / "x.png")
    assert "'d' is not one of a, b, c" in refused(capsys, *command, "--classes", "d")
    assert "neither a folder nor a hub id" in refused(capsys, "sample", "--student", "nothing", "--out", tmp_path / "x.png")


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_diffusers_own_pipeline_draws_the_same(clip, set_alpha_to_one, tmp_path, monkeypatch):
    """Wherever steps divide the schedule's: diffusers ends a step at the timestep T / steps below, not at the next one."""
    diffusers = pytest.importorskip("diffusers")
    options = {"clip_sample": clip, "set_alpha_to_one": set_alpha_to_one, "prediction_type": "v_prediction"}
    scheduler = diffusers.DDIMScheduler(100, **options)
    teacher = Teacher(tiny_student().model.unet, scheduler)
    student = DenoiserStudent.from_teacher(teacher, sampler=Sampler(TRAILING, 4))
    student.save_pretrained(tmp_path)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *a, **options: student.latents(3, 5))
    pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 4, 10, 25):
        images = pipe(3, num_inference_steps=steps, output_type="pt").images
        # float32 networks and steps in another order, each of a few roundings of numbers up to 4.
        assert torch.allclose(images, student.sample(3, 5, steps) / 2 + 0.5, atol=steps * 4e-7), steps


def test_the_pipeline_draws_with_the_student(folder, tmp_path):
    pipe, student = advkd.DenoiserPipeline.from_pretrained(folder), advkd.load_student(folder)
    wanted = student.sample(3, draw_seed(seeded(7)))
    images = pipe(3, seeded(7), output_type="pt").images
    assert torch.equal(images, wanted / 2 + 0.5)
    assert torch.equal(pipe(3, seeded(7), 2, output_type="pt").images, student.sample(3, draw_seed(seeded(7)), 2) / 2 + 0.5)
    arrays = pipe(3, seeded(7), output_type="np", return_dict=False)[0]
    assert np.array_equal(arrays, images.permute(0, 2, 3, 1).numpy())
    assert [a.tobytes() for a in pipe(3, seeded(7)).images] == [a.tobytes() for a in to_pil(wanted)]
    one = pipe(1, [seeded(8)], output_type="pt").images
    assert torch.allclose(pipe(2, [seeded(7), seeded(8)], output_type="pt").images[1:], one, atol=1e-6)
    assert torch.allclose(pipe(1, seeded(8), output_type="pt").images, one, atol=1e-6)
    assert set(pipe.components) == {"unet", "scheduler"}
    pipe.save_pretrained(tmp_path / "s")
    for name in ("sampler.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "s" / name).read_bytes() == (folder / name).read_bytes()
    narrow = advkd.DenoiserPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert narrow.unet.dtype == torch.bfloat16
    assert (narrow(3, seeded(7), output_type="pt").images - images).abs().max() < 0.1  # 2^-8 of it, over four steps


def test_the_pipeline_takes_classes_and_guidance(told):
    pipe, student = advkd.DenoiserPipeline.from_pretrained(told), advkd.load_student(told)
    found = pipe(2, seeded(1), class_labels=[2, 0], guidance=1.5, output_type="pt").images
    assert torch.equal(found, student.sample(2, draw_seed(seeded(1)), labels=[2, 0], guidance=1.5) / 2 + 0.5)


def test_bad_calls_of_the_pipeline_are_refused(folder, noisy, told):
    pipe = advkd.DenoiserPipeline.from_pretrained(folder)
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"output_type": "jpg"}, "output_type must be pil, np or pt"),
        ({"batch_size": 2, "generator": [seeded(0)]}, "1 generators came for batch_size 2"),
        ({"num_inference_steps": 0}, "steps must be at least 1"),
        ({"class_labels": 1}, "unconditional"),
        ({"guidance": 1.0}, "guidance needs labels"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(**options)
    with pytest.raises(InputError, match=r"labels must be in \[0, 3\)"):
        advkd.DenoiserPipeline.from_pretrained(told)(class_labels=3)
    with pytest.raises(InputError, match="one generator for all images"):
        advkd.DenoiserPipeline.from_pretrained(noisy)(1, [seeded(0)])
    with pytest.raises(InputError, match="is a generator"):
        advkd.DenoiserPipeline.from_pretrained("digits")


def test_a_sampler_that_adds_noise_draws_it_by_seed_and_index(noisy):
    pipe, student = advkd.DenoiserPipeline.from_pretrained(noisy), advkd.load_student(noisy)
    images = student.sample(3, draw_seed(seeded(2)))
    assert torch.equal(pipe(3, seeded(2), output_type="pt").images, images / 2 + 0.5)
    x_T = student.latents(3, 0)
    assert not torch.equal(student.draw(x_T, seed=1), student.draw(x_T, seed=2))
    assert torch.allclose(student.draw(x_T, seed=1)[1:], student.draw(x_T[1:], seed=1, start=1), atol=1e-6)
