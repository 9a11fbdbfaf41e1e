"""A super-resolution model whose denoiser is known in closed form: Gaussian images and area averages of them."""

import torch

from ..data.levels import downsample
from ..models.denoiser import LowImage
from .exact import GaussianTeacher
from .low_images import LowImages, require_divides
from .schedule import Schedule


class GaussianSuperResolution(GaussianTeacher):
    """Gaussian images N(mean, covariance), drawn given their noised low images.

    With a = alpha_bar of the level and the area average P, x_t and the low image are linear in x with Gaussian noise, so that
    E[x | x_t, low, level] is affine in both.

    Args:
        mean: ``(C, H, W)`` mean of the images.
        covariance: ``(d, d)`` with d = C H W, or the variances in the shape of ``mean``.
        low_size: side of the low images.
        schedule: noise schedule; None: linear betas, T = 1000. Any level in [0, T] can be told.

    Raises:
        InputError: as :class:`~advkd.diffusion.exact.GaussianTeacher`, or a side that does not divide.

    Examples:
        >>> model = GaussianSuperResolution(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), 2)
        >>> SuperResolution(model, "unipc-2", 10).sample(torch.zeros(3, 1, 2, 2), level=100).shape
        torch.Size([3, 1, 4, 4])
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor, low_size: int, schedule: Schedule | None = None):
        super().__init__(mean, covariance, schedule)
        require_divides(low_size, self.shape[-1], "low_size")
        self.low = LowImages(low_size, len(self.schedule))
        pixels = torch.eye(len(self.mean), dtype=torch.float64).reshape(-1, *self.shape)
        self.average = downsample(pixels, low_size).flatten(1).T

    def x0(
        self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | LowImage | None = None
    ) -> torch.Tensor:
        """mean + C A^T (A C A^T + R)^-1 (y - A mean) for the observations y = A x + noise of covariance R.

        Args:
            x: ``(N, C, H, W)`` float64 states.
            alpha: weight of the image, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: the low images; None: the posterior mean given the state alone.

        Returns:
            ``(N, C, H, W)`` float64.
        """
        if not isinstance(labels, LowImage):
            return super().x0(x, alpha, noise, labels)
        seen = torch.cat((x.flatten(1), labels.image.double().flatten(1)), dim=1)
        operator, spread = self._observed(alpha, noise, labels.level)
        covariance = operator @ self.covariance
        gain = torch.linalg.solve(covariance @ operator.mT + torch.diag_embed(spread), covariance)
        return (self.mean + ((seen - operator @ self.mean).unsqueeze(1) @ gain).squeeze(1)).reshape(x.shape)

    def _observed(self, alpha, noise, level):
        """A and the diagonal of R: one of each where all samples have one level, one a sample otherwise."""
        level = level[:1] if (level == level[0]).all() else level
        kept = torch.cat((torch.ones(1, dtype=torch.float64), self.schedule.alpha_bars))[level]
        alpha, noise, kept = torch.broadcast_tensors(alpha.reshape(-1), noise.reshape(-1), kept)
        d, m = len(self.mean), len(self.average)
        state = alpha[:, None, None] * torch.eye(d, dtype=torch.float64)
        operator = torch.cat((state, kept.sqrt()[:, None, None] * self.average), dim=1)
        return operator, torch.cat((noise[:, None].expand(-1, d) ** 2, (1 - kept)[:, None].expand(-1, m)), dim=1)
