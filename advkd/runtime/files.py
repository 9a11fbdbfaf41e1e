"""Files that are whole or absent: everything is written to a temporary name and renamed."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import InputError
from .folders import NO_SPACE, UNSUPPORTED, make_folder, temporary_path, writing
from .hub import reason
from .launcher import TEMPORARY

LFS_POINTER = b"version https://git-lfs"
START_AGAIN = "delete it and start again, or restore a copy"
JSON_LIMIT, MANIFEST_LIMIT = 2**22, 2**26
"""Bytes that a JSON file may have; the manifest of very many shards may have more. Values take up to 40 times the memory."""


@contextlib.contextmanager
def replacing(path: str | Path, once: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside ``path``; rename it to ``path`` on success, remove it on failure.

    A symbolic link stays, and the file that it points to is replaced. Two threads or processes may write one path at the same
    time: each has its own temporary file. With ``once`` an existing file stays: the first writer wins.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = temporary_path(target)
    TEMPORARY.add(temporary)
    try:
        with writing(path, temporary):
            make_folder(target.parent)
            temporary.unlink(missing_ok=True)
            # Created exclusively: a link that somebody else has planted in its place would be written through.
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
                raise  # other numbers come from file systems without hard links, and vary between them
    os.replace(temporary, target)


def synchronize_all(folder: str | Path) -> None:
    """Flush a folder and everything below it to the disk."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            synchronize(descriptor)
        finally:
            os.close(descriptor)


def synchronize(descriptor: int) -> None:
    """Flush an open file to the disk, where its file system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def require_there(file: IO, path: str | Path) -> None:
    """Refuse to go on writing to ``file``, opened as ``path``, once that name belongs to another file or to none."""
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return
    except FileNotFoundError:
        pass
    raise InputError(f"{path} cannot be written: it has been removed or moved away; run the same command again")


def require_regular(path: str | Path, what: str, most: int | None = None) -> None:
    """Refuse anything but a regular file (a pipe or a device would be read for ever), or one of more than ``most`` bytes.

    A safetensors file whose header alone has more than ``JSON_LIMIT`` bytes is refused, too. Symbolic links are followed.
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


def why_unreadable(path: str | Path, error: Exception) -> str:
    """The reason why a file cannot be read: a git-lfs pointer in its place, an empty file, or the text of ``error``."""
    beginning = _beginning(path)
    if beginning == LFS_POINTER:
        return "a git-lfs pointer is in its place: run 'git lfs pull'"
    return "it is empty" if beginning == b"" else reason(error)


def damaged(what: str, path: str | Path, error: Exception, remedy: str) -> InputError:
    """The :class:`InputError` for a file that cannot be read; a git-lfs pointer has its own remedy."""
    remedy = "" if _beginning(path) == LFS_POINTER else f": {remedy}"
    return InputError(f"{what} {path} is damaged ({why_unreadable(path, error)}){remedy}")


def _beginning(path):
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError:
        return None


def write_bytes(path: str | Path, data: bytes, once: bool = False) -> None:
    """Write ``data`` (bytes) atomically; ``once`` as in :func:`replacing`."""
    with replacing(path, once) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any, once: bool = False) -> None:
    """Write ``value`` atomically as indented JSON with sorted keys, so that equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), once)


def read_json(path: str | Path, what: str = "file", keys: Collection[str] = (), most: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, damaged, not regular or longer than ``most`` bytes, or lacks one of ``keys``.
    """
    require_regular(path, what, most)
    try:
        value = parse_json(text := Path(path).read_text(encoding="utf-8"))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair: text that nothing can show or write
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{what} {path} is not readable JSON ({why_unreadable(path, error)})") from error
    return _require_keys(value, keys, f"{what} {path}")


def parse_json(text: str) -> Any:
    """The value of a JSON text; ``ValueError`` for an object with a duplicate key, where ``json`` silently takes the last."""
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


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Any = None) -> None:
    """Write a dict of tensors atomically as safetensors.

    ``metadata`` is one JSON value, stored under a single header key, so that equal contents give equal bytes.
    """
    header = {"advkd": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header))


def read_tensors(
    path: str | Path, what: str = "file", keys: Collection[str] = (), remedy: str = START_AGAIN
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
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
def restoring(what: str, path: str | Path, remedy: str = START_AGAIN) -> Iterator[None]:
    """Turn errors while a file's contents are used into the :class:`InputError` of a damaged file."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(what, path, error, remedy) from error


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of a dict of tensors: names, dtypes, shapes and contents."""
    return _hashed(tensors).hexdigest()


def _hashed(tensors):
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy())
    return state


def with_digest(tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    """``metadata`` (a JSON object) with the ``digest`` of itself and of the tensors beside it."""
    return {**metadata, "digest": _digest_of_all(_hashed(tensors), metadata)}


def _digest_of_all(state, metadata):
    state = state.copy()
    state.update(json.dumps(metadata, sort_keys=True).encode())
    return state.hexdigest()


def has_own_digest(tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> bool:
    """True if the digest is of these tensors and metadata, or, as in older files, of the tensors alone."""
    state, rest = _hashed(tensors), {key: value for key, value in metadata.items() if key != "digest"}
    return metadata["digest"] in (_digest_of_all(state, rest), state.hexdigest())


def require_digest(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any], remedy: str = START_AGAIN
) -> None:
    """Refuse a file whose tensors or metadata were altered after it was written."""
    if not has_own_digest(tensors, metadata):
        raise InputError(f"{path} is altered: {remedy}")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pack_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimiser's state into tensors named ``prefix/parameter/key`` (its options stay in the configuration)."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}/{i}/{key}": torch.as_tensor(value) for i, slots in state.items() for key, value in slots.items()}


def unpack_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the state that :func:`pack_optimizer` wrote into a freshly built Adam; ``ValueError`` where it does not fit."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith(prefix + "/"):
            number, key = name[len(prefix) + 1 :].split("/")
            state.setdefault(int(number), {})[key] = value.clone()
    for index, slots in state.items():
        shapes = {"step": torch.Size(), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[index].shape)}
        if {key: value.shape for key, value in slots.items()} != shapes:
            raise ValueError(f"the optimiser's state of parameter {index} does not fit it")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
