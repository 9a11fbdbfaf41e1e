"""The quality of a student: its images against the teacher's and against real ones, each with the floor of that comparison.

The floor is the distance of two disjoint halves of the reference at the same N: no generator can be expected to do better.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.dataset_info import DatasetInfo, same_teacher, samples_overlap
from ..data.glyph_sets import NAMES
from ..data.images import describe_shape
from ..data.trajectories import Trajectories
from ..diffusion.students import generator_classes
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.classes import listed
from ..models.classifier import Classifier
from ..models.fused_student import FusedStudent
from ..models.shape import DTYPES
from ..models.student import Student
from ..runtime.devices import require_device
from ..runtime.files import digest, write_json
from ..runtime.folders import cache_folder, require_output_folder
from ..runtime.ranges import named
from ..runtime.timing import measure, provenance
from .decoded import DECODED, decoded_features
from .features import build_extractor, extract, require_fit
from .image_sets import eight_bit, gather, read_images, real_images, reference_images, shuffled
from .kept_images import Condition
from .metrics import compare, frechet_floor
from .taught import Lesson, all_in_turn, taught
from .teacher_samples import kept_recording, recording_of

REFERENCE_SEED = 1_000_001
"""Default seed of evaluation, far from the small numbers that training usually takes."""


@dataclass
class EvaluationConfig:
    """Options of ``advkd evaluate``.

    Attributes:
        num: images of the student, and of each of two disjoint sets of the teacher's.
        seed: of the student's and the teacher's noise; what the student was trained on must not be among its samples.
        extractor: ``digits``, ``glyphs``, ``inception`` or a folder of ``advkd classifier train``.
        inception_weights: file of the Inception weights.
        real: ``digits``, ``glyphs`` (held-out ones; ``glyphs-digits``, ``glyphs-letters``), a folder of images of the student's
            size, ``none``, or ``auto``: those of the extractor ``digits`` or ``glyphs``.
        real_num: number of glyphs that stand for the real images (0: twice ``num``) or the reference (0: 10,000). Distances
            are of N images a side, the smaller of ``num`` and half of it.
        resamples: of the bootstrap behind the intervals (with Inception each takes seconds).
        processes: local processes that draw the teacher's samples (CPU only).
        dtype: in which the fused student draws, ``float32`` or ``bfloat16`` say.
        classes: names of a conditional student's classes, separated by commas, which images take in turn, the student's and the
            teacher's alike (empty: every class of the student).
        guidance: weight of the teacher's guidance towards them (empty: that of the student's trajectories, 0 where its training
            record has none).
    """

    num: int = 2000
    seed: int = REFERENCE_SEED
    extractor: str = "digits"
    inception_weights: str = ""
    real: str = "auto"
    real_num: int = 0
    resamples: int = 200
    processes: int = 1
    dtype: str = "float32"
    classes: str = ""
    guidance: float | None = None

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name, least in (("num", 1), ("resamples", 20), ("processes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.num > 10**9:
            raise InputError(f"num must be at most 10^9, got {self.num}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")


def evaluate_student(
    student: str | Path,
    teacher: str | Path,
    config: EvaluationConfig,
    out: str | Path,
    teacher_samples: str | Path | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a student against its teacher and against real images, and write ``evaluation.json`` under ``out``.

    Args:
        student: source for :meth:`advkd.Student.from_pretrained`.
        teacher: source for :meth:`advkd.Teacher.from_pretrained`.
        config: an :class:`EvaluationConfig`.
        out: folder, made where it is missing.
        teacher_samples: folder of ``advkd trajectories``, ``2 num`` samples or more; None: drawn (killed runs go on), cached.
        device: torch device of the models and the extractor; distances are computed on the CPU.
        cache: folder of kept features and samples (default :func:`advkd.runtime.folders.cache_folder`).
        progress: show a bar while the teacher draws.

    Returns:
        The contents of ``evaluation.json``: ``rows`` (one per comparison), ``models``, ``pairs`` and ``provenance``.

    Raises:
        InputError: sets, extractor and seeds that do not fit each other; nothing was drawn.
    """
    extractor, model, drawer = _load(student, teacher, config, device)
    turns = generator_classes(student, model, config.classes or None)
    names = [model.class_names[number] for number in turns]
    if teacher_samples is None:
        weight = taught(model, drawer).condition.guidance if config.guidance is None else config.guidance
        config = replace(config, guidance=weight)
        recording = recording_of(drawer, 2 * config.num, config.seed, names, weight)
        _require_unseen(model.training_record, asdict(recording))
    else:
        _require_samples(Trajectories(teacher_samples, option="--teacher-samples"), drawer, model, config, names)
    real = _real_images(extractor, config, drawer, names, progress)
    cache = require_output_folder(cache or cache_folder(), "the cache (ADVKD_CACHE)")
    out = require_output_folder(out)
    folder = teacher_samples or kept_recording(teacher, drawer, recording, cache, config.processes, progress)
    samples = Trajectories(folder, option="--teacher-samples")

    # Without a search: figures must not depend on the noise of a measurement.
    fused = model.fuse(dtype=DTYPES[config.dtype], tune=False)
    drawn = _draw_student(fused, config, turns)
    ours, theirs = (extract(extractor, images, cache=cache) for images in (drawn, _images(samples, drawer, 2 * config.num)))
    rows = _rows("teacher", {"student": ours}, theirs, "fresh teacher samples", config)
    if real is not None:
        sets, decoded = {"student": ours, "teacher": theirs[config.num :]}, decoded_features(drawer, extractor, real, cache)
        sets |= {} if decoded is None else {DECODED: decoded}
        rows += _rows("real", sets, shuffled(extract(extractor, real, cache=cache)), "other real images", config)
    result = {
        **_header(extractor, config, device),
        "rows": rows,
        "student": {"weights_sha256": digest(model.state_dict()), "config": asdict(model.config)},
        "classes": {"student": names, "teacher": samples.info.class_names},
        "teacher": drawer.identity(),
        "samples": {"parts": samples.parts, "manifests": samples.manifests},
        "real_sha256": None if real is None else digest({"images": real}),
        "pairs": _pairs(samples, model, drawer),
        "models": describe_models(fused, model, drawer, samples.info),
        "known_unseen": model.training_record is not None,
    }
    write_json(out / "evaluation.json", result)
    return result


