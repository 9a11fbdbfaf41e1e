"""Quality of a teacher's images by solver and number of evaluations (``advkd evaluate --solvers``).

All sets begin at one start noise; distances are to real images and to a fine-step reference of other noise. Images are kept in
the cache (:mod:`advkd.evaluation.kept_images`), so that a killed run goes on.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..diffusion.solvers import METHODS, Solver
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..runtime.devices import require_device
from ..runtime.files import digest, write_json
from ..runtime.folders import cache_folder, require_output_folder
from ..runtime.progress import progress_bar
from ..runtime.timing import provenance
from .evaluate import REFERENCE_SEED
from .features import build_extractor, extract, require_fit
from .image_sets import real_images, shuffled
from .kept_images import FINE, Run, fine_run, solver_set
from .paired import compare_paired

_LOGGER = logging.getLogger(__name__)

MAIN = ("ddim", "unipc-2", "dpmpp-2m", "dpmpp-3m")
"""Solvers whose sets have ``num`` images; the others have ``other_num``."""


@dataclass
class SolverEvaluationConfig:
    """Options of ``advkd evaluate --solvers``.

    Attributes:
        solvers: comma-separated names of solvers, or ``all`` that can take the teacher.
        evaluations: network evaluations of a run, at most; several separated by commas. A solver of two evaluations a step
            takes 9 of 10.
        num: images of ddim, unipc-2, dpmpp-2m and dpmpp-3m, and of the reference.
        other_num: images of the other solvers (0: at most 2,000).
        seed: of the start noise; the reference's is the next one.
        fine_steps: steps of the reference, by unipc-2.
        spacing: of the levels (empty: each solver's own).
        extractor: ``digits``, ``glyphs``, ``inception`` or a folder of ``advkd classifier train``.
        real: ``digits``, ``glyphs`` (held-out ones; ``glyphs-digits``, ``glyphs-letters``), or a folder of images.
        real_num: number of real glyphs (0: 10,000).
        resamples: of the bootstrap behind the intervals.
        batch_size: images that run through the network together.
    """

    solvers: str = "all"
    evaluations: tuple[int, ...] = (5, 10, 50)
    num: int = 2000
    other_num: int = 0
    seed: int = REFERENCE_SEED
    fine_steps: int = 100
    spacing: str = ""
    extractor: str = "digits"
    real: str = "digits"
    real_num: int = 0
    resamples: int = 100
    batch_size: int = 50

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("num", "fine_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.other_num <= self.num:
            raise InputError(f"other_num must be in [0, num = {self.num}], got {self.other_num}")
        if self.resamples < 20:
            raise InputError(f"resamples must be at least 20, got {self.resamples}")
        if not self.evaluations or min(self.evaluations) < 1:
            raise InputError(f"evaluations must be positive numbers, got {self.evaluations}")
        if not 0 <= self.seed < 2**64 - 1:
            raise InputError(f"seed must be in [0, 2^64 - 1), got {self.seed}")
        self.chosen()

    def chosen(self) -> list[Solver]:
        """The solvers, in the order of their names in ``solvers``.

        Returns:
            A :class:`~advkd.diffusion.solvers.Solver` for each.

        Raises:
            InputError: an unknown name.
        """
        names = list(METHODS) if self.solvers == "all" else [name.strip() for name in self.solvers.split(",")]
        return list(dict.fromkeys(Solver(name, self.spacing) for name in names))


def evaluate_solvers(
    teacher: str | Path,
    config: SolverEvaluationConfig,
    out: str | Path,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a teacher's images by solver and evaluations, and write ``solvers.json`` under ``out``.

    Args:
        teacher: source for :meth:`advkd.Teacher.from_pretrained`.
        config: a :class:`SolverEvaluationConfig`.
        out: folder, made where it is missing.
        device: torch device of the teacher and the extractor.
        cache: folder of kept images and features (default :func:`advkd.runtime.folders.cache_folder`).
        progress: show a bar while the teacher draws.

    Returns:
        The contents of ``solvers.json``: ``rows``, one per solver and number of evaluations, with the distances to ``real`` and
        to ``fine``, a fine-step reference of other start noise.

    Raises:
        InputError: bad configuration, a named solver that cannot take this teacher, or images that do not fit it; nothing was
            drawn.
    """
    config.validate()
    device = require_device(device)
    model, extractor = Teacher.from_pretrained(teacher, device), build_extractor(config.extractor).to(device)
    some = torch.empty(2 * extractor.num_features, *model.image_shape, dtype=torch.uint8, device="meta")
    require_fit(extractor, some, f"--teacher {teacher}")
    runs, left_out = _runs(config, model)
    if len(runs) == 1:
        raise InputError(f"no run is left: give more evaluations or other solvers ({left_out[0]})")
    if model.num_classes and model.null_class is None:
        raise InputError(f"teacher {model.name} has no null class: its images of no class cannot be drawn")
    model.program(FINE, config.fine_steps)
    real = real_images(config.real, model.image_shape, num=config.real_num, progress=progress, classes=model.class_names)
    require_fit(extractor, real, "--real")
    for line in left_out:
        _LOGGER.warning("left out: %s", line)
    cache, out = require_output_folder(cache or cache_folder(), "the cache (ADVKD_CACHE)"), require_output_folder(out)
    features = _features(model, extractor, runs, config.batch_size, cache, progress)
    fine = features.pop("fine")
    baseline = max(features, key=lambda name: (len(features[name]), name.startswith("ddim "), int(name.split()[-1])))
    against = {"real": shuffled(extract(extractor, real, cache=cache)), "fine": fine}
    compared = {name: compare_paired(features, reference, baseline, config.resamples) for name, reference in against.items()}
    rows = [
        {
            "solver": run.solver.name,
            "steps": run.steps,
            "evaluations": run.evaluations,
            **{name: asdict(compared[name][run.name]) for name in against},
        }
        for run in runs[1:]
    ]
    result = {
        "rows": rows,
        "baseline": baseline,
        "config": asdict(config),
        "teacher": model.identity(),
        "real_sha256": digest({"images": real}),
        "provenance": provenance(device),
    }
    write_json(out / "solvers.json", result)
    return result


def describe(result: dict[str, Any]) -> str:
    """A result as lines of text.

    Args:
        result: what :func:`evaluate_solvers` gives.

    Returns:
        A line for every solver and number of evaluations, the best at real images first.
    """
    heads = "solver            evaluations     N  FD to real (at infinity)  to the fine-step reference"
    lines = [f"{heads}  real, less {result['baseline']}"]
    for row in sorted(result["rows"], key=lambda row: row["real"]["at_infinity"]):
        real, fine = row["real"], row["fine"]
        low, high = real["difference_interval"]
        lines.append(
            f"{row['solver']:<20}{row['evaluations']:>8}{real['num']:>7}{real['frechet']:>10.3f} ({real['at_infinity']:.3f})"
            f"{fine['frechet']:>15.3f} ({fine['at_infinity']:.3f})     {real['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        )
    return "\n".join(lines)


def _runs(config: SolverEvaluationConfig, model: Teacher) -> tuple[list[Run], list[str]]:
    """The reference, then all sets once; and a line for every solver and number of evaluations that is left out."""
    runs, left_out = [fine_run(config.fine_steps, config.seed, config.num)], []
    for evaluations in config.evaluations:
        for solver in config.chosen():
            num = config.num if solver.name in MAIN else config.other_num or min(config.num, 2000)
            run = Run.of_evaluations(solver, evaluations, model, config.seed, num)
            try:
                model.program(solver, run.steps)
            except InputError as error:
                if config.solvers != "all" and run.steps >= METHODS[solver.name].least:
                    raise
                left_out.append(f"{solver.name} with {evaluations} evaluations: {error}")
                continue
            if run not in runs:
                runs.append(run)
    return runs, left_out


def _features(model, extractor, runs, batch_size, cache, progress):
    """Features of every set by its name; the first is the reference."""
    with progress_bar(total=sum(run.num for run in runs), desc="solvers", unit="image", shown=progress) as bar:
        names = ["fine", *(run.name for run in runs[1:])]
        images = (solver_set(model, run, batch_size).images(cache, bar) for run in runs)
        return {name: extract(extractor, drawn, cache=cache) for name, drawn in zip(names, images, strict=True)}
