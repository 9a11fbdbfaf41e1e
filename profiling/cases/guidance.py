"""Worth of guidance: class accuracy and distance to real digits of the conditional teacher by weight.

python -m profiling.cases.guidance --num 1000

The classes take turns; the accuracy is the share of images in which the classifier of clean digits finds the class that was
asked for. All sets begin at one start noise. The table is ``profiling/results/<device>/guidance.json``.
"""

import argparse
from pathlib import Path

import torch

from advkd import Classifier, Teacher
from advkd.diffusion.solvers import Solver
from advkd.evaluation.evaluate import REFERENCE_SEED
from advkd.evaluation.features import build_extractor, extract
from advkd.evaluation.image_sets import eight_bit, real_images, shuffled
from advkd.evaluation.metrics import frechet_distance, frechet_interval, neighbour_measures
from advkd.evaluation.recognition import recognised
from advkd.evaluation.teacher_pictures import WEIGHTS
from advkd.models.shape import batches
from advkd.runtime.files import write_json
from advkd.runtime.progress import progress_bar
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder


def measure(draw, teacher, num, weights, batch_size=50, data="digits"):
    """A row for every weight of guidance: ``draw(count, first, labels, weight)`` gives images of the teacher's classes.

    ``data`` names classifier, features and real images.
    """
    classifier, extractor = Classifier.from_pretrained(data), build_extractor(data)
    reference = shuffled(extract(extractor, real_images(data, teacher.shape)))
    rows = []
    with progress_bar(total=num * len(weights), desc="guidance", unit="image") as bar:
        for weight in weights:
            images, labels = [], torch.arange(num) % len(teacher.class_names)
            for first, count in batches(num, batch_size):
                chosen = labels[first : first + count]
                images.append(eight_bit(draw(count, first, chosen, weight)))
                bar.update(count)
            images = torch.cat(images)
            features = extract(extractor, images)
            near = neighbour_measures(features, reference, resamples=100)
            row = {"guidance": weight, "accuracy": classifier.accuracy(images, labels)}
            row |= {"recognised": recognised(classifier, images, labels).double().mean().item()}
            row |= {"frechet": frechet_distance(features, reference), "interval": frechet_interval(features, reference, 100)}
            rows.append(row | {key: near[key] for key in ("precision", "recall", "diversity")})
    return rows


def lines():
    """The table of stored results."""
    found = []
    for result in stored("guidance"):
        found += source(result, [], "intervals are in the table")
        titles = ("w", "class found", "FD to real digits", "95 % interval", "precision", "recall", "diversity")
        rows = [
            (
                f"{row['guidance']:g}",
                f"{row['accuracy']:.3f}",
                f"{row['frechet']:.3f}",
                "{:.3f} to {:.3f}".format(*row["interval"]),
            )
            + tuple(f"{row[key]:.3f}" for key in ("precision", "recall", "diversity"))
            for row in result["rows"]
        ]
        found += [*markdown(titles, rows), ""]
    return found[:-1] or NOTHING


def sentence():
    """The figures of a model card: without guidance, and at the weight of the best distance."""
    result = stored("guidance")[0]
    plain, best = result["rows"][0], min(result["rows"], key=lambda row: row["frechet"])
    said = [
        f"at w = {row['guidance']:g} the class that was asked for is found in {100 * row['accuracy']:.1f} % of the images, "
        f"Frechet distance to real digits {row['frechet']:.3f}"
        for row in ((plain, best) if best is not plain else (plain,))
    ]
    return f"{'; '.join(said)} (N = {result['config']['num']:,})"


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits-conditional", help="a conditional teacher of digits")
    parser.add_argument("--num", type=int, default=1000, help="images of every weight")
    parser.add_argument("--solver", default="unipc", help="name of the solver")
    parser.add_argument("--steps", type=int, default=10, help="its steps")
    parser.add_argument("--results", help="folder of guidance.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    teacher, solver = Teacher.from_pretrained(options.teacher), Solver(options.solver)

    def draw(count, first, labels, weight):
        return teacher.sample(count, REFERENCE_SEED, solver, options.steps, first, labels=labels, guidance=weight)

    rows = measure(draw, teacher, options.num, WEIGHTS)
    settings = {"num": options.num, "solver": solver.name, "steps": options.steps, "teacher": teacher.identity()}
    result = {"rows": rows, "config": settings, "provenance": provenance()}
    write_json(Path(options.results or device_folder()) / "guidance.json", result)


if __name__ == "__main__":
    main()
