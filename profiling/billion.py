"""Cost of a billion images of 256x256: device hours and money, from measured seconds per image.

python -m profiling.billion [--device cuda] [--out FOLDER]     measures; python -m profiling.tables writes docs/billion.md

The teacher is the 113.7 M-parameter UNet of the published 256x256 DDPMs with random weights (weights do not change the time):
one evaluation times the sampler's steps; the sampler's own arithmetic is left out, in the teacher's favour. Every engine below
runs it in every batch and dtype, and the fastest is what counts. The student is timed as it is used, from seed to images on the
host.
"""

import argparse
import copy
import functools
import itertools
from pathlib import Path

import torch

from advkd.runtime.files import write_json
from advkd.runtime.hub import reason
from advkd.runtime.timing import measure

from . import peers
from .cases.student import PARITY_TESTS, plausible_student
from .cases.teacher import Evaluation
from .evidence import device_alone, source
from .harness import device_folder, passes, provenance
from .trace.workloads import TEACHER

IMAGES = 10**9
SAMPLERS = {"DDPM-1000": 1000, "DDIM-50": 50}
PRICES = {"cpu": (0.05, "a thread of a CPU"), "cuda": (3.5, "a GPU")}
"""Dollars per hour, as rented: assumptions, not measurements."""


def teacher_seconds(device, batches):
    """Seconds of one evaluation per image: of every engine and batch that runs here, the fastest is what counts."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network, calls, images, missing = Evaluation(UNet2DModel(**TEACHER)).to(device), {}, {}, {}
    for batch, dtype in itertools.product(batches, (torch.float32, torch.bfloat16)):
        x = torch.randn(batch, 3, 256, 256, device=device)
        for engine, prepare in engines(device).items():
            name = f"{engine}, {str(dtype).removeprefix('torch.')}, batch {batch}"
            try:
                calls[name], images[name] = prepare(copy.deepcopy(network), x, dtype), batch
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {reason(error)}"
    times = measure(calls, repeats=3, warmup=1, device=device)
    rows = {name: _per_image(time, images[name]) for name, time in times.items()}
    return {"parameters": sum(p.numel() for p in network.parameters()), "rows": rows, "missing": missing}


def engines(device):
    """Engines to be compared on a network, by name; the fastest counts."""
    if device == "cpu":
        return {"eager": peers.eager, "torch.compile": peers.compiled, "OpenVINO": peers.openvino}
    tuned = functools.partial(peers.compiled, mode="max-autotune")
    return {"cuDNN, graph": peers.graphed, "torch.compile, max-autotune": tuned, "TensorRT": peers.tensorrt}


def student_seconds(device, batch):
    """Seconds per image of each 256x256 preset and dtype, from seed to images on the host."""
    rows = {}
    for preset in ("paper-256", "pyramid-256"):
        student = plausible_student(preset).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            fused = student.fuse(dtype=dtype)
            calls = {"sample": lambda fused=fused: fused.sample(2 * batch, batch_size=batch)}
            name = f"{preset}, {str(dtype).removeprefix('torch.')}"
            rows[name] = measure(calls, repeats=5, warmup=1, device=device)["sample"]
    return {"batch": batch, "rows": {name: _per_image(time, 2 * batch) for name, time in rows.items()}}


def _per_image(time, images):
    return {key: time[key] / images for key in ("median", "p20", "p80")}


def page(results, above=source):
    """The page as text, of stored results."""
    lines = ["# A billion images of 256x256", "", *__doc__.split("\n\n")[2].replace("\n", " ").split("\n"), ""]
    lines += ["Device hours are seconds per image times a billion over 3600. Assumed prices, in dollars per hour: "]
    lines[-1] += ", ".join(f"{price:g} for {what}" for price, what in PRICES.values())
    lines[-1] += ". Energy, storage and the host's writing of pictures are left out on both sides."
    for result in results:
        place, kind = result["provenance"], result["kind"]
        units = place["threads"] if kind == "cpu" else 1
        rate = PRICES[kind][0] * units
        times = [time for part in ("student", "teacher") for time in result[part]["rows"].values()]
        lines += ["", f"## {place['device']}" + (f", {units} cores" if kind == "cpu" else ""), "", *above(result, times)]
        lines += ["| | seconds per image | device hours | dollars | against the fastest student |", "|---|---|---|---|---|"]
        student, teacher = (
            {name: row["median"] for name, row in result[part]["rows"].items()} for part in ("student", "teacher")
        )
        best = min(student.values())
        fastest = min(teacher, key=teacher.get)
        rows = {f"teacher, {name} ({fastest})": n * teacher[fastest] for name, n in SAMPLERS.items()}
        rows |= {f"student, {name}": seconds for name, seconds in student.items()}
        for name, seconds in rows.items():
            hours = IMAGES * seconds / 3600
            figures = (f"{seconds:.4g}", f"{hours:,.0f}", f"{hours * rate:,.0f}", f"{seconds / best:,.1f} x")
            lines.append("| " + " | ".join((name, *figures)) + " |")
        lines += [
            "",
            f"The student draws batches of {result['student']['batch']}. One evaluation of the teacher:",
            "",
        ]
        lines += ["| engine | seconds per image |", "|---|---|"]
        lines += [f"| {name} | {seconds:.4g} |" for name, seconds in sorted(teacher.items(), key=lambda row: row[1])]
        lines += [f"| {name} | cannot run here: {why} |" for name, why in result["teacher"].get("missing", {}).items()]
    if not any(result["kind"] == "cuda" for result in results):
        lines += ["", "No GPU has been measured yet."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Measure what an image of 256x256 costs, teacher's and student's.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="folder for the JSON (default: profiling/results/<device>)")
    options = parser.parse_args()
    if not passes(PARITY_TESTS):
        raise SystemExit("the parity tests failed or none ran, nothing was timed")
    gpu = options.device != "cpu"
    result = {"benchmark": "billion", "kind": "cuda" if gpu else "cpu", "provenance": provenance(options.device)}
    result["student"] = student_seconds(options.device, 64 if gpu else 8)
    result["teacher"] = teacher_seconds(options.device, (1, 16) if gpu else (1,))
    write_json(Path(options.out or device_folder(options.device)) / "billion.json", result)
    print(page([result], device_alone))


if __name__ == "__main__":
    main()
