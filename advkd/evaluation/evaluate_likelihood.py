"""The likelihood of a teacher: its variational bound on real images, batch by batch, so that a killed run goes on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.dataset_info import differences
from ..data.draws import DataOrder
from ..data.glyph_sets import held_out_glyphs
from ..data.images import load_images
from ..diffusion.solvers import Solver
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.autoencoder import require_pixels
from ..runtime.devices import require_device
from ..runtime.files import digest, read_tensors, require_digest, restoring, with_digest, write_json, write_tensors
from ..runtime.folders import locked, require_output_folder
from ..runtime.progress import progress_bar
from ..runtime.timing import provenance
from .image_sets import eight_bit, real_images
from .likelihood import BATCH_SIZE, BOUND_VARIANCES, Likelihood, VariationalBound


@dataclass
class LikelihoodConfig:
    """Options of ``advkd evaluate --likelihood``.

    Attributes:
        num: images, drawn from the set without repetition (of glyphs the first held-out ones); those of a smaller ``num`` are
            the first of a larger one.
        steps: timesteps of the chain, evenly spaced; 0 for all T.
        seed: of the choice of images and of the noise.
        variance: of the reverse transitions, ``fixed_small``, ``fixed_large`` or ``analytic``; empty for the teacher's.
    """

    num: int = 96
    steps: int = 0
    seed: int = 0
    variance: str = ""

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        if self.num < 2:
            raise InputError(f"num must be at least 2, got {self.num}: the interval comes from the spread of images")
        if self.steps < 0 or self.steps == 1:
            raise InputError(f"steps must be 0 (all of the teacher's) or at least 2, got {self.steps}")
        if self.variance and self.variance not in BOUND_VARIANCES:
            raise InputError(f"variance must be one of {', '.join(BOUND_VARIANCES)}, got {self.variance!r}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")


def evaluate_likelihood(
    teacher: str | Path,
    images: str | Path,
    config: LikelihoodConfig,
    out: str | Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Bound a teacher's negative log-likelihood of 8-bit images, and write ``likelihood.json`` under ``out``.

    Finished batches are kept under ``out``: a killed run goes on, and one of more images computes the further ones alone.

    Args:
        teacher: source for :meth:`advkd.Teacher.from_pretrained`.
        images: ``digits`` (enlarged to the teacher's size), ``glyphs`` (held-out ones of its size; ``glyphs-digits``,
            ``glyphs-letters``), or a folder of images of the teacher's size and channels.
        config: a :class:`LikelihoodConfig`.
        out: folder, made where it is missing.
        device: torch device of the network.
        progress: show a bar that counts network evaluations.

    Returns:
        The contents of ``likelihood.json``: ``likelihood`` (the fields of :class:`~advkd.evaluation.likelihood.Likelihood`),
        ``variance``, ``teacher``, ``images`` (source, digest), ``config`` and ``provenance``.

    Raises:
        InputError: before work starts: images, steps or a variance that do not fit the teacher, fewer images than ``num``, or
            an ``out`` with batches of another evaluation.
    """
    config.validate()
    model = Teacher.from_pretrained(teacher, require_device(device))
    require_pixels(model, "the bound of a likelihood")
    bound = VariationalBound(model, config.steps or None, config.seed, config.variance or None)
    chosen = _chosen(str(images), model, config, progress)
    labels, out = bound.check(chosen), require_output_folder(out)
    with locked(out):
        terms = _terms(bound, chosen, labels, out, progress)
        result = {
            "likelihood": asdict(Likelihood.of(terms, bound.timesteps)),
            "variance": bound.variance,
            "teacher": model.identity(),
            "images": {"source": str(images), "sha256": digest({"images": chosen})},
            "config": asdict(config),
            "provenance": provenance(device),
        }
        write_json(out / "likelihood.json", result)
    return result


def describe(result: dict[str, Any]) -> str:
    """A result as a line of text.

    Args:
        result: contents of ``likelihood.json``, as :func:`evaluate_likelihood` returns them.

    Returns:
        The teacher, the bound, its interval and its parts.
    """
    found = result["likelihood"]
    low, high = found["interval"]
    return (
        f"teacher {result['teacher']['name']}: at most {found['bits_per_dimension']:.4f} bits per dimension "
        f"(95 % interval {low:.4f} to {high:.4f}) on {found['images']} images, {len(found['timesteps'])} steps, "
        f"variance {result['variance']}: prior {found['prior']:.4f}, steps {sum(found['steps']):.4f}, "
        f"decoder {found['decoder']:.4f}"
    )


def _pictures(source, teacher):
    """All images of a source, uint8 ``(N, C, S, S)``; the digits are enlarged to the teacher's size."""
    if source == "digits":
        return eight_bit(load_images("digits", teacher.image_size, teacher.image_channels))
    return real_images(source, teacher.shape, "--images")


def _chosen(source, teacher, config, progress):
    """Images of an evaluation: the first of a seeded permutation, as sets are sorted by class or name, or the first glyphs."""
    if held_out_glyphs(source) is not None:
        return real_images(source, teacher.shape, "--images", config.num, progress, teacher.class_names)
    images = _pictures(source, teacher)
    if config.num > len(images):
        raise InputError(f"--images {source} holds {len(images)} images, --num {config.num} are needed: lower --num")
    return images[DataOrder(len(images), config.seed).rows(0, config.num)]


def _terms(bound, images, labels, out, progress):
    """Terms of all images, ``(N, steps + 1)``: kept batches, and the missing ones computed."""
    starts, terms = range(0, len(images), BATCH_SIZE), {}
    for first in starts:
        terms[first] = _kept(bound, images[first : first + BATCH_SIZE], first, out)
    missing = [first for first in starts if terms[first] is None]
    total = sum(len(images[first : first + BATCH_SIZE]) for first in missing) * len(bound.timesteps)
    with progress_bar(total=total, desc="likelihood", unit="evaluation", shown=progress) as bar:
        for first in missing:
            part = slice(first, first + BATCH_SIZE)
            terms[first] = bound.terms(images[part], first, None if labels is None else labels[part], bar.update)
            tensors = {"terms": terms[first]}
            record = with_digest(tensors, {"of": _description(bound, images[part], first)})
            write_tensors(_path(out, first, len(terms[first])), tensors, record)
    return torch.cat([terms[first] for first in starts])


def _path(out, first, count):
    return out / f"terms-{first:06d}-{count:02d}.safetensors"


def _description(bound, images, first):
    """Everything that a batch's terms depend on."""
    chain = {"timesteps": list(bound.timesteps), "variance": bound.variance, "seed": bound.seed, "first": first}
    solver = Solver("analytic-ddpm") if bound.variance == "analytic" else None
    return {**chain, "teacher": bound.teacher.identity(solver), "images": digest({"images": images})}


def _kept(bound, images, first, out):
    """Terms of a batch that an earlier run has kept, or None."""
    path = _path(out, first, len(images))
    if not path.exists():
        return None
    tensors, record = read_tensors(path, "batch", ("of", "digest"), "delete it and run the same command again")
    with restoring("batch", path, "delete it and run the same command again"):
        require_digest(path, tensors, record, "delete it and run the same command again")
        changed = differences(_description(bound, images, first), record["of"])
        terms = tensors["terms"]
    if changed:
        raise InputError(f"--out {out} holds batches of an evaluation whose {', '.join(changed)} differ: name another folder")
    return terms