def _load(student, teacher, config, device):
    """Extractor, student and teacher, which fit each other."""
    config.validate()
    device = require_device(device)
    if config.processes > 1 and device.type != "cpu":
        raise InputError(f"--processes {config.processes} is for --device cpu")
    extractor = build_extractor(config.extractor, config.inception_weights or None).to(device)
    model, drawer = Student.from_pretrained(student, device), Teacher.from_pretrained(teacher, device)
    _require_drawable(extractor, model, drawer, config)
    return extractor, model, drawer


def evaluate_folders(
    images: str | Path,
    reference: str | Path,
    config: EvaluationConfig,
    out: str | Path | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a folder of images against a folder of reference images (each also ``"digits"``), as :func:`evaluate_student`.

    The reference may be a data set of glyphs, too, of the images' size and ``config.real_num`` of them.

    Args:
        images: of the reference's size and channels; others, or too few on either side, are an :class:`InputError`.
        reference: one half is compared with, the other is for the floor; N is the smaller of a half and of ``images``.
        config: an :class:`EvaluationConfig`; its extractor and resamples are taken.
        out: folder for ``evaluation.json``, made where it is missing; None: nothing is written.
        device: torch device of the extractor; distances are computed on the CPU.
        cache: folder of kept features (default :func:`advkd.runtime.folders.cache_folder`).
        progress: show a bar while glyphs are drawn.

    Returns:
        Contents of ``evaluation.json``: ``score``, ``rows``, ``images`` and ``reference`` (folder, digest), ``provenance``, ...
    """
    config.validate()
    device = require_device(device)
    extractor = build_extractor(config.extractor, config.inception_weights or None).to(device)
    found = read_images(str(images), "--images")
    wanted = reference_images(str(reference), found.shape[1:], config.real_num, progress)
    if found.shape[1:] != wanted.shape[1:]:
        ours, theirs = (describe_shape(pictures.shape[1:]) for pictures in (found, wanted))
        raise InputError(f"--images {images} are {ours}, --reference {reference} are {theirs}: they must be alike")
    require_fit(extractor, found, f"--images {images}")
    require_fit(extractor, wanted[::2], f"half of --reference {reference}")
    cache = require_output_folder(cache or cache_folder(), "the cache (ADVKD_CACHE)")
    out = None if out is None else require_output_folder(out)
    kept = [shuffled(extract(extractor, pictures, cache=cache), i) for i, pictures in enumerate((found, wanted))]
    result = {
        **_header(extractor, config, device),
        "images": {"folder": str(images), "sha256": digest({"images": found})},
        "reference": {"folder": str(reference), "sha256": digest({"images": wanted})},
        "rows": _rows("reference", {"images": kept[0]}, kept[1], "other reference images", config),
    }
    if out is not None:
        write_json(out / "evaluation.json", result)
    return result


def _header(extractor, config, device):
    names = {"score": extractor.score, "num_features": extractor.num_features, "extractor_sha256": extractor.identity}
    return {**names, "config": asdict(config), "provenance": provenance(device)}


def table(result: dict[str, Any]) -> str:
    """A result as text: the rows aligned, then the models."""
    return "\n".join([*aligned(cells(result)), *_describe(result)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts as lines with aligned columns."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """A result's rows as texts, titles first, for any table."""
    titles = ["images", "against", "N", result["score"], "95 % interval", "x floor", "floor", "at infinity", "KID"]
    lines = [[*titles, "precision", "recall", "nearest", "diversity"]]
    for row in result["rows"]:
        low, high = row["frechet_interval"]
        distance = [f"{row['frechet']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['times_floor']:.2f}", f"{row['floor']:.3f}"]
        distance += [f"{row['frechet_at_infinity']['value']:.3f}", f"{row['kid']:.4f}"]
        shares = [f"{row[name]:.3f}" for name in ("precision", "recall", "nearest", "diversity")]
        lines.append([row["images"], row["against"], str(row["samples"][0]), *distance, *shares])
    return lines


def _describe(result):
    """Lines about the models, where a result has them."""
    if "models" not in result:
        return []
    models, pairs = result["models"], result["pairs"]
    lines = [
        f"{name}: {models[name]['parameters']:,} parameters, network evaluations: {models[name]['evaluations']}, "
        f"{1e3 * models[name]['seconds']['median']:.2f} ms per image (batches of {models['batch_size']})"
        for name in ("teacher", "student")
    ]
    if pairs:
        lines.append(f"correlation with the teacher's image of the same noise: {pairs['correlation']:.3f}")
    if not result["known_unseen"]:
        lines.append("the student does not say what it was trained on: whether it has seen this noise is not known")
    return lines


def _rows(against, sets, reference, floor_name, config):
    """One row per set against the reference's first half, and the floor from its second, all at the same N."""
    half = len(reference) // 2
    n = min(half, *(len(features) for features in sets.values()))
    first, second = reference[:n], reference[half : half + n]
    splits = frechet_floor(torch.cat((first, second)))
    floor = sum(splits) / len(splits)
    if floor <= 1e-9 * first.double().square().mean():
        raise InputError("the reference images are all alike: nothing can be measured against them")
    other = compare(second, first, config.resamples)
    rows = [{"images": name, **compare(features[:n], first, config.resamples)} for name, features in sets.items()]
    rows.append({"images": floor_name, **other})
    for row in rows:
        row |= {"against": against, "floor": floor, "floor_range": [min(splits), max(splits)]}
        row["times_floor"] = row["frechet"] / floor
        row["times_floor_interval"] = [end / floor for end in row["frechet_interval"]]
        row["recall_of_other"] = row["recall"] / other["recall"] if other["recall"] else None
    return rows


def _require_drawable(extractor, model, teacher, config):
    for ours, theirs in ((model.shape, teacher.shape), (model.image_shape, teacher.image_shape)):
        if tuple(ours) != tuple(theirs):
            raise InputError(f"--student draws {describe_shape(ours)} images, --teacher {describe_shape(theirs)} ones")
    drawn = torch.empty(config.num, *model.image_shape, dtype=torch.uint8, device="meta")
    require_fit(extractor, drawn, f"--student with --num {config.num}")


def has_seen(record: dict | None, part: dict) -> bool | None:
    """True if a student's training record (None: unknown) has some of a part's (seed, start, num) samples, of any teacher."""
    return None if record is None else any(samples_overlap(seen, part) for seen in record["samples"])


def _require_unseen(record, part):
    """Reference samples that the student was trained on measure nothing."""
    if has_seen(record, part):
        raise InputError(f"seed {part['seed']} is that of the student's training trajectories: choose another --seed")


def _require_samples(samples, teacher, model, config, names):
    if config.guidance:
        raise InputError("--guidance is of samples that are drawn: leave it out, as --teacher-samples have their own")
    teacher.match(samples.info.teacher)
    if not same_teacher(samples.info.teacher, teacher.identity()):
        raise InputError(f"--teacher-samples {samples.folder} are of another teacher than --teacher")
    theirs = samples.info.class_names or teacher.class_names
    if names and theirs and sorted(names) != sorted(theirs):
        raise InputError(
            f"--teacher-samples {samples.folder} are of the classes {listed(theirs)}, the student's images of {listed(names)}: "
            "name the same by --classes, or other samples"
        )
    if len(samples) < 2 * config.num:
        raise InputError(f"--teacher-samples {samples.folder} holds {len(samples)} samples, 2 x {config.num} are needed")
    for part in samples.parts:
        _require_unseen(model.training_record, part)


def _draw_student(fused, config, turns=()):
    """The student's images, uint8 ``(num, C, S, S)``."""
    batches = fused.stream(config.num, config.seed, dtype=torch.uint8, labels=turns or None)
    return gather((pictures.permute(0, 3, 1, 2) for pictures in batches), config.num)


def _images(samples, teacher, num):
    """The first ``num`` images of a teacher's recording, uint8 ``(num, C, S, S)``."""
    last, starts = samples.info.depth, range(0, num, 64)
    batches = (samples.batch(range(start, min(start + 64, num)), [last])[1][last] for start in starts)
    return gather((eight_bit(teacher.images(batch.to(teacher.device))) for batch in batches), num)


def _pairs(samples, model, teacher, n=256):
    """The likeness of the student's image to the teacher's from the same noise and class, unseen in training, or None."""
    n, info, classes = min(n, len(samples)), samples.info, set(samples.info.class_names)
    if not samples.paired or bool(classes) != bool(model.num_classes) or not classes <= set(model.class_names):
        return None
    images, labels = samples.batch(range(n), [info.depth])[1][info.depth], samples.labels(range(n), model.class_names)
    device = model.head.weight.device
    with torch.no_grad():
        z = model.project(samples.noise(range(n))).to(device)
        drawn = model.images(model(z, labels=None if labels is None else labels.to(device))).cpu()
        images = teacher.images(images.to(teacher.device)).cpu()
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (drawn, images))
    correlation = torch.nn.functional.cosine_similarity(a, b)
    other = torch.nn.functional.cosine_similarity(a.roll(1, dims=0), b)
    squared = (drawn - images).square().mean()
    return {"num": n, "correlation": correlation.mean().item(), "mismatched": other.mean().item(), "mse": squared.item()}


