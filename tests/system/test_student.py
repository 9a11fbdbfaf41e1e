"""Student, fused student and critic: shapes, sizes, saving, sampling."""

import copy
import io
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

from advkd.errors import BackendUnavailableError, InputError
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.models.critic import Critic, CriticConfig
from advkd.models.fused_student import FusedStudent
from advkd.models.shape import PRESETS, StudentConfig, batches, gather
from advkd.models.student import Student
from advkd.runtime.extension import extension_gap

from ..conftest import tiny_student

CPU = pytest.mark.skipif(extension_gap("cpu") is not None, reason="the cpu extension is not built")
RESOLUTIONS_256 = [4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256]


def trained_like(student):
    """Batch-norm statistics and scales away from their initial values, as after training."""
    generator = torch.Generator().manual_seed(5)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
    return student.eval()


@pytest.mark.parametrize(("preset", "parameters"), [("paper-256", 1_878_275), ("pyramid-256", 2_297_827), ("digits", 727_665)])
def test_presets_have_the_sizes_in_the_readme(preset, parameters):
    student = Student.from_preset(preset)
    assert student.num_parameters(terminals=False) == parameters
    assert sum(p.numel() for p in student.parameters()) == student.num_parameters()
    assert student.depth == 12 and len(student.terminals) == 11
    assert student.resolutions == [min(r, student.config.image_size) for r in RESOLUTIONS_256]


@pytest.mark.parametrize("size", [8, 16, 64, 512])
def test_other_resolutions(size):
    depth = max(4, 2 * (size.bit_length() - 3))
    student = Student(StudentConfig(size, 2, channels=(3,) * depth, latent_size=1)).eval()
    z = student.latents(1)
    assert [level.shape[-1] for level in student.levels(z)] == student.resolutions
    assert student(z).shape == (1, 2, size, size)


def test_levels_end_with_the_image():
    student = trained_like(tiny_student())
    z = student.latents(3)
    levels = student.levels(z)
    assert [tuple(level.shape) for level in levels] == [(3, 1, side, side) for side in (4, 8, 8, 8)]
    assert torch.equal(levels[-1], student(z))
    assert student(z).abs().max() <= 1


def test_detail_noise_reaches_the_image():
    student = trained_like(Student(StudentConfig(16, 1, channels=(4,) * 6, latent_size=1, detail_noise=True)))
    x_T = torch.randn(2, 1, 16, 16)
    z = student.project(x_T)
    assert z.shape == (2, student.latent_numel) == (2, 256)
    image = student(z)
    for part in (slice(16, 64), slice(64, 256)):
        changed = z.clone()
        changed[:, part] += 1
        assert not torch.equal(student(changed), image)
    assert (student.fuse()(z) - image).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_fused_is_the_student(dtype, tolerance):
    student = trained_like(tiny_student())
    z = student.latents(4, seed=1)
    fused = student.fuse(dtype=dtype)
    assert fused(z).dtype == dtype
    assert (fused(z).float() - student(z)).abs().max() <= tolerance
    assert not any("terminal" in name for name, _ in fused.named_buffers())
    assert not any(value is student for value in vars(fused).values()), "the student must not stay alive"
    assert torch.equal(fused.latents(2, seed=9, start=3), student.latents(2, seed=9, start=3))
    with pytest.raises(BackendUnavailableError, match="student_forward"):
        student.fuse(backend="cuda")
    with pytest.raises(InputError, match="dtype"):
        student.fuse(dtype=torch.int8)


def test_noise_and_images_do_not_depend_on_the_batch():
    student = trained_like(tiny_student())
    assert torch.equal(student.latents(10, seed=3)[4:6], student.latents(2, seed=3, start=4))
    assert not torch.equal(student.latents(2, seed=3), student.latents(2, seed=4))
    fused = student.fuse()
    whole = fused.sample(10, seed=3, batch_size=10)
    assert (fused.sample(10, seed=3, batch_size=3) - whole).abs().max() <= 1e-5
    assert (fused.sample(3, seed=3, start=7) - whole[7:]).abs().max() <= 1e-5
    assert fused.sample(0).shape == (0, 1, 8, 8)
    with pytest.raises(InputError, match="batch_size"):
        fused.sample(1, batch_size=0)


