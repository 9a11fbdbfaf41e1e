"""Guidance towards a class: the network's output is changed before the step, which clamps x0 after it.

Classifier guidance (Dhariwal and Nichol 2021, algorithm 2): eps - w sqrt(1 - a) grad_x log p(class | x). Classifier-free
guidance (Ho and Salimans 2022): (1 + w) eps(x, class) - w eps(x). By Bayes' rule the second is the first with weight 1 + w on
the unconditional model, where the classifier is the one that both networks imply. w = 0 is the conditional model in the second
and the unconditional one in the first; diffusers' ``guidance_scale`` is 1 + w.
"""

import csv
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import InputError
from ..models.denoiser import LowImage, pack
from ..ops.arguments import finite
from .prediction import eps_weights

ALL = "all"
"""Text that stands for every class in turn."""

ConditionalNetwork = Callable[..., torch.Tensor]
"""Function of the state ``(N, ...)``, its :class:`~advkd.diffusion.loop.Place` and classes ``(N,)`` or None, to an output."""


class Model(Protocol):
    """The part of a :class:`~advkd.diffusion.sampling.DiffusionModel` that guidance reads."""

    name: str
    prediction: str
    num_classes: int
    null_class: int | None
    most_guidance: float
    latent: int
    low: Any
    shape: tuple[int, ...]
    state_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Device of the states."""


class NoisyClassifier(Protocol):
    """A classifier of noisy states."""

    def log_probability_gradient(self, x: torch.Tensor, alpha_bar: torch.Tensor, labels: torch.Tensor, /) -> torch.Tensor:
        """Gradient by the state of log p(class | x)."""


def guided(
    model: Model,
    network: ConditionalNetwork,
    n: int,
    labels: torch.Tensor | Sequence[int] | int | None,
    guidance: float,
    classifier: NoisyClassifier | None,
) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """A network of state and level: the model's own for ``n`` samples, with their classes and guidance.

    Args:
        model: the model, which knows its classes.
        network: its network.
        n: number of samples.
        labels: ``(n,)`` classes, or one for all, or None; a tensor that :func:`classes_of` gave is read at every call.
        guidance: weight w, at least 0.
        classifier: for classifier guidance, or None for classifier-free guidance.

    Returns:
        Function of the state and its :class:`~advkd.diffusion.loop.Place` that gives the output of the same kind.

    Raises:
        InputError: as :func:`classes_of`.
    """
    labels = classes_of(model, n, labels, guidance, classifier)
    if is_packed(model):
        told, most = null_labels(model, n) if labels is None else labels, model.most_guidance
        weights = torch.full((n,), float(guidance), dtype=torch.float32, device=model.device) if most else None
        # Packed at every call: the next batch's classes may have taken the place of these.
        return lambda x, place: network(x, place, pack(told, weights, place.latent))
    if labels is None or classifier is not None:
        null = null_labels(model, n)
        plain = (lambda x, place: network(x, place)) if null is None else lambda x, place: network(x, place, null)
        return plain if labels is None else _classifier_guided(plain, classifier, labels, guidance, model.prediction)
    if guidance == 0:
        return lambda x, place: network(x, place, labels)
    return _classifier_free(network, labels, model.null_class, guidance)


def is_packed(model: Model) -> bool:
    """True if a model's network takes :func:`advkd.models.denoiser.pack` in the place of classes.

    Args:
        model: the model.
    """
    return bool(model.most_guidance or model.latent)


def classes_of(
    model: Model,
    n: int,
    labels: torch.Tensor | Sequence[int] | int | None,
    guidance: float,
    classifier: NoisyClassifier | None,
) -> torch.Tensor | None:
    """The classes of ``n`` samples, checked with the guidance towards them.

    Args:
        model: the model, which knows its classes.
        n: number of samples.
        labels: ``(n,)`` classes, or one for all, or None.
        guidance: weight w, at least 0.
        classifier: for classifier guidance, or None.

    Returns:
        ``(n,)`` int64 on the model's device; None without classes.

    Raises:
        InputError: classes out of range or of an unconditional model, guidance without classes or a null class, or a classifier
            of clean images, of other shapes or on another device.
    """
    if model.low is not None:
        raise InputError(f"{model.name} enlarges low images: name it by 'advkd sample --cascade', or take SuperResolution")
    guidance = finite("guidance", guidance)
    if guidance < 0:
        raise InputError(f"guidance must be at least 0 (the model itself), got {guidance}")
    if is_packed(model):
        _require_weight(model, labels, guidance, classifier)
    if classifier is not None:
        _require_fit(classifier, model)
    if labels is None:
        if guidance or classifier is not None:
            raise InputError("guidance needs labels: name the class of every sample")
        null_labels(model, n)
        return None
    if not model.num_classes and classifier is None:
        raise InputError(f"labels: teacher {model.name} is unconditional; leave them out, or give a classifier of noisy images")
    own = not is_packed(model) and (guidance or classifier is not None)
    if model.num_classes and model.null_class is None and own:
        raise InputError(
            f"guidance: teacher {model.name} has no null class: take guidance 0, or train one with --conditional --drop 0.15"
        )
    count = model.num_classes if classifier is None else _count_of(classifier)
    return require_labels(labels, n, count, model.device)


def _require_weight(model, labels, guidance, classifier):
    """Refuse what a network that takes a weight or a latent itself was not trained for."""
    if guidance and not model.most_guidance:
        raise InputError(f"guidance: {model.name} draws with a latent and is not guided: leave it out")
    if guidance > model.most_guidance:
        raise InputError(f"guidance must be at most {model.most_guidance:g}, that of {model.name}'s training, got {guidance}")
    if classifier is not None:
        raise InputError(f"classifier: {model.name} takes its conditions itself; leave the classifier out")
    if labels is None and model.num_classes and model.null_class is None:
        raise InputError(f"labels: {model.name} has no null class: name the class of every sample")


def _count_of(classifier):
    """Number of classes of a classifier, or None where it does not say."""
    config = getattr(classifier, "config", classifier)
    return getattr(config, "classes", None) or getattr(config, "num_classes", None)


def _require_fit(classifier, model):
    """Refuse what is no classifier of noisy states, and one of this package that cannot see the model's."""
    if not hasattr(classifier, "log_probability_gradient"):
        raise InputError(f"classifier must be a classifier of noisy images, got {classifier!r}")
    config = getattr(classifier, "config", None)
    if config is None:
        return
    if not getattr(config, "noisy", True):
        raise InputError("classifier: it knows clean images only; train one with 'advkd classifier train --noisy'")
    size, channels = getattr(config, "image_size", None), getattr(config, "image_channels", None)
    if size is not None and (channels, size, size) != tuple(model.shape):
        raise InputError(
            f"classifier takes ({channels}, {size}, {size}) images, teacher {model.name} draws {tuple(model.shape)}"
        )
    parameter = next(iter(classifier.parameters()), None) if isinstance(classifier, torch.nn.Module) else None
    if parameter is not None and parameter.device != model.device:
        raise InputError(f"classifier is on {parameter.device}, the teacher on {model.device}: move one of them")
    if parameter is not None and parameter.dtype != model.state_dtype:
        raise InputError(f"classifier computes in {parameter.dtype}, states are {model.state_dtype}: convert it")


