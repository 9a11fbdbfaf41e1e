"""Estimation of how much noise a teacher finds at every level, for Analytic-DPM's variances (``advkd teacher noise-power``)."""

import torch

from ..data.images import normalize
from ..diffusion.denoiser import Denoiser
from ..diffusion.guidance import null_labels
from ..diffusion.noise_power import NoisePower
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import whole
from ..runtime.progress import progress_bar


@torch.no_grad()
def estimate_noise_power(
    teacher: Teacher,
    images: torch.Tensor,
    levels: int = 48,
    num: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> NoisePower:
    """Estimate E|eps|^2 / d of a teacher's network, denser towards the image.

    Args:
        teacher: the teacher; a conditional one is told its null class.
        images: ``(M, C, S, S)`` of the data that it was trained on, float32 in [-1, 1] or uint8.
        levels: number of timesteps, at least 2.
        num: images noised at each of them, spread evenly over ``images``, which may be sorted by class.
        seed: of the noise, in [0, 2^64).
        batch_size: images that run through the network together.
        progress: show a bar.

    Returns:
        Estimates; their standard error is about sqrt(2 / (num d)) of a value.

    Raises:
        InputError: images of another shape, numbers out of range, or a conditional teacher without a null class.
    """
    if tuple(images.shape[1:]) != teacher.image_shape or not len(images):
        raise InputError(f"images must be (M, {', '.join(map(str, teacher.image_shape))}), got {tuple(images.shape)}")
    if teacher.low is not None:
        raise InputError(f"teacher {teacher.name} enlarges low images: its noise power is that of single ones, and not known")
    if teacher.num_classes and teacher.null_class is None:
        raise InputError(f"teacher {teacher.name} has no null class: the noise that it finds is known of single classes only")
    total = teacher.train_timesteps
    levels, num = whole("levels", levels, 2, total), whole("num", num, 1)
    times = sorted({round((total - 1) * (i / (levels - 1)) ** 2) for i in range(levels)})
    if teacher.autoencoder is not None:
        images = teacher.autoencoder.encode(images)
    plain = teacher.denoiser
    denoiser = Denoiser(plain.network, plain.schedule, plain.prediction)
    values = []
    with progress_bar(total=len(times) * num, desc="noise power", unit="image", shown=progress) as bar:
        for t in times:
            values.append(_mean_square(teacher, denoiser, images, t, num, seed, batch_size, bar))
    return NoisePower(tuple(times), tuple(values), num, seed)


def _mean_square(teacher, denoiser, images, t, num, seed, batch_size, bar):
    level, total = teacher.schedule.level(float(t)), 0.0
    for first in range(0, num, batch_size):
        indices = torch.arange(first, min(first + batch_size, num), device=teacher.device)
        x0 = normalize(images[(indices * len(images) // num % len(images)).cpu()]).to(teacher.device)
        eps = philox_normal(seed, indices + t * num, teacher.shape, stream="x_T")
        found = denoiser.predict(level.alpha * x0 + level.noise * eps, level.sigma, null_labels(teacher, len(indices)))[1]
        total += found.double().square().sum().item()
        bar.update(len(indices))
    return total / num / images[0].numel()
