"""Processes that end at a limit with all that they have started, and do not outlive the one that started them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
POLL = 0.3
"""Seconds between two looks at another process."""


def run_session(command, log, seconds, environment, prefix="", stopped=lambda: False):
    """Run a command in a session of its own, its output in a log; its code, None where it was ended.

    It is ended after so many seconds, or once ``stopped()`` is true. Its lines are printed as they come, after the prefix.
    """
    limit = time.monotonic() + seconds
    with open(log, "ab") as file, open(log, "rb") as said:
        said.seek(0, os.SEEK_END)
        options = {"env": environment, "stdout": file, "stderr": file, "start_new_session": True}
        process, rest = subprocess.Popen(command, cwd=ROOT, **options), b""
        try:
            while process.poll() is None and not stopped() and (left := limit - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, POLL))
                *lines, rest = (rest + said.read()).split(b"\n")
                _print(lines, prefix)
            return process.returncode
        finally:
            end(process)
            process.wait()
            _print((rest + said.read()).splitlines(), prefix)


def _print(lines, prefix):
    if lines:
        print("\n".join(prefix + line.decode(errors="replace") for line in lines), flush=True)


def end(process):
    """End the session that a process leads, also what a dead leader has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent(parent):
    """End this process and its group once the process with the number ``parent`` has gone, be it before this call."""

    def watch():
        while os.getppid() == parent:
            time.sleep(POLL)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
