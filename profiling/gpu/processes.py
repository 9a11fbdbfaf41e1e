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
"""Seconds between two looks at the parent."""


def run_session(command, log, seconds, environment, live=None):
    """Run a command in a session of its own, its output in a log; its code, None where it was ended at its limit.

    The process is in the set ``live`` while it runs.
    """
    live = set() if live is None else live
    with open(log, "a") as file:
        options = {"env": environment, "stdout": file, "stderr": file, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
    live.add(process)
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        live.discard(process)
        end(process)
        process.wait()


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
