"""Latent teachers and students: their folders, their pictures, what is refused, and every command on them."""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, VQModel

from advkd.cli.main import main
from advkd.data.dataset_info import TrajectoryConfig
from advkd.data.images import load_images, normalize
from advkd.data.sources import Tensors
from advkd.data.trajectories import Trajectories
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.loading import Classes
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import LatentTeacher, Teacher
from advkd.errors import InputError
from advkd.evaluation.decoded import DECODED
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_student
from advkd.evaluation.report import save_levels_of, save_pairs_of
from advkd.export.denoiser_pipeline import DenoiserPipeline
from advkd.export.onnx import export_onnx
from advkd.export.pipeline import StudentModel
from advkd.methods.adv_kd import recipe
from advkd.methods.consistency import ConsistencyConfig
from advkd.methods.diff_instruct import DiffInstructConfig
from advkd.methods.dpdm import DPDMConfig
from advkd.methods.features import Features, FeaturesConfig
from advkd.methods.guided import GuidedConfig
from advkd.methods.pairs import PairsConfig
from advkd.methods.progressive import ProgressiveConfig
from advkd.methods.rectified_flow import RectifiedFlowConfig
from advkd.methods.reparametrize import ReparametrizeConfig
from advkd.models.autoencoder import Autoencoder, Pictured, build_autoencoder, scaling_of
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.runtime.files import read_tensors
from advkd.training.denoiser_data import encoded
from advkd.training.denoisers import distill_denoiser
from advkd.training.distillation import Distiller, distill

from ..conftest import tiny_teacher, tiny_unet

SCALING = 0.5
SHAPE, LATENTS = (1, 32, 32), (4, 8, 8)
STUDENT = StudentConfig(image_size=8, image_channels=4, channels=(8, 8, 8, 8), latent_size=2)


def tiny_network(regularisation="kl", seed=0):
    torch.manual_seed(seed)
    return build_autoencoder(regularisation, SHAPE, (8, 8, 8), LATENTS[0], codes=16)


def tiny_autoencoder(regularisation="kl", seed=0):
    return Autoencoder(tiny_network(regularisation, seed), SCALING, SHAPE)


def tiny_latent_teacher(seed=0, **scheduler):
    scheduler = DDIMScheduler(clip_sample=False, **scheduler)
    return LatentTeacher(tiny_unet(LATENTS[0], seed), scheduler, tiny_autoencoder(), "tiny")


def pipeline_folder(folder, regularisation="kl"):
    """A folder as diffusers writes it, with the scaling factor in the autoencoder's configuration."""
    network = tiny_network(regularisation)
    network.register_to_config(scaling_factor=SCALING)
    LDMPipeline(network, tiny_unet(LATENTS[0]), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    return pipeline_folder(tmp_path_factory.mktemp("latent"))


def changed(folder, target, file, remove=(), **changes):
    """A copy of a folder with some keys of a JSON file changed or removed."""
    shutil.copytree(folder, target)
    path = target / file
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in remove}))
    return target


class Linear(torch.nn.Module):
    """A linear autoencoder with the interface of diffusers' VQModel: z = A^T x, x = A z, without scaling."""

    def __init__(self, axes):
        super().__init__()
        self.axes = torch.nn.Parameter(axes)

    def encode(self, x):
        return type("Output", (), {"latents": x @ self.axes})

    def decode(self, z):
        return type("Output", (), {"sample": z @ self.axes.T})


class LatentGaussian(Pictured, GaussianTeacher):
    """Gaussian data in the plane of an autoencoder."""