def null_labels(model: Model, n: int) -> torch.Tensor | None:
    """Classes that stand for none.

    Args:
        model: the model, which knows its null class.
        n: number of samples.

    Returns:
        ``(n,)`` int64 on the model's device, or None for an unconditional model.

    Raises:
        InputError: a conditional model without a null class.
    """
    if not model.num_classes:
        return None
    if model.null_class is None:
        raise InputError(
            f"labels: teacher {model.name} has {model.num_classes} classes and no null class: name one for every sample"
        )
    return torch.full((n,), model.null_class, dtype=torch.int64, device=model.device)


def condition_of(
    model: Model, n: int, labels: torch.Tensor | Sequence[int] | int | LowImage | None
) -> torch.Tensor | LowImage | None:
    """The conditions that a model's network is told of ``n`` states: the classes given, or the null class, or low images.

    Args:
        model: the model, which knows its classes.
        n: number of states.
        labels: ``(n,)`` classes, the null class among them, or one for all; None: no class. A model that takes the guidance
            weight itself or a latent needs ``(n, k)`` of :func:`advkd.models.denoiser.pack`, one that enlarges low images.

    Returns:
        ``(n,)`` int64 on the model's device, or None for an unconditional model; ``(n, k)`` is handed on.

    Raises:
        InputError: classes out of range or of an unconditional model, or none where the model has no null class.
    """
    if (model.low is not None) != isinstance(labels, LowImage):
        takes = "takes low images with the level of their noise" if model.low else "takes no low images"
        raise InputError(f"condition: {model.name} {takes}")
    if isinstance(labels, LowImage):
        return model.low.require_told(labels, (n, model.shape[0]), model.name)
    if is_packed(model):
        if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or len(labels) != n:
            raise InputError(f"condition: {model.name} takes conditions packed as ({n}, k), see advkd.models.denoiser.pack")
        return labels
    if labels is None:
        return null_labels(model, n)
    if not model.num_classes:
        raise InputError(f"labels: teacher {model.name} is unconditional; leave them out")
    return require_labels(labels, n, model.num_classes + (model.null_class is not None), model.device)


def require_labels(
    labels: torch.Tensor | Sequence[int] | int, n: int, classes: int | None, device: torch.device
) -> torch.Tensor:
    """Classes, one per sample.

    Args:
        labels: ``(n,)`` whole numbers in [0, ``classes``), or one for all.
        n: number of samples.
        classes: number of classes; None: not known.
        device: of the result.

    Returns:
        ``(n,)`` int64.

    Raises:
        InputError: other labels.
    """
    try:
        given = torch.as_tensor(labels, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"labels must be whole numbers, one per sample or one for all, got {labels!r}") from None
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.ndim > 1:
        raise InputError(f"labels must be whole numbers, one per sample or one for all, got {labels!r}")
    given = given.to(torch.int64)
    if given.ndim == 1 and len(given) != n:
        raise InputError(f"labels must be one per sample, {n}, or one for all, got {len(given)}")
    if given.numel() and classes is not None and not 0 <= int(given.min()) <= int(given.max()) < classes:
        raise InputError(f"labels must be in [0, {classes}), got {int(given.min())} to {int(given.max())}")
    return given.expand(n).contiguous()


