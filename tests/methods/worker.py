"""One process of a method's tiny run: NAME DATA OUT [KILL_AT | resume | -]; its updates and its state to OUT.json.

With KILL_AT the process kills itself at the beginning of that update.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from advkd.methods import METHODS
from advkd.runtime.files import digest


def tiny_run(name, data, out, **options):
    """A trainer of the tiny run that the method's own test file describes; every process brings weights of its own."""
    module = importlib.import_module(f"tests.methods.test_{METHODS[name].partition('.')[0]}")
    options = {"dtype": torch.float64, "progress": False, **options}
    return module.tiny_run(data, out, weights=int(os.environ.get("RANK", 0)), **options)


def follow(trainer, kill_at=None):
    """Run to the end: what every update logged, and a digest of all modules, averages and optimisers."""
    history, step = [], trainer.step

    def update():
        if trainer.done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        history.append(step())
        return history[-1]

    trainer.step = update
    trainer.run()
    state = {}
    for name, part in trainer.running.items():
        state |= part.tensors(name)
    return {"history": history, "state": digest({name: tensor.detach().clone() for name, tensor in state.items()})}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, data, out, how = sys.argv[1:]
    found = follow(tiny_run(name, data, out, resume=how == "resume"), int(how) if how.isdecimal() else None)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(f"{out}.json").write_text(json.dumps(found))
