"""Student, fused student and critic: shapes, sizes, saving, sampling."""

import json

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError
from advkd.models.critic import Critic, CriticConfig
from advkd.models.student import PRESETS, Student, StudentConfig

from ..conftest import tiny_student

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
def test_presets_have_the_sizes_the_readme_says(preset, parameters):
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
