"""Processes that do not outlive the one that started them, however that one ends."""

import os
import signal
import threading
import time

PARENT = "ADVKD_PARENT"
"""Environment variable with the number of the process that starts another."""
POLL = 0.3
"""Seconds between two looks at the parent."""


def as_parent():
    """The environment variable that tells a process who has started it."""
    return {PARENT: str(os.getpid())}


def end_with_parent():
    """End this process and its group once the process that started it is gone, be it before this call."""
    parent = int(os.environ.get(PARENT) or os.getppid())

    def watch():
        while os.getppid() == parent:
            time.sleep(POLL)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
