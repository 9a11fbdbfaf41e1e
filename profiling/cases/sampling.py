"""Growth of sampling with processes: ``advkd sample`` under torchrun, as many images for each process (weak scaling).

python -m profiling.cases.sampling [--out FOLDER]

So many processes have as many cores, and one thread each for the network; another one writes the pictures, as PNG, as a user
has them. Times are whole commands, the difference between many and few images, so that starting up does not count.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from advkd.runtime.timing import percentiles

from ..evidence import environment
from ..harness import Sweep, main
from .tables import TABLES

FEW, MANY, REPEATS = 64, 4160, 3
"""Images per process of the two commands."""


def seconds(processes, images):
    """Seconds of one command that draws ``images`` digits for each of so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "advkd.cli", "sample", "-n", str(processes * images), "--out", f"{folder}/images"]
        alone = environment(OMP_NUM_THREADS="1")
        begin = time.perf_counter()
        subprocess.run(["taskset", "--cpu-list", cores(processes), *command], check=True, capture_output=True, env=alone)
        spent = time.perf_counter() - begin
        assert len(list(Path(folder, "images").glob("*.png"))) == processes * images
        return spent


def cores(processes):
    """The first so many cores that this process may use, as ``taskset`` names them."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes]))


def rates(counts):
    """Images per second by processes, in turn."""
    found = {processes: [] for processes in counts}
    for _, processes in itertools.product(range(REPEATS), counts):
        spent = seconds(processes, MANY) - seconds(processes, FEW)
        found[processes].append(processes * (MANY - FEW) / spent)
    return {str(processes): percentiles(values) for processes, values in found.items()}


def scaling():
    """Images per second and efficiency by processes."""
    rows = rates([1, 2] if len(os.sched_getaffinity(0)) >= 2 else [1])
    efficiency = {processes: value["median"] / int(processes) / rows["1"]["median"] for processes, value in rows.items()}
    return {"images_per_second": rows, "efficiency": efficiency, "images_per_process": MANY}


if __name__ == "__main__":
    sweep = Sweep("sample_scaling", scaling, ["tests/system/test_fused_student.py"], [TABLES["sample_scaling"]])
    main({"sample_scaling": sweep})
