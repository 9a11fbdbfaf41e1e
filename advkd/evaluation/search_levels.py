"""Search for the noise levels of multistep consistency sampling (``advkd search-levels``; Song et al. 2023, section 3).

Levels are found greedily, one at a time from the highest down, each by golden-section search over log sigma for the least
Frechet distance between the student's images and real ones. All candidates draw the same start and step noise, so that the
distance is a function of the level alone. ``levels.json`` keeps every candidate as it comes: a killed search goes on.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.images import describe_shape
from ..data.pictures import eight_bit
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.saving import INDEX
from ..diffusion.schedule import Level
from ..diffusion.solvers import Solver
from ..diffusion.students import student_class
from ..errors import InputError
from ..ops.arguments import real, whole
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import digest, read_json, restoring, write_json
from ..runtime.folders import locked, require_output_folder
from ..runtime.progress import progress_bar
from .evaluate import REFERENCE_SEED
from .features import Extractor, build_extractor, extract, require_fit
from .image_sets import gather, real_images
from .metrics import frechet_distance

FILE = "levels.json"
"""File with all candidates of a search, beside the student that it ends with."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Ratio by which a golden-section search narrows its interval."""

REMEDY = "name a student of 'advkd distill consistency'"
"""End of the errors about students whose levels cannot be searched."""


@dataclass
class SearchLevelsConfig:
    """Options of ``advkd search-levels``.

    Attributes:
        steps: network evaluations of an image, at least 2: the highest level's and one for each level that is searched.
        num: images of a candidate.
        tries: candidates of every level.
        real: ``digits``, ``glyphs`` (held-out ones; ``glyphs-digits``, ``glyphs-letters``), or a folder of images.
        extractor: ``digits``, ``glyphs`` or a folder of ``advkd classifier train``.
        seed: seed of the start and step noise of all candidates; not 1000001 or 1000002, with which ``advkd compare`` measures:
            levels that were chosen on that noise would seem better there than on any other.
        batch_size: images that run through the network together.
        device: torch device.
    """

    steps: int = 2
    num: int = 2000
    tries: int = 10
    real: str = "digits"
    extractor: str = "digits"
    seed: int = 77
    batch_size: int = 50
    device: str = "cpu"

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        if whole("steps", self.steps) < 2:
            raise InputError(f"steps must be at least 2, as a single one has no further level to search, got {self.steps}")
        for name in ("num", "tries", "batch_size"):
            whole(name, getattr(self, name), least=1)
        whole("seed", self.seed, below=2**64)
        if self.seed in (REFERENCE_SEED, REFERENCE_SEED + 1):
            raise InputError(
                f"seed {self.seed} is one that 'advkd compare' measures with, and levels chosen on its noise would be measured "
                "too well: choose another --seed"
            )


