"""Train the classifier whose features measure images of a small data set (``advkd classifier train``)."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.images import load_labelled, normalize
from ..errors import InputError, TrainingError
from ..models.classifier import Classifier, ClassifierConfig
from ..runtime.devices import plain_defaults
from ..runtime.folders import locked, require_output_folder, require_space
from ..runtime.progress import progress_bar


@dataclass
class ClassifierTrainingConfig:
    """How ``advkd classifier train`` trains.

    Attributes:
        data: ``digits`` or a folder that holds one folder of images per class.
        size: side of the images in pixels (0: from the data).
        num_features: features of an image.
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule.
        held_out: fraction of the images that is not trained on and tells the accuracy.
        seed: of the split, weights, data order and distortions.
    """

    data: str = "digits"
    size: int = 0
    num_features: int = 64
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    held_out: float = 0.2
    seed: int = 0

    def validate(self):
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("steps", "batch_size", "num_features"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size and (self.size < 8 or self.size & (self.size - 1)):
            raise InputError(f"size must be 4 * 2^k and at least 8, got {self.size}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")


@plain_defaults()
def train_classifier(config, out, progress=True):
    """Train a :class:`Classifier`, save it and its ``training.json`` (configuration, accuracies) under ``out``.

    In float32 on the CPU, whatever torch's defaults are; the images stay 8-bit in memory. Pictures are read as
    :func:`~advkd.data.images.load_labelled` says. Returns the accuracy on the held-out images.

    Raises:
        InputError: bad configuration, data that cannot be read, or ``out`` holds a model already.
        TrainingError: the loss is not finite.
    """
    config.validate()
    out = require_output_folder(out)
    with locked(out):
        return _train_locked(config, out, progress)


def _train_locked(config, out, progress):
    if (out / "config.json").exists():
        raise InputError(f"--out {out} holds a model already: name another folder")
    images, labels, names = load_labelled(config.data, config.size or None)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator, dtype=torch.int64, device="cpu")
    held_out = max(1, round(config.held_out * len(images)))
    if len(images) - held_out < 2:
        raise InputError(f"--data {config.data} holds {len(images)} images, too few to train on")
    test, train = order[:held_out], order[held_out:]
    torch.manual_seed(config.seed)
    classifier = Classifier(_shape(config, images, len(names)))
    require_space(out, 8 * sum(p.numel() for p in classifier.parameters()) + 2**20, "the classifier")
    _fit(classifier, images, labels, train, config, generator, progress)
    classifier.calibrate(images[train])
    accuracy = {part: classifier.accuracy(images[i], labels[i]) for part, i in (("held_out", test), ("trained", train))}
    record = {"config": asdict(config), "accuracy": accuracy, "classes": names, "images": len(images)}
    classifier.training_record = record
    classifier.save_pretrained(out)
    return accuracy["held_out"]


def _shape(config, images, classes):
    size = images.shape[-1]
    halvings = size.bit_length() - 3
    channels = tuple(min(64, 32 << i) for i in range(halvings))
    return ClassifierConfig(
        name=Path(config.data).resolve().name if config.data != "digits" else "digits",
        image_size=size,
        image_channels=images.shape[1],
        classes=classes,
        channels=channels,
        num_features=config.num_features,
    )


def _fit(classifier, images, labels, train, config, generator, progress):
    """Train on the rows ``train`` of the images, which become floating point a batch at a time."""
    optimizer = torch.optim.AdamW(classifier.parameters(), config.learning_rate, weight_decay=1e-2)
    classifier.train()
    bar = progress_bar(range(config.steps), desc="classifier", shown=progress)
    for step in bar:
        chosen = torch.randint(len(train), (config.batch_size,), generator=generator, dtype=torch.int64, device="cpu")
        rows = train[chosen]
        loss = F.cross_entropy(classifier(_distort(normalize(images[rows]), generator)), labels[rows])
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is not finite at step {step}: lower learning_rate (now {config.learning_rate})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def _distort(images, generator):
    """Small rotations, scalings and shifts, so that a few hundred images teach the classes and not themselves."""
    n = len(images)
    spread = torch.tensor([[0.12], [0.06], [0.06], [0.06]], dtype=torch.float32, device="cpu")
    angle, scale, dx, dy = torch.randn(4, n, generator=generator, dtype=torch.float32, device="cpu") * spread
    scale = 1 + scale
    rows = (scale * angle.cos(), -scale * angle.sin(), dx), (scale * angle.sin(), scale * angle.cos(), dy)
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
