"""The work of ``advkd sample``: images of a student to a picture or a folder, by one process or several."""

import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from ..data.pictures import save_grid, save_image, to_pil
from ..errors import InputError
from ..models.shape import DTYPES, batches
from ..models.student import Student
from ..runtime import launcher
from ..runtime.devices import require_device
from ..runtime.files import digest, read_json, write_json
from ..runtime.folders import held, require_output_folder
from ..runtime.progress import progress_bar

RECORD = "samples.json"
"""Record, beside the pictures, of the student and the seed: a later call goes on with the same ones only."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 2**28
"""Most pixels of one picture: 16,384 x 16,384."""


def sample(
    student: str,
    n: int,
    seed: int,
    out: str | Path,
    interpolate: bool = False,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    dtype: str = "float32",
    batch_size: int = 64,
    progress: bool = True,
) -> None:
    """Draw ``n`` images of seed ``seed`` with the fused student and save them.

    Args:
        student: what :meth:`Student.from_pretrained` takes.
        n: number of images.
        seed: of the noise; image i of a seed is always the same (to rounding: see :meth:`Student.fuse`).
        out: a picture (a grid; .png, .jpg, .jpeg, .webp or .bmp; a symbolic link stays and its target is written) or a folder
            (a name without a suffix, or one that ends in a slash: one PNG per image; pictures that are there are kept, so that
            the same call goes on after a kill, or with a larger ``n``).
        interpolate: a spherical walk from the seed's first latent to its second, in ``n`` pictures.
        device: torch device that draws.
        backend: of the kernels, see :func:`advkd.ops.registry.choose`.
        dtype: of the network, a name of :data:`advkd.models.shape.DTYPES`.
        batch_size: images that are drawn at a time.
        progress: show a bar.

    Under ``torchrun`` process r of w draws the batches r, r + w, ... into the folder.
    """
    if not 1 <= n <= 2**62:
        raise InputError(f"-n must be in [1, 2^62], got {n}")
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed must be in [0, 2^64), got {seed}")
    rank, world = launcher.processes()
    folder = _is_folder(out)
    out = Path(out)
    if folder:
        require_output_folder(out)
    elif world > 1:
        raise InputError(f"--out {out}: several processes draw into a folder, not one picture")
    else:
        require_output_folder(out.parent)
    model = Student.from_pretrained(student, require_device(device))
    if folder:
        _require_same(out, {"student": digest(model.state_dict()), "seed": seed, "walk": n if interpolate else None})
    else:
        _require_one_picture(n, model.config.image_size, out)
    fused = model.fuse(backend, DTYPES[dtype])
    draw = partial(_walk, fused, n, seed) if interpolate else partial(_drawn, fused, seed, folder)
    if not folder:
        save_grid(torch.cat(list(draw(batches(n, batch_size)))), out, columns=min(n, 10) if interpolate else None)
        return
    parts = islice(batches(n, batch_size), rank, None, world)
    # The share of this process, of which a last batch may be smaller.
    total = min(n, batch_size * -(-(-(-n // batch_size) - rank) // world))
    with held(out), progress_bar(total=total, desc="sample", unit="image", shown=progress and rank == 0) as bar:
        _save(draw, parts, out, bar)


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
    if not path.exists():
        if picture is not None:
            raise InputError(f"--out {out} holds pictures of unknown origin (no {RECORD}): name another folder")
        write_json(path, record, once=True)
    known = read_json(path, "record of samples", record)
    if changed := [key for key in record if known[key] != record[key]]:
        raise InputError(f"--out {out} holds pictures of another {', '.join(changed)}: name another folder")


def _paths(out, part):
    first, count = part
    return [out / f"{i:06d}.png" for i in range(first, first + count)]


def _drawn(fused, seed, as_pictures, parts):
    return fused.draw(parts, seed, torch.uint8 if as_pictures else torch.float32)


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


def _walk(fused, n, seed, parts):
    a, b = fused.latents(2, seed)
    for first, count in parts:
        z = torch.stack([slerp(a, b, i / max(n - 1, 1)) for i in range(first, first + count)])
        yield fused(z).float().cpu()


def slerp(a: torch.Tensor, b: torch.Tensor, position: float) -> torch.Tensor:
    """Spherical interpolation between two latents: a at 0, b at 1; both N(0, I) give N(0, I)-like norms between."""
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-6:
        return (1 - position) * a + position * b
    return (math.sin((1 - position) * angle) * a + math.sin(position * angle) * b) / math.sin(angle)