def test_decoded_samples_have_the_covariance_of_the_autoencoders_plane():
    """PCA of rank k: scaled latents have variance 1, decoded samples the first k parts of the data's covariance.

    Points at +-sqrt(d) sqrt(v_i) u_i have exactly the covariance sum v_i u_i u_i^T, and start noise at +-sqrt(k) e_i exactly I.
    The linear schedule ends at alpha_bar = 4e-5 of data, and fifty steps of UniPC leave less than 1e-3.
    """
    d, k = 6, 3
    axes = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    variances = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64) / 400
    corners = torch.cat((axes.T, -axes.T)) * (d * variances.repeat(2)[:, None]).sqrt()
    plane = axes[:, :k]
    scaling = scaling_of(Autoencoder(Linear(plane), 1.0, (d,)).encode(corners))
    autoencoder = Autoencoder(Linear(plane), scaling, (d,))
    z = autoencoder.encode(corners)
    assert z.square().mean().item() == pytest.approx(1, abs=1e-12) and autoencoder.latent_shape == (k,)
    lost = (autoencoder.decode(z) - corners).square().sum(dim=1).mean()
    assert lost.item() == pytest.approx(variances[k:].sum().item(), rel=1e-12)

    model = LatentGaussian(torch.zeros(k), z.T @ z / len(z))
    model.autoencoder = autoencoder
    start = torch.eye(k, dtype=torch.float64) * k**0.5
    *_, (_, states) = model.path(torch.cat((start, -start)), "unipc", 50)
    images = model.images(states)
    found = images.T @ images / len(images)
    assert model.image_shape == (d,) and images.abs().max() < 1  # nothing is clamped
    assert torch.allclose(found, plane * variances[:k] @ plane.T, atol=1e-3 * variances[0])


