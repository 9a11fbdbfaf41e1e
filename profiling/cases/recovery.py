"""Frechet distances of images that were noised and denoised once, by noise level: table 1 of the DPDM paper.

python -m profiling.cases.recovery --teacher v --students dpdm

The teacher gives the mean of all images that a noisy one may come from, a DPDM an image. All models see the same images and the
same noise; the distance is to the images themselves, so that it is 0 where nothing is lost. The table is
``profiling/results/<device>/recovery.json``.
"""

import argparse
from pathlib import Path

import torch

from advkd import Teacher
from advkd.data.images import load_images, normalize
from advkd.diffusion.denoiser import noised
from advkd.evaluation.evaluate import REFERENCE_SEED
from advkd.evaluation.features import build_extractor, extract
from advkd.evaluation.metrics import frechet_distance
from advkd.ops import philox_normal
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise levels, those of the paper's table within the digits' schedule."""


def lines():
    """The table of stored results."""
    found = []
    for result in stored("recovery"):
        found += source(result, [], f"{result['config']['num']:,} images")
        titles = ("model", *(f"sigma {sigma:g}" for sigma in result["config"]["sigmas"]))
        rows = [(f"`{row['model']}`", *(f"{value:.3f}" for value in row["frechet"])) for row in result["rows"]]
        found += [*markdown(titles, rows), ""]
    return found[:-1] or NOTHING


@torch.no_grad()
def recovered(model: Teacher, images: torch.Tensor, eps: torch.Tensor, sigma: float, batch_size: int = 64) -> torch.Tensor:
    """Images after noise and one denoising.

    Args:
        model: teacher, or a denoiser student's model.
        images: ``(N, C, H, W)`` in [-1, 1].
        eps: ``(N, C, H, W)`` standard normal noise.
        sigma: noise level.
        batch_size: images that are denoised together.

    Returns:
        ``(N, C, H, W)`` images in [-1, 1].
    """
    parts = zip(images.split(batch_size), eps.split(batch_size))
    return torch.cat([model.predict(noised(x, z, sigma), sigma)[0].clamp(-1, 1) for x, z in parts])


def measure(models: dict[str, Teacher], images: torch.Tensor, sigmas: tuple[float, ...], extractor: str) -> list[dict]:
    """Rows of the table.

    Args:
        models: teachers, or denoiser students' models, by name.
        images: ``(N, C, H, W)`` in [-1, 1].
        sigmas: noise levels.
        extractor: name or folder of the classifier whose features the distances are in.

    Returns:
        One row a model, with its distances in the order of ``sigmas``.
    """
    features = build_extractor(extractor)
    wanted, rows = extract(features, images), []
    eps = philox_normal(REFERENCE_SEED, range(len(images)), tuple(images.shape[1:]), stream="x_T")
    for name, model in models.items():
        found = [frechet_distance(extract(features, recovered(model, images, eps, sigma)), wanted) for sigma in sigmas]
        rows.append({"model": name, "frechet": found, "identity": model.identity()})
    return rows


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits", help="teacher")
    parser.add_argument("--students", required=True, help="folders of denoiser students, separated by commas")
    parser.add_argument("--extractor", default="digits", help="classifier whose features the distances are in")
    parser.add_argument("--results", help="folder of recovery.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    models = {name: Teacher.from_pretrained(name) for name in (options.teacher, *options.students.split(","))}
    shape = models[options.teacher].shape
    images = normalize(load_images("digits", shape[-1], shape[0]))
    rows = measure(models, images, SIGMAS, options.extractor)
    config = {"num": len(images), "sigmas": list(SIGMAS), "extractor": options.extractor}
    write_json(
        Path(options.results or device_folder()) / "recovery.json", {"rows": rows, "config": config, "provenance": provenance()}
    )


if __name__ == "__main__":
    main()
