"""One table of students and solvers (``advkd compare``): quality, time and training cost, from the same start noise.

All sets begin at one start noise and are measured against the same references with the same bootstrap draws, so that the
difference of any two rows has an interval of its own. The cache keeps images, features and measures: a killed run goes on.
"""

import itertools
import logging
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..diffusion.solvers import Solver
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..ops.arguments import finite, whole
from ..runtime.devices import require_device
from ..runtime.files import digest, write_json
from ..runtime.folders import cache_folder, require_output_folder
from ..runtime.progress import progress_bar
from ..runtime.timing import measure, provenance
from .comparison_page import PICTURES, write_pages
from .contestants import Contestant, Setting, class_names, parse_solvers, parse_students, solver_rows, student_rows
from .decoded import decoded_features
from .evaluate import REFERENCE_SEED
from .features import build_extractor, extract, require_fit
from .image_sets import real_images, shuffled
from .kept_images import FINE, Condition, fine_run, solver_set
from .paired import Resampled
from .yardstick import SHARES, Yardstick

_LOGGER = logging.getLogger(__name__)

TIMED = 16
"""Images of a timed call."""

FEW = 8
"""Network evaluations of rows that have all ``num`` images; ``num_long`` is of those with more."""


@dataclass
class CompareConfig:
    """Options of ``advkd compare``.

    Attributes:
        students: folders separated by commas, a row each. Trainings of one student are joined by ``+`` and make one row; a
            student that samples with several numbers of steps takes another one as FOLDER@EVALUATIONS.
        solvers: comma-separated names of the teacher's solvers, a row for each of ``evaluations`` that they can take.
        evaluations: network evaluations of the solvers' runs, at most; several separated by commas.
        num: images of a row, and of the fine-step reference.
        num_long: images of a row with more than 8 evaluations, at most ``num`` (0: as many); it is compared with the first
            images of the others.
        baseline: name of the row that the others are compared with (empty: the solver with most evaluations; without solvers
            the first student).
        seed: seed of the start noise; the reference's is the next one.
        fine_steps: steps of the reference, by unipc-2.
        spacing: spacing of the solvers' levels (empty: each solver's own).
        extractor: ``digits``, ``glyphs`` or a folder of ``advkd classifier train``.
        real: ``digits``, ``glyphs`` (held-out ones; ``glyphs-digits``, ``glyphs-letters``), or a folder of images.
        real_num: number of real glyphs (0: 10,000).
        resamples: draws of the bootstrap behind the intervals.
        batch_size: images that run through a network together.
        classes: names of classes separated by commas, or ``all``: conditional models, the reference's too, draw them in turn
            by the image's index (empty: no class, but every class of a conditional student of one pass).
        guidance: weight w of guidance towards ``classes``, told to networks that take it; of others two evaluations a step.
    """

    students: str = ""
    solvers: str = ""
    evaluations: tuple[int, ...] = (1, 2, 4, 8)
    num: int = 10_000
    num_long: int = 0
    baseline: str = ""
    seed: int = REFERENCE_SEED
    fine_steps: int = 100
    spacing: str = ""
    extractor: str = "digits"
    real: str = "digits"
    real_num: int = 0
    resamples: int = 100
    batch_size: int = 50
    classes: str = ""
    guidance: float = 0.0

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name, least in (("num", 4), ("fine_steps", 1), ("batch_size", 1), ("resamples", 20)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.num_long and not 4 <= self.num_long <= self.num:
            raise InputError(f"num_long must be 0, or at least 4 and at most num, {self.num}, got {self.num_long}")
        if not self.evaluations:
            raise InputError("evaluations must name a number at least")
        for number in self.evaluations:
            whole("evaluations", number, least=1)
        if not 0 <= self.seed < 2**64 - 1:
            raise InputError(f"seed must be in [0, 2^64 - 1), got {self.seed}")
        if finite("guidance", self.guidance) < 0:
            raise InputError(f"guidance must be at least 0 (the model itself), got {self.guidance}")
        if self.guidance and not self.classes:
            raise InputError("guidance needs classes: name them by --classes, or take 'all'")
        Solver(spacing=self.spacing)
        students, solvers = parse_students(self.students), parse_solvers(self.solvers, self.spacing)
        if not students and not solvers:
            raise InputError("nothing to compare: name folders by --students, solvers by --solvers, or both")
        if self.spacing and not solvers:
            raise InputError("spacing places the levels of solvers: name some by --solvers, or leave it out")


def compare_models(
    teacher: str | Path,
    config: CompareConfig,
    out: str | Path,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare students and solvers, and write ``comparison.json``, ``.md`` and ``.html`` (self-contained) under ``out``.

    Args:
        teacher: source for :meth:`advkd.Teacher.from_pretrained`.
        config: a :class:`CompareConfig`.
        out: folder, made where it is missing.
        device: torch device of the networks and the extractor; distances are computed on the CPU.
        cache: folder of kept images, features and measures (default :func:`advkd.runtime.folders.cache_folder`).
        progress: show bars.

    Returns:
        The contents of ``comparison.json``: ``rows``, one per student or solver's run; ``differences``, of every two rows;
        ``decoder`` of a latent teacher, the distance of decoded real images; ``baseline``, ``floor`` and its ``floor_num``,
        ``batch_size`` of the times, ``config`` and ``provenance``.

    Raises:
        InputError: bad configuration, a student that does not fit the teacher, or images that do not fit the extractor;
            nothing was drawn.

    Examples:
        >>> config = CompareConfig(students="pd/4,pd/1", solvers="ddim,unipc-2", num=2000)
        >>> compare_models("digits", config, "comparison")["baseline"]
        'unipc-2 8'
    """
    config.validate()
    device = require_device(device)
    model, extractor = _measure(teacher, config, device)
    setting = Setting(model, config.seed, config.num, config.batch_size, config.classes, config.guidance)
    contestants, classes = _contestants(config, setting, device)
    baseline = _baseline(config, contestants)
    real = real_images(config.real, model.image_shape, num=config.real_num, progress=progress, classes=classes)
    require_fit(extractor, real, "--real")
    cache, out = require_output_folder(cache or cache_folder(), "the cache (ADVKD_CACHE)"), require_output_folder(out)

    fine, features, pictures = _features(model, extractor, contestants, config, cache, progress)
    known = shuffled(extract(extractor, real, cache=cache))
    lengths = sorted({row.num for row in contestants}, reverse=True)
    yardsticks = {num: Yardstick(known, fine[:num], config.resamples) for num in lengths}
    result = {
        **_rows(contestants, features, yardsticks, baseline, cache, progress),
        **_decoder(model, extractor, real, yardsticks[lengths[0]], cache),
        "baseline": baseline,
        "score": extractor.score,
        "floor": yardsticks[lengths[0]].floor,
        "floor_num": yardsticks[lengths[0]].half,
        "floors": [{"num": one.num, "half": one.half, "value": one.floor} for one in yardsticks.values()],
        "batch_size": TIMED,
        "config": asdict(config),
        "teacher": model.identity(),
        "real_sha256": digest({"images": real}),
        "provenance": provenance(device),
    }
    times = _times(contestants, device)
    for row in result["rows"]:
        row["seconds"] = times[row["name"]]
    write_pages(result, pictures, out)
    write_json(out / "comparison.json", result)
    return result


def _measure(teacher, config, device):
    """Teacher and extractor, which fit each other and the number of images."""
    model, extractor = Teacher.from_pretrained(teacher, device), build_extractor(config.extractor).to(device)
    for name, num in (("num", config.num), ("num-long", config.num_long or config.num)):
        require_fit(extractor, torch.empty(num, *model.image_shape, dtype=torch.uint8, device="meta"), f"--{name} {num}")
    Condition.of(model, config.classes, config.guidance)
    model.program(FINE, config.fine_steps)
    return model, extractor


def _contestants(config, setting, device):
    """All rows, and the names of their images' classes; what a solver cannot take is said."""
    solvers, left_out = solver_rows(parse_solvers(config.solvers, config.spacing), config.evaluations, setting)
    rows = [*student_rows(config.students, setting, device), *solvers]
    rows = [row.shortened(config.num_long) if config.num_long and row.evaluations > FEW else row for row in rows]
    if not rows:
        raise InputError(f"no row is left: give more evaluations or other solvers ({left_out[0]})")
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--students {twice[0]} is the name of a solver's row, too: name its folder by another path")
    classes = _same_classes(setting, rows)
    for line in left_out:
        _LOGGER.warning("left out: %s", line)
    return rows, classes


def _same_classes(setting, rows):
    """Classes in turn of the reference and of every row that is told some, all the same; else all that the teacher has."""
    told = {f"teacher {setting.teacher.name}": class_names(setting.teacher, setting.condition(setting.teacher))}
    told = {name: own for name, own in (told | {row.name: row.samplers[0].classes for row in rows}).items() if own}
    if setting.classes and not told:
        raise InputError("classes: the teacher and all students are unconditional: leave --classes out")
    first = next(iter(told), "")
    for name, own in told.items():
        if own != told[first]:
            raise InputError(
                f"classes: {name} draws {','.join(own)}, {first} {','.join(told[first])}: name some that both have"
            )
    return told[first] if told else setting.teacher.class_names


def _baseline(config, contestants):
    names = [row.name for row in contestants]
    if config.baseline and config.baseline not in names:
        raise InputError(f"--baseline must be a row, one of {', '.join(names)}; got {config.baseline!r}")
    solvers = [row for row in contestants if row.kind == "solver"]
    return config.baseline or max(solvers or contestants[:1], key=lambda row: row.evaluations).name


def _features(model, extractor, contestants, config, cache, progress):
    """Features of the reference and of every set by its name, and the first images of every row."""
    sets = {sampler.kept.name: sampler.kept for row in contestants for sampler in row.samplers}
    condition = Condition.of(model, config.classes, config.guidance)
    fine = solver_set(model, fine_run(config.fine_steps, config.seed, config.num), config.batch_size, condition)
    total = config.num + sum(kept.num for kept in sets.values())
    with progress_bar(total=total, desc="images", unit="image", shown=progress) as bar:
        reference = extract(extractor, fine.images(cache, bar), cache=cache)
        features, first = {}, {}
        for name, kept in sets.items():
            images = kept.images(cache, bar)
            features[name], first[name] = extract(extractor, images, cache=cache), images[:PICTURES].clone()
    return reference, features, {row.name: first[row.samplers[0].kept.name] for row in contestants}


def _rows(
    contestants: list[Contestant], features, yardsticks: dict[int, Yardstick], baseline: str, cache, progress
) -> dict[str, Any]:
    """Rows of the table without times, and the differences of every two, of as many images as both have."""
    measured = {}
    wanted = [(name, num) for name, found in features.items() for num in yardsticks if num <= len(found)]
    for name, num in progress_bar(wanted, desc="measures", unit="set", shown=progress):
        measured[name, num] = yardsticks[num].measure(features[name][:num], cache)
    medians = {
        (row.name, num): _medians(measured[sampler.kept.name, num][0] for sampler in row.samplers)
        for row in contestants
        for num in yardsticks
        if num <= row.num
    }
    lengths, rows = {row.name: row.num for row in contestants}, []
    for row in contestants:
        num = row.num
        figures = _figures(medians[row.name, num], [measured[sampler.kept.name, num] for sampler in row.samplers])
        shared = min(num, lengths[baseline])
        figures["real"]["difference"] = _figure(medians[row.name, shared]["real"] - medians[baseline, shared]["real"])
        trainings = [
            {"source": one.source, "weights_sha256": one.weights_sha256, **_alone(measured[one.kept.name, num])}
            for one in row.samplers
        ]
        rows.append({**_facts(row), "num": num, **figures, "trainings": trainings})
    return {"rows": rows, "differences": _differences(medians, lengths)}


def _decoder(model, extractor, real, yardstick, cache):
    """Row of a latent teacher's decoder: what a model of perfect latents would have."""
    if (decoded := decoded_features(model, extractor, real, cache)) is None:
        return {}
    distances = {name: _figure(one) for name, one in yardstick.of_decoded(decoded).items()}
    return {"decoder": {**distances, "num": len(real) // 2, "parameters": model.autoencoder.num_parameters()}}


def _medians(measured: Iterable[dict[str, Resampled]]) -> dict[str, Resampled]:
    """The median over trainings of every distance, draw by draw."""
    measured = list(measured)
    return {name: Resampled.median([one[name] for one in measured]) for name in measured[0]}


def _facts(row):
    first, costs = row.samplers[0], [sampler.cost for sampler in row.samplers]
    cost = None if None in costs else {n: statistics.median(each[n] for each in costs) for n in ("forward", "backward")}
    facts = {name: getattr(first, name) for name in ("method", "parameters", "evaluations", "classes", "guidance")}
    unseen = [sampler.known_unseen for sampler in row.samplers]
    known = {"known_unseen": None if None in unseen else True} if row.kind == "student" else {}
    return {"name": row.name, "kind": row.kind, **facts, "cost": cost, **known}


def _figures(medians, trainings):
    """Figures of a row, each with the spread of its trainings."""
    distances = {name: _figure(one, [training[0][name].value for training in trainings]) for name, one in medians.items()}
    shares = {}
    for name in ("precision", "recall"):
        values = [training[1][name] for training in trainings]
        shares[name] = {"value": statistics.median(values), "spread": [min(values), max(values)]}
    return {
        "real": {"frechet": distances["real"], "at_infinity": distances["real_at_infinity"], **shares},
        "fine": {
            "frechet": distances["fine"],
            "at_infinity": distances["fine_at_infinity"],
            "times_floor": distances["times_floor"],
        },
    }


def _figure(one: Resampled, values: list[float] | None = None) -> dict[str, Any]:
    spread = {} if values is None else {"spread": [min(values), max(values)]}
    return {"value": one.value, "interval": one.interval, **spread}


def _alone(measured):
    """The figures of one training."""
    distances, shares = measured
    return {**{name: _figure(one) for name, one in distances.items()}, **{name: shares[name] for name in SHARES}}


def _differences(medians, lengths):
    """Differences of every two rows in their distances to real images, the second less the first."""
    found = []
    for one, other in itertools.combinations(lengths, 2):
        shared = min(lengths[one], lengths[other])
        ours, its = medians[other, shared], medians[one, shared]
        figures = {
            key: _figure(ours[name] - its[name]) for key, name in (("frechet", "real"), ("at_infinity", "real_at_infinity"))
        }
        found.append({"row": other, "less": one, **figures})
    return found


def _times(contestants, device):
    """Seconds per image of every row, in turn; the untimed call before each captures what a timed one replays."""
    calls = {row.name: lambda sample=row.samplers[0].sample: sample(TIMED) for row in contestants}
    times = measure(calls, repeats=5, device=device, settle=0.05)
    return {name: {key: v if key == "repeats" else v / TIMED for key, v in time.items()} for name, time in times.items()}
