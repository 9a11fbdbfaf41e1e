"""Growth of the gradient penalty's cost with batch, resolution and depth, and its peak memory: figures, and a plot of them.

python -m profiling.cases.penalty_scaling [--out FOLDER]

Times are of the penalty with its gradients. Memory is what a call adds to the peak of a fresh process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from advkd.models.critic import Critic, CriticConfig
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.files import write_json
from advkd.runtime.timing import measure, percentiles

from ..evidence import ROOT
from ..harness import gated_folder, provenance
from ..plots import panels
from .gradient_penalty import PARITY_TESTS, SIZES, penalty_only, problem

BATCHES, RESOLUTIONS, DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128), (8, 16, 32, 64, 128), (1, 2, 3, 4, 6, 8, 12)
BACKENDS = {"advkd": "auto", "autograd": "autograd"}
PROCESSES = 3


def critic_of(size):
    return Critic(CriticConfig(size, 3)).to(memory_format=torch.channels_last)


def chain(depth):
    """A critic of so many convolutions of one size."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.LeakyReLU(0.2)]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AvgPool2d(32), nn.Flatten(), nn.Linear(32, 1)).to(memory_format=torch.channels_last)


def seconds(critic, batch, size):
    """Seconds by method."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    call = penalty_only(critic, x)
    return measure({name: lambda b=backend: call(b) for name, backend in BACKENDS.items()}, repeats=9, warmup=2)


def peaks():
    """Bytes that a penalty with its gradients adds to the peak of a process, by case and method."""
    found = []
    for case in SIZES:
        row = {"case": "{} critic, {}x{}, batch {}".format(case[0], case[1], case[1], case[2]), "bytes": {}}
        for name, backend in BACKENDS.items():
            command = [sys.executable, "-m", "profiling.cases.penalty_scaling", "--peak", json.dumps([*case, backend])]
            runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(PROCESSES)]
            row["bytes"][name] = percentiles([int(done.stdout) for done in runs])
        found.append(row)
    return found


def peak(width, size, batch, backend):
    """Bytes that one call adds to this process's peak; a small one before it has loaded what is needed."""
    critic, real, _, _ = problem(width, size, batch)
    penalty_only(critic, real[:1])(backend)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    gradients = penalty_only(critic, real)(backend)
    assert all(torch.isfinite(g).all() for g in gradients)
    return _status("VmHWM") - before


def _status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def plot(result, path):
    """Three panels: milliseconds by batch, resolution and depth."""
    with panels(path, size=(13, 4), count=3) as found:
        titles = {
            "batch": "critic of 64x64, by batch",
            "resolution": "critic, batch 16, by resolution",
            "depth": "chain of 3x3 convolutions at 32x32, by depth",
        }
        for panel, (axis, title) in zip(found, titles.items()):
            places = [row[axis] for row in result[axis]]
            for name in BACKENDS:
                panel.loglog(places, [1e3 * row["seconds"][name]["median"] for row in result[axis]], "o-", label=name)
            panel.set_xticks(places, map(str, places))
            panel.xaxis.minorticks_off()
            panel.set(xlabel=axis, ylabel="ms, penalty and gradients", title=title)
            panel.title.set_fontsize(10)
            panel.legend()


def main():
    out = gated_folder(__doc__.splitlines()[0], PARITY_TESTS)
    keep_freed_memory()
    result = {
        "batch": [{"batch": n, "seconds": seconds(critic_of(64), n, 64)} for n in BATCHES],
        "resolution": [{"resolution": s, "seconds": seconds(critic_of(s), 16, s)} for s in RESOLUTIONS],
        "depth": [{"depth": d, "seconds": seconds(chain(d), 16, 32)} for d in DEPTHS],
        "peaks": peaks(),
    }
    result |= {"parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(out / "penalty_scaling.json", result)
    plot(result, out / "penalty_scaling.png")
    for row in result["peaks"]:
        print(row["case"], {name: f"{size['median'] / 1e6:.0f} MB" for name, size in row["bytes"].items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak(*json.loads(sys.argv[2])))
    else:
        main()
