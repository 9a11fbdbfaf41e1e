"""Files that are whole or absent: everything is written to a temporary name and renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import InputError
from .hub import reason
from .launcher import TEMPORARY, writer_of

LFS_POINTER = b"version https://git-lfs"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Error numbers by which file systems refuse calls that they do not have."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a full disk, an exhausted quota or a file at its size limit."""

START_AGAIN = "delete it and start again, or restore a copy"
JSON_LIMIT, MANIFEST_LIMIT = 2**22, 2**26
"""Bytes that a JSON file may have; the manifest of very many shards may have more. Values take up to 40 times the memory."""

_HOST = socket.gethostname().replace(".", "-")
_HELD = Counter()


def cache_folder():
    """Where features, reference samples and plans are kept: ``ADVKD_CACHE``, else ``advkd`` in the user's cache folder.

    A user without a home has a private folder in the system's temporary one.

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
    """``folder``, made if it is not there; what lies in it is trusted, so nobody else may write to it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(f"the cache {folder} can be written by others: set ADVKD_CACHE to a folder of your own")
    return folder


@contextlib.contextmanager
def replacing(path, once=False):
    """Yield a temporary file beside ``path``; rename it to ``path`` on success, remove it on failure.

    A symbolic link stays, and the file that it points to is replaced. Two threads or processes may write one path at the same
    time: each has a temporary file of its own. With ``once`` a file that is there by then stays: the first writer wins.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = temporary_path(target)
    TEMPORARY.add(temporary)
    try:
        with writing(path, temporary):
            make_folder(target.parent)
            temporary.unlink(missing_ok=True)
            # Created here and now: a link that somebody else has put in its place would be written through.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            with open(temporary, "rb") as file:
                synchronize(file.fileno())
            _move(temporary, target, once)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        TEMPORARY.discard(temporary)


def _move(temporary, target, once):
    if once:
        try:
            return os.link(temporary, target)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno in (*NO_SPACE, errno.ENOENT, errno.EROFS, errno.EIO):
                raise  # others come from file systems without hard links, each of which says so in its own way
    os.replace(temporary, target)


@contextlib.contextmanager
def writing(path, temporary=None):
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


@contextlib.contextmanager
def held(folder):
    """While held, ``folder`` is not made again: if somebody removes it, the next write is an error."""
    folder = os.path.abspath(folder)
    _HELD[folder] += 1
    try:
        yield
    finally:
        _HELD[folder] -= 1


def make_folder(path):
    """Make the folder ``path`` and those that it lies in, except where a :func:`held` one among them has gone.

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


def synchronize_all(folder):
    """Bring a folder and all that is below it to the disk."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            synchronize(descriptor)
        finally:
            os.close(descriptor)


def synchronize(descriptor):
    """Bring an open file to the disk, where its file system can be asked to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def require_there(file, path):
    """Refuse to go on writing to ``file``, opened as ``path``, once another file or none has that name."""
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return
    except FileNotFoundError:
        pass
    raise InputError(f"{path} cannot be written: it has been removed or moved away; run the same command again")


def remove_leftovers(folder):
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


def temporary_path(path):
    """A name beside ``path`` that belongs to this thread, and that :func:`remove_leftovers` knows after its process's end."""
    path = Path(path)
    # No longer than a file's name may be, where the path's own is not.
    name = path.name if len(os.fsencode(path.name)) <= 100 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}.{_HOST}.{os.getpid()}-{threading.get_native_id()}.tmp")


@contextlib.contextmanager
def locked(folder, out=None, shared=False):
    """Hold ``folder`` for one process; a second one is refused. The kernel releases the lock of a killed process.

    ``shared``: for the processes of one run, which all say so.

    A file system without locks (Lustre or NFS, mounted without them) is a warning: nothing then refuses a second process.

    ``out``: the folder that messages name, where the lock stands for another one than it lies in.
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
    """The file ``path``, made if it is not there, never emptied, and never waited for as a pipe would be."""
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "rb+", buffering=0)
    except OSError as error:
        raise InputError(f"--out {folder}: its {path.name} cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"--out {folder}: its {path.name} is not a regular file: remove it")
    return file


def require_regular(path, what, most=None):
    """Refuse what is no regular file (a pipe or a device would be read for ever), or one of more than ``most`` bytes.

    So is a safetensors file whose header alone has more than ``JSON_LIMIT`` bytes. Symbolic links are followed.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{what} {path} is not a regular file")
    if most is not None and status.st_size > most:
        raise InputError(f"{what} {path} has {status.st_size:,} bytes, more than the {most:,} that such a file may have")
    if Path(path).suffix == ".safetensors" and JSON_LIMIT < (header := _header_size(path)) <= status.st_size - 8:
        said = f"{what} {path} has a header of {header:,} bytes, more than the {JSON_LIMIT:,} that it may have"
        raise InputError(f"{said}: it is not read")


def _header_size(path):
    """Bytes of the JSON object that a safetensors file begins with."""
    try:
        with open(path, "rb") as file:
            return int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise InputError(f"file {path} cannot be read ({error.strerror})") from error


