"""Files that are whole or absent: everything is written to a temporary name and renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .errors import InputError

_HOST = socket.gethostname().replace(".", "-")


def cache_folder():
    """Where features, reference samples and plans are kept: ``ADVKD_CACHE``, else ``advkd`` in the user's cache folder."""
    if folder := os.environ.get("ADVKD_CACHE"):
        return Path(folder)
    home = os.path.expanduser("~/.cache")
    # A user without a home has the system's temporary folder.
    return Path(os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else tempfile.gettempdir())) / "advkd"


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on failure.

    Two processes may write one path at the same time: each has a temporary file of its own.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"no space left to write {path}: free some and run the same command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove the temporary files and folders that killed processes of this machine left in ``folder``."""
    for path in Path(folder).glob(f".*.{_HOST}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not _is_running(int(process)):
            if path.is_dir():
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
    """A name beside ``path`` that belongs to this process, and that :func:`remove_leftovers` recognises after its death."""
    path = Path(path)
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


@contextlib.contextmanager
def locked(folder, out=None):
    """Hold ``folder`` for one process; a second one is refused. The kernel releases the lock of a killed process.

    ``out``: the folder that the error names, where the lock stands for another one than it lies in.
    """
    import fcntl

    with open(Path(folder) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"--out {out or folder}: another process is writing there; wait for it or name another folder"
            raise InputError(said) from None
        yield


def write_bytes(path, data):
    """Write ``data`` (bytes) atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path, value):
    """Write ``value`` atomically as indented JSON with sorted keys, so that equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path, what="file", keys=()):
    """Read a JSON object; a missing or damaged one, or one without ``keys``, raises :class:`InputError` that names it."""
    try:
        return _require_keys(json.loads(Path(path).read_text()), keys, f"{what} {path}")
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{what} {path} is not readable JSON ({error})") from error


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


def read_tensors(path, what="file", keys=()):
    """Return ``(tensors, metadata)`` of a file by :func:`write_tensors`, memory-mapped, on the CPU.

    Raises:
        InputError: a missing or damaged file, or metadata without ``keys``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _require_keys(json.loads((file.metadata() or {}).get("advkd", "{}")), keys, f"{what} {path}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{what} {path} is damaged ({error})") from error


def digest(tensors):
    """Hexadecimal SHA-256 of a dict of tensors: names, dtypes, shapes and contents."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def require_digest(path, tensors, metadata):
    """Refuse a file whose tensors are not those that were written."""
    if metadata["digest"] != digest(tensors):
        raise InputError(f"{path} is altered: delete it and start again, or restore a copy")


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
    try:
        path.mkdir(parents=True, exist_ok=True)
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
    """Restore what :func:`pack_optimizer` wrote into a freshly built optimiser."""
    state = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "/"):
            index, key = name[len(prefix) + 1 :].split("/")
            state.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
