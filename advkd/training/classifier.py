"""Training of classifiers of clean images, for features, or of noisy ones, for guidance (``advkd classifier train``)."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.glyph_sets import trained_glyphs
from ..data.images import load_labelled
from ..data.sources import Tensors
from ..diffusion.training_schedules import noise_scheduler
from ..errors import InputError
from ..methods.classification import Classification, ClassifierTrainingConfig
from ..models.classifier import Classifier, ClassifierConfig
from ..runtime.devices import plain_defaults
from .checkpoint import CHECKPOINT, require_unclaimed
from .trainer import Trainer

LEVELS = 5
"""Intervals of the timesteps between which a classifier of noisy images is measured."""


@plain_defaults()
def train_classifier(config: ClassifierTrainingConfig, out: str | Path, progress: bool = True, resume: bool = False) -> float:
    """Train a :class:`Classifier`, save it and its ``training.json`` (configuration, accuracies) under ``out``.

    In float32 on the CPU, whatever torch's defaults are; the images stay 8-bit in memory. Pictures are read as
    :func:`~advkd.data.images.load_labelled` says. A checkpoint every ``config.checkpoint_every`` steps makes a killed run go on
    with ``resume=True``.

    Args:
        config: a :class:`~advkd.methods.classification.ClassifierTrainingConfig`, with the data.
        out: folder for the classifier, ``training.json`` and the checkpoint, which is removed at the end.
        progress: show a bar.
        resume: go on from ``out``'s checkpoint.

    Returns:
        The accuracy on the held-out images, in [0, 1]; of a classifier of noisy images that at the least noise.

    Raises:
        InputError: bad configuration, data that cannot be read, or ``out`` holds a model already.
        TrainingError: the loss is not finite.

    Examples:
        >>> train_classifier(ClassifierTrainingConfig(data="pictures-by-class"), "classifier")
    """
    config.validate()
    require_unclaimed(out, resume, ("config.json",), "model")
    images, labels, names = load_labelled(config.data, config.size or None, None, config.classes, config.images, progress)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator, dtype=torch.int64, device="cpu")
    held_out = max(1, round(config.held_out * len(images)))
    if len(images) - held_out < 2:
        raise InputError(f"--data {config.data} holds {len(images)} images, too few to train on")
    test, train = order[:held_out], order[held_out:]
    torch.manual_seed(config.seed)
    alpha_bars = noise_scheduler(config.schedule).alphas_cumprod.double() if config.noisy else None
    method = Classification(config, Classifier(_shape(config, images, len(names))), generator, alpha_bars)
    parts = {"held_out": test, "trained": train}
    record: dict[str, Any] = {"config": asdict(config), "classes": names, "images": len(images)}
    if (glyphs := trained_glyphs(config.data, config.classes, config.images)) is not None:
        record["data"] = glyphs.description()
    source = Tensors(images=images, labels=labels, rows=train)
    save = partial(_save, images=images, labels=labels, parts=parts, record=record, alpha_bars=alpha_bars)
    Trainer(method, source, None, out, resume=resume, progress=progress, save=save, what="model").run()
    return record["accuracy"]["held_out"]


def _save(classifier, out, images, labels, parts, record, alpha_bars):
    """Calibrate, measure and write a classifier; its checkpoint has served then."""
    level = None
    if alpha_bars is None:
        classifier.calibrate(images[parts["trained"]])
    else:
        level = alpha_bars[0].item()
        record["levels"] = _accuracies(classifier, images[parts["held_out"]], labels[parts["held_out"]], alpha_bars)
    record["accuracy"] = {name: classifier.accuracy(images[rows], labels[rows], level) for name, rows in parts.items()}
    classifier.training_record = record
    classifier.save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)


def _accuracies(classifier, images, labels, alpha_bars):
    """Accuracy at timesteps from the first to the last."""
    timesteps = [i * (len(alpha_bars) - 1) // LEVELS for i in range(LEVELS + 1)]
    levels = [{"t": t, "alpha_bar": alpha_bars[t].item()} for t in timesteps]
    return [{**level, "held_out": classifier.accuracy(images, labels, level["alpha_bar"])} for level in levels]


def _shape(config, images, classes):
    size, glyphs = images.shape[-1], trained_glyphs(config.data, config.classes, config.images)
    halvings = size.bit_length() - 3
    channels = tuple(min(64, 32 << i) for i in range(halvings))
    return ClassifierConfig(
        name=glyphs.name if glyphs else config.data if config.data == "digits" else Path(config.data).resolve().name,
        image_size=size,
        image_channels=images.shape[1],
        classes=classes,
        channels=channels,
        num_features=config.num_features,
        noisy=config.noisy,
    )
