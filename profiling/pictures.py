"""Draw the pictures of README and site anew: python -m profiling.pictures.

The shipped student beside its teacher, from noise that training has not seen, and the plots of the stored results.
"""

import torch

from advkd import Student, Teacher
from advkd.data.pictures import save_strip
from advkd.evaluation.report import FRESH_SEED, save_levels_of, save_pairs_of

from . import roofline
from .cases import gradient_penalty, neighbours, sampler_step, student
from .evidence import ROOT, checked, stored
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
    """Noise, the teacher's images and the student's, not chosen, with the times of the stored evaluation."""
    result = stored("evaluation")[0]
    models, place = result["models"], checked(result)
    teacher, small = Teacher.from_pretrained("digits"), Student.from_pretrained("digits")
    noise = teacher.noise(n, FRESH_SEED)
    with torch.no_grad():
        images = torch.stack((noise.clamp(-3, 3) / 3, teacher.sample(n, FRESH_SEED), small(small.project(noise)).clamp(-1, 1)))
    titles = ("noise", *(f"{name}, {_evaluations(models[name])}" for name in ("teacher", "student")))
    where = f"{place['threads']} threads, batch {models['batch_size']}"
    times = [f"{1e3 * models[name]['seconds']['median']:.3g} ms an image ({where})" for name in ("teacher", "student")]
    save_strip(images, titles, ("", *times), PICTURES / "strip.png")


def _evaluations(model):
    count = model["evaluations"]
    return f"{count} evaluations" if count > 1 else "one evaluation"


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
