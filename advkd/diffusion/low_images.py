"""Low images that super-resolution models are told: area averages of the large ones with a known level of noise.

Conditioning augmentation (Ho et al. 2022, Cascaded diffusion models, section 4): y = sqrt(a) P x + sqrt(1 - a) n with the area
average P and a = alpha_bar after ``level`` steps of the model's own noise. A network that is told the level learns
p(x | y, level), so that what is drawn for a noised low image has the data's distribution at any level; noise hides what the
stage before gets wrong. Truncated augmentation trains on the levels up to one below the schedule's last.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..data.levels import downsample
from ..errors import InputError
from ..models.denoiser import LowImage, embedding_of
from ..ops.arguments import whole
from .denoiser import over
from .schedule import Schedule

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class LowImages(NamedTuple):
    """Low images of a super-resolution model.

    Attributes:
        size: their side in pixels.
        level: largest level of their noise that the model was trained with, in timesteps: 0 for clean ones alone, the
            schedule's T for non-truncated augmentation.
    """

    size: int
    level: int

    @classmethod
    def of(cls, unet: "UNet2DModel", timesteps: int, name: str) -> "LowImages | None":
        """The low images that a UNet takes.

        Args:
            unet: the network.
            timesteps: T of its schedule.
            name: the model's, for errors.

        Returns:
            Their size and largest level; None for a network that takes none.

        Raises:
            InputError: a size that does not divide the network's, or a level beyond T.
        """
        embedding = embedding_of(unet)
        if embedding is None or not embedding.config.low_size:
            return None
        found = cls(embedding.config.low_size, embedding.config.low_level)
        require_divides(found.size, unet.config.sample_size, f"teacher {name}")
        if found.level > timesteps:
            raise InputError(f"teacher {name}: low_level must be at most its {timesteps} timesteps, got {found.level}")
        return found

    def noised(self, low: torch.Tensor, level: torch.Tensor, noise: torch.Tensor, schedule: Schedule) -> LowImage:
        """Low images with noise.

        Args:
            low: ``(N, C, size, size)`` clean low images.
            level: ``(N,)`` int64 levels in [0, T].
            noise: standard normal, of the shape of ``low``.
            schedule: the model's.

        Returns:
            Images in the dtype of ``low``, and their levels.
        """
        alpha_bars = torch.cat((torch.ones(1, dtype=torch.float64), schedule.alpha_bars)).to(low.device)[level]
        return LowImage(over(low, alpha_bars.sqrt()) * low + over(low, (1 - alpha_bars).sqrt()) * noise, level)

    def trained(self, images: torch.Tensor, level: torch.Tensor, noise: torch.Tensor, schedule: Schedule) -> LowImage:
        """Low images of large ones, as training tells them.

        Args:
            images: ``(N, C, H, W)`` large images, in the data's range.
            level: as for :meth:`noised`.
            noise: ``(N, C, size, size)`` standard normal.
            schedule: the model's.

        Returns:
            As :meth:`noised`.
        """
        return self.noised(downsample(images, self.size), level, noise, schedule)

    def require_level(self, level: int, name: str) -> int:
        """Refuse a level that a model was not trained with.

        Args:
            level: of the low images' noise, in timesteps.
            name: the model's.

        Returns:
            The level.

        Raises:
            InputError: another number than a whole one in [0, ``level``].
        """
        if whole("level", level) > self.level:
            raise InputError(f"level must be at most {self.level}, the largest that {name} was trained with, got {level}")
        return level

    def require_told(self, told: LowImage, shape: tuple[int, ...], name: str) -> LowImage:
        """Refuse low images that a model does not take.

        Args:
            told: the low images and their levels.
            shape: of the states, ``(N, C)``.
            name: the model's.

        Returns:
            ``told``.

        Raises:
            InputError: another shape, or a level that the model was not trained with; levels on a GPU are not looked at.
        """
        wanted = (*shape, self.size, self.size)
        if tuple(told.image.shape) != wanted or told.level.shape != wanted[:1]:
            found = f"{tuple(told.image.shape)} with levels {tuple(told.level.shape)}"
            raise InputError(f"condition: {name} takes low images {wanted} with a level each, got {found}")
        if told.level.device.type == "cpu" and len(told.level):
            for level in (int(told.level.min()), int(told.level.max())):
                self.require_level(level, name)
        return told


def require_divides(low: int, size: int, name: str) -> None:
    """Refuse low images whose pixels are no averages of whole areas.

    Args:
        low: side of the low images.
        size: side of the large images.
        name: what says so, for the error.

    Raises:
        InputError: sides that do not divide, or are equal.
    """
    if not 0 < low < size or size % low:
        raise InputError(f"{name}: a low image's side must divide the large one's and be less, got {low} and {size}")
