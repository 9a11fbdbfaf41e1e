"""What ``advkd sample`` does: images of a student to a picture or a folder."""

import math
from pathlib import Path

import torch

from .errors import InputError
from .files import require_output_folder
from .models.fused_student import DTYPES
from .models.student import Student
from .pictures import save_grid, save_image, to_pil


def sample(student, n, seed, out, interpolate=False, device="cpu", backend="auto", dtype="float32", batch_size=64):
    """Draw ``n`` images of seed ``seed`` with the fused student and save them.

    Args:
        student: what :meth:`Student.from_pretrained` takes.
        n: number of images.
        seed: of the noise; image i of a seed is always the same (to rounding: see :meth:`Student.fuse`).
        out: a picture (a grid) or a folder (one PNG per image, finished ones are kept on failure).
        interpolate: a spherical walk from the seed's first latent to its second, in ``n`` pictures.
        device, backend, dtype, batch_size: how it runs.
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
    folder = out.suffix == "" or out.is_dir()
    if folder:
        require_output_folder(out)
    elif out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        raise InputError(f"--out {out}: unknown picture suffix {out.suffix!r}; use .png or a folder")
    else:
        require_output_folder(out.parent)
    fused = Student.from_pretrained(student, require_device(device)).fuse(backend, DTYPES[dtype])
    if interpolate:
        pieces = _walk(fused, n, seed, batch_size)
    else:
        pieces = fused.stream(n, seed, batch_size, dtype=torch.uint8 if folder else torch.float32)
    if not folder:
        save_grid(torch.cat(list(pieces)), out, columns=min(n, 10) if interpolate else None)
        return
    first = 0
    for images in pieces:
        for i, picture in enumerate(to_pil(images), first):
            save_image(picture, out / f"{i:06d}.png")
        first += len(images)


def _walk(fused, n, seed, batch_size):
    a, b = fused.latents(2, seed)
    for positions in torch.linspace(0, 1, n).split(batch_size):
        yield fused(torch.stack([slerp(a, b, float(p)) for p in positions])).float().cpu()


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
