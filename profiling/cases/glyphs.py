"""Quality of the shipped models of glyphs: the classifier first, then the teacher that it judges, then the student.

python -m profiling.cases.glyphs --num 1000

Real glyphs are of the held-out range, whose images no training reached. Classes take turns and all sets begin at one start
noise. An image is recognised where the classifier's probability of the class that was asked for is over 0.9. The table is
``profiling/results/<device>/glyphs.json``.
"""

import argparse
from operator import itemgetter
from pathlib import Path

import torch

from advkd import Classifier, Student, Teacher
from advkd.data.glyphs import HELD_OUT, HELD_OUT_FONTS, TRAINED, draw_glyphs, versions
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError
from advkd.evaluation.evaluate import REFERENCE_SEED
from advkd.evaluation.image_sets import eight_bit
from advkd.evaluation.recognition import recognised
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder
from .guidance import measure

REAL = {"held-out images": {}, "held-out images of held-out fonts": {"fonts": HELD_OUT_FONTS}}
"""Sets of real glyphs that the classifier is measured on."""


def of_classifier(classifier, num):
    """A row for every set of real glyphs: accuracy, and the share in which the classifier is sure of the class."""
    rows = []
    for name, options in REAL.items():
        images, labels = draw_glyphs(range(HELD_OUT, HELD_OUT + num), **options)
        sure = recognised(classifier, images, labels).double().mean().item()
        rows.append({"images": name, "accuracy": classifier.accuracy(images, labels), "recognised": sure})
    return rows


def nearest(images, trained):
    """Distance of every image to the nearest training image, root of the mean square in [-1, 1], and that one's number."""
    flat, known = images.flatten(1).float() / 127.5, trained.flatten(1).float() / 127.5
    distances, numbers = zip(*(torch.cdist(part, known).min(1) for part in flat.split(100)))
    return torch.cat(distances) / flat.shape[1] ** 0.5, torch.cat(numbers)


def memorised(images, num):
    """Median distance to the nearest training image: of drawn images, and of real ones that no training reached."""
    trained, _ = draw_glyphs(range(TRAINED))
    real, _ = draw_glyphs(range(HELD_OUT, HELD_OUT + num))
    return {name: nearest(group, trained)[0].median().item() for name, group in (("drawn", images[:num]), ("real", real))}


def lines():
    """The tables of stored results."""
    found = []
    for result in stored("glyphs"):
        found += source(result, [], "intervals are in the table")
        of_real = [(row["images"], f"{row['accuracy']:.3f}", f"{row['recognised']:.3f}") for row in result["classifier"]]
        found += [*markdown(("classifier on", "class found", "recognised"), of_real), ""]
        titles = ("model", "evaluations", "w", "class found", "recognised", "FD to real glyphs", "95 % interval")
        rows = [
            (row["model"], row["evaluations"], "distilled in" if row["guidance"] is None else f"{row['guidance']:g}")
            + (f"{row['accuracy']:.3f}", f"{row['recognised']:.3f}", f"{row['frechet']:.3f}")
            + ("{:.3f} to {:.3f}".format(*row["interval"]), f"{row['precision']:.3f}", f"{row['recall']:.3f}")
            for row in result["rows"]
        ]
        found += [*markdown((*titles, "precision", "recall"), rows), ""]
    return found[:-1] or NOTHING


def _said_of_real(rows):
    return "; ".join(
        f"{row['images']}: class found in {100 * row['accuracy']:.1f} %, recognised {100 * row['recognised']:.1f} %"
        for row in rows
    )


def _said_of_model(rows):
    return "; ".join(
        f"{_weight(row)}the classifier is sure of the class asked for in {100 * row['recognised']:.1f} % of the images, "
        f"Frechet distance to real glyphs {row['frechet']:.3f}"
        for row in rows
    )


def _weight(row):
    return "" if row["guidance"] is None else f"at w = {row['guidance']:g} "


def _said_of_memory(found):
    return (
        f"the median distance of an image to the nearest of the {TRAINED:,} training images is {found['drawn']:.3f} "
        f"(root mean square, range 2), that of real held-out images {found['real']:.3f}"
    )


def _rows_of(model):
    return lambda result: [row for row in result["rows"] if row["model"] == model]


SENTENCES = {
    "classifier": (itemgetter("classifier"), _said_of_real),
    "memory": (itemgetter("nearest"), _said_of_memory),
    **{model: (_rows_of(model), _said_of_model) for model in ("teacher", "student")},
}
"""Part of a model card -> the values that it states of a result, and the sentence that they make."""


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000, help="images of every set")
    parser.add_argument("--teacher", default="glyphs", help="a conditional teacher of glyphs")
    parser.add_argument("--student", default="glyphs", help="a conditional student of glyphs")
    parser.add_argument("--weights", default="0,2,4", help="the teacher's weights of guidance, separated by commas")
    parser.add_argument("--solver", default="unipc", help="name of the teacher's solver")
    parser.add_argument("--steps", type=int, default=10, help="its steps")
    parser.add_argument("--results", help="folder of glyphs.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    classifier, solver = Classifier.from_pretrained("glyphs"), Solver(options.solver)
    teacher, student = Teacher.from_pretrained(options.teacher), Student.from_pretrained(options.student)
    fused = student.fuse(tune=False)
    known = classifier.training_record["classes"]
    for name, model in (("teacher", teacher), ("student", student)):
        if list(model.class_names) != known:
            raise InputError(f"--{name}: its classes are not those of the classifier of glyphs, {', '.join(known)}")

    def by_teacher(count, first, labels, weight):
        return teacher.sample(count, REFERENCE_SEED, solver, options.steps, first, labels=labels, guidance=weight)

    def by_student(count, first, labels, weight):
        return fused(fused.latents(count, REFERENCE_SEED, first), labels).float()

    rows = []
    for name, draw, weights in (
        ("teacher", by_teacher, [float(weight) for weight in options.weights.split(",")]),
        ("student", by_student, [None]),
    ):
        for row in measure(draw, teacher, options.num, weights, data="glyphs"):
            passes = 2 if row["guidance"] else 1
            evaluations = "1" if name == "student" else f"{passes} x {solver.evaluations(options.steps)}"
            rows.append({"model": name, "evaluations": evaluations, **row})
    drawn = eight_bit(by_student(min(options.num, 200), 0, torch.arange(min(options.num, 200)) % student.num_classes, None))
    result = {
        "classifier": of_classifier(classifier, options.num),
        "rows": rows,
        "nearest": memorised(drawn, len(drawn)),
        "config": {
            "num": options.num,
            "solver": solver.name,
            "steps": options.steps,
            "teacher": teacher.identity(),
            "glyphs": versions(),
        },
        "provenance": provenance(),
    }
    write_json(Path(options.results or device_folder()) / "glyphs.json", result)


if __name__ == "__main__":
    main()
