"""Sharing with other processes: nothing changes but where threads run, and that is restored."""

import errno
import json
import os
import sys
import threading

import pytest
import torch

from advkd import InputError, sharing
from advkd.runtime import neighbours

from ..conftest import fork

BITS = """
import hashlib, json, torch, advkd
from advkd.diffusion.coefficients import ddim_coefficients
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
print(json.dumps([bool(torch.ops.advkd_cpu.crowded(2, [0, 1], [])), found]))
"""


def run_script(script, **environment):
    done = fork("-c", script, environment=environment).finish(300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_companions_change_no_bit():
    script = BITS.replace("THREADS", "2")
    (always, found), (never, wanted) = (run_script(script, ADVKD_SHARE=share) for share in "10")
    assert always and not never
    assert found == wanted and len(found) == 5


def test_kernels_do_not_depend_on_threads_beside_others():
    """The critic is left out: its convolutions are torch's."""
    found = [run_script(BITS.replace("THREADS", str(threads)), ADVKD_SHARE="1")[1] for threads in (1, 3)]
    assert all(found[0][name] == found[1][name] for name in ("latents", "student", "sampler_step", "norm_act"))


CROWD = """
import contextlib, json, os, subprocess, sys, threading, time
allowed = set(sorted(os.sched_getaffinity(0))[:2])
os.sched_setaffinity(0, allowed)
import torch
from advkd import sharing
from advkd.runtime import neighbours
from advkd.runtime.neighbours import unconfined

def until(condition):
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        torch.randn(100_000).exp_()
    return condition()

def threads():
    found = {}
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # of a thread that has just ended
            found[name] = os.sched_getaffinity(int(name))
    return found

def names():
    return {thread.name for thread in threading.enumerate()}

def bind(processor):
    os.sched_setaffinity(0, {processor})
    bound[threading.get_native_id()] = {processor}
    end.wait()

bound, end = {}, threading.Event()
binding = [threading.Thread(target=bind, args=(processor,)) for processor in allowed]
for thread in binding:
    thread.start()
until(lambda: len(bound) == 2)
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
        with unconfined(), unconfined():
            found["child"] = int(subprocess.check_output(child))
        found["again"] = len(os.sched_getaffinity(0)) == 1
        read, write = os.pipe()
        if os.fork() == 0:
            neighbours.LOOK_EVERY = 600.0  # however late this process gets its turn, its own watch has not confined it by then
            with sharing():
                os.write(write, json.dumps(len(os.sched_getaffinity(0)) == 2).encode())
            os._exit(0)
        found["forked"] = json.loads(os.read(read, 100))
    found["bound as it was"] = all(os.sched_getaffinity(thread) == processors for thread, processors in bound.items())
    end.set()
    for thread in binding:
        thread.join()
    found["given back"] = all(cpus == allowed for cpus in threads().values())
    found["gone"] = not any(name.startswith("advkd") for name in names())
finally:
    for process in busy:
        process.kill()
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2 or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_crowded_process_keeps_to_what_is_left_and_gives_it_back():
    found = run_script(CROWD)
    assert found.pop("child") == 2
    assert all(found.values()), found


ALONE = """
import json, os, threading, time, torch
from advkd import sharing
torch.set_num_threads(THREADS)
before = os.sched_getaffinity(0)
def names():
    return {thread.name for thread in threading.enumerate()}
with sharing():
    watched, end = "advkd neighbours" in names(), time.monotonic() + 60
    while WAITS and "advkd idle team" not in names() and time.monotonic() < end:
        torch.randn(100_000).exp_()
    sleeps = "advkd idle team" in names()
print(json.dumps([watched, sleeps, os.sched_getaffinity(0) == before]))
"""


@pytest.mark.parametrize("share, threads, found", [("0", 2, [False, False]), ("1", 2, [True, True]), ("1", 1, [False, False])])
def test_sharing_can_be_switched_off(share, threads, found):
    script = ALONE.replace("THREADS", str(threads)).replace("WAITS", str(found[1]))
    assert run_script(script, ADVKD_SHARE=share) == [*found, True]


def test_other_settings_are_refused(monkeypatch):
    monkeypatch.setenv("ADVKD_SHARE", "off")
    with pytest.raises(InputError, match="ADVKD_SHARE must be 0, 1 or auto, got 'off'"), sharing():
        pass


LATE = """
import json, os, torch
from advkd import sharing
torch.set_num_threads(2)
with sharing():
    torch.ops.advkd_cpu.crowded(2, [0], [0])
processor = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {processor})
seen = set()
with sharing():
    for _ in range(300):
        torch.randn(100_000).exp_()
        seen |= {frozenset(os.sched_getaffinity(0))}