def test_saving_and_loading(tmp_path):
    student = trained_like(tiny_student())
    student.save_pretrained(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = Student.from_pretrained(tmp_path / "s")
    z = student.latents(2)
    assert again.config == student.config and torch.equal(again(z), student(z))


MODELS = {
    "student": tiny_student,
    "engine": lambda: tiny_student().eval().fuse(tune=False),
    "classifier": lambda: Classifier(ClassifierConfig(image_size=8, channels=(8,))),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_equal_weights_give_equal_files(make, tmp_path):
    model, written = make(), set()
    for _ in range(20):
        model.save_pretrained(tmp_path)
        written.add((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(written) == 1
    type(model).from_pretrained(tmp_path)


def test_a_digest_under_another_name_is_refused(tmp_path):
    """Flipped bits in the key would make the file look like one of an older version, whose weights are not checked."""
    tiny_student().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"digest"', b'"dygest"', 1))
    with pytest.raises(InputError, match="its header has the unknown entry 'dygest'"):
        Student.from_pretrained(tmp_path)
    # Other programs write other entries.
    for metadata in ({"format": "pt"}, None, {"format": "pt", "license": "MIT", "commit": "d" * 40}):
        save_file(tiny_student().state_dict(), path, metadata)
        Student.from_pretrained(tmp_path)


def test_altered_weights_are_refused(tmp_path):
    student = tiny_student()
    student.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="model.safetensors is damaged or of another model .it is altered"):
        Student.from_pretrained(tmp_path)
    # Files of other programs have no digest.
    save_file(load_file(path), path, {"format": "pt"})
    found = Student.from_pretrained(tmp_path).state_dict()
    assert [name for name, tensor in student.state_dict().items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("head.weight", float("nan"), "head.weight holds numbers that are not finite"),
        ("submodules.1.norm1.bias", float("inf"), "norm1.bias holds numbers that are not finite"),
        ("submodules.1.convolution1.weight", -1e13, "convolution1.weight holds numbers .* larger than 1e.12"),
        ("submodules.0.norm2.running_var", -1.0, "running_var holds negative variances"),
    ],
)
def test_weights_that_no_training_gives_are_refused(name, value, why, tmp_path):
    from advkd.export.pipeline import StudentModel

    state = {key: tensor.clone() for key, tensor in tiny_student().state_dict().items()}
    state[name].view(-1)[0] = value
    tiny_student().save_pretrained(tmp_path)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for read in (Student.from_pretrained, StudentModel.from_pretrained):
        with pytest.raises(InputError, match=f"{tmp_path}.*{why}"):
            read(tmp_path)


def test_an_engines_weights_that_cannot_be_packed_are_named(tmp_path):
    tiny_student().eval().fuse("reference").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    for bias in (torch.full_like(state["bias3"], float("nan")), state["bias3"].int()):
        save_file({**state, "bias3": bias}, path, {"format": "pt"})
        with pytest.raises(InputError, match=f"{path} is damaged .*bias3 holds"):
            FusedStudent.from_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path):
    tiny_student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "chanels": 3}))
    with pytest.raises(InputError, match="unknown key 'chanels'"):
        Student.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "slope": "steep"}))
    with pytest.raises(InputError, match="slope must be float"):
        Student.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match="UNet2DModel, not a Student"):
        Student.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is damaged"):
        Student.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="does not exist"):
        Student.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json is not what advkd writes"):
        Student.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        Student.from_pretrained(tmp_path / "nothing")


