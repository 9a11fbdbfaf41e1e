"""Classifiers of noisy images: the level they are told, their gradient, their accuracy at every level, refusals."""

import hashlib
import json
import math

import pytest
import torch

from advkd.errors import InputError
from advkd.evaluation.features import build_extractor
from advkd.methods.classification import ClassifierTrainingConfig
from advkd.models.classifier import Classifier, ClassifierConfig, add_noise
from advkd.runtime.files import digest
from advkd.training.classifier import train_classifier

from ..conftest import killed_after

CONFIG = ClassifierConfig(image_size=8, classes=3, channels=(8,), num_features=4, noisy=True)
ALPHA_BARS = torch.tensor([0.9999, 0.5, 1e-4], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1])


def tiny(**changes):
    """A classifier in float64 with random weights, and three noisy images."""
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(**{**vars(CONFIG), **changes})).double().eval()
    return classifier, torch.randn(3, 1, 8, 8, dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of noisy 8x8 digits."""
    folder = tmp_path_factory.mktemp("classifier") / "noisy"
    config = ClassifierTrainingConfig(size=8, steps=300, noisy=True)
    return folder, train_classifier(config, folder, progress=False)


def test_the_level_is_a_channel():
    classifier, x_t = tiny()
    seen = []
    classifier.trunk.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    logits = classifier(x_t, ALPHA_BARS)
    classifier(x_t, 0.25)
    sigma = ((1 - ALPHA_BARS) / ALPHA_BARS).sqrt()
    levels = torch.stack([sigma.log() / 4, torch.full((3,), math.log(3**0.5) / 4, dtype=torch.float64)])
    for x, level in zip(seen, levels, strict=True):
        assert torch.equal(x[:, :1], x_t)
        assert torch.allclose(x[:, 1:], level[:, None, None, None].expand(3, 1, 8, 8), rtol=1e-14)
    # Levels are those of their rows, and float32 and scalar tensors are taken, too.
    assert torch.equal(classifier(x_t, ALPHA_BARS[1]), classifier(x_t, 0.5))
    assert torch.allclose(classifier(x_t[1:2], 0.5), logits[1:2], rtol=1e-12)
    assert torch.allclose(classifier.float()(x_t.float(), ALPHA_BARS.float()), logits.float(), atol=1e-5)


@pytest.mark.parametrize("alpha_bar", [0.5, ALPHA_BARS], ids=["number", "tensor"])
def test_gradients_are_difference_quotients(alpha_bar):
    """Central differences of width 1e-6 cost 2^-52 / 1e-6 = 2e-10 by rounding, 1e-12 by themselves: no kink is that near."""
    classifier, x_t = tiny()
    found = classifier.log_probability_gradient(x_t, alpha_bar, LABELS)
    expected, flat, h = torch.zeros(3, 64, dtype=torch.float64), x_t.flatten(1), 1e-6
    with torch.no_grad():
        for i in range(64):
            offset = torch.zeros(64, dtype=torch.float64)
            offset[i] = h
            up, down = (classifier.log_probability((flat + o).reshape_as(x_t), alpha_bar, LABELS) for o in (offset, -offset))
            expected[:, i] = (up - down) / (2 * h)
    assert found.shape == x_t.shape and not found.requires_grad and found.abs().max() > 1e-3
    assert torch.allclose(found.flatten(1), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha_bar", [0, 1.0, torch.tensor([0.0, 1.0, 1e-12])])
def test_gradients_are_finite_at_the_ends(alpha_bar):
    """A sampler starts at noise alone, and its alpha_bar may be rounded to 1."""
    classifier, x_t = tiny()
    assert classifier.log_probability_gradient(x_t, alpha_bar, LABELS).isfinite().all()


def test_probabilities_of_all_classes_are_one():
    classifier, x_t = tiny()
    sums = sum(classifier.log_probability(x_t, ALPHA_BARS, torch.full((3,), y)).exp() for y in range(3))
    assert torch.allclose(sums, torch.ones(3, dtype=torch.float64), rtol=1e-14)


def test_samplers_get_gradients_in_every_mode_of_autograd():
    """No parameter gets a gradient, batch norm takes its running statistics, and a classifier that trained is in eval mode."""
    classifier, x_t = tiny()
    expected = classifier.log_probability_gradient(x_t, 0.5, LABELS)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(classifier.train().log_probability_gradient(x_t + 0, 0.5, LABELS + 0), expected)
    assert not classifier.training and all(p.grad is None for p in classifier.parameters())


def test_noise_is_added_at_the_level():
    images, noise = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    expected = torch.stack([a.sqrt() * x + (1 - a).sqrt() * z for a, x, z in zip(ALPHA_BARS, images, noise)])
    assert torch.allclose(add_noise(images, noise, ALPHA_BARS), expected, rtol=1e-14)
    assert add_noise(images.float(), noise.float(), 0.5).dtype == torch.float32


def test_accuracy_falls_with_the_noise(trained):
    """High at the least noise; chance, within 4 standard deviations, where an image is 0.6 % of its state."""
    folder, accuracy = trained
    record = json.loads((folder / "training.json").read_text())
    levels = {level["t"]: level for level in record["levels"]}
    found = [level["held_out"] for level in levels.values()]
    assert accuracy == record["accuracy"]["held_out"] == found[0] > 0.9
    assert found[:4] == sorted(found[:4], reverse=True) and found[3] < 0.5
    held_out = round(0.2 * record["images"])
    assert abs(found[-1] - 0.1) < 4 * math.sqrt(0.1 * 0.9 / held_out)
    assert levels[999]["alpha_bar"] < 5e-5 and list(levels) == [0, 199, 399, 599, 799, 999]
    classifier = Classifier.from_pretrained(folder)
    assert classifier.config.noisy and record["config"]["noisy"]
    x = torch.zeros(2, 1, 8, 8)
    assert classifier.log_probability(x, 0.5, LABELS[:2]).shape == (2,)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    config = ClassifierTrainingConfig(size=8, steps=4, batch_size=8, checkpoint_every=2, noisy=True, schedule="cosine")
    train_classifier(config, tmp_path / "whole", progress=False)
    with killed_after(3):
        train_classifier(config, tmp_path / "killed", progress=False)
    train_classifier(config, tmp_path / "killed", progress=False, resume=True)
    for name in ("config.json", "training.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("alpha_bar", "reason"),
    [
        (None, "alpha_bar is missing"),
        (-0.1, r"alpha_bar must be in \[0, 1\]"),
        (2, r"alpha_bar must be in \[0, 1\]"),
        (float("nan"), "alpha_bar must be"),
        ("half", "alpha_bar must be"),
        (torch.tensor([0.5, 0.5, 1.5]), r"alpha_bar must be in \[0, 1\]"),
        (torch.tensor(float("nan")), r"alpha_bar must be in \[0, 1\]"),
        (torch.tensor([0.5, 0.5]), r"shape \(3,\), got shape \(2,\)"),
    ],
)
def test_levels_that_cannot_be_are_refused(alpha_bar, reason):
    classifier, x_t = tiny()
    with pytest.raises(InputError, match=reason):
        classifier.log_probability_gradient(x_t, alpha_bar, LABELS)


def test_labels_of_another_number_are_refused():
    classifier, x_t = tiny()
    with pytest.raises(InputError, match=r"labels must have shape \(3,\), got \(2,\)"):
        classifier.log_probability(x_t, 0.5, LABELS[:2])


def test_classifiers_of_clean_images_do_not_guide():
    classifier, x = tiny(noisy=False)
    for refused in (classifier.log_probability, classifier.log_probability_gradient):
        with pytest.raises(InputError, match="is of clean images; train one with --noisy"):
            refused(x, 0.5, LABELS)
    assert classifier(x).shape == (3, 3)


def test_classifiers_of_noisy_images_measure_nothing(trained):
    folder, _ = trained
    with pytest.raises(InputError, match="is of noisy images; features need one that is trained without --noisy"):
        build_extractor(str(folder))
    with pytest.raises(InputError, match="alpha_bar is missing: the classifier is of noisy images"):
        Classifier.from_pretrained(folder).features(torch.zeros(1, 1, 8, 8))


def test_extractors_keep_their_hashes():
    """Caches and results of before there were noisy classifiers name extractors by their configuration and weights."""
    classifier = Classifier.from_pretrained("digits")
    values = json.loads((Classifier.embedded["digits"] / "config.json").read_text())
    assert "noisy" not in values
    shape = json.dumps({name: value for name, value in values.items() if not name.startswith("_")}, sort_keys=True)
    expected = hashlib.sha256(f"{shape} {digest(classifier.state_dict())}".encode()).hexdigest()
    assert build_extractor("digits").identity == expected
