"""ADV-KD as a method of the trainer; its recipes and distances are in tests/system/test_distill.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from advkd.data.trajectories import Trajectories
from advkd.errors import InputError
from advkd.methods import adv_kd
from advkd.methods.adv_kd import recipe
from advkd.training.distillation import Distiller

from ..conftest import tiny_student

SMALL = {"critic_channels": 4, "critic_max_channels": 8, "batch_sizes": (8,)}


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of the paper's recipe with everything that a joint one may add, of which some exclude each other.

    Those of a student with classes learn the image and see fresh latents.
    """
    data = Trajectories(data)
    changes = {"recipe": "paper", "updates": (1, 1, 1, 3), "critic_updates": 2, "augment": True, "kl": 0.1, "mse": 1.0}
    changes |= {"fresh": True, "targets": "image"} if data.info.classes else {"conditional": True}
    config = recipe("joint", **SMALL, **changes, ema=0.9, checkpoint_every=2, seed=seed)
    student = tiny_student(seed + weights, classes=data.info.student_classes)
    return Distiller(data, student, config, out, **options)


def labelled_run(data, out, **changes):
    """A joint run in float64 of a student whose classes have other numbers than the teacher's and the recording's."""
    config = recipe("joint", **SMALL, **{"updates": (1,), **changes})
    return Distiller(Trajectories(data), tiny_student(classes=("a", "c")), config, out, dtype=torch.float64, progress=False)


