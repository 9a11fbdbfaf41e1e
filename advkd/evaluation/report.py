"""One page to look at: samples, levels, loss curves and the tables, in a single HTML file and as PNGs."""

import html
from pathlib import Path

import torch

from ..data.dataset_info import same_teacher
from ..data.levels import downsample, supervising_timesteps
from ..data.pictures import LARGEST, read_metrics, save_curves, save_extrapolation, save_grid, save_levels, save_pairs
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..models.student import Student
from ..runtime.files import digest, read_json, restoring, write_bytes
from ..runtime.folders import require_output_folder
from ..runtime.ranges import named
from .evaluate import cells, has_seen
from .html_page import figure, provenance_of, self_contained, table_of
from .taught import all_in_turn, learned_image, taught
from .teacher_pictures import STEPS, read_solvers, require_guidance, save_guidance, save_solver_curves

FRESH_SEED = 12345
"""Seed of the pictures' noise."""

UNSEEN = {
    None: "Whether training has seen this noise is not known.",
    False: "Training has not seen this noise.",
    True: "Training has seen this noise.",
}

LEARNED = {False: "The teacher's states", True: "Area averages of the teacher's image"}
"""Targets of the submodules by :func:`learned_image`."""

EVALUATION_KEYS = (
    "score",
    "num_features",
    "rows",
    "student",
    "teacher",
    "models",
    "pairs",
    "known_unseen",
    "provenance",
    "config",
)
RUN_KEYS = ("name", "times_floor", "at_infinity", "precision", "recall", "correlation", "cpu_seconds", "command")


def write_report(
    student: Student,
    teacher: Teacher,
    evaluation: str | Path,
    out: str | Path,
    metrics: str | Path | None = None,
    ablation: str | Path | None = None,
    title: str = "advkd: one pass against many",
    solvers: str | Path | None = None,
    conditional: Teacher | None = None,
) -> Path:
    """Write ``report.html`` (self-contained) and its PNGs under ``out``.

    Args:
        student: the :class:`Student` of the evaluation; its weights are compared with those that were measured.
        teacher: the :class:`Teacher` of the evaluation, compared likewise.
        evaluation: path of an ``evaluation.json`` of :func:`advkd.evaluation.evaluate.evaluate_student`.
        out: folder, made where it is missing.
        metrics: path of the training's ``metrics.csv``; None leaves the loss curves out.
        ablation: path of a table of runs by ``profiling/cases/ablation.py``; None leaves it out.
        title: heading of the page.
        solvers: path of a ``solvers.json`` of ``advkd evaluate --solvers``; None leaves its plot out.
        conditional: a conditional teacher whose classes are shown by weight of guidance; None: ``teacher``, if it is one.

    Returns:
        The page's path.

    Raises:
        InputError: a file that is missing or of another kind, an evaluation of another student or teacher, or a teacher that
            cannot be shown; nothing was written.

    Examples:
        >>> write_report(student, teacher, "evaluation/evaluation.json", "report", metrics="student/metrics.csv")
    """
    result = _read_evaluation(evaluation, student, teacher)
    runs = read_json(ablation, "ablation", ("runs",))["runs"] if ablation else []
    if not isinstance(runs, list) or not all(isinstance(run, dict) and set(RUN_KEYS) <= set(run) for run in runs):
        raise InputError(f"ablation {ablation} is not what profiling/cases/ablation.py writes")
    with restoring("ablation", ablation or "", "run profiling/cases/ablation.py again"):
        _ablation_table(runs, result["score"])
    if metrics:
        read_metrics(metrics)
    by_solver = read_solvers(solvers) if solvers else None
    if by_solver is not None and not same_teacher(by_solver["teacher"], teacher.identity()):
        raise InputError(f"solvers {solvers} is of another teacher: name that one by --teacher")
    teacher.check_run(1, **taught(student, teacher).arguments(1))
    if conditional is not None or teacher.null_class is not None:
        require_guidance(conditional or teacher)
    out = require_output_folder(out)
    captions = save_pictures(teacher, student, metrics, out)
    save_extrapolation(_curves(result), result["score"], out / "extrapolation.png")
    captions["extrapolation.png"] = f"{result['score']} against 1/N: the line's left end is the distance without the bias of N."
    captions |= save_teacher_pictures(by_solver, conditional or teacher, out)
    page = _page(title, result, runs, [(out / name, caption) for name, caption in captions.items()])
    write_bytes(out / "report.html", page.encode())
    return out / "report.html"


