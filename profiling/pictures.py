"""Draw the pictures of README and site anew: python -m profiling.pictures.

The shipped student beside its teacher, from noise that training has not seen, glyphs, solvers on two moons, the orders of
solvers, the errors of score networks, and the plots of the stored results. (The picture of a report, and a method's on its
page, are those of ``advkd report``.)
"""

from pathlib import Path

import torch

from advkd import Student, Teacher
from advkd.data.glyphs import TRAINED, draw_glyphs
from advkd.data.images import normalize
from advkd.data.pictures import save_grid, save_image, save_strip, to_pil
from advkd.evaluation.image_sets import eight_bit
from advkd.evaluation.report import FRESH_SEED, save_levels_of, save_pairs_of
from advkd.evaluation.taught import all_in_turn, taught
from advkd.evaluation.toy.data import DATA
from advkd.evaluation.toy.laboratory import Laboratory
from advkd.evaluation.toy.pictures import save_samples, shrink
from advkd.evaluation.toy.solvers import shown

from . import roofline, solver_orders
from .cases import glyphs, gradient_penalty, neighbours, sampler_step, score_error, student
from .evidence import ROOT, checked, device_of, stale, stored
from .gpu import summary
from .trace import demo

PICTURES = ROOT / "docs" / "pages" / "pictures"
PLOTS = {
    "demo": (demo.plot, "time of a demo by part"),
    "roofline": (roofline.plot, "every op under the machine's ceilings"),
    "scaling": (student.plot, "time by batch, resolution and threads"),
    "step_scaling": (sampler_step.plot, "time of a step by batch and resolution"),
    "penalty_scaling": (gradient_penalty.plot, "time of a penalty by batch, resolution and depth"),
    "neighbours": (neighbours.plot, "time over the fair share beside busy processes"),
}
"""Name of results -> the function that plots one, and the plot's caption."""


def strip(teacher, student, n=16):
    """Noise, the teacher's images and the student's, not chosen, with measured times of one machine."""
    noise = teacher.noise(n, FRESH_SEED)
    with torch.no_grad():
        drawn = student(student.project(noise)).clamp(-1, 1)
        images = torch.stack((noise.clamp(-3, 3) / 3, teacher.sample(n, FRESH_SEED), drawn))
    titles = ("noise", f"teacher, {len(teacher.timesteps())} evaluations", "student, one evaluation")
    save_strip(images, titles, captions(), PICTURES / "strip.png")


def glyph_pictures(teacher, student, n=16):
    """The shipped student of glyphs, not chosen: beside its teacher, 64 images, some above their nearest training images."""
    lesson, noise = taught(student, teacher), teacher.noise(n, FRESH_SEED)
    with torch.no_grad():
        drawn = student(student.project(noise), labels=all_in_turn(student, n))
    images = torch.stack((noise.clamp(-3, 3) / 3, teacher.sample(n, FRESH_SEED, **lesson.arguments(n)), drawn))
    titles = ("noise", f"teacher, {lesson.evaluations(teacher)} evaluations", "student, one evaluation")
    save_strip(images, titles, ("", "", ""), PICTURES / "glyphs_strip.png")
    many = student.sample(64, FRESH_SEED)
    save_grid(many, PICTURES / "glyphs_student.png", columns=16, scale=2)
    trained, _ = draw_glyphs(range(TRAINED))
    _, places = glyphs.nearest(eight_bit(many[:n]), trained)
    save_grid(torch.cat((many[:n], normalize(trained[places]))), PICTURES / "glyphs_neighbours.png", columns=n, scale=2)


def data_set(rows=3, columns=16):
    """Rows of the data set of glyphs at 32x32, each pixel shown as four, and below them the first ones at 128x128."""
    small, great = (draw_glyphs(range(n), size)[0] for n, size in ((rows * columns, 32), (columns // 2, 128)))
    sheet = [_tiled(small.repeat_interleave(2, 2).repeat_interleave(2, 3), rows), _tiled(great, 1)]
    save_image(to_pil(torch.cat(sheet).unsqueeze(0))[0], PICTURES / "glyphs.png")


def _tiled(images, rows):
    """``(N, C, S, S)`` as one picture, ``(rows * S, N / rows * S, C)``."""
    lines = images.unflatten(0, (rows, -1)).permute(0, 3, 1, 4, 2)
    return lines.flatten(2, 3).flatten(0, 1)


def toy():
    """Samples and paths of some solvers on two moons."""
    lab = Laboratory(DATA["two-moons"](), samples=2000, seed=0, scale=1.0)
    drawn = shown(lab)
    save_samples(lab.data, drawn.samples, drawn.paths, PICTURES / "toy.png")
    shrink(PICTURES / "toy.png")


def captions():
    """The machine, and milliseconds of an image in batches of 16: on kernels as they are, where there are such results."""
    machines = {Path(result["path"]).parent: result for result in stored("bench_teacher")}
    pairs = [(result, machines.get(Path(result["path"]).parent)) for result in stored("bench_student")]
    small, large = min(filter(all, pairs), key=lambda pair: any(result["changed"] for result in pair))
    place, old = checked(small), bool(checked(large) and (stale(small) or stale(large)))
    where = f"{device_of(place)}, {place['threads']} threads, batch 16{', earlier kernels' if old else ''}"
    times = (_milliseconds(large, "DDIM-50 trajectory, batch 16"), _milliseconds(small, "digits, batch 16, float32"))
    return (where, *(f"{time:.3g} ms an image" for time in times))


def _milliseconds(result, case):
    (row,) = [row for row in result["cases"] if row["case"] == case]
    return 1e3 * summary.fastest(row, ours=True)["seconds"]["median"] / row["images"]


def main():
    """Draw all of them."""
    teacher, small = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    strip(teacher, small)
    save_pairs_of(teacher, small, PICTURES / "teacher_and_student.png")
    save_levels_of(teacher, small, PICTURES / "levels.png")
    glyph_pictures(Teacher.from_pretrained("glyphs"), Student.from_pretrained("glyphs"))
    data_set()
    toy()
    solver_orders.plot(PICTURES / "solver_orders.png")
    for result in stored("score_error"):
        score_error.plot(result, PICTURES / "score-error.png")
    for name, (plot, _) in PLOTS.items():
        for result in stored(name):
            checked(result)
            plot(result, (ROOT / result["path"]).with_suffix(".png"))


if __name__ == "__main__":
    main()