print(json.dumps([sorted(map(sorted, seen)), processor]))
"""


def test_a_process_stays_where_its_user_bound_it():
    seen, processor = run_script(LATE, ADVKD_SHARE="1")
    assert seen == [[processor]]


COMPANIONS = """
import json, os, time, torch
from advkd.ops import philox_normal
torch.set_num_threads(2)

def companions():
    names = {task: open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}
    return {frozenset(os.sched_getaffinity(int(task))) for task, name in names.items() if name == "advkd companion"}

found = []
for processor in sorted(os.sched_getaffinity(0))[:2]:
    os.sched_setaffinity(0, {processor})
    for _ in range(10):
        philox_normal(3, range(40), (5000,), stream="z")
        time.sleep(0.1)
        # Another one may look at the load: the thread that calls a kernel sees where it is bound.
        torch.ops.advkd_cpu.crowded(2, [0, 1], [])
    found.append(companions() == {frozenset([processor])})
print(json.dumps(found))
"""


def test_companions_follow_the_thread_that_they_work_for():
    assert run_script(COMPANIONS, ADVKD_SHARE="1") == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_what_its_parent_entered(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    child = None
    try:
        with sharing():
            child = os.fork()
    finally:
        if child == 0:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_work_goes_on_where_no_thread_can_be_started(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(neighbours.threading.Thread, "start", start)
    with pytest.warns(UserWarning, match="not shared with others"), sharing(), neighbours.unconfined():
        pass


def test_processors_that_are_taken_away_do_not_end_the_watch(monkeypatch):
    """Affinities that the system refuses stay as they are; those of other threads are still set."""
    before, real = os.sched_getaffinity(0), os.sched_setaffinity
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    watch, refused = neighbours._Watch(), threading.get_native_id()

    def bind(thread, processors):
        if thread == refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(thread, processors)

    end, begun, found = threading.Event(), threading.Event(), []
    other = threading.Thread(target=lambda: (found.append(threading.get_native_id()), begun.set(), end.wait()))
    other.start()
    begun.wait()
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    try:
        watch._keep_to({min(before)})
        bound = os.sched_getaffinity(found[0])
        watch._keep_to(before)
        assert bound == {min(before)} and os.sched_getaffinity(found[0]) == os.sched_getaffinity(0) == before
    finally:
        end.set()
        other.join()


def test_idle_teams_are_more_threads_than_processors():
    for threads in (2, 3, 8, 64):
        for processors in (2, 8, 64, 256):
            teams = neighbours._teams_needed(threads, processors)
            assert threads + teams * (threads - 1) > processors or teams == 1


FORKED = """
import json, os, torch, advkd
torch.set_num_threads(2)
fused = advkd.Student.from_pretrained("digits").fuse(tune=False)
z = fused.latents(16, seed=0)
wanted = fused(z)
torch.randn(10**6).exp_()  # torch's threads are there
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fused(z), wanted) else 1)
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.mark.parametrize("share", ["0", "auto"])
def test_a_forked_child_draws(share):
    """Without care, OpenMP would wait for threads that a forked child lacks."""
    assert run_script(FORKED, ADVKD_SHARE=share) == 0


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), sharing():
        1 / 0  # noqa: B018
    with sharing():
        pass
