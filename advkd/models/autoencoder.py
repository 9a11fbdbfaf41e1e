"""Autoencoders between pictures and the latents that a diffusion model draws (Rombach et al. 2022, sections 3.1 and 4.1)."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..data.images import normalize
from ..errors import InputError
from ..runtime.files import digest, read_json, write_bytes, write_json
from ..runtime.hub import resolve
from .weights import WEIGHTS, load_network, require_ordinary

PARTS = ("vqvae", "vae")
"""Folders of a pipeline's autoencoder; the first is that of diffusers' ``LDMPipeline``, whatever the autoencoder's kind."""

KINDS = {"kl": "AutoencoderKL", "vq": "VQModel"}
"""Classes of diffusers by regularisation."""

LARGEST_IMAGE = 4096
"""Limit for the side of the images in a configuration that comes from elsewhere."""

TOGETHER = 64
"""Images that pass through the network at a time."""

Shape = tuple[int, ...]


class Autoencoder:
    """Latents of unit variance of pictures, and pictures of latents.

    Args:
        network: diffusers' ``AutoencoderKL`` or ``VQModel``, or a module with the same ``encode`` and ``decode``; it is put
            into eval mode and frozen, in place.
        scaling: factor by which the network's latents are multiplied, 1 over their standard deviation on the data.
        image_shape: ``(C, H, W)`` of the images.

    Attributes:
        latent_shape: of the latents.

    Examples:
        >>> autoencoder = Autoencoder.from_pretrained("autoencoder")
        >>> again = autoencoder.decode(autoencoder.encode(images))
    """

    def __init__(self, network: nn.Module, scaling: float, image_shape: Shape):
        self.network: Any = network.eval().requires_grad_(False)
        self.scaling, self.image_shape = float(scaling), tuple(image_shape)
        self.latent_shape = _latent_shape(network, self.image_shape)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Autoencoder":
        """Load an autoencoder.

        Args:
            source: a folder of ``advkd autoencoder train``, a latent teacher's, whose ``vqvae`` or ``vae`` is taken, or a hub
                id (owner/name) of either.

        Returns:
            Autoencoder on the CPU, float32.

        Raises:
            InputError: missing or damaged files, another class than diffusers' ``AutoencoderKL`` and ``VQModel``, a latent
                space that is shifted, or one without its scaling factor.
        """
        fetch = functools.partial(_fetched, source)
        folder = fetch("model_index.json")
        part = autoencoder_part(folder)
        if part is None and not os.path.lexists(folder / "config.json"):
            raise InputError(f"autoencoder {folder} has no config.json: name a folder of 'advkd autoencoder train'")
        return load_autoencoder(folder, part or "", fetch)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Latents of images: the posterior's mean of a KL-regularised network, the vectors before quantisation of the other.

        Args:
            images: ``(N, C, H, W)`` in [-1, 1], or of 8 bits.
            device: where the network runs, on parts of the images (None: where they are).

        Returns:
            ``(N, *latent_shape)`` in the network's dtype on the images' device, of unit variance over the data. Order of
            differentiability 0.
        """
        return self._in_parts(
            lambda x, dtype: _latents(self.network.encode(normalize(x).to(dtype))) * self.scaling, images, device
        )

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images of latents.

        Args:
            z: ``(N, *latent_shape)`` latents, as :meth:`encode` gives them.

        Returns:
            ``(N, C, H, W)`` in the network's dtype on the latents' device, not clamped; differentiable, of any order.
        """
        return self._in_parts(lambda x, dtype: self.network.decode(x.to(dtype) / self.scaling).sample, z)

    def require_latents(self, shape: Shape, name: str) -> "Autoencoder":
        """Refuse latents of another shape than the autoencoder's.

        Args:
            shape: of the latents that a network draws.
            name: of the model, for errors.

        Returns:
            The autoencoder itself.

        Raises:
            InputError: another shape.
        """
        if tuple(shape) != self.latent_shape:
            drawn, made, images = ("x".join(map(str, sides)) for sides in (shape, self.latent_shape, self.image_shape))
            raise InputError(
                f"{name}: its network draws latents of {drawn}, and its autoencoder makes {made} of {images} images: put the "
                "autoencoder in its place that the network was trained with, or correct sample_size in its config.json"
            )
        return self

    def _in_parts(self, function, x, device=None):
        device = device or x.device
        dtype = next(self.network.to(device).parameters()).dtype
        return torch.cat([function(part.to(device), dtype).to(x.device) for part in x.split(TOGETHER)])

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Digest of the weights."""
        return digest(self.network.state_dict())

    @property
    def sha256(self) -> str:
        """Digest of the weights, the network's configuration, the images' shape and the scaling factor."""
        config = {name: value for name, value in self._config().items() if not name.startswith("_")}
        depends = [self.weights_sha256, config, list(self.image_shape), self.scaling]
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _config(self):
        """The network's configuration as JSON values, without the folder that it was read from and its own factor."""
        config = json.loads(self.network.to_json_string()) if hasattr(self.network, "to_json_string") else {}
        return {name: value for name, value in config.items() if name not in ("_name_or_path", "scaling_factor")}

    def num_parameters(self) -> int:
        """Number of parameters, the encoder's and the decoder's."""
        return sum(p.numel() for p in self.network.parameters())

    def rescaled(self, factor: float) -> "Autoencoder":
        """The same network with latents that are divided by a factor.

        Args:
            factor: positive number.

        Returns:
            Autoencoder that shares the network's weights; its ``decode(z / factor)`` is that of ``z`` here.
        """
        return Autoencoder(self.network, self.scaling / factor, self.image_shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and configuration, with the scaling factor, in diffusers' format; ``config.json`` comes last.

        Args:
            folder: made where it is missing.
        """
        folder, network = Path(folder), self.network
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
        write_json(folder / "config.json", {**self._config(), "scaling_factor": self.scaling})


class Pictured:
    """A model that draws pictures, or latents that its autoencoder decodes.

    Attributes:
        shape: of what it draws, ``(C, H, W)``.
        autoencoder: between latents and pictures; None of a model that draws pictures.
    """

    shape: Shape
    autoencoder: Autoencoder | None = None

    @property
    def image_shape(self) -> Shape:
        """Shape of a picture."""
        return tuple(self.shape) if self.autoencoder is None else self.autoencoder.image_shape

    @property
    def image_channels(self) -> int:
        """Channels of the pictures."""
        return self.image_shape[0]

    @property
    def image_size(self) -> int:
        """Side of the (square) pictures in pixels."""
        return self.image_shape[-1]

    @torch.no_grad()
    def images(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures of what the model draws, to be shown or measured.

        Args:
            x: ``(N, *shape)``.

        Returns:
            ``(N, C, H, W)``, decoded and in [-1, 1]; ``x`` itself of a model that draws pictures. Order of differentiability 0.
        """
        return x if self.autoencoder is None else self.autoencoder.decode(x).clamp_(-1, 1)


def require_pixels(model: Pictured, what: str) -> None:
    """Refuse a model that draws latents.

    Args:
        model: the model.
        what: what works on pictures alone, for the error.

    Raises:
        InputError: the model has an autoencoder.
    """
    if model.autoencoder is not None:
        raise InputError(f"{what} takes models of pictures, and this one draws latents of an autoencoder")


def build_autoencoder(
    regularisation: str, image_shape: Shape, channels: tuple[int, ...], latent_channels: int, codes: int = 256
) -> nn.Module:
    """A small autoencoder of diffusers, which halves the side between every two entries of ``channels``.

    Args:
        regularisation: ``kl`` or ``vq``.
        image_shape: ``(C, S, S)`` of the images.
        channels: from the highest to the lowest resolution.
        latent_channels: channels of the latents.
        codes: vectors of the codebook, with ``vq``.

    Returns:
        The network in training mode, its weights drawn from torch's global generator.
    """
    import diffusers

    levels = len(channels)
    own = {"num_vq_embeddings": codes} if regularisation == "vq" else {}
    return getattr(diffusers, KINDS[regularisation])(
        in_channels=image_shape[0],
        out_channels=image_shape[0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_shape[-1],
        mid_block_add_attention=False,
        **own,
    )


def sha256_of(autoencoder: Autoencoder | None) -> str | None:
    """Digest by which two models have one autoencoder, or none.

    Args:
        autoencoder: a model's, or None.

    Returns:
        Its digest, or None.
    """
    return None if autoencoder is None else autoencoder.sha256


def scaling_of(latents: torch.Tensor) -> float:
    """Factor that gives latents the variance 1 over all their numbers (Rombach et al. 2022, appendix G).

    Args:
        latents: ``(N, ...)`` latents of data, as the network gives them.

    Returns:
        1 over their standard deviation about their mean.

    Raises:
        InputError: latents that are all alike or not finite.
    """
    deviation = latents.double().std(correction=0).item()
    if not 0 < deviation < math.inf:
        raise InputError(f"the latents have the standard deviation {deviation:g}: the autoencoder tells no two images apart")
    return 1 / deviation


def autoencoder_part(folder: Path, index: Mapping[str, Any] | None = None) -> str | None:
    """Name of the folder with a pipeline's autoencoder.

    Args:
        folder: the pipeline's.
        index: contents of its ``model_index.json``, where there is one.

    Returns:
        One of :data:`PARTS`, or None for a pipeline without an autoencoder.
    """
    return next((name for name in PARTS if name in (index or {}) or (folder / name).is_dir()), None)


def load_autoencoder(folder: Path, part: str, fetch: Callable[[str], Path]) -> Autoencoder:
    """Load the autoencoder of a folder.

    Args:
        folder: the pipeline's folder, or the autoencoder's own.
        part: folder of the autoencoder in there; empty: the folder itself.
        fetch: as for :func:`advkd.models.weights.load_network`.

    Returns:
        The autoencoder on the CPU, float32.

    Raises:
        InputError: as for :meth:`Autoencoder.from_pretrained`.
    """
    import diffusers

    where = folder / part
    config = read_json(where / "config.json", "autoencoder configuration")
    scaling, size = _require_known(config, where)
    shape = (config.get("in_channels", 3), size, size)
    run = functools.partial(_require_round_trip, shape)
    network = load_network(getattr(diffusers, config["_class_name"]), fetch, part, "autoencoder", torch.float32, run)
    return Autoencoder(network, scaling, shape)


def _require_known(config, where):
    """Scaling factor and side of the images in a configuration; what cannot be used is refused."""
    kind, scaling, size = (config.get(name) for name in ("_class_name", "scaling_factor", "sample_size"))
    if kind not in KINDS.values():
        raise InputError(f"autoencoder {where} is a {kind}; diffusers' {' and '.join(KINDS.values())} are supported")
    require_ordinary(config, f"autoencoder {where}")
    if scaling is None:
        remedy = 'add "scaling_factor" to its config.json, the one that its teacher was trained with (1 for unscaled latents)'
        raise InputError(f"autoencoder {where} has no scaling factor: {remedy}; 'advkd autoencoder train' writes it")
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise InputError(f"autoencoder {where}: scaling_factor must be positive and finite, got {scaling!r}")
    if shifts := [name for name in ("shift_factor", "latents_mean", "latents_std") if config.get(name) is not None]:
        raise InputError(f"autoencoder {where} has a {shifts[0]}: latents that are scaled alone are supported")
    if type(size) is not int or not 8 <= size <= LARGEST_IMAGE:
        limits = f"sample_size must be from 8 to {LARGEST_IMAGE}, the side of its images"
        raise InputError(f"autoencoder {where}: {limits}, got {size!r}")
    return scaling, size


def _fetched(source, files):
    return resolve(source, {}, "autoencoder", ["*.json", "*/*.json", files])


def _require_round_trip(shape, network):
    """Refuse a network, on the meta device, whose images have another shape than those that it takes."""
    latents = _latents(network.encode(torch.empty(1, *shape)))
    if (found := network.decode(latents).sample.shape[1:]) != shape:
        raise InputError(f"it makes images {tuple(found)} of images {shape}")


def _latents(output):
    """Latents in the output of either kind of encoder."""
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents


@torch.no_grad()
def _latent_shape(network, image_shape):
    parameter = next(network.parameters())
    images = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    return tuple(_latents(network.encode(images)).shape[1:])
