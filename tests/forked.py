"""Processes without the imports' seconds: forked children of two warm processes, which a run's test processes share.

For a test that needs a process, not a fresh interpreter. Variables that imports read (``OMP_NUM_THREADS``), signals during
imports and the lightness of imports need a real one: :func:`tests.conftest.run_cli`. Processes that such a child spawns by
``multiprocessing`` are forked as well, and so inherit what it has set; :func:`tests.conftest.start` shows those of "spawn".
"""

import atexit
import contextlib
import errno
import functools
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import runpy
import secrets
import select
import signal
import socket
import struct
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
START = 100
"""Seconds within which a warm process is warm and a child has begun."""
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or secrets.token_hex(16)
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
        self._connection.settimeout(START)
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
    """A socket to a warm process, which the first of the run's test processes starts; it ends after their last socket."""
    address = f"\0advkd-tests-{RUN}-{seed}"
    for _ in range(100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            if _is_bound(listener, address):
                listener.listen()
                # A process that has used OpenMP's threads must not fork; one thread is none but its own.
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
                command = [sys.executable, "-m", "tests.forked", str(listener.fileno())]
                subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(ConnectionRefusedError):  # bound, but not yet listened at
            connection.connect(address)
            assert is_ours(connection)
            return connection
        time.sleep(0.1)
    raise ConnectionError(f"no process listens at {address}")


def _is_bound(listener, address):
    """True if this process is the first to bind the address."""
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def is_ours(connection):
    """True if the process at the other end is this user's."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.getuid()


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
    """Answer the test processes' requests until the last of them has gone; a child returns the request that it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    clients = []
    while True:
        # Another test process of the run may come a little after the last.
        ready, _, _ = select.select([listener, *clients], [], [], None if clients else 5)
        if not ready:
            listener.close()
            sys.exit(0)
        if listener in ready:
            ready.remove(listener)
            client = listener.accept()[0]
            clients += [client] if is_ours(client) else []
        for client in ready:
            data, descriptors, *_ = socket.recv_fds(client, LIMIT, 3)
            if not data:
                clients.remove(client)
                client.close()
            elif not os.fork():
                for each in (listener, *clients):
                    each.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                child = os.fork()
                if not child:
                    return json.loads(data), descriptors
                watch(child, socket.socket(fileno=descriptors[0]))
            for descriptor in descriptors:
                os.close(descriptor)


def watch(child, connection):
    """Report a child's number, then how it ended. It is killed once nobody listens."""
    connection.send(str(child).encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
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
    """A function that starts the processes of "spawn" as forks, without the imports.

    Their work comes pickled through a pipe, they import the main module anew, and handlers of signals are those of the start;
    what modules hold is inherited.
    """

    def forked(path, arguments, passed):
        if "--multiprocessing-fork" not in arguments:
            return spawnv_passfds(path, arguments, passed)  # the tracker of resources, which imports little
        child = os.fork()
        if not child:
            end(spawned, arguments, passed)
        return child

    return forked


def spawned(arguments, passed):
    """Run the code of a process of "spawn" with no more of its parent than "spawn" leaves it, but for the modules."""
    atexit._clear()
    for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *passed}:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.modules["__main__"], sys.argv = types.ModuleType("__main__"), ["-c", *arguments[-1:]]
    exec(arguments[-2], {})


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
