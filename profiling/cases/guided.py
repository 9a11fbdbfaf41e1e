"""Class accuracy of guided students beside their teacher's, by weight of guidance.

python -m profiling.cases.guided --students w/w,w/8,w/4,w/2,w/1 --num 1000

The teacher takes two evaluations a step, a guided student takes the weight itself. Classes take turns, all sets begin at one
start noise, and a classifier of clean digits says what it finds. The table is ``profiling/results/<device>/guided.json``.
"""

import argparse
from pathlib import Path

from advkd import Teacher
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.solvers import Solver
from advkd.evaluation.evaluate import REFERENCE_SEED
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder
from .guidance import measure


def lines():
    """The table of stored results."""
    found = []
    for result in stored("guided"):
        found += source(result, [], "intervals are in the table")
        titles = ("model", "evaluations", "w", "class found", "FD to real digits", "95 % interval", "precision", "recall")
        rows = [
            (row["model"], row["evaluations"], f"{row['guidance']:g}", f"{row['accuracy']:.3f}", f"{row['frechet']:.3f}")
            + ("{:.3f} to {:.3f}".format(*row["interval"]), f"{row['precision']:.3f}", f"{row['recall']:.3f}")
            for row in result["rows"]
        ]
        found += [*markdown(titles, rows), ""]
    return found[:-1] or NOTHING


def _of_teacher(teacher, solver, steps):
    def draw(count, first, labels, weight):
        return teacher.sample(count, REFERENCE_SEED, solver, steps, first, labels=labels, guidance=weight)

    return draw


def _of_student(student):
    def draw(count, first, labels, weight):
        return student.sample(count, REFERENCE_SEED, start=first, labels=labels, guidance=weight)

    return draw


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits-conditional", help="the students' teacher")
    parser.add_argument("--students", required=True, help="folders of 'advkd distill guided', separated by commas")
    parser.add_argument("--num", type=int, default=1000, help="images of every weight")
    parser.add_argument("--weights", default="0,2", help="weights w, separated by commas")
    parser.add_argument("--solver", default="euler", help="name of the teacher's solver: ddim keeps eps where x0 is clamped")
    parser.add_argument("--steps", type=int, default=50, help="its steps")
    parser.add_argument("--results", help="folder of guided.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    teacher, solver = Teacher.from_pretrained(options.teacher), Solver(options.solver)
    students = {folder: DenoiserStudent.from_pretrained(folder) for folder in options.students.split(",")}
    sets = [("teacher", f"2 x {solver.evaluations(options.steps)}", _of_teacher(teacher, solver, options.steps))]
    sets += [(Path(folder).name, student.evaluations, _of_student(student)) for folder, student in students.items()]
    rows, weights = [], [float(weight) for weight in options.weights.split(",")]
    for name, evaluations, draw in sets:
        measured = measure(draw, teacher, options.num, weights)
        rows += [{"model": name, "evaluations": evaluations, **row} for row in measured]
    identities = {folder: student.identity() for folder, student in students.items()}
    settings = {"num": options.num, "solver": solver.name, "steps": options.steps, "teacher": teacher.identity()}
    result = {"rows": rows, "config": settings | {"students": identities}, "provenance": provenance()}
    write_json(Path(options.results or device_folder()) / "guided.json", result)


if __name__ == "__main__":
    main()
