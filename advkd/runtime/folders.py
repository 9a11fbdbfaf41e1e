"""Folders that a run writes to: made, held, locked, and cleaned of what killed processes left."""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .launcher import writer_of

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Error numbers of calls that a file system does not support."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a full disk, an exhausted quota or a file at its size limit."""

_HOST = socket.gethostname().replace(".", "-")
_HELD: Counter[str] = Counter()


def cache_folder() -> Path:
    """The folder for features, reference samples and plans: ``ADVKD_CACHE``, else ``advkd`` in the user's cache folder.

    A user without a home gets a private folder in the system's temporary one.

    Raises:
        InputError: that private folder belongs to somebody else, or others may write to it.
    """
    if folder := os.environ.get("ADVKD_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return (
        Path(home) / "advkd" if os.path.isabs(home) else _private_folder(Path(tempfile.gettempdir()) / f"advkd-{os.getuid()}")
    )


def _private_folder(folder):
    """``folder``, created if it is missing; its contents are trusted, so nobody else may write to it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(f"the cache {folder} can be written by others: set ADVKD_CACHE to a folder of your own")
    return folder


def require_folder_path(path: str | Path, option: str = "--out") -> Path:
    """Refuse an output path that cannot become a folder; nothing is created."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} {path} is a file; name a folder")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{option} {path} is a link to {os.path.realpath(path)}, which does not exist: make that folder")
    existing = _existing(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        raise InputError(f"{option} {path} cannot be created or written to ({existing} {why})")
    return path


def _existing(path):
    """The nearest folder above ``path`` that is there, or ``path`` itself."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def require_output_folder(path: str | Path, option: str = "--out") -> Path:
    """Refuse an output path that is a file or cannot be written to; create the folder."""
    path = require_folder_path(path, option)
    try:
        with writing(path):
            make_folder(path)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be created ({error.strerror})") from error
    remove_leftovers(path)
    return path


def require_space(folder: str | Path, needed: int, what: str) -> None:
    """Refuse before work starts when ``folder``'s disk has less than ``needed`` bytes left."""
    free = shutil.disk_usage(_existing(Path(folder))).free
    if free < needed:
        raise InputError(f"{what} needs {needed / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free")


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Hold ``folder``: if somebody removes it meanwhile, the next write is an error and does not make it again."""
    folder = os.path.abspath(folder)
    _HELD[folder] += 1
    try:
        yield
    finally:
        _HELD[folder] -= 1


def make_folder(path: str | Path) -> None:
    """Make the folder ``path`` and its parents, except where a :func:`held` one among them has gone.

    Raises:
        FileNotFoundError: such a folder has gone.
    """
    path = Path(path)
    if _HELD[os.path.abspath(path)]:
        os.stat(path)
        return
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_folder(path.parent)
        path.mkdir(exist_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Make errors of a write name ``path``; a full disk and a folder that has gone become an :class:`InputError`.

    ``temporary``: the file or folder in whose place messages name ``path``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise InputError(f"no space left to write {path}: free some and run the same command again") from error
        if isinstance(error, FileNotFoundError) and not Path(path).absolute().parent.exists():
            said = f"{path} cannot be written: its folder has been removed or moved away; run the same command again"
            raise InputError(said) from error
        known = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        if error.errno and (not known or temporary is not None and known.startswith(str(temporary))):
            error.filename = str(path)
            del error.filename2
        raise


def temporary_path(path: str | Path) -> Path:
    """A name beside ``path`` for this thread alone, which :func:`remove_leftovers` recognises once the process has ended."""
    path = Path(path)
    # A file's name has at most 255 bytes.
    name = path.name if len(os.fsencode(path.name)) <= 100 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}.{_HOST}.{os.getpid()}-{threading.get_native_id()}.tmp")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders that killed processes of this machine left in ``folder``."""
    for path in Path(folder).glob(f".*.{_HOST}.*.tmp"):
        process = writer_of(path)
        if process is not None and not _is_running(process):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def locked(folder: str | Path, out: str | Path | None = None, shared: bool = False) -> Iterator[None]:
    """Hold ``folder`` for one process; a second one is refused. The kernel releases the lock of a killed process.

    A file system without locks (Lustre or NFS, mounted without them) is a warning: nothing then refuses a second process.

    Args:
        folder: holds the lock's file.
        out: the folder that messages name, where the lock stands for another one.
        shared: share the lock with the other processes of one run, all of which pass True.
    """
    import fcntl

    file = _lock_file(Path(folder) / ".lock", out or folder)
    try:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"--out {out or folder}: another process is writing there; wait for it or name another folder"
            raise InputError(said) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise InputError(f"--out {out or folder} cannot be locked ({error.strerror}): name another folder") from error
            said = f"--out {out or folder}: its file system has no locks ({error.strerror}); let no other process write there"
            warnings.warn(said, UserWarning, stacklevel=3)
        with held(folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written there that could be lost
            file.close()


def _lock_file(path, folder):
    """The file ``path``, created if it is missing and never emptied; opening it never blocks, as a pipe would."""
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "rb+", buffering=0)
    except OSError as error:
        raise InputError(f"--out {folder}: its {path.name} cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"--out {folder}: its {path.name} is not a regular file: remove it")
    return file
