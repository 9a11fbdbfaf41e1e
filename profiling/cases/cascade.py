"""Frechet distances of cascades by the level of the low images' noise.

python -m profiling.cases.cascade --base base --stages sr,sr-plain --single v

Each stage enlarges the same low images by the same noise: as many as there are in a half of the real images, drawn by the base,
and those of that half, which have none of the base's errors. Distances are to the other half. The table is
``profiling/results/<device>/cascade.json``.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from advkd import SuperResolution, Teacher
from advkd.cli.enlarging import load_stages
from advkd.data.images import load_images, normalize
from advkd.data.levels import downsample
from advkd.diffusion.solvers import Solver
from advkd.evaluation.comparison_page import said
from advkd.evaluation.features import build_extractor, extract
from advkd.evaluation.image_sets import shuffled
from advkd.evaluation.metrics import frechet_distance, frechet_interval
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder

LEVELS = (0, 50, 100, 200, 400, 1000)
"""Levels of the low images' noise, in timesteps; a stage is asked for those that it was trained with."""
SEED = 1_000_001
"""Seed of all noise, which no training has."""


def lines():
    """The table of stored results."""
    found = []
    for result in stored("cascade"):
        config = result["config"]
        levels = config["levels"]
        found += source(result, [], f"{config['num']:,} images, 95 % intervals are in the table")
        titles = ("stage", "evaluations of it", "low images", *(f"level {level}" for level in levels))
        rows = [
            (f"`{row['stage']}`", row["evaluations"], row["low"], *(_cell(row["frechet"].get(str(n))) for n in levels))
            for row in result["rows"]
        ]
        found += [*markdown(titles, rows), "", _reading(config, result), ""]
    return found[:-1] or NOTHING


def _cell(one):
    return said(one, 3) if one else ""


def _reading(config, result):
    """The models beside the stages, in words."""
    by = f"{config['evaluations']} evaluations of {config['solver']}"
    return (
        f"The base `{config['base']}` takes {by}. `{config['single']}` alone, which draws the large images at once by as many: "
        f"{said(result['single'], 3)}. Real images against real ones: {said(result['floor'], 3)}."
    )


def distance(features, wanted: torch.Tensor, images: torch.Tensor, resamples: int = 100) -> dict:
    """Frechet distance of images with its interval.

    Args:
        features: the extractor.
        wanted: ``(M, D)`` features of the real images.
        images: ``(N, C, H, W)`` in [-1, 1].
        resamples: draws behind the interval.

    Returns:
        ``value`` and ``interval``.
    """
    found = extract(features, images)
    return {"value": frechet_distance(found, wanted), "interval": frechet_interval(found, wanted, resamples)}


def halves(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two halves of the real images: the one that distances are to, and the one whose low images are enlarged.

    Args:
        real: ``(M, C, H, W)``.

    Returns:
        Halves of one size, in an order drawn once for all; of an odd number one image is left out.
    """
    first, second = shuffled(real).split(len(real) // 2)[:2]
    return first, second


def measure(stages: dict[str, SuperResolution], lows: dict[str, torch.Tensor], distance_of: Callable) -> list[dict]:
    """Rows of the table.

    Args:
        stages: super-resolution models by name.
        lows: clean low images ``(N, C, h, h)`` in [-1, 1] by what they are.
        distance_of: function of images ``(N, C, H, W)`` that gives their distance, as :func:`distance` does.

    Returns:
        A row for each stage and kind of low images, with a distance for each of :data:`LEVELS` that the stage takes.
    """
    rows = []
    for name, stage in stages.items():
        model = {**stage.model.identity(stage.solver), "name": None}
        for what, low in lows.items():
            row = {"stage": name, "evaluations": stage.evaluations, "low": what, "identity": model, "frechet": {}}
            for level in (level for level in LEVELS if level <= stage.low.level):
                row["frechet"][str(level)] = distance_of(_enlarged(stage, low, level, f"{name}, {what}, level {level}"))
            rows.append(row)
    return rows


def _enlarged(stage, low, level, what, batch_size=100):
    starts = tqdm(range(0, len(low), batch_size), desc=what)
    return torch.cat([stage.sample(low[i : i + batch_size], level, SEED, start=i) for i in starts])


def _drawn(teacher: Teacher, num: int, solver: Solver, steps: int, batch_size=100):
    starts: Sequence[int] = range(0, num, batch_size)
    counts = [min(batch_size, num - i) for i in starts]
    return torch.cat([teacher.sample(n, SEED, solver, steps, i) for n, i in zip(counts, tqdm(starts, desc=teacher.name))])


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="teacher of the low images")
    parser.add_argument("--stages", required=True, help="super-resolution teachers and their students, separated by commas")
    parser.add_argument("--single", default="digits", help="teacher of the large images")
    parser.add_argument("--solver", default="unipc-2", help="solver of the teachers")
    parser.add_argument("--steps", type=int, default=10, help="its steps")
    parser.add_argument("--extractor", default="digits", help="classifier whose features the distances are in")
    parser.add_argument("--results", help="folder of cascade.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    names = options.stages.split(",")
    if len(set(names)) < len(names):
        parser.error(f"--stages {options.stages}: a stage is named twice")
    write_json(Path(options.results or device_folder()) / "cascade.json", _measured(options, names))


def _measured(options, names):
    solver, steps = Solver(options.solver), options.steps
    base, single = Teacher.from_pretrained(options.base), Teacher.from_pretrained(options.single)
    stages = dict(zip(names, load_stages(names, "cpu", solver, steps)))
    wanted, others = halves(normalize(load_images("digits", single.shape[-1], single.shape[0])))
    features = build_extractor(options.extractor)
    distance_of = partial(distance, features, extract(features, wanted))
    lows = {"the base's": _drawn(base, len(others), solver, steps), "of real images": downsample(others, base.shape[-1])}
    config = {"num": len(others), "levels": LEVELS, "solver": solver.name, "evaluations": solver.evaluations(steps)}
    models = {"base": base.identity(solver), "single": single.identity(solver)}
    return {
        "rows": measure(stages, lows, distance_of),
        "single": distance_of(_drawn(single, len(others), solver, steps)),
        "floor": distance_of(others),
        "config": {**config, "base": options.base, "single": options.single, "models": models},
        "provenance": provenance(),
    }


if __name__ == "__main__":
    main()