def _read_evaluation(path, student, teacher):
    """A student's evaluation; that of a folder, of another student or of another teacher is refused."""
    result = read_json(path, "evaluation", ("score", "rows"))
    if "images" in result:
        raise InputError(f"evaluation {path} is of a folder of images; a report needs that of a student")
    result = read_json(path, "evaluation", EVALUATION_KEYS)
    with restoring("evaluation", path, "run 'advkd evaluate' again"):
        if not isinstance(result["rows"], list) or not result["rows"]:
            raise ValueError("it has no rows")
        _page("", result, [], [])
        _curves(result)
        drawn_by_other = result["student"]["weights_sha256"] != digest(student.state_dict())
        taught_by_other = not same_teacher(result["teacher"], teacher.identity())
    if drawn_by_other:
        raise InputError(f"evaluation {path} is of another student: run 'advkd evaluate' for this one")
    if taught_by_other:
        raise InputError(f"evaluation {path} is of another teacher: name that one by --teacher")
    return result


def _curves(result):
    """The distances at several N of every row, by its name."""
    curves = {}
    for row in result["rows"]:
        fit = row["frechet_at_infinity"]
        numbers = {name: [float(number) for number in fit[name]] for name in ("sizes", "distances")}
        if not len(numbers["sizes"]) == len(numbers["distances"]) > 0 or min(numbers["sizes"]) < 1:
            raise ValueError("a row has no distances at several N")
        curve = {**numbers, "value": fit["value"] + 0.0, "slope": fit["slope"] + 0.0}
        drawn = (*numbers["sizes"], *numbers["distances"], curve["value"], curve["slope"])
        if not all(abs(number) <= LARGEST for number in drawn):
            raise ValueError("a row has distances that cannot be drawn")
        curves[f"{row['images']} against {row['against']}"] = curve
    return curves


def save_pictures(teacher: Teacher, student: Student, metrics: str | Path | None, out: str | Path) -> dict[str, str]:
    """Write the four PNGs of a student and return ``{file name: caption}`` in order of importance."""
    out = Path(out)
    save_pairs_of(teacher, student, out / "teacher_and_student.png")
    save_levels_of(teacher, student, out / "levels.png")
    with named("fuse"):
        fused = student.fuse()
    save_grid(fused.sample(64, seed=FRESH_SEED), out / "student_samples.png")
    evaluations = taught(student, teacher).evaluations(teacher)
    captions = {
        "teacher_and_student.png": f"The same noise: the teacher after {evaluations} evaluations, the student after one. "
        + UNSEEN[has_seen(student.training_record, {"seed": FRESH_SEED, "start": 0, "num": 12})],
        "levels.png": f"{LEARNED[learned_image(student)]} that supervise the submodules, and what the submodules draw.",
        "student_samples.png": f"64 images of the student, not chosen{', its classes in turn' * bool(student.num_classes)}.",
    }
    if metrics:
        save_curves(metrics, out / "loss_curves.png")
        captions["loss_curves.png"] = "The training's losses."
    return captions


def save_teacher_pictures(solvers: dict | None, teacher: Teacher, out: str | Path) -> dict[str, str]:
    """Write the PNGs of a teacher and return ``{file name: caption}``: solvers where measured, classes where there are any."""
    out, captions = Path(out), {}
    if solvers is not None:
        save_solver_curves(solvers, out / "solvers.png")
        captions["solvers.png"] = (
            "The teacher's images by solver and network evaluations: Frechet distance at infinity, 95 % intervals shaded."
        )
    if teacher.num_classes and teacher.null_class is not None:
        save_guidance(teacher, out / "guidance.png")
        captions["guidance.png"] = (
            "Classes by weight w of classifier-free guidance; a column has one start noise. "
            f"{STEPS} evaluations an image, {2 * STEPS} with guidance."
        )
    return captions