def describe_models(
    fused: FusedStudent, student: Student, teacher: Teacher, samples: DatasetInfo | None = None, n: int = 16
) -> dict[str, Any]:
    """Parameters, network evaluations and seconds per image (batches of ``n``), teacher and student in turn.

    ``samples`` describes the teacher's run; None: the one that the student was taught.
    """
    z, labels, passes = fused.latents(n, REFERENCE_SEED), all_in_turn(student, n), 10
    run = taught(student, teacher)
    if samples is not None:
        run = Lesson(samples.solver, samples.steps, Condition(tuple(samples.class_numbers), samples.guidance))

    def draw():
        with named("student"):
            for _ in range(passes):
                fused(z, labels)

    calls = {"teacher": lambda: teacher.sample(n, REFERENCE_SEED, **run.arguments(n)), "student": draw}
    times = measure(calls, repeats=5, device=z.device)
    quick, slow = _each(times["student"], n * passes), _each(times["teacher"], n)
    return {
        "batch_size": n,
        "teacher": {"parameters": teacher.num_parameters(), "evaluations": run.evaluations(teacher), "seconds": slow},
        "student": {"parameters": student.num_parameters(terminals=False), "evaluations": 1, "seconds": quick},
    }


def _each(times, n):
    return {name: value if name == "repeats" else value / n for name, value in times.items()}


def _real_images(extractor, config, teacher, names, progress):
    """Images of ``config.real`` of the named classes (none: of the teacher's), or None."""
    source = config.real
    if source == "auto":
        source = config.extractor if config.extractor in Classifier.embedded else "none"
    if source != "none":
        classes = names or teacher.class_names
        num = config.real_num or 2 * config.num * (source in NAMES)
        real = real_images(source, teacher.image_shape, num=num, progress=progress, classes=classes)
        require_fit(extractor, real[: len(real) // 2], f"half of --real {config.real}")
        return real
    if config.real_num:
        raise InputError("real_num is a number of glyphs: name them by --real, or leave --real-num out")
    return None
