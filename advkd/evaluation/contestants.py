"""Rows of a comparison: students, of one training or several, and a teacher's solvers, all from the same start setting."""

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..data.images import describe_shape
from ..data.labels import labels_in_turn
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.solvers import METHODS, Solver
from ..diffusion.students import generator_classes, load_student
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.student import Student
from ..runtime.files import digest, restoring
from .evaluate import has_seen
from .kept_images import Condition, KeptSet, Run, solver_set

UNKNOWN = "not recorded"
"""Method of a student without a training record."""


@dataclass(frozen=True)
class Setting:
    """Conditions that all sets of a comparison share.

    Attributes:
        teacher: the model whose start noise all sets begin at.
        seed: of that noise; the fine-step reference has the next one.
        num: images of a set.
        batch_size: images that are drawn together.
        classes: names of the classes that conditional models draw in turn; empty: no class.
        guidance: weight w of guidance towards them.
    """

    teacher: Teacher
    seed: int
    num: int
    batch_size: int
    classes: str = ""
    guidance: float = 0.0

    def condition(self, model: Teacher) -> Condition:
        """Classes and guidance of a model's images; see :meth:`Condition.of`."""
        return Condition.of(model, self.classes, self.guidance)


@dataclass(frozen=True)
class Sampler:
    """One set of images.

    Attributes:
        source: folder of the student, with ``@k`` where its evaluations are asked for, or name of the solver's run.
        kept: its images.
        sample: function of a number of images that draws them as a user would, for timing.
        parameters: of the network.
        evaluations: of the network for an image; guidance doubles them where the network does not take its weight.
        weights_sha256: digest of the network's weights.
        method: of the last training, or the solver.
        cost: network evaluations of its trainings, ``{"forward": n, "backward": n}``; None where that is not known.
        classes: names of the classes that its images take in turn; empty: no class; None: an unconditional model.
        guidance: weight towards them; None: an unconditional model, or one whose guidance was distilled into it.
        known_unseen: True if the training record says that the sets' noise was not trained on; None where it does not say.
    """

    source: str
    kept: KeptSet
    sample: Callable[[int], torch.Tensor]
    parameters: int
    evaluations: int
    weights_sha256: str
    method: str
    cost: dict[str, int] | None
    classes: tuple[str, ...] | None = None
    guidance: float | None = None
    known_unseen: bool | None = None