def save_pairs_of(teacher: Teacher, student: Student, path: str | Path, n: int = 12, seed: int = FRESH_SEED) -> None:
    """Write teacher and student side by side, from the same noise."""
    x_T = teacher.noise(n, seed)
    x_0 = teacher.sample(n, seed, **taught(student, teacher).arguments(n))
    with named("student"), torch.no_grad():
        drawn = student.images(student(student.project(x_T), labels=all_in_turn(student, n)))
    save_pairs(x_0, drawn, path)


def save_levels_of(teacher: Teacher, student: Student, path: str | Path, seed: int = FRESH_SEED) -> None:
    """Write the strip of all levels beneath what they learned of the teacher, from one noise; of latents the first channel."""
    x_T, lesson = teacher.noise(1, seed), taught(student, teacher)
    states = dict(teacher.path(x_T, **lesson.arguments(1)))
    timesteps = supervising_timesteps(lesson.solver, student.depth, [int(t) for t in states], teacher.train_timesteps)
    shown: list[int | None] = [*timesteps, None]
    if learned_image(student):
        timesteps, shown = [int(min(states))] * len(timesteps), [None] * len(shown)
    targets = [downsample(states[t], side) for t, side in zip(timesteps, student.resolutions)]
    with named("student"), torch.no_grad():
        levels = student.levels(student.project(x_T), all_in_turn(student, 1))
    channels = 1 if student.autoencoder is not None else student.config.image_channels
    theirs, ours = ([level[0, :channels] for level in row] for row in ([*targets, states[min(states)]], levels))
    save_levels(theirs, ours, shown, path)


def _page(title, result, runs, pictures):
    body = [_summary(result)]
    body += [figure(path, caption) for path, caption in pictures[:2]]
    titles, *rows = cells(result)
    body += ["<h2>How far from the teacher, how far from real images</h2>", table_of(titles, rows), _reading(result)]
    body += [figure(path, caption) for path, caption in pictures[2:]]
    if runs:
        body += ["<h2>What helped</h2>", _ablation_table(runs, result["score"])]
    body += ["<h2>Where this was measured</h2>", provenance_of(result)]
    return self_contained(title, body)


def _summary(result):
    models, pairs = result["models"], result["pairs"]
    rows = []
    for name in ("teacher", "student"):
        model = models[name]
        seconds = model["seconds"]
        spread = f"{1e3 * seconds['median']:.2f} ms ({1e3 * seconds['p20']:.2f} to {1e3 * seconds['p80']:.2f})"
        rows.append([name, f"{model['parameters']:,}", str(model["evaluations"]), spread])
    titles = ("", "parameters", "network evaluations", f"time per image, batches of {models['batch_size']} (p20 to p80)")
    text = UNSEEN[False if result["known_unseen"] else None]
    if pairs:
        likeness = f"{pairs['correlation']:.3f} (images of different noises: {pairs['mismatched']:.3f})"
        text = f"From the same {pairs['num']:d} noises, the student's image correlates with the teacher's by {likeness}. {text}"
    return table_of(titles, rows) + f"<p>{text}</p>"


def _reading(result):
    distance = html.escape(result["score"])
    return (
        f"<p>{distance} is a Frechet distance on {result['num_features']:d} features; smaller is better, and it means "
        "something only beside its <em>floor</em>: the mean over random splits of the reference into two halves of N images. "
        "Intervals are bootstrap. Precision is the share of images within the reference's manifold, recall the share of the "
        "reference within the images' manifold, nearest the mean distance of an image to the closest of the reference, "
        "diversity that of two images of the set.</p>"
    )


def _ablation_table(runs, score):
    titles = ("run", f"{score}, x floor", "at infinity", "precision", "recall", "likeness", "CPU s", "command")
    rows = [
        [run["name"], f"{run['times_floor']:.2f}", f"{run['at_infinity']:.3f}", f"{run['precision']:.3f}"]
        + [f"{run['recall']:.3f}", f"{run['correlation']:.3f}", seconds(run), run["command"]]
        for run in runs
    ]
    return table_of(titles, rows)


def seconds(run: dict) -> str:
    """A run's CPU seconds as text, empty for a run that was killed and resumed, whose time is not known."""
    return "" if run["cpu_seconds"] is None else f"{run['cpu_seconds']:.0f}"
