"""One process of the data-parallel tests: 20 updates in float64, losses to a JSON file by the main process.

``ending`` among the overrides is a special end: ``twice`` (a second run in the same process), ``caller`` (the process group is
the caller's), ``error`` and ``interrupt`` (the second process fails, or is interrupted, in its second update).
"""

import json
import os
import signal
import sys

import torch

from advkd.data.trajectories import Trajectories
from advkd.methods.adv_kd import recipe
from advkd.training.distillation import Distiller
from tests.conftest import tiny_student, tiny_teacher


def fail_in_the_second_update(run, ending):
    step = run.step

    def update():
        if run.update == 1 and ending == "error":
            raise RuntimeError("only here")
        if run.update == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a script's background ignores it
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    run.step = update


if __name__ == "__main__":
    folder, out, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    ending = overrides.pop("ending", None)
    if ending == "caller":
        torch.distributed.init_process_group("gloo")
    config = recipe(overrides.pop("recipe"), **overrides)
    data = Trajectories(folder)
    # Every process starts from different weights: those of the main process count.
    student = tiny_student(seed=int(os.environ.get("RANK", 0)))
    dtype = torch.float64 if config.mixed_precision == "no" else torch.float32
    teacher = tiny_teacher() if config.grow else None
    run = Distiller(data, student, config, out, dtype=dtype, progress=False, teacher=teacher)
    world = int(os.environ.get("WORLD_SIZE", 1))
    assert run.accelerator.num_processes == world
    assert len(run.next_batch()[0].z) == config.batch_sizes[0] // world
    run.cursor = 0
    if ending in ("error", "interrupt") and os.environ["RANK"] == "1":
        fail_in_the_second_update(run, ending)
    run.run()
    if ending == "twice":
        Distiller(data, tiny_student(), config, out + "-again", dtype=dtype, progress=False).run()