def means(images, side):
    """Area means by the definition."""
    n, channels, size, _ = images.shape
    return images.reshape(n, channels, side, size // side, side, size // side).mean(dim=(3, 5))


class Logged:
    """Actions of an update that move nothing."""

    def __call__(self, name, loss):
        self.loss = loss

    def log(self, **values):
        self.values = values


@pytest.mark.parametrize("targets", ["states", "image"])
def test_a_student_that_makes_the_area_means_has_no_loss(targets, trajectories, tmp_path):
    """Recorded images are of 16 bits: their means over squares are exact in float64."""
    config = recipe("joint", **SMALL, updates=(1,), targets=targets, wasserstein=0.0)
    run = Distiller(Trajectories(trajectories), tiny_student(), config, tmp_path, dtype=torch.float64, progress=False)
    read, picked = [], Trajectories._picked
    run.data.data._picked = lambda name, rows: read.append(name) or picked(run.data.data, name, rows)
    batch, draw = run.next_batch()
    whole = Trajectories(trajectories).images(run.data.places(run.rows(0, 8))).double()
    made = {k: means(whole, side) for k, side in enumerate(run.student.resolutions, 1)}
    assert [tuple(image.shape) for image in made.values()] == [(8, 1, side, side) for side in (4, 8, 8, 8)]
    assert torch.equal(batch.images, whole)
    logged = Logged()
    run.method.update_student(logged, batch, draw, made, {})
    if targets == "image":
        assert read == ["z", "level_04"], "earlier levels are not read"
        assert logged.loss == 0 and all(torch.equal(batch.levels[k], image) for k, image in made.items())
        # An error e at every number of level k costs its weight times e^2.
        off = {k: image + k / 8 for k, image in made.items()}
        run.method.update_student(logged, batch, draw, off, {})
        assert [float(logged.values[f"mse_{k:02d}"]) for k in off] == pytest.approx([(k / 8) ** 2 for k in off], rel=1e-12)
        assert float(logged.loss) == pytest.approx(sum((k / 8) ** 2 for k in off) / 4 + 2 * (4 / 8) ** 2, rel=1e-12)
    else:
        assert read == ["z", *(f"level_{k:02d}" for k in range(1, 5))]
        errors = [float(logged.values[f"mse_{k:02d}"]) for k in made]
        assert errors[3] == 0 and min(errors[:3]) > 0.1, "states are no images"


def test_a_student_learns_the_image_at_every_level(labelled_paths, tmp_path):
    run = labelled_run(labelled_paths, tmp_path, targets="image", updates=(90,), learning_rate=5e-3, wasserstein=0.0)
    history = [run.step() for _ in range(90)]
    for k in range(1, 5):
        first, last = (sum(row[f"mse_{k:02d}"] for row in part) for part in (history[:10], history[-10:]))
        assert last < 0.7 * first, k


@pytest.mark.parametrize("fresh", [False, True])
def test_critics_are_told_the_class(fresh, labelled_paths, tmp_path, monkeypatch):
    """Real images are the area means; both images of a pair have one condition, the class as planes behind the latent's."""
    run = labelled_run(labelled_paths, tmp_path, targets="image", fresh=fresh, conditional=not fresh)
    seen, original = [], adv_kd.critic_gradients

    def watched(critic, real, fake, **options):
        seen.append((critic, real, fake, options["condition"]))
        return original(critic, real, fake, **options)

    monkeypatch.setattr(adv_kd, "critic_gradients", watched)
    rows = run.data.places(run.rows(0, 8))
    run.step()
    data = Trajectories(labelled_paths)
    z, levels = data.batch(rows, [4])
    planes = F.one_hot(torch.tensor([1 - row % 2 for row in rows]), 2).double().reshape(8, 2, 1, 1).expand(-1, -1, 4, 4)
    latent = [] if fresh else [z.double().reshape(8, 4, 4, 4)]
    assert len(seen) == 4
    for side, (critic, real, fake, condition) in zip(run.student.resolutions, seen):
        assert torch.equal(condition, torch.cat([*latent, planes], dim=1))
        assert critic.config.condition_channels == condition.shape[1]
        assert torch.equal(real, means(levels[4].double(), side)) and fake.shape == real.shape


def test_the_class_reaches_images_and_embedding(labelled_paths, tmp_path):
    """In the paper's recipe, too: stages before the last train the embedding with the first submodule."""
    for scope, moved in (("all", [True] * 4), ("last", [True, False, False, False])):
        run = labelled_run(labelled_paths, tmp_path / scope, recipe="paper", train_scope=scope)
        for expected in moved:
            before = run.student.embedding.weight.detach().clone()
            run.step()
            assert torch.equal(run.student.embedding.weight, before) != expected
    batch, _ = labelled_run(labelled_paths, tmp_path / "batch").next_batch()
    student = run.student.eval()
    assert batch.labels.tolist() == [1 - row % 2 for row in run.data.places(run.rows(0, 8))]
    images, others = (student(batch.z, labels=labels) for labels in (batch.labels, 1 - batch.labels))
    assert ((images - others).flatten(1).abs().amax(dim=1) > 1e-3).all()


def test_fresh_latents_have_the_batchs_classes(labelled_paths, tmp_path, monkeypatch):
    run = labelled_run(labelled_paths, tmp_path, fresh=True)
    told, forward = [], run.student.forward

    def watched(z, levels, labels):
        told.append(labels)
        return forward(z, levels, labels)

    monkeypatch.setattr(run.student, "forward", watched)
    batch, _ = run.next_batch()
    run.cursor = 0
    run.step()
    assert torch.equal(told[0], torch.cat((batch.labels, batch.labels)))


def test_samples_show_all_classes_in_turn(labelled_paths, tmp_path):
    run = labelled_run(labelled_paths, tmp_path)
    student = run.student.eval()
    images = run.method.samples(student, run.stage)
    z = student.latents(36, 0).double()
    assert torch.equal(images, student(z, labels=torch.arange(36) % 2))
    method = run.method
    method.student = many = tiny_student(classes=tuple(map(str, range(50)))).eval()
    assert torch.equal(method.samples(many, run.stage), many(many.latents(50, 0), labels=torch.arange(50)))
    early = replace(run.stage, levels=(1,))
    standardised = method.samples(many, early)  # at a third of its contrast
    method.config.targets = "image"
    assert torch.allclose(method.samples(many, early), 3 * standardised)


def test_a_target_that_is_none(trajectories, tmp_path):
    config = recipe("joint", **SMALL, targets="images")
    with pytest.raises(InputError, match="targets must be states or image, got 'images'"):
        Distiller(Trajectories(trajectories), tiny_student(), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