def test_push_to_hub_uploads_the_folder(monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Url", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            uploaded[repo_id] = sorted(p.name for p in Path(folder_path).iterdir())
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tiny_student().push_to_hub("digits") == "commit"
    assert uploaded == {"someone/digits": ["config.json", "diffusion_pytorch_model.safetensors"]}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_size": 48}, "image_size"),
        ({"image_size": 4}, "image_size"),
        ({"channels": (8,) * 11}, "depth"),
        ({"channels": (8,) * 10}, "depth"),
        ({"channels": (8,) * 11 + (0,)}, "channels"),
        ({"image_channels": 5}, "image_channels"),
        ({"slope": -0.1}, "slope"),
        ({"latent_size": 65}, "latent_size"),
        ({"detail_noise": True}, "latent_size"),
    ],
)
def test_impossible_configurations_are_refused(changes, name):
    from dataclasses import replace

    with pytest.raises(InputError, match=name):
        replace(PRESETS["paper-256"], **changes)
    with pytest.raises(InputError, match="preset"):
        Student.from_preset("celeba")


@pytest.mark.parametrize("size", [4, 8, 32, 256])
def test_critic_scores_samples_independently(size):
    critic = Critic(CriticConfig(size, 3, channels=4, max_channels=8, condition_channels=2))
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in critic.modules())
    x, condition = torch.randn(3, 3, size, size), torch.randn(3, 2, 4, 4)
    scores = critic(x, condition)
    assert scores.shape == (3,)
    assert torch.allclose(scores[1:2], critic(x[1:2], condition[1:2]), atol=1e-5)
    with pytest.raises(InputError, match="condition"):
        critic(x)
    with pytest.raises(InputError, match="image_size"):
        CriticConfig(image_size=6)


def test_the_shipped_student_draws_digits_at_once():
    student = Student.from_pretrained("digits")
    images = student.fuse().sample(16, seed=1)
    # Digits are bright strokes on a black ground: most pixels near -1, some near 1, and no two images alike.
    assert images.shape == (16, 1, 32, 32)
    assert 0.25 < (images < -0.8).float().mean() < 0.8
    assert 0.05 < (images > 0.5).float().mean() < 0.5
    assert torch.pdist(images.flatten(1)).min() > 2


def with_norms(student, replace):
    """A copy whose norms are ``replace(block, name)``."""
    student = copy.deepcopy(student)
    for block, name in itertools.product(student.submodules, ("norm1", "norm2")):
        setattr(block, name, replace(block, name))
    return student


def plain_norm(block, name):
    """torch's own batch norm with the state of one of the student's."""
    norm = torch.nn.BatchNorm2d(getattr(block, name).num_features)
    norm.load_state_dict(getattr(block, name).state_dict())
    return norm.train(block.training)


def norms(student):
    return [norm for block in student.submodules for norm in (block.norm1, block.norm2)]


@pytest.mark.parametrize("averaged", [False, True], ids=["student", "averaged"])
def test_update_bn_gives_every_norm_torchs_statistics(averaged):
    ours = trained_like(tiny_student())
    theirs = with_norms(ours, plain_norm)
    loader = [ours.latents(count, seed) for seed, count in enumerate((4, 6, 2))]
    found, wanted = (AveragedModel(model) if averaged else model for model in (ours, theirs))
    for model in (found, wanted):
        update_bn(loader, model)
    found, wanted = (model.module if averaged else model for model in (found, wanted))
    for ours, theirs in zip(norms(found), norms(wanted), strict=True):
        assert ours.momentum == theirs.momentum == 0.1 and ours.num_batches_tracked == theirs.num_batches_tracked == 3
        for name in ("running_mean", "running_var"):
            a, b = getattr(ours, name), getattr(theirs, name)
            # The rounding of the eight layers before.
            assert (a - b).abs().max() <= 256 * torch.finfo(torch.float32).eps * (1 + b.abs().max())


