"""Draw the pictures of README and site anew: python -m profiling.pictures.

The shipped student beside its teacher, from noise that training has not seen, and the plots of the stored results.
"""

from pathlib import Path

import torch

from advkd import Student, Teacher
from advkd.data.pictures import save_strip
from advkd.evaluation.report import FRESH_SEED, save_levels_of, save_pairs_of

from . import roofline
from .cases import gradient_penalty, neighbours, sampler_step, student
from .evidence import ROOT, checked, device_of, stored
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


def strip(n=16):
    """Noise, the teacher's images and the student's, not chosen, with measured times of one machine."""
    teacher, small = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    noise = teacher.noise(n, FRESH_SEED)
    with torch.no_grad():
        images = torch.stack((noise.clamp(-3, 3) / 3, teacher.sample(n, FRESH_SEED), small(small.project(noise)).clamp(-1, 1)))
    titles = ("noise", f"teacher, {len(teacher.timesteps())} evaluations", "student, one evaluation")
    save_strip(images, titles, _captions(), PICTURES / "strip.png")


def _captions():
    """The machine, and milliseconds of an image in batches of 16: on kernels as they are, where there are such results."""
    results = {Path(result["path"]).parent: result for result in stored("bench_teacher")}
    pairs = [
        (result, results[folder]) for result in stored("bench_student") if (folder := Path(result["path"]).parent) in results
    ]
    small, large = min(pairs, key=lambda pair: bool(pair[0]["changed"]))
    place = checked(small)
    times = (_milliseconds(large, "DDIM-50 trajectory, batch 16"), _milliseconds(small, "digits, batch 16, float32"))
    return (f"{device_of(place)}, {place['threads']} threads, batch 16", *(f"{time:.3g} ms an image" for time in times))


def _milliseconds(result, case):
    (row,) = [row for row in result["cases"] if row["case"] == case]
    ours = next(entry for entry in row["contestants"] if entry["kind"] == "ours" and "seconds" in entry)
    return 1e3 * ours["seconds"]["median"] / row["images"]


def main():
    """Draw all of them."""
    strip()
    teacher, small = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    save_pairs_of(teacher, small, PICTURES / "teacher_and_student.png")
    save_levels_of(teacher, small, PICTURES / "levels.png")
    for name, (plot, _) in PLOTS.items():
        for result in stored(name):
            checked(result)
            plot(result, (ROOT / result["path"]).with_suffix(".png"))


if __name__ == "__main__":
    main()
