"""Folders of pretrained models: embedded in the package, on the disk, or on the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from .progress import can_be_shown

PRETRAINED = Path(__file__).parent.parent / "pretrained"


def resolve(source: str | Path, embedded: Mapping[str, Path], kind: str, patterns: Sequence[str]) -> Path:
    """The folder of a pretrained model.

    Args:
        source: an embedded name, a folder, or a hub id (owner/name), of which the files that match ``patterns`` are fetched.
        embedded: embedded names and their folders.
        kind: the model's name in error messages.
        patterns: file patterns.
    """
    source = str(source)
    if source in embedded:
        return embedded[source]
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        names = "".join(f", nor {name!r}" for name in embedded)
        raise InputError(f"{kind} {source!r} is neither a folder nor a hub id (owner/name){names}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not can_be_shown():
        disable_progress_bars()
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:
        raise InputError(
            f"{kind} {source!r} is not a local folder and cannot be fetched from the hub ({reason(error)})"
        ) from error


def reason(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