@dataclass(frozen=True)
class Contestant:
    """A row: several trainings of one student, one student, or a run of a solver.

    Attributes:
        name: of the row.
        kind: ``student`` or ``solver``.
        samplers: one of each training.
    """

    name: str
    kind: str
    samplers: tuple[Sampler, ...]

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image."""
        return self.samplers[0].evaluations

    @property
    def num(self) -> int:
        """Images of each of its sets."""
        return self.samplers[0].kept.num

    def shortened(self, num: int) -> "Contestant":
        """The row with the first ``num`` images of its sets."""
        return replace(self, samplers=tuple(replace(one, kept=replace(one.kept, num=num)) for one in self.samplers))


def parse_students(text: str) -> dict[str, list[tuple[str, int | None]]]:
    """Rows of students by name.

    Args:
        text: rows separated by commas; trainings of a row are joined by ``+``, and ``@k`` behind a folder asks for k network
            evaluations.

    Returns:
        ``{row: [(folder, evaluations; None for the student's own), ...]}``.

    Raises:
        InputError: an empty name, one that is there twice, or fewer than one evaluation.
    """
    rows = [[part.strip() for part in row.split("+")] for row in text.split(",")] if text.strip() else []
    names = _distinct(["+".join(parts) for parts in rows], "students")
    return {
        name: [_entry(part) for part in _distinct(parts, f"students: {name}")] for name, parts in zip(names, rows, strict=True)
    }


def parse_solvers(text: str, spacing: str = "") -> list[Solver]:
    """Solvers by their names, separated by commas.

    Args:
        text: names.
        spacing: of the levels; empty: each solver's own.

    Returns:
        A :class:`~advkd.diffusion.solvers.Solver` for each.

    Raises:
        InputError: an unknown name, or a solver that is there twice.
    """
    solvers = [Solver(name.strip(), spacing) for name in text.split(",")] if text.strip() else []
    _distinct([solver.name for solver in solvers], "solvers")
    return solvers


def _distinct(names, option):
    for i, name in enumerate(names):
        if not name.strip() or name in names[:i]:
            raise InputError(f"{option}: {name!r} is there twice" if name.strip() else f"{option}: a name is empty")
    return names


def _entry(text):
    asked = re.fullmatch(r"(.+)@(-?\d+)", text)
    if asked is None:
        return text, None
    if (evaluations := int(asked[2])) < 1:
        raise InputError(f"students: {text} asks for {evaluations} evaluations: a run has at least 1")
    return asked[1], evaluations


def student_rows(text: str, setting: Setting, device: str | torch.device) -> list[Contestant]:
    """The students of a comparison, loaded.

    Args:
        text: as :func:`parse_students` takes it.
        setting: conditions that all sets share.
        device: torch device of the students.

    Returns:
        A :class:`Contestant` for every row.

    Raises:
        InputError: a folder that holds no student, a student that cannot be compared, or trainings of one row that differ in
            more than their weights or are one.
    """
    rows, loaded = [], {}
    for name, entries in parse_students(text).items():
        for folder, _ in entries:
            if folder not in loaded:
                loaded[folder] = load_student(folder, device)
                _require_comparable(folder, loaded[folder], setting)
        samplers = tuple(_student(folder, loaded[folder], evaluations, setting) for folder, evaluations in entries)
        _require_trainings(samplers)
        rows.append(Contestant(name, "student", samplers))
    return rows


def _require_trainings(samplers):
    """Refuse trainings of one row that differ in more than their weights, or do not differ in these."""
    first, known = samplers[0], {}
    for one in samplers:
        for what in ("method", "parameters", "evaluations", "classes"):
            if (ours := getattr(one, what)) != (its := getattr(first, what)):
                found = f"{what} of {one.source} is {ours}, of {first.source} {its}"
                raise InputError(f"students: trainings of one row must be alike, but {found}: name them as rows")
        if (other := known.setdefault(one.weights_sha256, one)) is not one:
            raise InputError(f"students: {one.source} and {other.source} are one training: leave one of them out of the row")


def _require_comparable(source, student, setting):
    shape = tuple(setting.teacher.shape)
    if (found := _shape(student)) != shape:
        raise InputError(f"students: {source} draws {describe_shape(found)} images, the teacher {describe_shape(shape)} ones")
    if isinstance(student, DenoiserStudent):
        _require_condition(source, student.model, setting)
    else:
        _turns(source, student, setting)
    with restoring("the training record of", source):
        for seed, set_ in ((setting.seed, "sets"), (setting.seed + 1, "reference")):
            if has_seen(student.training_record, {"seed": seed, "start": 0, "num": setting.num}):
                raise InputError(
                    f"students: {source} was trained on the {set_}' start noise, seed {seed}: choose another --seed"
                )


def _require_condition(source, model, setting):
    if not setting.classes and model.num_classes and model.null_class is None:
        raise InputError(f"students: {source} has no null class: name its classes by --classes")
    with _telling(source):
        setting.condition(model)


@contextmanager
def _telling(source):
    """Context in which a student that cannot be told the setting's classes is named."""
    try:
        yield
    except InputError as error:
        raise InputError(f"students: {source} cannot be told these classes ({error})") from error


def _turns(source, student, setting):
    """Numbers of the classes that a one-pass student's images take in turn; none of an unconditional one."""
    with _telling(source):
        return generator_classes(source, student, setting.classes or None) if student.num_classes else []


def _shape(student):
    return tuple(student.shape if isinstance(student, Student) else student.model.shape)


def _student(source, student, evaluations, setting):
    make = _generator if isinstance(student, Student) else _denoiser
    with restoring("the training record of", source):
        record = student.training_record
        method, cost = method_of(record), total_cost(record)
    # Students that have seen some are refused by now.
    known = {"method": method, "cost": cost, "known_unseen": None if record is None else True}
    sampler = make(source, student, evaluations, setting, **known)
    return sampler if evaluations is None else replace(sampler, source=f"{source}@{evaluations}")


def _generator(source, student, evaluations, setting, **known):
    """A one-pass student through its fused engine, on the projections of the start noise."""
    if evaluations not in (None, 1):
        raise InputError(f"students: {source} draws in one pass: leave @{evaluations} out")
    # Without a search: figures must not depend on the noise of a measurement.
    fused, weights = student.fuse(tune=False), digest(student.state_dict())
    turns = _turns(source, student, setting)
    told = {"classes": tuple(student.class_names[number] for number in turns)} if turns else {}

    def draw(count, first):
        z, labels = student.project(setting.teacher.noise(count, setting.seed, first)), labels_in_turn(turns, first, count)
        return student.images(fused(z, None if labels is None else labels.to(z.device)))

    def sample(count):
        return fused.sample(count, setting.seed, count, labels=turns or None)

    # Students without classes keep the names that their images had before there were any.
    shape = {k: v for k, v in asdict(student.config).items() if turns or k not in ("classes", "class_channels")}
    depends = [weights, shape, setting.seed, setting.batch_size, *([turns] if turns else [])]
    depends += [student.autoencoder.sha256] if student.autoencoder is not None else []
    kept = KeptSet("students", depends, setting.num, setting.teacher.image_shape, setting.batch_size, draw)
    return Sampler(source, kept, sample, student.num_parameters(terminals=False), 1, weights, **known, **told)


def _denoiser(source, student, evaluations, setting, **known):
    """A student of few steps by its own solver, with its own number of steps or another one."""
    model, solver, steps = student.model, student.sampler.solver, student.sampler.steps
    condition = setting.condition(model)
    passes = condition.passes(model)
    if evaluations is not None:
        steps = _steps(source, solver, evaluations, model, passes)
    count = passes * solver.evaluations(steps)
    try:
        model.program(solver, steps)
    except InputError as error:
        raise InputError(f"students: {source} cannot take {count} evaluations ({error})") from error

    def draw(number, first):
        return student.sample(number, setting.seed, steps, first, **condition.arguments(number, first))

    identity = {**student.identity(), "name": None}
    depends = [identity, steps, setting.seed, setting.batch_size, *condition.identity()]
    kept = KeptSet("students", depends, setting.num, setting.teacher.image_shape, setting.batch_size, draw)
    weights, known = identity["weights_sha256"], known | _told(model, condition)
    return Sampler(source, kept, lambda number: draw(number, 0), student.num_parameters(), count, weights, **known)


def _steps(source, solver, evaluations, model, passes):
    """Steps of a run of exactly so many evaluations."""
    levels, least = len(solver.alpha_bars), METHODS[solver.name].least
    steps = [n for n in range(least, (levels or model.train_timesteps) + 1) if not levels or levels % n == 0]
    taken = {passes * solver.evaluations(n): n for n in steps}
    if evaluations not in taken:
        below, above = [n for n in taken if n < evaluations], [n for n in taken if n > evaluations]
        near = " or ".join(map(str, [*below[-3:], *above[:3]]))
        raise InputError(f"students: {source} by {solver.name} cannot take {evaluations} evaluations exactly: ask for {near}")
    return taken[evaluations]


def _told(model, condition):
    """Fields of :class:`Sampler` about classes."""
    return {"classes": class_names(model, condition), "guidance": condition.guidance if model.num_classes else None}


def class_names(model: Teacher, condition: Condition) -> tuple[str, ...] | None:
    """Names of the classes that a model's images take in turn.

    Args:
        model: the model.
        condition: of its images.

    Returns:
        The names; None of an unconditional model.
    """
    return tuple(model.class_names[number] for number in condition.classes) if model.num_classes else None


def method_of(record: dict[str, Any] | None) -> str:
    """The method of a student's last training.

    Args:
        record: its training record, or None.

    Returns:
        The method's name; ``adv-kd`` for records without one.
    """
    return record["runs"][-1].get("method", "adv-kd") if record and record["runs"] else UNKNOWN


def total_cost(record: dict[str, Any] | None) -> dict[str, int] | None:
    """Network evaluations of all trainings that a student went through.

    Args:
        record: its training record, or None.

    Returns:
        ``{"forward": n, "backward": n}``, or None where a training does not say them.
    """
    costs = [run.get("cost") for run in record["runs"]] if record else []
    if not costs or None in costs:
        return None
    return {name: sum(int(cost[name]) for cost in costs) for name in ("forward", "backward")}


def solver_rows(solvers: Sequence[Solver], evaluations: Sequence[int], setting: Setting) -> tuple[list[Contestant], list[str]]:
    """The runs of a teacher's solvers, each once.

    Args:
        solvers: see :func:`parse_solvers`.
        evaluations: network evaluations of a run, at most; a guided one takes two where others take one.
        setting: conditions that all sets share.

    Returns:
        ``(rows, left_out)``: a :class:`Contestant` for every run, and a line for every one that the solver cannot take.
    """
    model, runs, left_out = setting.teacher, [], []
    passes = setting.condition(model).passes(model)
    for solver in solvers:
        for number in sorted(evaluations):
            run = Run.of_evaluations(solver, number // passes, model, setting.seed, setting.num)
            try:
                model.program(solver, run.steps)
            except InputError as error:
                left_out.append(f"{solver.name} with {number} evaluations: {error}")
                continue
            if run not in runs:
                runs.append(run)
    samplers = [_solver(model, run, setting) for run in runs]
    return [Contestant(sampler.source, "solver", (sampler,)) for sampler in samplers], left_out


def _solver(model, run, setting):
    condition = setting.condition(model)
    kept, evaluations = solver_set(model, run, setting.batch_size, condition), condition.passes(model) * run.evaluations
    weights, free = model.identity()["weights_sha256"], {"forward": 0, "backward": 0}
    parameters, name, told = model.num_parameters(), run.solver.name, _told(model, condition)
    row = f"{name} {evaluations}"
    return Sampler(row, kept, lambda n: kept.draw(n, 0), parameters, evaluations, weights, name, free, **told)
