"""One process of the data-parallel test: 20 updates in float64, losses to a JSON file by the main process."""

import json
import os
import sys

import torch

from advkd.distill import Distiller
from advkd.recipes import recipe
from advkd.trajectories import Trajectories
from tests.conftest import tiny_student, tiny_teacher

if __name__ == "__main__":
    folder, out, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    config = recipe(overrides.pop("recipe"), **overrides)
    data = Trajectories(folder)
    # Every process brings other weights: those of the main process count.
    student = tiny_student(seed=int(os.environ.get("RANK", 0)))
    dtype = torch.float64 if config.mixed_precision == "no" else torch.float32
    teacher = tiny_teacher() if config.grow else None
    run = Distiller(data, student, config, out, dtype=dtype, progress=False, teacher=teacher)
    world = int(os.environ.get("WORLD_SIZE", 1))
    assert run.accelerator.num_processes == world
    assert len(run._next_batch(run.stages[0])[1]) == config.batch_sizes[0] // world
    run.cursor = 0
    run.run()
