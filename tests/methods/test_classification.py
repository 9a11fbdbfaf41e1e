"""Classification as a method of the trainer; the classifier's quality is in tests/system/test_evaluate.py."""

import pytest
import torch

from advkd.data.sources import Tensors
from advkd.errors import InputError
from advkd.methods.classification import Classification, ClassifierTrainingConfig, distort
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.training.trainer import Trainer


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates on random pictures of three classes."""
    config = ClassifierTrainingConfig(steps=6, batch_size=8, checkpoint_every=2, seed=seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    images = torch.randint(256, (20, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (20,), generator=generator)
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(image_size=8, classes=3, channels=(8,), num_features=4))
    return Trainer(Classification(config, classifier, generator), Tensors(images=images, labels=labels), None, out, **options)


def test_no_distortion_is_the_image():
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(distort(images, torch.zeros(4, 3)), images, atol=1e-6)
    turned = distort(images, torch.tensor([[torch.pi / 2 / 0.12], [0.0], [0.0], [0.0]]).expand(4, 3))
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-5)


NEVER = {
    **dict.fromkeys(("steps", "batch_size", "num_features", "checkpoint_every"), (-1, 0)),
    "size": (4, 24),
    "held_out": (0, 1),
    "learning_rate": (-1, 0),
    "seed": (-1, 2**63),
    "schedule": ("sigmoid", ""),
}


@pytest.mark.parametrize("field", NEVER)
def test_numbers_that_cannot_work_are_refused_by_name(field):
    for value in NEVER[field]:
        with pytest.raises(InputError, match=f"^{field} must be"):
            ClassifierTrainingConfig(**{field: value}).validate()
