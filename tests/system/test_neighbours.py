"""Beside other processes: nothing changes but where threads run, and that is given back."""

import json
import os
import subprocess
import sys

import pytest

from advkd import sharing

from ..conftest import process_environment

BITS = """
import hashlib, json, torch, advkd
from advkd.coefficients import ddim_coefficients
from advkd.ops import norm_act, philox_normal, sampler_step

torch.set_num_threads(THREADS)
found = {}
def keep(name, *tensors):
    found[name] = hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()

student = advkd.Student.from_pretrained("digits")
z = student.latents(3, seed=1)
keep("latents", z, philox_normal(3, range(40), (5000,), stream="z"))
keep("student", student.fuse(tune=False)(z))
x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
step = ddim_coefficients(0.3, 0.6, "epsilon", eta=1.0, clip=1.0)
with torch.no_grad():
    keep("sampler_step", *(t for t in sampler_step(x, x.roll(1, 0), step, noise=(0, range(8), 1), pool=4) if t is not None))
x.requires_grad_()
weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
y = norm_act(x, weight, bias, None, None, slope=0.2)
keep("norm_act", y, *torch.autograd.grad(y.square().sum(), [x, weight, bias]))
torch.manual_seed(0)
critic = advkd.Critic(advkd.CriticConfig(image_size=16, image_channels=1))
real, fake = torch.randn(2, 6, 1, 16, 16)
keep("critic", *advkd.critic_gradients(critic, real, fake, a=(0, range(6), 0)).gradients)
print(json.dumps([bool(torch.ops.advkd_cpu.crowded()), found]))
"""


def run_script(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=process_environment(environment)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_companions_change_no_bit():
    script = BITS.replace("THREADS", "2")
    (always, found), (never, wanted) = (run_script(script, ADVKD_SHARE=share) for share in "10")
    assert always and not never
    assert found == wanted and len(found) == 5


def test_kernels_do_not_depend_on_threads_beside_others():
    """But for the critic's, whose convolutions are torch's."""
    found = [run_script(BITS.replace("THREADS", str(threads)), ADVKD_SHARE="1")[1] for threads in (1, 3)]
    assert all(found[0][name] == found[1][name] for name in ("latents", "student", "sampler_step", "norm_act"))


CROWD = """
import json, os, subprocess, sys, threading, time
allowed = set(sorted(os.sched_getaffinity(0))[:2])
os.sched_setaffinity(0, allowed)
import torch
from advkd import sharing
from advkd.neighbours import unconfined

def until(condition):
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        torch.randn(100_000).exp_()
    return condition()

def threads():
    return {name: os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task")}

def names():
    return {thread.name for thread in threading.enumerate()}

torch.set_num_threads(2)
x = torch.randn(1000, 1000)
wanted, found = x.sum(), {}
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
try:
    with sharing():
        with sharing():
            found["crowded"] = until(lambda: len(os.sched_getaffinity(0)) == 1)
        found["sleeps"] = "advkd idle team" in names()
        found["all"] = until(lambda: all(len(cpus) == 1 for cpus in threads().values()))
        found["same"] = bool(x.sum() == wanted)
        child = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
        with unconfined():
            found["child"] = int(subprocess.check_output(child))
        found["again"] = len(os.sched_getaffinity(0)) == 1
    found["given back"] = all(cpus == allowed for cpus in threads().values())
    found["gone"] = not any(name.startswith("advkd") for name in names())
finally:
    for process in busy:
        process.kill()
print(json.dumps(found))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_crowded_process_keeps_to_what_is_left_and_gives_it_back():
    found = run_script(CROWD)
    assert found.pop("child") == 2
    assert all(found.values()), found


ALONE = """
import json, os, threading, torch
from advkd import sharing
torch.set_num_threads(THREADS)
before = os.sched_getaffinity(0)
with sharing():
    watched = "advkd neighbours" in {thread.name for thread in threading.enumerate()}
    torch.randn(100_000).exp_()
print(json.dumps([watched, os.sched_getaffinity(0) == before]))
"""


@pytest.mark.parametrize("share, watched", [("0", False), ("1", True), ("", True)])
def test_sharing_can_be_switched_off(share, watched):
    assert run_script(ALONE.replace("THREADS", "2"), ADVKD_SHARE=share) == [watched, True]


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), sharing():
        1 / 0  # noqa: B018
    with sharing():
        pass
