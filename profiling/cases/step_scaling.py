"""Growth of the sampler step's cost with batch and resolution, and the least cost of a call: figures, and a plot of them.

python -m profiling.cases.step_scaling [--out FOLDER]
"""

import torch

from advkd.ops import StepCoefficients, sampler_step
from advkd.runtime.files import write_json
from advkd.runtime.timing import measure

from ..harness import gated_folder, provenance
from ..plots import panels
from .sampler_step import PARITY_TESTS

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STEP = StepCoefficients(1.2, -0.5, 0.8, 0.1, 0.2, c_z=0.3, clip=1.0)
QUIET = StepCoefficients(1.2, -0.5, 0.8, 0.1, 0.2, clip=1.0)


def row(batch, size):
    """Seconds of a call by kind, 3 channels of float32, into a tensor that is there."""
    x, m = torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)
    y, indices = torch.empty_like(x), torch.arange(batch)
    calls = {
        "deterministic": lambda: sampler_step(x, m, QUIET, out=y),
        "with noise": lambda: sampler_step(x, m, STEP, noise=(0, indices, 1), out=y),
        "torch.add": lambda: torch.add(x, m, out=y),
    }
    return {"batch": batch, "size": size, "seconds": measure(calls, repeats=25, warmup=5)}


def overhead(repeats=2000):
    """Seconds of a call on 16 numbers: what a call costs at least."""
    x, m = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    indices = torch.arange(1)
    calls = {
        "deterministic": lambda: sampler_step(x, m, QUIET),
        "with noise": lambda: sampler_step(x, m, STEP, noise=(0, indices, 1)),
    }
    return measure(calls, repeats, warmup=100)


def plot(result, path):
    """Two panels: time by batch and by resolution, beside proportional growth."""
    with panels(path, size=(10, 4), count=2) as found:
        for panel, key, axis in zip(found, ("batches", "sizes"), ("batch", "size")):
            rows = result[key]
            places = [r[axis] for r in rows]
            for name in rows[0]["seconds"]:
                panel.loglog(places, [1e3 * r["seconds"][name]["median"] for r in rows], "o-", label=name)
            work = [r["batch"] * r["size"] ** 2 for r in rows]
            scale = rows[-1]["seconds"]["deterministic"]["median"] / work[-1]
            panel.loglog(places, [1e3 * scale * w for w in work], ":", color="gray", label="proportional")
            panel.set_xticks(places, map(str, places))
            panel.xaxis.minorticks_off()
            panel.legend()
        found[0].set(xlabel="images of 3x256x256", ylabel="ms per call", title="batch")
        found[1].set(xlabel="image side, 4 images of 3 channels", ylabel="ms per call", title="resolution")


def main():
    out = gated_folder(__doc__.splitlines()[0], PARITY_TESTS)
    result = {"batches": [row(batch, 256) for batch in BATCHES], "sizes": [row(4, size) for size in SIZES]}
    result |= {"overhead": overhead(), "parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(out / "step_scaling.json", result)
    plot(result, out / "step_scaling.png")
    print({name: f"{1e6 * seconds['median']:.1f} us" for name, seconds in result["overhead"].items()})


if __name__ == "__main__":
    main()
