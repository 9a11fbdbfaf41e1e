"""Frechet distances of cascades by the level of the low images' noise.

python -m profiling.cases.cascade --base base --stages sr,sr-plain --single v

Each stage enlarges the same low images by the same noise: those that the base draws, and those of real images, which have none
of the base's errors. Distances are to the real images. The table is ``profiling/results/<device>/cascade.json``.
"""

import argparse
from collections.abc import Sequence
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
        found += source(result, [], "95 % intervals are in the table")
        levels = config["levels"]
        titles = ("stage", "evaluations of it", "low images", *(f"level {level}" for level in levels))
        rows = [
            (f"`{row['stage']}`", row["evaluations"], row["low"], *(_cell(row["frechet"].get(str(n))) for n in levels))
            for row in result["rows"]
        ]
        single = f"One model of {config['size']}x{config['size']} pixels, with as many steps: {said(result['single'], 3)}."
        found += [*markdown(titles, rows), "", single, ""]
    return found[:-1] or NOTHING


def _cell(one):
    return said(one, 3) if one else ""


def distance(features, wanted: torch.Tensor, images: torch.Tensor, resamples: int) -> dict:
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


def measure(
    stages: dict[str, SuperResolution], lows: dict[str, torch.Tensor], real: torch.Tensor, extractor: str, resamples: int = 100
) -> list[dict]:
    """Rows of the table.

    Args:
        stages: super-resolution models by name.
        lows: clean low images ``(N, C, h, h)`` in [-1, 1] by what they are.
        real: ``(M, C, H, W)`` real images in [-1, 1].
        extractor: name or folder of the classifier whose features the distances are in.
        resamples: draws behind the intervals.

    Returns:
        A row for each stage and kind of low images, with a distance for each of :data:`LEVELS` that the stage takes.
    """
    features, rows = build_extractor(extractor), []
    wanted = extract(features, real)
    for name, stage in stages.items():
        levels = [level for level in LEVELS if level <= stage.low.level]
        for what, low in lows.items():
            found = {
                str(level): distance(
                    features, wanted, _enlarged(stage, low, level, f"{name}, {what}, level {level}"), resamples
                )
                for level in levels
            }
            rows.append({"stage": name, "evaluations": stage.evaluations, "low": what, "frechet": found})
            rows[-1]["identity"] = {**stage.model.identity(stage.solver), "name": None}
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
    parser.add_argument("--num", type=int, default=2000, help="images that the base draws")
    parser.add_argument("--solver", default="unipc-2", help="solver of the teachers")
    parser.add_argument("--steps", type=int, default=10, help="its steps")
    parser.add_argument("--extractor", default="digits", help="classifier whose features the distances are in")
    parser.add_argument("--results", help="folder of cascade.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    solver, names = Solver(options.solver), options.stages.split(",")
    base, single = Teacher.from_pretrained(options.base), Teacher.from_pretrained(options.single)
    stages = dict(zip(names, load_stages(names, "cpu", solver, options.steps)))
    size = single.shape[-1]
    real = normalize(load_images("digits", size, single.shape[0]))
    lows = {
        "the base's": _drawn(base, options.num, solver, options.steps),
        "of real images": downsample(real, base.shape[-1]),
    }
    alone = _drawn(single, options.num, solver, options.steps)
    result = {
        "rows": measure(stages, lows, real, options.extractor),
        "single": distance(build_extractor(options.extractor), extract(build_extractor(options.extractor), real), alone, 100),
        "config": {"num": options.num, "levels": LEVELS, "size": size, "solver": options.solver, "steps": options.steps},
        "provenance": provenance(),
    }
    write_json(Path(options.results or device_folder()) / "cascade.json", result)


if __name__ == "__main__":
    main()
