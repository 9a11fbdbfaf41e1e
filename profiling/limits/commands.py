"""The commands that the campaigns of kills and faults run, on tiny inputs, and the processes that run them.

A process is forked from this one, which has made all imports of the commands, or started anew. All files below the output
folder are compared, byte for byte, except TensorBoard's (their names and records hold times and process numbers) and those that
:func:`snapshot` leaves out.
"""

import atexit
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evidence import ROOT, environment

LIMIT = 300
"""Seconds after which a process counts as one that hangs."""

RESUME_NEEDS_CHECKPOINT = "run without --resume"
FINISHED = ("holds a teacher already", "holds a model already", "holds an autoencoder already")
"""Words of the commands' refusals to repeat a run that is complete."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: what tables call it.
        arguments: of the command line, without ``--out``.
        resumes: it has ``--resume``.
        other: arguments that ask for another result.
        out: name of the output inside its folder: the folder itself, or a picture.
        group: it starts processes of its own, which form a group with it.
    """

    name: str
    arguments: tuple
    resumes: bool = False
    other: tuple = ("--seed", "7")
    out: str = ""
    group: bool = False

    def line(self, folder, *more):
        """The arguments with their output in ``folder``."""
        return [*self.arguments, "--out", str(Path(folder) / self.out), *more]


def prepare(folder):
    """Write tiny inputs to ``folder`` and return the commands on them, by name."""
    from tests.conftest import TINY_STUDENT, tiny_recording, tiny_student, tiny_teacher, tiny_unet

    folder = Path(folder)
    os.environ["ADVKD_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    _import_all()
    _write_inputs(folder, TINY_STUDENT, tiny_recording(), tiny_student(), tiny_teacher(), tiny_unet())
    distill = ("distill", "--trajectories", f"{folder}/data", "--preset", f"{folder}/student.json")
    student = ("sample", "--student", f"{folder}/student", "-n", "12", "--batch-size", "4")
    pictures = ("--data", f"{folder}/pictures", "--size", "8", "--batch-size", "8")
    commands = [
        Command(
            "trajectories",
            ("trajectories", "--teacher", f"{folder}/teacher", *"--num 24 --depth 4 --steps 5 --batch-size 4".split())
            + ("--shard-size", "8"),
        ),
        Command(
            "distill joint",
            (*distill, *"--updates 9 --batch-sizes 8 --checkpoint-every 2 --critic-channels 8".split()),
            resumes=True,
        ),
        Command(
            "distill paper",
            (*distill, *"--recipe paper --updates 3 --batch-sizes 8 --checkpoint-every 2 --critic-channels 8".split())
            + ("--critic-updates", "2"),
            resumes=True,
        ),
        Command(
            "teacher train",
            ("teacher", "train", *pictures, *"--channels 8,8 --steps 9 --checkpoint-every 2".split()),
            resumes=True,
        ),
        Command(
            "classifier train",
            ("classifier", "train", *pictures, *"--steps 12 --num-features 4 --checkpoint-every 2".split()),
            resumes=True,
        ),
        Command("sample to a folder", student),
        Command("sample to a picture", student, out="picture.png"),
        Command(
            "autoencoder train",
            ("autoencoder", "train", "--data", f"{folder}/pictures", "--size", "16", "--batch-size", "8")
            + ("--channels", "8,8", *"--regularisation vq --codes 8 --steps 9 --checkpoint-every 2".split()),
            resumes=True,
        ),
    ]
    return {command.name: command for command in commands}


def _import_all():
    """Import all modules that the commands use, so that forked processes need not."""
    import accelerate  # noqa: F401
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel  # noqa: F401
    from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
    from tensorboard.summary.writer import record_writer  # noqa: F401

    from advkd.cli import main, sample  # noqa: F401
    from advkd.training import autoencoder, classifier, distillation, teacher  # noqa: F401


def _write_inputs(folder, config, recording, student, teacher, unet):
    import dataclasses
    import json

    from diffusers import DDPMPipeline, DDPMScheduler
    from PIL import Image

    from advkd.diffusion.recorder import record_trajectories

    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder / "teacher")
    record_trajectories(teacher, recording, folder / "data", progress=False)
    student.save_pretrained(folder / "student")
    (folder / "student.json").write_text(json.dumps(dataclasses.asdict(config)))
    draw = torch.Generator().manual_seed(0)
    for kind in ("even", "odd"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(256, (8, 8), generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "pictures" / kind / f"{i}.png")


class Process:
    """A command in a process of its own; forked (the default) or started anew.

    Args:
        line: arguments of the command line.
        fresh: start another interpreter.
        before: function that a forked process calls first.
    """

    def __init__(self, line, fresh=False, before=None):
        self._code, self._popen = None, None
        # A pipe and no file: what is said must not come under a limit of files. Nothing that a command says fills it.
        self._pipe, end = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20)
        if fresh:
            command = [sys.executable, "-m", "advkd", *line]
            said = {"stdout": end, "stderr": end, "stdin": subprocess.DEVNULL, "process_group": 0}
            self._popen = subprocess.Popen(command, env=environment(), cwd=ROOT, **said)
            self.pid = self._popen.pid
        else:
            # A Ctrl-C that comes before the command line heeds it is kept until then.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            self.pid = os.fork() or _run_forked(line, end, before)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        os.close(end)
        self._descriptor = os.pidfd_open(self.pid)

    def ends_within(self, seconds):
        """Wait for the end for so many seconds; True if it came."""
        return self._code is not None or bool(select.select([self._descriptor], [], [], max(0, seconds))[0])

    def send(self, number, group=False):
        """Send a signal, or send it to the whole ``group``; False if the process has ended before."""
        if self.ends_within(0):
            return False
        (os.killpg if group else os.kill)(self.pid, number)
        return True

    def stop(self):
        """Let the process stand still until SIGCONT; False if it has ended."""
        if not self.send(signal.SIGSTOP):
            return False
        how = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return how.si_code == os.CLD_STOPPED

    def leaves(self, seconds):
        """True if processes of its group are alive ``seconds`` after its end; they are killed."""
        deadline = time.perf_counter() + seconds
        while _alive(self.pid) and time.perf_counter() < deadline:
            time.sleep(0.05)
        left = _alive(self.pid)
        if left:
            os.killpg(self.pid, signal.SIGKILL)
        return left

    def wait(self, seconds=LIMIT):
        """The exit status, negative for a signal's number; None for a process that hangs (which is killed)."""
        if self._code is None:
            hangs = not self.ends_within(seconds)
            if hangs:
                os.kill(self.pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            if self._popen:
                self._popen.returncode = status
            os.set_blocking(self._pipe, False)
            self.said = _read_all(self._pipe).decode(errors="replace")
            os.close(self._descriptor)
            os.close(self._pipe)
            self._code = (None if hangs else status,)
        return self._code[0]


def _alive(group):
    """True if a process group has a process that has not ended; zombies do not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


def _read_all(descriptor):
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(descriptor, 2**16):
            parts.append(part)
    return b"".join(parts)


def _run_forked(line, said, before):
    """The whole life of a forked process; the interpreter's own end is left out: this one's objects are not its."""
    code = 1
    try:
        code = _run_command(line, said, before)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run_command(line, said, before):
    os.dup2(said, 1)
    os.dup2(said, 2)
    atexit._clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["advkd", *line]
    from tqdm import tqdm

    from advkd.__main__ import main
    from advkd.runtime.launcher import end_at_interrupt

    # Its default lock is shared with all processes that are forked, and a killed one would hold it for ever.
    tqdm.set_lock(threading.RLock())
    end_at_interrupt()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        if before:
            before()
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(line, **options):
    """Run a command to its end: ``(exit status, what it said)``."""
    process = Process(line, **options)
    return process.wait(), process.said


def measure(command, folder, **options):
    """The files, seconds and events of a run that is left alone, in a new folder below ``folder``."""
    out = folder / command.name
    out.mkdir(parents=True)
    events, begin = Events(out), time.perf_counter()
    code, said = run(command.line(out), **options)
    seconds = time.perf_counter() - begin
    events.read()
    events.close()
    if code:
        raise RuntimeError(f"{command.name} does not run here: {said}")
    return {"files": snapshot(out), "seconds": seconds, "events": events.count}


def finish(command, folder, **options):
    """Repeat a command as its messages say until it is complete; ``(exit status, what was said)`` of the last time."""
    code, said = run(command.line(folder, *(["--resume"] if command.resumes else [])), **options)
    if code == 2 and RESUME_NEEDS_CHECKPOINT in said:
        code, said = run(command.line(folder), **options)
    if code == 2 and any(words in said for words in FINISHED):
        return 0, said
    return code, said


def snapshot(folder):
    """Contents of all files below ``folder`` by path, except TensorBoard's and the empty lock."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("tensorboard/") and name != ".lock"}


def difference(folder, expected):
    """Differences of a folder from a snapshot, in words; empty if there are none."""
    found = snapshot(folder)
    parts = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "other": sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name]),
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def is_complete(folder, expected):
    """True if a folder holds all files of a snapshot, and perhaps others."""
    found = snapshot(folder)
    return all(found.get(name) == data for name, data in expected.items())


