"""A recording of trajectories end to end, against a plain diffusers loop that stores the same states.

python -m profiling.cases.recording [--out FOLDER]

Every contestant is a process of its own, timed from its start to its end.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from advkd import Teacher
from advkd.data.dataset_info import TrajectoryConfig
from advkd.data.trajectories import Trajectories
from advkd.errors import InputError
from advkd.ops.latents import project

from ..evidence import ROOT, environment
from ..harness import Sweep, main
from .tables import TABLES
from .teacher import PARITY_TESTS, ddim_scheduler

CONFIG = TrajectoryConfig(num=512)
ROUNDS = 2
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26)}

PLAIN = [sys.executable, "-c", "import sys; from profiling.cases.recording import plain; plain(sys.argv[1])"]
OURS = [sys.executable, "-m", "advkd.cli", "trajectories", "--num", str(CONFIG.num)]
CONTESTANTS = {
    "diffusers, plain loop": (PLAIN, {}),
    "diffusers, plain loop, freed memory kept": (PLAIN, KEEP_MEMORY),
    "advkd trajectories": ([*OURS, "--out"], {}),
    "advkd trajectories --compiled": ([*OURS, "--compiled", "--out"], {}),
    "advkd trajectories --processes 2": ([*OURS, "--processes", "2", "--out"], {}),
}


def plain(folder):
    """The loop that a diffusers user writes: eager network, DDIMScheduler, average pooling, one file per batch."""
    teacher = Teacher.from_pretrained("digits")
    unet = teacher.unet.to(memory_format=torch.contiguous_format)
    scheduler = ddim_scheduler(teacher)
    wanted = list(zip(*levels()))
    for start in range(0, CONFIG.num, CONFIG.batch_size):
        x = teacher.noise(CONFIG.batch_size, CONFIG.seed, start)
        tensors = {"z": project(x, 8)}
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t).sample, t, x).prev_sample
                for k, (other, side) in enumerate(wanted, 1):
                    if other == int(t):
                        tensors[f"level_{k:02d}"] = F.avg_pool2d(x, x.shape[-1] // side)
        tensors[f"level_{CONFIG.depth:02d}"] = x.clamp(-1, 1)
        save_file({name: tensor.half() for name, tensor in tensors.items()}, f"{folder}/batch-{start:05d}.safetensors")


def levels():
    """Timesteps and resolutions of the recorded levels, but the last."""
    from advkd.data.levels import resolutions, supervising_timesteps

    timesteps = supervising_timesteps("ddim", CONFIG.depth, list(range(980, -1, -20)), 1000)
    return timesteps, resolutions(32, CONFIG.depth)


def difference(ours, theirs):
    """Largest difference of the stored levels."""
    data = Trajectories(ours)
    names = [f"level_{k:02d}" for k in range(1, CONFIG.depth + 1)]
    files = [load_file(path) for path in sorted(theirs.glob("*.safetensors"))]
    _, found = data.batch(list(range(CONFIG.num)), list(range(1, CONFIG.depth + 1)))
    pairs = [(found[k], torch.cat([f[name] for f in files]).float()) for k, name in enumerate(names, 1)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def run(command, changes, folder):
    """Seconds of a contestant's process."""
    folder.mkdir()
    begin = time.perf_counter()
    subprocess.run([*command, str(folder)], cwd=ROOT, env=environment(**changes), check=True, capture_output=True)
    return time.perf_counter() - begin


def measure():
    """Seconds of every contestant, and how far ours are from the plain loop."""
    rows = {name: {"seconds": []} for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as root:
        # Round 0 is torch.compile's first time alone: it is paid once and kept on disk.
        compiled = "advkd trajectories --compiled"
        cold = {"TORCHINDUCTOR_CACHE_DIR": str(Path(root) / "inductor")}
        run(CONTESTANTS[compiled][0], cold, Path(root) / "first")
        for i in range(ROUNDS):
            for name, (command, changes) in CONTESTANTS.items():
                folder = Path(root) / f"{i} {name}"
                rows[name]["seconds"].append(run(command, {**changes, **cold}, folder))
                print(f"{name:42} {rows[name]['seconds'][-1]:7.1f} s", flush=True)
                if name.startswith("advkd"):
                    rows[name]["difference"] = difference(folder, Path(root) / "0 diffusers, plain loop")
                    # Halves of values below 8, after fifty steps that amplify rounding.
                    if rows[name]["difference"] > 2**-6:
                        raise InputError(f"{name} is off by {rows[name]['difference']}")
    return {"num": CONFIG.num, "rows": rows}


if __name__ == "__main__":
    main({"recording": Sweep("recording", measure, PARITY_TESTS, [TABLES["recording"]])})
