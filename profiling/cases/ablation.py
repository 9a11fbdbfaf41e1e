"""Worth of each choice of the recipe, at equal budget: one distillation per row, each measured against the same samples.

advkd trajectories --teacher digits --num 8192 --out paths
advkd trajectories --teacher digits --num 4096 --seed 1000001 --out reference
python -m profiling.cases.ablation --trajectories paths --teacher-samples reference --out runs

Every row differs from the first in what it names, and sees 400 student updates of 32 pairs. The paper's recipe has twelve
stages of 40 updates with five critic updates each, about twice the CPU time of the first row. Finished rows are kept, a killed
one goes on; several processes may share the rows by ``--only``. The table is ``profiling/results/<device>/ablation.json``.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from advkd.data.trajectories import Trajectories
from advkd.errors import InputError
from advkd.evaluation.evaluate import EvaluationConfig, evaluate_student
from advkd.models.shape import PRESETS
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..harness import device_folder
from .tables import TABLES

BASE = {
    "updates": 400,
    "batch-sizes": 32,
    "pairs": 4096,
    "critic-levels": 12,
    "learning-rate": 1e-3,
    "final-learning-rate": 0.05,
    "log-every": 20,
}
# The paper's critics, rates and batches.
PAPER = {"recipe": "paper", "updates": 40, "pairs": 4096, "log-every": 20, "batch-sizes": None}
PAPER |= {"critic-levels": None, "learning-rate": None, "final-learning-rate": None}
NARROW = [64, 64, 64, 64, 64, 32, 32, 24, 24, 24, 16, 16]

ROWS = {
    "joint recipe": {},
    "paper's recipe, stage by stage": PAPER,
    "no critic (J = MSE)": {"wasserstein": 0},
    "J = KL, no critic": {"mse": 0, "kl": 1, "wasserstein": 0},
    "J = Wasserstein alone": {"mse": 0, "wasserstein": 1},
    "J = MSE + KL + Wasserstein": {"kl": 1},
    "Wasserstein x 10": {"wasserstein": 1},
    "conditional critic": {"conditional": True},
    "critics at all levels": {"critic-levels": None},
    "regression at the image only": {"regression-levels": 12},
    "1,024 pairs": {"pairs": 1024},
    "8,192 pairs": {"pairs": 8192},
    "pairs made while training (1,024 to 4,096)": {"pairs": 1024, "grow": 512, "grow-every": 60, "teacher": "digits"},
    "critic sees fresh latents": {"fresh": True},
    "critic sees shifted images": {"augment": True},
    "detail noise": {"detail_noise": True},
    "no EMA": {"ema": 0},
    "narrower student (460,017 parameters)": {"channels": NARROW},
}
STUDENT_FIELDS = ("detail_noise", "channels")
KEPT = ("frechet", "frechet_interval", "times_floor", "floor", "precision", "recall", "recall_of_other", "diversity")
"""The figures of an evaluation that are kept."""


def command(name, trajectories, out):
    """The row's ``advkd distill`` command line, as a list; a student of its own shape is in ``<out>-student.json``."""
    options = {key: value for key, value in {**BASE, **ROWS[name]}.items() if key not in STUDENT_FIELDS and value is not None}
    preset = f"{out}-student.json" if set(ROWS[name]) & set(STUDENT_FIELDS) else "digits"
    line = ["advkd", "distill", *(word for folder in trajectories for word in ("--trajectories", str(folder)))]
    line += ["--preset", preset, "--out", str(out)]
    words = ([f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in options.items())
    return [*line, *(word for pair in words for word in pair)]


def student_shape(name):
    """The digits preset's configuration with a row's changes, or None; detail noise replaces the latent's high coefficients."""
    changes, config = {key: ROWS[name][key] for key in STUDENT_FIELDS if key in ROWS[name]}, PRESETS["digits"]
    shape = {"image_size": config.image_size, "image_channels": config.image_channels, "channels": list(config.channels)}
    return {**shape, "latent_size": 1 if "detail_noise" in changes else config.latent_size, **changes} if changes else None


def run_row(name, trajectories, samples, folder, num):
    """Distil and measure one row; its figures go to ``<folder>/<slug>.json``."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    out, record, student = folder / slug, folder / f"{slug}.json", student_shape(name)
    what = {"name": name, "command": shlex.join(command(name, ["paths"], slug)), "num": num, "student": student}
    what |= {"manifests": Trajectories(*trajectories).manifests}
    if record.exists():
        stored = json.loads(record.read_text())
        if changed := [key for key in what if stored.get(key) != what[key]]:
            raise InputError(f"{record} was made with another {', '.join(changed)}: name another --out")
        return
    if student:
        write_json(f"{out}-student.json", student)
    line, resumed = command(name, trajectories, out), (out / "checkpoint.safetensors").exists()
    before = os.times()
    subprocess.run([sys.executable, "-m", "advkd.cli", *line[1:], *(["--resume"] if resumed else [])], check=True)
    # Only the last part's time of a killed run is known.
    now = os.times()
    spent = now.children_user + now.children_system - before.children_user - before.children_system
    result = evaluate_student(out, "digits", EvaluationConfig(num=num, real="none", resamples=100), out / "evaluation", samples)
    row = result["rows"][0]
    figures = {key: row[key] for key in KEPT} | {"at_infinity": row["frechet_at_infinity"]["value"], "score": result["score"]}
    figures |= {"correlation": result["pairs"]["correlation"], "parameters": result["models"]["student"]["parameters"]}
    write_json(record, {**what, "cpu_seconds": None if resumed else spent, **figures, "provenance": provenance()})


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, action="append", help="the pairs, 8,192 or more (several: repeat)")
    parser.add_argument("--teacher-samples", required=True, help="twice --num samples of another seed")
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--only", action="append", help="a row's name, or a part of it (several: repeat)")
    parser.add_argument("--num", type=int, default=2000, help="images that a row is measured with")
    parser.add_argument("--results", help="folder of ablation.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    chosen = [name for name in ROWS if not options.only or any(part in name for part in options.only)]
    pairs, samples = len(Trajectories(*options.trajectories)), len(Trajectories(options.teacher_samples))
    if not chosen:
        parser.error(f"--only {', '.join(options.only)}: no such row (known: {', '.join(ROWS)})")
    if pairs < 8192 or samples < 2 * options.num:
        parser.error(f"8,192 pairs and {2 * options.num} samples are needed, {pairs} and {samples} are there")
    folder = Path(options.out)
    for name in chosen:
        run_row(name, options.trajectories, options.teacher_samples, folder, options.num)
    # The table of all rows that are there, in order.
    records = {row["name"]: row for path in folder.glob("*.json") if "name" in (row := json.loads(path.read_text()))}
    result = {"runs": [records[name] for name in ROWS if name in records], "budget": BASE, "provenance": provenance()}
    write_json(Path(options.results or device_folder()) / "ablation.json", result)
    print(*TABLES["ablation"].of(result), sep="\n")


if __name__ == "__main__":
    main()