def crash_fault(code, said):
    """The fault of a process that hung (code None) or said a traceback; empty for others."""
    if code is None:
        return "it hangs"
    return f"a traceback: {said[-1500:]}" if "Traceback" in said or "Exception" in said else ""


def message_fault(code, said, path=None):
    """The fault of the end of a command that failed; empty for one line ``advkd: ...`` and exit code 2."""
    if fault := crash_fault(code, said):
        return fault
    if code != 2:
        return f"exit status {code}: {said[-500:]}"
    last = said.rstrip().splitlines()[-1] if said.strip() else ""
    if not last.startswith("advkd: "):
        return f"no message at the end: {said[-500:]}"
    return "" if path is None or str(path) in last else f"the message does not name {path}: {last}"


class Events:
    """The events of files in a folder, as they come (inotify): made, written, closed, renamed, removed.

    Attributes:
        count: of all events that have been read.
        work: of those that the end of a process does not bring about, which closes its files.
    """

    _WORK, _CLOSED = 0x2 | 0x40 | 0x80 | 0x100 | 0x200, 0x8

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(str(folder)), self._WORK | self._CLOSED) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(folder))
        self.count = self.work = 0

    def wait(self, number, process):
        """Wait for the ``number``-th event; False if the process ends before."""
        deadline = time.perf_counter() + LIMIT
        while self.count < number and time.perf_counter() < deadline:
            ready, _, _ = select.select([self._descriptor, process._descriptor], [], [], 1)
            if self._descriptor in ready:
                self.read()
            elif process._descriptor in ready:
                return False
        return self.count >= number

    def read(self):
        """Count the events that have come."""
        data = _read_all(self._descriptor)
        while data:
            self.count += 1
            self.work += bool(int.from_bytes(data[4:8], sys.byteorder) & self._WORK)
            data = data[16 + int.from_bytes(data[12:16], sys.byteorder) :]

    def close(self):
        os.close(self._descriptor)
