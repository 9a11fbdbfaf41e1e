"""Files by ``torch.save``, which are pickles, looked through before torch reads them."""

import os
import pickletools
import re
import zipfile

from .errors import InputError
from .files import why_unreadable

PICKLE_LIMIT = 2**20
"""Bytes that the pickle of a file's tensors may have; their values are stored beside it."""

CALLED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)")
CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
PICKLES_WITHOUT_ZIP = 5
"""Pickles that a file of torch's older format, which is no archive, begins with."""


def require_weights(path, what):
    """Refuse a file by ``torch.save`` that holds anything but tensors, or unpacks to more than its size.

    ``weights_only=True`` runs no code, but makes arrays of any size that a few bytes ask for.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _require_stored(archive.infolist(), os.path.getsize(path))
                for record in archive.infolist():
                    if record.filename.endswith(".pkl"):
                        with archive.open(record) as file:
                            _require_tensors(file)
            return
        with open(path, "rb") as file:
            for _ in range(PICKLES_WITHOUT_ZIP):
                _require_tensors(file)
    except Exception as error:  # pickletools and zipfile raise nearly any on damaged files
        why = why_unreadable(path, error)
        raise InputError(f"{what} {path} cannot be read ({why}): restore or fetch a copy of it") from error


def _require_stored(records, size):
    """Refuse records that are compressed or overlap: a few bytes could unpack to any number."""
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > size:
        raise ValueError("it unpacks to more than its size, as nothing does that torch.save writes")


def _require_tensors(file):
    """Read one pickle of ``file`` without making anything of it."""
    begin = file.tell()
    for opcode, argument, place in pickletools.genops(file):
        if place - begin > PICKLE_LIMIT:
            raise ValueError(f"its pickle has more than the {PICKLE_LIMIT:,} bytes that it may have")
        if opcode.name in CALLS and not (opcode.name == "GLOBAL" and CALLED.fullmatch(argument)):
            raise ValueError(f"it asks for {argument or opcode.name}, and tensors alone are read")
