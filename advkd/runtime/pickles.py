"""Checks of files by ``torch.save``, which are pickles, before torch reads them."""

import os
import pickletools
import re
import zipfile
from pathlib import Path

from ..errors import InputError
from .files import why_unreadable

PICKLE_LIMIT = 2**20
"""Bytes that the pickle of a file's tensors may have; their values are stored beside it."""

CALLED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)")
"""Names that make tensors and the dict around them."""

NOT_OF_TENSORS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "DUP", "MEMOIZE")
"""Opcodes that torch.save never writes for tensors."""

RECORD = re.compile(
    r"([^/]+)/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
"""Names in an archive by ``torch.save``, all in one folder."""

PICKLES_WITHOUT_ZIP = 5
"""Pickles that a file of torch's older format, which is no archive, begins with."""


def require_weights(path: str | Path, what: str) -> None:
    """Refuse a file by ``torch.save`` that holds anything but tensors, or unpacks to more than its size.

    ``weights_only=True`` runs no code, but makes arrays of any size that a few bytes ask for.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":  # by which torch tells the formats apart
                _require_archive(file)
            else:
                file.seek(0)
                for _ in range(PICKLES_WITHOUT_ZIP):
                    _require_tensors(file)
    except Exception as error:  # pickletools and zipfile raise nearly any on damaged files
        why = why_unreadable(path, error)
        raise InputError(f"{what} {path} cannot be read ({why}): restore or fetch a copy of it") from error


def _require_archive(file):
    """Refuse archives that torch and zipfile might read differently, and records that are compressed or overlap."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        if any(r.compress_type != zipfile.ZIP_STORED for r in records) or sum(r.file_size for r in records) > size:
            raise ValueError("it unpacks to more than its size, as nothing does that torch.save writes")
        names = {record.filename for record in records}
        folders = {match and match[1] for match in map(RECORD.fullmatch, names)}
        whole = len(names) == len(records) and min(r.header_offset for r in records) == 0 and not archive.comment
        if not whole or len(folders) != 1 or None in folders:
            raise ValueError("it has other records than torch.save writes")
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            for record in records:
                record.CRC = None  # zipfile then compares nothing
        with archive.open(f"{folders.pop()}/data.pkl") as pickled:
            _require_tensors(pickled)
        if altered := archive.testzip():  # torch does not look at the checksums
            raise ValueError(f"its record {altered} is altered")


def _require_tensors(file):
    """Read one pickle of ``file`` without building its objects."""
    begin, tuples, before = file.tell(), set(), ""
    for opcode, argument, place in pickletools.genops(file):
        if place - begin > PICKLE_LIMIT:
            raise ValueError(f"its pickle has more than the {PICKLE_LIMIT:,} bytes that it may have")
        if opcode.name in NOT_OF_TENSORS or opcode.name == "GLOBAL" and not CALLED.fullmatch(argument):
            raise ValueError(f"it asks for {argument or opcode.name}, and tensors alone are read")
        if "PUT" in opcode.name and before.startswith("TUPLE"):
            tuples.add(argument)
        # Tuples of the same tuple twice, and so on, take a time that doubles with each where they are keys.
        if "GET" in opcode.name and argument in tuples:
            raise ValueError("it holds a tuple several times, as nothing does that torch.save writes")
        before = opcode.name