def class_numbers(model: Model, names: Sequence[str], classes: str | None) -> list[int]:
    """Numbers of the classes that samples take in turn, from their names.

    Args:
        model: the model that draws the samples.
        names: names of the classes by number: the model's own, or those of the classifier that guides it.
        classes: names, separated by commas; ``all`` for every class, unless one has that name; None: no class.

    Returns:
        The numbers, in the order of ``classes``; empty for no class.

    Raises:
        InputError: an unknown class, one of an unconditional model, or none where the model has no null class.
    """
    if classes is None:
        if model.num_classes and model.null_class is None:
            raise InputError(f"teacher {model.name} has no null class: name its classes by --classes")
        return []
    return named_classes(f"teacher {model.name}", names, classes)


def named_classes(owner: str, names: Sequence[str], classes: str) -> list[int]:
    """Numbers of classes from their names.

    Args:
        owner: the model in messages, ``teacher digits`` say.
        names: names of its classes by number; empty for an unconditional one.
        classes: names, separated by commas, one with a comma or outer spaces in double quotes; ``all`` for every class, unless
            one has that name.

    Returns:
        The numbers, in the order of ``classes``.

    Raises:
        InputError: an unknown class, or one of an unconditional model.
    """
    chosen = [part.strip() for part in classes.split(",") if part.strip()]
    if '"' in classes and not set(chosen) <= set(names):
        chosen = [part if part in names else part.strip() for part in next(csv.reader([classes], skipinitialspace=True))]
    if not chosen:
        raise InputError(f"--classes must name a class, got {classes!r}")
    if not names:
        raise InputError(f"--classes {classes}: {owner} is unconditional; leave it out")
    if chosen == [ALL] and ALL not in names:
        return list(range(len(names)))
    if unknown := [part for part in chosen if part not in names]:
        raise InputError(f"--classes: {unknown[0]!r} is not one of {', '.join(names)}")
    return [list(names).index(part) for part in chosen]


def joined(names: Sequence[str]) -> str:
    """Names of classes as the text that :func:`named_classes` takes.

    Args:
        names: the names.

    Returns:
        The names separated by commas, those with a comma, a double quote or outer spaces in double quotes.
    """
    quoted = ('"' + name.replace('"', '""') + '"' for name in names)
    return ",".join(text if "," in name or '"' in name or name != name.strip() else name for name, text in zip(names, quoted))


def classifier_free(
    network: Callable[..., torch.Tensor], guidance: torch.Tensor, null: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A network whose output is guided towards the class, by a weight of each sample.

    Args:
        network: function of states ``(N, ...)``, timesteps ``(N,)`` and classes ``(N,)``.
        guidance: ``(N,)`` weights w, at least 0.
        null: the class that stands for none.

    Returns:
        A function of the same arguments, (1 + w) m(x, class) - w m(x) with the network's outputs m, one batch of 2 N.
    """

    def evaluate(x, t, labels):
        both = torch.cat((labels, torch.full_like(labels, null)))
        conditional, unconditional = network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        weight = 1 + guidance.to(conditional.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return torch.lerp(unconditional, conditional, weight)

    return evaluate


def require_null(model: Model) -> int:
    """The null class of a model that is to be guided without a classifier.

    Args:
        model: the model.

    Returns:
        Its number.

    Raises:
        InputError: an unconditional model, one without a null class, or one that takes the guidance weight itself.
    """
    if is_packed(model):
        raise InputError(f"guidance: {model.name} takes its conditions itself: name the conditional teacher that it comes from")
    if not model.num_classes or model.null_class is None:
        lack = "is unconditional" if not model.num_classes else "has no null class"
        raise InputError(f"guidance: teacher {model.name} {lack}: train one with --conditional --drop 0.15")
    return model.null_class


def _classifier_free(network, labels, null, guidance):
    def evaluate(x, place):
        # Here, as the next batch's classes may have taken the place of these.
        both = torch.cat((labels, torch.full_like(labels, null)))
        conditional, unconditional = network(torch.cat((x, x)), place, both).chunk(2)
        return torch.lerp(unconditional, conditional, 1 + guidance)

    return evaluate


def _classifier_guided(network, classifier, labels, guidance, prediction):
    def evaluate(x, place):
        output = network(x, place)
        gradient = classifier.log_probability_gradient(x, place.alpha**2, labels)
        # eps changes by -w noise gradient, and the output by that through its own weight in eps.
        _, weight = eps_weights(place.alpha, place.noise, prediction)
        # Where no image is left (alpha = 0) the gradient is 0, and the output may have no weight in eps.
        shift = torch.where(weight == 0, 0.0, guidance * place.noise / weight)
        return output - shift.to(output.dtype) * gradient.to(output.dtype)

    return evaluate
