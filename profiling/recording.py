"""A recording of trajectories end to end, against a plain diffusers loop that stores the same states, and where its time goes.

python -m profiling.recording [--out FOLDER]
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from advkd import Teacher
from advkd.errors import InputError
from advkd.files import write_json
from advkd.latents import project
from advkd.timing import provenance
from advkd.trajectories import Trajectories, TrajectoryConfig, record_in_processes, record_trajectories

from .bench_teacher import PARITY_TESTS
from .harness import gated_folder

CONFIG = TrajectoryConfig(num=512)
ROUNDS = 2


def plain(folder):
    """The loop that a diffusers user writes: eager network, DDIMScheduler, average pooling, one file per batch."""
    from diffusers import DDIMScheduler

    teacher = Teacher.from_pretrained("digits")
    unet = teacher.unet.to(memory_format=torch.contiguous_format)
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(50)
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
        save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / f"batch-{start:05d}.safetensors")


def levels():
    """Timesteps and resolutions of the recorded levels, but the last."""
    from advkd.schedule import resolutions, supervising_timesteps

    timesteps = supervising_timesteps("ddim", CONFIG.depth, list(range(980, -1, -20)), 1000)
    return timesteps, resolutions(32, CONFIG.depth)


def recorded(folder, compiled=False):
    record_trajectories(Teacher.from_pretrained("digits").optimize(compiled), CONFIG, folder, progress=False)


CONTESTANTS = {
    "diffusers, plain loop": plain,
    "advkd": recorded,
    "advkd, --compiled": lambda folder: recorded(folder, compiled=True),
    "advkd, a process of one thread per core": lambda folder: record_in_processes(
        "digits", CONFIG, folder, torch.get_num_threads(), progress=False
    ),
}


def difference(ours, theirs):
    """Largest difference of the stored levels."""
    data = Trajectories(ours)
    names = [f"level_{k:02d}" for k in range(1, CONFIG.depth + 1)]
    files = [load_file(path) for path in sorted(theirs.glob("*.safetensors"))]
    _, found = data.batch(list(range(CONFIG.num)), list(range(1, CONFIG.depth + 1)))
    pairs = [(found[k], torch.cat([f[name] for f in files]).float()) for k, name in enumerate(names, 1)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def shares():
    """Seconds of a batch by part, in one process."""
    teacher = Teacher.from_pretrained("digits")
    loop = teacher._recording_loop(CONFIG.batch_size, "ddim", None, CONFIG.seed)
    spent, network = {"network": 0.0}, loop._network

    def timed(x, t):
        begin = time.perf_counter()
        output = network(x, t)
        spent["network"] += time.perf_counter() - begin
        return output

    loop._network = timed
    x_T = teacher.noise(CONFIG.batch_size)
    teacher.record(x_T, {})
    spent["network"] = 0.0
    begin = time.perf_counter()
    teacher.record(x_T, {t: 32 // side for t, side in zip(*levels())})
    total = time.perf_counter() - begin
    begin = time.perf_counter()
    teacher.noise(CONFIG.batch_size)
    return {"network": spent["network"], "steps": total - spent["network"], "start_noise": time.perf_counter() - begin}


def main():
    out = gated_folder(__doc__.splitlines()[0], PARITY_TESTS)
    rows = {name: {"seconds": []} for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as root:
        # torch.compile's first time is its own figure: it is paid once and kept on disk.
        begin = time.perf_counter()
        Teacher.from_pretrained("digits").optimize(compiled=True).sample(CONFIG.batch_size)
        rows["advkd, --compiled"]["first_time_seconds"] = time.perf_counter() - begin
        for i in range(ROUNDS):
            for name, record in CONTESTANTS.items():
                folder = Path(root) / f"{i} {name}"
                folder.mkdir()
                begin = time.perf_counter()
                record(folder)
                rows[name]["seconds"].append(time.perf_counter() - begin)
                print(f"{name:42} {rows[name]['seconds'][-1]:7.1f} s", flush=True)
                if record is not plain:
                    rows[name]["difference"] = difference(folder, Path(root) / "0 diffusers, plain loop")
                    # Halves of values below 8, after fifty steps that amplify rounding.
                    if rows[name]["difference"] > 2**-6:
                        raise InputError(f"{name} is off by {rows[name]['difference']}")
    result = {"num": CONFIG.num, "rows": rows, "shares": shares(), "parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(out / "recording.json", result)
    print(result["shares"])


if __name__ == "__main__":
    main()