@pytest.mark.parametrize("regularisation", ["kl", "vq"])
def test_ldm_pipelines_draw_the_same(regularisation, tmp_path, monkeypatch):
    folder = pipeline_folder(tmp_path / "t", regularisation)
    teacher = Teacher.from_pretrained(folder)
    assert isinstance(teacher, LatentTeacher) and (teacher.shape, teacher.image_shape) == (LATENTS, SHAPE)
    assert (teacher.image_size, teacher.image_channels, teacher.autoencoder.scaling) == (32, 1, SCALING)
    x_T = teacher.noise(2, seed=3)
    module = __import__(LDMPipeline.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: x_T)
    pipeline = LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(pipeline(2, num_inference_steps=5, output_type="np").images).permute(0, 3, 1, 2)
    ours = teacher.draw(x_T, "ddim", 5)
    assert ours.shape == (2, *SHAPE) and (ours / 2 + 0.5 - theirs).abs().max() <= 1e-5
    # A vae's folder is the same under its other name.
    (folder / "vqvae").rename(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = index.pop("vqvae")
    (folder / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(Teacher.from_pretrained(folder).draw(x_T, "ddim", 5), ours)


def test_a_hub_repositorys_layout_loads(tmp_path):
    """That of CompVis/ldm-celebahq-256 in small: a VQModel of three latent channels in colour, DDIM, a UNet2DModel.

    Its latents are not scaled, and its files are older than the scaling factor, whose default in diffusers is another.
    """
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = VQModel(block_out_channels=(8, 8), norm_num_groups=8, sample_size=16, latent_channels=3, **blocks)
    LDMPipeline(network, tiny_unet(3), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match=r"has no scaling factor.*trained with \(1 for unscaled latents\)"):
        Teacher.from_pretrained(changed(tmp_path / "hub", tmp_path / "old", "vqvae/config.json", ("scaling_factor",)))
    teacher = Teacher.from_pretrained(changed(tmp_path / "hub", tmp_path / "new", "vqvae/config.json", scaling_factor=1))
    assert teacher.autoencoder.scaling == 1
    assert (teacher.shape, teacher.image_shape, teacher.clip) == ((3, 8, 8), (3, 16, 16), float("inf"))
    assert teacher.sample(1, steps=2).shape == (1, 3, 16, 16)


def test_states_are_latents_and_samples_pictures():
    """Latents are not clamped, pictures are."""
    teacher = tiny_latent_teacher()
    x_T = teacher.noise(2, seed=1)
    x_0, kept = teacher.record(x_T, {0: 2}, "ddim", 2)
    assert x_0.shape == (2, *LATENTS) and kept[0].shape == (2, 4, 4, 4) and x_0.abs().max() > 1
    assert torch.equal(teacher.images(x_0), teacher.draw(x_T, "ddim", 2))
    wide = teacher.images(1e3 * x_0)
    assert wide.shape == (2, *SHAPE) and wide.abs().max() <= 1 and 1e3 * x_0.abs().max() > 1
    images = load_images("digits")[:3]
    z = teacher.autoencoder.encode(images)
    expected = teacher.autoencoder.network.encode(images).latent_dist.mode() * SCALING
    assert torch.equal(z, expected) and tuple(z.shape) == (3, *LATENTS)


@pytest.mark.parametrize(
    ("file", "remove", "changes", "message"),
    [
        ("vqvae/config.json", (), {"scaling_factor": 0}, "scaling_factor must be positive"),
        ("vqvae/config.json", (), {"shift_factor": 0.1}, "has a shift_factor"),
        ("vqvae/config.json", (), {"_class_name": "AutoencoderDC"}, "is a AutoencoderDC; diffusers' AutoencoderKL and VQModel"),
        ("vqvae/config.json", (), {"sample_size": 64}, "latents of 4x8x8, and its autoencoder makes 4x16x16 of 1x64x64 images"),
        ("vqvae/config.json", (), {"sample_size": 2**20}, "sample_size must be from 8 to 4096"),
        ("vqvae/config.json", (), {"latent_channels": 3}, "do not fit the configuration|cannot be read"),
        ("model_index.json", (), {"movq": ["diffusers", "VQModel"]}, "has a movq"),
    ],
)
def test_unfit_autoencoders_are_refused(latent_folder, tmp_path, file, remove, changes, message):
    with pytest.raises(InputError, match=message):
        Teacher.from_pretrained(changed(latent_folder, tmp_path / "t", file, remove, **changes))


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no config.json: name a folder of 'advkd autoencoder train'"):
        Autoencoder.from_pretrained(tmp_path / "empty")


def run(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """An autoencoder, a teacher and two generations of students by the command line, each in a few updates."""
    folder = tmp_path_factory.mktemp("commands")
    size = ("--channels", "8,8,8", "--steps", 2, "--batch-size", 4)
    said = run("autoencoder", "train", *size, "--out", folder / "ae")
    assert "latents 4x8x8, scaling factor" in said
    teach = ("teacher", "train", "--autoencoder", folder / "ae", "--channels", "16,16", "--steps", 2, "--batch-size", 4)
    run(*teach, "--out", folder / "t")
    learn = ("--updates", 2, "--batch-size", 4, "--data", "digits")
    run("distill", "reparametrize", "--teacher", folder / "t", *learn, "--out", folder / "v")
    few = ("--teacher", folder / "v", "--init", folder / "v", "--levels", 3)
    run("distill", "consistency", *few, *learn, "--out", folder / "c")
    run("distill", "ddgan", "--init", folder / "v", "--steps", 2, *learn, "--out", folder / "gan")
    return folder


def test_commands_make_a_latent_teacher_and_its_students(commands, tmp_path):
    autoencoder = Autoencoder.from_pretrained(commands / "ae")
    config = json.loads((commands / "ae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["scaling_factor"] == autoencoder.scaling
    assert AutoencoderKL.from_pretrained(commands / "ae").config.scaling_factor == autoencoder.scaling
    z = autoencoder.encode(load_images("digits"))
    assert z.double().var().item() == pytest.approx(1, rel=1e-3)
    teacher = Teacher.from_pretrained(commands / "t")
    assert teacher.autoencoder.sha256 == autoencoder.sha256 and teacher.clip == float("inf")
    record = json.loads((commands / "t" / "data.json").read_text())
    assert record["autoencoder_sha256"] == autoencoder.sha256
    for name in ("v", "c", "gan"):
        student = DenoiserStudent.from_pretrained(commands / name)
        assert isinstance(student.model, LatentTeacher) and student.model.autoencoder.sha256 == autoencoder.sha256
        assert student.sample(2, steps={"v": 3, "c": 1, "gan": 2}[name]).shape == (2, *SHAPE)
        assert LDMPipeline.from_pretrained(commands / name).vqvae.config.scaling_factor == autoencoder.scaling
    pipeline = DenoiserPipeline.from_pretrained(commands / "c")
    assert pipeline(1, output_type="np").images.shape == (1, 32, 32, 1)
    run("sample", "--student", commands / "c", "-n", 2, "--out", tmp_path / "c.png")
    run("sample", "--teacher", commands / "t", "-n", 2, "--steps", 2, "--out", tmp_path / "t")
    assert len(list((tmp_path / "t").glob("*.png"))) == 2
    run("teacher", "noise-power", "--teacher", commands / "t", "--num", 2)


def test_a_comparison_has_the_decoders_row(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    numbers = ("--num", 130, "--fine-steps", 3, "--resamples", 20, "--evaluations", 2)
    rows = ("--students", commands / "c", "--solvers", "ddim", *numbers)
    said = run("compare", "--teacher", commands / "t", *rows, "--out", tmp_path / "o")
    assert "decoded real images" in said
    found = json.loads((tmp_path / "o" / "comparison.json").read_text())["decoder"]
    low, high = found["frechet"]["interval"]
    assert 0 < low < high and found["num"] == 1797 // 2
    assert "| decoded real images | autoencoder |" in (tmp_path / "o" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacher", "train", "--autoencoder", "{ae}", "--size", "16"), "size must be the autoencoder's 32, got 16"),
        (("teacher", "train", "--autoencoder", "{ae}", "--init", "digits"), "draws other latents, or none"),
        (("teacher", "train", "--autoencoder", "{ae}", "--data", "nowhere"), "nowhere"),
        (("autoencoder", "train", "--channels", "8,8,8", "--size", "16"), "latents of 4 x 4 of images of 16 pixels"),
        (("autoencoder", "train", "--regularisation", "vae"), "regularisation must be one of kl, vq"),
        (("autoencoder", "train", "--codes", "16"), "codes does nothing without regularisation vq"),
        (("evaluate", "--likelihood", "--teacher", "{t}"), "likelihood takes models of pictures"),
        (("distill", "diff-instruct", "--teacher", "{t}", "--preset", "latent"), "name them by --trajectories, or begin with"),
    ],
)
def test_commands_refuse_what_does_not_fit(commands, tmp_path, arguments, message):
    given = [part.format(ae=commands / "ae", t=commands / "t") for part in arguments]
    done = CliRunner().invoke(main, [*given, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_student_of_another_autoencoder_is_refused(tmp_path):
    teacher = tiny_latent_teacher(prediction_type="v_prediction")
    student = DenoiserStudent.from_teacher(teacher, sampler=Sampler(steps=2))
    student.model.autoencoder = tiny_autoencoder(seed=1)
    with pytest.raises(InputError, match="draws latents of the autoencoder .*, the student latents of the autoencoder"):
        distill_denoiser("reparametrize", ReparametrizeConfig(updates=1), student, tmp_path, teacher=teacher, data="digits")
    assert not list(tmp_path.iterdir())


def test_latents_are_known_by_what_they_are_made_of():
    """By images, labels and autoencoder: their own last bits depend on the machine that encodes, which may change."""
    images, labels = load_images("digits", 32, 1)[:70], torch.arange(70) % 3
    autoencoder, cpu = tiny_autoencoder(), torch.device("cpu")
    source = Tensors(images=images, labels=labels)
    found = encoded(source, autoencoder, cpu)
    assert torch.equal(found.tensors["images"], autoencoder.encode(images)) and torch.equal(found.tensors["labels"], labels)
    others = [
        encoded(source, autoencoder.rescaled(2), cpu),
        encoded(Tensors(images=images), autoencoder, cpu),
        encoded(Tensors(images=images.flip(0), labels=labels), autoencoder, cpu),
        encoded(Tensors(images=images, labels=labels.flip(0)), autoencoder, cpu),
        found,
    ]
    assert len({other.identity()["tensors"] for other in others}) == len(others)
    asked = []
    rounded = SimpleNamespace(
        sha256=autoencoder.sha256,
        encode=lambda images, device: asked.append(device) or 1.0000001 * autoencoder.encode(images),
    )
    assert encoded(source, rounded, torch.device("meta")).identity() == found.identity()
    assert asked == [torch.device("meta")]
    assert len(encoded(Tensors(), autoencoder, cpu)) == 0


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Trajectories of a latent teacher."""
    config = TrajectoryConfig(num=8, steps=4, depth=4, batch_size=4, shard_size=4)
    return record_trajectories(tiny_latent_teacher(), config, tmp_path_factory.mktemp("recording"), progress=False)


def test_recordings_hold_latents_and_their_autoencoder(recording):
    data, teacher = Trajectories(recording), tiny_latent_teacher()
    assert data.info.latents and (data.info.image_channels, data.info.image_size) == (4, 8)
    expected, _ = teacher.record(data.noise(range(8))[:4], {}, "ddim", 4)
    found = data.images(range(8))
    assert torch.allclose(found[:4], expected, atol=2e-3 * expected.abs().max()) and found.abs().max() > 1
    assert data.largest() == found.abs().max()
    assert Autoencoder.from_pretrained(recording).sha256 == teacher.autoencoder.sha256


def test_the_pyramid_learns_latents_and_draws_pictures(recording, tmp_path):
    """Its tanh reaches the largest latent recorded; its autoencoder's scale lies there, and its folder and engine keep it."""
    torch.manual_seed(0)
    config = recipe("joint", updates=(2,), batch_sizes=(4,), critic_channels=8, checkpoint_every=1)
    student = distill(recording, Student(STUDENT), config, tmp_path / "s", progress=False)
    data = Trajectories(recording)
    bound = data.largest()
    assert student.autoencoder.scaling == pytest.approx(SCALING / bound, rel=1e-12)
    with open(tmp_path / "s" / "metrics.csv") as file:
        assert len(list(csv.reader(file))) == 3
    assert (tmp_path / "s" / "samples-stage-01.png").exists()

    again = Student.from_pretrained(tmp_path / "s")
    z = again.latents(3, seed=2)
    with torch.no_grad():
        y = again(z)
    pictures = tiny_autoencoder().decode(y * bound).clamp(-1, 1)
    assert y.shape == (3, *LATENTS) and y.abs().max() <= 1
    assert torch.allclose(again.images(y), pictures, atol=1e-5)
    assert torch.allclose(again.sample(3, seed=2), pictures, atol=1e-5)
    fused = again.fuse(tune=False)
    assert torch.allclose(fused.sample(3, seed=2), pictures, atol=1e-4)
    (eight,) = fused.stream(3, seed=2, dtype=torch.uint8)
    assert eight.shape == (3, 32, 32, 1) and eight.dtype == torch.uint8
    fused.save_pretrained(tmp_path / "f")
    assert torch.equal(type(fused).from_pretrained(tmp_path / "f").sample(3, seed=2), fused.sample(3, seed=2))
    # Trained further, it keeps its scale.
    more = distill(recording, again, config, tmp_path / "more", progress=False)
    assert more.autoencoder.scaling == again.autoencoder.scaling
    run("sample", "--student", tmp_path / "s", "-n", 2, "--interpolate", "--out", tmp_path / "walk.png")
    save_pairs_of(teacher := tiny_latent_teacher(), again, tmp_path / "pairs.png", n=2)
    save_levels_of(teacher, again, tmp_path / "levels.png")
    with pytest.raises(InputError, match="export to ONNX takes models of pictures"):
        export_onnx(again, tmp_path / "s.onnx")
    with pytest.raises(InputError, match="is a student that draws latents"):
        StudentModel.from_pretrained(tmp_path / "s")
    with pytest.raises(InputError, match="a pipeline takes models of pictures"):
        StudentModel.from_student(again)


def test_pixels_and_latents_do_not_mix(recording, tmp_path):
    torch.manual_seed(0)
    student = Student(STUDENT)
    student.autoencoder = tiny_autoencoder(seed=1)
    with pytest.raises(InputError, match="latents of another autoencoder than --trajectories or --teacher"):
        distill(recording, student, recipe("joint", updates=(1,), batch_sizes=(4,)), tmp_path / "s", progress=False)
    student.save_pretrained(tmp_path / "one")
    other = Student(STUDENT)
    for autoencoder in (None, tiny_autoencoder(seed=2)):
        other.autoencoder = autoencoder
        with pytest.raises(InputError, match="holds a model with another autoencoder, or without one: name another folder"):
            other.save_pretrained(tmp_path / "one")
    student.save_pretrained(tmp_path / "one")  # its own, again
    Student(STUDENT).save_pretrained(tmp_path / "pixels")
    with pytest.raises(InputError, match="or without one: name another folder"):
        student.save_pretrained(tmp_path / "pixels")


def test_a_generator_by_two_scores_draws_latents(recording, tmp_path):
    """With pairs, at the teacher's scale, its bound is the largest latent recorded; trained further, without, it keeps that."""
    torch.manual_seed(0)
    teacher, config = tiny_latent_teacher(), DiffInstructConfig(updates=2, batch_size=4, checkpoint_every=1)
    given = {"teacher": teacher, "method": "diff-instruct", "progress": False}
    with pytest.raises(InputError, match="--trajectories and --teacher are not of one autoencoder"):
        other = LatentTeacher(tiny_unet(LATENTS[0]), teacher.scheduler, tiny_autoencoder(seed=1))
        distill(recording, Student(STUDENT), config, tmp_path / "s", **{**given, "teacher": other})
    assert not (tmp_path / "s").exists()
    bound = Trajectories(recording).largest()
    run = Distiller(Trajectories(recording), Student(STUDENT), config, tmp_path / "s", **given)
    pairs = run.data.batch(range(8), (4,), torch.device("cpu"), torch.float32)
    assert run.method.bound == pytest.approx(bound, rel=1e-12) and pairs.images.abs().max() == bound
    student = run.run()
    assert student.autoencoder.scaling == pytest.approx(SCALING / bound, rel=1e-12)
    assert student.sample(2).shape == (2, *SHAPE)
    with pytest.raises(InputError, match="the student draws latents, and --teacher or --trajectories is of pictures"):
        distill(None, student, config, tmp_path / "p", **{**given, "teacher": tiny_teacher(channels=LATENTS[0])})
    images = load_images("digits")[:8]
    judged = DiffInstructConfig(updates=1, batch_size=4, gan=0.1, critic_channels=4)
    run = Distiller(None, student, judged, tmp_path / "more", images=images, **given)
    assert run.method.bound == pytest.approx(bound, rel=1e-12)
    assert torch.equal(run.data.tensors["images"], teacher.autoencoder.encode(images))
    assert run.run().autoencoder.scaling == student.autoencoder.scaling


@pytest.mark.parametrize("generator", ["pixels", "coefficients", "warp"])
def test_optimised_latents_are_shown_as_pictures(generator, commands, tmp_path):
    """A warp's prototype is the latent of the mean picture."""
    options = {"coefficients": ("--grid", 4), "warp": ("--data", "digits")}.get(generator, ())
    given = ("--teacher", commands / "t", "--generator", generator, "--num", 2, "--updates", 2, *options)
    run("distill", "score-distillation", *given, "--out", tmp_path / "o")
    found, _ = read_tensors(tmp_path / "o" / "images.safetensors")
    autoencoder = Teacher.from_pretrained(commands / "t").autoencoder
    assert found["latents"].shape == (2, *LATENTS) and found["latents"].abs().max() > 1
    assert torch.equal(found["images"], autoencoder.decode(found["latents"]).clamp(-1, 1))
    if generator == "warp":
        mean = autoencoder.encode(normalize(load_images("digits")).mean(dim=0, keepdim=True))
        assert (found["latents"] - mean).abs().mean() < 0.5 * (mean - mean.mean()).abs().mean()


@pytest.mark.parametrize("method", ["pairs", "rectified-flow"])
def test_recorded_latents_are_of_the_students_own_autoencoder(method, recording, tmp_path):
    config = PairsConfig(**ONE) if method == "pairs" else RectifiedFlowConfig(steps=1, **ONE)
    for seed, pixels in ((5, False), (0, True)):
        student = DenoiserStudent.from_teacher(tiny_latent_teacher(prediction_type="v_prediction"))
        model = student.model
        model.autoencoder = tiny_autoencoder(seed=seed)
        if pixels:
            student.model = Teacher(model.unet, model.scheduler)
        with pytest.raises(InputError, match="are not of the student's latents or pixels: record its own teacher's"):
            distill_denoiser(method, config, student, tmp_path / "s", trajectories=recording, progress=False)
    assert not (tmp_path / "s").exists()


def test_a_students_autoencoder_of_another_size_is_refused(tmp_path):
    student = Student(STUDENT)
    student.autoencoder = tiny_autoencoder()
    student.save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "vqvae" / "config.json"
    sound = json.loads(path.read_text())
    path.write_text(json.dumps({**sound, "sample_size": 64}))
    with pytest.raises(InputError, match="its network draws latents of 4x8x8, and its autoencoder makes 4x16x16 of"):
        Student.from_pretrained(tmp_path / "s")


def test_an_autoencoders_digest_has_its_configuration(tmp_path):
    (one := tiny_autoencoder()).save_pretrained(tmp_path / "ae")
    assert Autoencoder.from_pretrained(tmp_path / "ae").sha256 == one.sha256
    path = tmp_path / "ae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "act_fn": "relu"}))
    assert Autoencoder.from_pretrained(tmp_path / "ae").sha256 != one.sha256


ONE = {"updates": 1, "batch_size": 4}
METHOD_RUNS = {
    "reparametrize": (ReparametrizeConfig(**ONE), "teacher", "images"),
    "progressive": (ProgressiveConfig(rounds=(2,), **ONE), "", "images"),
    "guided": (GuidedConfig(rounds=(1,), first_updates=1, **ONE), "teacher", "images"),
    "consistency": (ConsistencyConfig(levels=3, **ONE), "teacher", "images"),
    "consistency training": (ConsistencyConfig(levels=3, **ONE), "", "images"),
    "features": (FeaturesConfig(rounds=(2,), **ONE), "", "images"),
    "diff-instruct": (DiffInstructConfig(**ONE), "teacher", ""),
    "dpdm": (DPDMConfig(steps=2, **ONE), "teacher", "images"),
    "rectified-flow": (RectifiedFlowConfig(steps=1, **ONE), "", "trajectories"),
    "pairs": (PairsConfig(**ONE), "", "trajectories"),
}
"""Methods on denoisers, an update each, with what they call and learn from; ddgan is among the commands."""


@pytest.mark.parametrize("name", METHOD_RUNS)
def test_every_denoiser_method_trains_on_latents(name, recording, tmp_path):
    """Its student keeps the autoencoder and draws pictures; images are encoded once, to unit variance."""
    config, called, learnt = METHOD_RUNS[name]
    if name == "features":
        Classifier(ClassifierConfig(channels=(4, 4, 4), num_features=12)).save_pretrained(tmp_path / "classifier")
        config = replace(config, classifier=str(tmp_path / "classifier"))
    conditional = name == "guided"
    classes = Classes(("even", "odd"), 2) if conditional else None
    told = {"num_class_embeds": 3} if conditional else {}
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    teacher = LatentTeacher(tiny_unet(LATENTS[0], **told), scheduler, tiny_autoencoder(), "tiny", classes)
    images = load_images("digits")[:16]
    data = (images, torch.arange(16) % 2) if conditional else images
    given = {"data": data} if learnt == "images" else {"trajectories": recording} if learnt else {}
    student = distill_denoiser(
        name.partition(" ")[0],
        config,
        DenoiserStudent.from_teacher(teacher),
        tmp_path / "s",
        teacher=teacher if called else None,
        progress=False,
        **given,
    )
    assert student.model.autoencoder.sha256 == teacher.autoencoder.sha256
    drawn = student.sample(1, labels=0 if conditional else None)
    assert drawn.shape == (1, *SHAPE) and drawn.isfinite().all()


def test_features_are_those_of_decoded_latents():
    """The gradient by latents is that by pixels through the decoder's derivative."""

    class Pixels(torch.nn.Module):
        def features(self, x):
            return x.flatten(1)

    autoencoder = tiny_autoencoder()
    autoencoder.network.double()
    method = Features(FeaturesConfig(rounds=(1,)), torch.nn.Identity(), Schedule.linear(), Pixels())
    z, target = (torch.randn(2, *LATENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    method.autoencoder = autoencoder
    found = torch.autograd.grad(method.loss(z.requires_grad_(), target, torch.ones(2)), z)[0]
    decoded = autoencoder.decode(z.detach()).requires_grad_()
    method.autoencoder = None
    by_pixels = torch.autograd.grad(method.loss(decoded, autoencoder.decode(target), torch.ones(2)), decoded)[0]
    _, expected = torch.autograd.functional.vjp(autoencoder.decode, z.detach(), by_pixels)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-15) and found.abs().max() > 0


def test_an_evaluation_has_the_decoders_row(tmp_path):
    """Pictures of student, teacher and decoder against real ones; a decoder that has learnt nothing is far from them."""
    torch.manual_seed(0)
    student = Student(STUDENT).eval()
    teacher = tiny_latent_teacher()
    student.autoencoder = teacher.autoencoder.rescaled(4.0)
    student.save_pretrained(tmp_path / "s")
    pipeline_folder(tmp_path / "t")
    config = EvaluationConfig(num=130, resamples=20)
    found = evaluate_student(tmp_path / "s", tmp_path / "t", config, tmp_path / "o", cache=tmp_path / "cache", progress=False)
    rows = {(row["images"], row["against"]): row for row in found["rows"]}
    decoded, other = rows[DECODED, "real"], rows["other real images", "real"]
    assert decoded["frechet"] > 2 * other["frechet"] and decoded["samples"] == other["samples"]
    assert {"student", "teacher"} < {images for images, against in rows if against == "real"}
    assert found["pairs"]["num"] == 256 and abs(found["pairs"]["correlation"]) <= 1
