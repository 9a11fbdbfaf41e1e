"""The few figures of the README, and the table of methods."""

from dataclasses import replace

from advkd.methods import METHODS, method_class

from .cases.tables import TABLES
from .evidence import ROOT, checked, device_of, families, last_run, link, markdown, stale, stored
from .gpu import summary


def of_gpus(name):
    """A benchmark's results of GPUs, where the parity tests were green."""
    return summary.green(name, stored)


WORK = (
    ("student, digits 32x32, one image", "bench_student", "digits, batch 1, float32", stored),
    ("student, `pyramid-256`, one image", "bench_student", "pyramid-256, batch 1, float32", stored),
    ("the same on a GPU, bfloat16", "bench_student", "pyramid-256, batch 1, bfloat16", of_gpus),
    ("sampler step with noise, 64 x 3x256x256", "bench_sampler_step", "with noise, float32", stored),
    ("gradient penalty, 16 x 3x128x128", "bench_gradient_penalty", "penalty, narrow critic, 128x128, batch 16", stored),
    ("critic's update, 16 x 3x128x128", "bench_gradient_penalty", "update, narrow critic, 128x128, batch 16", stored),
    ("teacher, one evaluation, 16 digits", "bench_teacher", "evaluation, batch 16", stored),
)
"""Work, the benchmark that measures it, its case there, and what gives the benchmark's stored results."""
QUALITY = (("student", "teacher"), ("fresh teacher samples", "teacher"), ("student", "real"))
"""Images and what they are compared with: the rows of an evaluation that the README shows."""
FIGURES = ("Frechet distance, x floor (95 %)", "precision", "recall")
"""Figures of a set of images."""
CARD_FIGURES = {
    "the_student": ("student", "teacher"),
    "the_student_beside_real": ("student", "real"),
    "the_teacher": ("teacher", "real"),
    "real_digits": ("other real images", "real"),
}
"""Name in a model card -> images and what they are compared with."""
SHIPPED = {"adv-kd": "evaluation"}
"""Method -> its stored evaluation, where that has another name than ``evaluation-<method>``."""


def speed():
    """Milliseconds of ours and of the fastest peer, a row for each part of the system, each with its result."""
    rows = [(work, *_times(results(name), case)) for work, name, case, results in WORK]
    return markdown(("work", "advkd, ms", "fastest other, ms", "faster by", "measured on"), rows)


def _times(results, case):
    found = [(result, row) for result in results for row in summary.cases_of(result) if row["case"] == case]
    timed = [(result, row) for result, row in found if summary.fastest(row, True) and summary.fastest(row, False)]
    if not timed:
        return "-", "-", "-", "not measured yet"
    # The kernels as they are come first; then one order of the machines for all rows.
    result, row = min(timed, key=lambda pair: (bool(pair[0].get("changed")), pair[0]["path"]))
    ours, other = (summary.fastest(row, whose) for whose in (True, False))
    where = device_of(checked(result)) + (" (of earlier kernels)" if stale(result) else "")
    ratio = other["seconds"]["median"] / ours["seconds"]["median"]
    return _ms(ours), f"{_ms(other)} ({other['name']})", f"{ratio:.2f} x", link(result, where)


def _ms(entry):
    time = 1e3 * entry["seconds"]["median"]
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def quality():
    """Distance of the shipped student's images in units of the floor, precision and recall."""
    checked(result := stored("evaluation")[0])
    rows = [(*pair, *_figures(_row(result, *pair)), link(result)) for pair in QUALITY]
    return markdown(("images", "against", *FIGURES, "result"), rows)


def methods():
    """The registered methods that have a stored evaluation of a student, against its teacher."""
    rows = []
    for name in METHODS:
        for result in stored(SHIPPED.get(name, f"evaluation-{name}")):
            checked(result)
            student = result["models"]["student"]
            size = (student["evaluations"], f"{student['parameters']:,}")
            page = f"[`{name}`](docs/pages/methods/{name}.md)"
            rows.append(
                (page, method_class(name).reference, *size, *_figures(_row(result, "student", "teacher")), link(result))
            )
    return markdown(("method", "paper", "evaluations", "parameters", *FIGURES, "result"), rows)


def _row(result, images, against):
    """The row of an evaluation that compares some images with others."""
    (row,) = [row for row in result["rows"] if (row["images"], row["against"]) == (images, against)]
    return row


def _figures(row):
    low, high = row["times_floor_interval"]
    return f"{row['times_floor']:.2f} ({low:.2f} to {high:.2f})", f"{row['precision']:.2f}", f"{row['recall']:.2f}"


def quality_of(images, against):
    """The function that makes a sentence of a model card: figures of some images against others."""

    def sentence():
        checked(result := stored("evaluation")[0])
        row = _row(result, images, against)
        distance, precision, recall = _figures(row)
        distance = distance.replace(" (", " times the floor (95 % interval ")
        return f"Frechet distance {distance}, precision {precision}, recall {recall} (N = {row['samples'][0]:,})"

    return sentence


def gpu_state():
    """How many GPU kernels have run on a GPU as they are, in a sentence."""
    runs = [last_run(family) for family in families()]
    current = sum(bool(run) and not run["stale"] for run in runs)
    return f"{current} of {len(runs)} GPU kernels have run at their current source"


TABLES_OF_METHODS = {
    f"method_{name.replace('-', '_')}": replace(TABLES["evaluation"], name=f"evaluation-{name}")
    for name in METHODS
    if name not in SHIPPED
    and "generator" in method_class(name).students
    and (ROOT / "docs" / "pages" / "methods" / f"{name}.md").exists()
}
"""The evaluation of each method that has a page, for it."""