def test_a_converted_student_draws_the_same_images():
    student = trained_like(tiny_student())
    z = student.latents(3)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(student)).eval()
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms(converted))
    with torch.no_grad():
        for found, wanted in zip(converted.levels(z), student.levels(z), strict=True):
            assert (found - wanted).abs().max() <= 1e-6
    assert torch.equal(converted.fuse("reference")(z), student.fuse("reference")(z))
    # Without a process group torch's synchronised batch norm trains like its plain one.
    plain = with_norms(student, plain_norm)
    gradients = []
    for model in (converted.train(), plain.train()):
        model(z).square().mean().backward()
        gradients.append([p.grad for p in model.submodules.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_norms_that_convolutions_have_swallowed():
    student = trained_like(tiny_student())
    z = student.latents(3)
    swallowed = copy.deepcopy(student)
    for block, i in itertools.product(swallowed.submodules, "12"):
        convolution, norm = getattr(block, f"convolution{i}"), getattr(block, f"norm{i}")
        setattr(block, f"convolution{i}", fuse_conv_bn_eval(convolution, norm))
        setattr(block, f"norm{i}", torch.nn.Identity())
    with torch.no_grad():
        assert (swallowed(z) - student(z)).abs().max() <= 1e-5
    assert (swallowed.fuse("reference")(z) - student(z)).abs().max() <= 1e-5


def test_norms_without_running_statistics():
    """They use each batch's statistics, as torch's do; that is no convolution, and cannot be fused."""
    student = trained_like(tiny_student())
    z = student.latents(4)
    found, wanted = copy.deepcopy(student), with_norms(student, plain_norm)
    for model in (found, wanted):
        torch.func.replace_all_batch_norm_modules_(model)
    for grad, training in itertools.product((False, True), (False, True)):
        with torch.set_grad_enabled(grad):
            assert (found.train(training)(z) - wanted.train(training)(z)).abs().max() <= 1e-5
    with pytest.raises(InputError, match="BatchNorm2d has no running statistics"):
        found.fuse()
    grouped = with_norms(student, lambda block, name: torch.nn.GroupNorm(2, 8))
    assert grouped(z).shape == (4, 1, 8, 8)
    with pytest.raises(InputError, match="not GroupNorm"):
        grouped.fuse()


def test_layers_of_another_form_cannot_be_fused():
    student = trained_like(tiny_student())
    student.submodules[1].slope = 0.5
    with pytest.raises(InputError, match="slopes must be equal in an engine, .* got 0.2, 0.5"):
        student.fuse()
    student = trained_like(tiny_student())
    student.submodules[1].convolution2 = torch.nn.Conv2d(8, 8, 1, bias=False)
    with pytest.raises(InputError, match=r"convolution 3 must have 3x3 pixels .*, got Conv2d\(8, 8, kernel_size=\(1, 1\)"):
        student.fuse()
    student.submodules[1].convolution2 = torch.nn.Conv2d(8, 7, 3, padding=1, bias=False)
    student.submodules[1].norm2 = torch.nn.Identity()
    with pytest.raises(InputError, match=r"convolution 3 must have weights \(8, 8, 3, 3\), got \(7, 8, 3, 3\)"):
        student.fuse()


def test_an_engine_has_the_slope_of_the_layers():
    student = trained_like(tiny_student())
    for block in student.submodules:
        block.slope = 0.5
    z = student.latents(3)
    assert (student.fuse()(z) - student(z)).abs().max() <= 1e-5


def everything_drawn(student, fused):
    """Results of the public functions that make tensors."""
    x_T = torch.arange(2.0 * 64, dtype=torch.float32, device="cpu").reshape(2, 1, 8, 8).sin()
    again = student.fuse("reference", tune=False)
    yield from (student.latents(3, seed=1), student.sample(3, seed=1), student.project(x_T))
    yield from (fused.latents(3, seed=1), fused.sample(3, seed=1), *fused.stream(3, seed=1, batch_size=2))
    yield from (again.sample(3, seed=1), student.sample(0), fused.sample(0), gather(iter(()), 0, student.shape))
    yield from fused.stream(3, seed=1, dtype=torch.uint8)


@pytest.fixture
def other_defaults(request):
    torch.set_default_dtype(getattr(torch, request.param, torch.float32))
    torch.set_default_device("meta" if request.param == "meta" else "cpu")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def drawn_before():
    student = trained_like(tiny_student())
    fused = student.fuse(tune=False)
    return student, fused, list(everything_drawn(student, fused))


@pytest.mark.parametrize("other_defaults", ["float64", "bfloat16", "float16", "meta"], indirect=True)
def test_torchs_defaults_do_not_change_what_is_drawn(drawn_before, other_defaults):
    """Neither another default dtype nor another default device (``meta`` stands for a GPU) affects documented results."""
    student, fused, wanted = drawn_before
    found = list(everything_drawn(student, fused))
    for ours, right in zip(found, wanted, strict=True):
        assert ours.device.type == "cpu" and ours.dtype == right.dtype and torch.equal(ours, right)


@CPU
@pytest.mark.parametrize("other_defaults", ["float64", "meta"], indirect=True)
def test_torchs_defaults_do_not_reach_a_plan(drawn_before, other_defaults):
    student, fused, _ = drawn_before
    tuned = student.fuse("cpu")
    assert (tuned.sample(3, seed=1) - fused.sample(3, seed=1)).abs().max() <= 1e-5
    assert all(row.measured > 0 for row in tuned.plan().rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_float32_whatever_the_students_dtype(dtype):
    student = trained_like(tiny_student())
    images = copy.deepcopy(student).to(dtype).sample(3, seed=1)
    assert images.dtype == torch.float32
    assert (images - student.sample(3, seed=1)).abs().max() <= (1e-5 if dtype == torch.float64 else 0.1)


def test_batches_are_made_when_they_are_asked_for():
    assert list(batches(10, 4)) == [(0, 4), (4, 4), (8, 2)] and list(batches(0, 4)) == []
    assert next(batches(10**15, 64)) == (0, 64)
    for n, batch_size, message in ((-1, 4, "^n must be at least 0"), (4, 0, "^batch_size must be at least 1")):
        with pytest.raises(InputError, match=message):
            batches(n, batch_size)


@pytest.fixture(params=["blocks", "pyramid"])
def either_latent(request):
    detail = request.param == "pyramid"
    torch.manual_seed(0)
    return trained_like(Student(StudentConfig(16, 1, channels=(4,) * 6, latent_size=1 if detail else 2, detail_noise=detail)))


class Levels(torch.nn.Module):
    """Two of a student's levels."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, z):
        levels = self.student(z, levels=(3, 6))
        return levels[3], levels[6]


def exported(model, z):
    """A program of a model for one to 64 latents, through a file; it has only torch's ops where it needs no others."""
    program = torch.export.export(model, (z,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.kernels)], ids=["grad", "no grad"])
def test_a_student_is_exported_for_every_batch_size(either_latent, grad):
    for model in (either_latent, Levels(either_latent)):
        with torch.set_grad_enabled(grad):
            program = exported(model, either_latent.latents(4))
        assert "advkd" not in str(program.graph_module.code)
        for count in (1, 7):
            z = either_latent.latents(count, seed=2)
            for found, wanted in zip(as_tuple(program.module()(z)), as_tuple(model(z)), strict=True):
                assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=CPU)])
def test_a_fused_student_is_exported_for_every_batch_size(either_latent, backend):
    fused = either_latent.fuse(backend, tune=False)
    program = exported(fused, fused.latents(4))
    for count in (1, 7):
        z = fused.latents(count, seed=2)
        assert torch.equal(program.module()(z), fused(z))


def test_a_traced_student_takes_every_batch_size(either_latent):
    z = either_latent.latents(4)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(either_latent, (z,)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for count in (1, 7):
        z = either_latent.latents(count, seed=2)
        assert (traced(z) - either_latent(z)).abs().max() <= 1e-5


@pytest.mark.kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_student_is_compiled_for_every_batch_size(either_latent, training):
    torch._dynamo.reset()
    right = copy.deepcopy(either_latent.train(training))
    compiled = torch.compile(either_latent, dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (4, 7):
        z = right.latents(count, seed=2)
        assert (compiled(z) - right(z)).abs().max() <= 1e-5
