"""Classifier-based feature distillation (Sun et al. 2023): rounds of progressive distillation, compared by features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.schedule import Schedule
from ..errors import InputError
from ..models.classifier import Classifier
from ..runtime.files import digest
from ..runtime.launcher import processes
from .base import Kept, Settings, Stage, Trained
from .denoiser_method import require_unused
from .distances import diversity, entropy, feature_kl
from .progressive import Progressive, ProgressiveConfig

REMEDY = "train another one: advkd classifier train --data {} --seed 1 --num-features 48 --out second"
"""Remedy for a classifier that is missing, or is that of a data set's Frechet distances."""


@dataclass
class FeaturesConfig(ProgressiveConfig):
    """How ``advkd distill features`` trains.

    Attributes:
        classifier: folder of ``advkd classifier train``: another network than that of the Frechet distances.
        tau: temperature by which the target's features are divided before softmax; below 1 they are sharpened.
        alpha: weight of entropy and diversity; above 0 it takes a run in one process.
        beta: share of the entropy of each prediction, which falls; the rest is that of the mean prediction's, which rises.
        pixels: weight of the error of progressive, ``weight`` times the squared error of x0.
    """

    classifier: str = ""
    tau: float = 0.9
    alpha: float = 0.0
    beta: float = 0.75
    pixels: float = 0.0

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("tau", 0 < self.tau < math.inf, "positive and finite"),
            ("alpha", 0 <= self.alpha < math.inf, "at least 0 and finite"),
            ("beta", 0 <= self.beta <= 1, "in [0, 1]"),
            ("pixels", 0 <= self.pixels < math.inf, "at least 0 and finite"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        require_unused(self, not self.alpha, "alpha", "beta")
        require_unused(self, not self.pixels, "pixels", "weight")
        if self.alpha and processes()[1] > 1:
            raise InputError(
                "alpha: the mean prediction is that of a whole batch, which one process must have: "
                "start the run without a launcher, or leave alpha out"
            )


class Features(Progressive):
    """Rounds as those of progressive, whose student is compared with its target by the features of a classifier.

    Args:
        config: a :class:`FeaturesConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of student and teacher.
        classifier: module whose ``features`` gives those of ``(N, ...)`` images, ``(N, ...)``, and which itself gives logits,
            ``(N, classes)``; it is frozen. None: that of the folder that ``config`` names.

    Raises:
        InputError: more steps than the schedule has levels, or no classifier that is fit.
    """

    name = "features"
    reference = "Sun et al. 2023 (CFD), Accelerating diffusion sampling with classifier-based feature distillation"
    requires = "images (--data), a student of v prediction (--init), and a classifier of your own training (--classifier)"
    Config = FeaturesConfig
    config: FeaturesConfig

    def __init__(self, config: FeaturesConfig, student: nn.Module, schedule: Schedule, classifier: nn.Module | None = None):
        super().__init__(config, student, schedule)
        self.classifier: Any = load_classifier(config.classifier) if classifier is None else classifier
        self._digest = digest(self.classifier.state_dict())

    @classmethod
    def begin(cls, config: Any, student: Any) -> Any:
        """The student itself.

        Args:
            config: a :class:`FeaturesConfig`.
            student: a :class:`~advkd.diffusion.denoiser_student.DenoiserStudent`.

        Returns:
            ``student``.

        Raises:
            InputError: weights of another prediction, or images of another shape than the classifier's.
        """
        config.validate()
        shape = load_classifier(config.classifier).config
        taken, drawn = (shape.image_channels, shape.image_size, shape.image_size), tuple(student.model.image_shape)
        if taken != drawn:
            raise InputError(
                f"classifier: {config.classifier} takes images {taken}, the student draws {drawn}: "
                "train one on images of that shape (advkd classifier train --data ... --size ...)"
            )
        return super().begin(config, student)

    def settings(self) -> Settings:
        """The trainer's part of the configuration; the classifier's folder may change, its weights not."""
        settings = super().settings()
        return replace(settings, free=(*settings.free, "classifier"))

    def identity(self) -> dict[str, Any]:
        """Values of :class:`Progressive`, and the digest of the classifier's weights."""
        return {**super().identity(), "classifier": self._digest}

    def measured(self, model: Any, stage: Stage) -> dict[str, Any]:
        """The digest of the classifier's weights.

        Args:
            model: not used.
            stage: not used.

        Returns:
            ``{"classifier_sha256": ...}``.
        """
        return {"classifier_sha256": self._digest}

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """Student and teacher of the round, and the classifier.

        Args:
            stage: the round.

        Returns:
            Modules of :class:`Progressive`, and ``classifier``.
        """
        return {**super().build(stage), "classifier": self.frozen(self.classifier)}

    def loss(self, x0: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """KL of the features, alpha (beta H(p) - (1 - beta) H(mean of p)), and a part of the error of x0; latents are decoded.

        Args:
            x0: ``(N, ...)`` of the student, which is not clamped: a clamped pixel has no gradient.
            target: ``(N, ...)`` x0 to be learnt.
            sigma: ``(N,)`` noise levels.

        Returns:
            Scalar.
        """
        config, phi = self.config, self.classifier
        image = self._picture(x0)
        with torch.no_grad():
            wanted = phi.features(self._picture(target))
        loss = feature_kl(phi.features(image), wanted, config.tau)
        if config.alpha:
            logits = phi(image)
            loss = loss + config.alpha * (config.beta * entropy(logits) - (1 - config.beta) * diversity(logits))
        return loss + config.pixels * super().loss(x0, target, sigma) if config.pixels else loss

    def _picture(self, x):
        return x if self.autoencoder is None else self.autoencoder.decode(x).to(x.dtype)


def load_classifier(folder: str | Path) -> Classifier:
    """A classifier to learn from: of clean images, and none that distances of the embedded data are measured with.

    Args:
        folder: of ``advkd classifier train``.

    Returns:
        The classifier, in eval mode.

    Raises:
        InputError: no folder, a classifier of noisy images, or the weights of an embedded classifier.
    """
    if not folder:
        raise InputError(f"classifier: none is named: {REMEDY.format('digits')}, and name its folder by --classifier")
    if folder not in Classifier.embedded and not Path(folder).is_dir():
        raise InputError(f"classifier: there is no folder {folder}: {REMEDY.format('digits')}")
    classifier = Classifier.from_pretrained(folder)
    if classifier.config.noisy:
        raise InputError(f"classifier: {folder} is of noisy images: train one without --noisy")
    weights = _weights(classifier.state_dict())
    for name in Classifier.embedded:
        if weights == _weights(Classifier.from_pretrained(name).state_dict()):
            raise InputError(
                f"classifier: {folder} is that with which Frechet distances of {name} are measured: {REMEDY.format(name)}"
            )
    return classifier


def _weights(state: Mapping[str, Tensor]) -> str:
    """Digest of all but the features' common scale, which changes no Frechet distance but for a factor."""
    return digest({name: tensor for name, tensor in state.items() if name != "scale"})
