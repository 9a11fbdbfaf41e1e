"""What the C library does with memory that is freed."""

import ctypes


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor instead of handing it back to the kernel; elsewhere nothing happens.

    By default every large tensor pays for fresh pages, a quarter of the time of a small network on a CPU. For a process of our
    own (the command line, a worker): the setting is the whole process's.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
