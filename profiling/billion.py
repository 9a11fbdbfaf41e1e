"""Cost of a billion images of 256x256: device hours and money, from measured seconds per image.

python -m profiling.billion [--device cuda] [--out FOLDER]     measures; python -m profiling.tables writes its page

The teacher is the 113.7 M-parameter UNet of the published 256x256 DDPMs with random weights (weights do not change the time):
one evaluation times the sampler's steps; the sampler's own arithmetic is left out, in the teacher's favour. Every engine below
runs it in every batch and dtype, and the fastest is what counts. The student is timed as it is used, from seed to images on the
host.
"""

import copy
import functools
import itertools

import torch

from advkd.runtime.hub import reason
from advkd.runtime.timing import measure

from . import peers
from .cases.student import PARITY_TESTS, plausible_student
from .cases.teacher import Evaluation
from .evidence import Table, device_of, source
from .harness import Sweep, main
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


def costs(result):
    """A row of every sampler of the teacher, by its fastest engine, and of every student."""
    student, teacher = ({name: row["median"] for name, row in result[part]["rows"].items()} for part in ("student", "teacher"))
    fastest = min(teacher, key=teacher.get)
    rows = {f"teacher, {name} ({fastest})": n * teacher[fastest] for name, n in SAMPLERS.items()}
    for name, seconds in {**rows, **{f"student, {name}": seconds for name, seconds in student.items()}}.items():
        hours = IMAGES * seconds / 3600
        dollars, times = hours * PRICES[result["kind"]][0] * cores(result), seconds / min(student.values())
        yield {"name": name, "seconds": seconds, "hours": hours, "dollars": dollars, "times": times}


def cores(result):
    """Number of cores that are paid for; a GPU counts as one."""
    return result["provenance"]["threads"] if result["kind"] == "cpu" else 1


def evaluations(result):
    """A row of every engine of the teacher, by time, and of those that cannot run."""
    rows = sorted(((row["median"], name) for name, row in result["teacher"]["rows"].items()))
    found = [{"name": name, "seconds": f"{seconds:.4g}"} for seconds, name in rows]
    missing = result["teacher"].get("missing", {}).items()
    return [*found, *({"name": name, "seconds": f"cannot run here: {why}"} for name, why in missing)]


COSTS = Table(
    "billion",
    {
        "": "{name}",
        "seconds per image": "{seconds:.4g}",
        "device hours": "{hours:,.0f}",
        "dollars": "{dollars:,.0f}",
        "against the fastest student": "{times:,.1f} x",
    },
    costs,
    below=lambda r: ["", f"The student draws batches of {r['student']['batch']}. One evaluation of the teacher:", ""],
)
EVALUATIONS = Table("billion", {"engine": "{name}", "seconds per image": "{seconds}"}, evaluations)


def page(results):
    """The page as text, of stored results."""
    lines = ["# A billion images of 256x256", "", *__doc__.split("\n\n")[2].replace("\n", " ").split("\n"), ""]
    lines += ["Device hours are seconds per image times a billion over 3600. Assumed prices, in dollars per hour: "]
    lines[-1] += ", ".join(f"{price:g} for {what}" for price, what in PRICES.values())
    lines[-1] += ". Energy, storage and the host's writing of pictures are left out on both sides."
    for result in results:
        times = [time for part in ("student", "teacher") for time in result[part]["rows"].values()]
        where = device_of(result["provenance"]) + (f", {cores(result)} cores" if result["kind"] == "cpu" else "")
        lines += ["", f"## {where}", "", *source(result, times), *COSTS.of(result), *EVALUATIONS.of(result)]
    if not any(result["kind"] == "cuda" for result in results):
        lines += ["", "No GPU has been measured yet."]
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def measured(device):
    """Seconds per image of both students and of the teacher's evaluation."""
    gpu = device != "cpu"
    found = {"benchmark": "billion", "kind": "cuda" if gpu else "cpu", "student": student_seconds(device, 64 if gpu else 8)}
    return {**found, "teacher": teacher_seconds(device, (1, 16) if gpu else (1,))}


SWEEPS = {"billion": Sweep("billion", measured, PARITY_TESTS, [COSTS, EVALUATIONS], options={"device": "cpu"})}

if __name__ == "__main__":
    main(SWEEPS)
