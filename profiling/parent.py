"""Processes that do not outlive the one that started them, however that one ends."""

import os
import signal
import threading
import time

POLL = 0.3
"""Seconds between two looks at the parent."""


def end_with_parent():
    """End this process and its group once its parent is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(POLL)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