def golden_section(f: Callable[[float], float], low: float, high: float, evaluations: int) -> float:
    """Golden-section search for the minimum of a function that falls and then rises (Kiefer 1953).

    Args:
        f: function of a number, for :func:`search_levels` the distance at a log sigma.
        low: lower end of the interval; ``f`` is evaluated within it only.
        high: upper end.
        evaluations: number of calls of ``f``.

    Returns:
        Argument with the least value among those that were tried, the lowest one of several. The minimum is at most
        (high - low) g^evaluations away, where g = (sqrt(5) - 1) / 2.

    Raises:
        InputError: an empty interval, no evaluation, or a value of ``f`` that is not finite.
    """
    whole("evaluations", evaluations, least=1)
    low, high = real("low", low), real("high", high)
    if not -math.inf < low < high < math.inf:
        raise InputError(f"low and high must be finite and low below high, got {low} and {high}")
    tried: list[tuple[float, float]] = []

    def value(x):
        tried.append((found := f(x), x))
        if not math.isfinite(found):
            raise InputError(f"the distance at log sigma {x:.6g} is {found}, and must be finite: look at the student's images")
        return found

    left = high - GOLDEN * (high - low)
    at_left = value(left)
    if evaluations > 1:
        right = low + GOLDEN * (high - low)
        at_right = value(right)
    for _ in range(evaluations - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = value(right)
    return min(tried)[1]


@plain_defaults()
def search_levels(student: str | Path, config: SearchLevelsConfig, out: str | Path, progress: bool = True) -> dict[str, Any]:
    """Search the levels of a consistency student, and write a copy of it that draws with them.

    Args:
        student: folder of ``advkd distill consistency``, or a hub id (owner/name).
        config: a :class:`SearchLevelsConfig`.
        out: folder for the copy and ``levels.json``: a new or empty one, or that of a killed search with the same settings.
        progress: show a bar.

    Returns:
        The contents of ``levels.json``: ``settings`` (the configuration), ``student`` (digests and sampler of the one that was
        searched), ``extractor_sha256`` and ``real_sha256``, ``score`` (name of the distance), ``candidates`` (``sigmas`` and
        ``distance`` of each, in their order) and ``sigmas``, the chosen ones, falling.

    Raises:
        InputError: bad configuration, a student that is of another solver, images that do not fit the extractor, or a folder
            that holds something else; nothing was drawn. Or images or a distance that are not finite,
            or levels that have come so close to the lowest one that none fits between.

    Examples:
        >>> search_levels("cd", SearchLevelsConfig(steps=2), "cd-2")["sigmas"]
        [0.661]
    """
    config.validate()
    device, out = require_device(config.device), Path(out)
    _require_new(out)
    model = _load(student, device)
    first, lowest = _ends(student, model)
    _require_room(lowest, first.sigma, config.tries, 2)
    extractor = build_extractor(config.extractor).to(device)
    shape = model.model.image_shape
    if extractor.shape is not None and tuple(extractor.shape) != tuple(shape):
        wanted, drawn = describe_shape(extractor.shape), describe_shape(shape)
        raise InputError(
            f"--extractor {config.extractor} takes {wanted} images, and --student {student} draws {drawn} ones: name a "
            "classifier of that size ('advkd classifier train')"
        )
    require_fit(extractor, torch.empty(config.num, *shape, dtype=torch.uint8, device="meta"), f"--num {config.num}")
    images = real_images(config.real, shape, progress=progress)
    require_fit(extractor, images, "--real")
    facts = {
        "settings": asdict(config),
        "student": {name: value for name, value in model.identity().items() if name != "name"},
        "extractor_sha256": extractor.identity,
        "real_sha256": digest({"images": images}),
        "score": extractor.score,
    }
    facts = json.loads(json.dumps(facts))  # as they are read again: lists, no tuples
    total = (config.steps - 1) * config.tries * config.num
    with locked(require_output_folder(out)), progress_bar(total=total, desc="images", unit="image", shown=progress) as bar:
        known = _known(out, facts)
        distance = _Distance(model, first, config, extractor, images, bar)
        return _Search(distance, config, (lowest, first.sigma), out / FILE, facts, known).run()


def _require_new(out):
    """Refuse a folder that is finished or holds something else; hidden files, as locks and leftovers are, do not count."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        require_output_folder(out)  # a file or a dangling link: the error says so
    names = {path.name for path in out.iterdir()}
    if FILE in names and INDEX in names:
        raise InputError(f"--out {out} holds the student of a finished search: name another folder")
    if FILE not in names and any(not name.startswith(".") for name in names):
        raise InputError(f"--out {out} is not empty and holds no unfinished search: name a new folder")


def _load(source, device):
    """The student, of the solver whose levels are searched."""
    if student_class(source) is not DenoiserStudent:
        raise InputError(f"--student {source} is a generator, which draws in one pass, or a teacher: {REMEDY}")
    student = DenoiserStudent.from_pretrained(source, device)
    if student.sampler.solver.name != "consistency":
        raise InputError(f"--student {source} draws by the solver {student.sampler.solver.name}, not consistency: {REMEDY}")
    if student.model.num_classes and student.model.null_class is None:
        raise InputError(f"--student {source} has no null class, and levels are searched without classes: {REMEDY} with one")
    return student


def _ends(source, student):
    """Highest level of a student's sampler, and the noise level that further ones must be above."""
    solver, schedule = student.sampler.solver, student.model.schedule
    first = solver.levels(schedule, student.sampler.steps)[0]
    lowest = max(solver.sigma_min, schedule.sigma(0.0).item())
    if not 0 < lowest < first.sigma < math.inf:
        found = f"from {first.sigma:.3g} to {lowest:.3g}"
        raise InputError(f"--student {source} has no levels to search between, {found}: {REMEDY}")
    return first, lowest


def _require_room(lowest, above, tries, evaluation):
    """Refuse an interval whose narrowest part float64's alpha_bars, near 1 at the lowest level, would not resolve."""
    narrowest = math.log(above / lowest) * GOLDEN**tries
    if 2 * lowest**2 / (1 + lowest**2) ** 2 * narrowest < 8 * sys.float_info.epsilon:
        remedy = f"--steps {evaluation - 1} in another --out" if evaluation > 2 else "fewer --tries"
        raise InputError(
            f"{tries} tries have no room for the level of evaluation {evaluation} between sigma {above:.6g} and the lowest, "
            f"{lowest:.6g}: ask for {remedy}"
        )


def _known(out, facts):
    """Distances of an unfinished search by the candidates' sigmas; one with other settings is refused."""
    path = out / FILE
    if not os.path.lexists(path):
        return {}
    found = read_json(path, "search", (*facts, "candidates"))
    with restoring("search", path):
        theirs, ours = ({**one, **one["settings"], "settings": None} for one in (found, facts))
        if others := [name for name in ours if name not in theirs or theirs[name] != ours[name]]:
            raise InputError(
                f"--out {out} holds an unfinished search of other {', '.join(others)}: repeat its own command, or name another "
                "folder"
            )
        return {tuple(map(float, one["sigmas"])): float(one["distance"]) for one in found["candidates"]}


class _Distance:
    """Distance of a candidate, a function of its further noise levels."""

    def __init__(
        self,
        student: DenoiserStudent,
        first: Level,
        config: SearchLevelsConfig,
        extractor: Extractor,
        images: torch.Tensor,
        bar: tqdm,
    ):
        self.student, self.first, self.config, self.bar = student, first, config, bar
        self.extractor, self.reference = extractor, extract(extractor, images)

    def __call__(self, sigmas: Sequence[float]) -> float:
        return frechet_distance(extract(self.extractor, gather(self._batches(sigmas), self.config.num)), self.reference)

    def _batches(self, sigmas):
        student, num, size = self.drawing(sigmas), self.config.num, self.config.batch_size
        for start in range(0, num, size):
            count = min(size, num - start)
            images = student.sample(count, self.config.seed, start=start)
            if not images.isfinite().all():  # in eight bits they would be black
                levels = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
                raise InputError(f"--student: its images with sigmas {levels} are not finite: name another student")
            yield eight_bit(images)
            self.bar.update(count)

    def drawing(self, sigmas: Sequence[float]) -> DenoiserStudent:
        """The student with other levels; the network is the same."""
        sampler, own = self.student.sampler, self.student.sampler.solver
        bars = (self.first.alpha_bar, *(1 / (1 + sigma**2) for sigma in sigmas))
        solver = Solver(own.name, sigma_min=own.sigma_min, sigma_data=own.sigma_data, alpha_bars=bars)
        levels = dataclasses.replace(sampler, solver=solver, steps=len(bars))
        return DenoiserStudent(self.student.model, levels, self.student.training_record)


class _Search:
    """A search in progress."""

    def __init__(
        self,
        distance: _Distance,
        config: SearchLevelsConfig,
        ends: tuple[float, float],
        path: Path,
        facts: dict[str, Any],
        known: dict[tuple[float, ...], float],
    ):
        self.distance, self.config, self.ends, self.path, self.facts, self.known = distance, config, ends, path, facts, known
        self.candidates: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Search all levels, and write the student."""
        sigmas: tuple[float, ...] = ()
        lowest, highest = self.ends
        if not self.known:
            self._write()
        for evaluation in range(2, self.config.steps + 1):
            above = sigmas[-1] if sigmas else highest
            _require_room(lowest, above, self.config.tries, evaluation)
            best = golden_section(partial(self._candidate, sigmas), math.log(lowest), math.log(above), self.config.tries)
            sigmas = (*sigmas, math.exp(best))
        result = self._write(sigmas=list(sigmas))
        # Last, as its index marks the folder as finished.
        self.distance.drawing(sigmas).save_pretrained(self.path.parent)
        return result

    def _candidate(self, before, log_sigma):
        """Distance of a level behind others, measured and kept or known."""
        sigmas = (*before, math.exp(log_sigma))
        new = sigmas not in self.known
        distance = self.distance(sigmas) if new else self.known[sigmas]
        self.candidates.append({"sigmas": list(sigmas), "distance": distance})
        if new:
            self._write()
        else:
            self.distance.bar.update(self.config.num)
        return distance

    def _write(self, **more):
        result = {**self.facts, "candidates": self.candidates, **more}
        write_json(self.path, result)
        return result
