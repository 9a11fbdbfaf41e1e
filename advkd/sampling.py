"""What ``advkd sample`` does: images of a student to a picture or a folder, by one process or several."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import InputError
from .files import digest, read_json, require_output_folder, write_json
from .models.fused_student import DTYPES
from .models.student import Student, batches
from .pictures import save_grid, save_image, to_pil

RECORD = "samples.json"
"""What the pictures of a folder are of: a later call goes on with the same ones only."""


def sample(
    student, n, seed, out, interpolate=False, device="cpu", backend="auto", dtype="float32", batch_size=64, progress=True
):  # fmt: skip
    """Draw ``n`` images of seed ``seed`` with the fused student and save them.

    Args:
        student: what :meth:`Student.from_pretrained` takes.
        n: number of images.
        seed: of the noise; image i of a seed is always the same (to rounding: see :meth:`Student.fuse`).
        out: a picture (a grid) or a folder (one PNG per image; pictures that are there are kept, so that the same call goes on
            after a kill, or with a larger ``n``).
        interpolate: a spherical walk from the seed's first latent to its second, in ``n`` pictures.
        device, backend, dtype, batch_size: how it runs.
        progress: show a bar.

    Under ``torchrun`` process r of w draws the batches r, r + w, ... into the folder.
    """
    if n < 1:
        raise InputError(f"-n must be at least 1, got {n}")
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed must be in [0, 2^64), got {seed}")
    out = Path(out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = out.suffix == "" or out.is_dir()
    if folder:
        require_output_folder(out)
    elif world > 1:
        raise InputError(f"--out {out}: several processes draw into a folder, not one picture")
    elif out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        raise InputError(f"--out {out}: unknown picture suffix {out.suffix!r}; use .png or a folder")
    else:
        require_output_folder(out.parent)
    model = Student.from_pretrained(student, require_device(device))
    if folder:
        _require_same(out, {"student": digest(model.state_dict()), "seed": seed, "walk": n if interpolate else None})
    fused = model.fuse(backend, DTYPES[dtype])
    parts = batches(n, batch_size)
    if folder:
        parts = [part for part in parts[rank::world] if not all(path.exists() for path in _paths(out, part))]
    kind = torch.uint8 if folder and not interpolate else torch.float32
    pieces = _walk(fused, n, seed, parts) if interpolate else fused.draw(parts, seed, kind)
    if not folder:
        save_grid(torch.cat(list(pieces)), out, columns=min(n, 10) if interpolate else None)
        return
    total = sum(count for _, count in parts)
    with tqdm(total=total, desc="sample", unit="image", disable=not progress or rank > 0) as bar:
        _save(pieces, [path for part in parts for path in _paths(out, part)], bar)


def _require_same(out, record):
    """Refuse a folder with pictures of something else; note what these are of."""
    path = out / RECORD
    if path.exists():
        known = read_json(path, "record of samples", record)
        if changed := [key for key in record if known[key] != record[key]]:
            raise InputError(f"--out {out} holds pictures of another {', '.join(changed)}: name another folder")
    elif next(out.glob("[0-9]*.png"), None) is not None:
        raise InputError(f"--out {out} holds pictures of unknown origin (no {RECORD}): name another folder")
    else:
        write_json(path, record)


def _paths(out, part):
    first, count = part
    return [out / f"{i:06d}.png" for i in range(first, first + count)]


def _save(pieces, paths, bar):
    """Pictures of all pieces, written by threads while the next piece is drawn."""
    paths, written = iter(paths), []
    with ThreadPoolExecutor(torch.get_num_threads()) as writers:
        for images in pieces:
            for done in written:
                done.result()
            written = [writers.submit(save_image, picture, next(paths)) for picture in to_pil(images)]
            bar.update(len(images))
        for done in written:
            done.result()


def _walk(fused, n, seed, parts):
    a, b = fused.latents(2, seed)
    positions = torch.linspace(0, 1, n)
    for first, count in parts:
        z = torch.stack([slerp(a, b, float(p)) for p in positions[first : first + count]])
        yield fused(z).float().cpu()


def slerp(a, b, position):
    """Spherical interpolation between two latents: a at 0, b at 1; both N(0, I) give N(0, I)-like norms between."""
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-6:
        return (1 - position) * a + position * b
    return (math.sin((1 - position) * angle) * a + math.sin(position * angle) * b) / math.sin(angle)


def require_device(name):
    """A torch device by name; one that is not there is an :class:`InputError`."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name!r} is not available ({str(error).splitlines()[0]})") from error
    return device
