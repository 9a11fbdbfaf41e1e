"""Growth of the fused student's cost with batch, resolution and threads, and its memory: figures, and a plot of them.

python -m profiling.cases.scaling [--out FOLDER]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from advkd import Student, StudentConfig
from advkd.runtime.files import write_json
from advkd.runtime.timing import measure, percentiles

from ..harness import gated_folder, provenance
from ..plots import panels
from .student import DTYPES, PARITY_TESTS, direct_products, plausible_student

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (32, 64, 128, 256, 512)
FOOTPRINTS = ("digits", "pyramid-256", "paper-256")
FIRST_IMAGES = 5

FIRST_IMAGE = """
import json, re, sys, time, torch

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.ones(1) + 1
begin, before = time.perf_counter(), memory("VmRSS")
import advkd
fused = advkd.Student.from_pretrained(sys.argv[1]).fuse(dtype=getattr(torch, sys.argv[2]), tune=False)
fused.sample(1)
seconds = time.perf_counter() - begin
# The peak from here on is the image's: loading has a peak of its own.
torch.ops.advkd_cpu.clear_workspaces()
open("/proc/self/clear_refs", "w").write("5")
loaded = memory("VmRSS")
fused.sample(1)
figures = {"seconds": seconds, "loading_bytes": loaded - before, "image_bytes": memory("VmHWM") - loaded}
print(json.dumps(figures))
"""


def seconds(fused, batch, repeats):
    """Seconds of a call."""
    z = fused.latents(batch, seed=1)
    return measure({"call": lambda: fused(z)}, repeats, warmup=2)["call"]


def batches(dtype):
    """The shipped student and the pyramid, by batch."""
    rows = []
    for preset in ("digits", "pyramid-256"):
        fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
        work = direct_products(fused.config)
        for batch in BATCHES:
            call = seconds(fused, batch, 30 if preset == "digits" else max(3, 40 // batch))
            rows.append({"preset": preset, "dtype": dtype, "batch": batch, "seconds": call, "products": batch * work})
    return rows


def sizes(dtype):
    """Students of 32 channels throughout, by image size."""
    rows = []
    for size in SIZES:
        depth = 2 * (size.bit_length() - 3)
        config = StudentConfig(size, 3, channels=(32,) * max(4, depth))
        torch.manual_seed(0)
        fused = Student(config).eval().fuse("cpu", DTYPES[dtype])
        rows.append({"size": size, "dtype": dtype, "seconds": seconds(fused, 1, 20), "products": direct_products(config)})
    return rows


def threads(dtype):
    """One image and eight on one thread and on all."""
    rows, most = [], torch.get_num_threads()
    for preset, batch in (("digits", 1), ("digits", 8), ("pyramid-256", 1), ("pyramid-256", 8)):
        fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
        for count in sorted({1, *(2**i for i in range(1, 7) if 2**i <= most), most}):
            torch.set_num_threads(count)
            rows.append(
                {"preset": preset, "dtype": dtype, "batch": batch, "threads": count, "seconds": seconds(fused, batch, 15)}
            )
        torch.set_num_threads(most)
    return rows


def footprint(preset, dtype, folder):
    """Seconds and memory of a first image in a fresh process, beside what the engine says it takes."""
    student = plausible_student(preset)
    student.save_pretrained(Path(folder) / preset)
    fused = student.fuse("cpu", DTYPES[dtype], tune=False)
    element = 4 if dtype == "float32" else 2
    pixels = [i.c_out * i.height * i.width * (4 if i.upsample else 1) for i in fused.layers[:-1]]
    command = [sys.executable, "-c", FIRST_IMAGE, str(Path(folder) / preset), dtype]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(FIRST_IMAGES)]
    measured = {key: percentiles([run[key] for run in runs]) for key in runs[0]}
    two = element * sum(sorted(pixels)[-2:])
    return {"preset": preset, "dtype": dtype, **fused.memory(1), "two_largest_activations": two, "first_image": measured}


def plot(result, path):
    """Three panels: time by batch, by resolution, by threads, each beside proportional growth."""
    with panels(path, size=(13, 4), count=3) as (left, middle, right):
        for preset in ("digits", "pyramid-256"):
            for dtype in DTYPES:
                rows = [r for r in result["batches"] if (r["preset"], r["dtype"]) == (preset, dtype)]
                left.loglog(
                    [r["batch"] for r in rows], [1e3 * r["seconds"]["median"] for r in rows], "o-", label=f"{preset}, {dtype}"
                )
                left.loglog(
                    [r["batch"] for r in rows],
                    [1e3 * rows[0]["seconds"]["median"] * r["batch"] for r in rows],
                    ":",
                    color="gray",
                )
        left.set(xlabel="images per call", ylabel="ms per call", title="batch (dotted: proportional)")
        left.legend()
        for dtype in DTYPES:
            rows = [r for r in result["sizes"] if r["dtype"] == dtype]
            middle.loglog([r["size"] for r in rows], [1e3 * r["seconds"]["median"] for r in rows], "o-", label=dtype)
            scale = rows[-1]["seconds"]["median"] / rows[-1]["products"]
            middle.loglog([r["size"] for r in rows], [1e3 * scale * r["products"] for r in rows], ":", color="gray")
        middle.set(
            xlabel="image side, 32 channels throughout",
            ylabel="ms per image",
            title="resolution (dotted: proportional to work)",
        )
        middle.set_xticks(SIZES, map(str, SIZES))
        left.set_xticks(BATCHES, map(str, BATCHES))
        for panel in (left, middle):
            panel.xaxis.minorticks_off()
        middle.legend()
        for preset, batch in (("digits", 1), ("digits", 8), ("pyramid-256", 1), ("pyramid-256", 8)):
            rows = [r for r in result["threads"] if (r["preset"], r["batch"], r["dtype"]) == (preset, batch, "float32")]
            speedups = [rows[0]["seconds"]["median"] / r["seconds"]["median"] for r in rows]
            right.plot([r["threads"] for r in rows], speedups, "o-", label=f"{preset}, batch {batch}")
        counts = sorted({r["threads"] for r in result["threads"]})
        right.plot(counts, counts, ":", color="gray")
        right.set(xlabel="threads", ylabel="times one thread's speed", title="threads, float32", xticks=counts)
        right.legend()


PARTS = {"batches": batches, "sizes": sizes, "threads": threads}


def main():
    out = gated_folder(__doc__.splitlines()[0], PARITY_TESTS)
    with tempfile.TemporaryDirectory() as folder:
        footprints = [footprint(preset, dtype, folder) for preset in FOOTPRINTS for dtype in DTYPES]
    result = {name: [r for dtype in DTYPES for r in part(dtype)] for name, part in PARTS.items()}
    result |= {"footprints": footprints, "parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(out / "scaling.json", result)
    plot(result, out / "scaling.png")


if __name__ == "__main__":
    main()