def why_unreadable(path, error):
    """Why a file cannot be read, in words: a git-lfs pointer in its place, nothing in it, or what ``error`` says."""
    beginning = _beginning(path)
    if beginning == LFS_POINTER:
        return "a git-lfs pointer is in its place: run 'git lfs pull'"
    return "it is empty" if beginning == b"" else reason(error)


def damaged(what, path, error, remedy):
    """The :class:`InputError` of a file that cannot be read; a git-lfs pointer has a remedy of its own."""
    remedy = "" if _beginning(path) == LFS_POINTER else f": {remedy}"
    return InputError(f"{what} {path} is damaged ({why_unreadable(path, error)}){remedy}")


def _beginning(path):
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError:
        return None


def write_bytes(path, data, once=False):
    """Write ``data`` (bytes) atomically; ``once`` as in :func:`replacing`."""
    with replacing(path, once) as temporary:
        temporary.write_bytes(data)


def write_json(path, value, once=False):
    """Write ``value`` atomically as indented JSON with sorted keys, so that equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), once)


def read_json(path, what="file", keys=(), most=JSON_LIMIT):
    """Read a JSON object; a missing or damaged one, or one without ``keys``, raises :class:`InputError` that names it.

    So does one that is no regular file, or has more than ``most`` bytes.
    """
    require_regular(path, what, most)
    try:
        value = parse_json(text := Path(path).read_text(encoding="utf-8"))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair: text that nothing can show or write
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{what} {path} is not readable JSON ({why_unreadable(path, error)})") from error
    return _require_keys(value, keys, f"{what} {path}")


def parse_json(text):
    """The value of a JSON text; ``ValueError`` for an object that has a key twice, of which ``json`` takes the last."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} is there twice")
    return value


def _require_keys(value, keys, what):
    if not isinstance(value, dict) or not set(keys) <= set(value):
        expected = f" with {', '.join(keys)}" if keys else ""
        raise InputError(f"{what} is not what advkd writes (expected an object{expected})")
    return value


def write_tensors(path, tensors, metadata=None):
    """Write a dict of tensors atomically as safetensors; ``metadata`` is one JSON value (a single header key, so that
    equal contents give equal bytes)."""
    header = {"advkd": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header))


def read_tensors(path, what="file", keys=(), remedy=START_AGAIN):
    """Return ``(tensors, metadata)`` of a file by :func:`write_tensors`, memory-mapped, on the CPU.

    Raises:
        InputError: a missing or damaged file, with the ``remedy``, or metadata without ``keys``.
    """
    require_regular(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("advkd", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise damaged(what, path, error, remedy) from error
    return tensors, _require_keys(metadata, keys, f"{what} {path}")


@contextlib.contextmanager
def restoring(what, path, remedy=START_AGAIN):
    """Errors while a file's contents are used become the :class:`InputError` of a damaged file."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(what, path, error, remedy) from error


def digest(tensors):
    """Hexadecimal SHA-256 of a dict of tensors: names, dtypes, shapes and contents."""
    return _hashed(tensors).hexdigest()


def _hashed(tensors):
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy())
    return state


def with_digest(tensors, metadata):
    """``metadata`` (a JSON object) with the ``digest`` of itself and of the tensors that it stands beside."""
    return {**metadata, "digest": _digest_of_all(_hashed(tensors), metadata)}


def _digest_of_all(state, metadata):
    state = state.copy()
    state.update(json.dumps(metadata, sort_keys=True).encode())
    return state.hexdigest()


def has_own_digest(tensors, metadata):
    """True if the digest is of these tensors and metadata, or, as in older files, of the tensors alone."""
    state, rest = _hashed(tensors), {key: value for key, value in metadata.items() if key != "digest"}
    return metadata["digest"] in (_digest_of_all(state, rest), state.hexdigest())


def require_digest(path, tensors, metadata, remedy=START_AGAIN):
    """Refuse a file whose tensors or metadata are not those that were written."""
    if not has_own_digest(tensors, metadata):
        raise InputError(f"{path} is altered: {remedy}")


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_space(folder, needed, what):
    """Refuse before work starts when ``folder``'s disk has less than ``needed`` bytes left."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(f"{what} needs {needed / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free")


def require_output_folder(path, option="--out"):
    """Refuse an output path that is a file or cannot be written to; create the folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} {path} is a file; name a folder")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{option} {path} is a link to {os.path.realpath(path)}, which does not exist: make that folder")
    try:
        with writing(path):
            make_folder(path)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be created ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{option} {path} is not writable")
    remove_leftovers(path)
    return path


def pack_optimizer(prefix, optimizer):
    """Flatten an optimiser's state into tensors named ``prefix/parameter/key`` (its options stay in the configuration)."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}/{i}/{key}": torch.as_tensor(value) for i, slots in state.items() for key, value in slots.items()}


def unpack_optimizer(prefix, optimizer, tensors):
    """Restore what :func:`pack_optimizer` wrote into a freshly built Adam; ``ValueError`` where it does not fit."""
    state, parameters = {}, [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith(prefix + "/"):
            index, key = name[len(prefix) + 1 :].split("/")
            state.setdefault(int(index), {})[key] = value.clone()
    for index, slots in state.items():
        shapes = {"step": torch.Size(), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[index].shape)}
        if {key: value.shape for key, value in slots.items()} != shapes:
            raise ValueError(f"the optimiser's state of parameter {index} does not fit it")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
