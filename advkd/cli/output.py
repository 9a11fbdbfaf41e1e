"""Pictures of ``advkd sample``: one grid, or a folder in which a killed call goes on."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..data.pictures import save_grid, save_image, to_pil
from ..errors import InputError
from ..models.shape import batches
from ..runtime import launcher
from ..runtime.files import read_json, write_json
from ..runtime.folders import held, require_output_folder
from ..runtime.progress import progress_bar

RECORD = "samples.json"
"""Record, beside the pictures, of the model and the seed: a later call goes on with the same ones only."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 2**28
"""Most pixels of one picture: 16,384 x 16,384."""

Draw = Callable[[Iterator[tuple[int, int]]], Iterator[torch.Tensor]]
"""Function of batches ``(first, count)`` that yields the images of each."""


def require_counts(n: int, seed: int, batch_size: int) -> None:
    """Refuse numbers with which nothing can be drawn."""
    if not 1 <= n <= 2**62:
        raise InputError(f"-n must be in [1, 2^62], got {n}")
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed must be in [0, 2^64), got {seed}")


def require_output(out: str | Path) -> bool:
    """Refuse an ``--out`` that cannot be written; return True for a folder, False for one picture."""
    folder, path = _is_folder(out), Path(out)
    if folder:
        require_output_folder(path)
    elif launcher.processes()[1] > 1:
        raise InputError(f"--out {out}: several processes draw into a folder, not one picture")
    else:
        require_output_folder(path.parent)
    return folder


def write_images(
    out: str | Path,
    n: int,
    size: int,
    draw: Draw,
    record: dict[str, Any],
    batch_size: int,
    columns: int | None = None,
    progress: bool = True,
) -> None:
    """Draw images and save them as one picture or into a folder; under ``torchrun`` process r of w draws batches r, r + w, ...

    Args:
        out: a picture or a folder; see :func:`require_output`.
        n: number of images.
        size: their side in pixels.
        draw: draws batches of them.
        record: JSON values that name everything the images depend on.
        batch_size: images that are drawn at a time.
        columns: of the grid; None: about square.
        progress: show a bar.

    Raises:
        InputError: a grid that no picture could hold, or a folder with pictures of something else.
    """
    folder, path = require_output(out), Path(out)
    if not folder:
        _require_one_picture(n, size, path)
        save_grid(torch.cat(list(draw(batches(n, batch_size)))), path, columns=columns)
        return
    _require_same(path, record)
    rank, world = launcher.processes()
    parts = islice(batches(n, batch_size), rank, None, world)
    # The share of this process, of which a last batch may be smaller.
    total = min(n, batch_size * -(-(-(-n // batch_size) - rank) // world))
    with held(path), progress_bar(total=total, desc="sample", unit="image", shown=progress and rank == 0) as bar:
        _save(draw, parts, path, bar)


def _is_folder(out):
    """True if ``--out`` names a folder, not a picture.

    One that is there, a name that ends in a slash, one without a suffix, or with a number for one (``run-0.5``, ``v1.2``).
    """
    path = Path(out)
    if path.is_dir() or str(out).endswith(("/", os.sep)) or not path.suffix[1:2].isalpha():
        return True
    if path.suffix.lower() not in PICTURES:
        known = f"use one of {', '.join(PICTURES)}, or end a folder's name with a slash"
        raise InputError(f"--out {out}: unknown picture suffix {path.suffix!r}; {known}")
    return False


def _require_one_picture(n, size, out):
    """Refuse a grid that no picture could hold, before it is drawn."""
    if n * max(size, 96) ** 2 > MOST_PIXELS:
        raise InputError(f"--out {out}: {n} images of {size}x{size} are too many for one picture; name a folder")


def _require_same(out, record):
    """Refuse a folder with pictures of something else; note what these are of."""
    path, picture = out / RECORD, next(out.glob("[0-9]*.png"), None)
    record = json.loads(json.dumps(record))  # tuples are lists in the file
    if not path.exists():
        if picture is not None:
            raise InputError(f"--out {out} holds pictures of unknown origin (no {RECORD}): name another folder")
        write_json(path, record, once=True)
    known = read_json(path, "record of samples")
    if changed := sorted(key for key in known.keys() | record.keys() if known.get(key) != record.get(key)):
        raise InputError(f"--out {out} holds pictures of another {', '.join(changed)}: name another folder")


def _paths(out, part):
    first, count = part
    return [out / f"{i:06d}.png" for i in range(first, first + count)]


def _save(draw, parts, out, bar):
    """Pictures that are not there yet, written by threads while the next ones are drawn."""
    paths, written = deque(), []

    def missing():
        for part in parts:
            wanted = _paths(out, part)
            if all(path.exists() for path in wanted):
                bar.update(len(wanted))
            else:
                paths.extend(wanted)
                yield part

    with ThreadPoolExecutor(torch.get_num_threads()) as writers:
        for images in draw(missing()):
            for done in written:
                done.result()
            written = [writers.submit(save_image, picture, paths.popleft()) for picture in to_pil(images)]
            bar.update(len(images))
        for done in written:
            done.result()
