"""Processes without the imports' seconds: forked children of two warm processes, which a run's test processes share.

For a test that needs a process, not a fresh interpreter. Variables that imports read (``OMP_NUM_THREADS``), signals during
imports and the lightness of imports need a real one: :func:`tests.conftest.run_cli`. Processes that such a child spawns by
``multiprocessing`` are forked as well.
"""

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 2**17
"""Bytes of a request: arguments, environment, folder."""
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
SEEDS = ("1", "2")
"""The warm processes' hash seeds: an order of a set that reaches a result must not go unnoticed."""


class Forked:
    """A running ``python ARGUMENTS`` in a forked child, with those methods of ``subprocess.Popen`` that tests use.

    Args:
        arguments: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``, as for ``python``.
        environment: the whole environment; its ``PYTHONHASHSEED``, one of :data:`SEEDS`, chooses the warm process.
        cwd: folder to run in.
    """

    def __init__(self, *arguments, environment, cwd=ROOT):
        self.args, self.returncode = list(map(str, arguments)), None
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"arguments": self.args, "environment": environment, "cwd": str(cwd)}).encode()
        assert len(request) <= LIMIT
        server = _servers()[environment["PYTHONHASHSEED"]]
        socket.send_fds(server, [request], [theirs.fileno(), *(file.fileno() for file in self._files)])
        theirs.close()
        self.pid = int(self._connection.recv(32))

    def poll(self):
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._connection.recv(32))
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the report is on its way
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def finish(self, timeout):
        """Wait for the end: what ``subprocess.run`` returns."""
        try:
            self.wait(timeout)
        finally:
            self.kill()
        for file in self._files:
            file.seek(0)
        return subprocess.CompletedProcess(self.args, self.returncode, *(file.read() for file in self._files))


class Fresh(subprocess.Popen):
    """A running ``python ARGUMENTS`` in a fresh interpreter: the arguments and the end are those of :class:`Forked`."""

    def __init__(self, *arguments, environment, cwd=ROOT):
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        out, err = self._files
        super().__init__([sys.executable, *map(str, arguments)], env=environment, cwd=cwd, stdout=out, stderr=err)

    finish = Forked.finish


@functools.cache
def _servers():
    """Sockets to the warm processes by seed. They warm up side by side."""
    return {seed: _server(seed) for seed in SEEDS}


def _server(seed):
    """A socket to a warm process, which the first of the run's test processes starts, and which ends with their last socket."""
    address = f"\0advkd-tests-{RUN}-{seed}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.suppress(OSError):  # it has been started
        listener.bind(address)
        listener.listen()
        # A process that has used OpenMP's threads must not fork; one thread is none but its own.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "tests.forked", str(listener.fileno())]
        subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):  # bound, but not yet listened at
            connection.connect(address)
            return connection
        time.sleep(0.1)
    raise ConnectionError(f"no process listens at {address}")


def warm_up():
    """Import what the commands import."""
    import accelerate
    import diffusers
    import torch.utils.tensorboard

    import advkd

    for module in pkgutil.walk_packages(advkd.__path__, "advkd."):
        if not module.name.startswith("advkd.csrc") and not module.name.endswith(("__main__", "_cpu", "_cuda")):
            importlib.import_module(module.name)
    # So that a child chooses the instruction set that its environment names.
    assert not hasattr(torch.ops.advkd_cpu, "isa"), "an import has loaded the extension"
    diffusers.UNet2DModel, diffusers.DDPMPipeline, accelerate.Accelerator, torch.utils.tensorboard.SummaryWriter
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started threads, which a forked child lacks"


def serve(listener):
    """Answer the test processes' requests until the last of them ends; a child returns the request that it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    open_sockets = [listener]
    while True:
        for ready in select.select(open_sockets, [], [])[0]:
            if ready is listener:
                open_sockets.append(listener.accept()[0])
                continue
            data, descriptors, *_ = socket.recv_fds(ready, LIMIT, 3)
            if not data:
                open_sockets.remove(ready)
                ready.close()
                if open_sockets == [listener]:
                    sys.exit(0)
            elif not os.fork():
                for each in open_sockets:
                    each.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                child = os.fork()
                if not child:
                    return json.loads(data), descriptors
                watch(child, socket.socket(fileno=descriptors[0]))
            for descriptor in descriptors:
                os.close(descriptor)


def watch(child, connection):
    """Report a child's number, then how it ended."""
    connection.send(str(child).encode())
    _, status = os.waitpid(child, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request, descriptors):
    """Run a request as if the interpreter had been started for it."""
    connection, *streams = descriptors
    os.close(connection)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    multiprocessing.util.spawnv_passfds = forking(multiprocessing.util.spawnv_passfds)
    first, *others = request["arguments"]
    sys.argv, sys.path[0] = [first, *others[first in ("-m", "-c") :]], request["cwd"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    if first == "-m":
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(others[0], "<string>", "exec"), vars(module))
    else:
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def forking(spawnv_passfds):
    """A function that starts the processes of "spawn" as forks, without the imports; the rest is as "spawn" has it.

    Their work comes pickled through a pipe, they import the main module anew, and handlers of signals are those of the start.
    """

    def forked(path, arguments, passed):
        if "--multiprocessing-fork" not in arguments:
            return spawnv_passfds(path, arguments, passed)  # the tracker of resources, which imports little
        if child := os.fork():
            return child
        atexit._clear()
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *passed}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.modules["__main__"], sys.argv = types.ModuleType("__main__"), ["-c", *arguments[-1:]]
        end(exec, arguments[-2], {})

    return forked


def end(function, *arguments):
    """Call a function and end the process as an interpreter does, except for freeing every object, which takes a second."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def main(number):
    warm_up()
    become(*serve(socket.socket(fileno=number)))


if __name__ == "__main__":
    end(main, int(sys.argv[1]))
